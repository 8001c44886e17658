"""Choose from the free memory of a GPU how to compute a step, and how many answers at once.

The pairs of an optimizer step and their loss never change. Only fields named in
`Settings.planned` do, so every value can be fixed by hand.
"""

import itertools
import os
from dataclasses import replace

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from utils import chat, memory
from utils.packed_rows import why_not_shared

# Bytes for CUDA itself and for what torch reserves without using it: up to 3 GB in results/gpu,
# where a step took 42 GB, and less than 1 GB where it took 15.
RESERVE = 1.5e9
SHORT = 1.1  # on an H100 a step took up to 1.09 times its estimate
MOST_ANSWERS = 64
# So few pairs must fit without checkpointing. Each micro-batch unpacks the 4-bit weights and starts
# all kernels anew: on an H100 one pair at a time made 2.8 pairs a second, four made 10.
FEWEST_PAIRS = 4
LOOKED_AT = 8  # rows, to find the longest


def processes():
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))  # `accelerate launch` sets it


def free_on_gpu():
    """Return the bytes that are free on this process's GPU, None without one.

    With several processes it is the least of all, so that they plan alike.
    """
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if processes() > 1:
        PartialState()
        free = min(gather_object([free]))
    return free


def image_workers():
    """Return how many processes prepare the batches of images.

    A GPU would wait for them, so with one it is this process's share of the CPU cores, at most
    four. On a CPU they would only take the cores from the training.
    """
    if not torch.cuda.is_available():
        return 0
    return min(4, max(1, (os.cpu_count() or 1) // processes()))


def longest_text(rows, processor):
    """Return the tokens of the longest of formatted `rows`, without those of one image."""
    most = 1
    for number in chat.longest_first(chat.stored_texts(rows))[:LOOKED_AT]:
        row = rows[number]
        batch = chat.training_batch([row], processor)
        length = int(batch["attention_mask"].sum(1).max())
        image_tokens = int((batch["input_ids"][0] == chat.image_token_id(processor)).sum())
        most = max(most, length - image_tokens // max(1, len(row["images"])))
    return most


def sharded():
    """Return what spreads the model over several GPUs, None if every GPU holds all of it."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true":
            return name
    return None


def step_bytes(settings, text_tokens):
    """Return what to allow for a step of the profile's trainer and its model.

    `text_tokens`: question, answer and template of the longest row.
    """
    config = memory.architecture(settings.model).config
    packed = settings.shared_prefix and why_not_shared(config) is None
    estimate = memory.estimate(settings, text_tokens, packed=packed)
    return SHORT * sum(estimate.values()) + RESERVE


def candidates(settings):
    """Return the settings to choose from, the best first.

    Without checkpointing a pair takes three quarters of the computation, so that comes first, if
    not too few pairs fit at a time. Then comes the size of the micro-batch. 16 bits are no faster,
    but they are the model as it was published.
    """
    pairs = settings.batch_size * settings.gradient_accumulation
    sizes = [settings.batch_size]
    if "batch_size" in settings.planned:
        # Every process computes one micro-batch at a time.
        sizes = [size for size in range(pairs, 0, -1) if pairs % (size * processes()) == 0]
    checkpointing = [settings.gradient_checkpointing]
    if "gradient_checkpointing" in settings.planned:
        checkpointing = [False, True]
    four_bit = [settings.four_bit]
    if "four_bit" in settings.planned:
        four_bit = [False, True]

    choices = []
    for again, size, quantized in itertools.product(checkpointing, sizes, four_bit):
        if not again and len(checkpointing) > 1 and size < min(FEWEST_PAIRS, sizes[0]):
            continue
        choice = replace(
            settings,
            gradient_checkpointing=again,
            batch_size=size,
            gradient_accumulation=pairs // size,
            four_bit=quantized,
        )
        choices.append(choice)
    return choices


def for_training(settings, text_tokens, free=None):
    """Return (settings that fit into the free memory, what was chosen and why).

    Call it before the model is loaded. `text_tokens`: see `step_bytes`. `free`: bytes, by default
    what `free_on_gpu` says. Where nothing fits, the least demanding choice is returned; preflight
    then says by how much it does not fit.
    """
    pairs = settings.batch_size * settings.gradient_accumulation
    unchanged = f"{settings.batch_size} of the step's {pairs} pairs at a time, as the profile says"
    if not settings.planned:
        return settings, f"{unchanged}; it leaves nothing to plan"
    if free is None:
        free = free_on_gpu()
    if free is None:
        return settings, f"{unchanged}; without a GPU nothing is planned"
    if sharded():
        return settings, f"{unchanged}; how much {sharded()} leaves free is not estimated"
    try:
        memory.architecture(settings.model)
    except ValueError as error:
        return settings, f"{unchanged}; {error}"

    chosen = None
    for choice in candidates(settings):
        chosen = choice
        needed = step_bytes(choice, text_tokens)
        if needed <= free:
            break
    verdict = "allow" if needed <= free else "too little: allow"
    return chosen, (
        f"{chosen.batch_size} of the step's {pairs} pairs at a time, "
        f"{'with' if chosen.gradient_checkpointing else 'without'} checkpointing, "
        f"in {4 if chosen.four_bit else 16} bits, {image_workers()} workers for images: "
        f"{verdict} {memory.readable(needed)}, {memory.readable(free)} are free"
    )


def for_answering(settings, text_tokens=256, free=None):
    """Return (settings with as many answers at once as fit, what was chosen and why).

    Call it when the model is loaded. `text_tokens`: of the question and its template. `free`: see
    `for_training`.
    """
    unchanged = f"{settings.generation_batch_size} answers at a time, as the profile says"
    if "generation_batch_size" not in settings.planned:
        return settings, f"{unchanged}; it leaves nothing to plan"
    if free is None:
        free = free_on_gpu()
    if free is None:
        return settings, f"{unchanged}; without a GPU nothing is planned"
    try:
        each = memory.answer_bytes(settings, text_tokens)
    except ValueError as error:
        return settings, f"{unchanged}; {error}"
    size = MOST_ANSWERS
    while size > 1 and SHORT * size * each + RESERVE > free:
        size //= 2
    chosen = replace(settings, generation_batch_size=size)
    return chosen, (
        f"{size} answers at a time: allow {memory.readable(SHORT * size * each + RESERVE)}, "
        f"{memory.readable(free)} are free"
    )
