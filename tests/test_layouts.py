"""Files of pairs with images beside them: every line is read, or named with what is wrong.

tests/test_field_layouts.py reads every layout of the field.
"""

import base64
import csv
import io
import json

import pytest
from datasets import Dataset, Features, Image, Value
from layout_files import PICTURES

from utils import layouts, preferences, review

COLUMNS = ["image", "question", "chosen", "rejected"]
GOOD = ["red.jpg", "What is it?", "A red field, nothing else.", "A dog."]
OTHER = ["pictures/blue.jpg", "What is it?", "A blue field.", "A dog."]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "red.jpg").write_bytes(PICTURES["red"])
    (tmp_path / "pictures" / "blue.jpg").write_bytes(PICTURES["blue"])
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
            line = json.dumps(dict(zip(COLUMNS, line, strict=False)), ensure_ascii=False)
        written.append(line + "\n")
    (folder / "pairs.jsonl").write_text("".join(written), encoding="utf-8")


def write_json(folder, *rows):
    items = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    (folder / "pairs.json").write_text(json.dumps(items), encoding="utf-8")


def load(folder):
    return preferences.load(str(folder))


def problems(folder):
    """Return {row number: what is wrong with it}, with one problem a row."""
    found = {}
    for problem, numbers in preferences.check(load(folder)).items():
        for number in numbers:
            assert number not in found
            found[number] = problem
    return found


def assert_reported(found, expected):
    """The problem of each row contains its facts."""
    assert found.keys() == expected.keys(), found
    for number, facts in expected.items():
        for fact in facts:
            assert fact in found[number]


def changed(column, value):
    row = list(GOOD)
    row[COLUMNS.index(column)] = value
    return row


def spoken(row):
    return [preferences.text_of(row[name]) for name in layouts.MESSAGES]


# Lines


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_json])
def test_every_letter_and_every_byte_is_read(folder, write):
    answer = "Ein blaues Feld – „nichts“ sonst.\nZweite\u2028Zeile,\x85 und\tweiter. "
    write(folder, GOOD, ["pictures/blue.jpg", "Was ist das?", answer, "Ein Hund."])
    rows = load(folder)
    assert preferences.check(rows) == {}
    assert [spoken(row) for row in rows] == [GOOD[1:], ["Was ist das?", answer, "Ein Hund."]]
    assert list(preferences.image_bytes(rows)) == [[PICTURES["red"]], [PICTURES["blue"]]]


