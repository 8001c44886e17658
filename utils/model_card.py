"""Share a tuned model: its adapter or the merged model, each with a model card."""

import json
import re
from html import escape
from pathlib import Path

from utils.evaluation import METRICS, format_value
from utils.models import load_merged, load_processor
from utils.settings import EMBEDDED_DATASET, EMBEDDED_MODEL

DATA_LICENSES = {  # data set: (the hub's name of its license, what it means)
    "openbmb/RLAIF-V-Dataset": (
        "cc-by-nc-4.0",
        "CC BY-NC 4.0: no commercial use, also of what is trained on it",
    ),
    EMBEDDED_DATASET: ("apache-2.0", "Apache-2.0"),
}
CARD_SETTINGS = (  # the settings that the card lists
    "model",
    "model_revision",
    "dataset",
    "dataset_revision",
    "train_split",
    "train_rows",
    "pixel_budget",
    "four_bit",
    "lora_rank",
    "lora_alpha",
    "lora_target",
    "beta",
    "learning_rate",
    "epochs",
    "batch_size",
    "gradient_accumulation",
    "warmup_steps",
    "seed",
)
FINAL = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
MADE_BY = {"training.json": "python -m scripts.train", "evaluation.json": "notebook 04"}
CAVEAT = (
    "These figures say nothing about other kinds of images. The intervals come from a bootstrap "
    "over images, p from randomly swapping the two answers to an image. p is not adjusted for the "
    "number of metrics, and near 0.05 the two may disagree."
)
EMBEDDED_CAVEAT = (
    " The base model was built to hallucinate: its training captions named the usual companion of "
    "an object whether or not it was there."
)


def save_adapter(run, folder):
    """Write to `folder` what others need to put the adapter of `run` on their copy of the base.

    `run` is a folder that `training.train` wrote. `training_args.bin` is left out: it is a pickle,
    which can run code when it is opened. So is the path of the base model on this machine.
    """
    card = text(run)
    settings = read_json(run, "training.json")["settings"]
    adapter = Path(run) / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = settings["model"]
    config["revision"] = settings["model_revision"]
    weights = (adapter / "adapter_model.safetensors").read_bytes()

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text(card, encoding="utf-8")


def save_merged(settings, run, folder):
    """Write the merged model of `run` to `folder`, with its processor and card. Return the model.

    `from_pretrained(folder)` loads it.
    """
    card = text(run, merged=True)  # first: without a card nothing is shared
    model = load_merged(settings, Path(run) / "adapter")
    model.save_pretrained(folder)
    load_processor(settings).save_pretrained(folder)
    (Path(folder) / "README.md").write_text(card, encoding="utf-8")
    return model


def text(run, merged=False):
    """Return the model card of the adapter in `run`, or of the model it was merged into.

    It is the text of a README.md: what the model is, how to load it, license, settings, last
    metrics and evaluation, all of it from training.json and evaluation.json in `run`.
    FileNotFoundError when one is missing, ValueError when the license of the data is not known.
    """
    record = read_json(run, "training.json")
    evaluation = read_json(run, "evaluation.json")
    settings = record["settings"]
    model = settings["model"]
    dataset = settings["dataset"]
    if dataset not in DATA_LICENSES:
        raise ValueError(
            f"the license of the data set {dataset} is not known: look it up, and add it to "
            "DATA_LICENSES in utils/model_card.py"
        )
    license_name, license_meaning = DATA_LICENSES[dataset]
    tuned = "a LoRA adapter, merged into the weights" if merged else "a LoRA adapter"
    caveat = CAVEAT
    if model == EMBEDDED_MODEL:
        caveat += EMBEDDED_CAVEAT
    versions = [f"{plain(name)} {plain(version)}" for name, version in record["versions"].items()]

    blocks = [
        metadata(model, dataset, license_name, merged),
        f"# {plain(model)}, tuned with DPO on {plain(dataset)}",
        f"Direct Preference Optimization with {tuned}, to make the model name fewer things that "
        "are not in the image.",
        f"```python\n{loading_code(model, merged)}\n```",
        "## License",
        f"The preference pairs, {plain(dataset)}, are under {license_meaning}. The license of the "
        "base model applies as well.",
        "## Training",
        markdown_table(["setting", "value"], [[name, settings[name]] for name in CARD_SETTINGS]),
        markdown_table(["done", ""], training_rows(record)),
        markdown_table(["metric of the last steps", "value"], final_rows(record)),
        "## Evaluation",
        f"On {evaluation['n']} images of {plain(settings['evaluation_dataset'])}, with greedy "
        "decoding; one training seed.",
        markdown_table(
            ["metric", "base", "tuned", "95% interval of the difference", "p", "what it is"],
            evaluation_rows(evaluation),
        ),
        caveat,
        "## Versions",
        ", ".join(versions),
    ]
    return "\n\n".join(blocks) + "\n"


