"""What preflight says of a trainer at rest, and that a right set-up passes every check.

Mistakes that need a trainer of their own are in slow/test_preflight_mistakes.py.
"""

import dataclasses
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from mixed_rows import IMAGE, NONE, NONE_EITHER, ONE, ROWS, TWO, dataset, row, text, turn
from peft import get_peft_model

from utils import chat, models, preferences, preflight, training
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
    "row length",
    "max_length",
    "image tokens",
    "memory",
    "reference",
    "first loss",
    "gradients",
]


@pytest.fixture(scope="module")
def trainer(processor, tmp_path_factory):
    """A trainer as notebook 03 makes it. Tests put back what they change."""
    rows = chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:8]"))
    model = models.load_model(SETTINGS)
    output = tmp_path_factory.mktemp("run")
    return training.make_trainer(
        SETTINGS,
        model,
        processor,
        rows,
        output,
        max_steps=3,
        per_device_train_batch_size=2,
        disable_tqdm=True,
    )


def test_a_right_set_up_passes_every_check(trainer):
    rows = preflight.check(trainer)
    assert [row["check"] for row in rows] == CHECKS
    assert {row["result"] for row in rows} == {preflight.OK}
    assert {row["what to do"] for row in rows} == {""}
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("pairs", [ROWS, [NONE, NONE_EITHER]])
def test_rows_with_and_without_images_pass_every_check(pairs, processor, tmp_path):
    trainer = training.make_trainer(
        SETTINGS,
        models.load_model(SETTINGS),
        processor,
        chat.format_dataset(dataset(pairs)),
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        disable_tqdm=True,
    )
    found = {row["check"]: row for row in preflight.check(trainer)}
    assert list(found) == CHECKS
    assert {row["result"] for row in found.values()} == {preflight.OK}
    # Two pairs, so four rows: those with two images of nine tokens each, or without any.
    tokens = 4 * 2 * 9 if pairs is ROWS else 0
    assert found["image tokens"]["found"] == f"{tokens} for {tokens} features of the model"


def test_images_make_a_row_long(trainer, monkeypatch):
    wordy = row([], [turn("user", text("Why? " * 100))])
    wordier = row(ONE["images"], [turn("user", IMAGE, text("Why? " * 300))])
    rows = chat.format_dataset(dataset([NONE, TWO, ONE, wordy]))
    monkeypatch.setattr(trainer, "train_dataset", rows)
    expected = [rows[1], rows[2], rows[3], rows[0]]
    assert preflight.longest_rows(trainer) == expected
    rows = chat.format_dataset(dataset([TWO, wordier]))
    monkeypatch.setattr(trainer, "train_dataset", rows)
    assert preflight.longest_rows(trainer) == [rows[1], rows[0]]


@pytest.mark.parametrize("pair, images", [(NONE, 0), (ONE, 1), (TWO, 2)])
def test_memory_counts_the_tokens_of_further_images(pair, images, trainer, monkeypatch):
    """The estimate itself adds the nine tokens of one image."""
    rows = chat.format_dataset(dataset([pair]))
    monkeypatch.setattr(trainer, "train_dataset", rows)
    text_tokens = []
    right = preflight.memory.estimate

    def watched(settings, tokens, **options):
        text_tokens.append(tokens)
        return right(settings, tokens, **options)

    monkeypatch.setattr(preflight.memory, "estimate", watched)
    preflight.check(trainer)
    length = chat.count_tokens(rows[0], trainer.processing_class)
    assert text_tokens == [length - (9 if images else 0)]


def test_a_sharded_run_needs_an_image_in_every_row_or_in_none(trainer, monkeypatch):
    for pairs, result in (([ONE, TWO], "ok"), ([NONE, NONE_EITHER], "ok"), (ROWS, "failed")):
        monkeypatch.setattr(trainer, "train_dataset", chat.format_dataset(dataset(pairs)))
        assert preflight.check_images_of_every_process(trainer)["result"] == result
    found = preflight.check_images_of_every_process(trainer)["found"]
    assert found == "2 of 6 rows have none"
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    names = [row["check"] for row in preflight.check(trainer)]
    assert names[-2:] == ["images", "one step"]


def test_the_learning_rate_of_full_fine_tuning_is_refused_for_an_adapter(trainer, monkeypatch):
    monkeypatch.setattr(trainer.args, "learning_rate", 1e-6)
    assert preflight.check_learning_rate(trainer)["result"] == "failed"
    monkeypatch.setattr(trainer.args, "learning_rate", 1e-5)
    assert preflight.check_learning_rate(trainer)["result"] == "ok"
    # Ten times the profile's: notebook 03 shows what it does.
    monkeypatch.setattr(trainer.args, "learning_rate", 3e-3)
    assert preflight.check_learning_rate(trainer)["result"] == "warning"


def test_weights_that_train_beside_the_adapter_are_named(trainer):
    embeddings = trainer.model.get_input_embeddings().weight
    embeddings.requires_grad_(True)
    row = preflight.check_trainable_weights(trainer, ("language",))
    embeddings.requires_grad_(False)
    assert row["result"] == "failed" and "embed_tokens" in row["found"]


