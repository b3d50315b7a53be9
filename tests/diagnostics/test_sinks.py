"""Sinks with the real libraries, read back from what they wrote; and queues that are full, slow, or broken."""

import json
import logging
import math
import os
import struct
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
from places import ROOT

from r3.diagnostics import RunFolder, Sinks, open_sinks, require_sinks
from r3.diagnostics.sinks import SinkCounts
from r3.errors import ConfigError, DiagnosticsError

SETTINGS = {"trainer.seed": 3, "trainer.output_dir": "", "trainer.diagnostics.sinks": ["x"], "alarm": None}
METRICS = {
    "reward/mean": 0.5,
    "logprob_diff/live/k3": torch.tensor(5e-4, dtype=torch.float64),
    "tokens": np.int64(7),
    "ok": True,
    "missing": None,
    "nan": math.nan,
    "inf": math.inf,
    "text": "word",
    "vector": torch.ones(2),
    "huge": 10**400,
}
NUMBERS = {"reward/mean": 0.5, "logprob_diff/live/k3": 5e-4, "tokens": 7.0, "ok": 1.0}


# What each library wrote. In processes of their own: wandb and trackio keep state in theirs.


WRITE = textwrap.dedent("""
    import sys
    from pathlib import Path
    from tests.diagnostics.test_sinks import METRICS, SETTINGS
    from r3.diagnostics import RunFolder, open_sinks

    folder = RunFolder(Path(sys.argv[1]) / "run-a", SETTINGS)
    with open_sinks(sys.argv[2:], run_folder=folder, settings=SETTINGS, project="proj") as sinks:
        for step in (1, 2, 5):
            sinks.log(step, METRICS | {"step_again": step})
    assert all(c.written == 3 and not c.dropped + c.failed for c in sinks.counts.values()), sinks.counts
""")


def in_process(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_tensorboard_has_the_numbers_and_the_settings(tmp_path):
    in_process(WRITE, tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "run-a")).Reload()
    assert set(found.Tags()["scalars"]) == set(NUMBERS) | {"step_again"}
    for name, value in NUMBERS.items():
        events = found.Scalars(name)
        assert [event.step for event in events] == [1, 2, 5]
        assert [event.value for event in events] == [np.float32(value)] * 3
    assert [event.value for event in found.Scalars("step_again")] == [1, 2, 5]
    (text,) = found.Tensors("settings/text_summary")
    assert b"| trainer.seed | 3 |" in text.tensor_proto.string_val[0]


def test_wandb_offline_has_the_numbers_and_the_settings(tmp_path):
    in_process(WRITE, tmp_path, "wandb", WANDB_MODE="offline")
    (file,) = (tmp_path / "run-a" / "wandb").glob("offline-run-*/run-*.wandb")
    config, run, history = read_wandb(file)
    assert (run.project, run.display_name) == ("proj", "run-a")
    assert config == SETTINGS
    assert [row["_step"] for row in history] == [1, 2, 5]
    assert [row["step_again"] for row in history] == [1, 2, 5]
    for row in history:
        assert {key: row[key] for key in row if not key.startswith("_") and key != "step_again"} == NUMBERS


def wandb_records(data):
    """The records of a `.wandb` file: LevelDB's log format behind a header of 7 bytes."""
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at < len(data):
        left = 2**15 - at % 2**15
        if left < 7:  # the rest of a block is too short for a header
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read_wandb(file):
    """Config, run and history of the records in a `.wandb` file."""
    from wandb.proto import wandb_internal_pb2

    config, run, history = {}, None, []
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                config |= {item.key: json.loads(item.value_json) for item in run.config.update}
            case "config":
                config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            case "history":
                items = record.history.item
                history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    config.pop("_wandb", None)
    return config, run, history


