"""What a trained adapter is: where it sits, where it starts, and what answers once it is saved."""

import math

import bitsandbytes as bnb
import pytest
import torch
from datasets import load_dataset

from utils import chat, models, preferences, training
from utils.generation import answer
from utils.rewards import answer_logits
from utils.settings import PROFILES, locate

SETTINGS = PROFILES["embedded"]
SHORT = {
    "max_steps": 4,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-3,
    "warmup_steps": 0,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:64]"))


@pytest.fixture(scope="module")
def scenes():
    return load_dataset(locate(SETTINGS.dataset), split="test[:4]")


@pytest.fixture(scope="module")
def round_one(rows, processor, tmp_path_factory):
    """A trainer that has trained four optimizer steps and saved its adapter."""
    folder = tmp_path_factory.mktemp("round one")
    model = models.load_model(SETTINGS)
    trainer = training.make_trainer(SETTINGS, model, processor, rows, folder, **SHORT)
    training.train(SETTINGS, trainer)
    return trainer


def adapter_in(trainer):
    return f"{trainer.args.output_dir}/adapter"


def weights(model, adapter="default"):
    """Copies of the LoRA matrices of one adapter: {name: tensor}."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora" in name and f".{adapter}." in name:
            found[name] = parameter.detach().clone()
    return found


@pytest.fixture(scope="module")
def round_two(rows, processor, round_one, tmp_path_factory):
    """(A trainer that continued the adapter of round one, its weights when it started)."""
    folder = tmp_path_factory.mktemp("round two")
    model = models.load_tuned(SETTINGS, adapter_in(round_one))
    trainer = training.make_trainer(
        SETTINGS, model, processor, rows, folder, continue_adapter=True, **SHORT
    )
    started = weights(trainer.model)
    training.train(SETTINGS, trainer)
    return trainer, started


def losses(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_gradients_still_flow_after_generation_in_eval_mode(round_one, processor, scenes):
    """On CPUs with AVX512-BF16 they would not, without `keep_gradients_flowing`."""
    trainer = round_one
    four_bit = [m for m in trainer.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert four_bit and not any(m.support_avx512bf16_for_cpu for m in four_bit)
    images = [scenes[0]["image"]]
    answer(SETTINGS, trainer.model, processor, images, [scenes[0]["question"]], max_new_tokens=2)
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    trainer.model.zero_grad()


def test_the_first_loss_is_ln_2_and_the_adapter_is_in_float32(round_one):
    assert {tensor.dtype for tensor in weights(round_one.model).values()} == {torch.float32}
    first = losses(round_one)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/accuracies"] == 0 and first["rewards/margins"] == 0
    assert losses(round_one)[-1]["loss"] < math.log(2)


def test_only_the_language_model_is_adapted(round_one):
    parts = models.trainable_by_part(round_one.model)
    for part in ("vision", "connector", "head"):
        assert parts[part][0] == 0
    assert parts["vision"][1] > 0 and parts["connector"][1] > 0
    adapter = sum(tensor.numel() for tensor in weights(round_one.model).values())
    assert parts["language"][0] == adapter > 0


def logits_of(model, processor, rows):
    return answer_logits(model, processor, [rows[number] for number in range(4)])


def test_a_saved_adapter_answers_as_the_trained_model(round_one, processor, rows, scenes):
    loaded = models.load_tuned(SETTINGS, adapter_in(round_one))
    tuned = logits_of(loaded, processor, rows)
    torch.testing.assert_close(tuned, logits_of(round_one.model, processor, rows))
    with models.answering(loaded, adapter=False):
        off = logits_of(loaded, processor, rows)
    base = logits_of(models.load_model(SETTINGS), processor, rows)
    torch.testing.assert_close(off, base)
    assert (tuned - base).abs().max() > 0.1
    asked = (processor, scenes["image"], scenes["question"])
    short = {"max_new_tokens": 8}
    answers = answer(SETTINGS, loaded, *asked, **short)
    assert answers == answer(SETTINGS, round_one.model, *asked, **short)


def test_round_two_starts_where_round_one_ended_and_measures_against_it(round_one, round_two):
    trainer, started = round_two
    saved = weights(models.load_tuned(SETTINGS, adapter_in(round_one)))
    trained = weights(trainer.model)
    reference = weights(trainer.model, "ref")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert saved.keys() == started.keys()
    for name, tensor in saved.items():
        # TRL's cast to bfloat16 must not be left in it, and the reference must not move.
        assert torch.equal(started[name], tensor)
        assert torch.equal(reference[name.replace(".default.", ".ref.")], tensor)
    assert any(not torch.equal(trained[name], tensor) for name, tensor in started.items())
    first = losses(trainer)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert losses(trainer)[-1]["loss"] < math.log(2)


def test_what_round_two_saves_loads_as_one_adapter_and_answers_as_trained(
    round_two, processor, rows
):
    trainer, _ = round_two
    loaded = models.load_tuned(SETTINGS, adapter_in(trainer))
    assert list(loaded.peft_config) == ["default"]
    tuned = logits_of(loaded, processor, rows)
    torch.testing.assert_close(tuned, logits_of(trainer.model, processor, rows))


def test_what_carries_the_wrong_adapters_is_refused(
    rows, processor, round_one, round_two, tmp_path
):
    with pytest.raises(ValueError, match="already carries an adapter"):
        training.make_trainer(SETTINGS, round_one.model, processor, rows, tmp_path)
    with pytest.raises(ValueError, match="exactly one adapter"):
        model = round_two[0].model  # the adapter and its reference
        training.make_trainer(SETTINGS, model, processor, rows, tmp_path, continue_adapter=True)
