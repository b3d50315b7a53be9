"""Capture: the experts that vLLM's rollouts used, checked row by row, as 4-D routing.

Limits of this version: one model behind a URL; streams of `/inference/v1/generate` are collected when they have ended.
"""

from r3.capture.collect import collect
from r3.capture.endpoint import Endpoint
from r3.capture.engine import capture_kwargs, engine_kwargs, running_engine, sampling_kwargs
from r3.capture.handshake import Handshake, handshake
from r3.capture.recapture import OverlapReport, compare_overlap
from r3.capture.rollout import Rollout, RolloutBatch, Rollouts
from r3.capture.saved import load_rollouts, save_rollouts, saved_settings
from r3.capture.serve import request_fields, server_args, server_command
from r3.capture.servers import running_servers
from r3.capture.settings import SamplingSettings
from r3.capture.stitch import next_prompt_start, stitch, stitch_runs
from r3.capture.stream import async_rollout
from r3.capture.weight_versions import resolve_mixed_versions, stamp_versions
from r3.sampling_mask import SamplingMask

__all__ = [
    "Endpoint",
    "Handshake",
    "OverlapReport",
    "Rollout",
    "RolloutBatch",
    "Rollouts",
    "SamplingMask",
    "SamplingSettings",
    "async_rollout",
    "capture_kwargs",
    "collect",
    "compare_overlap",
    "engine_kwargs",
    "handshake",
    "load_rollouts",
    "next_prompt_start",
    "request_fields",
    "resolve_mixed_versions",
    "running_engine",
    "running_servers",
    "sampling_kwargs",
    "save_rollouts",
    "saved_settings",
    "server_args",
    "server_command",
    "stamp_versions",
    "stitch",
    "stitch_runs",
]
