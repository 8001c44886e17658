"""The file of cached reference log-probabilities. Whole runs: tests/slow/test_reference_cache_runs.py."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from both_trainers import SETTINGS, embedded_trainer

from utils import chat, preferences
from utils.reference_cache import (
    collate_with_reference,
    read_log_probs,
    use_reference_cache,
    write_log_probs,
)
from utils.shared_prefix import SharedPrefixDPOTrainer

LOG_PROBS = torch.tensor([[-1.5, -2.5], [-3.5, -4.5], [-5.5, -6.5]])


def cut_off(data):
    return data[:-9]


def one_bit_flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def emptied(data):
    return b""


@pytest.mark.parametrize("damage", [cut_off, one_bit_flipped, emptied])
def test_a_damaged_file_says_so(damage, tmp_path):
    path = tmp_path / "cache" / "reference.safetensors"
    write_log_probs(path, LOG_PROBS)
    assert torch.equal(read_log_probs(path), LOG_PROBS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        read_log_probs(path)


def test_only_the_finished_file_is_left(tmp_path):
    path = tmp_path / "reference.safetensors"
    write_log_probs(path, LOG_PROBS)
    assert list(tmp_path.iterdir()) == [path]


def test_rows_bring_their_values_into_the_batch():
    def collate(rows):
        return {"rows": rows}

    examples = [("first", LOG_PROBS[0]), ("second", LOG_PROBS[1])]
    batch = collate_with_reference(collate, examples)
    assert batch["rows"] == ["first", "second"]
    assert batch["ref_chosen_logps"].tolist() == [-1.5, -3.5]
    assert batch["ref_rejected_logps"].tolist() == [-2.5, -4.5]
    assert collate_with_reference(collate, ["for evaluation"]) == {"rows": ["for evaluation"]}


def test_streamed_rows_are_refused(tmp_path):
    trainer = SimpleNamespace(train_dataset=iter(()), data_collator=None)
    with pytest.raises(ValueError, match="streaming"):
        use_reference_cache(trainer, tmp_path)


def test_a_second_run_reads_what_the_first_computed(processor, tmp_path, monkeypatch):
    rows = chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:3]"))
    make = partial(embedded_trainer, processor, tmp_path, SharedPrefixDPOTrainer, rows)
    cache = tmp_path / "cache"
    first = use_reference_cache(make(per_device_eval_batch_size=2), cache)
    assert read_log_probs(first).shape == (3, 2)
    monkeypatch.setattr(
        SharedPrefixDPOTrainer, "compute_ref_log_probs", lambda *_: pytest.fail("computed again")
    )
    assert use_reference_cache(make(seed=5), cache) == first
    assert list(cache.iterdir()) == [first]
