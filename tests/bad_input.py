"""Bad input, all in one place, with what happens to each.

The tests of bad input try these cases. `python -m tests.bad_input --write` lists them in
tests/README.md.
"""

import argparse
import dataclasses
import io
import json
import shutil
import struct
import threading
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from utils import chat, layouts, models, preferences, preflight, reference_cache, settings
from utils.preferences import NEARLY_IDENTICAL, NO_END

EMBEDDED = settings.PROFILES["embedded"]
TEXTS = dict.fromkeys(("prompt", "chosen", "rejected"), Value("string"))
FEATURES = Features({"images": List(Image()), **TEXTS})
FOLDER = Path(__file__).parent  # below which paths of images are looked for
WEIGHTS = "adapter_model.safetensors"
RED = PillowImage.new("RGB", (8, 6), "red")
BLUE = PillowImage.new("RGB", (8, 6), "blue")


def raw(data, path=None):
    return {"bytes": data, "path": path}


def stored(image, kind="PNG", name=None, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return raw(file.getvalue(), name)


def png(width, height):
    """Return a PNG file's header with next to nothing behind it."""
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(b"\0"),
        b"IEND": b"",
    }
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in parts.items():
        checksum = zlib.crc32(name + content)
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
    return raw(data)


def turned():
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    return stored(RED.resize((6, 8)), "JPEG", exif=exif)


