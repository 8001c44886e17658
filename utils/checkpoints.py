"""Checkpoints of an interrupted run: which of them is whole, and does it belong to this run?"""

import json
import re
import shutil
import time
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

# What resuming reads, with the patterns of its files. Where one is missing, transformers may go on
# without it and not say so.
NEEDED = {
    "adapter_config.json": ["adapter_config.json"],
    "adapter_model.safetensors": ["adapter_model.safetensors"],
    # Of one process, FSDP's two forms, DeepSpeed's.
    "optimizer.pt": ["optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"],
    "scheduler.pt": ["scheduler.pt"],
    "rng_state.pth": ["rng_state.pth", "rng_state_*.pth"],
    "trainer_state.json": ["trainer_state.json"],  # written last
}
# Fields of `Settings` and arguments of `DPOConfig` that decide which adapter a run ends at.
RUN_SETTINGS = (
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
)
RUN_ARGUMENTS = (
    "learning_rate",
    "beta",
    "loss_type",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
)


def unreadable(path):
    """Return whether the file `path` is damaged.

    PyTorch's files are zip archives with a checksum for each part, so any changed byte of a tensor
    is found. Of safetensors, header and length are compared, which finds a file that was cut off.
    """
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is not None
    # zipfile reports damage with several kinds of error.
    except (ValueError, EOFError, RuntimeError, SafetensorError, zipfile.BadZipFile):
        return True
    return False


def damage(checkpoint):
    """Return what is wrong with the folder `checkpoint`, or None when it is whole.

    For example "optimizer.pt is missing", "… is empty" or "… is damaged".
    """
    for name, patterns in NEEDED.items():
        if not any(list(checkpoint.glob(pattern)) for pattern in patterns):
            return f"{name} is missing"
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and unreadable(path):
            problem = "damaged" if path.stat().st_size else "empty"
            return f"{path.relative_to(checkpoint)} is {problem}"
    return None


def newest_first(output):
    """Return the folders `checkpoint-<step>` in `output`, whole or not, latest step first."""
    folders = []
    for path in Path(output).glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name):
            folders.append(path)
    return sorted(folders, key=steps_done, reverse=True)


def steps_done(checkpoint):
    """Return how many optimizer steps were done when `checkpoint` was saved."""
    return int(checkpoint.name.split("-")[1])


def recorded_origin(checkpoint):
    """Return what `Origin` wrote into `checkpoint`: {"values", "saved_at"}, or {} without one."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state.get("stateful_callbacks", {}).get("Origin", {}).get("attributes", {})


def last_checkpoint(output):
    """Return the whole checkpoint in `output` that was saved last.

    This need not be the one with the most steps: an earlier, longer run into the same folder may
    have left that. Warns about damaged checkpoints that went further, and says what is wrong with
    each. Raises FileNotFoundError when no checkpoint is whole.
    """
    last = None
    last_saved_at = -1
    damaged = []
    for checkpoint in newest_first(output):
        problem = damage(checkpoint)
        if problem:
            damaged.append((checkpoint, problem))
            continue
        saved_at = recorded_origin(checkpoint).get("saved_at", 0)
        if saved_at > last_saved_at:
            last = checkpoint
            last_saved_at = saved_at

    further = []
    for checkpoint, problem in damaged:
        if last is None or steps_done(checkpoint) > steps_done(last):
            further.append(f"{checkpoint.name} ({problem})")
    if last is None:
        found = f"no whole checkpoint: {', '.join(further)}" if further else "no checkpoint"
        raise FileNotFoundError(
            f"nothing to resume: {output} holds {found}; "
            "train without resuming (no --resume, resume=False)"
        )
    if further:
        warnings.warn(
            f"{output}: skipping {', '.join(further)}; resuming from {last.name}", stacklevel=2
        )
    return last


def put_in_place(new, folder):
    """Rename the folder `new` to `folder` and delete what `folder` held.

    Killed in between, `folder` is the old one, the new one, or absent.
    """
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def pairs_per_step(arguments):
    """Return how many pairs an optimizer step uses, over all processes."""
    micro_batch = arguments.train_batch_size
    return micro_batch * arguments.gradient_accumulation_steps * arguments.world_size


def origin(settings, arguments, rows):
    """Return what decides which adapter a run ends at, as {name: value} of JSON.

    Rows are only counted: a row that was edited goes unnoticed.
    """
    values = {}
    for name in RUN_SETTINGS:
        values[name] = getattr(settings, name)
    for name in RUN_ARGUMENTS:
        values[name] = getattr(arguments, name)
    values["pairs a step"] = pairs_per_step(arguments)
    values["rows"] = len(rows) if hasattr(rows, "__len__") else "a stream"
    return json.loads(json.dumps(values))  # in the form in which it will be read back


class Origin(TrainerCallback, ExportableState):
    """Write the `values` that `origin` returns, and the time, into every trainer_state.json."""

    def __init__(self, values):
        self.values = values

    def state(self):
        return {"args": {}, "attributes": {"values": self.values, "saved_at": time.time()}}


def check_origin(checkpoint, values):
    """Raise ValueError when `checkpoint` was not made with the `values` that `origin` returns.

    The error names each setting that differs, with both values.
    """
    made = recorded_origin(checkpoint).get("values")
    if made is None:
        raise ValueError(
            f"{checkpoint} does not say which settings it was made with: "
            "train without resuming, into another folder"
        )
    changed = []
    for name, value in values.items():
        if made.get(name) != value:
            changed.append(f"{name} was {made.get(name)!r} and is {value!r}")
    if changed:
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings ({'; '.join(changed)}): "
            "resume with those settings, or train into another output folder"
        )
