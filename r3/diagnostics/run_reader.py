"""Reading of a run folder that may be broken, cut off or still being written: what is there, and what is wrong."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median_high
from typing import Any

from r3.diagnostics.run_folder import DETAILS_FILE, METRICS_FILE, SETTINGS_FILE
from r3.errors import SHOWN, DiagnosticsError

EXCERPT = 60
"""Characters shown of a line that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder holds. Null and numbers that are not finite are None.

    `records` and `details` have one object a step, each with an int `step`, once, in ascending order; the values of
    `records` are numbers, bools, strings and None. `problems` has a sentence for all that is missing or wrong.
    """

    records: list[dict[str, Any]]
    details: list[dict[str, Any]]
    settings: dict[str, Any]
    problems: list[str]


def read_run(path: str | os.PathLike[str]) -> Run:
    """All that can be read of a run folder, whatever its files hold.

    Lines that are no JSON object with a step are left out, of a step that is there twice the last is used, and steps
    out of order are sorted: `problems` says each, with file and line. Raises `DiagnosticsError` only if `path` is no
    folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DiagnosticsError(f"run: expected a run folder, found none at {folder}")
    problems: list[str] = []
    settings = _settings(folder, problems)
    records = _steps(folder / METRICS_FILE, problems, flat=True)
    if not (folder / DETAILS_FILE).exists():
        details = []
        if records and _asks_for_details(settings):
            problems.append(f"{DETAILS_FILE}: missing, although the settings ask for details")
    else:
        details = _steps(folder / DETAILS_FILE, problems, flat=False)
    return Run(records=records, details=details, settings=settings, problems=problems)


def _settings(folder: Path, problems: list[str]) -> dict[str, Any]:
    data = _bytes(folder / SETTINGS_FILE, problems)
    if data is None:
        return {}
    found, wrong = _object(data)
    problems += [f"{SETTINGS_FILE}: {text}" for text in wrong]
    return found or {}


def _asks_for_details(settings: Mapping[str, Any]) -> bool:
    intervals = [settings.get(f"trainer.diagnostics.{name}") for name in ("every", "details_every")]
    return all(isinstance(interval, int) and interval > 0 for interval in intervals)


def _steps(file: Path, problems: list[str], *, flat: bool) -> list[dict[str, Any]]:
    data = _bytes(file, problems)
    if data is None:
        return []
    found: list[tuple[int, int, dict[str, Any]]] = []  # step, line, record
    wrong: list[str] = []
    for line, last, text in _lines(data):
        record, notes = _object(text)
        if record is None and last:
            notes = ["incomplete and left out: the run is writing it, or was cut off"]
        elif record is not None:
            step = record.get("step")
            if isinstance(step, float) and step.is_integer():
                step = int(step)
            if isinstance(step, bool) or not isinstance(step, int):
                notes.append(f"expected a whole number as step, got {_shown(step)}; left out")
            else:
                if flat:
                    record = _flat(record, notes)
                found.append((step, line, record | {"step": step}))
        wrong += [f"{file.name}, line {line}: {note}" for note in notes]
    problems += _capped(wrong, f"{file.name}: ... and %d more of the kind")
    problems += _disorder(file.name, [(step, line) for step, line, _ in found])
    records = {step: record for step, _, record in found}
    if not records:
        problems.append(f"{file.name}: no step is recorded{'' if wrong else ' yet'}")
    steps = sorted(records)
    if flat:
        problems += _gaps(file.name, steps)
    return [records[step] for step in steps]


def _bytes(file: Path, problems: list[str]) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        problems.append(f"{file.name}: missing")
    except OSError as error:
        problems.append(f"{file.name}: cannot be read: {error.strerror}")
    return None


def _lines(data: bytes) -> Iterator[tuple[int, bool, bytes]]:
    """Number, whether no newline ends it, and content, of each line that is not blank."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, text in enumerate(lines, start=1):
        if text.strip():
            yield number, number == len(lines), text


def _object(data: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    """The JSON object in `data`, None if there is none; and what is wrong with it."""
    notes = []
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", errors="replace")
        notes.append(f"invalid UTF-8 at byte {error.start}")
    try:
        found = _clean(json.loads(text), notes)
    except (ValueError, RecursionError) as error:
        reason = f"at character {error.pos}, {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        return None, [*notes, f"no JSON: {reason}: {_shown(text)}; left out"]
    if not isinstance(found, dict):
        return None, [*notes, f"expected a JSON object, got {_shown(found)}; left out"]
    return found, notes


def _clean(value: Any, notes: list[str]) -> Any:
    """`value` without what breaks its readers: numbers that no float holds, and text that UTF-8 does not have."""
    if isinstance(value, dict):
        return {_clean(key, notes): _clean(item, notes) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, notes) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", errors="replace").decode("utf-8")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    # 2**1023 is the largest power of two in a float64.
    if isinstance(value, int) and value.bit_length() > 1023:
        notes.append("a whole number beyond the range of float64 reads as null")
        return None
    return value


def _flat(record: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    nested = [key for key, value in record.items() if isinstance(value, dict | list)]
    notes += [f"{key}: expected one number, got {_shown(record[key])}; left out" for key in nested]
    return {key: value for key, value in record.items() if key not in nested}


def _disorder(name: str, places: list[tuple[int, int]]) -> Iterator[str]:
    """What is wrong with the order of (step, line) pairs."""
    lines: dict[int, list[int]] = {}
    for step, line in places:
        lines.setdefault(step, []).append(line)
    repeated = [
        f"{name}: step {step} is there {len(at)} times, on lines {', '.join(map(str, at))}; the last is used"
        for step, at in lines.items()
        if len(at) > 1
    ]
    yield from _capped(repeated, f"{name}: ... and %d more steps that are there several times")
    falls = [
        f"{name}, line {line}: step {step} comes after step {before}; steps are sorted"
        for (before, _), (step, line) in pairwise(places)
        if step < before
    ]
    yield from _capped(falls, f"{name}: ... and %d more steps that are out of order")


def _gaps(name: str, steps: list[int]) -> Iterable[str]:
    """Steps further apart than they are as a rule."""
    usual = median_high(after - before for before, after in pairwise(steps)) if len(steps) > 1 else 0
    gaps = [f"{name}: nothing between steps {a} and {b}" for a, b in pairwise(steps) if b - a > usual]
    return _capped(gaps, f"{name}: ... and %d more gaps")


def _capped(texts: list[str], rest: str) -> list[str]:
    beyond = len(texts) - SHOWN
    return texts if beyond <= 0 else [*texts[:SHOWN], rest % beyond]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}..."
