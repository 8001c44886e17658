"""Estimates of memory: the architectures, the formulas, what is really allocated, and who stays out of 4 bit."""

import copy
import dataclasses
import functools
import json

import bitsandbytes as bnb
import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from utils import chat, memory, models, preferences, training
from utils.settings import PROFILES, ROOT

EMBEDDED = PROFILES["embedded"]
WITHIN = 0.15


def total(settings, key="adapter"):
    return sum(row[key] for row in memory.placement(settings))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # the first is what https://huggingface.co/blog/dpo_vlm prints, 8,458,116,848 with 55,348,736 of LoRA, without the latter
    [
        ("idefics2-8b", 8_402_768_112),
        ("smolvlm-instruct", 2_246_272_880),
        ("qwen2.5-vl-3b-instruct", 3_754_622_976),
    ],
)
def test_an_architecture_has_the_known_number_of_parameters(name, parameters):
    model = memory.architecture(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_has_an_architecture(profile):
    rows = memory.placement(PROFILES[profile])
    assert sum(row["weights"] for row in rows) == sum(
        p.numel() for p in memory.architecture(PROFILES[profile].model).parameters()
    )


def test_an_unknown_model_is_refused_with_the_names_of_those_there_are():
    with pytest.raises(
        ValueError,
        match=r"configs/llava\.json; there are embedded/model, idefics2-8b, qwen2\.5-vl-3b-instruct, smolvlm",
    ):
        memory.architecture("somebody/LLaVA")


def test_the_well_known_table_is_reproduced():
    full = memory.training_states(8e9 * 4, 8e9, reference=8e9 * 4)
    assert (
        full == {"weights": 32e9, "reference": 32e9, "gradients": 32e9, "optimizer": 64e9}
        and sum(full.values()) == 160e9
    )
    lora = memory.training_states(8e9 * 2, 55_348_736, state_bytes=2, reference=8e9 * 2)
    assert {name: round(count / 1e9, 1) for name, count in lora.items()} == {
        "weights": 16.0,
        "reference": 16.0,
        "gradients": 0.1,
        "optimizer": 0.2,
    }
    assert round(sum(lora.values()) / 1e9, 1) == 32.3


def test_the_well_known_number_of_adapter_weights_is_that_of_rank_16():
    everywhere = dataclasses.replace(PROFILES["idefics2"], lora_target="all-linear", lora_rank=8)
    assert total(everywhere) == 27_674_368
    assert total(dataclasses.replace(everywhere, lora_rank=16)) == 55_348_736
    assert LoraConfig().r == 8 and trl.ModelConfig().lora_r == 16


@pytest.mark.parametrize("target", ["the profile's", "all-linear"])
@pytest.mark.parametrize("profile", PROFILES)
def test_peft_counts_the_same_adapter(profile, target):
    settings = PROFILES[profile]
    if target == "all-linear":
        settings = dataclasses.replace(settings, lora_target=target)
    model = get_peft_model(
        copy.deepcopy(memory.architecture(settings.model)), training.lora_config(settings)
    )
    parts = dict.fromkeys(("vision", "connector", "language", "head"), 0)
    for row in memory.placement(settings):
        parts[row["part"]] += row["adapter"]
    assert {
        part: trainable for part, (trainable, _) in models.trainable_by_part(model).items()
    } == parts


@pytest.mark.parametrize("profile", PROFILES)
def test_only_the_language_model_is_in_4_bit_and_adapted_and_all_of_it(profile):
    settings, model = PROFILES[profile], memory.architecture(PROFILES[profile].model)
    for row in memory.placement(settings):
        linear = isinstance(
            model.get_submodule(row["name"].rpartition(".")[0]), torch.nn.Linear
        ) and row["name"].endswith("weight")
        assert row["four_bit"] == bool(row["adapter"]) == (linear and row["part"] == "language"), (
            row["name"]
        )


def test_without_the_pattern_the_vision_tower_would_be_in_4_bit():
    careless = dataclasses.replace(PROFILES["idefics2"], keep_in_full_precision=("lm_head",))
    assert {row["part"] for row in memory.placement(careless) if row["four_bit"]} == {
        "vision",
        "connector",
        "language",
    }


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(128, 384), (100, 70), (64, 1), (2048, 256)])
def test_nf4_takes_the_bytes_that_the_formula_says(shape, double):
    packed, state = bnb.functional.quantize_4bit(
        torch.randn(shape), quant_type="nf4", compress_statistics=double
    )
    tensors = [packed, state.absmax, state.code]
    if double:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    assert sum(tensor.nbytes for tensor in tensors) == memory.nf4_bytes(shape[0] * shape[1], double)


