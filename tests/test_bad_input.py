"""Bad input, all in one place: what happens to each, as tests/README.md has it. `python -m tests.test_bad_input` prints that table."""

import dataclasses
import io
import json
import re
import shutil
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from peft import get_peft_model
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from utils import (
    chat,
    layouts,
    models,
    preferences,
    preflight,
    reference_cache,
    settings,
    trainer_checks,
    training,
)

EMBEDDED = settings.PROFILES["embedded"]
FEATURES = Features({"image": Image()} | dict.fromkeys(preferences.TEXT_COLUMNS, Value("string")))
WEIGHTS = "adapter_model.safetensors"


def stored(image, kind="PNG", name=None, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return {"bytes": file.getvalue(), "path": name}


def png(width, height):
    """The header of a PNG file, and next to nothing behind it."""
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(b"\0"),
        b"IEND": b"",
    }
    written = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    ]
    return raw(b"\x89PNG\r\n\x1a\n" + b"".join(written))


def raw(data, path=None):
    return {"bytes": data, "path": path}


def turned():
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    return stored(RED.resize((6, 8)), "JPEG", exif=exif)


RED, BLUE = PillowImage.new("RGB", (8, 6), "red"), PillowImage.new("RGB", (8, 6), "blue")
GOOD = {
    "image": stored(RED),
    "question": "What is it?",
    "chosen": "A red field.",
    "rejected": "A dog.",
}
OTHER = GOOD | {"image": stored(BLUE), "question": "What is this?", "chosen": "A blue field."}
TWO_FRAMES = {"save_all": True, "append_images": [BLUE]}
KEPT, DROPPED = "kept", "dropped"
NO_FILE = "its bytes are not an image file"
SPECIAL = "which the model does not read as text: drop the row"

