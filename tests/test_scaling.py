"""accelerate understands the configuration files; a stream has every row once.

tests/slow/test_scaling_runs.py trains on two processes and resumes streams.
"""

import os
import re
from itertools import pairwise
from unittest import mock

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import load_dataset

from utils import chat, layouts, preferences
from utils.settings import EMBEDDED_DATASET, ROOT, locate

CONFIGS = ROOT / "configs" / "accelerate"
KINDS = {
    "two_processes": "multi_gpu",
    "fsdp_qlora": "use_fsdp",
    "deepspeed_zero2": "use_deepspeed",
    "deepspeed_zero3": "use_deepspeed",
}
every_config = pytest.mark.parametrize("name", KINDS)


def path_of(name):
    return CONFIGS / f"{name}.yaml"


def launched(name):
    """Return the arguments that `accelerate launch` makes of the file, as `launch_command` does."""
    command = ["--config_file", str(path_of(name)), "-m", "scripts.train"]
    arguments = launch_command_parser().parse_args(command)
    return _validate_launch_command(arguments)[0]


def test_no_configuration_is_left_out_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(KINDS)


@every_config
def test_accelerate_understands_every_key(name):
    config = load_config_from_file(str(path_of(name)))  # refuses unknown keys of the first level
    known = vars(launch_command_parser().parse_args(["scripts.train"]))
    # accelerate takes the keys below that level as they come: a misspelled one does nothing.
    for key in (*config.fsdp_config, *config.deepspeed_config):
        assert key in known, f"accelerate launch has no argument {key}"
    arguments = launched(name)
    assert arguments.num_processes == 2
    for kind in ("multi_gpu", "use_fsdp", "use_deepspeed"):
        assert getattr(arguments, kind) == (kind == KINDS[name])


@every_config
def test_every_file_says_how_to_use_it_and_explains_its_inner_lines(name):
    text = path_of(name).read_text()
    assert (
        f"accelerate launch --config_file configs/accelerate/{name}.yaml -m scripts.train" in text
    )
    lines = text.splitlines()
    for before, line in pairwise(lines):
        if re.match(r"  \w", line):
            assert "#" in line or before.startswith("  #"), line
    assert yaml.safe_load(text)["compute_environment"] == "LOCAL_MACHINE"


def test_fsdp_takes_every_value():
    environment = prepare_multi_gpu_env(launched("fsdp_qlora"))
    needing_a_gpu = ("FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_SYNC_MODULE_STATES")
    assert [environment[name] for name in needing_a_gpu] == ["true", "true"]
    with mock.patch.dict(os.environ, environment | dict.fromkeys(needing_a_gpu, "false")):
        plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.use_orig_params) == (1, False)
    assert (plugin.sharding_strategy or plugin.reshard_after_forward).name == "FULL_SHARD"
    assert "transformer" in str(plugin.auto_wrap_policy)
    # Of shards, trainer.save_model would write nothing, without a word.
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


def test_a_stream_by_row_group_has_every_row_once_and_reads_one_group_at_a_time(tmp_path):
    questions = [f"Number {number}?" for number in range(24)]
    rows = load_dataset(locate(EMBEDDED_DATASET), split="train[:24]").remove_columns("question")
    path = str(tmp_path / "pairs.parquet")
    rows.add_column("question", questions).to_parquet(path, batch_size=4)
    stream = preferences.load(path, streaming=True).reshard()
    assert stream.num_shards == 6, "24 rows in groups of 4"
    asked = [layouts.text_of(row["prompt"]) for row in chat.format_dataset(stream)]
    assert asked == questions
