"""TRL's `DPOTrainer` against ours on a GPU, with the profiles' true shapes: python -m benchmarks.gpu [--profiles smolvlm qwen idefics2]

Needs no download: the architectures stand in configs/, weights are random (written in shards to a temporary folder, so that
`models.load_model` loads and quantises them as it does real ones), batches are synthetic, as a 640×480 photograph and answers
of 60 to 150 tokens give them. Either trainer runs `train()`, optimizer step included, at growing batch sizes until memory ends.
A batch fits a limit when all memory that torch took from the GPU stays below it (the CUDA context, about 0.5 GB, comes on top).
Prints a table and one line of JSON; writes results/gpu/<gpu name>-<profile>.json.
"""

import argparse
import gc
import json
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

from benchmarks.train_step import FLOPS, PROMPT, Shape, batches, lengths, make_trainer
from utils import memory, models, training, versions
from utils.settings import PROFILES, ROOT
from utils.shared_prefix import SharedPrefixDPOTrainer

PICTURES = {  # what the profile's processor makes of 640×480 pixels
    "smolvlm": Shape({}, pixels=(5, 3, 384, 384), tokens=5 * 81),
    "qwen": Shape({}, pixels=(34 * 46, 3 * 2 * 14 * 14), tokens=17 * 23, grid=(1, 34, 46)),
    "idefics2": Shape({}, pixels=(1, 3, 480, 640), tokens=64),
}
KINDS = {"stock": DPOTrainer, "ours": SharedPrefixDPOTrainer}
LIMITS = (15, 24, 80)  # GB, 10⁹ bytes
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # pairs in a batch
TIMED = 3  # steps at each size, after one that warms up and counts FLOPs
SHARD = 2e9  # bytes
NO_GPU = "no GPU here: this benchmark compares training steps on one; on a CPU run python -m benchmarks.train_step"


