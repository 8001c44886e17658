"""The judge that knows the truth: which claims about drawn scenes are right, and what is missing.

`truths` is a list of scenes, each a list of objects as in `embedded.scenes`.
"""

import numpy as np

from embedded.claims import claims, is_right, left_out, mentions, wrong_spans
from embedded.scenes import DESCRIBE_QUESTIONS, absent_companions, true_description


def truth_judge(claims, rows):
    """Return for each claim whether it is right about the `objects` of its row."""
    return [is_right(claim, row["objects"]) for claim, row in zip(claims, rows, strict=True)]


def mistakes(answers, rows):
    """Count the mistakes of each answer: its wrong claims and, in descriptions, what it leaves out.

    `answers` holds a list of texts for each row, and the counts are nested in the same way. Wrong
    claims alone would reward silence. Only descriptions can leave objects out: answers to one of
    the `DESCRIBE_QUESTIONS`.
    """
    counts = []
    for texts, row in zip(answers, rows, strict=True):
        describing = row["question"] in DESCRIBE_QUESTIONS
        counted = []
        for text in texts:
            count = len(wrong_spans(text, row["objects"]))
            if describing:
                count += len(left_out(text, row["objects"]))
            counted.append(count)
        counts.append(counted)
    return counts


def pair_with_best(texts, counts, rng):
    """Pair the best answer with a worse one that is longer, and with a worse one that is not.

    Returns at most two tuples (chosen, rejected): this is how the embedded data set was made.
    Answers that claim nothing are left out, or silence would be best.
    """
    # Sorted, so that the draws below do not depend on the order of a set.
    scored = sorted({(n, text) for text, n in zip(texts, counts, strict=True) if claims(text)})
    if not scored:
        return []
    fewest = scored[0][0]
    chosen = rng.choice([text for count, text in scored if count == fewest])
    longer = []
    others = []
    for count, text in scored:
        if count > fewest:
            side = longer if len(text.split()) > len(chosen.split()) else others
            side.append(text)
    return [(chosen, rng.choice(worse)) for worse in (longer, others) if worse]


def claim_counts(texts, truths):
    """Count per description what only an exact truth can tell.

    Returns {"cog", "claim_precision"}, each an array (scenes, 2) of numerators and denominators:
    absent companions named, of all absent companions, and right claims, of all claims.
    """
    cog = []
    precision = []
    for text, objects in zip(texts, truths, strict=True):
        companions = set(absent_companions(objects))
        named = companions & set(mentions(text))
        cog.append((len(named), len(companions)))
        made = claims(text)
        right = sum(is_right(claim, objects) for claim in made)
        precision.append((right, len(made)))
    return {"cog": np.array(cog, float), "claim_precision": np.array(precision, float)}


def answered_right(text, objects, kind):
    """Return whether `text` makes a claim of `kind` about the scene, and no wrong claim.

    `kind` is "colour", "place" or "count".
    """
    made = claims(text)
    addressed = any(claim["kind"] == kind for claim in made)
    return addressed and all(is_right(claim, objects) for claim in made)


def attributes_right(texts, truths, kind):
    """Return the share of `kind` claims about objects that are there which are right.

    `kind` is "colour" or "place".
    """
    right = []
    for text, objects in zip(texts, truths, strict=True):
        there = [thing["category"] for thing in objects]
        for claim in claims(text):
            if claim["kind"] == kind and claim["category"] in there:
                right.append(is_right(claim, objects))
    return float(np.mean(right))


def true_words(truths):
    """Return the mean number of words in the true descriptions, the length of an honest answer."""
    return float(np.mean([len(true_description(objects).split()) for objects in truths]))


def present(truths):
    """Return the categories that are in each scene, as a list of lists."""
    categories = []
    for objects in truths:
        categories.append([thing["category"] for thing in objects])
    return categories
