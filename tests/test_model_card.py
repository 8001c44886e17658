"""What is given away computes what was trained, loads where nothing of this repository is, and its card says the truth."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import mistune
import pytest
import torch
from huggingface_hub import ModelCard

from utils import chat, model_card, models, preferences
from utils.settings import PROFILES, ROOT
from utils.training import lora_config, make_trainer, train

SETTINGS = PROFILES["embedded"]
ELSEWHERE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
merged, adapter, base, batch = sys.argv[1:]
stored = torch.load(batch)
model = AutoModelForImageTextToText.from_pretrained(merged).eval()
with torch.no_grad():
    torch.testing.assert_close(model(**stored["batch"]).logits, stored["logits"], rtol=0, atol=1e-5)
    wide = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter).eval()
    torch.testing.assert_close(wide(**stored["batch"]).logits, stored["logits"], rtol=0, atol=1e-3)
assert type(AutoProcessor.from_pretrained(merged)).__name__ == "Idefics3Processor"
assert not [name for name in sys.modules if name.split(".")[0] in ("trl", "utils")]
"""


@pytest.fixture(scope="module")
def rows():
    formatted = chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:16]"))
    return [formatted[number] for number in range(4)]


def invented(metric):
    return {"mean": -0.17, "low": -0.2, "high": -0.1 if metric != "words" else -4.0, "p": 0.0004}


@pytest.fixture(scope="module")
def run(processor, tmp_path_factory):
    """A short run at a rate that moves the adapter, and an invented evaluation."""
    output = tmp_path_factory.mktemp("run")
    formatted = chat.format_dataset(preferences.load(SETTINGS.dataset, "train[:16]"))
    changes = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
    }
    train(
        make_trainer(
            SETTINGS,
            models.load_model(SETTINGS),
            processor,
            formatted,
            output,
            disable_tqdm=True,
            **changes,
        ),
        SETTINGS,
    )
    sides = {
        side: {metric: value for metric in share.METRICS}
        for side, value in (("base", 0.181), ("dpo", 0.012))
    }
    evaluation = sides | {
        "difference": {metric: invented(metric) for metric in share.METRICS},
        "n": 500,
    }
    (output / "evaluation.json").write_text(json.dumps(evaluation))
    return output


def test_the_merged_model_computes_what_base_and_adapter_compute(run, processor, rows):
    wide = models.load_tuned(replace(SETTINGS, four_bit=False), run / "adapter")
    expected = model_card.answer_logits(wide, processor, rows)
    merged = models.load_merged(SETTINGS, run / "adapter")
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    same = model_card.difference(expected, model_card.answer_logits(merged, processor, rows))
    assert same["largest"] < 1e-3 and same["changed"] == 0 and abs(same["divergence"]) < 1e-6
    with wide.disable_adapter():
        assert (
            model_card.difference(expected, model_card.answer_logits(wide, processor, rows))[
                "largest"
            ]
            > 1
        ), "an adapter that does nothing"


def test_merging_into_4_bit_is_further_from_what_was_trained_than_merging_into_the_wide_base(
    run, processor, rows
):
    trained = model_card.answer_logits(
        models.load_tuned(SETTINGS, run / "adapter"), processor, rows
    )
    wide = model_card.answer_logits(models.load_merged(SETTINGS, run / "adapter"), processor, rows)
    with pytest.warns(UserWarning, match="rounding errors"):
        rounded = models.load_tuned(SETTINGS, run / "adapter").merge_and_unload()
    narrow = model_card.answer_logits(rounded, processor, rows)
    assert (
        model_card.difference(trained, narrow)["divergence"]
        > model_card.difference(trained, wide)["divergence"]
        > 0
    )


def test_differences_by_hand():
    even, sure = torch.zeros(1, 2), torch.tensor([[0.0, 3.0]]).log_softmax(-1)
    p = torch.tensor(3.0).sigmoid()
    by_hand = (0.5 * (0.5 / p).log() + 0.5 * (0.5 / (1 - p)).log()).item()
    assert model_card.difference(even, sure)["divergence"] == pytest.approx(by_hand, rel=1e-5)
    assert model_card.difference(
        torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[1.0, 0], [0, 2]])
    ) == pytest.approx(
        {
            "largest": 2,
            "changed": 0.5,
            "divergence": model_card.difference(torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 2]]))[
                "divergence"
            ]
            / 2,
        }
    )


