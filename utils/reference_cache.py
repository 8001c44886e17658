"""Reference log-probabilities of the training rows, computed once and kept on disk: the reference does not change while the policy trains.

Computing them takes one forward per row more, so this pays over several epochs, or when a run is repeated.
"""

import hashlib
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, StackDataset

from utils.progress import progress


def use_reference_cache(trainer, folder):
    """Give `trainer`, a `SharedPrefixDPOTrainer`, the log-probabilities of its training rows from `folder`; returns their file.

    Computes and writes them when `folder` has none for this reference model, data set, processor and settings. Raises
    ValueError for streaming data, whose rows have no numbers, and for a damaged file.
    """
    rows, collate = trainer.train_dataset, trainer.data_collator
    if not hasattr(rows, "__len__"):
        raise ValueError(
            "reference log-probabilities cannot be kept for streaming data: load the data set without streaming=True"
        )
    path = Path(folder) / f"reference-{cache_key(trainer)}.safetensors"
    if not path.exists():
        batches = DataLoader(rows, trainer.args.per_device_eval_batch_size, collate_fn=collate)
        model, part = trainer.ref_model or trainer.model, path.with_suffix(f".{os.getpid()}")
        batches = progress(batches, "reference log-probabilities")
        pairs = [
            torch.stack(trainer.compute_ref_log_probs(model, trainer._prepare_inputs(batch)), dim=1)
            for batch in batches
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        log_probs = torch.cat(pairs).float().cpu()
        save_file({"log_probs": log_probs}, part, metadata={"digest": digest(log_probs)})
        part.replace(path)
    trainer.train_dataset = StackDataset(
        rows, read(path)
    )  # a column added to shuffled rows would have every image written again
    trainer.data_collator = partial(collate_with_reference, collate)
    return path


def collate_with_reference(collate, examples):
    """The batch of `collate`; where the examples are (row, log-probabilities), these too."""
    if not isinstance(examples[0], tuple):  # rows for evaluation
        return collate(examples)
    rows, log_probs = zip(*examples, strict=True)
    chosen, rejected = torch.stack(log_probs).unbind(1)
    return {**collate(list(rows)), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def cache_key(trainer):
    """A name that changes with whatever the log-probabilities depend on. The policy's own adapter is not among them."""
    args, parts = trainer.args, []
    for name, tensor in sorted((trainer.ref_model or trainer.model).state_dict().items()):
        if trainer.ref_model is not None or "default" not in name.split("."):
            parts.append(f"{name} {tensor.dtype} {digest(tensor)}")
    with tempfile.TemporaryDirectory() as folder:
        trainer.processing_class.save_pretrained(folder)
        parts += [
            f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"
            for path in sorted(Path(folder).rglob("*.*"))
        ]
    parts += [
        trainer.train_dataset._fingerprint,
        args.max_length,
        args.truncation_mode,
        args.ld_alpha,
        args.bf16,
        args.fp16,
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def digest(tensor):
    return hashlib.sha256(
        tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    ).hexdigest()


def read(path):
    """The log-probabilities (rows, 2) in the file; ValueError when it is not as it was written."""
    try:
        with safe_open(path, "pt") as file:
            log_probs, expected = file.get_tensor("log_probs"), file.metadata()["digest"]
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, and the log-probabilities are computed again"
        ) from error
    if digest(log_probs) != expected:
        raise ValueError(
            f"{path} is damaged (a value has changed): delete it, and the log-probabilities are computed again"
        )
    return log_probs
