from embedded import exam
from embedded.scenes import CATEGORIES, DESCRIBE_QUESTIONS, existence_question
from utils import evaluation, generation

TRUTHS = [
    [
        {"category": "chair", "colour": "red", "place": "top"},
        {"category": "cup", "colour": "blue", "place": "left"},
    ],
    [
        {"category": "chair", "colour": "pink", "place": "top"},
        {"category": "book", "colour": "blue", "place": "right"},
    ],
    [
        {"category": "chair", "colour": "green", "place": "top"},
        {"category": "book", "colour": "red", "place": "right"},
    ],
]


def test_embedded_and_utils_agree_on_the_questions():
    """Neither imports the other, so each has its own list."""
    assert generation.DESCRIBE in DESCRIBE_QUESTIONS
    assert exam.QUESTION_KINDS == ("present", *evaluation.POPE_KINDS)


def test_pope_asks_about_present_random_popular_and_companion():
    for chosen, objects in zip(exam.pope_categories(TRUTHS), TRUTHS, strict=True):
        there = {thing["category"] for thing in objects}
        assert chosen["present"] in there
        for kind in evaluation.POPE_KINDS:
            assert chosen[kind] in CATEGORIES
            assert chosen[kind] not in there
    first = exam.pope_categories(TRUTHS)[0]
    assert first["popular"] == "book"
    assert first["adversarial"] == "book"


def test_pope_questions_are_about_the_chosen_categories():
    chosen = exam.pope_categories(TRUTHS, seed=3)
    questions = exam.pope_questions(TRUTHS, seed=3)
    assert tuple(questions) == exam.QUESTION_KINDS
    for kind, asked in questions.items():
        assert asked == [existence_question(categories[kind]) for categories in chosen]


def test_what_was_never_asked_is_asked_about_something_that_is_there():
    questions = exam.never_asked(TRUTHS)
    assert set(questions) == {"colour", "place", "count"}
    for kind in ("colour", "place"):
        for question, objects in zip(questions[kind], TRUTHS, strict=True):
            assert any(thing["category"] in question for thing in objects)
    assert len(questions["count"]) == len(TRUTHS)


def test_constant_answers_have_the_form_of_a_model_s():
    for answers in exam.constant_answers(TRUTHS).values():
        assert len(answers["descriptions"]) == len(TRUTHS)
        assert tuple(answers["pope"]) == exam.QUESTION_KINDS
        assert {len(replies) for replies in answers["pope"].values()} == {len(TRUTHS)}
