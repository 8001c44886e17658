"""Nothing that comes with a model or an adapter runs: no code of its repository, no pickle."""

import json
import pickle
import re
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from torch import save

from utils import models
from utils.settings import PROFILES, ROOT

SETTINGS = PROFILES["embedded"]


class Trap:
    """Unpickled, it makes the file `where`."""

    def __init__(self, where):
        self.where = where

    def __reduce__(self):
        return open, (str(self.where), "w")


@pytest.fixture
def model(tmp_path):
    """The embedded model as somebody else's: a folder that may hold anything, and its settings."""
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "embedded" / "model", folder)
    return folder, replace(SETTINGS, profile="other", model=str(folder))


def test_the_trap_would_snap(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung"))).close()
    assert (tmp_path / "sprung").exists()


def test_code_that_a_model_brings_along_is_not_run(model, tmp_path):
    folder, settings = model
    classes = {
        "config.json": ["AutoConfig", "AutoModelForImageTextToText"],
        "processor_config.json": ["AutoProcessor"],
    }
    for name, kinds in classes.items():
        content = json.loads((folder / name).read_text())
        content["auto_map"] = dict.fromkeys(kinds, "other.Other")
        (folder / name).write_text(json.dumps(content))
    code = f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Other: pass\n"
    (folder / "other.py").write_text(code)
    loaded = models.load_processor(settings)
    assert loaded.chat_template == models.load_processor(SETTINGS).chat_template
    models.load_model(settings)
    assert not (tmp_path / "sprung").exists()


def test_weights_are_read_from_safetensors_only(model, tmp_path):
    folder, settings = model
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for content in (Trap(tmp_path / "sprung"), weights):
        save(content, folder / "pytorch_model.bin")
        with pytest.raises(OSError, match=re.escape(str(folder))):
            models.load_model(settings)
    assert not (tmp_path / "sprung").exists()


def test_an_adapter_in_a_pickle_is_not_opened(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save(Trap(tmp_path / "sprung"), tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        models.load_tuned(SETTINGS, tmp_path)
    assert not (tmp_path / "sprung").exists()
