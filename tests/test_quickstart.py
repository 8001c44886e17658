"""What the README's commands say when something is wrong, and that each image keeps its answers.

tests/slow/test_quickstart_commands.py runs the commands to the end.
"""

import json
from dataclasses import replace

import pytest
from PIL import Image

from scripts import ask, import_pairs, make_pairs, train
from utils import pairing, preferences, settings
from utils.settings import EMBEDDED_DATASET, PROFILES

SETTINGS = PROFILES["embedded"]


def gray(path, level):
    Image.new("RGB", (8, 8), (level, level, level)).save(path)


def test_images_are_found_in_all_folders_and_others_are_reported(tmp_path):
    (tmp_path / "more").mkdir()
    gray(tmp_path / "01.png", 1)
    gray(tmp_path / "more" / "02.JPG", 2)
    (tmp_path / "broken.jpg").write_text("not an image")
    (tmp_path / "notes.txt").write_text("not for training")
    names, problems = make_pairs.readable_images(tmp_path)
    assert names == ["01.png", "more/02.JPG"]
    assert len(problems) == 1 and "broken.jpg" in problems[0]


def test_a_folder_without_images_says_so(tmp_path):
    with pytest.raises(SystemExit, match=tmp_path.name):
        make_pairs.main([str(tmp_path)])


@pytest.fixture
def fakes(monkeypatch):
    """Replace the models of make_pairs, and ask about two images at a time.

    Every answer names the gray level of its image. The judge rejects what was "said badly", and
    fails when the sentence of one image is judged on another.
    """

    def level(image):
        return image.getpixel((0, 0))[0]

    def answer(profile, model, processor, images, questions, samples):
        said = ["badly", "well"]
        return [[f"Level {level(image)}, said {word}." for word in said] for image in images]

    def model_judge(profile, model, processor, claims, rows):
        verdicts = []
        for claim, row in zip(claims, rows, strict=True):
            assert claim.startswith(f"Level {level(row['image'])},")
            verdicts.append("badly" not in claim)
        return verdicts

    small = replace(SETTINGS, generation_batch_size=2)
    monkeypatch.setattr(settings, "load", lambda profile: small)
    monkeypatch.setattr(make_pairs, "load_model", lambda profile: None)
    monkeypatch.setattr(make_pairs, "load_processor", lambda profile: None)
    monkeypatch.setattr(make_pairs, "answer", answer)
    monkeypatch.setattr(pairing, "model_judge", model_judge)


def test_every_image_keeps_its_answers_and_verdicts(fakes, tmp_path):
    for number in range(5):
        gray(tmp_path / f"{number}.png", number)
    make_pairs.main([str(tmp_path)])
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    assert len(lines) == 5
    for number, line in enumerate(lines):
        pair = json.loads(line)
        assert pair["image"] == f"{number}.png"
        assert pair["chosen"] == f"Level {number}, said well."
        assert pair["rejected"] == f"Level {number}, said badly."


def test_a_judge_that_accepts_everything_leaves_no_pair(fakes, tmp_path, monkeypatch):
    gray(tmp_path / "black.png", 0)
    monkeypatch.setattr(pairing, "model_judge", lambda *loaded: [True] * len(loaded[-1]))
    with pytest.raises(SystemExit, match="--samples"):
        make_pairs.main([str(tmp_path)])
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_question_without_adapter_or_image_says_what_is_missing(tmp_path):
    image = str(tmp_path / "black.png")
    gray(image, 0)
    with pytest.raises(SystemExit, match=r"adapter_config\.json"):
        ask.main([image, "--adapter", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"lost\.png"):
        ask.main([str(tmp_path / "lost.png"), "--adapter", str(tmp_path)])
    (tmp_path / "adapter").mkdir()  # a run's folder instead of the adapter in it
    with pytest.raises(SystemExit, match=f"did you mean {tmp_path / 'adapter'}"):
        ask.main([image, "--adapter", str(tmp_path)])


@pytest.mark.parametrize(
    ("command", "arguments", "named"),
    [
        (make_pairs, ["lost"], "lost"),
        (import_pairs, ["lost"], "lost"),
        (import_pairs, ["empty"], r"scripts\.make_pairs"),
        (train, ["--dataset", "lost"], r"lost.*scripts\.import_pairs"),
        (train, ["--dataset", "empty"], "empty, split train"),
    ],
)
def test_a_folder_that_is_missing_or_empty_is_named_with_the_way_out(
    command, arguments, named, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=named):
        command.main(arguments)


def test_rows_that_cannot_be_trained_on_are_dropped_and_named(processor, tmp_path, capsys):
    rows = preferences.load(EMBEDDED_DATASET, "train[:40]")
    rows = rows.select_columns(["image", "question", "chosen", "rejected"])
    bad = {3: "A cup.</s>", 17: "", 30: rows[30]["rejected"]}
    chosen = [bad.get(number, text) for number, text in enumerate(rows["chosen"])]
    spoiled = rows.remove_columns("chosen").add_column("chosen", chosen)
    spoiled.to_parquet(tmp_path / "train.parquet")
    settings = replace(SETTINGS, dataset=str(tmp_path), train_split="train")
    pairs = train.load_pairs(settings, processor)
    shown = capsys.readouterr().out
    assert len(pairs) == 37
    assert "3 of 40 rows" in shown
    for number in bad:
        assert f"({number})" in shown
    assert "37 pairs" in shown
