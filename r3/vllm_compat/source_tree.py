"""What a package's source defines, read and not run: classes, functions, attributes and parameters."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_DEPTH = 24  # names that stand for names; beyond it they go in a circle


class Found(NamedTuple):
    """A name's definition. `node` is None for a module itself."""

    module: str
    node: ast.AST | None


class SourceTree:
    """The Python files below a folder.

    Args:
        root: the folder that holds the package, as `site-packages` does.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._parsed = functools.cache(self._parse)

    def has_module(self, module: str) -> bool:
        return self._file(module) is not None

    def find(self, place: str) -> Found | None:
        """What `module:Name.attribute` is, or None. Imported names and base classes are followed."""
        module, _, names = place.partition(":")
        if not names:
            return Found(module, None) if self.has_module(module) else None
        first, *rest = names.split(".")
        found = self._in_module(module, first, _DEPTH)
        for name in rest:
            if found is None:
                return None
            found = self._in_class(found, name, _DEPTH)
        return found

    def parameters(self, found: Found) -> list[str] | None:
        """Names that a function takes, or a class's constructor; None where it takes any.

        A class without a constructor of its own takes its annotated fields, as dataclasses do.
        """
        node = found.node
        if isinstance(node, ast.ClassDef):
            made = self._in_class(found, "__init__", _DEPTH)
            if made is None:
                return [item.target.id for item in node.body if _is_field(item)]  # type: ignore[attr-defined]
            node = made.node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return None
        taken = node.args
        if taken.kwarg is not None or taken.vararg is not None:
            return None
        return [arg.arg for arg in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)]

    def _file(self, module: str) -> Path | None:
        path = self.root.joinpath(*module.split("."))
        return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)

    def _parse(self, module: str) -> list[ast.stmt]:
        file = self._file(module)
        return [] if file is None else list(_statements(ast.parse(file.read_bytes()).body))

    def _in_module(self, module: str, name: str, depth: int) -> Found | None:
        if not depth:
            return None
        for item in self._parsed(module):
            if isinstance(item, ast.ImportFrom):
                for alias in item.names:
                    if (alias.asname or alias.name) == name:
                        return self._imported(module, item, alias.name, depth - 1)
                    if alias.name == "*" and (found := self._in_module(self._source(module, item), name, depth - 1)):
                        return found
            elif name in _bound(item):
                return Found(module, item)
        return Found(f"{module}.{name}", None) if self.has_module(f"{module}.{name}") else None

    def _source(self, module: str, item: ast.ImportFrom) -> str:
        """The module that `item`, in `module`, imports from."""
        if not item.level:
            return item.module or ""
        file = self._file(module)
        package = module.split(".") if file is not None and file.name == "__init__.py" else module.split(".")[:-1]
        return ".".join([*package[: len(package) - item.level + 1], *filter(None, [item.module])])

    def _imported(self, module: str, item: ast.ImportFrom, name: str, depth: int) -> Found | None:
        source = self._source(module, item)
        found = self._in_module(source, name, depth)
        # A name of another package can be followed no further.
        return found if found is not None or self.has_module(source) else Found(source, item)

    def _in_class(self, found: Found, name: str, depth: int) -> Found | None:
        if found.node is None:
            return self._in_module(found.module, name, depth)
        if not isinstance(found.node, ast.ClassDef) or not depth:
            return None
        for item in _statements(found.node.body):
            if name in _bound(item):
                return Found(found.module, item)
        for node in ast.walk(found.node):
            if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Store):
                return Found(found.module, node)
        for base in found.node.bases:
            if isinstance(base, ast.Name):
                of_base = self._in_module(found.module, base.id, depth - 1)
                inherited = None if of_base is None else self._in_class(of_base, name, depth - 1)
                if inherited is not None:
                    return inherited
        return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or class, also those under `if`, `try` and `with`."""
    for item in body:
        yield item
        for field in ("body", "orelse", "finalbody"):
            if not isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _statements(getattr(item, field, []))
        for handler in getattr(item, "handlers", []):
            yield from _statements(handler.body)


def _bound(item: ast.stmt) -> list[str]:
    """Names that a statement defines."""
    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [item.name]
    targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _is_field(item: ast.stmt) -> bool:
    return isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