def test_double_quantization_saves_what_its_paper_says():
    """QLoRA, section 3: 0.5 bit for the scale of each weight become 0.127, which is 0.373 less."""
    weights = 4096 * 14336
    bits = [8 * memory.nf4_bytes(weights, double) / weights for double in (False, True)]
    assert bits[0] == pytest.approx(4.5, abs=1e-3) and bits[1] == pytest.approx(4.127, abs=1e-3)


def test_trl_scores_in_tiles_of_the_assumed_size():
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    assert memory.LOGIT_TILE == (
        chunked_logprob.TOKEN_CHUNK_SIZE,
        utils._CHUNKED_LOGPROB_CHUNK_SIZE,
    )


def test_the_image_tokens_are_those_of_a_square_image_that_fills_the_budget():
    assert [
        memory.image_tokens(PROFILES[name]) for name in ("embedded", "smolvlm", "qwen", "idefics2")
    ] == [9, 5 * 81, 22**2, 64]
    assert [
        memory.image_tokens(PROFILES["smolvlm"], side) for side in (100, 384, 767, 768, 1152)
    ] == [81, 81, 81, 5 * 81, 10 * 81]
    assert [memory.image_tokens(PROFILES["qwen"], side) for side in (56, 224, 616)] == [
        2**2,
        8**2,
        22**2,
    ]
    assert [memory.image_side(PROFILES[name]) for name in ("smolvlm", "qwen")] == [768, 633]


def test_the_embedded_model_gets_the_image_tokens_that_are_counted(processor):
    pairs = chat.format_dataset(preferences.load(EMBEDDED.dataset, "train[:1]"))
    assert memory.image_tokens(EMBEDDED) == chat.check_tokens(pairs[0], processor)["image_tokens"]


def test_an_architecture_whose_image_tokens_are_not_known_says_so(monkeypatch):
    other = copy.deepcopy(memory.architecture(EMBEDDED.model))
    other.config.model_type = "another"
    monkeypatch.setattr(memory, "architecture", lambda name: other)
    with pytest.raises(ValueError, match=r"how another .* turns pixels into tokens"):
        memory.image_tokens(EMBEDDED)


@pytest.mark.parametrize("bad", [{"precision": "int3"}, {"text_tokens": 0}])
def test_a_bad_argument_of_the_estimate_is_named(bad):
    with pytest.raises(ValueError, match=r"precision.*fp32, bf16, nf4.*text_tokens"):
        memory.estimate(EMBEDDED, **bad)


def test_the_estimate_grows_with_what_it_is_said_to_depend_on():
    settings = PROFILES["smolvlm"]
    base = sum(memory.estimate(settings).values())
    assert sum(memory.estimate(settings, precision="bf16").values()) > base
    assert sum(memory.estimate(settings, precision="fp32").values()) > sum(
        memory.estimate(settings, precision="bf16").values()
    )
    assert sum(memory.estimate(settings, text_tokens=512).values()) > base
    assert sum(memory.estimate(settings, side=1536).values()) > base
    for change in ({"lora_rank": 64}, {"batch_size": 8}, {"gradient_checkpointing": False}):
        assert sum(memory.estimate(dataclasses.replace(settings, **change)).values()) > base


# Estimated and measured


def one_step(settings, processor, output):
    """TRL's trainer for one step on 8 pairs, whose image features carry no gradient, and how many tokens of text its rows have."""
    rows = chat.format_dataset(preferences.load(settings.dataset, f"train[:{settings.batch_size}]"))
    changes = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True, "shared_prefix": False}
    trainer = training.make_trainer(
        settings, models.load_model(settings), processor, rows, output, **changes
    )
    inner = trainer.model.get_base_model().model
    inner.get_image_features = functools.partial(
        torch.no_grad()(type(inner).get_image_features), inner
    )
    return trainer, chat.training_batch(rows, processor)["input_ids"].shape[
        1
    ] - memory.image_tokens(settings)


