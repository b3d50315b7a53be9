"""What vLLM returns is checked row by row; degenerate capture stops the run and says why."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import EXPERTS, LAYERS, TOP_K, random_ids

from r3 import CaptureError, RolloutRouting, RoutingError
from r3.capture import Rollouts, collect
from r3.routing import RoutingSpec

SPEC = RoutingSpec(layer_ids=(0, 1, 2), num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K)
PROMPT, GENERATED = 4, 3


def rows(seed: int = 0) -> np.ndarray:
    return random_ids(1, PROMPT + GENERATED - 1, seed=seed)[0].numpy().astype(np.uint8)


def output(*arrays, **changes) -> SimpleNamespace:
    """A `RequestOutput` as vLLM makes it, with a completion for each array."""
    completions = [
        SimpleNamespace(
            **dict(
                index=i,
                token_ids=[5, 6, 7],
                logprobs=[{t: SimpleNamespace(logprob=-0.1 * t)} for t in (5, 6, 7)],
                routed_experts=array,
                finish_reason="length",
            )
            | changes
        )
        for i, array in enumerate(arrays)
    ]
    return SimpleNamespace(prompt_token_ids=[1, 2, 3, 4], outputs=completions)


def test_rows_tokens_and_logprobs_line_up_in_the_batch():
    arrays = rows(0), rows(1)
    batch = collect([output(*arrays)], SPEC, weight_version=3).batch(pad_token_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]] * 2
    assert batch.response_mask.tolist() == [[False] * 4 + [True] * 3] * 2
    torch.testing.assert_close(batch.logprobs[0], torch.tensor([0, 0, 0, 0, -0.5, -0.6, -0.7]))
    assert batch.routing.valid.tolist() == [[True] * 6 + [False]] * 2
    assert np.array_equal(batch.routing.expert_ids[1, :6].numpy(), arrays[1])
    assert batch.routing.weight_version == 3
    assert batch.select(slice(1, 2)).routing.shape == (1, 7, LAYERS, TOP_K)


def test_rows_are_not_checked_again_when_they_are_collated(monkeypatch):
    found = collect([output(rows(0), rows(1))], SPEC)
    monkeypatch.setattr("r3.routing.types.check_rows", lambda *args: pytest.fail("checked again"))
    assert found.batch(pad_token_id=0).routing.rows_valid == 12
    assert found.batch(pad_token_id=0).to("cpu").select(slice(0, 1)).routing.rows_valid == 6


@pytest.mark.gpu
def test_a_page_locked_batch_goes_to_a_gpu_whole():
    batch = collect([output(rows(0), rows(1))], SPEC).batch(pad_token_id=0)
    locked = collect([output(rows(0), rows(1))], SPEC).batch(pad_token_id=0, pin_memory=True)
    for moved in (locked, batch.pin_memory()):
        assert moved.input_ids.is_pinned()
        assert moved.routing.expert_ids.is_pinned()
        there = moved.to("cuda", non_blocking=True).to("cpu")
        assert torch.equal(there.input_ids, batch.input_ids)
        assert torch.equal(there.logprobs, batch.logprobs)
        assert torch.equal(there.routing.expert_ids, batch.routing.expert_ids)
        assert torch.equal(there.routing.valid, batch.routing.valid)


def test_routing_that_belongs_to_no_rollout_cannot_be_batched():
    with_rows = collect([output(rows(0), rows(1))], SPEC).items
    bare = replace(with_rows[0], routing=None)
    with pytest.raises(CaptureError, match=r"routing: expected \[1, 7, 3, 2\], got \[1, 4, 3, 2\]"):
        replace(with_rows[1], routing=with_rows[1].routing.shard(0, 2))
    for items, spec, message in (
        (
            [with_rows[0], bare, with_rows[1]],
            SPEC,
            r"1 of 3 rollouts(?s:.*)rollout 1: expected \(1, 7, 3, 2\), got none",
        ),
        ([bare, bare], SPEC, "2 of 2 rollouts"),
        (with_rows, None, r"rollout 0: expected none, got \(1, 7, 3, 2\)"),
    ):
        with pytest.raises(CaptureError, match=message):
            Rollouts(items, spec).batch(pad_token_id=0)
    assert Rollouts([bare, bare], None).batch(pad_token_id=0).routing is None

    live = replace(bare, routing=RolloutRouting.without_rows(SPEC, len(bare)))
    batch = Rollouts([with_rows[0], live, with_rows[1]], SPEC).batch(pad_token_id=0)
    assert batch.routing.valid.sum(1).tolist() == [6, 0, 6]
    assert np.array_equal(batch.select(slice(2, 3)).routing.expert_ids[0, :6].numpy(), rows(1))


def test_the_parts_of_a_batch_have_the_same_rows():
    batch = collect([output(rows(0), rows(1), rows(2))], SPEC).batch(pad_token_id=0)
    for name in ("attention_mask", "response_mask", "logprobs"):
        with pytest.raises(CaptureError, match=rf"(?s)\[B, S\] = \[3, 7\].*{name}: \[2, 7\]"):
            replace(batch, **{name: getattr(batch, name)[:2]})
    with pytest.raises(CaptureError, match=r"routing: \[2, 7, 3, 2\]"):
        replace(batch, routing=batch.routing.select(slice(0, 2)))
    with pytest.raises(RoutingError, match="a slice or indices"):
        batch.routing.select(1)


def test_dense_layers_lose_their_column():
    spec = RoutingSpec(layer_ids=(1, 2), num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K)
    array = rows()
    array[:, 0] = 0
    assert np.array_equal(collect([output(array)], spec).items[0].routing.expert_ids[0, :-1].numpy(), array[:, 1:])
    with pytest.raises(CaptureError, match=r"layers \[0\] are routed in the engine, but have no router"):
        collect([output(rows())], spec)


def test_layers_that_choose_by_token_id_are_reported_and_dropped():
    spec = RoutingSpec(layer_ids=(1, 2), num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, table_layers=(0,))
    array = rows()
    assert np.array_equal(collect([output(array)], spec).items[0].routing.expert_ids[0, :-1].numpy(), array[:, 1:])


def test_uint16_ids_are_kept():
    spec = RoutingSpec(layer_ids=(0, 1, 2), num_layers=LAYERS, num_experts=40000, top_k=TOP_K)
    array = rows().astype(np.uint16)
    array[0, 0, 0] = 39999
    assert collect([output(array)], spec).items[0].routing.expert_ids[0, 0, 0, 0] == 39999


def broken(change) -> np.ndarray:
    array = rows()
    change(array)
    return array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (None, "enable_return_routed_experts=True"),
        (rows()[:-1], r"= \(6, 3, 2\), got uint8 \(5, 3, 2\)"),
        (np.concatenate([rows(), rows()[:1]]), r"got uint8 \(7, 3, 2\)"),
        (rows()[:, :2], r"got uint8 \(6, 2, 2\)"),
        (rows().astype(np.float32), "got float32"),
        (broken(lambda a: a.fill(0)), r"layers \[0, 1, 2\] were never captured.*enforce_eager"),
        (broken(lambda a: a[:, 1].fill(0)), r"layers \[1\] were never captured"),
        (
            broken(lambda a: a[3, 2].fill(5)),
            r"rows of routing are not 2 distinct.*position 3, decoder layer 2: \[5, 5\]",
        ),
        (broken(lambda a: a[2, 1, :1].fill(EXPERTS)), r"distinct expert ids in \[0, 8\).*position 2, decoder layer 1"),
    ],
)
def test_degenerate_capture_names_the_sample_and_the_cause(array, message):
    with pytest.raises(CaptureError, match=rf"(?s)1 of 2 samples:.*sample 1 \(prompt 1, completion 0\).*{message}"):
        collect([output(rows()), output(array)], SPEC)


def test_missing_logprobs_are_refused_and_nothing_is_not_a_batch():
    with pytest.raises(CaptureError, match=r"SamplingParams\(logprobs=0\)"):
        collect([output(rows(), logprobs=None)], SPEC)
    with pytest.raises(CaptureError, match="got none"):
        collect([], SPEC)


def test_versions_that_the_engine_tells_are_those_of_the_rows():
    def told(*spans):
        return [SimpleNamespace(version=version, start=start, end=None) for version, start in spans]

    (spanning,) = collect([output(rows(), weight_versions=told(("7", 0), ("8", 2)))], SPEC)
    assert spanning.weight_versions == (7, 8)
    assert spanning.row_versions.tolist() == [7, 7, 7, 7, 7, 8, -1]
    (unlabelled,) = collect([output(rows(), weight_versions=told(("default", 0)))], SPEC, weight_version=7)
    assert unlabelled.weight_versions == (7,)
    with pytest.raises(CaptureError, match="expected 6, but the engine says that it sampled with 7 from token 0"):
        collect([output(rows(), weight_versions=told(("7", 0)))], SPEC, weight_version=6)


class Arraylike:
    """What numpy reads, and no array."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self._array


