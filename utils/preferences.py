"""Load preference pairs in any of the field's layouts, check them, describe them.

A row is TRL's: `images`, a list of {"bytes", "path"}, not decoded, and `prompt`, `chosen` and
`rejected`, lists of messages whose content is a list of parts.
"""

import io
import re
import shutil
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean

from datasets import (
    Dataset,
    Features,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image as PillowImage

from utils import layouts, text_files
from utils.images import BOMBS, file_bytes, read_image
from utils.layouts import COLUMNS, IMAGE_LIST, MESSAGES, PROBLEM, TEXT_FEATURES, text_of
from utils.progress import progress
from utils.settings import EMBEDDED_DATASET, digest, locate, verify_embedded

# What `check` reports without calling for the row to be dropped.
PARTS = ("train", "validation", "test")  # in the order in which rows of one split are drawn
NEARLY_IDENTICAL = "nearly identical answers"
NO_END = "answer without an end"
NO_IMAGE = "no image"
WARNINGS = (NEARLY_IDENTICAL, NO_END, NO_IMAGE)
NEARLY_ALL_SHARED = 0.95  # the share of words from which two answers are nearly identical
SHORT = 8  # words: a shorter answer may do without a full stop
ENDS = tuple(".!?…。！？｡\"'”’»)]}」』`*|:")
CHECKED_PIXELS = 1_000_000  # to which an image is reduced when it is only looked at for damage
SLOW = 10  # seconds from which `check` says how long it took
WORD = re.compile(r"\w+|[^\w\s]")
SHUFFLE_BUFFER = 2000  # rows of a stream among which the next one is drawn
# Files of JSON that `datasets` and the hub write beside the rows.
NOT_PAIRS = ("metadata", "dataset_info", "dataset_infos", "dataset_dict", "state")
REVIEW_FILE = "review.jsonl"  # what utils.review writes beside the pairs


# Loading


def load(name, split="train", revision="main", streaming=False, limit=None, skip=0, seed=0):
    """Return the preference pairs of a data set as TRL's rows, and print which layout it has.

    Other columns stay as they are; those of a JSON, JSONL or CSV file are left out. A row that
    cannot be read stays in its place with what is wrong in a column `problem`: `check` reports it,
    and reading it for training raises. No image is decoded.

    Args:
        name: a name on the hub, `owner/name` or `owner/name/configuration`; or a path: a folder of
            Parquet files, of images with a JSON, JSONL or CSV file beside them, or such a file.
        split: in the notation of `datasets`, such as "train[:100]".
        streaming: return an `IterableDataset`, whose rows are read when they are needed.
        limit: take so many rows at random by `seed`, after `skip` others. From the hub, only what
            is needed for them is downloaded.

    Raises ValueError for an unknown layout. Every other failure names the data set, the split and
    the revision: ConnectionError, FileNotFoundError, or else ValueError.
    """
    if name == EMBEDDED_DATASET:
        verify_embedded("dataset")
    local = locate(name)
    on_hub = not Path(local).exists()
    if on_hub and (name.startswith(("/", ".", "~")) or name.endswith(text_files.ENDINGS)):
        raise FileNotFoundError(f"there is no {name}, neither a folder nor a file")
    if limit is not None and on_hub and not streaming:
        return collected(name, split, revision, limit, skip, seed)
    where = f"{name}, split {split}"
    file = file_of_texts(local, split)
    if file:
        rows = text_file_rows(file, split, streaming)
    else:
        stored = stored_rows(local, split, revision, streaming, where)
        if stored.column_names is None:
            stored = stored._resolve_features()  # a stream of JSON does not know its columns
        rows = layouts.as_rows(stored, where, root=folder_of(local))
        say(where, layouts.recognize(stored.column_names, where), rows)
    if limit is None:
        return rows
    # Drawn at random: neighbors in a file often come from the same model or source.
    if streaming:
        return rows.shuffle(seed, buffer_size=SHUFFLE_BUFFER).skip(skip).take(limit)
    last = min(skip + limit, len(rows))
    return rows.shuffle(seed).select(range(min(skip, last), last))


def load_part(settings, part):
    """Return the rows of one part of a profile's data set: "train", "validation" or "test".

    Parts that come from the same split get different rows of it.
    """
    split = getattr(settings, f"{part}_split")
    skip = 0
    for earlier in PARTS[: PARTS.index(part)]:
        if getattr(settings, f"{earlier}_split") == split:
            skip += getattr(settings, f"{earlier}_rows") or 0
    return load(
        settings.dataset,
        split,
        settings.dataset_revision,
        limit=getattr(settings, f"{part}_rows"),
        skip=skip,
        seed=settings.seed,
    )


def folder_of(local):
    """Return the folder below which the paths of a data set on this machine lie, or None."""
    path = Path(local)
    if path.is_file():
        return path.parent
    return path if path.is_dir() else None


def stored_rows(local, split, revision, streaming, where):
    """Return a data set as it is stored. Errors name it and say what helps."""
    path, _, configuration = local.rpartition("/")
    on_hub = not Path(local).exists()
    if not on_hub or local.count("/") < 2:
        path = local
        configuration = None
    arguments = {"path": path, "name": configuration, "split": split, "streaming": streaming}
    if on_hub:
        arguments["revision"] = revision
        if not streaming:
            say_download(path, revision)
    elif Path(local).is_file():
        arguments["path"] = Path(local).suffix.removeprefix(".").lower()
        arguments["data_files"] = local
    elif list(Path(local).rglob("metadata.parquet")):
        arguments["path"] = "imagefolder"
        arguments["data_dir"] = local
    try:
        if list(Path(local).glob("state.json")) or list(Path(local).glob("dataset_dict.json")):
            return saved_to_disk(local, split)
        return load_dataset(**arguments)
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
        advice = (
            "check the profile's splits, that its files are complete, and whether it has "
            "configurations: name one as owner/name/configuration"
        )
        raise ValueError(problem + advice) from error


def half_written(folder):
    """Return the names of the Parquet files in `folder` that lack their end.

    Parquet keeps its table of contents there.
    """
    names = []
    for path in Path(folder).rglob("*.parquet"):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4))
            if file.read() != b"PAR1":
                names.append(path.name)
    return sorted(names)


