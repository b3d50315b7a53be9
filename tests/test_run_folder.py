"""The run folder, the report made from it, and the live table: with everything there, and with much of it missing."""

import json
import logging
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console

from r3.diagnostics import LiveTable, RunFolder, read_details, read_metrics, read_settings, write_figure, write_report
from r3.errors import DiagnosticsError

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (1, 2, 3, 10, 100)


def step_metrics(step):
    metrics = {"reward/mean": 0.1 * step, "routing/differing_rows": 0.05, "routing/differing_tokens": 0.3}
    for side, scale in (("live", 6e-4), ("replayed", 1e-4)):
        metrics |= {
            f"logprob_diff/{side}/k3": scale * step,
            f"logprob_diff/{side}/k1": -scale,
            f"logprob_diff/{side}/abs_mean": 10 * scale,
            f"logprob_diff/{side}/abs_max": 1000 * scale,
            f"logprob_diff/{side}/extreme_frac": 0.0,
        }
    metrics |= {f"routing/differing_rows/layer_{layer:02d}": 0.0007 * layer for layer in LAYERS}
    metrics |= {"routing/rows_replayed": 1000, "routing/rows_live": 7, "sync/version": step, "sync/bytes": 3 * 2**20}
    return metrics | {"sync/seconds": 0.25, "time/rollout_s": 12.0, "time/train_s": 7.5, "time/sync_s": 0.5}


def run(path, steps, settings=None, metrics=step_metrics):
    folder = RunFolder(path, settings or {"seed": 1})
    for step in range(1, steps + 1):
        folder.log(step, metrics(step))
    return folder.path


# Files


def test_writes_and_reads_back(tmp_path):
    folder = RunFolder(tmp_path / "new" / "run", {"lr": 1e-5, "model": {"path": tmp_path, "tags": ("a", math.nan)}})
    folder.log(1, {"a": 0.5, "b": 3, "c": None, "d": "text", "e": True})
    assert read_metrics(folder.path) == [{"step": 1, "a": 0.5, "b": 3, "c": None, "d": "text", "e": True}]
    folder.log(2, {"step": 2, "t": torch.tensor([1.5]), "n": np.int64(4), "f": np.float32(0.5), "a": 1.0})
    assert read_metrics(folder.path / "metrics.jsonl")[1] == {"step": 2, "t": 1.5, "n": 4, "f": 0.5, "a": 1.0}
    assert read_settings(folder.path) == {"lr": 1e-5, "model": {"path": str(tmp_path), "tags": ["a", None]}}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, torch.tensor(math.nan), np.float32(np.inf)])
def test_what_is_not_finite_is_null(tmp_path, bad):
    folder = RunFolder(tmp_path, {})
    folder.log(1, {"a": bad})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "a": None}


def test_a_folder_in_use_is_refused(tmp_path):
    run(tmp_path / "run", 1)
    with pytest.raises(
        DiagnosticsError, match=r"expected an empty or new folder, got .*run with metrics.jsonl, settings"
    ):
        RunFolder(tmp_path / "run", {})
    assert len(read_metrics(tmp_path / "run")) == 1
    with pytest.raises(DiagnosticsError, match="got the file"):
        RunFolder(tmp_path / "run" / "settings.json", {})


def test_values_that_are_no_number_are_named(tmp_path):
    folder = RunFolder(tmp_path, {})
    with pytest.raises(DiagnosticsError, match=r"(?s)nested: dict.*many: Tensor"):
        folder.log(1, {"fine": 1, "nested": {}, "many": torch.ones(2)})
    with pytest.raises(DiagnosticsError, match="expected step 1, got a key 'step' with 2"):
        folder.log(1, {"step": 2})
    assert read_metrics(tmp_path) == []


def test_a_last_line_cut_anywhere_is_left_out(tmp_path, caplog):
    path = run(tmp_path / "run", 3) / "metrics.jsonl"
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in range(start, len(whole) + 1):
        path.write_bytes(whole[:cut])
        caplog.clear()
        complete = cut >= len(whole) - 1
        assert [r["step"] for r in read_metrics(path)] == ([1, 2, 3] if complete else [1, 2])
        assert ("line 3 is incomplete" in caplog.text) == (start < cut and not complete)


@pytest.mark.parametrize("broken", ['{"step": 2', "[1]", "\x00\x00"])
def test_a_broken_line_elsewhere_is_an_error(tmp_path, broken):
    path = run(tmp_path / "run", 2) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], broken, lines[1], ""]))
    with pytest.raises(DiagnosticsError, match="one JSON object a line, got:\n  line 2"):
        read_metrics(path)
    path.write_text(f"{lines[0]}\n{broken}\n")
    with pytest.raises(DiagnosticsError, match="line 2"):
        read_metrics(path)


