import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset
from PIL import Image

from tests import layout_files
from tests.layout_files import EXPECTED, LAYOUTS, PICTURES, QUESTION
from utils import chat, layouts, preferences
from utils.settings import PROFILES

ANSWERS = {"chosen": "A red field.", "rejected": "A dog."}
GOOD = {"images": ["red.jpg"], "prompt": QUESTION, **ANSWERS}


@pytest.fixture(params=LAYOUTS)
def written(request, tmp_path):
    source, pairs = layout_files.write(request.param, tmp_path)
    return request.param, source, [EXPECTED[pair] for pair in pairs]


def files_of(row):
    return [stored["bytes"] or Path(stored["path"]).read_bytes() for stored in row["images"]]


def assert_rows(rows, expected):
    for row, pair in zip(rows, expected, strict=True):
        assert files_of(row) == [PICTURES[color] for color in pair["images"]]
        for name in layouts.MESSAGES:
            assert row[name] == pair[name]


def test_every_layout_is_read_as_the_same_rows(written, capsys):
    name, source, expected = written
    rows = preferences.load(source)
    assert capsys.readouterr().out.endswith(f"in the layout of {LAYOUTS[name][2]}\n")
    assert_rows(rows, expected)
    texts = [number for number, pair in enumerate(expected) if not pair["images"]]
    assert preferences.check(rows) == ({preferences.NO_IMAGE: texts} if texts else {})
    assert_rows(preferences.load(source, streaming=True), expected)


def test_every_layout_becomes_batches(written, processor):
    _, source, expected = written
    formatted = chat.format_dataset(preferences.load(source))
    batch = chat.training_batch(list(formatted), processor)
    assert len(batch["input_ids"]) == 2 * len(expected)
    for row, pair in zip(formatted, expected, strict=True):
        assert [image.size for image in row["images"]] == [(48, 36)] * len(pair["images"])


def test_a_row_keeps_its_images_after_shuffle_select_and_slice(tmp_path):
    source, _ = layout_files.write("TRL", tmp_path)
    formatted = chat.format_dataset(preferences.load(source))
    mixed = formatted.shuffle(seed=3).select([2, 0, 3])
    sliced = mixed[:2]
    for number in range(2):
        row = {name: sliced[name][number] for name in sliced}
        assert row["prompt"] == mixed[number]["prompt"]
        colors = next(e["images"] for e in EXPECTED.values() if e["chosen"] == row["chosen"])
        shown = [Image.open(io.BytesIO(PICTURES[color])).getpixel((1, 1)) for color in colors]
        assert [image.getpixel((1, 1)) for image in row["images"]] == shown


def user(content):
    return {"role": "user", "content": content}


BAD = {
    "a role that nobody knows": ({"prompt": [{"role": "boss", "content": "?"}]}, "boss"),
    "more places than images": ({"prompt": "<image><image>?"}, "1 images for 2 places"),
    "fewer places than images": (
        {"images": ["a.jpg"] * 3, "prompt": "<image> and <image>?"},
        "3 images for 2 places",
    ),
    "an empty turn": (
        {"prompt": [user("?"), {"role": "assistant", "content": " "}, user("And now?")]},
        "an empty turn of the assistant",
    ),
    "no prompt": ({"prompt": None}, "there is no prompt"),
    "a prompt that ends with the assistant": (
        {"prompt": [user("?"), {"role": "assistant", "content": "Yes."}]},
        "ends with a turn of the assistant",
    ),
    "a system turn in the middle": (
        {"prompt": [user("?"), {"role": "system", "content": "Be brief."}]},
        "system",
    ),
    "an answer by the user": ({"chosen": [user("A red field.")]}, "chosen answer is user"),
    "an image inside an answer": ({"rejected": "A dog <image>."}, "image inside the rejected"),
    "a number for an answer": ({"chosen": [{"role": "assistant", "content": 3}]}, "chosen"),
    "a video": ({"prompt": [user([{"type": "video", "text": None}])]}, "video"),
    "an address in the network": ({"images": ["https://h.example/a.jpg"]}, "download"),
    "a file outside": ({"images": ["../a.jpg"]}, "not inside"),
    "an absolute path": ({"images": ["/etc/hostname"]}, "not inside"),
}


