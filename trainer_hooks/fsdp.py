"""GRPO with rollout routing replay: an FSDP2 policy, a vLLM engine, and the loop between them.

Each step: rollouts with captured routing, rewards, training with that routing replayed, and a complete weight sync back
into the running engine. `trainer.policy.fsdp_config.moe_enable_routing_replay=false` turns replay off and nothing else.

Limits of this version: one trainer process (FSDP2 over a mesh of one rank), right-padded batches.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import r3
from r3.capture import RolloutBatch, Rollouts, collect, running_engine, sampling_kwargs
from r3.config import R3Config, process_rank
from r3.diagnostics import LiveTable, LogprobSums, RoutingSums, RunFolder, write_report
from r3.weight_sync import SyncReceipt, WeightSync

logger = logging.getLogger("r3")

ADVANTAGE_EPS = 1e-4


class Task(Protocol):
    """Prompts, and rewards for what is made of them."""

    def problems(self, step: int, count: int) -> list[Any]:
        """`count` problems for `step`."""
        ...

    def prompt(self, problem: Any) -> str: ...

    def reward(self, problem: Any, completion: str) -> float: ...


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO advantages: rewards `[prompts, samples]` less the prompt's mean, over its standard deviation.

    Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, equation for outcome supervision; a small constant keeps groups
    whose rewards are all equal at 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + ADVANTAGE_EPS)


def clipped_objective(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """PPO's clipped surrogate by token, to be maximised: min(r A, clip(r, 1 - low, 1 + high) A)."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


