"""The time that follows from the FLOPs of a pair."""

import dataclasses

import pytest

from utils import flops
from utils.settings import PROFILES

QWEN = PROFILES["qwen"]


def test_time_grows_with_the_pairs_and_the_budget():
    hours = flops.hours(QWEN, 1000, "T4")
    assert flops.hours(QWEN, 2000, "T4") == pytest.approx(2 * hours)
    assert flops.hours(dataclasses.replace(QWEN, pixel_budget=200_000), 1000, "T4") < hours


def test_time_shrinks_with_a_faster_device():
    t4, l4, a100 = (flops.hours(QWEN, 1000, device) for device in ("T4", "L4", "A100"))
    assert t4 > l4 > a100 > 0


def test_checkpointing_computes_the_forward_pass_of_the_policy_again():
    without = flops.pair_flops(dataclasses.replace(QWEN, gradient_checkpointing=False))
    with_it = flops.pair_flops(dataclasses.replace(QWEN, gradient_checkpointing=True))
    assert with_it["language"] * 3 == without["language"] * 4
    assert with_it["vision"] == without["vision"]