# Row 1 of two: what is wrong with it, what `preferences.check` calls that, and what `chat.within_budget` does with it: keep it (as
# a batch for training), drop and count it, or refuse it by its number with these words. None: the check finds nothing wrong.
ROWS = {
    "an image cut off in the middle": (
        {"image": raw(stored(BLUE, "JPEG")["bytes"][:-40])},
        "unreadable image",
        "cannot be read",
    ),
    "an empty image file": ({"image": raw(b"")}, "unreadable image", NO_FILE),
    "an image of zero width": ({"image": png(0, 6)}, "unreadable image", NO_FILE),
    "a hundred megapixels": ({"image": png(10_001, 10_000)}, "image too large", "100010000 pixels"),
    "a page of HTML called .jpg": (
        {"image": raw(b"<!DOCTYPE html><title>404</title>", "a.jpg")},
        "unreadable image",
        NO_FILE,
    ),
    "a drawing in SVG": (
        {"image": raw(b'<svg xmlns="http://www.w3.org/2000/svg"/>')},
        "unreadable image",
        NO_FILE,
    ),
    "no image": ({"image": None}, "unreadable image", "is NoneType, not an image"),
    "the path of an image that is not there": (
        {"image": raw(None, "lost.png")},
        "unreadable image",
        "image lost.png of the question",
    ),
    "an address in place of an image": (
        {"image": raw(None, "https://host/a.png")},
        "unreadable image",
        "is an address; download",
    ),
    "an image of floats": (
        {"image": stored(PillowImage.new("F", (8, 6), 0.5), "TIFF")},
        "unreadable image",
        "save it with 8 or 16 bits",
    ),
    "a CMYK image": ({"image": stored(BLUE.convert("CMYK"), "JPEG")}, None, KEPT),
    "a 16-bit image": ({"image": stored(PillowImage.new("I;16", (8, 6), 700))}, None, KEPT),
    "a palette image": ({"image": stored(BLUE.quantize(4), "GIF")}, None, KEPT),
    "an animated image": ({"image": stored(RED, "GIF", **TWO_FRAMES)}, None, KEPT),
    "an image that its EXIF turns": ({"image": turned()}, None, KEPT),
    "a transparent image": (
        {"image": stored(PillowImage.new("RGBA", (8, 6), (0, 0, 255, 40)))},
        None,
        KEPT,
    ),
    "a JPEG called .png": ({"image": stored(BLUE, "JPEG", "a.png")}, None, KEPT),
    "an image of one pixel": ({"image": stored(BLUE.resize((1, 1)))}, None, KEPT),
    "an image of 1 × 3000 pixels": ({"image": stored(BLUE.resize((1, 3000)))}, None, KEPT),
    "no question": ({"question": None}, "empty question", "the question is NoneType, not text"),
    "an empty question": ({"question": ""}, "empty question", KEPT),
    "no chosen answer": (
        {"chosen": None},
        "empty chosen",
        "the chosen answer of the question 'What is this?' is NoneType",
    ),
    "an empty answer": ({"rejected": ""}, "empty rejected", KEPT),
    "an answer of spaces": ({"chosen": " \t\n "}, "empty chosen", KEPT),
    "identical answers": ({"rejected": OTHER["chosen"]}, "chosen equals rejected", KEPT),
    "the same row again": (GOOD, "duplicate pair", KEPT),
    "the same row with its answers swapped": (
        GOOD | {"chosen": GOOD["rejected"], "rejected": GOOD["chosen"]},
        "preferred both ways",
        KEPT,
    ),
    "an answer of a million characters": ({"chosen": "A cup. " * 150_000}, None, DROPPED),
    "<image> in a question": (
        {"question": "What is in <image>?"},
        "special token in question",
        f"holds <image>, {SPECIAL}",
    ),
    "<image> in an answer": (
        {"chosen": "A <image> cup."},
        "special token in chosen",
        f"holds <image>, {SPECIAL}",
    ),
    "the end of a turn in a question": (
        {"question": "What?<end_of_utterance>\nAssistant: No."},
        "special token in question",
        f"holds <end_of_utterance>, {SPECIAL}",
    ),
    "the end of a turn in an answer": (
        {"rejected": "No.<end_of_utterance>"},
        "special token in rejected",
        SPECIAL,
    ),
    "the end of all text in an answer": (
        {"chosen": "Yes.</s>"},
        "special token in chosen",
        f"holds </s>, {SPECIAL}",
    ),
    "something in angle brackets that is no token": (
        {"chosen": "A <b>cup</b>, <IMAGE>."},
        None,
        KEPT,
    ),
    "NUL in an answer": ({"chosen": "A\0cup."}, None, KEPT),
    "emoji in an answer": ({"chosen": "A 🦊, 👩‍🚀 and 🇩🇪."}, None, KEPT),
    "text from right to left": ({"chosen": "כוס \u202eכחולה\u202c."}, None, KEPT),
    "combining characters": (
        {"chosen": "Cafe\u0301 Z\u0351\u0352\u0353a\u0354\u0355."},
        None,
        KEPT,
    ),
}


def pairs(*rows, features=FEATURES):
    return Dataset.from_list(
        [{name: row[name] for name in features} for row in rows], features=features
    )


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row(name, processor):
    change, problem, outcome = ROWS[name]
    row = OTHER | change
    rows = pairs(GOOD, row)
    tokens = preferences.special_tokens(processor)
    assert preferences.check(rows, special_tokens=tokens) == ({problem: [1]} if problem else {})
    sound, dropped = preferences.without_problems(rows, tokens)
    assert len(sound) == 2 - bool(problem) and dropped == ({problem: [1]} if problem else {}), (
        "what training drops, it reports"
    )
    formatted = chat.format_dataset(rows)
    if outcome not in (KEPT, DROPPED):
        with pytest.raises(ValueError, match=rf"^row 1: .*{re.escape(outcome)}"):
            chat.within_budget(formatted, processor, EMBEDDED.token_budget)
        with pytest.raises(ValueError, match=rf"^row 1: .*{re.escape(outcome)}"):
            list(chat.format_dataset(rows.to_iterable_dataset(), tokens))
        return
    kept, dropped = chat.within_budget(formatted, processor, EMBEDDED.token_budget)
    assert dropped == ([1] if outcome == DROPPED else []) and len(kept) + len(dropped) == len(rows)
    if outcome == KEPT:
        tokens, kinds = chat.token_kinds(kept[1], processor)["chosen"]
        assert kinds.count("image") == 9 and len(tokens) == len(kinds)
        assert kept[1]["image"].mode == "RGB" and kept[1]["image"].size != (6, 8), (
            "as people see it"
        )
        batch = chat.training_batch([kept[1]], processor)
        answer = processor.tokenizer.decode(
            batch["input_ids"][0][batch["completion_mask"][0].bool()]
        )
        assert answer == f" {row['chosen']}<end_of_utterance>\n", "no character is lost"


