"""How far the trainer's log-probabilities are from the rollout's, over the same sampled tokens.

A difference is always d = train - rollout, in nats, so exp(d) is the importance ratio of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from r3.diagnostics.histogram import BINS, bin_of, counts_of, pooled, quantile
from r3.diagnostics.merging import MergeableSums
from r3.diagnostics.metric import KONG, SCHULMAN, Chart, Metric, Watch
from r3.diagnostics.moments import Moments
from r3.errors import SHOWN, DiagnosticsError, summary

if TYPE_CHECKING:
    from typing_extensions import Self

QUANTILES = {"abs_p50": 500, "abs_p90": 900, "abs_p99": 990, "abs_p999": 999}
"""In thousandths."""
NONE = Moments()


def compare_logprobs(
    train: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, *, extreme_ratio: float = 2.0
) -> dict[str, float]:
    """Token-weighted gap between two sides' log-probabilities of the same tokens.

    `train` and `rollout` are float tensors of one shape, any shape, in nats; `mask` is bool of that shape, and only
    tokens where it is true count: leave out prompts, padding and tokens that were not sampled. The rollout's
    log-probabilities have to be those of the distribution that was sampled from. See `LogprobSums.METRICS` for the
    names, and `LogprobSums` to merge micro-batches and ranks.

    Raises `DiagnosticsError` for unequal shapes, other dtypes, and non-finite values where `mask` is true.

    >>> compare_logprobs(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5]), torch.tensor([True, True]))["abs_mean"]
    0.25
    """
    return LogprobSums.from_tensors(train, rollout, mask, extreme_ratio=extreme_ratio).metrics()


@dataclass(frozen=True, kw_only=True, eq=False)
class LogprobSums(MergeableSums):
    """Mergeable totals behind `compare_logprobs`; d is train minus rollout, in nats, and p is a probability."""

    tokens: int = 0
    extreme: int = 0
    diff_sum: float = 0.0
    k3_sum: float = 0.0
    chi2_sum: float = 0.0
    """Sum of exp(2 d) - 1."""
    diff_max: float = 0.0
    ratio_sum: float = 0.0
    """Sum of exp(d - diff_max), which does not overflow."""
    ratio_square_sum: float = 0.0
    """Sum of exp(2 (d - diff_max))."""
    abs_max: float = 0.0
    prob_abs_max: float = 0.0
    sizes: Moments = NONE
    """Of |d| and |p_train - p_rollout|."""
    probs: Moments = NONE
    """Of p_train - 1 and p_rollout - 1, which keep the digits of probabilities close to 1."""
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(2, BINS, dtype=torch.int64), repr=False)
    """int64 `[2, BINS]`: how many d below 0, and from 0 up, have their size in each bin of the histogram."""
    extreme_ratio: float = 2.0

    METRICS = (
        Metric(name="tokens", formula="N", unit="tokens"),
        Metric(name="abs_mean", formula="mean of abs(d)", unit="nats"),
        Metric(
            name="abs_std",
            formula="standard deviation of abs(d), over N and not N - 1",
            unit="nats",
            notes="0 for one token",
        ),
        Metric(name="abs_max", formula="max of abs(d)", unit="nats", notes="merges by maximum"),
        Metric(
            name="abs_{p50,p90,p99,p999}",
            formula="the abs(d) that 50, 90, 99, 99.9% of the tokens do not exceed",
            unit="nats",
            notes="see [quantiles](#quantiles)",
        ),
        Metric(
            name="k1",
            formula="mean of -d",
            unit="nats",
            notes="KL(rollout ‖ train), unbiased, may be negative",
            source=SCHULMAN,
        ),
        Metric(
            name="k3",
            formula="mean of r - 1 - d",
            unit="nats",
            notes="the same KL, unbiased, never negative, lower variance; infinite once a d reaches 710",
            source=SCHULMAN,
            chart=Chart(
                section="gap",
                title="k3 KL, live and replayed",
                unit="nats per token",
                caption="Mean of exp(d) - 1 - d over sampled tokens; d is the train less the rollout log-probability.",
                log=True,
            ),
            watch=Watch(
                name="k3", remedy="r3 explain --model --rollout on a saved rollout says what the gap comes from"
            ),
        ),
        Metric(
            name="ppl_ratio",
            formula="exp(-mean of log p_train) / exp(-mean of log p_rollout) = exp(`k1`)",
            notes="perplexity of all tokens together; above 1: train finds them less likely than the rollout did",
        ),
        Metric(
            name="chi2_token",
            formula="mean of r² - 1",
            notes="χ²(train ‖ rollout), the variance of the ratios; may be negative in a sample, down to -1; infinite "
            "once a d reaches 355",
        ),
        Metric(
            name="ess",
            formula="(sum of r)² / (N · sum of r²)",
            notes="effective sample size over N, in (0, 1]; 1 if all ratios are equal; does not overflow",
            source=KONG,
        ),
        Metric(
            name="extreme_frac",
            formula="share of tokens with r outside [1/2, 2]",
            notes="threshold: `extreme_ratio=`; the bounds themselves are inside",
            chart=Chart(
                section="gap",
                title="Extreme tokens",
                unit="share of tokens",
                caption="Tokens whose importance ratio exp(d) leaves the bounds, 1/2 to 2 unless set otherwise.",
                share=True,
                from_zero=True,
            ),
            watch=Watch(
                name="extreme_frac",
                remedy="the report's worst tokens show where; r3 explain --model --rollout says what it comes from",
            ),
        ),
        Metric(
            name="prob_abs_{mean,std,max}",
            formula="mean, standard deviation (over N) and max of abs(p_train - p_rollout)",
        ),
        Metric(
            name="prob_pearson",
            formula="Pearson's correlation of p_train and p_rollout",
            notes="NaN for one token, and where either does not vary",
        ),
    )

    @classmethod
    def from_tensors(
        cls, train: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, *, extreme_ratio: float = 2.0
    ) -> Self:
        """Totals of one batch, in float64; arguments and errors as in `compare_logprobs`.

        Waits for the device twice.
        """
        _check(train, rollout, mask, extreme_ratio)
        where = mask.flatten().nonzero()[:, 0]
        if not len(where):
            return cls.empty(extreme_ratio=extreme_ratio)
        a, b = (side.detach().flatten().index_select(0, where).double() for side in (train, rollout))
        diff = a - b
        size = diff.abs()
        largest = diff.max()
        ratio = torch.exp(diff - largest)
        # |exp(a) - exp(b)|, with the digits that the difference of two close probabilities would lose.
        apart = torch.exp(torch.maximum(a, b)) * -torch.expm1(-size)
        sums = [
            (~diff.isfinite()).sum(),
            (size > math.log(extreme_ratio)).sum(),
            diff.sum(),
            # expm1 keeps the digits that exp(d) - 1 loses at small d. It never came out below d in 65 million values on
            # a CPU, but a library whose last bit is wrong would make k3 negative.
            (torch.expm1(diff) - diff).clamp_min(0).sum(),
            torch.expm1(2 * diff).sum(),
            largest,
            ratio.sum(),
            (ratio * ratio).sum(),
            size.max(),
            apart.max(),
        ]
        moments = [Moments.of(size, apart), Moments.of(torch.expm1(a), torch.expm1(b))]
        counts = counts_of(bin_of(size) + BINS * (diff >= 0), 2 * BINS)
        found = torch.cat([torch.stack([s.double() for s in sums]), *moments, counts.double()]).cpu()
        bad, *_ = found.tolist()
        if bad:
            raise DiagnosticsError(_non_finite(train, rollout, mask))
        found[0] = len(where)
        return cls.from_tensor(found, extreme_ratio=extreme_ratio)

    @property
    def signature(self) -> dict[str, Any]:
        return {"extreme_ratio": self.extreme_ratio}

    def as_tensor(self) -> torch.Tensor:
        """The fields in their order, each of `sizes` and `probs` as five entries, and the counts; float64."""
        totals = [self.tokens, self.extreme, self.diff_sum, self.k3_sum, self.chi2_sum]
        totals += [self.diff_max, self.ratio_sum, self.ratio_square_sum, self.abs_max, self.prob_abs_max]
        totals += self.sizes.as_list() + self.probs.as_list()
        return torch.cat([torch.tensor(totals, dtype=torch.float64), self.counts.flatten().double()])

    @classmethod
    def from_tensor(cls, totals: torch.Tensor, *, extreme_ratio: float = 2.0) -> Self:
        """The inverse of `as_tensor`; the threshold is not among the totals."""
        plain, counts = totals.split([20, 2 * BINS])
        tokens, extreme, *floats = plain.tolist()
        diff_sum, k3_sum, chi2_sum, diff_max, ratio_sum, ratio_square_sum, abs_max, prob_abs_max, *moments = floats
        return cls(
            tokens=int(tokens),
            extreme=int(extreme),
            diff_sum=diff_sum,
            k3_sum=k3_sum,
            chi2_sum=chi2_sum,
            diff_max=diff_max,
            ratio_sum=ratio_sum,
            ratio_square_sum=ratio_square_sum,
            abs_max=abs_max,
            prob_abs_max=prob_abs_max,
            sizes=Moments.from_list(int(tokens), moments[:5]),
            probs=Moments.from_list(int(tokens), moments[5:]),
            counts=counts.long().view(2, BINS),
            extreme_ratio=extreme_ratio,
        )

    def with_totals(self, totals: torch.Tensor) -> Self:
        return self.from_tensor(totals, extreme_ratio=self.extreme_ratio)

    @classmethod
    def empty(cls, *, extreme_ratio: float = 2.0) -> Self:
        """The neutral element of `merge`: no tokens."""
        return cls(extreme_ratio=extreme_ratio)

    def _merged(self, other: Self) -> Self:
        if not self.tokens or not other.tokens:
            return self if self.tokens else other
        largest = max(self.diff_max, other.diff_max)
        mine, theirs = (math.exp(side.diff_max - largest) for side in (self, other))
        return type(self)(
            tokens=self.tokens + other.tokens,
            extreme=self.extreme + other.extreme,
            diff_sum=self.diff_sum + other.diff_sum,
            k3_sum=self.k3_sum + other.k3_sum,
            chi2_sum=self.chi2_sum + other.chi2_sum,
            diff_max=largest,
            ratio_sum=self.ratio_sum * mine + other.ratio_sum * theirs,
            ratio_square_sum=self.ratio_square_sum * mine**2 + other.ratio_square_sum * theirs**2,
            abs_max=max(self.abs_max, other.abs_max),
            prob_abs_max=max(self.prob_abs_max, other.prob_abs_max),
            sizes=self.sizes.merge(other.sizes),
            probs=self.probs.merge(other.probs),
            counts=self.counts + other.counts,
            extreme_ratio=self.extreme_ratio,
        )

    def metrics(self) -> dict[str, float]:
        """The gap between the two sides, by the names in `METRICS`; all but `tokens` are NaN without tokens."""
        n = self.tokens
        sizes, probs, either = self.sizes, self.probs, self.counts.sum(0)
        k1 = _over(-self.diff_sum, n)
        return {
            "tokens": float(n),
            "abs_mean": sizes.mean_x if n else math.nan,
            "abs_std": sizes.std_x,
            "abs_max": self.abs_max if n else math.nan,
            **{name: quantile(either, per_mille, self.abs_max) for name, per_mille in QUANTILES.items()},
            "k1": k1,
            "k3": _over(self.k3_sum, n),
            "ppl_ratio": exp(k1),
            "chi2_token": _over(self.chi2_sum, n),
            # Rounding may leave it a last bit above 1.
            "ess": min(1.0, self.ratio_sum / n * (self.ratio_sum / self.ratio_square_sum)) if n else math.nan,
            "extreme_frac": _over(self.extreme, n),
            "prob_abs_mean": sizes.mean_y if n else math.nan,
            "prob_abs_std": sizes.std_y,
            "prob_abs_max": self.prob_abs_max if n else math.nan,
            "prob_pearson": probs.pearson,
        }

    def histogram(self, per_octave: int = 4) -> list[tuple[float, float, int]]:
        """(lower, upper, count) of d in nats, ascending, of the bins that are not empty.

        Bins lie on both sides of 0, which has one of its own, `per_octave` (1, 2, 4, 8 or 16) to each doubling of |d|.
        """
        if per_octave not in (1, 2, 4, 8, 16):
            raise DiagnosticsError(f"per_octave: expected 1, 2, 4, 8 or 16, got {per_octave}")
        below, above = (pooled(side, per_octave, self.abs_max) for side in self.counts)
        return [(-upper, -lower, count) for lower, upper, count in reversed(below)] + above


def exp(value: float) -> float:
    """exp, infinite where the standard library's raises."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _over(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _check(train: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, extreme_ratio: float) -> None:
    problems = pair_problems(train, rollout, mask)
    if not extreme_ratio > 1:
        problems.append(f"extreme_ratio: expected more than 1, got {extreme_ratio}")
    if problems:
        raise DiagnosticsError(f"log-probabilities cannot be compared:{summary(problems)}")


