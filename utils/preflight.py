"""Look at a trainer before hours are spent on it: what would go wrong, found in seconds, with nothing about it changed."""

import dataclasses
import math

import bitsandbytes as bnb
import psutil  # comes with accelerate
import torch

from utils import chat, memory, trial_step
from utils.display import MARKS, TEXT_CELL, text_html
from utils.display import show as show_html
from utils.trainer_checks import FAILED, OK, WARNING, at_rest, row, size, some_of


def preflight(trainer, parts=("language",)):
    """What is right and wrong about `trainer` (a `DPOTrainer`) before `trainer.train()`: a list of rows for `show` and `as_text`.

    A row is {"check", "result": "ok" | "warning" | "failed", "found", "what to do"}. `parts`: what is meant to train (keys of
    `trainable_by_part`). One step on the longest rows is computed and undone: the trainer is left as it was. An error in it becomes
    a row too. The token budget and the estimate of memory need the profile: `trainer.settings`, which `make_trainer` sets.
    """
    rows = at_rest(trainer, parts)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return [
            *rows,
            row(
                "one step",
                WARNING,
                "not computed: processes share out the model",
                "run preflight in one process as well",
            ),
        ]
    try:
        with trial_step.left_as_it_was(trainer):
            for found in in_motion(trainer):
                rows.append(found)
    except Exception as error:  # whatever it is, it would stop the training too
        advice = "see the failed rows above, or trainer.train() for the whole error"
        rows.append(
            row("one step", FAILED, f"{type(error).__name__}: {str(error).strip()[:300]}", advice)
        )
    return rows


def in_motion(trainer):
    """The rows that need batches, each as soon as it is known: what comes later may raise."""
    processor, settings = trainer.processing_class, getattr(trainer, "settings", None)
    pairs, limit = trial_step.longest_rows(trainer), trial_step.max_length(trainer)
    lengths = [chat.count_tokens(trial_step.pair_of(pair), processor) for pair in pairs]
    yield budget(trainer, lengths, settings)
    own, stock = trial_step.batches(trainer, pairs[: trainer.args.per_device_train_batch_size])
    yield cut(limit, max(lengths), stock["completion_mask"].sum(1))
    images = (stock["input_ids"] == chat.image_token_id(processor)).sum(1)
    yield image_tokens(int(images.sum()), trial_step.count_features(trainer, stock), limit)
    yield memory_left(trainer, settings, max(1, max(lengths) - int(images.max())))
    yield reference(
        trainer,
        trial_step.reference_logps(trainer, own),
        trial_step.adapter_off_logps(trainer, stock),
    )
    loss, log_ratio, largest = trial_step.step(trainer, own)
    yield first_loss(trainer, loss, log_ratio)
    yield gradients(trainer, largest)


def budget(trainer, lengths, settings):
    dataset = trainer.train_dataset
    total = (
        f"the {len(lengths)} longest of {len(dataset):,} rows"
        if hasattr(dataset, "__len__")
        else f"the first {len(lengths)} rows"
    )
    found = f"{total} have up to {max(lengths)} tokens"
    if settings is None:
        return row(
            "row length",
            WARNING,
            f"{found}; no token budget is known",
            "trainer.settings = settings, your profile",
        )
    over = sum(length > settings.token_budget for length in lengths)
    found += (
        f"; {over} are over the budget of {settings.token_budget}"
        if over
        else f"; the budget is {settings.token_budget}"
    )
    return row(
        "row length",
        FAILED if over else OK,
        found,
        "chat.within_budget(rows, processor, settings.token_budget) drops them",
    )


def cut(limit, longest, answers):
    """Whether `limit` cuts rows; `answers`: how many tokens of each answer are left."""
    found, result = (
        f"{limit}; the longest row has {longest} tokens",
        OK if limit is None or limit >= longest else WARNING,
    )
    if gone := int((answers == 0).sum()):
        found, result = f"{found}; nothing is left of {gone} of {len(answers)} answers", FAILED
    return row(
        "max_length",
        result,
        found,
        "max_length=None, and chat.within_budget for long rows: a cut answer teaches not to stop",
    )


def image_tokens(tokens, features, limit):
    advice = "processor and model do not belong together: load both from the same name and revision"
    if limit is not None and tokens < features:
        advice = f"max_length=None: {limit} cuts image tokens off"
    return row(
        "image tokens",
        OK if tokens == features else FAILED,
        f"{tokens} for {features} features of the model",
        advice,
    )


def free_bytes(place):
    """Memory that a step could still take on `place` (torch.device)."""
    if place.type != "cuda":
        return psutil.virtual_memory().available
    return (
        torch.cuda.mem_get_info(place)[0]
        + torch.cuda.memory_reserved(place)
        - torch.cuda.memory_allocated(place)
    )


