"""An engine that computes something other than the trainer is named before training, and a healthy one never is."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from model_engine import ModelEngine
from places import DEMO_MODEL
from zoo.case import CORRECTIONS
from zoo.engine_table import MEASURED, WRONG
from zoo.families import CASES

import r3
from r3.capture import engine_kwargs, handshake
from r3.capture.ask import repeat_nats
from r3.diagnostics import EngineAgreement
from r3.doctor import engine_agreement
from r3.doctor.engine_agreement import probe_prompts

HEALTHY = EngineAgreement(
    family="qwen3_moe", tokens=192, k3_live=4e-4, k3_replayed=8e-5, differing_rows=0.01, repeat_nats=0.0
)
MEASUREMENTS = {
    f"{name} of {versions}": found
    for versions, families in json.loads(MEASURED.read_text()).items()
    for name, found in families.items()
    if "start" in found
}
FAMILIES = ["qwen3_moe", "ernie4_5_moe", "deepseek_v3"]


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_bounds_tell_the_families_that_were_measured_to_be_right_from_those_that_were_not(name):
    """`WRONG` says of which it is known why."""
    found = MEASUREMENTS[name]
    family = name.split()[0]
    for when in ("start", "cache"):
        made = EngineAgreement(family=family, tokens=192, **found[when])
        assert set(made.faults()) == WRONG.get(family, set()), made
    if "stale_k3" in found:
        assert EngineAgreement(family=family, tokens=192, k3_live=found["stale_k3"]).faults().keys() == {"logprobs"}


@pytest.mark.parametrize(
    ("changes", "name", "text"),
    [
        (dict(repeat_nats=0.8), "repetition", "does not repeat itself: two answers .* are 0.8 nats a token apart"),
        (dict(k3_replayed=0.28, k3_live=0.36), "logprobs", "k3 is 0.28 nats a token with replayed routing .*0.36 live"),
        (dict(k3_replayed=None, differing_rows=None, k3_live=0.5), "logprobs", "0.5 nats a token with live routing"),
        (dict(differing_rows=0.84), "selection", "other experts in 84% of rows .*selection bias"),
        (dict(k3_replayed=math.nan), "logprobs", "k3 is nan"),
    ],
)
def test_a_fault_stops_with_family_figure_and_cause_unless_it_is_accepted_by_name(changes, name, text):
    HEALTHY.require()
    made = dataclasses.replace(HEALTHY, **changes)
    with pytest.raises(
        r3.errors.AlarmError, match=rf"agree with the trainer on qwen3_moe.*\n  {name}: .*{text}"
    ) as error:
        made.require()
    assert f"accepted_engine_faults=[{name}]" in str(error.value)
    made.require([name])
    with pytest.raises(r3.ConfigError, match="expected any of repetition, logprobs, selection, got all"):
        made.require(["all"])


def test_settings_take_no_other_fault():
    key = "trainer.diagnostics.accepted_engine_faults"
    assert r3.R3Config.from_overrides([f"{key}=[selection]"]).trainer.diagnostics.accepted_engine_faults == [
        "selection"
    ]
    with pytest.raises(r3.ConfigError, match=r"repetition, logprobs, selection, each once, got \['bias'\]"):
        r3.R3Config.from_overrides([f"{key}=[bias]"])


def test_answers_are_compared_up_to_the_token_where_they_part():
    def answer(tokens, logprobs):
        return SimpleNamespace(token_ids=tokens, logprobs=torch.tensor(logprobs))

    first = [answer([1, 2, 3, 4], [-1.0, -1.0, -1.0, -1.0])]
    assert repeat_nats(first, first) == 0
    # The third token counts, of which both log-probabilities are the largest of their distributions; the fourth not.
    assert repeat_nats(first, [answer([1, 2, 5, 4], [-1.0, -1.0, -1.75, -9.0])]) == 0.25


@pytest.fixture(params=FAMILIES)
def pair(request):
    """A trainer's model with replay, and an engine of the same weights."""
    case = CASES[request.param]
    return r3.attach(case.build()), ModelEngine(case.build())


