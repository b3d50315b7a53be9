"""The page on two runs: differences of settings and metrics, and what one of them lacks."""

import random
import re

import pytest
from html_pages import Page, assert_sound
from run_folders import SETTINGS, step_metrics, synthetic_run

from r3.diagnostics import RunFolder
from r3.errors import DiagnosticsError
from r3.report import panels, write_comparison


def page_of(*args):
    return assert_sound(write_comparison(*args).read_text(encoding="utf-8"))


def rows(page):
    found = re.findall(r'<tr><th scope="row">.*?</tr>', page.source, flags=re.DOTALL)
    return {cells[0]: cells[1:] for cells in (Page(row).texts for row in found)}


def logged(path, records, settings=None):
    folder = RunFolder(path, settings or {})
    for step, record in enumerate(records, start=1):
        folder.log(step, record)
    return folder.path


SIDED = [f"logprob_diff/{side}/{name}" for side in ("live", "replayed") for name in ("k3", "abs_mean", "extreme_frac")]
ONE_BY_ONE = [
    *SIDED,
    *(
        line.key
        for shown in (panels.ROUTING, panels.COVERAGE, panels.TRAINING)
        for each in shown
        for line in each.lines
    ),
    # The load of a live forward is the trainer's alone: the page compares rollouts.
    *(each.lines[-1].key for each in panels.LOAD),
]
OF_DETAILS = [
    "layers",
    *(f"{chart}-{run}" for chart in ("layer-map", "load") for run in "AB"),
    *(f"scatter-{run}-{side}" for run in "AB" for side in ("live", "replayed")),
    *(f"histogram-{side}" for side in ("live", "replayed")),
]

OF_B = [f"scatter-B-{side}" for side in ("live", "replayed")] + ["load-B"]


def test_a_whole_page(tmp_path):
    a = synthetic_run(tmp_path / "a", 12)
    b = synthetic_run(tmp_path / "b", 5, seed=1, worse=3, settings=SETTINGS | {"trainer.seed": 7, "more": "<b>"})
    target = write_comparison(a, b)
    assert target == b / "comparison.html"
    page = assert_sound(target.read_text())
    assert "A: a, B: b" in page.text
    assert "A: 12 steps, 1 to 12. B: 5 steps, 1 to 5" in page.text
    assert "times larger in B" in page.text
    found = rows(page)
    assert found["trainer.seed"] == ["42", "7"]
    assert found["more"] == ["(not set)", "<b>"]
    assert "generator.inference_engine.dtype" not in found
    assert page.charts == {name.replace("/", "-") for name in (*ONE_BY_ONE, *OF_DETAILS)}
    assert len(page.drawings) == len(page.charts)


def test_metrics_are_weighted_and_their_ratio_is_that_of_the_means(tmp_path):
    def steps(*pairs):
        return [{"logprob_diff/live/k3": k3, "logprob_diff/live/tokens": n, "reward/mean": k3} for k3, n in pairs]

    a, b = logged(tmp_path / "a", steps((1.0, 1), (3.0, 3))), logged(tmp_path / "b", steps((4.0, 2), (6.0, 2)))
    page = page_of(a, b, tmp_path / "deep" / "page.html")
    found = rows(page)
    assert found["logprob_diff/live/k3"] == ["1", "3", "2.5", "4", "6", "5", "2"]
    assert found["reward/mean"] == ["1", "3", "2", "4", "6", "5", "2.5"]
    assert (
        "k3 with live routing is 2.50e+00 in A and 5.00e+00 in B, mean over tokens: 2 times larger in B." in page.text
    )


def test_what_one_run_lacks(tmp_path):
    a = synthetic_run(tmp_path / "a", 3)
    b = synthetic_run(tmp_path / "b", 3, replay=False, details_every=0)
    page = page_of(a, b)
    assert "Only A has logprob_diff/replayed/k3" in page.text
    assert "B: details.jsonl: missing" in page.text
    assert rows(page)["logprob_diff/replayed/k3"][3:] == ["-", "-", "-", "-"]
    # What one run alone has is shown for that one.
    assert page.charts == {name.replace("/", "-") for name in (*ONE_BY_ONE, *OF_DETAILS) if name not in OF_B}


def test_what_neither_run_has_is_not_shown(tmp_path):
    parts = (ONE_BY_ONE[::3], ONE_BY_ONE[1::3])
    a, b = (logged(tmp_path / name, [dict.fromkeys(keys, 0.5)]) for name, keys in zip("ab", parts, strict=True))
    assert page_of(a, b).charts == {key.replace("/", "-") for keys in parts for key in keys}


def test_runs_of_one_name_are_told_apart(tmp_path):
    a, b = (logged(tmp_path / name / "run", [{"reward/mean": 1.0}]) for name in ("x", "y"))
    assert "A: x/run, B: y/run" in page_of(a, b).text


@pytest.mark.parametrize("steps", [0, 1])
def test_short_runs(tmp_path, steps):
    a, b = (synthetic_run(tmp_path / name, steps) for name in "ab")
    page = page_of(a, b)
    assert bool(page.drawings) == bool(steps)
    assert "None." in page.text


@pytest.mark.parametrize("value", [0.0, None, "text", -1.0])
def test_values_that_cannot_be_drawn(tmp_path, value):
    record = dict.fromkeys(step_metrics(1, random.Random(0), layers=4, experts=4, replay=True, steps=2), value)
    page_of(logged(tmp_path / "a", [record, record]), synthetic_run(tmp_path / "b", 2))


def test_not_a_run_folder(tmp_path):
    run = logged(tmp_path / "run", [{"reward/mean": 1.0}])
    for a, b in ((run, tmp_path / "none"), (tmp_path / "none", run), (tmp_path, run)):
        with pytest.raises(DiagnosticsError, match="expected a run folder"):
            write_comparison(a, b)
    assert not (run / "comparison.html").exists()
