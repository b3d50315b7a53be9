"""The command line, short of the demo itself, which `test_processes.py` runs."""

import subprocess
import sys

import pytest

from r3.cli import main
from r3.diagnostics import RunFolder


def test_settings_are_listed_as_they_are_given(capsys):
    main(["demo", "--settings"])
    lines = capsys.readouterr().out.splitlines()
    assert "trainer.policy.fsdp_config.moe_enable_routing_replay=True" in lines
    assert "generator.inference_engine.enable_return_routed_experts=True" in lines


def test_report_of_a_run_folder_is_written_and_its_path_printed(tmp_path, capsys):
    RunFolder(tmp_path / "run", {"trainer.seed": 0}).log(1, {"reward/mean": 0.5})
    main(["report", str(tmp_path / "run")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")


def test_what_went_wrong_is_said_without_a_traceback(tmp_path):
    with pytest.raises(SystemExit, match=r"^r3: .*metrics\.jsonl"):
        main(["report", str(tmp_path)])


def test_the_installed_command_finds_the_example():
    command = [sys.executable, "-m", "r3.cli", "demo", "trainer.nonsense=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ConfigError: unknown setting 'trainer.nonsense'" in done.stderr
