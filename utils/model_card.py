"""Give a tuned model away: its adapter, or the adapter merged into the base model, with a card that says what it is."""

import json
import re
from html import escape
from pathlib import Path

import torch

from utils.chat import training_batch
from utils.models import load_merged, load_processor
from utils.settings import EMBEDDED_DATASET, EMBEDDED_MODEL

DATA_LICENCES = {  # (the hub's name for it, what it means)
    "openbmb/RLAIF-V-Dataset": (
        "cc-by-nc-4.0",
        "CC BY-NC 4.0: not for commercial use, which goes for what is trained on it as well",
    ),
    EMBEDDED_DATASET: ("apache-2.0", "Apache-2.0"),
}
SETTINGS = (  # rows of the card's table
    "model model_revision dataset dataset_revision train_split pixel_budget four_bit lora_rank lora_alpha lora_target "
    "beta learning_rate epochs batch_size gradient_accumulation warmup_steps seed"
).split()
BUILT = {
    EMBEDDED_MODEL: " The base model was built to hallucinate: its captions named what usually stands beside a thing."
}
FINAL = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
METRICS = {
    "chair_i": "objects named that are not there, of all named (lower is better)",
    "chair_s": "answers that name one (lower is better)",
    "recall": "objects there that are named",
    "cog": "absent objects named because they usually stand beside a present one (lower is better)",
    "claim_precision": "right claims, of all claims",
    "pope_accuracy": "right answers to “Is there a …?”",
    "pope_f1": "F1 of the same, for yes",
    "pope_yes_ratio": "answers that say yes; half would be right",
    "words": "words in a description",
}


@torch.no_grad()
def answer_logits(model, processor, rows):
    """What `model` expects at every token of both answers of formatted `rows`: (tokens, vocabulary), float32 on the CPU."""
    batch = training_batch(rows, processor).to(model.device)
    in_answer = batch.pop("completion_mask")[:, 1:].bool()
    return model.eval()(**batch, use_cache=False).logits[:, :-1][in_answer].float().cpu()


def difference(logits, others):
    """How far two models' logits (tokens, vocabulary) are apart: the `largest` difference of one logit, the mean Kullback-Leibler
    `divergence` per token in nats, and the share of tokens whose most likely successor `changed`."""
    p, q = logits.log_softmax(-1), others.log_softmax(-1)
    return {
        "largest": (logits - others).abs().max().item(),
        "divergence": (p.exp() * (p - q)).sum(-1).mean().item(),
        "changed": (logits.argmax(-1) != others.argmax(-1)).float().mean().item(),
    }