def test_a_byte_order_mark_as_excel_writes_it_does_no_harm(folder):
    write_csv(folder, GOOD)
    (folder / "pairs.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "pairs.csv").read_bytes())
    assert [spoken(row) for row in load(folder)] == [GOOD[1:]]


def test_every_problem_of_a_table_is_reported(folder):
    write_csv(
        folder,
        GOOD,
        changed("image", "lost.png"),
        changed("image", "broken.png"),
        changed("image", "../red.jpg"),
        changed("chosen", "  "),
        changed("rejected", GOOD[2]),
        ["red.jpg", "One\nquestion, two lines", "Yes.", "No.", "too many"],
        changed("image", "https://h/a.png"),
        GOOD,
    )
    expected = {
        1: ["missing image"],
        2: ["unreadable image"],
        3: ["line 5: ", "'../red.jpg'"],
        4: ["empty chosen"],
        5: ["chosen equals rejected"],
        6: ["line 8: ", "5 values for 4 columns"],
        7: ["line 10: ", "https://h/a.png"],
        8: ["duplicate pair"],
    }
    assert_reported(problems(folder), expected)


def test_a_line_of_json_that_is_no_row_is_reported_unless_it_is_empty(folder):
    number = json.dumps({"image": "red.jpg", "question": "How many?", "chosen": 1, "rejected": "2"})
    write_jsonl(folder, '{"image": "red.jpg",}', "", '["red.jpg"]', GOOD[:3], number, GOOD)
    expected = {
        0: ["line 1: ", "JSON"],
        1: ["line 3: ", '["red.jpg"]'],
        2: ["line 4: ", "no rejected"],
        3: ["line 5: ", "chosen"],
    }
    assert_reported(problems(folder), expected)


@pytest.mark.parametrize(
    "half",
    [
        json.dumps(dict(zip(COLUMNS, changed("chosen", "\ud83e"), strict=True))),
        '{"image": "red.jpg", "\\ud83e": 1}',
        '{"\\ud83e": 1, "\\ud83e": 2}',
        '"\\ud83e"',
    ],
)
def test_half_a_character_costs_only_its_row(folder, half):
    write_jsonl(folder, GOOD, half, OTHER)
    assert_reported(problems(folder), {1: ["line 2: "]})


def test_an_item_of_a_list_that_is_no_row_is_reported(folder):
    good = dict(zip(COLUMNS, GOOD, strict=True))
    items = [good, 7, {**good, "image": "../a.jpg"}, "\ud83e"]
    (folder / "pairs.json").write_text(json.dumps(items))
    expected = {1: ["item 2: ", "7"], 2: ["item 3: ", "'../a.jpg'"], 3: ["item 4: "]}
    assert_reported(problems(folder), expected)


def test_a_file_of_json_that_is_no_list_is_named(folder):
    (folder / "pairs.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match=r"pairs\.json: .*list"):
        load(folder)


def test_a_streamed_file_names_the_same_lines(folder):
    write_jsonl(folder, GOOD, "{", changed("image", "../red.jpg"))
    stream = preferences.load(str(folder), streaming=True)
    assert [row["problem"] for row in stream] == load(folder)["problem"][:]
    assert load(folder)["problem"][0] is None


@pytest.mark.parametrize("name", ["pairs.JSONL", "Pairs.Jsonl"])
def test_an_ending_in_capitals_is_known(folder, name):
    write_jsonl(folder, GOOD)
    (folder / "pairs.jsonl").rename(folder / name)
    for source in (folder, folder / name):
        assert len(preferences.load(str(source))) == 1


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl"])
def test_a_line_that_is_not_utf_8_is_named_and_the_others_are_still_read(folder, name):
    write = write_csv if name == "pairs.csv" else write_jsonl
    write(folder, GOOD, changed("chosen", "Ein gruenes Feld."), changed("image", "../a.png"), OTHER)
    data = (folder / name).read_bytes().replace(b"grue", "grü".encode("latin-1"))
    (folder / name).write_bytes(data)
    first = 3 if name == "pairs.csv" else 2
    expected = {1: [f"line {first}: ", "UTF-8"], 2: [f"line {first + 1}: ", "'../a.png'"]}
    assert_reported(problems(folder), expected)


def test_two_lines_of_one_row_that_are_not_utf_8_are_one_problem(folder):
    write_csv(folder, GOOD, changed("chosen", "A\nvery ?\nor ?\nred field."), OTHER)
    data = (folder / "pairs.csv").read_bytes().replace(b"?\n", b"\xff\n")
    (folder / "pairs.csv").write_bytes(data)
    assert_reported(problems(folder), {1: ["line 4: ", "UTF-8"]})


def test_a_quote_that_is_never_closed_is_reported_where_it_begins(folder):
    write_csv(folder, GOOD)
    with (folder / "pairs.csv").open("a") as file:
        file.write('red.jpg,"What?,Yes.,No.\nred.jpg,Why?,Yes.,No.\n')
    assert_reported(problems(folder), {1: ["line 3: ", "CSV", "not read"]})


def test_two_problems_of_one_row_are_both_reported(folder):
    write_jsonl(folder, ["broken.png", "What?", "", "No."])
    assert preferences.check(load(folder)) == {"empty chosen": [0], "unreadable image": [0]}


@pytest.mark.parametrize("text", ["", ",".join(COLUMNS) + "\n"])
def test_a_file_without_a_row_is_named(folder, text):
    (folder / "pairs.csv").write_text(text)
    with pytest.raises(ValueError, match=r"pairs\.csv: no row"):
        load(folder)


def test_a_wrong_column_names_those_there_are(folder):
    write_csv(folder, GOOD, columns=["image", "question", "winner", "rejected"])
    with pytest.raises(ValueError, match=r"pairs\.csv.*image, question, rejected, winner"):
        load(folder)


def test_of_several_files_the_one_called_as_the_split_is_read(folder):
    write_jsonl(folder, GOOD)
    (folder / "pairs.jsonl").rename(folder / "train.jsonl")
    write_jsonl(folder, OTHER, OTHER)
    (folder / "pairs.jsonl").rename(folder / "test.jsonl")
    assert len(load(folder)) == 1
    assert len(preferences.load(str(folder), "test[1:]")) == 1
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl, train\.jsonl"):
        preferences.load(str(folder), "validation")


def test_a_review_beside_the_pairs_is_not_taken_for_pairs(folder):
    write_jsonl(folder, GOOD)
    review.write_lines(folder, [])
    assert len(load(folder)) == 1


# Images


@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
def test_a_file_outside_is_refused_and_its_path_is_not_kept(tmp_path, kind):
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(PICTURES["green"])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.jpg").symlink_to(outside)
    name = {"parent": "../outside.jpg", "absolute": str(outside), "link": "link.jpg"}[kind]
    write_jsonl(folder, changed("image", name))
    (row,) = load(folder)
    assert row["images"] == []
    assert repr(name[:80]) in row["problem"]


def test_an_absolute_path_inside_is_read_also_where_the_folder_is_a_link(folder, tmp_path):
    write_jsonl(folder, changed("image", str(folder / "red.jpg")), OTHER)
    (tmp_path / "link").symlink_to(folder)
    assert preferences.check(load(tmp_path / "link")) == {}


@pytest.mark.parametrize("name", ["red.jpg", "pictures/blue.jpg"])
def test_paths_lead_into_the_folder_from_any_working_directory(folder, tmp_path, monkeypatch, name):
    write_jsonl(folder, changed("image", name))
    expected = [[(folder / name).read_bytes()]]
    other = tmp_path / "elsewhere"
    (other / "pictures").mkdir(parents=True)
    (other / name).write_bytes(PICTURES["green"])
    for place, source in ((other, str(folder)), (folder, "."), (other, "../pairs.jsonl")):
        monkeypatch.chdir(place)
        rows = preferences.load(source)
        monkeypatch.chdir(other)
        assert list(preferences.image_bytes(rows)) == expected


ENCODED = base64.b64encode(PICTURES["red"]).decode()


@pytest.mark.parametrize(
    "text",
    [
        ENCODED,
        f"data:image/jpeg;base64,{ENCODED}",
        "\n".join(ENCODED[start : start + 76] for start in range(0, len(ENCODED), 76)),
    ],
)
def test_an_image_may_be_base64(folder, text):
    write_jsonl(folder, changed("image", text))
    assert list(preferences.image_bytes(load(folder))) == [[PICTURES["red"]]]


@pytest.mark.parametrize("text", ["data:image/jpeg;base64,", "data:image/jpeg;base64,?!", "data:"])
def test_a_data_address_without_an_image_is_missing(folder, text):
    write_jsonl(folder, changed("image", text))
    assert preferences.check(load(folder)) == {"missing image": [0]}


@pytest.mark.parametrize("as_stream", [False, True])
def test_an_empty_file_is_a_missing_image_and_not_a_row_without_one(as_stream):
    texts = dict.fromkeys(COLUMNS[1:], Value("string"))
    row = {"image": {"bytes": b"", "path": None}, **dict(zip(COLUMNS[1:], GOOD[1:], strict=True))}
    stored = Dataset.from_list([row], features=Features({"image": Image(), **texts}))
    if as_stream:
        stored = stored.to_iterable_dataset()
    (row,) = layouts.as_rows(stored)
    assert row["images"] == [{"bytes": b"", "path": None}]