def save_random(model, folder, dtype):
    """Write a checkpoint of `model` (its parameters may be without memory) with random weights of `dtype` to `folder`."""
    device, shard, size, files = "cuda" if torch.cuda.is_available() else "cpu", {}, 0, {}
    torch.manual_seed(0)

    def write():
        name = f"model-{len(set(files.values())):05}.safetensors"
        save_file(shard, Path(folder) / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    total = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            value = torch.randn(parameter.shape, dtype=dtype, device=device) * 0.02
        else:
            value = torch.full(
                parameter.shape, float(name.endswith("weight")), dtype=dtype, device=device
            )
        shard[name] = value.cpu()
        size, total = size + value.nbytes, total + value.nbytes
        if size > SHARD:
            write()
            size = 0
    if shard:
        write()
    (Path(folder) / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": files})
    )
    model.config.save_pretrained(folder)


def random_model(settings):
    """The profile's model as `models.load_model` gives it, 4-bit matrices included, with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        save_random(memory.architecture(settings.model), folder, models.compute_dtype())
        return models.load_model(replace(settings, model=folder))


class Steps(TrainerCallback):
    """Feeds and watches one `train()`: for each size a step that warms up and counts, then `TIMED` steps; `rows` holds the results."""

    def __init__(self, config, shape, sizes):
        self.config, self.shape, self.sizes = config, shape, sizes
        self.rows, self.seconds, self.step, self.handed_out, self.batch = [], [], 0, 0, None
        self.counting, self.cuda = False, torch.cuda.is_available()

    def collate(self, kind, _examples):
        """The next step's batch; the examples are not looked at."""
        if self.handed_out % (1 + TIMED) == 0:
            answers = lengths(self.sizes[self.handed_out // (1 + TIMED)])
            self.batch = batches(self.config, self.shape, answers)[kind == "ours"]
        self.handed_out += 1
        return dict(self.batch)

    def on_step_begin(self, _args, _state, _control, **_):
        warms_up = self.step % (1 + TIMED) == 0
        if self.cuda:
            torch.cuda.synchronize()
        if warms_up:
            self.seconds = []
            if self.cuda:
                torch.cuda.empty_cache()
            self.counter, self.counting = FlopCounterMode(display=False, custom_mapping=FLOPS), True
            self.counter.__enter__()
        elif self.cuda and not self.seconds:
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def on_step_end(self, _args, _state, control, **_):
        if self.cuda:
            torch.cuda.synchronize()
        if self.step % (1 + TIMED) == 0:
            self.stop_counting()
        else:
            self.seconds.append(time.perf_counter() - self.start)
        self.step += 1
        if len(self.seconds) == TIMED:
            size = self.sizes[self.step // (1 + TIMED) - 1]
            self.rows.append(self.row(size, sorted(self.seconds)[TIMED // 2]))
            control.should_training_stop = self.rows[-1]["reserved_gb"] > max(LIMITS)
        return control

    def stop_counting(self):
        if self.counting:
            self.counter.__exit__(None, None, None)
        self.counting = False

    def row(self, size, seconds):
        tokens = sum(
            2 * (self.shape.tokens + PROMPT) + sum(pair) for pair in lengths(size)
        )  # of the stock trainer's rows, without padding
        return {
            "batch_size": size,
            "row_tokens": self.shape.tokens
            + PROMPT
            + max(map(max, lengths(size))),  # of the longest row
            "seconds": seconds,
            "pairs_per_second": size / seconds,
            "tokens_per_second": tokens / seconds,
            "tflop_per_second": self.counter.get_total_flops() / 1e12 / seconds,
            "allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if self.cuda else 0.0,
        }


def sweep(kind, model, settings, shape, output, sizes=SIZES, **changes):
    """One row of figures for each of `sizes`, smallest first, that trained; ends without error where the GPU's memory does."""
    once = {
        "max_steps": len(sizes) * (1 + TIMED),
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 1,
    }
    quiet = {"save_strategy": "no", "logging_strategy": "no", "dataloader_num_workers": 0}
    trainer = make_trainer(KINDS[kind], model, settings, output, **once | quiet | changes)
    steps = Steps(model.config, shape, sizes)
    trainer.train_dataset = list(range(once["max_steps"]))
    trainer.data_collator = lambda examples: steps.collate(kind, examples)
    trainer.add_callback(steps)
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        print(f"{kind}: memory ends at {sizes[len(steps.rows)]} pairs", file=sys.stderr)
    finally:
        steps.stop_counting()
    return steps.rows


def largest(rows, limit):
    """The fastest that fits: the row of the largest batch within `limit` GB, None when not even one pair fits."""
    return max(
        (row for row in rows if row["reserved_gb"] <= limit),
        key=lambda row: row["batch_size"],
        default=None,
    )


def summary(rows):
    """{"equal_batch": {size: speed and memory ratio}, "limits": {GB: both trainers at their largest batch, and their ratio}}."""
    stock, ours = ({row["batch_size"]: row for row in rows[kind]} for kind in ("stock", "ours"))
    equal = {
        size: {
            "speed_ratio": ours[size]["pairs_per_second"] / stock[size]["pairs_per_second"],
            "memory_ratio": ours[size]["allocated_gb"] / stock[size]["allocated_gb"]
            if stock[size]["allocated_gb"]
            else None,
        }
        for size in stock.keys() & ours.keys()
    }
    limits = {}
    for limit in LIMITS:
        best = {kind: largest(rows[kind], limit) for kind in ("stock", "ours")}
        speed = (
            best["ours"]["pairs_per_second"] / best["stock"]["pairs_per_second"]
            if all(best.values())
            else None
        )
        limits[limit] = best | {"speed_ratio": speed}
    return {"equal_batch": dict(sorted(equal.items())), "limits": limits}


def matrix_rate(size=8192, repeats=20):
    """FLOPs a second of a large matrix product in the profile's precision: what this chip can do, against which shares are given."""
    a = torch.randn(size, size, device="cuda", dtype=models.compute_dtype())
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        a @ a
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def report(gpu, profile, rate, rows, folder):
    """Write and print what was measured; returns its `summary`. `rate`: what `matrix_rate` gave."""
    for row in rows["stock"] + rows["ours"]:
        row["share_of_rate"] = row["tflop_per_second"] * 1e12 / rate
    about = {
        "gpu": gpu,
        "profile": profile,
        "matrix_tflop_per_second": rate / 1e12,
        "versions": versions(*training.LIBRARIES),
    }
    ratios = summary(rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{gpu.replace(' ', '-').replace('/', '-')}-{profile}.json").write_text(
        json.dumps(about | rows | ratios, indent=1) + "\n"
    )
    print(f"\n{profile} on {gpu}, a large matrix product runs at {rate / 1e12:.0f} TFLOP/s")
    print(
        f"{'':10}{'pairs':>6}{'s/step':>9}{'pairs/s':>9}{'tokens/s':>10}{'GB':>7}{'taken':>7}{'of rate':>9}"
    )
    for kind in KINDS:
        for row in rows[kind]:
            print(
                f"{kind:10}{row['batch_size']:6}{row['seconds']:9.3f}{row['pairs_per_second']:9.2f}{row['tokens_per_second']:10.0f}"
                f"{row['allocated_gb']:7.1f}{row['reserved_gb']:7.1f}{row['share_of_rate']:9.0%}"
            )
    for limit, best in ratios["limits"].items():
        sizes = ", ".join(
            f"{kind} {best[kind]['batch_size'] if best[kind] else 'no'} pairs" for kind in KINDS
        )
        print(
            f"in {limit} GB: {sizes}"
            + (f", {best['speed_ratio']:.2f} times as fast" if best["speed_ratio"] else ""),
            flush=True,
        )
    return ratios


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--profiles", nargs="+", choices=PICTURES, default=list(PICTURES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(NO_GPU)
    logging.set_verbosity_error()
    gpu, rate, results = torch.cuda.get_device_name(), matrix_rate(), {}
    for profile in options.profiles:
        settings, rows = PROFILES[profile], {}
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as output:
                rows[kind] = sweep(
                    kind, random_model(settings), settings, PICTURES[profile], output
                )
            gc.collect()
            torch.cuda.empty_cache()
        results[profile] = report(gpu, profile, rate, rows, ROOT / "results" / "gpu")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
