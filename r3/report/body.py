"""The order of a page: title, what is broken, what it says in words, sections that may fail on their own."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from r3.report import page

logger = logging.getLogger("r3")


class Body(ABC):
    """The body of a page of runs; `problems` are plain sentences, to which sections that fail add theirs."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)

    @abstractmethod
    def title(self) -> str:
        """Plain text."""

    @abstractmethod
    def extent(self) -> str:
        """What the page is of, one plain sentence or two."""

    @abstractmethod
    def head(self) -> str:
        """HTML between the links and the sections."""

    @abstractmethod
    def sections(self) -> Iterable[tuple[str, str, Callable[[], str], bool]]:
        """(id, title, what builds its HTML, whether it is folded); one that builds nothing is left out."""

    def foot(self) -> str:
        """HTML after the sections."""
        return ""

    def html(self) -> str:
        # The sections first: what fails in them is named above them.
        found = [self._section(*section) for section in self.sections()]
        shown = [(name, title, html) for name, title, html in found if html]
        head = self.safely("The summary", self.head)
        return "".join(
            [
                f'<header><h1>{page.text(self.title())}</h1>\n<p class="soft">{page.text(self.extent())}</p>\n',
                page.links((name, title) for name, title, _ in shown),
                page.warning("Missing or broken", self.problems, label="Problems of what was read"),
                f"{head}</header>\n<main>\n",
                *(html for _, _, html in shown),
                self.foot(),
                "</main>\n",
            ]
        )

    def safely(self, what: str, build: Callable[[], str]) -> str:
        """What `build` makes; if it fails, that is named among the problems, and the rest of the page is shown."""
        try:
            return build()
        except Exception as error:
            logger.exception("%s: %s could not be made", self.title(), what)
            self.problems.append(f"{what} could not be made: {type(error).__name__}: {error}")
            return ""

    def _section(self, name: str, title: str, build: Callable[[], str], folded: bool) -> tuple[str, str, str]:
        content = self.safely(title, build)
        wrap = page.folded if folded else page.section
        return name, title, wrap(name, title, content) if content else ""
