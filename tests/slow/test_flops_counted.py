"""The formula for what a pair computes, against torch's counter."""

import dataclasses

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.train_step import FLOPS
from utils import chat, flops, memory, models, preferences, training
from utils.settings import PROFILES

# torch does not count products in 4 bits.
EMBEDDED = dataclasses.replace(PROFILES["embedded"], four_bit=False, batch_size=2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pair_computes_what_the_formula_says(checkpointing, processor, tmp_path):
    settings = dataclasses.replace(EMBEDDED, gradient_checkpointing=checkpointing)
    rows = chat.format_dataset(preferences.load(settings.dataset, "train[:4]").select([3, 3]))
    trainer = training.make_trainer(
        settings,
        models.load_model(settings),
        processor,
        rows,
        tmp_path,
        max_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        trainer.train()
    counts = chat.check_tokens(rows[0], processor)
    prompt = counts["prompt_tokens"] - memory.image_tokens(settings)
    answer = (counts["chosen_tokens"] + counts["rejected_tokens"]) / 2
    expected = flops.pair_flops(settings, prompt, answer)
    assert 2 * sum(expected.values()) == pytest.approx(counter.get_total_flops(), rel=0.05)
