"""Compare TRL's `DPOTrainer` with ours on a GPU, in the profiles' shapes: python -m benchmarks.gpu

Downloads nothing. The architectures come from configs/ and the weights are random, written in
shards to a temporary folder, so that `models.load_model` loads and quantizes them as it does real
ones. Batches are synthetic: what a 640×480 photograph and answers of 60 to 150 tokens make.

Each trainer runs `train()`, with the optimizer, at growing batch sizes until the GPU's memory is
used up. A batch fits a limit if all memory that torch reserved stays below it. The CUDA context
takes about 0.5 GB more. Prints a table and one line of JSON, and writes
results/gpu/<gpu name>-<profile>.json.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback
from transformers.utils import logging
from trl import DPOTrainer

from benchmarks.train_step import (
    FLOPS,
    PROMPT,
    QWEN_PATCH,
    Shape,
    benchmark_trainer,
    draw_lengths,
    synthetic_batches,
)
from utils import memory, models, training, versions
from utils.settings import PROFILES, ROOT
from utils.shared_prefix import SharedPrefixDPOTrainer

PROFILE_SHAPES = {  # what the profile's processor makes of an image of 640×480 pixels
    "smolvlm": Shape({}, pixels=(5, 3, 384, 384), tokens=5 * 81),
    "qwen": Shape({}, pixels=(34 * 46, QWEN_PATCH), tokens=17 * 23, grid=(1, 34, 46)),
    "idefics2": Shape({}, pixels=(1, 3, 480, 640), tokens=64),
}
TRAINERS = {"stock": DPOTrainer, "ours": SharedPrefixDPOTrainer}
LIMITS = (15, 24, 80)  # GB, 10⁹ bytes
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # pairs in a batch
TIMED = 3  # steps at each size, after one that warms up and counts FLOPs
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


def random_model(settings):
    """Return the profile's model with random weights, loaded by `models.load_model`."""
    with tempfile.TemporaryDirectory() as folder:
        save_random(memory.architecture(settings.model), folder, models.compute_dtype())
        return models.load_model(replace(settings, model=folder))


