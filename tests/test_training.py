import inspect
import json
import math

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

from scripts import train
from utils import callbacks, chat, models, preferences, training
from utils.generation import answer
from utils.settings import PROFILES

SETTINGS = PROFILES["embedded"]


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:64]"))


def trainer_for(rows, processor, output, **changes):
    changes = {
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
    } | changes
    return training.make_trainer(
        SETTINGS, models.load_model(SETTINGS), processor, rows, output, **changes
    )


def adapter_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_only_the_language_model_is_in_4_bit():
    model = models.load_model(SETTINGS)
    four_bit = {
        name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)
    }
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert (
        four_bit == {name for name in linear if ".text_model." in name} and len(four_bit) == 7 * 4
    )
    assert not any(p.requires_grad for p in model.parameters())


def test_gradients_still_flow_after_generation_in_eval_mode(processor, rows, tmp_path):
    """Without `keep_gradients_flowing`, CPUs with AVX512-BF16 repack the 4-bit weights here and the gradient is gone."""
    trainer = trainer_for(rows, processor, tmp_path)
    row = preferences.load(SETTINGS.dataset, "train[:1]")[0]
    answer(trainer.model, processor, [row["image"]], [row["question"]], SETTINGS, max_new_tokens=2)
    four_bit = [m for m in trainer.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert four_bit and not any(m.support_avx512bf16_for_cpu for m in four_bit)
    trainer.model.train()
    trainer.compute_loss(
        trainer.model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    ).backward()
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_repacking_that_is_switched_off_does_stop_gradients():
    """The trap itself, forced: on other CPUs the case does not exist, and this test says that it proves nothing there."""
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(
        "cpu"
    )
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


def test_the_first_loss_is_ln_2_and_the_adapter_is_in_float32(processor, rows, tmp_path):
    trainer = trainer_for(rows, processor, tmp_path)
    assert {p.dtype for p in adapter_of(trainer.model).values()} == {torch.float32}
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/accuracies"] == 0 and first["rewards/margins"] == 0
    assert trainer.state.log_history[3]["loss"] < math.log(2)


def test_only_the_language_model_is_adapted(processor, rows, tmp_path):
    model = trainer_for(rows, processor, tmp_path).model
    parts = models.trainable_by_part(model)
    assert (
        parts["language"][0] > 0
        and parts["vision"][0] == parts["connector"][0] == parts["head"][0] == 0
    )
    assert parts["vision"][1] > 0 and parts["connector"][1] > 0
    assert parts["language"][0] == sum(p.numel() for p in adapter_of(model).values())


def test_a_model_with_an_adapter_is_refused(processor, rows, tmp_path):
    model = trainer_for(rows, processor, tmp_path).model
    for adapted in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="already carries an adapter"):
            training.make_trainer(SETTINGS, adapted, processor, rows, tmp_path)


def continued(rows, processor, round_one, output, **changes):
    """A trainer that goes on with the adapter of `round_one`."""
    changes = {
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
    } | changes
    model = models.load_tuned(SETTINGS, round_one / "adapter")
    return training.make_trainer(
        SETTINGS, model, processor, rows, output, continue_adapter=True, **changes
    )


