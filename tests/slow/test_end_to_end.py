"""The whole path in small: train, then compare base and tuned; and all of it without a network."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
from datasets import load_dataset

from embedded import exam, judge
from embedded.claims import mentions
from scripts import train
from utils import evaluation, models
from utils.settings import PROFILES, ROOT, locate

SETTINGS = PROFILES["embedded"]
# Python tells this hook of every socket made in any library, and of every name that is looked up.
NO_SOCKET = """
import socket, sys

def refuse(event, arguments):
    unix = event == "socket.__new__" and arguments[1] == socket.AF_UNIX
    if event.startswith("socket.") and event != "socket.gethostname" and not unix:
        raise OSError(f"a socket: {event} {arguments}")

sys.addaudithook(refuse)
"""
NOWHERE = "http://127.0.0.1:9"  # the discard port: a connection is refused at once


@pytest.fixture(scope="module")
def thirty_steps(tmp_path_factory):
    """The folder of a run of the command line, and what it printed."""
    folder = tmp_path_factory.mktemp("thirty")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train.main(["--profile", "embedded", "--output", str(folder), "--max-steps", "30"])
    return folder, printed.getvalue()


def test_the_command_line_writes_adapter_and_record(thirty_steps):
    folder, printed = thirty_steps
    record = json.loads((folder / "training.json").read_text())
    measured = {"steps", "pairs", "seconds", "pairs_per_second", "final", "log"}
    assert measured | {"versions", "settings"} <= record.keys()
    assert record["steps"] == 30 and record["pairs"] == 30 * SETTINGS.batch_size
    assert record["settings"]["profile"] == "embedded"
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert "0 longer than" in printed and "30 steps in" in printed


def test_thirty_steps_already_hallucinate_less(thirty_steps, processor):
    folder, _ = thirty_steps
    scenes = load_dataset(locate(SETTINGS.evaluation_dataset), split="test[:100]")
    images = list(scenes["image"])
    truths = list(scenes["objects"])
    questions = exam.pope_questions(truths)
    model = models.load_tuned(SETTINGS, folder / "adapter")

    counts = []
    for answers in evaluation.ask_both(SETTINGS, model, processor, images, questions):
        of_objects = evaluation.count(answers, judge.present(truths), mentions)
        counts.append(of_objects | judge.claim_counts(answers["descriptions"], truths))
    result = evaluation.compare(*counts)
    assert result["n"] == 100
    assert result["difference"]["chair_i"]["high"] < 0
    assert result["tuned"]["recall"] > 0.9 and result["tuned"]["pope_accuracy"] > 0.75


def run(command, **variables):
    """Run `command` in this repository without the variables that forbid the network."""
    environment = os.environ | variables
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if name not in variables:
            environment.pop(name, None)
    command = [sys.executable, *command]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )


def test_the_embedded_path_needs_no_network(tmp_path):
    variables = {"HF_ENDPOINT": NOWHERE, "HF_HOME": str(tmp_path / "empty")}
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        variables[name] = NOWHERE
        variables[name.upper()] = NOWHERE
    variables["no_proxy"] = ""
    variables["NO_PROXY"] = ""
    output = tmp_path / "run"
    command = ["-m", "scripts.train", "--profile", "embedded"]
    finished = run([*command, "--output", str(output), "--max-steps", "1"], **variables)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((output / "training.json").read_text())["steps"] == 1


WHOLE_PATH = """
import pathlib, sys
from datasets import load_dataset
from embedded import exam
from scripts import ask, train
from utils import evaluation, models, settings

folder = pathlib.Path(sys.argv[1])
scene = str(folder / "scene.png")
adapter = str(folder / "adapter")
train.main(["--profile", "embedded", "--output", str(folder), "--max-steps", "1"])
scenes = load_dataset(settings.locate("embedded/dataset"), split="test[:4]")
scenes[0]["image"].save(scene)
ask.main([scene, "--adapter", adapter])
profile = settings.load("embedded")
model = models.load_tuned(profile, adapter)
processor = models.load_processor(profile)
questions = exam.pope_questions(list(scenes["objects"]))
asked = evaluation.ask(profile, model, processor, list(scenes["image"]), questions)
print("asked", len(asked["descriptions"]))
"""


def test_offline_the_whole_path_opens_no_socket(tmp_path):
    """Load, check, train, save, ask and evaluate."""
    command = ["-c", NO_SOCKET + WHOLE_PATH, str(tmp_path)]
    done = run(command, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert done.returncode == 0 and "asked 4" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://localhost')",
        "socket.gethostbyname('localhost')",
    ],
)
def test_a_socket_would_be_noticed(code):
    done = run(["-c", NO_SOCKET + code])
    assert done.returncode and "a socket: " in done.stderr
