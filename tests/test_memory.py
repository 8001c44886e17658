"""Estimates of memory: the architectures, the formulas, and who stays out of 4 bits."""

import copy
import dataclasses

import bitsandbytes as bnb
import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model

from utils import chat, memory, models, preferences, training
from utils.settings import PROFILES

EMBEDDED = PROFILES["embedded"]


def total(settings, key="adapter"):
    return sum(row[key] for row in memory.placement(settings))


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0"), (26_112, "26.1 kB"), (115_600_000, "115.6 MB"), (6.447e9, "6.4 GB")],
)
def test_bytes_are_readable(count, words):
    assert memory.readable(count) == words


@pytest.mark.parametrize(
    ("name", "parameters"),
    # The first is what https://huggingface.co/blog/dpo_vlm prints, 8,458,116,848, without its
    # 55,348,736 of LoRA.
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
    settings = PROFILES[profile]
    parameters = memory.architecture(settings.model).parameters()
    assert total(settings, "weights") == sum(parameter.numel() for parameter in parameters)


def test_an_unknown_model_is_refused_with_the_names_of_those_there_are():
    with pytest.raises(ValueError, match=r"configs/llava\.json.* embedded/model, idefics2-8b, "):
        memory.architecture("somebody/LLaVA")


def test_the_well_known_table_is_reproduced():
    full = memory.training_states(8e9 * 4, 8e9, reference=8e9 * 4)
    assert full == {"weights": 32e9, "reference": 32e9, "gradients": 32e9, "optimizer": 64e9}
    assert sum(full.values()) == 160e9
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
    assert LoraConfig().r == 8
    assert trl.ModelConfig().lora_r == 16


@pytest.mark.parametrize("target", [EMBEDDED.lora_target, "all-linear"])
def test_peft_counts_the_same_adapter(target):
    settings = dataclasses.replace(EMBEDDED, lora_target=target)
    model = copy.deepcopy(memory.architecture(settings.model))
    model = get_peft_model(model, training.lora_config(settings))
    parts = dict.fromkeys(("vision", "connector", "language", "head"), 0)
    for row in memory.placement(settings):
        parts[row["part"]] += row["adapter"]
    for part, (trainable, _) in models.trainable_by_part(model).items():
        assert trainable == parts[part], part


@pytest.mark.parametrize("profile", PROFILES)
def test_only_the_language_model_is_in_4_bit_and_adapted_and_all_of_it(profile):
    settings = PROFILES[profile]
    model = memory.architecture(settings.model)
    for row in memory.placement(settings):
        layer, _, kind = row["name"].rpartition(".")
        is_matrix = kind == "weight" and isinstance(model.get_submodule(layer), torch.nn.Linear)
        expected = is_matrix and row["part"] == "language"
        assert row["four_bit"] == expected, row["name"]
        assert bool(row["adapter"]) == expected, row["name"]


def test_without_the_pattern_the_vision_tower_would_be_in_4_bit():
    careless = dataclasses.replace(PROFILES["idefics2"], keep_in_full_precision=("lm_head",))
    quantized = {row["part"] for row in memory.placement(careless) if row["four_bit"]}
    assert quantized == {"vision", "connector", "language"}


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(128, 384), (100, 70), (64, 1), (2048, 256)])
def test_nf4_takes_the_bytes_that_the_formula_says(shape, double):
    packed, state = bnb.functional.quantize_4bit(
        torch.randn(shape), quant_type="nf4", compress_statistics=double
    )
    tensors = [packed, state.absmax, state.code]
    if double:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    stored = sum(tensor.nbytes for tensor in tensors)
    assert stored == memory.nf4_bytes(shape[0] * shape[1], double)


def test_double_quantization_saves_what_its_paper_says():
    """QLoRA, section 3: 0.5 bit for the scale of each weight become 0.127, which is 0.373 less."""
    weights = 4096 * 14336
    single = 8 * memory.nf4_bytes(weights, double_quantization=False) / weights
    double = 8 * memory.nf4_bytes(weights) / weights
    assert single == pytest.approx(4.5, abs=1e-3)
    assert double == pytest.approx(4.127, abs=1e-3)


def test_trl_scores_in_tiles_of_the_assumed_size():
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    positions, words = memory.LOGIT_TILE
    assert positions == chunked_logprob.TOKEN_CHUNK_SIZE
    assert words == utils._CHUNKED_LOGPROB_CHUNK_SIZE


@pytest.mark.parametrize(
    ("profile", "side", "tokens"),
    [
        ("embedded", None, 9),
        ("smolvlm", None, 5 * 81),
        ("qwen", None, 22**2),
        ("idefics2", None, 64),
        ("smolvlm", 100, 81),
        ("smolvlm", 384, 81),
        ("smolvlm", 767, 81),
        ("smolvlm", 768, 5 * 81),
        ("smolvlm", 1152, 10 * 81),
        ("qwen", 56, 2**2),
        ("qwen", 224, 8**2),
        ("qwen", 616, 22**2),
    ],
)
def test_the_image_tokens_are_those_of_a_square_image_that_fills_the_budget(profile, side, tokens):
    assert memory.image_tokens(PROFILES[profile], side) == tokens


def test_the_side_is_that_of_a_square_as_large_as_the_budget():
    assert memory.image_side(PROFILES["smolvlm"]) == 768
    assert memory.image_side(PROFILES["qwen"]) == 633


def test_the_embedded_model_gets_the_image_tokens_that_are_counted(processor):
    pairs = chat.format_dataset(preferences.load(EMBEDDED.dataset, "train[:1]"))
    assert memory.image_tokens(EMBEDDED) == chat.check_tokens(pairs[0], processor)["image_tokens"]


def test_an_architecture_whose_image_tokens_are_not_known_says_so(monkeypatch):
    other = copy.deepcopy(memory.architecture(EMBEDDED.model))
    other.config.model_type = "another"
    monkeypatch.setattr(memory, "architecture", lambda name: other)
    with pytest.raises(ValueError, match="another"):
        memory.image_tokens(EMBEDDED)


@pytest.mark.parametrize(
    ("name", "value"), [("precision", "int3"), ("text_tokens", 0), ("text_tokens", -1)]
)
def test_a_bad_argument_of_the_estimate_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        memory.estimate(EMBEDDED, **{name: value})


def test_the_estimate_grows_with_what_it_is_said_to_depend_on():
    settings = PROFILES["smolvlm"]

    def peak(settings, **arguments):
        return sum(memory.estimate(settings, **arguments).values())

    base = peak(settings)
    assert base < peak(settings, precision="bf16") < peak(settings, precision="fp32")
    assert base < peak(settings, text_tokens=512)
    assert base < peak(settings, side=1536)
    assert base < peak(dataclasses.replace(settings, lora_rank=64))
    assert base < peak(dataclasses.replace(settings, batch_size=8))
    assert base < peak(dataclasses.replace(settings, gradient_checkpointing=False))
