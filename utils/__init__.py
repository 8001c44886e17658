"""Silence, at their source, messages that a reader cannot act on, and progress bars in log files.

Notebooks and scripts import this package first: Hugging Face's libraries read the environment
only once, when they are imported.
"""

import logging
import os
import sys
import warnings
from importlib.metadata import version

# bitsandbytes recommends an optional package at every import.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# TRL itself sets the argument that this warning is about.
warnings.filterwarnings(
    "ignore", message=r".*gradient_checkpointing.* is deprecated", category=FutureWarning
)

# Bars need a terminal or a notebook.
if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
    os.environ.setdefault("TQDM_DISABLE", "1")

# In a notebook, tqdm's own widgets ignore TQDM_DISABLE. The libraries that draw them have their
# own switches.
if os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def versions(*packages):
    """Return {name: installed version} for the given packages."""
    return {name: version(name) for name in packages}
