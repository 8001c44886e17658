"""Pairs from a folder of pictures: what is read, kept, resumed, refused and reported.

The models are scripted; tests/slow/test_quickstart_commands.py runs the command with a real one.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from PIL import Image

from scripts import make_pairs
from utils import pairing, review, settings
from utils.settings import PROFILES

SETTINGS = replace(PROFILES["embedded"], generation_batch_size=4)  # two pictures of two samples


def gray(path, level):
    Image.new("RGB", (8, 8), (level, level, level)).save(path)


def level_of(image):
    return image.getpixel((0, 0))[0]


class Scripted:
    """What stands for the models: it counts what it is asked, and may be stopped."""

    def __init__(self):
        self.said = ["said badly.", "said well."]
        self.ended = True
        self.listed = None  # the answer to the request to list claims
        self.calls = []  # (what is asked, the gray levels of the images)
        self.stop_at = None  # number of the call in which the run is killed

    def called(self, what, images):
        self.calls.append((what, [level_of(image) for image in images]))
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt

    def generated(self, profile, model, processor, images, questions, samples):
        """Answers that depend on the image and on torch's random numbers."""
        self.called("answers", images)
        answers = []
        for image in images:
            drawn = int(torch.randint(1000, ()))
            texts = [f"Level {level_of(image)} with {drawn}, {said}" for said in self.said]
            answers.append([{"text": text, "ended": self.ended} for text in texts])
        return answers

    def model_judge(self, profile, model, processor, claims, rows):
        """Reject what was said badly; fail where a sentence is judged on another image."""
        self.called("verdicts", [row["image"] for row in rows])
        verdicts = []
        for claim, row in zip(claims, rows, strict=True):
            if claim.startswith("Level"):
                assert claim.startswith(f"Level {level_of(row['image'])} ")
            verdicts.append("badly" not in claim)
        return verdicts

    def asked_to_list(self, profile, model, processor, images, questions):
        return [{"text": self.listed, "ended": True} for _ in questions]


@pytest.fixture
def scripted(monkeypatch):
    """Replace the models of make_pairs."""
    script = Scripted()
    monkeypatch.setattr(settings, "load", lambda profile: SETTINGS)
    monkeypatch.setattr(make_pairs, "load_model", lambda profile: None)
    monkeypatch.setattr(make_pairs, "load_processor", lambda profile: None)
    monkeypatch.setattr(make_pairs, "special_tokens", lambda processor: ["<image>"])
    monkeypatch.setattr(make_pairs, "generated", script.generated)
    monkeypatch.setattr(pairing, "model_judge", script.model_judge)
    return script


@pytest.fixture
def folder(tmp_path):
    """Five pictures of different gray levels."""
    return five_pictures(tmp_path / "pictures")


def five_pictures(folder):
    folder.mkdir()
    for number in range(5):
        gray(folder / f"{number}.png", number)
    return folder


def read(folder):
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def make(folder, *options):
    make_pairs.main([str(folder), "--samples", "2", *options])


# What is read


