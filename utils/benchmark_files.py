"""Read and write the files of POPE, AMBER and CHAIR in their authors' formats.

What is written here can be scored by an official script, and what a model answered is read back.
Every reader raises FileNotFoundError that names the missing file and where to get it, and
ValueError that names the file and the line of a mistake, or the entry of a JSON list, from 1 on.
"""

import json
from pathlib import Path

from utils.hallucination import caption_mentions

# Where each file comes from, for those who do not have it yet.
ANSWERS_SOURCE = "your own run, which writes the model's answers there"
POPE_SOURCE = "github.com/AoiDragon/POPE: output/coco/{name}"
AMBER_SOURCE = "github.com/junyangwang0410/AMBER: data/{name}"
AMBER_QUERIES_SOURCE = "github.com/junyangwang0410/AMBER: data/query/{name}"
COCO_SOURCE = "images.cocodataset.org/annotations/annotations_trainval2014.zip: annotations/{name}"
SYNONYMS_SOURCE = "github.com/LisaAnne/Hallucination: data/synonyms.txt"


def write_json(path, value):
    """Write `value` as one JSON document, the format of AMBER, COCO and captions."""
    _write(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path, rows):
    """Write one JSON object per line, the format of POPE's files and of captions."""
    lines = [json.dumps(row) + "\n" for row in rows]
    _write(path, "".join(lines))


def _write(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _text(path, source):
    """Return the text of a file that comes from `source`."""
    path = Path(path)
    source = source.format(name=path.name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; get it from {source}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); "
            f"get it again from {source}"
        ) from None


def _lines(path, source):
    """Return the lines of a file.

    Only a line feed ends a line. `str.splitlines` would also split at marks inside an answer.
    """
    lines = _text(path, source).split("\n")
    return lines if lines[-1] else lines[:-1]


def _decoded(text, path, line=1):
    """Return the JSON value of `text`, which begins at `line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg}); "
            "check that this is the file itself, not a web page that shows it"
        ) from None


def _check_rows(rows, keys, path, what):
    """Raise ValueError unless `rows` is a list of objects with all of `keys`, {name: type}."""
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must be a list, not {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, {what} {number}"
        for key, kind in keys.items():
            if not isinstance(row, dict) or key not in row:
                raise ValueError(f"{where}: no {key!r}; required are {', '.join(keys)}")
            if not isinstance(row[key], kind):
                raise ValueError(
                    f"{where}: {key!r} must be of type {kind.__name__}, not {row[key]!r}"
                )


def _json_list(path, source, keys):
    """Read a file that is one JSON list."""
    rows = _decoded(_text(path, source), path)
    _check_rows(rows, keys, path, "entry")
    return rows


def _json_lines(path, source, keys):
    """Read a file with one JSON object per line."""
    rows = []
    for number, line in enumerate(_lines(path, source), start=1):
        rows.append(_decoded(line, path, number))
    _check_rows(rows, keys, path, "line")
    return rows


def _json_object(path, source, sections):
    """Read a file that is one JSON object with lists. `sections` is {list: {key: type}}."""
    whole = _decoded(_text(path, source), path)
    if not isinstance(whole, dict) or set(sections) - set(whole):
        raise ValueError(f"{path}: must be one object with {', '.join(sections)}")
    for name, keys in sections.items():
        _check_rows(whole[name], keys, path, f"{name}, entry")
    return whole


def read_pope(path):
    """Read POPE's questions, e.g. coco_pope_random.json.

    Returns [{"question_id", "image", "text", "label"}]. The label is "yes" or "no".
    """
    keys = {"question_id": int, "image": str, "text": str, "label": str}
    rows = _json_lines(path, POPE_SOURCE, keys)
    for number, row in enumerate(rows, start=1):
        if row["label"] not in ("yes", "no"):
            raise ValueError(
                f"{path}, line {number}: the label must be yes or no, not {row['label']!r}"
            )
    return rows


def read_pope_answers(path, questions):
    """Read the answers to `questions` from lines {"question", "answer"}, and return their texts.

    `questions` come from `read_pope`. The official script joins the two files by their order
    alone. Here each line must repeat its question, upper and lower case apart, so that a shifted
    file is an error and not a score.
    """
    rows = _json_lines(path, ANSWERS_SOURCE, {"question": str, "answer": str})
    # The lengths are compared last: the first line that does not match says more.
    for number, (row, asked) in enumerate(zip(rows, questions, strict=False), start=1):
        if row["question"].strip().lower() != asked["text"].strip().lower():
            raise ValueError(
                f"{path}, line {number}: answers {row['question']!r}, "
                f"but line {number} of the questions is {asked['text']!r}"
            )
    if len(rows) != len(questions):
        unmatched = min(len(rows), len(questions)) + 1
        raise ValueError(
            f"{path}: {len(rows)} answers to {len(questions)} questions; "
            f"line {unmatched} has no counterpart"
        )
    return [row["answer"] for row in rows]


def read_amber_queries(path):
    """Read AMBER's questions, e.g. query/query_all.json: [{"id", "image", "query"}]."""
    return _json_list(path, AMBER_QUERIES_SOURCE, {"id": int, "image": str, "query": str})


