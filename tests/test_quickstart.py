"""The README's way from a folder of pictures to a tuned adapter, command by command, with the embedded model."""

import json

import pytest
from PIL import Image

from scripts import ask, import_pairs, make_pairs, train
from utils import pairing, preferences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve drawn scenes, one of them in a folder of its own, a file that is no picture, and one that only says so."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for number, row in enumerate(preferences.load("embedded/dataset", "test[:12]")):
        row["image"].save(folder / ("more/11.jpg" if number == 11 else f"{number:02}.png"))
    (folder / "broken.jpg").write_text("not an image")
    (folder / "notes.txt").write_text("not for training")
    return folder


@pytest.fixture(scope="module")
def pairs(folder):
    """The pairs that the model makes of them."""
    make_pairs.main([str(folder), "--samples", "4"])
    return [
        json.loads(line)
        for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_pictures_become_pairs(folder, pairs):
    assert make_pairs.pictures(folder)[0] == [
        *(f"{number:02}.png" for number in range(11)),
        "more/11.jpg",
    ]
    assert len(pairs) >= 2 and len({pair["image"] for pair in pairs}) >= 2
    assert all(
        list(pair) == ["image", "question", "chosen", "rejected"]
        and pair["chosen"] != pair["rejected"]
        for pair in pairs
    )
    assert {pair["question"] for pair in pairs} == {"Describe the image."}


def test_pairs_are_not_overwritten(folder, pairs):
    before = (folder / "pairs.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="is there already"):
        make_pairs.main([str(folder)])
    assert (folder / "pairs.jsonl").read_bytes() == before


def test_what_is_no_picture_is_reported(folder):
    _, problems = make_pairs.pictures(folder)
    assert problems == [
        "broken.jpg cannot be read: its bytes are not an image file that Pillow knows"
    ]


def test_a_folder_without_pictures_says_so(tmp_path):
    with pytest.raises(
        SystemExit, match="no picture that can be read: no file has the ending of one"
    ):
        make_pairs.main([str(tmp_path)])


def test_a_judge_that_accepts_everything_leaves_no_pair(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    monkeypatch.setattr(pairing, "model_judge", lambda claims, rows, **loaded: [True] * len(claims))
    with pytest.raises(SystemExit, match=r"there is no pair to balance.*More --samples"):
        make_pairs.main([str(tmp_path), "--samples", "2"])
    assert not (tmp_path / "pairs.jsonl").exists()


def test_answers_and_verdicts_keep_to_their_picture(tmp_path, monkeypatch):
    """Pictures are asked about some at a time; the grey level of each says which it is, through sampling, judging and pairing."""
    for number in range(5):
        Image.new("RGB", (8, 8), (number,) * 3).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(make_pairs, "load_model", lambda settings: None)
    monkeypatch.setattr(make_pairs, "load_processor", lambda settings: None)
    monkeypatch.setattr(
        make_pairs,
        "load",
        lambda name: type("Settings", (), {"generation_batch_size": 2, "seed": 0}),
    )

    def answers(model, processor, images, questions, settings, samples):
        return [
            [
                f"Picture {image.getpixel((0, 0))[0]}, said {'well' * (k == 1)}{'badly' * (k == 0)}."
                for k in range(2)
            ]
            for image in images
        ]

    def looks(claims, rows, model, processor, settings):
        assert all(
            claim.startswith(f"Picture {row['image'].getpixel((0, 0))[0]},")
            for claim, row in zip(claims, rows, strict=True)
        )
        return ["badly" not in claim for claim in claims]

    monkeypatch.setattr(make_pairs, "answer", answers)
    monkeypatch.setattr(pairing, "model_judge", looks)
    make_pairs.main([str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    expected = [
        (f"{n}.png", f"Picture {n}, said well.", f"Picture {n}, said badly.") for n in range(5)
    ]
    assert [(line["image"], line["chosen"], line["rejected"]) for line in lines] == expected


def test_pairs_become_an_adapter_that_answers(folder, pairs, tmp_path, capsys):
    import_pairs.main([str(folder)])
    train.main(["--dataset", str(folder / "data"), "--output", str(tmp_path), "--max-steps", "1"])
    record = json.loads((tmp_path / "training.json").read_text())
    assert (
        record["settings"]["dataset"] == str(folder / "data")
        and record["settings"]["train_split"] == "train"
    )
    capsys.readouterr()
    ask.main([str(folder / "00.png"), "--adapter", str(tmp_path / "adapter")])
    shown = capsys.readouterr().out
    assert shown.count("base:  ") == shown.count("tuned: ") == 1 and len(shown) > 60


def test_a_question_without_adapter_or_picture_says_what_is_missing(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"adapter_config\.json is missing: train"):
        ask.main([str(folder / "00.png"), "--adapter", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"lost\.png cannot be read"):
        ask.main([str(folder / "lost.png"), "--adapter", str(tmp_path)])
    (tmp_path / "adapter").mkdir()
    with pytest.raises(
        SystemExit, match=r"adapter_config\.json is missing: did you mean .*adapter\?"
    ):
        ask.main([str(folder / "00.png"), "--adapter", str(tmp_path)])


@pytest.mark.parametrize(
    ("command", "arguments", "way_out"),
    [
        (make_pairs, ["lost"], "there is no folder lost"),
        (import_pairs, ["lost"], "there is no folder lost"),
        (import_pairs, ["."], "or let python -m scripts.make_pairs make it"),
        (train, ["--dataset", "lost"], "there is no folder lost: python -m scripts.import_pairs"),
        (
            train,
            ["--dataset", "."],
            r"\., split train, revision main cannot be loaded: .* What helps:",
        ),
    ],
)
def test_a_folder_that_is_missing_or_empty_is_named_with_the_way_out(
    command, arguments, way_out, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=way_out):
        command.main(arguments)


def test_rows_that_cannot_be_trained_on_are_dropped_and_named(tmp_path, capsys):
    rows = preferences.load("embedded/dataset", "train[:40]").select_columns(
        ["image", "question", "chosen", "rejected"]
    )
    bad = {3: "A cup.</s>", 17: "", 30: rows[30]["rejected"]}
    (tmp_path / "data").mkdir()
    spoilt = rows.map(
        lambda row, number: {"chosen": bad.get(number, row["chosen"])}, with_indices=True
    )
    spoilt.to_parquet(tmp_path / "data" / "train.parquet")
    train.main(
        [
            "--dataset",
            str(tmp_path / "data"),
            "--output",
            str(tmp_path / "run"),
            "--max-steps",
            "1",
            "--no-preflight",
        ]
    )
    shown = capsys.readouterr().out
    assert "3 of 40 rows dropped: " in shown and shown.count("1 rows (") == 3
    for reported in (
        "special token in chosen: 1 rows (3)",
        "empty chosen: 1 rows (17)",
        "chosen equals rejected: 1 rows (30)",
    ):
        assert reported in shown
    assert "37 pairs; 0 longer" in shown
