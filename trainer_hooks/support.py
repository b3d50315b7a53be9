"""What each trainer's hook relies on and what it refuses: checked at start, with the reason and the cure."""

import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from r3.errors import ConfigError, summary
from r3.releases import unseen

logger = logging.getLogger("r3")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A setting of a trainer with which its hook would be wrong.

    Attributes:
        setting: by the trainer's own name.
        why: what would go wrong.
        cure: what to do instead.
        found: whether an object of the trainer (its own type: trainer, engine, configuration) has it.
    """

    setting: str
    why: str
    cure: str
    found: Callable[[Any], bool]


def require_supported(trainer: str, refusals: Iterable[Refusal], subject: Any) -> None:
    """Raise for every one of `refusals` that `subject`, an object of `trainer`'s, has.

    Raises:
        ConfigError: names the settings, why each is refused, and what to do instead.
    """
    found = [f"{each.setting}: {each.why}. {each.cure}" for each in refusals if each.found(subject)]
    if found:
        raise ConfigError(f"routing replay in {trainer}:{summary(found)}")


@dataclass(frozen=True, kw_only=True)
class Seam:
    """A function or class of a trainer that a hook calls, replaces or overrides.

    Attributes:
        where: dotted name, for messages.
        target: the function, or None if the trainer has it no more.
        parameters: parameters that it must have, in this order at its beginning (`self` left out).
    """

    where: str
    target: Any
    parameters: Sequence[str] = ()


def require_seams(package: str, tested: str, seams: Iterable[Seam]) -> None:
    """Raise unless the installed trainer has all `seams`; warn if it is a release that was not tested.

    Args:
        package: name of its distribution.
        tested: the versions with which the hook was tested, as a text.
        seams: what the hook relies on.

    Raises:
        ConfigError: names what is missing or has other parameters.
    """
    problems = []
    seams = list(seams)
    for seam in seams:
        if seam.target is None:
            problems.append(f"{seam.where}: not there")
            continue
        if not seam.parameters:
            continue
        got = [name for name in inspect.signature(seam.target).parameters if name != "self"]
        if got[: len(seam.parameters)] != list(seam.parameters):
            problems.append(f"{seam.where}: expected parameters {', '.join(seam.parameters)}, got {', '.join(got)}")
    if problems:
        raise ConfigError(
            f"{package} {installed_version(package)}: it has moved from what r3's hook relies on (tested with "
            f"{tested}). Install one of these, or turn replay off:{summary(problems)}"
        )
    if str(version := installed_version(package)) != tested:
        checked = f"the {len(seams)} functions that r3's hook relies on are there, and take what they took"
        logger.warning("%s", unseen(package, str(version), tested, checked=checked, unknown="what they do now"))


def installed_version(package: str) -> Version | None:
    """Version of an installed distribution, None if there is none."""
    try:
        return Version(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None
