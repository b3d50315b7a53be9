"""How evenly rows are spread over the ranks of expert parallelism, each of which has a part of every layer's experts.

The others wait for the rank that has most, in every layer. Replay takes the choice from the router: where a rollout's
rows went to the experts of one rank, this rank has them in training too.
"""

from __future__ import annotations

from r3.diagnostics.expert_load import SIDES, LoadSums
from r3.diagnostics.metric import Chart, Metric
from r3.errors import DiagnosticsError

RANK_LOAD_METRICS = (
    Metric(
        name="rank_load_max/{live,rollout}",
        formula="max over layers of (largest load of a rank) / (mean load of the ranks)",
        notes="with expert parallelism; 1 if even, its number of ranks at most; over all rows of the step",
        chart=Chart(
            section="load",
            title="Most loaded rank",
            unit="times the mean load",
            caption="Load of the rank whose experts get most, over the mean of its layer; the largest of all layers.",
        ),
    ),
    Metric(name="rank_load/{live,rollout}/layer_NN", formula="the same in decoder layer NN, at least two digits"),
)


def rank_load_metrics(load: LoadSums, expert_parallel_size: int) -> dict[str, float]:
    """Largest over mean load of the ranks that share the experts, by the names in `RANK_LOAD_METRICS`.

    Rank r has the experts from r E / P to (r + 1) E / P, as transformers places them. NaN when there are no rows.

    Args:
        load: counts by layer and expert, live and in the rollout: what live and replayed forwards send to the experts.
        expert_parallel_size: P, ranks that together have all experts.

    Raises:
        DiagnosticsError: P does not divide the experts.
    """
    experts = load.counts.shape[-1]
    if expert_parallel_size < 1 or experts % expert_parallel_size:
        raise DiagnosticsError(
            f"expert_parallel_size: expected a divisor of {experts} experts, got {expert_parallel_size}"
        )
    ranks = load.counts.unflatten(-1, (expert_parallel_size, -1)).sum(-1).double()  # [2, L, P]
    most = ranks.amax(-1) / ranks.mean(-1)
    found = {f"rank_load_max/{side}": float(layers.max()) for side, layers in zip(SIDES, most, strict=True)}
    for side, layers in zip(SIDES, most.tolist(), strict=True):
        found |= {f"rank_load/{side}/layer_{n:02d}": v for n, v in zip(load.layer_ids, layers, strict=True)}
    return found
