"""Measure the memory that reading preference pairs takes: python -m benchmarks.streaming

Pairs are streamed in two ways or loaded into memory. A stream read by file runs ahead of a slow
reader by up to the whole file. Read by row group (`reshard`), it runs ahead by up to one group.

The pairs are generated: JPEGs (320×240) in RLAIF-V's columns, one Parquet file for each number of
rows. Every row is formatted and its image decoded, each time in a new process. Prints a table and
one line of JSON. Takes about two minutes.
"""

import argparse
import io
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
import psutil
import pyarrow
import pyarrow.parquet
from PIL import Image

from benchmarks.format_dataset import jpeg
from utils import chat, layouts

WAYS = ("by row group", "by file", "in memory")
DIFFERENT_JPEGS = 50
ROW_GROUP = 100
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "chosen": datasets.Value("string"),
        "rejected": datasets.Value("string"),
    }
)


def small_jpeg(number):
    """Return a JPEG file (320×240)."""
    stored = io.BytesIO()
    small = Image.open(io.BytesIO(jpeg(number))).resize((320, 240))
    small.save(stored, "JPEG", quality=95)
    return stored.getvalue()


def write_row_groups(path, rows):
    """Write `rows` pairs to `path` in row groups, as the hub's files have them.

    Returns the file's size in bytes.
    """
    jpegs = [small_jpeg(number) for number in range(min(rows, DIFFERENT_JPEGS))]
    schema = FEATURES.arrow_schema
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        for start in range(0, rows, ROW_GROUP):
            columns = {"image": [], "question": [], "chosen": [], "rejected": []}
            for number in range(start, min(start + ROW_GROUP, rows)):
                # Its number makes every file a different one, or Parquet would store few of them.
                stored = jpegs[number % len(jpegs)] + b"%06d" % number
                columns["image"].append({"bytes": stored, "path": f"{number}.jpg"})
                for name in ("question", "chosen", "rejected"):
                    columns[name].append(f"{name} {number} " * 40)
            file.write_table(pyarrow.table(columns, schema=schema))
    return Path(path).stat().st_size


def open_pairs(way, parquet, cache):
    """Open the pairs in `parquet` in one of the WAYS."""
    source = {"data_files": parquet, "split": "train", "cache_dir": cache}
    if way == "in memory":
        return datasets.load_dataset("parquet", keep_in_memory=True, **source)
    stream = datasets.load_dataset("parquet", streaming=True, **source)
    if way == "by row group":
        stream = stream.reshard()
    return stream


def measure(way, parquet):
    """Read all pairs in this process in one of the WAYS.

    Returns {"rows", "seconds", "memory": the peak in bytes above what was used before}.
    """
    datasets.disable_progress_bars()
    process = psutil.Process()
    start = time.perf_counter()
    before = process.memory_info().rss
    peak = before
    rows = 0
    with tempfile.TemporaryDirectory() as cache:
        for row in chat.format_dataset(layouts.as_rows(open_pairs(way, parquet, cache))):
            row["images"][0].load()
            if rows % 20 == 0:
                peak = max(peak, process.memory_info().rss)
            rows += 1
    return {"rows": rows, "seconds": time.perf_counter() - start, "memory": peak - before}


def alone(*arguments):
    """Return `measure(*arguments)`, computed in a new process."""
    # Spawned: a forked one would not count the libraries' pages until they are used.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 5000, 20000])
    sizes = parser.parse_args().rows
    os.environ["OMP_NUM_THREADS"] = "1"
    names = "".join(f"{way:>13}" for way in WAYS)
    print(f"{'':7} {'':10} {'memory, +MB':^39}{'rows a second':^39}")
    print(f"{'rows':>7} {'stored MB':>10}{names}{names}")
    stored = []
    peaks = {way: [] for way in WAYS}
    for rows in sizes:
        memory = ""
        speed = ""
        with tempfile.TemporaryDirectory() as folder:
            parquet = str(Path(folder) / "pairs.parquet")
            stored.append(write_row_groups(parquet, rows) / 1e6)
            for way in WAYS:
                result = alone(way, parquet)
                assert result["rows"] == rows, f"{way} lost or repeated rows"
                peaks[way].append(result["memory"] / 1e6)
                memory += f"{result['memory'] / 1e6:13.0f}"
                speed += f"{rows / result['seconds']:13.0f}"
        print(f"{rows:7} {stored[-1]:10.0f}{memory}{speed}", flush=True)
    growth = peaks["by row group"][-1] - peaks["by row group"][0]
    print(json.dumps({"rows": sizes, "stored_mb": stored, "peak_mb": peaks, "growth_mb": growth}))


if __name__ == "__main__":
    main()
