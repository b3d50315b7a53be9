"""Rewards on problems that are held out of training, without an effect on training."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from r3.capture import sampling_kwargs
from r3.config import R3Config
from r3.errors import CaptureError, ConfigError
from r3.pool import EnginePool
from trainer_hooks.engines import sample
from trainer_hooks.random_states import kept_random_states


@runtime_checkable
class HeldOut(Protocol):
    """What a task has beside `problems`, if the settings ask for evaluation."""

    def eval_problems(self, count: int) -> list[Any]:
        """The same `count` problems at every call; `problems` gives none of them."""
        ...


def require_held_out(config: R3Config, task: Any) -> None:
    """Raise `ConfigError` if the settings ask for evaluation and the task has nothing held out."""
    if config.trainer.eval_every and not isinstance(task, HeldOut):
        raise ConfigError(
            f"trainer.eval_every={config.trainer.eval_every} needs a task with eval_problems(count), got "
            f"{type(task).__name__} without it"
        )


def evaluate(config: R3Config, task: Any, engine: Any, tokenizer: Any) -> dict[str, float]:
    """One completion of each held-out problem, on the rank with the engine. Returns metrics by flat names.

    Random numbers here, and the engine's prefix cache, are afterwards as without it; the engine's random numbers are
    those of step 0, and a rollout seeds them anew. No routing is read.

    Raises:
        CaptureError: the engine still has requests, so that its prefix cache cannot be emptied.
    """
    trainer = config.trainer
    sampling = sampling_kwargs(config) | {"n": 1, "temperature": trainer.eval_temperature}
    with kept_random_states():
        problems = task.eval_problems(trainer.eval_batch_size)
        prompts = [tokenizer(task.prompt(problem)).input_ids for problem in problems]
        rollouts = sample(config, engine, prompts, None, sampling=sampling, version=None, step=0)
        texts = tokenizer.batch_decode([rollout.token_ids for rollout in rollouts], skip_special_tokens=True)
        rewards = [task.reward(problem, text) for problem, text in zip(problems, texts, strict=True)]
        # Rollouts that found these prompts' beginnings in it would be computed in other batches. A pool's batches are
        # never twice the same.
        if not isinstance(engine, EnginePool) and not engine.reset_prefix_cache():
            raise CaptureError("after evaluation: expected an idle engine, got one whose prefix cache is in use")
    return {"eval/reward": sum(rewards) / len(rewards)}
