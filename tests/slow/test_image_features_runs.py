"""Image features on disk: the same step in every family, the same run, and nothing encoded."""

import numpy as np
import pytest
import torch
from both_trainers import (
    SETTINGS,
    assert_same_run,
    assert_same_step,
    embedded_trainer,
    family_trainers,
    seen_by_the_vision_tower,
)
from datasets import Dataset
from families import FAMILIES
from PIL import Image

from utils import chat, image_features, preferences
from utils.image_features import use_image_features
from utils.reference_cache import use_reference_cache
from utils.shared_prefix import SharedPrefixDPOTrainer
from utils.vision import ENCODED_ONCE, backbone_of


@pytest.fixture(scope="module")
def rows():
    return chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:8]"))


def trainer_of(processor, output, rows, **changes):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,  # two epochs
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 5e-4,
        "dataloader_num_workers": 0,
    }
    return embedded_trainer(processor, output, SharedPrefixDPOTrainer, rows, **settings | changes)


def test_a_run_with_kept_features_is_the_same_and_encodes_nothing(
    processor, rows, tmp_path, monkeypatch
):
    evaluation = {"eval_dataset": rows.select(range(4)), "eval_strategy": "steps", "eval_steps": 4}
    usual = trainer_of(processor, tmp_path, rows, **evaluation)
    kept = trainer_of(processor, tmp_path, rows, **evaluation)
    folder = use_image_features(kept, tmp_path / "cache")
    use_reference_cache(kept, tmp_path / "cache")
    usual.train()

    def refuse(*_, **__):
        raise AssertionError("an image was encoded")

    backbone = type(backbone_of(kept.model))
    monkeypatch.setattr(backbone, "get_image_features", refuse)
    kept.train()
    assert_same_run(usual, kept)
    different = {image_features.images_digest(row["images"]) for row in rows}
    assert {path.stem for path in folder.iterdir()} == different

    # Again: every file is there, so nothing is computed.
    again = trainer_of(processor, tmp_path, rows)
    monkeypatch.setattr(image_features, "compute_features", refuse)
    assert use_image_features(again, tmp_path / "cache") == folder


def family_rows():
    """Two pairs about noise, in two sizes."""
    generator = np.random.default_rng(0)
    rows = []
    for height, width in ((64, 96), (120, 60)):
        noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        row = {
            "images": [Image.fromarray(noise)],
            "prompt": chat.prompt_messages("What is this?"),
            "chosen": chat.answer_messages("A cup on a table."),
            "rejected": chat.answer_messages("A dog."),
        }
        rows.append(row)
    return Dataset.from_list(rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_the_same_in_every_family(name, tmp_path):
    stock, ours = family_trainers(name, tmp_path)
    ours.train_dataset = family_rows()
    rows = list(ours.train_dataset)
    family = ours.model.config.model_type
    if family == "qwen3_vl" or family not in ENCODED_ONCE:
        with pytest.raises(ValueError, match=r"later layers|not compared"):
            use_image_features(ours, tmp_path / "cache")
        return
    use_image_features(ours, tmp_path / "cache")
    batch = ours.collate(rows)
    assert_same_step(stock, ours, [stock.data_collator([dict(row) for row in rows]), batch])
    assert seen_by_the_vision_tower(ours, batch)[0] == 0


def test_another_tower_or_another_processor_gets_other_files(processor, rows, tmp_path):
    trainer = trainer_of(processor, tmp_path, rows)
    first = use_image_features(trainer, tmp_path / "cache")
    changed = trainer_of(processor, tmp_path, rows)
    for name, parameter in backbone_of(changed.model).named_parameters():
        if "vision" in name:
            parameter.data = parameter.data + 0.01
            break
    assert use_image_features(changed, tmp_path / "cache") != first


def test_a_tower_that_trains_is_refused(processor, rows, tmp_path):
    trainer = trainer_of(processor, tmp_path, rows)
    for name, parameter in backbone_of(trainer.model).named_parameters():
        if "connector" in name:
            parameter.requires_grad_(True)
    with pytest.raises(ValueError, match="its vision tower trains"):
        use_image_features(trainer, tmp_path / "cache")


def test_a_stream_is_refused(processor, rows, tmp_path):
    trainer = trainer_of(processor, tmp_path, rows)
    trainer.train_dataset = iter(rows)
    with pytest.raises(ValueError, match="streaming"):
        use_image_features(trainer, tmp_path / "cache")


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:-1] + b"\xff"])
def test_a_damaged_file_says_so(damage, tmp_path):
    path = tmp_path / "a.safetensors"
    image_features.write_features(path, [torch.ones(2, 3), torch.zeros(1, 3)])
    single, (first, second) = image_features.read_features(path)
    assert not single and first.shape == (2, 3) and second.shape == (1, 3)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        image_features.read_features(path)