READ = {
    "list": lambda array: array.tolist(),
    "tuples": lambda array: tuple(tuple(map(tuple, row)) for row in array.tolist()),
    "big-endian": lambda array: array.astype(">i4"),
    "array-like": Arraylike,
    **{
        str(dtype): lambda array, dtype=dtype: torch.from_numpy(array.astype(np.int64)).to(dtype)
        for dtype in (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)
    },
}


@pytest.mark.parametrize("kind", READ)
def test_any_array_of_integers_is_read(kind):
    expected = collect([output(rows())], SPEC).items[0].routing
    found = collect([output(READ[kind](rows()))], SPEC).items[0].routing
    assert torch.equal(found.expert_ids, expected.expert_ids)
    assert torch.equal(found.valid, expected.valid)


class Hostile:
    """Whatever it is asked for, it raises."""

    def __getattr__(self, name: str):
        raise RuntimeError(f"no {name}")


WRONG = [
    *(None, True, 7, -1, 1.5, float("nan"), "abc", b"abc", "17", {}, {"a": 1}, {5}, object(), Hostile(), range(-2, 1)),
    *([], [None], ["a"], [1.5], [-1], [[1], [2, 3]], [2**70], [{}], [{5: None}] * 3, [{5: SimpleNamespace()}] * 3),
    *(np.zeros(3), np.array(["a"]), np.zeros((6, LAYERS, TOP_K)), np.full((6, LAYERS, TOP_K), 2**40)),
    *(rows().astype(object), [[[True, False]] * LAYERS] * 6, torch.eye(6).to_sparse(), torch.ones(3).requires_grad_()),
    *(torch.zeros(6, LAYERS, TOP_K, dtype=torch.bool), torch.zeros(6, LAYERS, TOP_K, device="meta")),
]
FIELDS = ("token_ids", "logprobs", "routed_experts", "finish_reason", "weight_versions")


