"""Checkpoints that a killed run left: which of them is whole, and whether it belongs to this run."""

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

# What resuming reads; where one of them is missing, transformers may go on without it and not say so.
NEEDED = {
    "adapter_config.json": ["adapter_config.json"],
    "adapter_model.safetensors": ["adapter_model.safetensors"],
    "optimizer.pt": [
        "optimizer.pt",
        "optimizer.bin",
        "optimizer_*",
        "global_step*",
    ],  # of one process, FSDP's two forms, DeepSpeed's
    "scheduler.pt": ["scheduler.pt"],
    "rng_state.pth": ["rng_state.pth", "rng_state_*.pth"],
    "trainer_state.json": ["trainer_state.json"],  # the last that is written
}
SETTINGS = (
    "model",
    "model_revision",
    "dataset",
    "dataset_revision",
    "train_split",
    "pixel_budget",
    "four_bit",
)
SETTINGS += ("lora_rank", "lora_alpha", "lora_target")
ARGUMENTS = (
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
    """Whether the file `path` is not whole. PyTorch's files are zip archives with a checksum for each part, so any changed byte of
    a tensor is found there; of safetensors the header and the length are compared, which finds what was cut off."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is not None
    except (
        ValueError,
        EOFError,
        RuntimeError,
        SafetensorError,
        zipfile.BadZipFile,
    ):  # zipfile meets damage in many ways
        return True
    return False


def damage(checkpoint):
    """What is wrong with the folder `checkpoint` ("optimizer.pt is missing", "… is empty", "… is damaged"), or None: it is whole."""
    for name, patterns in NEEDED.items():
        if not any(next(checkpoint.glob(pattern), None) for pattern in patterns):
            return f"{name} is missing"
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if unreadable(path):
            return (
                f"{path.relative_to(checkpoint)} is {'damaged' if path.stat().st_size else 'empty'}"
            )
    return None


def newest_first(output):
    """The folders `checkpoint-<step>` in `output`, whole or not."""
    folders = [
        path
        for path in Path(output).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return sorted(folders, key=step, reverse=True)


def step(checkpoint):
    """The optimizer steps that were done when `checkpoint` was saved."""
    return int(checkpoint.name.split("-")[1])


def recorded(checkpoint):
    """What `Origin` wrote into `checkpoint`: {"values", "saved_at"}; {} when it was saved without one."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state.get("stateful_callbacks", {}).get("Origin", {}).get("attributes", {})


def last_checkpoint(output):
    """The whole checkpoint in `output` that was saved last: not that of an earlier, longer run into the same folder.

    A warning names the damaged ones that went further, and what is wrong with them; FileNotFoundError when none is whole.
    """
    problems = {checkpoint: damage(checkpoint) for checkpoint in newest_first(output)}
    whole = [checkpoint for checkpoint, problem in problems.items() if not problem]
    last = max(whole, key=lambda checkpoint: recorded(checkpoint).get("saved_at", 0), default=None)
    further = [
        f"{path.name} ({problem})"
        for path, problem in problems.items()
        if problem and (last is None or step(path) > step(last))
    ]
    if last is None:
        found = f"no whole one: {', '.join(further)}" if further else "no checkpoint"
        raise FileNotFoundError(
            f"nothing to resume: {output} holds {found}; train without resuming (no --resume, resume=False)"
        )
    if further:
        warnings.warn(
            f"{output}: passed over {', '.join(further)}; going on from {last.name}", stacklevel=2
        )
    return last


def put_in_place(new, folder):
    """Rename the folder `new` to `folder` and delete what stood there: killed in between, `folder` is the old, the new or none."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def origin(settings, arguments, rows):
    """{name: value} of what decides where a run ends: `settings` of the profile, training `arguments`, how many `rows` there are.
    Rows that were edited but not counted otherwise are not noticed."""
    values = {name: getattr(settings, name) for name in SETTINGS} | {
        name: getattr(arguments, name) for name in ARGUMENTS
    }
    values["pairs a step"] = (
        arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    )
    values["rows"] = len(rows) if hasattr(rows, "__len__") else "a stream"
    return json.loads(json.dumps(values))  # as it will be read back


class Origin(TrainerCallback, ExportableState):
    """Writes `values`, what `origin` returned, and the time into the trainer_state.json of every checkpoint."""

    def __init__(self, values):
        self.values = values

    def state(self):
        return {"args": {}, "attributes": {"values": self.values, "saved_at": time.time()}}


def check_origin(checkpoint, values):
    """ValueError that names each setting in which `checkpoint` was made with another value than `values`, what `origin` returns."""
    made = recorded(checkpoint).get("values")
    if made is None:
        raise ValueError(
            f"{checkpoint} does not say with which settings it was made: train without resuming, into another folder"
        )
    other = [
        f"{name} was {made.get(name)!r} and is {value!r}"
        for name, value in values.items()
        if made.get(name) != value
    ]
    if other:
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings ({'; '.join(other)}): "
            "resume with those, or train into another output folder"
        )
