"""What holds for every table of results that hypothesis makes up: CHAIR, POPE, AMBER, paired."""

import random
from itertools import product
from statistics import mean

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from utils import hallucination
from utils.paired_statistics import (
    holm,
    interval,
    mcnemar,
    paired_difference,
    rate,
    scenes_needed,
)

SEEDS = st.integers(0, 2**32 - 1).map(random.Random)
TEXTS = st.lists(
    st.sampled_from(["no", "No", "not", "yes", " ", ",", ".", "!"]) | st.characters(), max_size=8
).map("".join)

# scorers

NAMES = st.lists(st.sampled_from(["cup", "book", "car", "dog"]), max_size=5)
SAID = st.lists(st.tuples(NAMES, NAMES), max_size=6)
JUDGED = st.lists(
    st.tuples(st.sampled_from(["Yes", "No"]), st.sampled_from(["yes", "no"])),
    min_size=1,
    max_size=12,
)
OTHER = {"Yes": "No", "No": "Yes", "yes": "no", "no": "yes"}


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)] or [[], []]


@given(SAID, SEEDS)
def test_chair_is_a_share_of_mentions_whatever_their_order(rows, rng):
    counts = hallucination.chair_counts(*columns(rows))
    for values in counts.values():
        assert (values[:, 0] <= values[:, 1]).all()
        assert (values >= 0).all()
    mentions = [name in truth for said, truth in rows for name in said]
    if not mentions:
        with pytest.raises(ZeroDivisionError):
            hallucination.chair(*columns(rows))
        return
    scores = hallucination.chair(*columns(rows))
    assert scores["chair_i"] == pytest.approx(1 - mean(mentions))
    assert scores["chair_s"] == mean(bool(set(said) - set(truth)) for said, truth in rows)
    mixed = []
    for said, truth in rng.sample(rows, len(rows)):
        mixed.append((rng.sample(said, len(said)), rng.sample(truth, len(truth))))
    assert hallucination.chair(*columns(mixed)) == pytest.approx(scores, nan_ok=True)


@given(
    st.lists(st.tuples(NAMES, NAMES.filter(bool)), min_size=1, max_size=6),
    st.sampled_from(["cup", "dog"]),
)
def test_one_more_true_mention_never_worsens_chair_and_one_more_wrong_one_never_betters_it(
    rows, name
):
    (said, truth), *others = rows
    assume(any(said for said, _ in rows))
    before = hallucination.chair(*columns(rows))
    after = hallucination.chair(*columns([([*said, name], truth), *others]))
    if name in truth:
        assert after["chair_i"] <= before["chair_i"] + 1e-12
        assert after["chair_s"] == before["chair_s"]
        assert (after["recall"] > before["recall"]) == (name not in said)
    else:
        assert after["chair_i"] >= before["chair_i"] - 1e-12
        assert after["recall"] == before["recall"]


@given(JUDGED, SEEDS)
def test_pope_of_inverted_and_of_exchanged_answers(rows, rng):
    answers, labels = columns(rows)
    assume("Yes" in answers and "yes" in labels)
    scores = hallucination.pope(answers, labels)
    assert all(0 <= value <= 1 for value in scores.values())
    assert hallucination.pope(*columns(rng.sample(rows, len(rows)))) == scores
    turned = hallucination.pope(
        [label.title() for label in labels], [answer.lower() for answer in answers]
    )
    assert (turned["precision"], turned["recall"]) == (scores["recall"], scores["precision"])
    assert turned["accuracy"] == scores["accuracy"]
    assert turned["f1"] == pytest.approx(scores["f1"])
    f1 = hallucination.pope_counts(answers, labels)["f1"].sum(axis=0)
    assert scores["f1"] == pytest.approx(f1[0] / f1[1])  # 2 TP / (2 TP + FP + FN)
    if "No" in answers:
        inverted = hallucination.pope([OTHER[answer] for answer in answers], labels)
        for name in ("accuracy", "recall", "yes_ratio"):
            assert inverted[name] + scores[name] == pytest.approx(1)


@given(TEXTS, TEXTS)
def test_pope_reads_only_the_first_sentence_and_no_comma(first, rest):
    said = hallucination.says_no(first)
    assert hallucination.says_no(f"{first}.{rest}") == said
    assert hallucination.says_no(first.replace(",", "")) == said
    assert hallucination.says_no(f"no {first}")
    sentence = rest.partition(".")[0]
    assert hallucination.says_no("x" + rest) == hallucination.says_no("x" + sentence)


KINDS = st.sampled_from([*hallucination.AMBER_DIMENSIONS])
ASKED = st.lists(
    st.tuples(
        st.sampled_from(["Yes", "No", "yes", "No.", ""]), st.sampled_from(["yes", "no"]), KINDS
    ),
    min_size=1,
    max_size=12,
)


@given(ASKED, SEEDS)
def test_amber_questions_score_by_id_and_a_no_that_is_right_counts_twice(rows, rng):
    responses = []
    annotations = []
    for number, (response, truth, kind) in enumerate(rows):
        responses.append({"id": number, "response": response})
        annotations.append({"id": number, "truth": truth, "type": kind})
    scores = hallucination.amber_discriminative(responses, annotations)
    shuffled = rng.sample(responses, len(rows)), rng.sample(annotations, len(rows))
    assert hallucination.amber_discriminative(*shuffled) == scores
    pairs = [(response, truth) for response, truth, _ in rows]
    found = pairs.count(("No", "no"))
    right = found + pairs.count(("Yes", "yes"))
    denied = [response for response, _ in pairs].count("No")
    absent = [truth for _, truth in pairs].count("no")
    # AMBER adds 0.001 to each counter, and rounds.
    assert scores["precision"] == pytest.approx(100 * found / (denied or 1), abs=0.16)
    assert scores["recall"] == pytest.approx(100 * found / (absent or 1), abs=0.16)
    assert scores["accuracy"] == pytest.approx(100 * right / len(rows), abs=0.16)
    for value in scores.values():
        figures = value.values() if isinstance(value, dict) else [value]
        assert all(0 <= figure <= 100 for figure in figures)
    if absent == len(rows):
        assert scores["accuracy"] == scores["recall"]


