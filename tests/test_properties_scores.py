"""What holds for every table of results, on examples that hypothesis makes up: CHAIR, POPE, AMBER, paired_statistics."""

import random
from itertools import product
from statistics import mean

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from utils import hallucination, paired_statistics

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
    assert all(
        (values[:, 0] <= values[:, 1]).all() and (values >= 0).all() for values in counts.values()
    )
    mentions = [name in truth for said, truth in rows for name in said]
    if not mentions:
        with pytest.raises(ZeroDivisionError):
            hallucination.chair(*columns(rows))
        return
    scores = hallucination.chair(*columns(rows))
    assert scores["chair_i"] == pytest.approx(1 - mean(mentions)) and scores["chair_s"] == mean(
        bool(set(said) - set(truth)) for said, truth in rows
    )
    mixed = [
        (rng.sample(said, len(said)), rng.sample(truth, len(truth)))
        for said, truth in rng.sample(rows, len(rows))
    ]
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
    better = name in truth
    assert (
        after["chair_i"] <= before["chair_i"] + 1e-12
        if better
        else after["chair_i"] >= before["chair_i"] - 1e-12
    )
    assert (
        (after["chair_s"] == before["chair_s"]) if better else (after["recall"] == before["recall"])
    )
    assert (after["recall"] > before["recall"]) == (better and name not in said)


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
    assert (turned["accuracy"], turned["f1"]) == (scores["accuracy"], pytest.approx(scores["f1"]))
    f1 = hallucination.pope_counts(answers, labels)["f1"].sum(axis=0)
    assert scores["f1"] == pytest.approx(f1[0] / f1[1])  # 2 TP / (2 TP + FP + FN)
    if "No" in answers:
        inverted = hallucination.pope([OTHER[answer] for answer in answers], labels)
        assert [
            inverted[name] + scores[name] for name in ("accuracy", "recall", "yes_ratio")
        ] == pytest.approx([1, 1, 1])


@given(TEXTS, TEXTS)
def test_pope_reads_only_the_first_sentence_and_no_comma(first, rest):
    assert (
        hallucination.says_no(first)
        == hallucination.says_no(f"{first}.{rest}")
        == hallucination.says_no(first.replace(",", ""))
    )
    assert hallucination.says_no(f"no {first}") and hallucination.says_no(
        "x" + rest
    ) == hallucination.says_no("x" + rest.partition(".")[0])


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
    responses = [
        {"id": number, "response": response} for number, (response, _, _) in enumerate(rows)
    ]
    annotations = [
        {"id": number, "truth": truth, "type": kind} for number, (_, truth, kind) in enumerate(rows)
    ]
    scores = hallucination.amber_discriminative(responses, annotations)
    assert (
        hallucination.amber_discriminative(
            rng.sample(responses, len(rows)), rng.sample(annotations, len(rows))
        )
        == scores
    )
    right = sum((response, truth) in (("Yes", "yes"), ("No", "no")) for response, truth, _ in rows)
    found = sum((response, truth) == ("No", "no") for response, truth, _ in rows)
    denied, absent = (
        sum(response == "No" for response, _, _ in rows),
        sum(truth == "no" for _, truth, _ in rows),
    )
    exact = [100 * found / (denied or 1), 100 * found / (absent or 1), 100 * right / len(rows)]
    assert [scores[name] for name in ("precision", "recall", "accuracy")] == pytest.approx(
        exact, abs=0.16
    )  # 0.001 a counter, and rounding
    dimensions = [value for value in scores.values() if isinstance(value, dict)]
    assert all(
        0 <= value <= 100
        for figures in [scores, *dimensions]
        for value in figures.values()
        if not isinstance(value, dict)
    )
    if all(truth == "no" for _, truth, _ in rows):
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
    for (nouns, truth, habit), chair, cover, hal, cog in zip(
        rows, *(counts[name] for name in ("chair", "cover", "hal", "cog")), strict=True
    ):
        explained = {"drink", *truth, *(word for name in truth for word in RELATIONS[name])}
        wrong = [noun for noun in nouns if noun != "table" and noun not in explained]
        assert chair.tolist() == [
            len(wrong),
            len(nouns) - nouns.count("table"),
        ] and hal.tolist() == [bool(wrong), 1]
        assert (
            0 <= cover[0] <= len(set(truth))
            and cover[1] == len(truth)
            and 0 <= cog[0] <= len(set(habit))
            and cog[1] == len(habit)
        )
    mixed = amber([(rng.sample(nouns, len(nouns)), truth, habit) for nouns, truth, habit in rows])
    lenient = amber(rows, similar=lambda noun, word: 1.0)
    assert all(np.array_equal(mixed[name], counts[name]) for name in counts)
    assert (lenient["chair"][:, 0] <= counts["chair"][:, 0]).all() and (
        lenient["cover"] >= counts["cover"]
    ).all()