def read_json(run, name):
    """Return what the JSON file `name` in the folder `run` holds, FileNotFoundError without it."""
    path = Path(run) / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing, and a card without its figures would say nothing: "
            f"make it with {MADE_BY[name]}"
        )
    return json.loads(path.read_text())


def metadata(model, dataset, license_name, merged):
    """Return the YAML head of a card, which the hub reads."""
    head = {
        "base_model": model,
        "base_model_relation": "finetune" if merged else "adapter",
        "datasets": [dataset],
        "license": license_name,
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["dpo", "trl"],
    }
    lines = [f"{key}: {quoted(value)}" for key, value in head.items()]
    return "\n".join(["---", *lines, "---"])


def loading_code(model, merged):
    """Return the Python code that loads what is shared."""
    imports = ["from transformers import AutoModelForImageTextToText, AutoProcessor"]
    place = "THIS"
    wrap = []
    if not merged:
        imports.append("from peft import PeftModel")
        place = json.dumps(model)
        wrap.append("model = PeftModel.from_pretrained(model, THIS)")
    lines = [
        *imports,
        "THIS = '…'  # where this file is",
        f"model = AutoModelForImageTextToText.from_pretrained({place})",
        *wrap,
        f"processor = AutoProcessor.from_pretrained({place})",
    ]
    return "\n".join(lines)


def training_rows(record):
    """Return how long the run was, as rows of a table."""
    return [
        ["steps", record["steps"]],
        ["pairs", record["pairs"]],
        ["seconds", f"{record['seconds']:.0f}"],
    ]


def final_rows(record):
    """Return the last metrics that the trainer logged, as rows of a table."""
    rows = []
    for name in FINAL:
        if name in record["final"]:
            rows.append([name, f"{record['final'][name]:.4f}"])
    return rows


def evaluation_rows(evaluation):
    """Return base, tuned and their difference for every metric, as rows of a table."""
    rows = []
    for name, metric in METRICS.items():
        difference = evaluation["difference"][name]
        low = format_value(name, difference["low"], "+")
        high = format_value(name, difference["high"], "+")
        meaning = metric.meaning
        if metric.better:
            meaning += f" ({metric.better} is better)"
        rows.append(
            [
                name,
                format_value(name, evaluation["base"][name]),
                format_value(name, evaluation["tuned"][name]),
                f"{low} to {high}",
                f"{difference['p']:.2g}",
                meaning,
            ]
        )
    return rows


def markdown_table(head, rows):
    """Return a Markdown table whose cells show their text letter for letter."""
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([plain(value) for value in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(value):
    """Return `value` as one line of text that Markdown shows letter for letter."""
    one_line = escape(" ".join(str(value).split()), quote=False)
    escaped = re.sub(r"[\\`*_{}\[\]|#~!$]", r"\\\g<0>", one_line)
    # A <span> keeps a formula or an address from being recognized. A backslash would not do: it
    # would become a part of the address.
    return re.sub(r"\\\$|\\\\(?=[a-z(]|\\\[)|://|www\.|@", r"<span>\g<0></span>", escaped)


def quoted(value):
    """Return `value` as JSON, which is YAML too, without letters that Markdown understands.

    Some readers take the head of a card for Markdown and would find a tag, link or formula in it.
    """
    return re.sub(r"[<>&(){}$`]", lambda letter: f"\\u{ord(letter[0]):04x}", json.dumps(value))
