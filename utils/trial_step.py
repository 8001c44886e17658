"""The pieces of one training step that is computed, looked at and undone: what `preflight` sees of a trainer in motion."""

import inspect
import itertools
import random
from collections import defaultdict
from contextlib import contextmanager, nullcontext

import numpy
import torch
from peft import PeftModel
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from utils.shared_prefix import backbone_of

ROWS = 8  # at least so many rows are looked at


@contextmanager
def left_as_it_was(trainer):
    """Within it, the model of `trainer` is as in training, and a loss can be computed that no other process waits for.

    Afterwards gradients, modes, metrics and random states are what they were; weights must not be changed.
    """
    model, args, accelerator = trainer.model, trainer.args, trainer.accelerator
    gradients, modes = (
        [(p, p.grad) for p in model.parameters()],
        [(m, m.training) for m in model.modules()],
    )
    metrics, tokens, states = (
        trainer._metrics,
        trainer._total_train_tokens,
        (random.getstate(), numpy.random.get_state()),
    )
    checkpoint = (
        args.gradient_checkpointing and not model.is_gradient_checkpointing
    )  # it is switched on by train()
    with torch.random.fork_rng():
        try:
            trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
            accelerator.gather = accelerator.gather_for_metrics = lambda values: values
            model.zero_grad(set_to_none=True)
            model.train()
            if checkpoint:
                model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
            yield
        finally:
            if checkpoint:
                model.gradient_checkpointing_disable()
            for module, mode in modes:
                module.training = mode
            for parameter, gradient in gradients:
                parameter.grad = gradient
            del accelerator.gather, accelerator.gather_for_metrics
            trainer._metrics, trainer._total_train_tokens = metrics, tokens
            random.setstate(states[0])
            numpy.random.set_state(states[1])


def longest_rows(trainer):
    """The rows of the training data with the longest texts, as the collator takes them, longest first; of a stream the first ones.

    As many as a device takes in a step, at least ROWS. ValueError when they hold no image.
    """
    dataset, count = trainer.train_dataset, max(ROWS, trainer.args.per_device_train_batch_size)
    if not trainer._is_vision_dataset:
        raise ValueError("the rows hold no image (column image or images)")
    if not hasattr(dataset, "__len__"):
        return list(itertools.islice(iter(dataset), count))
    texts = getattr(dataset, "datasets", (dataset,))[0].with_format(
        None
    )  # with a reference cache the rows are the first of two
    texts = texts.select_columns(["prompt", "chosen", "rejected"])  # text only: no image is decoded
    sizes = [
        len(str(text["prompt"])) + max(len(str(text["chosen"])), len(str(text["rejected"])))
        for text in texts
    ]
    return [
        dataset[number]
        for number in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)[:count]
    ]


def pair_of(row):
    """A row without the reference's log-probabilities that a cache puts beside it."""
    return dict(row[0] if isinstance(row, tuple) else row)


def max_length(trainer):
    """How many tokens of a row are kept, None for all: the collator decides, and where it does not say, the arguments do."""
    return getattr(trainer.data_collator, "max_length", trainer.args.max_length)


def batches(trainer, rows):
    """(The trainer's batch of `rows`, TRL's own, in which each image stands twice), on the trainer's device."""
    stock = DataCollatorForVisionPreference(trainer.processing_class, max_length(trainer))(
        [pair_of(row) for row in rows]
    )
    own = trainer.data_collator(
        [row if isinstance(row, tuple) else dict(row) for row in rows]
    )  # it changes what it is given
    return trainer._prepare_inputs(dict(own)), trainer._prepare_inputs(dict(stock))


@torch.no_grad()
def count_features(trainer, stock):
    """How many vectors the model makes of the images in TRL's batch: one for each image token, if all is right."""
    encode = backbone_of(trainer.model).get_image_features
    with trainer.accelerator.autocast():
        output = encode(
            **{name: stock[name] for name in inspect.signature(encode).parameters if name in stock}
        )
    found = getattr(output, "pooler_output", output)
    return sum(
        vectors.shape[:-1].numel()
        for vectors in (found if isinstance(found, list | tuple) else [found])
    )


def reference_logps(trainer, batch):
    """Log-probabilities (2 · pairs,) of the reference as the trainer takes them: chosen answers, then rejected ones; in nats."""
    cached = [
        batch[f"ref_{side}_logps"]
        for side in ("chosen", "rejected")
        if f"ref_{side}_logps" in batch
    ]
    return torch.cat(
        cached or trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    ).float()


@torch.no_grad()
def adapter_off_logps(trainer, stock):
    """The same of the model itself with its adapter off, computed as TRL does, row by row."""
    model, labels = (
        trainer.model,
        stock["input_ids"].masked_fill(stock["completion_mask"] == 0, -100),
    )
    inputs = {name: value for name, value in stock.items() if name != "completion_mask"}
    with (
        trainer.accelerator.autocast(),
        model.disable_adapter() if isinstance(model, PeftModel) else nullcontext(),
    ):
        return (
            model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
            .log_probs.float()
            .sum(1)
        )


def step(trainer, batch):
    """(Loss, log-ratio, gradients) of the trainer's batch. Log-ratio: log-probability under the policy minus that under the
    reference in nats, the larger mean of chosen and rejected answers. Gradients: {name: largest entry}, None where none arrives."""
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    (
        loss * (1024 if trainer.args.fp16 else 1)
    ).backward()  # float16 training scales as well, or small gradients become 0
    ratios = [
        trainer._metrics["train"][f"rewards/{side}"][-1] / trainer.beta
        for side in ("chosen", "rejected")
    ]
    learned = [
        (name, parameter.grad)
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    ]
    gradients = {
        name: None if gradient is None else gradient.abs().max().item()
        for name, gradient in learned
    }
    return loss.item(), max(ratios, key=abs), gradients
