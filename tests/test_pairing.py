import random
import re
import sys
from functools import partial

import numpy as np
import pytest
from datasets import Image, load_dataset

from embedded import judge
from embedded.claims import as_question, claims, is_right
from embedded.drawing import COLORS
from embedded.scenes import CATEGORIES, DESCRIBE_QUESTIONS, PLACES, true_description
from utils import models, pairing, preferences
from utils.layouts import text_of
from utils.settings import PROFILES, locate

SETTINGS = PROFILES["embedded"]
SCENE = [
    {"category": "cup", "colour": "red", "place": "top"},
    {"category": "car", "colour": "blue", "place": "left"},
]


def drawn(split):
    """Rows about drawn scenes, with the columns that the embedded data set has on the disk."""
    return load_dataset(locate("embedded/dataset"), split=split)


@pytest.fixture(scope="module")
def model():
    return models.load_model(SETTINGS)


def object_claim(category, there=True):
    return {"kind": "object", "category": category, "value": there}


# claims and judges


def without_place(made):
    """Claims without the characters that make them."""
    kept = []
    for claim in made:
        kept.append((claim["kind"], claim["category"], claim["value"]))
    return kept


def read_strictly(sentence, objects):
    """What a sentence of the usual form claims and whether it is right; None for any other."""
    phrases = {phrase: place for place, phrase in PLACES.items()}
    phrase, _, thing = sentence.removesuffix(".").partition(" there is a ")
    words = thing.split(" ")
    if phrase not in phrases or len(words) != 2:
        return None
    color, category = words
    if color not in COLORS or category not in CATEGORIES:
        return None
    same = [thing for thing in objects if thing["category"] == category]
    return {
        ("object", category, True): bool(same),
        ("colour", category, color): color in [thing["colour"] for thing in same],
        ("place", category, phrases[phrase]): phrases[phrase] in [o["place"] for o in same],
    }


def test_splitter_and_judge_agree_with_a_strict_reading_of_a_thousand_sampled_answers():
    """The answers of the test split were sampled from the base model."""
    answers = 0
    compared = 0
    for row in drawn("test").remove_columns("image"):
        for text in (row["chosen"], row["rejected"]):
            answers += 1
            by_sentence = []
            for sentence in pairing.sentences(text):
                made = claims(sentence)
                by_sentence += without_place(made)
                expected = read_strictly(sentence, row["objects"])
                if expected is not None:  # one sentence in 27 is broken, see test_judge.py
                    verdicts = judge.truth_judge(made, [row] * len(made))
                    found = dict(zip(without_place(made), verdicts, strict=True))
                    assert found == expected, sentence
                    compared += len(found)
            assert without_place(claims(text)) == by_sentence
    assert answers >= 1000
    assert compared > 7500


def test_a_tie_is_a_rejection_whatever_the_expected_answer():
    assert pairing.accepts(0.6, 0.4) and not pairing.accepts(0.4, 0.6)
    assert pairing.accepts(0.4, 0.6, "no") and not pairing.accepts(0.6, 0.4, "no")
    assert not pairing.accepts(0.5, 0.5) and not pairing.accepts(0.5, 0.5, "no")


def test_a_sentence_is_asked_about_as_it_is_and_other_claims_by_their_world():
    question, expected = pairing.question_of("A dog sleeps.")
    assert question == pairing.sentence_question("A dog sleeps.")
    assert question.endswith(" A dog sleeps.")
    assert expected == "yes"
    claim = object_claim("kite", there=False)
    assert pairing.question_of(claim, as_question) == ("Is there a kite in the image?", "no")


