"""The package behind the notebooks. Importing it silences, at their source, messages that a reader cannot act on."""

import logging
import os
import warnings
from importlib.metadata import version

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # recommends an optional package at every import
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore", message=r".*gradient_checkpointing.* is deprecated", category=FutureWarning)  # by TRL's own default


def versions(*packages):
    """The installed versions of `packages`: {name: version}."""
    return {name: version(name) for name in packages}
