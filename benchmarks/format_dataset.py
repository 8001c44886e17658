"""Compare three ways to format preference pairs as chats: python -m benchmarks.format_dataset

  article      the usual recipe: `map` over decoded images, which encodes and writes each again
  not_decoded  the same recipe after `cast_column(…, Image(decode=False))`, so that `map` copies
               the files as they are
  ours         `layouts.as_rows` and `chat.format_dataset`, which leave the images where they are

All read the same generated JPEGs (640×480) from one Parquet file, each in its own process, so that
their peak memory can be told apart. Then all rows are read once with their images, as in an epoch
of training. Prints a table and one line of JSON.
"""

import argparse
import io
import json
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from utils import chat, layouts, models
from utils.settings import PROFILES

RECIPES = ("article", "not_decoded", "ours")
DIFFERENT_JPEGS = 100  # drawn once and repeated, because drawing takes longer than formatting
COMPARED = 50  # rows whose pixels are compared


def jpeg(number):
    """Return a JPEG file (640×480) as hard to compress as a photograph: smooth, with some noise."""
    generator = np.random.default_rng(number)
    blocks = generator.integers(0, 256, size=(12, 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(blocks).resize((640, 480), Image.Resampling.BICUBIC)
    noise = generator.normal(0, 6, size=(480, 640, 1))
    pixels = np.clip(np.asarray(smooth, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "JPEG", quality=90)
    return stored.getvalue()


def write_pairs(path, rows):
    """Write `rows` pairs in RLAIF-V's columns to `path`. Return the bytes of all their images."""
    jpegs = [jpeg(number) for number in range(min(rows, DIFFERENT_JPEGS))]

    def generate():
        for number in range(rows):
            words = f"object {number} on a table beside a window "
            yield {
                "image": {"bytes": jpegs[number % len(jpegs)], "path": f"{number}.jpg"},
                "question": f"What is in image {number}?",
                "chosen": words * 12,
                "rejected": words * 14,
            }

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "chosen": datasets.Value("string"),
            "rejected": datasets.Value("string"),
        }
    )
    with tempfile.TemporaryDirectory() as cache:
        pairs = datasets.Dataset.from_generator(generate, features=features, cache_dir=cache)
        pairs.to_parquet(path, batch_size=100)
    return sum(len(jpegs[number % len(jpegs)]) for number in range(rows))


def format_as_article(dataset, processor):
    """Format `dataset` the usual way: let `map` write every image again, then cast."""

    def format_row(row):
        formatted = {"images": [row["image"]]}
        question = chat.prompt_messages(row["question"])
        formatted["prompt"] = processor.apply_chat_template(question, tokenize=False)
        for side in ("chosen", "rejected"):
            answer = chat.answer_messages(row[side])
            formatted[side] = processor.apply_chat_template(answer, tokenize=False)
        return formatted

    dataset = dataset.map(format_row, writer_batch_size=10, remove_columns=dataset.column_names)
    features = dataset.features
    features["images"] = datasets.List(datasets.Image(decode=True))
    return dataset.cast(features)


def arrow_bytes(folder):
    """Return how many bytes the Arrow files in `folder` hold."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*.arrow"))


def peak_memory():
    """Return the peak resident memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compared_rows(rows):
    """Return the numbers of the rows whose pixels are compared."""
    return range(0, rows, max(1, rows // COMPARED))


def measure(recipe, parquet, rows):
    """Measure one recipe in this process.

    Returns {"seconds", "epoch_seconds", "bytes_written", "peak_memory": bytes above what was used
    before, "pixels": arrays (height, width, 3) of the compared rows}.
    """
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        dataset = datasets.load_dataset(
            "parquet", data_files=parquet, split="train", cache_dir=cache
        )
        processor = models.load_processor(PROFILES["embedded"])
        bytes_before = arrow_bytes(cache)
        memory_before = peak_memory()
        start = time.perf_counter()
        if recipe == "ours":
            formatted = chat.format_dataset(layouts.as_rows(dataset))
        else:
            if recipe == "not_decoded":
                dataset = dataset.cast_column("image", datasets.Image(decode=False))
            formatted = format_as_article(dataset, processor)
        # Ours makes the messages only when a row is read, so every row is.
        formatted.select_columns(["prompt", "chosen", "rejected"])[:]
        seconds = time.perf_counter() - start
        memory = peak_memory() - memory_before
        start = time.perf_counter()
        for row in formatted:
            row["images"][0].load()
        epoch_seconds = time.perf_counter() - start
        pixels = []
        for number in compared_rows(rows):
            image = formatted[number]["images"][0]
            pixels.append(np.asarray(image, dtype=np.int16))
        return {
            "seconds": seconds,
            "epoch_seconds": epoch_seconds,
            "bytes_written": arrow_bytes(cache) - bytes_before,
            "peak_memory": memory,
            "pixels": pixels,
        }


def alone(*arguments):
    """Return `measure(*arguments)`, computed in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def largest_pixel_difference(images, others):
    """Return the largest difference between the pixels of two lists of images."""
    differences = []
    for image, other in zip(images, others, strict=True):
        differences.append(int(np.abs(image - other).max()))
    return max(differences)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.format_dataset", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, default=1000)
    rows = parser.parse_args().rows
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    truth = []
    for number in compared_rows(rows):
        image = Image.open(io.BytesIO(jpeg(number % DIFFERENT_JPEGS)))
        truth.append(np.asarray(image, np.int16))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        parquet = str(Path(folder) / "pairs.parquet")
        image_bytes = write_pairs(parquet, rows)
        for recipe in RECIPES:
            results[recipe] = alone(recipe, parquet, rows)

    print(f"{rows} rows, {image_bytes / 1e6:.1f} MB of JPEGs")
    print(f"{'':12} format s  epoch s  written MB  peak memory +MB  pixel difference")
    for recipe, result in results.items():
        result["difference"] = largest_pixel_difference(result.pop("pixels"), truth)
        print(
            f"{recipe:12}{result['seconds']:9.2f}{result['epoch_seconds']:9.2f}"
            f"{result['bytes_written'] / 1e6:12.1f}{result['peak_memory'] / 1e6:17.1f}"
            f"{result['difference']:18}"
        )
    ours = results["ours"]
    summary = {"rows": rows, "bytes_written_share": ours["bytes_written"] / image_bytes}
    for recipe in RECIPES[:-1]:
        other = results[recipe]
        whole = other["seconds"] + other["epoch_seconds"]
        summary[recipe] = {
            "format_ratio": other["seconds"] / ours["seconds"],
            "with_an_epoch_ratio": whole / (ours["seconds"] + ours["epoch_seconds"]),
        }
    print(json.dumps(summary | {"results": results}))


if __name__ == "__main__":
    main()
