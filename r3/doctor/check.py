"""`Check`, the result of one check, and `guarded`, which runs code that may raise anything."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from r3.errors import R3Error

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check.

    Attributes:
        name: name of what was checked.
        status: "problem" if a run would fail or be wrong.
        detail: the finding.
        remedy: what to do; empty if nothing is wrong.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def guarded(name: str, check: Callable[[], Check | None]) -> Iterator[Check]:
    """The check's result. An exception becomes a problem: checks run foreign code, which may raise anything."""
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
