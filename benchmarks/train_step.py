"""One training step of TRL's `DPOTrainer` against each step of ours: python -m benchmarks.train_step [--shapes …] [--repeats N]

  stock             DPOTrainer
  images_once       the collator processes an image once per pair, the vision tower encodes without gradient, once per step
  ours              and the prompt goes through the language model once per forward (utils/shared_prefix.py)
  cached_reference  and the reference log-probabilities are known already (utils/reference_cache.py)

Random weights and synthetic batches, float32 on the CPU, an adapter with random weights on the language model, gradient
checkpointing on as in `train()`; forward and backward, no optimizer step. All four run alternately in one process. FLOPs
are those of torch's counter, time is CPU time (median), memory is the peak of all tensors above those of the model.
One thread. Prints a table per shape and one line of JSON.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from typing import NamedTuple

import torch
from datasets import Dataset
from PIL import Image
from torch.utils import flop_counter
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging
from trl import DPOTrainer

from utils import chat, memory, models, training
from utils.settings import PROFILES
from utils.shared_prefix import SharedPrefixDPOTrainer, backbone_of

PROMPT, ANSWERS = 35, (60, 150)  # tokens of text before an answer; shortest and longest answer
STEPS = ("stock", "images_once", "ours", "cached_reference")
GOALS = {
    "idefics2_64": 1.85,
    "qwen_256": 1.85,
    "split": 2.3,
    "smolvlm_256m": 3.6,
}  # FLOPs of stock over ours
aten = torch.ops.aten
FLOPS = {  # what torch's counter leaves out: attention on CPUs, and the in-place product of TRL's LM head
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        flop_counter.sdpa_flop_count(q, k, v)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        flop_counter.sdpa_backward_flop_count(g, q, k, v)
    ),
    aten.addmm_: lambda _, a, b, *__, **___: 2 * a[0] * a[1] * b[1],
    aten.addmm: lambda _, a, b, *__, **___: (
        2 * a[0] * a[1] * b[1]
    ),  # torch's own formula fails on out_dtype, as TRL's head has it
}


class Shape(NamedTuple):
    """A model, and what a pair of its batch looks like: `pixels` and `grid` as the processor makes them, `tokens` in the text."""

    config: dict
    pixels: tuple
    tokens: int
    pairs: int = 2
    grid: tuple = ()


def text(
    model_type, hidden=512, intermediate=1408, layers=10, heads=8, keys=4, vocabulary=4300, **more
):
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }
    heads = {"num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": 64}
    return (
        {"model_type": model_type, "pad_token_id": 0, "max_position_embeddings": 4096}
        | sizes
        | heads
        | more
    )


def tower(hidden, layers, side, patch, heads, **more):
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return {"image_size": side, "patch_size": patch} | sizes | more


RESAMPLER = {
    "hidden_size": 512,
    "resampler_n_latents": 64,
    "resampler_depth": 2,
    "resampler_n_heads": 8,
    "resampler_head_dim": 64,
}
MROPE = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
QWEN = {
    "model_type": "qwen2_5_vl",
    "text_config": text("qwen2_5_vl_text", keys=2, rope_parameters=MROPE),
    "vision_config": {
        "depth": 4,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_heads": 4,
        "out_hidden_size": 512,
    }
    | {
        "fullatt_block_indexes": [3],
        "window_size": 112,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
SHAPES = {
    "idefics2_64": Shape(
        {
            "model_type": "idefics2",
            "text_config": text("mistral"),
            "vision_config": tower(384, 6, 224, 14, 6),
            "perceiver_config": RESAMPLER | {"num_key_value_heads": 4},
        },
        pixels=(1, 3, 224, 224),
        tokens=64,
    ),
    "qwen_256": Shape(QWEN, pixels=(1024, 3 * 2 * 14 * 14), tokens=256, grid=(1, 32, 32)),
    "qwen_1000": Shape(QWEN, pixels=(4000, 3 * 2 * 14 * 14), tokens=1000, grid=(1, 50, 80)),
    "split": Shape(  # SmolVLM: four tiles and the whole image
        {
            "model_type": "smolvlm",
            "text_config": text("llama"),
            "vision_config": tower(320, 6, 224, 14, 5),
            "scale_factor": 2,
        },
        pixels=(5, 3, 224, 224),
        tokens=5 * 64,
    ),
    "smolvlm_256m": Shape(
        {
            "model_type": "smolvlm",
            "text_config": text(
                "llama", 576, 1536, 30, 9, 3, vocabulary=49280, tie_word_embeddings=True
            ),
            "vision_config": tower(768, 12, 512, 16, 12),
            "scale_factor": 4,
            "tie_word_embeddings": True,
        },
        pixels=(1, 3, 512, 512),
        tokens=64,
        pairs=1,
    ),
}


def lengths(pairs, seed=0):
    """Tokens of (chosen, rejected) for each of `pairs`, drawn evenly between the shortest and the longest answer."""
    draw = random.Random(seed)
    return [(draw.randint(*ANSWERS), draw.randint(*ANSWERS)) for _ in range(pairs)]


def batches(config, shape, answers, device="cpu", dtype=torch.float32):
    """(the batch of TRL's collator, the same with each image once) for the answers' (chosen, rejected) lengths; random tokens."""
    generator = torch.Generator().manual_seed(0)
    ordinary = min(config.get_text_config().vocab_size, config.image_token_id, 1000)
    prompts = [
        [config.image_token_id] * shape.tokens
        + torch.randint(3, ordinary, (PROMPT,), generator=generator).tolist()
        for _ in answers
    ]
    rows = [
        (prompt, torch.randint(3, ordinary, (pair[side],), generator=generator).tolist())
        for side in (0, 1)
        for prompt, pair in zip(prompts, answers, strict=True)
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)

    def padded(rows):
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)

    batch = {
        "input_ids": padded([prompt + answer for prompt, answer in rows]),
        "attention_mask": padded([[1] * len(prompt + answer) for prompt, answer in rows]),
        "completion_mask": padded(
            [[0] * len(prompt) + [1] * len(answer) for prompt, answer in rows]
        ),
    }
    once = {
        "pixel_values": torch.randn(len(answers), *shape.pixels, generator=generator).to(
            device, dtype
        )
    }
    if shape.grid:
        batch["mm_token_type_ids"] = (batch["input_ids"] == config.image_token_id).long()
        once = {
            "pixel_values": once["pixel_values"].flatten(0, 1),
            "image_grid_thw": torch.tensor([shape.grid] * len(answers)).to(device),
        }
    return batch | {name: torch.cat([value, value]) for name, value in once.items()}, batch | once


def build(shape):
    """The shape's model with random weights, all frozen; the same every time."""
    torch.manual_seed(0)
    vocabulary = shape.config["text_config"]["vocab_size"]
    config = AutoConfig.for_model(**shape.config, image_token_id=vocabulary - 1)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).requires_grad_(
        False
    )


