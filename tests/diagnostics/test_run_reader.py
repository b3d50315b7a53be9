"""`read_run` says exactly what is wrong with a folder and gives the rest; nothing that a file holds makes it raise."""

import json
import math
import os
import random

import pytest

from r3.diagnostics import RunFolder, read_run
from r3.errors import DiagnosticsError

DETAILS_ON = {"trainer.diagnostics.every": 1, "trainer.diagnostics.details_every": 10}


def folder(path, steps=(1, 2, 3), settings=None):
    made = RunFolder(path, {"seed": 1} if settings is None else settings)
    for step in steps:
        made.log(step, {"a": 0.5 * step})
    return made


def lines(path, *texts, newline=True):
    """Replace `metrics.jsonl` by these lines."""
    data = b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts)
    (path / "metrics.jsonl").write_bytes(data + b"\n" * newline)


def steps_of(run):
    return [record["step"] for record in run.records]


def test_a_sound_run_has_no_problems(tmp_path):
    made = folder(tmp_path / "run", settings={"seed": 1} | DETAILS_ON)
    made.log_details(1, {"tokens": {"live": [0.5, math.nan]}})
    run = read_run(tmp_path / "run")
    assert run.problems == []
    assert run.records == [{"step": step, "a": 0.5 * step} for step in (1, 2, 3)]
    assert run.details == [{"step": 1, "tokens": {"live": [0.5, None]}}]
    assert run.settings == {"seed": 1} | DETAILS_ON


def test_only_a_missing_folder_raises(tmp_path):
    for path in (tmp_path / "none", folder(tmp_path / "run").path / "metrics.jsonl"):
        with pytest.raises(DiagnosticsError, match="expected a run folder"):
            read_run(path)
    (tmp_path / "empty").mkdir()
    run = read_run(tmp_path / "empty")
    assert (run.records, run.details, run.settings) == ([], [], {})
    assert run.problems == ["settings.json: missing", "metrics.jsonl: missing"]


def test_a_run_that_has_just_begun(tmp_path):
    folder(tmp_path, steps=(), settings=DETAILS_ON)
    assert read_run(tmp_path).problems == ["metrics.jsonl: no step is recorded yet"]


@pytest.mark.parametrize("cut", range(1, len('{"step": 3, "a": 1.5}') + 2))
def test_a_last_line_that_is_being_written(tmp_path, cut):
    path = folder(tmp_path).path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    run = read_run(tmp_path)
    last = '{"step": 3, "a": 1.5}\n'[:-cut]
    complete = len(last) in (0, len('{"step": 3, "a": 1.5}'))
    assert steps_of(run) == ([1, 2, 3] if last and complete else [1, 2])
    expected = "metrics.jsonl, line 3: incomplete and left out: the run is writing it, or was cut off"
    assert run.problems == ([] if complete else [expected])


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("{", "line 2: no JSON: at character 1, Expecting property name enclosed in double quotes: '{'; left out"),
        ("[1]", "line 2: expected a JSON object, got [1]; left out"),
        ("7", "line 2: expected a JSON object, got 7; left out"),
        ("\x00\x00", "line 2: no JSON: at character 0, Expecting value: '\\x00\\x00'; left out"),
        ('{"a": 1}', "line 2: expected a whole number as step, got None; left out"),
        ('{"step": true}', "line 2: expected a whole number as step, got True; left out"),
        ('{"step": "2"}', "line 2: expected a whole number as step, got '2'; left out"),
        ('{"step": 1.5}', "line 2: expected a whole number as step, got 1.5; left out"),
        ('{"step": NaN}', "line 2: expected a whole number as step, got None; left out"),
        (b'{"step": \xff}', "line 2: invalid UTF-8 at byte 9"),
        ("[" * 100_000, "line 2: no JSON: "),
        ("9" * 5000, "line 2: no JSON: "),
    ],
)
def test_a_broken_line_is_left_out_and_named(tmp_path, broken, problem):
    folder(tmp_path, steps=())
    lines(tmp_path, '{"step": 1}', broken, '{"step": 2}')
    run = read_run(tmp_path)
    assert steps_of(run) == [1, 2]
    assert run.problems[0].startswith(f"metrics.jsonl, {problem}")
    assert all(len(text) < 250 for text in run.problems)


def test_what_can_be_read_of_a_line_is_kept(tmp_path):
    folder(tmp_path, steps=())
    lines(
        tmp_path, b'{"step": 1.0, "t": "\xff"}', f'{{"step": 2, "list": [1], "n": {{}}, "i": {"9" * 400}, "f": 1e999}}'
    )
    run = read_run(tmp_path)
    assert run.records == [{"step": 1, "t": "�"}, {"step": 2, "i": None, "f": None}]
    assert isinstance(run.records[0]["step"], int)
    assert run.problems == [
        "metrics.jsonl, line 1: invalid UTF-8 at byte 20",
        "metrics.jsonl, line 2: a whole number beyond the range of float64 reads as null",
        "metrics.jsonl, line 2: list: expected one number, got [1]; left out",
        "metrics.jsonl, line 2: n: expected one number, got {}; left out",
    ]


def test_text_can_be_written_again(tmp_path):
    folder(tmp_path, steps=(), settings={"a": "\ud800"})
    lines(tmp_path, '{"step": 1, "\\ud800": "\\udfff"}')
    run = read_run(tmp_path)
    json.dumps([run.records, run.settings], ensure_ascii=False).encode()


