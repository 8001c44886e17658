"""Compare a training step of TRL's `DPOTrainer` with ours: python -m benchmarks.train_step

  stock             TRL's DPOTrainer as it comes
  fixed_tower       the same with the vision tower under no_grad, which is one line and what a user
                    who knows that nothing in it trains would write
  tower_once        the collator processes an image once per pair, and the vision tower runs without
                    gradient and once per step, for both rows of each pair
  one_pair_a_row    besides, the prompt goes through the language model once per forward pass
  ours              besides, pairs share a row where that computes less (utils/shared_prefix.py)
  cached_reference  besides, the reference log-probabilities are known (utils/reference_cache.py)

Random weights and synthetic batches in float32 on one CPU thread, an adapter with random weights
on the language model, gradient checkpointing as in `train()`. A step is forward and backward of
one micro-batch, without the optimizer. The six take turns in one process. FLOPs are those of
torch's counter, the time is the median CPU time, memory is the peak of all tensors above those of
the model. Only smolvlm_256m has the sizes of a real model; the others are ten thin layers with the
image of one. Prints a table per shape and one line of JSON.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from datasets import Dataset
from PIL import Image
from torch.utils import flop_counter
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging
from trl import DPOTrainer

from utils import chat, memory, models, shared_prefix, training
from utils.settings import PROFILES
from utils.shared_prefix import SharedPrefixDPOTrainer, balanced_order
from utils.vision import backbone_of

PROMPT = 35  # tokens of text before an answer
ANSWERS = (60, 150)  # tokens of the shortest and of the longest answer
STEPS = (
    "stock",
    "fixed_tower",
    "tower_once",
    "one_pair_a_row",
    "ours",
    "cached_reference",
)
# FLOPs of four pairs with a fixed tower over ours.
GOALS = {"resampled_64": 1.7, "windows_256": 1.9, "tiles_5x64": 2.1, "smolvlm_256m": 2.7}


def attention_flops(query, key, value, *_, **__):
    """Count the FLOPs of attention from the shapes of its arguments."""
    return flop_counter.sdpa_flop_count(query, key, value)


def attention_backward_flops(gradient, query, key, value, *_, **__):
    """Count the FLOPs of the backward pass of attention."""
    return flop_counter.sdpa_backward_flop_count(gradient, query, key, value)


def product_flops(_, left, right, *__, **___):
    """Count the FLOPs of a matrix product that is added to something."""
    return 2 * left[0] * left[1] * right[1]


aten = torch.ops.aten
FLOPS = {  # what torch's counter leaves out, or cannot count
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    aten.addmm_: product_flops,  # in TRL's LM head
    aten.addmm: product_flops,  # torch's own formula fails on out_dtype, which TRL's LM head sets
}


class Shape(NamedTuple):
    """A model and what a pair of its batch looks like.

    `pixels` and `grid` are as the processor makes them for one image, `tokens` is how many tokens
    stand for it in the text.
    """

    config: dict
    pixels: tuple
    tokens: int
    grid: tuple = ()


def language_config(model_type, **changes):
    """Return the configuration of a small language model of a family."""
    config = {
        "model_type": model_type,
        "pad_token_id": 0,
        "max_position_embeddings": 4096,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 10,
        "vocab_size": 4300,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    }
    return config | changes


def vision_config(hidden, layers, side, patch, heads):
    """Return the configuration of a small vision tower for images of `side` pixels."""
    return {
        "image_size": side,
        "patch_size": patch,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


IDEFICS2 = {
    "model_type": "idefics2",
    "text_config": language_config("mistral"),
    "vision_config": vision_config(384, 6, 224, 14, 6),
    "perceiver_config": {
        "hidden_size": 512,
        "resampler_n_latents": 64,
        "resampler_depth": 2,
        "resampler_n_heads": 8,
        "resampler_head_dim": 64,
        "num_key_value_heads": 4,
    },
}
QWEN = {
    "model_type": "qwen2_5_vl",
    "text_config": language_config(
        "qwen2_5_vl_text",
        num_key_value_heads=2,
        rope_parameters={
            "rope_type": "default",
            "mrope_section": [8, 12, 12],
            "rope_theta": 1e6,
        },
    ),
    "vision_config": {
        "depth": 4,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_heads": 4,
        "out_hidden_size": 512,
        "fullatt_block_indexes": [3],
        "window_size": 112,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
SPLIT = {  # SmolVLM with four tiles and the whole image
    "model_type": "smolvlm",
    "text_config": language_config("llama"),
    "vision_config": vision_config(320, 6, 224, 14, 5),
    "scale_factor": 2,
}
SMOLVLM_256M = {
    "model_type": "smolvlm",
    "text_config": language_config(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49280,
        tie_word_embeddings=True,
    ),
    "vision_config": vision_config(768, 12, 512, 16, 12),
    "scale_factor": 4,
    "tie_word_embeddings": True,
}
QWEN_PATCH = 3 * 2 * 14 * 14  # values in one row of Qwen's pixels
SHAPES = {
    "resampled_64": Shape(IDEFICS2, pixels=(1, 3, 224, 224), tokens=64),
    "windows_256": Shape(QWEN, pixels=(1024, QWEN_PATCH), tokens=256, grid=(1, 32, 32)),
    "windows_1000": Shape(QWEN, pixels=(4000, QWEN_PATCH), tokens=1000, grid=(1, 50, 80)),
    "tiles_5x64": Shape(SPLIT, pixels=(5, 3, 224, 224), tokens=5 * 64),
    "smolvlm_256m": Shape(SMOLVLM_256M, pixels=(1, 3, 512, 512), tokens=64),
}


def draw_lengths(pairs, shortest=ANSWERS[0], longest=ANSWERS[1], seed=0):
    """Draw the tokens of (chosen, rejected) for each of `pairs`, evenly in between.

    They come in the order in which our collator would bring them, which is nothing to TRL's.
    """
    draw = random.Random(seed)
    lengths = []
    rows = []
    for _ in range(pairs):
        chosen = draw.randint(shortest, longest)
        rejected = draw.randint(shortest, longest)
        lengths.append((chosen, rejected))
        rows.append({"prompt": "", "chosen": "a" * chosen, "rejected": "a" * rejected})
    return [lengths[number] for number in balanced_order(rows)]


def text_tensors(config, shape, answers, generator, device):
    """Return the token tensors of a batch, (2 · pairs, length), chosen rows before rejected ones.

    `answers` holds the lengths (chosen, rejected) of every pair. Tokens are random.
    """
    ordinary = min(config.get_text_config().vocab_size, config.image_token_id, 1000)

    def random_tokens(count):
        return torch.randint(3, ordinary, (count,), generator=generator).tolist()

    image = [config.image_token_id] * shape.tokens
    prompts = [image + random_tokens(PROMPT) for _ in answers]
    input_ids = []
    completion_mask = []
    for side in (0, 1):
        for prompt, lengths in zip(prompts, answers, strict=True):
            answer = random_tokens(lengths[side])
            input_ids.append(prompt + answer)
            completion_mask.append([0] * len(prompt) + [1] * len(answer))
    attention_mask = [[1] * len(ids) for ids in input_ids]
    width = max(len(ids) for ids in input_ids)

    def padded(rows):
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)

    tensors = {
        "input_ids": padded(input_ids),
        "attention_mask": padded(attention_mask),
        "completion_mask": padded(completion_mask),
    }
    if shape.grid:
        tensors["mm_token_type_ids"] = (tensors["input_ids"] == config.image_token_id).long()
    return tensors


def synthetic_batches(config, shape, answers, device="cpu", dtype=torch.float32):
    """Make TRL's batch, with every image twice, and ours, with every image once: (TRL's, ours).

    `answers` holds the lengths (chosen, rejected) of every pair.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = text_tensors(config, shape, answers, generator, device)
    pixels = torch.randn(len(answers), *shape.pixels, generator=generator).to(device, dtype)
    images = {"pixel_values": pixels}
    if shape.grid:
        images["pixel_values"] = pixels.flatten(0, 1)
        images["image_grid_thw"] = torch.tensor([shape.grid] * len(answers)).to(device)
    images_twice = {name: torch.cat([value, value]) for name, value in images.items()}
    return tensors | images_twice, tensors | images


