"""How many pixels of an image the model gets to see, and how many tokens they become: one setting for all families.

A family is what `config.model_type` says. `RULES` holds per family what an image costs, the least that can be asked of it, and
the arguments of its image processor that hold every image to a budget of pixels.
"""

import math
from itertools import product

from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

SHORTEST = 378  # pixels: Idefics2 enlarges shorter edges
LONGEST = 4096  # pixels: Idefics3 and SmolVLM reduce longer ones
LEAST_TOKENS = {
    "qwen2_vl": 4,
    "qwen2_5_vl": 4,
    "qwen3_vl": 64,
}  # to which smaller images are enlarged: the families' own values


def limit(processor, config, pixel_budget):
    """`processor`, which from now on holds every image to `pixel_budget` pixels; None leaves it as it comes.

    The small picture of the whole that families with tiles put beside the tiles is not counted. A family with one fixed size has
    nothing to set. Raises ValueError for a budget below the family's least, naming that, and for a family without a rule.
    """
    if pixel_budget is None:
        return processor
    if pixel_budget < least(config):
        raise ValueError(
            f"{config.model_type} sees at least {least(config)} pixels of every image: set pixel_budget to that or more"
        )
    current = processor.image_processor
    processor.image_processor = type(current)(
        **(current.to_dict() | rule(config)[2](config, pixel_budget))
    )
    return processor


def limit_tiles(model, pixel_budget):
    """`model`, which lays tiles as its processor does: LLaVA-NeXT and LLaVA-OneVision look them up on both sides."""
    if pixel_budget is not None and hasattr(model.config, "image_grid_pinpoints"):
        model.config.image_grid_pinpoints = grids(model.config, pixel_budget)
    return model


def seen(config, pixel_budget, width=None, height=None):
    """(tokens, pixels): how many tokens an image of `width` × `height` becomes, without the few that mark its tiles, and how many
    pixels the vision tower gets, that of the whole included.

    By default a square image as large as the budget. A budget below the family's least counts as that.
    """
    side = square_side(pixel_budget)
    if width is None:
        width = height = max(side, math.isqrt(least(config)))
    return rule(config)[0](config, max(pixel_budget, least(config)), width, height)


def square_side(pixel_budget):
    """Edge in pixels of a square image as large as the budget. ValueError for None."""
    if pixel_budget is None:
        raise ValueError(
            "pixel_budget is None, so the processor alone knows what is seen of an image: set it in the profile"
        )
    return math.isqrt(pixel_budget)


def least(config):
    """The fewest pixels to which the images of this model can be held."""
    return rule(config)[1](config)


def rule(config):
    """The family's entry in RULES. ValueError where there is none."""
    family, vision = config.model_type, config.vision_config.model_type
    if family not in RULES or vision == "pixtral":
        known = ", ".join(RULES)
        raise ValueError(
            f"how {family} (vision tower: {vision}) turns pixels into tokens is not known: add it to RULES; known: {known}"
        )
    return RULES[family]


def tile(config):
    """Edge in pixels of what the vision tower takes at a time."""
    size = config.vision_config.image_size
    return size if isinstance(size, int) else size[0]  # InternVL's config says [height, width]


def one_tile(config):
    return tile(config) ** 2


def per_side(config):
    """Patches along the edge of a tile."""
    return tile(config) // config.vision_config.patch_size


# What an image costs, (tokens, pixels), family by family


def fixed(config, pixel_budget, width, height):
    """LLaVA 1.5, Gemma 3, PaliGemma: every image is resized to one size."""
    return getattr(config, "mm_tokens_per_image", per_side(config) ** 2), one_tile(config)


