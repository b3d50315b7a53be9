"""What pyproject.toml says of the package, and what others say of it.

All that is imported is declared, and nobody is told to install `r3`, which on the public index is another project.
"""

import ast
import re
import sys
from collections.abc import Iterator

import pytest
from places import ROOT

from r3.doctor.vllm_build import INSTALL_VLLM
from r3.releases import TESTED

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

OTHER_NAMES = {"yaml": "pyyaml", "swift": "ms-swift"}
"""Module -> distribution, where they differ by more than a hyphen."""
NEVER_NEEDED = {
    "torchvision": "doctor looks whether one that is there fits torch",
    "triton": "comes with torch's builds for GPUs, and is imported on a GPU only",
}

FOLDERS = ("r3", "trainer_hooks", "examples", "scripts", "docs", "benchmarks", ".ci")
TEXTS = sorted(
    path
    for pattern in ("*", *(f"{folder}/**/*" for folder in FOLDERS))
    for path in ROOT.glob(pattern)
    if path.is_file() and path.suffix in ("", ".md", ".py", ".toml", ".txt")
)
TOLD = (
    re.compile(r"\b(?:pip3?|pipx|uv|poetry|conda|mamba)\b[^\n]*\b(?:install|add)\b[^\n]*?(?<![\w./-])r3(?![\w./-])"),
    re.compile(r"(?<![\w./-])r3\[[\w$,{}-]+\](?!\()"),
    re.compile(r"\b(?:version|distribution|metadata|requires|files)\(['\"]r3['\"]"),
)
"""A command that installs r3, an extra of r3, and a question to the environment for the distribution r3."""


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


def told_to_install_r3(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if any(pattern.search(line) for pattern in TOLD)]


def test_nobody_is_told_to_install_a_distribution_called_r3():
    assert PROJECT["name"] != "r3"
    assert len(TEXTS) > 200
    found = {str(path.relative_to(ROOT)): lines for path in TEXTS if (lines := told_to_install_r3(path.read_text()))}
    assert not found, f"the name r3 belongs to another project on the public index: {found}"


@pytest.mark.parametrize(
    "text",
    [
        "pip install r3",
        "remedy=\"pip install 'r3[gpu]', or 'r3[cpu]' without a GPU\"",
        "`uv pip install --upgrade r3==0.1.0`",
        "uv add r3",
        "The libraries are extras (`r3[sinks]`)",
        'version("r3")',
    ],
)
def test_advice_to_install_r3_is_seen(text: str):
    assert told_to_install_r3(text)


@pytest.mark.parametrize(
    "text",
    ["pip install -e .", "pip install 'vllm>=0.22'  # then run r3.attach", "uv pip install -e ~/src/r3/"],
)
def test_other_advice_is_not_taken_for_it(text: str):
    assert not told_to_install_r3(text)


def test_doctor_names_the_versions_that_are_declared():
    # Without the upper bounds that a known break has set.
    lines = {line.split(",")[0] for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gpu"]]}
    assert {f"{name}>={TESTED[name].first}" for name in ("torch", "transformers", "vllm")} <= lines
    assert PROJECT["requires-python"] == f">={TESTED['python'].first}"
    assert f"pip install 'vllm>={TESTED['vllm'].first}'" in INSTALL_VLLM
