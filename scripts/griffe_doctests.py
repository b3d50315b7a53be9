"""Doctests in docstrings, as code: the Markdown of the API pages would take `>>>` for three quotations."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^(?P<indent> *)>>> .*\n?(?:(?P=indent)\S.*\n?|(?P=indent)\.\.\..*\n?)*", re.MULTILINE)


class Doctests(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(fenced, obj.docstring.value)


def fenced(block: re.Match[str]) -> str:
    return f"{block['indent']}```pycon\n{block[0].rstrip()}\n{block['indent']}```\n"
