"""What users may rely on: every public name with its signature, as `public_api.txt` has it.

python tests/project/test_public_api.py        # rewrites it: look at the difference, and tell users in CHANGELOG.md
"""

import ast
import dataclasses
import difflib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEPT = Path(__file__).with_name("public_api.txt")
INTERNAL = {"vllm_compat"}
PARTS = sorted({path.parent.name for path in ROOT.glob("r3/*/__init__.py")} - INTERNAL)
MODULES = ["r3", *(f"r3.{part}" for part in PARTS), "trainer_hooks", "trainer_hooks.skyrl"]


def public_names(module: Any) -> list[str]:
    """Those of `__all__`; of a module without, what it defines under a public name."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return sorted(name for name in own if name[0] != "_")


def api() -> Iterator[str]:
    """A line for each public name, and for each public member of a class."""
    for name in MODULES:
        module = import_module(name)
        for public in public_names(module):
            yield from described(f"{name}.{public}", getattr(module, public))


def described(name: str, value: Any) -> Iterator[str]:
    if inspect.ismodule(value):
        yield f"{name}: module"
    elif inspect.isclass(value):
        bases = [base.__name__ for base in value.__bases__ if base is not object]
        made = "" if issubclass(value, BaseException) else signature(value)
        yield f"{name}: class({', '.join(bases)}){made}"
        yield from sorted(line for line in members(name, value))
    elif callable(value) and hasattr(value, "__name__"):
        yield f"{name}{signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def members(name: str, cls: type) -> Iterator[str]:
    """Public methods and properties that the project defines, and the fields of a dataclass."""
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    for attribute in dir(cls):
        home = next(base for base in cls.__mro__ if attribute in vars(base)) if attribute[0] != "_" else None
        if home is None or attribute in fields or not home.__module__.startswith(("r3", "trainer_hooks")):
            continue
        value = inspect.getattr_static(cls, attribute)
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(function):
            kind = type(value).__name__ if function is not value else "method"
            yield f"{name}.{attribute}{signature(function)} [{kind}]"
        else:
            yield f"{name}.{attribute}: {type(value).__name__}"


def signature(value: Any) -> str:
    """The signature without what differs from one Python or process to the next: homes of types, and addresses."""
    try:
        text = str(inspect.signature(value))
    except ValueError:  # of a builtin
        return "(...)"
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)
    return re.sub(r"(: |-> )'([^']+)'", r"\1\2", text)  # annotations that are strings


def test_public_names_and_signatures_are_those_that_were_agreed():
    now, kept = list(api()), KEPT.read_text().splitlines()
    changes = [line for line in difflib.unified_diff(kept, now, "agreed", "now", lineterm="", n=0) if line[:2] != "@@"]
    assert not changes, (
        "the public interface changed. If it was meant to: `python tests/project/test_public_api.py` rewrites "
        "tests/project/public_api.txt, and CHANGELOG.md tells users\n" + "\n".join(changes)
    )


def test_each_public_name_is_there_and_no_other():
    import r3

    assert sorted(r3.__all__) == r3.__all__
    assert [name for name in r3.__all__ if getattr(r3, name, None) is None] == []
    assert set(r3.__all__) <= set(dir(r3))
    for name in ("nothing", "_part", "Attach"):
        assert not hasattr(r3, name)
    assert [part for part in PARTS if part not in r3.__all__] == [], "each part of r3 is reached as r3.part"
    errors = [name for name in vars(import_module("r3.errors")) if name.endswith("Error")]
    assert [name for name in errors if name not in r3.__all__] == [], "each error can be caught as r3.SomeError"


def test_each_name_is_reached_in_a_new_process():
    import r3

    script = f"import r3; [getattr(r3, name) for name in {r3.__all__}]; print(r3.explain.CAUSES[0], r3.doctor.examine)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("routing <function examine"), done.stderr


def test_type_checkers_see_what_is_reached():
    tree = ast.parse((ROOT / "r3/__init__.py").read_text())
    seen = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    import r3

    assert set(r3.__all__) <= seen


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    KEPT.write_text("".join(f"{line}\n" for line in api()))