def test_images_are_found_in_all_folders_and_others_are_counted_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(make_pairs.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "more").mkdir()
    gray(tmp_path / "01.png", 1)
    gray(tmp_path / "more" / "02.JPG", 2)
    (tmp_path / "broken.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "notes.txt").write_text("not for training")
    (tmp_path / "review.jsonl").touch()
    (tmp_path / ".make_pairs").mkdir()
    (tmp_path / ".make_pairs" / "answers.jsonl").touch()
    digests, left_out = make_pairs.readable_images(tmp_path)
    assert list(digests) == ["01.png", "more/02.JPG"]
    unreadable, photographs, others = left_out
    assert unreadable.startswith("2 ") and "broken.jpg" in unreadable and "empty.jpg" in unreadable
    assert photographs == "1 HEIC photographs: IMG_1.HEIC; `pip install pillow-heif`"
    assert others.startswith("1 ") and others.endswith(": notes.txt")


def test_only_the_first_of_many_files_are_named():
    assert make_pairs.named(list("abcdefg"), ", ", "{} files: {}") == ["7 files: a, b, c, d, e, …"]
    assert make_pairs.named([], ", ", "{} files: {}") == []


def test_a_folder_without_images_says_what_is_in_it(tmp_path):
    with pytest.raises(SystemExit, match="it is empty"):
        make(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit, match=r"notes\.txt"):
        make(tmp_path)


def test_damage_behind_a_header_costs_one_picture(scripted, folder, capsys):
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    make(folder)
    assert [pair["image"] for pair in read(folder)] == ["0.png", "1.png", "3.png", "4.png"]
    assert "left out: 1 cannot be read: 2.png" in capsys.readouterr().out


def test_pictures_are_reduced_to_the_pixel_budget(scripted, tmp_path, monkeypatch):
    Image.new("RGB", (1500, 1000)).save(tmp_path / "large.jpg")
    sizes = []
    generated = scripted.generated

    def looking(profile, model, processor, images, questions, samples):
        sizes.extend(image.width * image.height for image in images)
        return generated(profile, model, processor, images, questions, samples)

    monkeypatch.setattr(make_pairs, "generated", looking)
    make(tmp_path)
    assert 0.8 * SETTINGS.pixel_budget < sizes[0] <= SETTINGS.pixel_budget


# What is made


def test_every_image_keeps_its_answers_and_verdicts(scripted, folder):
    make(folder)
    pairs = read(folder)
    assert len(pairs) == 5
    for number, pair in enumerate(pairs):
        assert list(pair) == ["image", "question", "chosen", "rejected"]
        assert pair["image"] == f"{number}.png"
        assert pair["question"] == "Describe the image."
        assert pair["chosen"].startswith(f"Level {number} ") and "well" in pair["chosen"]
        assert pair["rejected"].startswith(f"Level {number} ") and "badly" in pair["rejected"]


def test_a_judge_that_accepts_everything_leaves_no_pair(scripted, folder, monkeypatch):
    monkeypatch.setattr(pairing, "model_judge", lambda *loaded: [True] * len(loaded[-1]))
    with pytest.raises(SystemExit, match="--samples"):
        make(folder)
    assert not (folder / "pairs.jsonl").exists()


def test_answers_that_are_no_candidates_are_counted_by_kind(scripted, folder, capsys):
    scripted.said = ["!!", "said well.", "said badly.", "a cup a cup a cup", "it is <image>."]
    make(folder, "--samples", "5")
    shown = capsys.readouterr().out
    assert "25 answers, 10 of them no candidates" in shown
    assert f"5 {pairing.REPEATS}" in shown
    assert f"5 {pairing.SPECIAL}" in shown
    for pair in read(folder):
        assert not any(word in str(pair) for word in ("a cup", "<image>"))


def test_cut_answers_are_no_candidates_and_the_way_out_is_named(scripted, folder, capsys):
    scripted.ended = False
    with pytest.raises(SystemExit, match="no pair"):
        make(folder)
    shown = capsys.readouterr().out
    assert f"10 {pairing.CUT}" in shown and "--max-new-tokens" in shown


def test_the_cost_of_a_thousand_pictures_is_told(scripted, folder, capsys):
    make(folder)
    assert "minutes for 1,000" in capsys.readouterr().out


def test_pairs_of_sentences_begin_alike(scripted, folder):
    scripted.said = ["red. A badly seen dog. A kite.", "red. A cat. A kite."]
    make(folder, "--pairs", "sentence")
    for pair in read(folder):
        assert pair["chosen"].endswith("red. A cat.")
        assert pair["rejected"].endswith("red. A badly seen dog.")
        assert pair["chosen"].split("red.")[0] == pair["rejected"].split("red.")[0]


def test_claims_are_those_that_the_model_lists(scripted, folder, monkeypatch, capsys):
    """The model is scripted: it lists two claims whatever the answer says."""
    monkeypatch.setattr(pairing, "generated", scripted.asked_to_list)
    monkeypatch.setattr(pairing, "processed_once", nullcontext)
    monkeypatch.setattr(pairing, "special_tokens", lambda processor: [])
    scripted.listed = "Claims:\n1. One is badly seen.\n2. One is not."
    with pytest.raises(SystemExit, match="no pair"):  # the answers have the same claims
        make(folder, "--claims", "listed")
    assert "the claims of 0 of 10 answers could not be listed" in capsys.readouterr().out
    lines = make_pairs.kept_header(folder / ".make_pairs" / "verdicts.jsonl")
    assert lines["claims"] == "listed"
    (folder / ".make_pairs" / "verdicts.jsonl").unlink()
    scripted.listed = ""  # then the claims are the sentences
    make(folder, "--claims", "listed")
    assert "the claims of 10 of 10 answers could not be listed" in capsys.readouterr().out
    assert len(read(folder)) == 5


# Going on


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5, 6])
def test_a_run_that_was_killed_goes_on_to_the_same_pairs(scripted, tmp_path, stop_at):
    """There are three batches to answer and three to judge."""
    whole = five_pictures(tmp_path / "whole")
    stopped = five_pictures(tmp_path / "stopped")
    make(whole)
    undisturbed = list(scripted.calls)
    assert len(undisturbed) == 6

    scripted.calls.clear()
    scripted.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        make(stopped)
    assert not (stopped / "pairs.jsonl").exists()
    # The last line was half written.
    for path in (stopped / ".make_pairs").iterdir():
        with open(path, "ab") as file:
            file.write(b'[{"image": "4.p')
    scripted.stop_at = None
    torch.rand(stop_at)  # other random numbers than those of the first run
    make(stopped)
    assert (stopped / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    # Only what was cut off is asked again, and nothing by one more run.
    (stopped / "pairs.jsonl").unlink()
    make(stopped)
    assert (stopped / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    assert scripted.calls == undisturbed[:stop_at] + undisturbed[stop_at - 1 :]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--question", "What is it?"], "What is it"),
        (["--samples", "3"], "samples 2, and now it is 3"),
        (["--max-new-tokens", "7"], "max_new_tokens 96, and now it is 7"),
    ],
)
def test_other_settings_are_refused(scripted, folder, options, named):
    make(folder)
    (folder / "pairs.jsonl").unlink()
    with pytest.raises(SystemExit, match=named):
        make(folder, *options)
    with pytest.raises(SystemExit, match=r"answers\.jsonl.*delete it"):
        make(folder, *options)


