"""Processes of a process group that stay up and run functions of the tests together."""

import faulthandler
import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ports import free_port
from processes import FORKS, fork_from


@dataclass(frozen=True)
class Skipped:
    """A rank's answer where the test has to be skipped; pytest's own exception cannot be pickled."""

    reason: str


class Ranks:
    """`size` processes with a process group between them.

    Args:
        size: how many.
        device: "cpu" (gloo) or "cuda" (NCCL, and gloo): a GPU each, or shared ones where there are fewer.
        parents: they may start processes of their own, engines for one, which this process does not end.
        here: rank 0 is this process, for what looks at code as it runs: a debugger, a coverage, mutants. CPU only.
    """

    def __init__(self, size: int, device: str = "cpu", *, parents: bool = False, here: bool = False) -> None:
        self._size, self._device, self._parents, self._here = size, device, parents, here
        self._ends: list[Any] = []
        self._processes: list[Any] = []

    def run(self, function: Callable, *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """What `function(*args)` returns on each rank; an exception is returned as one, and so is the rank's death.

        A test that is skipped on a rank is skipped. After a death or a hang the next call has new ranks.

        Raises:
            TimeoutError: a rank hangs. All ranks are ended.
        """
        if not self._processes:
            self._start()
        call = pickle.dumps((function, args))
        for end in self._ends:
            end.send_bytes(call)
        results = [_result(function, args)] if self._here else []
        died = False
        for rank, (end, process) in enumerate(zip(self._ends, self._processes, strict=True), len(results)):
            if not end.poll(timeout_s):
                self.close()
                raise TimeoutError(f"rank {rank} of {function.__name__} hangs")
            try:
                results.append(pickle.loads(end.recv_bytes()))
            except (EOFError, ConnectionError):
                process.join()
                results.append(EOFError(f"died in {function.__name__} with exit code {process.exitcode}"))
                died = True
        if died:
            self.close()
        for result in results:
            if isinstance(result, Skipped):
                pytest.skip(result.reason)
        return results

    def all(self, function: Callable, *args: Any, **options: Any) -> list[Any]:
        """As `run`, but an exception on any rank fails the test."""
        results = self.run(function, *args, **options)
        for rank, result in enumerate(results):
            assert not isinstance(result, BaseException), f"rank {rank}: {result}\n{getattr(result, '__notes__', None)}"
        return results

    def close(self) -> None:
        if self._here and dist.is_initialized():
            dist.destroy_process_group()
        for process in self._processes:
            process.kill()
            process.join()
        self._ends, self._processes = [], []

    def _start(self) -> None:
        port, first = free_port(), int(self._here)
        fork_from("rank_preload")
        for rank in range(first, self._size):
            ours, theirs = FORKS.Pipe()
            given = (theirs, rank, self._size, port, self._device)
            process = FORKS.Process(target=_serve, args=given, daemon=not self._parents)
            process.start()
            theirs.close()  # or the rank's death would not end the pipe
            self._ends.append(ours)
            self._processes.append(process)
        if self._here:
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=self._size)


def _serve(end: Any, rank: int, size: int, port: int, device: str) -> None:
    faulthandler.enable()  # a death says where
    local = rank % torch.cuda.device_count() if device == "cuda" else rank  # in a launcher's sense: also the GPU
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(local)
        if size > torch.cuda.device_count():
            # NCCL refuses two ranks on one GPU of one host. Hosts of their own, by name, it connects through sockets.
            os.environ |= {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo"}
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    while True:
        try:
            function, args = pickle.loads(end.recv_bytes())
        except EOFError:
            return
        result = _result(function, args)
        try:
            answer = pickle.dumps(result)
        except (TypeError, AttributeError, pickle.PicklingError):
            answer = pickle.dumps(RuntimeError(f"{type(result).__name__}: {result}"))
        end.send_bytes(answer)


def _result(function: Callable, args: tuple[Any, ...]) -> Any:
    try:
        return function(*args)
    except pytest.skip.Exception as skipped:
        return Skipped(str(skipped))
    except Exception as error:
        error.__notes__ = [traceback.format_exc()]
        return error
