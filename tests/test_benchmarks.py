"""The parts of the benchmarks that need no training.

Small runs are in slow/test_benchmark_runs.py.
"""

import dataclasses
import io
import json
import random
import sys
import time
from types import SimpleNamespace

import nbformat
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from benchmarks import format_dataset, gpu, kill, seeds, streaming, train_step
from utils import evaluation, memory
from utils.settings import PROFILES, ROOT


def test_flops_are_counted_exactly_where_torch_leaves_some_out():
    query = torch.randn(1, 2, 8, 16)
    matrix = torch.randn(8, 4)
    with FlopCounterMode(display=False, custom_mapping=train_step.FLOPS) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        torch.zeros(8, 8).addmm_(matrix, matrix.T)
    attention = 2 * 2 * (2 * 8 * 8 * 16)
    assert counter.get_total_flops() == attention + 2 * 8 * 8 * 4


def test_synthetic_batches_differ_only_in_how_often_they_hold_an_image():
    shape = train_step.SHAPES["windows_256"]
    config = AutoConfig.for_model(**shape.config, image_token_id=4299)
    twice, once = train_step.synthetic_batches(config, shape, [(60, 70), (80, 65)])
    assert twice["pixel_values"].shape == (2 * 2 * 1024, train_step.QWEN_PATCH)
    assert torch.equal(twice["pixel_values"][: 2 * 1024], once["pixel_values"])
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(twice[name], once[name])
    assert once["completion_mask"].sum(1).tolist() == [60, 80, 70, 65]
    assert (once["input_ids"] == 4299).sum(1).tolist() == [256] * 4


def test_gpu_says_that_there_is_none(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="GPU"):
        gpu.main()


def test_the_fastest_batch_that_fits_is_found_by_what_was_reserved():
    rows = []
    for size, speed in ((1, 2.0), (2, 5.0), (4, 4.0)):
        reserved = 4.0 + 5 * size
        rows.append({"batch_size": size, "reserved_gb": reserved, "pairs_per_second": speed})
    assert gpu.fastest_within(rows, 13)["batch_size"] == 1
    assert gpu.fastest_within(rows, 24)["batch_size"] == 2
    assert gpu.fastest_within(rows, 8) is None


def test_notebook_06_reads_what_gpu_writes(tmp_path):
    """Rows as `sweep` returns them, as `write_record` writes them, into the cell that compares."""
    steps = gpu.Steps(None, gpu.PROFILE_SHAPES["smolvlm"], [16])
    configuration = {"kind": "stock", "four_bit": True, "checkpointing": True}
    measured = {"allocated_gb": 20.0, "reserved_gb": 21.0}
    rows = [configuration | steps.row(16, 1.0) | measured]
    record = {"gpu": "Some GPU", "profile": "smolvlm", "training": rows}
    gpu.write_record(record, tmp_path / "results" / "gpu")
    notebook = nbformat.read(ROOT / "notebooks" / "06_fit_in_memory.ipynb", as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    (source,) = [source for source in sources if 'root / "results" / "gpu"' in source]
    shown = []
    names = {
        "root": tmp_path,
        "json": json,
        "dataclasses": dataclasses,
        "memory": memory,
        "PROFILES": PROFILES,
        "display": SimpleNamespace(table=lambda rows, caption: shown.extend(rows)),
    }
    exec(source, names)
    (row,) = shown
    assert row["profile"] == "smolvlm" and row["trainer"] == "TRL"
    assert row["measured"] == "20.0 GB"


def test_generated_images_are_like_photographs():
    image = Image.open(io.BytesIO(format_dataset.jpeg(0)))
    assert image.size == (640, 480) and image.format == "JPEG"
    assert 50_000 < len(format_dataset.jpeg(0)) < 200_000
    assert format_dataset.jpeg(0) != format_dataset.jpeg(1)
    pixels = np.asarray(image, np.int16)
    others = [pixels, pixels + 3]
    assert format_dataset.largest_pixel_difference([pixels, pixels], others) == 3


def test_streaming_writes_row_groups_and_reads_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "DIFFERENT_JPEGS", 2)
    monkeypatch.setattr(streaming, "ROW_GROUP", 10)
    path = str(tmp_path / "pairs.parquet")
    assert streaming.write_row_groups(path, 25) == (tmp_path / "pairs.parquet").stat().st_size
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 3
    for way in streaming.WAYS:
        assert streaming.measure(way, path)["rows"] == 25


