"""Load preference pairs (the columns of openbmb/RLAIF-V-Dataset), say what is wrong with them, describe them."""

import io
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean

from datasets import Image, Value, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image as PillowImage

from utils.images import BOMBS, read
from utils.progress import progress
from utils.settings import EMBEDDED_DATASET, digest, locate, verify_embedded

TEXT_COLUMNS = ["question", "chosen", "rejected"]
REQUIRED_COLUMNS = ["image", *TEXT_COLUMNS]
TEXT = ("string", "large_string")
ADVICE = {  # what helps when a data set cannot be loaded
    ConnectionError: "check the network; without it only the embedded data set loads, and what the cache holds",
    FileNotFoundError: "check the profile's dataset and dataset_revision",
    Exception: "check the profile's train_split and test_split, and that its files are whole",
}


def load(name, split, revision="main"):
    """The rows of `split` (datasets' notation: "train[:5%]") with an `image` column that decodes when it is read.

    Raises ValueError when a needed column is missing (naming those there are) or of another type, FileNotFoundError when a
    file of the embedded data set is missing or damaged (naming it and how to get it back). What else keeps it from being
    loaded is said with name, split and revision: ConnectionError, FileNotFoundError, otherwise ValueError.
    """
    if name == EMBEDDED_DATASET:
        verify_embedded("dataset")
    local, where = locate(name), f"{name}, split {split}"
    try:
        dataset = load_dataset(local, split=split, revision=None if local != name else revision)
    except (OSError, ValueError, DatasetsError) as error:
        kind = next(kind for kind in ADVICE if isinstance(error, kind))
        damaged = "".join(f"{file} was not written to its end. " for file in half_written(local))
        message = f"{where}, revision {revision} cannot be loaded: {damaged}{error} What helps: {ADVICE[kind]}"
        raise (ValueError if kind is Exception else kind)(message) from error
    require_columns(dataset.column_names, where)
    require_types(dataset.features, where)
    return (
        dataset
        if isinstance(dataset.features["image"], Image)
        else dataset.cast_column("image", Image())
    )


def half_written(folder):
    """The names of the Parquet files in `folder` that lack their end, where Parquet keeps the table of contents."""
    return sorted(
        path.name
        for path in Path(folder).rglob("*.parquet")
        if not path.read_bytes().endswith(b"PAR1")
    )


def require_columns(columns, where):
    missing = [column for column in REQUIRED_COLUMNS if column not in columns]
    if missing:
        raise ValueError(
            f"{where}: no column {', '.join(missing)}; it has {', '.join(columns)}. Rename with dataset.rename_column(old, new)."
        )


def require_types(features, where):
    if wrong := wrong_types(features):
        raise ValueError(
            f"{where}: {'; '.join(wrong)}. One image and three texts make a row; mend it with dataset.map"
        )


def wrong_types(features):
    """What is wrong with the types of the columns: a list of sentences. A stream that does not know its types has none wrong."""
    features = features or {}
    texts = {column: features[column] for column in TEXT_COLUMNS if column in features}
    wrong = [
        f"column {c} is {kind}, not text"
        for c, kind in texts.items()
        if not isinstance(kind, Value) or kind.dtype not in TEXT
    ]
    image = features.get("image", Image())
    stored = isinstance(image, Image) or (
        isinstance(image, dict) and {"bytes", "path"} <= set(image)
    )
    if not stored and not (
        isinstance(image, Value) and image.dtype in (*TEXT, "binary", "large_binary")
    ):
        wrong.append(f"column image is {image}, not one image")
    return wrong


def image_bytes(dataset):
    """The stored bytes of every image, not decoded. A row whose image is a path is read from there; None where there is nothing."""
    for row in (
        dataset.with_format(None)
        .select_columns(["image"])
        .cast_column("image", Image(decode=False))
    ):
        stored = row["image"] or {}
        path = Path(stored.get("path") or "")
        yield stored.get("bytes") or (path.read_bytes() if path.is_file() else None)


def image_header(data):
    """(file format, mode, (width, height)) of an image file's bytes, from its header: no pixel is decoded."""
    with PillowImage.open(io.BytesIO(data)) as image:
        return image.format, image.mode, image.size