def idefics2(config, pixel_budget, width, height):
    """64 tokens for any image; where it is cut in four, 64 for each and for the whole."""
    (longest, split), pixels = crop(config, pixel_budget), 0
    halves = (
        product((width // 2, width - width // 2), (height // 2, height - height // 2))
        if split
        else ()
    )
    for w, h in [(width, height), *halves]:
        larger = max(w, h, longest)
        pixels += max(SHORTEST, w * longest // larger) * max(SHORTEST, h * longest // larger)
    return config.perceiver_config.resampler_n_latents * (5 if split else 1), pixels


def crop(config, pixel_budget):
    """(longest edge, whether an image is cut in four): only beyond what the tower takes at a time."""
    split = pixel_budget > one_tile(config)
    return min(tile(config), math.isqrt(pixel_budget // 4 if split else pixel_budget)), split


def idefics3(config, pixel_budget, width, height):
    """Idefics3, SmolVLM: every image is enlarged or reduced to the longest edge, then cut in tiles; the whole is one more."""
    longest = edge(config, pixel_budget)
    short = int(longest / (max(width, height) / min(width, height)))
    tiles = longest // tile(config) * max(1, math.ceil((short + short % 2) / tile(config)))
    count = tiles + 1 if longest > tile(config) else 1
    return (per_side(config) // config.scale_factor) ** 2 * count, one_tile(config) * count


def edge(config, pixel_budget):
    """As many whole tiles as a square of the budget holds."""
    return min(math.isqrt(pixel_budget), LONGEST) // tile(config) * tile(config)


def qwen(config, pixel_budget, width, height):
    """Qwen-VL: one token for each square of 28 × 28 pixels (Qwen3-VL: 32 × 32), in any shape."""
    rows, columns = smart_resize(height, width, square(config), qwen_least(config), pixel_budget)
    return rows * columns // square(config) ** 2, rows * columns


def square(config):
    return config.vision_config.patch_size * config.vision_config.spatial_merge_size


def qwen_least(config):
    return LEAST_TOKENS[config.model_type] * square(config) ** 2


def llava_tiles(config, pixel_budget, width, height):
    """LLaVA-NeXT and LLaVA-OneVision: tiles without the rows or columns that are all padding, one token to end each row, and
    the whole. OneVision shrinks what is then still more than so many tiles."""
    side, layout = (
        per_side(config),
        select_best_resolution((height, width), grids(config, pixel_budget)),
    )
    rows, columns = (side * (length // tile(config)) for length in layout)
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    most = getattr(config, "vision_aspect_ratio", "").removeprefix("anyres_max_")
    shrink = math.sqrt(rows * columns / (int(most) * side**2)) if most else 1
    if shrink > 1.1:
        rows, columns = int(rows // shrink), int(columns // shrink)
    return side**2 + rows * columns + rows, math.prod(layout) + one_tile(config)


def grids(config, pixel_budget):
    """The [height, width] of tiles that the model has and the budget allows."""
    return [grid for grid in config.image_grid_pinpoints if math.prod(grid) <= pixel_budget]


def grids_least(config):
    return min(map(math.prod, config.image_grid_pinpoints))


def internvl(config, pixel_budget, width, height):
    """The layout of tiles closest to the image's shape; the whole is one more."""
    tiles = math.prod(
        get_optimal_tiled_canvas(
            (height, width), (tile(config),) * 2, 1, pixel_budget // one_tile(config)
        )
    )
    count = tiles + 1 if tiles > 1 else 1
    return config.image_seq_length * count, one_tile(config) * count


# What holds a family's image processor to the budget


def idefics2_limits(config, pixel_budget):
    longest, split = crop(config, pixel_budget)
    return {
        "size": {"longest_edge": longest, "shortest_edge": SHORTEST},
        "do_image_splitting": split,
    }


def idefics3_limits(config, pixel_budget):
    longest = edge(config, pixel_budget)
    return {"size": {"longest_edge": longest}, "do_image_splitting": longest > tile(config)}


def qwen_limits(config, pixel_budget):
    return {"size": {"shortest_edge": qwen_least(config), "longest_edge": pixel_budget}}


RULES = {  # family: (what an image costs, the least budget, limits)
    "idefics2": (idefics2, lambda config: SHORTEST**2, idefics2_limits),
    "internvl": (
        internvl,
        one_tile,
        lambda config, budget: {"max_patches": budget // one_tile(config)},
    ),
    **dict.fromkeys(("idefics3", "smolvlm"), (idefics3, one_tile, idefics3_limits)),
    **dict.fromkeys(LEAST_TOKENS, (qwen, qwen_least, qwen_limits)),
    **dict.fromkeys(
        ("llava_next", "llava_onevision"),
        (llava_tiles, grids_least, lambda c, b: {"image_grid_pinpoints": grids(c, b)}),
    ),
    **dict.fromkeys(("llava", "gemma3", "paligemma"), (fixed, one_tile, lambda config, budget: {})),
}
