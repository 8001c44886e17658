"""The probabilities of yes and no, and the row that all questions about an image share."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from embedded.scenes import existence_question
from utils import judging, models
from utils.settings import PROFILES, locate

SETTINGS = PROFILES["embedded"]
SPELLINGS = [" Yes", " yes", " No", " no"]


def drawn(split):
    """Rows about drawn scenes, with the columns that the embedded data set has on the disk."""
    return load_dataset(locate("embedded/dataset"), split=split)


@pytest.fixture(scope="module")
def model():
    return models.load_model(SETTINGS)


def test_yes_and_no_are_read_where_the_embedded_model_says_them(processor):
    lead, yes, no = judging.answer_tokens(processor)
    decode = processor.tokenizer.decode
    assert decode(lead) == " "
    assert [decode(token) for token in yes] == ["Yes"]
    assert [decode(token) for token in no] == ["No"]


def fake_processor(words, before="Assistant:"):
    """A template that ends with `before`, and a tokenizer with one token per word."""

    def template(messages, add_generation_prompt=False, tokenize=False):
        answers = ""
        for message in messages:
            if message["role"] == "assistant":
                answers += " " + message["content"][0]["text"]
        return "Assistant:" + answers if answers else before

    def tokenizer(text, add_special_tokens):
        rest = text.removeprefix("Assistant:")
        if rest == text:
            return {"input_ids": [99]}
        if not rest:
            return {"input_ids": [0]}
        return {"input_ids": [0, words.index(rest) + 1]}

    return SimpleNamespace(apply_chat_template=template, tokenizer=tokenizer)


def test_all_spellings_of_yes_and_no_count_that_are_one_token():
    assert judging.answer_tokens(fake_processor(SPELLINGS)) == ([], [1, 2], [3, 4])


def test_a_template_that_changes_the_prompt_is_refused():
    with pytest.raises(ValueError, match="Assistant thinks:"):
        judging.answer_tokens(fake_processor(SPELLINGS, before="Assistant thinks:"))


def test_probabilities_do_not_depend_on_the_batch(model, processor):
    scenes = drawn("test[:4]")
    images = list(scenes["image"])
    questions = [existence_question(category) for category in ("cup", "umbrella", "car", "kite")]
    together = judging.yes_and_no(SETTINGS, model, processor, images, questions)
    alone = []
    for image, question in zip(images, questions, strict=True):
        alone.append(judging.yes_and_no(SETTINGS, model, processor, [image], [question])[0])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert ((together > 0) & (together < 1)).all()
    assert (together.sum(1) > 0.9).all()


def test_an_image_is_processed_once_for_all_questions_about_it(model, processor, monkeypatch):
    """Even in several batches, and with images of two sizes that take turns."""
    scenes = drawn("test[:2]")
    first, second = scenes["image"]
    large = first.resize((144, 144))
    images = [first, second, large] * 3
    questions = [existence_question(category) for category in ("cup", "car", "kite")]
    asked = [question for question in questions for _ in range(3)]
    settings = replace(SETTINGS, generation_batch_size=2)
    expected = []
    for image, question in zip(images, asked, strict=True):
        expected.append(judging.yes_and_no(SETTINGS, model, processor, [image], [question])[0])

    sizes = []
    kind = type(processor.image_processor)
    process = kind.preprocess

    def counted(self, images, *arguments, **options):
        sizes.append([image.size for [image] in images])
        return process(self, images, *arguments, **options)

    monkeypatch.setattr(kind, "preprocess", counted)
    found = judging.yes_and_no(settings, model, processor, images, asked)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert sorted(sizes) == sorted([[first.size], [second.size], [large.size]])


def test_batches_hold_images_of_one_size_and_keep_their_order():
    small, large = Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))
    other = small.copy()
    images = [small, large, other, small, other, large, small]
    batches = judging.one_size_batches(images, 2)
    assert batches == [[0, 3], [6, 2], [4], [1, 5]]
    assert judging.one_size_batches([small] * 3 + [other] * 2, 5) == [[0, 1, 2, 3, 4]]
    assert judging.one_size_batches([], 5) == []


def test_questions_about_an_image_share_one_row(model, processor, monkeypatch):
    """Two images with three questions each: two forward passes, with each beginning once."""
    first, second = drawn("test[:2]")["image"]
    questions = [existence_question(category) for category in ("cup", "umbrella", "car")]
    rows = []
    forward = type(model).forward

    def watched(self, *arguments, **options):
        rows.append(tuple(options["input_ids"].shape))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", watched)
    judging.yes_and_no(SETTINGS, model, processor, [first, second] * 3, sorted(questions * 2))
    assert len(rows) == 2 and {row[0] for row in rows} == {1}
    alone = []
    for question in questions:
        batch = judging.inference_batch([first], [question], processor)
        alone.append(batch["input_ids"].shape[1] + 1)  # the answer begins with a token of its own
    prompt = batch["input_ids"][0].tolist()
    is_image = torch.tensor(prompt) == model.config.image_token_id
    assert rows[0][1] < sum(alone) - 2 * is_image.sum()


def test_a_part_of_an_image_in_the_questions_is_not_shared(model, processor):
    batch = judging.inference_batch([Image.new("RGB", (72, 72))] * 2, ["A?", "B?"], processor)
    changed = dict(batch)
    changed["input_ids"] = batch["input_ids"].clone()
    changed["input_ids"][0, 0] = 5  # they no longer begin alike
    assert judging.logits_of_shared_row(model, batch) is not None
    assert judging.logits_of_shared_row(model, changed) is None


def test_questions_that_cannot_share_a_row_come_in_batches(model, processor, monkeypatch):
    """As many at a time as the settings say, though a shared row may hold more of them."""
    image = drawn("test[:1]")["image"][0]
    questions = [existence_question(category) for category in ("cup", "car", "kite")] * 2
    together = judging.yes_and_no(SETTINGS, model, processor, [image] * 6, questions)
    sizes = []
    generate = model.generate

    def watched(**options):
        sizes.append(len(options["input_ids"]))
        return generate(**options)

    monkeypatch.setattr(model, "generate", watched)
    monkeypatch.setattr(judging, "logits_of_shared_row", lambda *_: None)
    settings = replace(SETTINGS, generation_batch_size=4)
    apart = judging.yes_and_no(settings, model, processor, [image] * 6, questions)
    np.testing.assert_allclose(apart, together, atol=1e-5)
    assert sizes == [4, 2]
