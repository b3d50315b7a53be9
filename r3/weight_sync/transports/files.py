"""Chunks as safetensors files in a folder that trainer and workers share: a RAM disk, a local disk, a mount."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import IO

from r3.errors import SyncError
from r3.weight_sync.transports.transport import Chunk, Descriptor, Receiver, Transport

_PREFIX = "r3-sync-"


class FilesTransport(Transport):
    """Writes each chunk to a file, which gets its final name when complete and is removed when no worker needs it.

    Works on an object-store mount: a file is written once, front to back, and read after it was closed; its
    length goes with the call. Such a mount must show a closed file to the workers (close-to-open consistency).

    Args:
        folder: where to write; by default a temporary folder, in memory where the machine has a RAM disk. It is removed
            by `close`, when the process ends, or, if the process was killed, by the next transport of this user here.

    Raises:
        SyncError: a file could not be written, the disk being full for example.
    """

    name = "files"

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        self._temporary = _TemporaryFolder() if folder is None else None
        self._folder = self._temporary.path if self._temporary else Path(folder)  # type: ignore[arg-type]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._published: dict[int, Path] = {}

    def publish(self, index: int, chunk: Chunk) -> Descriptor:
        from safetensors.torch import save_file

        path = self._folder / f"chunk-{os.getpid()}-{index:06d}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in chunk}, partial)
            partial.replace(path)
        except Exception as error:
            partial.unlink(missing_ok=True)
            raise SyncError(
                f"chunk {index} ({sum(t.nbytes for _, t in chunk)} bytes) could not be written to {self._folder} "
                f"({error}); {shutil.disk_usage(self._folder).free} bytes are free there: use smaller chunks, or "
                "another folder"
            ) from error
        self._published[index] = path
        return {"path": str(path), "bytes": path.stat().st_size}

    def release(self, index: int) -> None:
        for done in [number for number in self._published if number < index]:
            self._published.pop(done).unlink(missing_ok=True)

    def abort(self) -> None:
        self.release(max(self._published, default=0) + 1)

    def close(self) -> None:
        self.abort()
        if self._temporary is not None:
            self._temporary.remove()


class FilesReceiver(Receiver):
    def receive(self, where: Descriptor) -> Chunk:
        from safetensors.torch import load

        data = Path(where["path"]).read_bytes()
        if len(data) != where["bytes"]:
            raise SyncError(
                f"{where['path']}: expected {where['bytes']} bytes, got {len(data)}: it was cut or not yet shown"
            )
        return [(name, tensor.to(self.device)) for name, tensor in load(data).items()]


class _TemporaryFolder:
    """A temporary folder, locked by its process. Folders of processes that have died are unlocked, and removed."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
        for abandoned in parent.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError), _lock(abandoned):
                shutil.rmtree(abandoned)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            # Another process may take the folder for abandoned in the moment before it is locked.
            with contextlib.suppress(OSError):
                self._lock = _lock(self.path)
                if self.path.exists():
                    break
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def remove(self) -> None:
        self._finalizer()
        self._lock.close()


def _lock(folder: Path) -> IO:
    """Lock `folder`. Raises `OSError` if another process has locked it, or it belongs to another user."""
    file = (folder / ".lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