def saved_to_disk(local, split):
    """Return the split of what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    saved = load_from_disk(local)
    if isinstance(saved, Dataset):
        saved = {"train": saved}
    return split_of(saved, split)


def split_of(datasets, split):
    """Return what `split`, such as "train[:100]", means in a dict of data sets by their splits."""
    lengths = {name: len(rows) for name, rows in datasets.items()}
    parts = []
    for piece in ReadInstruction.from_spec(split).to_absolute(lengths):
        first = piece.from_ or 0
        last = lengths[piece.splitname] if piece.to is None else piece.to
        parts.append(datasets[piece.splitname].select(range(first, last)))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def say_download(name, revision):
    """Print how much a data set on the hub takes to download beside what the disk has free."""
    try:
        files = HfApi().dataset_info(name, revision=revision, files_metadata=True).siblings
    except (OSError, ValueError, HfHubHTTPError):
        return  # loading it says what is wrong, or takes it from the cache
    needed = sum(file.size or 0 for file in files)
    free = shutil.disk_usage(Path.home()).free
    print(
        f"{name}: up to {needed / 1e9:.1f} GB to download unless cached, {free / 1e9:.1f} GB free. "
        "With limit=…, only a sample is downloaded.",
        flush=True,
    )


def sampled_rows(name, split, revision, limit, skip, seed, code):
    """Yield `limit` rows of a data set on the hub, as they come from its stream.

    `code` does nothing but change the name of the cache.
    """
    for row in load(name, split, revision, True, limit, skip, seed):
        # Text in every row, or the first rows would decide that the column has none.
        yield {**row, PROBLEM: row[PROBLEM] or ""}


def collected(name, split, revision, limit, skip, seed):
    """Return a sample of a data set on the hub, kept in the cache of `datasets`."""
    arguments = {
        "name": name,
        "split": split,
        "revision": revision,
        "limit": limit,
        "skip": skip,
        "seed": seed,
        "code": layouts.code_digest(),
    }
    rows = Dataset.from_generator(sampled_rows, gen_kwargs=arguments)
    return layouts.finished(rows.cast_column("images", IMAGE_LIST))


def say(where, layout, rows):
    """Print the layout of a data set, how many rows it has and how many could not be read."""
    stream = isinstance(rows, IterableDataset)
    text = f"{where}: {'rows' if stream else f'{len(rows):,} rows'} in the layout of {layout.name}"
    if not stream and PROBLEM in rows.column_names:
        unreadable = sum(bool(problem) for problem in rows[PROBLEM])
        text += f"; {unreadable:,} cannot be read, and preferences.check says why"
    print(text, flush=True)


# Files of texts with images beside them


def file_of_texts(local, split):
    """Return the JSON, JSONL or CSV file that `local` is, or that lies in this folder, or None.

    Of several, the one that is called as the split is taken. Raises FileNotFoundError if none is.
    """
    path = Path(local)
    if path.is_file():
        return path if path.suffix.lower() in text_files.ENDINGS else None
    if not path.is_dir() or any(path.rglob("*.parquet")):
        return None
    if any(file.stem in NOT_PAIRS for file in path.iterdir()):
        return None
    files = [file for file in path.iterdir() if file.suffix.lower() in text_files.ENDINGS]
    files = sorted(file for file in files if file.name != REVIEW_FILE)
    if len(files) < 2:
        return files[0] if files else None
    wanted = re.split(r"\W", split)[0]
    for file in files:
        if file.stem == wanted:
            return file
    names = ", ".join(file.name for file in files)
    raise FileNotFoundError(f"{local} holds {names}: name one of them, or call one {wanted}")


def text_file_rows(path, split, streaming):
    """Return the rows of a JSON, JSONL or CSV file, whose images are paths below its folder."""
    columns = set()
    first = None
    for place, row, problem in text_files.file_rows(path):
        columns.update(row or ())
        first = first or (problem and f"{place}: {problem}")
    if not columns:
        raise ValueError(f"{path.name}: no row can be read. {first or 'It has none.'}")
    layout = layouts.recognize(sorted(columns), path.name)
    state = path.stat()
    arguments = {
        "path": path,
        "layout": layout,
        # They become part of the name in the cache, so a file that has changed is read again.
        "state": (state.st_mtime_ns, state.st_size, layouts.code_digest()),
    }
    if streaming:
        rows = IterableDataset.from_generator(read_text_file, gen_kwargs=arguments)
        say(path.name, layout, rows)
        return rows
    features = Features({**TEXT_FEATURES, "images": IMAGE_LIST, "rejected_images": IMAGE_LIST})
    rows = Dataset.from_generator(read_text_file, features, gen_kwargs=arguments)
    if not columns & set(layouts.IMAGE_COLUMNS):
        layouts.require_images(rows, path.name)
    name = "train" if path.stem != re.split(r"\W", split)[0] else path.stem
    rows = split_of({name: layouts.finished(rows)}, split)
    say(path.name, layout, rows)
    return rows


def read_text_file(path, layout, state):
    """Yield the rows of a file. A problem names the line.

    `state` does nothing but change the name of the cache.
    """
    for place, row, problem in text_files.file_rows(path):
        if problem is None:
            out = layouts.read_row(row, layout, path.parent)
        else:
            out = layouts.unread(problem)
        if out[PROBLEM]:
            # It may quote half a character, which cannot be stored.
            named = f"{place}: {out[PROBLEM]}"
            out[PROBLEM] = named.encode(errors="backslashreplace").decode()
        yield {"rejected_images": None, **out}


# Looking at rows


def require_rows(dataset):
    """Raise ValueError unless `dataset` has the columns of TRL's rows."""
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}. "
            "Read it with preferences.load, or convert it with layouts.as_rows"
        )


