"""Preflight: a right set-up is green, every wrong one is named, and the trainer is left as it was."""

import copy
import dataclasses
import random
from types import SimpleNamespace

import bitsandbytes as bnb
import numpy
import pytest
import torch
from peft import get_peft_model
from transformers import PrinterCallback
from trl import DPOTrainer

from scripts import train
from utils import chat, models, preferences, preflight, reference_cache, trainer_checks, training
from utils.settings import PROFILES

SETTINGS = PROFILES["embedded"]
CHECKS = [
    "versions",
    "device",
    "precision",
    "learning rate",
    "trainable weights",
    "one adapter",
    "checkpoints",
]
CHECKS += [
    "row length",
    "max_length",
    "image tokens",
    "memory",
    "reference",
    "first loss",
    "gradients",
]


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:32]"))


@pytest.fixture
def make(rows, processor, tmp_path):
    """`make(settings=…, model=…, **changes)`: a trainer as notebook 03 makes it, with four pairs a step."""

    def made(settings=SETTINGS, model=None, **changes):
        changes = {
            "max_steps": 3,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "disable_tqdm": True,
        } | changes
        return training.make_trainer(
            settings, model or models.load_model(settings), processor, rows, tmp_path, **changes
        )

    return made


@pytest.fixture
def by_hand(rows, processor, tmp_path):
    """A trainer that a reader builds without this package: `by_hand(model, peft_config)`."""

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
    """{check: (result, found and what to do)}"""
    found = training.preflight(trainer, **changes)
    assert {tuple(row) for row in found} == {("check", "result", "found", "what to do")}
    assert all(row["what to do"] or row["result"] == "ok" for row in found), (
        "what is not ok says what to do"
    )
    return {row["check"]: (row["result"], f"{row['found']} {row['what to do']}") for row in found}


def failed(trainer, **changes):
    return {
        check: text
        for check, (result, text) in results(trainer, **changes).items()
        if result == "failed"
    }


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_right_set_up_is_all_green(make, shared_prefix, checkpointing):
    trainer = make(shared_prefix=shared_prefix, gradient_checkpointing=checkpointing)
    found = results(trainer)
    assert list(found) == CHECKS and {result for result, _ in found.values()} == {"ok"}
    assert (
        "arrive at 28 of 56" in found["gradients"][1]
        and "0.6931 (ln 2 = 0.6931)" in found["first loss"][1]
    )
    assert (
        "72 for 72" in found["image tokens"][1]
    )  # 9 an image, in the two rows of each of four pairs
    assert not trainer.model.is_gradient_checkpointing