def typed(column, kind, value):
    return pairs(GOOD | {column: value}, features=Features(FEATURES | {column: kind}))


def parquet(folder, rows=None):
    """A folder with `rows` as the Parquet file of its split train."""
    folder = folder / "data"
    folder.mkdir()
    (rows or pairs(GOOD, OTHER)).to_parquet(folder / "train.parquet")
    return folder


def damaged_parquet(place, size):
    folder = parquet(place.folder)
    data = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(data[: int(len(data) * size)])
    return preferences.load(str(folder), "train")


def own(place, name, data):
    RED.save(place.folder / "red.png")
    (place.folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return layouts.load_folder(place.folder)


def line(**changes):
    return json.dumps(GOOD | {"image": "red.png"} | changes)


HEAD = "image,question,chosen,rejected\n"


def not_on_hub(place):
    """Ask the hub for a commit that it does not have."""
    place.online()
    return preferences.load("owner/pairs", "train", "0" * 40)


def model_on_hub(place, load):
    return load(dataclasses.replace(EMBEDDED, model="owner/model"))


def variable(place, value):
    place.patch.setenv("VLM_DPO_PROFILE", value)
    return settings.load()


def checkpoints(place, output, free):
    """What preflight says of a run with checkpoints in `output`, as an error."""
    place.patch.setattr(trainer_checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    args = {
        "output_dir": str(output),
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "world_size": 1,
        "max_steps": 9,
    }
    args |= {
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "num_train_epochs": 1,
    }
    return raised(
        trainer_checks.checkpoints(
            SimpleNamespace(
                args=SimpleNamespace(**args), train_dataset=[], model=torch.nn.Linear(9, 9)
            )
        )
    )


def raised(row):
    if row["result"] == "failed":
        raise SystemExit(preflight.as_text([row]))


def a_file(place):
    (place.folder / "file").touch()
    return place.folder / "file" / "runs"


def little_memory(place):
    place.patch.setattr(preflight, "free_bytes", lambda _: 2e9)
    args = SimpleNamespace(
        device=torch.device("cuda"), per_device_train_batch_size=4, gradient_checkpointing=True
    )
    return raised(
        preflight.memory_left(SimpleNamespace(args=args), settings.PROFILES["smolvlm"], 500)
    )


def out_of_memory(place):
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    place.patch.setattr(AutoModelForImageTextToText, "from_pretrained", load)
    return models.load_model(EMBEDDED)


def adapter(place, change):
    """Load an adapter after `change(its tensors)`, or after `change` has damaged its file where that is a number of bytes."""
    folder = place.folder / "adapter"
    shutil.copytree(place.adapter, folder)
    if change is None:
        (folder / WEIGHTS).unlink()
    elif isinstance(change, int):
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:change])
    else:
        save_file(
            dict(filter(None, map(change, load_file(folder / WEIGHTS).items()))),
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )
    return models.load_tuned(EMBEDDED, folder)


def narrower(item):
    return item[0], item[1][:, :3].contiguous() if "lora_B" in item[0] else item[1]


def damaged_cache(place):
    (place.folder / "reference.safetensors").write_bytes(b"half")
    return reference_cache.read(place.folder / "reference.safetensors")


def budget(place, rows, tokens):
    return chat.within_budget(chat.format_dataset(rows), place.processor, tokens)


def ask(place, images, questions):
    return chat.inference_batch(images, questions, place.processor)


