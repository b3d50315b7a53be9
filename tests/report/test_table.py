"""The live table of the steps: on terminals of any width, and without one."""

import logging
import math
import re
import subprocess
import sys
from io import StringIO

import pytest
from places import ROOT
from rich.console import Console
from run_folders import few_metrics

from r3.report import LiveTable


@pytest.mark.parametrize("width", [160, 80, 40])
def test_table_never_cuts_numbers(width):
    out = StringIO()
    with LiveTable(console=Console(file=out, force_terminal=True, width=width, color_system=None), rows=3) as table:
        for step in range(1, 6):
            table.update({"step": step} | few_metrics(step))
    last = out.getvalue().split("\x1b[2K")[-1]
    assert "…" not in last
    assert re.findall(r"(?m)^ +(\d)  ", last) == ["3", "4", "5"]
    assert "3.00e-03" in last
    assert ("1,000/7" in last) == (width == 160)
    assert re.search(r"layers 1 to 100:\s+▁▁▁▁█\s+most 7.0%\s+in\s+layer 100", last)


def test_a_bar_says_how_many_of_the_steps_are_done():
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with LiveTable(console=console, total=12) as table:
        assert "0/12" in out.getvalue(), "before the first step there is a bar alone"
        for step in (5, 6):  # as after a resume
            table.update({"step": step} | few_metrics(step))
    last = out.getvalue().split("\x1b[2K")[-1]
    assert re.search(r"steps ━+\S*\s*━* +6/12 \d:\d\d:\d\d", last)
    assert "6.00e-04" in last


def test_without_a_terminal_each_step_is_a_log_line(caplog):
    caplog.set_level(logging.INFO, logger="r3")
    with LiveTable() as table:
        table.update({"step": 1} | few_metrics(1))
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
