"""A model card says the truth, and no text breaks out of it. No model is loaded here.

That what is shared computes what was trained is tested in slow/test_shared_models.py.
"""

import json
import re
from dataclasses import asdict

import mistune
import pytest
from huggingface_hub import ModelCard

from utils import model_card
from utils.evaluation import METRICS
from utils.settings import PROFILES

SETTINGS = PROFILES["embedded"]
RECORD = {
    "steps": 4,
    "pairs": 16,
    "seconds": 12.3,
    "final": {"loss": 0.6, "rewards/margins": 0.25},
    "versions": {"torch": "2.14.1", "trl": "1.16.0"},
    "settings": asdict(SETTINGS),
}


def invented_evaluation():
    evaluation = {"base": {}, "tuned": {}, "difference": {}, "n": 500}
    for metric in METRICS:
        evaluation["base"][metric] = 0.181
        evaluation["tuned"][metric] = 0.012
        high = -4.0 if metric == "words" else -0.1
        evaluation["difference"][metric] = {"mean": -0.17, "low": -0.2, "high": high, "p": 0.0004}
    return evaluation


@pytest.fixture
def run(tmp_path):
    """`run(**settings)`: a folder with an invented run, in which some settings are changed."""

    def made(**settings):
        record = {**RECORD, "settings": {**RECORD["settings"], **settings}}
        (tmp_path / "training.json").write_text(json.dumps(record))
        (tmp_path / "evaluation.json").write_text(json.dumps(invented_evaluation()))
        return tmp_path

    return made


def rendered(card):
    """Return the card as HTML of a reader that lets tags through.

    The spans that keep formulas and addresses apart are left out.
    """
    markdown = mistune.create_markdown(escape=False, plugins=["table"])
    return re.sub("</?span>", "", markdown(ModelCard(card).text))


def cells(page):
    """Return the cells of every table row of a page, as text."""
    rows = []
    for row in re.findall("<tr>(.*?)</tr>", page, re.DOTALL):
        rows.append(re.findall("<t[dh].*?>(.*?)</t[dh]>", row))
    return rows


@pytest.mark.parametrize("merged", [True, False])
def test_the_card_has_license_settings_and_figures(run, merged):
    card = model_card.text(run(), merged=merged)
    data = ModelCard(card).data
    assert data.license == "apache-2.0"
    assert data.base_model == "embedded/model"
    assert data.datasets == ["embedded/dataset"]
    assert data.library_name == ("transformers" if merged else "peft")
    assert ("PeftModel" in card) != merged

    rows = cells(rendered(card))
    assert ["learning_rate", str(SETTINGS.learning_rate)] in rows
    assert ["lora_rank", str(SETTINGS.lora_rank)] in rows
    target = SETTINGS.lora_target.replace("&", "&amp;")
    assert ["lora_target", target] in rows, "the pattern must be readable letter for letter"
    assert ["rewards/margins", "0.2500"] in rows
    figures = {row[0]: row[1:5] for row in rows if row[0] in METRICS}
    assert list(figures) == list(METRICS)
    assert figures["chair_i"] == ["18.1%", "1.2%", "-20.0% to -10.0%", "0.0004"]
    assert figures["words"][2] == "-0.2 to -4.0", "words are not a share"


def test_rlaif_v_is_not_for_commercial_use(run):
    card = model_card.text(run(dataset="openbmb/RLAIF-V-Dataset"))
    assert ModelCard(card).data.license == "cc-by-nc-4.0"
    assert "CC BY-NC 4.0" in ModelCard(card).text


def test_a_data_set_of_unknown_license_gets_no_card(run):
    with pytest.raises(ValueError, match=r"mine/pairs.*DATA_LICENSES"):
        model_card.text(run(dataset="mine/pairs"))


def test_a_card_without_figures_is_refused_and_says_how_they_are_made(run, tmp_path):
    folder = run()
    (folder / "evaluation.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"evaluation\.json.*notebook 04"):
        model_card.text(folder)
    (folder / "training.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"training\.json.*scripts\.train"):
        model_card.text(folder)


def test_no_setting_can_break_out_of_the_card(run):
    evil = 'a|b`c`<script>alert(1)</script>\n# *x* [y](z) &lt; \\ "q"'
    card = model_card.text(run(model=evil))
    page = rendered(card)
    assert "<script" not in page and "<em>x" not in page and page.count("<h1>") == 1
    assert ModelCard(card).data.base_model == evil
    shown = page
    for entity, letter in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        shown = shown.replace(entity, letter)
    assert 'a|b`c`<script>alert(1)</script> # *x* [y](z) &lt; \\ "q"' in shown


def test_the_shared_adapter_names_the_base_and_leaves_the_pickle_behind(run, tmp_path):
    folder = run()
    adapter = folder / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": "/somewhere/on/this/machine", "r": 16}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "training_args.bin").write_bytes(b"a pickle")
    shared = tmp_path / "shared"
    model_card.save_adapter(folder, shared)
    files = {path.name: path.read_bytes() for path in shared.iterdir()}
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["adapter_model.safetensors"] == b"weights"
    written = json.loads(files["adapter_config.json"])
    assert written["base_model_name_or_path"] == SETTINGS.model
    assert written["revision"] == SETTINGS.model_revision and written["r"] == 16
