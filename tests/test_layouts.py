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
    for name, color in (("red.png", "red"), ("pictures/blue.jpg", "blue")):
        Image.new("RGB", (8, 6), color).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    return tmp_path


def write_csv(folder, *rows, columns=COLUMNS):
    text = io.StringIO()
    csv.writer(text).writerows([columns, *rows])
    (folder / "pairs.csv").write_text(text.getvalue(), encoding="utf-8", newline="")


def write_jsonl(folder, *lines):
    """Write `pairs.jsonl` with these lines; a list of values becomes an object."""
    written = []
    for line in lines:
        if not isinstance(line, str):
            line = json.dumps(dict(zip(COLUMNS, line, strict=False)))
        written.append(line + "\n")
    (folder / "pairs.jsonl").write_text("".join(written), encoding="utf-8")


def problems(folder):
    """Return the lines of the error message, without its first."""
    with pytest.raises(ValueError) as error:
        layouts.load_folder(folder)
    return str(error.value).splitlines()[1:]


def assert_reported(found, expected):
    """Each problem has the line and contains the fact of its pair (line, fact), in this order."""
    assert len(found) == len(expected), found
    for problem, (line, fact) in zip(found, expected, strict=True):
        assert problem.startswith(f"line {line}: "), problem
        assert fact in problem


def changed(column, value):
    row = list(GOOD)
    row[COLUMNS.index(column)] = value
    return row


@pytest.mark.parametrize("write", [write_csv, write_jsonl])
def test_a_folder_becomes_a_data_set_that_check_accepts(folder, write):
    answer = "Ein blaues Feld – „nichts“ sonst.\nZweite Zeile."
    write(folder, GOOD, ["pictures/blue.jpg", "Was ist das?", answer, "Ein Hund."])
    dataset = layouts.load_folder(folder)
    assert preferences.check(dataset) == {}
    assert dataset[1]["chosen"] == answer
    assert dataset["question"][:] == ["What is it?", "Was ist das?"]
    files = [folder / "red.png", folder / "pictures" / "blue.jpg"]
    assert list(preferences.image_bytes(dataset)) == [file.read_bytes() for file in files]


def test_saved_as_parquet_it_loads_as_any_other_data_set_and_names_no_folder(folder):
    write_csv(folder, GOOD)
    saved = folder / "saved" / "train.parquet"
    saved.parent.mkdir()
    layouts.load_folder(folder).to_parquet(saved)
    again = preferences.load(str(saved.parent), "train")
    assert preferences.check(again) == {}
    assert again[0]["image"].size == (8, 6)
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
    expected = [
        (3, "'lost.png'"),
        (4, "'broken.png'"),
        (5, "'../red.png'"),
        (6, "empty chosen"),
        (7, "chosen equals rejected"),
        (8, "5 values for 4 columns"),
        (10, "duplicate pair"),
    ]
    assert_reported(problems(folder), expected)


def test_two_problems_of_one_row_are_both_reported(folder):
    write_jsonl(folder, ["lost.png", "What?", "", "No."])
    assert_reported(problems(folder), [(1, "empty chosen"), (1, "'lost.png'")])


def test_a_line_of_json_that_is_no_row_is_reported_unless_it_is_empty(folder):
    number = {"image": "red.png", "question": "How many?", "chosen": 1, "rejected": "Two."}
    write_jsonl(
        folder, '{"image": "red.png",}', "", '["red.png"]', GOOD[:3], json.dumps(number), GOOD
    )
    expected = [(1, "JSON"), (3, '["red.png"]'), (4, "no rejected"), (5, "chosen")]
    assert_reported(problems(folder), expected)


def test_a_wrong_column_names_those_there_are(folder):
    write_csv(folder, GOOD, columns=["image", "question", "winner", "rejected"])
    found = problems(folder)
    assert_reported(found, [(1, "chosen")])
    assert "image, question, winner, rejected" in found[0]


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl"])
def test_a_line_that_is_not_utf_8_is_named_and_the_others_are_still_read(folder, name):
    write = write_csv if name == "pairs.csv" else write_jsonl
    write(folder, GOOD, changed("chosen", "Ein gruenes Feld."), changed("image", "lost.png"))
    data = (folder / name).read_bytes().replace(b"grue", "grü".encode("latin-1"))
    (folder / name).write_bytes(data)
    first = 3 if name == "pairs.csv" else 2
    assert_reported(problems(folder), [(first, "UTF-8"), (first + 1, "'lost.png'")])