def image_bytes(dataset):
    """Yield, for every row, the bytes of its images' files, not decoded; None for a missing one."""
    for row in dataset.select_columns(["images"]):
        yield [file_bytes(stored) for stored in row["images"]]


def image_header(data):
    """Return (file format, mode, (width, height)) of an image file's bytes.

    They are read from its header. No pixel is decoded.
    """
    with PillowImage.open(io.BytesIO(data)) as image:
        return image.format, image.mode, image.size


def check(dataset, held_out=(), processor=None, pixel_budget=None):
    """Return what is wrong with `dataset`: {problem: [row numbers]}, empty if nothing is.

    The problems are

    - whatever kept a row from being read, with its line where it comes from a file;
    - "empty prompt", "empty chosen", "empty rejected" and "chosen equals rejected";
    - "duplicate pair", and "preferred both ways" for the same two answers the other way round;
    - "missing image", "unreadable image" and "image too large";
    - "image also held out", when its bytes also occur in one of the data sets `held_out`;
    - with the model's `processor`, "special token in <column>", and "image refused by the model's
      processor", held to `pixel_budget`;
    - "no rows", without numbers.

    "nearly identical answers", "answer without an end" and "no image" are WARNINGS: such rows may
    be what is meant. Every image is decoded, because only that finds a file that was cut off; each
    is read once, and equal files are decoded once.
    """
    require_rows(dataset)
    if len(dataset) == 0:
        return {"no rows": []}
    elsewhere = set()
    for part in held_out:
        for files in image_bytes(part):
            elsewhere.update(digest(data) for data in files if data)
    problems = defaultdict(list)
    start = time.perf_counter()
    columns = [name for name in (*COLUMNS, PROBLEM) if name in dataset.column_names]
    rows = dataset.select_columns(columns)
    found = row_problems(rows, elsewhere, processor, pixel_budget)
    for number in progress(range(len(dataset)), "checking"):
        for problem in next(found):
            problems[problem].append(number)
    seconds = time.perf_counter() - start
    if seconds > SLOW:
        print(f"checked in {seconds:.0f} s, {1000 * seconds / len(dataset):.1f} s a thousand rows")
    return dict(problems)


