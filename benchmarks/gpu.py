"""Measure training and generation on a GPU, in the profiles' shapes: python -m benchmarks.gpu

Downloads nothing. The architectures come from configs/ and the weights are random, written in
shards to a temporary folder, so that `models.load_model` loads and quantizes them as it does real
ones. Batches are synthetic: what a 640×480 photograph and answers of 60 to 150 tokens make.

  stock        TRL's DPOTrainer as it comes
  fixed_tower  the same with the vision tower under no_grad, as a knowing user would write
  ours         utils/shared_prefix.py

Each runs `train()`, with the optimizer, in 4 and in 16 bits, with and without checkpointing, at
growing micro-batches up to the pairs of the profiles' optimizer step. A configuration fits a limit
if all memory that torch reserved stays below it. The CUDA context takes about 0.5 GB more. The
base answers in batches as well. `--processors FOLDER` names a folder that holds the files of each
profile's processor in a folder of the profile's name: then our trainer also runs end to end, with
photographs that are read, decoded and processed.

Prints a table and writes results/gpu/<gpu name>-<profile>.json after every part.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.utils import logging
from trl import DPOTrainer

from benchmarks.format_dataset import write_pairs
from benchmarks.train_step import (
    PROMPT,
    QWEN_PATCH,
    Shape,
    benchmark_trainer,
    draw_lengths,
    fixed_tower,
    synthetic_batches,
)
from utils import chat, layouts, memory, models, plan, training, versions
from utils.settings import PROFILES, ROOT
from utils.shared_prefix import SharedPrefixDPOTrainer

PROFILE_SHAPES = {  # what the profile's processor makes of an image of 640×480 pixels
    "smolvlm": Shape({}, pixels=(5, 3, 384, 384), tokens=5 * 81),
    "qwen": Shape({}, pixels=(34 * 46, QWEN_PATCH), tokens=17 * 23, grid=(1, 34, 46)),
    "idefics2": Shape({}, pixels=(1, 3, 480, 640), tokens=64),
}
KINDS = {  # kind → (trainer, what is different while it runs)
    "stock": (DPOTrainer, nullcontext),
    "fixed_tower": (DPOTrainer, fixed_tower),
    "ours": (SharedPrefixDPOTrainer, nullcontext),
}
LIMITS = (15, 24, 80)  # GB, 10⁹ bytes
SIZES = (1, 4, 16)  # pairs in a micro-batch; the profiles' optimizer step has 16
TIMED = 2  # steps at each size, after one that warms up
ANSWERING = (1, 4, 16, 64)  # answers generated together
NEW_TOKENS = 32  # in each of them
END_TO_END = 3  # optimizer steps, the first of which warms up
SHARD = 2e9  # bytes
NO_GPU = "no GPU here: to compare training steps on a CPU, run python -m benchmarks.train_step"


def save_random(model, folder, dtype):
    """Write a checkpoint of `model` with random weights of `dtype` to `folder`, in shards.

    The parameters of `model` may be on the meta device.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shard = {}
    shard_size = 0
    total_size = 0
    shards = 0
    weight_map = {}

    def write_shard():
        name = f"model-{shards:05}.safetensors"
        save_file(shard, Path(folder) / name, metadata={"format": "pt"})
        for parameter_name in shard:
            weight_map[parameter_name] = name
        shard.clear()

    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            value = torch.randn(parameter.shape, dtype=dtype, device=device) * 0.02
        else:
            # The weights of norms are 1, biases are 0.
            constant = 1.0 if name.endswith("weight") else 0.0
            value = torch.full(parameter.shape, constant, dtype=dtype, device=device)
        shard[name] = value.cpu()
        shard_size += value.nbytes
        total_size += value.nbytes
        if shard_size > SHARD:
            write_shard()
            shards += 1
            shard_size = 0
    if shard:
        write_shard()
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.save_pretrained(folder)


def synchronize():
    """Wait until the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget_peak():
    """Give unused memory back and start a new peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb():
    """Return {"allocated_gb", "reserved_gb"}: the peaks since `forget_peak`."""
    on_gpu = torch.cuda.is_available()
    return {
        "allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if on_gpu else 0,
    }