SENTENCES = {
    "A dog sleeps. Is it old?\n\nIt is!  And": ["A dog sleeps.", "Is it old?", "It is!", "And"],
    "A 3.5 m wall. It costs $2.50.": ["A 3.5 m wall.", "It costs $2.50."],
    "1. A cup\n2. A dog": ["A cup", "A dog"],
    "(1) A cup.\n(2) A dog.": ["A cup.", "A dog."],
    "The picture shows: 1. A cup. 2. A dog.": ["The picture shows:", "A cup.", "A dog."],
    "- A cup\n* A dog\n• A kite": ["A cup", "A dog", "A kite"],
    "# Left\nA cup.": ["Left", "A cup."],
    "Dr. Smith holds a cup. It is red.": ["Dr. Smith holds a cup.", "It is red."],
    "A container, e.g. a cup. It is red.": ["A container, e.g. a cup.", "It is red."],
    "The U.S. flag is red. It flies.": ["The U.S. flag is red.", "It flies."],
    "一只猫。一只狗。": ["一只猫。", "一只狗。"],
    "猫がいます。犬もいます！": ["猫がいます。", "犬もいます！"],
    "Well... there is a cup. And… a dog.": ["Well... there is a cup.", "And… a dog."],
    "A cup. . .": ["A cup. . ."],
    "A cup.There is a dog": ["A cup.", "There is a dog"],
    "No. 5 is red": ["No. 5 is red"],
    "!!!!!!": [],
    "2.\n-\n": [],
    "": [],
}


@pytest.mark.parametrize("text", SENTENCES)
def test_sentences_are_claims_of_texts_that_nothing_better_splits(text):
    assert pairing.sentences(text) == SENTENCES[text]


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_about_drawn_scenes_are_cut_at_every_full_stop(split):
    """The splitter made for photographs changes no figure about drawings."""
    rows = drawn(split).select_columns(["chosen", "rejected"])
    for row in rows:
        for text in row.values():
            cut = re.findall(r"[^.!?\s][^.!?\n]*[.!?]*", text)
            assert pairing.sentences(text) == [sentence.strip() for sentence in cut]


def test_a_missing_splitter_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(ImportError, match="pip install sentencex"):
        pairing.sentences("A cup.")


# answers that are no candidates


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("a cup a cup a cup", True),
        ("A cup. A dog. A cup. A dog. A cup. A dog.", True),
        ("There is a very Very, very big dog.", True),
        ("猫猫猫", True),
        ("一只猫。一只猫。一只猫。", True),
        ("A cup. A cup. A dog. A cup.", False),
        ("A red cup. A red car. A red kite.", False),
        ("It is 10 10 wide.", False),
        ("", False),
    ],
)
def test_the_same_words_three_times_in_a_row_are_repetition(text, repeats):
    assert pairing.repeats_itself(text) == repeats


@pytest.mark.parametrize(
    ("text", "ended", "reason"),
    [
        ("A cup.", True, None),
        ("一只猫。", True, None),
        ("A cup. A d", False, pairing.CUT),
        ("!!!!!!", False, pairing.CLAIMS_NOTHING),
        ("3.", True, pairing.CLAIMS_NOTHING),
        ("", True, pairing.CLAIMS_NOTHING),
        ("a cup a cup a cup a", False, pairing.REPEATS),
        ("A <image>.", True, pairing.SPECIAL),
    ],
)
def test_answers_are_unfit_for_a_reason(text, ended, reason):
    assert pairing.unfit({"text": text, "ended": ended}, ["<image>"]) == reason


# claims that a model lists


@pytest.mark.parametrize(
    ("answer", "claims"),
    [
        ("There is a cup.\nThe cup is red.", ["There is a cup.", "The cup is red."]),
        ("Claims:\n\n1. A cup.\n2. It is red.\n2. It is red.", ["A cup.", "It is red."]),
        ("- A cup.\n---\n- A dog.", ["A cup.", "A dog."]),
        ("A red cup and a dog.", None),  # one line: it did not list
        ("Claims:", None),
        ("", None),
    ],
)
def test_claims_are_read_line_by_line(answer, claims):
    assert pairing.claims_in_list("There is a red cup. There is a dog.", answer) == claims