def random_frozen_model(shape):
    """Return the shape's model with random frozen weights, the same every time."""
    torch.manual_seed(0)
    vocabulary = shape.config["text_config"]["vocab_size"]
    config = AutoConfig.for_model(**shape.config, image_token_id=vocabulary - 1)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return model.requires_grad_(False)


def benchmark_trainer(settings, trainer_class, model, output, **changes):
    """Return a trainer of `trainer_class` with the profile's adapter on `model`, B at random.

    With B at zero the loss would be ln 2, whatever is computed.
    """
    row = {
        "images": [Image.new("RGB", (64, 64))],
        "prompt": chat.prompt_messages("What is this?"),
        "chosen": chat.answer_messages("A cup."),
        "rejected": chat.answer_messages("A dog."),
    }
    arguments = {"disable_tqdm": True, **changes}
    trainer = trainer_class(
        model=model,
        args=training.dpo_config(settings, output, **arguments),
        train_dataset=Dataset.from_list([row]),  # never read: batches are synthetic
        processing_class=models.load_processor(PROFILES["embedded"]),
        peft_config=training.lora_config(settings),
    )
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return trainer


def forward_and_backward(trainer, batch):
    """Compute the gradients of a micro-batch as `train()` does. Return its loss."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.item()


@contextmanager
def fixed_tower(trainer):
    """Let the trainer's model encode images without gradient, as often as it is asked to."""
    backbone = backbone_of(trainer.model)
    backbone.get_image_features = torch.no_grad()(backbone.get_image_features)
    try:
        yield
    finally:
        del backbone.get_image_features


