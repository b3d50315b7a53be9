"""Check before the first step that the engine captures, repeats itself, and computes what the policy computes."""

from __future__ import annotations

import logging
from typing import Any

import torch

from r3.capture import Rollouts, handshake
from r3.config import MOST_REPEAT_NATS, R3Config
from r3.diagnostics import EngineAgreement
from r3.doctor.engine_agreement import PROMPT_TOKENS, PROMPTS, SAMPLED_TOKENS, ask_twice, family_of, probe_prompts
from r3.pool import EnginePool
from trainer_hooks.batches import StepBatch, broadcast
from trainer_hooks.measurement import measure
from trainer_hooks.policy import Policy
from trainer_hooks.random_states import kept_random_states

logger = logging.getLogger("r3")


def check_engine(config: R3Config, policy: Policy, engine: Any) -> dict[str, float]:
    """Compare the engine with the policy, of the same weights, on tokens that it samples. Every rank calls it.

    Args:
        engine: a running `vllm.LLM` or an `EnginePool` on the first rank, None on the others. Each engine of a pool
            answers a part of the prompts.

    Returns:
        Metrics by flat names, the same on every rank except `engine/repeat_nats`, which only the first rank has.

    Raises:
        CaptureError: capture does not work.
        AlarmError: the engine differs from the policy, and the settings do not accept how; `ParallelError` on the other
            ranks.
    """
    diagnostics, limits = config.trainer.diagnostics, config.generator.inference_engine
    accepted = diagnostics.accepted_engine_faults
    batch, apart = None, None
    with policy.barrier.guard(), kept_random_states():  # an engine in this process would use them up
        if engine is not None:
            spec = policy.replay.spec if policy.replay else None
            engines = [*engine.engines] if isinstance(engine, EnginePool) else [engine]
            if spec is not None:
                for each in engines:
                    handshake(each, spec, most_repeat_nats=None if "repetition" in accepted else MOST_REPEAT_NATS)
            # Every rank takes part in every forward.
            count = -(-max(PROMPTS, len(engines)) // policy.mesh.data_size) * policy.mesh.data_size
            length = min(PROMPT_TOKENS, limits.max_model_len // 2)
            prompts = probe_prompts(policy.model, count=count, length=length)
            answers = [
                ask_twice(
                    each,
                    prompts[number :: len(engines)],
                    spec,
                    max_tokens=min(SAMPLED_TOKENS, limits.max_model_len - length),
                    temperature=policy.temperature,
                )
                for number, each in enumerate(engines)
            ]
            rollouts = Rollouts([item for each in answers for item in each.rollouts], spec)
            batch = StepBatch.of(rollouts.batch(0), torch.zeros(count))
            apart = max(each.repeat_nats for each in answers)
    size = config.trainer.micro_train_batch_size
    measured = measure(policy, broadcast(batch), size=size, extreme_ratio=diagnostics.extreme_ratio, details=False)
    agreement = EngineAgreement.from_metrics(family_of(policy.model), measured.metrics, repeat_nats=apart)
    with policy.barrier.guard():
        agreement.require(accepted)
        for name, text in agreement.faults().items():
            logger.warning("accepted: %s: %s", name, text)
    return agreement.metrics()
