"""A progress bar, on a terminal and where tqdm is installed."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(total: int, what: str, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Context with a function that takes how many of `total` are done. Shows nothing unless `shown`."""
    if not shown or not sys.stderr.isatty():
        yield lambda done: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda done: None
        return
    with tqdm(total=total, unit=f" {what}", dynamic_ncols=True, leave=False) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        yield show
