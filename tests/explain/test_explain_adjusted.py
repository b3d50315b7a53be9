"""`r3 explain` on rollouts whose distribution was changed at sampling: penalties, bias, min-p; weights stay weights."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from models import tiny_moe
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper

import r3
from r3.capture import Rollout, Rollouts, SamplingSettings, load_rollouts, save_rollouts, saved_settings
from r3.explain import Explanation, Limits, explain
from r3.explain.adjustments import FAMILIES, Adjustment, Before
from r3.explain.distributions import Distribution, score, signed_mass
from r3.explain.scoring import _begins

PROMPT, LENGTH, COUNT, VOCABULARY = 6, 30, 12, 96
Change = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [B, V], prompt [B, P], sampled [B, G] -> logits


def by_vllm(presence: float = 0.0, frequency: float = 0.0, repetition: float = 1.0) -> Change:
    """vLLM's own penalties."""
    from vllm.model_executor.layers.utils import apply_penalties

    def change(logits: Tensor, prompt: Tensor, sampled: Tensor) -> Tensor:
        each = [torch.full((len(logits),), value) for value in (presence, frequency, repetition)]
        return apply_penalties(logits.clone(), prompt, sampled, *each)

    return change


def biased(values: dict[int, float]) -> Change:
    def change(logits: Tensor, prompt: Tensor, sampled: Tensor) -> Tensor:
        bias = torch.zeros(logits.shape[1])
        bias[list(values)] = torch.tensor(list(values.values()))
        return logits + bias

    return change


def allowing(tokens: range) -> Change:
    def change(logits: Tensor, prompt: Tensor, sampled: Tensor) -> Tensor:
        allowed = torch.zeros(logits.shape[1], dtype=torch.bool)
        allowed[list(tokens)] = True
        return logits.masked_fill(~allowed, -torch.inf)

    return change


def nothing(logits: Tensor, prompt: Tensor, sampled: Tensor) -> Tensor:
    return logits


UP, DOWN = dict.fromkeys(range(10, 15), 4.0), dict.fromkeys(range(48), -6.0)
MIN_P: Change = lambda logits, prompt, sampled: MinPLogitsWarper(0.1)(None, logits)
# Change of the distribution, what records it, and what its cause says without a record.
CHANGES: dict[str, tuple[Change, dict, str]] = {
    "bias up": (biased(UP), {"logit_bias": tuple(UP.items())}, "logit bias"),
    "bias down": (biased(DOWN), {"logit_bias": tuple(DOWN.items())}, "logit bias"),
    "allowed tokens": (allowing(range(40)), {"allowed_token_ids": tuple(range(40))}, "allowed"),
    "presence": (by_vllm(presence=1.2), {"presence_penalty": 1.2}, r"presence penalty 1\.[12]"),
    "frequency": (by_vllm(frequency=0.6), {"frequency_penalty": 0.6}, r"frequency penalty 0\.[56]"),
    "repetition": (by_vllm(repetition=1.35), {"repetition_penalty": 1.35}, r"repetition penalty 1\.3"),
    "two penalties": (
        by_vllm(presence=1.0, repetition=1.4),
        {"presence_penalty": 1.0, "repetition_penalty": 1.4},
        "penalt",
    ),
}