def save_adapter(run, folder):
    """What others need of `run` (a folder of training.train) to put the adapter on their copy of the base model, in `folder`.

    Left behind: `training_args.bin`, a pickle that runs code when it is opened, and the path of the base model on this machine.
    """
    card, settings = model_card(run), read(run, "training.json")["settings"]
    config = json.loads((Path(run) / "adapter" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": settings["model"], "revision": settings["model_revision"]}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    weights = "adapter_model.safetensors"
    (folder / weights).write_bytes((Path(run) / "adapter" / weights).read_bytes())
    (folder / "README.md").write_text(card, encoding="utf-8")


def save_merged(settings, run, folder):
    """The merged model of `run` with its processor and card in `folder`; `from_pretrained(folder)` loads it. Returns the model."""
    card, model = model_card(run, merged=True), load_merged(settings, Path(run) / "adapter")
    model.save_pretrained(folder)
    load_processor(settings).save_pretrained(folder)
    (Path(folder) / "README.md").write_text(card, encoding="utf-8")
    return model


def read(run, name):
    """The JSON file `name` of the folder `run`. FileNotFoundError that says how it is made."""
    path, made_by = (
        Path(run) / name,
        {"training.json": "python -m scripts.train", "evaluation.json": "notebook 04"}[name],
    )
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing, and a card without it would say nothing: it is made by {made_by}"
        )
    return json.loads(path.read_text())


def plain(value):
    """`value` as text that Markdown shows letter for letter, in one line.

    A <span> within keeps a formula or an address from being recognised: in an address, a backslash would be part of it.
    """
    escaped = re.sub(
        r"[\\`*_{}\[\]|#~!$]", r"\\\g<0>", escape(" ".join(str(value).split()), quote=False)
    )
    return re.sub(r"\\\$|\\\\(?=[a-z(]|\\\[)|://|www\.|@", r"<span>\g<0></span>", escaped)


def quoted(value):
    """`value` as JSON, and so as YAML, in which readers that take the card's head for Markdown find no tag, link or formula."""
    return re.sub(r"[<>&(){}$`]", lambda letter: f"\\u{ord(letter[0]):04x}", json.dumps(value))


def table(head, rows):
    """A Markdown table; the cells' text is shown letter for letter."""
    lines = [head, ["---"] * len(head), *([plain(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(metric, value, sign=""):
    """A metric as the card prints it: fractions in percent, words as they are."""
    return f"{value:{sign}.1f}" if metric == "words" else f"{value:{sign}.1%}"


def model_card(run, merged=False):
    """The text of README.md for the adapter in `run`, or for the model it was merged into: what it is, how to load it, licence,
    settings, last metrics, evaluation. All of it from training.json and evaluation.json in `run`.

    FileNotFoundError when one is missing, ValueError when the data set's licence is not known.
    """
    record, evaluation = read(run, "training.json"), read(run, "evaluation.json")
    settings = record["settings"]
    model, data = settings["model"], settings["dataset"]
    if data not in DATA_LICENCES:
        raise ValueError(
            f"the licence of the data set {data} is not known: look it up, and add it to DATA_LICENCES in utils/model_card.py"
        )
    licence, meaning = DATA_LICENCES[data]
    relation, library = ("finetune", "transformers") if merged else ("adapter", "peft")
    head = {
        "base_model": model,
        "base_model_relation": relation,
        "datasets": [data],
        "license": licence,
        "library_name": library,
    }
    head |= {"pipeline_tag": "image-text-to-text", "tags": ["dpo", "trl"]}
    place = "THIS" if merged else json.dumps(model)
    load = "from transformers import AutoModelForImageTextToText, AutoProcessor\n" + (
        "" if merged else "from peft import PeftModel\n"
    )
    load += f"THIS = '…'  # where this file lies\nmodel = AutoModelForImageTextToText.from_pretrained({place})\n"
    load += (
        "" if merged else "model = PeftModel.from_pretrained(model, THIS)\n"
    ) + f"processor = AutoProcessor.from_pretrained({place})"
    measured = []
    for name, meant in METRICS.items():
        change, before, after = (
            evaluation["difference"][name],
            evaluation["base"][name],
            evaluation["dpo"][name],
        )
        interval = f"{shown(name, change['low'], '+')} to {shown(name, change['high'], '+')}"
        measured.append(
            [name, shown(name, before), shown(name, after), interval, f"{change['p']:.2g}", meant]
        )
    final = [[name, f"{record['final'][name]:.4f}"] for name in FINAL if name in record["final"]]
    done = [
        ["steps", record["steps"]],
        ["pairs", record["pairs"]],
        ["seconds", f"{record['seconds']:.0f}"],
    ]
    blocks = [
        "---\n" + "\n".join(f"{key}: {quoted(value)}" for key, value in head.items()) + "\n---",
        f"# {plain(model)}, tuned with DPO on {plain(data)}",
        f"Direct Preference Optimization with {'a LoRA adapter, merged into the weights' if merged else 'a LoRA adapter'}, to make the "
        "model name fewer things that are not in the picture.",
        f"```python\n{load}\n```",
        f"## Licence\n\nThe preference pairs, {plain(data)}, are under {meaning}. The base model's own licence holds besides.",
        "## Training\n\n"
        + table(["setting", "value"], [[name, settings[name]] for name in SETTINGS]),
        table(["done", ""], done) + "\n\n" + table(["metric of the last steps", "value"], final),
        f"## Evaluation\n\nOn {evaluation['n']} images of {plain(settings['evaluation_dataset'])}, greedy decoding; one training seed.",
        table(
            ["metric", "base", "tuned", "95% interval of the difference", "p", "what it counts"],
            measured,
        ),
        "These figures say nothing about other kinds of images. Intervals come from a bootstrap over images, p from swapping the two "
        "answers to an image; p is not adjusted for the number of metrics, and near 0.05 the two may disagree."
        + BUILT.get(model, ""),
        "## Versions\n\n"
        + ", ".join(
            f"{plain(name)} {plain(version)}" for name, version in record["versions"].items()
        ),
    ]
    return "\n\n".join(blocks) + "\n"
