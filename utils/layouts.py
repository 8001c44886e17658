"""Turn a folder of images with a `pairs.jsonl` or `pairs.csv` into a data set to train on.

`python -m scripts.import_pairs FOLDER` writes it to FOLDER/data as Parquet.
"""

import csv
import json
from codecs import BOM_UTF8
from collections import Counter
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from utils import preferences
from utils.preferences import REQUIRED_COLUMNS, TEXT_COLUMNS, image_bytes
from utils.settings import digest

NAMES = ("pairs.jsonl", "pairs.csv")
FEATURES = Features({"image": Image(), **{column: Value("string") for column in TEXT_COLUMNS}})
SHOWN = 20  # problems in one error message


def load_folder(folder):
    """Return the pairs of `folder` as a data set in which `preferences.check` finds nothing wrong.

    `folder` holds either `pairs.jsonl`, with one JSON object per line, or `pairs.csv`, whose first
    line names the columns. Both are UTF-8, with the columns image, a path inside `folder`,
    question, chosen and rejected. Other columns are ignored. Every image keeps the bytes it has on
    disk, and all of them are held in memory.

    Raises FileNotFoundError unless there is exactly one of the two files, and ValueError with the
    line of each problem.
    """
    folder = Path(folder)
    file = pairs_file(folder)
    problems = []  # (line number, what is wrong)
    lines = utf8_lines(file.read_bytes(), problems)
    read_rows = csv_rows if file.suffix == ".csv" else jsonl_rows
    numbered = list(read_rows(lines, problems))
    rows = [row for _, row in numbered]

    images = []
    lost = []
    for row in rows:
        problem = path_problem(folder, row["image"])
        lost.append(problem)
        if problem:
            # Two missing images are not the same image: their names stand in for their bytes.
            data = row["image"].encode()
        else:
            data = (folder / row["image"]).read_bytes()
        images.append({"bytes": data, "path": row["image"]})
    columns = {column: [row[column] for row in rows] for column in TEXT_COLUMNS}
    dataset = Dataset.from_dict({"image": images, **columns}, features=FEATURES)

    for problem, numbers in preferences.check(dataset).items():
        for number in numbers:
            line, row = numbered[number]
            if problem == "unreadable image":
                problems.append((line, lost[number] or f"unreadable image {row['image']!r}"))
            else:
                problems.append((line, problem))
    if problems or not rows:
        report = [f"{file.name}: {len(rows)} pairs read, {len(problems)} problems"]
        for line, problem in sorted(problems)[:SHOWN]:
            report.append(f"line {line}: {problem}")
        if len(problems) > SHOWN:
            report.append(f"and {len(problems) - SHOWN} more")
        raise ValueError("\n".join(report))
    return dataset


def pairs_file(folder):
    """Return the path of the one file of pairs in `folder`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    files = [folder / name for name in NAMES if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{folder.name} holds neither {' nor '.join(NAMES)}: write one, or let "
            "python -m scripts.make_pairs create it from the images"
        )
    if len(files) > 1:
        raise FileNotFoundError(f"{folder.name} holds both {' and '.join(NAMES)}: keep one")
    return files[0]


def utf8_lines(data, problems):
    """Return the lines of `data`; one that is not UTF-8 is added to `problems` and left empty."""
    lines = []
    # `splitlines` would also cut at a \r, which a text may contain.
    for number, line in enumerate(data.removeprefix(BOM_UTF8).split(b"\n"), start=1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError:
            problems.append((number, "not UTF-8: save the file with that encoding"))
            lines.append("")
    return lines


def jsonl_rows(lines, problems):
    """Yield (line number, row) for every line that holds a complete row.

    Other lines are added to `problems`, except empty ones.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=each_name_once)
        except json.JSONDecodeError as error:
            problems.append((number, f"not JSON: {error.msg}, at character {error.pos + 1}"))
            continue
        except (ValueError, RecursionError) as error:
            # A name that comes twice, a number of thousands of digits, brackets without end.
            problems.append((number, f"not a row: {str(error)[:100]}"))
            continue
        problem = row_problem(row, line)
        if problem:
            problems.append((number, problem))
        else:
            yield number, row


def row_problem(row, line):
    """Return what is wrong with a row that was read from a line of JSON, or None."""
    if not isinstance(row, dict):
        start = line.strip()[:30]
        return f'not a JSON object: write {{"image": …, "question": …}}, not {start}'
    missing = [column for column in REQUIRED_COLUMNS if column not in row]
    if missing:
        return f"no {', '.join(missing)}; it has {', '.join(row)}"
    other = [column for column in REQUIRED_COLUMNS if not isinstance(row[column], str)]
    if other:
        return f"{', '.join(other)} must be text in quotes"
    half = [column for column in REQUIRED_COLUMNS if has_half_character(row[column])]
    if half:
        return f"half a character in {', '.join(half)}: \\ud800 to \\udfff come in pairs"
    return None


def each_name_once(pairs):
    """Return a JSON object as a dict. Raise ValueError if a name comes twice: one would be lost."""
    counts = Counter(name for name, _ in pairs)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise ValueError(f"{', '.join(repeated)} more than once")
    return dict(pairs)


def has_half_character(text):
    return any("\ud800" <= character <= "\udfff" for character in text)


def csv_rows(lines, problems):
    """Yield (line number, row) for every complete row of a CSV file; others go to `problems`.

    The number is that of the row's first line. A quoted answer may run over several lines.
    """
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    end = 1
    try:
        header = next(reader)
        missing = [column for column in REQUIRED_COLUMNS if column not in header]
        if missing:
            there = ", ".join(header) or "none"
            problems.append((1, f"no column {', '.join(missing)}; it has {there}"))
            return
        repeated = [column for column in REQUIRED_COLUMNS if header.count(column) > 1]
        if repeated:
            problems.append((1, f"column {', '.join(repeated)} more than once"))
            return
        end = reader.line_num
        for values in reader:
            start = end + 1
            end = reader.line_num
            if len(values) == len(header):
                yield start, dict(zip(header, values, strict=True))
            elif values:
                counts = f"{len(values)} values for {len(header)} columns"
                problems.append((start, f"{counts}: put a text with a comma in double quotes"))
    except csv.Error as error:
        problems.append((end + 1, f"not CSV: {error}"))


def path_problem(folder, name):
    """Return what is wrong with the path `name` of an image in `folder`, or None."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"image {name!r} is not inside the folder"
        if not path.is_file():
            return f"no image {name!r} in the folder"
    except (OSError, ValueError):
        # No file can have such a name: it is too long or contains a NUL.
        return f"no image {name[:80]!r} in the folder"
    return None


def held_out(dataset):
    """Return (rows to train on, rows held out).

    The rows of every tenth image are held out, at least those of one, so no image is in both
    parts. Raises ValueError when all rows are about one image, since nothing would be left to
    evaluate that was not trained on.
    """
    names = [digest(data) for data in image_bytes(dataset)]
    images = sorted(set(names))
    if len(images) < 2:
        raise ValueError(
            "all pairs are about one image: give pairs about at least two, one of them to hold out"
        )
    test_images = set(images[: max(1, len(images) // 10)])
    train = []
    test = []
    for number, name in enumerate(names):
        if name in test_images:
            test.append(number)
        else:
            train.append(number)
    return dataset.select(train), dataset.select(test)
