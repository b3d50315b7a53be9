"""The layers of the project: who may import whom, who reads the environment, who prints.

Checked on the source, so that a late import inside a function counts like any other. A module named in a plain
string (vLLM's `worker_extension_cls`) is no import; one named in `import_module("...")` is.
"""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

# What each part of r3 may import of r3, besides itself. A new part needs a line here.
BOTTOM = {
    "config",
    "engine_value",
    "entry_points",
    "errors",
    "float32_weights",
    "http",
    "own_methods",
    "proxy",
    "releases",
    "sampling_mask",
    "vllm_compat",
    "wrappers",
}
MIDDLE = {"capture", "diagnostics", "experts", "parallel", "replay", "weight_sync"}
MAY_IMPORT = {
    "errors": set(),
    "engine_value": set(),
    "entry_points": set(),
    "releases": set(),
    "sampling_mask": {"errors"},
    "float32_weights": set(),
    "own_methods": set(),
    "wrappers": set(),
    "config": {"errors"},
    "proxy": {"config", "errors"},
    "http": {"proxy"},
    "vllm_compat": {"config", "errors", "releases"},
    "routing": BOTTOM,
    **{part: BOTTOM | {"routing"} for part in MIDDLE},
    "numerics": BOTTOM | {"parallel"},
    "pool": BOTTOM | {"routing", "capture", "weight_sync"},
    "report": BOTTOM | {"diagnostics"},
    "doctor": BOTTOM | MIDDLE | {"routing"},
    "explain": BOTTOM | MIDDLE | {"routing"},
    "cli": BOTTOM | MIDDLE | {"routing", "doctor", "explain", "report"},
    "__main__": {"cli"},
}
# Within a part: what runs in one process, and must not import what runs in the other.
APART = {
    # The sender runs in the trainer, the worker inside vLLM. Both import what they share: the protocol, transports...
    "r3.weight_sync.worker": (
        "r3.weight_sync.sender",
        "r3.weight_sync.engines",
        "r3.weight_sync.weights",
        "r3.weight_sync.quantization",
    ),
    "r3.weight_sync.sender": ("r3.weight_sync.worker",),
    "r3.weight_sync.engines": ("r3.weight_sync.worker", "r3.weight_sync.sender"),
    "r3.weight_sync.weights": ("r3.weight_sync.worker", "r3.weight_sync.sender", "r3.weight_sync.engines"),
    "r3.weight_sync.quantization": ("r3.weight_sync.worker", "r3.weight_sync.sender", "r3.weight_sync.engines"),
    "r3.weight_sync.transports": (
        "r3.weight_sync.worker",
        "r3.weight_sync.sender",
        "r3.weight_sync.engines",
        "r3.weight_sync.weights",
    ),
    "r3.weight_sync.integrity": ("r3.weight_sync.worker", "r3.weight_sync.sender", "r3.weight_sync.engines"),
}
ABOVE = {"trainer_hooks", "examples", "tests", "benchmarks"}

HEAVY = ("vllm", "transformers", "matplotlib", "rich")


def part_of(module: str) -> str:
    """`r3.replay.hooks` -> `replay`; the package itself, or a name that it defines -> `` (empty)."""
    part = module.partition(".")[2].partition(".")[0]
    return part if part in MAY_IMPORT else ""


def is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def public_names(init_source: str) -> dict[str, str]:
    """Where each name that `r3/__init__.py` exports lazily really lives."""
    return {
        alias.asname or alias.name: node.module
        for node in ast.walk(ast.parse(init_source))
        if isinstance(node, ast.ImportFrom) and node.module not in (None, "r3") and not node.level
        for alias in node.names
    }


