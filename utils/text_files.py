"""Read the rows of JSON, JSONL and CSV files, and name the line of everything that is not one."""

import csv
import json
from codecs import BOM_UTF8
from collections import Counter
from contextlib import suppress

from utils.layouts import ALL_IMAGE_COLUMNS

ENDINGS = (".jsonl", ".json", ".csv")
NOT_UTF_8 = "not UTF-8: save the file with that encoding"


def file_rows(path):
    """Yield (place, row, problem) for every row of a JSON, JSONL or CSV file.

    `place` is "line 7" or "item 7". Either the row, a dict, or the problem, a text, is None. JSONL
    and CSV are read line by line.
    """
    ending = path.suffix.lower()
    if ending == ".json":
        yield from json_rows(path)
    elif ending == ".jsonl":
        yield from jsonl_rows(path)
    else:
        yield from csv_rows(path)


def utf8_lines(path):
    """Yield (line number, line without its end, or None where it is not UTF-8)."""
    with path.open("rb") as file:
        # Text mode would also cut at a \r, which a text may contain.
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(BOM_UTF8)
            try:
                yield number, line.removesuffix(b"\n").decode()
            except UnicodeDecodeError:
                yield number, None


def jsonl_rows(path):
    """Yield (place, row, problem) for every line that is not empty."""
    for number, line in utf8_lines(path):
        place = f"line {number}"
        if line is None:
            yield place, None, NOT_UTF_8
        elif line.strip():
            yield place, *parsed(line)


def parsed(text):
    """Return (row, problem) of the text of a JSON object; one of them is None."""
    try:
        row = json.loads(text, object_pairs_hook=each_name_once)
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg}, at character {error.pos + 1}"
    except (ValueError, RecursionError) as error:
        # A name that comes twice, a number of thousands of digits, brackets without end.
        return None, f"not a row: {str(error)[:100]}"
    problem = object_problem(row, text)
    return (None, problem) if problem else (row, None)


def object_problem(row, text):
    """Return what keeps a JSON value from being a row, or None."""
    if not isinstance(row, dict):
        return f'not a JSON object: write {{"images": …, "prompt": …}}, not {text.strip()[:30]}'
    if has_half_character(row):
        return "half a character: \\ud800 to \\udfff come in pairs"
    return None


def each_name_once(pairs):
    """Return a JSON object as a dict. Raise ValueError if a name comes twice: one would be lost."""
    counts = Counter(name for name, _ in pairs)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise ValueError(f"{', '.join(repeated)} more than once")
    return dict(pairs)


def has_half_character(value):
    """Return whether a text anywhere in a JSON value cannot be written as UTF-8."""
    if isinstance(value, str):
        return any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return any(has_half_character(inner) for inner in (*value, *value.values()))
    if isinstance(value, list):
        return any(has_half_character(inner) for inner in value)
    return False


def json_rows(path):
    """Yield (place, row, problem) for every item of a file that holds one list."""
    try:
        text = path.read_bytes().removeprefix(BOM_UTF8).decode()
        items = json.loads(text, object_pairs_hook=each_name_once)
    except UnicodeDecodeError:
        yield "the file", None, NOT_UTF_8
        return
    except json.JSONDecodeError as error:
        yield f"line {error.lineno}", None, f"not JSON: {error.msg}"
        return
    except (ValueError, RecursionError) as error:
        yield "the file", None, f"not a list of rows: {str(error)[:100]}"
        return
    if not isinstance(items, list):
        yield "the file", None, "not a list of rows: begin it with ["
        return
    for number, item in enumerate(items, start=1):
        problem = object_problem(item, str(item))
        yield f"item {number}", None if problem else item, problem


def csv_rows(path):
    """Yield (place, row, problem) for every row of a CSV file, which names its columns first.

    The place is the row's first line: a quoted answer may run over several.
    """
    unreadable = []

    def lines():
        for number, line in utf8_lines(path):
            if line is None:
                unreadable.append(number)
                line = ""
            yield line + "\n"

    reader = csv.reader(lines(), strict=True)
    end = 1
    try:
        header = next(reader, [])
        repeated = sorted(name for name, count in Counter(header).items() if count > 1)
        if repeated:
            yield "line 1", None, f"column {', '.join(repeated)} more than once"
            return
        end = reader.line_num
        for values in reader:
            place = f"line {end + 1}"
            end = reader.line_num
            if unreadable:
                yield f"line {unreadable[0]}", None, NOT_UTF_8
                unreadable.clear()
            elif len(values) == len(header):
                yield place, listed_images(dict(zip(header, values, strict=True))), None
            elif values:
                counts = f"{len(values)} values for {len(header)} columns"
                yield place, None, f"{counts}: put a text with a comma in double quotes"
    except csv.Error as error:
        yield f"line {end + 1}", None, f"not CSV: {error}; what follows was not read"


def listed_images(row):
    """Return a CSV row in which a cell with several images, a JSON list, is a list."""
    for name in ALL_IMAGE_COLUMNS:
        cell = row.get(name)
        if cell and cell.startswith("["):
            with suppress(json.JSONDecodeError):  # a file may have such a name
                row[name] = json.loads(cell)
        elif cell == "":
            row[name] = None
    return row