def test_one_claim_is_a_list_of_one_sentence():
    assert pairing.claims_in_list("There is a cup.", "There is a cup.") == ["There is a cup."]


def test_a_model_is_asked_to_list_the_claims_of_each_text(monkeypatch, processor):
    """The model is scripted: it lists the words of a text, and is cut when it gets to the last."""
    asked = []

    def generated(settings, model, processor, images, questions):
        answers = []
        for image, question in zip(images, questions, strict=True):
            asked.append((image, question))
            words = question.rpartition("\n\n")[2].split()
            answers.append({"text": "\n".join(words), "ended": "last" not in words})
        return answers

    monkeypatch.setattr(pairing, "generated", generated)
    texts = ["red cup {0}", "the last", "1"]
    found = pairing.listed_claims(SETTINGS, None, processor, texts, "picture")
    assert found == [["red", "cup"], None, None]
    for text, (image, question) in zip(texts, asked, strict=True):
        assert image == "picture"
        assert question == pairing.LIST_CLAIMS.replace("{text}", text)


# the model as a judge


def test_the_model_judges_what_is_there_and_is_asked_each_question_once(
    model, processor, monkeypatch
):
    rows = [dict(row) for row in drawn("test[:24]")]
    there = [object_claim(row["objects"][0]["category"]) for row in rows]
    denied = [object_claim(claim["category"], there=False) for claim in there]
    asked = []
    yes_and_no = pairing.yes_and_no

    def counted(settings, model, processor, images, questions):
        asked.append(questions)
        return yes_and_no(settings, model, processor, images, questions)

    monkeypatch.setattr(pairing, "yes_and_no", counted)
    looks = partial(pairing.model_judge, SETTINGS, model, processor, as_question=as_question)
    verdicts = looks(there + denied, rows + rows)
    assert [len(questions) for questions in asked] == [len(rows)]
    assert np.mean(verdicts[: len(rows)]) > 0.8
    assert np.mean(verdicts[len(rows) :]) < 0.2
    assert looks([], []) == []


# scores and pairs


def test_scores_and_pairs_are_rlaif_v_s():
    """Three claims of which two are accepted and one is a tie; one of one; one of three."""
    probabilities = {
        "a1": (0.9, 0.1),
        "a2": (0.8, 0.2),
        "a3": (0.5, 0.5),
        "b1": (0.7, 0.3),
        "c1": (0.6, 0.4),
        "c2": (0.1, 0.9),
        "c3": (0, 1),
    }

    def looks(claims, rows):
        return [pairing.accepts(*probabilities[claim]) for claim in claims]

    texts = ["a1 a2 a3", "b1", "c1 c2 c3"]
    counts = pairing.rejections([texts], [{}], looks, split=str.split)
    assert counts == [[1, 0, 2]]
    [told] = pairing.judged([texts], [{}], looks, split=str.split)
    assert told[2] == [("c1", True), ("c2", False), ("c3", False)]
    assert set(pairing.candidates(texts, counts[0])) == {
        (texts[0], texts[2]),
        (texts[1], texts[2]),
        (texts[1], texts[0]),
    }


def test_a_judge_that_forgets_a_claim_is_refused():
    def forgets(claims, rows):
        return [True]

    with pytest.raises(ValueError, match="3 claims"):
        pairing.rejections([["a b c"]], [{}], forgets, split=str.split)


def test_equal_answers_are_one_and_empty_ones_none():
    assert pairing.candidates(["x", "x", "", " ", "y"], [0, 0, 0, 0, 1]) == [("x", "y")]


def test_an_answer_that_claims_nothing_does_not_win():
    assert pairing.candidates(["!!!!!!", "A cup."], [0, 1]) == []