def test_of_a_step_that_is_there_twice_the_last_is_used(tmp_path):
    made = folder(tmp_path, steps=(1, 2, 3))
    made.log(2, {"a": 9.0})
    made.log(3, {"a": 8.0})
    made.log(3, {"a": 7.0})
    run = read_run(tmp_path)
    assert run.records == [{"step": 1, "a": 0.5}, {"step": 2, "a": 9.0}, {"step": 3, "a": 7.0}]
    assert run.problems == [
        "metrics.jsonl: step 2 is there 2 times, on lines 2, 4; the last is used",
        "metrics.jsonl: step 3 is there 3 times, on lines 3, 5, 6; the last is used",
        "metrics.jsonl, line 4: step 2 comes after step 3; steps are sorted",
    ]


def test_steps_out_of_order_are_sorted(tmp_path):
    folder(tmp_path, steps=(3, 1, 2))
    run = read_run(tmp_path)
    assert steps_of(run) == [1, 2, 3]
    assert run.problems == ["metrics.jsonl, line 2: step 1 comes after step 3; steps are sorted"]


@pytest.mark.parametrize(
    ("steps", "gaps"),
    [
        ((1, 2, 3, 7, 8), ["3 and 7"]),
        ((1, 10, 20, 30), []),  # recorded now and then, on purpose
        ((5,), []),
        ((1, 2, 5, 6, 9, 10, 11), ["2 and 5", "6 and 9"]),
    ],
)
def test_gaps_are_named(tmp_path, steps, gaps):
    folder(tmp_path, steps=steps)
    assert read_run(tmp_path).problems == [f"metrics.jsonl: nothing between steps {gap}" for gap in gaps]


def test_many_problems_are_summed_up(tmp_path):
    folder(tmp_path, steps=())
    lines(tmp_path, *["{"] * 40, '{"step": 1}')
    problems = read_run(tmp_path).problems
    assert len(problems) == 17
    assert problems[-1] == "metrics.jsonl: ... and 24 more of the kind"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "settings.json: missing"),
        (b"", "settings.json: no JSON: at character 0"),
        (b"[]", "settings.json: expected a JSON object, got []"),
        (b'{"a": 1', "settings.json: no JSON: at character"),
        (b'{"a": "\xff"}', "settings.json: invalid UTF-8 at byte 7"),
    ],
)
def test_settings_that_are_missing_or_broken(tmp_path, content, problem):
    path = folder(tmp_path).path / "settings.json"
    path.unlink() if content is None else path.write_bytes(content)
    run = read_run(tmp_path)
    assert steps_of(run) == [1, 2, 3]
    assert len(run.problems) == 1
    assert run.problems[0].startswith(problem)


def test_details_that_are_missing_although_they_were_asked_for(tmp_path):
    folder(tmp_path / "on", settings=DETAILS_ON)
    assert read_run(tmp_path / "on").problems == ["details.jsonl: missing, although the settings ask for details"]
    for name in DETAILS_ON:
        folder(tmp_path / name, settings=DETAILS_ON | {name: 0})
        assert read_run(tmp_path / name).problems == []


def test_details_are_read_like_metrics(tmp_path):
    made = folder(tmp_path)
    for step in (1, 30, 11):
        made.log_details(step, {"x": [step]})
    with open(tmp_path / "details.jsonl", "ab") as file:
        file.write(b'[]\n{"step": 41, "x": [')
    run = read_run(tmp_path)
    assert run.details == [{"step": 1, "x": [1]}, {"step": 11, "x": [11]}, {"step": 30, "x": [30]}]
    assert run.problems == [
        "details.jsonl, line 4: expected a JSON object, got []; left out",
        "details.jsonl, line 5: incomplete and left out: the run is writing it, or was cut off",
        "details.jsonl, line 3: step 11 comes after step 30; steps are sorted",
    ]


def test_files_that_cannot_be_opened(tmp_path):
    folder(tmp_path)
    for name in ("metrics.jsonl", "settings.json"):
        (tmp_path / name).unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    os.symlink("settings.json", tmp_path / "settings.json")
    assert read_run(tmp_path).problems == [
        "settings.json: cannot be read: Too many levels of symbolic links",
        "metrics.jsonl: cannot be read: Is a directory",
    ]


def test_crlf_and_a_byte_order_mark_do_no_harm(tmp_path):
    folder(tmp_path, steps=())
    (tmp_path / "metrics.jsonl").write_bytes(b'\xef\xbb\xbf{"step": 1}\r\n\r\n{"step": 2}\r\n')
    run = read_run(tmp_path)
    assert (steps_of(run), run.problems) == ([1, 2], [])


@pytest.mark.parametrize("seed", range(20))
def test_no_damage_makes_it_raise(tmp_path, seed):
    """Bytes replaced, removed, doubled and cut at random in all files."""
    made = folder(tmp_path, steps=range(1, 30), settings=DETAILS_ON)
    for step in (1, 11, 21):
        made.log_details(step, {"tokens": {"live": [0.1] * 20}, "worst": [{"token": "é", "layers": [1, 2]}]})
    rng = random.Random(seed)
    for name in ("metrics.jsonl", "details.jsonl", "settings.json"):
        data = bytearray((tmp_path / name).read_bytes())
        for _ in range(rng.randint(1, 12)):
            at = rng.randrange(len(data) or 1)
            end = at + rng.randint(1, 20)
            data[at:end] = rng.choice([b"", rng.randbytes(3), bytes(data[at:end]) * 2, b"\n", b"}{"])
        (tmp_path / name).write_bytes(data)
    run = read_run(tmp_path)
    assert run.problems
    assert steps_of(run) == sorted(set(steps_of(run)))
    assert len(run.records) >= 10
    for record in run.records:
        assert all(isinstance(value, int | float | str | None) for value in record.values())
    json.dumps([run.records, run.details, run.settings], allow_nan=False, ensure_ascii=False).encode()
