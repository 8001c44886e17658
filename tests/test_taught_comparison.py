"""What notebook 04 writes out, against the helpers that it introduces afterwards."""

import numpy as np
import pytest

from tests.taught import definitions
from utils import chat
from utils.paired_statistics import paired_difference, rate


def test_the_bootstrap_by_hand_gives_the_helper_s_interval():
    bootstrap = definitions("04", {"np": np, "rate": rate})["bootstrap"]
    random = np.random.default_rng(1)
    mentions = random.integers(1, 5, size=300)
    before = np.stack([random.binomial(mentions, 0.3), mentions], axis=1).astype(float)
    after = np.stack([random.binomial(mentions, 0.1), mentions], axis=1).astype(float)
    low, high = bootstrap(before, after)
    of_helper = paired_difference(before, after)
    assert low == pytest.approx(of_helper["low"], abs=0.01)
    assert high == pytest.approx(of_helper["high"], abs=0.01)
    assert of_helper["high"] < -0.1, "the intervals of no effect would agree by luck"


def test_the_prompt_by_hand_is_the_helper_s(processor):
    prompt_text = definitions("04", {"processor": processor})["prompt_text"]
    row = {"images": [], "prompt": chat.prompt_messages("Is there a cup?")}
    for side in ("chosen", "rejected"):
        row[side] = chat.answer_messages("No.")
    rendered = chat.render(row, processor)
    by_hand = prompt_text("Is there a cup?")
    assert by_hand.startswith(rendered["prompt"])
    assert (rendered["prompt"] + rendered["chosen"]).startswith(by_hand)
