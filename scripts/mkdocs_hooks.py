"""What mkdocs writes into pages when it builds them: the table of all settings, from the code."""

from typing import Any

from r3.config import settings_table

MARK = "<!-- the table of all settings -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, settings_table()) if MARK in markdown else markdown
