"""The script that readers take home, run on a CPU as it stands."""

import ast
import json
import math
import runpy
import sys

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value, load_dataset
from peft import PeftModel
from PIL import Image as PillowImage
from trl import DPOConfig

from utils import models
from utils.settings import PROFILES, ROOT, locate

SCRIPT = ROOT / "scripts" / "minimal_dpo.py"
SETTINGS = PROFILES["embedded"]
MESSAGES = List(
    {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
)


def run(monkeypatch, folder, data, **options):
    """Run the script as a command, and return the names that it leaves."""
    arguments = ["--model", locate(SETTINGS.model), "--data", str(data)]
    arguments += ["--output", str(folder / "adapter")]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments])
    monkeypatch.chdir(folder)
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a short run on RLAIF-V's columns leaves, and its folder."""
    folder = tmp_path_factory.mktemp("minimal")
    with pytest.MonkeyPatch.context() as monkeypatch:
        names = run(monkeypatch, folder, locate(SETTINGS.dataset), pairs=24, max_steps=2)
    return names, folder / "adapter"


def test_it_imports_nothing_of_this_repository():
    imported = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert "trl" in imported
    assert not [name for name in imported if (ROOT / name).exists()]


def test_each_pair_is_seen_once(trained):
    names, _ = trained
    assert names["arguments"].num_train_epochs == 1
    assert DPOConfig("out", use_cpu=True, bf16=False).num_train_epochs == 3


@pytest.mark.parametrize("column", ["image", "images"])
def test_images_may_be_paths(column, tmp_path, monkeypatch):
    lines = []
    for number, color in enumerate(("red", "green", "blue")):
        PillowImage.new("RGB", (40, 40), color).save(tmp_path / f"{number}.png")
        row = {"chosen": "A cup.", "rejected": "A dog."}
        if column == "image":
            row |= {"image": f"{number}.png", "question": "What is it?"}
        else:
            content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
            row |= {"images": [f"{number}.png"], "prompt": [{"role": "user", "content": content}]}
            for side in ("chosen", "rejected"):
                said = [{"type": "text", "text": row[side]}]
                row[side] = [{"role": "assistant", "content": said}]
        lines.append(json.dumps(row))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    names = run(monkeypatch, tmp_path, tmp_path / "pairs.jsonl", max_steps=1)
    colors = {row["images"][0].getpixel((0, 0)) for row in names["pairs"]}
    assert len(colors) == 3
    assert names["trainer"].state.global_step == 1


def test_the_first_loss_is_ln_2(trained):
    names, _ = trained
    first = names["trainer"].state.log_history[0]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_what_trains_is_in_the_language_model_and_in_float32(trained):
    names, _ = trained
    trains = [item for item in names["trainer"].model.named_parameters() if item[1].requires_grad]
    assert len(trains) == 56
    assert {models.part_of(name) for name, _ in trains} == {"language"}
    assert {parameter.dtype for _, parameter in trains} == {torch.float32}


def test_only_the_language_model_is_in_4_bits(trained):
    names, _ = trained
    in_4_bit = set()
    for name, module in names["trainer"].model.named_modules():
        if type(module).__name__ == "Linear4bit":
            in_4_bit.add(models.part_of(name))
    assert in_4_bit == {"language"}


def test_every_question_keeps_its_own_image(trained):
    names, _ = trained
    images = {}
    for row in load_dataset(locate(SETTINGS.dataset), split="train"):
        images.setdefault((row["question"], row["chosen"]), []).append(row["image"])
    compared = set()
    for row in names["pairs"]:
        question = row["prompt"][0]["content"][-1]["text"]
        chosen = row["chosen"][0]["content"][0]["text"]
        own = images[question, chosen]
        if len(own) > 1:  # "Yes, there is a cup." was said about many images
            continue
        expected = names["processor"].image_processor(own, return_tensors="pt")["pixel_values"]
        for side in names["trainer"].data_collator([row])["pixel_values"]:
            assert torch.equal(side, expected[0])
        compared.add(chosen)
    assert len(compared) >= 6


def test_the_adapter_loads_on_its_base(trained):
    _, folder = trained
    tuned = PeftModel.from_pretrained(models.load_model(SETTINGS), folder)
    moved = [
        parameter.abs().max() for name, parameter in tuned.named_parameters() if "lora_B" in name
    ]
    assert len(moved) == 28
    assert max(moved) > 0


def test_rows_in_trl_s_layout_train_too(tmp_path, monkeypatch):
    def message(role, *parts):
        content = [
            {"type": "image", "text": None} if part is None else {"type": "text", "text": part}
            for part in parts
        ]
        return [{"role": role, "content": content}]

    rows = []
    for row in load_dataset(locate(SETTINGS.dataset), split="train[:4]"):
        rows.append(
            {
                "images": [row["image"], row["image"]],
                "prompt": message("user", None, None, row["question"]),
                "chosen": message("assistant", row["chosen"]),
                "rejected": message("assistant", row["rejected"]),
            }
        )
    features = Features(
        {"images": List(Image()), "prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES}
    )
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "pairs.parquet")
    names = run(monkeypatch, tmp_path, tmp_path / "pairs.parquet", max_steps=1)
    assert names["trainer"].state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_an_unknown_layout_is_named(tmp_path, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"picture": "a.jpg", "good": "yes", "bad": "no"}\n')
    with pytest.raises(SystemExit, match="picture"):
        run(monkeypatch, tmp_path, file)
