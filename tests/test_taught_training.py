"""What notebook 03 writes out, against the helpers that it introduces afterwards."""

import os
from collections import Counter

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import DPOConfig

from tests.taught import definitions
from utils import models, training
from utils.layouts import text_of
from utils.settings import PROFILES

profiles = pytest.mark.parametrize("settings", PROFILES.values(), ids=list(PROFILES))


def taught(settings, output="runs"):
    """Return what the notebook defines for a profile on a machine without a GPU."""
    names = {
        "BitsAndBytesConfig": BitsAndBytesConfig,
        "Counter": Counter,
        "DPOConfig": DPOConfig,
        "LoraConfig": LoraConfig,
        "TrainerCallback": object,
        "dtype": torch.float32,
        "models": models,
        "on_gpu": False,
        "os": os,
        "output": output,
        "settings": settings,
        "text_of": text_of,
        "torch": torch,
    }
    return definitions("03", names, names=("quantization", "adapter", "arguments"))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@profiles
def test_the_arguments_are_those_of_the_profile(settings):
    by_hand = taught(settings)["arguments"].to_dict()
    assert by_hand == training.dpo_config(settings, "runs", disable_tqdm=True).to_dict()


@profiles
def test_the_adapter_is_that_of_the_profile(settings):
    assert taught(settings)["adapter"] == training.lora_config(settings)


@profiles
def test_the_model_is_quantized_as_the_helper_does_it(settings, monkeypatch):
    class Stop(Exception):
        pass

    def capture(**arguments):
        raise Stop(arguments["quantization_config"])

    monkeypatch.setattr(models.AutoModelForImageTextToText, "from_pretrained", capture)
    with pytest.raises(Stop) as stopped:
        models.load_model(settings)
    (of_helper,) = stopped.value.args
    assert taught(settings)["quantization"].to_dict() == of_helper.to_dict()


def test_pairs_with_a_shorter_chosen_answer_are_found():
    def answer(words):
        return [{"role": "assistant", "content": [{"type": "text", "text": words}]}]

    rows = {
        "chosen": [answer("one two"), answer("one"), answer("one two three")],
        "rejected": [answer("one two"), answer("one two"), answer("one")],
    }
    assert taught(PROFILES["embedded"])["with_shorter_chosen"](rows) == [1]
