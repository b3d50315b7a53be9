"""What the records of a run say, in a few sentences with numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from r3.report.cells import layer_shares, number, percent, scientific
from r3.report.series import Records, known, mean, recorded, thirds, total, values, weighted_mean

SAME = 1.1
"""Two gaps within this factor are called the same."""

SIDES = ("live", "replayed")


def diff_key(side: str, name: str) -> str:
    return f"logprob_diff/{side}/{name}"


def extreme_ratio(settings: Mapping[str, Any]) -> float:
    """The ratio beyond which the run called a token extreme."""
    found = number(settings, "trainer.diagnostics.extreme_ratio")
    return found if found > 1 else 2.0


def paired(records: Records, name: str) -> list[tuple[float, float]]:
    """(live, replayed) of the steps that have both."""
    both = zip(*(values(records, diff_key(side, name)) for side in SIDES), strict=True)
    return [(live, replayed) for live, replayed in both if not math.isnan(live + replayed)]


def times(above: float, below: float, *, more: str = "larger", less: str = "smaller") -> str:
    """How `below` compares with `above`, such as "6.3 times smaller"; the two are not negative."""
    if above == below or (min(above, below) > 0 and max(above, below) / min(above, below) < SAME):
        return "the same within 10%"
    if not above or not below:
        return less if above else more
    ratio = above / below
    return f"{ratio:.2g} times {less}" if ratio > 1 else f"{1 / ratio:.2g} times {more}"


def in_words(records: Records, settings: Mapping[str, Any]) -> list[str]:
    """A few sentences on the gap, what replay does to it, the routing, the reward and the time."""
    found = (_gap(records, settings), _replay(records), _trend(records), _routing(records), _coverage(records))
    return [sentence for sentence in (*found, _reward(records), _time(records)) if sentence]


def _gap(records: Records, settings: Mapping[str, Any]) -> str:
    side = next((side for side in SIDES if recorded(records, diff_key(side, "k3"))), None)
    if side is None:
        return ""
    k3, over = weighted_mean(records, diff_key(side, "k3"))
    tokens = total(known(records, diff_key(side, "tokens")))
    parts = [
        f"The gap with {side} routing: k3 is {scientific(k3)} nats per token, mean over "
        f"{f'{tokens:,.0f} tokens' if over == 'tokens' else 'the steps'}"
    ]
    if recorded(records, diff_key(side, "abs_mean")):
        parts.append(f"|d| is {weighted_mean(records, diff_key(side, 'abs_mean'))[0]:.2g} on average")
    if largest := known(records, diff_key(side, "abs_max")):
        parts.append(f"{max(largest):.2g} at most")
    if recorded(records, diff_key(side, "extreme_frac")):
        share, ratio = weighted_mean(records, diff_key(side, "extreme_frac"))[0], extreme_ratio(settings)
        parts.append(f"{share_text(share)} of tokens with an importance ratio outside [1/{ratio:g}, {ratio:g}]")
    return ", ".join(parts) + "."


def _replay(records: Records) -> str:
    both = paired(records, "k3")
    if not both:
        return ""
    have = [r for r in records if all(not math.isnan(number(r, diff_key(side, "k3"))) for side in SIDES)]
    live, replayed = (weighted_mean(have, diff_key(side, "k3"))[0] for side in SIDES)
    smaller = sum(b < a for a, b in both)
    sentence = f"With the rollout's routing replayed, k3 is {scientific(replayed)}: {times(live, replayed)} than live"
    sentence = sentence.replace("10% than live", "10% as live")
    return f"{sentence}, and smaller in {smaller} of the {len(both)} steps that have both."


def _trend(records: Records) -> str:
    found = {side: thirds(records, diff_key(side, "k3")) for side in SIDES}
    parts = [
        f"{side} k3 {scientific(first)} to {scientific(last)} ({times(first, last)})"
        for side, (first, last) in found.items()
        if not math.isnan(first + last)
    ]
    return f"From the first to the last third of the steps: {', '.join(parts)}." if parts else ""


def _routing(records: Records) -> str:
    if not recorded(records, "routing/differing_rows"):
        return ""
    sentence = (
        f"{percent(weighted_mean(records, 'routing/differing_rows')[0])} of all choices, one for each token and layer, "
        f"differ between live and rollout"
    )
    if layers := layer_means(records):
        least, most = min(layers, key=layers.__getitem__), max(layers, key=layers.__getitem__)
        sentence += f", from {percent(layers[least])} in layer {least} to {percent(layers[most])} in layer {most}"
    if recorded(records, "routing/differing_tokens"):
        share = weighted_mean(records, "routing/differing_tokens")[0]
        sentence += f"; {percent_down(share)} of tokens differ in at least one layer"
    return f"{sentence}."


def _coverage(records: Records) -> str:
    parts = []
    if found := known(records, "routing/coverage"):
        parts.append(
            f"Routing was captured for {percent_down(mean(found))} of the rows, {percent_down(min(found))} at the least"
        )
    if lag := known(records, "routing/version_lag_max"):
        parts.append(f"the oldest rollout was {max(lag):.0f} weight version{'s' * (max(lag) != 1)} behind")
    sentence = "; ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}." if sentence else ""


def _reward(records: Records) -> str:
    found = known(records, "reward/mean")
    if not found:
        return ""
    size = max(1, len(found) // 3)
    if len(found) == 1:
        return f"The reward is {found[0]:.3f}."
    span = "third of the steps" if size > 1 else "step"
    return (
        f"The reward goes from {mean(found[:size]):.3f} in the first {span} to {mean(found[-size:]):.3f} in the last."
    )


def _time(records: Records) -> str:
    parts = [
        f"{name} {mean(found):.3g} s"
        for name in ("rollout", "measure", "train", "sync")
        if (found := known(records, f"time/{name}_s"))
    ]
    return f"A step takes, on average: {', '.join(parts)}." if parts else ""


def layer_means(records: Records) -> dict[int, float]:
    """Share of differing rows by layer, mean over the steps that have it."""
    found: dict[int, list[float]] = {}
    for record in records:
        for layer, share in layer_shares(record).items():
            found.setdefault(layer, []).append(share)
    return {layer: mean(shares) for layer, shares in sorted(found.items())}


def percent_down(share: float) -> str:
    """A share as a percentage that is never rounded up to all: 99.96% is not 100%."""
    return "100%" if share == 1 else f"{min(share, 0.9999):.2%}" if 0.99 <= share < 1 else percent(share)


def share_text(share: float) -> str:
    """A small share, as a percentage with two digits that count."""
    return "none" if share == 0 else f"{share:.2%}" if share >= 1e-3 else f"{100 * share:.2g}%"
