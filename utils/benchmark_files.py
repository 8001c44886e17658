"""The files of POPE, AMBER and CHAIR as their authors lay them out: written for an official script to read, and read back to be scored.

Every reader raises FileNotFoundError that names the missing file and where it comes from, and ValueError that names the
file and the line (in JSON lists: the entry, counted from 1) that is not as it should be.
"""

import json
from pathlib import Path

from utils.hallucination import caption_mentions

# Where a file comes from, for who does not have it yet.
OWN_ANSWERS = "your own run, which writes the model's answers there"
POPE = "github.com/AoiDragon/POPE: output/coco/{name}"
AMBER = "github.com/junyangwang0410/AMBER: data/{name}"
AMBER_QUERIES = "github.com/junyangwang0410/AMBER: data/query/{name}"
COCO = "images.cocodataset.org/annotations/annotations_trainval2014.zip: annotations/{name}"
SYNONYMS = "github.com/LisaAnne/Hallucination: data/synonyms.txt"


def write_json(path, value):
    """`value` as one JSON document: AMBER's files, COCO's, captions."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_json_lines(path, rows):
    """One JSON object a line: POPE's questions and answers, captions."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _text(path, source):
    source = source.format(name=Path(path).name)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; it comes from {source}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); it comes from {source}"
        ) from None


def _lines(path, source):
    """The lines of a file, ended by nothing but a line feed: other marks may stand within a text."""
    lines = _text(path, source).split("\n")
    return lines if lines[-1] else lines[:-1]


def _decoded(text, path, line=1):
    """The JSON value of `text`, which begins at `line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}"
        raise ValueError(
            f"{where}: not JSON ({error.msg}); is it the file itself, not a page that shows it?"
        ) from None


def _checked(rows, keys, path, what):
    """`rows` if each is an object with all of `keys`, {name: type}."""
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a list is needed, not {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        for key, kind in keys.items():
            if not isinstance(row, dict) or key not in row:
                raise ValueError(
                    f"{path}, {what} {number}: no {key!r}; needed are {', '.join(keys)}"
                )
            if not isinstance(row[key], kind):
                raise ValueError(
                    f"{path}, {what} {number}: {key!r} must be of type {kind.__name__}, not {row[key]!r}"
                )
    return rows


def _json_list(path, source, keys):
    return _checked(_decoded(_text(path, source), path), keys, path, "entry")


def _json_lines(path, source, keys):
    rows = [
        _decoded(line, path, number) for number, line in enumerate(_lines(path, source), start=1)
    ]
    return _checked(rows, keys, path, "line")


def _json_sections(path, source, **sections):
    """The lists of a JSON object that `sections` names, each checked for its keys."""
    whole = _decoded(_text(path, source), path)
    if not isinstance(whole, dict) or set(sections) - set(whole):
        raise ValueError(f"{path}: needed is one object with {', '.join(sections)}")
    return [_checked(whole[name], keys, path, f"{name}, entry") for name, keys in sections.items()]


def read_pope(path):
    """POPE's questions, e.g. coco_pope_random.json: [{"question_id", "image", "text", "label"}], label "yes" or "no"."""
    rows = _json_lines(path, POPE, {"question_id": int, "image": str, "text": str, "label": str})
    for number, row in enumerate(rows, start=1):
        if row["label"] not in ("yes", "no"):
            raise ValueError(
                f"{path}, line {number}: the label must be yes or no, not {row['label']!r}"
            )
    return rows


def read_pope_answers(path, questions):
    """The answers to `questions` (`read_pope`), as texts, from lines {"question", "answer"}.

    The official script joins the two files by their order alone. Here each line's question must be the one asked (capital
    letters apart), so that a shifted file is an error and not a score.
    """
    rows = _json_lines(path, OWN_ANSWERS, {"question": str, "answer": str})
    for number, (row, asked) in enumerate(zip(rows, questions, strict=False), start=1):
        if row["question"].strip().lower() != asked["text"].strip().lower():
            raise ValueError(
                f"{path}, line {number}: answers {row['question']!r}, but line {number} of the questions is {asked['text']!r}"
            )
    if len(rows) != len(questions):
        raise ValueError(
            f"{path}: {len(rows)} answers to {len(questions)} questions; line {min(len(rows), len(questions)) + 1} has no partner"
        )
    return [row["answer"] for row in rows]