@pytest.mark.parametrize(("change", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row_stays_in_its_place_with_its_reason(tmp_path, change, reason):
    rows = [{**GOOD}, {**GOOD, **change}]
    (tmp_path / "red.jpg").write_bytes(PICTURES["red"])
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    loaded = preferences.load(str(tmp_path))
    (problem,) = [text for text, numbers in preferences.check(loaded).items() if numbers == [1]]
    assert problem.startswith("line 2: ")
    assert reason in problem
    with pytest.raises(ValueError, match="line 2"):
        chat.format_dataset(loaded)[1]
    assert len(preferences.without_problems(loaded)[0]) == 1


def test_an_unknown_layout_is_refused_with_its_columns_and_the_nearest():
    unknown = Dataset.from_dict({"image": [None], "prompt": ["?"], "chosen": ["A."], "bad": ["B."]})
    with pytest.raises(ValueError) as error:
        layouts.as_rows(unknown, "mine")
    for fact in ("mine", "bad", "TRL", "rejected is missing"):
        assert fact in str(error.value)


def test_a_data_set_without_any_image_is_refused():
    columns = {"img": ["a.jpg"], "prompt": ["?"], "chosen": ["A."], "rejected": ["B."]}
    texts = Dataset.from_dict(columns)
    with pytest.raises(ValueError, match="no column images or image"):
        layouts.as_rows(texts)


def test_bytes_win_over_a_file_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "red.jpg").write_bytes(PICTURES["blue"])
    source, _ = layout_files.write("RLAIF-V", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert files_of(preferences.load(source)[0]) == [PICTURES["red"]]


def test_rejected_images_are_kept(tmp_path):
    rows = [{**GOOD, "rejected_images": ["blue.jpg"]}, GOOD]
    for color in ("red", "blue"):
        (tmp_path / f"{color}.jpg").write_bytes(PICTURES[color])
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    loaded = preferences.load(str(tmp_path))
    stored = [row["rejected_images"] for row in loaded]
    assert [len(images) for images in stored] == [1, 0]
    assert Path(stored[0][0]["path"]).name == "blue.jpg"


def test_a_line_break_beside_a_placeholder_goes():
    parts = layouts.split_at_placeholders("<image>\nWhat is it?")
    assert parts == [{"type": "image"}, {"type": "text", "text": "What is it?"}]


def test_a_file_that_changed_is_read_again(tmp_path):
    (tmp_path / "red.jpg").write_bytes(PICTURES["red"])
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(GOOD))
    assert len(preferences.load(str(file))) == 1
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "chosen": "Red, I think."}))
    assert len(preferences.load(str(file))) == 2


def test_a_sample_is_drawn_by_its_seed_and_the_rest_are_others():
    def questions(**how):
        rows = preferences.load("embedded/dataset", "train[:60]", **how)
        return rows["idx"][:]

    drawn = questions(limit=20, seed=1)
    assert drawn == questions(limit=20, seed=1) != questions(limit=20, seed=2)
    everything = sorted(questions())
    assert sorted(drawn + questions(limit=40, skip=20, seed=1)) == everything


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub. Return what `load_dataset` was asked for."""
    asked = []
    pair = {"image": {"bytes": PICTURES["red"], "path": None}, "question": QUESTION, **ANSWERS}
    stored = Dataset.from_list([{**pair, "number": number} for number in range(30)])

    def load_dataset(**arguments):
        asked.append(arguments)
        return stored.to_iterable_dataset() if arguments["streaming"] else stored

    def dataset_info(self, name, **how):
        return SimpleNamespace(siblings=[SimpleNamespace(size=2_000_000_000)])

    monkeypatch.setattr(preferences, "load_dataset", load_dataset)
    monkeypatch.setattr(preferences.HfApi, "dataset_info", dataset_info)
    return asked


def test_a_configuration_is_part_of_the_name(hub):
    preferences.load("owner/name/detailed", "train")
    (asked,) = hub
    assert (asked["path"], asked["name"]) == ("owner/name", "detailed")


def test_the_size_of_a_download_is_said_beside_the_free_disk(hub, capsys):
    preferences.load("owner/name", "train")
    said = capsys.readouterr().out
    assert "2.0 GB to download" in said
    assert "GB free" in said


def test_a_sample_from_the_hub_is_streamed_and_kept(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    train = preferences.load("owner/name", "train", limit=20, seed=1)
    test = preferences.load("owner/name", "train", limit=10, skip=20, seed=1)
    assert all(arguments["streaming"] for arguments in hub)
    assert sorted(train["number"][:] + test["number"][:]) == list(range(30))
    assert files_of(train[3]) == [PICTURES["red"]]
    asked = len(hub)
    preferences.load("owner/name", "train", limit=20, seed=1)
    assert len(hub) == asked  # it came from the cache


def test_the_parts_of_a_profile_share_no_row_of_a_split():
    profile = replace(
        PROFILES["embedded"],
        train_split="train[:60]",
        test_split="train[:60]",
        train_rows=40,
        test_rows=20,
    )
    train = preferences.load_part(profile, "train")["idx"][:]
    test = preferences.load_part(profile, "test")["idx"][:]
    everything = preferences.load("embedded/dataset", "train[:60]")["idx"][:]
    assert sorted(train + test) == sorted(everything)
    other = replace(profile, test_split="test[:5]")
    assert len(preferences.load_part(other, "test")) == 5
