"""A GRPO run on a Ray cluster, from settings to its run folder."""

import contextlib
import dataclasses
import functools
import logging
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from r3.config import R3Config, environment
from r3.diagnostics import require_sinks
from r3.errors import AlarmError, ConfigError, DiagnosticsError, ParallelError, R3Error, UnsupportedModelError, summary
from trainer_hooks.evaluation import require_held_out
from trainer_hooks.grpo import Task
from trainer_hooks.launch import train
from trainer_hooks.ray.cluster import Needs, joined_cluster, require_ray, require_transport
from trainer_hooks.ray.engines import engines_on_ray

_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_FINAL = (ConfigError, UnsupportedModelError, AlarmError, DiagnosticsError)
"""Errors that a run which begins anew would raise again."""

logger = logging.getLogger("r3")


def train_on_ray(config: R3Config, task: Task, *, address: str | None = None) -> Path:
    """`trainer_hooks.train` with `ray.num_workers` ranks and `num_engines` engines on a Ray cluster.

    All processes that it started have ended when it returns, also after Ctrl-C or an exception, or soon after it was
    killed. A cluster that it joined goes on.

    Args:
        config: all settings. Paths are of all nodes: the model's, and `trainer.output_dir`.
        task: as for `train`; goes to the ranks by cloudpickle.
        address: of a node of the cluster, `auto` for the cluster that runs on this host, or `local` to start one. None
            takes RAY_ADDRESS, or the cluster of this host, or starts one.

    Returns:
        The run folder.

    Raises:
        ConfigError: as `train`; Ray is not installed; or the cluster cannot hold ranks and engines.
        ParallelError: a node or process was lost, `ray.max_failures` times already; or no place was found in time.
        R3Error: of any other kind, what a rank raised.
    """
    if not config.ray.num_workers:
        raise ConfigError("ray.num_workers: expected the number of trainer ranks, got 0")
    config.check(config.ray.num_workers)
    require_held_out(config, task)
    require_ray()
    require_sinks(config.trainer.diagnostics.sinks)
    config = _absolute(config)
    with joined_cluster(address) as nodes:
        require_transport(config, nodes)
        needs = Needs.of(config, nodes)
        needs.require_room(nodes)
        with _placed_engines(config, needs) as group:
            return _fit(config, needs, {"config": config, "task": task, "group": group, "bundle": dict(needs.engine)})


def _absolute(config: R3Config) -> R3Config:
    """Ray Train's ranks run in a folder of their own: relative paths are of this process."""
    trainer = config.trainer
    folder = Path(trainer.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    model = trainer.policy.model
    if Path(model.path).exists():
        model = dataclasses.replace(model, path=str(Path(model.path).absolute()))
    resume = trainer.resume_from if trainer.resume_from in ("", "auto") else str(Path(trainer.resume_from).absolute())
    policy = dataclasses.replace(trainer.policy, model=model)
    trainer = dataclasses.replace(trainer, policy=policy, output_dir=str(folder), resume_from=resume)
    return dataclasses.replace(config, trainer=trainer)


@contextlib.contextmanager
def _placed_engines(config: R3Config, needs: Needs) -> Iterator[Any]:
    """A placement group with a bundle for each engine. Bundles of a node that is lost move to others with room."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([dict(needs.engine)] * needs.engines, strategy="PACK", name=f"r3-engines-{time.time_ns()}")
    try:
        if not ray.wait([group.ready()], timeout=config.ray.start_timeout_s)[0]:
            raise ParallelError(
                f"{needs.engines} engines: expected a place on the cluster within {config.ray.start_timeout_s:g} s "
                f"(ray.start_timeout_s), which has enough of it but is busy: free are {ray.available_resources()}"
            )
        yield group
    finally:
        remove_placement_group(group)


def _fit(config: R3Config, needs: Needs, given: dict[str, Any]) -> Path:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from trainer_hooks.ray.ranks import torch_config

    often = config.ray.max_failures
    with (
        tempfile.TemporaryDirectory(prefix="r3-ray-") as storage,
        environment(**{_START_TIMEOUT: str(config.ray.start_timeout_s)}),
    ):
        trainer = TorchTrainer(
            _rank,
            train_loop_config=given,
            torch_config=torch_config(gpus="GPU" in needs.worker),
            scaling_config=ScalingConfig(
                num_workers=needs.workers,
                use_gpu="GPU" in needs.worker,
                resources_per_worker=dict(needs.worker),
            ),
            run_config=RunConfig(
                name=f"r3-{Path(config.trainer.output_dir).name}",
                storage_path=storage,
                # By default a group of ranks that finds no place is tried for ever.
                failure_config=FailureConfig(
                    max_failures=often, controller_failure_limit=often, max_preemption_failures=often
                ),
            ),
        )
        try:
            with _interrupts():
                ended = trainer.fit().return_value
        except TrainingFailedError as error:
            raise _named(error) from error
    if isinstance(ended, Exception):
        raise ended
    return Path(ended)


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt. Ray Train's own handler ends the process, and swallows Ctrl-C ever after."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stopped:  # whatever the handler raises, Ray makes it this
        raise KeyboardInterrupt from stopped
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _rank(given: Mapping[str, Any]) -> str | Exception:
    """What runs on each rank. An error that another attempt would raise again ends the run as its result."""
    logging.getLogger("r3").setLevel(logging.INFO)
    engines = functools.partial(engines_on_ray, group=given["group"], bundle=given["bundle"])
    try:
        return str(train(given["config"], given["task"], engines=engines))
    except _FINAL as error:
        return error
    except ParallelError as error:  # of another rank
        if any(f"{kind.__name__}: " in str(error) for kind in _FINAL):
            return error
        raise


def _named(error: Any) -> R3Error:
    """The cause of a failed run: what was lost, or else of r3's errors the one that is not of another rank."""
    from ray.exceptions import RayActorError
    from ray.train import WorkerGroupError

    if not isinstance(error, WorkerGroupError):
        return ParallelError(
            f"Ray Train could not go on: {error.controller_failure}. Look at `ray status`: expected the nodes that the "
            "run started on, or others with room within ray.start_timeout_s"
        )
    # Train wraps what a rank raised, for its traceback.
    failures = {rank: getattr(each, "_base_exc", each) for rank, each in sorted(error.worker_failures.items())}
    own = [each for each in failures.values() if isinstance(each, R3Error) and not isinstance(each, ParallelError)]
    if own and not any(isinstance(each, RayActorError) for each in failures.values()):
        return own[0]
    return ParallelError(
        f"{len(failures)} trainer ranks were lost or failed (ray.max_failures lets a run go on without them):"
        + summary(f"rank {rank}: {type(each).__name__}: {each}" for rank, each in failures.items())
    )