def test_what_was_shared_loads_in_another_process_far_from_this_repository(
    run, processor, rows, tmp_path
):
    model = model_card.save_merged(SETTINGS, run, tmp_path / "merged")
    model_card.save_adapter(run, tmp_path / "adapter")
    batch = dict(chat.training_batch(rows[:2], processor))
    del batch["completion_mask"]
    with torch.no_grad():
        torch.save({"batch": batch, "logits": model.eval()(**batch).logits}, tmp_path / "batch.pt")
    places = [
        tmp_path / "merged",
        tmp_path / "adapter",
        ROOT / SETTINGS.model,
        tmp_path / "batch.pt",
    ]
    finished = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, places)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    for shared in ("adapter", "merged"):
        texts = [
            path.read_text()
            for path in (tmp_path / shared).iterdir()
            if path.suffix in (".json", ".md", ".jinja")
        ]
        assert len(texts) > 1 and not [
            text for text in texts if str(ROOT) in text or str(run) in text
        ], "it names this machine"
        assert not list((tmp_path / shared).glob("*.bin"))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        == SETTINGS.model
    )


def rendered(card):
    """The card's text as HTML for a reader that lets tags through, without the spans that keep formulas and addresses apart."""
    return re.sub(
        "</?span>",
        "",
        mistune.create_markdown(escape=False, plugins=["table"])(ModelCard(card).text),
    )


@pytest.mark.parametrize("merged", [True, False])
def test_the_card_says_licence_settings_and_figures(run, merged):
    card = model_card.model_card(run, merged=merged)
    data, page = ModelCard(card).data, rendered(card)
    assert (data.license, data.base_model, data.datasets) == (
        "apache-2.0",
        "embedded/model",
        ["embedded/dataset"],
    )
    assert (
        data.library_name == ("transformers" if merged else "peft")
        and ("PeftModel" in card) != merged
    )
    record = json.loads((run / "training.json").read_text())
    assert f"<td>learning_rate</td>\n  <td>{SETTINGS.learning_rate}</td>" in page
    assert f"<td>rewards/margins</td>\n  <td>{record['final']['rewards/margins']:.4f}</td>" in page
    assert (
        "<td>chair_i</td>\n  <td>18.1%</td>\n  <td>1.2%</td>\n  <td>-20.0% to -10.0%</td>\n  <td>0.0004</td>"
        in page
    )
    assert "-0.2 to -4.0" in page, "words are not a share"
    assert SETTINGS.lora_target in page.replace("&amp;", "&"), (
        "the pattern must be readable letter for letter"
    )


def changed(run, folder, **settings):
    record = json.loads((run / "training.json").read_text())
    (folder / "training.json").write_text(
        json.dumps(record | {"settings": record["settings"] | settings})
    )
    (folder / "evaluation.json").write_text((run / "evaluation.json").read_text())
    return folder


def test_rlaif_v_is_not_for_commercial_use(run, tmp_path):
    card = model_card.model_card(changed(run, tmp_path, dataset="openbmb/RLAIF-V-Dataset"))
    assert (
        ModelCard(card).data.license == "cc-by-nc-4.0"
        and "CC BY-NC 4.0: not for commercial use" in card
    )


def test_a_data_set_of_unknown_licence_gets_no_card(run, tmp_path):
    with pytest.raises(
        ValueError, match="licence of the data set mine/pairs is not known: look it up"
    ):
        model_card.model_card(changed(run, tmp_path, dataset="mine/pairs"))


def test_a_card_without_figures_is_refused_and_says_how_they_are_made(run, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"training\.json is missing.*python -m utils\.train"
    ):
        model_card.model_card(tmp_path)
    (tmp_path / "training.json").write_text((run / "training.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"evaluation\.json is missing.*notebook 04"):
        model_card.model_card(tmp_path)


def test_no_setting_can_break_out_of_the_card(run, tmp_path):
    evil = 'a|b`c`<script>alert(1)</script>\n# *x* [y](z) &lt; \\ "q"'
    card = model_card.model_card(changed(run, tmp_path, model=evil))
    page = rendered(card)
    assert (
        "<script" not in page and "<em>x" not in page and "<h1>" in page and page.count("<h1>") == 1
    )
    assert ModelCard(card).data.base_model == evil
    shown = (
        page.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    )
    assert 'a|b`c`<script>alert(1)</script> # *x* [y](z) &lt; \\ "q"' in shown


def test_the_adapter_of_the_profile_is_what_is_described(run):
    """`lora_config` and the card read the same settings."""
    saved = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (lora_config(SETTINGS).r, SETTINGS.lora_alpha)
    assert f"| lora\\_rank | {saved['r']} |" in model_card.model_card(run)
