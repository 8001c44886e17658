"""The import of pairs of any layout into a folder that trains: nothing lost, nothing twice."""

import json
import os
import random

import pytest
from layout_files import PICTURES

from scripts import import_pairs
from utils import preferences

NAMES = [f"{color}.jpg" for color in PICTURES]


def line(number, *images, **changes):
    row = {
        "images": images,
        "prompt": f"Question {number}?",
        "chosen": "A field.",
        "rejected": "A dog.",
    }
    return json.dumps({**row, **changes})


def write(folder, *lines):
    folder.mkdir(exist_ok=True)
    for name, data in zip(NAMES, PICTURES.values(), strict=True):
        (folder / name).write_bytes(data)
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def source(tmp_path):
    """Sixty pairs about six images, and rows that cannot be trained on."""
    lines = [line(number, NAMES[number % 6]) for number in range(60)]
    lines[7:7] = [lines[3], "{", line(0, "../red.jpg"), line(0, "lost.jpg")]
    lines.append(line(0, "red.jpg", chosen="A dog.", rejected="A field."))
    return write(tmp_path / "source", *lines)


def run(source, output, *options):
    import_pairs.main([str(source), "--output", str(output), *options])


def tree(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def parts(output):
    return [preferences.load(str(output), name) for name in ("train", "test")]


def asked(rows):
    return [preferences.text_of(row["prompt"]) for row in rows]


def test_every_good_pair_is_written_with_its_images(source, tmp_path):
    run(source, tmp_path / "out")
    found = {}
    for part in parts(tmp_path / "out"):
        assert preferences.check(part) == {}
        for row, files in zip(part, preferences.image_bytes(part), strict=True):
            found[preferences.text_of(row["prompt"])] = files
            texts = [preferences.text_of(row[name]) for name in ("chosen", "rejected")]
            assert texts == ["A field.", "A dog."]
    colors = list(PICTURES.values())
    assert found == {f"Question {number}?": [colors[number % 6]] for number in range(60)}


def test_problems_are_printed_with_their_lines_and_repeated_pairs_are_dropped(
    source, tmp_path, capsys
):
    run(source, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "60 of 65 rows" in printed
    for fact in (
        "line 9: not JSON",
        "line 10: the image '../red.jpg'",
        "missing image: 1 rows (10)",
        "duplicate pair: 1 rows (7)",
        "preferred both ways: 1 rows (64)",
        str(tmp_path / "out"),
    ):
        assert fact in printed


def test_no_image_is_written_twice(source, tmp_path):
    (source / "again.jpg").write_bytes(PICTURES["red"])
    with (source / "pairs.jsonl").open("a") as file:
        file.write("\n" + line(99, "again.jpg"))
    run(source, tmp_path / "out")
    written = [data for name, data in tree(tmp_path / "out").items() if "images" in name]
    assert sorted(written) == sorted(PICTURES.values())


def test_other_images_and_a_tenth_of_the_pairs_are_held_out(tmp_path):
    lines = [line(number, NAMES[min(number // 2, 5)]) for number in range(100)]
    run(write(tmp_path / "source", *lines), tmp_path / "out")
    train, test = parts(tmp_path / "out")
    assert preferences.check(train, held_out=[test]) == {}
    assert len(test) == 10
    assert len(train) == 90


def test_pairs_that_share_an_image_with_others_are_on_the_same_side():
    images = {0: "a", 1: "ab", 2: "bc", 3: "d", 4: "de", 5: "e", 6: ""}
    pairs = {number: {"images": list(names)} for number, names in images.items()}
    groups = list(import_pairs.groups_by_image(pairs).values())
    assert sorted(groups) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("seed", range(5))
def test_never_more_than_a_tenth_is_held_out_where_that_is_possible(seed):
    rng = random.Random(seed)
    pairs = {number: {"images": [str(rng.randrange(30))]} for number in range(200)}
    train, test = import_pairs.hold_out(pairs, rng)
    assert train.keys() | test.keys() == pairs.keys()
    assert 15 <= len(test) <= 20
    images = [{*row["images"]} for row in train.values()]
    assert not set().union(*images) & set().union(*(row["images"] for row in test.values()))


def test_several_images_none_turns_and_images_of_answers_come_back(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>Is it red?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And <image>?"},
    ]
    lines = [
        line(0, "red.jpg", "blue.jpg", prompt=turns),
        line(1),
        line(2, "green.jpg", rejected_images=["yellow.jpg"]),
    ]
    source = write(tmp_path / "source", *lines)
    run(source, tmp_path / "out")

    def contents(rows):
        found = {}
        for row in rows:
            number = preferences.text_of(row["prompt"])
            found[number] = [row[name] for name in ("prompt", "chosen", "rejected")]
            for column in ("images", "rejected_images"):
                files = [import_pairs.file_bytes(stored) for stored in row.get(column) or []]
                found[number].append(files)
        return found

    train, test = parts(tmp_path / "out")
    assert contents([*train, *test]) == contents(preferences.load(str(source)))


def test_a_warning_drops_nothing_and_is_printed(tmp_path, capsys):
    chosen = "A field that is red from one end to the"
    source = write(tmp_path / "source", line(0, "red.jpg", chosen=chosen), line(1, "blue.jpg"))
    run(source, tmp_path / "out")
    assert preferences.NO_END in capsys.readouterr().out
    assert sum(len(part) for part in parts(tmp_path / "out")) == 2


def test_a_limit_and_its_seed_choose_the_rows(source, tmp_path):
    drawn = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(source, tmp_path / name, "--limit", "20", "--shuffle", seed)
        drawn.append(sorted(asked(parts(tmp_path / name)[0])))
    assert drawn[0] == drawn[1] != drawn[2]
    assert 10 < len(drawn[0]) < 20


@pytest.mark.parametrize("place", ["elsewhere", "source", "decoy"])
def test_the_output_is_the_same_from_any_working_directory(source, tmp_path, monkeypatch, place):
    run(source, tmp_path / "expected")
    decoy = tmp_path / "decoy"
    (tmp_path / "elsewhere").mkdir()
    write(decoy, line(0, "red.jpg"))
    for name in NAMES:
        (decoy / name).write_bytes(b"another file of this name")
    monkeypatch.chdir(tmp_path / place)
    for path in (source, os.path.relpath(source)):
        run(path, tmp_path / "found")
        assert tree(tmp_path / "found") == tree(tmp_path / "expected")
        (tmp_path / "found").rename(tmp_path / f"from {os.path.isabs(path)}")


def test_what_is_imported_names_no_folder_of_this_machine(source, tmp_path):
    run(source, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert preferences.check(parts(tmp_path / "moved")[0]) == {}
    assert not [
        data for data in tree(tmp_path / "moved").values() if str(tmp_path).encode() in data
    ]


@pytest.mark.parametrize(("step", "calls"), [("copy_image", 4), ("write_part", 1), ("move", 40)])
def test_a_run_that_is_killed_leaves_nothing_that_looks_complete(
    source, tmp_path, monkeypatch, step, calls
):
    whole = getattr(import_pairs, step)
    seen = []

    def killed(*arguments):
        seen.append(1)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return whole(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(import_pairs, step, killed)
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out")
    run(source, tmp_path / "undisturbed")
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "undisturbed"]


def test_an_existing_folder_is_not_touched(source, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="out already exists"):
        run(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([line(0, "lost.jpg"), line(1, "../red.jpg")], "nothing"),
        ([line(0, "red.jpg"), line(1, "red.jpg")], "one image"),
        (["{"], "line 1"),
    ],
)
def test_what_cannot_be_split_writes_nothing(tmp_path, lines, reason):
    source = write(tmp_path / "source", *lines)
    with pytest.raises(SystemExit, match=reason):
        run(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_drawn_scenes_are_imported_from_parquet(tmp_path):
    run("embedded/dataset", tmp_path / "out", "--limit", "30", "--split", "test")
    train, test = parts(tmp_path / "out")
    assert (len(train), len(test)) == (27, 3)
    assert preferences.check(train, held_out=[test]).keys() <= set(preferences.WARNINGS)
