"""Selection: a router's top-k answered with given experts, and its own search kept to the rows that need it.

Shapes: T tokens, E experts, K slots, R rows that are routed live.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from r3.errors import ReplayError

_ID_DTYPES = frozenset({torch.uint8, torch.int16, torch.int32, torch.int64})

Search = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A call of `topk` over the last dimension with its K bound: (values, indices) of the rows that it is given."""


def select(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of given experts, and their ids, in the form of `torch.topk(scores, K)`.

    A `gather`, whose backward adds to zeros: where the ids of a row are distinct, as those of a `RolloutRouting` are,
    that is the gradient of `topk`. An autograd function with a plain scatter, and a fused kernel each way, saved 0% and
    1% of a router's time on a GPU, and cost more on the host (docs/lab/performance.md).

    Args:
        scores: floating `[..., E]`.
        ids: uint8, int16, int32 or int64 `[..., K]`. Any strides: a layer's column of compact `[T, L, K]` will do.

    Returns:
        values `[..., K]` in the dtype of `scores`, differentiable with respect to them, and ids, int64 contiguous.

    Raises:
        ReplayError: shapes, dtypes or devices that do not agree.

    Example:
        >>> select(torch.tensor([[0.25, 0.5, 0.125]]), torch.tensor([[2, 0]], dtype=torch.uint8))
        (tensor([[0.1250, 0.2500]]), tensor([[2, 0]]))
    """
    if (
        not scores.is_floating_point()
        or ids.dtype not in _ID_DTYPES
        or ids.dim() == 0
        or scores.shape[:-1] != ids.shape[:-1]
        or not 1 <= ids.shape[-1] <= scores.shape[-1]
        or ids.device != scores.device
    ):
        raise ReplayError(
            "selection: expected floating scores [..., E] and ids [..., K <= E] of uint8, int16, int32 or int64 on one "
            f"device, got {_describe(scores)} and {_describe(ids)}"
        )
    indices = ids.long().contiguous()
    return scores.gather(-1, indices), indices


def with_live_rows(ids: Tensor, scores: Tensor, rows: Tensor, search: Search) -> Tensor:
    """Given ids, but the live choice in `rows`.

    Args:
        ids: integer `[T, K]`; what they are in `rows` does not matter.
        scores: floating `[..., E]` of T tokens, those that the router chooses by.
        rows: int64 `[R]`, distinct; or bool `[T]`, where their number is not known: then the search is of all rows.
        search: the router's choice.

    Returns:
        int64 `[T, K]`.
    """
    if rows.dtype == torch.bool:
        _, live = search(scores.detach().flatten(0, -2))
        return torch.where(rows[:, None], live, ids.long())
    _, live = search(scores.detach().flatten(0, -2).index_select(0, rows))
    return ids.long().index_copy(0, rows, live)


def search_rows(scores: Tensor, k: int, rows: Tensor | None, search: Search) -> tuple[Tensor, Tensor]:
    """A top-k whose result matters in `rows` alone: found there, and elsewhere the first k entries, whatever they are.

    For the top-k of a group limit, which restricts a live choice and has no say in a given one.

    Args:
        scores: floating `[T, ..., E]`.
        k: entries that the top-k returns.
        rows: int64 `[R]`, or None for no row; or bool `[T]`, and the search is of all.
        search: the top-k.

    Returns:
        values `[T, ..., k]`, detached, and int64 indices `[T, ..., k]`.
    """
    scores = scores.detach()
    if rows is not None and rows.dtype == torch.bool:
        return search(scores)
    values = scores.narrow(-1, 0, k)
    indices = torch.arange(k, device=scores.device).expand(values.shape)
    if rows is None:
        return values, indices
    found, places = search(scores.index_select(0, rows))
    return values.index_copy(0, rows, found), indices.index_copy(0, rows, places)


def margin(scores: Tensor, k: int, search: Search) -> Tensor:
    """How close a choice of the k best was: the k-th best score less the next one, each as the router's top-k sees it.

    Args:
        scores: floating `[..., E]` of T tokens, those that the router chooses by; -inf on experts that it rules out.
        k: how many it chooses.
        search: its choice, but of the best k + 1, in order.

    Returns:
        float32 `[T]`, detached, from 0 up. Infinite where no other expert could have been chosen: k is E, or all others
        are ruled out. NaN where a score is.
    """
    scores = scores.detach().flatten(0, -2)
    if k == scores.shape[-1]:
        return scores.new_full((len(scores),), torch.inf, dtype=torch.float32)
    best, _ = search(scores)
    last, following = best[:, -2], best[:, -1]
    # The difference of two bfloat16 numbers is one of float32. Two infinities are equal, and no NaN.
    wide = torch.promote_types(scores.dtype, torch.float32)
    apart = (last.to(wide) - following.to(wide)).abs()
    return apart.masked_fill(last == following, 0).float()


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


__all__ = ["Search", "margin", "search_rows", "select", "with_live_rows"]