def test_another_seed_is_refused(scripted, folder, monkeypatch):
    make(folder)
    (folder / "pairs.jsonl").unlink()
    monkeypatch.setattr(settings, "load", lambda profile: replace(SETTINGS, seed=1))
    with pytest.raises(SystemExit, match="seed 0, and now it is 1"):
        make(folder)


def test_another_judge_needs_only_new_verdicts(scripted, folder, monkeypatch):
    make(folder)
    (folder / "pairs.jsonl").unlink()
    other = replace(SETTINGS, profile="other")
    monkeypatch.setattr(settings, "load", lambda profile: other if profile else SETTINGS)
    with pytest.raises(SystemExit, match=r"verdicts\.jsonl was made with profile 'embedded'"):
        make(folder, "--judge", "other")
    (folder / ".make_pairs" / "verdicts.jsonl").unlink()
    scripted.calls.clear()
    make(folder, "--judge", "other")
    assert {what for what, _ in scripted.calls} == {"verdicts"}


def test_new_and_changed_pictures_are_answered_and_no_other(scripted, folder):
    make(folder)
    (folder / "pairs.jsonl").unlink()
    gray(folder / "0.png", 100)
    gray(folder / "5.png", 5)
    scripted.calls.clear()
    make(folder)
    answered = [levels for what, levels in scripted.calls if what == "answers"]
    assert answered == [[100, 5]]
    images = [pair["image"] for pair in read(folder)]
    assert images == [f"{number}.png" for number in range(6)]
    assert read(folder)[0]["chosen"].startswith("Level 100 ")


def test_a_damaged_line_is_named(scripted, folder):
    make(folder)
    (folder / "pairs.jsonl").unlink()
    path = folder / ".make_pairs" / "answers.jsonl"
    path.write_bytes(path.read_bytes().replace(b"[{", b"[", 1))
    with pytest.raises(SystemExit, match="line 2 of"):
        make(folder)


def test_pairs_are_not_overwritten(scripted, folder):
    make(folder)
    with pytest.raises(SystemExit, match="already exists"):
        make(folder)


def test_a_missing_splitter_is_noticed_before_anything_is_sampled(scripted, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(SystemExit, match="pip install sentencex"):
        make(folder)
    assert scripted.calls == []


# Review


def judge_as(folder, right):
    """Judge every claim of the review; `right(line)` says whether the judge was right."""
    lines = review.read_lines(folder)
    for line in lines:
        line["person"] = line["accepted"] == right(line)
    review.write_lines(folder, lines)


def test_a_review_comes_before_the_pairs_and_decides(scripted, folder, capsys):
    make(folder, "--review", "10")
    assert not (folder / "pairs.jsonl").exists()
    assert "review.verdicts" in capsys.readouterr().out
    lines = review.read_lines(folder)
    assert sorted(line["accepted"] for line in lines) == [False] * 5 + [True] * 5

    with pytest.raises(SystemExit, match="nobody has judged"):
        make(folder, "--review", "10")
    judge_as(folder, lambda line: line["accepted"])  # wrong about every rejected claim
    with pytest.raises(SystemExit, match="not worth training on"):
        make(folder)
    assert not (folder / "pairs.jsonl").exists()
    judge_as(folder, lambda line: True)
    make(folder)
    assert len(read(folder)) == 5
    assert "of 5 rejected claims the judge judged 5 rightly" in capsys.readouterr().out


def test_a_poor_judge_s_pairs_are_kept_if_asked_for(scripted, folder):
    make(folder, "--review", "10")
    judge_as(folder, lambda line: False)
    make(folder, "--keep-anyway")
    assert len(read(folder)) == 5


def test_a_review_of_other_verdicts_is_refused(scripted, folder):
    make(folder, "--review", "10")
    lines = review.read_lines(folder)
    lines[3]["claim"] = "Something else."
    review.write_lines(folder, lines)
    with pytest.raises(SystemExit, match="Something else"):
        make(folder)


# Options


@pytest.mark.parametrize(
    "options",
    [
        ["--samples", "1"],
        ["--review", "0"],
        ["--max-new-tokens", "0"],
        ["--pairs", "sentence", "--claims", "listed"],
    ],
)
def test_options_that_cannot_work_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        make_pairs.main(["folder", *options])
    assert options[0] in capsys.readouterr().err