def test_a_run_after_preflight_is_the_run_without_it(make):
    logs = []
    for looked_at in (False, True):
        trainer = make(learning_rate=1e-3)
        if looked_at:
            training.preflight(trainer)
        trainer.train()
        logs.append(
            [
                {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
                for entry in trainer.state.log_history
            ]
        )
    assert logs[0] == logs[1] and len(logs[0]) > 3 and logs[0][0]["num_tokens"] > 100


@pytest.mark.parametrize("wrong", [{}, {"max_length": 6}])
def test_the_trainer_is_left_as_it_was(make, wrong):
    trainer = make(**wrong)
    trainer.model.train()
    trainer.model.get_base_model().model.vision_model.eval()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def state():
        modes = [module.training for module in trainer.model.modules()]
        drawn = [
            torch.get_rng_state().tolist(),
            random.getstate(),
            numpy.random.get_state()[1].tolist(),
        ]
        attributes = [
            sorted(vars(thing))
            for thing in (
                trainer,
                trainer.accelerator,
                trainer.args,
                trainer.model.get_base_model().model,
            )
        ]
        return copy.deepcopy(
            [modes, drawn, attributes, trainer._metrics, trainer._total_train_tokens]
        )

    before = state()
    preflight.preflight(trainer)
    assert state() == before and not any(trainer._metrics.values())
    assert all(
        torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items()
    )
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_the_learning_rate_of_full_fine_tuning_is_refused_for_an_adapter(make):
    assert "hardly moves" in failed(make(learning_rate=1e-6))["learning rate"]
    trainer = make(learning_rate=1e-5)
    assert results(trainer)["learning rate"][0] == "ok"
    trainer.args.learning_rate = 3e-3  # ten times the profile's: notebook 03 shows what it does
    assert results(trainer)["learning rate"][0] == "warning"


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_max_length_that_cuts_image_tokens_is_named(make, shared_prefix):
    found = failed(make(max_length=6, shared_prefix=shared_prefix))
    assert "max_length=None: 6 cuts image tokens off" in found["image tokens"]
    assert "nothing is left of 8 of 8 answers" in found["max_length"]


def test_a_max_length_that_cuts_only_answers_is_a_warning(make):
    found = results(make(max_length=60))
    assert (
        found["max_length"][0] == "warning"
        and found["image tokens"][0] == found["gradients"][0] == "ok"
    )


def test_an_adapter_on_the_vision_tower_is_named_unless_it_is_meant(make):
    trainer = make(dataclasses.replace(SETTINGS, lora_target="all-linear"))
    assert "vision and connector would change too" in failed(trainer)["trainable weights"]
    assert not failed(trainer, parts=("language", "vision", "connector"))


def test_weights_that_train_beside_the_adapter_are_named(make):
    trainer = make()
    trainer.model.get_input_embeddings().weight.requires_grad_(True)
    assert "not the adapter's" in failed(trainer)["trainable weights"]


def test_a_model_in_which_nothing_trains_is_named(make):
    trainer = make()
    trainer.model.requires_grad_(False)
    assert "peft_config" in failed(trainer)["trainable weights"]


def test_a_left_over_get_peft_model_is_named_however_it_was_left(by_hand):
    lora = training.lora_config(SETTINGS)
    everywhere = training.lora_config(dataclasses.replace(SETTINGS, lora_target="all-linear"))

    def found(model, adapter):
        return failed(by_hand(model, adapter))["one adapter"]

    model = models.load_model(SETTINGS)
    first = get_peft_model(model, lora)
    assert "its old wrapper is still in use" in found(model, lora) and first is not None
    model = models.load_model(SETTINGS)
    get_peft_model(model, lora, adapter_name="first")
    assert "adapters first, default" in found(model, lora)
    model = models.load_model(SETTINGS)
    get_peft_model(model, everywhere)
    assert "25 layers carry one that target_modules does not name" in found(model, lora)
    assert "copy of a new adapter" in found(get_peft_model(models.load_model(SETTINGS), lora), None)
    assert "wraps another" in found(
        get_peft_model(get_peft_model(models.load_model(SETTINGS), lora), lora), None
    )


def test_a_right_trainer_made_by_hand_lacks_only_the_profile(by_hand):
    trainer = by_hand(models.load_model(SETTINGS), training.lora_config(SETTINGS))
    found = {check: text for check, (result, text) in results(trainer).items() if result != "ok"}
    assert (
        found.keys() == {"precision", "row length", "memory"}
        and "trains weights in bfloat16" in found["precision"]
    )


def test_going_on_with_an_adapter_is_right(make, tmp_path):
    trainer = make(learning_rate=2e-3, save_strategy="no")
    training.train(trainer, SETTINGS)
    assert "first loss" in failed(trainer), "it has trained already"
    found = results(
        make(model=models.load_tuned(SETTINGS, tmp_path / "adapter"), continue_adapter=True)
    )
    assert {result for result, _ in found.values()} == {"ok"}
    assert "frozen copy" in found["reference"][1] and found["gradients"][1].startswith(
        "arrive at 56 of 56"
    )


class Cut(bnb.nn.Linear4bit):
    """What bitsandbytes leaves on a CPU with AVX512-BF16 after generation: an output without a way back."""

    def forward(self, x):
        return super().forward(x).detach()


def test_gradients_that_do_not_arrive_are_missed(make):
    trainer = make()
    for module in trainer.model.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = Cut
    assert list(found := failed(trainer)) == ["gradients"]
    assert (
        "none at 20 of 56 tensors" in found["gradients"]
    )  # o_proj and down_proj of 4 layers hear through the residual stream


def test_layers_that_would_stop_gradients_later_are_found_now(make):
    trainer = make()
    four_bit = next(
        module for module in trainer.model.modules() if isinstance(module, bnb.nn.Linear4bit)
    )
    four_bit.support_avx512bf16_for_cpu = True
    assert "keep_gradients_flowing" in failed(trainer)["gradients"]


def test_an_adapter_that_is_not_zero_at_the_start_is_noticed_with_any_loss(make):
    for changes in ({}, {"loss_type": ["ipo"], "shared_prefix": False}):
        trainer = make(**changes)
        assert not failed(trainer)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(
                    parameter, std=0.02, generator=torch.Generator().manual_seed(0)
                )
        assert list(failed(trainer)) == ["first loss"]


def test_a_reference_that_is_not_this_model_is_noticed(make, tmp_path):
    trainer = make()
    reference_cache.use_reference_cache(trainer, tmp_path)
    assert not failed(trainer)
    stale = trainer.data_collator
    trainer.data_collator = lambda rows: (
        stale(rows) | {"ref_chosen_logps": torch.full((len(rows),), -50.0)}
    )
    assert "delete log-probabilities kept on disk" in failed(trainer)["reference"]


def test_too_little_memory_is_said_before_it_runs_out(make, monkeypatch):
    trainer = make()
    monkeypatch.setattr(preflight, "free_bytes", lambda place: 1e6)
    assert "1.0 MB are free" in failed(trainer)["memory"]


def test_a_disk_too_full_or_closed_is_said_before_the_first_checkpoint(make, monkeypatch, tmp_path):
    trainer = make(save_steps=1)
    needed = (
        4
        * sum(
            parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad
        )
        * 10
    )  # 3 checkpoints
    for free, expected in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(
            trainer_checks.shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free)
        )
        assert ("save_total_limit" in failed(trainer).get("checkpoints", "")) is expected
    (tmp_path / "file").touch()
    trainer.args.output_dir = str(tmp_path / "file" / "runs")
    assert "cannot be written" in failed(trainer)["checkpoints"]


