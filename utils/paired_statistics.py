"""Paired statistics for ratios of sums: intervals, tests, and corrections for looking at several metrics.

A metric over answers is an array of shape (answers, 2): numerators and denominators.
"""

from math import comb

import numpy as np


def rate(counts):
    """Sum of numerators over sum of denominators of an array (answers, 2); nan where the denominators sum to 0."""
    numerator, denominator = counts.sum(axis=0)
    return float(numerator / denominator) if denominator else float("nan")


def interval(counts, resamples=4000, seed=0):
    """95% bootstrap interval of `rate(counts)` over answers: (low, high)."""
    draws = _rates(_weights(len(counts), resamples, np.random.default_rng(seed)) @ counts)
    return tuple(float(value) for value in np.nanpercentile(draws, [2.5, 97.5]))


def paired_difference(before, after, resamples=4000, seed=0):
    """after − before of a metric on the same scenes: {"mean", "low", "high", "p"}.

    `before`, `after`: arrays (scenes, 2) of numerators and denominators. low, high: 95% interval of a bootstrap that draws
    whole scenes, both answers together. p: two-sided randomisation test that swaps the two answers of a scene at random.
    """
    random, scenes = np.random.default_rng(seed), len(before)
    difference = rate(after) - rate(before)
    weights = _weights(scenes, resamples, random)
    draws = _rates(weights @ after) - _rates(weights @ before)
    swap = random.integers(0, 2, size=(resamples, scenes)).astype(float)
    total, change = before.sum(axis=0), after - before
    swapped = _rates(total + (1 - swap) @ change) - _rates(total + swap @ change)
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    at_least = np.sum(np.abs(swapped) >= abs(difference) - 1e-12)
    return {
        "mean": difference,
        "low": float(low),
        "high": float(high),
        "p": float((at_least + 1) / (resamples + 1)),
    }


def scenes_needed(before, after, effect):
    """How many paired scenes show a difference of `effect` (a fraction) in four of five repetitions, at the 5% level, two-sided.

    (1.96 + 0.84)² · variance / effect², with the variance of one scene's contribution taken from `before` and `after` (arrays
    (scenes, 2)) by linearising the ratio: it holds for effects that leave the scatter as it is here.
    """
    share, mean = (rate(before), rate(after)), (before[:, 1].mean(), after[:, 1].mean())
    contribution = (after[:, 0] - share[1] * after[:, 1]) / mean[1] - (
        before[:, 0] - share[0] * before[:, 1]
    ) / mean[0]
    return int(np.ceil((1.96 + 0.84) ** 2 * contribution.var() / effect**2))


def _weights(scenes, resamples, random):
    return random.multinomial(scenes, np.full(scenes, 1 / scenes), size=resamples).astype(float)


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
