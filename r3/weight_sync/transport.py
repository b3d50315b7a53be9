"""How the bytes of a chunk get from the trainer to the engine's workers."""

import contextlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

Chunk = list[tuple[str, Tensor]]


class Transport(ABC):
    """Moves chunks of named tensors from the trainer to every worker.

    `sending` runs in the trainer, `receive` in each worker. What `sending` yields is a plain dictionary that goes to
    the workers by RPC; with it alone, and the transport's class, they must be able to `receive` the chunk. The workers
    may keep the tensors that they received for as long as the sync lasts: memory that holds them is not used again.
    """

    name: str

    @abstractmethod
    def sending(self, index: int, chunk: Chunk) -> contextlib.AbstractContextManager[dict[str, Any]]:
        """Make chunk number `index` available to the workers until the context is left."""

    @staticmethod
    @abstractmethod
    def receive(where: dict[str, Any]) -> Chunk:
        """The tensors of a chunk, in the worker. Raises if it is not there or not whole."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the transport holds."""


class FilesTransport(Transport):
    """Chunks as safetensors files in a folder that trainer and workers share: a RAM disk, a local disk, a mount.

    Args:
        folder: where to write; by default a temporary folder, in memory where the machine has a RAM disk.
            A temporary folder is removed by `close` and when the process ends.
    """

    name = "files"

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        memory = Path("/dev/shm")
        parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
        self._temporary = tempfile.TemporaryDirectory(prefix="r3-sync-", dir=parent) if folder is None else None
        self._folder = Path(self._temporary.name if self._temporary else folder)  # type: ignore[arg-type]
        self._folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def sending(self, index: int, chunk: Chunk) -> Iterator[dict[str, Any]]:
        from safetensors.torch import save_file

        path = self._folder / f"chunk-{index:06d}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in chunk}, partial)
            partial.replace(path)  # a worker sees a whole file or none
            yield {"path": str(path)}
        finally:
            partial.unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    @staticmethod
    def receive(where: dict[str, Any]) -> Chunk:
        from safetensors.torch import load

        # Read into memory of our own: the file is gone when the sender has its answers, and the worker keeps tensors.
        return list(load(Path(where["path"]).read_bytes()).items())

    def close(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
        elif not any(self._folder.iterdir()):
            shutil.rmtree(self._folder, ignore_errors=True)


TRANSPORTS: dict[str, type[Transport]] = {FilesTransport.name: FilesTransport}
