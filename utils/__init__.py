"""The package behind the notebooks. Importing it silences, at their source, messages that a reader cannot act on, and bars in log files."""

import logging
import os
import sys
import warnings
from importlib.metadata import version

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(
    logging.ERROR
)  # recommends an optional package at every import
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not (sys.stderr.isatty() or "ipykernel" in sys.modules):  # neither a terminal nor a notebook
    os.environ.setdefault("TQDM_DISABLE", "1")
warnings.filterwarnings(
    "ignore", message=r".*gradient_checkpointing.* is deprecated", category=FutureWarning
)  # by TRL's own default


def versions(*packages):
    """The installed versions of `packages`: {name: version}."""
    return {name: version(name) for name in packages}
