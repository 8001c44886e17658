"""Very small vision language models with random weights, one per family, and batches for them.

The batches are laid out like those of TRL's collator.
"""

import math
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

VOCABULARY = 100  # tokens
IMAGE = 99  # the token that stands for a piece of an image
WIDTH = 32  # hidden size
SIDE = 16  # pixels
PATCH = 4


class Pair(NamedTuple):
    """Numbers of a pair: tokens of its prompt's text, images, tokens of its answers."""

    text: int
    images: int
    chosen: int
    rejected: int


def text_config(**changes):
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 512,
    }
    return values | changes


def vision_config(**changes):
    values = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    return values | changes


def qwen_vision_config(**changes):
    values = {
        "depth": 2,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "intermediate_size": 64,
    }
    return values | changes


CLIP = vision_config(model_type="clip_vision_model", projection_dim=WIDTH)
SIGLIP = vision_config(model_type="siglip_vision_model", vision_use_head=False)
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10_000.0}
PERCEIVER = {
    "hidden_size": WIDTH,
    "resampler_n_latents": 4,
    "resampler_depth": 1,
    "resampler_n_heads": 4,
    "resampler_head_dim": 8,
}
GEMMA = {
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8,
}

CONFIGS = {
    "idefics2": {
        "text_config": text_config(model_type="mistral"),
        "vision_config": vision_config(),
        "perceiver_config": PERCEIVER | {"num_key_value_heads": 2},
    },
    "idefics3": {
        "text_config": text_config(model_type="llama"),
        "vision_config": vision_config(),
        "scale_factor": 2,
    },
    "smolvlm": {
        "text_config": text_config(model_type="llama"),
        "vision_config": vision_config(),
        "scale_factor": 2,
    },
    "llava": {"text_config": text_config(model_type="qwen2"), "vision_config": CLIP},
    "llava_next": {
        "text_config": text_config(model_type="mistral"),
        "vision_config": CLIP,
        "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
    },
    "internvl": {
        "text_config": text_config(model_type="qwen3"),
        "vision_config": vision_config(image_size=[SIDE] * 2, patch_size=[PATCH] * 2),
    },
    "qwen2_vl": {
        "text_config": text_config(rope_parameters=MROPE),
        "vision_config": qwen_vision_config(embed_dim=WIDTH, hidden_size=WIDTH, mlp_ratio=2),
    },
    "qwen2_5_vl": {
        "text_config": text_config(rope_parameters=MROPE),
        "vision_config": qwen_vision_config(
            hidden_size=WIDTH, out_hidden_size=WIDTH, window_size=SIDE, fullatt_block_indexes=[1]
        ),
    },
    "qwen3_vl": {
        "text_config": text_config(rope_parameters=MROPE | {"mrope_interleaved": True}),
        "vision_config": qwen_vision_config(
            hidden_size=WIDTH,
            out_hidden_size=WIDTH,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
    },
    "gemma3": {
        "text_config": text_config(**GEMMA),
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "paligemma": {
        "text_config": text_config(model_type="gemma"),
        "vision_config": SIGLIP,
        "projection_dim": WIDTH,
    },
    "llava_onevision": {
        "text_config": text_config(model_type="qwen2"),
        "vision_config": SIGLIP,
        "image_grid_pinpoints": [
            [height, width] for height in (SIDE, 2 * SIDE) for width in (SIDE, 2 * SIDE)
        ],
    },
    "mllama": {
        "text_config": text_config(
            cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        ),
        "vision_config": vision_config(
            attention_heads=4,
            num_global_layers=1,
            intermediate_layers_indices=[0],
            vision_output_dim=2 * WIDTH,
            max_num_tiles=4,
        ),
    },
    "llama4": {
        "text_config": text_config(
            intermediate_size_mlp=64, num_local_experts=2, interleave_moe_layer_step=2
        ),
        "vision_config": vision_config(
            vision_output_dim=WIDTH,
            projector_input_dim=WIDTH,
            projector_output_dim=WIDTH,
            intermediate_size=4 * WIDTH,
        ),
    },
}
TWO_ROWS = {"paligemma", "llava_onevision", "mllama", "llama4"}
# Those whose answers can share a row.
FAMILIES = [family for family in CONFIGS if family not in TWO_ROWS]


def tiny_model(family, seed=0, attention="sdpa", tokens=None, **text_changes):
    """A model of the family, the same for the same seed.

    Its weights are large enough for log-probabilities between about -20 and 0. `tokens`: ids that
    the configuration holds beside those of its text part, such as that of an image token.
    """
    torch.manual_seed(seed)
    values = CONFIGS[family] | (tokens or {"image_token_id": IMAGE})
    values["text_config"] = values["text_config"] | text_changes
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:
            scale = 1.5 / math.sqrt(parameter[0].numel())
            if "embed_tokens" in name or "lm_head" in name:
                scale = 0.5
            parameter.data.normal_(0, scale, generator=generator)
    return model.requires_grad_(False)


def image_inputs(family, counts, generator):
    """What the family's processor makes of `counts[i]` images in row i.

    Where the family knows several shapes, they alternate.
    """
    total = sum(counts)

    def pixels(*shape):
        return torch.randn(*shape, generator=generator)

    if family in ("idefics2", "idefics3", "smolvlm"):
        # Padded with black images to the same number in each row.
        values = pixels(len(counts), max(counts), 3, SIDE, SIDE)
        for row, count in enumerate(counts):
            values[row, count:] = 0
        return {"pixel_values": values, "pixel_attention_mask": (values != 0).any(2)}
    if family.startswith("qwen"):
        grids = torch.tensor([[1, 4, 4 if number % 2 else 8] for number in range(total)])
        patches = int(grids.prod(1).sum())
        return {
            "pixel_values": pixels(patches, 3 * 2 * PATCH * PATCH),
            "image_grid_thw": grids,
        }
    if family == "llava_next":
        shapes = ([2 * SIDE, SIDE], [SIDE, 2 * SIDE])
        sizes = torch.tensor([shapes[number % 2] for number in range(total)])
        return {"pixel_values": pixels(total, 3, 3, SIDE, SIDE), "image_sizes": sizes}
    return {"pixel_values": pixels(total, 3, SIDE, SIDE)}


def tokens_per_image(model, family, images):
    """How many places in the text each image takes, counted on the features the model makes."""
    with torch.no_grad():
        features = model.base_model.get_image_features(**images, return_dict=True).pooler_output
    if family.startswith("qwen"):
        return (images["image_grid_thw"].prod(1) // 4).tolist()
    if family == "llava_next":
        return [len(part) for part in features]
    places = sum(part.reshape(-1, part.shape[-1]).shape[0] for part in features)
    rows = images["pixel_values"]
    number = len(rows)
    if rows.dim() == 5:  # padded with black images
        number = int((rows != 0).flatten(2).any(2).sum())
    return [places // number] * number


def tiny_batch(model, pairs, seed=0, max_length=None):
    """(the batch of TRL's collator, the same with each image once) for `pairs`.

    Texts are random tokens. Both have the same images.
    """
    family = model.config.model_type
    generator = torch.Generator().manual_seed(seed)
    counts = [pair.images for pair in pairs]
    images = {}
    places = iter([])
    if any(counts):
        images = image_inputs(family, counts, generator)
        places = iter(tokens_per_image(model, family, images))

    def text(count):
        return torch.randint(3, IMAGE, (count,), generator=generator).tolist()

    sides = {"chosen": [], "rejected": []}  # (tokens, answer mask) of each row
    for pair in pairs:
        prompt = []
        for _ in range(pair.images):
            prompt += text(1) + [IMAGE] * next(places)
        prompt += text(pair.text)
        for side, rows in sides.items():
            answer = text(getattr(pair, side))
            tokens = prompt + answer
            mask = [0] * len(prompt) + [1] * len(answer)
            rows.append((tokens[:max_length], mask[:max_length]))

    rows = sides["chosen"] + sides["rejected"]
    width = max(len(tokens) for tokens, _ in rows)
    ids = []
    attention = []
    completion = []
    for tokens, mask in rows:
        padding = [0] * (width - len(tokens))
        ids.append(tokens + padding)
        attention.append([1] * len(tokens) + padding)
        completion.append(mask + padding)
    batch = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(attention),
        "completion_mask": torch.tensor(completion),
    }
    is_image = (batch["input_ids"] == IMAGE).long()
    if family.startswith("qwen"):
        batch["mm_token_type_ids"] = is_image
    if family == "gemma3":
        batch["token_type_ids"] = is_image
    if family == "paligemma":
        batch["token_type_ids"] = batch["completion_mask"].clone()
    twice = {name: torch.cat([value, value]) for name, value in images.items()}
    return batch | twice, batch | images
