"""The parts of `R3Config`, one class for each level of the dotted names.

Each field says what it means, in which unit, and which values it takes; `problems` finds values that contradict.
"""

from dataclasses import dataclass
from typing import Any

from r3.config.alarm_bounds import AlarmsConfig
from r3.config.fields import (
    DTYPES,
    NAME,
    OPEN,
    PATH,
    above,
    any_of,
    at_least,
    between,
    one_of,
    part,
    setting,
)

SINKS = ("tensorboard", "trackio", "wandb", "ray")
CORRECTIONS = ("none", "tis", "mis", "icepop", "gspo")
SCHEDULERS = ("constant", "linear", "cosine")
NUMERICS = ("own", "matched")
LEVELS = ("token", "sequence")
ENGINE_FAULTS = ("repetition", "logprobs", "selection")
MOST_REPEAT_NATS = 0.1
"""Mean over tokens of how far an engine's second answer to a prompt at temperature 0 may be from its first."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = setting("", "Folder of the policy: config, tokenizer and safetensors.", PATH)
    experts_implementation: str = setting(
        "auto",
        "How expert layers are computed: `r3_grouped`, `eager`, or another name in transformers' registry of experts "
        "functions, such as `grouped_mm`. `auto` is `r3_grouped`, or with a warning what transformers loads the model "
        "with, where a layer does not fit.",
        NAME,
    )
    use_liger_kernel: bool = setting(
        False, "RMS norms by Liger's kernels, on a GPU. Needs the package liger-kernel, and a model that Liger knows."
    )


@dataclass(frozen=True, kw_only=True)
class FSDPConfig:
    moe_enable_routing_replay: bool = setting(
        True,
        "Replay the rollouts' routing in training. Needs `generator.inference_engine.enable_return_routed_experts`.",
    )
    gradient_checkpointing: bool = setting(True, "Compute activations anew in the backward, for less memory.")
    param_dtype: str = setting(
        "bfloat16", "dtype of forward and backward; the optimizer works on float32 parameters.", one_of(DTYPES)
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    lr: float = setting(1e-6, "Learning rate of AdamW; with a scheduler, the highest.", at_least(0), unit="per update")
    weight_decay: float = setting(0.0, "Weight decay of AdamW; 0 for none.", at_least(0), unit="per lr")
    max_grad_norm: float = setting(
        1.0, "Gradients whose norm over all parameters is larger are scaled down to it.", above(0), unit="L2 norm"
    )
    scheduler: str = setting(
        "constant",
        "Learning rate after the warm-up: `constant`, or falling to 0 after `trainer.max_steps`, `linear` or as half a "
        "`cosine`. All updates of a step have the same.",
        one_of(SCHEDULERS),
    )
    warmup_steps: int = setting(
        0,
        "Steps over which the learning rate rises in equal parts, ending below its highest.",
        at_least(0),
        unit="steps",
    )


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    sequence_parallel_size: int = setting(
        1,
        "Ranks that share each row (Ulysses). Must divide the ranks, and the model's query heads.",
        at_least(1),
        unit="ranks",
    )
    expert_parallel_size: int = setting(
        1,
        "Ranks over which the experts of each layer are spread: each holds its own, and tokens are sent to them, by "
        "transformers (5.23 or later). Must divide the ranks, and the model's experts; 1 for none.",
        at_least(1),
        unit="ranks",
    )
    numerics: str = setting(
        "own",
        "Experimental: with `matched` the engine is batch-invariant, and its kernels give the values of the trainer's "
        "forward. On a Hopper GPU, of qwen3_moe, qwen3 and glm4_moe (`docs/reference/numerics.md` says what was seen). "
        "`own` leaves both sides their own kernels.",
        one_of(NUMERICS),
    )
    model: ModelConfig = part(ModelConfig)
    fsdp_config: FSDPConfig = part(FSDPConfig)
    optimizer_config: OptimizerConfig = part(OptimizerConfig)


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    eps_clip_low: float = setting(
        0.2, "The ratio of probabilities is clipped below 1 minus this.", between(0, 1), unit="ratio"
    )
    eps_clip_high: float = setting(
        0.28, "The ratio of probabilities is clipped above 1 plus this.", at_least(0), unit="ratio"
    )
    correction: str = setting(
        "none",
        "Of the gap between trainer and rollout: `tis` truncates importance weights, `mis` drops what is above the "
        "bound, `icepop` what is outside two; `gspo` takes ratios of sequences. `none` takes the ratio to the rollout.",
        one_of(CORRECTIONS),
    )
    correction_level: str = setting(
        "token", "Whether `tis` and `mis` weigh single tokens or sequences.", one_of(LEVELS)
    )
    correction_low: float | None = setting(
        None,
        "`icepop` drops tokens with less trainer over rollout; null for 0.5.",
        between(0, 1),
        unit="ratio",
    )
    correction_high: float | None = setting(
        None,
        "`tis` truncates there, `mis` and `icepop` drop what is above; null for 2, of sequences and `icepop` for 5.",
        between(1, 1e6),
        unit="ratio",
    )
    kl_coef: float = setting(
        0.0,
        "Weight of the KL to the starting checkpoint in the loss; 0 for none, and no second model.",
        at_least(0),
        unit="per nat",
    )

    def problems(self) -> list[str]:
        """What contradicts or makes no sense, by dotted name."""
        prefix, problems = "trainer.algorithm", []
        uses = {
            "correction_level": self.correction_level == "token" or self.correction in ("tis", "mis"),
            "correction_low": self.correction_low is None or self.correction == "icepop",
            "correction_high": self.correction_high is None or self.correction in ("tis", "mis", "icepop"),
        }
        for name, used in uses.items():
            if not used:
                problems.append(
                    f"{prefix}.{name}={getattr(self, name)}: {prefix}.correction={self.correction} does not use it; "
                    "leave it at its default"
                )
        if (self.correction_low, self.correction_high) == (1, 1):
            problems.append(f"{prefix}.correction_low: expected below correction_high (1), got 1")
        return problems


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    every: int = setting(
        1,
        "Measure the gap, live and replayed, at the first step and every so many after it; 0 for never.",
        at_least(0),
        unit="steps",
    )
    details_every: int = setting(
        10,
        "Every so many measured steps, beginning with the first, keep single tokens for the report; 0 for never.",
        at_least(0),
        unit="measured steps",
    )
    extreme_ratio: float = setting(
        2.0,
        "A token is extreme if its ratio of probabilities leaves [1 / extreme_ratio, extreme_ratio].",
        above(1),
        unit="ratio",
    )
    sinks: list[str] = setting([], "Where metrics go beside the run folder.", any_of(SINKS))
    project: str = setting("r3", "Name of the project in trackio and wandb.", NAME)
    save_rollouts_every: int = setting(
        0,
        "Save the rollouts of the first step and of every so many after it; 0 for never.",
        at_least(0),
        unit="steps",
    )
    accepted_engine_faults: list[str] = setting(
        [],
        "An engine that differs from the trainer before the first step stops the run, but for these. "
        "`docs/reference/engines.md` says what they are.",
        any_of(ENGINE_FAULTS),
    )
    alarms: AlarmsConfig = part(AlarmsConfig)

    def measures(self, step: int) -> bool:
        """Whether the gap is measured at `step`, which counts from 1."""
        return self.every > 0 and (step - 1) % self.every == 0

    def details(self, step: int) -> bool:
        """Whether single tokens of `step` are kept; only of steps that are measured."""
        return self.measures(step) and self.details_every > 0 and (step - 1) // self.every % self.details_every == 0

    def saves_rollouts(self, step: int) -> bool:
        """Whether the rollouts of `step` are saved."""
        return self.save_rollouts_every > 0 and (step - 1) % self.save_rollouts_every == 0

    def problems(self) -> list[str]:
        """What contradicts or makes no sense, by dotted name."""
        prefix = "trainer.diagnostics"
        problems = []
        if self.alarms.enabled and self.every == 0:
            problems.append(
                f"{prefix}.alarms.enabled=true needs {prefix}.every above 0: there is nothing to watch otherwise"
            )
        return problems + self.alarms.problems(f"{prefix}.alarms")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    policy: PolicyConfig = part(PolicyConfig)
    algorithm: AlgorithmConfig = part(AlgorithmConfig)
    diagnostics: DiagnosticsConfig = part(DiagnosticsConfig)
    max_steps: int = setting(12, "Length of the run.", at_least(1), unit="steps")
    train_batch_size: int = setting(32, "Prompts of a step.", at_least(1), unit="prompts")
    updates_per_step: int = setting(
        1,
        "Optimizer updates of a step: its rollouts are split into so many mini-batches.",
        at_least(1),
        unit="updates",
    )
    micro_train_batch_size: int = setting(
        64,
        "Rollouts in one forward and backward of a rank, or of ranks that share rows.",
        at_least(1),
        unit="rollouts",
    )
    micro_train_batch_tokens: int = setting(
        0,
        "Most tokens in one forward and backward of a rank, over which rollouts are then spread evenly, instead of "
        "`micro_train_batch_size` rollouts; a longer rollout is alone. 0 counts rollouts.",
        at_least(0),
        unit="tokens",
    )
    max_staleness: int = setting(
        0,
        "Sample the rollouts of coming steps while one trains, with weights at most so many versions older than those "
        "that are trained; 0 samples between steps. Set `trainer.algorithm.correction` with it.",
        at_least(0),
        unit="weight versions",
    )
    use_sample_packing: bool = setting(True, "Several rollouts a row, instead of padding.")
    timeout_s: float = setting(
        3600.0, "Longest wait of a rank for the others, such as for the first one's rollouts.", above(0), unit="s"
    )
    seed: int = setting(0, "Of the random numbers of trainer, engine and task.", between(0, 2**32 - 1), unit="seed")
    eval_every: int = setting(
        0,
        "Evaluate after every so many steps, and after the last, on held-out problems of the task; 0 for never.",
        at_least(0),
        unit="steps",
    )
    eval_batch_size: int = setting(64, "Held-out problems, one completion each.", at_least(1), unit="problems")
    eval_temperature: float = setting(
        0.0, "Of completions in evaluation; 0 for the likeliest tokens.", at_least(0), unit="ratio"
    )
    output_dir: str = setting("", "Run folder; by default a new one under `runs/`.", PATH)

    save_every: int = setting(
        0,
        "Save a checkpoint to go on from after every so many steps, and after the last; 0 for never.",
        at_least(0),
        unit="steps",
    )
    keep_checkpoints: int = setting(
        0, "Remove all but so many of the newest checkpoints; 0 keeps all.", at_least(0), unit="checkpoints"
    )
    save_hf: bool = setting(
        True, "Leave the trained policy as a Hugging Face checkpoint, `policy/` in the run folder, after the last step."
    )
    resume_from: str = setting(
        "",
        "Go on from a checkpoint, from the newest of a run folder, or with `auto` from the newest of `output_dir`, if "
        "it has one.",
        PATH,
    )

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is saved after `step`, which counts from 1."""
        return self.save_every > 0 and (step % self.save_every == 0 or step == self.max_steps)

    def evaluates(self, step: int) -> bool:
        """Whether the weights after `step`, which counts from 1, are evaluated."""
        return self.eval_every > 0 and (step % self.eval_every == 0 or step == self.max_steps)

    def problems(self) -> list[str]:
        """What contradicts or makes no sense, by dotted name."""
        problems = [*self.algorithm.problems(), *self.diagnostics.problems()]
        warmup = self.policy.optimizer_config.warmup_steps
        if 0 < warmup >= self.max_steps:
            problems.append(
                f"trainer.policy.optimizer_config.warmup_steps: expected fewer than trainer.max_steps "
                f"({self.max_steps}), got {warmup}"
            )
        if self.micro_train_batch_tokens and not self.use_sample_packing:
            problems.append(
                "trainer.micro_train_batch_tokens needs trainer.use_sample_packing=true: padding would be on top of it"
            )
        bounds = self.diagnostics.alarms
        if bounds.enabled and bounds.version_lag_stop is not None and self.max_staleness > bounds.version_lag_stop:
            problems.append(
                f"trainer.max_staleness={self.max_staleness}: expected at most "
                f"trainer.diagnostics.alarms.version_lag_stop ({bounds.version_lag_stop:g}), which would stop the run"
            )
        if self.keep_checkpoints and not self.save_every:
            problems.append("trainer.keep_checkpoints: expected trainer.save_every above 0 with it, got 0")
        if self.resume_from == "auto" and not (self.output_dir and self.save_every):
            problems.append(
                "trainer.resume_from=auto needs trainer.output_dir, where it looks, and trainer.save_every above 0"
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    name: str = setting("chain_sum", "A data set of the reasoning-gym package.", NAME)
    settings: dict[str, Any] = setting({}, "Its own settings, such as `task.settings.max_terms=4`.", OPEN)
