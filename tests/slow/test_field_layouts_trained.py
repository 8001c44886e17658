"""One small file of every layout of the field goes through training and import."""

from dataclasses import replace

import pytest

from scripts import import_pairs
from tests import layout_files
from tests.layout_files import EXPECTED, LAYOUTS, PICTURES
from utils import chat, images, layouts, models, preferences, training
from utils.settings import PROFILES

SETTINGS = replace(PROFILES["embedded"], batch_size=2, warmup_steps=0)


def losses(rows, output, processor, shared_prefix):
    trainer = training.make_trainer(
        SETTINGS,
        models.load_model(SETTINGS),
        processor,
        rows,
        output,
        shared_prefix=shared_prefix,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_trainers_log_the_same_losses(name, tmp_path, processor):
    source, _ = layout_files.write(name, tmp_path)
    rows = chat.format_dataset(preferences.load(source))
    stock = losses(rows, tmp_path / "stock", processor, shared_prefix=False)
    ours = losses(rows, tmp_path / "ours", processor, shared_prefix=True)
    assert len(stock) == 2
    assert ours[0] == pytest.approx(stock[0], abs=1e-6)
    # An Adam step turns rounding in a gradient near zero into a part of a whole step.
    assert ours[1] == pytest.approx(stock[1], abs=1e-4)
    assert stock[1] != stock[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_imported_is_what_was_there(name, tmp_path):
    source, pairs = layout_files.write(name, tmp_path)
    output = tmp_path / "imported"
    import_pairs.main([source, "--output", str(output)])
    found = {}
    for part in ("train", "test"):
        for row in preferences.load(str(output), part):
            files = [images.file_bytes(stored) for stored in row["images"]]
            found[layouts.text_of(row["chosen"])] = (files, row["prompt"], row["rejected"])
    assert len(found) == len(pairs)
    for pair in pairs:
        row = EXPECTED[pair]
        files = [PICTURES[color] for color in row["images"]]
        assert found[layouts.text_of(row["chosen"])] == (files, row["prompt"], row["rejected"])
