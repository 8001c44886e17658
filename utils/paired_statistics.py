"""Statistics for ratios of sums on paired answers: intervals, tests and corrections.

A metric over answers is an array (answers, 2) of numerators and denominators.
"""

from math import comb, sqrt

import numpy as np


def rate(counts):
    """Return the sum of numerators over the sum of denominators of an array (answers, 2).

    It is nan where the denominators sum to 0.
    """
    numerator, denominator = counts.sum(axis=0)
    return float(numerator / denominator) if denominator else float("nan")


def interval(counts, resamples=4000, seed=0):
    """Return the 95% bootstrap interval of `rate(counts)` over answers: (low, high)."""
    random = np.random.default_rng(seed)
    rates = _rates(_weights(len(counts), resamples, random) @ counts)
    low, high = np.nanpercentile(rates, [2.5, 97.5])
    return float(low), float(high)


def share_interval(count, total):
    """Return the 95% interval of the share `count` / `total`: (low, high), Wilson's.

    It holds for few cases and for shares near 0 and 1. Without a case it is (0, 1).
    """
    if not total:
        return 0.0, 1.0
    z = 1.96
    share = count / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(before, after, resamples=4000, seed=0):
    """Compare a metric on the same scenes, after − before: {"mean", "low", "high", "p"}.

    `before` and `after` are arrays (scenes, 2). low and high are the 95% interval of a bootstrap
    that draws whole scenes, both answers together. p is that of a two-sided randomization test,
    which swaps the two answers of a scene at random.
    """
    random = np.random.default_rng(seed)
    scenes = len(before)
    difference = rate(after) - rate(before)
    weights = _weights(scenes, resamples, random)
    resampled = _rates(weights @ after) - _rates(weights @ before)
    low, high = np.nanpercentile(resampled, [2.5, 97.5])

    # Where a scene's answers are swapped, its change moves from one sum to the other.
    swap = random.integers(0, 2, size=(resamples, scenes)).astype(float)
    total = before.sum(axis=0)
    change = after - before
    swapped = _rates(total + (1 - swap) @ change) - _rates(total + swap @ change)
    at_least = np.sum(np.abs(swapped) >= abs(difference) - 1e-12)
    # The observed assignment counts as one of them, so p is never 0.
    p = float((at_least + 1) / (resamples + 1))
    return {"mean": difference, "low": float(low), "high": float(high), "p": p}


def scenes_needed(before, after, effect):
    """Return how many paired scenes show a difference of `effect` with 80% power at the 5% level.

    `effect` is a fraction, the test is two-sided. `before` and `after` are arrays (scenes, 2). The
    number is (1.96 + 0.84)² · variance / effect². The variance is that of one scene's
    contribution, from linearizing the ratio. It holds for effects that leave the scatter as it is.
    """
    contribution_before = (before[:, 0] - rate(before) * before[:, 1]) / before[:, 1].mean()
    contribution_after = (after[:, 0] - rate(after) * after[:, 1]) / after[:, 1].mean()
    variance = (contribution_after - contribution_before).var()
    return int(np.ceil((1.96 + 0.84) ** 2 * variance / effect**2))


def _weights(scenes, resamples, random):
    """Return how often each scene is drawn in each bootstrap sample: (resamples, scenes)."""
    return random.multinomial(scenes, np.full(scenes, 1 / scenes), size=resamples).astype(float)


def _rates(sums):
    """Return numerators over denominators of an array (resamples, 2), nan for 0 over 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, 0] / sums[:, 1]


def mcnemar(before, after):
    """Return McNemar's exact two-sided test for yes/no outcomes on the same items.

    The result is {"only_before", "only_after", "p"}. Only items on which the two differ count.
    Without an effect, each of them goes either way like a fair coin.
    """
    only_before = 0
    only_after = 0
    for one, other in zip(before, after, strict=True):
        if one and not other:
            only_before += 1
        if other and not one:
            only_after += 1
    tosses = only_before + only_after
    rarer = min(only_before, only_after)
    tail = sum(comb(tosses, count) for count in range(rarer + 1)) / 2**tosses
    return {"only_before": only_before, "only_after": only_after, "p": min(1.0, 2 * tail)}


def holm(p_values):
    """Adjust the p-values of several metrics, as Holm does: {name: p} → {name: adjusted p}."""
    adjusted = {}
    largest = 0.0
    remaining = len(p_values)
    for name in sorted(p_values, key=p_values.get):
        largest = max(largest, min(1.0, p_values[name] * remaining))
        adjusted[name] = largest
        remaining -= 1
    return {name: adjusted[name] for name in p_values}
