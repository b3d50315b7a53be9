"""A GRPO run from settings to its run folder, on the ranks that a launcher started or on this process alone.

`torchrun --nproc-per-node N` and `accelerate launch` start it on N ranks: the first of them runs the engine, all train,
in groups of `sequence_parallel_size` that share each row.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from r3.config import R3Config, local_rank, process_rank
from r3.diagnostics import RunFolder, require_sinks
from r3.errors import ConfigError
from r3.report import write_report
from r3.weight_sync import local_address
from trainer_hooks import checkpoint
from trainer_hooks.engine_check import check_engine
from trainer_hooks.engines import running_engines
from trainer_hooks.evaluation import require_held_out
from trainer_hooks.export import export_policy
from trainer_hooks.grpo import GRPOTrainer, Task
from trainer_hooks.policy import Policy
from trainer_hooks.step_log import StepLog

POLICY = "policy"
"""The trained policy, in the run folder."""
BACKEND = "cpu:gloo,cuda:nccl"
"""Of the process group, where there are GPUs."""


Engines = Callable[[R3Config], contextlib.AbstractContextManager[Any]]
"""What samples while the context is open, as `trainer_hooks.engines.running_engines` gives it."""


def train(config: R3Config, task: Task, *, engines: Engines | None = None) -> Path:
    """Run the whole job: process group, policy, engine, loop, report. Returns the run folder.

    All processes that it started have ended when it returns, also after Ctrl-C or an exception.

    Args:
        config: all settings.
        task: source of prompts and rewards.
        engines: starts the engines, on the first rank; by default on this host, or found by their addresses.

    Raises:
        ConfigError: settings that contradict each other, before anything is started; or a checkpoint to resume from
            that is missing, or of a run with other settings.
        UnsupportedModelError: the model cannot be replayed.
        CaptureError, SyncError: capture or a sync failed; raised in the step in which it did.
        AlarmError: the engine differs from the trainer before the first step, or a metric is beyond a bound of
            `trainer.diagnostics.alarms` that stops the run.
    """
    rank, world = process_rank()
    config.check(world)
    if config.ray.num_workers and engines is None:
        raise ConfigError(
            f"ray.num_workers={config.ray.num_workers}: expected trainer_hooks.ray.train_on_ray, which runs on a Ray "
            "cluster, as examples/grpo_ray.py does; got a run without it"
        )
    require_held_out(config, task)
    require_sinks(config.trainer.diagnostics.sinks)  # before there is a folder that a second try would find in use
    path = Path(config.trainer.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    resume_from = checkpoint.chosen(config, path) if rank == 0 else None
    log = StepLog(config, _run_folder(config, path, resume_from)) if rank == 0 else contextlib.nullcontext()
    torch.manual_seed(config.trainer.seed)
    with process_group(), log as log:
        path, resume_from = _of_first_rank((path, resume_from))
        policy = Policy(config)
        with contextlib.ExitStack() as stack:
            with policy.barrier.guard():
                engine = stack.enter_context((engines or running_engines)(config)) if rank == 0 else None
            checked = check_engine(config, policy, engine)
            trainer = GRPOTrainer(config, task, policy, engine, log)
            trainer.train(checked, run_folder=path, resume_from=resume_from)
        if config.trainer.save_hf:
            export_policy(policy, config.trainer.policy.model.path, path / POLICY)
    if rank == 0:
        write_report(path)
    return path


def _run_folder(config: R3Config, path: Path, resume_from: Path | None) -> RunFolder:
    """A new one; or that of the run that goes on, without what it recorded after its checkpoint."""
    own = resume_from is not None and resume_from.resolve().is_relative_to((path / checkpoint.FOLDER).resolve())
    if own or (config.trainer.resume_from == checkpoint.AUTO and path.is_dir() and any(path.iterdir())):
        return RunFolder.reopen(path, config.to_flat(), step=checkpoint.step_of(resume_from) if resume_from else 0)
    return RunFolder(path, config.to_flat())


def _of_first_rank(value: Any) -> Any:
    holder = [value]
    dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
    return holder[0]


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Context with a default process group: an existing one, or of the launcher's ranks or this process alone."""
    if dist.is_initialized():
        yield
        return
    backend = BACKEND if torch.cuda.is_available() else "gloo"
    if process_rank()[1] > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        _choose_interface_of_launcher()
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _choose_interface_of_launcher() -> None:
    """The interface by which this host reaches the first one."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address and port:
        choose_interface(local_address(address, int(port)))


def choose_interface(own: str) -> None:
    """Let gloo use the interface with the address `own` of this host, unless the environment names another.

    Its own choice is the address that the host name resolves to. On many hosts (Debian's, and most containers) that is
    a loopback address, by which no other host can reach it.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.split("%")[0] == own for each in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