def test_rows_over_the_token_budget_are_counted(make):
    trainer = make(dataclasses.replace(SETTINGS, token_budget=80))
    longest = [chat.count_tokens(row, trainer.processing_class) for row in trainer.train_dataset]
    text = failed(trainer)["row length"]
    assert (
        f"up to {max(longest)} tokens; " in text
        and "over the budget of 80" in text
        and "within_budget" in text
    )


def test_rows_of_a_stream_are_looked_at_too(processor, tmp_path):
    stream = chat.format_dataset(
        preferences.load(SETTINGS.dataset, "train[:32]").to_iterable_dataset()
    )
    changes = {"max_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True}
    found = results(
        training.make_trainer(
            SETTINGS, models.load_model(SETTINGS), processor, stream, tmp_path, **changes
        )
    )
    assert {result for result, _ in found.values()} == {"ok"} and found["row length"][1].startswith(
        "the first 8 rows"
    )


def test_a_gpu_that_only_emulates_bfloat16_is_named(make, monkeypatch):
    """A T4, as seen by the check: `is_bf16_supported()` says yes there."""
    trainer, asked = make(), []
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: asked.append(1) or including_emulation,
    )
    gpu = SimpleNamespace(
        args=SimpleNamespace(bf16=True, fp16=False, device=torch.device("cuda")),
        model=trainer.model,
    )
    assert trainer_checks.precision(gpu)["result"] == "failed" and asked
    gpu.args.bf16, gpu.args.fp16 = False, True
    assert trainer_checks.precision(gpu)["result"] == "ok"
    trainer.args.bf16 = True  # what TRL's DPOConfig asks for where nobody says otherwise
    assert trainer_checks.precision(trainer)["result"] == "warning"


def test_an_old_package_is_named_with_what_is_needed(monkeypatch):
    there = trainer_checks.versions("peft")["peft"]
    monkeypatch.setattr(
        trainer_checks,
        "versions",
        lambda *names: dict.fromkeys(names, "99") | {"peft": "0.1", "trl": "1.16"},
    )
    assert there != "0.1" and trainer_checks.packages()["found"] == "peft>=0.20, here 0.1"


def test_the_table_escapes_and_speaks_without_colour(monkeypatch):
    shown = []
    monkeypatch.setattr(preflight, "show_html", lambda html, text: shown.extend([html, text]))
    preflight.show(
        [
            trainer_checks.row("a", "ok", "fine", "no advice"),
            trainer_checks.row("b", "failed", "<script>", "do & see"),
        ]
    )
    html, text = shown
    assert (
        "&lt;script&gt;" in html
        and "<script>" not in html
        and "do &amp; see" in html
        and html.count(">failed<") == 1
    )
    assert text == "ok      a: fine\nfailed  b: <script>\n        → do & see"


def test_the_command_line_stops_where_a_check_fails_unless_told_to_go_on(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(preflight, "free_bytes", lambda place: 1e6)
    monkeypatch.setitem(
        PROFILES, "embedded", dataclasses.replace(SETTINGS, train_split="train[:32]")
    )  # counting tokens takes seconds
    arguments = ["--profile", "embedded", "--output", str(tmp_path), "--max-steps", "1"]
    with pytest.raises(
        SystemExit, match=r"nothing was trained: preflight failed at memory\. --no-preflight"
    ):
        train.main(arguments)
    assert (
        "failed  memory: a step takes up to" in capsys.readouterr().out
        and not (tmp_path / "training.json").exists()
    )
    train.main([*arguments, "--no-preflight"])
    assert (tmp_path / "training.json").exists()
