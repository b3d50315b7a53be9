"""`Check`, and how one is made of code that may raise anything."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from r3.errors import R3Error

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        status: "problem" is what a run would fail on, or be wrong with.
        detail: what was found.
        remedy: what to do, unless all is well.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def guarded(name: str, check: Callable[[], Check | None]) -> Iterator[Check]:
    """The check's result; what it raises is a problem. Foreign code runs in it, so that it may raise anything."""
    try:
        result = check()
    except R3Error as error:
        yield Check(name=name, status="problem", detail=str(error))
    except Exception as error:
        yield Check(name=name, status="problem", detail=f"{type(error).__name__}: {brief(error)}")
    else:
        if result is not None:
            yield result


def brief(error: Exception) -> str:
    """The first lines of a long message."""
    return "\n".join(str(error).strip().splitlines()[:6])
