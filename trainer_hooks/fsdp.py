"""GRPO with rollout routing replay: an FSDP2 policy, a vLLM engine, and the loop between them.

Each step: rollouts with captured routing, rewards, training with that routing replayed, and a complete weight sync back
into the running engine. `trainer.policy.fsdp_config.moe_enable_routing_replay=false` turns replay off and nothing else.

`torchrun --nproc-per-node N` and `accelerate launch` start it on N ranks: the first of them runs the engine, all train,
in groups of `sequence_parallel_size` that share each row.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

import r3
from r3.capture import Rollouts, collect, resolve_mixed_versions, running_engine, sampling_kwargs
from r3.config import R3Config, local_rank, process_rank
from r3.diagnostics import RunFolder, require_sinks
from r3.errors import ParallelError, SyncError
from r3.parallel import RankBarrier, make_mesh, shard_parameters, token_logprobs, ulysses
from r3.report import write_report
from r3.routing import prefetch
from r3.weight_sync import LazyWeight, SyncReceipt, Weight, WeightSync, gather_all, named_weights
from r3.weight_sync.timing import StageTimer
from trainer_hooks.batches import Rows, StepBatch, broadcast
from trainer_hooks.engine_check import check_engine
from trainer_hooks.measure import Measured, StepGap, coverage, measure
from trainer_hooks.step_log import StepLog

logger = logging.getLogger("r3")

ADVANTAGE_EPS = 1e-4
CPU = torch.device("cpu")


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
        self.fused_experts = config.generator.inference_engine.weight_sync.fused_experts
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
        self.mesh = make_mesh(self.device.type, policy.sequence_parallel_size)
        self.barrier = RankBarrier(timeout_s=config.trainer.timeout_s)
        self.packed = config.trainer.use_sample_packing
        self.tokenizer = AutoTokenizer.from_pretrained(policy.model.path)
        model = AutoModelForCausalLM.from_pretrained(policy.model.path, dtype=torch.float32).to(self.device)
        # Before sharding, so that a model that cannot be replayed or sliced is refused before anything is built on it.
        self.replay = r3.attach(model, required=fsdp.moe_enable_routing_replay) if capture else None
        self.sliced = self.packed or self.mesh.sequence_size > 1
        if self.sliced:
            ulysses(model, self.mesh.sequence_group, barrier=self.barrier if dist.get_world_size() > 1 else None)
        if fsdp.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = shard_parameters(model, self.mesh, param_dtype=getattr(torch, fsdp.param_dtype))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=policy.optimizer_config.lr,
            betas=(0.9, 0.95),
            weight_decay=policy.optimizer_config.weight_decay,
        )

    def logprobs(self, rows: Rows, *, replayed: bool) -> Tensor:
        """Float32 `[R, N]` log-probabilities in nats of `rows.labels`, at the sampling temperature.

        0 where there is no label. `replayed` says whether routing is replayed or live.
        """
        routing = {"routed_experts": rows.routing} if replayed else {}
        padding = {} if self.sliced else {"attention_mask": rows.tokens.long()}
        logits = self.model(
            input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False, **padding, **routing
        ).logits
        return token_logprobs(logits, rows.labels, temperature=self.temperature)

    def rows(self, whole: StepBatch, size: int) -> Iterator[Rows]:
        """This rank's part of `whole` on its device, `size` rollouts at a time."""
        return prefetch(whole.rows(self.mesh, size=size, packed=self.packed), self.device)

    def named_weights(self) -> list[tuple[str, LazyWeight]]:
        """All weights by the names of a checkpoint; sharded ones are gathered when their turn comes."""
        return named_weights(self.model, fused_experts=self.fused_experts)


