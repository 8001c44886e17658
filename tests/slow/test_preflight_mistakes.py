"""Preflight names every wrong set-up, and leaves the trainer as it was."""

import copy
import dataclasses
import random

import bitsandbytes as bnb
import numpy
import pytest
import torch
from peft import get_peft_model
from transformers import PrinterCallback
from trl import DPOTrainer

from scripts import train
from utils import chat, models, preferences, preflight, reference_cache, training
from utils.settings import PROFILES

SETTINGS = PROFILES["embedded"]


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:32]"))


@pytest.fixture
def make(rows, processor, tmp_path):
    """`make(settings=…, model=…, **changes)`: a trainer as notebook 03 makes it."""

    def made(settings=SETTINGS, model=None, **changes):
        arguments = {
            "max_steps": 3,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "disable_tqdm": True,
            **changes,
        }
        model = model or models.load_model(settings)
        return training.make_trainer(settings, model, processor, rows, tmp_path, **arguments)

    return made


@pytest.fixture
def by_hand(rows, processor, tmp_path):
    """`by_hand(model, peft_config)`: a trainer that a reader builds without this package."""

    def made(model, adapter=None, **changes):
        args = training.dpo_config(
            SETTINGS, tmp_path, per_device_train_batch_size=4, disable_tqdm=True, **changes
        )
        trainer = DPOTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            processing_class=processor,
            peft_config=adapter,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return made


def results(trainer, **changes):
    """Return {check: (result, found and what to do)}."""
    found = {}
    for row in preflight.check(trainer, **changes):
        assert list(row) == ["check", "result", "found", "what to do"]
        assert row["what to do"] or row["result"] == "ok", "what is not ok says what to do"
        found[row["check"]] = (row["result"], f"{row['found']} {row['what to do']}")
    return found


def failed(trainer, **changes):
    """Return {check: found and what to do} of the checks that fail."""
    found = {}
    for check, (result, text) in results(trainer, **changes).items():
        if result == "failed":
            found[check] = text
    return found


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_right_set_up_passes_every_check(make, shared_prefix, checkpointing):
    trainer = make(shared_prefix=shared_prefix, gradient_checkpointing=checkpointing)
    found = results(trainer)
    assert {result for result, _ in found.values()} == {"ok"} and len(found) == 14
    assert "28 of 56" in found["gradients"][1]
    assert "0.6931 (ln 2 = 0.6931)" in found["first loss"][1]
    # 9 tokens an image, in the two rows of each of four pairs.
    assert "72 for 72" in found["image tokens"][1]
    assert not trainer.model.is_gradient_checkpointing


def test_a_run_after_preflight_is_the_run_without_it(make):
    logs = []
    for looked_at in (False, True):
        trainer = make(learning_rate=1e-3)
        if looked_at:
            preflight.check(trainer)
        trainer.train()
        log = []
        for entry in trainer.state.log_history:
            for name in list(entry):
                if "runtime" in name or "per_second" in name:
                    del entry[name]
            log.append(entry)
        logs.append(log)
    assert logs[0] == logs[1] and len(logs[0]) > 3 and logs[0][0]["num_tokens"] > 100


def state_of(trainer):
    """Return a copy of all that preflight must leave as it was, but for weights and gradients."""
    things = (
        trainer,
        trainer.accelerator,
        trainer.args,
        trainer.model.get_base_model().model,
    )
    state = {
        "modes": [module.training for module in trainer.model.modules()],
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state()[1].tolist(),
        "attributes": [sorted(vars(thing)) for thing in things],
        "metrics": trainer._metrics,
        "tokens": trainer._total_train_tokens,
    }
    return copy.deepcopy(state)


@pytest.mark.parametrize("wrong", [{}, {"max_length": 6}])
def test_the_trainer_is_left_as_it_was(make, wrong):
    trainer = make(**wrong)
    trainer.model.train()
    trainer.model.get_base_model().model.vision_model.eval()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    before = state_of(trainer)
    preflight.check(trainer)
    assert state_of(trainer) == before and not any(trainer._metrics.values())
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_max_length_that_cuts_image_tokens_is_named(make, shared_prefix):
    found = failed(make(max_length=6, shared_prefix=shared_prefix))
    assert "max_length=None" in found["image tokens"]
    assert "8 of 8 answers" in found["max_length"]


def test_a_max_length_that_cuts_only_answers_is_a_warning(make):
    found = results(make(max_length=60))
    assert found["max_length"][0] == "warning"
    assert found["image tokens"][0] == found["gradients"][0] == "ok"


def test_an_adapter_on_the_vision_tower_is_named_unless_it_is_intended(make):
    trainer = make(dataclasses.replace(SETTINGS, lora_target="all-linear"))
    assert "vision and connector" in failed(trainer)["trainable weights"]
    assert not failed(trainer, parts=("language", "vision", "connector"))


