"""Cached reference log-probabilities: the same run, and a key for all that they depend on."""

import pytest
import torch
from both_trainers import BOTH, SETTINGS, assert_same_run, embedded_trainer
from safetensors.torch import load_file
from transformers import AutoProcessor

from utils import chat, preferences
from utils.reference_cache import cache_key, use_reference_cache
from utils.settings import locate
from utils.shared_prefix import SharedPrefixDPOTrainer


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:16]")).shuffle(seed=0)


@pytest.fixture
def make(processor, tmp_path):
    usual_processor = processor

    def make(rows, kind=SharedPrefixDPOTrainer, processor=None, **changes):
        settings = {
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 3,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "dataloader_num_workers": 1,
        }
        settings.update(changes)
        return embedded_trainer(processor or usual_processor, tmp_path, kind, rows, **settings)

    return make


def test_a_run_with_cached_reference_is_the_same_and_runs_no_reference(
    make, rows, tmp_path, monkeypatch
):
    evaluation = {"eval_dataset": rows.select(range(6)), "eval_strategy": "steps", "eval_steps": 4}
    stock, ours = (make(rows, kind, **evaluation) for kind in BOTH)
    path = use_reference_cache(ours, tmp_path / "cache")
    assert ours.train_dataset[0][0] == rows[0]
    assert load_file(path)["log_probs"].shape == (16, 2)

    runs = []
    compute = SharedPrefixDPOTrainer.compute_ref_log_probs

    def counted(trainer, model, inputs):
        runs.append(1)
        return compute(trainer, model, inputs)

    monkeypatch.setattr(SharedPrefixDPOTrainer, "compute_ref_log_probs", counted)
    stock.train()
    ours.train()
    assert_same_run(stock, ours)
    # Only the two batches of the evaluation, whose rows have no cached values.
    assert len(runs) == 2


def test_the_values_are_those_of_the_reference(make, rows, tmp_path):
    trainer = make(rows)
    batch = trainer.collate(list(rows.select(range(5))))
    expected = torch.stack(trainer.compute_ref_log_probs(trainer.model, batch), dim=1)
    use_reference_cache(trainer, tmp_path)
    cached = torch.stack([trainer.train_dataset[number][1] for number in range(5)])
    torch.testing.assert_close(cached, expected, rtol=0, atol=1e-5)
    assert expected.min() < -1


def test_the_key_changes_with_model_data_processor_and_settings_but_not_with_the_policy(make, rows):
    trainer = make(rows)
    key = cache_key(trainer)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data += 1
    assert cache_key(trainer) == key, "the policy's adapter is not the reference"

    smaller = AutoProcessor.from_pretrained(locate(SETTINGS.model), size={"longest_edge": 36})
    other_model = make(rows)
    other_model.model.get_input_embeddings().weight.data[0, 0] += 1e-3
    keys = {
        key,
        cache_key(make(rows.select(range(8)))),
        cache_key(make(rows, max_length=90)),
        cache_key(make(rows, processor=smaller)),
        cache_key(other_model),
    }
    # As TRL does for a second round.
    trainer.model.add_adapter("ref", trainer.model.peft_config["default"])
    keys.add(cache_key(trainer))
    assert len(keys) == 6


def test_a_damaged_file_can_be_deleted_and_is_computed_again(make, rows, tmp_path):
    trainer = make(rows)
    path = use_reference_cache(trainer, tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        use_reference_cache(make(rows), tmp_path / "cache")
    path.unlink()
    assert use_reference_cache(make(rows), tmp_path / "cache") == path


def test_a_second_run_reads_what_the_first_computed(make, rows, tmp_path, monkeypatch):
    trainer = make(rows)
    first = use_reference_cache(trainer, tmp_path / "cache")
    trainer.data_collator(list(rows.select(range(2))))  # how the tokenizer padded last
    monkeypatch.setattr(
        SharedPrefixDPOTrainer, "compute_ref_log_probs", lambda *_: pytest.fail("computed again")
    )
    assert use_reference_cache(make(rows, seed=5), tmp_path / "cache") == first
    assert list((tmp_path / "cache").iterdir()) == [first]
