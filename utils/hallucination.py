"""How much a model hallucinates: mentions, claims, CHAIR, POPE and paired statistics, as plain functions on lists.

Formulas as the official scorers compute them (Rohrbach et al. 2018 for CHAIR, Li et al. 2023 for POPE). Every metric is a
ratio of sums over answers, so it is kept as an array of shape (answers, 2): numerators and denominators. That is all a
paired bootstrap needs.
"""

import re
from math import comb

import numpy as np

from embedded.scenes import CATEGORIES, COLOURS, NUMBERS, PLACES

SYNONYMS = {"mug": "cup", "automobile": "car"}  # what people and larger models also call them
_CATEGORY = {form: c for c in CATEGORIES for form in (c, c + "s")} | {w + s: c for w, c in SYNONYMS.items() for s in ("", "s")}
_WORDS = re.compile(r"[A-Za-z]+")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]?")
_PLACE = re.compile(r"\b(" + "|".join(sorted(PLACES, key=len, reverse=True)) + r")\b", re.IGNORECASE)
_COUNT = re.compile(r"\b(" + "|".join(NUMBERS[1:]) + r") objects?\b", re.IGNORECASE)


def mentions(text):
    """The categories named in `text`, every occurrence, in order: "a red cup and two mugs" → ["cup", "cup"]."""
    return [_CATEGORY[word.lower()] for word in _WORDS.findall(text) if word.lower() in _CATEGORY]


def claims(text):
    """What `text` says about the picture, piece by piece, as RLAIF-V splits answers into claims that can be judged alone.

    Each claim is {"kind", "category", "value", "start", "end"}: kind "object" (value: is it there?), "colour", "place"
    (category None: nothing is there) or "count" (category None); start and end are its characters in `text`. In a
    sentence with several objects a colour belongs to the next object, and a place to no one in particular.
    """
    found = []
    for sentence in _SENTENCE.finditer(text):
        start, said = sentence.start(), sentence.group()

        def claim(match, kind, category, value, start=start):
            found.append({"kind": kind, "category": category, "value": value, "start": start + match.start(), "end": start + match.end()})

        words = list(_WORDS.finditer(said))
        objects = [word for word in words if word.group().lower() in _CATEGORY]
        negated = any(word.group().lower() in ("no", "not") for word in words)
        for word in objects:
            claim(word, "object", _CATEGORY[word.group().lower()], not negated)
        for word in words:
            if word.group().lower() in COLOURS and objects and not negated:
                owner = next((o for o in objects if o.start() > word.start()), objects[-1])
                claim(word, "colour", _CATEGORY[owner.group().lower()], word.group().lower())
        places = list(_PLACE.finditer(said))
        if len(places) == 1 and len(objects) == 1 and not negated:
            claim(places[0], "place", _CATEGORY[objects[0].group().lower()], places[0].group().lower())
        elif len(places) == 1 and not objects and "nothing" in said.lower():
            claim(places[0], "place", None, places[0].group().lower())
        for match in _COUNT.finditer(said):
            claim(match, "count", None, NUMBERS.index(match.group(1).lower()))
    return sorted(found, key=lambda c: c["start"])


def is_right(claim, objects):
    """Whether `claim` is true of a scene. `objects`: its truth, dicts with category, colour and place."""
    if claim["kind"] == "count":
        return claim["value"] == len(objects)
    if claim["kind"] == "place" and claim["category"] is None:
        return all(o["place"] != claim["value"] for o in objects)
    same = [o for o in objects if o["category"] == claim["category"]]
    if claim["kind"] == "object":
        return bool(same) == claim["value"]
    return any(o[claim["kind"]] == claim["value"] for o in same)


def wrong_spans(text, objects):
    """The (start, end) characters of the wrong claims in `text`, for marking them."""
    return [(c["start"], c["end"]) for c in claims(text) if not is_right(c, objects)]


def left_out(text, objects):
    """The categories of the scene that `text` does not name."""
    named = set(mentions(text))
    return [o["category"] for o in objects if o["category"] not in named]


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


def rate(counts):
    """Sum of numerators over sum of denominators of an array (answers, 2); nan where the denominators sum to 0."""
    numerator, denominator = counts.sum(axis=0)
    return float(numerator / denominator) if denominator else float("nan")


def paired_difference(before, after, resamples=4000, seed=0):
    """after − before of a metric on the same scenes: {"mean", "low", "high", "p"}.

    `before`, `after`: arrays (scenes, 2) of numerators and denominators. low, high: 95% interval of a bootstrap that draws
    whole scenes, both answers together. p: two-sided randomisation test that swaps the two answers of a scene at random.
    """
    random, scenes = np.random.default_rng(seed), len(before)
    difference = rate(after) - rate(before)
    weights = random.multinomial(scenes, np.full(scenes, 1 / scenes), size=resamples).astype(float)
    draws = _rates(weights @ after) - _rates(weights @ before)
    swap = random.integers(0, 2, size=(resamples, scenes)).astype(float)
    total, change = before.sum(axis=0), after - before
    swapped = _rates(total + (1 - swap) @ change) - _rates(total + swap @ change)
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    at_least = np.sum(np.abs(swapped) >= abs(difference) - 1e-12)
    return {"mean": difference, "low": float(low), "high": float(high), "p": float((at_least + 1) / (resamples + 1))}


def _rates(sums):
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, 0] / sums[:, 1]


def mcnemar(before, after):
    """Exact two-sided McNemar test for yes/no outcomes on the same items: {"only_before", "only_after", "p"}.

    Only items on which the two differ count; without an effect each goes either way like a fair coin.
    """
    only_before = sum(bool(b) and not a for b, a in zip(before, after, strict=True))
    only_after = sum(bool(a) and not b for b, a in zip(before, after, strict=True))
    n, k = only_before + only_after, min(only_before, only_after)
    tail = sum(comb(n, i) for i in range(k + 1)) / 2**n
    return {"only_before": only_before, "only_after": only_after, "p": min(1.0, 2 * tail)}


def holm(p_values):
    """Holm's adjusted p-values for several metrics looked at together: {name: p} → {name: adjusted p}."""
    adjusted, largest = {}, 0.0
    for position, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - position)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
