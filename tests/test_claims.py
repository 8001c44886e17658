import pytest

from embedded.claims import as_question, claims, is_right, left_out, mentions, wrong_spans
from embedded.scenes import true_description

SCENE = [
    {"category": "cup", "colour": "red", "place": "top left"},
    {"category": "book", "colour": "blue", "place": "center"},
]


def test_mentions_counts_every_occurrence_plurals_and_synonyms():
    assert mentions("A red cup, two cups and a Mug beside the BOOK.") == [
        "cup",
        "cup",
        "cup",
        "book",
    ]
    assert mentions("A cupboard full of bookshelves and a carpet.") == []


def test_a_true_description_makes_only_right_claims():
    text = true_description(SCENE)
    made = claims(text)
    assert [c["kind"] for c in made] == ["place", "colour", "object"] * 2
    assert all(is_right(c, SCENE) for c in made)
    assert wrong_spans(text, SCENE) == []
    assert left_out(text, SCENE) == []


def test_each_wrong_claim_is_found_where_it_stands():
    text = "At the top left there is a green cup. On the right there is a yellow clock."
    assert [text[start:end] for start, end in wrong_spans(text, SCENE)] == [
        "green",
        "right",
        "yellow",
        "clock",
    ]
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


def test_in_one_sentence_each_color_belongs_to_the_next_object():
    said = {
        (c["kind"], c["category"], c["value"])
        for c in claims("There is a red cup and a blue book.")
    }
    assert said == {
        ("colour", "cup", "red"),
        ("colour", "book", "blue"),
        ("object", "cup", True),
        ("object", "book", True),
    }


def test_every_kind_of_claim_becomes_a_question_for_yes_or_no():
    said = (
        "At the top there is a red cup. On the left there is a blue car. There are three objects. "
        "There is one object. No, there is no kite. At the top left there is nothing. "
        "It is an orange apple."
    )
    assert [as_question(claim) for claim in claims(said)] == [
        ("Is there a cup at the top of the image?", "yes"),
        ("Is there a red cup in the image?", "yes"),
        ("Is there a cup in the image?", "yes"),
        ("Is there a car on the left of the image?", "yes"),
        ("Is there a blue car in the image?", "yes"),
        ("Is there a car in the image?", "yes"),
        ("Are there three objects in the image?", "yes"),
        ("Is there one object in the image?", "yes"),
        ("Is there a kite in the image?", "no"),
        ("Is there nothing at the top left of the image?", "yes"),
        ("Is there an apple in the image?", "yes"),
    ]