def test_a_left_over_get_peft_model_is_named_however_it_was_left(by_hand):
    lora = training.lora_config(SETTINGS)
    everywhere = training.lora_config(dataclasses.replace(SETTINGS, lora_target="all-linear"))

    def found(model, adapter):
        return failed(by_hand(model, adapter))["one adapter"]

    model = models.load_model(SETTINGS)
    get_peft_model(model, lora, adapter_name="first")
    assert "adapters first, default" in found(model, lora)
    model = models.load_model(SETTINGS)
    get_peft_model(model, everywhere)
    assert "25 layers" in found(model, lora)
    assert "copy of a new adapter" in found(get_peft_model(models.load_model(SETTINGS), lora), None)
    twice = get_peft_model(get_peft_model(models.load_model(SETTINGS), lora), lora)
    assert "wraps another" in found(twice, None)


def test_a_right_trainer_made_by_hand_lacks_only_the_profile(by_hand):
    trainer = by_hand(models.load_model(SETTINGS), training.lora_config(SETTINGS))
    wrong = {}
    for check, (result, text) in results(trainer).items():
        if result != "ok":
            wrong[check] = text
    assert wrong.keys() == {"precision", "row length", "memory"}
    assert "bfloat16" in wrong["precision"]


def test_continuing_with_an_adapter_is_right(make, tmp_path):
    trainer = make(learning_rate=2e-3, save_strategy="no")
    training.train(SETTINGS, trainer)
    assert "first loss" in failed(trainer), "it has trained already"
    tuned = models.load_tuned(SETTINGS, tmp_path / "adapter")
    found = results(make(model=tuned, continue_adapter=True))
    assert {result for result, _ in found.values()} == {"ok"}
    assert "frozen copy" in found["reference"][1]
    assert "56 of 56" in found["gradients"][1]


class Cut(bnb.nn.Linear4bit):
    """What bitsandbytes leaves on some CPUs after generation: an output without a way back."""

    def forward(self, x):
        return super().forward(x).detach()


def test_gradients_that_do_not_arrive_are_missed(make):
    trainer = make()
    for module in trainer.model.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = Cut
    found = failed(trainer)
    assert list(found) == ["gradients"]
    # o_proj and down_proj of the 4 layers still hear through the residual stream.
    assert "20 of 56" in found["gradients"]


def test_layers_that_would_stop_gradients_later_are_found_now(make):
    trainer = make()
    for module in trainer.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
            break
    assert "keep_gradients_flowing" in failed(trainer)["gradients"]


def test_an_adapter_that_is_not_zero_at_the_start_is_noticed_with_any_loss(make):
    for changes in ({}, {"loss_type": ["ipo"], "shared_prefix": False}):
        trainer = make(**changes)
        assert not failed(trainer)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(0)
                torch.nn.init.normal_(parameter, std=0.02, generator=generator)
        assert list(failed(trainer)) == ["first loss"]


def test_a_reference_that_is_not_this_model_is_noticed(make, tmp_path):
    trainer = make()
    reference_cache.use_reference_cache(trainer, tmp_path)
    assert not failed(trainer)
    collate = trainer.data_collator

    def stale(rows):
        return collate(rows) | {"ref_chosen_logps": torch.full((len(rows),), -50.0)}

    trainer.data_collator = stale
    assert "kept on disk" in failed(trainer)["reference"]

    def of_other_pairs(rows):
        batch = collate(rows)
        moved = {name: batch[name].roll(1) for name in ("ref_chosen_logps", "ref_rejected_logps")}
        return batch | moved

    trainer.data_collator = of_other_pairs
    assert "kept on disk" in failed(trainer)["reference"]


def test_the_longest_rows_are_found_and_counted(make):
    trainer = make(dataclasses.replace(SETTINGS, token_budget=80))
    lengths = [chat.count_tokens(row, trainer.processing_class) for row in trainer.train_dataset]
    text = failed(trainer)["row length"]
    assert f"up to {max(lengths)} tokens" in text and "budget of 80" in text


def test_rows_of_a_stream_are_looked_at_too(processor, tmp_path):
    pairs = preferences.load(SETTINGS.dataset, "train", streaming=True).take(32)
    trainer = training.make_trainer(
        SETTINGS,
        models.load_model(SETTINGS),
        processor,
        chat.format_dataset(pairs),
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        disable_tqdm=True,
    )
    found = results(trainer)
    assert {result for result, _ in found.values()} == {"ok"}
    assert "first 8 rows" in found["row length"][1]


def test_the_command_stops_where_a_check_fails_unless_told_otherwise(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 1e6)
    # Few rows: counting the tokens of all takes seconds.
    few = dataclasses.replace(SETTINGS, train_split="train[:32]")
    monkeypatch.setitem(PROFILES, "embedded", few)
    arguments = ["--profile", "embedded", "--output", str(tmp_path), "--max-steps", "1"]
    with pytest.raises(SystemExit, match=r"memory.*--no-preflight"):
        train.main(arguments)
    assert "failed  memory" in capsys.readouterr().out
    assert not (tmp_path / "training.json").exists()
    train.main([*arguments, "--no-preflight"])
    assert (tmp_path / "training.json").exists()