def imports(tree: ast.AST, package: str, exports: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import; `from r3 import X` counts as an import of X's home."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package.split(".")[: len(package.split(".")) + 1 - level] if level else []
                origin = ".".join([*parents, *([module] if module else [])])
                if origin != "r3":
                    yield node.lineno, origin
                else:
                    yield from ((node.lineno, exports.get(alias.name, f"r3.{alias.name}")) for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def import_violations(tree: ast.AST, module: str, package: str, exports: dict[str, str]) -> Iterator[tuple[int, str]]:
    if module == "r3":
        allowed = set(MAY_IMPORT)  # the lazy exports
    elif not part_of(module):
        yield 1, f"{module} is in no layer: give it a line in MAY_IMPORT"
        return
    else:
        allowed = MAY_IMPORT[part_of(module)] | {part_of(module)}
    for line, target in imports(tree, package, exports):
        top = target.partition(".")[0]
        if top in ABOVE:
            yield line, f"{module} imports {target}: r3 never imports {top}"
        elif target == "r3" and module != "r3":
            yield line, f"{module} imports the whole of r3: import from the module that defines the name"
        elif top == "r3" and part_of(target) and part_of(target) not in allowed:
            permitted = ", ".join(sorted(allowed - {part_of(module)})) or "nothing of r3"
            yield line, f"{module} imports {target}: {part_of(module)} may import {permitted}"
        for side, others in APART.items():
            if is_in(module, side) and any(is_in(target, other) for other in others):
                yield line, f"{module} imports {target}: {side} runs without it"


def environment_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Reads of the environment; `os.environ[name] = value`, for a child process, is none."""
    written = set()
    for node in ast.walk(tree):  # a parent comes before its children
        match node:
            case ast.Subscript(value=target, ctx=ast.Store() | ast.Del()):
                written.add(target)
            case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "environb" | "getenv" | "getenvb" as name):
                if node not in written:
                    yield node.lineno, f"os.{name}: only r3/config reads the environment"
            case ast.ImportFrom(module="os", names=names):
                for alias in names:
                    if alias.name.startswith(("environ", "getenv")):
                        yield node.lineno, f"from os import {alias.name}: only r3/config reads the environment"
            case ast.Import(names=names):
                for alias in names:
                    if alias.name == "os" and alias.asname:
                        yield node.lineno, "os under another name hides reads of the environment"


def prints(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "print":
            yield node.lineno, "print: only the command line prints, a library logs"


def violations(source: str, path: Path, exports: dict[str, str]) -> list[str]:
    """What the file `path`, relative to the project root, does against the rules, as `file:line: what`."""
    tree = ast.parse(source, str(path))
    parts = path.with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    package = ".".join(parts[:-1])
    found: list[tuple[int, str]] = []
    if parts[0] == "r3":
        found += import_violations(tree, module, package, exports)
        if part_of(module) != "config":
            found += environment_uses(tree)
    if part_of(module) != "cli":
        found += prints(tree)
    return [f"{path}:{line}: {what}" for line, what in sorted(found)]


def test_sources_keep_to_their_layers():
    exports = public_names((ROOT / "r3/__init__.py").read_text())
    files = sorted(path for top in ("r3", "trainer_hooks") for path in (ROOT / top).rglob("*.py"))
    assert len(files) > 5, f"expected the sources under {ROOT}, found only {files}"
    found = [line for path in files for line in violations(path.read_text(), path.relative_to(ROOT), exports)]
    assert not found, "\n" + "\n".join(found)


def imports_of_modules() -> dict[str, set[str]]:
    """By module, which modules of the project it imports, also late or for types alone; no package's `__init__`."""
    exports = public_names((ROOT / "r3/__init__.py").read_text())
    files = [path.relative_to(ROOT) for top in ("r3", "trainer_hooks") for path in (ROOT / top).rglob("*.py")]
    modules = {".".join(path.with_suffix("").parts): path for path in files if path.stem != "__init__"}
    return {
        name: {
            target
            for _, target in imports(ast.parse((ROOT / path).read_text()), name.rpartition(".")[0], exports)
            if target in modules
        }
        for name, path in modules.items()
    }


def test_no_modules_import_each_other():
    graph = imports_of_modules()
    assert {"r3.routing.spec", "r3.routing.wire"} <= graph["r3.routing.types"]
    TopologicalSorter(graph).prepare()  # CycleError names the modules
    graph["r3.routing.spec"].add("r3.routing.types")
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("use", ["import r3", "import r3; r3.RolloutRouting"])
def test_import_is_light(use: str):
    script = f"import sys; {use}; print(*sorted({set(HEAVY)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"`{use}` loads packages that must be imported late"


BAD = {
    "r3/errors.py": ("from r3.config import R3Config", "errors may import nothing of r3"),
    "r3/routing/types.py": (
        "import r3.diagnostics.metrics as metrics",
        "routing may import config, engine_value, entry_points, errors",
    ),
    "r3/replay/hooks.py": ("def f():\n    from r3.weight_sync import WeightSync", "replay may import"),
    "r3/weight_sync/worker/a.py": ("from ...replay import attach", "imports r3.replay"),
    "r3/weight_sync/worker/b.py": ("from r3.weight_sync.sender.session import WeightSync", "runs without it"),
    "r3/weight_sync/sender/a.py": ("def f():\n    import r3.weight_sync.worker", "runs without it"),
    "r3/vllm_compat/a.py": ("from r3.capture import collect", "vllm_compat may import"),
    "r3/parallel/__init__.py": ("from .. import capture", "imports r3.capture"),
    "r3/capture/outputs.py": ("from r3 import attach", "imports r3.replay"),
    "r3/report/run_report.py": ("import importlib\nimportlib.import_module('r3.cli')", "imports r3.cli"),
    "r3/diagnostics/sinks.py": ("import r3", "imports the whole of r3"),
    "r3/__init__.py": ("from trainer_hooks import grpo", "r3 never imports trainer_hooks"),
    "r3/cli.py": ("import trainer_hooks.grpo", "r3 never imports trainer_hooks"),
    "r3/helpers.py": ("x = 1", "is in no layer"),
    "r3/replay/a.py": ("import os\nx = os.environ.get('X')", "os.environ"),
    "r3/replay/b.py": ("import os\nx = os.getenv('X')", "os.getenv"),
    "r3/replay/c.py": ("from os import environ", "from os import environ"),
    "r3/replay/d.py": ("import os as system", "another name"),
    "r3/replay/e.py": ("print('here')", "print"),
    "trainer_hooks/grpo.py": ("print('here')", "print"),
}

GOOD = {
    "r3/__init__.py": "from r3.replay import attach\nfrom r3.weight_sync import WeightSync",
    "r3/config/environment.py": "import os\nfrom r3.errors import ConfigError\nx = os.environ.get('X')",
    "r3/replay/__init__.py": "from . import hooks\nfrom .hooks import f\nfrom r3 import RolloutRouting, __version__",
    "r3/capture/engine.py": "worker_extension_cls = 'r3.weight_sync.worker.Extension'",
    "r3/weight_sync/launch.py": "import os\nos.environ['X'] = '1'",
    "r3/cli.py": "from r3 import diagnostics, replay\nprint('done')",
    "trainer_hooks/trl.py": "import r3\nfrom r3.replay import attach\nfrom r3.weight_sync import WeightSync",
}

EXPORTS = {"attach": "r3.replay", "RolloutRouting": "r3.routing"}


@pytest.mark.parametrize("path", BAD)
def test_checker_catches(path: str):
    source, message = BAD[path]
    found = violations(source, Path(path), EXPORTS)
    assert len(found) == 1
    assert found[0].startswith(f"{path}:{len(source.splitlines())}: ")
    assert message in found[0]


@pytest.mark.parametrize("path", GOOD)
def test_checker_passes(path: str):
    assert violations(GOOD[path], Path(path), EXPORTS) == []


def test_all_violations_of_a_file_are_shown():
    source = textwrap.dedent("""
        import os
        from r3.capture import collect
        from r3.cli import main

        print(os.environ["X"])
    """)
    lines = [found.split(":")[1] for found in violations(source, Path("r3/replay/hooks.py"), EXPORTS)]
    assert lines == ["3", "4", "6", "6"]
