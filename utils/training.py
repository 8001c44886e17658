"""QLoRA DPO with TRL: an adapter on the language model, the trainer, resuming and saving."""

import json
import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import IterableDataset
from peft import LoraConfig, PeftModel
from transformers import PrinterCallback, set_seed
from trl import DPOConfig, DPOTrainer

from utils import checkpoints, versions
from utils.models import compute_dtype
from utils.preflight import preflight as preflight  # `training.preflight(trainer)`, before `train`
from utils.progress import watched
from utils.shared_prefix import SharedPrefixDPOTrainer

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def lora_config(settings):
    """LoRA on the linear layers of the language model; the vision tower and the connector stay as they are."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=settings.lora_target,
    )


def share_of_batch(settings, processes):
    """(Pairs at a time, how many times a step) of each of `processes`: a step takes as many pairs as one process alone would take,
    so that learning rate and steps stay right however many there are. ValueError when the pairs cannot be shared evenly."""
    pairs = settings.batch_size * settings.gradient_accumulation
    if pairs % processes:
        raise ValueError(
            f"a step takes {pairs} pairs (batch_size × gradient_accumulation), which {processes} processes cannot share evenly: "
            f"start as many as divide {pairs}, or change the profile in utils/settings.py"
        )
    at_a_time = math.gcd(
        settings.batch_size, pairs // processes
    )  # never more than the profile says one device holds
    return at_a_time, pairs // processes // at_a_time


def dpo_config(settings, output, **changes):
    """The profile's `DPOConfig`; `changes` are arguments of `DPOConfig` that replace the profile's.

    `max_length=None`: TRL's default would cut image tokens. The learning rate is explicit: TRL's default is for full
    fine-tuning and leaves an adapter where it is.
    """
    dtype = compute_dtype()
    batch_size, accumulation = share_of_batch(
        settings, int(os.environ.get("WORLD_SIZE", 1))
    )  # set by `accelerate launch`
    arguments = {
        "output_dir": str(output),
        "beta": settings.beta,
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup_steps,
        "max_length": None,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": not watched(),  # transformers would show no bar, because this package keeps its log quiet
        "logging_steps": settings.logging_steps,
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "ddp_find_unused_parameters": False,  # TRL's True is for batches without images; here every batch uses the whole adapter
        "report_to": "none",
        "seed": settings.seed,
    }
    return DPOConfig(**(arguments | changes))


def make_trainer(
    settings,
    model,
    processor,
    train,
    output,
    test=None,
    callbacks=None,
    continue_adapter=False,
    shared_prefix=None,
    **changes,
):
    """A `DPOTrainer` on formatted rows. The reference model is `model` with the adapter switched off: there is no second copy.

    With `shared_prefix` (None: `settings.shared_prefix`) the faster `SharedPrefixDPOTrainer`, which computes the same loss.
    `model` must not carry an adapter yet (ValueError: wrapped twice, "base" answers would be an adapter's), unless
    `continue_adapter` says that the one from `load_tuned` is to be trained on; the reference is then a frozen copy of it
    ("ref"). TRL casts the adapter of a 4-bit model to bfloat16, where small updates vanish in rounding; here it is kept in
    float32, and what the cast rounded off a continued one is given back. A stream (`train` of type `IterableDataset`) needs
    `max_steps`, and begins again where it ends.
    """
    if isinstance(train, IterableDataset):
        train = train.repeat(
            None
        )  # transformers counts its batches but not its passes: resumed in the second, it would start that over
    if continue_adapter:
        if not isinstance(model, PeftModel) or list(model.peft_config) != ["default"]:
            raise ValueError(
                "continue_adapter=True needs a model with one adapter: load it with load_tuned(settings, folder)"
            )
        model.set_adapter("default")  # load_tuned froze it
    elif isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        raise ValueError(
            "the model already carries an adapter: load it again with load_model(settings), the trainer adds the adapter itself"
        )
    set_seed(settings.seed)  # the adapter is made before the trainer seeds anything
    shared_prefix = settings.shared_prefix if shared_prefix is None else shared_prefix
    arguments = dpo_config(settings, output, **changes)
    trainer = (SharedPrefixDPOTrainer if shared_prefix else DPOTrainer)(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        peft_config=None if continue_adapter else lora_config(settings),
        callbacks=[
            *(callbacks or []),
            checkpoints.Origin(checkpoints.origin(settings, arguments, train)),
        ],
    )
    trainer.settings = settings  # for preflight
    if trainer.args.disable_tqdm:  # without a bar transformers prints every log entry instead
        trainer.remove_callback(PrinterCallback)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            exact = (
                trainer.model.get_parameter(name.replace(".default.", ".ref."))
                if continue_adapter
                else parameter
            )
            parameter.data = exact.data.float().clone()
    return trainer


def train(trainer, settings, resume=False):
    """Train, then write `adapter/` and `training.json` into the trainer's output folder; returns what training.json holds.

    `resume=True` goes on from the last whole checkpoint there (`checkpoints.last_checkpoint`), to the same adapter, and stops with a
    ValueError where that was made with other settings. Killed at any moment, this leaves a whole `adapter/` or none.
    """
    output, checkpoint = Path(trainer.args.output_dir), None
    if resume:
        checkpoint = checkpoints.last_checkpoint(output)
        checkpoints.check_origin(
            checkpoint, checkpoints.origin(settings, trainer.args, trainer.train_dataset)
        )
    start, first_step = time.perf_counter(), checkpoints.step(checkpoint) if checkpoint else 0
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds, steps = time.perf_counter() - start, trainer.state.global_step
    saved = output / "adapter.new"
    trainer.save_model(
        str(saved)
    )  # by every process, because it may have to be put together; the first one writes
    pairs_per_step = (
        trainer.args.train_batch_size
        * trainer.args.gradient_accumulation_steps
        * trainer.args.world_size
    )
    pairs, rows = steps * pairs_per_step, trainer.train_dataset
    if not isinstance(rows, IterableDataset):  # the last step of a pass may have fewer
        pairs = min(pairs, round(len(rows) * max(1, trainer.state.epoch or 1)))
    log = trainer.state.log_history
    record = {
        "steps": steps,
        "pairs": pairs,
        "seconds": seconds,
        "pairs_per_second": (steps - first_step) * pairs_per_step / seconds,
        "final": next((entry for entry in reversed(log) if "loss" in entry), {}),
        "log": log,
        "versions": versions(*LIBRARIES),
        "settings": asdict(settings),
    }
    if trainer.is_world_process_zero():
        shutil.rmtree(
            saved / "ref", ignore_errors=True
        )  # the reference of a continued adapter is the one it began with
        (output / "training.json").unlink(
            missing_ok=True
        )  # an earlier run's never stands beside this one's adapter
        checkpoints.put_in_place(saved, output / "adapter")
        (output / "training.json.new").write_text(json.dumps(record, indent=1))
        (output / "training.json.new").rename(output / "training.json")
    return record
