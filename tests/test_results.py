"""The committed results are what README and notebooks say of them."""

import io
import json

import pytest
from PIL import Image, ImageChops, ImageStat

from utils.plots import before_after
from utils.settings import ROOT

RESULTS = ROOT / "results" / "embedded"


def evaluation_of(seed):
    return json.loads((RESULTS / f"evaluation-seed{seed}.json").read_text())


def test_the_readme_s_figure_is_that_of_seed_0():
    drawn = io.BytesIO()
    before_after(evaluation_of(0)).savefig(drawn)
    ours = Image.open(drawn).convert("RGB")
    committed = Image.open(RESULTS / "before_after.png").convert("RGB")
    assert ours.size == committed.size
    difference = ImageStat.Stat(ImageChops.difference(ours, committed)).mean
    assert difference == pytest.approx([0, 0, 0], abs=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_committed_results_reach_what_the_readme_says(seed):
    result = evaluation_of(seed)
    base = result["base"]
    tuned = result["tuned"]
    assert result["n"] >= 500
    assert tuned["chair_i"] <= 0.3 * base["chair_i"]
    assert result["difference"]["chair_i"]["high"] < 0
    assert tuned["recall"] >= base["recall"] - 0.01
    assert tuned["pope_accuracy"] >= base["pope_accuracy"]
    assert abs(tuned["words"] / result["true_words"] - 1) < 0.1