def test_the_estimate_is_what_a_step_of_the_embedded_model_needs(processor, tmp_path):
    settings = dataclasses.replace(EMBEDDED, batch_size=8)
    trainer, text_tokens = one_step(settings, processor, tmp_path)
    measured = memory.measure(trainer)
    estimate = memory.estimate(settings, text_tokens, gpu=False)
    for component, count in estimate.items():
        assert count == pytest.approx(measured.get(component, 0), rel=WITHIN), component
    assert estimate["weights"] == measured["weights"], "every byte of the frozen model is counted"
    assert sum(estimate.values()) == pytest.approx(measured["peak"], rel=WITHIN)


def test_with_checkpointing_too(processor, tmp_path):
    settings = dataclasses.replace(EMBEDDED, batch_size=8, gradient_checkpointing=True)
    trainer, text_tokens = one_step(settings, processor, tmp_path)
    measured = memory.measure(trainer)
    text = memory.architecture(settings.model).config.get_text_config()
    kept = memory.kept_bytes(
        text,
        16,
        text_tokens + memory.image_tokens(settings),
        settings.lora_rank,
        4,
        checkpointing=True,
    )
    assert kept == pytest.approx(measured["activations"], rel=WITHIN)
    assert sum(memory.estimate(settings, text_tokens, gpu=False).values()) == pytest.approx(
        measured["peak"], rel=WITHIN
    )


@pytest.fixture
def sixteen_bit(monkeypatch):
    """Load and train as on a GPU: bfloat16 and autocast. PEFT asks whether CUDA's autocast is on, so here the CPU's answers."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda *device: asked(*device) if device else asked("cpu")
    )
    for module in (models, training):
        monkeypatch.setattr(module, "compute_dtype", lambda: torch.bfloat16)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_activations_in_16_bit_too(sixteen_bit, processor, tmp_path, checkpointing):
    settings = dataclasses.replace(EMBEDDED, batch_size=8, gradient_checkpointing=checkpointing)
    trainer, text_tokens = one_step(settings, processor, tmp_path)
    measured = memory.measure(trainer)
    text = memory.architecture(settings.model).config.get_text_config()
    kept = memory.kept_bytes(
        text, 16, text_tokens + memory.image_tokens(settings), settings.lora_rank, 2, checkpointing
    )
    assert kept == pytest.approx(measured["activations"], rel=WITHIN)
    assert memory.estimate(settings, text_tokens)["weights"] == measured["weights"]


@pytest.mark.parametrize("name", ["idefics2-8b", "qwen2.5-vl-3b-instruct", "smolvlm-instruct"])
def test_the_activations_of_the_other_language_models_too(name):
    """The real classes of configs/, made small, on padded text: what autograd keeps is what the formula says."""
    values = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    small = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 6,
        "pad_token_id": 0,
    }
    small |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if "qwen" in name or "idefics2" in name else 4,
        "head_dim": 16,
    }
    values["text_config"] |= small
    values["vision_config"] |= {
        "num_hidden_layers": 1,
        "depth": 1,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_heads": 2,
    }
    values["vision_config"] |= {
        "out_hidden_size": 64,
        "intermediate_size": 64,
        "image_size": 28,
        "fullatt_block_indexes": [0],
    }
    values["perceiver_config"] = values.get("perceiver_config", {}) | {
        "hidden_size": 64,
        "resampler_depth": 1,
    }
    if "qwen" in name:
        values["text_config"]["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**values))
    model = get_peft_model(model, training.lora_config(dataclasses.replace(EMBEDDED, lora_rank=4)))
    ids, mask, saved = torch.randint(1, 90, (4, 50)), torch.ones(4, 50, dtype=torch.long), []
    mask[0, 40:] = 0
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.detach()) or tensor, lambda tensor: tensor
    ):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    own = list(model.parameters())
    text = model.get_base_model().config.get_text_config()
    kept = memory.kept_bytes(text, 4, 50, 4, 4, checkpointing=False)
    assert kept == pytest.approx(memory.held(saved + own) - memory.held(own), rel=WITHIN)
    assert logits.requires_grad
