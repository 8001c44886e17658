"""The whole path in small: train on the embedded default, then compare base and tuned; and all of it without a network."""

import json
import os
import subprocess
import sys

from utils import evaluation, models, preferences, train
from utils.settings import PROFILES, ROOT

SETTINGS = PROFILES["embedded"]
NOWHERE = "http://127.0.0.1:9"  # the discard port: a connection is refused at once


def test_thirty_steps_already_hallucinate_less(tmp_path):
    train.main(["--profile", "embedded", "--output", str(tmp_path), "--max-steps", "30"])
    scenes = preferences.load(SETTINGS.evaluation_dataset, "test[:100]")
    model, processor = models.load_tuned(SETTINGS, tmp_path / "adapter"), models.load_processor(SETTINGS)
    answers = [evaluation.ask(model, processor, scenes, SETTINGS, adapter=adapter) for adapter in (False, True)]
    result = evaluation.compare(*answers, list(scenes["objects"]))
    assert result["difference"]["chair_i"]["high"] < 0
    assert result["dpo"]["recall"] > 0.9 and result["dpo"]["pope_accuracy"] > 0.75


def test_the_embedded_path_needs_no_network(tmp_path):
    network = {"HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE, "ALL_PROXY": NOWHERE, "HF_ENDPOINT": NOWHERE, "NO_PROXY": ""}
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    environment |= network | {name.lower(): value for name, value in network.items()} | {"HF_HOME": str(tmp_path / "empty")}
    command = [sys.executable, "-m", "utils.train", "--profile", "embedded", "--output", str(tmp_path / "run"), "--max-steps", "1"]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 1


def test_committed_results_reach_what_the_readme_says():
    for seed in range(5):
        result = json.loads((ROOT / "results" / "embedded" / f"evaluation-seed{seed}.json").read_text())
        base, dpo, difference = result["base"], result["dpo"], result["difference"]
        assert result["n"] >= 500 and result["training"]["seconds"] < 90
        assert dpo["chair_i"] <= 0.3 * base["chair_i"] and difference["chair_i"]["high"] < 0
        assert dpo["recall"] >= base["recall"] - 0.01 and dpo["pope_accuracy"] >= base["pope_accuracy"]
        assert abs(dpo["words"] / result["true_words"] - 1) < 0.1
