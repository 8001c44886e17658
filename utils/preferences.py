"""Load preference pairs with the columns of openbmb/RLAIF-V-Dataset, check them, describe them."""

import io
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean

from datasets import Image, Value, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image as PillowImage

from utils.images import BOMBS, file_bytes, read_image
from utils.progress import progress
from utils.settings import EMBEDDED_DATASET, digest, locate, verify_embedded

TEXT_COLUMNS = ["question", "chosen", "rejected"]
REQUIRED_COLUMNS = ["image", *TEXT_COLUMNS]
STRING_TYPES = ("string", "large_string")
BINARY_TYPES = ("binary", "large_binary")


def load(name, split, revision="main"):
    """Return the rows of `split` with an `image` column that is decoded when it is read.

    `split` is in the notation of `datasets`, as "train[:5%]".

    Raises ValueError when a required column is missing or has the wrong type, and
    FileNotFoundError when a file of the embedded data set is missing or damaged. Every other
    failure names the data set, the split and the revision: ConnectionError, FileNotFoundError, or
    else ValueError.
    """
    if name == EMBEDDED_DATASET:
        verify_embedded("dataset")
    local = locate(name)
    where = f"{name}, split {split}"
    try:
        dataset = load_dataset(local, split=split, revision=None if local != name else revision)
    except (OSError, ValueError, DatasetsError) as error:
        problem = f"{where}, revision {revision} cannot be loaded: "
        for file in half_written(local):
            problem += f"{file} was not written to its end. "
        problem += f"{error} To fix this, "
        if isinstance(error, ConnectionError):
            advice = (
                "check the network: without it, only cached data sets and the embedded one load"
            )
            raise ConnectionError(problem + advice) from error
        if isinstance(error, FileNotFoundError):
            advice = "check the profile's dataset and dataset_revision"
            raise FileNotFoundError(problem + advice) from error
        advice = "check the profile's train_split and test_split, and that its files are complete"
        raise ValueError(problem + advice) from error
    require_columns(dataset.column_names, where)
    require_types(dataset.features, where)
    if isinstance(dataset.features["image"], Image):
        return dataset
    return dataset.cast_column("image", Image())


def half_written(folder):
    """Return the names of the Parquet files in `folder` that lack their end.

    Parquet keeps its table of contents there.
    """
    names = []
    for path in Path(folder).rglob("*.parquet"):
        if not path.read_bytes().endswith(b"PAR1"):
            names.append(path.name)
    return sorted(names)


def require_columns(columns, where):
    """Raise ValueError unless `columns` holds every required column. `where` names the data set."""
    missing = [column for column in REQUIRED_COLUMNS if column not in columns]
    if missing:
        raise ValueError(
            f"{where}: no column {', '.join(missing)}; it has {', '.join(columns)}. "
            "Rename with dataset.rename_column(old, new)."
        )


def require_types(features, where):
    """Raise ValueError unless the columns hold one image and three texts per row."""
    wrong = wrong_types(features)
    if wrong:
        raise ValueError(
            f"{where}: {'; '.join(wrong)}. A row is one image and three texts; convert it with "
            "dataset.map"
        )


def wrong_types(features):
    """Return a list of what is wrong with the types of the columns.

    It is empty for a stream, which may not know its types.
    """
    features = features or {}
    wrong = []
    for column in TEXT_COLUMNS:
        kind = features.get(column)
        if kind is not None and not is_value(kind, STRING_TYPES):
            wrong.append(f"column {column} is {kind}, not text")
    image = features.get("image")
    if image is not None and not holds_image(image):
        wrong.append(f"column image is {image}, not one image")
    return wrong


def holds_image(kind):
    """Return whether a column of this type can be cast to images."""
    if isinstance(kind, dict):
        return "bytes" in kind and "path" in kind
    return isinstance(kind, Image) or is_value(kind, STRING_TYPES + BINARY_TYPES)


def is_value(kind, dtypes):
    return isinstance(kind, Value) and kind.dtype in dtypes


def image_bytes(dataset):
    """Yield the bytes of every image's file, not decoded; None where there is no image."""
    images = dataset.with_format(None).select_columns(["image"])
    for row in images.cast_column("image", Image(decode=False)):
        yield file_bytes(row["image"])


def image_header(data):
    """Return (file format, mode, (width, height)) of an image file's bytes.

    They are read from its header. No pixel is decoded.
    """
    with PillowImage.open(io.BytesIO(data)) as image:
        return image.format, image.mode, image.size


