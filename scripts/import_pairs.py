"""Import preference pairs of any layout: python -m scripts.import_pairs SOURCE --output DIR

DIR gets the folders `train` and `test`. Each holds every image once, as a file with the bytes it
had, and `metadata.parquet` with the pairs, as `datasets` calls the folder of images "imagefolder".
"""

import argparse
import random
import shutil
from collections import defaultdict
from pathlib import Path

import pyarrow
from datasets import Features, List, Value
from pyarrow import parquet

from utils import layouts, preferences
from utils.images import file_bytes
from utils.preferences import image_header
from utils.progress import progress
from utils.settings import digest

COPIED = ("images", "rejected_images")  # columns
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
SHOWN = 20  # reasons that are printed
EXAMPLES = 3  # pairs that are printed
LONGEST = 200  # characters of a text that are printed
PIECE = 1000  # rows that are written at a time
HELD_OUT = 0.1  # the share of pairs that is held out


def parse(arguments=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.import_pairs",
        description="Read preference pairs in any layout that the README lists, drop the rows that "
        "cannot be trained on, and write the others with their images.",
    )
    parser.add_argument(
        "source",
        help="a name on the hub, a folder, or a JSON, JSONL, CSV or Parquet file",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder to write; it must not exist yet"
    )
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument(
        "--limit",
        type=int,
        help="take so many rows at random; from the hub, only what they need is downloaded",
    )
    parser.add_argument(
        "--shuffle", type=int, default=0, metavar="SEED", help="which rows, and which are held out"
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """Import as the command line asks."""
    options = parse(arguments)
    output = options.output
    if output.exists():
        raise SystemExit(f"{output} already exists: move it away, or choose another folder")
    # Renamed at the end, so a run that is stopped leaves nothing that looks complete.
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        rows = preferences.load(
            options.source, options.split, limit=options.limit, seed=options.shuffle
        )
        pairs, problems = copy_images(rows, unfinished / "images")
        report(rows, len(pairs), problems)
        train, test = hold_out(pairs, random.Random(options.shuffle))
    except (OSError, ValueError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise SystemExit(str(error)) from None
    for name, part in (("train", train), ("test", test)):
        write_part(rows, part, unfinished, name)
    shutil.rmtree(unfinished / "images")
    unfinished.rename(output)

    show_examples(rows, train)
    print(f"{len(train)} pairs to train on, {len(test)} about other images held out, in {output}")
    print(f"Train on them with python -m scripts.train --dataset {output}")


def copy_images(rows, folder):
    """Check every row and copy its images into `folder`, each once.

    Returns ({row number: {column: [names of files]}} of the rows that can be trained on, and
    {problem: row numbers}).
    """
    columns = [name for name in COPIED if name in rows.column_names]
    pairs = {}
    problems = defaultdict(list)
    found = preferences.row_problems(rows)
    images = rows.select_columns(columns)
    for number in progress(range(len(rows)), "importing"):
        row_problems = next(found)
        for problem in row_problems:
            problems[problem].append(number)
        if set(row_problems) <= set(preferences.WARNINGS):
            row = images[number]
            pairs[number] = {}
            for column in columns:
                pairs[number][column] = [copy_image(stored, folder) for stored in row[column] or []]
    return pairs, dict(problems)


def copy_image(stored, folder):
    """Write the file of a stored image into `folder`, unless it is there. Return its name."""
    data = file_bytes(stored)
    kind = image_header(data)[0]
    ending = ENDINGS.get(kind, kind.lower())
    name = f"{digest(data)}.{ending}"
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return name


def report(rows, kept, problems):
    """Print how many rows are kept, and why which others are dropped."""
    print(f"{kept} of {len(rows)} rows can be trained on")
    dropped = {}
    for problem, numbers in problems.items():
        if problem in preferences.WARNINGS:
            print(f"kept, but look at them: {preferences.as_text({problem: numbers})}")
        else:
            dropped[problem] = numbers
    for problem, numbers in list(dropped.items())[:SHOWN]:
        print(f"dropped: {preferences.as_text({problem: numbers})}")
    if len(dropped) > SHOWN:
        print(f"dropped for {len(dropped) - SHOWN} more reasons")
    if not kept:
        raise ValueError("so there is nothing to write")


def hold_out(pairs, rng):
    """Return (row numbers to train on, row numbers held out), as dicts of their images.

    No image is on both sides. Groups of rows that share images are drawn by `rng` until a tenth of
    the pairs is held out. Raises ValueError when all pairs share images.
    """
    groups = list(groups_by_image(pairs).values())
    if len(groups) < 2:
        raise ValueError(
            "all pairs are about one image, or images shared by all: give pairs about at least two "
            "images, one of them to hold out"
        )
    rng.shuffle(groups)
    # The smallest group goes first, so that something is held out and something is left.
    groups.sort(key=len)
    wanted = HELD_OUT * len(pairs)
    held_out = set(groups[0])
    rest = groups[1:]
    rng.shuffle(rest)
    for group in rest:
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    train = {number: files for number, files in pairs.items() if number not in held_out}
    test = {number: files for number, files in pairs.items() if number in held_out}
    return train, test


def groups_by_image(pairs):
    """Return {a row of the group: row numbers of the group} for rows that share images."""
    leader = {number: number for number in pairs}

    def first_of(number):
        while leader[number] != number:
            number = leader[number]
        return number

    first_with = {}  # image → the first row that has it
    for number, files in pairs.items():
        for names in files.values():
            for name in names:
                earlier = first_of(first_with.setdefault(name, number))
                later = first_of(number)
                leader[max(earlier, later)] = min(earlier, later)
    groups = defaultdict(list)
    for number in pairs:
        groups[first_of(number)].append(number)
    return groups


def write_part(rows, pairs, folder, name):
    """Write the rows of `pairs` to folder/<name>, with their images, which lie in folder/images."""
    target = folder / name
    (target / "images").mkdir(parents=True)
    columns = list(next(iter(pairs.values())))
    features = Features(
        {
            **{f"{column}_file_names": List(Value("string")) for column in columns},
            **dict.fromkeys(layouts.MESSAGES, layouts.MESSAGE_LIST),
        }
    )
    texts = rows.select_columns(list(layouts.MESSAGES))
    numbers = list(pairs)
    with parquet.ParquetWriter(target / "metadata.parquet", features.arrow_schema) as writer:
        for start in range(0, len(numbers), PIECE):
            piece = numbers[start : start + PIECE]
            written = []
            for number in piece:
                row = texts[number]
                for column, names in pairs[number].items():
                    row[f"{column}_file_names"] = [f"images/{file}" for file in names]
                    move(names, folder / "images", target / "images")
                written.append(row)
            writer.write_table(pyarrow.Table.from_pylist(written, schema=features.arrow_schema))


def move(names, source, target):
    """Move the files called `names` from one folder to another, unless they are there already."""
    for name in names:
        if not (target / name).exists():
            (source / name).rename(target / name)


def show_examples(rows, pairs):
    """Print the texts of the first pairs, to be read before a model is trained on them."""
    for number, files in list(pairs.items())[:EXAMPLES]:
        row = rows[number]
        print(f"\nrow {number}, images: {len(files['images'])}")
        for name in layouts.MESSAGES:
            print(f"  {name + ':':9} {preferences.text_of(row[name])[:LONGEST]!r}")
    print()


if __name__ == "__main__":
    main()