@pytest.mark.parametrize("read", [read_metrics, write_report, lambda p: write_figure(p, p / "x.png")])
def test_no_run_folder_is_an_error(tmp_path, read):
    with pytest.raises(DiagnosticsError, match="expected a run folder"):
        read(tmp_path)


# Details


def test_details_of_all_kinds_are_read_back(tmp_path):
    folder = RunFolder(tmp_path, {})
    assert read_details(tmp_path) == []
    assert not (tmp_path / "details.jsonl").exists()
    folder.log_details(1, {"none": None, "text": "é", "nested": {"a": [1, (2.5, [True])]}})
    folder.log_details(
        3,
        {
            "scalars": [torch.tensor(1.5), np.int64(4), np.float32(0.5), torch.tensor(2, dtype=torch.uint8)],
            "tensor": torch.tensor([[1, 2], [3, 4]]),
            "half": torch.tensor([0.5, math.inf], dtype=torch.bfloat16),
            "array": np.array([[0.25, np.nan]]),
            "bad": [math.nan, {"x": -math.inf}],
            "step": 3,
        },
    )
    assert read_details(tmp_path / "details.jsonl") == [
        {"step": 1, "none": None, "text": "é", "nested": {"a": [1, [2.5, [True]]]}},
        {
            "step": 3,
            "scalars": [1.5, 4, 0.5, 2],
            "tensor": [[1, 2], [3, 4]],
            "half": [0.5, None],
            "array": [[0.25, None]],
            "bad": [None, {"x": None}],
        },
    ]
    assert (tmp_path / "details.jsonl").read_bytes().count(b"\n") == 2
    assert read_metrics(tmp_path) == []


def test_details_that_are_no_json_are_named_by_place_and_not_written(tmp_path):
    folder = RunFolder(tmp_path, {})
    expected = r"(?s)a\.b\[1\]: set.*c: complex.*2: a key of type int"
    with pytest.raises(DiagnosticsError, match=expected):
        folder.log_details(1, {"fine": 1, "a": {"b": [0, {1}]}, "c": torch.tensor(1j), "x": 1} | {2: {}})  # pyrefly: ignore
    with pytest.raises(DiagnosticsError, match="a: a key 3 of type int"):
        folder.log_details(1, {"a": {3: 1}})
    with pytest.raises(DiagnosticsError, match="details: expected step 1, got a key 'step' with 2"):
        folder.log_details(1, {"step": 2})
    assert not (tmp_path / "details.jsonl").exists()


@pytest.mark.parametrize("broken", ['{"step": 1', "[1]"])
def test_broken_details_are_an_error(tmp_path, broken):
    RunFolder(tmp_path, {})
    (tmp_path / "details.jsonl").write_text(broken + '\n{"step": 2}\n')
    with pytest.raises(DiagnosticsError, match="one JSON object a line, got:\n  line 1"):
        read_details(tmp_path)
    with pytest.raises(DiagnosticsError, match="expected a run folder or its details"):
        read_details(tmp_path / "elsewhere")


# Report


class Page(HTMLParser):
    """Text, tags, ids and everything that could load something."""

    def __init__(self, source):
        super().__init__()
        self.texts, self.tags, self.ids, self.links = [], [], [], []
        self.feed(source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "xlink:href", "src", "srcset", "data")]

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.texts.append(data)


@pytest.mark.parametrize("steps", [0, 1, 2, 12])
def test_page_is_self_contained(tmp_path, steps):
    source = write_report(run(tmp_path / "run", steps)).read_text()
    page = Page(source)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "@import" not in source
    assert re.findall(r"url\((?!#)", source) == []
    assert len(page.ids) == len(set(page.ids)), "two charts share an id, so that one would clip or mark like the other"
    targets = {link[1:] for link in page.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", source))
    assert targets <= set(page.ids)
    drawings = re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)
    assert len(drawings) == (5 if steps else 0)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "currentColor" in drawing
        assert "#010203" not in drawing
    assert source.count("<section") == source.count("</section>")


def test_headline_figures(tmp_path):
    text = Page(write_report(run(tmp_path / "run", 6)).read_text()).text
    assert "2.10e-03 k3 live, mean over steps" in text
    assert "3.50e-04 k3 replayed, mean over steps" in text
    assert "6.00 k3 live / replayed" in text
    assert "0.200 → 0.500 reward, first and last 3 steps" in text
    assert "6 steps, 1 to 6" in text
    assert "Not recorded" not in text


