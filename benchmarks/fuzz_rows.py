"""Random rows, many of them bad, through check, format and collate: python -m benchmarks.fuzz_rows [--rows 10000] [--seed 0]

A row may be reported by `preferences.check`, refused with a ValueError that names it, or become a batch; nothing else. A batch has
the image tokens of its image, and gives the answers back letter for letter. Prints how many rows took which way and one line of
JSON; ends with 1 if a row was refused that the check had not reported, or came back changed. Any other error ends it with a traceback.
"""

import argparse
import io
import json
import random
import time
from collections import Counter

import datasets
from PIL import Image
from transformers.utils import logging

from utils import chat, models, preferences
from utils.settings import PROFILES

SETTINGS = PROFILES["embedded"]
FEATURES = datasets.Features(
    {"image": datasets.Image()} | dict.fromkeys(preferences.TEXT_COLUMNS, datasets.Value("string"))
)
WORDS = [
    "a cup",
    "on the left",
    "a red book.",
    "<b>",
    "\0",
    "\n",
    "👩‍🚀",
    "e\u0301",
    "\u202eכוס\u202c",
    "{{ 7 * 7 }}",
    "{% if %}",
    "User:",
    "<|im_end|>",
]
RANGES = [
    (0x20, 0x7F),
    (0xA0, 0x2FF),
    (0x300, 0x36F),
    (0x5D0, 0x700),
    (0x4E00, 0x9FFF),
    (0xE000, 0xF8FF),
    (0x1F300, 0x1FAFF),
    (0, 0x20),
]
FATAL = {
    "empty",
    "special",
    "unreadable",
}  # the first words of what the check says of rows that cannot be trained on


def pictures():
    """Small image files of many kinds."""
    noise, files = Image.frombytes("L", (24, 18), random.Random(0).randbytes(24 * 18)), []
    for mode in ("L", "RGB", "RGBA", "LA", "P", "1"):
        files.append((noise.convert(mode), "PNG"))
    files += [(noise.convert("RGB"), kind) for kind in ("JPEG", "GIF", "WEBP", "BMP", "ICO", "PPM")]
    files += [(noise.convert("CMYK"), "JPEG"), (Image.new("I;16", (24, 18), 700), "PNG")]
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = []
    for image, kind in files:
        file = io.BytesIO()
        image.save(file, kind, **({"exif": exif} if kind in ("JPEG", "WEBP") else {}))
        stored.append(file.getvalue())
    return stored


def an_image(chance, stored):
    data = bytearray(chance.choice(stored))
    for _ in range(chance.choice([0, 0, 0, 1, 4])):
        data[chance.randrange(len(data))] = chance.randrange(256)
    if chance.random() < 0.1:
        data = data[: chance.randrange(len(data))]
    return (
        chance.choice([None, {"bytes": None, "path": "lost.png"}])
        if chance.random() < 0.02
        else {"bytes": bytes(data), "path": None}
    )


def a_text(chance, special):
    if chance.random() < 0.03:
        return chance.choice([None, "", " ", "\t\n", "word " * 2000])
    parts = [chance.choice(WORDS) for _ in range(chance.randrange(1, 6))]
    parts += [
        "".join(chr(chance.randint(*chance.choice(RANGES))) for _ in range(chance.randrange(20)))
    ]
    if chance.random() < 0.03:
        parts.append(chance.choice(special))
    chance.shuffle(parts)
    return chance.choice(["", " "]).join(parts)


def random_rows(count, seed, special):
    chance, stored, rows = random.Random(seed), pictures(), []
    for _ in range(count):
        if rows and chance.random() < 0.02:
            row = dict(chance.choice(rows))
            if chance.random() < 0.5:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        else:
            row = {"image": an_image(chance, stored)} | {
                column: a_text(chance, special) for column in preferences.TEXT_COLUMNS
            }
        rows.append(row)
    return rows


def way(rows, number, processor, problems):
    """Which way row `number` of the formatted `rows` takes, where the check found `problems` in it."""
    try:
        row = rows[number]
        batch = chat.training_batch([row], processor)
    except ValueError as error:
        fatal = {problem.split()[0] for problem in problems} & (FATAL | {"image"})
        return "reported and refused" if fatal else f"REFUSED WITHOUT A REPORT: {error}"
    answers = [row[name][0]["content"][0]["text"] for name in ("chosen", "rejected")]
    images = (batch["input_ids"] == chat.image_token_id(processor)).sum(1).tolist()
    for ids, mask, answer in zip(
        batch["input_ids"], batch["completion_mask"], answers, strict=True
    ):
        if processor.tokenizer.decode(ids[mask.bool()]) != f" {answer}<end_of_utterance>\n":
            return "CAME BACK CHANGED"
    if images != [9, 9]:
        return "CAME BACK CHANGED"
    if batch["input_ids"].shape[1] > SETTINGS.token_budget:
        return "over the token budget"
    return "reported, and a batch all the same" if problems else "a batch"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz_rows", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options, start = parser.parse_args(arguments), time.perf_counter()
    logging.set_verbosity_error()
    processor = models.load_processor(SETTINGS)
    special = preferences.special_tokens(processor)
    rows = datasets.Dataset.from_list(
        random_rows(options.rows, options.seed, special), features=FEATURES
    )
    problems = preferences.check(rows, special_tokens=special)
    found = [[] for _ in range(len(rows))]
    for problem, numbers in problems.items():
        for number in numbers:
            found[number].append(problem)
    formatted = chat.format_dataset(rows)
    ways = Counter(way(formatted, number, processor, found[number]) for number in range(len(rows)))
    for name, count in [
        *ways.most_common(),
        *((f"  check: {problem}", len(numbers)) for problem, numbers in sorted(problems.items())),
    ]:
        print(f"{count:7}  {name}")
    wrong = sum(count for name, count in ways.items() if name[:2].isupper())
    summary = {
        "rows": len(rows),
        "seed": options.seed,
        "seconds": round(time.perf_counter() - start, 1),
        "ways": dict(ways),
    }
    print(
        json.dumps(
            summary | {"problems": {problem: len(numbers) for problem, numbers in problems.items()}}
        )
    )
    return int(bool(wrong) or sum(ways.values()) != options.rows)


if __name__ == "__main__":
    raise SystemExit(main())
