"""Settings are read strictly: what is unknown, malformed or contradictory stops the run before it starts."""

import pytest

from r3 import ConfigError, R3Config
from r3.config import DiagnosticsConfig

REPLAY = "trainer.policy.fsdp_config.moe_enable_routing_replay"
CAPTURE = "generator.inference_engine.enable_return_routed_experts"
DIAGNOSTICS = "trainer.diagnostics"
ALARMS = f"{DIAGNOSTICS}.alarms"
BOUNDS = ("k3", "extreme_frac", "coverage", "version_lag")


def test_overrides_beat_defaults_and_go_round():
    config = R3Config.from_overrides(
        [
            "trainer.max_steps=3",
            "task.settings.max_terms=5",
            "trainer.diagnostics.sinks=[wandb,tensorboard]",
            f"{ALARMS}.enabled=true",
            f"{ALARMS}.k3_stop=null",
        ],
        {"trainer.seed": 7},
    )
    assert (config.trainer.max_steps, config.trainer.seed, config.task.settings) == (3, 7, {"max_terms": 5})
    flat = config.to_flat()
    pairs = [f"{key}={'null' if value is None else value}" for key, value in flat.items() if value != ""]
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
        ("trainer.max_steps=0", "trainer.max_steps: expected 1 or more, got 0"),
        ("generator.n_samples_per_prompt=1", "expected 2 or more"),
        ("generator.sampling_params.temperature=0", "above 0"),
        ("generator.inference_engine.weight_sync.chunk_mib=-1", "above 0"),
        (f"{DIAGNOSTICS}.every=-1", r"diagnostics\.every: expected 0 or more, got -1"),
        (f"{DIAGNOSTICS}.details_every=-1", r"diagnostics\.details_every: expected 0 or more"),
        (f"{DIAGNOSTICS}.save_rollouts_every=-2", r"diagnostics\.save_rollouts_every: expected 0 or more"),
        (f"{DIAGNOSTICS}.extreme_ratio=1", "extreme_ratio: expected a value above 1, got 1.0"),
        (f"{DIAGNOSTICS}.extreme_ratio=.inf", "expected a value above 1, got inf"),
        (f"{DIAGNOSTICS}.project=''", "project: expected a name"),
        (
            f"{DIAGNOSTICS}.sinks=[mlflow]",
            r"sinks: expected any of tensorboard, trackio, .*got \['mlflow'\]",
        ),
        (f"{DIAGNOSTICS}.sinks=[wandb,wandb]", r"sinks: expected .* each once, got \['wandb', 'wandb'\]"),
        (f"{DIAGNOSTICS}.sinks=wandb", r"expected a list, such as trainer.diagnostics.sinks=\[wandb\]"),
        (f"{ALARMS}.k3_stop=1", "bounds are set but nothing watches them; set .*enabled=true"),
    ],
)
def test_bad_settings_are_refused_by_name(pair, message):
    with pytest.raises(ConfigError, match=message):
        R3Config.from_overrides([pair])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["generator.inference_engine.tensor_parallel_size=2"], "needs generator.*tensor_parallel_size=1, got 2"),
        (["trainer.policy.sequence_parallel_size=2"], "needs trainer.policy.sequence_parallel_size=1, got 2"),
        (["trainer.policy.fsdp_config.param_dtype=float32"], "needs .*param_dtype=bfloat16, got float32"),
        (["generator.inference_engine.weight_sync.transport=in_process"], "an engine in a process of its own"),
        (["generator.inference_engine.num_engines=2"], "the one engine that the run starts"),
        (["generator.sampling_params.top_k=8"], "sampling from the whole vocabulary"),
    ],
)
def test_numerics_that_cannot_match_are_refused(pairs, message):
    R3Config.from_overrides(["trainer.policy.numerics=matched"])
    R3Config.from_overrides(pairs)
    with pytest.raises(ConfigError, match=f"trainer.policy.numerics=matched.*{message}"):
        R3Config.from_overrides(["trainer.policy.numerics=matched", *pairs])