def check(dataset, held_out=None, special_tokens=()):
    """What is wrong with `dataset`: {problem: [row numbers]}, empty when nothing is.

    Problems without rows: "missing column <name>", "column <name> is <type>, not text", "no rows". With rows: "empty <column>",
    "chosen equals rejected", "duplicate pair", "unreadable image", "image too large" (`images.read` refuses it), "preferred
    both ways" (the same two answers, the other way round), "image also held out" (its bytes occur in `held_out` too),
    "special token in <column>" (one of `special_tokens`, for which `special_tokens(processor)` has the model's).
    """
    problems = [
        f"missing column {column}"
        for column in REQUIRED_COLUMNS
        if column not in dataset.column_names
    ]
    problems += wrong_types(dataset.features) or ([] if len(dataset) else ["no rows"])
    if problems:
        return {problem: [] for problem in problems}
    problems, first_seen = defaultdict(list), {}
    elsewhere = (
        {digest(data) for data in image_bytes(held_out) if data} if held_out is not None else set()
    )
    texts, images = iter(dataset.select_columns(TEXT_COLUMNS)), image_bytes(dataset)
    for number in progress(range(len(dataset)), "checking"):
        row, data = next(texts), next(images)
        for column in TEXT_COLUMNS:
            if not (row[column] or "").strip():
                problems[f"empty {column}"].append(number)
            if any(token in (row[column] or "") for token in special_tokens):
                problems[f"special token in {column}"].append(number)
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
            problems[
                "image too large" if isinstance(error.__cause__, BOMBS) else "unreadable image"
            ].append(number)
        if name in elsewhere:
            problems["image also held out"].append(number)
    return dict(problems)


def without_problems(dataset, special_tokens=()):
    """(`dataset` without the rows that `check` reports, what it reports). ValueError when no row is left."""
    problems = check(dataset, special_tokens=special_tokens)
    dropped = set().union(*problems.values())
    if len(dropped) == len(dataset):
        raise ValueError(f"no row can be trained on: {as_text(problems)}")
    return dataset.select(
        [number for number in range(len(dataset)) if number not in dropped]
    ) if dropped else dataset, problems


def as_text(problems):
    """What `check` reports in one line: "empty chosen: 2 rows (4, 17); no rows"."""
    listed = {
        problem: ", ".join(map(str, rows[:10])) + ", …" * (len(rows) > 10)
        for problem, rows in problems.items()
    }
    return "; ".join(
        f"{problem}: {len(rows)} rows ({listed[problem]})" if rows else problem
        for problem, rows in problems.items()
    )


def special_tokens(processor):
    """What the tokenizer reads as a token of its own, wherever it stands: marks of images, of turns, of the end."""
    special = {
        token.content
        for token in processor.tokenizer.added_tokens_decoder.values()
        if token.special
    }
    return sorted(special | {getattr(processor, "image_token", None) or ""} - {""})


def refuse_special_tokens(tokens, text, name):
    """ValueError when `text` would bring an image, a turn or an end that nobody meant."""
    if found := [token for token in tokens if token in text]:
        advice = "drop the row or write it otherwise; check(…, special_tokens=special_tokens(processor)) of utils.preferences lists all"
        raise ValueError(
            f"the {name} {text[:80]!r} holds {', '.join(found)}, which the model does not read as text: {advice}"
        )


def describe(dataset):
    """Counts and means: rows, distinct images and questions, words per answer, how often the longer answer was chosen, sources.

    A missing answer has no words. ValueError when there are no rows.
    """
    if not len(dataset):
        raise ValueError("no rows to describe: the data set is empty")
    texts = dataset.select_columns(TEXT_COLUMNS)
    chosen, rejected = (
        [len((text or "").split()) for text in texts[column]] for column in ("chosen", "rejected")
    )
    pairs = list(zip(chosen, rejected, strict=True))
    return {
        "rows": len(dataset),
        "images": len({digest(data) for data in image_bytes(dataset) if data}),
        "questions": len(set(texts["question"])),
        "words chosen": mean(chosen),
        "words rejected": mean(rejected),
        "chosen is longer": mean(c > r for c, r in pairs),
        "chosen is shorter": mean(c < r for c, r in pairs),
        "sources": dict(Counter(dataset["origin_dataset"]).most_common())
        if "origin_dataset" in dataset.column_names
        else {},
    }
