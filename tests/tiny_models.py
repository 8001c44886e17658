"""Very small vision language models with random weights, one per family, and batches laid out like those of TRL's collator."""

import math
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

VOCABULARY, IMAGE, WIDTH = (
    100,
    99,
    32,
)  # tokens, the one that stands for a piece of an image, hidden size
SIDE, PATCH = 16, 4  # pixels


class Pair(NamedTuple):
    """How many tokens of text a pair's prompt has, how many images, and how many tokens its answers have."""

    text: int
    images: int
    chosen: int
    rejected: int


def text_config(**changes):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    tokens = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 512,
    }
    return sizes | heads | tokens | changes


def vision_config(**changes):
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return sizes | {"image_size": SIDE, "patch_size": PATCH} | changes


def qwen_vision_config(**changes):
    sizes = {
        "depth": 2,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return sizes | {"intermediate_size": 64} | changes


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
FAMILIES = [
    family for family in CONFIGS if family not in TWO_ROWS
]  # those whose answers can share a row


def tiny_model(family, seed=0, attention="sdpa", tokens=None, **text_changes):
    """A model of the family with weights large enough for log-probabilities between about -20 and 0; the same for the same seed.

    `tokens`: ids that the configuration holds beside those of its text part, such as that of an image token.
    """
    torch.manual_seed(seed)
    settings = CONFIGS[family] | (tokens or {"image_token_id": IMAGE})
    settings["text_config"] = settings["text_config"] | text_changes
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(family, **settings), attn_implementation=attention
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:
            scale = (
                0.5
                if "embed_tokens" in name or "lm_head" in name
                else 1.5 / math.sqrt(parameter[0].numel())
            )
            parameter.data.normal_(0, scale, generator=generator)
    return model.requires_grad_(False)


def image_inputs(family, counts, generator):
    """What the family's processor makes of `counts[i]` images in row i. Where the family knows several shapes, they alternate."""
    total = sum(counts)

    def pixels(*shape):
        return torch.randn(*shape, generator=generator)

    if family in (
        "idefics2",
        "idefics3",
        "smolvlm",
    ):  # padded with black images to the same number in each row
        values = pixels(len(counts), max(counts), 3, SIDE, SIDE)
        for row, count in enumerate(counts):
            values[row, count:] = 0
        return {"pixel_values": values, "pixel_attention_mask": (values != 0).any(2)}
    if family.startswith("qwen"):
        grids = torch.tensor([[1, 4, 4 if number % 2 else 8] for number in range(total)])
        return {
            "pixel_values": pixels(int(grids.prod(1).sum()), 3 * 2 * PATCH * PATCH),
            "image_grid_thw": grids,
        }
    if family == "llava_next":
        sizes = torch.tensor(
            [[SIDE, 2 * SIDE] if number % 2 else [2 * SIDE, SIDE] for number in range(total)]
        )
        return {"pixel_values": pixels(total, 3, 3, SIDE, SIDE), "image_sizes": sizes}
    return {"pixel_values": pixels(total, 3, SIDE, SIDE)}


def tokens_per_image(model, family, images):
    """How many places in the text each image of the batch takes, counted on the features that the model makes of it."""
    with torch.no_grad():
        features = model.base_model.get_image_features(**images, return_dict=True).pooler_output
    whole = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
    if family.startswith("qwen"):
        return (images["image_grid_thw"].prod(1) // 4).tolist()
    if family == "llava_next":
        return [len(part) for part in features]
    rows = images["pixel_values"]
    number = int((rows != 0).flatten(2).any(2).sum()) if rows.dim() == 5 else len(rows)
    return [len(whole) // number] * number


def tiny_batch(model, pairs, seed=0, max_length=None):
    """(the batch of TRL's collator, the same with each image once) for `pairs`: random tokens, the same images in both."""
    family, generator = model.config.model_type, torch.Generator().manual_seed(seed)
    counts = [pair.images for pair in pairs]
    images = image_inputs(family, counts, generator) if any(counts) else {}
    lengths = iter(tokens_per_image(model, family, images) if images else [])

    def text(count):
        return torch.randint(3, IMAGE, (count,), generator=generator).tolist()

    rows = {"chosen": [], "rejected": []}
    for pair in pairs:
        prompt = [
            token for _ in range(pair.images) for token in (*text(1), *[IMAGE] * next(lengths))
        ] + text(pair.text)
        for name in rows:
            answer = text(getattr(pair, name))
            rows[name].append(
                (
                    (prompt + answer)[:max_length],
                    ([0] * len(prompt) + [1] * len(answer))[:max_length],
                )
            )
    rows = rows["chosen"] + rows["rejected"]
    width = max(len(tokens) for tokens, _ in rows)
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor(
            [[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in rows]
        ),
        "completion_mask": torch.tensor(
            [answer + [0] * (width - len(answer)) for _, answer in rows]
        ),
    }
    if family.startswith("qwen"):
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    if family in ("gemma3", "paligemma"):
        batch["token_type_ids"] = (
            (ids == IMAGE).long() if family == "gemma3" else batch["completion_mask"].clone()
        )
    return batch | {
        name: torch.cat([value, value]) for name, value in images.items()
    }, batch | images
