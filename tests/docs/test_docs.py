"""The documentation keeps its word: each Python snippet and each doctest runs as printed, and no link is broken.

A page's snippets run from its first line to its last in one namespace, in a folder with `examples/` in it. Pages that
start an engine share the tests' one. A snippet that cannot run here (two GPUs, a server elsewhere) stands under
`<!-- skip: next "why" -->`.
"""

import contextlib
import os
import re
import unittest
from doctest import IGNORE_EXCEPTION_DETAIL
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from places import ROOT
from sybil import Document
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
SNIPPETS = [page for page in PAGES if "```python\n" in page.read_text()]
MODULES = [path for folder in ("r3", "trainer_hooks") for path in sorted((ROOT / folder).rglob("*.py"))]
DOCTESTS = [path for path in MODULES if ">>> " in path.read_text()]
ENGINE = re.compile(r"^(import vllm|from vllm import)|>>> .*\bllm\b", re.MULTILINE)


def cases(paths: list[Path]) -> list[Any]:
    """A case for each file; those that start or use an engine are marked."""
    return [
        pytest.param(path, id=str(path.relative_to(ROOT)), marks=[pytest.mark.engine] * starts_engine(path))
        for path in paths
    ]


def starts_engine(path: Path) -> bool:
    return ENGINE.search(path.read_text()) is not None


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """What snippets write is thrown away; the demo's model is where the pages say."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    yield
    if dist.is_initialized():  # of a snippet that failed in the middle
        dist.destroy_process_group()


@pytest.fixture
def names(request, monkeypatch):
    """What `vllm.LLM(...)` in a page starts is the engine of the tests, which gets its weights back at the end.

    Doctests may use it as `llm`, and the trainer's model as `model`.
    """
    if not starts_engine(request.node.callspec.params["path"]):
        yield {}
        return
    import vllm
    from transformers import AutoModelForCausalLM

    from r3.capture import engine_kwargs
    from r3.weight_sync import WeightSync

    engine, weights = request.getfixturevalue("engine"), request.getfixturevalue("weights")
    request.getfixturevalue("reference")  # taken before anything is synced
    expected = engine_kwargs(request.getfixturevalue("demo_config"))

    def started(**kwargs: Any) -> vllm.LLM:
        assert kwargs | {"model": os.path.realpath(kwargs["model"])} == expected, "one engine is shared by all pages"
        return engine

    monkeypatch.setattr(vllm, "LLM", started)
    yield {"llm": engine, "model": AutoModelForCausalLM.from_pretrained(expected["model"])}
    with contextlib.closing(WeightSync(engine)) as sync:
        sync.push(weights.items(), version=(sync.version or 0) + 1)


def run(document: Document, names: dict[str, Any]) -> None:
    document.namespace.update(names, __name__="__main__")
    for example in document.examples():
        with contextlib.suppress(unittest.SkipTest):
            example.evaluate()


@pytest.mark.parametrize("path", cases(SNIPPETS))
def test_snippets_run_as_printed(path, names):
    run(Document.parse(str(path), PythonCodeBlockParser(), SkipParser()), names)


@pytest.mark.parametrize("path", cases(DOCTESTS))
def test_doctests_run(path, names):
    run(PythonDocStringDocument.parse(str(path), DocTestParser(IGNORE_EXCEPTION_DETAIL)), names)


def test_no_doctest_is_skipped():
    skipped = [str(path.relative_to(ROOT)) for path in MODULES if "doctest: +SKIP" in path.read_text()]
    assert not skipped
