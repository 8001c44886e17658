"""The formula for what a pair computes, against torch's counter, and the time that follows from it."""

import dataclasses

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.train_step import FLOPS
from utils import chat, flops, memory, models, preferences, training
from utils.settings import PROFILES

EMBEDDED = dataclasses.replace(
    PROFILES["embedded"], four_bit=False, batch_size=2
)  # torch does not count products in 4 bit


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pair_computes_what_the_formula_says(checkpointing, tmp_path):
    settings, processor = (
        dataclasses.replace(EMBEDDED, gradient_checkpointing=checkpointing),
        models.load_processor(EMBEDDED),
    )
    rows = chat.format_dataset(preferences.load(settings.dataset, "train[:4]").select([3, 3]))
    changes = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    trainer = training.make_trainer(
        settings, models.load_model(settings), processor, rows, tmp_path, **changes
    )
    counts = chat.check_tokens(rows[0], processor)
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        trainer.train()
    answers = (counts["chosen_tokens"] + counts["rejected_tokens"]) / 2
    expected = flops.pair_flops(
        settings, counts["prompt_tokens"] - memory.image_tokens(settings), answers
    )
    assert 2 * sum(expected.values()) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_time_grows_with_the_budget_and_the_pairs_and_shrinks_with_the_device():
    settings = PROFILES["qwen"]
    assert flops.hours(settings, 2000, "T4") == pytest.approx(2 * flops.hours(settings, 1000, "T4"))
    assert (
        flops.hours(settings, 1000, "T4")
        > flops.hours(settings, 1000, "L4")
        > flops.hours(settings, 1000, "A100")
        > 0
    )
    assert flops.hours(
        dataclasses.replace(settings, pixel_budget=200_000), 1000, "T4"
    ) < flops.hours(settings, 1000, "T4")
