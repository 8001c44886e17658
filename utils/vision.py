"""What lies between pixels and language model: whether it is fixed, and how to run it only once."""

from contextlib import contextmanager, nullcontext
from functools import wraps

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers.modeling_outputs import BaseModelOutputWithPooling

from utils.families import PACKED_FAMILIES

ENCODED_ONCE = {*PACKED_FAMILIES, "paligemma"}


def backbone_of(model):
    """Return what is below adapter and LM head: vision tower, connector and language model."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model.base_model


def has_dropout(modules):
    """Return whether one of the `modules` is a dropout layer that is on in training."""
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in modules)


def vision_is_fixed(backbone):
    """Return whether nothing between pixels and language model is trained, adapted or random.

    Policy and reference then see the same image features.
    """
    language = set(backbone.get_decoder().modules())
    modules = [module for module in backbone.modules() if module not in language]
    for module in modules:
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return False
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                return False
    if has_dropout(modules):
        return False
    return not getattr(backbone.config.vision_config, "attention_dropout", 0)


@contextmanager
def encoding_once(backbone, known=None):
    """Make `backbone` encode the same pixels once and without gradient within this context.

    Policy and reference share the features. `known` are features that were computed before
    (utils/image_features.py); then no pixel is encoded.
    """
    encode = backbone.get_image_features
    last_pixels = None
    features = None

    @wraps(encode)  # `generate` asks which arguments it takes
    @torch.no_grad()
    def encode_once(pixel_values, *arguments, **options):
        nonlocal last_pixels, features
        if known is not None:
            return BaseModelOutputWithPooling(pooler_output=known)
        if last_pixels is None or not torch.equal(last_pixels, pixel_values):
            features = encode(pixel_values, *arguments, **options)
            last_pixels = pixel_values
        return features

    backbone.get_image_features = encode_once
    try:
        yield
    finally:
        del backbone.get_image_features


def images_encoded_once(model, known=None):
    """Return a context in which `model` encodes the same images once, if nothing changes them.

    Otherwise, and in families in which that was not compared, it does nothing. For `known` see
    `encoding_once`.
    """
    backbone = backbone_of(model)
    if model.config.model_type in ENCODED_ONCE and vision_is_fixed(backbone):
        return encoding_once(backbone, known)
    return nullcontext()
