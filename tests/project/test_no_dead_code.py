"""Every public function and class is used, tested or documented somewhere besides where it is defined and exported."""

import ast
import re
from collections import Counter
from collections.abc import Iterator

from places import ROOT

FOLDERS = ("r3", "trainer_hooks", "examples", "benchmarks", "tests")
DOCS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def defined(tree: ast.Module) -> Iterator[str]:
    """Public names of functions and classes of a module, and of the methods of its classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


def used(tree: ast.Module) -> Iterator[str]:
    """Names that are read, and the words of all strings but docstrings and those of `__all__`."""
    silent = [node for node in ast.walk(tree) if _is_export(node) or _is_docstring(node)]
    skipped = {id(part) for node in silent for part in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\w+", node.value)


def _is_export(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def overrides(tree: ast.Module) -> set[str]:
    """Methods of classes with a base: a library that knows the base may call them."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.bases]
    return {part.name for node in classes for part in node.body if isinstance(part, ast.FunctionDef)}


def test_nothing_public_is_dead():
    trees = {path: ast.parse(path.read_text()) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    uses = Counter(name for tree in trees.values() for name in used(tree))
    documented = set(re.findall(r"\w+", " ".join(path.read_text() for path in DOCS)))
    dead = {
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in trees.items()
        if path.relative_to(ROOT).parts[0] in ("r3", "trainer_hooks")
        for name in defined(tree)
        if not uses[name] and name not in documented and name not in overrides(tree)
    }
    assert not dead, f"defined, and never used, tested or documented: {sorted(dead)}"
