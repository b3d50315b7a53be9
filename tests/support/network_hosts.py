"""Hosts with addresses of their own on this machine: network namespaces on one bridge, which reaches nothing else."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import uuid

import pytest

_NETWORK = 0x40000000  # CLONE_NEWNET


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def can_make_hosts() -> bool:
    if shutil.which("ip") is None:
        return False
    name = f"r3-{uuid.uuid4().hex[:8]}"
    with contextlib.suppress(subprocess.CalledProcessError):
        _ip("netns", "add", name)
        _ip("netns", "del", name)
        return True
    return False


def enter_host(namespace: str) -> None:
    """Let this process, which has no threads yet, be on the host of that namespace."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NETWORK):
            raise OSError(ctypes.get_errno(), f"namespace {namespace}")


class Hosts:
    """`count` hosts at 10.77.0.1 and so on. A context manager, which ends all that was started on them.

    Attributes:
        namespaces, addresses: of each.
    """

    def __init__(self, count: int) -> None:
        mark = uuid.uuid4().hex[:6]
        self._switch = f"r3-{mark}-switch"
        self.namespaces = [f"r3-{mark}-{number}" for number in range(count)]
        self._processes: list[subprocess.Popen] = []
        self.addresses = [f"10.77.0.{number + 1}" for number in range(count)]

    def __enter__(self) -> "Hosts":
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "br0", "up")
            for number, (name, address) in enumerate(zip(self.namespaces, self.addresses, strict=True)):
                _ip("netns", "add", name)
                _ip(
                    "-n",
                    self._switch,
                    "link",
                    "add",
                    f"p{number}",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    name,
                )
                _ip("-n", self._switch, "link", "set", f"p{number}", "master", "br0", "up")
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def command(self, number: int, command: list[str]) -> list[str]:
        """`command`, to be run on a host."""
        return ["ip", "netns", "exec", self.namespaces[number], *command]

    def start(self, number: int, command: list[str], **more: str) -> subprocess.Popen:
        """Start `command` on a host, with variables `more`; stdout and stderr are a pipe."""
        process = subprocess.Popen(
            self.command(number, command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | more,
        )
        self._processes.append(process)
        return process

    def cut(self, number: int) -> None:
        """Take the host off the network."""
        _ip("-n", self._switch, "link", "set", f"p{number}", "down")

    def heal(self, number: int) -> None:
        _ip("-n", self._switch, "link", "set", f"p{number}", "up")

    def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for name in (*self.namespaces, self._switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)


needs_hosts = pytest.mark.skipif(not can_make_hosts(), reason="needs `ip netns` of iproute2, and the right to it")
