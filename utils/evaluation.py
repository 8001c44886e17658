"""Ask two models the same questions, count what they get wrong, and compare the counts.

A model's answers are {"descriptions": [text per image], "pope": {kind: [text per image]}}. Counts
are arrays (scenes, 2) of numerators and denominators, as in `utils.paired_statistics`. What is in
an image comes as a list of categories, and a function `mentions(text)` names those in a text, so
the same code serves any world in which the objects are known.
"""

import re
from typing import NamedTuple

import numpy as np

from utils.generation import DESCRIBE, answer
from utils.hallucination import chair_counts, pope_counts
from utils.paired_statistics import paired_difference, rate
from utils.progress import progress
from utils.vision import images_encoded_once

POPE_KINDS = ("random", "popular", "adversarial")  # POPE's ways to choose an absent category
POPE_TOKENS = 16  # an answer to a yes/no question needs no more


class Metric(NamedTuple):
    """What a metric is called, what it measures, and how to read it."""

    title: str
    meaning: str
    better: str  # "lower", "higher", or "" where a value is best near the truth
    unit: str  # "%" for fractions, "words" for lengths


METRICS = {
    "chair_i": Metric(
        title="CHAIR-i",
        meaning="the share of mentioned objects that are absent",
        better="lower",
        unit="%",
    ),
    "chair_s": Metric(
        title="CHAIR-s",
        meaning="the share of answers that mention at least one absent object",
        better="lower",
        unit="%",
    ),
    "recall": Metric(
        title="Recall",
        meaning="the share of present objects that are mentioned",
        better="higher",
        unit="%",
    ),
    "cog": Metric(
        title="Cog",
        meaning="the share of expected but absent objects that are mentioned",
        better="lower",
        unit="%",
    ),
    "claim_precision": Metric(
        title="Claim precision",
        meaning="the share of claims that are right",
        better="higher",
        unit="%",
    ),
    "pope_accuracy": Metric(
        title="POPE accuracy",
        meaning="the share of yes/no questions answered correctly",
        better="higher",
        unit="%",
    ),
    "pope_recall": Metric(
        title="POPE recall",
        meaning="the share of questions about present objects answered “yes”",
        better="higher",
        unit="%",
    ),
    "pope_f1": Metric(
        title="POPE F1",
        meaning="the harmonic mean of the precision and the recall of “yes”",
        better="higher",
        unit="%",
    ),
    "pope_yes_ratio": Metric(
        title="POPE yes ratio",
        meaning="the share of yes/no questions answered “yes”; right would be half",
        better="",
        unit="%",
    ),
    "words": Metric(
        title="Words",
        meaning="the mean number of words in a description",
        better="",
        unit="words",
    ),
}


def format_value(metric, value, sign=""):
    """Return `value` of the `metric` (its name) as text: "12.3%" for a fraction, "12.3" for words.

    `sign="+"` writes the sign of a difference. Where nothing could be counted (nan) it is "–".
    """
    if np.isnan(value):
        return "–"
    if METRICS[metric].unit == "%":
        return f"{100 * value:{sign}.1f}%"
    return f"{value:{sign}.1f}"


def ask(settings, model, processor, images, questions):
    """Return the model's greedy answers to all evaluation questions about `images`.

    `questions` holds one question per image for every kind: {"present": [...], "random": [...],
    "popular": [...], "adversarial": [...]}.
    """
    (answers,) = ask_each(settings, model, processor, images, questions, [True])
    return answers


def ask_both(settings, model, processor, images, questions):
    """Return the answers of base and tuned, each as `ask` returns them.

    They are one `model` with its adapter off and on, and an image is encoded once for both.
    """
    return ask_each(settings, model, processor, images, questions, [False, True])


def ask_each(settings, model, processor, images, questions, adapters):
    """Return the answers of `ask` with and without the adapter, as `adapters` says.

    All questions about a batch of images come one after another, so that it is encoded once.
    """
    kinds = ("present", *POPE_KINDS)
    everything = []
    for _ in adapters:
        replies = {kind: [] for kind in kinds}
        everything.append({"descriptions": [], "pope": replies})
    size = settings.generation_batch_size
    with images_encoded_once(model):
        for start in progress(range(0, len(images), size), "asking"):
            part = slice(start, start + size)
            shown = images[part]
            for adapter, answers in zip(adapters, everything, strict=True):
                # Descriptions may be as long as the settings say.
                describe = [DESCRIBE] * len(shown)
                answers["descriptions"] += answer(
                    settings, model, processor, shown, describe, adapter
                )
                for kind in kinds:
                    answers["pope"][kind] += answer(
                        settings,
                        model,
                        processor,
                        shown,
                        questions[kind][part],
                        adapter,
                        max_new_tokens=POPE_TOKENS,
                    )
    return everything


def count_descriptions(texts, present, mentions):
    """Count what descriptions mention, as arrays (scenes, 2): chair_i, chair_s, recall, words.

    `present` holds for each scene its categories. `mentions(text)` returns the categories that a
    text names, every occurrence.
    """
    counts = chair_counts([mentions(text) for text in texts], present)
    counts["words"] = np.array([(len(text.split()), 1) for text in texts], float)
    return counts


def pope_counts_of(answers, kind):
    """Return POPE's counts for one way of choosing absent categories: {metric: array (scenes, 2)}.

    Each scene adds two questions: the answer to one is yes, the answer to the other no.
    """
    present = answers["pope"]["present"]
    absent = answers["pope"][kind]
    counts_yes = pope_counts(present, ["yes"] * len(present))
    counts_no = pope_counts(absent, ["no"] * len(absent))
    return {name: counts_yes[name] + counts_no[name] for name in counts_yes}


def count(answers, present, mentions):
    """Count all that `ask` returned: {metric: array (scenes, 2)}; see `count_descriptions`.

    POPE's numbers are pooled over its three ways of choosing absent categories.
    The questions about present ones count once in each of the three, as in the official files.
    """
    counts = count_descriptions(answers["descriptions"], present, mentions)
    per_kind = [pope_counts_of(answers, kind) for kind in POPE_KINDS]
    for name in ("accuracy", "recall", "f1", "yes_ratio"):
        counts[f"pope_{name}"] = sum(counts_of_kind[name] for counts_of_kind in per_kind)
    return counts


def compare(base_counts, tuned_counts):
    """Compare two models on the same scenes, as evaluation.json holds it.

    Returns {"base", "tuned", "difference", "n"}. The first two are {metric: fraction}. The
    difference is tuned − base: {metric: {"mean", "low", "high", "p"}}. `n` is the number of scenes.
    """
    base = {}
    tuned = {}
    difference = {}
    for name in METRICS:
        if name in base_counts:
            base[name] = rate(base_counts[name])
            tuned[name] = rate(tuned_counts[name])
            difference[name] = paired_difference(base_counts[name], tuned_counts[name])
    scenes = len(next(iter(base_counts.values())))
    return {"base": base, "tuned": tuned, "difference": difference, "n": scenes}


def stammers(text):
    """Return whether a word follows itself: "a pink pink cup". CHAIR does not see it."""
    return re.search(r"\b(\w+) \1\b", text.lower()) is not None
