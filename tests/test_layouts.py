import csv
import io
import json

import pytest
from PIL import Image

from scripts import import_pairs
from utils import layouts, preferences

COLUMNS = ["image", "question", "chosen", "rejected"]
GOOD = ["red.png", "What is it?", "A red field, nothing else.", "A dog."]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name, colour in (("red.png", "red"), ("pictures/blue.jpg", "blue")):
        Image.new("RGB", (8, 6), colour).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    return tmp_path


def write_csv(folder, *rows, columns=COLUMNS):
    text = io.StringIO()
    csv.writer(text).writerows([columns, *rows])
    (folder / "pairs.csv").write_text(text.getvalue(), encoding="utf-8", newline="")


def write_jsonl(folder, *lines):
    lines = [
        line if isinstance(line, str) else json.dumps(dict(zip(COLUMNS, line, strict=False)))
        for line in lines
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def problems(folder):
    """The lines of the error message, without its first."""
    with pytest.raises(ValueError) as error:
        layouts.load_folder(folder)
    return str(error.value).splitlines()[1:]


def changed(column, value):
    return [value if name == column else old for name, old in zip(COLUMNS, GOOD, strict=True)]


@pytest.mark.parametrize("write", [write_csv, write_jsonl])
def test_a_folder_becomes_a_data_set_that_check_accepts(folder, write):
    write(
        folder,
        GOOD,
        [
            "pictures/blue.jpg",
            "Was ist das?",
            "Ein blaues Feld – „nichts“ sonst.\nZweite Zeile.",
            "Ein Hund.",
        ],
    )
    dataset = layouts.load_folder(folder)
    assert preferences.check(dataset) == {} and dataset[1]["chosen"].endswith("Zweite Zeile.")
    assert dataset["question"][:] == ["What is it?", "Was ist das?"]
    assert list(preferences.image_bytes(dataset)) == [
        (folder / name).read_bytes() for name in ("red.png", "pictures/blue.jpg")
    ]


def test_saved_as_parquet_it_loads_as_any_other_data_set_and_names_no_folder(folder):
    write_csv(folder, GOOD)
    saved = folder / "saved" / "train.parquet"
    saved.parent.mkdir()
    layouts.load_folder(folder).to_parquet(saved)
    again = preferences.load(str(saved.parent), "train")
    assert preferences.check(again) == {} and again[0]["image"].size == (8, 6)
    assert str(folder).encode() not in saved.read_bytes()


def test_every_problem_is_reported_with_its_line(folder):
    write_csv(
        folder,
        GOOD,
        changed("image", "lost.png"),
        changed("image", "broken.png"),
        changed("image", "../red.png"),
        changed("chosen", "  "),
        changed("rejected", GOOD[2]),
        ["red.png", "One\nquestion, two lines", "Yes.", "No.", "too many"],
        GOOD,
    )
    assert problems(folder) == [
        "line 3: no image 'lost.png' in the folder",
        "line 4: unreadable image 'broken.png'",
        "line 5: image '../red.png' is not inside the folder",
        "line 6: empty chosen",
        "line 7: chosen equals rejected",
        "line 8: 5 values for 4 columns: put a text with a comma in double quotes",
        "line 10: duplicate pair",
    ]


def test_two_problems_of_one_row_are_both_told(folder):
    write_jsonl(folder, ["lost.png", "What?", "", "No."])
    assert problems(folder) == ["line 1: empty chosen", "line 1: no image 'lost.png' in the folder"]


def test_what_is_no_row_in_jsonl_is_reported_and_empty_lines_are_not(folder):
    number = {"image": "red.png", "question": "How many?", "chosen": 1, "rejected": "Two."}
    write_jsonl(
        folder, '{"image": "red.png",}', "", '["red.png"]', GOOD[:3], json.dumps(number), GOOD
    )
    found = problems(
        folder
    )  # the words after "not JSON" are Python's, and not those of every version
    assert found[0].startswith("line 1: not JSON: ") and found[1:] == [
        'line 3: not a JSON object: write {"image": …, "question": …}, not ["red.png"]',
        "line 4: no rejected; it has image, question, chosen",
        "line 5: chosen must be text in quotes",
    ]


def test_a_wrong_column_names_those_there_are(folder):
    write_csv(folder, GOOD, columns=["image", "question", "winner", "rejected"])
    assert problems(folder) == [
        "line 1: no column chosen; it has image, question, winner, rejected"
    ]


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl"])
def test_a_line_that_is_not_utf_8_is_named_and_the_others_are_still_read(folder, name):
    (write_csv if name == "pairs.csv" else write_jsonl)(
        folder, GOOD, changed("chosen", "Ein gruenes Feld."), changed("image", "lost.png")
    )
    data = (folder / name).read_bytes().replace(b"grue", "grü".encode("latin-1"))
    (folder / name).write_bytes(data)
    first = 3 if name == "pairs.csv" else 2
    assert problems(folder) == [
        f"line {first}: not UTF-8: save the file with that encoding",
        f"line {first + 1}: no image 'lost.png' in the folder",
    ]


def test_a_byte_order_mark_as_excel_writes_it_does_no_harm(folder):
    write_csv(folder, GOOD)
    (folder / "pairs.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "pairs.csv").read_bytes())
    assert len(layouts.load_folder(folder)) == 1


def test_a_quote_that_is_never_closed_is_reported_where_it_begins(folder):
    (folder / "pairs.csv").write_text(
        'image,question,chosen,rejected\nred.png,What?,A red field.,A dog.\nred.png,"What?,Yes.,No.\n'
    )
    assert problems(folder) == ["line 3: not CSV: unexpected end of data"]


def test_no_pair_at_all_is_a_problem(folder):
    write_csv(folder)
    with pytest.raises(ValueError, match=r"pairs\.csv: 0 pairs read, 0 problems"):
        layouts.load_folder(folder)
    (folder / "pairs.csv").write_text("")
    assert problems(folder) == ["line 1: no column image, question, chosen, rejected; it has none"]


def test_only_the_first_twenty_problems_are_listed_with_the_number_of_all(folder):
    write_csv(folder, *[changed("image", f"{number}.png") for number in range(25)])
    found = problems(folder)
    assert len(found) == 21 and found[-1] == "and 5 more"


def test_without_a_file_of_pairs_or_with_two_it_says_which_are_needed(folder):
    with pytest.raises(
        FileNotFoundError, match=r"holds 0 of pairs\.jsonl and pairs\.csv: write one, or let"
    ):
        layouts.load_folder(folder)
    write_csv(folder, GOOD)
    write_jsonl(folder, GOOD)
    with pytest.raises(FileNotFoundError, match="holds 2 of"):
        layouts.load_folder(folder)


def test_every_tenth_image_is_held_out_with_all_its_pairs(tmp_path):
    for number in range(20):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / f"{number}.png")
    write_csv(
        tmp_path,
        *(
            [f"{number % 20}.png", f"Question {number}?", "A dark field.", "A dog."]
            for number in range(60)
        ),
    )
    dataset = layouts.load_folder(tmp_path)
    train, test = layouts.held_out(dataset)
    assert len(train) == 54 and len(test) == 6 and preferences.check(train, held_out=test) == {}
    assert sorted([*train["question"], *test["question"]]) == sorted(dataset["question"])


def test_one_image_alone_leaves_nothing_to_hold_out(folder):
    write_csv(folder, GOOD)
    with pytest.raises(SystemExit, match="about one image"):
        import_pairs.main([str(folder)])
    assert not (folder / "data").exists()


def test_the_command_line_writes_splits_that_load(folder, capsys):
    write_csv(folder, GOOD, ["pictures/blue.jpg", *GOOD[1:]])
    import_pairs.main([str(folder)])
    assert "1 pairs to train on, 1 about other images held out" in capsys.readouterr().out
    loaded = [preferences.load(str(folder / "data"), split)[0] for split in ("train", "test")]
    assert {row["image"].getpixel((0, 0)) for row in loaded} >= {(255, 0, 0)} and loaded[0][
        "chosen"
    ] == GOOD[2]


def test_the_command_line_says_what_is_wrong(folder):
    write_csv(folder, ["broken.png", *GOOD[1:]])
    with pytest.raises(SystemExit, match="line 2: unreadable image"):
        import_pairs.main([str(folder)])
