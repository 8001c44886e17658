"""What can be told of a trainer without running it, as rows of `preflight`: libraries, device, rate, adapter, room for checkpoints."""

import gc
import math
import shutil
import tempfile
from pathlib import Path

import torch
from packaging.requirements import Requirement
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from utils import versions
from utils.models import trainable_by_part
from utils.settings import ROOT

OK, WARNING, FAILED = "ok", "warning", "failed"
IN_FLOAT32 = "keep what trains in float32: training.make_trainer does it"
LOWEST_RATE, HIGHEST_RATE = (
    5e-6,
    1e-3,
)  # below, an adapter stays where it is in a run of usual length; above, it is ruined


def row(check, result, found, advice=""):
    return {
        "check": check,
        "result": result,
        "found": found,
        "what to do": "" if result == OK else advice,
    }


def packages():
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    needed = [
        need for need in map(Requirement, lines) if need.name != "jupyterlab"
    ]  # Colab has a notebook of its own
    there = versions(*(need.name for need in needed))
    old = [
        f"{need}, here {there[need.name]}"
        for need in needed
        if not need.specifier.contains(there[need.name], prereleases=True)
    ]
    found = ", ".join(
        f"{name} {there[name]}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")
    )
    return row(
        "versions",
        FAILED if old else OK,
        "; ".join(old) or found,
        "install requirements.txt, then restart Python",
    )


def device(trainer):
    place, weights = (
        trainer.args.device,
        sum(parameter.numel() for parameter in trainer.model.parameters()),
    )
    if place.type == "cuda":
        return row("device", OK, torch.cuda.get_device_name(place))
    if torch.cuda.is_available():
        return row("device", WARNING, f"{place.type}, although there is a GPU", "use_cpu=False")
    return row(
        "device",
        WARNING if weights > 1e9 else OK,
        place.type,
        f"use a GPU: this model has {weights / 1e9:.1f} billion weights",
    )


def precision(trainer):
    """Whether the device has what is computed in, and whether small updates of what trains can be kept."""
    args, gpu = trainer.args, trainer.args.device.type == "cuda"
    kinds = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    kept = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)) or "nothing"
    found = f"computes in {'bfloat16' if args.bf16 else 'float16' if args.fp16 else 'float32'}, trains weights in {kept}"
    if args.bf16 and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        return row(
            "precision",
            FAILED,
            f"{found}; this GPU only emulates bfloat16, slowly",
            "bf16=False, fp16=True",
        )
    if args.fp16 and torch.float16 in kinds:
        return row("precision", FAILED, f"{found}, where gradients overflow", IN_FLOAT32)
    if kinds & {torch.float16, torch.bfloat16}:
        return row("precision", WARNING, f"{found}, where small updates vanish", IN_FLOAT32)
    if (args.bf16 or args.fp16) != gpu:
        return row(
            "precision",
            WARNING,
            f"{found}, which is slow here",
            "bf16=True or fp16=True" if gpu else "bf16=False, fp16=False",
        )
    return row("precision", OK, found)


def learning_rate(trainer):
    rate, adapter = trainer.args.learning_rate, isinstance(trainer.model, PeftModel)
    if not adapter:
        return row(
            "learning rate",
            WARNING if rate > LOWEST_RATE else OK,
            f"{rate:g}, without an adapter",
            "about 1e-6",
        )
    advice = "1e-5 to 1e-4, 3e-4 for a very small model"
    if rate < LOWEST_RATE:
        return row(
            "learning rate",
            FAILED,
            f"{rate:g} is for training all weights; an adapter hardly moves",
            advice,
        )
    return row("learning rate", WARNING if rate > HIGHEST_RATE else OK, f"{rate:g}", advice)


def trainable(trainer, parts):
    counts = {part: some for part, (some, _) in trainable_by_part(trainer.model).items()}
    found = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    if not any(counts.values()):
        return row(
            "trainable weights", FAILED, "none", "peft_config=training.lora_config(settings)"
        )
    if wrong := [part for part, count in counts.items() if count and part not in parts]:
        advice = f"target_modules=settings.lora_target; where it is meant, preflight(trainer, parts={(*parts, *wrong)})"
        return row(
            "trainable weights", FAILED, f"{found}: {' and '.join(wrong)} would change too", advice
        )
    names = [
        name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad
    ]
    stray = [name for name in names if "lora_" not in name and "modules_to_save" not in name]
    if isinstance(trainer.model, PeftModel) and stray:
        advice = "model.requires_grad_(False) before the trainer is made: the reference would change with them"
        return row(
            "trainable weights", FAILED, f"{found}; not the adapter's: {some_of(stray)}", advice
        )
    return row("trainable weights", OK, found)


def one_adapter(trainer):
    """Whether the model carries one adapter, and got it from the trainer."""
    model = trainer.model
    if not isinstance(model, PeftModel):
        return row("one adapter", OK, "none")
    gc.collect()  # what nobody can use any more does no harm
    base, names = model.get_base_model(), list(model.peft_config)
    wrappers = [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), PeftModel) and thing is not model
    ]
    layers = [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    foreign = sorted(set(layers) - set(getattr(model.base_model, "targeted_module_names", layers)))
    moved = any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)
    left_over = {
        "one adapter wraps another": isinstance(base, PeftModel),
        "the model was wrapped before, and its old wrapper is still in use": any(
            w.get_base_model() is base for w in wrappers
        ),
        f"adapters {', '.join(names)}": not {"default", "ref"}.issuperset(names),
        "the reference is a copy of a new adapter, not the model itself": "ref" in names
        and not moved,
        f"{len(foreign)} layers carry one that target_modules does not name: {some_of(foreign)}": bool(
            foreign
        ),
    }
    found = [problem for problem, holds in left_over.items() if holds]
    right = f"on {len(layers)} layers" + (
        "; the reference is a frozen copy of it" if "ref" in names else ""
    )
    advice = (
        "load the model again and leave get_peft_model out: the trainer wraps it, by peft_config"
    )
    return row(
        "one adapter",
        FAILED if found else OK,
        f"left-over get_peft_model: {found[0]}" if found else right,
        advice,
    )


def some_of(names):
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def size(count):
    """A number of bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def checkpoints(trainer):
    """Whether there is room for the checkpoints that stand side by side (adapter and AdamW's two moments), and a right to write."""
    args, dataset, output = (
        trainer.args,
        trainer.train_dataset,
        Path(trainer.args.output_dir).resolve(),
    )
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return row(
            "checkpoints",
            FAILED,
            f"{args.output_dir} cannot be written: {error.strerror}",
            "choose another output_dir",
        )
    pairs = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = len(dataset) * args.num_train_epochs if hasattr(dataset, "__len__") else 0
    steps = args.max_steps if args.max_steps > 0 else math.ceil(rows / pairs)
    count = 0 if args.save_strategy == "no" else math.ceil(steps / max(1, args.save_steps))
    count = min(
        count, (args.save_total_limit or math.inf) + 1
    )  # the oldest goes when the next is complete
    trained = sum(
        parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad
    )
    needed, free = 4 * trained * (3 * count + 1), shutil.disk_usage(place).free
    found = f"{count} of {size(12 * trained)} at a time, then the adapter; {size(free)} free"
    return row(
        "checkpoints",
        FAILED if needed > free else OK,
        found,
        "a smaller save_total_limit, or an output_dir elsewhere",
    )


def at_rest(trainer, parts):
    """All rows of this module; `parts` of the model are meant to train."""
    rows = [packages(), device(trainer), precision(trainer), learning_rate(trainer)]
    return [*rows, trainable(trainer, parts), one_adapter(trainer), checkpoints(trainer)]
