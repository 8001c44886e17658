"""The file of cached log-probabilities. Whole runs: tests/slow/test_reference_cache_runs.py."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from utils.reference_cache import (
    cache_key,
    collate_with_reference,
    read_log_probs,
    use_reference_cache,
    write_log_probs,
)

LOG_PROBS = torch.tensor([[-1.5, -2.5], [-3.5, -4.5], [-5.5, -6.5]])


# The file


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


# The trainer, here one whose rows are numbers and whose log-probabilities follow from them


def collate_numbers(rows):
    return {"number": torch.tensor([row["number"] for row in rows])}


def save_processor(folder):
    (Path(folder) / "processor.json").write_text("{}")


ROWS = {
    "number": [1.0, 2.0, 3.0],
    "prompt": ["What is this?"] * 3,
    "chosen": ["A cup on a table.", "A cup.", "A cup."],  # the first row is the longest
    "rejected": ["A dog."] * 3,
}


class FakeTrainer:
    train_dataset = Dataset.from_dict(ROWS)
    collate = staticmethod(collate_numbers)
    processing_class = SimpleNamespace(save_pretrained=save_processor)
    ref_model = None

    def __init__(self, **changes):
        self.model = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(self.model.weight)
        torch.nn.init.zeros_(self.model.bias)
        arguments = {
            "per_device_eval_batch_size": 2,
            "max_length": None,
            "truncation_mode": "keep_start",
            "ld_alpha": None,
            "bf16": False,
            "fp16": False,
        }
        self.args = SimpleNamespace(**arguments | changes)
        self.batches = 0

    def _prepare_inputs(self, batch):
        return batch

    def compute_ref_log_probs(self, model, inputs):
        self.batches += 1
        return -inputs["number"], -2 * inputs["number"]


def test_a_second_run_reads_what_the_first_computed(tmp_path):
    first = FakeTrainer()
    second = FakeTrainer()
    path = use_reference_cache(first, tmp_path)
    assert use_reference_cache(second, tmp_path) == path
    assert (first.batches, second.batches) == (2, 0)
    for trainer in (first, second):
        batch = trainer.data_collator([trainer.train_dataset[2], trainer.train_dataset[0]])
        assert batch["number"].tolist() == [1, 3]  # the longest first
        assert batch["ref_chosen_logps"].tolist() == [-1, -3]
        assert batch["ref_rejected_logps"].tolist() == [-2, -6]


def test_rows_for_evaluation_bring_no_values():
    batch = collate_with_reference(collate_numbers, [FakeTrainer.train_dataset[0]])
    assert list(batch) == ["number"]


def test_the_key_changes_with_arguments_model_and_data():
    other_model = FakeTrainer()
    other_model.model.weight.data[0, 0] = 2
    other_rows = FakeTrainer()
    other_rows.train_dataset = FakeTrainer.train_dataset.select([2, 0])
    trainers = [FakeTrainer(), FakeTrainer(max_length=90), other_model, other_rows]
    assert len({cache_key(trainer) for trainer in trainers}) == 4
    assert cache_key(FakeTrainer()) == cache_key(FakeTrainer(per_device_eval_batch_size=1))


def test_streamed_rows_are_refused(tmp_path):
    trainer = FakeTrainer()
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match="streaming"):
        use_reference_cache(trainer, tmp_path)