def memory_left(trainer, settings, text_tokens):
    """The estimate without weights and adapter, which are there already, against what is free."""
    args, free = trainer.args, free_bytes(trainer.args.device)
    if settings is None:
        return row(
            "memory",
            WARNING,
            f"{size(free)} free; no profile to estimate from",
            "trainer.settings = settings, your profile",
        )
    changes = {
        "batch_size": args.per_device_train_batch_size,
        "gradient_checkpointing": args.gradient_checkpointing,
    }
    try:
        parts = memory.estimate(
            dataclasses.replace(settings, **changes), text_tokens, gpu=args.device.type == "cuda"
        )
    except ValueError as error:
        return row("memory", WARNING, f"{size(free)} free; {error}", "watch the first steps")
    needed = sum(count for name, count in parts.items() if name not in ("weights", "adapter"))
    found = f"a step takes up to {size(needed)}, {size(free)} are free"
    advice = "a smaller batch_size with more gradient_accumulation, gradient_checkpointing=True, or a smaller pixel_budget"
    return row(
        "memory", FAILED if needed > free else WARNING if needed > 0.9 * free else OK, found, advice
    )


def reference(trainer, used, off):
    """Whether the reference is the model with its adapter off. Two ways of computing differ by rounding, most of all in 16 bit."""
    if "ref" in getattr(trainer.model, "peft_config", {}):
        return row("reference", OK, "a frozen copy of the adapter that is trained on")
    apart, exact = (used - off).abs().max().item(), not (trainer.args.bf16 or trainer.args.fp16)
    close = apart < (0.01 if exact else 0.1 + 0.02 * off.abs().max().item())
    advice = "leave ref_model out, and delete log-probabilities kept on disk; if that does not help, shared_prefix=False"
    return row(
        "reference",
        OK if close else FAILED,
        f"{apart:.1g} nats from the model with its adapter off",
        advice,
    )


def first_loss(trainer, loss, log_ratio):
    """Policy and reference are equal at the start, whatever the loss; the sigmoid loss of the DPO paper is then ln 2."""
    plain = (
        trainer.loss_types == ["sigmoid"]
        and trainer.loss_weights == [1.0]
        and not trainer.use_weighting
    )
    meant = f"ln 2 = {math.log(2):.4f}" if plain else f"loss_type {', '.join(trainer.loss_types)}"
    equal = abs(log_ratio) < (
        0.5 if trainer.args.bf16 or trainer.args.fp16 else 0.01
    ) and math.isfinite(loss)
    right = equal and (not plain or abs(loss - math.log(2)) < 0.01)
    advice = "a new adapter must change nothing: load the model again; a trained one needs continue_adapter=True"
    return row(
        "first loss",
        OK if right else FAILED,
        f"{loss:.4f} ({meant}); policy − reference: {log_ratio:+.2g} nats",
        advice,
    )


def gradients(trainer, largest):
    """Whether a gradient arrives at every tensor that trains. LoRA's B begins at zero; until it has moved, its A gets exactly 0."""
    zero = {
        name
        for name, parameter in trainer.model.named_parameters()
        if "lora_B" in name and not parameter.any()
    }
    waiting = {
        name for name in largest if "lora_A" in name and name.replace("lora_A", "lora_B") in zero
    }
    must = {name for name in largest if "lora_" in name} - waiting
    silent = [
        name for name, size in largest.items() if size is None or (name in must and not size > 0)
    ]
    if silent:
        advice = "models.load_model keeps them flowing through 4-bit layers; with checkpointing: model.enable_input_require_grads()"
        return row(
            "gradients",
            FAILED,
            f"none at {len(silent)} of {len(largest)} tensors: {some_of(silent)}",
            advice,
        )
    four_bit = [
        module for module in trainer.model.modules() if isinstance(module, bnb.nn.Linear4bit)
    ]
    repacked = [
        module for module in four_bit if getattr(module, "support_avx512bf16_for_cpu", False)
    ]
    if repacked and trainer.args.device.type == "cpu":
        found = f"the first evaluation would repack {len(repacked)} 4-bit layers, and then none pass through them"
        return row(
            "gradients",
            FAILED,
            found,
            "models.keep_gradients_flowing(model), as models.load_model does",
        )
    found = f"arrive at {len(largest) - len(waiting)} of {len(largest)} tensors"
    return row(
        "gradients",
        OK,
        found
        + (f"; the other {len(waiting)} are LoRA's A, 0 until B has moved" if waiting else ""),
    )


def as_text(rows):
    """`rows` for a terminal: one to a line, what to do below it."""
    return "\n".join(
        f"{r['result']:<8}{r['check']}: {r['found']}"
        + f"\n{'':<8}→ {r['what to do']}" * bool(r["what to do"])
        for r in rows
    )


def show(rows):
    """Display `rows` as a table. What is not ok stands in colour; the words say it too."""
    head = "".join(
        f'<th scope="col" style="text-align:left">{text_html(name)}</th>' for name in rows[0]
    )
    style = {
        OK: TEXT_CELL,
        WARNING: f"{TEXT_CELL};background:rgba(230,159,0,0.2)",
        FAILED: f"{TEXT_CELL};{MARKS['del']}",
    }
    lines = [
        "".join(f'<td style="{style[r["result"]]}">{text_html(value)}</td>' for value in r.values())
        for r in rows
    ]
    show_html(
        f"<table><thead><tr>{head}</tr></thead><tbody><tr>{'</tr><tr>'.join(lines)}</tr></tbody></table>",
        as_text(rows),
    )
