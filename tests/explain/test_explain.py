"""`r3 explain` names what is wrong: each cause made with a trained MoE and sampled tokens, alone and with another."""

from dataclasses import replace

import pytest
import torch
from faulty_rollouts import (
    World,
    rollouts_of,
    with_logprobs_moved,
    with_router_noise,
    with_rows_moved,
    with_rows_of_others,
)
from transformers import AutoModelForCausalLM

from r3.capture import Rollouts, SamplingSettings
from r3.errors import DiagnosticsError
from r3.explain import CAUSES, Explanation, Limits, explain

UNKNOWN = SamplingSettings()
WARM = {"temperature": 0.7}
HOT = {"temperature": 1.3}
NUCLEUS = {"top_p": 0.9}


@pytest.fixture(
    scope="module", params=[0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)]
)
def world(request, tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"), request.param, 96)


def outcome(model: str, rollouts: Rollouts, settings=UNKNOWN, *earlier: str, **limits) -> Explanation:
    found = explain(model, rollouts, settings, earlier=earlier, device="cpu", limits=Limits(**limits))
    assert set(found.names) <= set(CAUSES)
    assert len(set(found.names)) == len(found.names)
    return found


def faults(found: Explanation) -> set[str]:
    """What is wrong; routing and precision are in every sound set-up."""
    return {cause.name for cause in found.causes if cause.wrong}


def figures(found: Explanation, name: str) -> dict:
    return next(cause.figures for cause in found.causes if cause.name == name)


def is_sound(found: Explanation) -> bool:
    return not found.wrong and faults(found) == set() and "precision" in found.names


@pytest.mark.long
def test_precision_alone_is_no_fault(world):
    found = outcome(world.demo, world.rollouts(engine=world.model))
    assert is_sound(found), found
    assert found.k3["live"] < 1e-4
    assert "nothing is wrong" in found.verdict


def test_routing_is_named_and_is_no_fault(world):
    found = outcome(world.demo, world.rollouts(), max_tokens=2000)
    assert is_sound(found), found
    assert found.names == ("routing", "precision")
    assert found.k3["replayed"] < found.k3["live"] / 2
    assert "replay removes it" in found.verdict
    assert f"k3 {found.k3['live']:.2e} live" in found.causes[0].text


@pytest.mark.long
def test_rollouts_without_routing_are_scored_live(world):
    found = outcome(world.demo, world.rollouts(engine=world.model))
    without = outcome(
        world.demo, Rollouts([replace(r, routing=None) for r in world.rollouts(engine=world.model)], None)
    )
    assert is_sound(without), without
    assert without.k3["live"] == found.k3["live"]
    assert "replayed" not in without.k3
    assert "no routing" in without.notes[0]


@pytest.mark.parametrize(("sampling", "value"), [(WARM, 0.7), pytest.param(HOT, 1.3, marks=pytest.mark.long)])
def test_a_temperature_is_named_with_its_value(world, sampling, value):
    found = outcome(world.demo, world.rollouts(**sampling))
    assert faults(found) == {"temperature"}, found
    assert figures(found, "temperature")["temperature"] == pytest.approx(value, rel=0.02)
    assert f"{value:.2f}" in found.verdict + found.causes[0].text


@pytest.mark.long
def test_a_temperature_that_is_told_is_no_fault(world):
    assert is_sound(outcome(world.demo, world.rollouts(**WARM), SamplingSettings(**WARM)))


@pytest.mark.long
def test_a_temperature_other_than_was_told_is_named(world):
    found = outcome(world.demo, world.rollouts(**WARM), SamplingSettings(**HOT))
    assert faults(found) == {"temperature"}, found
    assert figures(found, "temperature")["expected"] == 1.3


@pytest.mark.parametrize(
    "settings", [UNKNOWN, SamplingSettings(**WARM), SamplingSettings(**WARM, logprobs_mode="raw_logprobs")]
)
@pytest.mark.long
def test_raw_log_probabilities_of_tempered_samples_are_named(world, settings):
    found = outcome(world.demo, world.rollouts(reported={}, **WARM), settings)
    assert faults(found) == {"raw_logprobs"}, found
    told = figures(found, "raw_logprobs")
    assert 0.55 < told["sampled_temperature"] < 0.85  # an estimate from 4,700 tokens, of which most are certain
    assert told["sampled_temperature_low"] < told["sampled_temperature"] < told["sampled_temperature_high"] < 1
    name, reported = told["reported"].split()
    assert name == "temperature"
    assert float(reported) == pytest.approx(1, abs=0.005)  # estimated as well


@pytest.mark.long
def test_raw_log_probabilities_of_a_nucleus_are_named(world):
    found = outcome(world.demo, world.rollouts(reported={}, **NUCLEUS))
    assert faults(found) == {"raw_logprobs"}, found
    assert "top-p 0.9" in figures(found, "raw_logprobs")["sampled"]


@pytest.mark.parametrize(("sampling", "value"), [(NUCLEUS, 0.9), ({"top_k": 5}, 5)])
@pytest.mark.long
def test_renormalised_log_probabilities_are_named_with_what_is_kept(world, sampling, value):
    (name,) = sampling
    found = outcome(world.demo, world.rollouts(**sampling))
    assert faults(found) == {"renormalised"}, found
    assert figures(found, "renormalised")[name] == value


@pytest.mark.parametrize("places", [1, pytest.param(-1, marks=pytest.mark.long)])
def test_shifted_rows_are_named_with_the_direction(world, places):
    found = outcome(world.demo, with_rows_moved(world.rollouts(), places), max_tokens=2000)
    assert faults(found) == {"shifted_rows"}, found
    assert figures(found, "shifted_rows")["places"] == places
    assert "routing" in found.names  # of the rows, moved back


@pytest.mark.long
def test_shifted_rows_are_named_also_where_routing_makes_no_gap(world):
    assert faults(outcome(world.demo, with_rows_moved(world.rollouts(engine=world.model), 1))) == {"shifted_rows"}


@pytest.mark.long
def test_rows_of_other_rollouts_are_named(world):
    assert faults(outcome(world.demo, with_rows_of_others(world.rollouts(engine=world.model)))) == {"foreign_rows"}


@pytest.mark.parametrize("places", [1, -1])
@pytest.mark.long
def test_shifted_log_probabilities_are_named_with_the_direction(world, places):
    found = outcome(world.demo, with_logprobs_moved(world.rollouts(), places))
    assert faults(found) == {"shifted_logprobs"}, found
    assert figures(found, "shifted_logprobs")["places"] == places


@pytest.mark.long
def test_a_stale_sync_is_named_with_the_checkpoint(world):
    found = outcome(world.later, world.rollouts(), UNKNOWN, world.other, world.demo)
    assert faults(found) == {"stale_sync"}, found
    assert figures(found, "stale_sync")["checkpoint"] == world.demo


@pytest.mark.long
def test_without_the_checkpoint_a_stale_sync_cannot_be_told_and_the_words_say_how_to(world):
    for model in (world.later, world.much_later):
        found = outcome(model, world.rollouts())
        assert len(faults(found)) == 1, found
        assert faults(found) <= {"unexplained", "weights"}, found
        (cause,) = (cause for cause in found.causes if cause.wrong)
        assert "stale sync" in cause.text
        assert "earlier checkpoint" in cause.text
        assert "--earlier" in cause.text + cause.remedy


@pytest.mark.parametrize("weights", ["other", "confident"])
@pytest.mark.long
def test_other_weights_are_named_and_nothing_else(world, weights):
    found = outcome(
        getattr(world, weights), world.rollouts(), UNKNOWN, *([world.much_later] if weights == "other" else [])
    )
    assert faults(found) == {"weights"} == set(found.names), found
    assert found.correlation < 0.5
    assert ("none of the 1 earlier checkpoints fits better" in found.causes[0].text) == (weights == "other")


@pytest.mark.long
def test_versions_that_lag_tell_a_stale_sync(world):
    rollouts = Rollouts([replace(r, weight_versions=(7,)) for r in world.rollouts()], world.rollouts().spec)
    found = outcome(world.later, rollouts, SamplingSettings(weight_version=9))
    assert "stale_sync" in faults(found), found
    assert figures(found, "stale_sync")["versions_behind"] == 2
    # The same lag without a gap is none.
    assert is_sound(outcome(world.demo, rollouts, SamplingSettings(weight_version=9)))


@pytest.mark.long
def test_older_tokens_of_a_mixed_batch_tell_a_stale_sync(world):
    def version(item, number):
        return replace(
            item, weight_versions=(number,), row_versions=torch.full((len(item),), number, dtype=torch.int32)
        )

    old = [version(r, 3) for r in world.rollouts().items[::2]]
    engine = with_router_noise(AutoModelForCausalLM.from_pretrained(world.later, dtype=torch.float32).eval(), 0.02)
    new = rollouts_of(engine, world.sampled()[1::2], version=4)
    found = outcome(world.later, Rollouts([*old, *new], new.spec))
    assert "stale_sync" in faults(found), found
    assert (figures(found, "stale_sync")["older_version"], figures(found, "stale_sync")["newest_version"]) == (3, 4)


COMBINED = {
    "temperature and shifted rows": lambda w: (
        (w.demo, with_rows_moved(w.rollouts(**WARM), 1)),
        {"temperature", "shifted_rows"},
    ),
    "temperature and shifted log-probabilities": lambda w: (
        (w.demo, with_logprobs_moved(w.rollouts(**WARM), 1)),
        {"temperature", "shifted_logprobs"},
    ),
    "stale sync and temperature": lambda w: (
        (w.later, w.rollouts(**WARM), UNKNOWN, w.demo),
        {"stale_sync", "temperature"},
    ),
    "stale sync and shifted rows": lambda w: (
        (w.much_later, with_rows_moved(w.rollouts(), 1), UNKNOWN, w.demo),
        {"stale_sync", "shifted_rows"},
    ),
    "nucleus and temperature": lambda w: (
        (w.demo, w.rollouts(**WARM, **NUCLEUS)),
        {"renormalised", "temperature"},
    ),
    "nucleus and shifted log-probabilities": lambda w: (
        (w.demo, with_logprobs_moved(w.rollouts(**NUCLEUS), -1)),
        {"renormalised", "shifted_logprobs"},
    ),
    "raw log-probabilities and shifted rows": lambda w: (
        (w.demo, with_rows_moved(w.rollouts(reported={}, **WARM), -1)),
        {"raw_logprobs", "shifted_rows"},
    ),
}


@pytest.mark.parametrize("case", COMBINED)
@pytest.mark.long
def test_two_causes_at_once_are_both_named(world, case):
    given, expected = COMBINED[case](world)
    found = outcome(*given)
    assert faults(found) == expected, found


def test_too_few_tokens_name_nothing(world):
    found = outcome(world.demo, world.rollouts(**WARM), max_tokens=150)
    assert found.tokens <= 150
    assert found.wrong
    assert found.causes == ()
    assert f"{found.tokens} sampled tokens, and fewer than 200" in found.verdict


def test_what_cannot_be_compared_is_refused(world):
    rollouts = world.rollouts()
    item = rollouts.items[0]
    nan = replace(item, logprobs=item.logprobs.clone().index_fill_(0, torch.tensor([3]), float("nan")))
    with pytest.raises(DiagnosticsError, match=r"1 tokens are not finite numbers[\s\S]*rollout 0, token 3: nan"):
        outcome(world.demo, Rollouts([nan], rollouts.spec))
    with pytest.raises(DiagnosticsError, match="has 384 tokens, the rollouts have token 999"):
        outcome(world.demo, Rollouts([replace(item, prompt_ids=[999, *item.prompt_ids[1:]])], rollouts.spec))
    with pytest.raises(DiagnosticsError, match="expected a checkpoint"):
        outcome(str(world.folder / "nowhere"), rollouts)
    with pytest.raises(DiagnosticsError, match="expected sampled tokens"):
        outcome(world.demo, Rollouts([], rollouts.spec))
    with pytest.raises(DiagnosticsError, match="the rollouts have routing of 3 of 32 experts"):
        outcome(world.demo, Rollouts([replace(item, routing=None)], replace(rollouts.spec, top_k=3)))
