"""Take large photographs through the whole path: python -m benchmarks.photographs

Makes photographs of 12 megapixels with two pairs each, then imports, checks, formats and trains two
steps on them with the embedded model, each in its own process so that their peak memory can be told
apart. Prints a table with seconds per thousand pairs and one line of JSON.
"""

import argparse
import io
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from benchmarks.format_dataset import jpeg, peak_memory
from scripts import import_pairs
from utils import chat, models, preferences, training
from utils.settings import PROFILES

DIFFERENT = 10  # drawn once and repeated, because drawing takes longer than reading
SIZE = (4000, 3000)
PAIRS = 2  # of each photograph
PIXEL_BUDGET = 640 * 640  # that of a real profile
STAGES = ("import", "check", "format", "train")


def write_photographs(folder, count):
    """Write `count` photographs and their pairs to `folder`. Return their size in bytes."""
    drawn = []
    for number in range(min(count, DIFFERENT)):
        file = io.BytesIO()
        small = Image.open(io.BytesIO(jpeg(number)))
        small.resize(SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        drawn.append(file.getvalue())
    lines = []
    total = 0
    for number in range(count):
        # Its number behind the end makes every file a different one.
        data = drawn[number % len(drawn)] + b"%06d" % number
        (folder / f"{number}.jpg").write_bytes(data)
        total += len(data)
        for pair in range(PAIRS):
            row = {
                "image": f"{number}.jpg",
                "question": f"What is in image {number}?",
                "chosen": f"In image {number} there is a field, seen {pair + 1} times.",
                "rejected": "There is a dog.",
            }
            lines.append(json.dumps(row) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return total


def run_stage(stage, source, folder):
    """Run one stage in this process. Return {"seconds", "memory": peak above what was used}."""
    settings = replace(
        PROFILES["embedded"],
        dataset=str(folder / "imported"),
        pixel_budget=PIXEL_BUDGET,
        warmup_steps=0,
    )
    processor = models.load_processor(PROFILES["embedded"])
    trainer = None
    if stage == "train":
        rows = chat.format_dataset(preferences.load_part(settings, "train"), PIXEL_BUDGET)
        model = models.load_model(settings)
        output = folder / "run"
        trainer = training.make_trainer(
            settings, model, processor, rows, output, max_steps=2, save_strategy="no"
        )
    before = peak_memory()
    start = time.perf_counter()
    if stage == "import":
        import_pairs.main([str(source), "--output", settings.dataset])
    elif stage == "check":
        preferences.check(
            preferences.load_part(settings, "train"), processor=processor, pixel_budget=PIXEL_BUDGET
        )
    elif stage == "format":
        rows = chat.format_dataset(preferences.load_part(settings, "train"), PIXEL_BUDGET)
        for row in rows:
            assert row["images"][0].width * row["images"][0].height <= PIXEL_BUDGET
    else:
        trainer.train()
    return {"seconds": time.perf_counter() - start, "memory": peak_memory() - before}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.photographs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--photographs", type=int, default=300)
    count = parser.parse_args().photographs
    os.environ["OMP_NUM_THREADS"] = "1"
    results = {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_DATASETS_CACHE"] = str(Path(place) / "cache")
        source = Path(place) / "photographs"
        source.mkdir()
        stored = write_photographs(source, count)
        for stage in STAGES:
            # Spawned: a forked one would not count the libraries' pages until they are used.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                results[stage] = process.submit(run_stage, stage, source, Path(place)).result()

    pairs = count * PAIRS
    print(f"{count} photographs of 12 megapixels, {stored / 1e6:.0f} MB, {pairs} pairs")
    print("          seconds  a thousand pairs  peak memory +MB")
    for stage, result in results.items():
        # Two steps of training read no more than their own pairs.
        each = "" if stage == "train" else f"{1000 * result['seconds'] / pairs:.1f}"
        print(f"{stage:8}{result['seconds']:9.1f}{each:>18}{result['memory'] / 1e6:17.0f}")
    print(json.dumps({"photographs": count, "stored_mb": stored / 1e6, "stages": results}))


if __name__ == "__main__":
    main()