def pair_problems(train: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """What is wrong with shapes, devices and dtypes of two sides and their mask."""
    problems = []
    if not train.shape == rollout.shape == mask.shape:
        shapes = f"train {list(train.shape)}, rollout {list(rollout.shape)}, mask {list(mask.shape)}"
        problems.append(f"shapes: expected three equal ones, got {shapes}; align them first, nothing is broadcast")
    if not train.device == rollout.device == mask.device:
        problems.append(f"devices: expected one, got {train.device}, {rollout.device}, {mask.device}; move them first")
    for name, tensor in (("train", train), ("rollout", rollout)):
        if not tensor.dtype.is_floating_point:
            problems.append(f"{name}: expected floating-point log-probabilities, got {tensor.dtype}")
    if mask.dtype != torch.bool:
        problems.append(f"mask: expected torch.bool, got {mask.dtype}; use mask.bool()")
    return problems


def _non_finite(train: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor) -> str:
    bad = (mask & ~(train.double() - rollout.double()).isfinite()).nonzero()
    where = [tuple(position) for position in bad[:SHOWN].tolist()]
    shown = [f"at {at}: train {train[at].item()}, rollout {rollout[at].item()}" for at in where]
    return (
        f"log-probabilities: expected finite values wherever the mask is true, got {len(bad)} of {int(mask.sum())} "
        f"tokens that are not; mask out tokens that were not sampled, or find where they became non-finite. "
        f"{'First' if len(bad) > SHOWN else 'They are'}:{summary(shown)}"
    )
