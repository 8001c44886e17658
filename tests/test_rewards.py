"""Log-probabilities of answers by hand, and those of a small trainer as it logs them.

tests/slow/test_taught_losses.py compares the losses that notebook 05 teaches with TRL's.
"""

import math

import numpy as np
import pytest
import torch
from mixed_rows import ROWS, dataset

from utils import chat, models, preferences, rewards, training
from utils.settings import PROFILES

SETTINGS = PROFILES["embedded"]

LOGITS = torch.tensor(
    [
        [[5.0, 0, 0], [0, 1.0, 0], [0, 0, 3.0], [9.0, 9, 0]],
        [[1.0, 2, 3], [2.0, 0, 0], [7.0, 7, 7], [0, 0, 0]],
    ]
)
IDS = torch.tensor([[0, 2, 1, 2], [1, 1, 0, 2]])
MASK = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]])
E = math.e
BY_HAND = [
    math.log(E / (E + 2)) + math.log(E**3 / (E**3 + 2)),  # logits at places 1 and 2
    math.log(E**2 / (E**2 + 2)),
]


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, "test[:4]"))


@pytest.fixture(scope="module")
def trainer(processor, rows, tmp_path_factory):
    """A trainer whose adapter is not zero: at step 0 every mistake gives ln 2."""
    trainer = training.make_trainer(
        SETTINGS,
        models.load_model(SETTINGS),
        processor,
        rows,
        tmp_path_factory.mktemp("trainer"),
        per_device_eval_batch_size=len(rows),
        save_strategy="no",
        disable_tqdm=True,
    )
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return trainer


@pytest.fixture(scope="module")
def logps(trainer, processor, rows):
    return rewards.pair_logps(SETTINGS, trainer.model, processor, rows)


# by hand


def test_answer_logps_by_hand():
    assert rewards.answer_logps(LOGITS, IDS, MASK).tolist() == pytest.approx(BY_HAND, abs=1e-6)


def test_answer_logps_ignores_what_is_not_in_the_answer():
    other = LOGITS.clone()
    other[:, 0] = 50.0
    other[:, 3] = -50.0
    other[1, 2] = torch.tensor([1.0, 2.0, 3.0])
    expected = rewards.answer_logps(LOGITS, IDS, MASK)
    assert torch.equal(rewards.answer_logps(other, IDS, MASK), expected)


def test_answer_logps_of_16_bit_logits_is_computed_in_32():
    logits = torch.randn(2, 201, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.arange(402).view(2, 201) % 50
    log_p = logits.double().log_softmax(-1)[:, :-1]
    exact = log_p.gather(-1, ids[:, 1:, None]).sum(dim=(1, 2))
    computed = rewards.answer_logps(logits, ids, torch.ones_like(ids))
    assert computed.dtype == torch.float32
    torch.testing.assert_close(computed.double(), exact, rtol=0, atol=2e-3)
    assert abs(exact).min() > 256, "bfloat16 would be off by up to a nat here"


def test_rewards_by_hand():
    result = rewards.rewards(
        {
            "chosen": np.array([-0.9]),
            "rejected": np.array([-2.5]),
            "reference_chosen": np.array([-1.3]),
            "reference_rejected": np.array([-1.7]),
        },
        beta=0.5,
    )
    assert list(result) == ["chosen", "rejected", "margin"]
    assert result["chosen"] == pytest.approx([0.2])
    assert result["rejected"] == pytest.approx([-0.4])
    assert result["margin"] == pytest.approx([0.6])


def test_the_divergence_of_logits_by_hand():
    even = torch.zeros(1, 2)
    sure = torch.tensor([[0.0, 3.0]]).log_softmax(-1)
    p = torch.tensor(3.0).sigmoid()
    by_hand = 0.5 * (0.5 / p).log() + 0.5 * (0.5 / (1 - p)).log()
    divergence = rewards.logit_difference(even, sure)["divergence"]
    assert divergence == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_difference_of_logits_is_the_largest_of_one_and_the_mean_over_tokens():
    logits = torch.tensor([[1.0, 0], [1.0, 0]])
    others = torch.tensor([[1.0, 0], [0.0, 2]])  # the first token is the same
    result = rewards.logit_difference(logits, others)
    second = rewards.logit_difference(logits[1:], others[1:])
    assert result["largest"] == 2
    assert result["changed"] == 0.5
    assert result["divergence"] == pytest.approx(second["divergence"] / 2)


# of a model


def test_pair_logps_is_what_the_trainer_logs(trainer, rows, logps):
    ours = rewards.rewards(logps, SETTINGS.beta)
    logged = trainer.evaluate(rows)
    for values in logps.values():
        assert values.dtype == np.float64
        assert values.shape == (4,)
    for side in ("chosen", "rejected"):
        assert logps[side].mean() == pytest.approx(logged[f"eval_logps/{side}"], rel=1e-5)
        assert ours[side].mean() == pytest.approx(logged[f"eval_rewards/{side}"], abs=1e-5)
    assert ours["margin"].mean() == pytest.approx(logged["eval_rewards/margins"], abs=1e-5)
    assert (ours["margin"] > 0).mean() == logged["eval_rewards/accuracies"]
    assert abs(ours["margin"]).min() > 1e-3, "margins of 0 would hide a mistake"


def test_pair_logps_counts_the_answers_tokens(processor, rows, logps):
    counts = chat.check_tokens(rows[3], processor)
    assert logps["chosen_tokens"][3] == counts["chosen_tokens"]
    assert logps["rejected_tokens"][3] == counts["rejected_tokens"]


def test_rows_with_and_without_images_are_scored_as_each_is_alone(trainer, processor):
    mixed = chat.format_dataset(dataset())
    logps = rewards.pair_logps(SETTINGS, trainer.model, processor, mixed)
    for number in range(len(ROWS)):
        alone = rewards.pair_logps(SETTINGS, trainer.model, processor, mixed.select([number]))
        for name, values in alone.items():
            assert logps[name][number] == pytest.approx(values[0], abs=1e-4), name
    logits = rewards.answer_logits(trainer.model, processor, list(mixed))
    assert len(logits) == logps["chosen_tokens"].sum() + logps["rejected_tokens"].sum()


@pytest.mark.parametrize("training_mode", [True, False])
def test_pair_logps_leaves_the_model_as_it_was(training_mode, trainer, processor, rows):
    trainer.model.train(training_mode)
    of_one = rewards.pair_logps(SETTINGS, trainer.model, processor, rows.select([0]))
    assert trainer.model.training is training_mode
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert trainable
    assert all(parameter.grad is None for parameter in trainable)
    assert of_one["chosen"] != of_one["reference_chosen"]


def test_answer_logits_hold_one_row_per_answer_token(trainer, processor, rows, logps):
    logits = rewards.answer_logits(trainer.model, processor, list(rows))
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    tokens = int(logps["chosen_tokens"].sum() + logps["rejected_tokens"].sum())
    assert logits.shape == (tokens, len(processor.tokenizer))
    batch = chat.training_batch(list(rows), processor)
    ids = batch["input_ids"][batch["completion_mask"].bool()]
    total = logits.log_softmax(-1).gather(-1, ids[:, None]).sum()
    expected = logps["chosen"].sum() + logps["rejected"].sum()
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_pair_logps_needs_an_adapter_and_pairs(trainer, processor, rows):
    base = models.load_model(SETTINGS)
    with pytest.raises(ValueError, match="adapter"):
        rewards.pair_logps(SETTINGS, base, processor, rows)
    with pytest.raises(ValueError, match="rows is empty"):
        rewards.pair_logps(SETTINGS, trainer.model, processor, rows.select([]))
