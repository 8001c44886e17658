"""A killed run goes on from its last whole checkpoint to the adapter of an undisturbed one; what is damaged is found and named."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from safetensors.torch import load_file, save_file

from benchmarks import kill
from tools import notebooks
from utils import chat, checkpoints, models, preferences, training
from utils.callbacks import StopAfter

SETTINGS = replace(kill.SETTINGS, train_split="train[:16]")


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, SETTINGS.train_split))


def trainer_for(rows, processor, output, settings=SETTINGS, **changes):
    changes = {"max_steps": 4, "disable_tqdm": True} | changes
    return training.make_trainer(
        settings, models.load_model(settings), processor, rows, output, **changes
    )


@pytest.fixture(scope="module")
def finished(rows, processor, tmp_path_factory):
    """A run's folder with checkpoints 2 and 4, both whole."""
    folder = tmp_path_factory.mktemp("finished")
    training.train(trainer_for(rows, processor, folder), SETTINGS)
    return folder


@pytest.fixture
def output(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def empty(path):
    path.write_bytes(b"")


def zeros(path):
    """As a file whose last blocks a computer without power no longer wrote."""
    half = path.stat().st_size // 2
    path.write_bytes(path.read_bytes()[:half] + bytes(path.stat().st_size - half))


def one_byte(path):
    data = bytearray(path.read_bytes())
    place = data.index(b"/data/") + 200  # in a tensor, not in the directory
    data[place] ^= 1
    path.write_bytes(data)


FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
]
WAYS = [
    (name, way, word)
    for name in FILES
    for way, word in ((os.remove, "missing"), (empty, "empty"), (cut, "damaged"))
]
WAYS += [(name, zeros, "damaged") for name in FILES if name != "adapter_model.safetensors"] + [
    ("optimizer.pt", one_byte, "damaged")
]


@pytest.mark.parametrize(
    ("name", "way", "word"), WAYS, ids=[f"{name}-{way.__name__}" for name, way, _ in WAYS]
)
def test_every_damage_is_recognised_and_the_checkpoint_before_is_used(name, way, word, output):
    way(output / "checkpoint-4" / name)
    with pytest.warns(
        UserWarning, match=rf"checkpoint-4 \({name} is {word}\); going on from checkpoint-2$"
    ) as said:
        assert checkpoints.last_checkpoint(output).name == "checkpoint-2"
    assert len(said) == 1


def test_a_run_begun_anew_in_an_old_folder_resumes_its_own_checkpoint(output, rows, processor):
    """And not the old run's last one, which has more steps."""
    training.train(trainer_for(rows, processor, output, callbacks=[StopAfter(2)]), SETTINGS)
    assert (output / "checkpoint-4").exists() and checkpoints.last_checkpoint(
        output
    ).name == "checkpoint-2"


def test_whole_checkpoints_are_used_without_a_word(output):
    (output / "checkpoint-old").mkdir()
    cut(output / "checkpoint-2" / "optimizer.pt")  # an older one may be in any state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.last_checkpoint(output).name == "checkpoint-4"


def test_steps_are_compared_as_numbers(output):
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-10")
    assert [path.name for path in checkpoints.newest_first(output)] == [
        "checkpoint-10",
        "checkpoint-4",
        "checkpoint-2",
    ]


def test_where_none_is_whole_each_is_named(output, tmp_path):
    empty(output / "checkpoint-4" / "optimizer.pt")
    os.remove(output / "checkpoint-2" / "trainer_state.json")
    with pytest.raises(
        FileNotFoundError,
        match=r"no whole one: checkpoint-4 \(optimizer.pt is empty\), checkpoint-2 \(trainer_state",
    ):
        checkpoints.last_checkpoint(output)
    with pytest.raises(
        FileNotFoundError,
        match=r"nothing to resume: .* holds no checkpoint; train without resuming",
    ):
        checkpoints.last_checkpoint(tmp_path / "none")


def test_a_damaged_reference_of_a_continued_adapter_is_recognised(output):
    (output / "checkpoint-4" / "ref").mkdir()
    shutil.copy(
        output / "checkpoint-4" / "adapter_model.safetensors", output / "checkpoint-4" / "ref"
    )
    assert checkpoints.damage(output / "checkpoint-4") is None
    cut(output / "checkpoint-4" / "ref" / "adapter_model.safetensors")
    assert checkpoints.damage(output / "checkpoint-4") == "ref/adapter_model.safetensors is damaged"


def test_resuming_beside_a_damaged_checkpoint_ends_at_the_same_adapter(
    output, finished, rows, processor
):
    cut(output / "checkpoint-4" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="going on from checkpoint-2"):
        training.train(trainer_for(rows, processor, output), SETTINGS, resume=True)
    assert (
        kill.difference(output, finished) == 0
        and checkpoints.last_checkpoint(output).name == "checkpoint-4"
    )


@pytest.mark.parametrize(
    ("settings", "changes", "said"),
    [
        ({"lora_rank": 8}, {}, "lora_rank was 16 and is 8"),
        ({"model": "another/model"}, {}, "model was 'embedded/model' and is 'another/model'"),
        ({"beta": 0.1}, {}, r"beta was 0\.3 and is 0\.1"),
        ({}, {"learning_rate": 1e-5}, r"learning_rate was 0\.0003 and is 1e-05"),
        ({}, {"per_device_train_batch_size": 2}, "pairs a step was 4 and is 2"),
        ({}, {"max_steps": 6}, "max_steps was 4 and is 6"),
    ],
)
def test_a_checkpoint_from_other_settings_stops_with_their_names(
    settings, changes, said, finished, rows
):
    other = replace(SETTINGS, **settings)
    arguments = training.dpo_config(other, finished, **{"max_steps": 4} | changes)
    with pytest.raises(ValueError, match=rf"other settings \({said}\)"):
        checkpoints.check_origin(
            finished / "checkpoint-4", checkpoints.origin(other, arguments, rows)
        )


