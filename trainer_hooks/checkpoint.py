"""Checkpoints of a run, from which it goes on as if it had not stopped: `checkpoints/step-000004/` in the run folder.

Model and optimizer are written by torch's distributed checkpoint, each rank its shards, and `run.json` has what is the
same on all ranks. A folder has its name only once it is complete: a run that is killed while it saves goes on from the
checkpoint before. The data have no state beside the step, of which `Task.problems` is a function.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from r3.config import R3Config
from r3.errors import ConfigError, summary
from trainer_hooks.policy import Policy
from trainer_hooks.random_states import random_states, set_random_states

FOLDER = "checkpoints"
RUN_FILE = "run.json"
AUTO = "auto"
FREE = (
    "trainer.output_dir",
    "trainer.resume_from",
    "trainer.save_",
    "trainer.keep_checkpoints",
    "trainer.eval_",
    "trainer.timeout_s",
    "trainer.diagnostics.",
    # How the same computation is laid out.
    "trainer.micro_train_batch_size",
    "trainer.use_sample_packing",
    "trainer.policy.sequence_parallel_size",
    "trainer.policy.expert_parallel_size",
    "trainer.policy.fsdp_config.gradient_checkpointing",
    "generator.inference_engine.tensor_parallel_size",
    "generator.inference_engine.pipeline_parallel_size",
    "generator.inference_engine.max_num_seqs",
    "generator.inference_engine.enforce_eager",
    "generator.inference_engine.kv_cache_gib",
    "generator.inference_engine.gpu_memory_utilization",
    "generator.inference_engine.num_engines",
    "generator.inference_engine.addresses",
    "generator.inference_engine.max_in_flight",
    "generator.inference_engine.request_timeout_s",
    "generator.inference_engine.on_engine_lost",
    "generator.inference_engine.weight_sync.",
    "ray.",
)
"""Beginnings of the settings that may differ in the run that goes on; all others mean another run."""

logger = logging.getLogger("r3")


def newest(run_folder: Path) -> Path | None:
    """The complete checkpoint of the latest step in a run folder; None if there is none."""
    return next(reversed(_complete(run_folder)), None)


def chosen(config: R3Config, run_folder: Path) -> Path | None:
    """The checkpoint that `trainer.resume_from` means: itself, the newest of a run folder, or of this one (`auto`).

    Raises:
        ConfigError: a path without a complete checkpoint.
    """
    asked = config.trainer.resume_from
    if asked in ("", AUTO):
        return newest(run_folder) if asked else None
    found = Path(asked) if (Path(asked) / RUN_FILE).is_file() else newest(Path(asked))
    if found is None:
        raise ConfigError(
            f"trainer.resume_from: expected a checkpoint (a folder with {RUN_FILE}) or the folder of a run that has "
            f"saved one under {FOLDER}/, got {asked}"
        )
    return found


def save(run_folder: Path, step: int, config: R3Config, policy: Policy) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep_checkpoints`. Every rank calls it.

    Raises:
        ParallelError: another rank could not write; nothing has the checkpoint's name then.
    """
    final = run_folder / FOLDER / f"step-{step:06d}"
    partial = final.with_name(f"{final.name}.partial")
    first, barrier = dist.get_rank() == 0, policy.barrier
    with barrier.guard():
        if first:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
            partial.mkdir(parents=True)
    with barrier.guard():
        dcp.save(_state(policy) | {_random_key(): pickle.dumps(random_states())}, checkpoint_id=partial)
    with barrier.guard():
        if first:
            run = {
                "step": step,
                "ranks": dist.get_world_size(),
                "scheduler": policy.scheduler.state_dict(),
                "settings": config.to_flat(),
            }
            (partial / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
            if final.exists():  # of the same step, when a run goes on from an earlier one
                shutil.rmtree(final)
            partial.rename(final)
            _remove_old(run_folder, config.trainer.keep_checkpoints)
    return final


def load(path: Path, config: R3Config, policy: Policy) -> int:
    """Put model, optimizer, learning rate and random numbers where they were. Every rank calls it. Returns the step.

    Raises:
        ConfigError: the checkpoint is of a run with other settings than `FREE` ones.
    """
    run = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
    _require_same(run["settings"], config, path)
    state, mine = _state(policy), dist.get_rank() < run["ranks"]
    if mine:
        state[_random_key()] = b""
    if run["ranks"] != dist.get_world_size():
        logger.warning(
            "%s was saved by %d ranks and is loaded by %d: sums are in another order, so that last bits will differ",
            path,
            run["ranks"],
            dist.get_world_size(),
        )
    dcp.load(state, checkpoint_id=path)
    set_state_dict(policy.model, policy.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    policy.scheduler.load_state_dict(run["scheduler"])
    if mine:
        set_random_states(pickle.loads(state[_random_key()]))
    return run["step"]


def _state(policy: Policy) -> dict[str, Any]:
    model, optimizer = get_state_dict(policy.model, policy.optimizer)
    return {"model": model, "optimizer": optimizer}


def _random_key() -> str:
    return f"random_{dist.get_rank()}"


def _require_same(saved: Mapping[str, Any], config: R3Config, path: Path) -> None:
    defaults, now = R3Config().to_flat(), config.to_flat()
    # The schedule knows the length of the run, unless it is constant.
    constant = config.trainer.policy.optimizer_config.scheduler == "constant"
    free = (*FREE, "trainer.max_steps") if constant else FREE
    # Settings that the one of the two does not have, because its release had none, are at their defaults.
    different = [
        f"{key}: expected {then!r}, got {is_now!r}"
        for key in sorted({*saved, *now})
        if not key.startswith(free)
        and (then := saved.get(key, defaults.get(key))) != (is_now := now.get(key, defaults.get(key)))
    ]
    if different:
        raise ConfigError(
            f"trainer.resume_from: {path} is of a run with other settings:{summary(different)}\n"
            "give the same, or start a new run from its exported policy (trainer.policy.model.path)"
        )


def _complete(run_folder: Path) -> list[Path]:
    """By step. A partial one may have a run file too, but no step."""
    found = [file.parent for file in (run_folder / FOLDER).glob(f"step-*/{RUN_FILE}")]
    return sorted((path for path in found if step_of(path) >= 0), key=step_of)


def _remove_old(run_folder: Path, keep: int) -> None:
    for path in _complete(run_folder)[:-keep] if keep else []:
        # Without its run file it is no checkpoint any more, however far the removal comes.
        (path / RUN_FILE).unlink()
        shutil.rmtree(path)


def step_of(path: Path) -> int:
    """The step of the checkpoint at `path`, by its name; -1 if it has none."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1
