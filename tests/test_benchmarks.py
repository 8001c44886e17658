"""The benchmarks run, small, and print what they promise; the one that needs a GPU says so without it."""

import dataclasses
import json
import re
import sys

import nbformat
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks import format_dataset, gpu, train_step
from benchmarks.train_step import Shape, text, tower
from utils import memory
from utils.settings import PROFILES, ROOT
from utils.shared_prefix import SharedPrefixDPOTrainer
from utils.sliders import readable

TINY = Shape(
    {
        "model_type": "smolvlm",
        "text_config": text("llama", 64, 128, 2, 2, 1, vocabulary=200),
        "vision_config": tower(32, 2, 64, 4, 2),
        "scale_factor": 2,
    },
    pixels=(1, 3, 64, 64),
    tokens=64,
)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_train_step_compares_the_steps_on_the_same_loss(monkeypatch, capsys):
    monkeypatch.setitem(train_step.SHAPES, "tiny", TINY)
    monkeypatch.setattr(sys, "argv", ["train_step", "--shapes", "tiny", "--repeats", "1"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    train_step.main()
    figures = last_line(capsys)["shapes"]["tiny"]
    names = {"flop_ratio", "time_ratio", "memory_ratio", "loss_difference"}
    assert figures.keys() == names | {"ideal_ratio", "images_once", "cached_reference"}
    for step in (figures, figures["images_once"], figures["cached_reference"]):
        assert names <= step.keys() and step["loss_difference"] < 1e-5
    assert (
        1
        < figures["images_once"]["flop_ratio"]
        < figures["flop_ratio"]
        < figures["cached_reference"]["flop_ratio"]
    )
    assert figures["flop_ratio"] == pytest.approx(figures["ideal_ratio"], rel=0.15)


def test_the_vision_tower_works_as_often_as_is_claimed(tmp_path):
    """Gradient checkpointing is on: without it stock would go forward four times and never back."""
    results = train_step.compare(TINY, 1, 1, tmp_path)
    passes = {
        name: (results[name]["vision_forward"], results[name]["vision_backward"])
        for name in ("stock", "ours")
    }
    assert passes == {"stock": (6, 2), "ours": (1, 0)}  # of each image, which stock has twice


def test_flops_are_counted_exactly_where_torch_leaves_some_out():
    query, matrix = torch.randn(1, 2, 8, 16), torch.randn(8, 4)
    with torch.utils.flop_counter.FlopCounterMode(
        display=False, custom_mapping=train_step.FLOPS
    ) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        torch.zeros(8, 8).addmm_(matrix, matrix.T)
    assert counter.get_total_flops() == 2 * 2 * (2 * 8 * 8 * 16) + 2 * 8 * 8 * 4


def test_format_dataset_compares_the_recipes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["format_dataset", "--rows", "20"])
    monkeypatch.setattr(
        format_dataset, "alone", format_dataset.measure
    )  # in this process: memory means nothing, the test is quick
    format_dataset.main()
    summary = last_line(capsys)
    assert {
        "rows",
        "rows_per_second_ratio",
        "bytes_written_share",
        "largest_pixel_difference",
    } <= summary.keys()
    assert summary["rows"] == 20 and summary["largest_pixel_difference"] == 0


def test_gpu_says_that_there_is_none(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main()


def tiny_qwen():
    config = json.loads(json.dumps(train_step.QWEN))
    config["text_config"] |= {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config["text_config"] |= {"num_key_value_heads": 1, "vocab_size": 200}
    config["vision_config"] |= {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 128,
    }
    config["vision_config"] |= {"fullatt_block_indexes": [0]}
    return config, Shape({}, pixels=(16, 3 * 2 * 14 * 14), tokens=4, grid=(1, 4, 4))


@pytest.mark.parametrize(
    "config, shape", [(TINY.config, TINY), tiny_qwen()], ids=["smolvlm", "qwen"]
)
@pytest.mark.parametrize("four_bit", [True, False])
def test_gpu_sweeps_a_random_model_that_was_loaded_as_real_ones_are(
    config, shape, four_bit, tmp_path, monkeypatch
):
    with torch.device("meta"):
        bare = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(**config, image_token_id=199)
        )
    monkeypatch.setattr(memory, "architecture", lambda name: bare)
    monkeypatch.setattr(gpu, "TIMED", 1)
    monkeypatch.setattr(gpu, "SHARD", 50_000)  # several shards
    settings = PROFILES["smolvlm"]
    settings = type(settings)(**vars(settings) | {"four_bit": four_bit})
    rows = {}
    for kind in gpu.KINDS:
        model = gpu.random_model(settings)
        assert (sum("4bit" in type(module).__name__ for module in model.modules()) > 0) == four_bit
        weights = {
            name: value
            for name, value in model.named_parameters()
            if value.dim() > 1 and value.is_floating_point()
        }
        assert all(
            0.015 < value.std() < 0.025 for value in weights.values()
        )  # each was found in the checkpoint
        rows[kind] = gpu.sweep(kind, model, settings, shape, tmp_path, sizes=(1, 2), use_cpu=True)
        assert [row["batch_size"] for row in rows[kind]] == [1, 2]
    summary = gpu.report("A GPU", "smolvlm", 1e12, rows, tmp_path / "results")
    assert (
        summary["equal_batch"].keys() == {1, 2} and summary["limits"][15]["ours"]["batch_size"] == 2
    )
    written = json.loads((tmp_path / "results" / "A-GPU-smolvlm.json").read_text())
    for row in written["stock"] + written["ours"]:
        assert (
            row["share_of_rate"] == pytest.approx(row["tflop_per_second"])
            and row["tflop_per_second"] > 0
        )


def test_gpu_keeps_what_it_measured_before_memory_ended(tmp_path, monkeypatch):
    class Small(SharedPrefixDPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            if len(inputs["input_ids"]) > 2:
                raise torch.OutOfMemoryError
            return super()._compute_loss(model, inputs, return_outputs)

    monkeypatch.setitem(gpu.KINDS, "ours", Small)
    rows = gpu.sweep(
        "ours",
        train_step.build(TINY),
        PROFILES["smolvlm"],
        TINY,
        tmp_path,
        sizes=(1, 2, 3),
        use_cpu=True,
    )
    assert [row["batch_size"] for row in rows] == [1]
    assert torch._C._len_torch_dispatch_stack() == 0  # nothing goes on counting


def test_the_largest_batch_that_fits_is_found_by_what_was_taken():
    rows = [{"batch_size": size, "reserved_gb": 4.0 + 5 * size} for size in (1, 2, 4)]
    assert gpu.largest(rows, 15)["batch_size"] == 2
    assert gpu.largest(rows, 24)["batch_size"] == 4
    assert gpu.largest(rows, 8) is None


def test_notebook_04_reads_what_gpu_writes(tmp_path, capsys):
    """Rows as `sweep` gives them, through `report`, into the cell that sets estimates beside them."""
    steps = gpu.Steps(None, gpu.PICTURES["smolvlm"], [2])
    steps.counter = FlopCounterMode(display=False)
    row = steps.row(2, 1.0)
    gpu.report(
        "Some GPU",
        "smolvlm",
        1e12,
        {"stock": [row], "ours": [dict(row)]},
        tmp_path / "results" / "gpu",
    )
    notebook = nbformat.read(ROOT / "notebooks" / "06_fit_in_memory.ipynb", as_version=4)
    (cell,) = [
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code" and '"results" / "gpu"' in cell.source
    ]
    capsys.readouterr()
    exec(
        cell,
        {
            "root": tmp_path,
            "json": json,
            "dataclasses": dataclasses,
            "memory": memory,
            "PROFILES": PROFILES,
            "readable": readable,
        },
    )
    assert re.fullmatch(
        r"Some-GPU-smolvlm\.json, 2 pairs: [\d.]+ GB, measured 0\.0 GB\n", capsys.readouterr().out
    )