def row_problems(rows, elsewhere=(), processor=None, pixel_budget=None):
    """Yield the list of problems of every row, in the words of `check`.

    `elsewhere`: digests of images that are held out. A row is compared with those before it.
    """
    tokens = special_tokens(processor) if processor else []
    pairs_seen = set()
    image_problems = {}  # digest of a file → what is wrong with it
    sizes = {}  # size of an image → whether the processor refuses it
    for row in rows:
        if row.get(PROBLEM):
            yield [row[PROBLEM]]
            continue
        problems = text_problems(row, tokens)
        if not row["images"]:
            problems.append(NO_IMAGE)
        names = []
        for stored in row["images"]:
            data = file_bytes(stored)
            name = digest(data) if data else None
            names.append(name)
            if name not in image_problems:
                image_problems[name] = image_problem(data, processor, pixel_budget, sizes)
            if image_problems[name]:
                problems.append(image_problems[name])
            if name in elsewhere:
                problems.append("image also held out")

        prompt, chosen, rejected = (text_of(row[name]) for name in MESSAGES)
        pair = (*names, prompt, chosen, rejected)
        if chosen != rejected and (*names, prompt, rejected, chosen) in pairs_seen:
            problems.append("preferred both ways")
        if pair in pairs_seen:
            problems.append("duplicate pair")
        pairs_seen.add(pair)
        yield list(dict.fromkeys(problems))


def text_problems(row, tokens):
    """Return what is wrong with the texts of a row. `tokens`: the model's special tokens."""
    problems = []
    for name in MESSAGES:
        last = text_of(row[name][-1:])
        if not last.strip():
            problems.append(f"empty {name}")
        if any(token in text_of(row[name]) for token in tokens):
            problems.append(f"special token in {name}")
    chosen = text_of(row["chosen"])
    rejected = text_of(row["rejected"])
    if chosen == rejected:
        problems.append("chosen equals rejected")
    elif shared_words(chosen, rejected) >= NEARLY_ALL_SHARED:
        problems.append(NEARLY_IDENTICAL)
    for answer in (chosen, rejected):
        if len(answer.split()) >= SHORT and not answer.rstrip().endswith(ENDS):
            problems.append(NO_END)
    return problems


