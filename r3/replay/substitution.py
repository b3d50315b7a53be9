"""Top-k substitution: the router's own code runs, and its one top-k over the experts answers with recorded ids.

What the router does before and after (scores, renormalisation, scale, casts) is the model's own and live, so that the
result under a router's own choice is bit-identical to live and the gradient reaches the gate.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOPK = frozenset({torch.topk, Tensor.topk})


def _arguments(args: tuple, kwargs: dict) -> tuple[Tensor, int, int]:
    """(input, k, dim) of a `topk` call, however it was spelled."""
    names = ("input", "k", "dim")
    bound = dict(zip(names, args, strict=False)) | {n: kwargs[n] for n in names if n in kwargs}
    return bound["input"], int(bound["k"]), int(bound.get("dim", -1))


def _is_choice(scores: Tensor, dim: int) -> bool:
    """A choice among experts is a top-k over the last dimension of `[T, E]`; group limits work on other shapes."""
    return scores.dim() == 2 and dim in (-1, 1)


class TopKRecorder(TorchFunctionMode):
    """Records (E, K, indices `[T, K]`) of every 2-D `topk` that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _TOPK:
            scores, k, dim = _arguments(args, kwargs or {})
            if _is_choice(scores, dim):
                self.calls.append((scores.shape[-1], k, result.indices))
        return result


class TopKSubstitution(TorchFunctionMode):
    """Answers the `topk` of K among E with given ids; everything else runs as it is.

    Args:
        ids: int64 `[T, K]`.
        valid: bool `[T]`, or None if all rows are valid. Rows that are not valid take the live top-k.
        num_experts: E.

    `count` is the number of calls answered: a router must make exactly one.
    """

    def __init__(self, ids: Tensor, valid: Tensor | None, num_experts: int) -> None:
        super().__init__()
        self.ids = ids
        self.valid = valid
        self.num_experts = num_experts
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _TOPK:
            return func(*args, **kwargs)
        scores, k, dim = _arguments(args, kwargs)
        if not _is_choice(scores, dim) or scores.shape[-1] != self.num_experts or k != self.ids.shape[-1]:
            return func(*args, **kwargs)
        self.count += 1
        ids = self.ids
        if self.valid is not None:
            ids = torch.where(self.valid[:, None], ids, func(*args, **kwargs).indices)
        return torch.return_types.topk((scores.gather(-1, ids), ids))