class GRPOTrainer:
    """The loop. `train()` runs it to the end and leaves a run folder.

    Args:
        config: all settings.
        task: where prompts and rewards come from.
        policy: what is trained.
        engine: a running `vllm.LLM` with the policy's weights, on the first rank; None on the others.
        log: where steps are recorded, on the first rank; None on the others.
    """

    def __init__(self, config: R3Config, task: Task, policy: Policy, engine: Any, log: StepLog | None = None) -> None:
        self.config = config
        self.task = task
        self.policy = policy
        self.engine = engine
        self.log = log
        self.sync = None if engine is None else self._weight_sync()

    def _weight_sync(self) -> WeightSync:
        engine = self.config.generator.inference_engine
        return WeightSync(
            self.engine,
            transport=engine.weight_sync.transport,
            delta=engine.weight_sync.delta,
            dtype=getattr(torch, engine.dtype),
            chunk_bytes=int(engine.weight_sync.chunk_mib * 2**20),
            timeout_s=engine.weight_sync.timeout_s,
        )

    def train(self, checked: Mapping[str, float] = MappingProxyType({})) -> None:
        """Run `trainer.max_steps` steps, and record each; what was `checked` before, with the first.

        Raises:
            AlarmError: an alarm stops the run; a `ParallelError` on the other ranks.
        """
        with contextlib.closing(self.sync) if self.sync is not None else contextlib.nullcontext():
            for step in range(1, self.config.trainer.max_steps + 1):
                metrics, details = self.step(step)
                with self.policy.barrier.guard():
                    if self.log is not None:
                        self.log.add(step, {**(checked if step == 1 else {}), **metrics}, details)

    def step(self, step: int) -> tuple[dict[str, float], dict[str, Any] | None]:
        """Rollouts, rewards, training, sync. Returns the step's metrics, and its details where they are due."""
        diagnostics = self.config.trainer.diagnostics
        clock = StageTimer()
        with clock.stage("rollout"), self.policy.barrier.guard():
            # The first rank has the engine, and the others wait for what it makes.
            whole, metrics = self.experience(step) if self.engine is not None else (None, {})
        with clock.stage("rollout"):
            whole = broadcast(whole)
        details, gap = None, None
        if diagnostics.measures(step):
            with clock.stage("measure"):
                measured = self.measure(whole, details=diagnostics.details(step))
            metrics |= measured.metrics
            details = measured.details
        elif diagnostics.every:
            # Of the side that is trained on, what the training forwards give anyway.
            gap = StepGap(samples=len(whole.advantages), extreme_ratio=diagnostics.extreme_ratio)
        with clock.stage("train"):
            metrics |= self.update(whole, gap)
        if gap is not None:
            metrics |= gap.reduced().metrics()
        with clock.stage("sync"):
            receipt = self.push(version=step)
        if receipt is not None:
            metrics |= {
                "sync/version": receipt.version,
                "sync/bytes": receipt.bytes,
                "sync/chunks": receipt.chunks,
                "sync/seconds": receipt.seconds,
            }
        return metrics | {f"time/{stage}_s": seconds for stage, seconds in clock.stages_s.items()}, details

    def experience(self, step: int) -> tuple[StepBatch, dict[str, float]]:
        """The rollouts of a step with their advantages, and metrics of rewards and of captured routing."""
        problems = self.task.problems(step, self.config.trainer.train_batch_size)
        rollouts = self.rollout(problems)
        if self.log is not None and self.config.trainer.diagnostics.saves_rollouts(step):
            self.log.save(step, rollouts)
        rewards = self.rewards(problems, rollouts)
        batch = rollouts.batch(self.policy.tokenizer.pad_token_id)
        return StepBatch.of(batch, group_advantages(rewards).flatten()), {
            "reward/mean": float(rewards.mean()),
            "reward/std_in_group": float(rewards.std(dim=1).mean()),
            "rollout/tokens_mean": int(batch.response_mask.sum()) / rewards.numel(),
            **coverage(rollouts, batch, trainer_version=step - 1),
        }

    def rollout(self, problems: Sequence[Any]) -> Rollouts:
        """`n_samples_per_prompt` completions of each problem, with routing if it is captured."""
        from vllm import SamplingParams

        assert self.sync is not None
        self.sync.require_committed()
        tokenizer = self.policy.tokenizer
        prompts = [{"prompt_token_ids": tokenizer(self.task.prompt(problem)).input_ids} for problem in problems]
        outputs = self.engine.generate(prompts, SamplingParams(**sampling_kwargs(self.config)), use_tqdm=False)
        spec = self.policy.replay.spec if self.policy.replay else None
        # Before the first sync the engine has the checkpoint that training starts from.
        rollouts = collect(outputs, spec, weight_version=self.sync.version or 0)
        return resolve_mixed_versions(rollouts, self.config.generator.inference_engine.mixed_weight_versions)

    def rewards(self, problems: Sequence[Any], rollouts: Rollouts) -> Tensor:
        """`[prompts, samples]`, by the task's own verifier."""
        texts = self.policy.tokenizer.batch_decode([r.token_ids for r in rollouts.items], skip_special_tokens=True)
        scores = [self.task.reward(problems[r.prompt_index], t) for r, t in zip(rollouts.items, texts, strict=True)]
        return torch.tensor(scores).view(len(problems), -1)

    def measure(self, whole: StepBatch, *, details: bool = False) -> Measured:
        """The gap between train and rollout before the update, replayed and live on the same tokens."""
        trainer = self.config.trainer
        return measure(
            self.policy,
            whole,
            size=trainer.micro_train_batch_size,
            extreme_ratio=trainer.diagnostics.extreme_ratio,
            details=details,
        )

    def update(self, whole: StepBatch, gap: StepGap | None = None) -> dict[str, float]:
        """`updates_per_step` optimizer steps on the step's rollouts, token-weighted, with routing replayed.

        `gap` takes what is computed before the first of them: later ones are of weights that did not sample.
        """
        trainer, policy = self.config.trainer, self.policy
        replayed = trainer.policy.fsdp_config.moe_enable_routing_replay
        policy.model.train()
        totals = dict.fromkeys(("loss", "clipped", "rows_replayed", "rows_live", "pairs_live"), 0.0)
        layers = len(policy.replay.spec.layer_ids) if policy.replay else 0
        norms = []
        for mini in whole.split(-(-len(whole.advantages) // trainer.updates_per_step)):
            # Of all ranks, over which gradients are averaged.
            tokens = int(mini.batch.response_mask.sum()) / dist.get_world_size()
            for rows in policy.rows(mini, trainer.micro_train_batch_size):
                found = policy.logprobs(rows, replayed=replayed)
                if gap is not None and not norms:
                    gap.add(rows, {"replayed" if replayed else "live": found.detach()})
                loss, clipped = self._loss(found, rows)
                (loss / tokens).backward()
                totals["loss"] += float(loss.detach())
                totals["clipped"] += float(clipped)
                # Live ones of tokens, not of padding: `policy.replay.last` counts every row of the padded batch.
                last, real = policy.replay.last if policy.replay else None, int(rows.tokens.sum())
                totals["rows_replayed"] += last.rows_replayed if last else 0
                totals["rows_live"] += real - (last.rows_replayed if last else 0)
                totals["pairs_live"] += real * layers - (last.pairs_replayed if last else 0)
            norm = nn.utils.clip_grad_norm_(policy.model.parameters(), trainer.policy.optimizer_config.max_grad_norm)
            norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))  # pyrefly: ignore
            policy.optimizer.step()
            policy.optimizer.zero_grad(set_to_none=True)
        summed = torch.tensor(list(totals.values()), dtype=torch.float64, device=policy.device)
        dist.all_reduce(summed)
        totals = dict(zip(totals, summed.tolist(), strict=True))
        tokens = int(whole.batch.response_mask.sum())
        return {
            "train/loss": totals["loss"] / tokens,
            "train/clipped_frac": totals["clipped"] / tokens,
            "train/grad_norm": sum(norms) / len(norms),
            "train/updates": len(norms),
            "routing/rows_replayed": totals["rows_replayed"],
            "routing/rows_live": totals["rows_live"],
            "routing/pairs_live": totals["pairs_live"],
        }

    def _loss(self, found: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Sum over tokens of the negative objective, and how many tokens are outside the bounds."""
        low, high = self.config.trainer.algorithm.eps_clip_low, self.config.trainer.algorithm.eps_clip_high
        # Against the policy that sampled: the rollout's own log-probabilities, not the trainer's idea of them.
        # Where there is no label, both are 0 and so is the advantage: nothing is added.
        ratio = (found - rows.logprobs).exp()
        outside = ((ratio < 1 - low) | (ratio > 1 + high)).sum()
        return -clipped_objective(ratio, rows.advantages, low, high).sum(), outside

    def push(self, version: int) -> SyncReceipt | None:
        """A sync of the policy's weights into the engine; the receipt where the engine is."""
        return push_from_all_ranks(self.sync, self.policy.named_weights(), version, self.policy.barrier)


def push_from_all_ranks(
    sync: WeightSync | None,
    weights: Sequence[tuple[str, Weight]],
    version: int,
    barrier: RankBarrier,
    frozen: Sequence[str] = (),
) -> SyncReceipt | None:
    """A sync of sharded weights: one rank has the `sync`, and all gather. Every rank calls this, `frozen` alike.

    Sharded tensors are gathered one by one: no rank holds more than a chunk, or one tensor, beside its shards.

    Returns:
        The receipt on the rank with the `sync`, None on the others.

    Raises:
        SyncError: on every rank, if the sync did not commit everywhere or a rank could not gather; it says why.
    """
    try:
        if sync is None:
            with barrier.guard():
                gather_all(weights, frozen=frozen)
            barrier.exchange(None)  # whether it was committed
            return None
        try:
            receipt = sync.push(weights, version=version, frozen=frozen, agree=lambda: barrier.exchange(None))
        except ParallelError:  # of the line above: all ranks know
            raise
        except Exception as error:
            with contextlib.suppress(ParallelError):
                barrier.exchange(f"{type(error).__name__}: {error}")
            raise
        barrier.exchange(None)
    except ParallelError as error:  # what another rank raised
        raise SyncError(str(error)) from error
    return receipt


def train(config: R3Config, task: Task) -> Path:
    """The whole job: process group, policy, engine, loop, report. Returns the run folder.

    Nothing is left running, also after Ctrl-C or an exception.

    Raises:
        ConfigError: settings that contradict each other, before anything is started.
        UnsupportedModelError: the model cannot be replayed.
        CaptureError, SyncError: what went wrong, in the step in which it did.
        AlarmError: the engine differs from the trainer before the first step, or a metric is beyond a bound of
            `trainer.diagnostics.alarms` that stops the run.
    """
    rank, world = process_rank()
    config.check(world)
    require_sinks(config.trainer.diagnostics.sinks)  # before there is a folder that a second try would find in use
    path = Path(config.trainer.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    log = StepLog(config, RunFolder(path, config.to_flat())) if rank == 0 else contextlib.nullcontext()
    torch.manual_seed(config.trainer.seed)
    with process_group(), log as log:
        policy = Policy(config)
        with contextlib.ExitStack() as stack:
            with policy.barrier.guard():
                engine = stack.enter_context(running_engine(config)) if rank == 0 else None
            checked = check_engine(config, policy, engine)
            GRPOTrainer(config, task, policy, engine, log).train(checked)
    if rank == 0:
        write_report(path)
    return path


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """The default process group of the ranks that a launcher started, or of this process alone, unless there is one."""
    if dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if process_rank()[1] > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
