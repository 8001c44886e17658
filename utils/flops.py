"""How much a training step computes, by formula, and from that how long it may take: an estimate, not a measurement."""

import math
from collections import Counter

import torch

from utils.memory import architecture, placement
from utils.models import part_of
from utils.pixel_budget import seen

PEAK = {
    "T4": 65e12,
    "L4": 121e12,
    "A100": 312e12,
}  # dense 16-bit matrix products a second, by NVIDIA's data sheets
UTILISATION = 0.25  # the share of it that is assumed to be reached


def pair_flops(settings, prompt=35, answer=105):
    """FLOPs of one pair in a step of the profile's (shared-prefix) trainer by part; one multiplication and addition are two.

    For a square image as large as the budget, `prompt` tokens of text and two answers of `answer` tokens. Vision tower and connector
    run once; the rest as policy and as reference, backward to the adapters (a frozen matrix: once what the forward takes), and
    with checkpointing forward again. Not counted: attention inside the vision tower, and whatever is no matrix product.
    """
    model, (image, pixels) = (
        architecture(settings.model),
        seen(architecture(settings.model).config, settings.pixel_budget),
    )
    text, patch, weights = (
        model.config.get_text_config(),
        model.config.vision_config.patch_size,
        Counter(),
    )
    for name, module in model.named_modules():
        weights[part_of(name)] += (
            module.weight.numel() if isinstance(module, torch.nn.Linear) else 0
        )
    tokens, again = image + prompt + 2 * answer + 1, int(settings.gradient_checkpointing)
    width = text.num_attention_heads * (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    return {
        "vision": 2
        * weights["vision"]
        * pixels
        // (patch**2 if isinstance(patch, int) else math.prod(patch)),
        "connector": 2 * weights["connector"] * image,
        "language": 2 * weights["language"] * tokens * (3 + again),
        "attention": 4 * text.num_hidden_layers * width * tokens**2 * (4 + again),
        "head": 2 * text.vocab_size * text.hidden_size * 2 * answer * 4,
        "adapter": 2 * sum(row["adapter"] for row in placement(settings)) * tokens * (3 + again),
    }


def hours(settings, pairs, device):
    """Hours that one epoch of `pairs` takes on `device`, one of PEAK, if UTILISATION of its peak is reached."""
    return pairs * sum(pair_flops(settings).values()) / (PEAK[device] * UTILISATION) / 3600
