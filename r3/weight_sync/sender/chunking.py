"""The outgoing weights of a sync: the manifest, whole tensors in the engine's dtype, and chunks of them."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from r3.errors import SyncError, summary
from r3.weight_sync.transports import Chunk
from r3.weight_sync.weights.lazy import LazyWeight, Weight, gathered, is_live

_CASTABLE = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_MORE_IN_PLACE = 8  # times chunk_bytes: a chunk costs both sides 0.3 ms, in which a GPU copies 0.5 GiB


class OutgoingWeights:
    """The weights of one sync, each gathered once, in order.

    Args:
        named: the whole checkpoint, by name.
        frozen: module paths; weights below them are not sent.
        dtype: what 16-, 32- and 64-bit floating-point tensors are sent in; None for their own. A `LazyWeight` may
            keep its own.
        chunk_bytes: largest chunk; one tensor that is larger is a chunk of its own.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Weight]],
        *,
        dtype: torch.dtype | None,
        chunk_bytes: int,
        frozen: Sequence[str] = (),
    ) -> None:
        self.frozen = module_paths(frozen)
        self._named = list(unfrozen(named, frozen))
        self._ungathered = deque(self._named)
        self._dtype = dtype
        self._chunk_bytes = chunk_bytes
        self.zero_copy_names = {name for name, w in self._named if is_live(w) and w.dtype == self._sent_dtype(w)}
        """Names of weights that are sent as they are, neither gathered nor cast."""

    def manifest(self) -> dict[str, list]:
        """Name -> [shape, dtype] of what will be sent.

        Raises:
            SyncError: nothing to send, or a name that occurs twice.
        """
        if not self._named:
            raise SyncError("named_tensors: expected the whole checkpoint, got nothing")
        twice = sorted(name for name, count in Counter(name for name, _ in self._named).items() if count > 1)
        if twice:
            raise SyncError(f"named_tensors: {len(twice)} names occur twice:{summary(twice)}")
        return {name: [list(weight.shape), str(self._sent_dtype(weight))] for name, weight in self._named}

    def gpu_resident(self) -> Iterator[tuple[str, Tensor]]:
        """GPU-resident tensors that can be sent without a copy, up to the first that cannot."""
        for name, weight in self._named:
            if name in self.zero_copy_names:
                tensor = gathered(weight)
                if not tensor.is_cuda:
                    return
                yield name, tensor

    def chunks(self, takes_memory: Callable[[Chunk], bool]) -> Iterator[Chunk]:
        """Chunks of whole tensors, gathered and cast to the dtype in which they are sent.

        Args:
            takes_memory: whether sending these tensors takes memory. A chunk holds eight times as many bytes of
                zero-copy tensors that take none.

        Raises:
            SyncError: names the tensor that could not be gathered.
        """
        chunk: Chunk = []
        size = 0
        while self._ungathered:
            name, weight = self._ungathered[0]
            dtype = self._sent_dtype(weight)
            nbytes = weight.shape.numel() * dtype.itemsize
            tensor = _whole(name, weight) if name in self.zero_copy_names else None
            if tensor is not None and not takes_memory([(name, tensor)]):
                nbytes //= _MORE_IN_PLACE
            if chunk and size + nbytes > self._chunk_bytes:
                yield chunk
                chunk, size = [], 0
            self._ungathered.popleft()
            # Tensors are made for the sync only when the chunk has room.
            chunk.append((name, _whole(name, weight).to(dtype).contiguous() if tensor is None else tensor))
            size += nbytes
        if chunk:
            yield chunk

    def gather_rest(self) -> None:
        """After a failure, gather the remaining weights, so that ranks that gather in step do not wait for this one."""
        gather_all(self._ungathered)

    def _sent_dtype(self, weight: Weight) -> torch.dtype:
        keeps = isinstance(weight, LazyWeight) and weight.keep_dtype
        return weight.dtype if keeps or self._dtype is None or weight.dtype not in _CASTABLE else self._dtype


def _whole(name: str, weight: Weight) -> Tensor:
    try:
        return gathered(weight)
    except Exception as error:
        raise SyncError(f"{name} could not be gathered: {type(error).__name__}: {error}") from error


def module_paths(frozen: Sequence[str]) -> tuple[str, ...]:
    """`frozen` without dots at the ends; raises `SyncError` if it is no list of paths."""
    if isinstance(frozen, str) or not all(isinstance(path, str) and path.strip(".") for path in frozen):
        raise SyncError(f"frozen: expected module paths, such as ['model.visual'], got {frozen!r}")
    return tuple(path.strip(".") for path in frozen)


def unfrozen(named: Iterable[tuple[str, Weight]], frozen: Sequence[str]) -> Iterator[tuple[str, Weight]]:
    """The weights in `named` that are not at or below a path in `frozen`."""
    below = tuple(f"{path}." for path in module_paths(frozen))
    return ((name, weight) for name, weight in named if not f"{name}.".startswith(below))


def gather_all(weights: Iterable[tuple[str, Weight]], *, frozen: Sequence[str] = ()) -> None:
    """Gather every weight in step with the rank that pushes, and keep none: for ranks that have no engine.

    Args:
        weights: what the other rank pushes.
        frozen: as the other rank has it.

    Raises:
        SyncError: names what could not be gathered; after the last weight, so that no rank is left waiting.
    """
    problems = []
    for name, weight in unfrozen(weights, frozen):
        try:
            gathered(weight)
        except Exception as error:  # noqa: PERF203 (one weight after the other, in step with the other ranks)
            problems.append(f"{name}: {type(error).__name__}: {error}")
    if problems:
        raise SyncError(f"{len(problems)} weights could not be gathered:{summary(problems)}")
