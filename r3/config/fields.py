"""What each setting says of itself, as metadata of its dataclass field: meaning, unit, range; and the check of it."""

import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

_KEY = "r3"

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Range:
    """Which values a setting takes.

    Attributes:
        words: after "expected" in an error.
        accepts: of a value of the setting's type. None, where the type has it, is taken unasked.
    """

    words: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class About:
    """What a setting says of itself.

    Attributes:
        meaning: for people.
        unit: of a number: "s", "tokens", "nats per token". Empty for others.
        range: what it takes.
    """

    meaning: str
    unit: str
    range: Range


def at_least(least: float) -> Range:
    return Range(f"{least:g} or more", lambda value: least <= value < math.inf)


def above(bound: float) -> Range:
    return Range(f"a value above {bound:g}", lambda value: bound < value < math.inf)


def between(least: float, most: float) -> Range:
    return Range(f"{least:.10g} to {most:.10g}", lambda value: least <= value <= most)


def share(*, zero: bool) -> Range:
    """A part of a whole; `zero` says whether none of it is one."""
    return between(0, 1) if zero else Range("above 0, at most 1", lambda value: 0 < value <= 1)


def one_of(names: Sequence[str]) -> Range:
    return Range(f"one of {', '.join(names)}", lambda value: value in names)


def any_of(names: Sequence[str]) -> Range:
    """A list of some of `names`."""
    return Range(
        f"any of {', '.join(names)}, each once",
        lambda value: all(item in names for item in value) and len(set(value)) == len(value),
    )


SWITCH = Range("true or false", lambda value: True)
NAME = Range("a name", lambda value: bool(value.strip()) and value.isprintable())
PATH = Range("a path, or '' for none", lambda value: "\0" not in value)
HOST = Range("a host name or address, or '' for none", lambda value: not set(value) & set("/ \t\n\0"))
ADDRESSES = Range(
    "addresses, http://host:port, each once",
    lambda value: all(item.startswith(("http://", "https://")) for item in value) and len(set(value)) == len(value),
)
OPEN = Range("settings by name", lambda value: all(isinstance(name, str) and name for name in value))


def setting(default: Any, meaning: str, values: Range = SWITCH, *, unit: str = "") -> Any:
    """A field with its default, what it means, and which values it takes: `OPEN`, `SWITCH` or one with bounds."""
    metadata = {_KEY: About(meaning, unit, values)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def about(item: Field) -> About:
    """What the field of a setting says of itself."""
    return item.metadata[_KEY]


def part(cls: type) -> Any:
    """A field with further settings."""
    return field(default_factory=cls)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting among those of `R3Config`.

    Attributes:
        key: dotted name.
        kind: its type, in words.
        default: built in.
        about: meaning, unit and range.
    """

    key: str
    kind: str
    default: Any
    about: About

    @property
    def expected(self) -> str:
        return self.about.range.words + (", or null for none" if self.kind.endswith("or null") else "")


def settings_of(cls: type, prefix: str = "") -> Iterator[Setting]:
    """All settings under the dataclass `cls`, in order."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        key = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            yield from settings_of(hints[item.name], f"{key}.")
            continue
        default = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc]
        yield Setting(key=key, kind=_kind(hints[item.name]), default=default, about=about(item))


def problems_of(node: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """What each value of the dataclass `node` should be and is not, and whether its type is wrong."""
    hints = get_type_hints(type(node))
    for item in fields(node):
        key, value = f"{prefix}{item.name}", getattr(node, item.name)
        if is_dataclass(hints[item.name]):
            if isinstance(value, hints[item.name]):
                yield from problems_of(value, f"{key}.")
            else:
                yield f"{key}: expected {hints[item.name].__name__}, got {value!r}", True
            continue
        kind = _kind(hints[item.name])
        fits = _is(value, hints[item.name])
        if not fits or (value is not None and not about(item).range.accepts(value)):
            known = Setting(key=key, kind=kind, default=None, about=about(item))
            yield f"{key}: expected {known.expected if fits else f'{kind}, {known.expected}'}, got {value!r}", not fits


def _is(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is(item, get_args(hint)[0]) for item in value)
    return isinstance(value, get_origin(hint) or hint)


_KINDS = {bool: "a switch", int: "an integer", float: "a number", str: "text", dict: "a dictionary", type(None): "null"}


def _kind(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_kind(option) for option in get_args(hint))
    if get_origin(hint) is list:
        return "a list"
    return _KINDS[get_origin(hint) or hint]
