import io
import shutil

import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage

from utils import preferences, settings
from utils.settings import ROOT

TEXTS = dict.fromkeys(preferences.TEXT_COLUMNS, Value("string"))
FEATURES = Features({"image": Image(), **TEXTS})


def picture(color, kind="JPEG"):
    stored = io.BytesIO()
    PillowImage.new("RGB", (8, 6), color).save(stored, kind)
    return {"bytes": stored.getvalue(), "path": None}


def pairs(*rows):
    rows = [dict(zip(FEATURES, row, strict=True)) for row in rows]
    return Dataset.from_list(rows, features=FEATURES)


GOOD = (picture("red"), "What is it?", "A red field.", "A dog.")


def test_nothing_is_wrong_with_good_pairs():
    assert preferences.check(pairs(GOOD, (picture("blue"), "What?", "Blue.", "Green."))) == {}


def test_check_names_every_problem_with_its_rows():
    dataset = pairs(
        GOOD,
        (picture("red"), "What is it?", " ", "A dog."),
        (picture("red"), None, "Yes.", "No."),
        (picture("red"), "Is it?", "Yes.", "Yes."),
        GOOD,
        (picture("red"), "What is it?", "A dog.", "A red field."),
        ({"bytes": b"not an image", "path": None}, "What?", "Yes.", "No."),
        ({"bytes": picture("blue")["bytes"][:-40], "path": None}, "What?", "Yes.", "No."),
        (None, "What?", "Yes.", "No."),
        ({"bytes": b"not an image", "path": None}, "Why?", "Yes.", "No."),
    )
    assert preferences.check(dataset) == {
        "empty chosen": [1],
        "empty question": [2],
        "chosen equals rejected": [3],
        "duplicate pair": [4],
        "preferred both ways": [5],
        "unreadable image": [6, 7, 8, 9],
    }


def test_check_decodes_equal_images_once(monkeypatch):
    decoded = []
    monkeypatch.setattr(preferences, "read_image", lambda stored: decoded.append(stored["bytes"]))
    blue = picture("blue")
    rows = [(image, f"What is {n}?", "Yes.", "No.") for n, image in enumerate([GOOD[0], blue] * 3)]
    assert preferences.check(pairs(*rows)) == {}
    assert decoded == [GOOD[0]["bytes"], blue["bytes"]]


def test_check_finds_images_that_are_also_held_out():
    rows = pairs(GOOD, (picture("blue"), "a", "b", "c"))
    held_out = pairs((picture("blue"), "x", "y", "z"))
    assert preferences.check(rows, held_out) == {"image also held out": [1]}


def test_check_reports_missing_columns():
    rows = pairs(GOOD).remove_columns(["image", "chosen"])
    assert list(preferences.check(rows)) == ["missing column image", "missing column chosen"]


def test_problems_are_listed_in_one_line():
    problems = {"empty chosen": [4, 17], "no rows": [], "duplicate pair": list(range(12))}
    text = preferences.as_text(problems)
    assert text.splitlines() == [text]
    assert text.startswith("empty chosen: 2 rows (4, 17); no rows; duplicate pair: 12 rows (0, 1")
    assert text.endswith("9, …)")


def test_a_data_set_without_the_columns_names_the_ones_it_has(tmp_path):
    pairs(GOOD).rename_column("chosen", "winner").to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"chosen.*image, question, winner, rejected"):
        preferences.load(str(tmp_path), "train")


def test_describe_counts():
    facts = preferences.describe(pairs(GOOD, (picture("red"), "Why?", "One.", "Two words.")))
    assert (facts["rows"], facts["images"], facts["questions"]) == (2, 1, 2)
    assert facts["words chosen"] == facts["words rejected"] == 2
    assert facts["chosen is longer"] == facts["chosen is shorter"] == 0.5


def test_image_bytes_are_those_on_disk():
    assert list(preferences.image_bytes(pairs(GOOD))) == [GOOD[0]["bytes"]]


@pytest.fixture
def copy_of_embedded(tmp_path):
    folder = tmp_path / "embedded"
    shutil.copytree(ROOT / "embedded" / "dataset", folder / "dataset")
    shutil.copy(ROOT / "embedded" / "manifest.json", folder)
    return tmp_path


def test_a_missing_or_damaged_embedded_file_is_named(copy_of_embedded):
    settings.verify_embedded("dataset", copy_of_embedded)
    file = next((copy_of_embedded / "embedded" / "dataset").glob("test-*.parquet"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(FileNotFoundError, match=rf"{file.name} is damaged.*git checkout"):
        settings.verify_embedded("dataset", copy_of_embedded)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file.name} is missing.*embedded\.build"):
        settings.verify_embedded("dataset", copy_of_embedded)


def test_the_embedded_data_set_is_clean_and_balanced():
    train = preferences.load("embedded/dataset", "train")
    test = preferences.load("embedded/dataset", "test")
    assert preferences.check(train, test) == {}
    assert preferences.check(test) == {}
    facts = preferences.describe(train)
    assert abs(facts["words chosen"] - facts["words rejected"]) < 0.1
    assert 1800 <= facts["rows"] <= 2600
    assert len(test) >= 500
    assert set(train.column_names) == {
        "ds_name",
        "image",
        "question",
        "chosen",
        "rejected",
        "origin_dataset",
        "origin_split",
        "idx",
        "image_path",
        "objects",
    }