# statistics

COUNTS = st.integers(1, 6).flatmap(lambda d: st.tuples(st.integers(0, d), st.just(d)))
BOTH = st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=12).map(
    lambda rows: np.array(rows, dtype=float).swapaxes(0, 1)
)
OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=9)


@given(BOTH)
def test_a_rate_and_its_interval_lie_between_the_least_and_the_largest_share(tables):
    counts = tables[0]
    shares, (low, high) = counts[:, 0] / counts[:, 1], paired_statistics.interval(counts, resamples=200)
    assert shares.min() - 1e-12 <= low <= high <= shares.max() + 1e-12
    assert shares.min() - 1e-12 <= paired_statistics.rate(counts) <= shares.max() + 1e-12
    assert paired_statistics.rate(np.concatenate([counts, counts, [[0, 0]]])) == pytest.approx(
        paired_statistics.rate(counts)
    )


@given(BOTH)
def test_a_difference_is_turned_round_when_its_sides_are(tables):
    forth, back = (
        paired_statistics.paired_difference(*sides, resamples=200) for sides in (tables, tables[::-1])
    )
    assert [back["mean"], back["low"], back["high"]] == pytest.approx(
        [-forth["mean"], -forth["high"], -forth["low"]]
    )
    assert back["p"] == forth["p"] and 1 / 201 <= forth["p"] <= 1
    assert (
        forth["low"] <= forth["high"]
        and forth["low"] - 1e-12 <= forth["mean"] <= forth["high"] + 1e-12
    )
    assert forth["mean"] == pytest.approx(paired_statistics.rate(tables[1]) - paired_statistics.rate(tables[0]))
    assert paired_statistics.paired_difference(tables[0], tables[0], resamples=20) == {
        "mean": 0,
        "low": 0,
        "high": 0,
        "p": 1,
    }


@given(BOTH, st.floats(0.01, 0.5))
def test_half_the_effect_needs_four_times_the_scenes(tables, effect):
    needed = paired_statistics.scenes_needed(*tables, effect)
    assert 4 * needed - 4 <= paired_statistics.scenes_needed(*tables, effect / 2) <= 4 * needed
    assert paired_statistics.scenes_needed(*tables[::-1], effect) == needed


@given(OUTCOMES)
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_lopsided(outcomes):
    result, turned = (
        paired_statistics.mcnemar(*columns(rows)) for rows in (outcomes, [pair[::-1] for pair in outcomes])
    )
    assert turned == {
        "only_before": result["only_after"],
        "only_after": result["only_before"],
        "p": result["p"],
    }
    different = [before for before, after in outcomes if before != after]
    tosses = [abs(2 * sum(toss) - len(toss)) for toss in product([0, 1], repeat=len(different))]
    assert result["p"] == pytest.approx(
        mean(toss >= abs(2 * sum(different) - len(different)) for toss in tosses)
    )


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1), min_size=1))
def test_holm_rejects_step_by_step(p_values):
    """Written the other way: the smallest p against level / m, the next against level / (m − 1), until one is not below."""
    adjusted = paired_statistics.holm(p_values)
    assert list(adjusted) == list(p_values) and all(
        p <= adjusted[name] <= 1 for name, p in p_values.items()
    )
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for left, name in zip(
            range(len(p_values), 0, -1), sorted(p_values, key=p_values.get), strict=True
        ):
            if p_values[name] * left > level:
                break
            rejected.add(name)
        assert {name for name, p in adjusted.items() if p <= level} == rejected
