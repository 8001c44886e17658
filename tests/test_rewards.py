import ast
import dataclasses
import math

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from IPython.core.inputtransformer2 import TransformerManager

from utils import chat, models, preferences, rewards, training
from utils.settings import PROFILES, ROOT

SETTINGS = PROFILES["embedded"]
NOTEBOOK = ROOT / "notebooks" / "05_dpo_loss_by_hand.ipynb"
TAUGHT = ("sigmoid", "hinge", "robust", "ipo", "sigmoid_norm", "MPO")


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, "test[:8]"))


def noisy_trainer(processor, rows, output, **changes):
    """A trainer whose adapter is not zero: at step 0 every mistake gives ln 2."""
    changes |= {
        "per_device_eval_batch_size": len(rows),
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = training.make_trainer(
        SETTINGS, models.load_model(SETTINGS), processor, rows, output, **changes
    )
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return trainer


@pytest.fixture(scope="module")
def trainer(processor, rows, tmp_path_factory):
    return noisy_trainer(processor, rows, tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def notebook():
    """What the notebook defines, run alone: its functions, VARIANTS and LOSSES."""
    cells = [
        cell.source
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells
        if cell.cell_type == "code"
    ]
    nodes = [
        node
        for source in cells
        for node in ast.parse(TransformerManager().transform_cell(source)).body
    ]
    wanted = [
        node
        for node in nodes
        if isinstance(node, ast.FunctionDef) or defines(node) in ("VARIANTS", "LOSSES")
    ]
    namespace = {"torch": torch, "F": F, "settings": SETTINGS}
    exec(compile(ast.Module(wanted, type_ignores=[]), NOTEBOOK.name, "exec"), namespace)
    return namespace


def defines(node):
    """The name that an assignment (also `|=`) gives a value, else None."""
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AugAssign)
        else []
    )
    return targets[0].id if targets and isinstance(targets[0], ast.Name) else None


def as_tensors(logps):
    return {name: torch.tensor(values) for name, values in logps.items()}


LOGITS = torch.tensor(
    [
        [[5.0, 0, 0], [0, 1.0, 0], [0, 0, 3.0], [9.0, 9, 0]],
        [[1.0, 2, 3], [2.0, 0, 0], [7.0, 7, 7], [0, 0, 0]],
    ]
)
IDS, MASK = torch.tensor([[0, 2, 1, 2], [1, 1, 0, 2]]), torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]])
BY_HAND = [
    math.log(math.e / (math.e + 2))
    + math.log(math.e**3 / (math.e**3 + 2)),  # logits before each token: at positions 1 and 2
    math.log(math.e**2 / (math.e**2 + 2)),
]


def test_answer_logps_by_hand():
    assert rewards.answer_logps(LOGITS, IDS, MASK).tolist() == pytest.approx(BY_HAND, abs=1e-6)


def test_answer_logps_ignores_what_is_not_in_the_answer():
    other = LOGITS.clone()
    other[:, 0], other[:, 3], other[1, 2] = 50.0, -50.0, torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(
        rewards.answer_logps(other, IDS, MASK), rewards.answer_logps(LOGITS, IDS, MASK)
    )


def test_answer_logps_of_16_bit_logits_is_computed_in_32():
    logits = torch.randn(2, 201, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.arange(402).view(2, 201) % 50
    exact = logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).sum(dim=(1, 2))
    computed = rewards.answer_logps(logits, ids, torch.ones_like(ids))
    assert computed.dtype == torch.float32
    torch.testing.assert_close(computed.double(), exact, rtol=0, atol=2e-3)
    assert abs(exact).min() > 256, "bfloat16 would be off by up to a nat here"


def test_the_notebook_teaches_the_same_answer_logps(notebook):
    assert notebook["answer_logps"] is not rewards.answer_logps
    assert torch.equal(
        notebook["answer_logps"](LOGITS, IDS, MASK), rewards.answer_logps(LOGITS, IDS, MASK)
    )


