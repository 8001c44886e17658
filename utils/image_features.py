"""Features of the training images, computed once and kept on disk.

Where nothing between pixels and language model trains, an image has the same features in every
epoch. Reading them takes the place of the vision tower. Those of a photograph take 1 to 2 MB, about
ten times its JPEG, so this pays over several epochs, or when a run is repeated.
"""

import hashlib
import inspect
import os
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils.progress import progress
from utils.reference_cache import processor_parts, tensor_digest
from utils.shared_prefix import collate_balanced
from utils.vision import ENCODED_ONCE, backbone_of, vision_is_fixed


def use_image_features(trainer, folder):
    """Give `trainer` the features of the images of its training rows, kept below `folder`.

    Returns the folder of their files. What is missing there is computed; a run that was killed goes
    on where it stopped. `trainer`: a `SharedPrefixDPOTrainer`, before `use_reference_cache`.
    Raises ValueError for streaming data, and for a model whose features change or are not only one
    tensor for each image.
    """
    rows = trainer.train_dataset
    if not hasattr(rows, "__len__"):
        raise ValueError(
            "image features cannot be kept for streaming data: "
            "load the data set without streaming=True"
        )
    backbone = backbone_of(trainer.model)
    family = trainer.model.config.model_type
    if family not in ENCODED_ONCE or not vision_is_fixed(backbone):
        raise ValueError(
            f"the image features of this {family} cannot be kept: its vision tower trains, or it "
            "was not compared. Train without use_image_features"
        )
    kept = Path(folder) / f"images-{features_key(trainer, backbone)}"
    kept.mkdir(parents=True, exist_ok=True)
    collate = trainer.collate
    for number in progress(range(len(rows)), "image features"):
        row = rows[number]
        path = features_file(kept, row)
        if row["images"] and not path.exists():
            write_features(path, compute_features(trainer, backbone, collate([row])))
    trainer.collate = partial(collate_with_features, collate, kept)
    trainer.data_collator = partial(collate_balanced, trainer.collate)
    return kept


def compute_features(trainer, backbone, batch):
    """Return the features of the images in `batch`, as `get_image_features` gives them.

    A tensor whose first dimension counts images or their parts, or a list with one for each.
    """
    inputs = trainer._prepare_inputs(batch)
    arguments = {}
    for name in inspect.signature(backbone.get_image_features).parameters:
        if name in inputs:
            arguments[name] = inputs[name]
    with torch.no_grad(), trainer.compute_loss_context_manager():
        output = backbone.get_image_features(**arguments, return_dict=True)
    if getattr(output, "deepstack_features", None) is not None:
        raise ValueError(
            f"the image features of {trainer.model.config.model_type} are not kept: some of them "
            "enter later layers. Train without use_image_features"
        )
    return output.pooler_output


def images_digest(images):
    """Return a name for a list of Pillow images: the same pixels get the same one."""
    together = hashlib.sha256()
    for image in images:
        together.update(repr((image.mode, image.size)).encode())
        together.update(image.tobytes())
    return together.hexdigest()[:32]


def features_file(folder, row):
    """Return the file in `folder` for the images of a formatted row."""
    return folder / f"{images_digest(row['images'])}.safetensors"


def write_features(path, features):
    """Write a tensor, or a list of tensors, to `path`."""
    single = torch.is_tensor(features)
    tensors = {}
    digests = []
    for number, feature in enumerate([features] if single else features):
        tensors[f"{number:04}"] = feature.contiguous().cpu()
        digests.append(tensor_digest(feature))
    metadata = {"single": str(single), "digest": " ".join(digests)}
    # Renaming comes last, so a process that is killed leaves no half-written file at `path`.
    part = path.with_suffix(f".{os.getpid()}")
    save_file(tensors, part, metadata=metadata)
    part.replace(path)


def read_features(path):
    """Return (whether they are a single tensor, list of tensors). ValueError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(name) for name in sorted(file.keys())]
            metadata = file.metadata()
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, and its features are computed again"
        ) from error
    if " ".join(tensor_digest(tensor) for tensor in tensors) != metadata["digest"]:
        raise ValueError(
            f"{path} is damaged (a value has changed): "
            "delete it, and its features are computed again"
        )
    return metadata["single"] == "True", tensors


def collate_with_features(collate, folder, examples):
    """Return the batch of `collate` with "image_features", if those of all its images are kept."""
    batch = collate(examples)
    paths = [features_file(folder, row) for row in examples if row["images"]]
    if not paths or not all(path.exists() for path in paths):
        return batch  # rows of an evaluation
    features = []
    for path in paths:
        single, tensors = read_features(path)
        features += tensors
    return {**batch, "image_features": torch.cat(features) if single else features}


def features_key(trainer, backbone):
    """Return a name that changes with whatever the features depend on."""
    language = set(backbone.get_decoder().parameters())
    parts = []
    for name, parameter in sorted(backbone.named_parameters()):
        if parameter not in language:
            parts.append(f"{name} {parameter.dtype} {tensor_digest(parameter)}")
    parts += processor_parts(trainer.processing_class)
    parts += [trainer.args.bf16, trainer.args.fp16]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
