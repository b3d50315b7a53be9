"""A sender of syncs as a process of its own, which fails as it is told to."""

import contextlib
import faulthandler
import os
import resource
import signal
from collections.abc import Iterator
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from receivers import for_nccl
from safetensors.torch import load_file
from schedules import Fault, tampered

from r3.errors import SyncError
from r3.weight_sync import LazyWeight, WeightSync
from r3.weight_sync.engines import Engine, engine_of
from r3.weight_sync.transports import TRANSPORTS

CHUNK_BYTES = 1 << 20
Named = list[tuple[str, Any]]


class InjectedError(SyncError):
    pass


@cache
def weights(path: str, which: str, fused: bool) -> dict[str, torch.Tensor]:
    """Weight set "A" is the checkpoint, "B" differs everywhere, "C" from "B" in 1% of the elements."""
    named = load_file(Path(path) / "model.safetensors")
    if which != "A":
        named = {name: tensor + 0.02 * tensor.float().std().bfloat16() for name, tensor in named.items()}
    if which == "C":
        for tensor in named.values():
            tensor.view(-1)[::97] *= 1.5
    return _fused(named) if fused else named


def _fused(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as transformers holds them."""
    layers: dict[str, dict[tuple[str, int], torch.Tensor]] = {}
    rest = {}
    for name, tensor in named.items():
        if ".experts." in name:
            layer, expert = name.split(".experts.")
            number, projection, _ = expert.split(".")
            layers.setdefault(layer, {})[projection, int(number)] = tensor
        else:
            rest[name] = tensor
    for layer, experts in layers.items():
        count = len(experts) // 3
        both = [torch.cat([experts["gate_proj", e], experts["up_proj", e]]) for e in range(count)]
        rest[f"{layer}.experts.gate_up_proj"] = torch.stack(both)
        rest[f"{layer}.experts.down_proj"] = torch.stack([experts["down_proj", e] for e in range(count)])
    return rest


class Faults:
    """What is to happen in this process in the course of one sync, and tells the harness when it has."""

    def __init__(self, end: Connection, go: Event) -> None:
        self._end, self._go = end, go
        self._pending: list[Fault] = []
        self.late: list[tuple] = []
        self._calls: list[tuple] = []

    def arm(self, faults: list[Fault]) -> None:
        self._pending = list(faults)
        self.late, self._calls = self._calls or self.late, []

    def take(self, point: str, *kinds: str, when: str | None = None) -> list[Fault]:
        found = [f for f in self._pending if f.point == point and f.kind in kinds and when in (None, f.when)]
        self._pending = [f for f in self._pending if f not in found]
        return found

    def say(self, fault: Fault, **what: Any) -> None:
        self._end.send(("event", {"kind": fault.kind, "point": fault.point, **what}))

    def at(self, point: str, when: str, engine: Engine) -> None:
        for fault in self.take(point, "sender killed", "sender stopped", "sender raises", "held", "late", when=when):
            self.say(fault, pid=os.getpid())
            match fault.kind:
                case "sender killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "sender stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "sender raises":
                    raise InjectedError(f"injected {when} {point}")
                case "held":
                    self._go.wait()
                case "late" if self.late:
                    method, args = self.late[int(fault.pick * len(self.late))]
                    self.say(fault, late=method, replies=engine.call(method, *args, timeout_s=10.0))

    def remember(self, method: str, args: Any) -> None:
        if method in ("r3_load", "r3_seal", "r3_commit", "r3_abort"):
            self._calls.append((method, args))


class FaultyEngine(Engine):
    """The real adapter, between whose calls things happen."""

    def __init__(self, inner: Engine, faults: Faults) -> None:
        self.inner, self.faults = inner, faults
        self.name, self.remedy = inner.name, inner.remedy
        self._answers: list = []
        self._held: tuple | None = None

    def replies(self, method: str, args: Any, timeout_s: float) -> list[dict]:
        points = [method.removeprefix("r3_")]
        if method == "r3_load":
            points = [f"load:{index}" for index, _ in enumerate(args[2], args[1])]
        for point in points:
            self.faults.at(point, "before", self.inner)
        self.faults.remember(method, args)
        self._answers = self._call(points, method, args, timeout_s)
        for point in points:
            self.faults.at(point, "after", self.inner)
        return self._answers

    def _call(self, points: list[str], method: str, args: tuple, timeout_s: float) -> list[dict]:
        for fault in [fault for point in points for fault in self.faults.take(point, "call")]:
            self.faults.say(fault)
            if fault.how == "lost":
                return self._answers
            if fault.how == "doubled":
                self.inner.replies(method, args, timeout_s)
            elif fault.how == "reordered":
                self._held = (method, args)
                return self._answers
        replies = self.inner.replies(method, args, timeout_s)
        if self._held is not None and method == "r3_load":
            held, self._held = self._held, None
            replies = self.inner.replies(*held, timeout_s)
        return replies

    def pause(self, timeout_s: float) -> bool:
        return self._around("pause", self.inner.pause, timeout_s)

    def resume(self, timeout_s: float) -> None:
        self._around("resume", self.inner.resume, timeout_s)

    def reset_caches(self, timeout_s: float) -> None:
        self._around("caches", self.inner.reset_caches, timeout_s)

    def set_weight_version(self, version: int, timeout_s: float) -> None:
        self._around("set_weight_version", self.inner.set_weight_version, version, timeout_s)

    def refuse(self, cause: str) -> None:
        self._held = None
        self._around("refuse", self.inner.refuse, cause)

    def close(self) -> None:
        self.inner.close()

    def _around(self, point: str, call: Any, *args: Any) -> Any:
        self.faults.at(point, "before", self.inner)
        answer = call(*args)
        self.faults.at(point, "after", self.inner)
        return answer


def faulty(name: str, faults: Faults, *args: Any) -> Any:
    """The real transport, on whose way things happen."""

    class FaultyTransport(TRANSPORTS[name]):
        def publish(self, index: int, chunk: Any) -> Any:
            for fault in faults.take(f"load:{index}", "transit"):
                chunk, tensor = tampered(chunk, fault.how, fault.pick)
                faults.say(fault, tensor=tensor)
            with contextlib.ExitStack() as limits:
                for fault in faults.take(f"load:{index}", "disk full"):
                    limits.enter_context(full(Path(self._folder)))
                    faults.say(fault)
                where = super().publish(index, chunk)
            for fault in faults.take(f"load:{index}", "file"):
                faults.say(fault)
                damage(Path(where["path"]), fault.how, fault.pick)
            return where

    return FaultyTransport(*args)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """No room is left in `folder` if that is a disk of its own; else this process may write at most 4 KiB to a file."""
    if folder.is_mount():
        filler = folder / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass
        try:
            yield
        finally:
            filler.unlink()
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def damage(path: Path, how: str, pick: float) -> None:
    data = bytearray(path.read_bytes())
    match how:
        case "flip":
            data[int(pick * len(data))] ^= 1 << int(pick * 8)
        case "header":
            data[3] ^= 1
        case "truncated":
            data = data[: int(pick * len(data))]
        case "removed":
            path.unlink()
            return
        case "zeros":
            data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)


def content(named: Named, how: str, pick: float) -> tuple[Named, str]:
    """A list of weights that cannot be right, and the name of what is wrong in it."""
    at = int(pick * len(named))
    name, tensor = named[at]

    def fail() -> torch.Tensor:
        raise RuntimeError("injected while gathering")

    def source(make: Any) -> LazyWeight:
        return LazyWeight(name=name, shape=tensor.shape, dtype=tensor.dtype, make=make)

    bad: Any = tensor.clone()
    match how:
        case "missing":
            return named[:at] + named[at + 1 :], name
        case "unknown":
            name = name.replace("layers.", "layers.9").replace("norm", "norn")
            return [*named[:at], (name + ".extra", tensor), *named[at:]], name + ".extra"
        case "twice":
            return [*named, named[at]], name
        case "nan" | "inf":
            bad.view(-1)[int(pick * bad.numel())] = float(how)
        case "larger":
            bad = torch.cat([bad, bad])
        case "smaller":
            bad = bad[: max(1, len(bad) // 2)]
        case "gather raises":
            bad = source(fail)
        case "gather changes":
            bad = source(lambda: tensor[:-1])
    return [*named[:at], (name, bad), *named[at + 1 :]], name


def serve(end: Connection, go: Event, settings: dict[str, Any]) -> None:
    """Push as the harness says, until it goes away."""
    torch.set_num_threads(1)
    if settings["gpu"]:
        torch.cuda.set_device(1 % torch.cuda.device_count())
        os.environ |= for_nccl(f"sender {os.getpid()}", 1)
    where = open(settings["stacks"], "w")  # noqa: SIM115 (as long as the process lives)
    faulthandler.register(signal.SIGUSR1, file=where, all_threads=True)
    faults = Faults(end, go)
    sync: WeightSync | None = None
    transport: Any = None
    engine = engine_of(settings["url"])
    end.send(("ready", ""))
    while True:
        try:
            order = end.recv()
        except EOFError:
            return
        if order is None:
            if sync is not None:
                sync.close()
            elif transport is not None:
                transport.close()
            return
        faults.arm(order["faults"])
        engine._on_running = order["on_running"]
        try:
            if transport is None:
                folder = [settings["folder"]] if settings["folder"] else []
                transport = faulty(settings["transport"], faults, *folder)
                end.send(("folder", str(getattr(transport, "_folder", ""))))
            if sync is None:
                sync = WeightSync(
                    FaultyEngine(engine, faults),
                    transport=transport,
                    delta=settings["delta"],
                    chunk_bytes=CHUNK_BYTES,
                    timeout_s=order["timeout_s"],
                )
            sync._timeout_s = transport.timeout_s = order["timeout_s"]
            named = list(weights(settings["path"], order["weights"], order["fused"]).items())
            for fault in faults.take("start", "content"):
                named, tensor = content(named, fault.how, fault.pick)
                faults.say(fault, tensor=tensor)
            receipt = sync.push(named, version=order["version"])
            found = {name: getattr(receipt, name) for name in ("version", "digest", "workers", "complete")}
            answer = ("committed", found)
        except BaseException as error:
            said = {"error": type(error).__name__, "text": str(error), "notes": getattr(error, "__notes__", [])}
            answer = ("failed", said | {"poisoned": getattr(sync, "poisoned", None)})
        go.set()  # a call that is still held comes late
        end.send(answer)
