"""A run that was stopped or killed goes on to the adapter of an uninterrupted one."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from benchmarks import kill
from tools import notebooks
from utils import chat, checkpoints, models, preferences, training
from utils.callbacks import StopAfter

SETTINGS = replace(kill.SETTINGS, train_split="train[:16]")


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, SETTINGS.train_split))


def trainer_for(rows, processor, output, settings=SETTINGS, **changes):
    model = models.load_model(settings)
    changes = {"max_steps": 4, "disable_tqdm": True} | changes
    return training.make_trainer(settings, model, processor, rows, output, **changes)


@pytest.fixture(scope="module")
def finished(rows, processor, tmp_path_factory):
    """A run's folder with checkpoints 2 and 4, both whole."""
    folder = tmp_path_factory.mktemp("finished")
    training.train(SETTINGS, trainer_for(rows, processor, folder))
    return folder


@pytest.fixture
def output(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize("name", checkpoints.NEEDED)
def test_a_checkpoint_holds_every_file_that_resuming_needs(name, output):
    assert checkpoints.damage(output / "checkpoint-4") is None
    cut(output / "checkpoint-4" / name)
    assert checkpoints.damage(output / "checkpoint-4") == f"{name} is damaged"


def test_a_stopped_run_resumes_its_own_checkpoint_and_ends_at_the_same_adapter(
    output, finished, rows, processor
):
    """And not that of the earlier run into the same folder, which has more steps."""
    stopped = trainer_for(rows, processor, output, callbacks=[StopAfter(2)])
    assert training.train(SETTINGS, stopped)["steps"] == 2
    assert (output / "checkpoint-4").exists()
    assert checkpoints.last_checkpoint(output).name == "checkpoint-2"
    record = training.train(SETTINGS, trainer_for(rows, processor, output), resume=True)
    assert record["steps"] == 4
    assert kill.adapter_difference(output, finished) == 0


def test_resuming_beside_a_damaged_checkpoint_ends_at_the_same_adapter(
    output, finished, rows, processor
):
    cut(output / "checkpoint-4" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="resuming from checkpoint-2"):
        training.train(SETTINGS, trainer_for(rows, processor, output), resume=True)
    assert kill.adapter_difference(output, finished) == 0
    assert checkpoints.last_checkpoint(output).name == "checkpoint-4"


def test_resuming_with_other_data_or_rank_stops_before_training(finished, rows, processor):
    fewer = trainer_for(rows.select(range(12)), processor, finished)
    with pytest.raises(ValueError, match="rows was 16 and is 12"):
        training.train(SETTINGS, fewer, resume=True)
    other = replace(SETTINGS, lora_rank=8)
    with pytest.raises(ValueError, match="lora_rank was 16 and is 8"):
        training.train(other, trainer_for(rows, processor, finished, other), resume=True)


def test_nothing_to_resume_says_so(rows, processor, tmp_path):
    trainer = trainer_for(rows, processor, tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="none"):
        training.train(SETTINGS, trainer, resume=True)


def test_a_run_killed_while_it_trains_and_while_it_saves_ends_at_the_same_adapter(tmp_path):
    """SIGKILL, in separate processes; `python -m benchmarks.kill` does it at random moments."""
    context = kill.process_context()
    straight = tmp_path / "undisturbed"
    killed = tmp_path / "killed"
    kill.attempt(context, straight, 0)
    saving = {"event": ("step", 4), "folder": "checkpoint-4", "files": 1}
    found = {}
    for _ in range(20):  # on a busy machine the kill may come too late
        shutil.rmtree(killed, ignore_errors=True)
        _, killed_at = kill.attempt(context, killed, 0, saving)
        if killed_at:
            found = kill.saved_in(killed)
        if found.get("checkpoint-4", "whole") != "whole":
            break
    assert found.pop("checkpoint-2") == "whole" and found["checkpoint-4"] != "whole"
    saving = {"event": ("step", 9), "folder": "checkpoint-8", "files": 1}
    told, killed_at = kill.attempt(context, killed, 2, saving)
    assert killed_at and told[-1][:2] == ("step", 9)
    kill.attempt(context, killed, 8)
    assert kill.adapter_difference(killed, straight) == 0


def test_a_failure_of_its_own_is_not_taken_for_a_kill(tmp_path):
    with pytest.raises(RuntimeError, match="failed by itself"):
        kill.attempt(kill.process_context(), tmp_path, 2)  # nothing to resume


def test_a_silent_process_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(kill, "LIMIT", 0)
    with pytest.raises(RuntimeError, match="told nothing"):
        kill.attempt(kill.process_context(), tmp_path, 0)


WAITS = """\
import os, pathlib, time
if not pathlib.Path("kernel").exists():
    pathlib.Path("kernel").write_text(str(os.getpid()))
    time.sleep(1800)
print("done")"""
RUN = """\
import sys, pathlib
from tools import notebooks
paths = [pathlib.Path(name) for name in sys.argv[2:]]
notebooks.run(paths, pathlib.Path(sys.argv[1]))"""


def timed(build):
    return list(json.loads((build / "timings.json").read_text()))


def test_notebooks_killed_in_the_middle_run_when_started_again(tmp_path):
    """What a SIGKILL leaves of `make tutorial` does not keep the next one from running."""
    build = tmp_path / "build"
    paths = [tmp_path / "01_quick.ipynb", tmp_path / "02_slow.ipynb"]
    for path, source in zip(paths, ("print('done')", WAITS), strict=True):
        nbformat.write(new_notebook(cells=[new_code_cell(source)]), path)
    command = [sys.executable, "-c", RUN, str(build), *map(str, paths)]
    first = subprocess.Popen(command, cwd=notebooks.ROOT, stdout=subprocess.DEVNULL)
    kernel = build / "notebooks" / "kernel"
    while first.poll() is None and not (kernel.exists() and kernel.read_text()):
        time.sleep(0.1)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert timed(build) == ["01_quick", "total"]
    assert not (build / "notebooks" / "02_slow.ipynb").exists()
    second = subprocess.run(
        command, cwd=notebooks.ROOT, capture_output=True, text=True, timeout=1800
    )
    # The kernel ends by itself once it notices that nobody is there any more.
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(kernel.read_text()), signal.SIGKILL)
    assert second.returncode == 0 and "waiting" not in second.stdout, second.stderr
    assert timed(build) == ["01_quick", "02_slow", "total"]
    slow = nbformat.read(build / "notebooks" / "02_slow.ipynb", 4)
    assert slow.cells[0].outputs[0].text == "done\n"
