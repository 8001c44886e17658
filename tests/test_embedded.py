import random

import numpy as np
import pytest
from datasets import load_dataset

from embedded.claims import claims, is_right
from embedded.drawing import CATEGORIES, SIDE
from embedded.scenes import (
    COMPANIONS,
    DESCRIBE_QUESTIONS,
    PLACES,
    absent_companions,
    existence_answer,
    question_about,
    sample_scene,
    scene_and_image,
    true_description,
    with_planted_mistakes,
)
from utils import preferences
from utils.hallucination import says_no
from utils.preferences import PARTS, image_bytes
from utils.settings import digest, locate


def test_scenes_follow_their_rules():
    rng = random.Random(0)
    for _ in range(300):
        objects = sample_scene(rng)
        order = [list(PLACES).index(o["place"]) for o in objects]
        assert 1 <= len(objects) <= 4 and order == sorted(set(order))
        assert len({o["category"] for o in objects}) == len(objects)


def test_companions_often_stand_together():
    rng = random.Random(0)
    scenes = [{o["category"] for o in sample_scene(rng)} for _ in range(3000)]
    for category, companion in COMPANIONS.items():
        beside = np.mean([companion in s for s in scenes if category in s])
        assert beside > 1.5 * np.mean([companion in s for s in scenes if category not in s])


@pytest.mark.parametrize("part", PARTS)
def test_a_slice_of_the_data_set_is_rebuilt_from_its_seed(part):
    """The committed images and truths come out again; another Pillow may change single pixels."""
    for row in load_dataset(locate("embedded/dataset"), split=f"{part}[:6]"):
        objects, image = scene_and_image(part, row["idx"])
        assert objects == row["objects"]
        stored = np.asarray(row["image"]).astype(int)
        assert stored.shape == (SIDE, SIDE, 3)
        assert np.abs(stored - np.asarray(image)).mean() < 2


def test_no_image_is_in_two_splits():
    parts_of = {}
    for part in PARTS:
        for files in image_bytes(preferences.load("embedded/dataset", part)):
            parts_of.setdefault(digest(files[0]), set()).add(part)
    assert len(parts_of) > 1900
    assert not [parts for parts in parts_of.values() if len(parts) > 1]


def test_validation_has_one_pair_for_each_of_its_scenes():
    rows = load_dataset(locate("embedded/dataset"), split="validation").remove_columns("image")
    assert rows["idx"][:] == list(range(300))
    asks_yes_no = [row["chosen"] for row in rows if row["question"] not in DESCRIBE_QUESTIONS]
    yes = [text for text in asks_yes_no if text.startswith("Yes")]
    assert (len(asks_yes_no), len(yes)) == (90, 45)


def test_true_sentences_are_true_and_planted_ones_are_not():
    rng = random.Random(1)
    for _ in range(200):
        objects = sample_scene(rng)
        assert all(is_right(c, objects) for c in claims(true_description(objects)))
        question, answer = question_about(objects, rng)
        assert question.endswith("?")
        assert claims(answer), (question, answer)
        assert all(is_right(c, objects) for c in claims(answer)), (question, answer)
        habit = with_planted_mistakes(objects, rng, added=1, forgotten=0)
        assert [o["category"] for o in habit[len(objects) :]] == absent_companions(objects)
        assert not any(
            is_right(c, objects) for c in claims(true_description(habit[len(objects) :]))
        )


def test_existence_answers_are_read_by_pope():
    for category in CATEGORIES:
        assert says_no(existence_answer(category, False))
        assert not says_no(existence_answer(category, True))
