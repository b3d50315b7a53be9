"""Every setting says what it means and which values it takes, and refuses others before anything starts."""

import dataclasses
import math
from operator import attrgetter
from typing import Any, get_args

import pytest

from r3 import ConfigError, R3Config
from r3.cli import main
from r3.config import TRANSPORTS as NAMED_TRANSPORTS
from r3.config.fields import Setting, settings_of
from r3.config.generator import ON_RUNNING
from r3.weight_sync.engines import RunningRequests
from r3.weight_sync.transports import TRANSPORTS

SETTINGS = {item.key: item for item in settings_of(R3Config)}

NONSENSE: dict[str, list[Any]] = {
    "a switch": ["perhaps", 1, None],
    "an integer": [-(10**12), 0.5, True, "many", None],
    "a number": [-1e12, math.inf, math.nan, True, "many", None],
    "text": ["\0", 3, None],
    "a list": [["nonsense"], "nonsense", [3], None],
    "a dictionary": ["nonsense", {"": 1}, {3: 1}, None],
}
"""By the kind of a setting, values that none of them takes."""


def with_value(key: str, value: Any) -> R3Config:
    """A configuration made without `from_overrides`, in which one setting has another value."""
    config: Any = R3Config()
    *parents, name = key.split(".")
    for depth in range(len(parents), -1, -1):
        node = attrgetter(".".join(parents[:depth]))(config) if depth else config
        value = dataclasses.replace(node, **{name: value})
        name = parents[depth - 1]
    return value


def outside(item: Setting) -> list[Any]:
    """Values that this setting must refuse."""
    kind = item.kind.removesuffix(" or null")
    return [value for value in NONSENSE[kind] if value is not None or kind == item.kind]


def test_all_settings_are_walked():
    assert [key for key in R3Config().to_flat() if key not in SETTINGS] == []
    assert len(SETTINGS) > 50


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_says_what_it_is(key: str):
    item = SETTINGS[key]
    assert item.about.meaning[0] != " "
    assert item.about.meaning.endswith(".")
    assert len(item.about.meaning) > 10
    is_number = item.kind.removesuffix(" or null") in ("an integer", "a number")
    assert bool(item.about.unit) == is_number, "a number has a unit, and nothing else has"
    assert item.about.range.words
    with_value(key, item.default).check()


@pytest.mark.parametrize("key", SETTINGS)
def test_nonsense_is_refused_and_says_what_was_expected(key: str):
    for value in outside(SETTINGS[key]):
        with pytest.raises(ConfigError) as refused:
            with_value(key, value).check()
        message = str(refused.value)
        assert f"{key}: expected " in message
        assert SETTINGS[key].expected in message
        assert f"got {value!r}" in message


@pytest.mark.parametrize(
    "pair",
    [
        "generator.inference_engine.weight_sync.transport=foo",
        "generator.inference_engine.gpu_memory_utilization=7",
        "generator.inference_engine.gpu_memory_utilization=0",
        "generator.inference_engine.max_model_len=0",
        "generator.inference_engine.max_num_seqs=0",
        "generator.inference_engine.kv_cache_gib=0",
        "generator.inference_engine.weight_sync.timeout_s=.inf",
        "trainer.policy.optimizer_config.lr=-1",
        "trainer.policy.optimizer_config.max_grad_norm=0",
        "trainer.algorithm.eps_clip_low=-3",
        "trainer.algorithm.eps_clip_low=1.5",
        "trainer.seed=-1",
        "task.name=''",
    ],
)
def test_values_beside_the_range_are_refused_by_name(pair: str):
    with pytest.raises(ConfigError, match=f"^{pair.partition('=')[0]}: expected "):
        R3Config.from_overrides([pair])


def test_all_that_is_wrong_is_said_at_once():
    pairs = ["trainer.max_steps=0", "trainer.policy.optimizer_config.lr=-1", "trainer.diagnostics.alarms.k3_stop=1"]
    with pytest.raises(ConfigError, match=r"^3 settings:\n") as refused:
        R3Config.from_overrides(pairs)
    for problem in ("trainer.max_steps: expected", "optimizer_config.lr: expected", "nothing watches them"):
        assert problem in str(refused.value)


def test_a_part_of_the_wrong_class_is_refused():
    with pytest.raises(ConfigError, match="trainer: expected TrainerConfig, got 3"):
        R3Config(trainer=3).check()  # type: ignore[arg-type]


def test_transports_are_those_that_there_are():
    assert sorted(NAMED_TRANSPORTS) == sorted(TRANSPORTS)


def test_what_a_sync_does_with_requests_is_what_engines_know():
    assert sorted(ON_RUNNING) == sorted(get_args(RunningRequests))


@pytest.mark.parametrize(
    ("setting", "transport"),
    [("folder=/shared", "files"), ("host=trainer", "gloo"), ("port=29600", "nccl"), ("senders=first", "gloo")],
)
def test_a_setting_of_another_transport_is_refused(setting, transport):
    name = "generator.inference_engine.weight_sync"
    with pytest.raises(ConfigError, match=rf"{name}.{setting}: {name}.transport=ipc does not use it; .*{transport}"):
        R3Config.from_overrides([f"{name}.{setting}", f"{name}.transport=ipc"]).check()
    R3Config.from_overrides([f"{name}.{setting}", f"{name}.transport={transport}"]).check()


def test_the_table_has_a_row_for_each_setting(capsys):
    main(["settings"])
    head, line, *rows = capsys.readouterr().out.splitlines()
    assert head == "| Setting | Default | Unit or kind | Values | Meaning |"
    assert line.count("|") == head.count("|")
    assert [row.split("`")[1] for row in rows] == list(SETTINGS)
    cells = [row.replace("\\|", "").strip("|").split(" | ") for row in rows]
    assert {len(row) for row in cells} == {5}
    assert all(cell.strip() for row in cells for cell in row)
