"""The README's commands, from a folder of images to an adapter that answers, on embedded."""

import json

import pytest
from datasets import load_dataset

from scripts import ask, import_pairs, make_pairs, train
from utils.settings import locate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve drawn scenes, one of them in a folder of its own."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for number, row in enumerate(load_dataset(locate("embedded/dataset"), split="test[:12]")):
        name = "more/11.jpg" if number == 11 else f"{number:02}.png"
        row["image"].save(folder / name)
    return folder


@pytest.fixture(scope="module")
def pairs(folder):
    """The pairs that the model makes of them."""
    make_pairs.main([str(folder)])
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_images_become_pairs(folder, pairs):
    assert len(pairs) >= 2 and len({pair["image"] for pair in pairs}) >= 2
    for pair in pairs:
        assert list(pair) == ["image", "question", "chosen", "rejected"]
        assert (folder / pair["image"]).exists()
        assert pair["question"] == "Describe the image."
        assert pair["chosen"] != pair["rejected"]


def test_pairs_are_not_overwritten(folder, pairs):
    before = (folder / "pairs.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=r"pairs\.jsonl"):
        make_pairs.main([str(folder)])
    assert (folder / "pairs.jsonl").read_bytes() == before


def test_pairs_become_an_adapter_that_answers(folder, pairs, tmp_path, capsys):
    data = str(tmp_path / "data")
    import_pairs.main([str(folder), "--output", data])
    train.main(["--dataset", data, "--output", str(tmp_path), "--max-steps", "1"])
    settings = json.loads((tmp_path / "training.json").read_text())["settings"]
    assert (settings["dataset"], settings["train_split"]) == (data, "train")
    capsys.readouterr()
    ask.main([str(folder / "00.png"), "--adapter", str(tmp_path / "adapter")])
    shown = capsys.readouterr().out
    assert shown.count("base:  ") == shown.count("tuned: ") == 1 and len(shown) > 60
