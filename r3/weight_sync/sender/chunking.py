"""The outgoing weights of a sync: the manifest, whole tensors in the engine's dtype, and chunks of them."""

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from r3.errors import SyncError, summary
from r3.weight_sync.sender.deal import Dealt, deal
from r3.weight_sync.transports import Chunk
from r3.weight_sync.weights.gathering import Gathering
from r3.weight_sync.weights.lazy import LazyWeight, Weight, as_source, gathered, is_live

_CASTABLE = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_MORE_IN_PLACE = 8  # times chunk_bytes: a chunk costs both sides 0.3 ms, in which a GPU copies 0.5 GiB


class Round(NamedTuple):
    """One chunk of each sender, sent at the same time. With one sender it is a chunk.

    Attributes:
        names: of all of its tensors.
        chunk: the tensors that this rank sends.
    """

    names: list[str]
    chunk: Chunk


Parts = list[list[int]]
"""Numbers of the weights of a round, by sender."""


class OutgoingWeights:
    """The weights of one sync, each gathered once, in order.

    Args:
        named: the whole checkpoint, by name.
        frozen: module paths; weights below them are not sent.
        dtype: what 16-, 32- and 64-bit floating-point tensors are sent in; None for their own. A `LazyWeight` may
            keep its own.
        chunk_bytes: largest round; a sender's part is at most an equal share of it, or one tensor that is larger.
        owners: global ranks that gather together, each of which may send a part. None if this rank sends all, and
            whatever is sharded is gathered by all.
        sender: number of this rank among them.
        gathering: of the ranks.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Weight]],
        *,
        dtype: torch.dtype | None,
        chunk_bytes: int,
        frozen: Sequence[str] = (),
        owners: Sequence[int] | None = None,
        sender: int = 0,
        gathering: Gathering | None = None,
    ) -> None:
        self.frozen = module_paths(frozen)
        self._named = list(unfrozen(named, frozen))
        self._dtype = dtype
        self._chunk_bytes = chunk_bytes
        self._owners = owners
        self._sender = sender
        self._gathering = gathering
        self._ready: dict[int, Tensor] = {}
        self._ungathered: deque[tuple[int, int]] = deque()  # of the current round: sender, weight
        self.zero_copy_names = {name for name, w in self._named if is_live(w) and w.dtype == self._sent_dtype(w)}
        """Names of weights that are sent as they are, neither gathered nor cast."""
        self._shares = [deque[int]() for _ in owners or [0]]
        self._shares[sender].extend(range(len(self._named)))
        self._limit = chunk_bytes

    def deal(self) -> None:
        """Let every owner send its part, instead of this rank all: what it holds, where it holds weights whole."""
        sender_of = {rank: sender for sender, rank in enumerate(self._owners or [])}
        dealt = []
        for _, weight in self._named:
            lazy = as_source("", weight)
            holders = tuple(sender_of[rank] for rank in lazy.holders if rank in sender_of)
            dealt.append(Dealt(self._sent_bytes(weight), lazy.together, holders))
        self._shares = [deque(share) for share in deal(dealt, len(self._shares))]
        self._limit = max(1, self._chunk_bytes // len(self._shares))

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
        """GPU-resident tensors that this rank can send without a copy, up to the first that cannot."""
        for name, weight in [self._named[number] for number in self._shares[self._sender]]:
            if name in self.zero_copy_names:
                tensor = gathered(weight)
                if not tensor.is_cuda:
                    return
                yield name, tensor

    def rounds(
        self, takes_memory: Callable[[Chunk], bool], tell: Callable[[Parts], None] = lambda parts: None
    ) -> Iterator[Round]:
        """Rounds of whole tensors, gathered and cast to the dtype in which they are sent.

        Args:
            takes_memory: whether sending these tensors takes memory. A chunk holds eight times as many bytes of
                zero-copy tensors that take none.
            tell: called with what is gathered next: the other owners `gather` it at the same time.

        Raises:
            SyncError: names the tensor that could not be gathered.
        """
        while any(self._shares):
            parts = [self._next(sender, takes_memory) for sender in range(len(self._shares))]
            tell(parts)
            yield self.gather(parts)

    def gather(self, parts: Parts) -> Round:
        """Gather a round. Of a failure the other ranks see nothing: they find what is left of the round in step.

        Raises:
            SyncError: names the tensor that could not be gathered.
        """
        self._ungathered = deque((sender, number) for sender, part in enumerate(parts) for number in part)
        names = [self._named[number][0] for _, number in self._ungathered]
        chunk: Chunk = []
        try:
            while self._ungathered:
                sender, number = self._ungathered.popleft()
                name, weight = self._named[number]
                tensor = self._ready.pop(number) if number in self._ready else self._whole(sender, number)
                if sender == self._sender:
                    chunk.append((name, tensor.to(self._sent_dtype(weight)).contiguous()))
            if self._gathering is not None:
                self._gathering.settle()
        except BaseException:
            self._gather_round()
            raise
        return Round(names, chunk)

    def gather_rest(self) -> None:
        """After a failure, gather the remaining weights, so that ranks that gather in step do not wait for this one."""
        if self._owners is None:
            gather_all([self._named[number] for share in self._shares for number in share])

    def _next(self, sender: int, takes_memory: Callable[[Chunk], bool]) -> list[int]:
        """Numbers of the weights of the next chunk of `sender`."""
        share, part, size = self._shares[sender], [], 0
        while share:
            name, weight = self._named[share[0]]
            nbytes = self._sent_bytes(weight)
            if sender == self._sender and name in self.zero_copy_names:
                if share[0] not in self._ready:
                    self._ready[share[0]] = self._whole(sender, share[0])
                if not takes_memory([(name, self._ready[share[0]])]):
                    nbytes //= _MORE_IN_PLACE
            if part and size + nbytes > self._limit:
                break
            part.append(share.popleft())
            size += nbytes
        return part

    def _gather_round(self) -> None:
        """The rest of a round that has failed here: nobody waits for it, and nobody uses it."""
        if self._gathering is not None:
            self._gathering.waits = False
        for sender, number in self._ungathered:
            with contextlib.suppress(Exception):
                self._whole(sender, number)
        self._ungathered.clear()

    def _whole(self, sender: int, number: int) -> Tensor:
        name, weight = self._named[number]
        if self._owners is None or self._gathering is None:
            return _whole(name, weight)
        with self._gathering.to(self._owners[sender]):
            return _whole(name, weight)

    def _sent_bytes(self, weight: Weight) -> int:
        return weight.shape.numel() * self._sent_dtype(weight).itemsize

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
