import dataclasses
import io
import shutil

import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from layout_files import PICTURES, pair, text
from PIL import Image as PillowImage

from utils import images, layouts, preferences, settings
from utils.preferences import NEARLY_IDENTICAL, NO_END
from utils.settings import ROOT

FEATURES = Features(
    {"image": Image(), **dict.fromkeys(("question", "chosen", "rejected"), Value("string"))}
)
RED = {"bytes": PICTURES["red"], "path": None}
BLUE = {"bytes": PICTURES["blue"], "path": None}
GOOD = (RED, "What is it?", "A red field.", "A dog.")
LONG = "A red field with a dog in it, and"


def picture(width, height):
    file = io.BytesIO()
    PillowImage.new("RGB", (width, height)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def plain(*rows):
    """Return rows of one image, a question and two answers, as RLAIF-V has them."""
    rows = [dict(zip(FEATURES, row, strict=True)) for row in rows]
    return Dataset.from_list(rows, features=FEATURES)


def pairs(*rows):
    return layouts.as_rows(plain(*rows))


# What is wrong with rows


def test_nothing_is_wrong_with_good_pairs():
    assert preferences.check(pairs(GOOD, (BLUE, "What?", "Blue.", "Green."))) == {}


def test_check_names_every_problem_with_its_rows():
    rows = pairs(
        GOOD,
        (RED, "What is it?", " ", "A dog."),
        (RED, "", "Yes.", "No."),
        (RED, "Is it?", "Yes.", "Yes."),
        GOOD,
        (RED, "What is it?", "A dog.", "A red field."),
        ({"bytes": b"not an image", "path": None}, "What?", "Yes.", "No."),
        ({"bytes": BLUE["bytes"][:-40], "path": None}, "What?", "Yes.", "No."),
        ({"bytes": b"", "path": None}, "What?", "Yes.", "No."),
        ({"bytes": b"not an image", "path": None}, "Why?", "Yes.", ""),
    )
    assert preferences.check(rows) == {
        "empty chosen": [1],
        "empty prompt": [2],
        "chosen equals rejected": [3],
        "duplicate pair": [4],
        "preferred both ways": [5],
        "unreadable image": [6, 7, 9],
        "missing image": [8],
        "empty rejected": [9],
    }


def test_a_row_that_could_not_be_read_is_reported_in_its_own_words():
    problems = preferences.check(pairs(GOOD, (RED, None, "Yes.", "No.")))
    assert list(problems.values()) == [[1]]
    assert "prompt" in next(iter(problems))


SHARED = " ".join(f"word{number}" for number in range(19))  # 19 of 20 words are 95 %


@pytest.mark.parametrize(
    ("chosen", "rejected", "warning"),
    [
        (f"{SHARED} red.", f"{SHARED} blue.", NEARLY_IDENTICAL),
        (f"blue {SHARED}.", f"{SHARED} red.", NEARLY_IDENTICAL),
        (f"{SHARED[6:]}.", f"{SHARED} blue green.", None),
        (LONG, "A dog.", NO_END),
        ("A dog.", LONG, NO_END),
        (f"{LONG} so on…", "A dog.", None),
        (f"{LONG} “so on.” ", "A dog.", None),
        ("A red field", "A dog", None),
    ],
)
def test_what_may_be_meant_is_a_warning(chosen, rejected, warning):
    rows = pairs((RED, "What?", chosen, rejected))
    found = {warning: [0]} if warning else {}
    assert preferences.check(rows) == found
    kept, reported = preferences.without_problems(rows)
    assert (len(kept), reported) == (1, found)


def test_rows_with_problems_are_dropped():
    rows = pairs(GOOD, (RED, "What?", "", "No."), (BLUE, "Why?", LONG, "No."))
    kept, problems = preferences.without_problems(rows)
    assert problems == {"empty chosen": [1], NO_END: [2]}
    assert [preferences.text_of(row["prompt"]) for row in kept] == ["What is it?", "Why?"]


def test_no_row_left_is_an_error():
    with pytest.raises(ValueError, match="empty chosen"):
        preferences.without_problems(pairs((RED, "What?", "", "No.")))


def test_pairs_about_held_out_images_are_dropped_and_reported():
    rows = pairs(GOOD, (BLUE, "What?", "Blue.", "Green."))
    held_out = [pairs((RED, "x", "y", "z"))]
    kept, problems = preferences.without_problems(rows, held_out=held_out)
    assert len(kept) == 1 and problems == {"image also held out": [0]}


def test_check_decodes_equal_images_once(monkeypatch):
    decoded = []
    read = preferences.read_image

    def counted(stored, **options):
        decoded.append(stored["bytes"])
        return read(stored, **options)

    monkeypatch.setattr(preferences, "read_image", counted)
    rows = [(image, f"What is {n}?", "Yes.", "No.") for n, image in enumerate([RED, BLUE] * 3)]
    assert preferences.check(pairs(*rows)) == {}
    assert decoded == [RED["bytes"], BLUE["bytes"]]


def test_check_finds_images_that_are_also_held_out():
    rows = pairs(GOOD, (BLUE, "a", "b", "c"))
    assert preferences.check(rows, [pairs((BLUE, "x", "y", "z"))]) == {"image also held out": [1]}


def test_the_second_of_several_images_is_looked_at_too():
    rows = trl_rows(pair([RED["bytes"], b"broken"], [text("user", None, None, "?")], "a", "b"))
    assert preferences.check(rows) == {"unreadable image": [0]}
    held_out = pairs((BLUE, "a", "b", "c"))
    rows = trl_rows(pair([RED["bytes"], BLUE["bytes"]], [text("user", None, None, "?")], "a", "b"))
    assert preferences.check(rows, [held_out]) == {"image also held out": [0]}


def trl_rows(*rows):
    """Return rows of TRL's layout, whose images are given as bytes."""
    features = Features({**layouts.TEXT_FEATURES, "images": layouts.IMAGE_LIST})
    stored = [{"problem": None, **row} for row in rows]
    return layouts.as_rows(Dataset.from_list(stored, features=features))


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_special_token_is_found_in_every_turn(column, processor):
    row = pair(
        [RED["bytes"]],
        [text("user", None, "Is it?"), text("assistant", "Yes."), text("user", "And?")],
        "Yes.",
        "No.",
    )
    row[column][0]["content"][-1]["text"] += "</s>"
    rows = trl_rows(row)
    assert preferences.check(rows, processor=processor) == {f"special token in {column}": [0]}
    assert preferences.check(rows) == {}


def test_an_image_that_the_processor_refuses_is_reported_once_for_each_size(processor, monkeypatch):
    sizes = []

    def refuse(images, **options):
        sizes.append(images[0][0].size)
        if max(sizes[-1]) > 100:
            raise RuntimeError("too long")

    monkeypatch.setattr(processor, "image_processor", refuse)
    stored = [picture(8, 6), picture(200, 1), picture(6, 8), picture(8, 6), picture(200, 1)]
    rows = pairs(*[(image, f"{number}?", "a", "b") for number, image in enumerate(stored)])
    refused = {"image refused by the model's processor": [1, 4]}
    assert preferences.check(rows, processor=processor) == refused
    assert sizes == [(8, 6), (200, 1), (6, 8)]
    # Reduced to the budget, it is not too long any more.
    monkeypatch.setattr(images, "NO_PHOTOGRAPH", 0)
    assert preferences.check(rows, processor=processor, pixel_budget=50) == {}


@pytest.mark.parametrize("use", [preferences.check, preferences.describe])
def test_rows_of_another_layout_are_refused_with_the_columns_they_have(use):
    with pytest.raises(ValueError, match=r"images, prompt.*image, question, chosen, rejected"):
        use(plain(GOOD))


def test_no_rows_are_a_problem():
    assert preferences.check(pairs(GOOD).select([])) == {"no rows": []}


def test_problems_are_listed_in_one_line():
    problems = {"empty chosen": [4, 17], "no rows": [], "duplicate pair": list(range(12))}
    text = preferences.as_text(problems)
    assert text.splitlines() == [text]
    assert text.startswith("empty chosen: 2 rows (4, 17); no rows; duplicate pair: 12 rows (0, 1")
    assert text.endswith("9, …)")


# Numbers about rows


def test_describe_counts_texts_and_images():
    facts = preferences.describe(pairs(GOOD, (RED, "Why?", "One.", "Two words.")))
    assert (facts["rows"], facts["images"], facts["prompts"]) == (2, 1, 2)
    assert facts["words chosen"] == facts["words rejected"] == 2
    assert facts["chosen is longer"] == facts["chosen is shorter"] == 0.5


def test_describe_counts_turns_and_images_of_a_row():
    turns = [text("system", "Be brief."), text("user", None, None, "?"), text("assistant", "Yes.")]
    facts = preferences.describe(
        trl_rows(
            pair([RED["bytes"], BLUE["bytes"]], [*turns, text("user", "And?")], "a", "b"),
            pair([], [text("user", "Why?")], "a b", "a c"),
        )
    )
    assert facts["images per row"] == {0: 1, 2: 1}
    assert (facts["system turns"], facts["several turns"], facts["images"]) == (1, 1, 2)
    assert facts["words in common"] == 0.25


def test_an_empty_data_set_cannot_be_described():
    with pytest.raises(ValueError, match="empty"):
        preferences.describe(pairs(GOOD).select([]))


def test_image_bytes_are_those_on_disk():
    assert list(preferences.image_bytes(pairs(GOOD))) == [[RED["bytes"]]]


# Loading


def test_a_data_set_without_the_columns_names_the_ones_it_has(tmp_path):
    plain(GOOD).rename_column("chosen", "winner").to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"image, question, winner, rejected.*chosen is missing"):
        preferences.load(str(tmp_path), "train")