class Toy:
    """A checkpoint, and rollouts that it samples under a change, with its own log-probabilities and routing."""

    def __init__(self, folder) -> None:
        self.folder = folder
        torch.manual_seed(0)
        self.model = tiny_moe(torch.float32, vocab_size=VOCABULARY, initializer_range=0.2).eval()
        self.path = str(folder / "model")
        self.model.save_pretrained(self.path)
        self.spec = r3.attach(self.model).spec

    def other_weights(self, scale: float) -> str:
        torch.manual_seed(1)
        other = tiny_moe(torch.float32, vocab_size=VOCABULARY, initializer_range=0.2)
        other.load_state_dict(self.model.state_dict())
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(scale * parameter.std() * torch.randn_like(parameter))
        path = str(self.folder / f"other {scale}")
        other.save_pretrained(path)
        return path

    @torch.no_grad()
    def rollouts(self, change: Change) -> Rollouts:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCABULARY, (COUNT, PROMPT), generator=generator)
        scores = []
        for _ in range(LENGTH):
            logits = self.model(input_ids=ids, use_cache=False).logits[:, -1].float()
            chances = change(logits, ids[:, :PROMPT], ids[:, PROMPT:]).log_softmax(-1)
            new = torch.multinomial(chances.exp(), 1, generator=generator)
            scores.append(chances.gather(1, new))
            ids = torch.cat([ids, new], 1)
        with r3.record(self.model) as recorder:
            self.model(input_ids=ids, use_cache=False)
        valid = torch.ones_like(ids, dtype=torch.bool)
        valid[:, -1] = False
        rows = recorder.routing
        whole = r3.RolloutRouting(rows.expert_ids, valid, rows.layer_ids, rows.num_experts)
        logprobs = torch.cat(scores, 1)
        items = [
            Rollout(
                prompt_ids=ids[b, :PROMPT].tolist(),
                token_ids=ids[b, PROMPT:].tolist(),
                response_mask=torch.ones(LENGTH, dtype=torch.bool),
                logprobs=logprobs[b],
                routing=whole.select([b]),
                finish_reason="length",
                prompt_index=b,
            )
            for b in range(COUNT)
        ]
        return Rollouts(items, self.spec)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Toy(tmp_path_factory.mktemp("toy"))


PLAIN = SamplingSettings(temperature=1.0, top_p=1.0, top_k=-1, logprobs_mode="processed_logprobs", dtype="float32")


def told(path: str, rollouts: Rollouts, settings: SamplingSettings = PLAIN) -> Explanation:
    return explain(path, rollouts, settings, device="cpu", limits=Limits())


def cause(found: Explanation, name: str):
    return next(item for item in found.causes if item.name == name)


LONG = ("allowed tokens", "two penalties")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.long if kind in LONG else ()) for kind in CHANGES]
)
def test_a_changed_distribution_is_named_and_the_weights_are_not(toy, tmp_path, kind):
    change, recorded, words = CHANGES[kind]
    rollouts = toy.rollouts(change)
    untold = told(toy.path, rollouts)
    assert "adjusted" in untold.names, untold
    assert "weights" not in untold.names
    assert untold.wrong
    text = cause(untold, "adjusted").text
    assert re.search(words, text), text
    # What is recorded is computed again: nothing else remains.
    file = save_rollouts(rollouts, tmp_path / "a", settings=replace(PLAIN, **recorded))
    known = told(toy.path, load_rollouts(file), saved_settings(file))
    assert set(known.names) - {"routing"} == {"adjusted", "precision"}, known
    assert "which the file's settings say" in cause(known, "adjusted").text


def test_min_p_is_a_truncation(toy):
    found = told(toy.path, toy.rollouts(MIN_P))
    assert set(found.names) - {"routing"} == {"renormalised", "precision"}, found
    assert "min-p 0.1 (about)" in cause(found, "renormalised").text
    assert told(toy.path, toy.rollouts(nothing)).names[-1] == "precision"


def test_other_weights_are_still_the_weights(toy):
    rollouts = toy.rollouts(nothing)
    other = toy.other_weights(0.3)
    of_config = replace(PLAIN, presence_penalty=0.0, logit_bias=(), other=())
    for settings in (PLAIN, of_config):
        found = told(other, rollouts, settings)
        assert found.names[-1] == "weights", found
        assert "adjusted" not in found.names
        assert "of the live choices of experts differ" in cause(found, "weights").text
        assert "changed at sampling" not in cause(found, "weights").text
    # Without routing nobody knows, unless the settings say that nothing was changed.
    unrouted = Rollouts([replace(item, routing=None) for item in rollouts], None)
    assert "or from a distribution that was changed at sampling" in cause(told(other, unrouted), "weights").text
    assert "changed at sampling" not in cause(told(other, unrouted, of_config), "weights").text
    # And what was changed beside them is not blamed for them.
    both = told(other, toy.rollouts(by_vllm(presence=1.2)))
    assert "weights" in both.names, both


def test_what_cannot_be_computed_again_is_named_as_it_was_recorded(toy):
    found = told(toy.path, toy.rollouts(biased(UP)), replace(PLAIN, other=("bad_words=['x']",)))
    assert found.names[-1] == "adjusted"
    assert "sampling was also changed by bad_words=['x']" in cause(found, "adjusted").text


