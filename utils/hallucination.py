"""How much a model hallucinates: CHAIR, POPE and AMBER as plain functions on lists, computed as the official scorers do.

Rohrbach et al. 2018 for CHAIR, Li et al. 2023 for POPE, Wang et al. 2023 for AMBER. Metrics that are ratios of sums over answers
are kept as arrays of shape (answers, 2): numerators and denominators. That is all a paired bootstrap (`utils.paired_statistics`) needs.
"""

import re
from operator import eq

import numpy as np

from utils.paired_statistics import rate

CAPTION_WORD = re.compile(r"[\w/-]+|'\w*|[^\w\s]")
_ANIMALS = (
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "animal",
    "cub",
)
DOUBLE_WORDS = {  # CHAIR's: two words that count as one, so that "hot dog" names no dog and "baby bird" no person
    **{pair: pair for pair in ("hot dog", "teddy bear", "motor bike", "train track", "home plate")},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{
        "passenger jet": "jet",
        "passenger train": "train",
        "bow tie": "tie",
        "toilet seat": "toilet",
    },
    "wine glas": "wine glass",  # what the official singularizer leaves of "wine glass"
}
AMBER_DIMENSIONS = {  # type in annotations.json → the dimensions it counts for
    **{
        f"discriminative-attribute-{name}": ["attribute", name]
        for name in ("state", "number", "action")
    },
    **{
        "discriminative-hallucination": ["existence"],
        "discriminative-relation": ["relation"],
        "relation": ["relation"],
    },
}


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
    return {name: np.array(values, dtype=float).reshape(-1, 2) for name, values in rows.items()}


def chair(mentions, truths):
    """CHAIR over a list of answers: {"chair_i", "chair_s", "recall"} as fractions, micro-averaged as the official script does.

    Raises ZeroDivisionError when no answer names any object: CHAIR_i does not exist then (the official script stops too).
    """
    counts = chair_counts(mentions, truths)
    if counts["chair_i"][:, 1].sum() == 0:
        raise ZeroDivisionError(
            "no answer names any object, so there is no share of wrong mentions"
        )
    return {name: rate(values) for name, values in counts.items()}


def caption_mentions(caption, synonyms, singular, words=CAPTION_WORD.findall):
    """The COCO categories that `caption` names, every occurrence, in order, by the rules of the official CHAIR script.

    `synonyms`: {word: category} (`benchmark_files.read_synonyms`). `singular(word)`: its singular, officially `singularize` of
    clips Pattern, which makes "bus" a "bu": "bus" never counts, "buses" does. `words(text)`: its words and punctuation marks,
    officially nltk's `word_tokenize`, where contractions fall apart otherwise and "u.s." and "dog.a" are one word.
    """
    left, joined = [singular(word) for word in words(caption.lower())], []
    while left:
        pair = " ".join(left[:2])
        double = DOUBLE_WORDS.get(pair, pair if pair in synonyms else "")
        joined.append(double or left[0])
        left = left[2 if double else 1 :]
    other = {"seat"} if "toilet" in joined else set()  # a toilet's seat is no chair
    return [synonyms[word] for word in joined if word in synonyms and word not in other]


def says_no(answer):
    """POPE's own reading of an answer: the words up to the first full stop, without commas; anything without a "no" is a yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "No" in words or "not" in words or "no" in words


def pope_counts(answers, labels):
    """Per answer numerators and denominators of accuracy, precision, recall, F1 and yes ratio. `labels`: "yes" or "no"."""
    if len(answers) != len(labels):
        raise ValueError(
            f"{len(answers)} answers but {len(labels)} labels: POPE joins them by their order"
        )
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
    Without a single right "yes", where the script stops as well, F1 is 0; without a label "yes" recall is nan.
    """
    counts = pope_counts(answers, labels)
    if counts["precision"][:, 1].sum() == 0:
        raise ZeroDivisionError("every answer is a no, so there is no precision")
    scores = {name: rate(values) for name, values in counts.items()}
    precision, recall = (
        scores["precision"],
        scores["recall"],
    )  # F1 from these two, as officially: equal to the last digit
    return scores | {
        "f1": 2 * precision * recall / (precision + recall) if precision * recall > 0 else 0.0
    }


def amber_percent(count, total, counters=1):
    """AMBER's percentage, rounded to one decimal. Each official counter starts at 0.001, so that nothing is divided by 0."""
    return round(count / (total + 0.001 * counters) * 100, 1)


