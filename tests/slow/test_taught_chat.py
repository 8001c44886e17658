"""What notebook 02 writes out, against the helpers that it introduces afterwards."""

import pytest

from tests.taught import prepared
from utils import chat


@pytest.fixture(scope="module")
def taught():
    return prepared("02")


def test_the_rendered_texts_are_the_helper_s(taught):
    rendered = chat.render(taught["row"], taught["processor"])
    for side in ("chosen", "rejected"):
        by_hand = taught["asking"] + taught["answer_texts"][side]
        assert by_hand == rendered["prompt"] + rendered[side]


def test_the_prompt_s_tokens_are_the_helper_s(taught):
    of_helper = chat.prompt_batch([taught["row"]], taught["processor"])
    assert of_helper["input_ids"].tolist() == taught["inputs"]["input_ids"].tolist()
    counted = chat.check_tokens(taught["row"], taught["processor"])
    assert counted["prompt_tokens"] == len(taught["prompt_ids"])
    assert counted["image_tokens"] == taught["prompt_ids"].count(taught["image_token"])
    assert taught["image_token"] == chat.image_token_id(taught["processor"])


def test_the_batch_is_the_helper_s(taught):
    of_helper = chat.training_batch([taught["row"]], taught["processor"])
    assert set(of_helper) == set(taught["batch"])
    for name, values in taught["batch"].items():
        assert values.tolist() == of_helper[name].tolist(), name