def read_amber_queries(path):
    """AMBER's questions, e.g. query/query_all.json: [{"id", "image", "query"}]."""
    return _json_list(path, AMBER_QUERIES, {"id": int, "image": str, "query": str})


def read_amber(folder):
    """AMBER's truth, from its folder data: (annotations, associations, safe words).

    annotations.json: [{"id", "type", "truth", …}], which the official script finds by position, so ids must be 1, 2, 3, …;
    relation.json: {object: [words]}; safe_words.txt: one word a line.
    """
    path = Path(folder) / "annotations.json"
    annotations = _json_list(path, AMBER, {"id": int, "type": str, "truth": object})
    for number, row in enumerate(annotations, start=1):
        generative = row["type"] == "generative"
        if row["id"] != number:
            raise ValueError(
                f"{path}, entry {number}: its id is {row['id']}; the official script takes entry n for id n"
            )
        if not generative and row["truth"] not in ("yes", "no"):
            raise ValueError(
                f"{path}, entry {number}: the truth must be yes or no, not {row['truth']!r}"
            )
        if generative and not (
            isinstance(row["truth"], list) and isinstance(row.get("hallu"), list)
        ):
            raise ValueError(f"{path}, entry {number}: truth and hallu must be lists of objects")
    path = Path(folder) / "relation.json"
    associations = _decoded(_text(path, AMBER), path)
    if not isinstance(associations, dict) or not all(
        isinstance(words, list) for words in associations.values()
    ):
        raise ValueError(f"{path}: needed is one object {{name: [words]}}")
    return annotations, associations, _lines(Path(folder) / "safe_words.txt", AMBER)


def read_amber_responses(path):
    """A model's answers to AMBER: [{"id", "response"}]. `hallucination.amber_discriminative` says which id is unknown."""
    return _json_list(path, OWN_ANSWERS, {"id": int, "response": str})


def read_captions(path):
    """A model's captions for CHAIR: [{"image_id", "caption"}], from one JSON list (.json) or from lines (.jsonl).

    An image_id is COCO's whole number: as a text, "42", it would be unknown to the truth and all of its caption hallucinated.
    """
    read = _json_lines if str(path).endswith(".jsonl") else _json_list
    return read(path, OWN_ANSWERS, {"image_id": int, "caption": str})


def read_synonyms(path):
    """CHAIR's synonyms.txt as {word: category}: words of a line are parted by ", ", the first is the category.

    As in the official script, a second space belongs to the word (" cheesecake" in COCO's file, which no caption contains),
    and of two categories with the same word the later has it.
    """
    entries = [line.strip().split(", ") for line in _lines(path, SYNONYMS)]
    return {word: entry[0] for entry in entries for word in entry}


def read_coco(folder, synonyms, singular):
    """CHAIR's truth: {image id: set of categories}, those segmented in an image and those that its five captions name.

    Reads instances_{split}.json and captions_{split}.json for val2014 and train2014, as the official script does; arguments
    as for `caption_mentions`. An image id that is not in the result has no truth: officially, all that its caption names is wrong.
    """
    truths = {}
    for split in ("val2014", "train2014"):
        path = Path(folder) / f"instances_{split}.json"
        keys = {
            "categories": {"id": int, "name": str},
            "annotations": {"image_id": int, "category_id": int},
        }
        categories, objects = _json_sections(path, COCO, **keys)
        names = {row["id"]: row["name"] for row in categories}
        if unknown := sorted(set(names.values()) - set(synonyms)):
            raise ValueError(f"{path}: the category {unknown[0]} is not in the synonyms")
        for number, row in enumerate(objects, start=1):
            if row["category_id"] not in names:
                raise ValueError(
                    f"{path}, annotations, entry {number}: no category has the id {row['category_id']}"
                )
            truths.setdefault(row["image_id"], set()).add(synonyms[names[row["category_id"]]])
        path = Path(folder) / f"captions_{split}.json"
        (captions,) = _json_sections(path, COCO, annotations={"image_id": int, "caption": str})
        for row in captions:
            truths.setdefault(row["image_id"], set()).update(
                caption_mentions(row["caption"], synonyms, singular)
            )
    return truths
