"""Load preference pairs (the columns of openbmb/RLAIF-V-Dataset), say what is wrong with them, describe them."""

import hashlib
import io
import json
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean

from datasets import Image, load_dataset
from PIL import Image as PillowImage

from utils.images import BOMBS, read
from utils.settings import EMBEDDED_DATASET, ROOT, locate

TEXT_COLUMNS = ["question", "chosen", "rejected"]
REQUIRED_COLUMNS = ["image", *TEXT_COLUMNS]


def load(name, split, revision="main"):
    """The rows of `split` (datasets' notation: "train[:5%]") with an `image` column that decodes when it is read.

    Raises ValueError when a needed column is missing (naming those there are), FileNotFoundError when a file of the
    embedded data set is missing or damaged (naming it and how to get it back).
    """
    if name == EMBEDDED_DATASET:
        verify_embedded("dataset")
    local = locate(name)
    dataset = load_dataset(local, split=split, revision=None if local != name else revision)
    require_columns(dataset.column_names, f"{name}, split {split}")
    return dataset if isinstance(dataset.features["image"], Image) else dataset.cast_column("image", Image())


def require_columns(columns, where):
    missing = [column for column in REQUIRED_COLUMNS if column not in columns]
    if missing:
        raise ValueError(
            f"{where}: no column {', '.join(missing)}; it has {', '.join(columns)}. Rename with dataset.rename_column(old, new)."
        )


def verify_embedded(part, root=ROOT):
    """Compare the files of `embedded/<part>` ("dataset" or "model") with the manifest's digests.

    Raises FileNotFoundError that names the missing or damaged file and how to get it back.
    """
    manifest = json.loads((Path(root) / "embedded" / "manifest.json").read_text())
    for name, expected in manifest["files"].items():
        if not name.startswith(f"embedded/{part}/"):
            continue
        path = Path(root) / name
        problem = "is missing" if not path.exists() else "is damaged" if digest(path.read_bytes()) != expected else None
        if problem:
            raise FileNotFoundError(
                f"{name} {problem}: restore it with `git checkout -- {name}`, or rebuild with `python -m embedded.build`"
            )


def digest(data):
    """A name for these bytes: equal for equal files, different for different ones (SHA-256)."""
    return hashlib.sha256(data).hexdigest()


def image_bytes(dataset):
    """The stored bytes of every image, not decoded. A row whose image is a path is read from there; None where there is nothing."""
    for row in dataset.with_format(None).select_columns(["image"]).cast_column("image", Image(decode=False)):
        stored = row["image"] or {}
        path = Path(stored.get("path") or "")
        yield stored.get("bytes") or (path.read_bytes() if path.is_file() else None)


def image_header(data):
    """(file format, mode, (width, height)) of an image file's bytes, from its header: no pixel is decoded."""
    with PillowImage.open(io.BytesIO(data)) as image:
        return image.format, image.mode, image.size


def check(dataset, held_out=None):
    """What is wrong with `dataset`: {problem: [row numbers]}, empty when nothing is.

    Problems: "missing column <name>" (no rows), "empty <column>", "chosen equals rejected", "duplicate pair",
    "unreadable image", "image too large" (`images.read` refuses it), "preferred both ways" (the same two answers, the
    other way round), "image also held out" (its bytes occur in `held_out` too).
    """
    missing = {f"missing column {column}": [] for column in REQUIRED_COLUMNS if column not in dataset.column_names}
    if missing:
        return missing
    problems, first_seen = defaultdict(list), {}
    elsewhere = {digest(data) for data in image_bytes(held_out) if data} if held_out is not None else set()
    rows = zip(dataset.select_columns(TEXT_COLUMNS), image_bytes(dataset), strict=True)
    for number, (row, data) in enumerate(rows):
        for column in TEXT_COLUMNS:
            if not (row[column] or "").strip():
                problems[f"empty {column}"].append(number)
        name = digest(data) if data else None
        pair = (name, row["question"], row["chosen"], row["rejected"])
        if row["chosen"] == row["rejected"]:
            problems["chosen equals rejected"].append(number)
        elif (name, row["question"], row["rejected"], row["chosen"]) in first_seen:
            problems["preferred both ways"].append(number)
        if pair in first_seen:
            problems["duplicate pair"].append(number)
        first_seen.setdefault(pair, number)
        try:
            read({"bytes": data or b"", "path": None})
        except ValueError as error:
            problems["image too large" if isinstance(error.__cause__, BOMBS) else "unreadable image"].append(number)
        if name in elsewhere:
            problems["image also held out"].append(number)
    return dict(problems)


def describe(dataset):
    """Counts and means: rows, distinct images and questions, words per answer, how often the longer answer was chosen, sources."""
    texts = dataset.select_columns(TEXT_COLUMNS)
    chosen, rejected = ([len(text.split()) for text in texts[column]] for column in ("chosen", "rejected"))
    pairs = list(zip(chosen, rejected, strict=True))
    return {
        "rows": len(dataset),
        "images": len({digest(data) for data in image_bytes(dataset) if data}),
        "questions": len(set(texts["question"])),
        "words chosen": mean(chosen),
        "words rejected": mean(rejected),
        "chosen is longer": mean(c > r for c, r in pairs),
        "chosen is shorter": mean(c < r for c, r in pairs),
        "sources": dict(Counter(dataset["origin_dataset"]).most_common()) if "origin_dataset" in dataset.column_names else {},
    }
