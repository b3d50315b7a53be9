"""Selection against `torch.topk`, and against `torch.gather` in double precision: values, ids and gradients."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from r3.errors import ReplayError
from r3.replay.topk import margin, search_rows, select, with_live_rows

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [torch.uint8, torch.int16, torch.int32, torch.int64]
SHAPES = [((7,), 8, 2), ((65,), 100, 100), ((33,), 13, 1), ((2, 5), 60, 6), ((1,), 1, 1)]


def random_ids(leading: tuple[int, ...], experts: int, slots: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """`[..., K]`, distinct within a row: the second of three layers, as a column of `[..., L, K]`."""
    ids = torch.rand(*leading, 3, experts).argsort(-1)[..., :slots]
    return ids.to(dtype)[..., 1, :]


def result(choose, scores: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Values, indices and the gradient of the scores."""
    leaf = scores.detach().clone().requires_grad_()
    values, indices = choose(leaf)
    return values.detach(), indices, *torch.autograd.grad(values, leaf, direction)


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("leading", "experts", "slots"), SHAPES)
def test_own_ids_give_what_topk_gives(leading, experts, slots, dtype):
    torch.manual_seed(0)
    scores = torch.randn(*leading, experts).to(dtype)
    own = scores.topk(slots).indices
    direction = torch.randn(own.shape).to(dtype)
    live = result(lambda s: s.topk(slots), scores, direction)
    assert_same(result(lambda s: select(s, own.to(torch.uint8)), scores, direction), live)


@pytest.mark.parametrize("ids_dtype", INTEGERS)
@pytest.mark.parametrize(("leading", "experts", "slots"), SHAPES)
def test_foreign_ids_equal_gather_in_double_precision(leading, experts, slots, ids_dtype):
    torch.manual_seed(0)
    scores, ids = torch.randn(*leading, experts), random_ids(leading, experts, slots, ids_dtype)
    direction = torch.randn(ids.shape)
    values, indices, gradient = result(lambda s: select(s, ids), scores, direction)
    wide = ids.long()
    truth = result(lambda s: (s.gather(-1, wide), wide), scores.double(), direction.double())
    assert torch.equal(values.double(), truth[0])
    assert torch.equal(indices, wide)
    assert indices.dtype == torch.int64
    assert indices.is_contiguous()
    assert torch.equal(gradient.double(), truth[2])


