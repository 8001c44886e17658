"""Reference log-probabilities of the training rows, computed once and kept on disk.

The reference does not change while the policy trains. Computing the log-probabilities takes one
more forward per row, so this pays over several epochs, or when a run is repeated.
"""

import hashlib
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, StackDataset

from utils.progress import progress
from utils.shared_prefix import balanced_order, collate_balanced


def use_reference_cache(trainer, folder):
    """Give `trainer` the reference log-probabilities of its training rows, kept in `folder`.

    Returns their file. It is computed and written when `folder` has none for this reference model,
    data set, processor and settings. `trainer`: a `SharedPrefixDPOTrainer`.
    Raises ValueError for streaming data, whose rows have no numbers, and for a damaged file.
    """
    rows = trainer.train_dataset
    if not hasattr(rows, "__len__"):
        raise ValueError(
            "reference log-probabilities cannot be kept for streaming data: "
            "load the data set without streaming=True"
        )
    path = Path(folder) / f"reference-{cache_key(trainer)}.safetensors"
    if not path.exists():
        write_log_probs(path, compute_log_probs(trainer))
    # A column added to shuffled rows would have every image written again.
    trainer.train_dataset = StackDataset(rows, read_log_probs(path))
    trainer.data_collator = partial(collate_with_reference, trainer.collate)
    return path


def compute_log_probs(trainer):
    """Return the reference's log-probabilities of chosen and rejected answers, (rows, 2)."""
    model = trainer.ref_model or trainer.model
    batches = DataLoader(
        trainer.train_dataset,
        trainer.args.per_device_eval_batch_size,
        collate_fn=trainer.collate,  # in the order of the rows
    )
    pairs = []
    for batch in progress(batches, "reference log-probabilities"):
        inputs = trainer._prepare_inputs(batch)
        chosen, rejected = trainer.compute_ref_log_probs(model, inputs)
        pairs.append(torch.stack([chosen, rejected], dim=1))
    return torch.cat(pairs).float().cpu()


def write_log_probs(path, log_probs):
    """Write `log_probs` (rows, 2) to `path` with their digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renaming comes last, so a process that is killed leaves no half-written file at `path`.
    part = path.with_suffix(f".{os.getpid()}")
    save_file({"log_probs": log_probs}, part, metadata={"digest": tensor_digest(log_probs)})
    part.replace(path)


def read_log_probs(path):
    """Return the log-probabilities (rows, 2) in the file. Raises ValueError when it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            log_probs = file.get_tensor("log_probs")
            expected = file.metadata()["digest"]
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, and the log-probabilities are computed again"
        ) from error
    if tensor_digest(log_probs) != expected:
        raise ValueError(
            f"{path} is damaged (a value has changed): "
            "delete it, and the log-probabilities are computed again"
        )
    return log_probs


def collate_with_reference(collate, examples):
    """Return a batch in balanced order, with the log-probabilities where examples have them.

    An example for training is a tuple of row and log-probabilities, one for evaluation only a row.
    """
    if not isinstance(examples[0], tuple):
        return collate_balanced(collate, examples)
    order = balanced_order([row for row, _ in examples])
    rows, log_probs = zip(*[examples[number] for number in order], strict=True)
    chosen, rejected = torch.stack(log_probs).unbind(1)
    return {**collate(list(rows)), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def cache_key(trainer):
    """Return a name that changes with whatever the log-probabilities depend on.

    The policy's own adapter is not part of it.
    """
    args = trainer.args
    reference = trainer.ref_model or trainer.model
    parts = []
    for name, tensor in sorted(reference.state_dict().items()):
        # "default" is the policy's adapter; a reference model of its own has none.
        if trainer.ref_model is not None or "default" not in name.split("."):
            parts.append(f"{name} {tensor.dtype} {tensor_digest(tensor)}")
    parts += processor_parts(trainer.processing_class)
    parts.append(trainer.train_dataset._fingerprint)
    parts += [args.max_length, args.truncation_mode, args.ld_alpha, args.bf16, args.fp16]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def processor_parts(processor):
    """Return the names and digests of the files that `processor` saves."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*.*")):
            parts.append(f"{path.name} {hashlib.sha256(lasting_bytes(path)).hexdigest()}")
    return parts


def lasting_bytes(path):
    """Return the bytes of a processor's file, of tokenizer.json without what its last call left."""
    if path.name != "tokenizer.json":
        return path.read_bytes()
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    return json.dumps(tokenizer | {"padding": None, "truncation": None}).encode()


def tensor_digest(tensor):
    """Return the SHA-256 of the tensor's bytes."""
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(values.numpy()).hexdigest()
