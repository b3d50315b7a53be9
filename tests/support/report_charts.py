"""Which charts a report of `run_folders.synthetic_run` has."""

from r3.report import panels

CURVES = [*panels.GAP, *panels.ROUTING, *panels.LOAD, *panels.COVERAGE, *panels.TRAINING]
TOKENS = ("Rollout against train, live", "Rollout against train, replayed", "Histogram of d")


def titles(steps, *, tokens=True):
    """Sorted titles; `tokens`: whether those of single tokens are among them."""
    if not steps:
        return []
    details = [1, *range(10, steps + 1, 10)]
    by_layer = ["Choices that differ, by layer", "Choices that differ, by layer and step"]
    return sorted(
        [
            *(shown.title for shown in CURVES),
            *by_layer[:steps],
            *(f"{what}, step {details[-1]}" for what in TOKENS if tokens),
            *(f"Load, {side}, step {step}" for step in {details[0], details[-1]} for side in ("live", "rollout")),
        ]
    )
