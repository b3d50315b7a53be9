"""The report of a run: what it says, that it says it safely, and what it does where records are missing or broken."""

import json
import math
import random
import re

import pytest
import torch
from html_pages import Page, assert_sound
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_charts import titles
from run_folders import SETTINGS, details, step_metrics, synthetic_run

from r3.diagnostics import LogprobSums, RunFolder, TokenDetails
from r3.errors import DiagnosticsError
from r3.report import write_figure, write_report
from r3.report.run_report import MOST_ROWS
from r3.report.series import MOST_POINTS, series
from r3.report.token_charts import outline


def logged(path, records, detail=None, run_settings=None):
    folder = RunFolder(path, SETTINGS if run_settings is None else run_settings)
    for step, record in enumerate(records, start=1):
        folder.log(step, record)
    if detail is not None:
        folder.log_details(len(records), detail)
    return folder.path


def page_of(path):
    return assert_sound(write_report(path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("steps", [0, 1, 2, 12])
def test_page_is_self_contained_and_whole(tmp_path, steps):
    page = page_of(synthetic_run(tmp_path / "run", steps))
    assert page.titles == titles(steps)
    assert len(page.drawings) == len(page.titles)
    assert "Content-Security-Policy" in page.source
    assert ("No steps are recorded yet" in page.text) == (steps == 0)
    assert "Not recorded" not in page.text


def test_key_figures_and_words(tmp_path):
    def metrics(step, record):
        sides = {"live": 6e-4, "replayed": 1e-4}
        return (
            record
            | {"reward/mean": 0.1 * step}
            | {f"logprob_diff/{s}/k3": k * step for s, k in sides.items()}
            | {f"logprob_diff/{s}/tokens": 100 for s in sides}
        )

    text = page_of(synthetic_run(tmp_path / "run", 6, metrics=metrics)).text
    assert "2.10e-03 k3 live, mean over tokens" in text
    assert "3.50e-04 k3 replayed, mean over tokens" in text
    assert "6.00 k3 live / replayed" in text
    assert "0.150 → 0.550 reward, first and last 2 steps" in text
    assert "6 steps, 1 to 6" in text
    assert "k3 is 3.50e-04: 6 times smaller than live, and smaller in 6 of the 6 steps" in text
    assert "live k3 9.00e-04 to 3.30e-03 (3.7 times larger)" in text
    assert "mean over 600 tokens" in text


def test_means_are_weighted_by_tokens_where_they_are_known(tmp_path):
    counted = [{"logprob_diff/live/k3": k3, "logprob_diff/live/tokens": n} for k3, n in ((1.0, 1), (2.0, 3))]
    assert "1.75e+00 k3 live, mean over tokens" in page_of(logged(tmp_path / "a", counted)).text
    plain = [{"logprob_diff/live/k3": 1.0}, {"logprob_diff/live/k3": 2.0, "logprob_diff/live/tokens": 3}]
    assert "1.50e+00 k3 live, mean over steps" in page_of(logged(tmp_path / "b", plain)).text


def test_ratio_is_over_steps_that_have_both(tmp_path):
    records = [{"logprob_diff/live/k3": 10.0**step} for step in (1, 2, 3)]
    records[0]["logprob_diff/replayed/k3"] = 5.0
    assert "2.00 k3 live / replayed" in page_of(logged(tmp_path / "run", records)).text


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        (("logprob_diff/live/",), ["logprob_diff/live/k3"]),
        (("logprob_diff/replayed/",), ["logprob_diff/replayed/k3"]),
        (
            ("reward/", "routing/coverage", "sync/", "time/"),
            ["reward/mean", "routing/coverage", "sync/seconds", "time/train_s"],
        ),
        (("routing/",), ["routing/differing_rows/layer_NN"]),
        (("",), ["routing/load_shift"]),
    ],
)
def test_what_is_not_recorded_is_named_once_and_the_rest_is_shown(tmp_path, lost, named):
    def metrics(step, record):
        return {key: value for key, value in record.items() if not key.startswith(lost)}

    path = synthetic_run(tmp_path / "run", 2, metrics=metrics)
    page = page_of(path)
    assert page.text.count("Not recorded:") == 1
    # Once as a word of its own: among the metrics' rows it is not.
    assert [page.texts.count(name) for name in named] == [1] * len(named)
    assert "2 steps, 1 to 2" in page.text
    assert len(page.drawings) >= 5
    assert write_figure(path, tmp_path / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_no_details(tmp_path):
    page = page_of(synthetic_run(tmp_path / "run", 2, details_every=0, settings={}))
    for name in ("tokens (details)", "histogram (details)", "load (details)"):
        assert page.texts.count(name) == 1
    assert "worst tokens" not in page.text
    assert "Settings" not in page.text


@pytest.mark.parametrize("value", [0.0, None, math.nan, "text", True, -1.0, 1e300, 1.7e308, 10**400, 5e-324])
def test_values_that_cannot_be_drawn(tmp_path, value):
    record = dict.fromkeys(step_metrics(1, random.Random(0), layers=4, experts=4, replay=True, steps=2), value)
    path = logged(tmp_path / "run", [record, record])
    page_of(path)
    if value != 10**400:
        write_figure(path, tmp_path / "figure.png")


# What a model, or somebody else, wrote


HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><script>alert('&')</script>"


def test_text_stays_text(tmp_path):
    detail = details(random.Random(0), layers=4, experts=4, replay=True)
    for entry in detail["worst"]:
        entry |= {"token": HOSTILE, "before": f"{HOSTILE}\n\u202e\x00", "after": "\ud800</table></section></bdi>"}
    hostile = {HOSTILE: {HOSTILE: HOSTILE}, "list": [HOSTILE], "</td>": "</style><b>"}
    record = {HOSTILE: 1.0, "reward/mean": 0.5, "note": HOSTILE}
    path = logged(tmp_path / "a<b>&c<h1><script>", [record, record], detail, hostile)
    page = page_of(path)
    assert page.source.count("<h1>a&lt;b&gt;&amp;c&lt;h1&gt;&lt;script&gt;</h1>") == 1
    assert sum(HOSTILE in text for text in page.texts) >= 2 * 16
    # Shown as escapes, for neither hides nor turns what stands around it.
    assert not set("\u202e\x00") & set(page.source)
    assert "\\u202e\\u0000" in page.source
    assert "↵" in page.text


def test_every_letter_survives(tmp_path):
    detail = details(random.Random(0), layers=4, experts=4, replay=True)
    detail["worst"][0]["token"] = "naïve 中文 и 🙂 $x_1$ %s {0} \\"
    assert detail["worst"][0]["token"] in page_of(logged(tmp_path / "run", [{"reward/mean": 1}], detail)).texts


def test_worst_tokens_have_their_probabilities_and_layers(tmp_path):
    detail = details(random.Random(0), layers=40, experts=4, replay=True)
    first = {"sample": 3, "position": 14, "token": "tok", "before": "left ", "after": " right", "token_id": 5}
    detail["worst"] = [
        first | {"live": math.log(0.5), "replayed": math.log(0.2), "rollout": math.log(0.1), "layers": list(range(30))},
        first | {"live": math.log(0.5), "replayed": None, "rollout": math.log(0.1), "layers": []},
        first | {"live": math.log(0.5), "replayed": None, "rollout": math.log(0.1), "layers": None},
    ]
    page = page_of(logged(tmp_path / "run", [{"reward/mean": 1}], detail))
    rows = [" ".join(Page(row).text.split()) for row in re.findall(r"<tr><th.*?</tr>", page.source, flags=re.DOTALL)]
    layers = ", ".join(map(str, range(12)))
    assert f"3, 14 left tok right 0.1 0.5 0.2 +1.609 +0.693 {layers} and 18 more" in rows
    assert "3, 14 left tok right 0.1 0.5 - +1.609 - none" in rows
    assert "3, 14 left tok right 0.1 0.5 - +1.609 - ?" in rows


# Broken folders


def test_no_run_folder_is_an_error(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DiagnosticsError, match="expected a run folder"):
            write_report(path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_broken_is_named_and_the_rest_is_shown(tmp_path):
    path = synthetic_run(tmp_path / "run", 30)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[4], lines[7] = lines[4][:80], "[1, 2]"
    (path / "metrics.jsonl").write_text("\n".join(lines)[:-900])
    (path / "settings.json").write_text('{"a": ')
    (path / "details.jsonl").write_text((path / "details.jsonl").read_text()[:-5000])
    page = page_of(path)
    for problem in (
        "settings.json: no JSON",
        "line 5: no JSON",
        "line 8: expected a JSON object",
        "line 30: incomplete",
    ):
        assert problem in page.text
    assert "details.jsonl, line 4: incomplete" in page.text
    assert "27 steps, 1 to 29" in page.text
    assert page.titles == titles(29)


@pytest.mark.parametrize("lost", ["metrics.jsonl", "details.jsonl", "settings.json"])
def test_a_file_less(tmp_path, lost):
    path = synthetic_run(tmp_path / "run", 2)
    (path / lost).unlink()
    assert f"{lost}: missing" in page_of(path).text


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | st.just([]) | st.just({}),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "live", "rollout"]), inner, max_size=3)
    ),
    max_leaves=6,
)
PLACES = st.lists(
    st.sampled_from(["tokens", "worst", "histogram", "load", "live", "rollout", "layers", "layer_ids", 0, 1, 2]),
    max_size=4,
)


