"""The same preference pairs in every layout of the field, with real JPEG files.

`write(name, folder)` writes the pairs that the layout `name` can hold and returns (what to load,
which pairs they are). `EXPECTED` has the rows that every layout must be read as.
"""

import base64
import csv
import io
import json

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PillowImage

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
QUESTION = "What is in the image?"


def jpeg(color):
    file = io.BytesIO()
    PillowImage.new("RGB", (48, 36), color).save(file, "JPEG")
    return file.getvalue()


PICTURES = {color: jpeg(color) for color in COLORS}


def text(role, *contents):
    """Return a message; None stands for an image."""
    parts = []
    for content in contents:
        if content is None:
            parts.append({"type": "image"})
        else:
            parts.append({"type": "text", "text": content})
    return {"role": role, "content": parts}


def pair(images, prompt, chosen, rejected):
    return {
        "images": images,
        "prompt": prompt,
        "chosen": [text("assistant", chosen)],
        "rejected": [text("assistant", rejected)],
    }


# "one" is the plain case; "plain" layouts can hold the first three.
EXPECTED = {
    "one": pair(["red"], [text("user", None, QUESTION)], "A red field.", "A dog."),
    "two": pair(
        ["green", "blue"], [text("user", None, None, "Compare them.")], "Green and blue.", "A cat."
    ),
    "none": pair([], [text("user", "What is a cup?")], "A thing to drink from.", "A cup is a dog."),
    "turns": pair(
        ["yellow", "purple"],
        [
            text("system", "Be brief."),
            text("user", None, "Is it yellow?"),
            text("assistant", "Yes."),
            text("user", "And this one: ", None, "?"),
        ],
        "No, purple.",
        "Yes, it is.",
    ),
}
PLAIN = ("one", "two", "none")
ALL = tuple(EXPECTED)


def said(messages, placeholder="<image>"):
    """Return [(role, text)], with a placeholder for every image."""
    turns = []
    for turn in messages:
        texts = [part.get("text", placeholder) for part in turn["content"]]
        turns.append((turn["role"], "".join(texts)))
    return turns


def question(row):
    """Return the text of a prompt of one turn, without a place for its images."""
    return said(row["prompt"], placeholder="")[-1][1]


def answer(row, name):
    return row[name][0]["content"][0]["text"]


def picture_paths(row, folder):
    """Write the images of `row` below `folder`. Return their relative paths."""
    paths = []
    for color in row["images"]:
        path = folder / "pictures" / f"{color}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PICTURES[color])
        paths.append(f"pictures/{color}.jpg")
    return paths


def bytes_of(row):
    return [{"bytes": PICTURES[color], "path": f"{color}.jpg"} for color in row["images"]]


def parquet(folder, rows, features=None):
    Dataset.from_list(rows, features=features).to_parquet(folder / "pairs.parquet")
    return folder


def jsonl(folder, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def sharegpt_turns(messages):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[role], "value": content} for role, content in said(messages)]


def rlaif_v(folder, rows):
    features = Features(
        {
            "image": Image(),
            "question": Value("string"),
            "chosen": Value("string"),
            "rejected": Value("string"),
            "origin_dataset": Value("string"),
        }
    )
    stored = []
    for row in rows:
        stored.append(
            {
                "image": (bytes_of(row) or [None])[0],
                "question": question(row),
                "chosen": answer(row, "chosen"),
                "rejected": answer(row, "rejected"),
                "origin_dataset": "here",
            }
        )
    return parquet(folder, stored, features)


def trl_parquet(folder, rows):
    part = {"type": Value("string"), "text": Value("string")}
    messages = List({"role": Value("string"), "content": List(part)})
    names = ("prompt", "chosen", "rejected")
    features = Features({"images": List(Image()), **dict.fromkeys(names, messages)})
    stored = []
    for row in rows:
        stored.append({**row, "images": bytes_of(row)})
    return parquet(folder, stored, features)


