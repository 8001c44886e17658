"""Compare ways to judge, evaluate and sample with a model: python -m benchmarks.generate

  judging     20 yes/no questions about an image: a row for each with its own image, eight rows at
              a time, and all of them in one row that holds the image once (utils/judging.py)
  evaluation  a description and four yes/no questions from base and from tuned: an image is encoded
              for each of the ten answers, or once (utils/evaluation.py)
  sampling    eight descriptions of an image: the prompt is computed for each, or once
              (utils/generation.py)

Small models with random weights in the shapes of benchmarks.train_step, in float32 on one CPU
thread, with an adapter. FLOPs are those of torch's counter, the time is the CPU time of one run
after the one that counts. What is compared gives the same answers, which is checked. Prints a table
and one line of JSON.
"""

import argparse
import json
import time
from contextlib import nullcontext

import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig
from transformers.utils import logging

from benchmarks.train_step import FLOPS, GOALS, SHAPES, random_frozen_model
from utils import generation, judging, training
from utils.models import answering
from utils.settings import PROFILES
from utils.vision import images_encoded_once

CLAIMS = 20  # about an image
SAMPLES = 8
ROWS = 8  # at a time, the profiles' generation_batch_size
OPENING = 12  # tokens between the image and what differs from question to question
QUESTION = 12  # tokens of what differs
DESCRIPTION = 80  # tokens of a generated description
REPLY = 3  # tokens of a generated yes or no
IMAGES = 2  # in the evaluation


def prompt_batch(config, shape, images, questions, seed=0):
    """Return the batch of `questions` different questions about each of `images` images.

    Its rows are [image, opening, question], those about an image one after another.
    """
    generator = torch.Generator().manual_seed(seed)
    ordinary = min(config.image_token_id, 1000)

    def random_tokens(*size):
        return torch.randint(3, ordinary, size, generator=generator)

    rows = images * questions
    image = torch.full((rows, shape.tokens), config.image_token_id)
    opening = random_tokens(1, OPENING).expand(rows, -1)
    ids = torch.cat([image, opening, random_tokens(rows, QUESTION)], dim=1)
    pixels = torch.randn(images, *shape.pixels, generator=generator)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.repeat_interleave(questions, dim=0),
    }
    if shape.grid:
        batch["pixel_values"] = batch["pixel_values"].flatten(0, 1)
        batch["image_grid_thw"] = torch.tensor([shape.grid] * rows)
        batch["mm_token_type_ids"] = (ids == config.image_token_id).long()
    return batch


def part_of(batch, start, stop):
    """Return the rows `start` to `stop` of `batch`."""
    rows = len(batch["input_ids"])
    part = {}
    for name, value in batch.items():
        each = len(value) // rows  # Qwen has many rows of pixels for each image
        part[name] = value[start * each : stop * each]
    return part


def tuned_model(shape):
    """Return the shape's model with a random adapter on its language model."""
    model = random_frozen_model(shape)
    model.generation_config = GenerationConfig(eos_token_id=1)
    model = get_peft_model(model, training.lora_config(PROFILES["smolvlm"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.05)
    return model.requires_grad_(False)


def judge_rows(model, shape):
    """Return the logits of all claims, each with a row of its own."""
    batch = prompt_batch(model.config, shape, 1, CLAIMS)
    logits = []
    for start in range(0, CLAIMS, ROWS):
        part = part_of(batch, start, start + ROWS)
        logits.append(judging.logits_of_rows(model, part, pad_token=0))
    return torch.cat(logits)


def judge_shared(model, shape):
    """Return the logits of all claims from one row."""
    batch = prompt_batch(model.config, shape, 1, CLAIMS)
    return judging.logits_of_shared_row(model, batch)


def evaluate(model, shape, sharing):
    """Return the tokens of all answers; `sharing` is the context in which they are made."""
    options = generation.NEUTRAL | {"pad_token_id": 0, "do_sample": False, "top_k": None}
    made = []
    with sharing:
        for adapter in (False, True):
            with answering(model, adapter):
                for number, tokens in enumerate([DESCRIPTION, REPLY, REPLY, REPLY, REPLY]):
                    batch = prompt_batch(model.config, shape, IMAGES, 1)
                    batch["input_ids"][:, -1] = 3 + number  # another question
                    made.append(model.generate(**batch, **options, max_new_tokens=tokens))
    return torch.cat([tokens.flatten() for tokens in made])


def evaluate_each(model, shape):
    """Return the tokens of all answers, with an image encoded for each."""
    return evaluate(model, shape, nullcontext())


def evaluate_shared(model, shape):
    """Return the tokens of all answers, with an image encoded once."""
    return evaluate(model, shape, images_encoded_once(model))


def sample(model, shape, shared):
    """Return the tokens of all samples; `shared` is whether their prompt is computed once."""
    batch = prompt_batch(model.config, shape, 1, 1)
    options = generation.NEUTRAL | {"pad_token_id": 0, "do_sample": True, "top_k": 0}
    options["max_new_tokens"] = DESCRIPTION
    if shared:
        batch = generation.repeated(model, batch, SAMPLES, options)
    else:
        options["num_return_sequences"] = SAMPLES
    torch.manual_seed(0)
    return model.generate(**batch, **options)


def sample_each(model, shape):
    """Return the tokens of all samples, each of which computes its prompt."""
    return sample(model, shape, shared=False)


def sample_shared(model, shape):
    """Return the tokens of all samples, whose prompt is computed once."""
    return sample(model, shape, shared=True)


WAYS = {
    "judging": (judge_rows, judge_shared),
    "evaluation": (evaluate_each, evaluate_shared),
    "sampling": (sample_each, sample_shared),
}


def measure(way, model, shape):
    """Run one way twice. Return (what it gives, FLOPs of the first run, seconds of the second)."""
    with answering(model):
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            made = way(model, shape)
        start = time.process_time()
        way(model, shape)
    return made, counter.get_total_flops(), time.process_time() - start


def compare(model, shape, each, shared):
    """Return the FLOPs and the time of one way over those of the other, and the difference."""
    expected, flops, seconds = measure(each, model, shape)
    made, fewer_flops, fewer_seconds = measure(shared, model, shape)
    return {
        "flop_ratio": flops / fewer_flops,
        "time_ratio": seconds / fewer_seconds,
        "difference": (made - expected).abs().max().item(),
    }


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(GOALS))
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    logging.set_verbosity_error()
    print(f"{'':14} {'':11}  FLOP ratio  time ratio  difference")
    summary = {}
    for name in options.shapes:
        model = tuned_model(SHAPES[name])
        summary[name] = {}
        for what, ways in WAYS.items():
            found = compare(model, SHAPES[name], *ways)
            summary[name][what] = found
            print(
                f"{name:14} {what:11}{found['flop_ratio']:12.2f}{found['time_ratio']:12.2f}"
                f"{found['difference']:12.1e}",
                flush=True,
            )
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