def test_rewards_by_hand():
    logps = {
        "chosen": [-0.9],
        "rejected": [-2.5],
        "reference_chosen": [-1.3],
        "reference_rejected": [-1.7],
    }
    result = rewards.rewards({name: np.array(values) for name, values in logps.items()}, beta=0.5)
    assert {name: float(values[0]) for name, values in result.items()} == pytest.approx(
        {"chosen": 0.2, "rejected": -0.4, "margin": 0.6}
    )


def test_pair_logps_is_what_the_trainer_logs(trainer, processor, rows):
    logps = rewards.pair_logps(trainer.model, processor, rows, SETTINGS)
    ours, logged = rewards.rewards(logps, SETTINGS.beta), trainer.evaluate(rows)
    assert {values.dtype for values in logps.values()} == {np.dtype("float64")} and {
        len(values) for values in logps.values()
    } == {8}
    for side in ("chosen", "rejected"):
        assert logps[side].mean() == pytest.approx(logged[f"eval_logps/{side}"], rel=1e-5)
        assert ours[side].mean() == pytest.approx(logged[f"eval_rewards/{side}"], abs=1e-5)
    assert ours["margin"].mean() == pytest.approx(logged["eval_rewards/margins"], abs=1e-5)
    assert (ours["margin"] > 0).mean() == logged["eval_rewards/accuracies"]
    assert abs(ours["margin"]).min() > 1e-3, "margins of 0 would hide a mistake"


def test_pair_logps_does_not_depend_on_the_batch(trainer, processor, rows):
    together = rewards.pair_logps(trainer.model, processor, rows, SETTINGS)
    for size in (1, 3):
        apart = rewards.pair_logps(
            trainer.model, processor, list(rows), dataclasses.replace(SETTINGS, batch_size=size)
        )
        for name, values in together.items():
            np.testing.assert_allclose(apart[name], values, rtol=0, atol=1e-4, err_msg=name)
    assert len(set(together["chosen_tokens"])) > 1, (
        "with answers of one length there is no padding to go wrong"
    )


def test_pair_logps_counts_the_answers_tokens(trainer, processor, rows):
    logps = rewards.pair_logps(trainer.model, processor, rows, SETTINGS)
    counts = chat.check_tokens(rows[3], processor)
    assert (logps["chosen_tokens"][3], logps["rejected_tokens"][3]) == (
        counts["chosen_tokens"],
        counts["rejected_tokens"],
    )


def test_pair_logps_leaves_the_model_as_it_was(trainer, processor, rows):
    for mode in (True, False):
        trainer.model.train(mode)
        before = rewards.pair_logps(trainer.model, processor, rows.select([0]), SETTINGS)
        assert trainer.model.training is mode
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert trainable and all(parameter.grad is None for parameter in trainable)
    assert before["chosen"] != before["reference_chosen"]


def test_pair_logps_needs_an_adapter_and_pairs(trainer, processor, rows):
    with pytest.raises(ValueError, match="carries no adapter"):
        rewards.pair_logps(models.load_model(SETTINGS), processor, rows, SETTINGS)
    with pytest.raises(ValueError, match="no pairs"):
        rewards.pair_logps(trainer.model, processor, rows.select([]), SETTINGS)


@pytest.mark.parametrize("name", TAUGHT)
def test_every_loss_of_the_notebook_is_trl_s(name, notebook, processor, rows, tmp_path):
    changes = notebook["VARIANTS"][name]
    trainer = noisy_trainer(processor, rows, tmp_path, **changes)
    logps = as_tensors(rewards.pair_logps(trainer.model, processor, rows, SETTINGS))
    ours = notebook["LOSSES"][name](logps, changes["beta"]).mean().item()
    assert ours == pytest.approx(trainer.evaluate(rows)["eval_loss"], rel=1e-5)
    no_preference = logps | {side: logps[f"reference_{side}"] for side in ("chosen", "rejected")}
    assert (
        abs(notebook["LOSSES"][name](no_preference, changes["beta"]).mean().item() - ours) > 1e-3
    ), "too little noise to tell"


def test_the_notebook_compares_the_losses_tested_here(notebook):
    assert set(notebook["VARIANTS"]) == set(notebook["LOSSES"]) == set(TAUGHT)
