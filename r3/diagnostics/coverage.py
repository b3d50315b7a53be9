"""How much of what was sampled has captured routing, and how old the weights were that made it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from r3.diagnostics.merging import MergeableSums
from r3.diagnostics.metric import Chart, Metric, Watch
from r3.errors import DiagnosticsError, summary

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class CoverageSums(MergeableSums):
    """Mergeable counts of rows. A rollout of n tokens has n - 1 rows: its last token was sampled and never fed."""

    rows_captured: int = 0
    rows_invalid: int = 0
    pairs_missing: int = 0
    version_known: int = 0
    lag_sum: int = 0
    lag_max: float = -math.inf

    maxima: ClassVar[int] = 1
    METRICS = (
        Metric(name="rows_captured", formula="rows whose routing was captured in every layer", unit="rows"),
        Metric(name="rows_invalid", formula="the other rows, which are routed live where it is missing", unit="rows"),
        Metric(
            name="pairs_missing",
            formula="(row, layer) pairs that are missing in rows that were captured in other layers",
            unit="pairs",
        ),
        Metric(
            name="coverage",
            formula="`rows_captured` / (`rows_captured` + `rows_invalid`)",
            chart=Chart(
                section="coverage",
                title="Coverage",
                unit="rows with routing",
                caption="Rows whose routing was captured; the others are routed live.",
                share=True,
                colour="replayed",
            ),
            watch=Watch(
                name="coverage",
                remedy="rows without routing are routed live; r3 doctor checks the capture",
                worse="lower",
            ),
        ),
        Metric(
            name="version_lag_mean",
            formula="mean of (version of the trainer's weights - version that made the row), over rows of known "
            "version",
            unit="versions",
        ),
        Metric(
            name="version_lag_max",
            formula="max of the same",
            unit="versions",
            notes="merges by maximum",
            watch=Watch(
                name="version_lag",
                remedy="rollouts are older than the settings allow: sync more often, or keep fewer rollouts in flight",
            ),
        ),
        Metric(name="version_unknown", formula="rows without version information", unit="rows"),
    )

    @classmethod
    def from_tensors(
        cls,
        valid: torch.Tensor | None,
        tokens: torch.Tensor,
        versions: torch.Tensor | None,
        trainer_version: int,
    ) -> Self:
        """Counts of a batch of whole rollouts, one a row, before they are packed or sliced.

        Args:
            valid: bool `[B, S]`, rows whose routing was captured, or `[B, S, L]` where some lack layers; None if
                routing was not asked for.
            tokens: bool `[B, S]`, False on padding, on either side.
            versions: integer `[B, S]`, the version of the weights that made each row, negative where unknown; None if
                nobody told.
            trainer_version: version of the weights that are trained.

        Raises:
            DiagnosticsError: unequal shapes, or other dtypes.
        """
        _check(valid, tokens, versions)
        # The last token of each rollout: no token comes after it.
        has_row = tokens & (tokens.flip(1).cumsum(1).flip(1) > 1)
        valid = torch.zeros_like(has_row) if valid is None else valid
        by_layer = valid if valid.dim() == 3 else valid[..., None]
        captured = has_row & by_layer.all(-1)
        missing = ~by_layer & (has_row & by_layer.any(-1))[..., None]
        known = torch.zeros_like(has_row) if versions is None else has_row & (versions >= 0)
        lag = torch.zeros_like(has_row, dtype=torch.int64) if versions is None else trainer_version - versions.long()
        lowest = torch.iinfo(torch.int64).min
        largest = lag.masked_fill(~known, lowest).max() if lag.numel() else torch.tensor(lowest, device=tokens.device)
        totals = [captured, has_row, missing, known, lag.masked_fill(~known, 0)]
        rows_captured, rows, pairs_missing, version_known, lag_sum, lag_max = torch.stack(
            [*(total.sum() for total in totals), largest]
        ).tolist()
        return cls(
            rows_captured=rows_captured,
            rows_invalid=rows - rows_captured,
            pairs_missing=pairs_missing,
            version_known=version_known,
            lag_sum=lag_sum,
            lag_max=float(lag_max) if version_known else -math.inf,
        )

    @property
    def signature(self) -> dict[str, Any]:
        return {}

    def as_tensor(self) -> torch.Tensor:
        """The fields in their order, float64; only the last merges by maximum."""
        totals = [self.rows_captured, self.rows_invalid, self.pairs_missing, self.version_known, self.lag_sum]
        return torch.tensor([*totals, self.lag_max], dtype=torch.float64)

    def with_totals(self, totals: torch.Tensor) -> Self:
        *counts, lag_max = totals.tolist()
        rows_captured, rows_invalid, pairs_missing, version_known, lag_sum = map(int, counts)
        return type(self)(
            rows_captured=rows_captured,
            rows_invalid=rows_invalid,
            pairs_missing=pairs_missing,
            version_known=version_known,
            lag_sum=lag_sum,
            lag_max=lag_max,
        )

    @classmethod
    def empty(cls) -> Self:
        """The neutral element of `merge`: no rows."""
        return cls()

    def metrics(self) -> dict[str, float]:
        """By the names in `METRICS`; without rows, or any of known version, counts are 0 and the rest is NaN."""
        rows, known = self.rows_captured + self.rows_invalid, self.version_known
        return {
            "coverage": self.rows_captured / rows if rows else math.nan,
            "rows_captured": float(self.rows_captured),
            "rows_invalid": float(self.rows_invalid),
            "pairs_missing": float(self.pairs_missing),
            "version_lag_mean": self.lag_sum / known if known else math.nan,
            "version_lag_max": self.lag_max if known else math.nan,
            "version_unknown": float(rows - known),
        }


def _check(valid: torch.Tensor | None, tokens: torch.Tensor, versions: torch.Tensor | None) -> None:
    problems = []
    for name, tensor in (("valid", valid), ("tokens", tokens), ("versions", versions)):
        if tensor is None:
            continue
        whole = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)
        if (tensor.dtype != torch.bool) if name != "versions" else not whole:
            problems.append(
                f"{name}: expected {'integers' if name == 'versions' else 'torch.bool'}, got {tensor.dtype}"
            )
        shape = tensor.shape[:2] if name == "valid" and tensor.dim() == 3 else tensor.shape
        if tokens.dim() != 2 or shape != tokens.shape:
            problems.append(f"{name}: expected [B, S] as `tokens` is, {list(tokens.shape)}, got {list(tensor.shape)}")
        if tensor.device != tokens.device:
            problems.append(f"{name}: expected on {tokens.device}, got {tensor.device}; move it first")
    if problems:
        raise DiagnosticsError(f"coverage cannot be counted:{summary(problems)}")
