"""What pyproject.toml says of the package: all that the code imports is declared."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

OTHER_NAMES = {"yaml": "pyyaml"}
"""Module -> distribution, where they differ by more than a hyphen."""
NEVER_NEEDED = {
    "torchvision": "doctor looks whether one that is there fits torch",
    "triton": "comes with torch's builds for GPUs, and is imported on a GPU only",
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    """The distributions that are dependencies, or in an extra for users."""
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for name, lines in extras.items() if name != "dev" for line in lines)]
    return {normal(re.match(r"[\w.-]+", line).group()) for line in lines}


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level modules, late imports included."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.partition(".")[0]
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module.partition(".")[0]


def test_all_that_is_imported_is_a_dependency_or_in_an_extra():
    known = declared()
    ours = {"r3", "trainer_hooks", *sys.stdlib_module_names, *NEVER_NEEDED}
    missing = {
        f"{path.relative_to(ROOT)}: {module}"
        for top in ("r3", "trainer_hooks")
        for path in (ROOT / top).rglob("*.py")
        for module in imported(ast.parse(path.read_text()))
        if module not in ours and normal(OTHER_NAMES.get(module, module)) not in known
    }
    assert not missing, f"imported, and neither among the dependencies nor in an extra: {sorted(missing)}"
