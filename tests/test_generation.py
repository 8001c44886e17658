import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import load_dataset
from families import FAMILIES, make_processor
from PIL import Image
from transformers import DynamicCache, GenerationConfig

from embedded.scenes import existence_question
from utils import generation, judging, models
from utils.chat import inference_batch
from utils.settings import PROFILES, locate

SETTINGS = PROFILES["embedded"]


def drawn(split):
    """Rows about drawn scenes, with the columns that the embedded data set has on the disk."""
    return load_dataset(locate("embedded/dataset"), split=split)


@pytest.fixture(scope="module")
def model():
    return models.load_model(SETTINGS)


def test_each_image_needs_a_question(model, processor):
    images = list(drawn("test[:2]")["image"])
    with pytest.raises(ValueError, match=r"2 images .* 1 questions"):
        generation.answer(SETTINGS, model, processor, images, ["What?"])


def test_an_image_gets_as_many_answers_as_samples_were_asked_for(model, processor):
    scenes = drawn("test[:3]")
    images = list(scenes["image"])
    questions = list(scenes["question"])
    options = {"max_new_tokens": 4}
    greedy = generation.answer(SETTINGS, model, processor, images, questions, **options)
    assert len(greedy) == 3
    assert all(isinstance(text, str) for text in greedy)
    sampled = generation.answer(SETTINGS, model, processor, images, questions, samples=2, **options)
    assert [len(texts) for texts in sampled] == [2, 2, 2]


PEAKED = {  # Qwen2.5-VL's
    "do_sample": True,
    "temperature": 0.1,
    "top_p": 0.001,
    "top_k": 1,
    "repetition_penalty": 1.05,
}
OTHER = {
    "min_p": 0.9,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [70, 71, 72],
    "min_new_tokens": 12,
    "num_beams": 2,
}


@pytest.mark.parametrize("brought", [PEAKED, OTHER], ids=["Qwen2.5-VL", "other"])
@pytest.mark.parametrize("samples", [None, 6])
def test_the_model_s_own_sampler_settings_change_no_answer(
    model, processor, monkeypatch, brought, samples
):
    scene = drawn("test[:1]")
    images = list(scene["image"])

    def ask():
        torch.manual_seed(0)
        return generation.answer(
            SETTINGS, model, processor, images, [generation.DESCRIBE], samples=samples,
            max_new_tokens=24,
        )  # fmt: skip

    neutral = ask()
    monkeypatch.setattr(model, "generation_config", copy.deepcopy(model.generation_config))
    model.generation_config.update(**brought)
    assert ask() == neutral
    if samples:
        assert len(set(neutral[0])) > 1
    # Without our settings, the model's count. Some of them need help to change this answer.
    model.generation_config.update(num_beams=1, repetition_penalty=20.0)
    monkeypatch.setattr(generation, "NEUTRAL", {})
    monkeypatch.setattr(generation, "refuse_overflow", lambda tokens, logits: logits)
    assert ask() != neutral


def test_samples_are_drawn_from_all_tokens(model, processor, monkeypatch):
    images = list(drawn("test[:1]")["image"])
    given = {}

    def generate(**options):
        if "return_dict_in_generate" in options:  # the prompt, which is computed once
            return {"cache": DynamicCache()}
        given.update(options)
        return torch.zeros(2, options["input_ids"].shape[1] + 1, dtype=torch.long)

    monkeypatch.setattr(model, "generate", generate)
    generation.answer(SETTINGS, model, processor, images, ["What?"], samples=2, temperature=0.7)
    assert (given["do_sample"], given["top_k"], given["temperature"]) == (True, 0, 0.7)
    assert given["input_ids"].shape[0] == 2
    assert given.items() >= (generation.NEUTRAL | {"temperature": 0.7}).items()


