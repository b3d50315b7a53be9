"""The command line, short of the demo itself, which `test_processes.py` runs."""

import subprocess
import sys

import pytest
from places import ROOT

from r3 import R3Config
from r3.cli import main
from r3.diagnostics import RunFolder


@pytest.mark.parametrize("overrides", [[], ["trainer.max_steps=3", "trainer.diagnostics.sinks=[wandb,trackio]"]])
def test_the_demo_lists_the_settings_that_it_runs_with(overrides, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import grpo_demo

    class Started(Exception):
        pass

    def start(config, task):
        raise Started(config)

    monkeypatch.setattr("trainer_hooks.launch.train", start)
    with pytest.raises(Started) as started:
        grpo_demo.main(overrides)
    command = [sys.executable, "-m", "r3.cli", "demo", "--settings", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    printed = [line.partition("  # ")[0].strip() for line in lines]
    assert R3Config.from_overrides(printed) == started.value.args[0]
    key = "trainer.policy.optimizer_config.lr"
    assert next(line for line in lines if line.startswith(key)).startswith(f"{key}=0.0001 ")
    assert R3Config.from_overrides([]).to_flat()[key] != 1e-4, "the demo's value is one of its own"


def test_settings_that_are_listed_are_checked():
    command = [sys.executable, "-m", "r3.cli", "demo", "--settings", "trainer.max_steps=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert "trainer.max_steps: expected 1 or more, got 0" in done.stderr


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
