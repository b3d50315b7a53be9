"""Log-probabilities over the ids that each token was sampled from, and every gradient, against float64."""

import math

import pytest
import torch
from test_head_logprobs import given

from r3 import ParallelError
from r3.capture import SamplingMask
from r3.parallel import head_logprobs, head_scores

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def masked(labels, vocabulary, *, share=0.3, without=0.2, seed=0):
    """Random sets with their label in them: all kinds, from one id to the whole vocabulary, and tokens without one.

    Returns bool `[..., V]` of what each token is scored over, and the mask.
    """
    of = torch.Generator().manual_seed(seed)
    kept = torch.rand(*labels.shape, vocabulary, generator=of) < share
    flat = kept.view(-1, vocabulary)
    flat[::5] = False  # one id
    flat[3::7] = True
    kept.scatter_(-1, labels.cpu().clamp(min=0)[..., None], True)
    none = torch.rand(labels.shape, generator=of) < without
    sets = kept & ~none[..., None]
    mask = SamplingMask(sets.sum(-1), sets.nonzero()[:, -1].int()).to(labels.device)
    return kept | none[..., None], mask


def reference(inputs, labels, upstream, kept, *, temperature=1.0, scale=1.0, softcap=None):
    hidden, weight, bias = (None if t is None else t.detach().double().cpu().requires_grad_() for t in inputs)
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(~kept, -math.inf) / temperature
    logprobs = logits.log_softmax(-1)
    here, labels = labels.cpu() != -100, labels.cpu().clamp(min=0)
    own = torch.where(here, logprobs.gather(-1, labels[..., None])[..., 0], 0)
    (own * upstream.cpu()).sum().backward()
    entropy = -(logprobs.exp() * logprobs.masked_fill(~kept, 0)).sum(-1)
    top = logprobs.topk(2).values
    scores = own, torch.where(here, entropy, 0), torch.where(here, top[..., 0] - top[..., 1], 0)
    return [each.detach() for each in scores], [None if t is None else t.grad for t in (hidden, weight, bias)]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", [dict(), dict(bias=True), dict(scale=0.7, softcap=4.0, bias=True)], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_scores_and_gradients_are_those_over_the_sets_in_float64(head, temperature, dtype, device):
    options = {name: value for name, value in head.items() if name != "bias"} | {"temperature": temperature}
    for vocabulary, shape, without in ((7, (1, 1), 0.0), (301, (3, 11), 0.2), (64, (2, 40), 0.0), (50, (2, 9), 1.0)):
        inputs, labels, upstream = given(shape, vocabulary, dtype, bias="bias" in head, device=device)
        kept, mask = masked(labels, vocabulary, without=without)
        hidden, weight, bias = inputs
        found = head_scores(
            hidden, weight, labels, bias=bias, sampling_mask=mask, chunk_bytes=4 * vocabulary * 4, **options
        )
        (found.logprobs * upstream).sum().backward()
        scores, gradients = reference(inputs, labels, upstream, kept, **options)
        for mine, theirs in zip(found, scores, strict=True):
            torch.testing.assert_close(mine.double().cpu(), theirs, rtol=1e-5, atol=2e-5)
        for tensor, gradient in zip(inputs, gradients, strict=True):
            if tensor is not None:
                error = float((tensor.grad.double().cpu() - gradient).norm())
                assert error <= (ROUNDING[dtype] + 2e-5) * float(gradient.norm()) + 1e-12


@pytest.mark.parametrize("device", DEVICES)
def test_the_only_id_of_a_set_is_certain_to_the_last_bit_and_teaches_nothing(device):
    (hidden, weight, _), labels, upstream = given((2, 30), 200, masked=0.0, device=device)
    mask = SamplingMask(torch.ones(2, 30, dtype=torch.int64, device=device), labels.flatten().int())
    logprobs = head_logprobs(hidden, weight, labels, temperature=0.3, sampling_mask=mask)
    (logprobs * upstream).sum().backward()
    assert not logprobs.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_two_likeliest_ids_of_a_set_are_no_margin_apart():
    (hidden, weight, _), labels, _ = given((1, 4), 20, masked=0.0)
    with torch.no_grad():
        weight[1:4] = weight[0]
        hidden.copy_(weight[0] * 3)  # so that these are the likeliest
    sets = [sorted({0, 1, 2, label}) for label in labels[0].tolist()]
    mask = SamplingMask.of([*map(len, sets)], [token for ids in sets for token in ids], labels[0].tolist())
    scores = head_scores(hidden, weight, labels, sampling_mask=mask.take(mask.positions()[None]))
    assert scores.margin.tolist() == [[0.0] * 4]


def test_the_whole_vocabulary_as_a_set_is_no_set():
    (hidden, weight, _), labels, _ = given((2, 9), 40)
    everything = SamplingMask(torch.full((2, 9), 40), torch.arange(40, dtype=torch.int32).repeat(18))
    torch.testing.assert_close(
        head_logprobs(hidden, weight, labels, sampling_mask=everything), head_logprobs(hidden, weight, labels)
    )


def test_sets_that_are_not_of_their_labels_are_refused():
    (hidden, weight, _), labels, _ = given((1, 6), 40, masked=0.0)
    _, mask = masked(labels, 40, without=0.0)
    shifted = mask.take(mask.positions().roll(1, 1))
    with pytest.raises(ParallelError, match="labels that are not: is it shifted"):
        head_logprobs(hidden, weight, labels, sampling_mask=shifted)
    with pytest.raises(ParallelError, match=r"expected \(1, 6\) on cpu, as the labels, got \(1, 5\)"):
        head_logprobs(hidden, weight, labels, sampling_mask=mask.select([0]).take(mask.positions()[:, :5]))
    beyond = SamplingMask(mask.sizes, torch.where(mask.token_ids == labels[0, 0], mask.token_ids, 40).int())
    with pytest.raises(ParallelError, match=r"expected ids of the vocabulary of 40"):
        head_logprobs(hidden, weight, labels, sampling_mask=beyond)
