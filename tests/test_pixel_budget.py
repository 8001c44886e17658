"""The pixel budget: the library's own processors hold images to it, family by family."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import transformers
from families import FAMILIES, NOT_TRAINABLE, make_processor
from PIL import Image
from tiny_models import CONFIGS, SIDE

from utils import families, memory, models
from utils.settings import PROFILES

EMBEDDED = PROFILES["embedded"]
PALIGEMMA = NOT_TRAINABLE["PaliGemma"]
BY_TYPE = {family.model_type: family for family in (*FAMILIES.values(), PALIGEMMA)}
FIXED_SIZE = ("llava", "gemma3", "paligemma")
COUNTED = ("idefics2", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SHAPES = [(64, 48), (30, 90), (140, 100), (6, 4), (90, 91), (150, 12)]  # width, height


def config_of(family):
    """The family's tiny configuration, with tiles to choose from."""
    config = transformers.AutoConfig.for_model(family, **CONFIGS[family])
    if family == "idefics2":
        config.vision_config.image_size = 980  # its least is 378, whatever the tower
    if family in ("llava_next", "llava_onevision"):
        edges = [SIDE, 2 * SIDE, 3 * SIDE]
        config.image_grid_pinpoints = [[height, width] for height in edges for width in edges]
    return config


def processor_of(family):
    processor = make_processor(BY_TYPE[family])
    if family == "internvl":
        processor.image_processor.min_patches = 1  # as in its real checkpoints
    return processor


def tokens_and_pixels(processor, family, width, height):
    """How many tokens the processor makes of an image, and pixels that are no padding."""
    image_token = BY_TYPE[family].image_token
    text = "<start_of_image>" if family == "gemma3" else image_token
    image = Image.new("RGB", (width, height), "red")
    batch = processor(images=[[image]], text=[text], return_tensors="pt")
    tokens = batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids(image_token)
    if "qwen" in family:
        pixels = len(batch["pixel_values"]) * processor.image_processor.patch_size**2
    elif "pixel_attention_mask" in batch:
        pixels = int(batch["pixel_attention_mask"].sum())
    else:
        pixels = batch["pixel_values"].numel() // 3
    return int(tokens.sum()), pixels


@pytest.mark.parametrize("family", BY_TYPE)
def test_every_image_stays_within_the_budget(family):
    config = config_of(family)
    whole = 0 if "qwen" in family else families.tile_edge(config) ** 2
    for factor in (4, 9):
        budget = factor * families.least(config)
        processor = families.limit(processor_of(family), config, budget)
        for width, height in SHAPES:
            tokens, pixels = tokens_and_pixels(processor, family, width, height)
            assert pixels <= budget + whole, (budget, width, height)
            if family in COUNTED:
                counted = families.seen(config, budget, width, height)
                assert counted == (tokens, pixels), (budget, width, height)


@pytest.mark.parametrize("family", sorted(BY_TYPE.keys() - {*FIXED_SIZE}))
def test_a_larger_budget_means_more_tokens(family):
    config = config_of(family)
    least = families.least(config)
    counts = []
    for budget in (least, 9 * least):
        processor = families.limit(processor_of(family), config, budget)
        counts.append(tokens_and_pixels(processor, family, 400, 300)[0])
    assert counts[0] < counts[1]


@pytest.mark.parametrize("family", BY_TYPE)
def test_a_budget_below_the_least_is_refused_with_the_least(family):
    config = config_of(family)
    least = families.least(config)
    with pytest.raises(ValueError, match=rf"{family}.* {least} "):
        families.limit(processor_of(family), config, least - 1)
    processor = families.limit(processor_of(family), config, least)
    made = tokens_and_pixels(processor, family, 90, 90)
    if family in COUNTED:
        assert families.seen(config, least, 90, 90) == made
        assert families.seen(config, 1, 90, 90) == made


def test_idefics2_cuts_an_image_in_four_only_beyond_what_its_tower_takes_at_a_time():
    config = memory.architecture(PROFILES["idefics2"].model).config
    assert families.seen(config, 980 * 980, 3000, 2000)[0] == 64
    assert families.seen(config, 980 * 980 + 1, 3000, 2000)[0] == 5 * 64


@pytest.mark.parametrize("family", FIXED_SIZE)
def test_a_family_of_a_fixed_size_keeps_its_processor(family):
    processor = processor_of(family)
    before = processor.image_processor.to_dict()
    families.limit(processor, config_of(family), 10_000_000)
    assert processor.image_processor.to_dict() == before


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_the_model_lays_the_tiles_that_the_processor_lays(family):
    config = config_of(family)
    processor = families.limit(processor_of(family), config, 1000)
    model = families.limit_tiles(SimpleNamespace(config=config), 1000)
    tiles = model.config.image_grid_pinpoints
    assert tiles == processor.image_processor.image_grid_pinpoints
    assert tiles and max(math.prod(tile) for tile in tiles) <= 1000


def test_without_a_budget_nothing_is_changed_and_nothing_is_known():
    config = config_of("llava_next")
    processor = processor_of("llava_next")
    before = processor.image_processor.to_dict()
    families.limit(processor, config, None)
    assert processor.image_processor.to_dict() == before
    model = families.limit_tiles(SimpleNamespace(config=config_of("llava_next")), None)
    assert model.config.image_grid_pinpoints == config.image_grid_pinpoints
    with pytest.raises(ValueError, match="pixel_budget"):
        families.seen(config_of("idefics3"), None)


def test_a_family_that_cannot_be_held_is_named():
    config = transformers.AutoConfig.for_model("llava", vision_config={"model_type": "pixtral"})
    with pytest.raises(ValueError, match=r"llava.*pixtral"):
        families.limit(None, config, 500_000)


def test_a_family_that_cannot_be_counted_is_named_with_what_to_ask():
    with pytest.raises(ValueError, match=r"gemma3.*processor\._get_num_multimodal_tokens"):
        families.seen(config_of("gemma3"), 500_000)


def test_the_embedded_model_is_loaded_as_it_is_stored():
    limited = models.load_processor(EMBEDDED)
    stored = models.load_processor(dataclasses.replace(EMBEDDED, pixel_budget=None))
    assert limited.image_processor.to_dict() == stored.image_processor.to_dict()


def test_a_saved_processor_keeps_its_budget(tmp_path):
    four_tiles = dataclasses.replace(EMBEDDED, pixel_budget=4 * 72 * 72)
    models.load_processor(four_tiles).save_pretrained(tmp_path)
    image_processor = transformers.AutoProcessor.from_pretrained(tmp_path).image_processor
    assert image_processor.size["longest_edge"] == 144
    assert image_processor.do_image_splitting