def test_settings_that_the_number_of_ranks_contradicts_are_refused():
    config = R3Config.from_overrides(["trainer.policy.sequence_parallel_size=2"])
    config.check(ranks=2)
    for ranks in (1, 3):
        with pytest.raises(
            ConfigError, match=f"sequence_parallel_size: expected a divisor of the {ranks} ranks, got 2"
        ):
            config.check(ranks)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([f"{ALARMS}.k3_stop=1e-3"], r"alarms.k3_stop: expected at least k3_warn \(0.002\), got 0.001"),
        ([f"{ALARMS}.version_lag_warn=9"], r"version_lag_stop: expected at least version_lag_warn \(9.0\), got 8"),
        ([f"{ALARMS}.coverage_stop=1"], r"coverage_stop: expected at most coverage_warn \(0.99\), got 1.0"),
        ([f"{ALARMS}.coverage_warn=1.1"], "coverage_warn: expected 0 to 1, or null for none, got 1.1"),
        ([f"{ALARMS}.extreme_frac_stop=2"], "extreme_frac_stop: expected 0 to 1, or null for none, got 2.0"),
        ([f"{ALARMS}.k3_warn=-1"], "k3_warn: expected 0 or more, or null for none, got -1.0"),
        ([f"{ALARMS}.k3_stop=.inf"], "k3_stop: expected 0 or more, or null for none, got inf"),
        ([f"{ALARMS}.k3_warn=.nan"], "k3_warn: expected 0 or more, or null for none, got nan"),
        ([f"{DIAGNOSTICS}.every=0"], r"alarms.enabled=true needs trainer.diagnostics.every above 0"),
        ([f"{CAPTURE}=false", f"{REPLAY}=false"], f"coverage_warn and coverage_stop need {CAPTURE}=true"),
        (
            [f"{ALARMS}.{name}_{kind}=null" for name in BOUNDS for kind in ("warn", "stop")],
            "enabled=true needs a bound that is not null",
        ),
    ],
)
def test_alarms_that_cannot_be_are_refused(pairs, message):
    with pytest.raises(ConfigError, match=message):
        R3Config.from_overrides([f"{ALARMS}.enabled=true", *pairs])


def test_alarms_are_off_and_one_switch_turns_them_on():
    assert not R3Config().trainer.diagnostics.alarms.enabled
    R3Config.from_overrides([f"{ALARMS}.enabled=true"])
    without_capture = [f"{CAPTURE}=false", f"{REPLAY}=false", f"{ALARMS}.coverage_warn=null"]
    R3Config.from_overrides([f"{ALARMS}.enabled=true", f"{ALARMS}.coverage_stop=null", *without_capture])
    equal = [f"{ALARMS}.k3_warn=1", f"{ALARMS}.k3_stop=1", f"{ALARMS}.coverage_warn=1", f"{ALARMS}.coverage_stop=1"]
    R3Config.from_overrides([f"{ALARMS}.enabled=true", *equal])


@pytest.mark.parametrize(
    ("every", "details_every", "measured", "detailed"),
    [
        (1, 10, list(range(1, 25)), [1, 11, 21]),
        (4, 2, [1, 5, 9, 13, 17, 21], [1, 9, 17]),
        (4, 0, [1, 5, 9, 13, 17, 21], []),
        (0, 1, [], []),
    ],
)
def test_which_steps_are_measured(every, details_every, measured, detailed):
    config = DiagnosticsConfig(every=every, details_every=details_every, save_rollouts_every=5)
    assert [step for step in range(1, 25) if config.measures(step)] == measured
    assert [step for step in range(1, 25) if config.details(step)] == detailed
    assert [step for step in range(1, 25) if config.saves_rollouts(step)] == [1, 6, 11, 16, 21]
    assert not DiagnosticsConfig().saves_rollouts(1)
