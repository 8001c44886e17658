"""Estimate how much a training step computes and how long that may take. Nothing is measured."""

import math
from collections import Counter

import torch

from utils.families import seen
from utils.memory import architecture, placement
from utils.models import part_of

# Dense 16-bit matrix products, FLOPs a second, from NVIDIA's data sheets.
PEAK = {"T4": 65e12, "L4": 121e12, "A100": 312e12}
UTILIZATION = 0.25  # the share of it that is assumed to be reached


def pair_flops(settings, prompt=35, answer=105):
    """Return the FLOPs of one pair in a step of the shared-prefix trainer: {part: FLOPs}.

    One multiplication and addition are two FLOPs. The pair is a square image as large as the
    profile's budget, `prompt` tokens of text and two answers of `answer` tokens. Not counted are
    attention inside the vision tower and whatever is no matrix product.
    """
    model = architecture(settings.model)
    text = model.config.get_text_config()
    image, pixels = seen(model.config, settings.pixel_budget)
    weights = Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weights[part_of(name)] += module.weight.numel()
    adapter = sum(row["adapter"] for row in placement(settings))

    patch = model.config.vision_config.patch_size
    pixels_per_patch = patch**2 if isinstance(patch, int) else math.prod(patch)
    # The last token of the prompt comes twice, once before each answer.
    tokens = image + prompt + 2 * answer + 1
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = text.num_attention_heads * head_size

    # Vision tower and connector run once. The language model runs forward as policy and as
    # reference, and backward to the adapters, which takes as much as one forward pass, because
    # its matrices are frozen. Attention has no frozen factor, so its backward pass takes two.
    # With checkpointing the policy's forward pass runs again.
    passes = 3
    attention_passes = 4
    if settings.gradient_checkpointing:
        passes += 1
        attention_passes += 1
    # TRL always computes the logits of the answers again, so the head runs four times.
    head_passes = 4
    return {
        "vision": 2 * weights["vision"] * pixels // pixels_per_patch,
        "connector": 2 * weights["connector"] * image,
        "language": 2 * weights["language"] * tokens * passes,
        "attention": 4 * text.num_hidden_layers * width * tokens**2 * attention_passes,
        "head": 2 * text.vocab_size * text.hidden_size * 2 * answer * head_passes,
        "adapter": 2 * adapter * tokens * passes,
    }


def hours(settings, pairs, device):
    """Return the hours of an epoch of `pairs` on `device`, a key of PEAK, at UTILIZATION of it."""
    flops = pairs * sum(pair_flops(settings).values())
    return flops / (PEAK[device] * UTILIZATION) / 3600