@contextmanager
def two_rows(trainer):
    """Let our trainer run each answer in a row of its own."""
    trainer.packs = False
    try:
        yield
    finally:
        trainer.packs = True


def one_pair_a_row(_trainer):
    """Let no two pairs share a row."""
    return mock.patch.object(
        shared_prefix, "groups_in_rows", lambda lengths, width: [1] * len(lengths)
    )


def vision_layers(backbone):
    """Return the layers outside the language model that gradient checkpointing runs again."""
    language = set(backbone.get_decoder().modules())
    layers = []
    for module in backbone.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in language:
            layers.append(module)
    return layers


def watch_vision(trainer, patches):
    """Count how often `patches` go forward and back through the vision tower's first layer.

    Returns a Counter that goes on counting, and the hook that stops it when it is removed.
    """
    # Hooks of the layer itself do not see it run again for the backward pass; those of a matrix
    # inside it do.
    layer = vision_layers(backbone_of(trainer.model))[0]
    matrix = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
    passes = Counter()

    def count(module, inputs, output):
        share = output.shape[:-1].numel() / patches
        passes["forward"] += share
        if output.requires_grad:
            output.register_hook(lambda gradient: passes.update(backward=share))

    return passes, matrix.register_forward_hook(count)


def measure_step(trainer, batch, patches):
    """Count FLOPs, memory and passes through the vision tower in one step, which also warms up.

    Returns {"loss", "gflop", "memory_mb", "vision_forward", "vision_backward"}.
    """
    passes, hook = watch_vision(trainer, patches)
    trainer.model.zero_grad()
    tensors = list(memory.frozen_tensors(trainer.model))
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            tensors.append(parameter)
    allocations = memory.Allocations(tensors)
    flops = flop_counter.FlopCounterMode(display=False, custom_mapping=FLOPS)
    with allocations, flops:
        loss = forward_and_backward(trainer, batch)
    hook.remove()
    return {
        "loss": loss,
        "gflop": flops.get_total_flops() / 1e9,
        "memory_mb": (allocations.peak - memory.held(tensors)) / 1e6,
        "vision_forward": passes["forward"],
        "vision_backward": passes["backward"],
    }