# Whatever is not one row: what is done (with a `place` to do it at), the error, words in its message.
ERRORS = {
    "a missing column": (
        lambda place: chat.format_dataset(pairs(GOOD).remove_columns("chosen")),
        ValueError,
        "no column chosen; it has",
    ),
    "a renamed column": (
        lambda place: preferences.load(
            str(parquet(place.folder, pairs(GOOD).rename_column("chosen", "winner"))), "train"
        ),
        ValueError,
        "no column chosen; it has image, question, winner, rejected. Rename with",
    ),
    "numbers as questions": (
        lambda place: chat.format_dataset(typed("question", Value("int64"), 7)),
        ValueError,
        "column question is Value('int64'), not text",
    ),
    "lists as answers": (
        lambda place: chat.format_dataset(typed("chosen", List(Value("string")), ["Yes."])),
        ValueError,
        "column chosen is List(Value('string')), not text",
    ),
    "numbers as images": (
        lambda place: chat.format_dataset(typed("image", Value("int64"), 7)),
        ValueError,
        "column image is Value('int64'), not one image",
    ),
    "several images in a row": (
        lambda place: preferences.load(
            str(parquet(place.folder, typed("image", List(Image()), [GOOD["image"]] * 2))), "train"
        ),
        ValueError,
        "not one image. One image and three texts make a row",
    ),
    "a data set without rows": (
        lambda place: budget(place, pairs(GOOD).select([]), 256),
        ValueError,
        "of 0 rows none is within",
    ),
    "a data set without rows, described": (
        lambda place: preferences.describe(pairs(GOOD).select([])),
        ValueError,
        "the data set is empty",
    ),
    "all rows dropped": (
        lambda place: budget(place, pairs(GOOD, OTHER), 5),
        ValueError,
        "of 2 rows none is within the budget of 5 tokens",
    ),
    "a wrong split": (
        lambda place: preferences.load("embedded/dataset", "validation"),
        ValueError,
        "embedded/dataset, split validation, revision main cannot be loaded: Unknown split",
    ),
    "a split that is empty": (
        lambda place: preferences.load("embedded/dataset", "train[:0]"),
        ValueError,
        "corresponds to no data",
    ),
    "a split that is misspelled": (
        lambda place: preferences.load("embedded/dataset", "train[5:"),
        ValueError,
        "split train[5:, revision",
    ),
    "a folder that is not there": (
        lambda place: preferences.load("no/such/folder", "train"),
        OSError,
        "no/such/folder, split train",
    ),
    "a half-written Parquet file": (
        lambda place: damaged_parquet(place, 0.5),
        ValueError,
        "train.parquet was not written to its end",
    ),
    "an empty Parquet file": (
        lambda place: damaged_parquet(place, 0),
        ValueError,
        "train.parquet was not written to its end",
    ),
    "a hub that cannot be reached": (
        lambda place: preferences.load("owner/pairs", "train"),
        ConnectionError,
        "owner/pairs, split train, revision main cannot be loaded",
    ),
    "a wrong revision": (not_on_hub, FileNotFoundError, "cannot be loaded: Revision '0000"),
    "no hub for the processor": (
        lambda place: model_on_hub(place, models.load_processor),
        OSError,
        "owner/model, revision main cannot",
    ),
    "no hub for the model": (
        lambda place: model_on_hub(place, models.load_model),
        OSError,
        "without it only the embedded model loads",
    ),
    "a missing embedded file": (
        lambda place: settings.verify_embedded("model", place.empty_repository()),
        FileNotFoundError,
        "is missing: restore it with",
    ),
    "own pairs, no folder": (
        lambda place: layouts.load_folder(place.folder / "lost"),
        FileNotFoundError,
        "there is no folder",
    ),
    "own pairs, not UTF-8": (
        lambda place: own(
            place, "pairs.jsonl", line(chosen="Grün.").replace("\\u00fc", "ü").encode("latin-1")
        ),
        ValueError,
        "line 1: not UTF-8",
    ),
    "own pairs, not JSON": (
        lambda place: own(place, "pairs.jsonl", f"{line()}\n{{"),
        ValueError,
        "line 2: not JSON",
    ),
    "own pairs, brackets without end": (
        lambda place: own(place, "pairs.jsonl", "[" * 100_000),
        ValueError,
        "line 1: not a row",
    ),
    "own pairs, a number of 5,000 digits": (
        lambda place: own(place, "pairs.jsonl", "1" * 5000),
        ValueError,
        "line 1: not a row",
    ),
    "own pairs, a name twice in a row": (
        lambda place: own(place, "pairs.jsonl", line()[:-1] + ', "chosen": "B"}'),
        ValueError,
        "line 1: not a row: chosen more than once",
    ),
    "own pairs, half a character": (
        lambda place: own(place, "pairs.jsonl", line(chosen="\ud83e")),
        ValueError,
        "line 1: chosen holds half a character",
    ),
    "own pairs, a number as an answer": (
        lambda place: own(place, "pairs.jsonl", line(chosen=1)),
        ValueError,
        "chosen must be text",
    ),
    "own pairs, NUL in an image's name": (
        lambda place: own(place, "pairs.jsonl", line(image="a\0.png")),
        ValueError,
        r"no image 'a\x00",
    ),
    "own pairs, an endless image's name": (
        lambda place: own(place, "pairs.jsonl", line(image="a" * 5000)),
        ValueError,
        "no image 'aaaa",
    ),
    "own pairs, an image outside": (
        lambda place: own(place, "pairs.jsonl", line(image="../red.png")),
        ValueError,
        "image '../red.png' is not inside the folder",
    ),
    "own pairs, a column twice": (
        lambda place: own(place, "pairs.csv", HEAD.replace("rejected", "chosen,rejected")),
        ValueError,
        "line 1: column chosen more than once",
    ),
    "own pairs, a comma without quotes": (
        lambda place: own(place, "pairs.csv", f"{HEAD}red.png,What?,Red, all of it,Blue\n"),
        ValueError,
        "line 2: 5 values for 4 columns",
    ),
    "own pairs, a million characters in a cell": (
        lambda place: own(place, "pairs.csv", f"{HEAD}red.png,What?,{'A cup. ' * 150_000},Blue\n"),
        ValueError,
        "line 2: not CSV: field larger than field limit",
    ),
    "asking without an image": (
        lambda place: ask(place, [], []),
        ValueError,
        "0 images and 0 questions",
    ),
    "asking once about two images": (
        lambda place: ask(place, [RED, BLUE], ["What?"]),
        ValueError,
        "2 images and 1 questions",
    ),
    "asking nothing": (
        lambda place: ask(place, [RED], [None]),
        ValueError,
        "the question is NoneType, not text",
    ),
    "asking with <image> in the question": (
        lambda place: ask(place, [RED], ["<image>?"]),
        ValueError,
        f"holds <image>, {SPECIAL}",
    ),
    "a wrong VLM_DPO_PROFILE": (
        lambda place: variable(place, "typo"),
        ValueError,
        "no profile is called 'typo'; choose one of embedded,",
    ),
    "an empty VLM_DPO_PROFILE": (
        lambda place: variable(place, ""),
        ValueError,
        "no profile is called ''",
    ),
    "an output folder that cannot be written": (
        lambda place: checkpoints(place, a_file(place), 1e12),
        SystemExit,
        "cannot be written: Not a directory\n        → choose another output_dir",
    ),
    "a full disk": (
        lambda place: checkpoints(place, place.folder, 1000),
        SystemExit,
        "→ a smaller save_total_limit, or an output_dir",
    ),
    "a GPU with too little memory for a step": (
        little_memory,
        SystemExit,
        "2.0 GB are free\n        → a smaller batch_size",
    ),
    "a GPU with too little memory for the model": (
        out_of_memory,
        torch.OutOfMemoryError,
        "What helps: four_bit=True",
    ),
    "no adapter": (
        lambda place: models.load_tuned(EMBEDDED, place.folder),
        FileNotFoundError,
        "train the adapter with notebook 03",
    ),
    "an adapter without weights": (
        lambda place: adapter(place, None),
        FileNotFoundError,
        f"{WEIGHTS} is missing",
    ),
    "an adapter cut off": (
        lambda place: adapter(place, -100),
        ValueError,
        "is damaged, or not one for embedded/model",
    ),
    "an empty adapter": (
        lambda place: adapter(place, 0),
        ValueError,
        "is damaged, or not one for embedded/model",
    ),
    "an adapter that lacks a layer": (
        lambda place: adapter(place, lambda item: None if "layers.0.mlp" in item[0] else item),
        ValueError,
        "Found missing adapter keys",
    ),
    "an adapter of another rank than it says": (
        lambda place: adapter(place, narrower),
        ValueError,
        "size mismatch",
    ),
    "a damaged reference cache": (damaged_cache, ValueError, "is damaged"),
}