def test_trackio_has_the_numbers_and_the_settings(tmp_path):
    in_process(WRITE, tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    code = textwrap.dedent("""
        import json
        from trackio.sqlite_storage import SQLiteStorage

        (run,) = SQLiteStorage.get_runs("proj")
        print(json.dumps([run, SQLiteStorage.get_logs("proj", run), SQLiteStorage.get_run_config("proj", run)]))
    """)
    name, logs, config = json.loads(in_process(code, TRACKIO_DIR=str(tmp_path / "trackio")).splitlines()[-1])
    assert name == "run-a"
    assert [row["step"] for row in logs] == [1, 2, 5]
    assert [row["step_again"] for row in logs] == [1, 2, 5]
    for row in logs:
        assert {key: row[key] for key in NUMBERS} == NUMBERS
        assert not {"missing", "nan", "inf", "text", "vector", "huge"} & set(row)
    assert {key: value for key, value in config.items() if not key.startswith("_")} == SETTINGS


# Start


def test_no_sinks_need_no_package(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    with open_sinks([], run_folder=folder, settings={}, project="p") as sinks:
        sinks.log(1, METRICS)
    assert sinks.counts == {}
    assert sorted(path.name for path in folder.path.iterdir()) == ["metrics.jsonl", "settings.json"]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_refused_at_the_start_with_its_remedy(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    folder = RunFolder(tmp_path / "run", {})
    with pytest.raises(ConfigError, match=rf"sinks: {name} cannot be imported .*`pip install {name}`, or leave it out"):
        open_sinks([name], run_folder=folder, settings={}, project="p")


def test_all_that_is_wrong_with_the_names_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"got 'mlflow'; wandb cannot be imported"):
        require_sinks(["mlflow", "wandb"])
    require_sinks(["tensorboard"])


def test_a_sink_that_cannot_start_stops_the_run_and_leaves_none_open(tmp_path):
    code = textwrap.dedent("""
        import sys, threading
        from pathlib import Path
        from r3.diagnostics import RunFolder, open_sinks
        from r3.errors import ConfigError

        folder = RunFolder(Path(sys.argv[1]) / "run", {})
        try:
            open_sinks(["tensorboard", "wandb"], run_folder=folder, settings={}, project="a/b?c")
        except ConfigError as error:
            print(error)
        print([thread.name for thread in threading.enumerate() if "r3" in thread.name])
    """)
    out = in_process(code, tmp_path, WANDB_MODE="offline")
    assert "sinks: wandb could not be started: UsageError" in out
    assert "or set WANDB_MODE=offline" in out
    assert out.splitlines()[-1] == "[]"


def test_importing_the_diagnostics_imports_none():
    out = in_process("import sys, r3.diagnostics; print(*{'tensorboard', 'trackio', 'wandb'} & set(sys.modules))")
    assert out.split() == []


# Queues


class Recorder:
    """A sink that keeps what it gets; `gate` holds it back, `fails` names steps at which it raises."""

    def __init__(self, gate=None, fails=(), close_fails=False):
        self.steps, self.values, self.closed = [], [], 0
        self.gate, self.fails, self.close_fails = gate, fails, close_fails

    def write(self, step, values):
        if self.gate is not None:
            self.gate.wait(30)
        if step in self.fails:
            raise OSError(f"disk {step}")
        self.steps.append(step)
        self.values.append(values)

    def close(self):
        self.closed += 1
        if self.close_fails:
            raise OSError("no room")


@pytest.fixture
def gate():
    event = threading.Event()
    yield event
    event.set()


def test_all_steps_arrive_in_order_and_close_waits_for_them():
    sink = Recorder()
    with Sinks({"one": sink}) as sinks:
        for step in range(200):
            sinks.log(step, METRICS)
    assert sink.steps == list(range(200))
    assert sink.values[0] == NUMBERS
    assert all(type(value) is float for value in sink.values[0].values())
    assert sink.closed == 1
    assert sinks.counts == {"one": SinkCounts(written=200)}


def test_a_slow_sink_never_holds_up_a_step_and_what_is_dropped_is_counted(gate, caplog):
    slow, quick = Recorder(gate), Recorder()
    sinks = Sinks({"slow": slow, "quick": quick}, queue_steps=4)
    start = time.perf_counter()
    for step in range(50):
        sinks.log(step, {"a": 1.0})
        while sinks.counts["quick"].written <= step:  # the other one is not behind
            time.sleep(0.001)
    assert time.perf_counter() - start < 20
    assert sinks.counts["slow"].dropped in (45, 46)  # one step is with the sink, four are queued
    gate.set()
    sinks.close()
    assert quick.steps == list(range(50))
    assert slow.steps == list(range(len(slow.steps)))
    assert sinks.counts["slow"] == SinkCounts(written=len(slow.steps), dropped=50 - len(slow.steps))
    messages = [record.getMessage() for record in caplog.records]
    assert [("is 4 steps behind" in m, "of 50 steps are not in it" in m) for m in messages] == [
        (True, False),
        (False, True),
    ]
    assert all(message.startswith("sink slow: ") for message in messages)


def test_a_sink_that_raises_is_logged_once_and_summed_up(caplog):
    broken, sound = Recorder(fails={2, 3, 7}), Recorder()
    with Sinks({"broken": broken, "sound": sound}) as sinks:
        for step in range(10):
            sinks.log(step, {})
    assert sound.steps == list(range(10))
    assert broken.steps == [0, 1, 4, 5, 6, 8, 9]
    assert sinks.counts == {"broken": SinkCounts(written=7, failed=3), "sound": SinkCounts(written=10)}
    first, last = (record.getMessage() for record in caplog.records)
    assert first == "sink broken: step 2 failed: OSError: disk 2; more of this is counted, not logged"
    assert last == "sink broken: 3 of 10 steps are not in it (0 dropped, 3 failed); metrics.jsonl has them"


def test_a_sink_that_hangs_does_not_hold_up_the_end(gate, caplog):
    hanging, sound = Recorder(gate), Recorder()
    sinks = Sinks({"hanging": hanging, "sound": sound})
    for step in range(3):
        sinks.log(step, {})
    start = time.perf_counter()
    sinks.close(timeout_s=0.3)
    assert 0.2 < time.perf_counter() - start < 20
    assert sound.closed == 1
    assert sinks.counts["hanging"] in (SinkCounts(dropped=2), SinkCounts(dropped=3))
    assert "sink hanging: did not finish in time and is left behind" in caplog.text
    assert caplog.text.count("steps are not in it") == 1
    sinks.close(timeout_s=0.1)
    assert caplog.text.count("steps are not in it") == 1


def test_an_end_that_fails_is_said(caplog):
    with Sinks({"one": Recorder(close_fails=True)}) as sinks:
        sinks.log(1, {})
    assert "sink one: could not be closed: OSError: no room" in caplog.text
    assert sinks.counts["one"].written == 1


def test_a_sink_without_steps_is_closed_too():
    sink = Recorder()
    Sinks({"one": sink}).close()
    assert (sink.closed, sink.steps) == (1, [])


def test_after_close_it_is_too_late():
    sinks = Sinks({"one": Recorder()})
    sinks.close()
    sinks.close()
    with pytest.raises(DiagnosticsError, match="step 4 was logged after close"):
        sinks.log(4, {})


def test_values_are_taken_when_they_are_logged(gate):
    sink, value = Recorder(gate), torch.tensor([1.0])
    with Sinks({"one": sink}) as sinks:
        sinks.log(1, {"a": value})
        value.fill_(2.0)
        gate.set()
    assert sink.values == [{"a": 1.0}]


def test_a_process_that_ends_without_close_is_not_held_up(tmp_path):
    code = textwrap.dedent("""
        import threading
        from r3.diagnostics import Sinks

        class Stuck:
            def write(self, step, values):
                threading.Event().wait()
            def close(self): ...

        Sinks({"stuck": Stuck()}).log(1, {})
    """)
    in_process(code)


def test_the_log_of_a_sink_is_the_projects(caplog):
    with caplog.at_level(logging.WARNING, logger="r3"), Sinks({"one": Recorder(fails={1})}) as sinks:
        sinks.log(1, {})
    assert {record.name for record in caplog.records} == {"r3"}