def image_flops(backbone, batch):
    """Count the FLOPs of encoding the images of `batch` once.

    Returns (those of the tower's layers, which checkpointing runs again; all others).
    """
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=FLOPS)
    in_layers = 0

    def enter(*_):
        nonlocal in_layers
        in_layers -= counter.get_total_flops()

    def leave(*_):
        nonlocal in_layers
        in_layers += counter.get_total_flops()

    hooks = []
    for layer in vision_layers(backbone):
        hooks.append(layer.register_forward_pre_hook(enter))
        hooks.append(layer.register_forward_hook(leave))
    inputs = {}
    for name in ("pixel_values", "image_grid_thw"):
        if name in batch:
            inputs[name] = batch[name]
    with torch.no_grad(), counter:
        backbone.get_image_features(**inputs)
    for hook in hooks:
        hook.remove()
    return in_layers, counter.get_total_flops() - in_layers


def ideal_ratio(model, shape, answers, batch):
    """Compute how many times the FLOPs of stock are those of a step in which nothing runs twice.

    The ideal step has neither padding nor adapter. Returns the ratio, and the FLOPs of one image
    over those of one stock row in the language model.
    """
    text_config = model.config.get_text_config()
    backbone = backbone_of(model)
    weights = 0
    for module in backbone.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):
            weights += module.weight.numel()
    attention = 4 * text_config.num_hidden_layers
    attention *= text_config.num_attention_heads * text_config.head_dim
    head = 2 * text_config.vocab_size * text_config.hidden_size
    layers, rest = image_flops(backbone, batch)  # of all pairs

    def language_flops(row_lengths, scored):
        # With checkpointing every row runs four times: forward for the reference, forward, forward
        # again and back. Frozen weights need the gradient of their input alone; back through
        # attention costs 2.5 forward passes.
        flops = 4 * head * scored
        for tokens in row_lengths:
            flops += 4 * 2 * weights * tokens + (3 + 2.5) * attention * tokens**2
        return flops

    prompt = shape.tokens + PROMPT
    stock_rows = []
    ideal_rows = []
    answer_tokens = 0
    for chosen, rejected in answers:
        stock_rows += [prompt + chosen, prompt + rejected]
        ideal_rows.append(prompt + chosen + rejected)
        answer_tokens += chosen + rejected
    # Stock encodes both images of a pair, four times in what is checkpointed and three times in
    # the rest. On a CPU it scores every position but the last; only answers need it.
    stock = 8 * layers + 6 * rest
    stock += language_flops(stock_rows, sum(stock_rows) - len(stock_rows))
    ideal = layers + rest + language_flops(ideal_rows, answer_tokens)
    row_flops = 0
    for tokens in stock_rows:
        row_flops += 2 * weights * tokens + attention * tokens**2
    image_over_row = (layers + rest) / len(answers) / (row_flops / len(stock_rows))
    return stock / ideal, image_over_row