def trl_implicit(folder, rows):
    stored = []
    for row in rows:
        both = {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
        stored.append({"images": picture_paths(row, folder), **both})
    return jsonl(folder, stored)


def trl_strings(folder, rows):
    stored = []
    for row in rows:
        texts = {name: answer(row, name) for name in ("chosen", "rejected")}
        images = picture_paths(row, folder)
        stored.append({"images": images, "prompt": question(row), **texts})
    (folder / "pairs.json").write_text(json.dumps(stored), encoding="utf-8")
    return folder / "pairs.json"


def rlhf_v(folder, rows):
    stored = []
    for row in rows:
        texts = {name: answer(row, name) for name in ("chosen", "rejected")}
        encoded = json.dumps({"question": question(row), **texts})
        stored.append({"image": (bytes_of(row) or [None])[0], "text": encoded, "idx": 1})
    features = Features({"image": Image(), "text": Value("string"), "idx": Value("int64")})
    return parquet(folder, stored, features)


def sharegpt(folder, rows):
    stored = []
    for row in rows:
        stored.append(
            {
                "conversations": sharegpt_turns(row["prompt"]),
                "chosen": sharegpt_turns(row["chosen"])[0],
                "rejected": sharegpt_turns(row["rejected"])[0],
                "images": picture_paths(row, folder),
            }
        )
    (folder / "pairs.json").write_text(json.dumps(stored, indent=1), encoding="utf-8")
    return folder


def swift(folder, rows):
    stored = []
    for row in rows:
        turns = said(row["prompt"] + row["chosen"])
        messages = [{"role": role, "content": content} for role, content in turns]
        stored.append(
            {
                "messages": messages,
                "rejected_response": answer(row, "rejected"),
                "images": picture_paths(row, folder),
            }
        )
    return jsonl(folder, stored)


def swift_messages(folder, rows):
    stored = []
    for row in rows:
        both = {}
        for column, name in (("messages", "chosen"), ("rejected_messages", "rejected")):
            turns = said(row["prompt"] + row[name])
            both[column] = [{"role": role, "content": content} for role, content in turns]
        images = [base64.b64encode(PICTURES[color]).decode() for color in row["images"]]
        stored.append({**both, "images": images})
    return jsonl(folder, stored)


def openai(folder, rows):
    """Images stand inside the messages as `data:` addresses."""
    stored = []
    for row in rows:
        prompt = []
        colors = iter(row["images"])
        for turn in row["prompt"]:
            parts = []
            for part in turn["content"]:
                if part["type"] == "image":
                    encoded = base64.b64encode(PICTURES[next(colors)]).decode()
                    url = {"url": f"data:image/jpeg;base64,{encoded}"}
                    part = {"type": "image_url", "image_url": url}
                parts.append(part)
            prompt.append({"role": turn["role"], "content": parts})
        stored.append({**row, "prompt": prompt})
        del stored[-1]["images"]
    return jsonl(folder, stored)


def own_csv(folder, rows):
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "chosen", "rejected"])
        for row in rows:
            paths = picture_paths(row, folder)
            cell = json.dumps(paths) if len(paths) > 1 else "".join(paths)
            texts = [answer(row, name) for name in ("chosen", "rejected")]
            table.writerow([cell, question(row), *texts])
    return folder


# Name → (what writes it, the pairs it can hold, what `layouts.recognize` calls it).
LAYOUTS = {
    "RLAIF-V": (rlaif_v, ("one", "none"), "RLAIF-V"),
    "TRL": (trl_parquet, ALL, "TRL"),
    "TRL implicit": (trl_implicit, ALL, "TRL, implicit prompt"),
    "TRL strings": (trl_strings, PLAIN, "TRL"),
    "RLHF-V": (rlhf_v, ("one", "none"), "RLHF-V"),
    "ShareGPT": (sharegpt, ALL, "ShareGPT"),
    "ms-swift": (swift, ALL, "ms-swift"),
    "ms-swift messages": (swift_messages, ALL, "ms-swift"),
    "OpenAI content": (openai, ALL, "TRL"),
    "CSV": (own_csv, PLAIN, "RLAIF-V"),
}


def write(name, folder):
    """Return (what to load, names of the pairs) of the layout `name`, written into `folder`."""
    writer, pairs, _ = LAYOUTS[name]
    return str(writer(folder, [EXPECTED[pair] for pair in pairs])), pairs
