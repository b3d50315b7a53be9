"""All declared metrics, under the names by which a run folder has them.

The tables of the docs, the charts of the report and the alarms come from here. What is not declared may be recorded all
the same: a trainer has metrics of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from r3.diagnostics.correction_sums import CorrectionSums
from r3.diagnostics.coverage import CoverageSums
from r3.diagnostics.expert_load import LoadSums
from r3.diagnostics.initial_mismatch import EngineAgreement
from r3.diagnostics.logprobs import LogprobSums
from r3.diagnostics.margins import MarginSums
from r3.diagnostics.metric import Metric, without_layer
from r3.diagnostics.rank_load import RANK_LOAD_METRICS
from r3.diagnostics.routing_agreement import RoutingSums
from r3.diagnostics.sequences import SequenceSums
from r3.diagnostics.step_metrics import STEP_METRICS

GAP = ("logprob_diff/live/", "logprob_diff/replayed/")
ROUTING = ("routing/",)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Metrics that are computed together.

    Attributes:
        name: of the group's table in the docs.
        metrics: in the order of the table.
        prefixes: of the keys in `metrics.jsonl`; none if the trainer does not record them.
        over: what all of the formulas are over, for the heading of their column.
    """

    name: str
    metrics: tuple[Metric, ...]
    prefixes: tuple[str, ...] = ()
    over: str = ""

    def keys(self, metric: Metric) -> tuple[str, ...]:
        """Those of `metrics.jsonl`, with `layer_NN` as it is declared."""
        return tuple(prefix + name for prefix in self.prefixes for name in metric.names)


GROUPS = (
    Group(name="log-probabilities", over="the N masked-in tokens", metrics=LogprobSums.METRICS, prefixes=GAP),
    Group(name="sequences", over="the sequences", metrics=SequenceSums.METRICS, prefixes=GAP),
    Group(
        name="routing",
        over="the N rows with a valid pair, and their valid pairs (N x L where rows are whole)",
        metrics=RoutingSums.METRICS,
        prefixes=ROUTING,
    ),
    Group(name="load", metrics=LoadSums.METRICS, prefixes=ROUTING),
    Group(name="rank-load", metrics=RANK_LOAD_METRICS, prefixes=ROUTING),
    Group(name="margin", metrics=MarginSums.METRICS, prefixes=ROUTING),
    Group(name="coverage", over="the rows of all rollouts", metrics=CoverageSums.METRICS, prefixes=ROUTING),
    Group(name="corrections", metrics=CorrectionSums.METRICS, prefixes=("correction/",)),
    Group(name="engine", metrics=EngineAgreement.METRICS, prefixes=("engine/",)),
    Group(name="step", metrics=STEP_METRICS, prefixes=("",)),
)


def declared(groups: Sequence[Group] = GROUPS) -> Iterator[tuple[Metric, tuple[str, ...]]]:
    """Each metric with its keys in `metrics.jsonl`."""
    for group in groups:
        for metric in group.metrics:
            yield metric, group.keys(metric)


def is_declared(key: str) -> bool:
    """Whether a recorded key is one of a declared metric."""
    return any(without_layer(key) in keys for _, keys in declared())


def metric_table(group: Group) -> str:
    """A Markdown table of a group, with the columns that one of its metrics has something for."""
    columns = {
        "key": [", ".join(f"`{name}`" for name in metric.names) for metric in group.metrics],
        f"formula over {group.over}" if group.over else "formula": [metric.formula for metric in group.metrics],
        "unit": [metric.unit for metric in group.metrics],
        "notes": [metric.notes for metric in group.metrics],
        "source": [metric.source for metric in group.metrics],
    }
    columns = {heading: cells for heading, cells in columns.items() if any(cells)}
    rows = [_row(columns), "|---" * len(columns) + "|", *map(_row, zip(*columns.values(), strict=True))]
    return "\n".join(rows)


def _row(cells: Iterable[str]) -> str:
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return "".join(f"| {cell} " if cell else "| " for cell in escaped) + "|"
