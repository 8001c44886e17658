"""The tokens that `count_tokens` counts are those of the collator, in every family.

The method that says how many tokens an image takes is private to transformers and may change.
"""

import pytest
from families import FAMILIES, make_processor
from PIL import Image

from utils import chat, families

SIZES = [(8, 6), (20, 20), (64, 63), (100, 30), (30, 100), (640, 480), (77, 301), (8, 150)]
# Idefics2 and SmolVLM have no such method, Gemma 3 also puts line breaks around an image, and
# LLaVA-OneVision does not tile several images of a row.
BY_PROCESSING = {"Idefics2", "SmolVLM", "Gemma 3", "LLaVA-OneVision"}


@pytest.mark.parametrize("name", FAMILIES)
def test_counted_tokens_are_the_collators(name):
    processor = families.complete_template(make_processor(FAMILIES[name]))
    trusted = chat.counts_image_tokens(processor, processor.image_processor)
    assert trusted == (name not in BY_PROCESSING)
    for first, second in (("A cup.", "\nA much longer answer."), (" Two cups, and no dog.", "No.")):
        texts = {
            "prompt": chat.prompt_messages("What is\n this? "),
            "chosen": chat.answer_messages(first),
            "rejected": chat.answer_messages(second),
        }
        for size in SIZES:
            formatted = {"images": [Image.new("RGB", size)], **texts}
            expected = chat.training_batch([formatted], processor)["input_ids"].shape[1]
            assert chat.count_tokens(formatted, processor) == expected, size