RELATIONS = {"cup": ["mug", "drink"], "dog": ["puppy", "pet"], "cat": ["pet", "kitten"], "sky": []}
NOUNS = st.lists(
    st.sampled_from(
        ["cup", "mug", "drink", "dog", "puppy", "pet", "cat", "kitten", "sky", "table"]
    ),
    max_size=6,
)
THERE = st.lists(st.sampled_from([*RELATIONS]), max_size=3)
DESCRIBED = st.lists(st.tuples(NOUNS, THERE, THERE), min_size=1, max_size=5)


def amber(rows, similar=None):
    annotations = [{"truth": truth, "hallu": habit} for _, truth, habit in rows]
    return hallucination.amber_counts(
        [nouns for nouns, _, _ in rows], annotations, RELATIONS, {"drink"}, similar
    )


@given(DESCRIBED, SEEDS)
def test_amber_counts_what_no_true_object_explains_whatever_the_order(rows, rng):
    counts = amber(rows)
    for number, (nouns, truth, habit) in enumerate(rows):
        explained = {"drink", *truth}
        for name in truth:
            explained.update(RELATIONS[name])
        wrong = [noun for noun in nouns if noun != "table" and noun not in explained]
        mentions = len(nouns) - nouns.count("table")
        assert counts["chair"][number].tolist() == [len(wrong), mentions]
        assert counts["hal"][number].tolist() == [bool(wrong), 1]
        assert 0 <= counts["cover"][number, 0] <= len(set(truth))
        assert counts["cover"][number, 1] == len(truth)
        assert 0 <= counts["cog"][number, 0] <= len(set(habit))
        assert counts["cog"][number, 1] == len(habit)
    mixed = amber([(rng.sample(nouns, len(nouns)), truth, habit) for nouns, truth, habit in rows])
    for name in counts:
        assert np.array_equal(mixed[name], counts[name])
    lenient = amber(rows, similar=lambda noun, word: 1.0)
    assert (lenient["chair"][:, 0] <= counts["chair"][:, 0]).all()
    assert (lenient["cover"] >= counts["cover"]).all()


# statistics

COUNTS = st.integers(1, 6).flatmap(lambda d: st.tuples(st.integers(0, d), st.just(d)))
BOTH = st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=12).map(
    lambda rows: np.array(rows, dtype=float).swapaxes(0, 1)
)
OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=9)


@given(BOTH)
def test_a_rate_and_its_interval_lie_between_the_least_and_the_largest_share(tables):
    counts = tables[0]
    shares = counts[:, 0] / counts[:, 1]
    low, high = interval(counts, resamples=200)
    assert shares.min() - 1e-12 <= low <= high <= shares.max() + 1e-12
    assert shares.min() - 1e-12 <= rate(counts) <= shares.max() + 1e-12
    assert rate(np.concatenate([counts, counts, [[0, 0]]])) == pytest.approx(rate(counts))


@given(BOTH)
def test_a_difference_is_turned_round_when_its_sides_are(tables):
    before, after = tables
    forth = paired_difference(before, after, resamples=200)
    back = paired_difference(after, before, resamples=200)
    assert back["mean"] == pytest.approx(-forth["mean"])
    assert (back["low"], back["high"]) == pytest.approx((-forth["high"], -forth["low"]))
    assert back["p"] == forth["p"]
    assert 1 / 201 <= forth["p"] <= 1
    assert forth["low"] - 1e-12 <= forth["mean"] <= forth["high"] + 1e-12
    assert forth["low"] <= forth["high"]
    assert forth["mean"] == pytest.approx(rate(after) - rate(before))
    none = paired_difference(before, before, resamples=20)
    assert none == {"mean": 0, "low": 0, "high": 0, "p": 1}


@given(BOTH, st.floats(0.01, 0.5))
def test_half_the_effect_needs_four_times_the_scenes(tables, effect):
    needed = scenes_needed(*tables, effect)
    assert 4 * needed - 4 <= scenes_needed(*tables, effect / 2) <= 4 * needed
    assert scenes_needed(*tables[::-1], effect) == needed


@given(OUTCOMES)
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_lopsided(outcomes):
    before, after = columns(outcomes)
    result = mcnemar(before, after)
    turned = mcnemar(after, before)
    assert turned["only_before"] == result["only_after"]
    assert turned["only_after"] == result["only_before"]
    assert turned["p"] == result["p"]
    different = [one for one, other in outcomes if one != other]
    tosses = [abs(2 * sum(toss) - len(toss)) for toss in product([0, 1], repeat=len(different))]
    lopsided = abs(2 * sum(different) - len(different))
    assert result["p"] == pytest.approx(mean(toss >= lopsided for toss in tosses))


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1), min_size=1))
def test_holm_rejects_step_by_step(p_values):
    """The smallest p against level / m, the next against level / (m − 1), until one is larger."""
    adjusted = holm(p_values)
    assert list(adjusted) == list(p_values)
    assert all(p <= adjusted[name] <= 1 for name, p in p_values.items())
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        remaining = len(p_values)
        for name in sorted(p_values, key=p_values.get):
            if p_values[name] * remaining > level:
                break
            rejected.add(name)
            remaining -= 1
        assert {name for name, p in adjusted.items() if p <= level} == rejected
