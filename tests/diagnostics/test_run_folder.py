"""The run folder: what is written reads back, and what is broken is named."""

import json
import math

import numpy as np
import pytest
import torch
from run_folders import few_metrics

from r3.diagnostics import RunFolder, read_details, read_metrics, read_settings
from r3.errors import DiagnosticsError
from r3.report import write_figure, write_report


def run(path, steps, settings=None, metrics=few_metrics):
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