@pytest.fixture(scope="module")
def new_adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(models.load_model(EMBEDDED), training.lora_config(EMBEDDED)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, processor, new_adapter):
    """Where a case is tried: a `folder`, a `processor`, an `adapter`, `patch`, and `online()`: a hub that knows no revision."""
    servers = []

    def online():
        class Hub(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_POST = do_GET

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Hub))
        threading.Thread(target=servers[0].serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{servers[0].server_port}"
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def empty_repository():
        (tmp_path / "embedded").mkdir()
        return (
            shutil.copy(settings.ROOT / "embedded" / "manifest.json", tmp_path / "embedded")
            and tmp_path
        )

    yield SimpleNamespace(
        folder=tmp_path,
        processor=processor,
        adapter=new_adapter,
        patch=monkeypatch,
        online=online,
        empty_repository=empty_repository,
    )
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_other_than_a_row(name, place):
    act, error, words = ERRORS[name]
    with pytest.raises(error, match=re.escape(words)):
        act(place)


def test_what_the_check_says_of_columns_and_of_no_rows():
    assert preferences.check(pairs(GOOD).rename_column("chosen", "winner")) == {
        "missing column chosen": []
    }
    assert preferences.check(typed("question", Value("int64"), 7)) == {
        "column question is Value('int64'), not text": []
    }
    assert preferences.check(pairs(GOOD).select([])) == {"no rows": []}


def test_more_columns_are_left_out_and_one_row_is_enough(processor):
    rows = pairs(GOOD).add_column("more", [1])
    kept, dropped = chat.within_budget(chat.format_dataset(rows), processor, EMBEDDED.token_budget)
    assert (
        preferences.check(rows) == {}
        and kept.column_names == ["image", "prompt", "chosen", "rejected"]
        and (len(kept), dropped) == (1, [])
    )


def test_an_image_of_the_test_rows_is_reported():
    assert preferences.check(pairs(GOOD, OTHER), pairs(OTHER)) == {"image also held out": [1]}


def table():
    """The cases as tests/README.md lists them."""
    does = {DROPPED: "dropped by `within_budget`, counted, its number reported"}
    lines = ["| a row with | what happens |", "|---|---|"]
    for name, (change, problem, outcome) in ROWS.items():
        does[KEPT] = (
            "kept, and seen as people see it"
            if list(change) == ["image"]
            else "kept, and no character is lost"
        )
        found = f"`check` reports “{problem}”; " if problem else ""
        lines.append(
            f"| {name} | {found}{does.get(outcome) or f'refused with its number: “… {outcome} …”'} |"
        )
    lines += ["", "| other bad input | what happens |", "|---|---|"]
    for name, (_, error, words) in ERRORS.items():
        kind = "preflight fails" if error is SystemExit else f"`{error.__name__}`"
        lines.append(f"| {name} | {kind}: “… {' '.join(words.split())} …” |")
    return "\n".join(line.replace("<", "&lt;") for line in lines)


def test_the_readme_lists_every_case():
    assert len(ROWS) + len(ERRORS) >= 40
    listed, front = (
        (settings.ROOT / place / "README.md").read_text(encoding="utf-8")
        for place in ("tests", ".")
    )
    assert table() in listed, "python -m tests.test_bad_input prints the table"
    assert (
        f"{len(ROWS) + len(ERRORS)} cases" in listed and f"{len(ROWS) + len(ERRORS)} cases" in front
    )


if __name__ == "__main__":
    print(table())
