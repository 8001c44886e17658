"""What the README's commands say when something is wrong.

tests/test_make_pairs.py has more about making pairs, and tests/slow/test_quickstart_commands.py
runs the commands to the end.
"""

from dataclasses import replace

import pytest
from datasets import load_dataset
from PIL import Image

from scripts import ask, import_pairs, make_pairs, train
from utils.settings import EMBEDDED_DATASET, PROFILES, locate

SETTINGS = PROFILES["embedded"]


def gray(path, level):
    Image.new("RGB", (8, 8), (level, level, level)).save(path)


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
        (import_pairs, ["./lost", "--output", "out"], "lost"),
        (import_pairs, ["empty", "--output", "out"], "empty, split train"),
        (train, ["--dataset", "./lost"], "lost"),
        (train, ["--dataset", "lost.jsonl"], r"lost\.jsonl"),
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
    rows = load_dataset(locate(EMBEDDED_DATASET), split="train[:40]")
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
