"""A run's folder: `settings.json`, written once, `metrics.jsonl`, one JSON object with flat keys a step, and
`details.jsonl`, one nested object for each step whose tokens were looked at one by one.

These readers raise at what they cannot read; `r3.diagnostics.read_run` gives what can be read, and says what cannot.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from operator import index
from pathlib import Path
from typing import Any

from r3.errors import DiagnosticsError, summary

METRICS_FILE = "metrics.jsonl"
DETAILS_FILE = "details.jsonl"
SETTINGS_FILE = "settings.json"

logger = logging.getLogger("r3")


class RunFolder:
    """A new folder for one run's settings and metrics.

    Raises `DiagnosticsError` if `path` is a file or a folder with anything in it: two runs never share a folder.

    >>> folder = RunFolder("runs/first", {"seed": 1})
    >>> folder.log(1, {"reward/mean": 0.5})
    >>> read_metrics(folder.path)
    [{'step': 1, 'reward/mean': 0.5}]
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise DiagnosticsError(f"run folder: expected a folder or a new path, got the file {self.path}")
        if self.path.is_dir() and (found := sorted(entry.name for entry in self.path.iterdir())):
            raise DiagnosticsError(
                f"run folder: expected an empty or new folder, got {self.path} with {', '.join(found[:4])}"
                f"{' and more' if len(found) > 4 else ''}; choose another path, or move the earlier run away"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_settings(settings)
        (self.path / METRICS_FILE).touch()

    @classmethod
    def reopen(cls, path: str | os.PathLike[str], settings: Mapping[str, Any], *, step: int) -> RunFolder:
        """The folder of a run that goes on after `step`: what it has of later steps is taken out.

        Raises `DiagnosticsError` if `path` is no run folder, or has lines that cannot be read.
        """
        folder = cls.__new__(cls)
        folder.path = Path(path)
        if not (folder.path / SETTINGS_FILE).is_file():
            raise DiagnosticsError(f"run folder: expected one with {SETTINGS_FILE} to go on with, got {folder.path}")
        for name in (METRICS_FILE, DETAILS_FILE):
            file = folder.path / name
            if file.is_file():
                kept = [json.dumps(record) + "\n" for record in _read_lines(file) if record["step"] <= step]
                shortened = file.with_name(f"{name}.partial")
                shortened.write_text("".join(kept), encoding="utf-8")
                shortened.replace(file)
        folder._write_settings(settings)
        return folder

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        settings_json = json.dumps(json_values(settings), indent=2, default=str, allow_nan=False)
        (self.path / SETTINGS_FILE).write_text(settings_json + "\n", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line; it has left this process when the call returns.

        Values are numbers, bools, strings, None, or tensors and arrays with one element. What is not finite is written
        as null, for JSON has no NaN. Raises `DiagnosticsError` for other values and for a `step` that contradicts.
        """
        record: dict[str, float | int | bool | str | None] = _step("metrics", step, metrics)
        problems = []
        for key, value in metrics.items():
            if key == "step":
                continue
            try:
                record[key] = _scalar(value)
            except (TypeError, ValueError, RuntimeError):
                problems.append(f"{key}: {type(value).__name__}")
        if problems:
            raise DiagnosticsError(f"metrics: expected flat keys with one number each, got:{summary(problems)}")
        self._append(METRICS_FILE, record)

    def log_details(self, step: int, details: Mapping[str, Any]) -> None:
        """Append one line to `details.jsonl`, which the first call makes; it has left this process on return.

        Values are as for `log`, and lists, tuples, mappings, tensors and arrays of them, nested as they come. What is
        not finite is written as null. Raises `DiagnosticsError`, and writes nothing, for other values, keys that are no
        strings, and a `step` that contradicts.
        """
        record: dict[str, Any] = _step("details", step, details)
        problems: list[str] = []
        for key, value in details.items():
            if key != "step":
                record[key] = _plain(value, str(key), problems)
        problems += [f"{key!r}: a key of type {type(key).__name__}" for key in details if not isinstance(key, str)]
        if problems:
            raise DiagnosticsError(
                f"details: expected numbers, text, and lists and mappings of them, got:{summary(problems)}"
            )
        self._append(DETAILS_FILE, record)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False) + "\n"
        # Opened for each step: nothing is left to close, and a crash loses at most the line being written.
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(line)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The steps of a run, from its folder or its `metrics.jsonl`; null reads as None.

    A last line that is cut off, as in a run that is being written, is left out with a warning. Raises
    `DiagnosticsError` if there is no such file or any other line is not a JSON object.
    """
    file = Path(path)
    file = file / METRICS_FILE if file.is_dir() else file
    if not file.is_file():
        raise DiagnosticsError(f"metrics: expected a run folder or its {METRICS_FILE}, found none at {file}")
    return _read_lines(file)


def read_details(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The details of a run, from its folder or its `details.jsonl`; none if a folder has no such file.

    Otherwise as `read_metrics`.
    """
    file = Path(path)
    if file.is_dir():
        file = file / DETAILS_FILE
        if not file.exists():
            return []
    if not file.is_file():
        raise DiagnosticsError(f"details: expected a run folder or its {DETAILS_FILE}, found none at {file}")
    return _read_lines(file)


def _read_lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    records, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number == len(lines):
            # Every complete line ends with a newline, so only what comes after the last one can be cut off.
            logger.warning("%s: line %d is incomplete and left out", file, number)
        else:
            problems.append(f"line {number}: {line[:80]}")
    if problems:
        raise DiagnosticsError(f"{file}: expected one JSON object a line, got:{summary(problems)}")
    return records


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of a run folder, empty if it has none; raises `DiagnosticsError` if they cannot be read."""
    file = Path(path) / SETTINGS_FILE
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DiagnosticsError(f"{file}: expected one JSON object, got: {error}") from error
    if not isinstance(settings, dict):
        raise DiagnosticsError(f"{file}: expected one JSON object, got {type(settings).__name__}")
    return settings


def _step(kind: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("step", step) != step:
        raise DiagnosticsError(f"{kind}: expected step {step}, got a key 'step' with {values['step']}")
    return {"step": index(step)}


def _plain(value: Any, where: str, problems: list[str]) -> Any:
    """`value` as JSON has it; what JSON does not have is added to `problems`."""
    if isinstance(value, Mapping):
        problems += [
            f"{where}: a key {key!r} of type {type(key).__name__}" for key in value if not isinstance(key, str)
        ]
        return {key: _plain(item, f"{where}.{key}", problems) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{place}]", problems) for place, item in enumerate(value)]
    try:
        return _scalar(value)
    except TypeError:
        problems.append(f"{where}: {type(value).__name__}")
        return None


def _scalar(value: Any) -> float | int | bool | str | None:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError


def json_values(value: Any) -> Any:
    """`value` for JSON, which has no NaN and no infinities: None in their place."""
    if isinstance(value, Mapping):
        return {str(key): json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