@pytest.fixture(scope="module")
def round_one(rows, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("round one")
    training.train(
        trainer_for(rows, processor, folder, learning_rate=2e-3, warmup_steps=0), SETTINGS
    )
    return folder


def test_round_two_starts_where_round_one_ended_and_measures_against_it(
    rows, processor, round_one, tmp_path
):
    trainer = continued(rows, processor, round_one, tmp_path, learning_rate=2e-3, warmup_steps=0)
    started = {
        name: p.detach().clone()
        for name, p in trainer.model.named_parameters()
        if ".default." in name
    }
    saved = {
        n: p
        for n, p in models.load_tuned(SETTINGS, round_one / "adapter").named_parameters()
        if "lora" in n
    }
    assert saved.keys() == started.keys() and {
        p.dtype for p in adapter_of(trainer.model).values()
    } == {torch.float32}
    assert all(torch.equal(started[name], p) for name, p in saved.items()), (
        "TRL's cast to bfloat16 must not be left in it"
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and log[0][
        "rewards/margins"
    ] == pytest.approx(0, abs=1e-6)
    assert log[-1]["loss"] < math.log(2)
    now = dict(trainer.model.named_parameters())
    assert all(
        torch.equal(now[name.replace(".default.", ".ref.")], p) for name, p in started.items()
    ), "the reference must not move"
    assert any(not torch.equal(now[name], p) for name, p in started.items())


def test_what_round_two_saves_loads_as_one_adapter_and_answers_as_trained(
    rows, processor, round_one, tmp_path
):
    trainer = continued(rows, processor, round_one, tmp_path, learning_rate=2e-3)
    training.train(trainer, SETTINGS)
    assert not [path.name for path in (tmp_path / "adapter").iterdir() if path.is_dir()]
    loaded, scenes = (
        models.load_tuned(SETTINGS, tmp_path / "adapter"),
        preferences.load(SETTINGS.dataset, "test[:4]"),
    )
    assert list(loaded.peft_config) == ["default"]
    asked = (processor, scenes["image"], scenes["question"], SETTINGS)
    assert answer(loaded, *asked) == answer(trainer.model, *asked)


def test_continuing_what_carries_no_single_adapter_is_refused(rows, processor, round_one, tmp_path):
    for model in (
        models.load_model(SETTINGS),
        continued(rows, processor, round_one, tmp_path).model,
    ):
        with pytest.raises(ValueError, match="needs a model with one adapter"):
            training.make_trainer(SETTINGS, model, processor, rows, tmp_path, continue_adapter=True)
    with pytest.raises(ValueError, match="already carries an adapter"):
        training.make_trainer(
            SETTINGS, models.load_tuned(SETTINGS, round_one / "adapter"), processor, rows, tmp_path
        )


def test_resuming_ends_at_the_same_adapter(processor, rows, tmp_path):
    straight = trainer_for(rows, processor, tmp_path / "straight", max_steps=6)
    training.train(straight, SETTINGS)
    stopped = trainer_for(rows, processor, tmp_path / "stopped", max_steps=6, save_steps=3)
    stopped.add_callback(callbacks.StopAfter(3))
    training.train(stopped, SETTINGS)
    assert stopped.state.global_step == 3
    resumed = trainer_for(rows, processor, tmp_path / "stopped", max_steps=6, save_steps=3)
    record = training.train(resumed, SETTINGS, resume=True)
    assert record["steps"] == 6
    for name, parameter in adapter_of(straight.model).items():
        torch.testing.assert_close(adapter_of(resumed.model)[name], parameter, rtol=0, atol=1e-6)


def test_nothing_to_resume_says_so(processor, rows, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        training.train(trainer_for(rows, processor, tmp_path / "none"), SETTINGS, resume=True)


def test_the_command_line_writes_adapter_and_record(tmp_path, capsys):
    train.main(["--profile", "embedded", "--output", str(tmp_path), "--max-steps", "2"])
    record = json.loads((tmp_path / "training.json").read_text())
    assert {
        "steps",
        "pairs",
        "seconds",
        "pairs_per_second",
        "final",
        "log",
        "versions",
        "settings",
    } <= set(record)
    assert (
        record["steps"] == 2
        and record["pairs"] == 2 * SETTINGS.batch_size
        and record["settings"]["profile"] == "embedded"
    )
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert "0 longer than" in capsys.readouterr().out


def test_the_command_line_lists_the_profiles():
    with pytest.raises(SystemExit, match="embedded, smolvlm, qwen, idefics2"):
        train.main(["--profile", "nothing"])


def test_a_saved_adapter_answers_as_the_trained_model(processor, rows, tmp_path):
    trainer = trainer_for(rows, processor, tmp_path, learning_rate=2e-3)
    training.train(trainer, SETTINGS)
    scenes = preferences.load(SETTINGS.dataset, "test[:8]")
    asked = (processor, scenes["image"], scenes["question"], SETTINGS)
    loaded = models.load_tuned(SETTINGS, tmp_path / "adapter")
    assert answer(loaded, *asked) == answer(trainer.model, *asked)
    assert answer(loaded, *asked, adapter=False) == answer(models.load_model(SETTINGS), *asked)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_argument_we_pass_exists_in_the_installed_libraries(profile, tmp_path):
    """Libraries rename arguments; a run on a real model should not be the first to find out."""
    settings = PROFILES[profile]
    config = training.dpo_config(settings, tmp_path)
    assert (
        config.max_length is None
        and config.learning_rate == settings.learning_rate
        and config.report_to in ([], "none", ["none"])
    )
    lora = training.lora_config(settings)
    assert isinstance(lora, LoraConfig) and lora.target_modules == settings.lora_target
    for function, names in {
        DPOTrainer.__init__: [
            "model",
            "args",
            "train_dataset",
            "eval_dataset",
            "processing_class",
            "peft_config",
            "callbacks",
        ],
        DPOConfig.__init__: [
            "beta",
            "max_length",
            "warmup_steps",
            "gradient_checkpointing",
            "bf16",
            "fp16",
            "use_cpu",
            "save_total_limit",
        ],
        BitsAndBytesConfig.__init__: [
            "load_in_4bit",
            "bnb_4bit_quant_type",
            "bnb_4bit_use_double_quant",
            "bnb_4bit_compute_dtype",
            "llm_int8_skip_modules",
        ],
    }.items():
        assert set(names) <= set(inspect.signature(function).parameters)
    assert AutoProcessor.from_pretrained and AutoModelForImageTextToText.from_pretrained


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
