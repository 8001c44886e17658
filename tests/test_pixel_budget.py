"""The pixel budget: what the library's own processors make of images under it, family by family, and what the rules say."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers.models.smolvlm import processing_smolvlm

from utils import memory, models, pixel_budget
from utils.settings import PROFILES

SHAPES = [(640, 480), (300, 900), (1400, 1000), (40, 30), (900, 905), (1500, 120)]  # width, height
NAMES = {
    "idefics2": "Idefics2",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "llava": "Llava",
    "llava_next": "LlavaNext",
}
NAMES |= {
    "llava_onevision": "LlavaOnevision",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
}
NAMES |= {"internvl": "InternVL", "gemma3": "Gemma3", "paligemma": "PaliGemma"}
IMAGE_PROCESSORS = {
    "qwen2_5_vl": "Qwen2VL",
    "qwen3_vl": "Qwen2VL",
    "internvl": "GotOcr2",
    "paligemma": "Siglip",
}
VIDEO_PROCESSORS = {"qwen2_5_vl": "Qwen2VL"}
FILES = {
    "idefics2": "idefics2-8b",
    "idefics3": "smolvlm-instruct",
    "qwen2_5_vl": "qwen2.5-vl-3b-instruct",
}
SPECIAL = {
    "image_token": "<image>",
    "video_token": "<video>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "pad_token": "<pad>",
}
SPECIAL |= {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<image>",
    "image_boundary_token": "<fake>",
}
SPECIAL |= {
    "fake_image_token": "<fake>",
    "global_image_token": "<global-img>",
    "vision_bos_token": "<img>",
    "vision_eos_token": "</img>",
}
SPECIAL |= {"end_of_utterance_token": "<end>"}


def config_of(family):
    """The family's configuration: that in configs/, else the library's own default."""
    if family in FILES:
        return memory.architecture(FILES[family]).config
    config = transformers.AutoConfig.for_model(family)
    if family == "smolvlm":
        config.vision_config.image_size, config.vision_config.patch_size, config.scale_factor = (
            512,
            16,
            4,
        )
    return config


def build(family, config):
    """The family's processor from the library's classes, with a tokenizer that knows its special tokens and nothing else."""
    words = {
        word: number
        for number, word in enumerate(dict.fromkeys(["<unk>", "<bos>", *SPECIAL.values()]))
    }
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", extra_special_tokens=SPECIAL
    )
    edge, changes = pixel_budget.tile(config) if "qwen" not in family else None, {}
    if family in ("idefics3", "smolvlm"):
        changes = {"max_image_size": {"longest_edge": edge}}
    elif family in ("internvl", "llava_onevision", "gemma3", "paligemma"):
        changes = {"size": {"height": edge, "width": edge}}
    elif family in ("llava", "llava_next"):
        changes = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    elif family == "qwen3_vl":
        changes = {"patch_size": 16}
    if family in ("llava_next", "llava_onevision"):
        changes["image_grid_pinpoints"] = config.image_grid_pinpoints
    images = getattr(transformers, f"{IMAGE_PROCESSORS.get(family, NAMES[family])}ImageProcessor")(
        **changes
    )
    side = (
        pixel_budget.per_side(config) if family not in ("internvl",) and "qwen" not in family else 0
    )
    extra = {
        "idefics2": {"image_seq_len": config.perceiver_config.resampler_n_latents}
        if family == "idefics2"
        else {},
        "idefics3": {"image_seq_len": (side // getattr(config, "scale_factor", 1)) ** 2},
        "llava": {
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        "llava_onevision": {
            "num_image_tokens": side**2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
        "internvl": {"image_seq_length": getattr(config, "image_seq_length", 0)},
        "gemma3": {"image_seq_length": getattr(config, "mm_tokens_per_image", 0)},
    }
    extra["smolvlm"], extra["llava_next"] = extra["idefics3"], extra["llava"]
    if family == "paligemma":
        images.image_seq_length = side**2
    processor = getattr(transformers, f"{NAMES[family]}Processor")
    if "video_processor" in processor.get_attributes():
        video = getattr(
            transformers, f"{VIDEO_PROCESSORS.get(family, NAMES[family])}VideoProcessor"
        )
        extra.setdefault(family, {})["video_processor"] = video()
    return processor(image_processor=images, tokenizer=tokenizer, **extra.get(family, {}))


def tokens_and_pixels(processor, family, width, height):
    """What the processor makes of one picture: how many tokens, and pixels for the vision tower without padding."""
    text = "<boi>" if family == "gemma3" else "<image>"
    batch = processor(
        images=[[Image.new("RGB", (width, height), "red")]], text=[text], return_tensors="pt"
    )
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    pixels = batch["pixel_values"]
    if "qwen" in family:
        seen = len(pixels) * processor.image_processor.patch_size**2
    elif "pixel_attention_mask" in batch:
        seen = int(batch["pixel_attention_mask"].sum())
    else:
        seen = pixels.numel() // 3
    return int((batch["input_ids"] == image_id).sum()), seen


@pytest.fixture(autouse=True)
def without_num2words(monkeypatch):
    """SmolVLM's processor asks for a package that only videos need."""
    monkeypatch.setattr(processing_smolvlm, "num2words", str)


