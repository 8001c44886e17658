"""Preference pairs with none, one and several images, a system turn and several turns.

`dataset(rows)` holds them as `preferences.load` stores them.
"""

import io

from datasets import Dataset, Features
from PIL import Image

from utils.layouts import IMAGE_LIST, TEXT_FEATURES, stored_batch

IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def turn(role, *parts):
    return {"role": role, "content": list(parts)}


def stored(color, width=40, height=30, path=None):
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": path}


def row(images, prompt, chosen="A cup.", rejected="A dog and a cat."):
    return {
        "images": images,
        "prompt": prompt,
        "chosen": [turn("assistant", text(chosen))],
        "rejected": [turn("assistant", text(rejected))],
    }


RED = stored("red")
BLUE = stored("blue", 60, 20)
GREEN = stored("green", 20, 50)
SYSTEM = turn("system", text("Be brief."))

ONE = row([RED], [turn("user", IMAGE, text("What is it?"))])
NONE = row([], [turn("user", text("What is a cup?"))], "A thing.", "It is a dog.")
TWO = row([BLUE, GREEN], [turn("user", IMAGE, text("And"), IMAGE, text("differ in?"))], "Color.")
NONE_EITHER = row([], [turn("user", text("Who is there, and why?"))], "Nobody.", "A man.")
TURNS = row(
    [GREEN, RED],
    [
        turn("user", IMAGE, text("What is it?")),
        turn("assistant", text("A tree.")),
        turn("user", text("And now?"), IMAGE, text("Be exact.")),
    ],
    "A red field.",
    "The same.",
)
WITH_SYSTEM = row([BLUE], [SYSTEM, *ONE["prompt"]], "A sea.", "Two.")
ROWS = [ONE, NONE, TWO, WITH_SYSTEM, TURNS, NONE_EITHER]
# Batches of rows that no processor may refuse.
BATCHES = {
    "none, one and two images": [ONE, NONE, TWO],
    "text first": [NONE, ONE],
    "text alone": [NONE, NONE_EITHER],
    "several turns": [TURNS, NONE],
}


def dataset(rows=ROWS, **columns):
    """Return a `Dataset` of the rows. `columns`: {name: (values, feature)} of further ones."""
    features = {"images": IMAGE_LIST, **TEXT_FEATURES}
    stored_rows = []
    for number, one in enumerate(rows):
        further = {name: values[number] for name, (values, _) in columns.items()}
        stored_rows.append({"problem": None, **one, **further})
    features |= {name: feature for name, (_, feature) in columns.items()}
    made = Dataset.from_list(stored_rows, features=Features(features))
    if all(one["problem"] is None for one in stored_rows):
        made = made.remove_columns("problem")
    return made.with_transform(stored_batch)