@pytest.fixture
def numbered(tmp_path):
    """A folder with thirty pairs."""
    rows = [(RED, f"{number}?", "a", "b") for number in range(30)]
    plain(*rows).to_parquet(tmp_path / "train.parquet")
    return str(tmp_path)


def asked(rows):
    return [preferences.text_of(row["prompt"]) for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_limit_draws_rows_that_another_draw_can_leave_out(numbered, streaming):
    how = {"streaming": streaming, "seed": 3}
    first = asked(preferences.load(numbered, limit=8, **how))
    others = asked(preferences.load(numbered, limit=100, skip=8, **how))
    assert sorted(first + others) == sorted(f"{number}?" for number in range(30))
    assert len(first) == 8
    assert first == asked(preferences.load(numbered, limit=8, **how))
    assert first != asked(preferences.load(numbered, limit=8, streaming=streaming, seed=4))


def test_rows_to_test_on_are_not_those_to_train_on(numbered):
    profile = settings.PROFILES["embedded"]
    one_split = dict.fromkeys(("train_split", "validation_split", "test_split"), "train")
    rows = {"train_rows": 20, "validation_rows": 4, "test_rows": 5}
    profile = dataclasses.replace(profile, dataset=numbered, **one_split, **rows)
    drawn = [asked(preferences.load_part(profile, part)) for part in preferences.PARTS]
    assert [len(part) for part in drawn] == [20, 4, 5]
    assert len(set().union(*drawn)) == 29


def test_of_a_split_of_its_own_nothing_is_skipped(numbered):
    profile = settings.PROFILES["embedded"]
    own = {"dataset": numbered, "train_split": "train[:9]", "test_split": "train[9:]"}
    profile = dataclasses.replace(profile, **own)
    assert asked(preferences.load_part(profile, "test")) == [
        f"{number}?" for number in range(9, 30)
    ]


def test_what_save_to_disk_wrote_is_read(tmp_path):
    both = DatasetDict(
        train=plain(GOOD), test=plain((BLUE, "1?", "a", "b"), (BLUE, "2?", "a", "b"))
    )
    both.save_to_disk(tmp_path / "both")
    assert asked(preferences.load(str(tmp_path / "both"), "test[1:]+train")) == ["2?", GOOD[1]]
    both["test"].save_to_disk(tmp_path / "one")
    assert asked(preferences.load(str(tmp_path / "one"), "train[:1]")) == ["1?"]


# The embedded data set


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
    assert preferences.check(train, [test]).keys() <= set(preferences.WARNINGS)
    assert preferences.check(test).keys() <= set(preferences.WARNINGS)
    facts = preferences.describe(train)
    assert abs(facts["words chosen"] - facts["words rejected"]) < 0.1
    assert 1800 <= facts["rows"] <= 2600
    assert len(test) >= 500
    assert set(train.column_names) == {
        "ds_name",
        "images",
        "prompt",
        "chosen",
        "rejected",
        "origin_dataset",
        "origin_split",
        "idx",
        "image_path",
        "objects",
    }
