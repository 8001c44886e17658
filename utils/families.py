"""What differs from one model family to the next; a family is what `config.model_type` says.

  * `limits` translates the budget of pixels into the family's own image processor arguments;
  * `complete_template` repairs chat templates that serve for asking but not for training;
  * `PACKED_FAMILIES` are those whose pairs the faster trainer was compared on.

A new family of which none of this is needed takes no entry here, only a profile in `settings`.
"""

import math

import torch
from transformers import Idefics2ImageProcessor, Idefics3ImageProcessor, Qwen2VLImageProcessor

from utils.chat import answer_messages, prompt_messages

# tests/slow/test_packed_families.py compares these families and decoders with the stock trainer.
# What is not listed runs as it does there.
PACKED_FAMILIES = {
    "idefics2",
    "idefics3",
    "smolvlm",
    "llava",
    "llava_next",
    "internvl",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "gemma3",
}
PACKED_DECODERS = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "gemma3_text",
}

IDEFICS3 = ("idefics3", "smolvlm")
LLAVA_TILES = ("llava_next", "llava_onevision")
FIXED_SIZE = ("llava", "gemma3", "paligemma")
# Tokens to which smaller images are enlarged: the least that the families' checkpoints set.
QWEN_LEAST_TOKENS = {"qwen2_vl": 4, "qwen2_5_vl": 4, "qwen3_vl": 64}

IDEFICS2_SHORTEST = 378  # pixels: Idefics2 enlarges shorter edges
IDEFICS3_LONGEST = 4096  # pixels: Idefics3 reduces longer edges

# Jinja: what the template writes for the question, then the answer, then what the template writes
# after the answer.
AFTER_GENERATION_PROMPT = (
    "{% macro written(messages, add_generation_prompt) %}TEMPLATE{% endmacro %}"
    "{% if messages[-1]['role'] == 'assistant' and messages | length > 1 %}"
    "{% set answer = messages[-1]['content'][0]['text'] %}"
    "{{ written(messages[:-1], true) }}{{ answer }}"
    "{{ written(messages, false).rpartition(answer)[2] }}"
    "{% else %}{{ written(messages, add_generation_prompt) }}{% endif %}"
)


def limit(processor, config, pixel_budget):
    """Hold every image that `processor` prepares to `pixel_budget` pixels. Return the processor.

    None leaves the processor as it is. The small copy of the whole image that some families add
    to its tiles is not counted. A family with one fixed image size has nothing to set.
    Raise ValueError for a budget below the family's least and for an unknown family.
    """
    if pixel_budget is None:
        return processor
    fewest = least(config)
    if pixel_budget < fewest:
        raise ValueError(
            f"pixel_budget is {pixel_budget}, but {config.model_type} sees at least {fewest} "
            f"pixels of every image: set pixel_budget to {fewest} or more"
        )
    current = processor.image_processor
    arguments = current.to_dict() | limits(config, pixel_budget)
    processor.image_processor = type(current)(**arguments)
    return processor


def limit_tiles(model, pixel_budget):
    """Make the model lay the tiles that its limited processor lays. Return the model.

    LLaVA-NeXT and LLaVA-OneVision look the layouts up on both sides.
    """
    if pixel_budget is not None and hasattr(model.config, "image_grid_pinpoints"):
        model.config.image_grid_pinpoints = grids(model.config, pixel_budget)
    return model


def least(config):
    """Return the fewest pixels to which images can be held. Raise ValueError if unknown."""
    family = config.model_type
    vision = config.vision_config.model_type
    if family == "idefics2":
        return IDEFICS2_SHORTEST**2
    if family in QWEN_LEAST_TOKENS:
        return QWEN_LEAST_TOKENS[family] * token_edge(config) ** 2
    if family in LLAVA_TILES:
        return min(math.prod(grid) for grid in config.image_grid_pinpoints)
    # Pixtral's vision tower, which some LLaVA models have, takes images of any size.
    if family in (*IDEFICS3, "internvl", *FIXED_SIZE) and vision != "pixtral":
        return tile_edge(config) ** 2
    raise ValueError(
        f"there is no rule that holds {family} with the vision tower {vision} to a pixel_budget: "
        "set pixel_budget to None, or add the family to utils/families.py"
    )


