"""A weight sync of a model whose parameters are spread over ranks."""

import contextlib
from collections.abc import Sequence

from r3.errors import EngineLostError, ParallelError, SyncError
from r3.parallel import RankBarrier
from r3.pool import EnginePool
from r3.weight_sync import SyncRanks, SyncReceipt, Weight, WeightSync, gather_all

_LOST = f"{EngineLostError.__name__}: "


def push_from_all_ranks(
    sync: WeightSync | EnginePool | None,
    weights: Sequence[tuple[str, Weight]],
    version: int,
    barrier: RankBarrier | None,
    frozen: Sequence[str] = (),
    *,
    ranks: SyncRanks | None = None,
) -> SyncReceipt | None:
    """A sync that commits on all ranks, or raises on all. Every rank calls this, `frozen` alike, and all gather.

    Either one rank has the `sync`, or each has one of its own: of the `vllm.LLM` that an external launcher started in
    its process, alone or as one of a tensor-parallel group.

    Where engines that are lost are removed (`WeightSync(on_lost="remove")`), all push again to those that are left.

    With `ranks`, for one rank with a `sync`, each weight is gathered to one rank, which sends it: no rank holds more
    than its part of a chunk, or one tensor, beside its shards. Without them all ranks gather every weight, one by one.
    Without a `barrier` this is the only rank, which has a `sync`.

    Returns:
        The receipt on a rank with a `sync`, None on the others.

    Raises:
        SyncError: on every rank, if the sync did not commit everywhere or a rank could not gather; it says why.
    """
    try:
        if ranks is not None:
            if sync is not None:
                return sync.push(weights, version=version, frozen=frozen, ranks=ranks)
            return ranks.take_part(weights, frozen=frozen)
        if barrier is not None:
            return _push(sync, weights, version, barrier, frozen)
        assert sync is not None
        return sync.push(weights, version=version, frozen=frozen)
    except EngineLostError:  # it has warned
        return push_from_all_ranks(sync, weights, version, barrier, frozen, ranks=ranks)


def _push(
    sync: WeightSync | EnginePool | None,
    weights: Sequence[tuple[str, Weight]],
    version: int,
    barrier: RankBarrier,
    frozen: Sequence[str],
) -> SyncReceipt | None:
    try:
        if sync is None:
            with barrier.guard():
                gather_all(weights, frozen=frozen)
            barrier.exchange(None)  # whether it was committed
            return None
        try:
            receipt = sync.push(weights, version=version, frozen=frozen, agree=lambda: barrier.exchange(None))
        except ParallelError:  # of the line above: all ranks know
            raise
        except Exception as error:
            with contextlib.suppress(ParallelError):
                barrier.exchange(f"{type(error).__name__}: {error}")
            raise
        barrier.exchange(None)
    except ParallelError as error:  # what another rank raised
        raise (EngineLostError if _LOST in str(error) else SyncError)(str(error)) from error
    return receipt
