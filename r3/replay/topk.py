"""Top-k substitution: the router's own code runs, and its one top-k over the experts returns recorded ids.

Everything before and after (scores, renormalisation, scale, casts) is the model's own and live. So the result under a
router's own ids is bit-identical to live, and the gradient reaches the gate.

Shapes: T tokens, E experts, K slots, R rows that are routed live.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from r3.errors import ReplayError
from r3.replay.discovery import RouterSite

_TOPK = frozenset({torch.topk, Tensor.topk})
_MASKED_FILL = frozenset({torch.masked_fill, Tensor.masked_fill})
_ID_DTYPES = frozenset({torch.uint8, torch.int16, torch.int32, torch.int64})

Search = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A call of `topk` over the last dimension with its K bound: (values, indices) of the rows that it is given."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The `topk` call by which a router selects K of E experts, in the last of `dims` dimensions.

    The number of dimensions distinguishes it from a top-k over groups of experts, `[T, groups, E / groups]`.

    `limited` says that the router's other top-ks only mask this one (to the experts of the best groups): they need not
    run where the ids are given.
    """

    num_experts: int
    top_k: int
    dims: int
    limited: bool = False

    def is_made_by(self, scores: Tensor, k: int, dim: int) -> bool:
        """Whether it is the call `topk(scores, k, dim)`."""
        dims = self.dims
        return scores.dim() == dims == dim + 1 and scores.shape[-1] == self.num_experts and k == self.top_k


def _arguments(args: tuple, kwargs: dict) -> tuple[Tensor, int, int]:
    """(input, k, dim) of a `topk` call, however it was spelled."""
    count = len(args)
    scores = args[0] if count else kwargs["input"]
    k = args[1] if count > 1 else kwargs["k"]
    dim = args[2] if count > 2 else kwargs.get("dim", -1)
    return scores, k, dim if dim >= 0 else dim + scores.dim()


def _search(func, args: tuple, kwargs: dict, **changes) -> Search:
    """Repeat a `topk` call over the last dimension of other scores, with `changes` to its arguments."""

    def search(scores: Tensor):
        names = ("k", "dim", "largest", "sorted")
        bound = dict(zip(names, args[1:], strict=False)) | {n: kwargs[n] for n in names if n in kwargs}
        return func(scores, **bound | {"dim": -1} | changes)

    return search


