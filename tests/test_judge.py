import random

from embedded import judge
from embedded.claims import claims
from embedded.scenes import DESCRIBE_QUESTIONS, existence_question, true_description
from utils import pairing

SCENE = [
    {"category": "cup", "colour": "red", "place": "top"},
    {"category": "car", "colour": "blue", "place": "left"},
]
FULL = true_description(SCENE)
SHORT = true_description(SCENE[:1])
LONG = FULL + " On the right there is a red book."


def test_a_broken_sentence_is_judged_by_what_can_be_read_in_it():
    made = claims("At the top there is a red a red cup. On the left there is a")
    assert [(claim["kind"], claim["value"]) for claim in made] == [
        ("place", "top"),
        ("colour", "red"),
        ("colour", "red"),
        ("object", True),
    ]
    assert judge.truth_judge(made, [{"objects": SCENE}] * 4) == [True] * 4


def test_mistakes_are_what_the_truth_rejects_and_omissions_in_descriptions():
    rows = [
        {"objects": SCENE, "question": DESCRIBE_QUESTIONS[0]},
        {"objects": SCENE, "question": existence_question("cup")},
    ]
    answers = [[FULL, SHORT, LONG], ["Yes, there is a cup.", "No, there is no cup."]]
    assert judge.mistakes(answers, rows) == [[0, 1, 3], [0, 1]]
    rejected = pairing.rejections(answers, rows, judge.truth_judge, split=claims)
    assert rejected == [[0, 0, 3], [0, 1]]


def test_the_best_answer_meets_a_longer_and_a_shorter_worse_one():
    pairs = judge.pair_with_best(
        [FULL, SHORT, LONG, FULL, "Hm."], [0, 1, 3, 0, 0], random.Random(0)
    )
    assert sorted(pairs) == sorted([(FULL, LONG), (FULL, SHORT)])


def test_an_answer_that_claims_nothing_is_never_the_best():
    assert judge.pair_with_best(["Hm."], [0], random.Random(0)) == []


def test_attributes_right_looks_only_at_objects_that_are_there():
    text = (
        "At the top there is a green cup. On the left there is a blue car. "
        "In the center there is a red kite."
    )
    assert judge.attributes_right([text], [SCENE], "colour") == 0.5
    assert judge.attributes_right([text], [SCENE], "place") == 1.0


def test_an_answer_is_right_if_it_addresses_the_question_and_nothing_in_it_is_wrong():
    assert judge.answered_right("The cup is red.", SCENE, "colour")
    assert not judge.answered_right("The cup is blue.", SCENE, "colour")
    assert not judge.answered_right("The cup is red.", SCENE, "place")
    assert not judge.answered_right("The cup is red. There is one object.", SCENE, "colour")
    assert not judge.answered_right("", SCENE, "count")


def test_the_true_descriptions_set_the_length():
    assert judge.true_words([SCENE, SCENE[:1]]) == (len(FULL.split()) + len(SHORT.split())) / 2
    assert judge.present([SCENE, SCENE[:1]]) == [["cup", "car"], ["cup"]]
