"""How much a model hallucinates: CHAIR and POPE as plain functions on lists, computed as the official scorers do.

Rohrbach et al. 2018 for CHAIR, Li et al. 2023 for POPE. Every metric is a ratio of sums over answers, so it is kept as an
array of shape (answers, 2): numerators and denominators. That is all a paired bootstrap (`utils.statistics`) needs.
"""

import numpy as np

from utils.statistics import rate


def chair_counts(mentioned, truths):
    """Per answer, numerators and denominators of CHAIR_i, CHAIR_s and recall: {name: array (answers, 2)}.

    `mentioned`: per answer the categories named, every occurrence; `truths`: per answer the categories really there.
    """
    rows = {"chair_i": [], "chair_s": [], "recall": []}
    for said, truth in zip(mentioned, truths, strict=True):
        wrong, truth = [c for c in said if c not in set(truth)], set(truth)
        rows["chair_i"].append((len(wrong), len(said)))
        rows["chair_s"].append((bool(wrong), 1))
        rows["recall"].append((len(truth & set(said)), len(truth)))
    return {name: np.array(values, dtype=float) for name, values in rows.items()}


def chair(mentions, truths):
    """CHAIR over a list of answers: {"chair_i", "chair_s", "recall"} as fractions, micro-averaged as the official script does.

    Raises ZeroDivisionError when no answer names any object: CHAIR_i does not exist then (the official script stops too).
    """
    counts = chair_counts(mentions, truths)
    if counts["chair_i"][:, 1].sum() == 0:
        raise ZeroDivisionError("no answer names any object, so there is no share of wrong mentions")
    return {name: rate(values) for name, values in counts.items()}


def says_no(answer):
    """POPE's own reading of an answer: the words up to the first full stop, without commas; anything without a "no" is a yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "No" in words or "not" in words or "no" in words


def pope_counts(answers, labels):
    """Per answer numerators and denominators of accuracy, precision, recall, F1 and yes ratio. `labels`: "yes" or "no"."""
    yes = np.array([not says_no(answer) for answer in answers], dtype=float)
    label = np.array([{"yes": 1.0, "no": 0.0}[name] for name in labels])
    both, one = yes * label, np.ones_like(label)
    pairs = {
        "accuracy": ((yes == label).astype(float), one),
        "precision": (both, yes),
        "recall": (both, label),
        "f1": (2 * both, yes + label),
        "yes_ratio": (yes, one),
    }
    return {name: np.stack(pair, axis=1) for name, pair in pairs.items()}


def pope(answers, labels):
    """POPE over a list of answers, positive class "yes": {"accuracy", "precision", "recall", "f1", "yes_ratio"} as fractions.

    Raises ZeroDivisionError when every answer is a "no": precision does not exist then (the official script stops too).
    """
    counts = pope_counts(answers, labels)
    if counts["precision"][:, 1].sum() == 0:
        raise ZeroDivisionError("every answer is a no, so there is no precision")
    return {name: rate(values) for name, values in counts.items()}
