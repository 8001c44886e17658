import numpy as np
import pytest

from embedded.scenes import describe
from utils.hallucination import (
    chair,
    chair_counts,
    claims,
    holm,
    is_right,
    left_out,
    mcnemar,
    mentions,
    paired_difference,
    pope,
    pope_counts,
    rate,
    says_no,
    wrong_spans,
)

SCENE = [{"category": "cup", "colour": "red", "place": "top left"}, {"category": "book", "colour": "blue", "place": "center"}]


def test_mentions_counts_every_occurrence_plurals_and_synonyms():
    assert mentions("A red cup, two cups and a Mug beside the BOOK.") == ["cup", "cup", "cup", "book"]
    assert mentions("A cupboard full of bookshelves and a carpet.") == []


def test_a_true_description_makes_only_right_claims():
    text = describe(SCENE)
    made = claims(text)
    assert [c["kind"] for c in made] == ["place", "colour", "object"] * 2
    assert all(is_right(c, SCENE) for c in made) and wrong_spans(text, SCENE) == [] and left_out(text, SCENE) == []


def test_each_wrong_claim_is_found_where_it_stands():
    text = "At the top left there is a green cup. On the right there is a yellow clock."
    assert [text[start:end] for start, end in wrong_spans(text, SCENE)] == ["green", "right", "yellow", "clock"]
    assert left_out(text, SCENE) == ["book"]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("No, there is no clock.", True),
        ("No, there is no cup.", False),
        ("Yes, there is a cup.", True),
        ("Yes, there is a clock.", False),
        ("There are two objects.", True),
        ("There is one object.", False),
        ("At the top there is nothing.", True),
        ("In the center there is nothing.", False),
        ("The cup is red.", True),
        ("The cup is blue.", False),
        ("The book is in the center.", True),
        ("The book is at the bottom left.", False),
    ],
)
def test_answers_to_questions_are_judged(text, right):
    made = claims(text)
    assert made and all(is_right(c, SCENE) for c in made) is right


def test_in_one_sentence_each_colour_belongs_to_the_next_object():
    said = {(c["kind"], c["category"], c["value"]) for c in claims("There is a red cup and a blue book.")}
    assert said == {("colour", "cup", "red"), ("colour", "book", "blue"), ("object", "cup", True), ("object", "book", True)}


def test_chair_by_hand():
    said, truths = [["cup", "clock", "clock"], ["book"], []], [["cup", "book"], ["book"], ["car"]]
    assert chair(said, truths) == {"chair_i": 2 / 4, "chair_s": 1 / 3, "recall": 2 / 4}
    assert chair_counts(said, truths)["chair_i"].tolist() == [[2, 3], [0, 1], [0, 0]]


def test_chair_without_any_mention_says_so():
    with pytest.raises(ZeroDivisionError, match="no answer names any object"):
        chair([[]], [["cup"]])


@pytest.mark.parametrize("answer", ["NO", "none", "No!", "no\n", "It isn't", "", "Maybe", "Yes. No.", "Yes, there is a cup."])
def test_pope_reads_these_as_yes(answer):
    assert not says_no(answer)


@pytest.mark.parametrize("answer", ["No", "no", "No, there is no cup.", "Yes, not a doubt", "It is not, I think"])
def test_pope_reads_these_as_no(answer):
    assert says_no(answer)


def test_pope_by_hand():
    scores = pope(["Yes", "Yes", "No", "No"], ["yes", "no", "no", "yes"])
    assert scores == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}
    with pytest.raises(ZeroDivisionError, match="every answer is a no"):
        pope(["No"], ["no"])


def test_pope_f1_is_that_of_precision_and_recall():
    rng = np.random.default_rng(0)
    answers, labels = (list(rng.choice(["yes", "no"], 200)) for _ in range(2))
    p, r = (rate(pope_counts(answers, labels)[name]) for name in ("precision", "recall"))
    assert rate(pope_counts(answers, labels)["f1"]) == pytest.approx(2 * p * r / (p + r))


def test_paired_difference_finds_an_effect_and_no_effect():
    rng = np.random.default_rng(0)
    before = np.stack([rng.integers(0, 2, 400), np.full(400, 3)], axis=1).astype(float)
    better, shuffled = before.copy(), rng.permutation(before)
    better[:, 0] *= rng.random(400) < 0.3
    effect = paired_difference(before, better)
    assert effect["high"] < 0 and effect["p"] < 0.001 and effect["low"] < effect["mean"] < effect["high"]
    nothing = paired_difference(before, shuffled)
    assert nothing["low"] < 0 < nothing["high"] and nothing["p"] > 0.05
    same = paired_difference(before, before)
    assert same == {"mean": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for seed in range(100):
        before = np.stack([rng.random(150) < 0.3, np.ones(150)], axis=1).astype(float)
        after = np.stack([rng.random(150) < 0.2, np.ones(150)], axis=1).astype(float)
        interval = paired_difference(before, after, resamples=400, seed=seed)
        covered += interval["low"] <= -0.1 <= interval["high"]
    assert 88 <= covered <= 100


def test_mcnemar_by_hand():
    result = mcnemar([1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1])
    assert (result["only_before"], result["only_after"]) == (5, 0) and result["p"] == pytest.approx(2 / 2**5)
    assert mcnemar([1, 0], [1, 0])["p"] == 1.0


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