def limits(config, pixel_budget):
    """Return the arguments of the family's image processor that keep it within the budget."""
    family = config.model_type
    if family == "idefics2":
        # Beyond what the vision tower takes at a time, the image is cut in four.
        split = pixel_budget > tile_edge(config) ** 2
        pixels = pixel_budget // 4 if split else pixel_budget
        longest = min(tile_edge(config), math.isqrt(pixels))
        size = {"longest_edge": longest, "shortest_edge": IDEFICS2_SHORTEST}
        return {"size": size, "do_image_splitting": split}
    if family in IDEFICS3:
        # As many whole tiles as the edge of a square image holds.
        tiles = min(math.isqrt(pixel_budget), IDEFICS3_LONGEST) // tile_edge(config)
        size = {"longest_edge": tiles * tile_edge(config)}
        return {"size": size, "do_image_splitting": tiles > 1}
    if family in QWEN_LEAST_TOKENS:
        return {"size": {"shortest_edge": least(config), "longest_edge": pixel_budget}}
    if family in LLAVA_TILES:
        return {"image_grid_pinpoints": grids(config, pixel_budget)}
    if family == "internvl":
        return {"max_patches": pixel_budget // tile_edge(config) ** 2}
    return {}


def grids(config, pixel_budget):
    """Return the layouts [height, width] of tiles that the model knows and the budget allows."""
    return [grid for grid in config.image_grid_pinpoints if math.prod(grid) <= pixel_budget]


def tile_edge(config):
    """Return the edge in pixels of what the vision tower takes at a time."""
    size = config.vision_config.image_size
    return size if isinstance(size, int) else size[0]  # InternVL's config says [height, width]


def token_edge(config):
    """Return the edge in pixels of the square that becomes one token in Qwen-VL."""
    return config.vision_config.patch_size * config.vision_config.spatial_merge_size


def square_side(pixel_budget):
    """Return the edge of a square image as large as the budget. Raise ValueError for None."""
    if pixel_budget is None:
        raise ValueError(
            "pixel_budget is None, so only the model's processor knows how large its images "
            "become: set pixel_budget in the profile"
        )
    return math.isqrt(pixel_budget)


def seen(config, pixel_budget, width=None, height=None):
    """Return (tokens, pixels): what a model makes of an image, for the families of the profiles.

    `tokens` are those that stand for the image in the text, without the few that mark its tiles.
    `pixels` are those that the vision tower gets. Without `width` and `height` the image is a
    square as large as the budget. A budget below the family's least counts as the least.
    No processor is needed: the library's image processor is made from the family's limits.
    Raise ValueError for another family, whose processor has to be asked.
    """
    side = square_side(pixel_budget)
    family = config.model_type
    if family not in ("idefics2", *IDEFICS3, *QWEN_LEAST_TOKENS):
        raise ValueError(
            f"how many tokens an image takes in {family} is known to its processor only: ask "
            "processor._get_num_multimodal_tokens(image_sizes=[(height, width)])"
        )
    fewest = least(config)
    arguments = limits(config, max(pixel_budget, fewest))
    if width is None:
        width = height = max(side, math.isqrt(fewest))
    vision = config.vision_config

    if family == "idefics2":
        processor = Idefics2ImageProcessor(**arguments)
        image = torch.empty(1, 3, height, width, device="meta")  # a shape without pixels
        parts = [image]
        if processor.do_image_splitting:
            parts = [part[None] for part in processor.split_images(image)[0]]
        pixels = 0
        for part in parts:
            pixels += math.prod(processor.resize(part, processor.size).shape[-2:])
        return config.perceiver_config.resampler_n_latents * len(parts), pixels

    if family in IDEFICS3:
        edge = tile_edge(config)
        processor = Idefics3ImageProcessor(max_image_size={"longest_edge": edge}, **arguments)
        # The count includes the copy of the whole image. It is 0 for an image that is not cut.
        tiles = max(1, processor.get_number_of_image_patches(height, width)[0])
        tokens_per_tile = (edge // vision.patch_size // config.scale_factor) ** 2
        return tokens_per_tile * tiles, edge**2 * tiles

    patch = vision.patch_size
    merge = vision.spatial_merge_size
    processor = Qwen2VLImageProcessor(patch_size=patch, merge_size=merge, **arguments)
    patches = processor.get_number_of_image_patches(height, width)
    return patches // merge**2, patches * patch**2


def complete_template(processor):
    """Repair a chat template that serves for asking but not for training. Return the processor.

    - LLaVA-OneVision's writes a space before an answer that its generation prompt lacks, so
      training and inference prompts differ. The answer now follows the generation prompt.
    - LLaVA 1.5's ends an answer without a token, so nothing would teach the model to stop. The
      tokenizer's end-of-sequence token is added.
    - Idefics2's and LLaVA's leave the first token of a text to the tokenizer, which TRL asks to
      add none. The template now writes it.
    """
    question = prompt_messages("q")
    answer = answer_messages("An answer.")
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    whole = processor.apply_chat_template(question + answer, tokenize=False)
    if not whole.startswith(prompt):
        template = AFTER_GENERATION_PROMPT.replace("TEMPLATE", processor.chat_template)
        processor.chat_template = template

    tokenizer = processor.tokenizer
    after_answer = whole.rpartition("An answer.")[2]
    end = tokenizer(after_answer, add_special_tokens=False)["input_ids"]
    if not set(end) & tokenizer.added_tokens_decoder.keys():
        processor.chat_template += (
            "{% if messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        )

    adds_bos = tokenizer("q")["input_ids"][0] == tokenizer.bos_token_id
    if adds_bos and not prompt.startswith(tokenizer.bos_token):
        processor.chat_template = "{{ bos_token }}" + processor.chat_template
    return processor
