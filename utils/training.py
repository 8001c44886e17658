"""Train an adapter with TRL's `DPOTrainer`: its configuration, the trainer, resuming and saving."""

import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import IterableDataset
from peft import LoraConfig, PeftModel
from transformers import PrinterCallback, set_seed
from trl import DPOConfig, DPOTrainer

from utils import checkpoints, plan, versions
from utils.models import compute_dtype
from utils.progress import watched
from utils.shared_prefix import SharedPrefixDPOTrainer

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def lora_config(settings):
    """Return the `LoraConfig` that adapts the linear layers of the language model.

    The vision tower and the connector stay as they are.
    """
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=settings.lora_target,
    )


def share_of_batch(settings, processes):
    """Return (pairs per micro-batch, micro-batches per optimizer step) for each of `processes`.

    An optimizer step uses as many pairs as it would on a single process, so learning rate and
    number of steps stay right. Raises ValueError when the pairs cannot be shared evenly.
    """
    pairs = settings.batch_size * settings.gradient_accumulation
    if pairs % processes:
        raise ValueError(
            f"{processes} processes cannot evenly share the {pairs} pairs of an optimizer step "
            f"(batch_size × gradient_accumulation): start a number of processes that divides "
            f"{pairs}, or change the profile in utils/settings.py"
        )
    pairs_per_process = pairs // processes
    # Never more than one device holds according to the profile.
    micro_batch = math.gcd(settings.batch_size, pairs_per_process)
    return micro_batch, pairs_per_process // micro_batch


def dpo_config(settings, output, **changes):
    """Return the profile's `DPOConfig`; `changes` are arguments that replace the profile's."""
    dtype = compute_dtype()
    micro_batch, accumulation = share_of_batch(settings, plan.processes())
    arguments = {
        "output_dir": str(output),
        "beta": settings.beta,
        # TRL's default is meant for full fine-tuning and hardly moves an adapter.
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup_steps,
        "max_length": None,  # TRL's default would cut off image tokens
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_num_workers": plan.image_workers(),
        # Set explicitly: transformers would hide the bar because this package quiets its log.
        "disable_tqdm": not watched(),
        "logging_steps": settings.logging_steps,
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        # TRL's True is for batches without images. Here only the language model has an adapter,
        # and every batch uses all of it.
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "seed": settings.seed,
    }
    arguments.update(changes)
    return DPOConfig(**arguments)


def make_trainer(
    settings,
    model,
    processor,
    train_rows,
    output,
    validation_rows=None,
    callbacks=None,
    continue_adapter=False,
    shared_prefix=None,
    **changes,
):
    """Return a `DPOTrainer` on formatted rows.

    The reference is `model` with its adapter switched off, so there is no second copy.

    - `train_rows`: a `Dataset`, or an `IterableDataset`, which needs `max_steps` and starts over
      when it ends.
    - `continue_adapter`: train the adapter that `load_tuned` put on `model`; the reference is then
      a frozen copy of it, named "ref". Otherwise `model` must not carry an adapter.
    - `shared_prefix`: True for the faster `SharedPrefixDPOTrainer`, which computes the same loss;
      None for what `settings.shared_prefix` says.
    - `changes`: arguments of `DPOConfig` that replace the profile's.

    Raises ValueError when `model` carries an adapter that it must not carry, or lacks one, and
    when the rows have a column `rejected_images`.
    """
    if isinstance(train_rows, IterableDataset):
        # transformers counts the batches of a stream but not its passes: resumed in the second
        # pass, it would start that pass over. Repeated, the stream has a single endless pass.
        train_rows = train_rows.repeat(None)
        changes = {"dataloader_num_workers": 0} | changes  # workers would share out its files
    if continue_adapter:
        if not isinstance(model, PeftModel) or list(model.peft_config) != ["default"]:
            raise ValueError(
                "continue_adapter=True needs a model with exactly one adapter: "
                "load it with load_tuned(settings, folder)"
            )
        model.set_adapter("default")  # load_tuned froze it
    elif isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        # Wrapped twice, its answers as the base would still use the first adapter.
        raise ValueError(
            "the model already carries an adapter: load a fresh one with load_model(settings); "
            "the trainer adds the adapter itself"
        )
    for rows in (train_rows, validation_rows):
        refuse_rejected_images(rows)
    if shared_prefix is None:
        shared_prefix = settings.shared_prefix
    trainer_class = SharedPrefixDPOTrainer if shared_prefix else DPOTrainer
    set_seed(settings.seed)  # TRL creates the adapter before the trainer sets any seed
    arguments = dpo_config(settings, output, **changes)
    origin = checkpoints.Origin(checkpoints.origin(settings, arguments, train_rows))
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=processor,
        peft_config=None if continue_adapter else lora_config(settings),
        callbacks=[*(callbacks or []), origin],
    )
    trainer.settings = settings  # for preflight
    if trainer.args.disable_tqdm:  # without a bar transformers would print every log entry
        trainer.remove_callback(PrinterCallback)
    keep_adapter_in_float32(trainer.model, continue_adapter)
    return trainer