class Steps(TrainerCallback):
    """Feed and measure one `train()`; `rows` holds the results, one for each size in `sizes`.

    Each size gets one step that warms up, then `TIMED` steps. Sizes that would
    end more than `seconds` after the start are left out.
    """

    def __init__(self, config, shape, sizes, seconds=60):
        self.config = config
        self.shape = shape
        self.sizes = sizes
        self.deadline = time.perf_counter() + seconds
        self.rows = []
        self.seconds = []
        self.losses = []
        self.step = 0
        self.collated = 0
        self.batch = None

    def collate(self, kind):
        """Return the next step's batch for a trainer of `kind`."""
        if self.collated % (1 + TIMED) == 0:
            answers = draw_lengths(self.sizes[self.collated // (1 + TIMED)])
            twice, once = synthetic_batches(self.config, self.shape, answers)
            self.batch = once if kind == "ours" else twice
        self.collated += 1
        return dict(self.batch)

    def keep_losses(self, compute_loss):
        """Return `compute_loss` as it is, but for keeping each loss."""

        def kept(*arguments, **options):
            loss = compute_loss(*arguments, **options)
            self.losses.append(loss.detach())
            return loss

        return kept

    def on_step_begin(self, _args, _state, _control, **_):
        """Start the clock."""
        synchronize()
        if self.step % (1 + TIMED) == 0:
            self.seconds = []
            forget_peak()
        self.start = time.perf_counter()

    def on_step_end(self, _args, _state, control, **_):
        """Stop the clock. After the last step of a size, add its row."""
        synchronize()
        if self.step % (1 + TIMED) > 0:
            self.seconds.append(time.perf_counter() - self.start)
        self.step += 1
        if len(self.seconds) == TIMED:
            size = self.sizes[self.step // (1 + TIMED) - 1]
            seconds = statistics.median(self.seconds)
            self.rows.append(self.row(size, seconds))
            expected = (1 + TIMED) * 4 * seconds  # four times as many pairs
            control.should_training_stop = time.perf_counter() + expected > self.deadline
        return control

    def row(self, size, seconds):
        """Return the figures of a batch of `size` pairs whose step took `seconds`."""
        prompt = self.shape.tokens + PROMPT
        answers = draw_lengths(size)
        # Tokens are those of the stock trainer's rows, without padding.
        tokens = sum(2 * prompt + chosen + rejected for chosen, rejected in answers)
        return {
            "batch_size": size,
            "row_tokens": prompt + max(max(pair) for pair in answers),  # of the longest row
            "seconds": seconds,
            "pairs_per_second": size / seconds,
            "tokens_per_second": tokens / seconds,
            "loss": self.losses[-1].item() if self.losses else None,
            **peak_gb(),
        }


def sweep(settings, kind, model, shape, output, sizes, seconds=60, **changes):
    """Train a trainer of `kind` at each of `sizes`, smallest first, and return a row for each.

    `model` has no adapter, before and after. Ends without an error where the GPU's memory does,
    and before it takes longer than `seconds`. `changes` are arguments of `DPOConfig`.
    """
    max_steps = len(sizes) * (1 + TIMED)
    trainer_class, changed = KINDS[kind]
    arguments = {
        "max_steps": max_steps,
        "learning_rate": 0.0,  # every step computes the same loss, for all trainers to agree on
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_num_workers": 0,
        **changes,
    }
    trainer = benchmark_trainer(settings, trainer_class, model, output, **arguments)
    steps = Steps(model.config, shape, sizes, seconds)
    trainer.train_dataset = list(range(max_steps))  # the collator does not look at its rows
    trainer.data_collator = lambda rows: steps.collate(kind)
    trainer.compute_loss = steps.keep_losses(trainer.compute_loss)
    trainer.add_callback(steps)
    try:
        with changed(trainer):
            trainer.train()
    except torch.OutOfMemoryError:
        print(f"{kind}: out of memory at {sizes[len(steps.rows)]} pairs", file=sys.stderr)
    finally:
        trainer.model.unload()
    configuration = {
        "kind": kind,
        "four_bit": settings.four_bit,
        "checkpointing": settings.gradient_checkpointing,
    }
    return [configuration | row for row in steps.rows]


def answering_rows(model, shape, sizes=ANSWERING, new_tokens=NEW_TOKENS):
    """Let `model` answer batches of each of `sizes`, smallest first, and return a row for each.

    Every answer has `new_tokens` tokens. Ends without an error where the GPU's memory does.
    """
    rows = []
    for size in (sizes[0], *sizes):  # the first one warms up
        _, batch = synthetic_batches(model.config, shape, [(1, 1)] * size, model.device)
        inputs = {}
        for name, value in batch.items():
            if name == "completion_mask":
                continue
            # The first rows are the chosen ones; the last token is the answer's.
            is_text = value.shape[:1] == (2 * size,) and value.dim() == 2
            inputs[name] = value[:size, :-1] if is_text else value
        forget_peak()
        start = time.perf_counter()
        try:
            with models.answering(model):
                model.generate(
                    **inputs,
                    do_sample=False,
                    min_new_tokens=new_tokens,
                    max_new_tokens=new_tokens,
                )
        except torch.OutOfMemoryError:
            print(f"out of memory at {size} answers", file=sys.stderr)
            break
        synchronize()
        seconds = time.perf_counter() - start
        row = {
            "batch_size": size,
            "seconds": seconds,
            "tokens_per_second": size * new_tokens / seconds,
            **peak_gb(),
        }
        rows.append(row)
    return rows[1:]


class StepEnds(TrainerCallback):
    """Note when each optimizer step ends."""

    def __init__(self):
        self.times = []

    def on_step_end(self, _args, _state, _control, **_):
        synchronize()
        self.times.append(time.perf_counter())


def end_to_end(settings, model, processor, output, workers):
    """Return the pairs per second of our trainer with photographs, and without reading them.

    {"workers", "pairs_per_second", "computing_only": the same batches, made beforehand}
    """
    per_step = settings.batch_size * settings.gradient_accumulation
    path = Path(output) / "pairs.parquet"
    write_pairs(path, END_TO_END * per_step)
    pairs = Dataset.from_parquet(str(path), cache_dir=output)
    pairs = chat.format_dataset(layouts.as_rows(pairs), settings.pixel_budget)
    speeds = []
    for ahead in (False, True):
        trainer = training.make_trainer(
            settings,
            model,
            processor,
            pairs,
            output,
            shared_prefix=True,
            max_steps=END_TO_END,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=0 if ahead else workers,
        )
        ends = StepEnds()
        trainer.add_callback(ends)
        if ahead:
            collate = trainer.data_collator
            batches = []
            for start in range(0, len(pairs), settings.batch_size):
                rows = pairs.select(range(start, start + settings.batch_size))
                batches.append(collate(list(rows)))
            made = iter(batches)
            trainer.data_collator = lambda rows, made=made: next(made)
            trainer.train_dataset = list(range(len(pairs)))
        trainer.train()
        trainer.model.unload()
        speeds.append((END_TO_END - 1) * per_step / (ends.times[-1] - ends.times[0]))
    return {"workers": workers, "pairs_per_second": speeds[0], "computing_only": speeds[1]}


def fastest_within(rows, limit):
    """Return the row of the fastest batch within `limit` GB, None when not even one pair fits."""
    fitting = [row for row in rows if row["reserved_gb"] <= limit]
    return max(fitting, key=lambda row: row["pairs_per_second"], default=None)


def fastest_of_each(rows):
    """Return {GB: {kind: the row of its fastest configuration}}."""
    limits = {}
    for limit in LIMITS:
        limits[limit] = {}
        for kind in KINDS:
            of_kind = [row for row in rows if row["kind"] == kind]
            limits[limit][kind] = fastest_within(of_kind, limit)
    return limits


def matrix_rate(size=8192, repeats=20):
    """Measure the FLOPs per second of a large matrix product in the profiles' precision.

    It stands for what the chip can do.
    """
    matrix = torch.randn(size, size, device="cuda", dtype=models.compute_dtype())
    for _ in range(3):
        matrix @ matrix
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        matrix @ matrix
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def write_record(record, folder):
    """Write what was measured so far to `folder`, with the fastest within each limit."""
    folder.mkdir(parents=True, exist_ok=True)
    record["limits"] = fastest_of_each(record["training"])
    name = f"{record['gpu'].replace(' ', '-').replace('/', '-')}-{record['profile']}.json"
    (folder / name).write_text(json.dumps(record, indent=1) + "\n")


def configuration_of(row):
    """Return the configuration of a row in words."""
    bits = 4 if row["four_bit"] else 16
    checkpointing = "checkpointing" if row["checkpointing"] else "no checkpointing"
    return f"{bits} bits, {checkpointing}"


def print_training(rows):
    """Print the rows of `sweep`."""
    for row in rows:
        print(
            f"{row['kind']:12}{configuration_of(row):26}{row['batch_size']:3} pairs"
            f"{row['seconds']:8.3f} s{row['pairs_per_second']:8.2f} pairs/s"
            f"{row['allocated_gb']:7.1f} GB{row['reserved_gb']:7.1f} GB taken"
            f"  loss {row['loss'] or 0:.4f}"
        )


def print_limits(limits):
    """Print what `fastest_of_each` returned."""
    for limit, best in limits.items():
        for kind, row in best.items():
            if row is None:
                print(f"in {limit} GB {kind}: not even one pair")
                continue
            line = f"in {limit} GB {kind}: {row['batch_size']} pairs, {configuration_of(row)}"
            print(f"{line}, {row['pairs_per_second']:.2f} pairs/s", flush=True)


def measure_profile(profile, gpu, rate, options):
    """Measure one profile and write its record after every part."""
    settings = PROFILES[profile]
    shape = PROFILE_SHAPES[profile]
    record = {
        "gpu": gpu,
        "profile": profile,
        "matrix_tflop_per_second": rate / 1e12,
        "versions": versions(*training.LIBRARIES),
        "training": [],
        "answering": [],
        "end_to_end": [],
    }
    print(f"\n{profile} on {gpu}: a large matrix product runs at {rate / 1e12:.0f} TFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        save_random(memory.architecture(settings.model), folder, models.compute_dtype())
        for four_bit in (True, False):
            chosen = replace(settings, model=folder, four_bit=four_bit)
            model = models.load_model(chosen)
            if four_bit == settings.four_bit:
                record["answering"] = answering_rows(model, shape)
            # Checkpointing last, because what it switches on stays on.
            for checkpointing in (False, True):
                chosen = replace(chosen, gradient_checkpointing=checkpointing)
                for kind in KINDS:
                    with tempfile.TemporaryDirectory() as output:
                        rows = sweep(chosen, kind, model, shape, output, SIZES, options.seconds)
                    forget_peak()
                    record["training"] += rows
                    write_record(record, options.output)
                    print_training(rows)
            if four_bit == settings.four_bit and options.processors:
                files = str(options.processors / profile)
                processor = models.load_processor(replace(settings, model=files))
                for workers in (0, plan.image_workers()):
                    with tempfile.TemporaryDirectory() as output:
                        row = end_to_end(
                            replace(settings, model=folder), model, processor, output, workers
                        )
                    record["end_to_end"].append(row)
                    print(row, flush=True)
            del model
            forget_peak()
    write_record(record, options.output)
    for row in record["answering"]:
        print(row)
    print_limits(record["limits"])


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--profiles", nargs="+", choices=PROFILE_SHAPES, default=list(PROFILE_SHAPES)
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "gpu")
    parser.add_argument("--processors", type=Path, help="folder with a folder for each profile")
    parser.add_argument("--seconds", type=float, default=60, help="at most, for each sweep")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(NO_GPU)
    logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or each worker would warn
    gpu = torch.cuda.get_device_name()
    rate = matrix_rate()
    for profile in options.profiles:
        measure_profile(profile, gpu, rate, options)


if __name__ == "__main__":
    main()
