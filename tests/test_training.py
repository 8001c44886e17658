"""Configurations and refusals; nothing here trains. tests/slow/test_training_runs.py does."""

import inspect
import os
from dataclasses import replace
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from mixed_rows import RED, ROWS, dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

from scripts import train
from utils import chat, layouts, models, plan, training
from utils.settings import PROFILES

SETTINGS = PROFILES["embedded"]
# What we pass to the libraries. They rename arguments now and then.
PASSED = {
    DPOTrainer: (
        "model",
        "args",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "peft_config",
        "callbacks",
    ),
    DPOConfig: (
        "beta",
        "max_length",
        "warmup_steps",
        "gradient_checkpointing",
        "bf16",
        "fp16",
        "use_cpu",
        "save_total_limit",
    ),
    BitsAndBytesConfig: (
        "load_in_4bit",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "bnb_4bit_compute_dtype",
        "llm_int8_skip_modules",
    ),
}


@pytest.mark.parametrize("profile", PROFILES)
def test_the_libraries_accept_every_profile(profile, tmp_path):
    settings = PROFILES[profile]
    config = training.dpo_config(settings, tmp_path)
    assert config.max_length is None
    assert config.learning_rate == settings.learning_rate
    assert config.report_to in ([], "none", ["none"])
    lora = training.lora_config(settings)
    assert isinstance(lora, LoraConfig) and lora.target_modules == settings.lora_target


@pytest.mark.parametrize("library_class", PASSED)
def test_every_argument_we_pass_exists_in_the_installed_libraries(library_class):
    assert set(PASSED[library_class]) <= set(inspect.signature(library_class).parameters)
    assert AutoProcessor.from_pretrained and AutoModelForImageTextToText.from_pretrained


def test_changes_replace_the_arguments_of_the_profile(tmp_path):
    config = training.dpo_config(SETTINGS, tmp_path, learning_rate=1e-5, max_steps=3)
    assert (config.learning_rate, config.max_steps, config.beta) == (1e-5, 3, SETTINGS.beta)


@pytest.mark.parametrize(
    ("gpu", "cores", "processes", "workers"),
    [
        (False, 8, 1, 0),
        (True, 8, 1, 4),
        (True, 2, 1, 2),
        (True, None, 1, 1),
        (True, 4, 2, 2),
        (True, 2, 4, 1),
    ],
)
def test_a_gpu_does_not_wait_for_images(gpu, cores, processes, workers, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert plan.image_workers() == workers


@pytest.mark.parametrize(
    "batch_size, accumulation, processes, expected",
    [(16, 1, 1, (16, 1)), (16, 1, 2, (8, 1)), (1, 16, 4, (1, 4)), (4, 4, 2, (4, 2))],
)
def test_a_step_takes_as_many_pairs_however_many_processes(
    batch_size, accumulation, processes, expected, monkeypatch
):
    settings = replace(SETTINGS, batch_size=batch_size, gradient_accumulation=accumulation)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(training, "DPOConfig", dict)
    config = training.dpo_config(settings, "output")
    micro_batch = config["per_device_train_batch_size"]
    times = config["gradient_accumulation_steps"]
    assert (micro_batch, times) == expected
    assert micro_batch * times * processes == batch_size * accumulation
    assert micro_batch <= batch_size


def test_pairs_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(ValueError, match=r"3 processes.*16 pairs"):
        training.share_of_batch(SETTINGS, 3)


@pytest.mark.parametrize(("steps", "epoch", "pairs"), [(2, 0.8, 8), (3, 1.0, 10), (5, 1.8, 18)])
def test_pairs_are_counted_also_where_the_last_step_of_a_pass_has_fewer(steps, epoch, pairs):
    """Ten rows, four pairs per optimizer step: 4, 4 and 2."""
    arguments = SimpleNamespace(train_batch_size=2, gradient_accumulation_steps=2, world_size=1)
    state = SimpleNamespace(global_step=steps, epoch=epoch)
    trainer = SimpleNamespace(args=arguments, state=state, train_dataset=range(10))
    assert training.pairs_seen(trainer) == pairs


@pytest.fixture
def adapted():
    return get_peft_model(models.load_model(SETTINGS), training.lora_config(SETTINGS))


def test_a_model_with_an_adapter_is_refused(adapted, tmp_path):
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match="adapter"):
            training.make_trainer(SETTINGS, model, None, [], tmp_path)


