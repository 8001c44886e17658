"""Ask a model about scenes whose truth is known, and compare two models on the same scenes."""

import random
import re
from collections import Counter
from itertools import permutations

import numpy as np

from embedded.claims import claims, is_right, mentions
from embedded.drawing import CATEGORIES
from embedded.scenes import (
    COUNT_QUESTION,
    absent_companions,
    colour_question,
    describe,
    existence_question,
    place_question,
)
from utils.generation import answer
from utils.hallucination import chair_counts, pope_counts
from utils.paired_statistics import paired_difference, rate

DESCRIBE = "Describe the image."
POPE_KINDS = ("random", "popular", "adversarial")
METRICS = (
    "chair_i",
    "chair_s",
    "recall",
    "cog",
    "claim_precision",
    "pope_accuracy",
    "pope_f1",
    "pope_yes_ratio",
    "words",
)


def pope_questions(truths, seed=0):
    """Per scene the four categories that POPE asks about: one that is there, three that are not.

    Absent ones are chosen as POPE does: at random; the most frequent in these scenes; the one that stands most often
    together with something that is there. Returns [{"present", "random", "popular", "adversarial"}].
    """
    draw = np.random.default_rng(seed)
    names = [sorted({o["category"] for o in objects}) for objects in truths]
    frequency = Counter(name for scene in names for name in scene)
    together = Counter(pair for scene in names for pair in permutations(scene, 2))
    questions = []
    for scene in names:
        absent = [c for c in CATEGORIES if c not in scene]
        questions.append(
            {
                "present": str(draw.choice(scene)),
                "random": str(draw.choice(absent)),
                "popular": max(absent, key=lambda c: frequency[c]),
                "adversarial": max(
                    absent,
                    key=lambda c: max(together[there, c] / frequency[there] for there in scene),
                ),
            }
        )
    return questions


def ask(model, processor, scenes, settings, adapter=True):
    """Greedy answers to all evaluation questions: {"descriptions": [...], "pope": {kind: [...]}}.

    `scenes`: rows with `image` and `objects`. Every picture is read once.
    """
    images, truths = list(scenes["image"]), list(scenes["objects"])
    answers = {
        "descriptions": answer(
            model, processor, images, [DESCRIBE] * len(images), settings, adapter
        ),
        "pope": {},
    }
    asked = pope_questions(truths)
    for kind in ("present", *POPE_KINDS):
        questions = [existence_question(row[kind]) for row in asked]
        answers["pope"][kind] = answer(
            model, processor, images, questions, settings, adapter, max_new_tokens=16
        )
    return answers


def never_asked(truths, seed=0):
    """Questions of kinds that no preference pair asks, one of each per scene: {"colour" | "place" | "count": [question]}."""
    rng = random.Random(seed)
    about = [rng.choice(objects)["category"] for objects in truths]
    return {
        "colour": [colour_question(category) for category in about],
        "place": [place_question(category) for category in about],
        "count": [COUNT_QUESTION] * len(truths),
    }


def answered_right(text, objects, kind):
    """Whether `text` makes a claim of `kind` ("colour", "place" or "count") about the scene, and no wrong claim."""
    made = claims(text)
    return any(claim["kind"] == kind for claim in made) and all(
        is_right(claim, objects) for claim in made
    )


def stammers(text):
    """Whether a word follows itself: "a pink pink cup". CHAIR does not see it."""
    return re.search(r"\b(\w+) \1\b", text.lower()) is not None


def describe_counts(texts, truths):
    """Numerators and denominators of the metrics of descriptions, scene by scene: {metric: array (scenes, 2)}."""
    said = [mentions(text) for text in texts]
    counts = chair_counts(said, [[o["category"] for o in objects] for objects in truths])
    cog, precision, words = [], [], []
    for text, named, objects in zip(texts, said, truths, strict=True):
        planted, made = absent_companions(objects), claims(text)
        cog.append((len(set(planted) & set(named)), len(planted)))
        precision.append((sum(is_right(claim, objects) for claim in made), len(made)))
        words.append((len(text.split()), 1))
    return counts | {
        "cog": np.array(cog, float),
        "claim_precision": np.array(precision, float),
        "words": np.array(words, float),
    }


def count(answers, truths):
    """`describe_counts`, and POPE's accuracy, F1 and yes ratio pooled over its three ways to choose absent objects.

    The questions about present objects count once in each of the three, as in the official files.
    """
    per_kind = [pope_counts_of(answers, kind) for kind in POPE_KINDS]
    pope = {
        f"pope_{name}": sum(kind[name] for kind in per_kind)
        for name in ("accuracy", "f1", "yes_ratio")
    }
    counts = describe_counts(answers["descriptions"], truths)
    return {name: (counts | pope)[name] for name in METRICS}


def pope_counts_of(answers, kind):
    """POPE's counts for one way of choosing absent objects, per scene (one question whose answer is yes, one whose answer is no)."""
    yes = pope_counts(answers["pope"]["present"], ["yes"] * len(answers["pope"]["present"]))
    no = pope_counts(answers["pope"][kind], ["no"] * len(answers["pope"][kind]))
    return {name: yes[name] + no[name] for name in yes}


def constant_answers(truths):
    """What the metrics say of four models that never look: they are the lines a real one has to beat."""
    everything = " ".join(f"There is a {category}." for category in CATEGORIES)
    descriptions = {
        "always yes": "Yes.",
        "always no": "No.",
        "the empty answer": "",
        "lists everything": everything,
    }
    kinds = ("present", *POPE_KINDS)
    return {
        name: {
            "descriptions": [text] * len(truths),
            "pope": {
                kind: ["No." if name == "always no" else "Yes." if text else ""] * len(truths)
                for kind in kinds
            },
        }
        for name, text in descriptions.items()
    }


def compare(base, dpo, truths):
    """The comparison that `evaluation.json` holds: {"base", "dpo", "difference", "n"}, metrics as fractions.

    `base`, `dpo`: answers from `ask` for the same scenes. "difference" is dpo − base: {metric: {"mean", "low", "high", "p"}}.
    """
    before, after = count(base, truths), count(dpo, truths)
    return {
        "base": {name: rate(values) for name, values in before.items()},
        "dpo": {name: rate(values) for name, values in after.items()},
        "difference": {name: paired_difference(before[name], after[name]) for name in before},
        "n": len(truths),
    }


def true_words(truths):
    """Words per scene in the true descriptions: the length an honest answer has."""
    return float(np.mean([len(describe(objects).split()) for objects in truths]))


def attributes_right(texts, truths, kind):
    """Of the true objects that are named with a `kind` ("colour" or "place"), the share for which it is right."""
    said = [
        (claim, objects)
        for text, objects in zip(texts, truths, strict=True)
        for claim in claims(text)
        if claim["kind"] == kind and claim["category"]
    ]
    known = [
        (claim, objects)
        for claim, objects in said
        if any(o["category"] == claim["category"] for o in objects)
    ]
    return float(np.mean([is_right(claim, objects) for claim, objects in known]))
