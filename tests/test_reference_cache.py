"""Cached reference log-probabilities: the same run, computed once, and a key that changes with whatever they depend on."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from test_shared_prefix import BOTH, SETTINGS, assert_same_run, embedded, make_trainer
from transformers import AutoProcessor

from utils import chat, preferences
from utils.reference_cache import cache_key, use_reference_cache
from utils.settings import locate
from utils.shared_prefix import SharedPrefixDPOTrainer


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:16]")).shuffle(seed=0)


@pytest.fixture
def trainer_for(processor, tmp_path):
    def trainer(rows, kind=SharedPrefixDPOTrainer, processor=processor, **changes):
        settings = {
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 3,
            "max_steps": 4,
            "logging_steps": 1,
        }
        settings |= {"save_strategy": "no", "learning_rate": 1e-3, "dataloader_num_workers": 1}
        return embedded(
            partial(make_trainer, processor, None, tmp_path), kind, rows, **settings | changes
        )

    return trainer


def test_a_run_with_cached_reference_is_the_same_and_runs_no_reference(
    trainer_for, rows, tmp_path, monkeypatch
):
    evaluation = {"eval_dataset": rows.select(range(6)), "eval_strategy": "steps", "eval_steps": 4}
    stock, ours = (trainer_for(rows, kind, **evaluation) for kind in BOTH)
    path = use_reference_cache(ours, tmp_path / "cache")
    assert ours.train_dataset[0][0] == rows[0] and load_file(path)["log_probs"].shape == (16, 2)
    runs, right = [], SharedPrefixDPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        SharedPrefixDPOTrainer,
        "compute_ref_log_probs",
        lambda *given: runs.append(1) or right(*given),
    )
    stock.train(), ours.train()
    assert_same_run(stock, ours)
    assert len(runs) == 2, (
        "only for the two batches of the evaluation, whose rows have no cached values"
    )


def test_the_values_are_those_of_the_reference(trainer_for, rows, tmp_path):
    trainer = trainer_for(rows)
    batch = trainer.data_collator(list(rows.select(range(5))))
    expected = torch.stack(trainer.compute_ref_log_probs(trainer.model, batch), dim=1)
    use_reference_cache(trainer, tmp_path)
    torch.testing.assert_close(
        torch.stack([trainer.train_dataset[number][1] for number in range(5)]),
        expected,
        rtol=0,
        atol=1e-5,
    )
    assert expected.min() < -1


def test_a_second_run_reads_what_the_first_computed(trainer_for, rows, tmp_path, monkeypatch):
    first = use_reference_cache(trainer_for(rows), tmp_path / "cache")
    monkeypatch.setattr(
        SharedPrefixDPOTrainer, "compute_ref_log_probs", lambda *_: pytest.fail("computed again")
    )
    assert use_reference_cache(trainer_for(rows, seed=5), tmp_path / "cache") == first
    assert list((tmp_path / "cache").iterdir()) == [first]


def test_the_key_changes_with_model_data_processor_and_settings_but_not_with_the_policy(
    trainer_for, rows
):
    trainer = trainer_for(rows)
    key = cache_key(trainer)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data += 1
    assert cache_key(trainer) == key, "the policy's adapter is not the reference"
    smaller = AutoProcessor.from_pretrained(locate(SETTINGS.model), size={"longest_edge": 36})
    other = [
        trainer_for(rows.select(range(8))),
        trainer_for(rows, max_length=90),
        trainer_for(rows, processor=smaller),
        trainer_for(rows),
    ]
    other[3].model.get_input_embeddings().weight.data[0, 0] += 1e-3
    keys = [cache_key(changed) for changed in other]
    trainer.model.add_adapter(
        "ref", trainer.model.peft_config["default"]
    )  # as TRL does for a second round
    keys.append(cache_key(trainer))
    assert len({key, *keys}) == 6


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-9], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""],
)
def test_a_damaged_file_says_so(damage, trainer_for, rows, tmp_path):
    path = use_reference_cache(trainer_for(rows), tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name} is damaged .*delete it"):
        use_reference_cache(trainer_for(rows), tmp_path)
    path.unlink()
    assert use_reference_cache(trainer_for(rows), tmp_path) == path


def test_streamed_rows_are_refused(trainer_for, tmp_path):
    streamed = chat.format_dataset(
        preferences.load(SETTINGS.dataset, "train[:16]").to_iterable_dataset()
    )
    with pytest.raises(ValueError, match="streaming"):
        use_reference_cache(trainer_for(streamed, dataloader_num_workers=0), tmp_path)
