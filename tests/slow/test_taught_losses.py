"""What notebook 05 teaches, against the package and TRL; log-probabilities for any batch size."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.taught import definitions
from utils import chat, models, preferences, rewards, training
from utils.settings import PROFILES

SETTINGS = PROFILES["embedded"]
TAUGHT = ("sigmoid", "hinge", "robust", "ipo", "sigmoid_norm", "MPO")


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, "test[:8]"))


@pytest.fixture
def noisy_trainer(processor, rows, tmp_path):
    """A maker of trainers whose adapter is not zero: at step 0 every mistake gives ln 2."""

    def make(**changes):
        trainer = training.make_trainer(
            SETTINGS,
            models.load_model(SETTINGS),
            processor,
            rows,
            tmp_path,
            per_device_eval_batch_size=len(rows),
            save_strategy="no",
            disable_tqdm=True,
            **changes,
        )
        torch.manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        return trainer

    return make


@pytest.fixture(scope="module")
def notebook():
    """What the notebook defines, run alone: its functions, VARIANTS and LOSSES, and the toy."""
    names = {"torch": torch, "F": F, "settings": SETTINGS}
    return definitions(
        "05", names, names=("VARIANTS", "LOSSES", "true_reward", "reference_p", "toy")
    )


def test_the_notebook_compares_the_losses_tested_here(notebook):
    assert set(notebook["VARIANTS"]) == set(TAUGHT)
    assert set(notebook["LOSSES"]) == set(TAUGHT)


def test_the_notebook_teaches_the_same_answer_logps(notebook):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    ids = torch.randint(0, 11, (3, 7), generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
    taught = notebook["answer_logps"]
    assert taught is not rewards.answer_logps
    assert torch.equal(taught(logits, ids, mask), rewards.answer_logps(logits, ids, mask))


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
def test_no_distribution_beats_the_best_policy_of_the_toy(notebook, beta):
    best, _ = notebook["best_policy"](beta)
    assert best.sum() == pytest.approx(1)
    reached = notebook["objective"](best, beta)
    others = torch.distributions.Dirichlet(torch.ones(3))
    torch.manual_seed(0)
    for other in others.sample((500,)):
        assert notebook["objective"](other, beta) <= reached + 1e-6


@pytest.mark.parametrize("name", TAUGHT)
def test_every_loss_of_the_notebook_is_trl_s(name, notebook, processor, rows, noisy_trainer):
    changes = notebook["VARIANTS"][name]
    loss = notebook["LOSSES"][name]
    beta = changes["beta"]
    trainer = noisy_trainer(**changes)
    logps = {}
    for side, values in rewards.pair_logps(SETTINGS, trainer.model, processor, rows).items():
        logps[side] = torch.tensor(values)
    ours = loss(logps, beta).mean().item()
    assert ours == pytest.approx(trainer.evaluate(rows)["eval_loss"], rel=1e-5)

    no_preference = dict(logps)
    for side in ("chosen", "rejected"):
        no_preference[side] = logps[f"reference_{side}"]
    untouched = loss(no_preference, beta).mean().item()
    assert abs(untouched - ours) > 1e-3, "too little noise to tell"


def test_pair_logps_does_not_depend_on_the_batch(noisy_trainer, processor, rows):
    model = noisy_trainer().model
    together = rewards.pair_logps(SETTINGS, model, processor, rows)
    for size in (1, 3):
        smaller = dataclasses.replace(SETTINGS, batch_size=size)
        apart = rewards.pair_logps(smaller, model, processor, list(rows))
        for name, values in together.items():
            np.testing.assert_allclose(apart[name], values, rtol=0, atol=1e-4, err_msg=name)
    # With answers of one length there would be no padding to go wrong.
    assert len(set(together["chosen_tokens"])) > 1
