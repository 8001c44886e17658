import numpy as np
import pytest

from utils.paired_statistics import holm, interval, mcnemar, paired_difference


def test_paired_difference_finds_an_effect_and_no_effect():
    rng = np.random.default_rng(0)
    before = np.stack([rng.integers(0, 2, 400), np.full(400, 3)], axis=1).astype(float)
    better = before.copy()
    shuffled = rng.permutation(before)
    better[:, 0] *= rng.random(400) < 0.3
    effect = paired_difference(before, better)
    assert effect["low"] < effect["mean"] < effect["high"] < 0
    assert effect["p"] < 0.001
    nothing = paired_difference(before, shuffled)
    assert nothing["low"] < 0 < nothing["high"]
    assert nothing["p"] > 0.05
    same = paired_difference(before, before)
    assert same == {"mean": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        before = np.stack([rng.random(150) < 0.3, np.ones(150)], axis=1).astype(float)
        after = np.stack([rng.random(150) < 0.2, np.ones(150)], axis=1).astype(float)
        difference = paired_difference(before, after, resamples=400, seed=seed)
        covered += difference["low"] <= -0.1 <= difference["high"]
    assert 88 <= covered <= 100


def test_mcnemar_by_hand():
    result = mcnemar([1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1])
    assert (result["only_before"], result["only_after"]) == (5, 0)
    assert result["p"] == pytest.approx(2 / 2**5)
    assert mcnemar([1, 0], [1, 0])["p"] == 1.0


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )


def test_the_interval_of_a_share_is_that_of_the_binomial():
    counts = np.stack([np.arange(400) < 100, np.ones(400)], axis=1).astype(float)
    low, high = interval(counts)
    half = 0.042  # 1.96 · √(0.25 · 0.75 / 400)
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.006)
