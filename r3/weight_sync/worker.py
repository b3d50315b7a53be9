"""The worker's side of a sync: `LLM(worker_extension_cls="r3.weight_sync.worker.WeightSyncWorker")`.

vLLM appends the class to its worker's bases: no `__init__` runs, every name starts with `r3_`, and what comes and goes
is plain dictionaries. A call never raises into the engine; it answers {"error": ...}, and the worker is poisoned unless
the call was turned away before it touched a weight.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from r3.weight_sync.digest import combine, digest
from r3.weight_sync.reload import LayerwiseReload
from r3.weight_sync.transport import TRANSPORTS, Chunk

Reply = dict[str, Any]


@dataclass
class _Session:
    """State of a worker's sync: idle, open or poisoned."""

    state: str = "idle"
    version: int | None = None  # committed
    incoming: int | None = None
    transport: str = ""
    manifest: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    reload: LayerwiseReload | None = None
    cause: str = ""


class _RefusedError(RuntimeError):
    """A call that was turned away before it touched a weight: the worker is as it was."""


class WeightSyncWorker:
    """Mixed into vLLM's worker."""

    def r3_status(self) -> Reply:
        """State ("idle", "open", "poisoned"), committed version and, if poisoned, the cause."""
        return self._r3_reply(lambda session: {"state": session.state, "cause": session.cause})

    def r3_begin(self, version: int, transport: str, manifest: dict[str, list]) -> Reply:
        """Open a sync of the tensors in `manifest` (name -> [shape, dtype]); heals a poisoned worker."""

        def begin(session: _Session) -> Reply:
            if session.state == "open":
                raise _RefusedError(f"sync of version {session.incoming} is open; commit or abort it first")
            if session.version is not None and version <= session.version:
                raise _RefusedError(f"expected a version above {session.version}, got {version}")
            if transport not in TRANSPORTS:
                raise _RefusedError(f"expected a transport of {sorted(TRANSPORTS)}, got {transport!r}")
            if self.vllm_config.model_config.quantization is not None:  # type: ignore[attr-defined]
                raise _RefusedError("the engine is quantised; sync into quantised engines is not supported")
            session.incoming = version
            session.transport = transport
            session.manifest = {name: (tuple(shape), dtype) for name, (shape, dtype) in manifest.items()}
            session.received = {}
            session.reload = LayerwiseReload(self.model_runner.model, self.vllm_config)  # type: ignore[attr-defined]
            session.reload.begin()
            session.state = "open"
            return {}

        return self._r3_reply(begin)

    def r3_load(self, version: int, where: dict[str, Any], digests: dict[str, int]) -> Reply:
        """Receive one chunk, check it against manifest and digests, and load it."""

        def load(session: _Session) -> Reply:
            reload = self._r3_open(session, version)
            chunk = TRANSPORTS[session.transport].receive(where)
            session.received |= _checked(chunk, session, digests)
            reload.load(chunk)
            return {}

        return self._r3_reply(load)

    def r3_commit(self, version: int) -> Reply:
        """Close the bracket if everything has come; answers the digest of all that was loaded."""

        def commit(session: _Session) -> Reply:
            reload = self._r3_open(session, version)
            unsent = sorted(session.manifest.keys() - session.received.keys())
            if unsent:
                raise RuntimeError(f"{len(unsent)} tensors of the manifest have not come: {unsent[:16]}")
            missing = reload.missing()
            if missing:
                raise RuntimeError(
                    f"{len(missing)} layers of the engine have not got all their weights: {'; '.join(missing[:16])}"
                )
            reload.finish()
            session.state, session.version, session.incoming, session.reload = "idle", version, None, None
            session.cause = ""
            return {"digest": combine(session.received)}

        return self._r3_reply(commit)

    def r3_abort(self, version: int, cause: str) -> Reply:
        """Give up the open sync: the worker is poisoned until a complete sync commits."""

        def abort(session: _Session) -> Reply:
            if session.state == "open" and session.incoming == version:
                _poison(session, cause)
            return {"state": session.state}

        return self._r3_reply(abort)

    def _r3_open(self, session: _Session, version: int) -> LayerwiseReload:
        if session.state != "open" or session.incoming != version or session.reload is None:
            raise _RefusedError(
                f"no sync of version {version} is open: the worker is {session.state}"
                + (f" ({session.cause})" if session.cause else "")
            )
        return session.reload

    def _r3_reply(self, action: Callable[[_Session], Reply]) -> Reply:
        session: _Session = self.__dict__.setdefault("r3_session", _Session())
        reply: Reply = {}
        try:
            reply = action(session)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
            if not isinstance(error, _RefusedError):
                _poison(session, reply["error"])
        return {"rank": self.rank, "version": session.version, **reply}  # type: ignore[attr-defined]


def _poison(session: _Session, cause: str) -> None:
    session.state, session.incoming, session.reload, session.cause = "poisoned", None, None, cause


def _checked(chunk: Chunk, session: _Session, digests: dict[str, int]) -> dict[str, int]:
    """Digests of a chunk that is exactly what the manifest and the sender say."""
    problems = []
    found: dict[str, int] = {}
    for name, tensor in chunk:
        expected = session.manifest.get(name)
        got = (tuple(tensor.shape), str(tensor.dtype))
        if expected is None:
            problems.append(f"{name}: not in the manifest")
        elif name in session.received or name in found:
            problems.append(f"{name}: came twice")
        elif got != expected:
            problems.append(f"{name}: expected {expected}, got {got}")
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name}: holds NaN or infinity")
        else:
            found[name] = digest(tensor)
            if found[name] != digests.get(name):
                problems.append(f"{name}: expected digest {digests.get(name)}, got {found[name]}")
    problems += [f"{name}: announced with this chunk, did not come" for name in sorted(digests.keys() - found.keys())]
    if problems:
        raise RuntimeError(f"bad chunk: {'; '.join(problems[:16])}")
    return found
