"""Capture: the experts that vLLM's rollouts used, checked row by row, as 4-D routing.

Limits of this version: offline engines (`vllm.LLM`).
"""

from r3.capture.collect import collect
from r3.capture.engine import engine_kwargs, running_engine, sampling_kwargs
from r3.capture.overlap import OverlapReport, compare_overlap
from r3.capture.rollout import Rollout, RolloutBatch, Rollouts
from r3.capture.stitch import next_prompt_start, stitch, stitch_runs
from r3.capture.versions import resolve_mixed_versions, stamp_versions

__all__ = [
    "OverlapReport",
    "Rollout",
    "RolloutBatch",
    "Rollouts",
    "collect",
    "compare_overlap",
    "engine_kwargs",
    "next_prompt_start",
    "resolve_mixed_versions",
    "running_engine",
    "sampling_kwargs",
    "stamp_versions",
    "stitch",
    "stitch_runs",
]