GOOD = {
    "images": [stored(RED)],
    "prompt": "What is it?",
    "chosen": "A red field.",
    "rejected": "A dog.",
}
OTHER = {
    "images": [stored(BLUE)],
    "prompt": "What is this?",
    "chosen": "A blue field.",
    "rejected": "A dog.",
}
SWAPPED = {**GOOD, "chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}


def as_stored(*rows, features=FEATURES):
    rows = [{name: row[name] for name in features} for row in rows]
    return Dataset.from_list(rows, features=features)


def pairs(*rows, features=FEATURES):
    return layouts.as_rows(as_stored(*rows, features=features), root=FOLDER)


# What `chat.within_budget` does with a row that was not dropped before.
KEPT = "kept"
DROPPED = "dropped"
LATE = "late"  # kept, because only its header is read; reading the row raises


class Row(NamedTuple):
    """A row that is like OTHER except for `change`."""

    name: str
    change: dict
    problem: str | None  # what `preferences.check` calls it
    # KEPT, DROPPED, LATE, or else a fact in the error that refuses it. Without a problem, the row
    # could not be read, and the fact also stands in what `check` reports.
    outcome: str


def image_row(name, image, problem=None, outcome=KEPT):
    return Row(name, {"images": [image]}, problem, outcome)


UNREADABLE = "unreadable image"
MISSING = "missing image"
QUESTION = "'What is this?'"
HTML = b"<!DOCTYPE html><title>404</title>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
FLOATS = stored(PillowImage.new("F", (8, 6), 0.5), "TIFF")
SIXTEEN_BITS = stored(PillowImage.new("I;16", (8, 6), 700))
ANIMATED = stored(RED, "GIF", save_all=True, append_images=[BLUE])
TRANSPARENT = stored(PillowImage.new("RGBA", (8, 6), (0, 0, 255, 40)))
NOISY = stored(PillowImage.effect_noise((64, 48), 50), "JPEG")
CUT_OFF = raw(NOISY["bytes"][: len(NOISY["bytes"]) // 2])
TURN = "<end_of_utterance>"

ROWS = [
    image_row("an image cut off in the middle", CUT_OFF, UNREADABLE, LATE),
    image_row("an empty image file", raw(b""), MISSING, QUESTION),
    image_row("an image of zero width", png(0, 6), UNREADABLE, QUESTION),
    image_row("a hundred megapixels", png(10_001, 10_000), "image too large", "100010000"),
    image_row("a page of HTML called .jpg", raw(HTML, "a.jpg"), UNREADABLE, "a.jpg"),
    image_row("a drawing in SVG", raw(SVG), UNREADABLE, QUESTION),
    image_row("the path of a missing image", raw(None, "lost.png"), MISSING, "lost.png"),
    image_row("the path of an image outside", raw(None, "../red.png"), None, "'../red.png'"),
    image_row("a URL instead of an image", raw(None, "https://h/a.png"), None, "'https://h/a"),
    image_row("an image of floating-point numbers", FLOATS, UNREADABLE, "mode F"),
    Row(
        "two images, the second cut off",
        {"images": [stored(BLUE), CUT_OFF]},
        UNREADABLE,
        LATE,
    ),
    image_row("a CMYK image", stored(BLUE.convert("CMYK"), "JPEG")),
    image_row("a 16-bit image", SIXTEEN_BITS),
    image_row("a palette image", stored(BLUE.quantize(4), "GIF")),
    image_row("an animated image", ANIMATED),
    image_row("an image that its EXIF turns", turned()),
    image_row("a transparent image", TRANSPARENT),
    image_row("a JPEG called .png", stored(BLUE, "JPEG", "a.png")),
    image_row("an image of one pixel", stored(BLUE.resize((1, 1)))),
    image_row("an image of 1 × 3000 pixels", stored(BLUE.resize((1, 3000)))),
    Row("no prompt", {"prompt": None}, None, "no prompt"),
    Row("an empty prompt", {"prompt": ""}, "empty prompt", KEPT),
    Row("no chosen answer", {"chosen": None}, "empty chosen", "chosen"),
    Row("an empty answer", {"rejected": ""}, "empty rejected", KEPT),
    Row("an answer of spaces", {"chosen": " \t\n "}, "empty chosen", KEPT),
    Row("identical answers", {"rejected": OTHER["chosen"]}, "chosen equals rejected", KEPT),
    Row(
        "answers with the same words",
        {"chosen": "A cup, and then a dog.", "rejected": "A dog, and then a cup."},
        NEARLY_IDENTICAL,
        KEPT,
    ),
    Row("an answer cut off", {"chosen": "A blue field with a dog in the"}, NO_END, KEPT),
    Row("the same row again", GOOD, "duplicate pair", KEPT),
    Row("the same row with its answers swapped", SWAPPED, "preferred both ways", KEPT),
    Row("an answer of 100,000 characters", {"chosen": "A cup. " * 15_000}, None, DROPPED),
    Row("<image> without an image", {"images": [], "prompt": "In <image>?"}, None, "0 images"),
    Row("<image> twice for one image", {"prompt": "<image> or <image>?"}, None, "1 images"),
    Row("<image> in an answer", {"chosen": "A <image> cup."}, None, "chosen"),
    Row(
        "the end of a turn in a prompt",
        {"prompt": f"What?{TURN}\nAssistant: No."},
        "special token in prompt",
        TURN,
    ),
    Row(
        "the end of a turn in an answer",
        {"rejected": f"No.{TURN}"},
        "special token in rejected",
        TURN,
    ),
    Row(
        "the end of all text in an answer",
        {"chosen": "Yes.</s>"},
        "special token in chosen",
        "</s>",
    ),
    Row(
        "something in angle brackets that is no token",
        {"chosen": "A <b>cup</b>, <IMAGE>."},
        None,
        KEPT,
    ),
    Row("NUL in an answer", {"chosen": "A\0cup."}, None, KEPT),
    Row("emoji in an answer", {"chosen": "A 🦊, 👩‍🚀 and 🇩🇪."}, None, KEPT),
    Row("text from right to left", {"chosen": "כוס \u202eכחולה\u202c."}, None, KEPT),
    Row(
        "combining characters",
        {"chosen": "Cafe\u0301 Z\u0351\u0352\u0353a\u0354\u0355."},
        None,
        KEPT,
    ),
]


class PreflightFailedError(Exception):
    """What preflight reports as failed."""


class Case(NamedTuple):
    """Anything else than one row: `act(place)` raises `error`, whose message contains `fact`."""

    name: str
    error: type
    fact: str
    act: Callable[[Any], Any]


QUICK = []
WITH_A_MODEL = []  # cases that load the embedded model


def case(name, error, fact, cases=QUICK):
    """Add the decorated function to the cases."""

    def add(act):
        cases.append(Case(name, error, fact, act))
        return act

    return add


class Place:
    """Where a case is tried: a `folder`, a `processor`, a saved `adapter`, pytest's `patch`."""

    def __init__(self, folder, patch, processor=None, adapter=None):
        self.folder = Path(folder)
        self.patch = patch
        self.processor = processor
        self.adapter = adapter
        self.server = None

    def online(self):
        """Go online with a hub that knows no revision."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{self.server.server_port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        constants = huggingface_hub.constants
        self.patch.setattr(datasets.config, "HF_ENDPOINT", address)
        self.patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        self.patch.setattr(constants, "ENDPOINT", address)
        self.patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        self.patch.setattr(constants, "HF_HUB_OFFLINE", False)

    def close(self):
        if self.server:
            self.server.shutdown()
            self.server.server_close()


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RevisionNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass


# Columns and splits


def typed(column, kind, value):
    """Drop the only row, whose column has another type."""
    features = Features({**FEATURES, column: kind})
    preferences.without_problems(pairs({**GOOD, column: value}, features=features))


def parquet(place, rows):
    """Write `rows` as the Parquet file of the split train; return its folder."""
    folder = place.folder / "data"
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet")
    return folder


@case("a missing column", ValueError, "chosen")
def missing_column(place):
    chat.format_dataset(pairs(GOOD).remove_columns("chosen"))


@case("a renamed column", ValueError, "images, prompt, winner, rejected")
def renamed_column(place):
    rows = as_stored(GOOD).rename_column("chosen", "winner")
    preferences.load(str(parquet(place, rows)), "train")


@case("no column of images", ValueError, "images")
def no_column_of_images(place):
    rows = as_stored(GOOD).remove_columns("images")
    preferences.load(str(parquet(place, rows)), "train")


@case("rows that were not converted", ValueError, "question")
def not_converted(place):
    chat.format_dataset(as_stored(GOOD).rename_column("prompt", "question"))


@case("numbers as prompts", ValueError, "prompt holds int")
def numbers_as_prompts(place):
    typed("prompt", Value("int64"), 7)


@case("lists of text as answers", ValueError, "chosen holds str")
def lists_as_answers(place):
    typed("chosen", List(Value("string")), ["Yes."])


@case("numbers as images", ValueError, "int")
def numbers_as_images(place):
    typed("images", Value("int64"), 7)


def budget(place, rows, tokens):
    return chat.within_budget(chat.format_dataset(rows), place.processor, tokens)


@case("a data set without rows", ValueError, "0 rows")
def no_rows(place):
    budget(place, pairs(GOOD).select([]), 256)


@case("a data set without rows, described", ValueError, "no rows")
def no_rows_described(place):
    preferences.describe(pairs(GOOD).select([]))


@case("all rows dropped", ValueError, "5 tokens")
def all_rows_dropped(place):
    budget(place, pairs(GOOD, OTHER), 5)


@case("a wrong split", ValueError, "embedded/dataset, split dev, revision main")
def wrong_split(place):
    preferences.load("embedded/dataset", "dev")


@case("an empty split", ValueError, "train[:0]")
def empty_split(place):
    preferences.load("embedded/dataset", "train[:0]")


@case("a misspelled split", ValueError, "train[5:")
def misspelled_split(place):
    preferences.load("embedded/dataset", "train[5:")


@case("a missing folder", OSError, "no/such/folder")
def missing_folder(place):
    preferences.load("no/such/folder", "train")


def cut_parquet(place, share):
    """Load a Parquet file of which only the first part was written."""
    folder = parquet(place, as_stored(GOOD, OTHER))
    data = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(data[: int(len(data) * share)])
    preferences.load(str(folder), "train")


@case("a half-written Parquet file", ValueError, "train.parquet")
def half_written_parquet(place):
    cut_parquet(place, 0.5)


@case("an empty Parquet file", ValueError, "train.parquet")
def empty_parquet(place):
    cut_parquet(place, 0)


# The hub and this repository


@case("a hub that cannot be reached", ConnectionError, "owner/pairs")
def unreachable_hub(place):
    preferences.load("owner/pairs", "train")


@case("a wrong revision", FileNotFoundError, "0000")
def wrong_revision(place):
    place.online()
    preferences.load("owner/pairs", "train", "0" * 40)


ON_THE_HUB = dataclasses.replace(EMBEDDED, model="owner/model")


@case("no hub for the processor", OSError, "owner/model")
def no_hub_for_the_processor(place):
    models.load_processor(ON_THE_HUB)


@case("no hub for the model", OSError, "owner/model")
def no_hub_for_the_model(place):
    models.load_model(ON_THE_HUB)


@case("a missing embedded file", FileNotFoundError, "embedded/model/")
def missing_embedded_file(place):
    (place.folder / "embedded").mkdir()
    shutil.copy(settings.ROOT / "embedded" / "manifest.json", place.folder / "embedded")
    settings.verify_embedded("model", place.folder)


@case("an unknown VLM_DPO_PROFILE", ValueError, "VLM_DPO_PROFILE")
def unknown_profile(place):
    place.patch.setenv("VLM_DPO_PROFILE", "typo")
    settings.load()


@case("an empty VLM_DPO_PROFILE", ValueError, "VLM_DPO_PROFILE")
def empty_profile(place):
    place.patch.setenv("VLM_DPO_PROFILE", "")
    settings.load()


# Files of pairs


def own(place, name, text):
    """Load a file with an image beside it, and drop the rows that cannot be trained on."""
    RED.save(place.folder / "red.png")
    data = text if isinstance(text, bytes) else text.encode()
    (place.folder / name).write_bytes(data)
    preferences.without_problems(preferences.load(str(place.folder)))


def line(**changes):
    return json.dumps({**GOOD, "images": ["red.png"], **changes})


HEAD = "images,prompt,chosen,rejected\n"


@case("own pairs, a missing folder", FileNotFoundError, "lost, neither")
def own_without_a_folder(place):
    preferences.load(str(place.folder / "lost"))


@case("own pairs, a missing file", FileNotFoundError, "my/lost.jsonl")
def own_without_a_file(place):
    preferences.load("my/lost.jsonl")


@case("own pairs, two files", FileNotFoundError, "pairs.csv, pairs.jsonl")
def own_two_files(place):
    (place.folder / "pairs.csv").write_text(HEAD)
    own(place, "pairs.jsonl", line())


@case("own pairs, an empty file", ValueError, "pairs.jsonl")
def own_empty_file(place):
    own(place, "pairs.jsonl", "")


@case("own pairs, not UTF-8", ValueError, "line 1: not UTF-8")
def own_not_utf8(place):
    text = line(chosen="Gr*n.").replace("*", "ü")
    own(place, "pairs.jsonl", text.encode("latin-1"))


@case("own pairs, not JSON", ValueError, "line 1: not JSON")
def own_not_json(place):
    own(place, "pairs.jsonl", "{")


@case("own pairs, JSON cut off", ValueError, "line 2: not JSON")
def own_json_cut_off(place):
    own(place, "pairs.json", f"[{line()},\n{{")


@case("own pairs, brackets without end", ValueError, "line 1")
def own_endless_brackets(place):
    own(place, "pairs.jsonl", "[" * 100_000)


@case("own pairs, a number of 5,000 digits", ValueError, "line 1")
def own_endless_number(place):
    own(place, "pairs.jsonl", "1" * 5000)


@case("own pairs, a name twice in a row", ValueError, "chosen")
def own_name_twice(place):
    own(place, "pairs.jsonl", line()[:-1] + ', "chosen": "B"}')


@case("own pairs, half a character", ValueError, "line 1: half a character")
def own_half_character(place):
    own(place, "pairs.jsonl", line(chosen="\ud83e"))


@case("own pairs, a number as an answer", ValueError, "line 1: chosen")
def own_number(place):
    own(place, "pairs.jsonl", line(chosen=1))


@case("own pairs, NUL in an image's name", ValueError, r"'a\x00.png'")
def own_nul(place):
    own(place, "pairs.jsonl", line(images=["a\0.png"]))


@case("own pairs, an endless image's name", ValueError, "missing image")
def own_endless_name(place):
    own(place, "pairs.jsonl", line(images=["ä" * 5000]))


@case("own pairs, an image outside", ValueError, "'../red.png'")
def own_outside(place):
    own(place, "pairs.jsonl", line(images=["../red.png"]))


@case("own pairs, a column twice", ValueError, "line 1: column chosen")
def own_column_twice(place):
    own(place, "pairs.csv", HEAD.replace("rejected", "chosen,rejected"))


@case("own pairs, a comma without quotes", ValueError, "line 2: 5 values for 4 columns")
def own_comma(place):
    own(place, "pairs.csv", f"{HEAD}red.png,What?,Red, all of it,Blue\n")


@case("own pairs, a million characters in a cell", ValueError, "line 2")
def own_endless_cell(place):
    own(place, "pairs.csv", f"{HEAD}red.png,What?,{'A cup. ' * 150_000},Blue\n")


# Questions


@case("asking without an image", ValueError, "0 images")
def ask_without_an_image(place):
    chat.inference_batch([], [], place.processor)


@case("asking once about two images", ValueError, "2 images and 1 questions")
def ask_once_about_two(place):
    chat.inference_batch([RED, BLUE], ["What?"], place.processor)


@case("asking nothing", ValueError, "question")
def ask_nothing(place):
    chat.inference_batch([RED], [None], place.processor)


@case("asking with <image> in the question", ValueError, "<image>")
def ask_with_a_special_token(place):
    chat.inference_batch([RED], ["<image>?"], place.processor)


# Machines


def failed(finding):
    if finding["result"] == preflight.FAILED:
        raise PreflightFailedError(preflight.as_text([finding]))


def checkpoints(place, output, free):
    """Check the disk for a run with checkpoints in `output` and `free` bytes."""
    usage = SimpleNamespace(free=free)
    place.patch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    args = SimpleNamespace(
        output_dir=str(output),
        train_batch_size=1,
        gradient_accumulation_steps=1,
        world_size=1,
        max_steps=9,
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
    )
    model = torch.nn.Linear(9, 9)
    failed(preflight.check_disk(SimpleNamespace(args=args, train_dataset=[], model=model)))


@case("an output folder that cannot be written", PreflightFailedError, "output_dir")
def unwritable_output(place):
    (place.folder / "file").touch()
    checkpoints(place, place.folder / "file" / "runs", 1e12)


@case("a full disk", PreflightFailedError, "save_total_limit")
def full_disk(place):
    checkpoints(place, place.folder, 1000)


@case("a GPU with too little memory for a step", PreflightFailedError, "batch_size")
def little_memory(place):
    place.patch.setattr(preflight, "free_bytes", lambda _: 2e9)
    args = SimpleNamespace(
        device=torch.device("cuda"), per_device_train_batch_size=4, gradient_checkpointing=True
    )
    trainer = SimpleNamespace(args=args)
    failed(preflight.check_memory(settings.PROFILES["smolvlm"], trainer, 500))


@case("a GPU with too little memory for the model", torch.OutOfMemoryError, "four_bit=True")
def out_of_memory(place):
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    place.patch.setattr(AutoModelForImageTextToText, "from_pretrained", load)
    models.load_model(EMBEDDED)


# Adapters and caches


@case("no adapter", FileNotFoundError, "adapter_config.json")
def no_adapter(place):
    models.load_tuned(EMBEDDED, place.folder)


def copy_adapter(place):
    """Return the file of weights of a copy of the adapter."""
    folder = place.folder / "adapter"
    shutil.copytree(place.adapter, folder)
    return folder / WEIGHTS


@case("an adapter without weights", FileNotFoundError, WEIGHTS, WITH_A_MODEL)
def adapter_without_weights(place):
    file = copy_adapter(place)
    file.unlink()
    models.load_tuned(EMBEDDED, file.parent)


@case("an adapter cut off", ValueError, "embedded/model", WITH_A_MODEL)
def adapter_cut_off(place):
    file = copy_adapter(place)
    file.write_bytes(file.read_bytes()[:-100])
    models.load_tuned(EMBEDDED, file.parent)


@case("an empty adapter", ValueError, "embedded/model", WITH_A_MODEL)
def empty_adapter(place):
    file = copy_adapter(place)
    file.write_bytes(b"")
    models.load_tuned(EMBEDDED, file.parent)


@case("an adapter that lacks a layer", ValueError, "embedded/model", WITH_A_MODEL)
def adapter_without_a_layer(place):
    file = copy_adapter(place)
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.0.mlp" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})
    models.load_tuned(EMBEDDED, file.parent)


@case("an adapter of another rank than it says", ValueError, "embedded/model", WITH_A_MODEL)
def adapter_of_another_rank(place):
    file = copy_adapter(place)
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = tensor[:, :3].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    models.load_tuned(EMBEDDED, file.parent)


@case("a damaged reference cache", ValueError, "reference.safetensors")
def damaged_cache(place):
    (place.folder / "reference.safetensors").write_bytes(b"half")
    reference_cache.read_log_probs(place.folder / "reference.safetensors")


# The list in tests/README.md

README = settings.ROOT / "tests" / "README.md"
BEGIN = "<!-- written by python -m tests.bad_input --write -->"
END = "<!-- end of what it writes -->"


def what_happens(row):
    """Return what happens to a bad row, as a sentence."""
    if row.outcome == DROPPED:
        text = "dropped by `within_budget`, counted, its number reported"
    elif row.outcome == LATE:
        text = "kept by `within_budget`, refused with its question when it is read"
    elif row.outcome != KEPT:
        text = f"refused with its number and “{row.outcome}”"
        if row.problem is None:
            text = f"`check` says so; {text}"
    elif list(row.change) == ["images"]:
        text = "kept, and seen as people see it"
    else:
        text = "kept, and no character is lost"
    if row.problem in preferences.WARNINGS:
        return f"`check` reports “{row.problem}”, which is a warning; {text}"
    return f"`check` reports “{row.problem}”; {text}" if row.problem else text


def as_markdown():
    """Return the cases as two tables."""
    cases = [*QUICK, *WITH_A_MODEL]
    lines = [
        f"<details><summary>The {len(ROWS) + len(cases)} cases</summary>",
        "",
        "| a row with | what happens |",
        "|---|---|",
    ]
    for row in ROWS:
        lines.append(f"| {row.name} | {what_happens(row)} |".replace("<", "&lt;"))
    lines += ["", "| other bad input | what happens |", "|---|---|"]
    for other in cases:
        kind = f"`{other.error.__name__}`"
        if other.error is PreflightFailedError:
            kind = "preflight fails"
        lines.append(f"| {other.name} | {kind}, naming “{other.fact}” |".replace("<", "&lt;"))
    lines += ["", "</details>"]
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.bad_input", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write the list to {README.name}")
    options = parser.parse_args(arguments)
    if not options.write:
        print(as_markdown())
        return
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    text = f"{before}{BEGIN}\n\n{as_markdown()}\n\n{END}{after}"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