def test_kill_finds_the_checkpoint_that_training_should_resume_from():
    found = {"checkpoint-14": "optimizer.pt is missing", "checkpoint-12": "whole"}
    assert kill.step_to_resume(found) == 12
    assert kill.step_to_resume({"checkpoint-2": "damaged", "adapter": "whole"}) == 0


def test_kill_chooses_moments_that_can_come():
    draw = random.Random(0)
    files = {"checkpoint": 7, "adapter": 3}
    folders = set()
    for _ in range(100):
        assert 0 <= kill.choose_moment(draw, False, 4, {4: 1.5}, files)["seconds"] <= 1.5
        moment = kill.choose_moment(draw, True, 12, {}, files)
        folders.add(moment["folder"])
        most = 3 if moment["folder"] == "adapter.new" else 7
        assert 1 <= moment["files"] <= most
    assert folders == {"checkpoint-14", "checkpoint-16", "adapter.new"}


def test_kill_notices_that_a_moment_has_come(tmp_path):
    now = time.monotonic()
    assert not kill.reached({"seconds": 0}, [], tmp_path)
    assert kill.reached({"seconds": 1}, [("begin", 0, now - 2)], tmp_path)
    assert not kill.reached({"seconds": 1e6}, [("begin", 0, now)], tmp_path)
    moment = {"event": ("step", 2), "folder": "checkpoint-2", "files": 1}
    told = [("begin", 0, now), ("step", 2, now)]
    assert not kill.reached(moment, told, tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "file").touch()
    assert kill.reached(moment, told, tmp_path)
    assert not kill.reached(moment, [*told, ("saved", 2, now)], tmp_path)


def test_kill_counts_what_its_runs_ended_at():
    while_saving = {"chosen": {"folder": "checkpoint-2"}, "found": {"checkpoint-2": "damaged"}}
    any_moment = {"chosen": {"seconds": 1.0}, "found": {"checkpoint-4": "whole"}}
    runs = [
        {"largest_difference": 0.0, "kills": [while_saving, any_moment]},
        {"largest_difference": 0.5, "kills": [any_moment]},
    ]
    record = kill.reliability_record(runs, 0, 2.0)
    assert record["runs"] == 2 and record["kills"] == 3
    assert record["kills_while_saving"] == record["kills_that_left_a_damaged_checkpoint"] == 1
    assert record["equal_to_the_last_bit"] == 1 and record["largest_difference"] == 0.5
    committed = json.loads((ROOT / "results" / "reliability.json").read_text())
    assert record.keys() == committed.keys()


def test_seeds_counts_every_metric_of_both_sides(monkeypatch):
    """The model is replaced by one that says the same of every scene."""

    def ask_both(settings, model, processor, images, questions):
        replies = {kind: ["Yes."] * len(asked) for kind, asked in questions.items()}
        both = []
        for text in ("There is a cup and a kite.", "There is a cup."):
            both.append({"descriptions": [text] * len(images), "pope": replies})
        return both

    monkeypatch.setattr(evaluation, "ask_both", ask_both)
    cup = {"category": "cup", "colour": "red", "size": "small", "column": 0, "row": 0}
    truths = [[cup], [cup]]
    result = evaluation.compare(*seeds.count_both(None, None, None, [None] * 2, truths))
    assert list(result["base"]) == list(evaluation.METRICS)
    assert result["base"]["chair_i"] == 0.5 and result["tuned"]["chair_i"] == 0