def shared_words(text, other):
    """Return the share of words and marks that two texts have in common, 0 to 1.

    It is twice the number in common over the number in both, whatever their order.
    """
    words = Counter(WORD.findall(text))
    other_words = Counter(WORD.findall(other))
    total = words.total() + other_words.total()
    return 2 * (words & other_words).total() / total if total else 0.0


def image_problem(data, processor, pixel_budget, sizes):
    """Return what is wrong with the bytes of an image file, or None. The image is decoded."""
    if data is None:
        return "missing image"
    if processor is None:
        pixel_budget = CHECKED_PIXELS
    try:
        image = read_image({"bytes": data, "path": None}, pixel_budget=pixel_budget)
    except ValueError as error:
        return "image too large" if isinstance(error.__cause__, BOMBS) else "unreadable image"
    if processor is None:
        return None
    # Whether an image is refused depends on its size alone.
    if image.size not in sizes:
        sizes[image.size] = is_refused(image, processor)
    return "image refused by the model's processor" if sizes[image.size] else None


def is_refused(image, processor):
    """Return whether the model's image processor raises an error for `image`."""
    try:
        processor.image_processor(images=[[image]], return_tensors="pt")
    except Exception:  # each processor has errors of its own
        return True
    return False


def without_problems(dataset, processor=None, pixel_budget=None, held_out=()):
    """Return (`dataset` without the rows that have a problem, what `check` reports).

    Rows with no more than a warning stay. For the arguments see `check`. Raises ValueError when no
    row is left.
    """
    problems = check(dataset, held_out, processor, pixel_budget)
    dropped = set()
    for problem, rows in problems.items():
        if problem not in WARNINGS:
            dropped.update(rows)
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
            "as text: drop the row or rephrase it; utils.preferences.check(rows, "
            "processor=processor) lists all such rows"
        )


def describe(dataset):
    """Return counts and means of `dataset` as a dict.

    It has the numbers of rows, of rows with a system turn, with several turns and by the number of
    their images, of distinct images and prompts, the mean words per answer, how often the longer
    and the shorter answer was chosen, the mean share of words that both answers have, and the
    number of rows per source. Raises ValueError when there are no rows.
    """
    require_rows(dataset)
    if len(dataset) == 0:
        raise ValueError("the data set is empty: there are no rows to describe")
    counts = Counter()
    system = several = 0
    prompts = set()
    pairs = []
    shared = []
    images = set()
    for row in dataset.select_columns(list(COLUMNS)):
        roles = [turn["role"] for turn in row["prompt"]]
        system += "system" in roles
        several += roles.count("user") > 1
        prompts.add(text_of(row["prompt"]))
        chosen = text_of(row["chosen"])
        rejected = text_of(row["rejected"])
        pairs.append((len(chosen.split()), len(rejected.split())))
        shared.append(shared_words(chosen, rejected))
        counts[len(row["images"])] += 1
        images.update(digest(data) for data in map(file_bytes, row["images"]) if data)
    sources = {}
    if "origin_dataset" in dataset.column_names:
        sources = dict(Counter(dataset["origin_dataset"]).most_common())
    return {
        "rows": len(dataset),
        "images per row": dict(sorted(counts.items())),
        "system turns": system,
        "several turns": several,
        "images": len(images),
        "prompts": len(prompts),
        "words chosen": mean(chosen for chosen, _ in pairs),
        "words rejected": mean(rejected for _, rejected in pairs),
        "chosen is longer": mean(chosen > rejected for chosen, rejected in pairs),
        "chosen is shorter": mean(chosen < rejected for chosen, rejected in pairs),
        "words in common": mean(shared),
        "sources": sources,
    }
