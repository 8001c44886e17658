"""What a model is asked about drawn scenes, and the constant answers that a real one has to beat.

`truths` is a list of scenes, each a list of objects as in `embedded.scenes`.
"""

import random
from collections import Counter
from itertools import permutations

import numpy as np

from embedded.scenes import (
    CATEGORIES,
    COUNT_QUESTION,
    color_question,
    existence_question,
    place_question,
)

# One question about a category that is there, and POPE's three ways to choose one that is not.
QUESTION_KINDS = ("present", "random", "popular", "adversarial")


def pope_categories(truths, seed=0):
    """Choose for each scene the four categories that POPE asks about: {kind: category}.

    "present" is there, the others are not. They are chosen as POPE does (Li et al. 2023, section
    4.1): at random, the most frequent in these scenes, and the one that most often appears
    together with something that is there.
    """
    draw = np.random.default_rng(seed)
    frequency = Counter()
    together = Counter()
    scenes = []
    for objects in truths:
        there = sorted({thing["category"] for thing in objects})
        frequency.update(there)
        together.update(permutations(there, 2))
        scenes.append(there)
    chosen = []
    for there in scenes:
        absent = [category for category in CATEGORIES if category not in there]
        popularity = {}
        attraction = {}
        for category in absent:
            popularity[category] = frequency[category]
            # How often this category is there when one of the scene's own categories is.
            attraction[category] = max(together[own, category] / frequency[own] for own in there)
        # The two draws must stay in this order, or the questions of a seed change.
        categories = {
            "present": str(draw.choice(there)),
            "random": str(draw.choice(absent)),
            "popular": max(popularity, key=popularity.get),
            "adversarial": max(attraction, key=attraction.get),
        }
        chosen.append(categories)
    return chosen


def pope_questions(truths, seed=0):
    """Return POPE's questions about the scenes: {kind: [question for each scene]}."""
    questions = {kind: [] for kind in QUESTION_KINDS}
    for categories in pope_categories(truths, seed):
        for kind in QUESTION_KINDS:
            questions[kind].append(existence_question(categories[kind]))
    return questions


def never_asked(truths, seed=0):
    """Return questions of the kinds that no preference pair asks, one of each kind per scene.

    The result is {"colour": [...], "place": [...], "count": [...]}, named as kinds of claims.
    """
    rng = random.Random(seed)
    about = [rng.choice(objects)["category"] for objects in truths]
    return {
        "colour": [color_question(category) for category in about],
        "place": [place_question(category) for category in about],
        "count": [COUNT_QUESTION] * len(truths),
    }


def constant_answers(truths):
    """Return the answers of four models that never look, each as `utils.evaluation.ask` does.

    Their scores are the lines that a real model has to beat. The keys are "always yes",
    "always no", "the empty answer" and "lists everything".
    """
    everything = " ".join(f"There is a {category}." for category in CATEGORIES)
    models = {  # name → what it says of an image, and what it says to a yes/no question
        "always yes": ("Yes.", "Yes."),
        "always no": ("No.", "No."),
        "the empty answer": ("", ""),
        "lists everything": (everything, "Yes."),
    }
    answers = {}
    for name, (description, reply) in models.items():
        replies = {kind: [reply] * len(truths) for kind in QUESTION_KINDS}
        answers[name] = {"descriptions": [description] * len(truths), "pope": replies}
    return answers
