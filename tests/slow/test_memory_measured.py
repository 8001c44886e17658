"""Estimates of memory against what a step really keeps, and against PEFT for the real models."""

import copy
import dataclasses
import functools
import json

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from utils import chat, memory, models, preferences, training
from utils.settings import PROFILES, ROOT

EMBEDDED = PROFILES["embedded"]
WITHIN = 0.15


@pytest.mark.parametrize("target", ["the profile's", "all-linear"])
@pytest.mark.parametrize("profile", ["smolvlm", "qwen", "idefics2"])
def test_peft_counts_the_same_adapter_in_a_real_model(profile, target):
    settings = PROFILES[profile]
    if target == "all-linear":
        settings = dataclasses.replace(settings, lora_target=target)
    model = copy.deepcopy(memory.architecture(settings.model))
    model = get_peft_model(model, training.lora_config(settings))
    parts = dict.fromkeys(("vision", "connector", "language", "head"), 0)
    for row in memory.placement(settings):
        parts[row["part"]] += row["adapter"]
    for part, (trainable, _) in models.trainable_by_part(model).items():
        assert trainable == parts[part], part


def one_step(settings, processor, output, shared_prefix=False):
    """A trainer for one step, by default TRL's, and how many tokens of text its rows have.

    Its image features carry no gradient, as the estimate assumes.
    """
    rows = chat.format_dataset(preferences.load(settings.dataset, f"train[:{settings.batch_size}]"))
    trainer = training.make_trainer(
        settings,
        models.load_model(settings),
        processor,
        rows,
        output,
        shared_prefix=shared_prefix,
        max_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    inner = trainer.model.get_base_model().model
    without_gradient = torch.no_grad()(type(inner).get_image_features)
    inner.get_image_features = functools.partial(without_gradient, inner)
    tokens = chat.training_batch(rows, processor)["input_ids"].shape[1]
    return trainer, tokens - memory.image_tokens(settings)


def kept_bytes(settings, text_tokens, compute_bytes, casts=False):
    """The formula for the activations of a batch of `settings`."""
    text = memory.architecture(settings.model).config.get_text_config()
    tokens = text_tokens + memory.image_tokens(settings)
    rows = 2 * settings.batch_size
    checkpointing = settings.gradient_checkpointing
    batch = (text, rows, tokens, settings.lora_rank, compute_bytes)
    return memory.kept_bytes(*batch, checkpointing, casts)


def test_the_estimate_is_what_a_step_of_the_embedded_model_needs(processor, tmp_path):
    settings = dataclasses.replace(EMBEDDED, batch_size=8)
    trainer, text_tokens = one_step(settings, processor, tmp_path)
    measured = memory.measure(trainer)
    estimate = memory.estimate(settings, text_tokens, gpu=False)
    estimate_of_peak = sum(estimate.values())
    del estimate["backward"]  # not measured on its own
    for component, count in estimate.items():
        assert count == pytest.approx(measured.get(component, 0), rel=WITHIN), component
    assert estimate["weights"] == measured["weights"], "every byte of the frozen model is counted"
    assert estimate_of_peak == pytest.approx(measured["peak"], rel=WITHIN)


def test_with_checkpointing_too(processor, tmp_path):
    settings = dataclasses.replace(EMBEDDED, batch_size=8, gradient_checkpointing=True)
    trainer, text_tokens = one_step(settings, processor, tmp_path)
    measured = memory.measure(trainer)
    kept = kept_bytes(settings, text_tokens, compute_bytes=4)
    assert kept == pytest.approx(measured["activations"], rel=WITHIN)
    estimate = memory.estimate(settings, text_tokens, gpu=False)
    assert sum(estimate.values()) == pytest.approx(measured["peak"], rel=WITHIN)


@pytest.fixture
def sixteen_bit(monkeypatch):
    """Load and train as on a GPU: bfloat16 and autocast.

    PEFT asks whether CUDA's autocast is on, so here the CPU's answers.
    """
    asked = torch.is_autocast_enabled

    def answered(*device):
        return asked(*device) if device else asked("cpu")

    monkeypatch.setattr(torch, "is_autocast_enabled", answered)
    for module in (models, training):
        monkeypatch.setattr(module, "compute_dtype", lambda: torch.bfloat16)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("four_bit", [False, True])
def test_the_activations_in_16_bit_too(sixteen_bit, processor, tmp_path, checkpointing, four_bit):
    settings = dataclasses.replace(
        EMBEDDED, batch_size=8, gradient_checkpointing=checkpointing, four_bit=four_bit
    )
    trainer, text_tokens = one_step(settings, processor, tmp_path)
    measured = memory.measure(trainer)
    kept = kept_bytes(settings, text_tokens, compute_bytes=2, casts=not four_bit)
    assert kept == pytest.approx(measured["activations"], rel=WITHIN)
    assert memory.estimate(settings, text_tokens)["weights"] == measured["weights"]


def test_a_pair_in_one_row_takes_at_most_its_estimate(processor, tmp_path):
    settings = dataclasses.replace(EMBEDDED, batch_size=8)
    trainer, text_tokens = one_step(settings, processor, tmp_path, shared_prefix=True)
    peak = memory.measure(trainer)["peak"]
    packed = sum(memory.estimate(settings, text_tokens, gpu=False, packed=True).values())
    stock = sum(memory.estimate(settings, text_tokens, gpu=False).values())
    assert peak < packed < stock


def small_config(name):
    """The configuration `name` of configs/, made small: its real classes, other sizes."""
    values = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    grouped = "qwen" in name or "idefics2" in name
    values["text_config"].update(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=6,
        pad_token_id=0,
        num_attention_heads=4,
        num_key_value_heads=2 if grouped else 4,
        head_dim=16,
    )
    values["vision_config"].update(
        num_hidden_layers=1,
        depth=1,
        hidden_size=64,
        num_attention_heads=2,
        num_heads=2,
        out_hidden_size=64,
        intermediate_size=64,
        image_size=28,
        fullatt_block_indexes=[0],
    )
    values.setdefault("perceiver_config", {}).update(hidden_size=64, resampler_depth=1)
    if "qwen" in name:
        values["text_config"]["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    return AutoConfig.for_model(**values)


@pytest.mark.parametrize("name", ["idefics2-8b", "qwen2.5-vl-3b-instruct", "smolvlm-instruct"])
def test_the_activations_of_the_other_language_models_too(name):
    """On padded text, what autograd keeps is what the formula says."""
    model = AutoModelForImageTextToText.from_config(small_config(name))
    model = get_peft_model(model, training.lora_config(dataclasses.replace(EMBEDDED, lora_rank=4)))
    ids = torch.randint(1, 90, (4, 50))
    mask = torch.ones(4, 50, dtype=torch.long)
    mask[0, 40:] = 0
    saved = []

    def save(tensor):
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    own = list(model.parameters())
    text = model.get_base_model().config.get_text_config()
    kept = memory.kept_bytes(text, 4, 50, 4, 4, checkpointing=False)
    assert kept == pytest.approx(memory.held(saved + own) - memory.held(own), rel=WITHIN)
    assert logits.requires_grad
