import numpy as np

from utils.paired_statistics import paired_difference, scenes_needed


def test_as_many_scenes_as_needed_show_the_effect_four_times_in_five():
    random = np.random.default_rng(0)

    def scenes(n):
        mentions = random.integers(1, 5, size=n)
        before = np.stack([random.binomial(mentions, 0.30), mentions], axis=1).astype(float)
        after = np.stack([random.binomial(mentions, 0.24), mentions], axis=1).astype(float)
        return before, after

    needed = scenes_needed(*scenes(20_000), effect=0.06)
    shown = [paired_difference(*scenes(needed), resamples=400)["high"] < 0 for _ in range(200)]
    assert 0.7 < np.mean(shown) < 0.9
