"""Questions that share a row get the probabilities that they get alone, in every family."""

import numpy as np
import pytest
import torch
from families import FAMILIES, make_processor, write_checkpoint
from PIL import Image
from transformers import AutoModelForImageTextToText

from utils import families as utils_families
from utils import judging
from utils.packed_rows import PackedRows
from utils.settings import PROFILES

SETTINGS = PROFILES["embedded"]
QUESTIONS = ["What?", "Is there a cup?", "Is it?", "Is there a cup on the table?", "No?"]


def tiny(name, folder):
    """Return a model of the family with random weights, float64 below its head, and a processor."""
    write_checkpoint(FAMILIES[name], folder)
    processor = utils_families.complete_template(make_processor(FAMILIES[name]))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.double(), processor


def asked():
    """Return two images, in turns, and a question about each: the same five about both."""
    pixels = np.random.default_rng(0).integers(0, 255, (2, 90, 130, 3), dtype=np.uint8)
    first, second = (Image.fromarray(each) for each in pixels)
    images = [first, second.resize((80, 120))] * len(QUESTIONS)
    questions = [question for question in QUESTIONS for _ in range(2)]
    return images, questions


@pytest.mark.parametrize("name", FAMILIES)
def test_probabilities_are_those_of_each_question_alone(name, tmp_path, monkeypatch):
    model, processor = tiny(name, tmp_path)
    images, questions = asked()
    in_one_row = judging.logits_of_shared_row
    shared = []

    def watched(*arguments):
        logits = in_one_row(*arguments)
        shared.append(logits is not None)
        return logits

    monkeypatch.setattr(judging, "logits_of_shared_row", watched)
    together = judging.yes_and_no(SETTINGS, model, processor, images, questions)
    assert shared == ([] if name == "LLaVA-OneVision" else [True, True])

    monkeypatch.setattr(judging, "logits_of_shared_row", lambda *_: None)
    alone = []
    for image, question in zip(images, questions, strict=True):
        alone.append(judging.yes_and_no(SETTINGS, model, processor, [image], [question])[0])
    alone = np.array(alone)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=0)
    assert np.abs(alone - alone[0]).max() > 1e-3 * alone.max(), "questions and images matter"


@pytest.mark.parametrize("name", ["SmolVLM", "Qwen2.5-VL", "Gemma 3"])
def test_the_comparison_finds_a_question_that_sees_the_one_before_it(name, tmp_path, monkeypatch):
    model, processor = tiny(name, tmp_path)
    images, questions = asked()
    right = judging.yes_and_no(SETTINGS, model, processor, images, questions)
    mask = PackedRows.mask

    def without_branches(rows, *arguments):
        rows.branch = torch.zeros_like(rows.branch)
        return mask(rows, *arguments)

    monkeypatch.setattr(PackedRows, "mask", without_branches)
    wrong = judging.yes_and_no(SETTINGS, model, processor, images, questions)
    assert np.abs(wrong / right - 1).max() > 1e-4