def test_a_byte_order_mark_as_excel_writes_it_does_no_harm(folder):
    write_csv(folder, GOOD)
    (folder / "pairs.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "pairs.csv").read_bytes())
    assert len(layouts.load_folder(folder)) == 1


def test_a_quote_that_is_never_closed_is_reported_where_it_begins(folder):
    (folder / "pairs.csv").write_text(
        "image,question,chosen,rejected\n"
        "red.png,What?,A red field.,A dog.\n"
        'red.png,"What?,Yes.,No.\n'
    )
    assert_reported(problems(folder), [(3, "CSV")])


def test_no_pair_at_all_is_a_problem(folder):
    write_csv(folder)
    with pytest.raises(ValueError, match=r"pairs\.csv: 0 pairs"):
        layouts.load_folder(folder)
    (folder / "pairs.csv").write_text("")
    assert_reported(problems(folder), [(1, "image, question, chosen, rejected")])


def test_only_the_first_twenty_problems_are_listed_with_the_number_of_all(folder):
    write_csv(folder, *[changed("image", f"{number}.png") for number in range(25)])
    found = problems(folder)
    assert len(found) == layouts.SHOWN + 1
    assert "5 more" in found[-1]


def test_without_a_file_of_pairs_or_with_two_it_says_which_are_needed(folder):
    with pytest.raises(FileNotFoundError, match=r"pairs\.jsonl.*pairs\.csv"):
        layouts.load_folder(folder)
    write_csv(folder, GOOD)
    write_jsonl(folder, GOOD)
    with pytest.raises(FileNotFoundError, match=r"pairs\.jsonl.*pairs\.csv"):
        layouts.load_folder(folder)


def test_every_tenth_image_is_held_out_with_all_its_pairs(tmp_path):
    for number in range(20):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = []
    for number in range(60):
        rows.append([f"{number % 20}.png", f"Question {number}?", "A dark field.", "A dog."])
    write_csv(tmp_path, *rows)
    dataset = layouts.load_folder(tmp_path)
    train, test = layouts.held_out(dataset)
    assert len(train) == 54
    assert len(test) == 6
    assert preferences.check(train, held_out=test) == {}
    assert sorted([*train["question"], *test["question"]]) == sorted(dataset["question"])


def test_one_image_alone_leaves_nothing_to_hold_out(folder):
    write_csv(folder, GOOD)
    with pytest.raises(SystemExit, match="one image"):
        import_pairs.main([str(folder)])
    assert not (folder / "data").exists()


def test_the_command_line_writes_splits_that_load(folder, capsys):
    write_csv(folder, GOOD, ["pictures/blue.jpg", *GOOD[1:]])
    import_pairs.main([str(folder)])
    assert str(folder / "data") in capsys.readouterr().out
    train = preferences.load(str(folder / "data"), "train")
    test = preferences.load(str(folder / "data"), "test")
    assert len(train) == len(test) == 1
    assert train[0]["chosen"] == GOOD[2]
    colors = [train[0]["image"].getpixel((0, 0)), test[0]["image"].getpixel((0, 0))]
    assert (255, 0, 0) in colors
    assert colors[0] != colors[1]


def test_the_command_line_takes_another_folder_to_write_to(folder):
    write_csv(folder, GOOD, ["pictures/blue.jpg", *GOOD[1:]])
    import_pairs.main([str(folder), "--output", str(folder / "elsewhere" / "pairs")])
    assert not (folder / "data").exists()
    assert len(preferences.load(str(folder / "elsewhere" / "pairs"), "train")) == 1


def test_the_command_line_says_what_is_wrong(folder):
    write_csv(folder, ["broken.png", *GOOD[1:]])
    with pytest.raises(SystemExit, match=r"line 2: .*broken"):
        import_pairs.main([str(folder)])