def has(inner, key):
    if isinstance(inner, list):
        return isinstance(key, int) and key < len(inner)
    return isinstance(inner, dict) and key in inner


@given(changes=st.lists(st.tuples(PLACES, JSON), min_size=1, max_size=6))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_details_of_any_form_never_break_the_page(tmp_path_factory, changes):
    detail = details(random.Random(0), layers=2, experts=3, replay=True)
    detail["tokens"] = {side: values[:20] for side, values in detail["tokens"].items()}
    detail["step"] = 1
    for place, value in changes:
        inner = detail
        for key in place[:-1]:
            inner = inner[key] if has(inner, key) else inner
        if place and (isinstance(inner, dict) or has(inner, place[-1])):
            inner[place[-1]] = value
    path = logged(tmp_path_factory.mktemp("run") / "run", [{"reward/mean": 0.5}])
    (path / "details.jsonl").write_text(json.dumps({str(key): value for key, value in detail.items()}) + "\n")
    page_of(path)


@given(
    record=st.dictionaries(
        st.sampled_from(sorted(step_metrics(1, random.Random(0), layers=2, experts=2, replay=True, steps=2))),
        st.none() | st.floats() | st.text(max_size=3) | st.integers(),
    )
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_metrics_of_any_form_never_break_the_page(tmp_path_factory, record):
    path = logged(tmp_path_factory.mktemp("run") / "run", [record, {}, record])
    page_of(path)


@pytest.fixture(scope="module")
def whole_details(tmp_path_factory):
    """Details with nothing wrong, and the source of their page."""
    whole = details(random.Random(0), layers=2, experts=3, replay=True)
    return whole, page_of(logged(tmp_path_factory.mktemp("whole") / "run", [{"reward/mean": 0.5}], whole)).source


@pytest.mark.parametrize(
    ("piece", "lost", "named"),
    [
        ({"tokens": {"live": [-1.0], "replayed": [-1.0, -2.0], "rollout": [-1.0, -2.0]}}, "train, live", None),
        (
            {"tokens": {"live": [-1.0], "replayed": None, "rollout": [-1.0, -2.0]}},
            "Rollout against",
            "tokens (details)",
        ),
        ({"tokens": {"live": ["x", None], "rollout": [-1.0, -2.0]}}, "Rollout against", "tokens (details)"),
        ({"histogram": {"live": [[1, 0, 5]], "replayed": [[0, 1]]}}, "Histogram", "histogram (details)"),
        ({"histogram": [[0, 1, 5]]}, "Histogram", "histogram (details)"),
        (
            {"load": {"layer_ids": [0, 1], "live": [[1, 2], [3]], "rollout": [[1, 2], [3, 4]]}},
            "Load, ",
            "load (details)",
        ),
        (
            {"load": {"layer_ids": [0], "live": [[1, 2], [3, 4]], "rollout": [[1, 2], [3, 4]]}},
            "Load, ",
            "load (details)",
        ),
        ({"load": {"layer_ids": [0], "live": [[1, -2]], "rollout": [[1, 2]]}}, "Load, ", "load (details)"),
        ({"worst": [{"token": "x", "rollout": -1.0}, {"live": -1.0}, 5, None]}, "The worst tokens", None),
        ({"worst": "none"}, "The worst tokens", None),
    ],
)
def test_a_piece_of_another_form_is_not_shown_and_the_others_are(tmp_path, whole_details, piece, lost, named):
    whole, source = whole_details
    title = re.compile(f"<h[23][^>]*>[^<]*{lost}")
    assert title.search(source)
    page = page_of(logged(tmp_path / "run", [{"reward/mean": 0.5}], whole | piece))
    assert not title.search(page.source)
    assert named is None or page.texts.count(named) == 1
    assert len(page.drawings) >= 4


def test_a_section_that_fails_is_named_and_the_rest_is_shown(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("<why>")

    monkeypatch.setattr("r3.report.run_report.token_panels", fail)
    page = Page(write_report(synthetic_run(tmp_path / "run", 2)).read_text())
    assert "Single tokens could not be made: KeyError: '<why>'" in page.text
    assert page.titles == titles(2, tokens=False)


# Long runs


def test_a_long_run_stays_small_and_keeps_its_extremes(tmp_path):
    def metrics(step, record):
        return record | ({"logprob_diff/replayed/k3": 0.5} if step == 777 else {})

    path = synthetic_run(tmp_path / "run", 1000, layers=8, experts=16, details_every=500, metrics=metrics)
    page = page_of(path)
    assert len(page.source) < 1_100_000
    assert f"{MOST_ROWS} of 1000 steps, evenly spread" in page.text
    assert "A point stands for 4 steps" in page.text
    shown = [int(row) for row in re.findall(r'<tr><th scope="row">(\d+)</th>', page.source)]
    assert len(shown) == MOST_ROWS
    assert (shown[0], shown[-1]) == (1, 1000)


def test_bins_of_steps_keep_mean_and_range():
    records = [{"step": step, "m": float(step % 7)} for step in range(1, 2 * MOST_POINTS + 2)]
    found = series(records, "m")
    assert found.width == 3
    assert len(found.steps) <= MOST_POINTS
    assert found.steps[0] == 2.0
    assert (found.low[0], found.middle[0], found.high[0]) == (1.0, 2.0, 3.0)
    assert max(found.high) == 6.0
    assert series(records, "m", largest=True).middle[0] == 3.0


def test_steps_that_were_not_measured_do_not_break_the_lines(tmp_path):
    """With `trainer.diagnostics.every` = 5 and 100 steps: too many for markers, and nothing between two of them."""

    def metrics(step, record):
        return {key: value for key, value in record.items() if step % 5 == 1 or not key.startswith("logprob_diff/")}

    page = page_of(synthetic_run(tmp_path / "run", 100, details_every=0, layers=4, experts=4, metrics=metrics))
    curves = [
        re.search(r'\sd="([^"]*)"', line)[1]
        for line in re.findall(r"<g id=\"k3-line2d_\d+\">\s*<path[^>]*>", page.drawings[0])
    ]
    assert max(curve.count("L") for curve in curves) == 19
    records = [{"step": step} | ({"m": 1.0} if step % 5 == 1 else {}) for step in range(1, 101)]
    assert series(records, "m").steps == [float(step) for step in range(1, 101, 5)]


# The rest


def test_an_outline_counts_every_token():
    bins = [
        (-0.5, -0.4, 3),
        (-2e-5, -1e-5, 5),
        (0.0, 0.0, 7),
        (1e-5, 2e-5, 2),
        (9e-5, 2e-4, 1),
        (0.1, 0.2, 4),
        (0.2, 0.3, 6),
    ]
    edges, counts = outline(bins, 1e-4)
    assert sum(counts) == 28
    assert edges == sorted(edges)
    assert len(edges) == len(counts) + 1
    assert counts[edges.index(-1e-4)] == 14
    assert counts[edges.index(-0.4)] == 0
    assert sum(outline([(0.5, 0.5, 9)], 1e-4)[1]) == 9


def test_details_as_the_trainer_writes_them(tmp_path):
    draw = torch.Generator().manual_seed(0)
    rollout = -torch.rand(4, 50, generator=draw) * 3 - 1
    sides = {"live": rollout + torch.randn(4, 50, generator=draw) * 0.1}
    sides["replayed"] = rollout + torch.randn(4, 50, generator=draw) * 0.01
    mask, ids = torch.ones(4, 50, dtype=torch.bool), torch.arange(200).view(4, 50)
    found = TokenDetails.from_tensors(
        rollout,
        mask,
        **sides,
        token_ids=ids,
        sample_ids=torch.arange(4)[:, None].expand(4, 50),
        positions=torch.arange(50).expand(4, 50),
        parted=torch.rand(4, 50, 3, generator=draw) < 0.5,
    )
    detail = found.record(lambda tokens: "".join(f"<{token}>" for token in tokens), lambda row: ids[row].tolist())
    sums = {side: LogprobSums.from_tensors(values, rollout, mask) for side, values in sides.items()}
    detail["histogram"] = {side: each.histogram() for side, each in sums.items()}
    metrics = {f"logprob_diff/{side}/{key}": v for side, each in sums.items() for key, v in each.metrics().items()}
    page = page_of(logged(tmp_path / "run", [metrics], detail))
    assert "200 of 200 tokens, drawn evenly" in page.text
    assert "200 tokens, logarithmic both ways" in page.text
    assert f"<{found.furthest.token_id[0]}>" in page.texts


def test_figure_of_every_length(tmp_path):
    for steps in (0, 1, 100):
        target = tmp_path / "figures" / f"{steps}.png"
        assert write_figure(synthetic_run(tmp_path / str(steps), steps, details_every=0), target) == target
        assert target.stat().st_size > 5000
    with pytest.raises(DiagnosticsError, match="expected a run folder"):
        write_figure(tmp_path / "figures", tmp_path / "x.png")
