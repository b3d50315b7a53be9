"""Every adapter to a trainer is shown to be right by the same checks, and the docs say which test shows what."""

import ast
import re

import pytest
import torch
from places import ROOT, TESTS
from trainers.conformance import (
    Oracle,
    Scored,
    check_gap,
    check_identical,
    check_live,
    check_refused,
    check_replayed,
    distance,
    plain_model,
    rows_of,
)

import r3

SUITE = TESTS / "trainers" / "conformance.py"
CHECKS = [node.name for node in ast.parse(SUITE.read_text()).body if getattr(node, "name", "").startswith("check_")]
FOLDERS_OF_HOOKS = sorted(path.parent.name for path in (ROOT / "trainer_hooks").glob("*/__init__.py"))
ADAPTERS = [name for name in FOLDERS_OF_HOOKS if name != "ray"]  # there r3's own trainer runs
FOLDERS = {adapter: TESTS / "trainers" / adapter.removeprefix("ms_") for adapter in ADAPTERS}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_makes_every_check(adapter: str, check: str):
    called = {
        node.func.id
        for path in FOLDERS[adapter].glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert check in called, f"tests of {adapter}: no call of {check} of tests/trainers/conformance.py"


def test_the_tests_that_the_docs_name_are_there():
    text = (ROOT / "docs" / "how-to" / "your-trainer.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", text)
    assert len(named) >= len(CHECKS) * len(ADAPTERS)
    defined = {
        (path.name, node.name)
        for folder in FOLDERS.values()
        for path in folder.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert set(named) <= defined, set(named) - defined


GOOD = Scored(replayed=1e-6, live=1.0, sequences=2)
NAN = float("nan")


@pytest.mark.parametrize(
    "forwards",
    [
        [],
        [Scored(replayed=1e-6, live=1.0, sequences=2, in_loss=False)],
        [Scored(replayed=1e-6, live=1.0)],
        [GOOD, Scored(replayed=2e-5, live=1.0, sequences=1)],
        [GOOD, Scored(replayed=NAN, live=1.0, sequences=1)],
        [Scored(replayed=1e-6, live=1.0, sequences=2, in_loss=False), Scored(replayed=1e-6, live=1e-4, sequences=1)],
    ],
    ids=["no forward", "not in a loss", "no sequence", "not exact", "no rows", "a live loss would pass"],
)
def test_a_policy_that_is_not_replayed_fails(forwards):
    check_replayed([GOOD, Scored(replayed=1.0, live=0.0, sequences=1, reference=True)])
    with pytest.raises(AssertionError):
        check_replayed(forwards)


@pytest.mark.parametrize("forward", [GOOD, Scored(), Scored(replayed=0.0, live=0.0, sequences=1)])
def test_a_reference_that_may_be_replayed_fails(forward):
    check_live([Scored(replayed=1.0, live=1e-6, sequences=1), Scored(replayed=NAN, live=1e-6, sequences=1)])
    with pytest.raises(AssertionError):
        check_live([forward])


def test_a_gap_that_stays_fails():
    check_gap(0.3, 1.0)
    for own in (0.4, 0.0, NAN):
        with pytest.raises(AssertionError):
            check_gap(own, 1.0)


def test_a_run_that_differs_by_a_bit_fails():
    one = torch.ones(3)
    run = lambda last, loss=0.5: ([{"loss": loss}], {"w": torch.cat([one, last])})
    check_identical(run(one), run(one))
    for other in (run(torch.nextafter(one, 2 * one)), run(one, 0.25), run(one[:2])):
        with pytest.raises(AssertionError):
            check_identical(run(one), other)


def test_a_refusal_without_its_cure_fails():
    with pytest.raises(AssertionError), check_refused("use_vllm=False", "Set use_vllm=True"):
        raise r3.ConfigError("use_vllm=False: completions come without experts")


def test_rows_of_other_tokens_are_far_from_the_oracle():
    """As far as no routing: one row that is put beside the next token is seen."""
    ids = list(range(20, 40))
    rows = rows_of(ids)[:-1]
    shifted = rows.clone()
    shifted[7] = rows[8]
    mine, other = (
        Oracle(plain_model(), {tuple(ids): each}).logprobs(ids, replayed=True).detach() for each in (rows, shifted)
    )
    assert distance(other[7:], mine[7:]) > 1e-2
    assert distance(other[:7], mine[:7]) < 1e-5
    assert distance(torch.tensor([NAN, -1.0]), torch.tensor([-1.0, -1.0])) > 1
