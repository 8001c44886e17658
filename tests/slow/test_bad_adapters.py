"""Damaged adapters are refused with a clear error: the cases of bad_input.py that load a model."""

import re

import bad_input
import pytest
from bad_input import EMBEDDED
from peft import get_peft_model

from utils import models, training


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(models.load_model(EMBEDDED), training.lora_config(EMBEDDED))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", bad_input.WITH_A_MODEL, ids=lambda case: case.name)
def test_a_bad_adapter(case, tmp_path, monkeypatch, adapter):
    place = bad_input.Place(tmp_path, monkeypatch, adapter=adapter)
    with pytest.raises(case.error, match=re.escape(case.fact)):
        case.act(place)


def test_the_sound_adapter_loads(adapter):
    models.load_tuned(EMBEDDED, adapter)
