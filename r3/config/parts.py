"""The parts of `R3Config`, one class for each level of the dotted names.

Each field says what it means, in which unit, and which values it takes; `problems` finds values that contradict.
"""

from dataclasses import dataclass
from typing import Any

from r3.config.alarm_bounds import AlarmsConfig
from r3.config.fields import (
    ADDRESSES,
    HOST,
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
    share,
)

DTYPES = ("float32", "bfloat16", "float16")
MIXED_VERSIONS = ("keep", "invalidate", "drop")
ON_ENGINE_LOST = ("raise", "remove")
ON_RUNNING = ("wait", "abort", "keep")
SINKS = ("tensorboard", "trackio", "wandb", "ray")
BROADCASTS = ("gloo", "nccl")
TRANSPORTS = ("files", "gloo", "in_process", "ipc", "nccl")
SENDERS = ("all", "first")
CORRECTIONS = ("none", "tis", "mis", "icepop", "gspo")
SCHEDULERS = ("constant", "linear", "cosine")
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
class SamplingConfig:
    temperature: float = setting(
        1.0, "Logits are divided by it, in the engine and in the trainer.", above(0), unit="ratio"
    )
    max_generate_length: int = setting(96, "Longest completion.", at_least(1), unit="tokens")
    top_k: int = setting(
        0,
        "Number of likeliest tokens that a token is sampled from; 0 for all. Below all, the trainer scores each token "
        "over what it was sampled from.",
        at_least(0),
        unit="tokens",
    )
    top_p: float = setting(
        1.0,
        "Mass of the likeliest tokens that a token is sampled from; below 1 it needs `top_k`.",
        share(zero=False),
        unit="share of probability",
    )
    min_p: float = setting(
        0.0,
        "Least probability of a token that is sampled, over the likeliest one's; above 0 it needs `top_k`.",
        share(zero=True),
        unit="ratio",
    )

    @property
    def truncated(self) -> bool:
        """Whether tokens are sampled from less than the whole vocabulary."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def problems(self, prefix: str) -> list[str]:
        """Settings that make no sense together, by dotted name from `prefix`."""
        if self.truncated and not self.top_k:
            return [
                f"{prefix}.top_k: expected a number above 0 with top_p below 1 or min_p above 0, got 0: it bounds the "
                "sets that tokens are sampled from, which the engine sends with them"
            ]
        return []


@dataclass(frozen=True, kw_only=True)
class WeightSyncConfig:
    transport: str = setting(
        "files",
        "How weights go to the engine: `nccl` between GPUs, `ipc` on one GPU. `in_process` runs the engine in the "
        "first rank's own process: there is one process less, and on a GPU a step of the engine takes less time.",
        one_of(TRANSPORTS),
    )
    delta: bool = setting(
        False,
        "Send only what changed since the last version. Costs a copy of the weights in main memory on both sides.",
    )
    fused_experts: bool = setting(
        False,
        "Send the experts of a layer as one tensor, as transformers has them: faster, where vLLM's model takes them "
        "so.",
    )
    load_plan: bool = setting(
        True,
        "Copy weights as the first sync proved that vLLM's loaders do. `false` sends every sync through the loaders: "
        "much slower with many experts, and one thing less to look at when a sync is in doubt.",
    )
    chunk_mib: float = setting(512.0, "Largest chunk.", above(0), unit="MiB")
    folder: str = setting(
        "",
        "Where `files` go, the same path on all hosts; '' for a temporary folder of this one, in memory where it has a "
        "RAM disk.",
        PATH,
    )
    host: str = setting(
        "",
        "Address of the first rank's host by which engines on other hosts reach it, for `gloo` and `nccl`; '' for the "
        "one from which it reaches the first of them.",
        HOST,
    )
    port: int = setting(
        0,
        "Port at that address where trainer and engines meet, for a firewall to open; 0 for any that is free.",
        between(0, 65535),
        unit="port",
    )
    senders: str = setting(
        "all",
        "Which trainer ranks send weights by `gloo` and `nccl`: `all` a part each, gathered to that rank alone; or the "
        "`first`, for engines that reach no other. A delta is sent by the first.",
        one_of(SENDERS),
    )
    on_running: str = setting(
        "wait",
        "What a sync does with requests that run in one of several engines: `wait` for their end, `abort` them, after "
        "which they are asked anew, or `keep` them, which go on by the new weights.",
        one_of(ON_RUNNING),
    )
    timeout_s: float = setting(600.0, "Longest wait for the engine or its workers in a sync.", above(0), unit="s")

    def problems(self, prefix: str) -> list[str]:
        """Settings that the transport does not use, by dotted name from `prefix`."""
        users = {"folder": ("files",)} | dict.fromkeys(("host", "port", "senders"), BROADCASTS)
        default = WeightSyncConfig()
        return [
            f"{prefix}.{name}={getattr(self, name)}: {prefix}.transport={self.transport} does not use it; "
            f"{' and '.join(transports)} {'does' if len(transports) == 1 else 'do'}"
            for name, transports in users.items()
            if getattr(self, name) != getattr(default, name) and self.transport not in transports
        ]


@dataclass(frozen=True, kw_only=True)
class InferenceEngineConfig:
    enable_return_routed_experts: bool = setting(True, "Capture routing. Replay needs it.")
    mixed_weight_versions: str = setting(
        "keep",
        "Rollouts during which the weights changed: `keep` their routing, under which their tokens were sampled; "
        "`invalidate` rows of older weights, which are then routed live; or `drop` the rollout.",
        one_of(MIXED_VERSIONS),
    )
    dtype: str = setting("bfloat16", "dtype of the engine's weights and activations.", one_of(DTYPES))
    tensor_parallel_size: int = setting(1, "Workers that share each layer.", at_least(1), unit="workers")
    pipeline_parallel_size: int = setting(1, "Groups of workers that share the layers.", at_least(1), unit="groups")
    max_model_len: int = setting(512, "Longest prompt and completion together.", at_least(2), unit="tokens")
    max_num_seqs: int = setting(256, "Most sequences that the engine computes at once.", at_least(1), unit="sequences")
    enforce_eager: bool = setting(True, "No compilation and no CUDA graphs. vLLM's compiled CPU mode does not capture.")
    cpu_kv_cache_gib: float = setting(0.5, "Memory for keys and values of an engine on the CPU.", above(0), unit="GiB")
    gpu_memory_utilization: float = setting(
        0.3,
        "What the engine takes of a GPU's memory, its weights included; the trainer needs the rest.",
        share(zero=False),
        unit="share of memory",
    )
    num_engines: int = setting(
        1,
        "Engines that the run starts. More than one are `vllm serve`s of this host, each with GPUs of its own.",
        at_least(1),
        unit="engines",
    )
    addresses: list[str] = setting(
        [], "Addresses of `vllm serve`s, on any host, that sample instead of engines that the run starts.", ADDRESSES
    )
    max_in_flight: int = setting(
        256,
        "Most sequences in flight on one of several engines; what comes beyond waits for whichever has room.",
        at_least(1),
        unit="sequences",
    )
    request_timeout_s: float = setting(
        1800.0,
        "Longest wait for one of several engines to answer a request. Then its requests move to others.",
        above(0),
        unit="s",
    )
    on_engine_lost: str = setting(
        "raise",
        "A sync in which one of several engines dies or does not answer: `raise` its error, or `remove` that engine "
        "with a warning and commit on the rest.",
        one_of(ON_ENGINE_LOST),
    )
    weight_sync: WeightSyncConfig = part(WeightSyncConfig)

    @property
    def in_process(self) -> bool:
        """Whether the engine runs in the first rank's own process."""
        return self.weight_sync.transport == "in_process"

    @property
    def pooled(self) -> bool:
        """Whether an engine pool samples."""
        return self.num_engines > 1 or bool(self.addresses)


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    n_samples_per_prompt: int = setting(
        8, "Completions of a prompt, whose rewards are compared with each other.", at_least(2), unit="rollouts"
    )
    sampling_params: SamplingConfig = part(SamplingConfig)
    inference_engine: InferenceEngineConfig = part(InferenceEngineConfig)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    name: str = setting("chain_sum", "A data set of the reasoning-gym package.", NAME)
    settings: dict[str, Any] = setting({}, "Its own settings, such as `task.settings.max_terms=4`.", OPEN)