def make_trainer(kind, model, settings, output, **changes):
    """A trainer of class `kind` with the profile's adapter, its B at random: at zero the loss is ln 2, whatever is computed."""
    texts = chat.conversation(
        {"question": "What is this?", "chosen": "A cup.", "rejected": "A dog."}
    )
    trainer = kind(
        model=model,
        args=training.dpo_config(settings, output, **{"disable_tqdm": True} | changes),
        train_dataset=Dataset.from_list(
            [{"images": [Image.new("RGB", (64, 64))], **texts}]
        ),  # never read: batches are synthetic
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


def run(trainer, batches):
    """Forward and backward of each batch, as between two optimizer steps of `train()`; returns the losses."""
    trainer.model.zero_grad()
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        losses.append(loss.item())
    return losses


def vision_layers(backbone):
    """The layers outside the language model that gradient checkpointing runs again."""
    language = set(backbone.get_decoder().modules())
    return [
        module
        for module in backbone.modules()
        if isinstance(module, GradientCheckpointingLayer) and module not in language
    ]


def vision_passes(trainer, images):
    """A Counter that goes on counting how often each of `images` goes forward and back through the first layer of the vision tower.
    Watches a matrix inside the layer: hooks of the layer itself do not see it run again for the backward pass."""
    passes, layer = Counter(), vision_layers(backbone_of(trainer.model))[0]
    matrix = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))

    def watch(module, inputs, output):
        patches = output.shape[:-1].numel()
        passes["forward"] += patches / images
        if output.requires_grad:
            output.register_hook(lambda gradient: passes.update(backward=patches / images))

    return passes, matrix.register_forward_hook(watch)


