"""Two processes end at the adapter of one, and an interrupted stream goes on with the next row."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file

from benchmarks import streaming
from utils import callbacks, chat, models, preferences, training
from utils.settings import PROFILES, ROOT, locate

SETTINGS = PROFILES["embedded"]
STEPS = 3


# Several processes


@pytest.fixture(scope="module")
def few_pairs(tmp_path_factory):
    """A folder with the pairs of a few optimizer steps: counting the tokens of all takes longer."""
    folder = tmp_path_factory.mktemp("few")
    split = f"train[:{(STEPS + 1) * SETTINGS.batch_size}]"
    load_dataset(locate(SETTINGS.dataset), split=split).to_parquet(folder / "train.parquet")
    return folder


def moved(output):
    """Return how far training moved the adapter, as one vector: LoRA's B starts at zero."""
    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights) if "lora_B" in name])


def one_process(processor, few_pairs, output, **changes):
    settings = replace(SETTINGS, dataset=str(few_pairs))
    pairs = chat.format_dataset(preferences.load(settings.dataset, settings.train_split))
    changes = {"max_steps": STEPS, "save_strategy": "no", "disable_tqdm": True} | changes
    model = models.load_model(settings)
    trainer = training.make_trainer(settings, model, processor, pairs, output, **changes)
    return training.train(settings, trainer), moved(output)


def test_two_processes_end_at_the_adapter_of_one(processor, few_pairs, tmp_path):
    """The same pairs per optimizer step, in two halves.

    What differs is the order in which float32 sums are added: relative errors of 1e-7, and AdamW's
    division by its running mean lets them grow: 1e-6 was seen. Half the pairs move it elsewhere.
    """
    two = tmp_path / "two"
    config = str(ROOT / "configs" / "accelerate" / "two_processes.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    command += ["-m", "scripts.train", "--profile", "embedded", "--dataset", str(few_pairs)]
    command += ["--output", str(two), "--max-steps", str(STEPS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count(f"{STEPS} steps in") == 1, "only the first process speaks"
    record, alone = one_process(processor, few_pairs, tmp_path / "one")
    together = json.loads((two / "training.json").read_text())
    assert together["pairs"] == record["pairs"] == STEPS * 16
    assert together["pairs_per_second"] == pytest.approx(together["pairs"] / together["seconds"])
    assert (moved(two) - alone).norm() / alone.norm() < 1e-4
    changes = {"per_device_train_batch_size": 8}
    _, half = one_process(processor, few_pairs, tmp_path / "half", **changes)
    assert (half - alone).norm() / alone.norm() > 0.1
    assert not list((two / "adapter").glob("*-of-*"))
    assert (two / "adapter" / "adapter_config.json").exists()


# Streams


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """A file of 12 pairs whose question says which they are, in groups of two."""
    rows = load_dataset(locate(SETTINGS.dataset), split="train[:12]").remove_columns("question")
    rows = rows.add_column("question", [f"Number {number}?" for number in range(12)])
    path = tmp_path_factory.mktemp("stream") / "pairs.parquet"
    rows.to_parquet(path, batch_size=2)
    return str(path)


def trained_rows(processor, parquet, output, rows, steps, stop=None, resume=False, shuffle=False):
    """Return the numbers of the pairs in the order in which they were trained on, two a step."""
    stream = preferences.load(parquet, streaming=True).reshard().take(rows)
    if shuffle:
        stream = stream.shuffle(seed=0, buffer_size=4)
    trainer = training.make_trainer(
        SETTINGS,
        models.load_model(SETTINGS),
        processor,
        chat.format_dataset(stream),
        output,
        callbacks=[callbacks.StopAfter(stop)] if stop else None,
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        disable_tqdm=True,
    )
    seen = []
    compute_loss = trainer.compute_loss

    def watched(model, inputs, *arguments, **named):
        chosen = inputs["input_ids"][: len(inputs["input_ids"]) // 2]
        numbers = []
        for prompt in processor.tokenizer.batch_decode(chosen):
            numbers.append(int(re.search(r"Number (\d+)", prompt)[1]))
        seen.extend(sorted(numbers))  # a batch may bring them in any order
        return compute_loss(model, inputs, *arguments, **named)

    trainer.compute_loss = watched
    record = training.train(SETTINGS, trainer, resume=resume)
    assert record["pairs"] == 2 * record["steps"]
    return seen


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_resumed_in_the_middle_repeats_and_loses_no_row(
    processor, parquet, tmp_path, shuffle
):
    before = trained_rows(processor, parquet, tmp_path, 12, 6, stop=3, shuffle=shuffle)
    after = trained_rows(processor, parquet, tmp_path, 12, 6, resume=True, shuffle=shuffle)
    order = before + after
    assert len(before) == 6 and sorted(order) == list(range(12))
    assert (order == sorted(order)) != shuffle


def test_a_stream_resumed_in_its_second_pass_goes_on_there(processor, parquet, tmp_path):
    """transformers alone would start the second pass over: it does not count passes."""
    before = trained_rows(processor, parquet, tmp_path, 4, 5, stop=3)
    after = trained_rows(processor, parquet, tmp_path, 4, 5, resume=True)
    assert before + after == [*range(4), *range(4), *range(2)]


def test_the_streaming_benchmark_reports_what_it_measured(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["streaming", "--rows", "20", "40"])
    # In this process the peaks mean nothing, but the test is quick.
    monkeypatch.setattr(streaming, "alone", streaming.measure)
    streaming.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["rows"] == [20, 40] and len(summary["stored_mb"]) == 2
    peaks = summary["peak_mb"]["by row group"]
    assert summary["growth_mb"] == pytest.approx(peaks[1] - peaks[0])
    assert summary["peak_mb"].keys() == set(streaming.WAYS)
    assert all(len(peaks) == 2 for peaks in summary["peak_mb"].values())
