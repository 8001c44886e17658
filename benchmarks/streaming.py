"""Memory while preference pairs are read, streamed in two ways or loaded: python -m benchmarks.streaming [--rows 1000 5000 20000]

Generated JPEGs (320×240) in RLAIF-V's columns, one Parquet file for each number of rows. Every row is formatted and its image
decoded, in a process of its own. A stream reads a file ahead of a slow reader, up to all of it; by row group (`reshard`), up to
a group. Prints a table and one line of JSON. About two minutes.
"""

import argparse
import io
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import datasets
import psutil
import pyarrow
import pyarrow.parquet
from PIL import Image

from benchmarks.format_dataset import picture
from utils import chat

WAYS = ("by row group", "by file", "in memory")
DIFFERENT_PICTURES, ROW_GROUP = 50, 100
FEATURES = datasets.Features(
    {"image": datasets.Image()}
    | dict.fromkeys(("question", "chosen", "rejected"), datasets.Value("string"))
)


def small_picture(number):
    stored = io.BytesIO()
    Image.open(io.BytesIO(picture(number))).resize((320, 240)).save(stored, "JPEG", quality=95)
    return stored.getvalue()


def write_parquet(path, rows):
    """`rows` pairs at `path`, in row groups as the hub's files have them: what is read at once is a group. Returns the file's bytes."""
    pictures = [small_picture(number) for number in range(min(rows, DIFFERENT_PICTURES))]
    with pyarrow.parquet.ParquetWriter(path, FEATURES.arrow_schema) as file:
        for start in range(0, rows, ROW_GROUP):
            numbers = range(start, min(start + ROW_GROUP, rows))
            images = [
                {
                    "bytes": pictures[number % len(pictures)] + b"%06d" % number,
                    "path": f"{number}.jpg",
                }
                for number in numbers
            ]
            texts = {
                name: [f"{name} {number} " * 40 for number in numbers]
                for name in ("question", "chosen", "rejected")
            }
            file.write_table(pyarrow.table({"image": images} | texts, schema=FEATURES.arrow_schema))
    return Path(path).stat().st_size


def open_pairs(way, parquet, cache):
    pairs = partial(
        datasets.load_dataset, "parquet", data_files=parquet, split="train", cache_dir=cache
    )
    if way == "in memory":
        return pairs(keep_in_memory=True)
    stream = pairs(streaming=True)
    return stream.reshard() if way == "by row group" else stream


def measure(way, parquet):
    """{"rows", "seconds", "memory": bytes at the fullest moment, above what was there before}, in this process."""
    datasets.disable_progress_bars()
    process, start = psutil.Process(), time.perf_counter()
    before = fullest = process.memory_info().rss
    with tempfile.TemporaryDirectory() as cache:
        for number, row in enumerate(chat.format_dataset(open_pairs(way, parquet, cache))):
            row["image"].load()
            if number % 20 == 0:
                fullest = max(fullest, process.memory_info().rss)
    return {"rows": number + 1, "seconds": time.perf_counter() - start, "memory": fullest - before}


def alone(*arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 5000, 20000])
    sizes, stored, results = parser.parse_args().rows, [], {way: [] for way in WAYS}
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{'':7} {'':10} {'memory, +MB':^38} {'rows a second':^38}")
    print(f"{'rows':>7} {'stored MB':>10}" + 2 * "".join(f"{way:>13}" for way in WAYS))
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            parquet = str(Path(folder) / "pairs.parquet")
            stored.append(write_parquet(parquet, rows) / 1e6)
            for way in WAYS:
                results[way].append(alone(way, parquet))
                assert results[way][-1]["rows"] == rows, f"{way} lost or repeated rows"
        last = [results[way][-1] for way in WAYS]
        memory = "".join(f"{one['memory'] / 1e6:13.0f}" for one in last)
        print(
            f"{rows:7} {stored[-1]:10.0f}{memory}"
            + "".join(f"{rows / one['seconds']:13.0f}" for one in last),
            flush=True,
        )
    peaks = {way: [one["memory"] / 1e6 for one in results[way]] for way in WAYS}
    growth = peaks["by row group"][-1] - peaks["by row group"][0]
    print(json.dumps({"rows": sizes, "stored_mb": stored, "peak_mb": peaks, "growth_mb": growth}))


if __name__ == "__main__":
    main()
