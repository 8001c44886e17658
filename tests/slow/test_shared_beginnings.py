"""What is computed once for several answers gives what each has alone, in every family."""

from dataclasses import replace
from functools import wraps

import numpy as np
import pytest
import torch
from families import FAMILIES, make_processor, write_checkpoint
from PIL import Image
from transformers import AutoModelForImageTextToText

from utils import families as utils_families
from utils import generation, judging
from utils.generation import answer
from utils.packed_rows import PackedRows
from utils.settings import PROFILES
from utils.vision import images_encoded_once

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


def passes_of(model, images):
    """Return a list to which each pass of the vision tower adds its number of `images`."""
    passes = []
    encode = model.model.get_image_features

    def counted(pixel_values, *arguments, **options):
        passes.append(images)
        return encode(pixel_values, *arguments, **options)

    model.model.get_image_features = wraps(encode)(counted)
    return passes


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_the_same_when_an_image_is_encoded_once(name, tmp_path):
    model, processor = tiny(name, tmp_path)
    model.requires_grad_(False)
    images, questions = asked()
    settings = replace(SETTINGS, generation_batch_size=2, max_new_tokens=12)

    def answers():
        told = []
        for start in range(0, len(images), 2):
            part = slice(start, start + 2)
            told += answer(settings, model, processor, images[part], questions[part])
        return told

    expected = answers()
    passes = passes_of(model, 2)
    with images_encoded_once(model):
        assert answers() == expected
    assert len(passes) == (len(QUESTIONS) if name == "LLaVA-OneVision" else 1)
    assert len(set(expected)) > len(QUESTIONS), "questions and images matter"


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_are_the_same_when_their_prompt_is_computed_once(name, tmp_path, monkeypatch):
    model, processor = tiny(name, tmp_path)
    images, questions = asked()
    settings = replace(SETTINGS, generation_batch_size=12, max_new_tokens=12)

    def samples():
        torch.manual_seed(0)
        return answer(settings, model, processor, images[:5], questions[:5], samples=3)

    together = samples()
    monkeypatch.setattr(generation, "PACKED_FAMILIES", ())
    assert samples() == together
    assert len({text for texts in together for text in texts}) > 10


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