@pytest.mark.parametrize("budget", [500_000, 1_100_000, 2_500_000])
@pytest.mark.parametrize("family", NAMES)
def test_every_image_stays_within_the_budget_and_becomes_the_tokens_of_the_rule(family, budget):
    config = config_of(family)
    budget = max(budget, pixel_budget.least(config))
    processor = pixel_budget.limit(build(family, config), config, budget)
    for width, height in SHAPES:
        tokens, pixels = tokens_and_pixels(processor, family, width, height)
        assert pixel_budget.seen(config, budget, width, height) == (tokens, pixels), (width, height)
        whole = pixel_budget.tile(config) ** 2 if "qwen" not in family else 0
        assert pixels <= budget + whole, (width, height)


@pytest.mark.parametrize("family", sorted(set(NAMES) - {"llava", "gemma3", "paligemma"}))
def test_a_larger_budget_means_more_tokens(family):
    config = config_of(family)
    least, much = (
        pixel_budget.seen(config, budget, 2000, 1500)[0]
        for budget in (pixel_budget.least(config), 2_500_000)
    )
    assert least < much


def test_idefics2_cuts_an_image_in_four_only_beyond_what_its_tower_takes_at_a_time():
    config = config_of("idefics2")
    assert pixel_budget.seen(config, 980 * 980, 3000, 2000)[0] == 64
    assert pixel_budget.seen(config, 980 * 980 + 1, 3000, 2000)[0] == 5 * 64


@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma"])
def test_a_family_of_a_fixed_size_keeps_its_processor(family):
    config = config_of(family)
    before, processor = build(family, config), build(family, config)
    pixel_budget.limit(processor, config, 10_000_000)
    assert processor.image_processor.to_dict() == before.image_processor.to_dict()


@pytest.mark.parametrize("family", NAMES)
def test_a_budget_that_the_family_cannot_keep_is_refused_with_the_least(family):
    config = config_of(family)
    least = pixel_budget.least(config)
    with pytest.raises(ValueError, match=rf"{family} sees at least {least} pixels"):
        pixel_budget.limit(build(family, config), config, least - 1)
    tokens, _ = tokens_and_pixels(
        pixel_budget.limit(build(family, config), config, least), family, 900, 900
    )
    assert (
        tokens
        == pixel_budget.seen(config, least, 900, 900)[0]
        == pixel_budget.seen(config, 1, 900, 900)[0]
    )


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_the_model_lays_the_tiles_that_the_processor_lays(family):
    config = copy.deepcopy(config_of(family))
    processor = pixel_budget.limit(build(family, config), config, 500_000)
    model = pixel_budget.limit_tiles(SimpleNamespace(config=config), 500_000)
    assert model.config.image_grid_pinpoints == processor.image_processor.image_grid_pinpoints
    assert (
        model.config.image_grid_pinpoints
        and max(map(math.prod, model.config.image_grid_pinpoints)) <= 500_000
    )


def test_without_a_budget_nothing_is_changed_and_nothing_is_known():
    config = config_of("llava_next")
    before, processor = build("llava_next", config), build("llava_next", config)
    assert (
        pixel_budget.limit(processor, config, None).image_processor.to_dict()
        == before.image_processor.to_dict()
    )
    assert pixel_budget.limit_tiles(
        SimpleNamespace(config=config), None
    ).config.image_grid_pinpoints
    with pytest.raises(ValueError, match="pixel_budget is None"):
        pixel_budget.seen(config, None)


def test_a_family_without_a_rule_says_so():
    config = transformers.AutoConfig.for_model("llava", vision_config={"model_type": "pixtral"})
    with pytest.raises(
        ValueError,
        match=r"how llava \(vision tower: pixtral\) turns pixels into tokens is not known.*idefics2",
    ):
        pixel_budget.limit(None, config, 500_000)


def test_the_embedded_model_is_loaded_as_it_is_stored():
    loaded = [
        models.load_processor(dataclasses.replace(PROFILES["embedded"], pixel_budget=b))
        for b in (PROFILES["embedded"].pixel_budget, None)
    ]
    assert loaded[0].image_processor.to_dict() == loaded[1].image_processor.to_dict()


def test_a_saved_processor_keeps_its_budget(tmp_path):
    processor = models.load_processor(
        dataclasses.replace(PROFILES["embedded"], pixel_budget=4 * 72 * 72)
    )
    processor.save_pretrained(tmp_path)
    again = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert (
        again.image_processor.size["longest_edge"] == 144
        and again.image_processor.do_image_splitting
    )
