"""The whole path in small: train on the embedded default, then compare base and tuned; and all of it without a network."""

import io
import json
import os
import subprocess
import sys

import pytest
from PIL import Image, ImageChops, ImageStat

from scripts import train
from utils import evaluation, models, preferences
from utils.plots import before_after
from utils.settings import PROFILES, ROOT

SETTINGS = PROFILES["embedded"]
RESULTS = ROOT / "results" / "embedded"
# Python tells this hook of every socket that is made, in whatever library, and of every name that is looked up.
NO_SOCKET = """
import socket, sys

def refuse(event, arguments):
    unix = event == "socket.__new__" and arguments[1] == socket.AF_UNIX
    if event.startswith("socket.") and event != "socket.gethostname" and not unix:
        raise OSError(f"a socket: {event} {arguments}")

sys.addaudithook(refuse)
"""
NOWHERE = "http://127.0.0.1:9"  # the discard port: a connection is refused at once


def test_thirty_steps_already_hallucinate_less(tmp_path):
    train.main(["--profile", "embedded", "--output", str(tmp_path), "--max-steps", "30"])
    scenes = preferences.load(SETTINGS.evaluation_dataset, "test[:100]")
    model, processor = (
        models.load_tuned(SETTINGS, tmp_path / "adapter"),
        models.load_processor(SETTINGS),
    )
    answers = [
        evaluation.ask(model, processor, scenes, SETTINGS, adapter=adapter)
        for adapter in (False, True)
    ]
    result = evaluation.compare(*answers, list(scenes["objects"]))
    assert result["difference"]["chair_i"]["high"] < 0
    assert result["dpo"]["recall"] > 0.9 and result["dpo"]["pope_accuracy"] > 0.75


def test_the_embedded_path_needs_no_network(tmp_path):
    network = {
        "HTTP_PROXY": NOWHERE,
        "HTTPS_PROXY": NOWHERE,
        "ALL_PROXY": NOWHERE,
        "HF_ENDPOINT": NOWHERE,
        "NO_PROXY": "",
    }
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    }
    environment |= (
        network
        | {name.lower(): value for name, value in network.items()}
        | {"HF_HOME": str(tmp_path / "empty")}
    )
    command = [
        sys.executable,
        "-m",
        "scripts.train",
        "--profile",
        "embedded",
        "--output",
        str(tmp_path / "run"),
        "--max-steps",
        "1",
    ]
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 1


def run_without_sockets(code, **variables):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    }
    command = [sys.executable, "-c", NO_SOCKET + code]
    return subprocess.run(
        command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=300
    )


def test_offline_the_whole_path_opens_no_socket(tmp_path):
    """Load, check, train, save, ask and evaluate."""
    code = f"""
from scripts import ask, train
from utils import evaluation, models, preferences
from utils.settings import PROFILES
train.main(["--profile", "embedded", "--output", {str(tmp_path)!r}, "--max-steps", "1"])
scenes = preferences.load("embedded/dataset", "test[:4]")
scenes[0]["image"].save({str(tmp_path / "scene.png")!r})
ask.main([{str(tmp_path / "scene.png")!r}, "--adapter", {str(tmp_path / "adapter")!r}])
model, processor = models.load_tuned(PROFILES["embedded"], {str(tmp_path / "adapter")!r}), models.load_processor(PROFILES["embedded"])
asked = evaluation.ask(model, processor, scenes, PROFILES["embedded"])
print("asked", len(asked["descriptions"]))
"""
    done = run_without_sockets(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert done.returncode == 0 and "asked 4" in done.stdout, done.stderr


def test_a_socket_would_be_noticed():
    for code in (
        "socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://localhost')",
        "socket.gethostbyname('localhost')",
    ):
        done = run_without_sockets(code)
        assert done.returncode and "a socket: " in done.stderr


def test_the_readme_s_figure_is_that_of_seed_0():
    drawn = io.BytesIO()
    before_after(json.loads((RESULTS / "evaluation-seed0.json").read_text())).savefig(drawn)
    ours, committed = (
        Image.open(file).convert("RGB") for file in (drawn, RESULTS / "before_after.png")
    )
    assert ours.size == committed.size and ImageStat.Stat(
        ImageChops.difference(ours, committed)
    ).mean == pytest.approx([0] * 3, abs=0.1)


def test_committed_results_reach_what_the_readme_says():
    for seed in range(5):
        result = json.loads(
            (ROOT / "results" / "embedded" / f"evaluation-seed{seed}.json").read_text()
        )
        base, dpo, difference = result["base"], result["dpo"], result["difference"]
        assert result["n"] >= 500 and result["training"]["seconds"] < 90
        assert dpo["chair_i"] <= 0.3 * base["chair_i"] and difference["chair_i"]["high"] < 0
        assert (
            dpo["recall"] >= base["recall"] - 0.01 and dpo["pope_accuracy"] >= base["pope_accuracy"]
        )
        assert abs(dpo["words"] / result["true_words"] - 1) < 0.1
