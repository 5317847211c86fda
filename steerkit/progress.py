"""Progress that reads well live and in a saved notebook: bars, silence for other libraries' bars, times in words."""

import contextlib
import io
import sys
from collections.abc import Iterable, Iterator


def bar(items: Iterable, what: str, unit: str, *, show: bool = True):
    """Return the items with a progress bar on standard output, one line in a saved notebook; none for a single item."""
    from tqdm import tqdm

    items = list(items)
    return tqdm(items, desc=what, unit=unit, disable=not show or len(items) < 2, file=sys.stdout, mininterval=5.0, ncols=80)


@contextlib.contextmanager
def quiet(silent: bool = True) -> Iterator[None]:
    """Keep the bars that other libraries write to standard error out of the page; errors are raised all the same."""
    with contextlib.redirect_stderr(io.StringIO()) if silent else contextlib.nullcontext():
        yield


def about(seconds: float) -> str:
    """Return a rough time in words. Example: `about(130)` is "about 2 min"."""
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
