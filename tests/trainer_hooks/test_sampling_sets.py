"""Logits over the ids that tokens were sampled from, for trainers that make log-probabilities of logits themselves."""

from types import SimpleNamespace

import pytest
import torch
from models import tiny_moe, tokens

import r3
from r3.capture import SamplingMask
from trainer_hooks.sampling_sets import logits_over_sets, logprobs_asked, of_sampled_tokens, without_bound
from trainer_hooks.support import require_supported

RESPONSE = 5  # the last tokens of each row, which were sampled


def sets_of(ids: torch.Tensor, vocabulary: int) -> tuple[SamplingMask, torch.Tensor]:
    """Random sets of the last tokens, the first of which alone in its own; and bool `[B, S, V]`, what they leave."""
    left = torch.rand(*ids.shape, vocabulary, generator=torch.Generator().manual_seed(0)) < 0.1
    left[:, -RESPONSE] = False
    left.scatter_(2, ids[..., None], True)
    left[:, :-RESPONSE] = False
    mask = SamplingMask(left.sum(2), left.nonzero()[:, 2].int())
    left[:, :-RESPONSE] = True
    return mask, left


def scores(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropy, as trainers make them of logits: by the product of both."""
    logits = logits / temperature
    logprobs = logits.log_softmax(-1)
    entropy = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
    return logprobs.gather(-1, labels[..., None])[..., 0], entropy


@pytest.mark.parametrize("keep", [None, RESPONSE + 1])
def test_logprobs_entropy_and_gradients_are_those_over_the_sets(keep):
    model, ids = tiny_moe().double().eval(), tokens()
    model.set_experts_implementation("eager")
    mask, left = sets_of(ids, model.config.vocab_size)
    more = {} if keep is None else {"logits_to_keep": keep}

    def run(cut: bool) -> list[torch.Tensor]:
        model.zero_grad()
        with logits_over_sets(model, mask if cut else None):
            logits = model(input_ids=ids, use_cache=False, **more).logits
        logits = logits[:, -RESPONSE - 1 : -1]
        if not cut:
            logits = logits.masked_fill(~left[:, -RESPONSE:], -torch.inf)
        logprobs, entropy = scores(logits, ids[:, -RESPONSE:], temperature=0.7)
        if not cut:
            entropy = torch.special.entr((logits / 0.7).softmax(-1)).sum(-1)
        logprobs.sum().backward()
        return [logprobs.detach(), entropy.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    wanted = [value.clone() for value in run(cut=False)]
    got = run(cut=True)
    assert not got[0][:, 0].any()  # alone in its set: exactly 0
    assert len(got) == len(wanted) > 2
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_tokens_without_a_set_keep_their_logits():
    model, ids = tiny_moe().eval(), tokens()
    mask, _ = sets_of(ids, model.config.vocab_size)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        with logits_over_sets(model, mask):
            cut = model(input_ids=ids, use_cache=False).logits
        after = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(cut[:, : -RESPONSE - 1], whole[:, : -RESPONSE - 1])
    assert torch.equal(cut[:, -1], whole[:, -1])
    assert not torch.equal(cut, whole)
    assert torch.equal(after, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entropy_is_finite_in_every_dtype(dtype):
    logits = torch.zeros(1, 3, 40, dtype=dtype)
    mask = SamplingMask(torch.tensor([[0, 1, 2]]), torch.tensor([4, 5, 9], dtype=torch.int32))
    model = SimpleHead(logits)
    with logits_over_sets(model, mask):
        output = model()
    _, entropy = scores(output.logits, torch.tensor([[4, 9, 0]]), temperature=0.25)
    assert entropy.isfinite().all()
    assert entropy[0, 0] == 0
    torch.testing.assert_close(entropy[0, 1].float(), torch.tensor(2.0).log(), rtol=1e-2, atol=0)


class SimpleHead(torch.nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


def test_forwards_of_other_rows_or_none_are_refused():
    mask = SamplingMask(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int32))
    other, right = SimpleHead(torch.zeros(1, 3, 8)), SimpleHead(torch.zeros(2, 3, 8))
    for model, calls, message in (
        (other, 1, r"rows \[2, 3\], or of their last positions, got \[1, 3, 8\]"),
        (right, 0, "expected one forward of the rows, got 0"),
        (right, 2, "expected one forward of the rows, got 2"),
    ):
        with pytest.raises(r3.ReplayError, match=message), logits_over_sets(model, mask):
            [model() for _ in range(calls)]
    assert not other._forward_hooks
    assert not right._forward_hooks


def test_what_is_asked_and_what_is_refused():
    whole = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    assert logprobs_asked(whole) == 0
    assert logprobs_asked(whole | {"top_k": 50}) == 54
    assert logprobs_asked(whole | {"top_k": 50, "temperature": 0}) == 0  # greedy
    refusals = (without_bound(lambda sampling: sampling),)
    require_supported("a trainer", refusals, whole | {"top_k": 50, "top_p": 0.9})
    for cut in ({"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 0, "top_p": 0.5}):
        with pytest.raises(r3.ConfigError, match=r"(?s)a trainer:.*top_p or min_p without top_k.*Set top_k"):
            require_supported("a trainer", refusals, whole | cut)


def test_the_sampled_tokens_are_chosen_from_either_form():
    from vllm.logprobs import FlatLogprobs, Logprob

    told = [{7: Logprob(-2.0, 2), 3: Logprob(-0.5, 1)}, {5: Logprob(0.0, 1)}]
    flat = FlatLogprobs()
    for entries in told:
        flat.append(entries)
    for logprobs in (told, flat):
        made = of_sampled_tokens(SimpleNamespace(token_ids=[7, 5], logprobs=logprobs))
        assert [{token: entry.logprob for token, entry in each.items()} for each in made] == [{7: -2.0}, {5: 0.0}]
