from types import SimpleNamespace

import numpy as np
import pytest

from embedded.scenes import existence_question
from utils import generation, models, preferences
from utils.settings import PROFILES

SETTINGS = PROFILES["embedded"]
SPELLINGS = [" Yes", " yes", " No", " no"]


@pytest.fixture(scope="module")
def model():
    return models.load_model(SETTINGS)


def test_yes_and_no_are_read_where_the_embedded_model_says_them(processor):
    lead, yes, no = generation.answer_tokens(processor)
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
    assert generation.answer_tokens(fake_processor(SPELLINGS)) == ([], [1, 2], [3, 4])


def test_a_template_that_changes_the_prompt_is_refused():
    with pytest.raises(ValueError, match="Assistant thinks:"):
        generation.answer_tokens(fake_processor(SPELLINGS, before="Assistant thinks:"))


def test_probabilities_do_not_depend_on_the_batch(model, processor):
    scenes = preferences.load(SETTINGS.dataset, "test[:4]")
    images = list(scenes["image"])
    questions = [existence_question(category) for category in ("cup", "umbrella", "car", "kite")]
    together = generation.yes_and_no(SETTINGS, model, processor, images, questions)
    alone = []
    for image, question in zip(images, questions, strict=True):
        alone.append(generation.yes_and_no(SETTINGS, model, processor, [image], [question])[0])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert ((together > 0) & (together < 1)).all()
    assert (together.sum(1) > 0.9).all()


def test_each_image_needs_a_question(model, processor):
    images = list(preferences.load(SETTINGS.dataset, "test[:2]")["image"])
    with pytest.raises(ValueError, match=r"2 images .* 1 questions"):
        generation.answer(SETTINGS, model, processor, images, ["What?"])


def test_an_image_gets_as_many_answers_as_samples_were_asked_for(model, processor):
    scenes = preferences.load(SETTINGS.dataset, "test[:3]")
    images = list(scenes["image"])
    questions = list(scenes["question"])
    options = {"max_new_tokens": 4}
    greedy = generation.answer(SETTINGS, model, processor, images, questions, **options)
    assert len(greedy) == 3
    assert all(isinstance(text, str) for text in greedy)
    sampled = generation.answer(SETTINGS, model, processor, images, questions, samples=2, **options)
    assert [len(texts) for texts in sampled] == [2, 2, 2]


def test_a_model_that_fails_is_left_as_it_was(model, processor, monkeypatch):
    images = list(preferences.load(SETTINGS.dataset, "test[:1]")["image"])
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    model.train()
    with pytest.raises(ZeroDivisionError):
        generation.answer(SETTINGS, model, processor, images, [generation.DESCRIBE])
    assert model.training
    model.eval()