def check(dataset, held_out=None, special_tokens=()):
    """Return what is wrong with `dataset`: {problem: [row numbers]}, empty if nothing is.

    Problems of the whole data set have no row numbers: "missing column <name>", "column <name> is
    <type>, not text", "no rows". Problems of rows are:

    - "empty <column>" and "chosen equals rejected";
    - "duplicate pair", and "preferred both ways" for the same two answers the other way round;
    - "unreadable image" and "image too large", when `images.read_image` refuses it;
    - "image also held out", when its bytes also occur in `held_out`;
    - "special token in <column>", when a text contains one of `special_tokens`, which
      `special_tokens(processor)` lists for a model.

    Every image is decoded, because only that finds a file that was cut off; equal files are
    decoded once.
    """
    of_columns = []
    for column in REQUIRED_COLUMNS:
        if column not in dataset.column_names:
            of_columns.append(f"missing column {column}")
    of_columns += wrong_types(dataset.features)
    if not of_columns and len(dataset) == 0:
        of_columns.append("no rows")
    if of_columns:
        return {problem: [] for problem in of_columns}

    elsewhere = set()
    if held_out is not None:
        elsewhere = {digest(data) for data in image_bytes(held_out) if data}
    problems = defaultdict(list)
    pairs_seen = set()
    image_problems = {}
    texts = iter(dataset.select_columns(TEXT_COLUMNS))
    images = image_bytes(dataset)
    for number in progress(range(len(dataset)), "checking"):
        row = next(texts)
        data = next(images)
        for column in TEXT_COLUMNS:
            text = row[column] or ""
            if not text.strip():
                problems[f"empty {column}"].append(number)
            if any(token in text for token in special_tokens):
                problems[f"special token in {column}"].append(number)

        name = digest(data) if data else None
        pair = (name, row["question"], row["chosen"], row["rejected"])
        swapped = (name, row["question"], row["rejected"], row["chosen"])
        if row["chosen"] == row["rejected"]:
            problems["chosen equals rejected"].append(number)
        elif swapped in pairs_seen:
            problems["preferred both ways"].append(number)
        if pair in pairs_seen:
            problems["duplicate pair"].append(number)
        pairs_seen.add(pair)

        if name not in image_problems:
            image_problems[name] = image_problem(data)
        if image_problems[name]:
            problems[image_problems[name]].append(number)
        if name in elsewhere:
            problems["image also held out"].append(number)
    return dict(problems)


def image_problem(data):
    """Return what is wrong with the bytes of an image file, or None. The image is decoded."""
    try:
        read_image({"bytes": data or b"", "path": None})
    except ValueError as error:
        return "image too large" if isinstance(error.__cause__, BOMBS) else "unreadable image"
    return None


def without_problems(dataset, special_tokens=()):
    """Return (`dataset` without the rows that `check` reports, what it reports).

    Raises ValueError when no row is left.
    """
    problems = check(dataset, special_tokens=special_tokens)
    dropped = set().union(*problems.values())
    if len(dropped) == len(dataset):
        raise ValueError(f"no row can be trained on: {as_text(problems)}")
    if not dropped:
        return dataset, problems
    kept = [number for number in range(len(dataset)) if number not in dropped]
    return dataset.select(kept), problems


def as_text(problems):
    """Return what `check` reports in one line, as "empty chosen: 2 rows (4, 17); no rows"."""
    parts = []
    for problem, rows in problems.items():
        if not rows:
            parts.append(problem)
            continue
        numbers = [str(number) for number in rows[:10]]
        if len(rows) > 10:
            numbers.append("…")
        parts.append(f"{problem}: {len(rows)} rows ({', '.join(numbers)})")
    return "; ".join(parts)


def special_tokens(processor):
    """Return, sorted, the texts that the tokenizer always reads as one special token.

    They stand for an image, the end of a turn, the end of the text and the like.
    """
    special = {
        token.content
        for token in processor.tokenizer.added_tokens_decoder.values()
        if token.special
    }
    image_token = getattr(processor, "image_token", None)
    if image_token:
        special.add(image_token)
    return sorted(special)


def refuse_special_tokens(tokens, text, name):
    """Raise ValueError when `text` contains one of `tokens`.

    It would insert an image, a turn or an end of text that nobody meant.
    """
    found = [token for token in tokens if token in text]
    if found:
        raise ValueError(
            f"the {name} {text[:80]!r} contains {', '.join(found)}, which the model does not read "
            "as text: drop the row or rephrase it; utils.preferences.check(…, "
            "special_tokens=special_tokens(processor)) lists all such rows"
        )


def describe(dataset):
    """Return counts and means of `dataset` as a dict.

    It has the numbers of rows, distinct images and questions, the mean words per answer, how often
    the longer and the shorter answer was chosen, and the number of rows per source. A missing
    answer counts as zero words. Raises ValueError when there are no rows.
    """
    if len(dataset) == 0:
        raise ValueError("the data set is empty: there are no rows to describe")
    texts = dataset.select_columns(TEXT_COLUMNS)
    chosen = [len((text or "").split()) for text in texts["chosen"]]
    rejected = [len((text or "").split()) for text in texts["rejected"]]
    pairs = list(zip(chosen, rejected, strict=True))
    sources = {}
    if "origin_dataset" in dataset.column_names:
        sources = dict(Counter(dataset["origin_dataset"]).most_common())
    return {
        "rows": len(dataset),
        "images": len({digest(data) for data in image_bytes(dataset) if data}),
        "questions": len(set(texts["question"])),
        "words chosen": mean(chosen),
        "words rejected": mean(rejected),
        "chosen is longer": mean(c > r for c, r in pairs),
        "chosen is shorter": mean(c < r for c, r in pairs),
        "sources": sources,
    }
