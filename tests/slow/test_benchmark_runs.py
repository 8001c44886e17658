"""The benchmarks run, small, and print what they promise."""

import argparse
import dataclasses
import json
import sys
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks import format_dataset, generate, gpu, photographs, train_step
from utils import memory, models
from utils.settings import PROFILES
from utils.shared_prefix import SharedPrefixDPOTrainer

TINY_CONFIG = {
    "model_type": "smolvlm",
    "text_config": train_step.language_config(
        "llama",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=200,
    ),
    "vision_config": train_step.vision_config(32, 2, 64, 4, 2),
    "scale_factor": 2,
}
TINY = train_step.Shape(TINY_CONFIG, pixels=(1, 3, 64, 64), tokens=64)
TINY_QWEN_CONFIG = {
    "model_type": "qwen2_5_vl",
    "text_config": train_step.QWEN["text_config"]
    | {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 200,
    },
    "vision_config": train_step.QWEN["vision_config"]
    | {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [0],
    },
}
TINY_QWEN = train_step.Shape({}, pixels=(16, train_step.QWEN_PATCH), tokens=4, grid=(1, 4, 4))


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_train_step_compares_the_steps_on_the_same_loss(monkeypatch, capsys):
    monkeypatch.setitem(train_step.SHAPES, "tiny", TINY)
    arguments = "train_step --shapes tiny --repeats 1 --pairs 3 --answers 5 90"
    monkeypatch.setattr(sys, "argv", arguments.split())
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    train_step.main()
    steps = last_line(capsys)["shapes"]["tiny"]["3"]
    ideal = steps.pop("ideal_ratio")
    assert list(steps) == list(train_step.STEPS[2:])
    flops = []
    for step in steps.values():
        assert step["stock"]["loss_difference"] < 1e-5
        assert step["fixed_tower"]["flop_ratio"] < step["stock"]["flop_ratio"]
        flops.append(step["stock"]["flop_ratio"])
    # Each of the steps computes less than the one before it.
    assert flops == sorted(flops) and flops[0] > 1
    assert steps["ours"]["stock"]["flop_ratio"] == pytest.approx(ideal, rel=0.15)


@pytest.mark.parametrize("shape", [TINY, TINY_QWEN], ids=["smolvlm", "qwen"])
def test_generate_compares_ways_that_give_the_same(shape, monkeypatch):
    monkeypatch.setitem(
        generate.SHAPES, "tiny", shape._replace(config=shape.config or TINY_QWEN_CONFIG)
    )
    monkeypatch.setattr(generate, "DESCRIPTION", 8)
    model = generate.tuned_model(generate.SHAPES["tiny"])
    for each, shared in generate.WAYS.values():
        found = generate.compare(model, generate.SHAPES["tiny"], each, shared)
        assert found["difference"] < 1e-4
        assert found["flop_ratio"] > 1 and found["time_ratio"] > 0


def test_the_vision_tower_runs_as_often_as_is_claimed(tmp_path):
    """Gradient checkpointing is on. Without it, stock would run forward four times, never back."""
    results = train_step.measure_shape(TINY, 1, [(60, 70), (80, 65)], tmp_path)
    # Passes of each image, which stock has twice.
    stock = results["stock"]
    assert (stock["vision_forward"], stock["vision_backward"]) == (6, 2)
    fixed = results["fixed_tower"]
    assert (fixed["vision_forward"], fixed["vision_backward"]) == (4, 0)
    ours = results["ours"]
    assert (ours["vision_forward"], ours["vision_backward"]) == (1, 0)


def test_format_dataset_compares_the_recipes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["format_dataset", "--rows", "20"])
    # In this process: its memory means nothing, but the test is quick.
    monkeypatch.setattr(format_dataset, "alone", format_dataset.measure)
    format_dataset.main()
    summary = last_line(capsys)
    assert summary["rows"] == 20 and summary["bytes_written_share"] < 0.1
    results = summary["results"]
    assert list(results) == list(format_dataset.RECIPES)
    assert results["ours"]["difference"] == results["not_decoded"]["difference"] == 0
    for recipe in ("article", "not_decoded"):
        assert results[recipe]["bytes_written"] > results["ours"]["bytes_written"]
        assert summary[recipe].keys() == {"format_ratio", "with_an_epoch_ratio"}


