"""Declared metrics are those that the sums return, and nothing is declared twice."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from r3.config import AlarmsConfig
from r3.diagnostics import (
    CorrectionSums,
    CoverageSums,
    EngineAgreement,
    LoadSums,
    LogprobSums,
    MarginSums,
    MergeableSums,
    RoutingSums,
    SequenceSums,
    geometric_mask,
    icepop,
    masked_importance,
    truncated_importance,
)
from r3.diagnostics.alarms import watched
from r3.diagnostics.metric import Chart, Metric, Watch, without_layer
from r3.diagnostics.registry import GROUPS, Group, declared, is_declared, metric_table

TRAIN = torch.tensor([[-1.0, -2.0, -0.5], [-0.1, -3.0, -1.5]])
ROLLOUT = TRAIN + torch.tensor([[0.1, -0.9, 0.0], [0.0, 0.2, 0.01]])
MASK = torch.ones_like(TRAIN, dtype=torch.bool)
LIVE = torch.tensor([[[0, 1], [2, 3]], [[1, 0], [2, 5]]])
THEIRS = torch.tensor([[[0, 1], [2, 4]], [[0, 1], [2, 5]]])
VALID = torch.tensor([True, True])
ROUTED = (LIVE, THEIRS, VALID)
COMPARED = (TRAIN, ROLLOUT, MASK)

MADE = {
    LogprobSums: [LogprobSums.from_tensors(*COMPARED)],
    SequenceSums: [SequenceSums.from_totals((TRAIN - ROLLOUT).sum(1), MASK.sum(1))],
    RoutingSums: [RoutingSums.from_tensors(*ROUTED, layer_ids=[3, 117])],
    LoadSums: [LoadSums.from_tensors(*ROUTED, num_experts=6, layer_ids=[0, 1])],
    MarginSums: [MarginSums.from_tensors(torch.rand(2, 2), *ROUTED)],
    CoverageSums: [CoverageSums.from_tensors(MASK, MASK, None, 1)],
    # Which names it has depends on the kind of correction.
    CorrectionSums: [
        masked_importance(*COMPARED).sums,
        icepop(*COMPARED).sums,
        truncated_importance(*COMPARED, level="sequence").sums,
        geometric_mask(*COMPARED).sums,
    ],
}
AGREEMENT = EngineAgreement(
    family="x", tokens=6, k3_live=0.1, k3_replayed=0.1, differing_rows=0.1, repeat_nats=0.1
).metrics()


def kinds_of_sums(parent: type = MergeableSums) -> Iterator[type]:
    for kind in parent.__subclasses__():
        if kind.__module__.startswith("r3."):
            yield kind
        yield from kinds_of_sums(kind)


def names(metrics) -> list[str]:
    return sorted(name for metric in metrics for name in metric.names)


@pytest.mark.parametrize("kind", kinds_of_sums(), ids=lambda kind: kind.__name__)
def test_sums_return_what_they_declare(kind):
    """Also without data: `MADE` needs an example of each class."""
    made = MADE[kind]
    for sums in (*made, *(each.with_totals(torch.zeros_like(each.as_tensor())) for each in made)):
        assert {without_layer(name) for name in sums.metrics()} <= set(names(kind.METRICS))
    assert sorted({without_layer(name) for sums in made for name in sums.metrics()}) == names(kind.METRICS)


def test_what_the_engine_is_compared_by_is_declared():
    assert sorted(AGREEMENT) == [f"engine/{name}" for name in names(EngineAgreement.METRICS)]
    assert all(is_declared(key) for key in AGREEMENT)


def test_every_class_of_sums_is_in_the_registry():
    collected = [group.metrics for group in GROUPS]
    assert [kind for kind in kinds_of_sums() if kind.METRICS not in collected] == []
    assert len({group.name for group in GROUPS}) == len(GROUPS)


def test_no_key_has_two_meanings():
    keys = Counter(key for _, keys in declared() for key in keys)
    assert [key for key, count in keys.items() if count > 1] == []


@pytest.mark.parametrize(("metric", "keys"), declared(), ids=lambda value: getattr(value, "name", ""))
def test_a_metric_says_what_it_is(metric, keys):
    assert metric.formula
    assert len(metric.formula) == len(metric.formula.strip())
    assert not metric.formula.endswith(".")
    assert metric.chart is None or metric.chart.caption.endswith(".")
    assert all(re.fullmatch(r"[a-z][\w/]*", name) for name in metric.names)
    if "layer_NN" in metric.name or not keys:
        assert metric.chart is metric.watch is None, "nothing is drawn or watched by this name"


def test_alarms_have_bounds_in_the_settings_that_stop_on_the_side_that_is_worse():
    found = {watch.name: watch.worse == "lower" for watch, _ in watched()}
    assert found == {name: AlarmsConfig.lower_is_worse(name) for name in AlarmsConfig.names()}


def test_of_two_sides_the_alarm_takes_replayed():
    metric = Metric(name="far", formula="", watch=Watch(name="far", remedy="come closer"))
    ((watch, keys),) = watched([replace(GROUPS[0], metrics=(metric,))])
    assert watch is metric.watch
    assert keys == ("logprob_diff/replayed/far", "logprob_diff/live/far")


def test_keys_by_layer_are_declared_once_for_all():
    assert is_declared("routing/differing_rows/layer_07")
    assert is_declared("routing/differing_rows/layer_117")
    assert not is_declared("routing/differing_rows/layer_7")
    assert not is_declared("routing/jaccard/layer_07")
    assert not is_declared("my/own")


def test_a_name_in_braces_stands_for_several():
    assert Metric(name="a_{b,c}/{d,e}_f", formula="").names == ("a_b/d_f", "a_b/e_f", "a_c/d_f", "a_c/e_f")
    assert Metric(name="a", formula="").names == ("a",)


def test_a_table_has_the_columns_that_are_needed():
    chart = Chart(section="gap", title="t", caption="c.")
    metrics = (Metric(name="a", formula="p(x|y)", chart=chart), Metric(name="b_{c,d}", formula="mean", notes="n"))
    assert metric_table(Group(name="g", over="tokens", metrics=metrics)).splitlines() == [
        "| key | formula over tokens | unit | notes |",
        "|---|---|---|---|",
        r"| `a` | p(x\|y) | 1 | |",
        "| `b_c`, `b_d` | mean | 1 | n |",
    ]