def test_resuming_with_other_data_or_rank_stops_before_training(finished, rows, processor):
    with pytest.raises(ValueError, match=r"other settings \(rows was 16 and is 12\)"):
        training.train(
            trainer_for(rows.select(range(12)), processor, finished), SETTINGS, resume=True
        )
    other = replace(SETTINGS, lora_rank=8)
    with pytest.raises(ValueError, match=r"other settings \(lora_rank was 16 and is 8\)"):
        training.train(trainer_for(rows, processor, finished, other), other, resume=True)


def test_settings_that_change_nothing_learned_may_differ(finished, rows):
    other = replace(
        SETTINGS,
        save_steps=1,
        logging_steps=1,
        max_new_tokens=8,
        generation_batch_size=1,
        batch_size=2,
        gradient_accumulation=2,
    )
    arguments = training.dpo_config(other, finished, max_steps=4)
    checkpoints.check_origin(finished / "checkpoint-4", checkpoints.origin(other, arguments, rows))


def test_a_checkpoint_that_does_not_name_its_settings_is_refused(output, rows):
    path = output / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["Origin"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="does not say with which settings"):
        checkpoints.check_origin(output / "checkpoint-4", {})


def test_what_was_saved_before_stays_until_the_new_is_whole(tmp_path):
    for name in ("adapter", "adapter.new", "adapter.old"):  # the last one: a kill left it
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    checkpoints.put_in_place(tmp_path / "adapter.new", tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"] and (
        tmp_path / "adapter" / "file"
    ).read_text() == "adapter.new"


def test_a_run_killed_while_it_trains_and_while_it_saves_ends_at_the_same_adapter(tmp_path):
    """SIGKILL, in processes of their own; `python -m benchmarks.kill` does it twenty times at random moments."""
    context, runs = kill.processes(), [tmp_path / name for name in ("undisturbed", "killed")]
    kill.attempt(context, runs[0], 0)
    saving, found = {"event": ("step", 4), "folder": "checkpoint-4", "files": 1}, {}
    for _ in range(5):  # on a busy machine the kill may come too late
        shutil.rmtree(runs[1], ignore_errors=True)
        if kill.attempt(context, runs[1], 0, saving)[1]:
            found = kill.on_disk(runs[1])
        if found.get("checkpoint-4", "whole") != "whole":
            break
    assert found.pop("checkpoint-2") == "whole" and found["checkpoint-4"] != "whole"
    told, killed = kill.attempt(
        context, runs[1], 2, {"event": ("step", 9), "folder": "checkpoint-8", "files": 1}
    )
    assert killed and told[-1][:2] == ("step", 9)
    kill.attempt(context, runs[1], 8)
    assert kill.difference(runs[1], runs[0]) == 0


def test_a_failure_of_its_own_is_not_taken_for_a_kill(tmp_path):
    with pytest.raises(RuntimeError, match="failed by itself"):
        kill.attempt(kill.processes(), tmp_path, 2)  # nothing to resume


def test_difference_sees_one_bit(finished, output):
    assert kill.difference(output, finished) == 0
    path = output / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(1.0))
    save_file(tensors, path)
    assert kill.difference(output, finished) > 0


WAITS = """\
import os, pathlib, time
if not pathlib.Path("kernel").exists():
    pathlib.Path("kernel").write_text(str(os.getpid()))
    time.sleep(600)
print("done")"""


def test_notebooks_killed_in_the_middle_run_when_started_again(tmp_path):
    """`make tutorial`: the lock, outputs and timings that a SIGKILL leaves do not stand in the way of the next."""
    build, paths = tmp_path / "build", [tmp_path / "01_quick.ipynb", tmp_path / "02_slow.ipynb"]
    for path, source in zip(paths, ("print('done')", WAITS), strict=True):
        nbformat.write(new_notebook(cells=[new_code_cell(source)]), path)
    code = "import sys, pathlib; from tools import notebooks\nnotebooks.run([*map(pathlib.Path, sys.argv[2:])], pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(build), *map(str, paths)]
    first = subprocess.Popen(command, cwd=notebooks.ROOT, stdout=subprocess.DEVNULL)
    kernel = build / "notebooks" / "kernel"
    for _ in range(1200):
        if first.poll() is not None or (kernel.exists() and kernel.read_text()):
            break
        time.sleep(0.1)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert list(json.loads((build / "timings.json").read_text())) == ["01_quick"]
    assert not (build / "notebooks" / "02_slow.ipynb").exists()
    second = subprocess.run(
        command, cwd=notebooks.ROOT, capture_output=True, text=True, timeout=300
    )
    with contextlib.suppress(
        ProcessLookupError
    ):  # it ends by itself when it notices that nobody is there any more
        os.kill(int(kernel.read_text()), signal.SIGKILL)
    assert second.returncode == 0 and "waiting" not in second.stdout, second.stderr
    assert list(json.loads((build / "timings.json").read_text())) == ["01_quick", "02_slow"]
    assert (
        nbformat.read(build / "notebooks" / "02_slow.ipynb", 4).cells[0].outputs[0].text == "done\n"
    )