def refuse_rejected_images(rows):
    """Raise ValueError when `rows`, a data set or None, have a column `rejected_images`."""
    if rows is None:
        return
    names = rows.column_names or next(iter(rows), ())  # a stream may not know them
    if "rejected_images" in names:
        raise ValueError(
            "the rows have a column rejected_images, but DPO compares two answers to the same "
            'images: drop it with rows.remove_columns("rejected_images") if the answers differ too'
        )


def keep_adapter_in_float32(model, continued):
    """Cast what trains in `model` back to float32, in place.

    TRL casts the adapter of a 4-bit model to bfloat16, where small updates vanish in rounding.
    The cast has already rounded a `continued` adapter; its copy "ref" still has the exact values.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exact = parameter
        if continued:
            exact = model.get_parameter(name.replace(".default.", ".ref."))
        parameter.data = exact.data.float().clone()


def train(settings, trainer, resume=False):
    """Train, write `adapter/` and `training.json` into the output folder, return the latter.

    `resume=True` goes on from the last whole checkpoint in the output folder and ends at the same
    adapter as an uninterrupted run. Raises FileNotFoundError when there is no such checkpoint, and
    ValueError when it was made with other settings. Killed at any moment, a run leaves a whole
    `adapter/` or none.
    """
    output = Path(trainer.args.output_dir)
    checkpoint = None
    first_step = 0
    if resume:
        checkpoint = checkpoints.last_checkpoint(output)
        origin = checkpoints.origin(settings, trainer.args, trainer.train_dataset)
        checkpoints.check_origin(checkpoint, origin)
        first_step = checkpoints.steps_done(checkpoint)

    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    # Every process calls this, since the adapter may be spread over them; the first one writes.
    trainer.save_model(str(output / "adapter.new"))

    steps = trainer.state.global_step
    pairs_per_step = checkpoints.pairs_per_step(trainer.args)
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    record = {
        "steps": steps,
        "pairs": pairs_seen(trainer),
        "seconds": seconds,
        "pairs_per_second": (steps - first_step) * pairs_per_step / seconds,
        "final": losses[-1] if losses else {},
        "log": trainer.state.log_history,
        "versions": versions(*LIBRARIES),
        "settings": asdict(settings),
    }
    if trainer.is_world_process_zero():
        put_run_in_place(output, record)
    return record


def pairs_seen(trainer):
    """Return how many pairs `trainer` has trained on, each counted in every pass."""
    pairs = trainer.state.global_step * checkpoints.pairs_per_step(trainer.args)
    if isinstance(trainer.train_dataset, IterableDataset):
        return pairs
    # The last step of a pass may have fewer pairs than the others.
    passes = max(1, trainer.state.epoch or 1)
    return min(pairs, round(len(trainer.train_dataset) * passes))


def put_run_in_place(output, record):
    """Rename `adapter.new` in the folder `output` to `adapter`, and write training.json."""
    saved = output / "adapter.new"
    # The reference of a continued adapter is the adapter it started from; nobody needs it twice.
    shutil.rmtree(saved / "ref", ignore_errors=True)
    # The record of an earlier run must never lie beside the adapter of this one.
    (output / "training.json").unlink(missing_ok=True)
    checkpoints.put_in_place(saved, output / "adapter")
    unfinished = output / "training.json.new"
    unfinished.write_text(json.dumps(record, indent=1))
    unfinished.rename(output / "training.json")