class Policy:
    """A causal language model under FSDP2, with replay attached.

    Args:
        config: settings; `trainer.policy.model.path` is the checkpoint.

    Raises:
        UnsupportedModelError: the model is dense, or its routers cannot be replayed exactly, while the settings ask
            for capture or replay.
    """

    def __init__(self, config: R3Config) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        policy = config.trainer.policy
        fsdp, capture = policy.fsdp_config, config.generator.inference_engine.enable_return_routed_experts
        self.temperature = config.generator.sampling_params.temperature
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(policy.model.path)
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(policy.model.path, dtype=torch.float32)
        self.model.to(self.device)
        # Before sharding, so that the proof at attach refuses a model before anything is built around it.
        self.replay = r3.attach(self.model, required=fsdp.moe_enable_routing_replay) if capture else None
        if fsdp.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # pyrefly: ignore
        self._shard(getattr(torch, fsdp.param_dtype))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=policy.optimizer_config.lr,
            betas=(0.9, 0.95),
            weight_decay=policy.optimizer_config.weight_decay,
        )

    def _shard(self, param_dtype: torch.dtype) -> None:
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),), mesh_dim_names=("fsdp",))
        low = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        names = set(self.model._no_split_modules)  # pyrefly: ignore
        for module in self.model.modules():
            if type(module).__name__ in names:
                fully_shard(module, mesh=mesh, mp_policy=low)
        if not self.model.config.tie_word_embeddings:  # pyrefly: ignore
            # Logits in float32, as the engine computes them: in bfloat16 their rounding alone is most of the gap.
            full = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float32)
            fully_shard(self.model.lm_head, mesh=mesh, mp_policy=full)  # pyrefly: ignore
        fully_shard(self.model, mesh=mesh, mp_policy=low)

    def logprobs(self, batch: RolloutBatch, *, replayed: bool) -> Tensor:
        """Float32 `[B, S]` log-probabilities in nats of `batch.input_ids`, at the sampling temperature.

        Entry t is of token t; 0 where `response_mask` is False. `replayed` says whether routing is replayed or live.
        """
        routing = {"routed_experts": batch.routing} if replayed else {}
        logits = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **routing
        ).logits
        mask = batch.response_mask
        chosen = logits[:, :-1][mask[:, 1:]].float() / self.temperature
        found = -F.cross_entropy(chosen, batch.input_ids[mask], reduction="none")
        return torch.zeros(mask.shape, device=found.device).masked_scatter(mask, found)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights by Hugging Face names; sharded ones as they are."""
        yield from self.model.state_dict().items()


@dataclass
class StepBatch:
    """The rollouts of a step as tensors, with an advantage for each."""

    batch: RolloutBatch
    advantages: Tensor  # [B]

    def split(self, size: int, device: torch.device) -> Iterator["StepBatch"]:
        """Parts of at most `size` rollouts, on `device`."""
        for at in range(0, len(self.advantages), size):
            part = slice(at, at + size)
            yield StepBatch(self.batch.select(part).to(device), self.advantages[part].to(device))


class GRPOTrainer:
    """The loop. `train()` runs it to the end and leaves a run folder.

    Args:
        config: all settings.
        task: where prompts and rewards come from.
        policy: what is trained.
        engine: a running `vllm.LLM` with the policy's weights.
    """

    def __init__(self, config: R3Config, task: Task, policy: Policy, engine: Any) -> None:
        from vllm import SamplingParams

        settings = config.generator.inference_engine.weight_sync
        self.config = config
        self.task = task
        self.policy = policy
        self.engine = engine
        self.sampling = SamplingParams(**sampling_kwargs(config))
        self.sync = WeightSync(
            engine,
            transport=settings.transport,
            dtype=getattr(torch, config.generator.inference_engine.dtype),
            chunk_bytes=int(settings.chunk_mib * 2**20),
            timeout_s=settings.timeout_s,
        )

    def train(self, folder: RunFolder) -> None:
        """Run `trainer.max_steps` steps; each is logged to `folder` and shown in a live table."""
        with contextlib.closing(self.sync), LiveTable() as table:
            for step in range(1, self.config.trainer.max_steps + 1):
                metrics = self.step(step)
                folder.log(step, metrics)
                table.update({"step": step, **metrics})

    def step(self, step: int) -> dict[str, float]:
        """Rollouts, rewards, training, sync. Returns the step's metrics."""
        start = time.perf_counter()
        problems = self.task.problems(step, self.config.trainer.train_batch_size)
        rollouts = self.rollout(problems)
        rewards = self.rewards(problems, rollouts)
        rolled_out = time.perf_counter()
        whole = StepBatch(rollouts.batch(self.policy.tokenizer.pad_token_id), group_advantages(rewards).flatten())
        metrics = self.measure(whole) | self.update(whole)
        trained = time.perf_counter()
        receipt = self.push(version=step)
        tokens = int(whole.batch.response_mask.sum())
        return {
            "reward/mean": float(rewards.mean()),
            "reward/std_in_group": float(rewards.std(dim=1).mean()),
            "rollout/tokens_mean": tokens / rewards.numel(),
            **metrics,
            "sync/version": receipt.version,
            "sync/bytes": receipt.bytes,
            "sync/chunks": receipt.chunks,
            "sync/seconds": receipt.seconds,
            "time/rollout_s": rolled_out - start,
            "time/train_s": trained - rolled_out,
            "time/sync_s": time.perf_counter() - trained,
        }

    def rollout(self, problems: Sequence[Any]) -> Rollouts:
        """`n_samples_per_prompt` completions of each problem, with routing if it is captured."""
        self.sync.require_committed()
        tokenizer = self.policy.tokenizer
        prompts = [{"prompt_token_ids": tokenizer(self.task.prompt(problem)).input_ids} for problem in problems]
        outputs = self.engine.generate(prompts, self.sampling, use_tqdm=False)
        spec = self.policy.replay.spec if self.policy.replay else None
        return collect(outputs, spec, weight_version=self.sync.version)

    def rewards(self, problems: Sequence[Any], rollouts: Rollouts) -> Tensor:
        """`[prompts, samples]`, by the task's own verifier."""
        texts = self.policy.tokenizer.batch_decode([r.token_ids for r in rollouts.items], skip_special_tokens=True)
        scores = [self.task.reward(problems[r.prompt_index], t) for r, t in zip(rollouts.items, texts, strict=True)]
        return torch.tensor(scores).view(len(problems), -1)

    @torch.no_grad()
    def measure(self, whole: StepBatch) -> dict[str, float]:
        """The gap between train and rollout before the update, replayed and live on the same tokens."""
        policy = self.policy
        policy.model.eval()
        gaps: dict[str, list[LogprobSums]] = {"live": [], "replayed": []}
        routing: list[RoutingSums] = []
        for part in whole.split(self.config.trainer.micro_train_batch_size, policy.device):
            batch = part.batch

            def gap(found: Tensor, batch: RolloutBatch = batch) -> LogprobSums:
                return LogprobSums.from_tensors(found, batch.logprobs, batch.response_mask)

            if batch.routing is None:
                gaps["live"].append(gap(policy.logprobs(batch, replayed=False)))
                continue
            with r3.record(policy.model) as recorder:
                gaps["live"].append(gap(policy.logprobs(batch, replayed=False)))
            gaps["replayed"].append(gap(policy.logprobs(batch, replayed=True)))
            taken, rolled_out = recorder.routing, batch.routing.to("cpu")
            routing.append(
                RoutingSums.from_tensors(
                    taken.expert_ids, rolled_out.expert_ids, rolled_out.valid, layer_ids=rolled_out.layer_ids
                )
            )
        groups = {f"logprob_diff/{mode}": sums for mode, sums in gaps.items()} | {"routing": routing}
        return {
            f"{group}/{name}": value
            for group, sums in groups.items()
            if sums
            for name, value in sum(sums[1:], sums[0]).metrics().items()
        }

    def update(self, whole: StepBatch) -> dict[str, float]:
        """`updates_per_step` optimizer steps on the step's rollouts, token-weighted, with routing replayed."""
        trainer, policy = self.config.trainer, self.policy
        replayed = trainer.policy.fsdp_config.moe_enable_routing_replay
        policy.model.train()
        totals = {"loss": 0.0, "clipped": 0.0, "tokens": 0, "rows_replayed": 0, "rows_live": 0}
        norms = []
        size = -(-len(whole.advantages) // trainer.updates_per_step)
        for mini in whole.split(size, torch.device("cpu")):
            tokens = int(mini.batch.response_mask.sum())
            for part in mini.split(trainer.micro_train_batch_size, policy.device):
                loss, clipped = self._loss(part, replayed)
                (loss / tokens).backward()
                totals["loss"] += float(loss.detach())
                totals["clipped"] += float(clipped)
                # Of tokens, not of padding: `policy.replay.last` counts every row of the padded batch.
                rows = int(part.batch.attention_mask.sum())
                valid = policy.replay.last.rows_replayed if policy.replay and policy.replay.last else 0
                totals["rows_replayed"] += valid
                totals["rows_live"] += rows - valid
            totals["tokens"] += tokens
            norm = nn.utils.clip_grad_norm_(policy.model.parameters(), trainer.policy.optimizer_config.max_grad_norm)
            norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))  # pyrefly: ignore
            policy.optimizer.step()
            policy.optimizer.zero_grad(set_to_none=True)
        return {
            "train/loss": totals["loss"] / totals["tokens"],
            "train/clipped_frac": totals["clipped"] / totals["tokens"],
            "train/grad_norm": sum(norms) / len(norms),
            "train/updates": len(norms),
            "routing/rows_replayed": totals["rows_replayed"],
            "routing/rows_live": totals["rows_live"],
        }

    def _loss(self, part: StepBatch, replayed: bool) -> tuple[Tensor, Tensor]:
        """Sum over tokens of the negative objective, and how many tokens are outside the bounds."""
        low, high = self.config.trainer.algorithm.eps_clip_low, self.config.trainer.algorithm.eps_clip_high
        mask = part.batch.response_mask
        # Against the policy that sampled: the rollout's own log-probabilities, not the trainer's idea of them.
        ratio = (self.policy.logprobs(part.batch, replayed=replayed) - part.batch.logprobs)[mask].exp()
        advantages = part.advantages[:, None].expand(mask.shape)[mask]
        outside = ((ratio < 1 - low) | (ratio > 1 + high)).sum()
        return -clipped_objective(ratio, advantages, low, high).sum(), outside

    def push(self, version: int) -> SyncReceipt:
        """A complete sync of the policy's weights into the engine."""
        return self.sync.push(self.policy.named_tensors(), version=version)


def train(config: R3Config, task: Task) -> Path:
    """The whole job: process group, policy, engine, loop, report. Returns the run folder.

    Nothing is left running, also after Ctrl-C or an exception.

    Raises:
        ConfigError: settings that contradict each other, before anything is started.
        UnsupportedModelError: the model cannot be replayed.
        CaptureError, SyncError: what went wrong, in the step in which it did.
    """
    config.check()
    path = Path(config.trainer.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    folder = RunFolder(path, config.to_flat())
    torch.manual_seed(config.trainer.seed)
    with process_group():
        policy = Policy(config)
        with running_engine(config) as engine:
            GRPOTrainer(config, task, policy, engine).train(folder)
    write_report(path)
    return path


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """The default process group, made here unless there is one already."""
    world = process_rank()[1]
    if world > 1:
        raise r3.ConfigError(f"expected one trainer process, got {world}: start it without a launcher")
    if dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