class Steps(TrainerCallback):
    """Feed and measure one `train()`; `rows` holds the results, one for each batch size.

    Each size gets one step that warms up and counts FLOPs, then `TIMED` steps.
    """

    def __init__(self, config, shape, sizes):
        self.config = config
        self.shape = shape
        self.sizes = sizes
        self.rows = []
        self.seconds = []
        self.step = 0
        self.collated = 0
        self.batch = None
        self.counter = None
        self.counting = False
        self.cuda = torch.cuda.is_available()

    def collate(self, kind):
        """Return the next step's batch for a trainer of `kind`."""
        if self.collated % (1 + TIMED) == 0:
            answers = draw_lengths(self.sizes[self.collated // (1 + TIMED)])
            twice, once = synthetic_batches(self.config, self.shape, answers)
            self.batch = once if kind == "ours" else twice
        self.collated += 1
        return dict(self.batch)

    def on_step_begin(self, _args, _state, _control, **_):
        """Start the FLOP counter or the clock."""
        if self.cuda:
            torch.cuda.synchronize()
        if self.step % (1 + TIMED) == 0:
            self.seconds = []
            if self.cuda:
                torch.cuda.empty_cache()
            self.counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
            self.counter.__enter__()
            self.counting = True
        elif self.cuda and not self.seconds:
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def on_step_end(self, _args, _state, control, **_):
        """Stop them. After the last step of a size, add its row."""
        if self.cuda:
            torch.cuda.synchronize()
        if self.step % (1 + TIMED) == 0:
            self.stop_counting()
        else:
            self.seconds.append(time.perf_counter() - self.start)
        self.step += 1
        if len(self.seconds) == TIMED:
            size = self.sizes[self.step // (1 + TIMED) - 1]
            self.rows.append(self.row(size, statistics.median(self.seconds)))
            # What is above the largest limit is not reported, so larger batches need not run.
            control.should_training_stop = self.rows[-1]["reserved_gb"] > max(LIMITS)
        return control

    def stop_counting(self):
        """Take the FLOP counter off torch."""
        if self.counting:
            self.counter.__exit__(None, None, None)
        self.counting = False

    def row(self, size, seconds):
        """Return the figures of a batch of `size` pairs whose step took `seconds`."""
        prompt = self.shape.tokens + PROMPT
        answers = draw_lengths(size)
        # Tokens are those of the stock trainer's rows, without padding.
        tokens = sum(2 * prompt + chosen + rejected for chosen, rejected in answers)
        allocated = torch.cuda.max_memory_allocated() if self.cuda else 0
        reserved = torch.cuda.max_memory_reserved() if self.cuda else 0
        return {
            "batch_size": size,
            "row_tokens": prompt + max(max(pair) for pair in answers),  # of the longest row
            "seconds": seconds,
            "pairs_per_second": size / seconds,
            "tokens_per_second": tokens / seconds,
            "tflop_per_second": self.counter.get_total_flops() / 1e12 / seconds,
            "allocated_gb": allocated / 1e9,
            "reserved_gb": reserved / 1e9,
        }


def sweep(settings, kind, model, shape, output, sizes=SIZES, **changes):
    """Train a trainer of `kind` at each of `sizes`, smallest first, and return a row for each.

    Ends without an error where the GPU's memory does. `changes` are arguments of `DPOConfig`.
    """
    max_steps = len(sizes) * (1 + TIMED)
    arguments = {
        "max_steps": max_steps,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_num_workers": 0,
        **changes,
    }
    trainer = benchmark_trainer(settings, TRAINERS[kind], model, output, **arguments)
    steps = Steps(model.config, shape, sizes)
    trainer.train_dataset = list(range(max_steps))  # the collator does not look at its rows
    trainer.data_collator = lambda rows: steps.collate(kind)
    trainer.add_callback(steps)
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        print(f"{kind}: out of memory at {sizes[len(steps.rows)]} pairs", file=sys.stderr)
    finally:
        steps.stop_counting()
    return steps.rows


def fastest_within(rows, limit):
    """Return the row of the fastest batch within `limit` GB, None when not even one pair fits."""
    fitting = [row for row in rows if row["reserved_gb"] <= limit]
    return max(fitting, key=lambda row: row["pairs_per_second"], default=None)


def compare_trainers(rows):
    """Compare `rows`, {"stock": [...], "ours": [...]}.

    Returns {"equal_batch": {size: speed and memory ratio}, "limits": {GB: the row of each trainer's
    fastest batch, and their speed ratio}}.
    """
    stock_rows = {row["batch_size"]: row for row in rows["stock"]}
    ours_rows = {row["batch_size"]: row for row in rows["ours"]}
    equal = {}
    for size in sorted(stock_rows.keys() & ours_rows.keys()):
        stock = stock_rows[size]
        ours = ours_rows[size]
        memory_ratio = None
        if stock["allocated_gb"]:
            memory_ratio = ours["allocated_gb"] / stock["allocated_gb"]
        equal[size] = {
            "speed_ratio": ours["pairs_per_second"] / stock["pairs_per_second"],
            "memory_ratio": memory_ratio,
        }
    limits = {}
    for limit in LIMITS:
        stock = fastest_within(rows["stock"], limit)
        ours = fastest_within(rows["ours"], limit)
        speed_ratio = None
        if stock and ours:
            speed_ratio = ours["pairs_per_second"] / stock["pairs_per_second"]
        limits[limit] = {"stock": stock, "ours": ours, "speed_ratio": speed_ratio}
    return {"equal_batch": equal, "limits": limits}


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


def report(gpu, profile, rate, rows, folder):
    """Write and print what was measured, and return the comparison.

    `rate` is what `matrix_rate` returned.
    """
    for row in rows["stock"] + rows["ours"]:
        row["share_of_rate"] = row["tflop_per_second"] * 1e12 / rate
    comparison = compare_trainers(rows)
    record = {
        "gpu": gpu,
        "profile": profile,
        "matrix_tflop_per_second": rate / 1e12,
        "versions": versions(*training.LIBRARIES),
        **rows,
        **comparison,
    }
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{gpu.replace(' ', '-').replace('/', '-')}-{profile}.json"
    (folder / name).write_text(json.dumps(record, indent=1) + "\n")

    print(f"\n{profile} on {gpu}, a large matrix product runs at {rate / 1e12:.0f} TFLOP/s")
    print(f"{'':10} pairs   s/step  pairs/s  tokens/s     GB  taken  of rate")
    for kind in TRAINERS:
        for row in rows[kind]:
            print(
                f"{kind:10}{row['batch_size']:6}{row['seconds']:9.3f}"
                f"{row['pairs_per_second']:9.2f}{row['tokens_per_second']:10.0f}"
                f"{row['allocated_gb']:7.1f}{row['reserved_gb']:7.1f}{row['share_of_rate']:9.0%}"
            )
    for limit, best in comparison["limits"].items():
        sizes = []
        for kind in TRAINERS:
            size = best[kind]["batch_size"] if best[kind] else "no"
            sizes.append(f"{kind} {size} pairs")
        if best["speed_ratio"]:
            sizes.append(f"{best['speed_ratio']:.2f} times as fast")
        print(f"in {limit} GB: {', '.join(sizes)}", flush=True)
    return comparison


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--profiles", nargs="+", choices=PROFILE_SHAPES, default=list(PROFILE_SHAPES)
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(NO_GPU)
    logging.set_verbosity_error()
    gpu = torch.cuda.get_device_name()
    rate = matrix_rate()
    results = {}
    for profile in options.profiles:
        settings = PROFILES[profile]
        shape = PROFILE_SHAPES[profile]
        rows = {}
        for kind in TRAINERS:
            with tempfile.TemporaryDirectory() as output:
                rows[kind] = sweep(settings, kind, random_model(settings), shape, output)
            gc.collect()
            torch.cuda.empty_cache()
        results[profile] = report(gpu, profile, rate, rows, ROOT / "results" / "gpu")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
