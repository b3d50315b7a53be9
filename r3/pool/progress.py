"""A progress bar, on a terminal and where tqdm is installed."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_bar(total: int, what: str, *, shown: bool) -> Iterator[Callable[[Callable[[], int]], Any]]:
    """Context with a function that asks how many of `total` are done, and shows it. Shows nothing unless `shown`."""
    bar_class = _tqdm() if shown and sys.stderr.isatty() else None
    if bar_class is None:
        yield lambda done: None
        return
    with bar_class(total=total, unit=f" {what}", dynamic_ncols=True, leave=False) as bar:
        yield lambda done: bar.update(done() - bar.n)


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