def counted(trainer, batches, patches):
    """{"losses", "gflop", "memory_mb", "vision_forward", "vision_backward"} of one step, which also warms up."""
    passes, hook = vision_passes(trainer, patches)
    trainer.model.zero_grad()
    tensors = [
        *memory.frozen_tensors(trainer.model),
        *(p for p in trainer.model.parameters() if p.requires_grad),
    ]
    allocations, flops = (
        memory.Allocations(tensors),
        flop_counter.FlopCounterMode(display=False, custom_mapping=FLOPS),
    )
    with allocations, flops:
        losses = run(trainer, batches)
    hook.remove()
    sizes = {
        "gflop": flops.get_total_flops() / 1e9,
        "memory_mb": (allocations.peak - memory.held(tensors)) / 1e6,
    }
    return {
        "losses": losses,
        **sizes,
        "vision_forward": passes["forward"],
        "vision_backward": passes["backward"],
    }


def image_flops(backbone, batch):
    """FLOPs that the images of `batch` cost in (the layers of the tower, which checkpointing runs again; all else on their way)."""
    counter, layers = flop_counter.FlopCounterMode(display=False, custom_mapping=FLOPS), [0]

    def enter(*_):
        layers[0] -= counter.get_total_flops()

    def leave(*_):
        layers[0] += counter.get_total_flops()

    hooks = [
        hook
        for layer in vision_layers(backbone)
        for hook in (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave))
    ]
    with torch.no_grad(), counter:
        backbone.get_image_features(
            **{name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}
        )
    for hook in hooks:
        hook.remove()
    return layers[0], counter.get_total_flops() - layers[0]


def ideal_ratio(model, shape, answers, batch):
    """FLOPs of stock over those of a step in which nothing runs twice, without padding and adapter; and one image over one stock row.

    With checkpointing every row goes through the language model four times, forward for the reference, forward, forward again and
    back (frozen weights need the gradient of their input alone; back through attention costs 2.5 forwards). Stock sends an image,
    twice in a pair, the same four times through the tower, and three times through what is not checkpointed. On a CPU stock
    scores every position but the last; only answers need it.
    """
    text, backbone = model.config.get_text_config(), backbone_of(model)
    weights = sum(
        module.weight.numel()
        for module in backbone.get_decoder().modules()
        if isinstance(module, torch.nn.Linear)
    )
    attention = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    head = 2 * text.vocab_size * text.hidden_size
    layers, rest = image_flops(backbone, batch)  # of all pairs

    def rows(tokens, scored):
        return (
            sum(4 * 2 * weights * n + (3 + 2.5) * attention * n**2 for n in tokens)
            + 4 * head * scored
        )

    prompt = shape.tokens + PROMPT
    stock = [prompt + answer for pair in answers for answer in pair]
    ours = [prompt + sum(pair) for pair in answers]
    row = sum(2 * weights * n + attention * n**2 for n in stock) / len(stock)
    ratio = (8 * layers + 6 * rest + rows(stock, sum(stock) - len(stock))) / (
        layers + rest + rows(ours, sum(map(sum, answers)))
    )
    return ratio, (layers + rest) / len(answers) / row


