"""Set before anything is imported: offline, quiet, the embedded default, and one thread (two processes may share two cores)."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
os.environ.pop("VLM_DPO_PROFILE", None)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processor():
    """The embedded model's. A test that changes it puts it back."""
    from utils import models  # takes seconds, which the tests of notebooks and house need not wait for
    from utils.settings import PROFILES

    return models.load_processor(PROFILES["embedded"])
