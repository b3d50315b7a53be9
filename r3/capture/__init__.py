"""Capture: the experts that vLLM's rollouts used, checked row by row, as 4-D routing.

Limits of this version: offline engines (`vllm.LLM`), one turn, one weight version a rollout.
"""

from r3.capture.collect import collect
from r3.capture.engine import engine_kwargs, running_engine, sampling_kwargs
from r3.capture.rollout import Rollout, RolloutBatch, Rollouts

__all__ = ["Rollout", "RolloutBatch", "Rollouts", "collect", "engine_kwargs", "running_engine", "sampling_kwargs"]
