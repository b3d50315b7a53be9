"""What mkdocs writes into pages when it builds them: the table of all settings, from the code."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

from r3.config import R3Config

MARK = "<!-- the table of all settings -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, settings_table()) if MARK in markdown else markdown


def settings_table() -> str:
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    rows += [f"| `{key}` | `{default}` | {meaning} |" for key, default, meaning in settings(R3Config(), "")]
    return "\n".join(rows)


def settings(part: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    """`(key, default, meaning)` of each setting of a dataclass and of those within it."""
    meanings = documented(type(part))
    for field in fields(part):
        value, key = getattr(part, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from settings(value, f"{key}.")
        else:
            yield key, "null" if value is None else str(value) or "''", meanings.get(field.name, "")


def documented(cls: type) -> dict[str, str]:
    """The docstrings under the fields of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # pyrefly: ignore
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