def is_good(rollout) -> bool:
    return (
        rollout.token_ids == [5, 6, 7]
        and torch.equal(rollout.routing.expert_ids[0, :6], torch.from_numpy(rows()))
        and rollout.routing.rows_valid == 6
    )


@pytest.mark.parametrize("field", [*FIELDS, "prompt_token_ids", "outputs", "completion"])
def test_what_is_wrong_with_one_sample_costs_no_other(field):
    for value in WRONG:
        bad = output(rows(), rows(), rows())
        if field in FIELDS:
            setattr(bad.outputs[1], field, value)
        elif field == "completion":
            bad.outputs[1] = value
        else:
            setattr(bad, field, value)
        kept = collect([output(rows()), bad, output(rows())], SPEC, on_error="skip")
        good = [rollout for rollout in kept if is_good(rollout)]
        assert len(good) >= (2 if field in ("prompt_token_ids", "outputs") else 4), value
        assert (good[0].prompt_index, good[-1].prompt_index) == (0, 2), value
        # What came through is whole: it can be used like any other.
        assert kept.batch(0).routing.shape[0] == len(kept), value
        assert all(problem.startswith(f"sample {n} (prompt 1") for n, problem in kept.failed.items()), value
        if kept.failed:
            with pytest.raises(CaptureError, match=f"sample {next(iter(kept.failed))} "):
                collect([output(rows()), bad], SPEC)


@pytest.mark.parametrize(
    "value", [[-0.6], [], [-0.6, -0.7], -1e39, -(10**310), math.nan, -math.inf, 0.01, True, None, "-0.6"]
)
@pytest.mark.parametrize("flat", [False, True])
def test_a_log_probability_that_is_no_number_of_float32_costs_its_sample_alone(value, flat):
    bad, each = output(rows()), [-0.5, value, -0.7]
    for entry, logprob in zip(bad.outputs[0].logprobs, each, strict=True):
        (only,) = entry.values()
        only.logprob = logprob
    if flat:
        from vllm.logprobs import FlatLogprobs

        bad.outputs[0].logprobs = FlatLogprobs([0, 1, 2], [1, 2, 3], [5, 6, 7], each, [1] * 3, [None] * 3)
    kept = collect([output(rows()), bad], SPEC, on_error="skip")
    assert len(kept) == 1
    assert list(kept.failed) == [1]
    assert "sampled token 1: expected a finite log-probability" in kept.failed[1]


def test_routing_that_is_not_wanted_is_not_read():
    found = collect([output("no array", 17)], None)
    assert [rollout.routing for rollout in found] == [None, None]


def test_numbers_of_numpy_are_versions_and_starts():
    (found,) = collect([output(rows()[1:])], SPEC, weight_version=np.int64(3), prompt_start=np.int32(1))
    assert (found.weight_versions, found.routing.rows_valid) == ((3,), 5)
    with pytest.raises(CaptureError, match=r"sample 0 .*prompt_start: expected 0 or more, got -1"):
        collect([output(rows())], SPEC, prompt_start=-1)
