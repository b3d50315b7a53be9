"""A metric that was recorded and has a chart is shown, and no other."""

from dataclasses import replace

import pytest
from html_pages import assert_sound
from report_charts import CURVES

from r3.diagnostics import RunFolder
from r3.diagnostics.metric import Chart, Metric
from r3.diagnostics.registry import GROUPS, declared
from r3.report import panels, write_comparison, write_report


def logged(path, record):
    folder = RunFolder(path, {})
    folder.log(1, record)
    return folder.path


def page_of(path):
    return assert_sound(write_report(path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("shown", CURVES, ids=lambda shown: shown.name)
def test_a_chart_is_there_if_one_of_its_metrics_was_recorded_and_no_other(tmp_path, shown):
    for line in shown.lines:
        page = page_of(logged(tmp_path / line.key.replace("/", "-"), {line.key: 0.5}))
        assert page.titles == [shown.title]


def test_a_metric_that_declares_a_chart_has_one(tmp_path, monkeypatch):
    chart = Chart(section="gap", title="Far tokens", caption="Tokens that are far.", unit="tokens a batch")
    metric = Metric(name="far", formula="their number", unit="tokens", chart=chart)
    groups = [*GROUPS, replace(GROUPS[0], name="own", metrics=(metric,))]
    monkeypatch.setattr(panels, "GAP", panels.section("gap", panels.K3, panels.SIZE_OF_D, groups=groups))
    record = {"logprob_diff/live/far": 2.0, "logprob_diff/replayed/far": 1.0, "logprob_diff/live/k3": 1e-3}
    path = logged(tmp_path / "run", record)
    page = page_of(path)
    assert page.titles == ["Far tokens", "k3 KL, live and replayed"]
    for said in ("Tokens that are far.", "tokens a batch", "live", "replayed"):
        assert said in page.texts
    both = assert_sound(write_comparison(path, path, tmp_path / "both.html").read_text(encoding="utf-8"))
    assert both.titles == ["Far tokens, live", "Far tokens, replayed", "k3 KL, live"]


def test_every_declared_chart_is_on_the_page():
    titles = {metric.chart.title for metric, _ in declared() if metric.chart}
    assert titles <= {shown.title for shown in CURVES}


def test_names_of_charts_are_their_own():
    assert len({shown.name for shown in CURVES}) == len(CURVES)
