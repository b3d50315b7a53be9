"""Where two captures of the same tokens chose different experts, and whether the router's own margin explains it.

An engine repeats itself only for the same batch: another chunking, batch or cache hit changes the order of bf16 sums,
and an expert near the top-k boundary may fall on its other side. Such a flip is explained: the experts that differ lie
within rounding of the k-th logit. A wrong row (shifted, copied, of another token) differs by far more. What follows a
flip at the same token, in later layers, sees another hidden state: its margin may be larger and is kept apart.

S tokens, L decoder layers, K slots, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from r3.replay import find_routers
from r3.routing import RolloutRouting

# Margins, in bf16 ulps of a row's largest logit, that rounding explains on the demo's model. Measured over six
# conversations: up to 6.5 for first flips and 20 for those that follow one; a wrong row has 140 in the median.
FIRST_ULPS, FOLLOWING_ULPS = 16, 64


@dataclass(frozen=True, kw_only=True)
class FlipReport:
    """Counts of (token, layer) pairs, and margins in ulps: bf16 spacing at the row's largest absolute logit.

    The margin of a flip is the largest distance from the k-th logit among the experts that one side chose alone.

    Attributes:
        pairs: compared, that is, of tokens valid on both sides.
        unmatched_tokens: valid on one side only.
        first: flips with no flip of the same token in an earlier layer.
        following: the other flips.
        first_margin_ulps: largest margin of the first flips; 0 without any.
        following_margin_ulps: largest margin of the following flips; 0 without any.
        by_layer: flips of each of the L columns.
        worst: (position, column, margin in ulps) of the first flips with the largest margins, at most 8.
    """

    pairs: int
    unmatched_tokens: int
    first: int
    following: int
    first_margin_ulps: float
    following_margin_ulps: float
    by_layer: tuple[int, ...]
    worst: tuple[tuple[int, int, float], ...]

    @property
    def flips(self) -> int:
        return self.first + self.following

    @property
    def share(self) -> float:
        """Flips a pair."""
        return self.flips / self.pairs

    def __str__(self) -> str:
        return (
            f"{self.flips} of {self.pairs} (token, layer) pairs flipped ({100 * self.share:.3f}%): {self.first} first, "
            f"margin up to {self.first_margin_ulps:.1f} bf16 ulps; {self.following} following, up to "
            f"{self.following_margin_ulps:.1f}; by layer {self.by_layer}; {self.unmatched_tokens} tokens valid on one "
            f"side only; worst {self.worst}"
        )


def explained_flips(found: RolloutRouting, expected: RolloutRouting, logits: Tensor) -> FlipReport:
    """Compare two captures of the same tokens, both `[1, S, L, K]`; the order of slots is ignored.

    Args:
        found: the capture in question.
        expected: the capture that it should equal.
        logits: float `[S, L, E]`, the routers' logits with `expected` replayed (`router_logits`).
    """
    assert found.shape == expected.shape == (1, *logits.shape[:2], found.shape[3]), (found, expected, logits.shape)
    both = (found.valid & expected.valid)[0]
    sets = [
        torch.zeros(logits.shape, dtype=torch.bool).scatter_(-1, side.expert_ids[0].long(), True)
        for side in (found, expected)
    ]
    alone = (sets[0] ^ sets[1]) & both[:, None, None]
    flipped = alone.any(-1)
    first = flipped & (flipped.cumsum(-1) == 1)
    kth = logits.topk(found.shape[3]).values[..., -1:]
    ulp = torch.exp2(logits.abs().amax(-1).log2().floor() - 7)
    margin = ((logits - kth).abs() * alone).amax(-1) / ulp
    where = sorted(first.nonzero().tolist(), key=lambda at: -margin[tuple(at)])
    return FlipReport(
        pairs=int(both.sum()) * logits.shape[1],
        unmatched_tokens=int((found.valid ^ expected.valid).sum()),
        first=int(first.sum()),
        following=int((flipped & ~first).sum()),
        first_margin_ulps=float((margin * first).max()),
        following_margin_ulps=float((margin * (flipped & ~first)).max()),
        by_layer=tuple(flipped.sum(0).tolist()),
        worst=tuple((t, c, round(float(margin[t, c]), 1)) for t, c in where[:8]),
    )


def assert_explained(report: FlipReport) -> None:
    """All rows are there, few differ, and rounding explains those that do."""
    assert report.unmatched_tokens == 0, report
    assert report.share < 0.02, report
    assert report.first_margin_ulps < FIRST_ULPS, report
    assert report.following_margin_ulps < FOLLOWING_ULPS, report


def router_logits(model: nn.Module, input_ids: list[int], routing: RolloutRouting) -> Tensor:
    """float32 `[S, L, E]`: logits of the routers of `model`, which has replay attached, with `routing` replayed.

    For routers that return a tuple with the logits first, as those of Qwen3-MoE.
    """
    logits: list[Tensor] = []
    handles = [
        site.router.register_forward_hook(lambda module, args, output: logits.append(output[0].detach().float()))
        for site in find_routers(model).sites
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([input_ids]), routed_experts=routing, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(logits, dim=1)