def test_means_are_weighted_by_tokens_where_they_are_known(tmp_path):
    def metrics(step):
        return {"logprob_diff/live/k3": float(step), "logprob_diff/live/tokens": 1 if step == 1 else 3}

    assert (
        "1.75e+00 k3 live, mean over tokens"
        in Page(write_report(run(tmp_path / "run", 2, None, metrics)).read_text()).text
    )


def test_ratio_is_over_steps_that_have_both(tmp_path):
    def metrics(step):
        return {"logprob_diff/live/k3": 10.0**step} | ({"logprob_diff/replayed/k3": 5.0} if step == 1 else {})

    assert "2.00 k3 live / replayed" in Page(write_report(run(tmp_path / "run", 3, None, metrics)).read_text()).text


@pytest.mark.parametrize("lost", ["reward/", "logprob_diff/live/", "logprob_diff/replayed/", "routing/", "sync/", ""])
def test_missing_keys_are_named_and_the_rest_is_shown(tmp_path, lost):
    def metrics(step):
        return {key: value for key, value in step_metrics(step).items() if not key.startswith(lost)}

    path = run(tmp_path / "run", 2, None, metrics)
    text = Page(write_report(path).read_text()).text
    named = {"reward/": "reward/mean", "routing/": "routing/differing_rows/layer_NN", "sync/": "sync/seconds"}
    assert "Not recorded:" in text
    assert named.get(lost, f"{lost or 'logprob_diff/live/'}k3") in text
    assert "2 steps, 1 to 2" in text
    assert write_figure(path, tmp_path / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("value", [0.0, None, math.nan, "text", True, -1.0])
def test_values_that_cannot_be_drawn(tmp_path, value):
    path = run(tmp_path / "run", 2, None, lambda step: dict.fromkeys(step_metrics(step), value))
    write_report(path)
    write_figure(path, tmp_path / "figure.png")


def test_text_is_escaped(tmp_path):
    hostile = "<script>alert('&')</script>"
    path = run(tmp_path / "a<b>&c", 1, {hostile.replace("/", ""): {"inner": hostile}, "list": [hostile]})
    source = write_report(path).read_text()
    page = Page(source)
    assert "script" not in page.tags
    assert "<h1>a&lt;b&gt;&amp;c</h1>" in source
    assert hostile in page.text


def test_figure_of_every_length(tmp_path):
    for steps in (0, 1, 100):
        target = tmp_path / "figures" / f"{steps}.png"
        assert write_figure(run(tmp_path / str(steps), steps), target) == target
        assert target.stat().st_size > 5000


# Live table


@pytest.mark.parametrize("width", [160, 80, 40])
def test_table_never_cuts_numbers(width):
    out = StringIO()
    with LiveTable(console=Console(file=out, force_terminal=True, width=width, color_system=None), rows=3) as table:
        for step in range(1, 6):
            table.update({"step": step} | step_metrics(step))
    last = out.getvalue().split("\x1b[2K")[-1]
    assert "…" not in last
    assert re.findall(r"(?m)^ +(\d)  ", last) == ["3", "4", "5"]
    assert "3.00e-03" in last
    assert ("1,000/7" in last) == (width == 160)
    assert re.search(r"layers 1 to 100:\s+▁▁▁▁█\s+most 7.0%\s+in\s+layer 100", last)


def test_without_a_terminal_each_step_is_a_log_line(caplog):
    caplog.set_level(logging.INFO, logger="r3")
    with LiveTable() as table:
        table.update({"step": 1} | step_metrics(1))
        table.update({"step": 2, "reward/mean": math.nan})
    first, second = (record.getMessage() for record in caplog.records)
    assert "step 1, reward 0.100, k3 live 6.00e-04, k3 replayed 1.00e-04" in first
    assert "rows replayed / live 1,000 / 7" in first
    assert "layers 0.1% to 7.0%" in first
    assert second == "step 2"


def test_the_cursor_comes_back_after_an_exception():
    out = StringIO()

    def fail():
        with LiveTable(console=Console(file=out, force_terminal=True)) as table:
            table.update({"step": 1})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert out.getvalue().rstrip().endswith("\x1b[?25h")


def test_import_is_light():
    code = "import sys, r3.diagnostics; print(*{'matplotlib', 'rich', 'transformers', 'vllm'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout.split() == []
