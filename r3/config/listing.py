"""All settings as text: as they are given, and as a table for people."""

from collections.abc import Iterator
from typing import Any

from r3.config.fields import Setting, settings_of
from r3.config.run_config import R3Config


def as_text(value: Any) -> str:
    """A value as `key=value` takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(as_text, value))}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else "''"


def settings_lines(config: R3Config) -> Iterator[str]:
    """`key=value  # meaning`, one line for each setting of `config`."""
    known = {item.key: item for item in settings_of(R3Config)}
    pairs = {key: f"{key}={as_text(value)}" for key, value in config.to_flat().items()}
    width = max(map(len, (pair for pair in pairs.values() if len(pair) <= 88)))
    for key, pair in pairs.items():
        meant = known.get(key)
        yield f"{pair:{width}}  # {_sentence(meant)}" if meant else pair


def settings_table() -> str:
    """A Markdown table of all settings with their built-in defaults."""
    rows = [("Setting", "Default", "Unit or kind", "Values", "Meaning"), ("---",) * 5]
    rows += [
        (
            f"`{item.key}`",
            f"`{as_text(item.default)}`",
            item.about.unit or item.kind.removeprefix("a "),
            item.expected,
            item.about.meaning,
        )
        for item in settings_of(R3Config)
    ]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _sentence(item: Setting) -> str:
    unit = f"{item.about.unit}, " if item.about.unit else ""
    return f"{unit}{item.expected}. {item.about.meaning}"