@pytest.mark.parametrize(
    "config, shape",
    [(TINY_CONFIG, TINY), (TINY_QWEN_CONFIG, TINY_QWEN)],
    ids=["smolvlm", "qwen"],
)
def test_gpu_measures_random_models_that_are_loaded_as_real_ones(
    config, shape, tmp_path, monkeypatch
):
    with torch.device("meta"):
        model_config = AutoConfig.for_model(**config, image_token_id=199)
        bare = AutoModelForImageTextToText.from_config(model_config)
    monkeypatch.setattr(memory, "architecture", lambda name: bare)
    monkeypatch.setattr(gpu, "TIMED", 1)
    monkeypatch.setattr(gpu, "SIZES", (1, 2))
    monkeypatch.setattr(gpu, "SHARD", 50_000)  # several shards
    monkeypatch.setitem(gpu.PROFILE_SHAPES, "smolvlm", shape)
    load_model = models.load_model
    loaded = []

    def checked(settings):
        model = load_model(settings)
        for name, weights in model.named_parameters():
            if weights.dim() > 1 and weights.is_floating_point():
                # A weight that was not found in the checkpoint would have another spread.
                assert 0.015 < weights.std() < 0.025, name
        kinds = {type(module).__name__ for module in model.modules()}
        assert ("Linear4bit" in kinds) == settings.four_bit
        loaded.append(settings.four_bit)
        return model

    monkeypatch.setattr(models, "load_model", checked)
    options = argparse.Namespace(output=tmp_path, seconds=600, processors=None)
    gpu.measure_profile("smolvlm", "A GPU", 1e12, options)
    assert loaded == [True, False]
    written = json.loads((tmp_path / "A-GPU-smolvlm.json").read_text())
    losses = {}
    for row in written["training"]:
        configuration = (row["four_bit"], row["batch_size"])
        losses.setdefault(configuration, []).append(row["loss"])
    assert len(losses) == 4
    for compared in losses.values():
        assert len(compared) == 2 * len(gpu.KINDS)  # with and without checkpointing
        assert compared == pytest.approx([compared[0]] * len(compared), abs=1e-5)
    assert len({round(compared[0], 4) for compared in losses.values()}) == 4
    assert written["limits"]["15"]["ours"]["pairs_per_second"] > 0
    sizes = [row["batch_size"] for row in written["answering"]]
    assert sizes == list(gpu.ANSWERING)


def test_gpu_trains_end_to_end_on_photographs(tmp_path):
    settings = dataclasses.replace(PROFILES["embedded"], batch_size=8, gradient_accumulation=2)
    model = models.load_model(settings)
    processor = models.load_processor(settings)
    row = gpu.end_to_end(settings, model, processor, tmp_path, workers=0)
    assert row["pairs_per_second"] > 0 and row["computing_only"] > 0


def test_gpu_keeps_what_it_measured_before_memory_ended(tmp_path, monkeypatch):
    class Small(SharedPrefixDPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            if len(inputs["input_ids"]) > 2:
                raise torch.OutOfMemoryError
            return super()._compute_loss(model, inputs, return_outputs)

    monkeypatch.setitem(gpu.KINDS, "ours", (Small, nullcontext))
    model = train_step.random_frozen_model(TINY)
    settings = PROFILES["smolvlm"]
    rows = gpu.sweep(settings, "ours", model, TINY, tmp_path, sizes=(1, 2, 3), use_cpu=True)
    assert [row["batch_size"] for row in rows] == [1]


def test_photographs_go_through_the_whole_path(monkeypatch, capsys):
    for name in ("HF_DATASETS_CACHE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # the benchmark sets them, and this puts them back
    monkeypatch.setattr(photographs, "SIZE", (1200, 900))
    monkeypatch.setattr(sys, "argv", ["photographs", "--photographs", "6"])
    photographs.main()
    *_, summary = capsys.readouterr().out.splitlines()
    stages = json.loads(summary)["stages"]
    assert list(stages) == ["import", "check", "format", "train"]
    assert all(result["seconds"] > 0 for result in stages.values())