def test_sentences_are_paired_after_the_same_beginning():
    """R is right, W is wrong; the second line begins a text of its own."""
    told = {
        "A. R1. W9.": [("A.", True), ("R1.", True), ("W9.", False)],
        "A. W1. R9.": [("A.", True), ("W1.", False), ("R9.", True)],
        "A.  R1. R2.": [("A.", True), ("R1.", True), ("R2.", True)],
        "A. R1. R3.": [("A.", True), ("R1.", True), ("R3.", True)],
        "W0. W1.": [("W0.", False), ("W1.", False)],
    }
    pairs = pairing.sentence_candidates(list(told), list(told.values()))
    assert set(pairs) == {
        ("A.", "W0."),
        ("A. R1.", "A. W1."),
        ("A.  R1.", "A. W1."),
        ("A. R1. R3.", "A. R1. W9."),
    }
    assert len(pairs) == 4


def test_at_most_two_pairs_of_sentences_come_from_one_question():
    told = [[("R.", True)], *[[(f"W{number}.", False)] for number in range(5)]]
    texts = [sentence for [(sentence, _)] in told]
    rows = [{"question": "What?"}] * 2
    pairs = pairing.pair_sentences(rows, [texts, texts], [told, told], random.Random(0))
    assert [pair["row"] for pair in pairs] == [0, 0, 1, 1]
    assert all(pair["chosen"] == "R." and pair["rejected"] in texts[1:] for pair in pairs)


def test_at_most_two_pairs_come_from_one_question():
    texts = [f"text {i}" for i in range(8)]
    pairs = pairing.pair_up(texts, list(range(8)), random.Random(0))
    assert len(pairs) == len(set(pairs)) == 2
    assert all(texts.index(chosen) < texts.index(rejected) for chosen, rejected in pairs)
    assert pairing.pair_up(texts[:2], [3, 3], random.Random(0)) == []


def words(number):
    return "a " * number


def test_the_threshold_is_the_one_with_the_smallest_gap():
    lengths = [(10, 10), (10, 8), (9, 12), (2, 20)]  # shares 0, -0.25, 0.25, 0.9
    pairs = [{"chosen": words(c), "rejected": words(r)} for c, r in lengths]
    kept, threshold = pairing.balance_by_threshold(pairs)
    assert kept == pairs[:3] and threshold == 0.26
    with pytest.raises(ValueError, match="no pair"):
        pairing.balance_by_threshold([])


def test_balance_at_random_makes_the_mean_lengths_equal_and_loses_nothing_else():
    rng = random.Random(0)
    rows = []
    for _ in range(400):
        rows.append({"chosen": words(rng.randint(5, 9)), "rejected": words(rng.randint(7, 14))})
    kept = pairing.balance_at_random(rows, rng)
    assert abs(sum(map(pairing.gap, kept))) <= 9
    assert all(row in rows for row in kept)
    assert len(kept) > 50


def test_pairs_become_a_data_set_that_check_accepts_with_the_images_as_stored():
    scenes = drawn("test[:4]")
    rows = []
    answers = []
    for row in scenes:
        rows.append({"objects": row["objects"], "question": DESCRIBE_QUESTIONS[0]})
        answers.append(
            [true_description(row["objects"]), "At the top there is nothing, and nothing."]
        )
    pairs = pairing.pair_all(rows, answers, judge.mistakes(answers, rows), random.Random(0))
    dataset = pairing.to_dataset(scenes, pairs)
    assert preferences.check(dataset) == {}
    assert len(dataset) == len(pairs) == 4
    stored = scenes.cast_column("image", Image(decode=False))["image"]
    for row, pair in zip(dataset, pairs, strict=True):
        assert [image["bytes"] for image in row["images"]] == [stored[pair["row"]]["bytes"]]
        for name in ("chosen", "rejected"):
            assert text_of(row[name]) == pair[name]
        assert text_of(row["prompt"]) == pair["question"]
    for pair in pairs:
        objects = rows[pair["row"]]["objects"]
        assert all(is_right(claim, objects) for claim in claims(pair["chosen"]))
