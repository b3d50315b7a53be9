"""Settings are read strictly: what is unknown, malformed or contradictory stops the run before it starts."""

import pytest

from r3 import ConfigError, R3Config

REPLAY = "trainer.policy.fsdp_config.moe_enable_routing_replay"
CAPTURE = "generator.inference_engine.enable_return_routed_experts"


def test_overrides_beat_defaults_and_go_round():
    config = R3Config.from_overrides(["trainer.max_steps=3", "task.settings.max_terms=5"], {"trainer.seed": 7})
    assert (config.trainer.max_steps, config.trainer.seed, config.task.settings) == (3, 7, {"max_terms": 5})
    pairs = [f"{key}={value}" for key, value in config.to_flat().items() if value != ""]
    assert R3Config.from_overrides(pairs) == config


def test_replay_is_on_and_one_switch_turns_only_it_off():
    on, off = R3Config().to_flat(), R3Config.from_overrides([f"{REPLAY}=false"]).to_flat()
    assert {key for key in on if on[key] != off[key]} == {REPLAY}
    assert on[REPLAY] is True


def test_replay_without_capture_is_refused():
    with pytest.raises(ConfigError, match=f"{REPLAY}=true needs {CAPTURE}=true"):
        R3Config.from_overrides([f"{CAPTURE}=false"])
    R3Config.from_overrides([f"{CAPTURE}=false", f"{REPLAY}=false"])


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("trainer.max_step=3", "did you mean trainer.max_steps"),
        ("moe_enable_routing_replay=true", f"did you mean {REPLAY}"),
        ("trainer.policy=3", "unknown setting"),
        ("trainer.max_steps=many", "trainer.max_steps=many.*many"),
        (f"{REPLAY}=perhaps", "not a valid bool"),
        ("trainer.max_steps", "expected key=value"),
        ("trainer.output_dir=a: b", "trainer.output_dir=a: b"),
        ("trainer.policy.fsdp_config.param_dtype=bf16", "expected one of float32, bfloat16"),
        ("trainer.max_steps=0", "trainer.max_steps: expected a value above 0"),
        ("generator.n_samples_per_prompt=1", "at least 2"),
        ("generator.sampling_params.temperature=0", "above 0"),
        ("generator.inference_engine.weight_sync.chunk_mib=-1", "above 0"),
    ],
)
def test_bad_settings_are_refused_by_name(pair, message):
    with pytest.raises(ConfigError, match=message):
        R3Config.from_overrides([pair])


def test_settings_that_the_number_of_ranks_contradicts_are_refused():
    config = R3Config.from_overrides(["trainer.policy.sequence_parallel_size=2"])
    config.check(ranks=2)
    for ranks in (1, 3):
        with pytest.raises(
            ConfigError, match=f"sequence_parallel_size: expected a divisor of the {ranks} ranks, got 2"
        ):
            config.check(ranks)
