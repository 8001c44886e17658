import random

import numpy as np
from datasets import load_dataset

from embedded.claims import claims, is_right
from embedded.drawing import CATEGORIES, SIDE
from embedded.scenes import (
    COMPANIONS,
    PLACES,
    absent_companions,
    existence_answer,
    question_about,
    sample_scene,
    scene_and_image,
    true_description,
    with_planted_mistakes,
)
from utils.hallucination import says_no
from utils.settings import locate


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


def test_a_slice_of_the_data_set_is_rebuilt_from_its_seed():
    """The committed images and truths come out again; another Pillow may change single pixels."""
    for row in load_dataset(locate("embedded/dataset"), split="test[:6]"):
        objects, image = scene_and_image("test", row["idx"])
        assert objects == row["objects"]
        stored = np.asarray(row["image"]).astype(int)
        assert stored.shape == (SIDE, SIDE, 3)
        assert np.abs(stored - np.asarray(image)).mean() < 2


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
