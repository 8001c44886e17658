import io
import shutil

import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage

from utils import preferences, settings
from utils.settings import ROOT

FEATURES = Features(
    {
        "image": Image(),
        "question": Value("string"),
        "chosen": Value("string"),
        "rejected": Value("string"),
    }
)


def picture(colour, kind="JPEG"):
    stored = io.BytesIO()
    PillowImage.new("RGB", (8, 6), colour).save(stored, kind)
    return {"bytes": stored.getvalue(), "path": None}


def pairs(*rows):
    return Dataset.from_list(
        [dict(zip(FEATURES, row, strict=True)) for row in rows], features=FEATURES
    )


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
    )
    assert preferences.check(dataset) == {
        "empty chosen": [1],
        "empty question": [2],
        "chosen equals rejected": [3],
        "duplicate pair": [4],
        "preferred both ways": [5],
        "unreadable image": [6, 7, 8],
    }


def test_check_finds_images_that_are_also_held_out():
    assert preferences.check(
        pairs(GOOD, (picture("blue"), "a", "b", "c")), pairs((picture("blue"), "x", "y", "z"))
    ) == {"image also held out": [1]}


def test_check_reports_missing_columns():
    assert list(preferences.check(pairs(GOOD).remove_columns(["image", "chosen"]))) == [
        "missing column image",
        "missing column chosen",
    ]


def test_a_data_set_without_the_columns_names_the_ones_it_has(tmp_path):
    pairs(GOOD).rename_column("chosen", "winner").to_parquet(tmp_path / "train.parquet")
    with pytest.raises(
        ValueError, match="no column chosen; it has image, question, winner, rejected"
    ):
        preferences.load(str(tmp_path), "train")


def test_describe_counts():
    facts = preferences.describe(pairs(GOOD, (picture("red"), "Why?", "One.", "Two words.")))
    assert facts["rows"] == 2 and facts["images"] == 1 and facts["questions"] == 2
    assert (
        facts["words chosen"] == 2
        and facts["words rejected"] == 2
        and facts["chosen is longer"] == facts["chosen is shorter"] == 0.5
    )


def test_image_bytes_are_those_on_disk():
    assert list(preferences.image_bytes(pairs(GOOD))) == [GOOD[0]["bytes"]]


@pytest.fixture
def copy_of_embedded(tmp_path):
    for name in ("manifest.json", "dataset"):
        source, target = ROOT / "embedded" / name, tmp_path / "embedded" / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return tmp_path


def test_a_missing_or_damaged_embedded_file_is_named(copy_of_embedded):
    settings.verify_embedded("dataset", copy_of_embedded)
    file = next((copy_of_embedded / "embedded" / "dataset").glob("test-*.parquet"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(
        FileNotFoundError,
        match=r"test-00000-of-00001.parquet is damaged: restore it with `git checkout",
    ):
        settings.verify_embedded("dataset", copy_of_embedded)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"is missing: .*`python -m embedded.build`"):
        settings.verify_embedded("dataset", copy_of_embedded)


def test_the_embedded_data_set_is_clean_and_balanced():
    train, test = (
        preferences.load("embedded/dataset", "train"),
        preferences.load("embedded/dataset", "test"),
    )
    assert preferences.check(train, test) == {} and preferences.check(test) == {}
    facts = preferences.describe(train)
    assert abs(facts["words chosen"] - facts["words rejected"]) < 0.1
    assert 1800 <= facts["rows"] <= 2600 and len(test) >= 500
    assert {
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
    } == set(train.column_names)