def test_every_setting_that_shapes_probabilities_is_given():
    """A setting that a new version of the library adds has to be looked at."""
    looked_at = set(generation.NEUTRAL) | {"do_sample", "top_k", "max_new_tokens"}
    of_the_run = {
        "max_length", "early_stopping", "use_cache", "cache_implementation", "cache_config",
        "max_cache_len", "output_attentions", "output_hidden_states", "output_scores",
        "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id",
        "decoder_start_token_id", "compile_config", "disable_compile", "prefill_chunk_size",
        "continuous_batching_config", "low_memory", "transformers_version", "token_healing",
        "_from_model_config",
    }  # fmt: skip
    # Of beams and of a second model that drafts: without either they do nothing.
    of_other_ways = {
        "length_penalty", "diversity_penalty", "num_beam_groups", "constraints",
        "force_words_ids", "penalty_alpha", "dola_layers", "use_mtp", "is_assistant",
        "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
        "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    }  # fmt: skip
    assert set(vars(GenerationConfig())) - looked_at - of_the_run - of_other_ways == set()


def test_an_answer_says_whether_the_model_ended_it(model, processor):
    scene = drawn("test[:1]")
    images = list(scene["image"]) * 2
    questions = [existence_question("cup"), generation.DESCRIBE]
    short, long = generation.generated(
        SETTINGS, model, processor, images, questions, max_new_tokens=16
    )
    assert short["ended"] and not long["ended"]
    [[sampled]] = generation.generated(
        SETTINGS, model, processor, images[:1], questions[:1], samples=1, max_new_tokens=1
    )
    assert not sampled["ended"]


def test_one_of_several_ends_is_enough():
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 9]))
    tokens = torch.tensor([[1, 9, 0], [1, 2, 3], [7, 0, 0]])
    assert generation.has_ended(model, tokens) == [True, False, True]
    model.generation_config.eos_token_id = 7
    assert generation.has_ended(model, tokens) == [False, False, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("samples", [None, 2])
def test_a_model_that_computes_no_numbers_is_noticed(model, processor, monkeypatch, value, samples):
    images = list(drawn("test[:1]")["image"])
    weight = model.get_output_embeddings().weight
    spoiled = weight.detach().clone()
    spoiled[5] = value
    monkeypatch.setattr(weight, "data", spoiled)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 or torch\.float32"):
        generation.answer(SETTINGS, model, processor, images, ["What?"], samples=samples)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 or torch\.float32"):
        judging.yes_and_no(SETTINGS, model, processor, images, ["What?"])


def test_a_batch_of_nothing_but_one_character_is_noticed():
    with pytest.raises(ValueError, match=r"'!!!!!!'.*another dtype"):
        generation.refuse_noise(["!!!!!!", "!!!!"])
    generation.refuse_noise(["!!!!!!", "A cup."])
    generation.refuse_noise(["", "", ""])
    generation.refuse_noise(["0000000"])


@pytest.mark.parametrize("name", FAMILIES)
def test_sharing_an_image_changes_no_number_of_a_family_s_batch(name):
    family_processor = make_processor(FAMILIES[name])
    pixels = np.random.default_rng(0).integers(0, 255, (2, 90, 130, 3), dtype=np.uint8)
    first, second = (Image.fromarray(each) for each in pixels)
    images = [first, first, second, first, second]
    questions = ["What?", "Is there a cup?", "Is it?", "No?", "Where is it now?"]
    plain = inference_batch(images, questions, family_processor)
    with generation.processed_once(family_processor):
        shared = inference_batch(images, questions, family_processor)
    assert plain.keys() == shared.keys()
    for key in plain:
        assert torch.equal(plain[key], shared[key]), key
    again = inference_batch(images, questions, family_processor)  # the processor is as before
    assert torch.equal(plain["pixel_values"], again["pixel_values"])


def test_a_model_that_fails_is_left_as_it_was(model, processor, monkeypatch):
    images = list(drawn("test[:1]")["image"])
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    model.train()
    with pytest.raises(ZeroDivisionError):
        generation.answer(SETTINGS, model, processor, images, [generation.DESCRIBE])
    assert model.training
    model.eval()
