"""Every adapter to a trainer is shown to be right by the same checks, and the docs say which test shows what."""

import ast
import re

import pytest
from places import ROOT, TESTS

SUITE = TESTS / "trainers" / "conformance.py"
CHECKS = [node.name for node in ast.parse(SUITE.read_text()).body if getattr(node, "name", "").startswith("check_")]
ADAPTERS = sorted(path.parent.name for path in (ROOT / "trainer_hooks").glob("*/__init__.py"))
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