def amber_discriminative(responses, annotations):
    """AMBER's yes/no questions, positive class "no": {"accuracy", "precision", "recall", "f1"} in percent, as the script prints them.

    `responses`: [{"id", "response"}]; `annotations`: [{"id", "type", "truth"}] with all of their ids, looked up by id. Beside the
    overall figures there is a dict of the same four for every dimension asked about: existence, attribute (state, number and
    action together), state, number, action, relation. A response counts only if it is exactly "Yes" or "No": any other
    is wrong, and no predicted "no". F1 comes from the rounded precision and recall. Raises ValueError for an id without an
    annotation and for the id of a generative item.
    """
    known = {row["id"]: row for row in annotations}
    asked = {
        name: []
        for name in ("overall", "existence", "attribute", "state", "number", "action", "relation")
    }
    for row in responses:
        if row["id"] not in known:
            raise ValueError(
                f"response with id {row['id']}: no annotation has this id; is it another version's annotations.json?"
            )
        kind = known[row["id"]]["type"]
        if kind not in AMBER_DIMENSIONS:
            raise ValueError(
                f"response with id {row['id']}: its type is {kind!r}, not a yes/no question; see amber_generative"
            )
        for name in ["overall", *AMBER_DIMENSIONS[kind]]:
            asked[name].append((row["response"], known[row["id"]]["truth"]))
    scores = {
        name: _amber_scores(name, pairs)
        for name, pairs in asked.items()
        if pairs or name == "overall"
    }
    return scores.pop("overall") | scores


def _amber_scores(dimension, pairs):
    """The four figures of `pairs`, (response, truth)."""
    counters = (
        3 if dimension == "attribute" else 1
    )  # the script sums those of state, number and action
    said, there = (
        sum(response == "No" for response, _ in pairs),
        sum(truth == "no" for _, truth in pairs),
    )
    found = sum(pair == ("No", "no") for pair in pairs)
    accuracy = amber_percent(
        found + sum(pair == ("Yes", "yes") for pair in pairs), len(pairs), counters
    )
    precision, recall = amber_percent(found, said, counters), amber_percent(found, there, counters)
    p, r, epsilon = precision / 100, recall / 100, 0.001 if dimension == "existence" else 0.0001
    f1 = round(2 * p * r / (p + r + epsilon) * 100, 1)
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def amber_generative(nouns, annotations, associations, safe_words, similar=None):
    """AMBER's descriptions: {"chair", "cover", "hal", "cog"} in percent, as the script prints them; arguments of `amber_counts`.

    chair: wrong mentions of all mentions. cover: truth entries named, of all (one that stands twice can be named once).
    hal: responses with a wrong mention. cog: hallu entries named, of all, as in the code (the paper divides by mentions).
    """
    counts = amber_counts(nouns, annotations, associations, safe_words, similar)
    sums = {name: values.sum(axis=0).tolist() for name, values in counts.items()}
    scores = {name: amber_percent(*pair) for name, pair in sums.items()}
    wrong, responses = sums["hal"]  # the script subtracts the responses without a mistake from 100
    return scores | {"hal": round(100 - (responses - wrong) / (responses + 0.001) * 100, 1)}


def amber_counts(nouns, annotations, associations, safe_words, similar=None):
    """Per response, numerators and denominators of AMBER's chair, cover, hal and cog: {name: array (responses, 2)}.

    `nouns`: per response its nouns in order, every occurrence; `annotations`: per response {"truth": [...], "hallu": [...]},
    objects that are there and objects that invite a mistake; `associations`: {object: [words]} (relation.json), whose objects
    and words are the vocabulary: other nouns do not count; `safe_words`: nouns that count but are never wrong;
    `similar(noun, word)`: how alike they are, officially by spaCy's en_core_web_lg; without it only equal words match.
    Raises ValueError for an object that `associations` lacks.
    """
    vocabulary, rows = (
        set(associations).union(*associations.values()),
        {"chair": [], "cover": [], "hal": [], "cog": []},
    )
    close = (
        (lambda noun, word: similar(noun, word) > 0.8) if similar else (lambda noun, word: False)
    )
    for said, row in zip(nouns, annotations, strict=True):
        truth, habit = (_amber_words(row[key], associations) for key in ("truth", "hallu"))
        kept, named, fell_for, wrong = (
            [noun for noun in said if noun in vocabulary],
            set(),
            set(),
            0,
        )
        for noun in kept:
            if noun in safe_words:
                continue
            entry = _first(noun, truth, eq)
            if entry is None:
                fell_for |= {_first(noun, habit, eq), _first(noun, habit, close)}
                entry = _first(noun, truth, close)
            named.add(entry)
            wrong += entry is None
        rows["chair"].append((wrong, len(kept)))
        rows["cover"].append((len(named - {None}), len(row["truth"])))
        rows["hal"].append((wrong > 0, 1))
        rows["cog"].append((len(fell_for - {None}), len(row["hallu"])))
    return {name: np.array(values, dtype=float).reshape(-1, 2) for name, values in rows.items()}


def _amber_words(objects, associations):
    """What names each of `objects`, as (word, its number): first the words associated with any of them, then they themselves."""
    if unknown := set(objects) - set(associations):
        raise ValueError(
            f"relation.json has no entry for {', '.join(sorted(unknown))}, which an annotation names"
        )
    numbered = list(enumerate(objects))
    return [(word, number) for number, name in numbered for word in associations[name]] + [
        (name, number) for number, name in numbered
    ]


def _first(noun, words, alike):
    """The number of the object whose word is the first that is `alike`, None if none is."""
    return next((number for word, number in words if alike(noun, word)), None)