def read_amber(folder):
    """Read AMBER's truth from its folder data: (annotations, associations, safe words).

    annotations.json is [{"id", "type", "truth", …}]. The official script finds them by position,
    so the ids must be 1, 2, 3 and so on. relation.json is {object: [words]}. safe_words.txt has one
    word per line.
    """
    folder = Path(folder)
    path = folder / "annotations.json"
    annotations = _json_list(path, AMBER_SOURCE, {"id": int, "type": str, "truth": object})
    for number, row in enumerate(annotations, start=1):
        _check_annotation(row, number, f"{path}, entry {number}")
    path = folder / "relation.json"
    associations = _decoded(_text(path, AMBER_SOURCE), path)
    well_formed = isinstance(associations, dict)
    well_formed = well_formed and all(isinstance(words, list) for words in associations.values())
    if not well_formed:
        raise ValueError(f"{path}: must be one object {{name: [words]}}")
    return annotations, associations, _lines(folder / "safe_words.txt", AMBER_SOURCE)


def _check_annotation(row, number, where):
    """Raise ValueError unless `row` is fit to be entry `number` of AMBER's annotations."""
    if row["id"] != number:
        raise ValueError(
            f"{where}: its id is {row['id']}, but the official script takes entry n for id n"
        )
    if row["type"] == "generative":
        for key in ("truth", "hallu"):
            if not isinstance(row.get(key), list):
                raise ValueError(f"{where}: truth and hallu must be lists of objects")
    elif row["truth"] not in ("yes", "no"):
        raise ValueError(f"{where}: the truth must be yes or no, not {row['truth']!r}")


def read_amber_responses(path):
    """Read a model's answers to AMBER: [{"id", "response"}].

    `hallucination.amber_discriminative` checks the ids.
    """
    return _json_list(path, ANSWERS_SOURCE, {"id": int, "response": str})


def read_captions(path):
    """Read a model's captions for CHAIR: [{"image_id", "caption"}].

    A .jsonl file has one per line, a .json file is one list. An image_id is COCO's integer. As the
    string "42" it would match no truth, and its whole caption would count as hallucinated.
    """
    read = _json_lines if str(path).endswith(".jsonl") else _json_list
    return read(path, ANSWERS_SOURCE, {"image_id": int, "caption": str})


def read_synonyms(path):
    """Read CHAIR's synonyms.txt as {word: category}.

    The words of a line are separated by ", " and the first one is the category. As in the official
    script, a second space belongs to the word, such as " cheesecake" in COCO's file, which no
    caption contains. If two lines have the same word, the later one wins.
    """
    synonyms = {}
    for line in _lines(path, SYNONYMS_SOURCE):
        words = line.strip().split(", ")
        for word in words:
            synonyms[word] = words[0]
    return synonyms


def read_coco(folder, synonyms, singular):
    """Read CHAIR's truth: {image id: set of categories}.

    The categories of an image are those segmented in it and those that its five captions name.
    Reads instances_{split}.json and captions_{split}.json for val2014 and train2014, as the
    official script does. Arguments as for `caption_mentions`. An image id that is not in the result
    has no truth. Officially, everything that its caption mentions is wrong.
    """
    folder = Path(folder)
    truths = {}
    for split in ("val2014", "train2014"):
        _add_segmented(truths, folder / f"instances_{split}.json", synonyms)
        path = folder / f"captions_{split}.json"
        sections = {"annotations": {"image_id": int, "caption": str}}
        for row in _json_object(path, COCO_SOURCE, sections)["annotations"]:
            named = caption_mentions(row["caption"], synonyms, singular)
            truths.setdefault(row["image_id"], set()).update(named)
    return truths


def _add_segmented(truths, path, synonyms):
    """Add to `truths` the categories that COCO's file at `path` says are segmented in an image."""
    sections = {
        "categories": {"id": int, "name": str},
        "annotations": {"image_id": int, "category_id": int},
    }
    instances = _json_object(path, COCO_SOURCE, sections)
    names = {row["id"]: row["name"] for row in instances["categories"]}
    unknown = sorted(set(names.values()) - set(synonyms))
    if unknown:
        raise ValueError(f"{path}: the category {unknown[0]} is not in the synonyms")
    for number, row in enumerate(instances["annotations"], start=1):
        if row["category_id"] not in names:
            raise ValueError(
                f"{path}, annotations, entry {number}: no category has the id {row['category_id']}"
            )
        category = synonyms[names[row["category_id"]]]
        truths.setdefault(row["image_id"], set()).add(category)
