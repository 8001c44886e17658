"""Format preference pairs as chats: the article's recipe against ours: python -m benchmarks.format_dataset [--rows 1000]

Both read the same generated JPEGs (640×480) from one Parquet file, each in a process of its own so that peak memory can be
told apart. Prints a table and one line of JSON.
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

from utils import chat, models
from utils.settings import PROFILES

DIFFERENT_PICTURES = (
    100  # drawn once each and repeated: drawing 33,000 would take longer than what is measured
)
COMPARED = 50  # rows whose pixels are compared


def picture(number):
    """A JPEG, 640×480, as hard to compress as a photograph: smooth shapes with some noise."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, size=(12, 16, 3), dtype=np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    noisy = np.clip(
        np.asarray(coarse, dtype=np.int16) + random.normal(0, 6, size=(480, 640, 1)), 0, 255
    ).astype(np.uint8)
    stored = io.BytesIO()
    Image.fromarray(noisy).save(stored, "JPEG", quality=90)
    return stored.getvalue()


def write_parquet(path, rows):
    """`rows` preference pairs in RLAIF-V's columns at `path`; returns how many bytes their images have."""
    pictures = [picture(number) for number in range(min(rows, DIFFERENT_PICTURES))]

    def generate():
        for number in range(rows):
            words = f"object {number} on a table beside a window "
            answers = {
                "question": f"What is in picture {number}?",
                "chosen": words * 12,
                "rejected": words * 14,
            }
            yield {
                "image": {"bytes": pictures[number % len(pictures)], "path": f"{number}.jpg"}
            } | answers

    text = datasets.Value("string")
    features = datasets.Features(
        {"image": datasets.Image(), "question": text, "chosen": text, "rejected": text}
    )
    with tempfile.TemporaryDirectory() as cache:
        datasets.Dataset.from_generator(generate, features=features, cache_dir=cache).to_parquet(
            path, batch_size=100
        )
    return sum(len(pictures[number % len(pictures)]) for number in range(rows))


def article(dataset, processor):
    """As the article does it: decode every image, let `map` write it again, then cast."""

    def format(example):
        prompt = processor.apply_chat_template(
            chat.prompt_messages(example["question"]), tokenize=False
        )
        answers = {
            name: processor.apply_chat_template(chat.answer_messages(example[name]), tokenize=False)
            for name in ("chosen", "rejected")
        }
        return {"images": [example["image"]], "prompt": prompt} | answers

    dataset = dataset.map(format, writer_batch_size=10, remove_columns=dataset.column_names)
    features = dataset.features
    features["images"] = datasets.List(datasets.Image(decode=True))
    return dataset.cast(features)


def ours(dataset, processor):
    return chat.format_dataset(dataset)


def written(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*.arrow"))


def measure(name, parquet, rows):
    """{"rows_per_second", "bytes_written", "peak_memory" (bytes above what was there), "pixels"} of one recipe, in this process."""
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        dataset = datasets.load_dataset(
            "parquet", data_files=parquet, split="train", cache_dir=cache
        )
        processor, before, memory = (
            models.load_processor(PROFILES["embedded"]),
            written(cache),
            peak(),
        )
        start = time.perf_counter()
        formatted = {"article": article, "ours": ours}[name](dataset, processor)
        formatted.select_columns(["prompt", "chosen", "rejected"])[
            :
        ]  # ours makes the messages here, when a row is read
        seconds, memory = time.perf_counter() - start, peak() - memory
        numbers = range(0, rows, max(1, rows // COMPARED))
        images = [formatted[number]["image" if name == "ours" else "images"] for number in numbers]
        pixels = [
            np.asarray(image if name == "ours" else image[0], dtype=np.int16) for image in images
        ]
        return {
            "rows_per_second": rows / seconds,
            "bytes_written": written(cache) - before,
            "peak_memory": memory,
            "pixels": pixels,
        }


def peak():
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def alone(*arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.format_dataset", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, default=1000)
    rows = parser.parse_args().rows
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        parquet = str(Path(folder) / "pairs.parquet")
        image_bytes = write_parquet(parquet, rows)
        truth = [
            np.asarray(Image.open(io.BytesIO(picture(n % DIFFERENT_PICTURES))), np.int16)
            for n in range(0, rows, max(1, rows // COMPARED))
        ]
        results = {name: alone(name, parquet, rows) for name in ("article", "ours")}
    print(f"{rows} rows, {image_bytes / 1e6:.1f} MB of JPEGs")
    print(
        f"{'':8} {'rows/s':>9} {'written MB':>11} {'peak memory +MB':>16} {'pixel difference':>17}"
    )
    for name, result in results.items():
        result["difference"] = max(
            int(np.abs(a - b).max()) for a, b in zip(result.pop("pixels"), truth, strict=True)
        )
        sizes = f"{result['bytes_written'] / 1e6:11.1f} {result['peak_memory'] / 1e6:16.1f}"
        print(f"{name:8} {result['rows_per_second']:9.0f} {sizes} {result['difference']:17}")
    summary = {
        "rows": rows,
        "rows_per_second_ratio": results["ours"]["rows_per_second"]
        / results["article"]["rows_per_second"],
        "bytes_written_share": results["ours"]["bytes_written"] / image_bytes,
        "largest_pixel_difference": results["ours"]["difference"],
        "peak_memory_mb": {name: result["peak_memory"] / 1e6 for name, result in results.items()},
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