def test_continuing_needs_exactly_one_adapter(adapted, tmp_path):
    adapted.add_adapter("second", training.lora_config(SETTINGS))
    for model in (models.load_model(SETTINGS), adapted):
        with pytest.raises(ValueError, match="exactly one adapter"):
            training.make_trainer(SETTINGS, model, None, [], tmp_path, continue_adapter=True)


def test_pairs_of_one_answer_and_two_images_are_refused(processor, tmp_path):
    """By name, also in a stream, which does not know its columns, and among rows to validate on."""
    second = ([[RED]] * len(ROWS), layouts.IMAGE_LIST)
    loaded = dataset(rejected_images=second)
    rows = chat.format_dataset(loaded)
    stream = chat.format_dataset(loaded.with_format(None).to_iterable_dataset())
    plain = chat.format_dataset(dataset())
    for train_rows, validation_rows in ((rows, None), (stream, None), (plain, rows)):
        with pytest.raises(ValueError, match=r'remove_columns\("rejected_images"\)'):
            training.make_trainer(
                SETTINGS, None, processor, train_rows, tmp_path, validation_rows=validation_rows
            )
    for without in (rows, stream):
        without = without.remove_columns("rejected_images")
        training.refuse_rejected_images(without)
        assert "rejected_images" not in next(iter(without))


def test_only_the_language_model_is_in_4_bit():
    model = models.load_model(SETTINGS)
    four_bit = set()
    linear = set()
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            four_bit.add(name)
        if isinstance(module, torch.nn.Linear):
            linear.add(name)
    assert four_bit == {name for name in linear if ".text_model." in name}
    assert len(four_bit) == 7 * 4
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_repacking_that_is_switched_off_does_stop_gradients():
    """Force the trap itself. On other CPUs it does not exist, and this test proves nothing."""
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer = layer.to("cpu")
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16: bitsandbytes does not repack here")

    def gradient():
        x = torch.ones(1, 64, requires_grad=True)
        layer.train()(x).sum().backward()
        return x.grad

    def forward_as_in_generation():
        with torch.no_grad():
            layer.eval()(torch.ones(1, 64))

    before = gradient()
    models.keep_gradients_flowing(layer)
    forward_as_in_generation()
    assert torch.equal(gradient(), before)
    layer.support_avx512bf16_for_cpu = True
    forward_as_in_generation()
    assert gradient() is None, (
        "bitsandbytes no longer loses the gradient: keep_gradients_flowing may go"
    )


def test_what_the_command_line_fixes_is_not_planned():
    smolvlm = PROFILES["smolvlm"]
    options = train.parse(["--batch-size", "2", "--no-four-bit"])
    fixed = train.fixed_by_hand(smolvlm, options)
    assert (fixed.batch_size, fixed.gradient_accumulation, fixed.four_bit) == (2, 8, False)
    assert fixed.planned == ("gradient_checkpointing", "generation_batch_size")
    assert train.fixed_by_hand(smolvlm, train.parse([])) == smolvlm
    with pytest.raises(ValueError, match="--batch-size 3 does not divide the 16 pairs"):
        train.fixed_by_hand(smolvlm, train.parse(["--batch-size", "3"]))


def test_the_command_line_lists_the_profiles():
    with pytest.raises(SystemExit, match="embedded, smolvlm, qwen, idefics2"):
        train.main(["--profile", "nothing"])


@pytest.mark.parametrize(
    ("gpu", "variables", "place"),
    [
        (False, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, None),
        (True, {"WORLD_SIZE": "1"}, "auto"),
        (True, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {"": 1}),
    ],
)
def test_each_process_puts_its_model_on_its_own_gpu(gpu, variables, place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert models.device_map() == place