def measure_shape(shape, repeats, answers, output):
    """Measure all STEPS on one shape, `repeats` times each.

    `answers` holds the lengths (chosen, rejected) of every pair in the micro-batch. Returns
    {step: {…}}, with "ideal_ratio" and "vision_over_language": one image over one row.
    """
    settings = PROFILES["smolvlm"]
    cpu = {"use_cpu": True, "bf16": False, "fp16": False}
    model = random_frozen_model(shape)
    twice, once = synthetic_batches(model.config, shape, answers)
    ideal, image_over_row = ideal_ratio(model, shape, answers, once)
    stock = benchmark_trainer(settings, DPOTrainer, model, output, **cpu)
    model = random_frozen_model(shape)
    ours = benchmark_trainer(settings, SharedPrefixDPOTrainer, model, output, **cpu)
    for trainer in (stock, ours):  # what train() does before its first step
        trainer.model.train()
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)

    chosen, rejected = ours.compute_ref_log_probs(ours.model, once)
    cached = once | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    steps = {  # step → (trainer, its batch, what is different while it runs)
        "stock": (stock, twice, nullcontext),
        "fixed_tower": (stock, twice, fixed_tower),
        "tower_once": (ours, once, two_rows),
        "one_pair_a_row": (ours, once, one_pair_a_row),
        "ours": (ours, once, nullcontext),
        "cached_reference": (ours, cached, nullcontext),
    }
    patches = shape.pixels[0] * len(answers)
    if not shape.grid:
        patches *= (shape.pixels[-1] // model.config.vision_config.patch_size) ** 2

    results = {}
    seconds = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, (trainer, batch, changed) in steps.items():
            with changed(trainer):
                if repeat == 0:
                    results[name] = measure_step(trainer, batch, patches)
                    continue
                start = time.process_time()
                forward_and_backward(trainer, batch)
                seconds[name].append(time.process_time() - start)
    for name, result in results.items():
        result["seconds"] = statistics.median(seconds[name])
    return results | {"ideal_ratio": ideal, "vision_over_language": image_over_row}


def against(other, step):
    """Return the ratios of a step: another over it for FLOPs and time, it over that for memory."""
    return {
        "flop_ratio": other["gflop"] / step["gflop"],
        "time_ratio": other["seconds"] / step["seconds"],
        "memory_ratio": step["memory_mb"] / other["memory_mb"],
        "loss_difference": abs(other["loss"] - step["loss"]),
    }


def ratios(results):
    """Return the figures of one shape: {step: against stock and against fixed_tower}."""
    figures = {"ideal_ratio": results["ideal_ratio"]}
    for name in STEPS[2:]:
        figures[name] = {
            "stock": against(results["stock"], results[name]),
            "fixed_tower": against(results["fixed_tower"], results[name]),
        }
    return figures


def print_table(name, answers, results):
    """Print the table of one shape."""
    print(
        f"\n{name}, pairs: {len(answers)}. An image costs {results['vision_over_language']:.2f} of "
        f"a row; if nothing ran twice, stock would compute {results['ideal_ratio']:.2f} × as much"
    )
    print(
        f"{'':17}{'stock ÷ this: FLOPs  time  memory':>37}"
        f"{'fixed_tower ÷ this: FLOPs  time  memory':>42}"
        f"{'loss difference':>17}{'vision forward, back':>22}"
    )
    for step in STEPS:
        result = results[step]
        row = f"{step:17}"
        for other, width in (("stock", 23), ("fixed_tower", 28)):
            found = against(results[other], result)
            row += f"{found['flop_ratio']:{width}.2f}{found['time_ratio']:6.2f}"
            row += f"{1 / found['memory_ratio']:8.2f}"
        row += f"{against(results['stock'], result)['loss_difference']:17.1e}"
        row += f"{result['vision_forward']:19.0f}, {result['vision_backward']:.0f}"
        print(row, flush=True)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(GOALS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--pairs", nargs="+", type=int, default=[1, 4], help="in a micro-batch; profiles take four"
    )
    parser.add_argument(
        "--answers", nargs=2, type=int, default=ANSWERS, help="tokens of the shortest and longest"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    logging.set_verbosity_error()  # or each trainer would warn of its model's special tokens
    summary = {}
    for name in options.shapes:
        summary[name] = {}
        for pairs in options.pairs:
            answers = draw_lengths(pairs, *options.answers)
            with tempfile.TemporaryDirectory() as output:
                results = measure_shape(SHAPES[name], options.repeats, answers, output)
            summary[name][pairs] = ratios(results)
            print_table(name, answers, results)
    print(json.dumps({"shapes": summary}))


if __name__ == "__main__":
    main()