def test_a_model_in_which_nothing_trains_is_named():
    nothing = SimpleNamespace(model=torch.nn.Linear(2, 2).requires_grad_(False))
    row = preflight.check_trainable_weights(nothing, ("language",))
    assert row["result"] == "failed" and "peft_config" in row["what to do"]


def test_a_left_over_get_peft_model_is_named():
    lora = training.lora_config(SETTINGS)
    everywhere = training.lora_config(dataclasses.replace(SETTINGS, lora_target="all-linear"))

    def found(model):
        row = preflight.check_adapter(SimpleNamespace(model=model))
        assert row["result"] == "failed"
        return row["found"]

    model = models.load_model(SETTINGS)
    get_peft_model(model, everywhere)
    model = get_peft_model(model, lora)
    assert "25 layers" in found(model)
    assert "wraps another" in found(get_peft_model(model, lora))
    model.add_adapter("first", lora)
    assert "default, first" in found(model)


def test_checkpoints_that_do_not_fit_the_disk_are_noticed(trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer.args, "save_steps", 1)
    trained = 0
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
    needed = 4 * trained * 10  # three checkpoints of three tensors each, then the adapter
    for free, result in ((needed, "ok"), (needed - 1, "failed")):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place, usage=usage: usage)
        assert preflight.check_disk(trainer)["result"] == result
    (tmp_path / "file").touch()
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path / "file" / "runs"))
    row = preflight.check_disk(trainer)
    assert row["result"] == "failed" and "output_dir" in row["what to do"]


@pytest.mark.parametrize(
    "limit, longest, lengths, result",
    [
        (None, 90, [5, 7], "ok"),
        (90, 90, [5, 7], "ok"),
        (89, 90, [5, 7], "warning"),
        (60, 90, [5, 0], "failed"),
    ],
)
def test_a_max_length_that_cuts_rows_is_noticed(limit, longest, lengths, result):
    row = preflight.check_max_length(limit, longest, torch.tensor(lengths))
    assert row["result"] == result


def test_image_tokens_without_features_are_noticed():
    assert preflight.check_image_tokens(9, 9, None)["result"] == "ok"
    assert "max_length=None" in preflight.check_image_tokens(4, 9, 6)["what to do"]
    assert "revision" in preflight.check_image_tokens(4, 9, None)["what to do"]


def test_rows_over_the_token_budget_are_counted(trainer):
    short = dataclasses.replace(SETTINGS, token_budget=80)
    row = preflight.check_row_length(short, trainer, [60, 90, 100])
    assert row["result"] == "failed" and "2 are over the budget of 80" in row["found"]
    assert preflight.check_row_length(None, trainer, [60])["result"] == "warning"


def test_too_little_memory_is_noticed(trainer, monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 1e6)
    row = preflight.check_memory(SETTINGS, trainer, 60)
    assert row["result"] == "failed" and "1.0 MB" in row["found"]
    assert preflight.check_memory(None, trainer, 60)["result"] == "warning"


def test_a_reference_or_a_loss_that_is_off_is_noticed(trainer):
    logps = torch.tensor([-10.0, -12.0])
    assert preflight.check_reference(trainer, logps, logps)["result"] == "ok"
    assert preflight.check_reference(trainer, logps, logps - 1)["result"] == "failed"
    assert preflight.check_first_loss(trainer, 0.6931, 0.0)["result"] == "ok"
    assert preflight.check_first_loss(trainer, 0.8, 0.0)["result"] == "failed"
    assert preflight.check_first_loss(trainer, 0.6931, 0.5)["result"] == "failed"
    assert preflight.check_first_loss(trainer, float("nan"), 0.0)["result"] == "failed"


def test_a_gpu_that_only_emulates_bfloat16_is_noticed(trainer, monkeypatch):
    """A T4, as seen by the check: `is_bf16_supported()` says yes there."""

    def supported(including_emulation=True):
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    args = SimpleNamespace(bf16=True, fp16=False, device=torch.device("cuda"))
    gpu = SimpleNamespace(args=args, model=trainer.model)
    assert preflight.check_precision(gpu)["result"] == "failed"
    args.bf16 = False
    args.fp16 = True
    assert preflight.check_precision(gpu)["result"] == "ok"
    args.device = torch.device("cpu")
    assert preflight.check_precision(gpu)["result"] == "warning"


def test_an_old_package_is_named_with_what_is_needed(monkeypatch):
    assert preflight.check_versions()["result"] == "ok"

    def installed(name):
        if name == "trl":
            raise PackageNotFoundError(name)
        return "0.1" if name == "peft" else "99"

    monkeypatch.setattr(preflight, "version", installed)
    row = preflight.check_versions()
    assert row["result"] == "failed"
    peft, trl = sorted(row["found"].split("; "))
    assert trl.startswith("trl") and trl.endswith("is missing")
    assert peft.split(", ") == ["peft>=0.20", "here 0.1"]


def test_the_text_puts_advice_below_what_is_not_ok():
    rows = [
        preflight.finding("a", "ok", "fine", "no advice"),
        preflight.finding("b", "failed", "bad", "do this"),
    ]
    first, second, third = preflight.as_text(rows).splitlines()
    assert first.split() == ["ok", "a:", "fine"]
    assert second.split() == ["failed", "b:", "bad"]
    assert third.strip() == "→ do this"
