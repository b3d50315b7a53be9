"""What the code must say in one place only: names by which others find parts of r3, and those that others choose."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from places import ROOT
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from r3 import entry_points
from r3.wrappers import CHECKPOINTED, COMPILED, WRAPPERS, own_path

SOURCES = sorted(path for top in ("r3", "trainer_hooks") for path in (ROOT / top).rglob("*.py"))


def strings(tree: ast.AST) -> Iterator[str]:
    """All string literals but docstrings and other strings that stand alone."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


def is_class_path(text: str) -> bool:
    """Whether `text` is `package.module.name` of a module of ours."""
    parts = text.split(".")
    home = ROOT.joinpath(*parts[:-1]).with_suffix(".py")
    return len(parts) > 2 and parts[0] in ("r3", "trainer_hooks") and text.isprintable() and home.is_file()


def homes_of(chosen) -> dict[str, list[str]]:
    """The files that hold each literal which `chosen` accepts."""
    found = defaultdict(list)
    for path in SOURCES:
        for text in strings(ast.parse(path.read_text())):
            if chosen(text):
                found[text].append(str(path.relative_to(ROOT)))
    return found


def test_names_that_vllm_loads_are_literals_in_one_module():
    found = homes_of(is_class_path)
    assert found, "expected the names of r3/entry_points.py"
    assert {text: files for text, files in found.items() if files != ["r3/entry_points.py"]} == {}


def test_names_of_wrappers_are_literals_in_one_module():
    found = homes_of(lambda text: text.strip(".") in WRAPPERS)
    assert found == {text: ["r3/wrappers.py"] for text in WRAPPERS}


def test_only_one_module_opens_urls():
    homes = [str(path.relative_to(ROOT)) for path in SOURCES if "urllib.request.Request(" in path.read_text()]
    assert homes == ["r3/http.py"]


def test_only_one_module_strips_the_class_of_fsdp():
    homes = [str(path.relative_to(ROOT)) for path in SOURCES if "not issubclass(cls, FSDPModule)" in path.read_text()]
    assert homes == ["r3/wrappers.py"]


@pytest.mark.parametrize("name", [name for name in vars(entry_points) if name.isupper()])
def test_names_that_vllm_loads_exist(name: str):
    module, _, attribute = getattr(entry_points, name).rpartition(".")
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text()).body
    defined = [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    exported = [alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert attribute in [*defined, *exported]


def test_wrappers_are_named_as_torch_names_them():
    bare = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 2)))
    checkpointed = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))
    assert f"{COMPILED}.0.weight" in compiled.state_dict()
    assert CHECKPOINTED in dict(checkpointed[0].named_children())
    names = [name for name, _ in bare.named_parameters()]
    for wrapped in (compiled, checkpointed):
        assert [own_path(name) for name, _ in wrapped.named_parameters()] == names
    assert own_path("a._fsdp_wrapped_module.b") == "a.b"