def compare(shape, repeats, batch_size, output):
    """What is measured of one shape, {step: {…}}, with `ideal_ratio` and `vision_over_language` (one image over one stock row)."""
    cpu = {"use_cpu": True, "bf16": False, "fp16": False}
    answers, bare = lengths(shape.pairs), build(shape)
    config = bare.config
    ideal, image = ideal_ratio(bare, shape, answers, batches(config, shape, answers)[1])
    each = (DPOTrainer, bare), (SharedPrefixDPOTrainer, build(shape))
    stock, ours = (
        make_trainer(kind, model, PROFILES["smolvlm"], output, **cpu) for kind, model in each
    )
    for trainer in (stock, ours):  # what train() does before its first step
        trainer.model.train()
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    parts = [answers[start : start + batch_size] for start in range(0, len(answers), batch_size)]
    twice, once = zip(*(batches(config, shape, part) for part in parts), strict=True)
    log_probs = [ours.compute_ref_log_probs(ours.model, batch) for batch in once]
    cached = [
        batch | {"ref_chosen_logps": c, "ref_rejected_logps": r}
        for batch, (c, r) in zip(once, log_probs, strict=True)
    ]
    steps = {
        "stock": (stock, twice, True),
        "images_once": (ours, once, False),
        "ours": (ours, once, True),
    }
    steps["cached_reference"] = (ours, cached, True)
    patches = (
        shape.pixels[0]
        if shape.grid
        else shape.pixels[0] * (shape.pixels[-1] // config.vision_config.patch_size) ** 2
    )
    results, seconds = {}, {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, (trainer, inputs, packs) in steps.items():
            trainer.packs = packs
            if repeat == 0:
                results[name] = counted(trainer, inputs, patches * shape.pairs)
            else:
                start = time.process_time()
                run(trainer, inputs)
                seconds[name].append(time.process_time() - start)
    for name, result in results.items():
        result["seconds"] = statistics.median(seconds[name])
    return results | {"ideal_ratio": ideal, "vision_over_language": image}


def ratios(results):
    """The contract's figures of one shape: stock over ours for FLOPs and time, ours over stock for memory; the other steps inside."""

    def against_stock(name):
        stock, step = results["stock"], results[name]
        return {
            "flop_ratio": stock["gflop"] / step["gflop"],
            "time_ratio": stock["seconds"] / step["seconds"],
            "memory_ratio": step["memory_mb"] / stock["memory_mb"],
            "loss_difference": max(
                abs(a - b) for a, b in zip(stock["losses"], step["losses"], strict=True)
            ),
        }

    steps = {name: against_stock(name) for name in STEPS}
    return (
        steps["ours"]
        | {"ideal_ratio": results["ideal_ratio"]}
        | {name: steps[name] for name in ("images_once", "cached_reference")}
    )


def show(name, results, figures):
    """A shape's table."""
    goal = f", goal {GOALS[name]}" if name in GOALS else ""
    print(
        f"\n{name}: an image costs {results['vision_over_language']:.2f} of a row, ideal ratio {results['ideal_ratio']:.2f}{goal}"
    )
    print(
        f"{'':17}{'GFLOP':>8}{'ratio':>7}{'CPU s':>8}{'ratio':>7}{'+MB':>7}{'share':>7}  loss difference  vision forward, back"
    )
    nothing = {"flop_ratio": 1, "time_ratio": 1, "memory_ratio": 1, "loss_difference": 0}
    for step in STEPS:
        result, row = results[step], {"stock": nothing, "ours": figures, **figures}[step]
        print(
            f"{step:17}{result['gflop']:8.1f}{row['flop_ratio']:7.2f}{result['seconds']:8.2f}{row['time_ratio']:7.2f}"
            f"{result['memory_mb']:7.0f}{row['memory_ratio']:7.2f}{row['loss_difference']:17.1e}"
            f"{result['vision_forward']:16.0f}, {result['vision_backward']:.0f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(GOALS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--batch-size", type=int, default=1, help="pairs at a time; the profiles train with one"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    logging.set_verbosity_error()  # it would say for every trainer that its model has other special tokens
    summary = {}
    for name in options.shapes:
        with tempfile.TemporaryDirectory() as output:
            results = compare(SHAPES[name], options.repeats, options.batch_size, output)
        summary[name] = ratios(results)
        show(name, results, summary[name])
    print(json.dumps({"shapes": summary}))


if __name__ == "__main__":
    main()
