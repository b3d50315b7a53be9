"""Messages between the rank that drives a sync and the others: JSON over TCP.

Beside the process groups, in which a rank that fails would leave the others waiting, and which a wait that has timed
out leaves unusable. The end of a process shows at once.
"""

import contextlib
import fcntl
import hmac
import json
import secrets
import select
import socket
import termios
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from r3.errors import SyncError
from r3.weight_sync.transports.transport import wait_until

Message = dict[str, Any]

_ADDRESS_BYTES = 512
_LENGTH_BYTES = 8


class Link:
    """One connection. Messages may be sent by several threads."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self.rank = rank
        self._connection = connection
        self._lock = threading.Lock()
        self._came = bytearray()

    def send(self, message: Message, timeout_s: float) -> None:
        """Raises `SyncError` if the other rank has ended, or takes nothing for `timeout_s`."""
        data = json.dumps(message).encode()
        try:
            with self._lock:
                self._connection.settimeout(timeout_s)
                self._connection.sendall(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
        except OSError as error:
            raise SyncError(f"rank {self.rank} has ended, or stands still ({error or type(error).__name__})") from error

    def receive(self, timeout_s: float) -> Message | None:
        """The next message; None if none comes within `timeout_s`. Raises `SyncError` if the other rank has ended."""
        until = time.monotonic() + timeout_s
        while (message := self._complete()) is None:
            # Not the socket's own timeout, which another thread sets that sends.
            if not _readable([self._connection], max(0.0, until - time.monotonic())):
                return None
            try:
                data = self._connection.recv(1 << 20)
            except (BlockingIOError, TimeoutError):
                continue
            except OSError as error:
                raise SyncError(f"rank {self.rank} has ended ({error})") from error
            if not data:
                raise SyncError(f"rank {self.rank} has ended: its connection is closed")
            self._came += data
        return message

    def delivered(self) -> bool:
        """Whether all that was sent has come to the other rank's machine, whether or not that rank has read it."""
        waiting = fcntl.ioctl(self._connection, termios.TIOCOUTQ, bytes(4))
        return not any(waiting)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _complete(self) -> Message | None:
        end = _LENGTH_BYTES + int.from_bytes(self._came[:_LENGTH_BYTES], "big")
        if len(self._came) < max(end, _LENGTH_BYTES + 1):
            return None
        message = json.loads(self._came[_LENGTH_BYTES:end])
        del self._came[:end]
        return message


def links(group: dist.ProcessGroup | None, host: str | None, timeout_s: float) -> dict[int, Link]:
    """Connect the ranks of `group`: the one that drives with all others. Every rank comes here.

    Args:
        group: None for all.
        host: on the rank that drives an address by which the others reach it; None on the others.
        timeout_s: longest wait for them.

    Returns:
        By number in the group: on the rank that drives the links to all others, on these the one to it.

    Raises:
        SyncError: not exactly one rank drives; not all came.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    with contextlib.ExitStack() as stack:
        listener, mine = None, ""
        if host is not None:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                listener = stack.enter_context(socket.create_server((host, 0), family=family, backlog=size))
            except OSError as error:
                mine = json.dumps({"error": f"rank {rank}: {host:.80} is no address of this machine: {error.strerror}"})
            else:
                mine = json.dumps({"host": host, "port": listener.getsockname()[1], "token": secrets.token_hex(16)})
        said = _everyones(mine, group, timeout_s)
        drives = [number for number, text in enumerate(said) if text]
        if len(drives) != 1:
            raise SyncError(f"expected one rank that pushes while the others take part, got ranks {drives}")
        where = json.loads(said[drives[0]])
        if "error" in where:
            raise SyncError(where["error"])
        if listener is not None:
            return _accepted(listener, where["token"], rank, size, timeout_s)
        try:
            connection = socket.create_connection((where["host"], where["port"]), timeout_s)
        except OSError as error:
            raise SyncError(
                f"rank {rank} does not reach rank {drives[0]} at {where['host']}:{where['port']} ({error}): give the "
                "transport's `host=`, or weight_sync.host, an address by which all ranks and engines reach it"
            ) from error
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(connection, drives[0])
        link.send({"token": where["token"], "rank": rank}, timeout_s)
        return {drives[0]: link}


def _accepted(listener: socket.socket, token: str, rank: int, size: int, timeout_s: float) -> dict[int, Link]:
    found: dict[int, Link] = {}
    until = time.monotonic() + timeout_s
    while len(found) < size - 1:
        left_s = until - time.monotonic()
        if left_s <= 0 or not _readable([listener], left_s):
            missing = sorted({*range(size)} - {*found, rank})
            raise SyncError(f"ranks {missing} have not connected to rank {rank} within {timeout_s:g} s")
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(connection, -1)
        first = link.receive(min(left_s, 5.0)) or {}
        if not hmac.compare_digest(str(first.get("token")), token):  # not one of ours
            link.close()
            continue
        link.rank = int(first["rank"])
        found[link.rank] = link
    return found


def _everyones(text: str, group: dist.ProcessGroup | None, timeout_s: float) -> Sequence[str]:
    """The `text` of each rank."""
    on_cpu = "cpu" in dist.get_backend_config(group)
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    mine = torch.tensor([*text.encode().ljust(_ADDRESS_BYTES)], dtype=torch.uint8, device=device)
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    where = f"rank {dist.get_rank(group)} waits for the first meeting of all ranks for a sync"
    try:
        work = dist.all_gather(everyones, mine, group=group, async_op=True)
        assert work is not None
        wait_until(work.is_completed, lambda: False, timeout_s, where)
        work.wait()
    except SyncError:
        raise
    except RuntimeError as error:  # as the group says that a rank has ended
        raise SyncError(f"{where}: {error}") from error
    return [bytes(each.tolist()).decode().strip() for each in everyones]


def await_any(links: Iterable[Link], timeout_s: float) -> None:
    """Wait until one of `links` has something to receive, for `timeout_s` at most."""
    _readable([link._connection for link in links], timeout_s)


def _readable(connections: Iterable[socket.socket], timeout_s: float) -> bool:
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN)
    return bool(poll.poll(timeout_s * 1e3))
