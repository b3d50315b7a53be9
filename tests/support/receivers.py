"""Processes that receive as an engine's workers do, for tests of transports without an engine."""

import os
import pickle
import signal
import threading
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp


def for_nccl(name: str, gpu: int) -> dict[str, str]:
    """Settings for a process of this host, which uses its GPU `gpu`.

    NCCL refuses two of one host on one GPU, and takes those that name hosts of their own for ones on several hosts,
    connected by TCP. Where there are more GPUs than `gpu`, no other process has it.
    """
    shared = {} if gpu < torch.cuda.device_count() else {"NCCL_HOSTID": name}
    return shared | {"NCCL_SOCKET_IFNAME": "lo"}


class Workers:
    """`size` processes, each with a receiver of its own. Calls go to all; answers are waited for apart.

    Args:
        size: how many.
        device: "cpu" or "cuda"; "threads" for threads of this process in place of processes, on the CPU.
    """

    def __init__(self, size: int, device: str = "cpu") -> None:
        self._device = device
        self._context = mp.get_context("spawn")
        self.processes: list[Any] = []
        self._ends: list[Connection] = []
        for rank in range(size):
            self._start(rank)

    def _start(self, rank: int) -> None:
        here, there = self._context.Pipe()
        kind = threading.Thread if self._device == "threads" else self._context.Process
        process = kind(target=_serve, args=(there, rank, self._device), daemon=True)
        process.start()
        self.processes[rank : rank + 1] = [process]
        self._ends[rank : rank + 1] = [here]

    def call(self, name: str, *args: Any) -> "Answers":
        for end in self._ends:
            end.send((name, args))
        return Answers(self._ends)

    def run(self, name: str, *args: Any) -> list[Any]:
        return self.call(name, *args).all()

    def send_signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def restart(self, rank: int) -> None:
        self.processes[rank].kill()
        self.processes[rank].join()
        self._start(rank)

    def close(self) -> None:
        for process, end in zip(self.processes, self._ends, strict=True):
            if self._device == "threads":
                end.close()
            else:
                process.kill()
            process.join()


class Answers:
    def __init__(self, ends: list[Connection]) -> None:
        self._ends = ends

    def all(self, timeout_s: float = 60.0) -> list[Any]:
        """An answer of each, in order; an exception is returned as one, and so is a process that has died."""
        found = []
        for end in self._ends:
            if not wait([end], timeout_s):
                raise TimeoutError("a receiver hangs")
            try:
                found.append(pickle.loads(end.recv_bytes()))
            except EOFError as error:
                found.append(error)
        return found


def _serve(end: Connection, rank: int, device: str) -> None:
    from r3.weight_sync.transports import RECEIVERS

    if device == "threads":
        device = "cpu"
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(1)
    where = torch.device(device)
    if device == "cuda":
        where = torch.device("cuda", (rank + 1) % torch.cuda.device_count())
        torch.cuda.set_device(where)
        os.environ |= for_nccl(f"worker {rank}", rank + 1)
    receiver: Any = None
    kept: list = []
    received = 0
    while True:
        try:
            name, args = end.recv()
        except EOFError:
            return
        try:
            answer: Any = None
            if name == "join":
                offer, timeout_s = args
                if (
                    receiver is None
                    or receiver.connection_id is None
                    or receiver.connection_id != offer.get("connection_id")
                ):
                    receiver = RECEIVERS[offer["transport"]](offer, rank, where, timeout_s)
                    answer = "joined"
                kept, received = [], 0
            elif name == "receive":
                chunk = receiver.receive(*args)
                receiver.wait()
                kept += [(key, tensor.clone()) for key, tensor in chunk]
                if where.type == "cuda":
                    torch.cuda.current_stream(where).synchronize()
                del chunk
                received += 1
                receiver.release(received)
            elif name == "flush":
                receiver.flush()
                answer = [
                    (
                        key,
                        str(t.dtype),
                        list(t.shape),
                        t.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
                    )
                    for key, t in kept
                ]
            elif name == "connection_id":
                answer = None if receiver is None else receiver.connection_id
            elif name == "abort":
                if receiver is not None:
                    receiver.abort()
                receiver = None
        except Exception as error:
            answer = error
        end.send_bytes(pickle.dumps(answer))
