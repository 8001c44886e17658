"""More processes end where one does; a stream that stops goes on with the next row; the configuration files are understood."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import load_dataset
from safetensors.torch import load_file

from benchmarks import streaming
from utils import callbacks, chat, models, preferences, training
from utils.settings import PROFILES, ROOT

SETTINGS = PROFILES["embedded"]
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
STEPS = 3


# configs/accelerate


def launched(path):
    """The arguments that `accelerate launch` makes of the file, as in its own `launch_command`."""
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(path), "-m", "scripts.train"]
    )
    return _validate_launch_command(arguments)[0]


def test_there_are_configurations():
    assert [path.stem for path in CONFIGS] == [
        "deepspeed_zero2",
        "deepspeed_zero3",
        "fsdp_qlora",
        "two_processes",
    ]


@every_config
def test_accelerate_understands_every_key(path):
    config = load_config_from_file(str(path))  # refuses unknown keys of the first level
    known = vars(launch_command_parser().parse_args(["scripts.train"]))
    for key in (
        *config.fsdp_config,
        *config.deepspeed_config,
    ):  # those below it accelerate takes as they come, and forgets
        assert key in known, (
            f"{key} is no argument of accelerate launch: a misspelt key does nothing, silently"
        )
    arguments = launched(path)
    assert arguments.num_processes == 2
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed) == tuple(
        path.stem.startswith(kind) for kind in ("two_processes", "fsdp", "deepspeed")
    )


@every_config
def test_lines_that_matter_are_explained(path):
    lines = path.read_text().splitlines()
    assert (
        lines[0].startswith("# ")
        and f"accelerate launch --config_file configs/accelerate/{path.name} -m scripts.train"
        in lines[0]
    )
    inner = [line for line in lines if re.match(r"  \w", line)]
    assert not [line for line in inner if "#" not in line]
    assert yaml.safe_load(path.read_text())["compute_environment"] == "LOCAL_MACHINE"


def test_fsdp_takes_every_value():
    environment = prepare_multi_gpu_env(
        launched(ROOT / "configs" / "accelerate" / "fsdp_qlora.yaml")
    )
    needing_a_gpu = ("FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_SYNC_MODULE_STATES")
    assert [environment[name] for name in needing_a_gpu] == ["true", "true"]
    with mock.patch.dict(os.environ, environment | dict.fromkeys(needing_a_gpu, "false")):
        plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.use_orig_params) == (1, False)
    assert (plugin.sharding_strategy or plugin.reshard_after_forward).name == "FULL_SHARD"
    assert "transformer" in str(plugin.auto_wrap_policy)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT", (
        "trainer.save_model writes nothing for shares, without a word"
    )


# Several processes


@pytest.mark.parametrize(
    "batch_size, accumulation, processes, expected",
    [(16, 1, 1, (16, 1)), (16, 1, 2, (8, 1)), (1, 16, 4, (1, 4)), (4, 4, 2, (4, 2))],
)
def test_a_step_takes_as_many_pairs_however_many_processes(
    batch_size, accumulation, processes, expected, monkeypatch
):
    settings = replace(SETTINGS, batch_size=batch_size, gradient_accumulation=accumulation)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(training, "DPOConfig", dict)
    config = training.dpo_config(settings, "output")
    assert (
        config["per_device_train_batch_size"],
        config["gradient_accumulation_steps"],
    ) == expected
    assert (
        expected[0] * expected[1] * processes == batch_size * accumulation
        and expected[0] <= batch_size
    )


def test_pairs_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(
        ValueError, match=r"a step takes 16 pairs .* which 3 processes cannot share evenly"
    ):
        training.share_of_batch(SETTINGS, 3)


def one_process(processor, output, **changes):
    """What `python -m scripts.train` trains; all rows are within the token budget (tests/test_training.py)."""
    pairs = chat.format_dataset(preferences.load(SETTINGS.dataset, SETTINGS.train_split))
    changes = {"max_steps": STEPS, "save_strategy": "no", "disable_tqdm": True} | changes
    record = training.train(
        training.make_trainer(
            SETTINGS, models.load_model(SETTINGS), processor, pairs, output, **changes
        ),
        SETTINGS,
    )
    return record, moved(output)


def moved(output):
    """The adapter's second matrices, which begin at zero: how far training moved, as one vector."""
    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights) if "lora_B" in name])