def test_gradient_of_a_function_of_the_values():
    torch.manual_seed(0)
    ids = random_ids((5,), 6, 3, torch.uint8)

    def weights(scores: torch.Tensor) -> torch.Tensor:
        values, _ = select(scores.softmax(-1), ids)
        return values / values.sum(-1, keepdim=True)

    assert torch.autograd.gradcheck(weights, torch.randn(5, 6, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    scores, ids = torch.randn(5, 6), random_ids((5,), 6, 2)
    with context():
        values, indices = select(scores, ids)
    assert torch.equal(values, scores.gather(-1, ids))
    assert torch.equal(indices, ids)
    assert not values.requires_grad
    assert not select(scores, ids)[0].requires_grad


def test_no_rows():
    scores = torch.randn(0, 6, requires_grad=True)
    values, indices = select(scores, torch.zeros(0, 2, dtype=torch.uint8))
    values.sum().backward()
    assert values.shape == indices.shape == (0, 2)
    assert scores.grad is not None
    assert scores.grad.shape == (0, 6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    torch.manual_seed(0)
    scores, ids = torch.randn(5, 6), random_ids((5,), 6, 2, torch.uint8)
    direction = torch.randn(5, 2)
    plain = result(lambda s: select(s, ids), scores, direction)
    leaf = scores.clone().requires_grad_()
    values, indices = checkpoint(select, leaf, ids, use_reentrant=reentrant)
    values.backward(direction)
    assert leaf.grad is not None
    assert_same((values.detach(), indices, leaf.grad), plain)


def test_compiles_without_a_graph_break():
    torch.manual_seed(0)
    scores, direction = torch.randn(5, 6), torch.randn(5, 2)
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # new ids take effect
        ids = random_ids((5,), 6, 2, torch.uint8)
        assert_same(
            result(lambda s, ids=ids: compiled(s, ids), scores, direction),
            result(lambda s, ids=ids: select(s, ids), scores, direction),
        )


@pytest.mark.parametrize(
    ("scores", "ids"),
    [
        (torch.zeros(5, 6), torch.zeros(4, 2, dtype=torch.uint8)),
        (torch.zeros(5, 6), torch.zeros(5, 7, dtype=torch.uint8)),
        (torch.zeros(5, 6), torch.zeros(5, 0, dtype=torch.uint8)),
        (torch.zeros(2, 3, 6), torch.zeros(6, 2, dtype=torch.uint8)),
        (torch.zeros(5, 6), torch.zeros(5, 2, dtype=torch.bool)),
        (torch.zeros(5, 6), torch.zeros(5, 2)),
        (torch.zeros(5, 6, dtype=torch.int64), torch.zeros(5, 2, dtype=torch.uint8)),
        (torch.zeros(5, 6, device="meta"), torch.zeros(5, 2, dtype=torch.uint8)),
    ],
    ids=["rows", "more slots than experts", "no slots", "leading dimensions", "bool", "float ids", "scores", "device"],
)
def test_what_does_not_agree_is_refused(scores, ids):
    with pytest.raises(ReplayError, match="expected floating scores") as error:
        select(scores, ids)
    assert f"{ids.dtype} {tuple(ids.shape)}" in str(error.value)


def test_the_scores_of_one_token():
    values, indices = select(torch.tensor([0.5, 0.25, 1.0]), torch.tensor([2, 1], dtype=torch.uint8))
    assert (values.tolist(), indices.tolist()) == ([1.0, 0.25], [2, 1])
    with pytest.raises(ReplayError, match="expected floating scores"):
        select(torch.tensor([0.5, 0.25]), torch.tensor(1))


def test_margins_of_low_precision_are_float32():
    """In bfloat16 itself the difference would be 256."""
    scores = torch.tensor([[256.0, 0.25, 0.0], [3.0, 2.0, 1.0]], dtype=torch.bfloat16)
    found = margin(scores, 1, search(2))
    assert found.dtype == torch.float32
    assert found.tolist() == [255.75, 1.0]
    every = margin(scores, 3, search(4))
    assert every.dtype == torch.float32
    assert every.tolist() == [torch.inf, torch.inf]


def test_an_id_out_of_range_is_refused():
    with pytest.raises(RuntimeError, match="out of bounds"):
        select(torch.zeros(5, 6), torch.full((5, 1), 6, dtype=torch.uint8))


def search(k: int):
    return lambda scores: scores.topk(k)


def test_live_rows_take_the_live_choice_and_the_others_the_given():
    torch.manual_seed(0)
    scores, ids, rows = torch.randn(9, 8), random_ids((9,), 8, 2, torch.uint8), torch.tensor([1, 4, 8])
    before = ids.clone()
    merged = with_live_rows(ids, scores, rows, search(2))
    live = scores.topk(2).indices
    expected = torch.stack([live[t] if t in rows else ids[t].long() for t in range(9)])
    assert_same((merged, ids), (expected, before))
    assert_same((with_live_rows(ids.long(), scores.view(3, 3, 8), rows, search(2)),), (expected,))


def test_live_rows_of_wide_ids_leave_them_as_they_were():
    scores, ids = torch.randn(4, 8), torch.zeros(4, 2, dtype=torch.int64)
    assert with_live_rows(ids, scores, torch.tensor([2]), search(2))[2].any()
    assert not ids.any()


@pytest.mark.parametrize("leading", [(9,), (9, 4)])
def test_a_search_in_some_rows_is_the_live_one_there(leading):
    torch.manual_seed(0)
    scores, rows = torch.randn(*leading, 8, requires_grad=True), torch.tensor([0, 5])
    values, indices = search_rows(scores, 3, rows, search(3))
    live = scores.detach().topk(3)
    assert_same((values[rows], indices[rows]), (live.values[rows], live.indices[rows]))
    assert values.shape == indices.shape == (*leading, 3)
    assert not values.requires_grad


def test_a_search_in_no_row_does_not_run():
    def never(scores: torch.Tensor):
        raise AssertionError

    values, indices = search_rows(torch.randn(9, 4, 8), 3, None, never)
    assert values.shape == indices.shape == (9, 4, 3)
    assert indices.max() < 8


RAGGED = [*SHAPES, ((16385,), 128, 8), ((3,), 5000, 3), ((31,), 513, 10), ((2, 1000), 60, 4)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("leading", "experts", "slots"), RAGGED)
def test_a_gpu_gives_what_a_cpu_gives(leading, experts, slots, dtype):
    torch.manual_seed(0)
    scores, ids = torch.randn(*leading, experts).to(dtype), random_ids(leading, experts, slots, torch.int16)
    layers = torch.stack([ids, ids, ids], -2).cuda()
    direction = torch.randn(ids.shape).to(dtype)
    found = result(lambda s: select(s, layers[..., 1, :]), scores.cuda(), direction.cuda())
    assert_same(tuple(t.cpu() for t in found), result(lambda s: select(s, ids), scores, direction))


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [60, 128, 256, 512])
def test_a_gpu_searches_a_row_alone_as_among_others(experts):
    """Also among equal scores, of which bf16 has many."""
    torch.manual_seed(0)
    scores, rows = torch.randn(16384, experts, device="cuda").bfloat16(), torch.arange(0, 16384, 100, device="cuda")
    for ordered in (True, False):
        live = scores.topk(8, sorted=ordered)
        values, indices = search_rows(scores, 8, rows, lambda s, ordered=ordered: s.topk(8, sorted=ordered))
        assert_same((values[rows], indices[rows]), (live.values[rows], live.indices[rows]))
