"""A bar for what takes more than a few seconds."""

import os

from tqdm.auto import tqdm


def watched():
    """Whether bars are shown: not with `TQDM_DISABLE=1`, which `utils/__init__.py` sets where nobody looks on."""
    return os.environ.get("TQDM_DISABLE", "0") in ("", "0")


def progress(items, what):
    """`items` (anything with a length) to iterate over, with a bar that says `what` is done and goes away at the end."""
    return tqdm(items, desc=what, leave=False, disable=len(items) < 5 or not watched())