def test_two_processes_end_at_the_adapter_of_one(processor, tmp_path):
    """The same pairs a step, in two halves. What differs is the order in which float32 sums are added: relative errors of 1e-7,
    and AdamW's division by its running mean lets them grow: 1e-6 was seen. Half the pairs a step move it elsewhere."""
    config = str(ROOT / "configs" / "accelerate" / "two_processes.yaml")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "-m",
        "scripts.train",
    ]
    command += [
        "--profile",
        "embedded",
        "--output",
        str(tmp_path / "two"),
        "--max-steps",
        str(STEPS),
    ]
    finished = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count(f"{STEPS} steps in") == 1, "only the first process speaks"
    record, alone = one_process(processor, tmp_path / "one")
    together = json.loads((tmp_path / "two" / "training.json").read_text())
    assert together["pairs"] == record["pairs"] == STEPS * 16
    assert together["pairs_per_second"] == pytest.approx(together["pairs"] / together["seconds"])
    distance = (moved(tmp_path / "two") - alone).norm() / alone.norm()
    assert distance < 1e-4
    _, half = one_process(processor, tmp_path / "half", per_device_train_batch_size=8)
    assert (half - alone).norm() / alone.norm() > 0.1
    assert (
        not list((tmp_path / "two" / "adapter").glob("*-of-*"))
        and (tmp_path / "two" / "adapter" / "adapter_config.json").exists()
    )


# Streams


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """24 pairs whose question says which they are."""
    rows = preferences.load(SETTINGS.dataset, "train[:24]").remove_columns("question")
    path = tmp_path_factory.mktemp("stream") / "pairs.parquet"
    rows.add_column("question", [f"Number {number}?" for number in range(24)]).to_parquet(
        path, batch_size=4
    )
    return str(path)


def trained_rows(processor, parquet, output, rows, steps, stop=None, resume=False, shuffle=False):
    """The numbers of the pairs in the order in which they were trained on, two a step."""
    stream = (
        load_dataset("parquet", data_files=parquet, split="train", streaming=True)
        .reshard()
        .take(rows)
    )
    stream = chat.format_dataset(stream.shuffle(seed=0, buffer_size=6) if shuffle else stream)
    changes = {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "disable_tqdm": True,
    }
    stopping = [callbacks.StopAfter(stop)] if stop else None
    trainer = training.make_trainer(
        SETTINGS,
        models.load_model(SETTINGS),
        processor,
        stream,
        output,
        callbacks=stopping,
        **changes,
    )
    seen, compute_loss = [], trainer.compute_loss

    def watched(model, inputs, *arguments, **settings):
        prompts = processor.tokenizer.batch_decode(
            inputs["input_ids"][: len(inputs["input_ids"]) // 2]
        )
        seen.extend(int(re.search(r"Number (\d+)", prompt)[1]) for prompt in prompts)
        return compute_loss(model, inputs, *arguments, **settings)

    trainer.compute_loss = watched
    record = training.train(trainer, SETTINGS, resume=resume)
    assert record["pairs"] == 2 * record["steps"]
    return seen


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_resumed_in_the_middle_repeats_and_loses_no_row(
    processor, parquet, tmp_path, shuffle
):
    before = trained_rows(processor, parquet, tmp_path, 24, 12, stop=5, shuffle=shuffle)
    after = trained_rows(processor, parquet, tmp_path, 24, 12, resume=True, shuffle=shuffle)
    assert len(before) == 10 and sorted(before + after) == list(range(24))
    assert (before + after == sorted(before + after)) != shuffle


def test_a_stream_resumed_in_its_second_pass_goes_on_there(processor, parquet, tmp_path):
    """Where transformers alone starts the second pass over, because it counts a stream's batches but not its passes."""
    before = trained_rows(processor, parquet, tmp_path, 8, 10, stop=6)
    after = trained_rows(processor, parquet, tmp_path, 8, 10, resume=True)
    assert before + after == [*range(8), *range(8), *range(4)]


def test_the_streaming_benchmark_reports_what_it_measured(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["streaming", "--rows", "20", "40"])
    monkeypatch.setattr(
        streaming, "alone", streaming.measure
    )  # in this process: memory means nothing, the test is quick
    streaming.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        summary["rows"] == [20, 40]
        and len(summary["stored_mb"]) == 2
        and summary["growth_mb"]
        == pytest.approx(
            summary["peak_mb"]["by row group"][1] - summary["peak_mb"]["by row group"][0]
        )
    )
    assert {way: len(peaks) for way, peaks in summary["peak_mb"].items()} == {
        way: 2 for way in streaming.WAYS
    }


def test_a_stream_by_row_group_has_every_row_once_and_reads_one_group_at_a_time(parquet):
    stream = load_dataset("parquet", data_files=parquet, split="train", streaming=True).reshard()
    assert stream.num_shards == 6, "24 rows in groups of 4"
    assert [row["prompt"][0]["content"][-1]["text"] for row in chat.format_dataset(stream)] == [
        f"Number {n}?" for n in range(24)
    ]
