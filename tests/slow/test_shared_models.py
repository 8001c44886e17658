"""A shared model computes what was trained and loads where nothing of this repository is."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from utils import chat, model_card, models, preferences, rewards, training
from utils.evaluation import METRICS
from utils.settings import PROFILES, ROOT

SETTINGS = PROFILES["embedded"]
ELSEWHERE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
merged, adapter, base, batch = sys.argv[1:]
stored = torch.load(batch)
expected = stored["logits"]
model = AutoModelForImageTextToText.from_pretrained(merged).eval()
with torch.no_grad():
    torch.testing.assert_close(model(**stored["batch"]).logits, expected, rtol=0, atol=1e-5)
    wide = AutoModelForImageTextToText.from_pretrained(base)
    wide = PeftModel.from_pretrained(wide, adapter).eval()
    torch.testing.assert_close(wide(**stored["batch"]).logits, expected, rtol=0, atol=1e-3)
assert type(AutoProcessor.from_pretrained(merged)).__name__ == "Idefics3Processor"
assert not [name for name in sys.modules if name.split(".")[0] in ("trl", "utils")]
"""


@pytest.fixture(scope="module")
def rows():
    formatted = chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:16]"))
    return [formatted[number] for number in range(4)]


@pytest.fixture(scope="module")
def run(processor, tmp_path_factory):
    """A short run at a rate that moves the adapter, and an invented evaluation."""
    output = tmp_path_factory.mktemp("run")
    formatted = chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:16]"))
    trainer = training.make_trainer(
        SETTINGS,
        models.load_model(SETTINGS),
        processor,
        formatted,
        output,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        warmup_steps=0,
        logging_steps=1,
        disable_tqdm=True,
    )
    training.train(SETTINGS, trainer)
    figures = dict.fromkeys(METRICS, 0.1)
    difference = {"mean": 0.1, "low": 0.0, "high": 0.2, "p": 0.04}
    evaluation = {
        "base": figures,
        "tuned": figures,
        "difference": dict.fromkeys(METRICS, difference),
        "n": 500,
    }
    (output / "evaluation.json").write_text(json.dumps(evaluation))
    return output


def test_the_merged_model_computes_what_base_and_adapter_compute(run, processor, rows):
    wide = models.load_tuned(replace(SETTINGS, four_bit=False), run / "adapter")
    expected = rewards.answer_logits(wide, processor, rows)
    merged = models.load_merged(SETTINGS, run / "adapter")
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    same = rewards.logit_difference(expected, rewards.answer_logits(merged, processor, rows))
    assert same["largest"] < 1e-3 and same["changed"] == 0 and abs(same["divergence"]) < 1e-6
    with wide.disable_adapter():
        base = rewards.answer_logits(wide, processor, rows)
    assert rewards.logit_difference(expected, base)["largest"] > 1, "the adapter does nothing"


def test_merging_into_4_bit_loses_more_than_merging_into_the_wide_base(run, processor, rows):
    def divergence(model):
        logits = rewards.answer_logits(model, processor, rows)
        return rewards.logit_difference(trained, logits)["divergence"]

    tuned = models.load_tuned(SETTINGS, run / "adapter")
    trained = rewards.answer_logits(tuned, processor, rows)
    wide = models.load_merged(SETTINGS, run / "adapter")
    with pytest.warns(UserWarning, match="rounding errors"):
        rounded = models.load_tuned(SETTINGS, run / "adapter").merge_and_unload()
    assert divergence(rounded) > divergence(wide) > 0


def test_what_was_shared_loads_in_another_process_far_from_this_repository(
    run, processor, rows, tmp_path
):
    model = model_card.save_merged(SETTINGS, run, tmp_path / "merged")
    model_card.save_adapter(run, tmp_path / "adapter")
    batch = dict(chat.training_batch(rows[:2], processor))
    del batch["completion_mask"]
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    torch.save({"batch": batch, "logits": logits}, tmp_path / "batch.pt")
    places = (
        tmp_path / "merged",
        tmp_path / "adapter",
        ROOT / SETTINGS.model,
        tmp_path / "batch.pt",
    )
    finished = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, places)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert finished.returncode == 0, finished.stderr
    for shared in ("adapter", "merged"):
        texts = []
        for path in (tmp_path / shared).iterdir():
            assert path.suffix != ".bin"
            if path.suffix in (".json", ".md", ".jinja"):
                texts.append(path.read_text())
        assert len(texts) > 1
        for text in texts:
            assert str(ROOT) not in text and str(run) not in text, "it names this machine"


def test_the_saved_adapter_is_what_the_card_describes(run):
    """`lora_config` and the card read the same settings."""
    saved = json.loads((run / "adapter" / "adapter_config.json").read_text())
    described = json.loads((run / "training.json").read_text())["settings"]
    assert saved["r"] == training.lora_config(SETTINGS).r == described["lora_rank"]
    assert saved["lora_alpha"] == described["lora_alpha"]
