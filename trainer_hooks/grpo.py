"""GRPO with rollout routing replay: the loop between a policy and a vLLM engine.

Each step: rollouts with captured routing, rewards, training with that routing replayed, and a complete weight sync back
into the running engine. `trainer.policy.fsdp_config.moe_enable_routing_replay=false` turns replay off and nothing else.
With `trainer.max_staleness` the rollouts of coming steps are sampled while one trains.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from r3.capture import Rollouts, resolve_mixed_versions, sampling_kwargs
from r3.config import R3Config
from r3.pool import EnginePool
from r3.weight_sync import SyncReceipt
from r3.weight_sync.timing import StageTimer
from trainer_hooks import checkpoint
from trainer_hooks.batches import StepBatch, broadcast
from trainer_hooks.engines import sample, sync_ranks, weight_sync_of
from trainer_hooks.evaluation import evaluate, require_held_out
from trainer_hooks.measurement import Measured, StepGap, coverage, measure, truncation
from trainer_hooks.objective import group_advantages
from trainer_hooks.policy import Policy
from trainer_hooks.publish import push_from_all_ranks
from trainer_hooks.rollouts_ahead import RolloutsAhead
from trainer_hooks.step_log import StepLog
from trainer_hooks.update import update


class Task(Protocol):
    """A source of problems, and of rewards for their completions."""

    def problems(self, step: int, count: int) -> list[Any]:
        """`count` problems for `step`, the same ones if it is asked again, as after a resume."""
        ...

    def prompt(self, problem: Any) -> str: ...

    def reward(self, problem: Any, completion: str) -> float: ...


@dataclass(frozen=True)
class Experience:
    """What a step learns from.

    Attributes:
        rollouts: as they were sampled.
        batch: the same as tensors, with advantages.
        metrics: of rewards and of captured routing, by flat names.
    """

    rollouts: Rollouts
    batch: StepBatch
    metrics: dict[str, float]


class GRPOTrainer:
    """The loop. `train()` runs it to the end and leaves a run folder.

    Args:
        config: all settings.
        task: source of prompts and rewards; with `eval_problems`, if the settings ask for evaluation (`HeldOut`).
        policy: the policy to train.
        engine: a running `vllm.LLM` or an `EnginePool` with the policy's weights, on the first rank; None on the
            others.
        log: record of the steps, on the first rank; None on the others.

    Raises:
        ConfigError: the settings ask for evaluation, and the task has no held-out problems.
    """

    def __init__(self, config: R3Config, task: Task, policy: Policy, engine: Any, log: StepLog | None = None) -> None:
        require_held_out(config, task)
        self.config = config
        self.task = task
        self.policy = policy
        self.engine = engine
        self.log = log
        self.sync = engine if engine is None or isinstance(engine, EnginePool) else weight_sync_of(config, engine)
        self.sync_ranks = sync_ranks(
            config.generator.inference_engine.weight_sync.transport, timeout_s=config.trainer.timeout_s
        )

    def train(
        self,
        checked: Mapping[str, float] = MappingProxyType({}),
        *,
        run_folder: Path | None = None,
        resume_from: Path | None = None,
    ) -> None:
        """Run the steps up to `trainer.max_steps`, and record each.

        Args:
            checked: metrics that are recorded with the first step.
            run_folder: where checkpoints are saved; needed on every rank if the settings ask for them.
            resume_from: a checkpoint to go on from. The engine gets its weights before anything is sampled.

        Raises:
            AlarmError: an alarm stops the run; a `ParallelError` on the other ranks.
            ConfigError: the checkpoint is of a run with other settings.
        """
        with contextlib.ExitStack() as stack:
            for each in (self.sync, self.sync_ranks):
                if each is not None:
                    stack.enter_context(contextlib.closing(each))
            done = 0
            if resume_from is not None:
                done = checkpoint.load(resume_from, self.config, self.policy)
                self.push(version=done)
            steps = range(done + 1, self.config.trainer.max_steps + 1)
            with self.rollouts_ahead(steps) as ahead:
                for step in steps:
                    metrics, details = self.step(step, ahead)
                    with self.policy.barrier.guard():
                        if self.log is not None:
                            self.log.add(step, {**(checked if step == done + 1 else {}), **metrics}, details)
                    if run_folder is not None and self.config.trainer.saves(step):
                        checkpoint.save(run_folder, step, self.config, self.policy)

    def rollouts_ahead(self, steps: range) -> RolloutsAhead[Experience]:
        """The rollouts of `steps`, whose engine has the weights of the step before the first of them."""
        # The first rank has the engine; the others wait for its rollouts.
        staleness = self.config.trainer.max_staleness if self.engine is not None else 0
        return RolloutsAhead(
            self.experience,
            steps,
            version=steps.start - 1,
            max_staleness=staleness,
            shared=isinstance(self.engine, EnginePool),
        )

    def step(
        self, step: int, ahead: RolloutsAhead[Experience] | None = None
    ) -> tuple[dict[str, float], dict[str, Any] | None]:
        """Rollouts, rewards, training, sync, evaluation. Returns the step's metrics, and details if they are due.

        `ahead` has the rollouts; without it they are sampled here.
        """
        diagnostics = self.config.trainer.diagnostics
        ahead = ahead or RolloutsAhead(self.experience, range(step, step + 1))
        clock = StageTimer()
        with clock.stage("rollout"), self.policy.barrier.guard():
            made = self._taken(step, ahead) if self.engine is not None else None
        with clock.stage("rollout"):
            batch = broadcast(None if made is None else made.batch)
        metrics = {} if made is None else made.metrics
        details, gap = None, None
        if diagnostics.measures(step):
            with clock.stage("measure"):
                measured = self.measure(batch, details=diagnostics.details(step))
            metrics |= measured.metrics
            details = measured.details
        elif diagnostics.every:
            # The gap of the trained side, which the training forwards give for free.
            gap = StepGap(samples=len(batch.advantages), extreme_ratio=diagnostics.extreme_ratio)
        with clock.stage("train"):
            metrics |= self.update(batch, gap)
        if gap is not None:
            metrics |= gap.reduced().metrics()
        with clock.stage("sync"), ahead.engine():
            receipt = self.push(version=step)
        ahead.synced(step)
        if receipt is not None:
            metrics |= {
                "sync/version": receipt.version,
                "sync/bytes": receipt.bytes,
                "sync/chunks": receipt.chunks,
                "sync/seconds": receipt.seconds,
            }
        if self.config.trainer.evaluates(step):
            with clock.stage("eval"), self.policy.barrier.guard(), ahead.engine():
                if self.engine is not None:
                    metrics |= evaluate(self.config, self.task, self.engine, self.policy.tokenizer)
        return metrics | {f"time/{stage}_s": seconds for stage, seconds in clock.stages_s.items()}, details

    def _taken(self, step: int, ahead: RolloutsAhead[Experience]) -> Experience:
        made = ahead.get(step)
        if self.log is not None and self.config.trainer.diagnostics.saves_rollouts(step):
            self.log.save(step, made.rollouts)
        return made

    def experience(self, step: int) -> Experience:
        """The rollouts of a step with their rewards, by the weights that the engine has now."""
        problems = self.task.problems(step, self.config.trainer.train_batch_size)
        rollouts = self.rollout(problems, step)
        rewards = self.rewards(problems, rollouts)
        batch = rollouts.batch(self.policy.tokenizer.pad_token_id)
        metrics = {
            "reward/mean": float(rewards.mean()),
            "reward/std_in_group": float(rewards.std(dim=1).mean()),
            "rollout/tokens_mean": int(batch.response_mask.sum()) / rewards.numel(),
            **truncation(batch),
            **coverage(rollouts, batch, trainer_version=step - 1),
        }
        return Experience(rollouts, StepBatch.of(batch, group_advantages(rewards).flatten()), metrics)

    def rollout(self, problems: Sequence[Any], step: int) -> Rollouts:
        """`n_samples_per_prompt` completions of each problem, with routing if it is captured; drawn for `step`."""
        assert self.sync is not None
        self.sync.require_committed()
        tokenizer = self.policy.tokenizer
        rollouts = sample(
            self.config,
            self.engine,
            [tokenizer(self.task.prompt(problem)).input_ids for problem in problems],
            self.policy.replay.spec if self.policy.replay else None,
            sampling=sampling_kwargs(self.config),
            version=self.sync.version or 0,  # before the first sync, of the checkpoint that training starts from
            step=step,
        )
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
            expert_parallel_size=trainer.policy.expert_parallel_size,
        )

    def update(self, whole: StepBatch, gap: StepGap | None = None) -> dict[str, float]:
        """`updates_per_step` optimizer steps on the step's rollouts: see `trainer_hooks.update`."""
        return update(self.config, self.policy, whole, gap)

    def push(self, version: int) -> SyncReceipt | None:
        """Sync the policy's weights into the engine. Returns the receipt on the rank that has the engine."""
        weights, ranks = self.policy.named_weights(), self.sync_ranks
        return push_from_all_ranks(self.sync, weights, version, self.policy.barrier, ranks=ranks)
