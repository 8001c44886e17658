"""Damage to a checkpoint is found and named; a checkpoint of another run is refused.

The checkpoints here are made up; tests/slow/test_checkpoints_of_runs.py has real ones.
"""

import json
import os
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import kill
from utils import checkpoints, training

SETTINGS = replace(kill.SETTINGS, train_split="train[:16]")
ROWS = range(16)  # of the rows, only their number counts


def config(settings, output, **changes):
    changes = {"max_steps": 4} | changes
    return training.dpo_config(settings, output, **changes)


def make_checkpoint(folder, saved_at):
    """Write the files that resuming reads, each as its library writes it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 16}')
    save_file({"lora_B.weight": torch.zeros(64, 16)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"values": torch.rand(64, 16)}, folder / name)
    origin = checkpoints.origin(SETTINGS, config(SETTINGS, folder.parent), ROWS)
    attributes = {"values": origin, "saved_at": saved_at}
    state = {"stateful_callbacks": {"Origin": {"args": {}, "attributes": attributes}}}
    (folder / "trainer_state.json").write_text(json.dumps(state))


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A run's folder with checkpoints 2 and 4, both whole."""
    folder = tmp_path_factory.mktemp("made_up")
    make_checkpoint(folder / "checkpoint-2", saved_at=100)
    make_checkpoint(folder / "checkpoint-4", saved_at=200)
    return folder


@pytest.fixture
def output(made_up, tmp_path):
    shutil.copytree(made_up, tmp_path / "run")
    return tmp_path / "run"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def empty(path):
    path.write_bytes(b"")


def zeros(path):
    """Leave the file as a computer that lost power before it wrote the last blocks."""
    half = path.stat().st_size // 2
    path.write_bytes(path.read_bytes()[:half] + bytes(path.stat().st_size - half))


def one_byte(path):
    data = bytearray(path.read_bytes())
    place = data.index(b"/data/") + 200  # in a tensor, not in the directory
    data[place] ^= 1
    path.write_bytes(data)


WAYS = [("optimizer.pt", one_byte, "damaged")]
for name in checkpoints.NEEDED:
    WAYS.append((name, os.remove, "missing"))
    WAYS.append((name, empty, "empty"))
    WAYS.append((name, cut, "damaged"))
    if name != "adapter_model.safetensors":  # it has no checksum of its tensors
        WAYS.append((name, zeros, "damaged"))


@pytest.mark.parametrize(
    ("name", "way", "word"), WAYS, ids=[f"{name}-{way.__name__}" for name, way, _ in WAYS]
)
def test_every_damage_is_recognized_and_the_checkpoint_before_is_used(name, way, word, output):
    way(output / "checkpoint-4" / name)
    with pytest.warns(UserWarning, match=rf"checkpoint-4 \({name} is {word}\)") as said:
        assert checkpoints.last_checkpoint(output).name == "checkpoint-2"
    assert len(said) == 1


def test_the_checkpoint_saved_last_is_used_not_the_one_with_most_steps(output):
    """Checkpoint 4 is then that of an earlier run into the same folder."""
    shutil.rmtree(output / "checkpoint-2")
    make_checkpoint(output / "checkpoint-2", saved_at=300)
    assert checkpoints.last_checkpoint(output).name == "checkpoint-2"


def test_whole_checkpoints_are_used_without_a_word(output):
    (output / "checkpoint-old").mkdir()
    cut(output / "checkpoint-2" / "optimizer.pt")  # an older one may be in any state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.last_checkpoint(output).name == "checkpoint-4"


def test_steps_are_compared_as_numbers(output):
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-10")
    names = [path.name for path in checkpoints.newest_first(output)]
    assert names == ["checkpoint-10", "checkpoint-4", "checkpoint-2"]


def test_where_none_is_whole_each_is_named(output, tmp_path):
    empty(output / "checkpoint-4" / "optimizer.pt")
    os.remove(output / "checkpoint-2" / "trainer_state.json")
    named = r"checkpoint-4 \(optimizer.pt is empty\), checkpoint-2 \(trainer_state.json is missing"
    with pytest.raises(FileNotFoundError, match=named):
        checkpoints.last_checkpoint(output)
    with pytest.raises(FileNotFoundError, match=r"none.*--resume"):
        checkpoints.last_checkpoint(tmp_path / "none")


def test_a_damaged_reference_of_a_continued_adapter_is_recognized(output):
    reference = output / "checkpoint-4" / "ref"
    reference.mkdir()
    shutil.copy(output / "checkpoint-4" / "adapter_model.safetensors", reference)
    assert checkpoints.damage(output / "checkpoint-4") is None
    cut(reference / "adapter_model.safetensors")
    assert checkpoints.damage(output / "checkpoint-4") == "ref/adapter_model.safetensors is damaged"


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
def test_a_checkpoint_from_other_settings_is_refused_with_their_names(
    settings, changes, said, made_up
):
    other = replace(SETTINGS, **settings)
    origin = checkpoints.origin(other, config(other, made_up, **changes), ROWS)
    with pytest.raises(ValueError, match=rf"\({said}\)"):
        checkpoints.check_origin(made_up / "checkpoint-4", origin)


def test_a_checkpoint_from_other_data_is_refused(made_up):
    origin = checkpoints.origin(SETTINGS, config(SETTINGS, made_up), range(12))
    with pytest.raises(ValueError, match="rows was 16 and is 12"):
        checkpoints.check_origin(made_up / "checkpoint-4", origin)


def test_settings_that_change_nothing_learned_may_differ(made_up):
    other = replace(
        SETTINGS,
        save_steps=1,
        logging_steps=1,
        max_new_tokens=8,
        generation_batch_size=1,
        batch_size=2,
        gradient_accumulation=2,
    )
    origin = checkpoints.origin(other, config(other, made_up), ROWS)
    checkpoints.check_origin(made_up / "checkpoint-4", origin)


def test_a_checkpoint_that_does_not_name_its_settings_is_refused(output):
    path = output / "checkpoint-4" / "trainer_state.json"
    path.write_text(json.dumps({"stateful_callbacks": {}}))
    with pytest.raises(ValueError, match="checkpoint-4"):
        checkpoints.check_origin(output / "checkpoint-4", {})


def test_what_was_saved_before_stays_until_the_new_is_whole(tmp_path):
    for name in ("adapter", "adapter.new", "adapter.old"):  # a kill left the last one
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    checkpoints.put_in_place(tmp_path / "adapter.new", tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "file").read_text() == "adapter.new"


def test_difference_sees_one_bit(tmp_path):
    for name in ("ours", "theirs"):
        (tmp_path / name / "adapter").mkdir(parents=True)
        path = tmp_path / name / "adapter" / "adapter_model.safetensors"
        save_file({"lora_A": torch.ones(2, 2), "lora_B": torch.full((2, 2), 1e-3)}, path)
    assert kill.adapter_difference(tmp_path / "ours", tmp_path / "theirs") == 0
    tensors = load_file(path)
    tensors["lora_B"][0, 0] = torch.nextafter(tensors["lora_B"][0, 0], torch.tensor(1.0))
    save_file(tensors, path)
    assert kill.adapter_difference(tmp_path / "ours", tmp_path / "theirs") > 0
