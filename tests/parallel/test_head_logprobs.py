"""Log-probabilities fused with the head, and every gradient, against float64; the kernels against their twin."""

import functools
import math

import pytest
import torch

from r3 import ParallelError
from r3.parallel import head_logprobs, head_scores
from r3.parallel.head import passes
from r3.parallel.head.passes import Tempering

H = 24
HEADS = [dict(), dict(bias=True), dict(scale=0.125), dict(softcap=3.0), dict(scale=0.7, softcap=20.0, bias=True)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of a gradient, relative to its norm: as rounding it to its dtype gives.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def given(shape, vocabulary, dtype=torch.float32, *, bias=False, masked=0.3, device="cpu", hidden=H, seed=0):
    """Hidden states, weight and bias that need gradients, labels, and an upstream gradient for each token."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype).requires_grad_()

    labels = torch.randint(0, vocabulary, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < masked] = -100
    upstream = torch.randn(shape, generator=generator)
    inputs = [random(*shape, hidden), random(vocabulary, hidden, scale=0.7), random(vocabulary) if bias else None]
    return inputs, labels.to(device), upstream.to(device)


def reference(inputs, labels, upstream, *, temperature=1.0, scale=1.0, softcap=None):
    """Log-probabilities, entropy, margin and gradients in float64, from all logits."""
    hidden, weight, bias = (None if t is None else t.detach().double().cpu().requires_grad_() for t in inputs)
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logprobs = (logits / temperature).log_softmax(-1)
    mask, labels = labels.cpu() != -100, labels.cpu().clamp(min=0)
    own = logprobs.gather(-1, labels[..., None])[..., 0] * mask
    (own * upstream.cpu()).sum().backward()
    top = logprobs.topk(2).values
    scores = own.detach(), -(logprobs.exp() * logprobs).sum(-1) * mask, (top[..., 0] - top[..., 1]) * mask
    return scores, [None if t is None else t.grad for t in (hidden, weight, bias)], float(logits.detach().abs().max())


def check(inputs, labels, upstream, options, *, rounding=None, chunk_bytes=1 << 30):
    """Scores to what float32 logits allow, gradients to what rounding them to their dtype allows."""
    hidden, weight, bias = inputs
    found = head_scores(hidden, weight, labels, bias=bias, chunk_bytes=chunk_bytes, **options)
    (found.logprobs * upstream).sum().backward()
    expected, gradients, largest = reference(inputs, labels, upstream, **options)
    atol = 1e-6 * (1 + largest / options.get("temperature", 1.0))
    for name, values in zip(found._fields, expected, strict=True):
        mine = getattr(found, name)
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double().cpu(), values.detach(), rtol=1e-5, atol=atol, msg=name)
    for tensor, gradient in zip(inputs, gradients, strict=True):
        if tensor is None:
            continue
        assert tensor.grad.dtype == tensor.dtype
        error = float((tensor.grad.double().cpu() - gradient).norm())
        bound = (rounding or ROUNDING)[tensor.dtype] + atol
        assert error <= bound * float(gradient.norm()) + 1e-12, (tuple(tensor.shape), error, float(gradient.norm()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.1, *(pytest.param(t, marks=pytest.mark.long) for t in (0.7, 1.0)), 2.0])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_scores_and_gradients_are_those_of_all_logits_in_float64(head, temperature, dtype):
    options = {name: value for name, value in head.items() if name != "bias"} | {"temperature": temperature}
    for vocabulary, shape in ((7, (1, 1)), (1009, (3, 11)), (64, (2, 150))):
        inputs, labels, upstream = given(shape, vocabulary, DTYPES[dtype], bias="bias" in head)
        check(inputs, labels, upstream, options, chunk_bytes=4 * vocabulary * 5)


@pytest.mark.parametrize("labelled", [(), (0,), (4,), (0, 1, 2, 3, 4)])
def test_any_tokens_may_have_labels_and_all_gradients_are_there(labelled):
    (hidden, weight, bias), labels, upstream = given((1, 5), 50, bias=True, masked=0.0)
    labels[0, [place for place in range(5) if place not in labelled]] = -100
    check((hidden, weight, bias), labels, upstream, {})
    rest = [place for place in range(5) if place not in labelled]
    assert not hidden.grad[0, rest].any()
    assert bool(weight.grad.any()) == bool(labelled)


def test_chunks_change_nothing_but_the_order_of_the_sum():
    inputs, labels, upstream = given((1, 300), 101, masked=0.0)
    found = {}
    for tokens in (1, 7, 128, 300, 5000):
        for tensor in inputs[:2]:
            tensor.grad = None
        logprobs = head_logprobs(*inputs[:2], labels, temperature=0.8, chunk_bytes=4 * 101 * tokens)
        (logprobs * upstream).sum().backward()
        found[tokens] = [logprobs.detach(), *(tensor.grad for tensor in inputs[:2])]
    for tokens, parts in found.items():
        for part, whole in zip(parts, found[5000], strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5, msg=f"{tokens} tokens a chunk")


def test_nothing_as_large_as_the_logits_is_kept_for_the_backward_pass():
    inputs, labels, _ = given((1, 400), 1000, masked=0.0)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head_logprobs(*inputs[:2], labels, chunk_bytes=4 * 1000 * 10)
    assert 0 < sum(kept.values()) < 4 * 400 * 1000 / 5


def test_only_gradients_that_are_needed_are_computed():
    (hidden, weight, _), labels, _ = given((2, 6), 40)
    frozen = head_logprobs(hidden, weight.detach(), labels)
    frozen.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert not head_logprobs(hidden, weight, labels).requires_grad
    scores = head_scores(hidden, weight, labels)
    assert scores.logprobs.requires_grad
    assert not scores.entropy.requires_grad
    assert not scores.margin.requires_grad


def test_hidden_states_that_are_not_finite_show_in_their_own_tokens_alone():
    (hidden, weight, _), labels, _ = given((1, 4), 40, masked=0.0)
    with torch.no_grad():
        hidden[0, 2, 3] = math.nan
    assert head_logprobs(hidden, weight, labels).isnan().tolist() == [[False, False, True, False]]


def test_a_vocabulary_of_one_token_is_certain():
    (hidden, weight, _), labels, _ = given((1, 3), 1, masked=0.0)
    scores = head_scores(hidden, weight, labels)
    assert scores.logprobs.tolist() == [[0.0] * 3]
    assert scores.margin.tolist() == [[math.inf] * 3]


def test_autocast_does_not_lower_the_precision():
    (hidden, weight, _), labels, _ = given((2, 6), 40)
    with torch.autocast("cpu", torch.bfloat16):
        found = head_logprobs(hidden, weight, labels)
    assert torch.equal(found, head_logprobs(hidden, weight, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, y: (h, w, y.int()), r"labels: expected torch\.int64, got torch\.int32"),
        (lambda h, w, y: (h, w, y + 40), r"token ids below 40, the head's vocabulary, got \d\d"),
        (lambda h, w, y: (h, w, y - 1000), r"got -\d+"),
        (lambda h, w, y: (h, w[:, :5], y), r"weight \[V, H\].*\(40, 5\)"),
        (lambda h, w, y: (h, w, y[:, :3]), r"labels \[\.\.\.\].*\(2, 3\)"),
        (lambda h, w, y: (h.long(), w, y), r"floating hidden states"),
    ],
)
def test_wrong_input_is_refused(change, message):
    (hidden, weight, _), labels, _ = given((2, 6), 40, masked=0.0)
    with pytest.raises(ParallelError, match=message):
        head_logprobs(*change(hidden, weight, labels))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_above_0_is_refused(temperature):
    (hidden, weight, _), labels, _ = given((2, 6), 40)
    with pytest.raises(ParallelError, match="temperature: expected a number above 0"):
        head_logprobs(hidden, weight, labels, temperature=temperature)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [1, 7, 4096, 10007])
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
def test_kernels_do_what_their_twin_does(head, vocabulary, temperature):
    from r3.parallel.head import passes_cuda

    generator = torch.Generator().manual_seed(0)
    random = functools.partial(torch.randn, generator=generator)
    tempering = Tempering.of(temperature=temperature, scale=head.get("scale", 1.0), softcap=head.get("softcap"))
    x, upstream = (random(9, vocabulary) * 5).cuda(), random(9).cuda()
    bias = random(vocabulary).cuda() if "bias" in head else None
    labels = torch.randint(0, vocabulary, (9,), generator=generator).cuda()
    exact = passes.statistics(x.double(), bias, labels, tempering, details=True)
    atol = 1e-6 * (1 + float(tempering(x).abs().max()))
    for details in (False, True):
        found = passes_cuda.statistics(x, bias, labels, tempering, details=details)
        for name, mine in found._asdict().items():
            if mine is not None:
                torch.testing.assert_close(mine.double(), getattr(exact, name), rtol=1e-5, atol=atol, msg=name)
    slope = abs(tempering.post) * (tempering.pre or 1.0)
    for dtype, rtol in ((torch.float32, 1e-4), (torch.bfloat16, 2**-7)):
        expected = passes.logits_gradient(
            x.double(), bias, labels, exact.normaliser, upstream.double(), tempering, torch.empty_like(x).double()
        )
        mine = passes_cuda.logits_gradient(
            x, bias, labels, found.normaliser, upstream, tempering, torch.empty_like(x, dtype=dtype)
        )
        torch.testing.assert_close(mine.double(), expected, rtol=rtol, atol=10 * atol * slope)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_scores_and_gradients_on_a_gpu_are_those_of_all_logits_in_float64(head, temperature, dtype):
    options = {name: value for name, value in head.items() if name != "bias"} | {"temperature": temperature}
    # The gradient of the logits is rounded to bfloat16, and then that of hidden states, weight and bias.
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
    for vocabulary, shape in ((7, (1, 1)), (10007, (3, 111)), (4096, (2, 150))):
        inputs, labels, upstream = given(
            shape, vocabulary, DTYPES[dtype], bias="bias" in head, device="cuda", hidden=64
        )
        check(inputs, labels, upstream, options, rounding=rounding, chunk_bytes=4 * vocabulary * 140)


@pytest.mark.gpu
def test_a_logit_that_is_not_finite_shows_on_a_gpu():
    (hidden, weight, _), labels, _ = given((1, 4), 5000, torch.bfloat16, masked=0.0, device="cuda")
    with torch.no_grad():
        hidden[0, 2, 3] = math.nan
    assert head_logprobs(hidden, weight, labels).isnan().tolist() == [[False, False, True, False]]
