"""The parts of `R3Config` that are of rollouts: sampling, engines, and weight syncs into them."""

from dataclasses import dataclass

from r3.config.fields import (
    ADDRESSES,
    DTYPES,
    HOST,
    PATH,
    above,
    at_least,
    between,
    one_of,
    part,
    setting,
    share,
)

MIXED_VERSIONS = ("keep", "invalidate", "drop")
ON_ENGINE_LOST = ("raise", "remove")
ON_RUNNING = ("wait", "abort", "keep")
BROADCASTS = ("gloo", "nccl")
TRANSPORTS = ("files", "gloo", "in_process", "ipc", "nccl")
SENDERS = ("all", "first")


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
    kv_cache_gib: float | None = setting(
        None,
        "Memory for keys and values, taken without measuring what is free: engines that share a GPU with other "
        "processes can start at any time. null: 0.5 on the CPU, and on a GPU the rest of `gpu_memory_utilization`.",
        above(0),
        unit="GiB",
    )
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
