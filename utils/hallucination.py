"""Measure hallucination with CHAIR, POPE and AMBER, as the official scorers compute them.

CHAIR is from Rohrbach et al. 2018, POPE from Li et al. 2023 and AMBER from Wang et al. 2023. A
metric that is a ratio of sums over answers is kept as an array (answers, 2) of numerators and
denominators, which is all that a paired bootstrap in `utils.paired_statistics` needs.
"""

import re

import numpy as np

from utils.paired_statistics import rate

CAPTION_WORD = re.compile(r"[\w/-]+|'\w*|[^\w\s]")

# CHAIR's double words count as one word, so that "hot dog" names no dog.
DOUBLE_WORDS = {
    "hot dog": "hot dog",
    "teddy bear": "teddy bear",
    "motor bike": "motor bike",
    "train track": "train track",
    "home plate": "home plate",
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",  # what the official singularizer leaves of "wine glass"
}
_ANIMALS = ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"]
_ANIMALS += ["animal", "cub"]
for _animal in _ANIMALS:  # "baby" alone is a person, but "baby bird" names none
    DOUBLE_WORDS[f"baby {_animal}"] = _animal
    DOUBLE_WORDS[f"adult {_animal}"] = _animal

AMBER_DIMENSIONS = {  # type in annotations.json → the dimensions it counts for
    "discriminative-attribute-state": ["attribute", "state"],
    "discriminative-attribute-number": ["attribute", "number"],
    "discriminative-attribute-action": ["attribute", "action"],
    "discriminative-hallucination": ["existence"],
    "discriminative-relation": ["relation"],
    "relation": ["relation"],
}
SIMILARITY_THRESHOLD = 0.8  # AMBER takes words for the same when they are more alike than this


def chair_counts(mentioned, truths):
    """Count CHAIR_i, CHAIR_s and recall per answer: {name: array (answers, 2)}.

    `mentioned` holds for each answer the categories it names, every occurrence. `truths` holds the
    categories that are there.
    """
    chair_i = []
    chair_s = []
    recall = []
    for named, present in zip(mentioned, truths, strict=True):
        present = set(present)
        wrong = [category for category in named if category not in present]
        chair_i.append((len(wrong), len(named)))
        chair_s.append((len(wrong) > 0, 1))
        recall.append((len(present & set(named)), len(present)))
    return {"chair_i": _table(chair_i), "chair_s": _table(chair_s), "recall": _table(recall)}


def _table(rows):
    """Return pairs of numerator and denominator as an array (answers, 2), even if there is none."""
    return np.array(rows, dtype=float).reshape(-1, 2)


def chair(mentions, truths):
    """Compute CHAIR over a list of answers: {"chair_i", "chair_s", "recall"} as fractions.

    The averages are micro-averages, as in the official script. Arguments as for `chair_counts`.
    Raises ZeroDivisionError when no answer names any object. The official script stops there too.
    """
    counts = chair_counts(mentions, truths)
    if counts["chair_i"][:, 1].sum() == 0:
        raise ZeroDivisionError("no answer mentions an object, so CHAIR_i is undefined")
    return {name: rate(values) for name, values in counts.items()}


def caption_mentions(caption, synonyms, singular, words=CAPTION_WORD.findall):
    """Return the COCO categories that `caption` names by the rules of the official CHAIR script.

    Every occurrence counts, in order. `synonyms` is {word: category}, as
    `benchmark_files.read_synonyms` returns it. `singular(word)` returns a word's singular:
    officially `singularize` of CLiPS Pattern, which makes "bus" a "bu", so that "bus" never counts
    and "buses" does. `words(text)` returns words and punctuation marks: officially nltk's
    `word_tokenize`, which splits contractions differently and keeps "u.s." and "dog.a" together.
    """
    singulars = [singular(word) for word in words(caption.lower())]
    joined = []
    position = 0
    while position < len(singulars):
        pair = " ".join(singulars[position : position + 2])
        if pair in DOUBLE_WORDS:
            joined.append(DOUBLE_WORDS[pair])
            position += 2
        elif pair in synonyms:
            joined.append(pair)
            position += 2
        else:
            joined.append(singulars[position])
            position += 1
    if "toilet" in joined:  # a toilet's seat is no chair
        joined = [word for word in joined if word != "seat"]
    return [synonyms[word] for word in joined if word in synonyms]


