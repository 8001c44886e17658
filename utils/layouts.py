"""Your own preference pairs: a folder of images with a `pairs.jsonl` or `pairs.csv` becomes a data set to train on.

python -m scripts.import_pairs FOLDER writes it to FOLDER/data as Parquet.
"""

import csv
import json
from codecs import BOM_UTF8
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from utils.preferences import REQUIRED_COLUMNS, TEXT_COLUMNS, check, image_bytes
from utils.settings import digest

NAMES = ("pairs.jsonl", "pairs.csv")
FEATURES = Features({"image": Image(), **{column: Value("string") for column in TEXT_COLUMNS}})
SHOWN = 20  # problems in one error message


def load_folder(folder):
    """The pairs of `folder` as a data set that `preferences.check` accepts; every image keeps the bytes it has on disk.

    `folder` holds `pairs.jsonl` (one JSON object a line) or `pairs.csv` (the first line names the columns), in UTF-8, with
    image (a path inside `folder`), question, chosen and rejected; further columns are not taken over. All images are held in
    memory. Raises FileNotFoundError unless there is exactly one of the two files, ValueError with the line of each problem.
    """
    folder, problems = Path(folder), []
    files = [folder / name for name in NAMES if (folder / name).is_file()]
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if len(files) != 1:
        advice = (
            "write one, or let python -m scripts.make_pairs make it of pictures alone"
            if not files
            else "keep one"
        )
        raise FileNotFoundError(
            f"{folder.name} holds {len(files)} of {' and '.join(NAMES)}: {advice}"
        )
    lines = utf8_lines(files[0].read_bytes(), problems)
    rows = list((csv_rows if files[0].suffix == ".csv" else jsonl_rows)(lines, problems))
    missing = [image_problem(folder, row["image"]) for _, row in rows]
    images = [  # a name stands in for the bytes that are not there: two missing images are not the same image
        {
            "bytes": row["image"].encode() if wrong else (folder / row["image"]).read_bytes(),
            "path": row["image"],
        }
        for (_, row), wrong in zip(rows, missing, strict=True)
    ]
    texts = {column: [row[column] for _, row in rows] for column in TEXT_COLUMNS}
    dataset = Dataset.from_dict({"image": images} | texts, features=FEATURES)
    for problem, number in [
        (problem, number) for problem, numbers in check(dataset).items() for number in numbers
    ]:
        line, row = rows[number]
        about_image = missing[number] or f"unreadable image {row['image']!r}"
        problems.append((line, about_image if problem == "unreadable image" else problem))
    if problems or not rows:
        listed = [f"line {line}: {problem}" for line, problem in sorted(problems)[:SHOWN]]
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ValueError(
            "\n".join(
                [
                    f"{files[0].name}: {len(rows)} pairs read, {len(problems)} problems",
                    *listed,
                    *more,
                ]
            )
        )
    return dataset


def utf8_lines(data, problems):
    """The lines of `data`; one that is not UTF-8 is added to `problems` and left empty."""
    lines = []
    for number, line in enumerate(
        data.removeprefix(BOM_UTF8).split(b"\n"), start=1
    ):  # not splitlines: a text may hold a \r
        try:
            lines.append(line.decode())
        except UnicodeDecodeError:
            problems.append((number, "not UTF-8: save the file with that encoding"))
            lines.append("")
    return lines


def jsonl_rows(lines, problems):
    """(line number, row) of every line that holds a complete row; the others are added to `problems`, empty lines are not."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=each_name_once)
        except json.JSONDecodeError as error:
            problems.append((number, f"not JSON: {error.msg}, at character {error.pos + 1}"))
            continue
        except (
            ValueError,
            RecursionError,
        ) as error:  # a name twice, a number of thousands of digits, brackets without end
            problems.append((number, f"not a row: {str(error)[:100]}"))
            continue
        if not isinstance(row, dict):
            problems.append(
                (
                    number,
                    f'not a JSON object: write {{"image": …, "question": …}}, not {line.strip()[:30]}',
                )
            )
        elif missing := [column for column in REQUIRED_COLUMNS if column not in row]:
            problems.append((number, f"no {', '.join(missing)}; it has {', '.join(row)}"))
        elif other := [column for column in REQUIRED_COLUMNS if not isinstance(row[column], str)]:
            problems.append((number, f"{', '.join(other)} must be text in quotes"))
        elif half := [column for column in REQUIRED_COLUMNS if not whole_characters(row[column])]:
            problems.append(
                (
                    number,
                    f"{', '.join(half)} holds half a character (\\ud800 to \\udfff without the other half)",
                )
            )
        else:
            yield number, row


def each_name_once(pairs):
    """A JSON object as a dict. ValueError where it would lose a value: a name that comes twice."""
    if twice := sorted(
        {name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1}
    ):
        raise ValueError(f"{', '.join(twice)} more than once")
    return dict(pairs)


def whole_characters(text):
    return not any("\ud800" <= character <= "\udfff" for character in text)


def csv_rows(lines, problems):
    """As `jsonl_rows`, for CSV. The number is that of a row's first line; a quoted answer may go on over several."""
    reader, end = csv.reader((line + "\n" for line in lines), strict=True), 1
    try:
        header = next(reader)
        if missing := [column for column in REQUIRED_COLUMNS if column not in header]:
            problems.append(
                (1, f"no column {', '.join(missing)}; it has {', '.join(header) or 'none'}")
            )
            return
        if twice := [column for column in REQUIRED_COLUMNS if header.count(column) > 1]:
            problems.append((1, f"column {', '.join(twice)} more than once"))
            return
        end = reader.line_num
        for values in reader:
            start, end = end + 1, reader.line_num
            if len(values) == len(header):
                yield start, dict(zip(header, values, strict=True))
            elif values:
                problems.append(
                    (
                        start,
                        f"{len(values)} values for {len(header)} columns: put a text with a comma in double quotes",
                    )
                )
    except csv.Error as error:
        problems.append((end + 1, f"not CSV: {error}"))


def image_problem(folder, name):
    """What is wrong with the path `name`, or None."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"image {name!r} is not inside the folder"
        return None if path.is_file() else f"no image {name!r} in the folder"
    except (OSError, ValueError):  # a name that no file can have: too long, or with a NUL
        return f"no image {name[:80]!r} in the folder"


def held_out(dataset):
    """(Rows to train on, rows held out): those of every tenth image, one at least, so that no image is in both.

    ValueError where all rows are about one image: nothing would be left to look at that was not trained on.
    """
    names = [digest(data) for data in image_bytes(dataset)]
    images = sorted(set(names))
    if len(images) < 2:
        raise ValueError(
            "all pairs are about one image: give pairs about two at least, one of them to hold out"
        )
    test = set(images[: max(1, len(images) // 10)])
    return tuple(
        dataset.select([number for number, name in enumerate(names) if (name in test) == held])
        for held in (False, True)
    )