def test_settings_are_taken_from_the_parameters_of_a_request(tmp_path):
    from vllm import SamplingParams

    plain = SamplingSettings.of_params(SamplingParams(temperature=0.7, logprobs=0), dtype="bfloat16")
    assert plain.other == ()
    assert (plain.temperature, plain.min_p, plain.repetition_penalty, plain.logit_bias) == (0.7, 0.0, 1.0, ())
    changed = SamplingParams(
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.1,
        min_p=0.05,
        logit_bias={7: -3.0, 2: 1.5},
        allowed_token_ids=[2, 7, 9],
        bad_words=["no"],
        min_tokens=4,
        extra_args={"own": 1},
    )
    found = SamplingSettings.of_params(changed, logits_processors=["own.Processor"])
    assert found.logit_bias == ((2, 1.5), (7, -3.0))
    assert (found.presence_penalty, found.frequency_penalty, found.min_p) == (0.5, 0.25, 0.05)
    assert found.allowed_token_ids == (2, 7, 9)
    assert found.other == (
        "bad_words=['no']",
        "min_tokens=4",
        "extra_args={'own': 1}",
        "logits processor own.Processor",
    )
    assert SamplingSettings.from_mapping(found.to_dict()) == found


@pytest.mark.parametrize(
    "adjustment",
    [
        Adjustment(presence_penalty=-0.7),
        Adjustment(frequency_penalty=0.4),
        Adjustment(repetition_penalty=0.8),
        Adjustment(presence_penalty=1.1, frequency_penalty=0.3, repetition_penalty=1.6),
    ],
)
def test_penalties_are_those_of_vllm(adjustment):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (3, 14), generator=generator)
    row, end = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([5, 13, 8, 6, 11])
    begin = torch.tensor([5, 5, 3, 6, 6])
    logits, labels = 3 * torch.randn(5, 12, generator=generator), ids[row, end]
    before = Before(input_ids=ids, row=row, begin=begin, end=end)
    # The second keeps all as well, by the way over the whole vocabulary.
    chosen = [Distribution(adjustment=adjustment), Distribution(adjustment=adjustment, min_p=1e-30), Distribution()]
    found = score(logits, labels, chosen, before)
    change = by_vllm(adjustment.presence_penalty, adjustment.frequency_penalty, adjustment.repetition_penalty)
    for i in range(5):
        prompt, sampled = ids[row[i], : begin[i]][None], ids[row[i], begin[i] : end[i]][None]
        expected = change(logits[i : i + 1], prompt, sampled).log_softmax(-1)[0, labels[i]]
        torch.testing.assert_close(found[:2, i], expected.expand(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[2], logits.log_softmax(-1).gather(1, labels[:, None])[:, 0], atol=1e-5, rtol=0)


def test_tokens_between_turns_are_the_prompt_of_the_next_request():
    sampled = torch.tensor([True, True, False, False, True, True, True])
    assert _begins(sampled)[sampled].tolist() == [0, 0, 4, 4, 4]


@pytest.mark.parametrize("min_p", [0.02, 0.3])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_min_p_is_that_of_the_warper(min_p, temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 2.5 * torch.randn(400, 300, generator=generator)
    labels = (logits / temperature).softmax(-1).multinomial(1, generator=generator)[:, 0]
    kept = MinPLogitsWarper(min_p)(None, logits.double() / temperature).log_softmax(-1)
    reference = kept.gather(1, labels[:, None])[:, 0]
    inside = reference.isfinite()
    assert 20 < inside.sum() < 400
    distribution = Distribution(temperature=temperature, min_p=min_p)
    found = score(logits, labels, [distribution])[0].double()
    torch.testing.assert_close(found[inside], reference[inside], atol=2e-5, rtol=0)
    assert torch.equal(signed_mass(logits, labels, [distribution])[0] > 0, inside)


def test_families_find_their_own_values():
    for family in FAMILIES:
        assert [family.place(adjustment) for adjustment in family.grid] == pytest.approx(list(range(family.count)))
        assert family.place(Adjustment(logit_bias=((1, 2.0),))) is None
    presence, frequency, _ = FAMILIES
    assert presence.place(frequency.at(0.5)) is None
