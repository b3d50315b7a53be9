"""`RolloutRouting`: which experts each token of a batch of rollouts went to.

Shapes: B batch, S sequence, L decoder layers, K slots, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r3.errors import RoutingError
from r3.routing.checks import check_rows


def compact_dtype(num_experts: int) -> torch.dtype:
    """Smallest integer dtype for ids of `num_experts` experts: uint8 up to 256, int16 up to 32768, else int32."""
    if num_experts <= 1 << 8:
        return torch.uint8
    return torch.int16 if num_experts <= 1 << 15 else torch.int32


@dataclass(frozen=True, kw_only=True)
class RoutingSpec:
    """What the routing of a model looks like.

    Attributes:
        layer_ids: decoder layers that have a router, ascending.
        num_layers: all decoder layers; those not in `layer_ids` are dense.
        num_experts: E.
        top_k: K.
    """

    layer_ids: tuple[int, ...]
    num_layers: int
    num_experts: int
    top_k: int


@dataclass(frozen=True, eq=False)
class RolloutRouting:
    """Expert ids of a batch, checked when made: every valid row holds K distinct ids in [0, E).

    Args:
        expert_ids: integer `[B, S, L, K]`; stored in the compact dtype of `num_experts`.
        valid: bool `[B, S]`. A row that is not valid was not captured, or belongs to padding or to the token that
            was sampled last; its ids are ignored (and stored as 0) and the token is routed live.
        layer_ids: decoder layer of each of the L columns, ascending.
        num_experts: E.
        weight_version: version of the weights that produced the rows, where known.

    Raises:
        RoutingError: wrong shape or dtype, an id out of range or repeated in a valid row.

    Example:
        >>> ids = torch.tensor([[[[0, 2]], [[1, 3]]]])
        >>> RolloutRouting(ids, torch.tensor([[True, True]]), layer_ids=(0,), num_experts=4).shape
        (1, 2, 1, 2)
    """

    expert_ids: Tensor
    valid: Tensor
    layer_ids: tuple[int, ...]
    num_experts: int
    weight_version: int | None = None

    def __post_init__(self) -> None:
        ids, valid = self.expert_ids, self.valid
        if ids.dim() != 4 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise RoutingError(f"expert_ids: expected integer [B, S, L, K], got {ids.dtype} {tuple(ids.shape)}")
        if valid.dtype != torch.bool or valid.shape != ids.shape[:2]:
            raise RoutingError(
                f"valid: expected bool [B, S] = {tuple(ids.shape[:2])}, got {valid.dtype} {tuple(valid.shape)}"
            )
        if len(self.layer_ids) != ids.shape[2] or list(self.layer_ids) != sorted(set(self.layer_ids)):
            raise RoutingError(
                f"layer_ids: expected {ids.shape[2]} ascending decoder layers, one a column, got {self.layer_ids}"
            )
        check_rows(ids, valid, self.layer_ids, self.num_experts)
        compact = ids.to(compact_dtype(self.num_experts))
        if not bool(valid.all()):
            compact = compact.masked_fill(~valid[..., None, None], 0)
        object.__setattr__(self, "expert_ids", compact)
        object.__setattr__(self, "layer_ids", tuple(self.layer_ids))

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Tensor],
        length: int,
        *,
        layer_ids: tuple[int, ...],
        num_experts: int,
        weight_version: int | None = None,
    ) -> "RolloutRouting":
        """Right-padded batch `[B, length, L, K]` of samples with integer rows `[R_b, L, K]`, R_b <= length.

        Row r of a sample is the routing of its token r; positions from R_b on are not valid.
        """
        if not rows:
            raise RoutingError("rows: expected at least one sample, got none")
        shapes = {tuple(r.shape[1:]) for r in rows}
        longest = max(len(r) for r in rows)
        if len(shapes) != 1 or longest > length:
            raise RoutingError(
                f"rows: expected samples of [R <= {length}, L, K] with one (L, K), got (L, K) in {sorted(shapes)} "
                f"and up to {longest} rows"
            )
        expert_ids = torch.zeros(len(rows), length, *shapes.pop(), dtype=rows[0].dtype)
        valid = torch.zeros(len(rows), length, dtype=torch.bool)
        for b, sample in enumerate(rows):
            expert_ids[b, : len(sample)] = sample
            valid[b, : len(sample)] = True
        return cls(expert_ids, valid, layer_ids, num_experts, weight_version)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, S, L, K)."""
        b, s, n, k = self.expert_ids.shape
        return b, s, n, k

    @property
    def device(self) -> torch.device:
        return self.expert_ids.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "RolloutRouting":
        """The same routing on `device`, moved in the compact dtype."""
        return self._with(
            self.expert_ids.to(device, non_blocking=non_blocking), self.valid.to(device, non_blocking=non_blocking)
        )

    def select(self, samples: Tensor | Sequence[int] | slice) -> "RolloutRouting":
        """The samples of the batch that `samples` picks, in that order; a slice shares memory."""
        index = samples if isinstance(samples, slice) else torch.as_tensor(samples, device=self.device)
        return self._with(self.expert_ids[index], self.valid[index])

    def pad(self, length: int) -> "RolloutRouting":
        """Right-padded to `length` positions; the new ones are not valid.

        Raises:
            RoutingError: `length` is shorter than S.
        """
        extra = length - self.shape[1]
        if extra < 0:
            raise RoutingError(f"length: expected at least S = {self.shape[1]}, got {length}")
        if not extra:
            return self
        pad = torch.nn.functional.pad
        return self._with(pad(self.expert_ids, (0, 0, 0, 0, 0, extra)), pad(self.valid, (0, extra)))

    @classmethod
    def cat(cls, parts: Sequence["RolloutRouting"]) -> "RolloutRouting":
        """One batch of all samples of `parts`, right-padded to the longest.

        Raises:
            RoutingError: no parts, or parts that differ in layers, slots or experts.
        """
        if not parts:
            raise RoutingError("parts: expected at least one, got none")
        kinds = {(p.layer_ids, p.shape[3], p.num_experts) for p in parts}
        if len(kinds) != 1:
            raise RoutingError(f"parts: expected one (layer_ids, K, num_experts), got {sorted(kinds)}")
        length = max(p.shape[1] for p in parts)
        padded = [p.pad(length) for p in parts]
        versions = {p.weight_version for p in parts}
        return replace_trusted(
            parts[0],
            torch.cat([p.expert_ids for p in padded]),
            torch.cat([p.valid for p in padded]),
            weight_version=versions.pop() if len(versions) == 1 else None,
        )

    def _with(self, expert_ids: Tensor, valid: Tensor) -> "RolloutRouting":
        return replace_trusted(self, expert_ids, valid, weight_version=self.weight_version)


def replace_trusted(
    like: RolloutRouting, expert_ids: Tensor, valid: Tensor, *, weight_version: int | None
) -> RolloutRouting:
    """A `RolloutRouting` of rows that another one has checked already: content is not looked at again."""
    new = object.__new__(RolloutRouting)
    fields = dict(
        expert_ids=expert_ids,
        valid=valid,
        layer_ids=like.layer_ids,
        num_experts=like.num_experts,
        weight_version=weight_version,
    )
    for name, value in fields.items():
        object.__setattr__(new, name, value)
    return new
