"""Set before anything is imported: offline, quiet, the embedded default, and a single thread."""

import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(Path(__file__).parents[1] / "build" / "hypothesis")
os.environ.pop("VLM_DPO_PROFILE", None)
# Some tests start processes as copies of this one. A thread of Arrow's might hold a lock then.
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # two processes may share two cores

# The same few examples each time; `--hypothesis-profile thorough` hunts with new ones. A slow
# machine fails neither.
unhurried = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=100, derandomize=True, **unhurried)
settings.register_profile("thorough", max_examples=2000, derandomize=False, **unhurried)
settings.load_profile("quick")


@pytest.fixture(scope="session")
def processor():
    """The embedded model's processor. A test that changes it puts it back."""
    # Imported here: it takes seconds, and the tests of notebooks and house do without it.
    from utils import models
    from utils.settings import PROFILES

    return models.load_processor(PROFILES["embedded"])
