"""Show a progress bar for whatever takes more than a few seconds."""

import os

from tqdm.auto import tqdm


def watched():
    """Return whether progress bars are shown.

    They are hidden with `TQDM_DISABLE=1`, which `utils/__init__.py` sets outside terminals and
    notebooks.
    """
    return os.environ.get("TQDM_DISABLE", "0") in ("", "0")


def progress(items, what):
    """Return an iterator over `items` with a bar labeled `what`, which disappears at the end.

    `items` is anything that has a length. Fewer than five items get no bar.
    """
    hidden = len(items) < 5 or not watched()
    return tqdm(items, desc=what, leave=False, disable=hidden)