class TopKRecorder(TorchFunctionMode):
    """Records shape and indices `[..., K]` of every `topk` over a last dimension that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Choice, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _TOPK:
            scores, k, dim = _arguments(args, kwargs or {})
            if scores.dim() == dim + 1 > 1:
                choice = Choice(num_experts=scores.shape[-1], top_k=k, dims=scores.dim())
                self.calls.append((choice, result.indices))
        return result


class TopKSubstitution(TorchFunctionMode):
    """Replaces a router's choice by given ids, or lets it run. All other operations run unchanged.

    If the choice is made on masked scores, values are gathered from the scores before `masked_fill`: group limits
    (DeepSeek-V2) restrict which experts may be chosen, but do not change the weight of a chosen one.

    Args:
        choice: the `topk` call to replace.
        ids: integer `[T, K]`, or None to let the live choice stand.
        live: int64 `[R]`, the rows that take the live choice, some perhaps repeated, or None if there are none: the
            top-k runs on these rows only. Or bool `[T]`: it then runs on all rows.
        site: the router, for errors.
        margins: whether to record the margin of live choices, which takes a second `topk` over the same scores.

    Attributes:
        count: number of choices seen; a router must make exactly one.
        chosen: int64 `[..., K]`, the ids of the last choice.
        margin: float32 `[T]`, of the last choice that was live in all rows, if asked for: see `margin`.

    Raises:
        ReplayError: the router chooses for another number of tokens than there are ids for.
    """

    def __init__(
        self, choice: Choice, ids: Tensor | None, live: Tensor | None, site: RouterSite, *, margins: bool = False
    ) -> None:
        super().__init__()
        self.choice = choice
        self.ids = ids
        self.live = live
        self.site = site
        self.count = 0
        self.chosen: Tensor | None = None
        self.margins = margins
        self.margin: Tensor | None = None
        self._masked: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.ids is None or func not in _TOPK:
            result = func(*args, **kwargs)
            if func in _MASKED_FILL:
                self._masked = (result, args[0] if args else kwargs["input"])
            elif func in _TOPK and self.choice.is_made_by(*_arguments(args, kwargs)):
                self._choose(result)
                if self.margins:
                    scores, k, _ = _arguments(args, kwargs)
                    self.margin = margin(scores, k, _search(func, args, kwargs, k=k + 1, sorted=True))
            return result
        scores, k, dim = _arguments(args, kwargs)
        search = _search(func, args, kwargs)
        if self.choice.is_made_by(scores, k, dim):
            return self._choose(self._answer(scores, self.ids, search))
        if not self.choice.limited or self.count or scores.dim() != dim + 1 or len(scores) != len(self.ids):
            return func(*args, **kwargs)
        rows = None if self.live is None else self.live.to(scores.device)
        return torch.return_types.topk(search_rows(scores, k, rows, search))

    def _choose(self, result):
        self.count += 1
        self.chosen = result[1]
        return result

    def _answer(self, scores: Tensor, ids: Tensor, search: Search):
        if scores.shape[:-1].numel() != len(ids):
            raise ReplayError(
                f"router {self.site.name}: expected to choose for {len(ids)} tokens, got {scores.shape[:-1].numel()}; a"
                " router that sees some of the tokens only (those of one modality, say) cannot be replayed"
            )
        ids = ids.to(scores.device)  # a layer on another device (`device_map`)
        if self.live is not None:
            ids = with_live_rows(ids, scores, self.live.to(scores.device), search)
        if self._masked is not None and self._masked[0] is scores:
            scores = self._masked[1]
        return torch.return_types.topk(select(scores, ids.view(*scores.shape[:-1], -1)))


def select(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of given experts and their ids, as `torch.topk(scores, K)` would return them.

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
    """The given ids, with the live choice in `rows`.

    Args:
        ids: integer `[T, K]`; what they are in `rows` does not matter.
        scores: floating `[..., E]` of T tokens, those that the router chooses by.
        rows: int64 `[R]`, which may be repeated; or bool `[T]`, where their number is not known: then the search is of
            all rows.
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
    """A top-k on `rows` only. Other rows return their first k entries, which are not used.

    For the top-k of a group limit, which restricts a live choice and does not affect given ids.

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
    top_values, top_indices = search(scores.index_select(0, rows))
    return values.index_copy(0, rows, top_values), indices.index_copy(0, rows, top_indices)


def margin(scores: Tensor, k: int, search: Search) -> Tensor:
    """The margin of a top-k choice: the k-th best score minus the next one, each as the router's top-k sees it.

    Args:
        scores: floating `[..., E]` of T tokens, those that the router chooses by; -inf on experts that it rules out.
        k: how many it chooses.
        search: the router's top-k, but of the best k + 1, in order.

    Returns:
        float32 `[T]`, detached, from 0 up. Infinite where no other expert could have been chosen: k is E, or all others
        are ruled out. NaN where a score is.
    """
    scores = scores.detach().flatten(0, -2)
    if k == scores.shape[-1]:
        return scores.new_full((len(scores),), torch.inf, dtype=torch.float32)
    best, _ = search(scores)
    last, following = best[:, -2], best[:, -1]
    # Differences of bfloat16 numbers need float32. Two infinities have margin 0, and not NaN.
    wide = torch.promote_types(scores.dtype, torch.float32)
    apart = (last.to(wide) - following.to(wide)).abs()
    return apart.masked_fill(last == following, 0).float()


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