def says_no(answer):
    """Return whether POPE reads an answer as "no". Everything else is a "yes" to its script.

    The script looks for "No", "no" or "not" among the words before the first period, after it has
    deleted the commas.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "No" in words or "not" in words or "no" in words


def pope_counts(answers, labels):
    """Count POPE's metrics per answer: {name: array (answers, 2)}.

    The names are accuracy, precision, recall, f1 and yes_ratio. A label is "yes" or "no". Raises
    ValueError if there is not one label per answer.
    """
    if len(answers) != len(labels):
        raise ValueError(
            f"{len(answers)} answers but {len(labels)} labels: POPE needs one label per answer, "
            "in the same order"
        )
    value = {"yes": 1.0, "no": 0.0}
    said_yes = np.array([not says_no(answer) for answer in answers], dtype=float)
    is_yes = np.array([value[label] for label in labels])
    right = (said_yes == is_yes).astype(float)
    found = said_yes * is_yes  # 1 where a "yes" is right
    one = np.ones_like(is_yes)
    return {
        "accuracy": np.stack([right, one], axis=1),
        "precision": np.stack([found, said_yes], axis=1),
        "recall": np.stack([found, is_yes], axis=1),
        "f1": np.stack([2 * found, said_yes + is_yes], axis=1),
        "yes_ratio": np.stack([said_yes, one], axis=1),
    }


def pope(answers, labels):
    """Compute POPE over a list of answers, as fractions. The positive class is "yes".

    Returns {"accuracy", "precision", "recall", "f1", "yes_ratio"}. Raises ZeroDivisionError when
    every answer is a "no" and precision is undefined. The official script stops there too. It also
    stops where no "yes" is right; here F1 is 0 then. Recall is nan if no label is "yes".
    """
    counts = pope_counts(answers, labels)
    if counts["precision"][:, 1].sum() == 0:
        raise ZeroDivisionError("every answer is a no, so precision is undefined")
    scores = {name: rate(values) for name, values in counts.items()}
    # From precision and recall, as officially, so that F1 agrees to the last digit.
    precision = scores["precision"]
    recall = scores["recall"]
    if precision * recall > 0:
        scores["f1"] = 2 * precision * recall / (precision + recall)
    else:
        scores["f1"] = 0.0
    return scores


def amber_percent(count, total, counters=1):
    """Return AMBER's percentage, rounded to one decimal.

    Each official counter starts at 0.001 to avoid a division by zero. `counters` is the number of
    counters that were summed for `total`.
    """
    return round(count / (total + 0.001 * counters) * 100, 1)


def amber_discriminative(responses, annotations):
    """Score AMBER's yes/no questions in percent, as the script prints them.

    The positive class is "no". `responses` is [{"id", "response"}]. `annotations` is [{"id",
    "type", "truth"}] and must contain all of their ids. Returns {"accuracy", "precision", "recall",
    "f1"} and, for every dimension asked about, a dict of the same four: existence, attribute,
    state, number, action and relation. Attribute takes state, number and action together. A
    response counts only if it is exactly "Yes" or "No". Any other is wrong and no predicted "no".
    Raises ValueError for an id without annotation and for the id of a generative item.
    """
    annotation_of = {row["id"]: row for row in annotations}
    overall = []
    dimensions = {
        "existence": [],
        "attribute": [],
        "state": [],
        "number": [],
        "action": [],
        "relation": [],
    }
    for row in responses:
        if row["id"] not in annotation_of:
            raise ValueError(
                f"response with id {row['id']}: there is no annotation with this id; "
                "check that annotations.json is of the same version"
            )
        annotation = annotation_of[row["id"]]
        kind = annotation["type"]
        if kind not in AMBER_DIMENSIONS:
            raise ValueError(
                f"response with id {row['id']}: its type is {kind!r}, not a yes/no question; "
                "score it with amber_generative"
            )
        pair = (row["response"], annotation["truth"])
        overall.append(pair)
        for name in AMBER_DIMENSIONS[kind]:
            dimensions[name].append(pair)
    scores = _amber_scores("overall", overall)
    for name, pairs in dimensions.items():
        if pairs:
            scores[name] = _amber_scores(name, pairs)
    return scores


def _amber_scores(dimension, pairs):
    """Return the four figures of the (response, truth) `pairs` of one dimension."""
    # The script sums the counters of state, number and action, each of which starts at 0.001.
    counters = 3 if dimension == "attribute" else 1
    said_no = sum(response == "No" for response, _ in pairs)
    is_no = sum(truth == "no" for _, truth in pairs)
    right_no = pairs.count(("No", "no"))
    right_yes = pairs.count(("Yes", "yes"))
    accuracy = amber_percent(right_no + right_yes, len(pairs), counters)
    precision = amber_percent(right_no, said_no, counters)
    recall = amber_percent(right_no, is_no, counters)
    # The script computes F1 from the rounded figures and adds ten times as much for existence.
    p = precision / 100
    r = recall / 100
    epsilon = 0.001 if dimension == "existence" else 0.0001
    f1 = round(2 * p * r / (p + r + epsilon) * 100, 1)
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def amber_generative(nouns, annotations, associations, safe_words, similar=None):
    """Score AMBER's descriptions in percent, as the script prints them.

    Returns {"chair", "cover", "hal", "cog"}. Arguments as for `amber_counts`. chair is the share of
    mentions that are wrong. cover is the share of truth entries that are named; of an entry that
    is listed twice, only one can be. hal is the share of responses with a wrong mention. cog is
    the share of hallu entries that are named: this is the code's definition, the paper divides by
    mentions.
    """
    counts = amber_counts(nouns, annotations, associations, safe_words, similar)
    scores = {}
    for name, values in counts.items():
        numerator, denominator = values.sum(axis=0).tolist()
        scores[name] = amber_percent(numerator, denominator)
    # The script subtracts the share of correct responses from 100, which can round differently.
    wrong, responses = counts["hal"].sum(axis=0).tolist()
    scores["hal"] = round(100 - (responses - wrong) / (responses + 0.001) * 100, 1)
    return scores


def amber_counts(nouns, annotations, associations, safe_words, similar=None):
    """Count AMBER's chair, cover, hal and cog per response: {name: array (responses, 2)}.

    `nouns` holds the nouns of each response, every occurrence, in order. `annotations` holds for
    each response {"truth", "hallu"}: lists of objects that are there and of objects that invite a
    mistake. `associations` is {object: [words]}, from relation.json. Its objects and words are the
    vocabulary. `safe_words` are never wrong. `similar(noun, word)` returns how alike two words are:
    officially by spaCy's en_core_web_lg. Without it only equal words match. Raises ValueError for
    an object that `associations` does not contain.
    """
    vocabulary = set(associations).union(*associations.values())
    chair = []
    cover = []
    hal = []
    cog = []
    for said, annotation in zip(nouns, annotations, strict=True):
        truth = _amber_words(annotation["truth"], associations)
        habit = _amber_words(annotation["hallu"], associations)
        mentions = 0
        wrong = 0
        named = set()  # numbers of the truth entries that are credited
        invented = set()  # numbers of the hallu entries that are marked
        for noun in said:
            if noun not in vocabulary:
                continue
            mentions += 1
            # A safe word stays among the mentions, but is asked first: it credits nothing, even
            # where it is in the truth.
            if noun in safe_words:
                continue
            entry = _first_equal(noun, truth)
            if entry is not None:
                named.add(entry)
                continue
            # An equal truth word ended the search. A similar one does not: the script marks hallu
            # entries before it looks for one, both an equal and a similar entry.
            invented.add(_first_equal(noun, habit))
            invented.add(_first_similar(noun, habit, similar))
            entry = _first_similar(noun, truth, similar)
            if entry is None:
                wrong += 1
            else:
                named.add(entry)
        invented.discard(None)
        chair.append((wrong, mentions))
        cover.append((len(named), len(annotation["truth"])))
        hal.append((wrong > 0, 1))
        cog.append((len(invented), len(annotation["hallu"])))
    return {
        "chair": _table(chair),
        "cover": _table(cover),
        "hal": _table(hal),
        "cog": _table(cog),
    }


def _amber_words(objects, associations):
    """Return the words that name each of `objects`, as a list of (word, number of the object)."""
    unknown = sorted(set(objects) - set(associations))
    if unknown:
        raise ValueError(
            f"relation.json has no entry for {', '.join(unknown)}, which an annotation names"
        )
    # The script looks through the associated words of all objects before the objects themselves,
    # and the first hit counts: a word may be credited to an object that is merely associated.
    associated = []
    own = []
    for number, name in enumerate(objects):
        for word in associations[name]:
            associated.append((word, number))
        own.append((name, number))
    return associated + own


def _first_equal(noun, words):
    """Return the number of the object with the first equal word, None if there is none."""
    for word, number in words:
        if word == noun:
            return number
    return None


def _first_similar(noun, words, similar):
    """Return the number of the object with the first similar word, None if there is none."""
    if similar is None:
        return None
    for word, number in words:
        if similar(noun, word) > SIMILARITY_THRESHOLD:
            return number
    return None