def compared(replay, engine):
    return engine_agreement(engine, replay, prompts=probe_prompts(replay.model, count=4, length=8), max_tokens=6)


def test_an_engine_of_the_same_weights_agrees(pair):
    found = compared(*pair)
    assert (found.tokens, found.repeat_nats, found.differing_rows) == (24, 0.0, 0.0)
    assert found.k3_replayed == pytest.approx(0, abs=1e-9)
    found.require()


def test_an_engine_that_ignores_the_selection_bias_is_named(pair):
    replay, engine = pair
    biases = [
        t for n, t in [*engine.model.named_parameters(), *engine.model.named_buffers()] if n.endswith(CORRECTIONS)
    ]
    for bias in biases:
        bias.data.zero_()
    own = [t for n, t in [*replay.model.named_parameters(), *replay.model.named_buffers()] if n.endswith(CORRECTIONS)]
    for bias in own:
        bias.data.mul_(10)
    found = compared(replay, engine)
    assert set(found.faults()) == ({"selection"} if biases else set())
    assert found.k3_replayed == pytest.approx(0, abs=1e-9)


def test_an_engine_of_other_weights_is_named(pair):
    replay, engine = pair
    name = next(n for n, p in engine.model.named_parameters() if n.endswith(("down_proj.weight", "o_proj.weight")))
    engine.model.get_parameter(name).data.mul_(-1)
    assert "logprobs" in compared(replay, engine).faults()


def test_an_engine_that_does_not_repeat_itself_is_named(pair):
    replay, engine = pair
    noise = torch.Generator().manual_seed(0)
    engine.disturb = lambda logits: logits + 2 * torch.randn(logits.shape, generator=noise)
    assert "repetition" in compared(replay, engine).faults()
    (prompt,) = probe_prompts(replay.model, count=1, length=7)
    with pytest.raises(r3.CaptureError, match=r"handshake with the engine: two answers .* at temperature 0 are"):
        handshake(Forcing(engine), replay.spec, prompt_ids=prompt)
    assert handshake(Forcing(engine), replay.spec, prompt_ids=prompt, most_repeat_nats=None).repeat_nats > 0.1


class Forcing:
    """The stand-in does not know `allowed_token_ids`: the one answer that is forced is made here."""

    def __init__(self, engine):
        self.engine, self.llm_engine = engine, engine.llm_engine

    def generate(self, prompts, sampling, use_tqdm):
        answers = []
        for prompt, wanted in zip(prompts, sampling, strict=True):
            (answer,) = self.engine.generate([prompt], [wanted], use_tqdm)
            if wanted.allowed_token_ids:
                answer.outputs[0].token_ids = wanted.allowed_token_ids
                answer.outputs[0].logprobs = [{wanted.allowed_token_ids[0]: SimpleNamespace(logprob=0.0)}]
            answers.append(answer)
        return answers


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is that of vLLM's CPU build")
def test_the_engines_rotary_embedding_turns_heads_as_latent_attention_passes_them():
    """Slices of larger rows `[T, H, D]`: vLLM's CPU kernel turns others, and `engine_kwargs` does without."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    config = r3.R3Config.from_overrides([], {"trainer.policy.model.path": str(DEMO_MODEL)})
    with set_current_vllm_config(EngineArgs(**engine_kwargs(config)).create_engine_config()):
        rotary = RotaryEmbedding(64, 64, 32, 10000.0, is_neox_style=False, dtype=torch.float32)
    tokens, generator = torch.arange(12), torch.Generator().manual_seed(0)
    query = torch.randn(12, 2, 192, generator=generator)[..., 128:]
    key = torch.randn(12, 640, generator=generator)[:, None, -64:]
    angles = tokens[:, None].double() * 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)

    def turned(heads):
        pairs = torch.view_as_complex(heads.double().unflatten(-1, (32, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2).float()

    expected = turned(query), turned(key)
    for got, wanted in zip(rotary(tokens, query, key), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
