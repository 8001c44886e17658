"""The model and its processor: loaded in 4 bit, with or without a tuned adapter, and what part of it trains."""

import bitsandbytes as bnb
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from utils.preferences import verify_embedded
from utils.settings import EMBEDDED_MODEL, locate


def compute_dtype():
    """bfloat16 where the GPU really has it (a T4 only emulates it), else float16; float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_processor(settings):
    """Tokenizer, image processor and chat template of the profile's model."""
    if settings.model == EMBEDDED_MODEL:
        verify_embedded("model")
    return AutoProcessor.from_pretrained(locate(settings.model), revision=settings.model_revision, **settings.processor_arguments)


def load_model(settings):
    """The profile's model with frozen weights: the language model's matrices in nf4 (`settings.four_bit`), the rest in 16 or 32 bit."""
    if settings.model == EMBEDDED_MODEL:
        verify_embedded("model")
    dtype = compute_dtype()
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(settings.keep_in_full_precision),
    )
    model = AutoModelForImageTextToText.from_pretrained(
        locate(settings.model),
        revision=settings.model_revision,
        dtype=dtype,
        quantization_config=four_bit if settings.four_bit else None,
        device_map="auto" if torch.cuda.is_available() else None,
    )
    model.requires_grad_(False)
    return keep_gradients_flowing(model)


def keep_gradients_flowing(model):
    """Keep bitsandbytes from repacking 4-bit weights for inference.

    On CPUs with AVX512-BF16 the first forward without gradient (generation, evaluation) would repack every `Linear4bit`
    in place, and from then on no gradient would pass through it, without any error. Seen with bitsandbytes 0.50.2.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def load_tuned(settings, adapter):
    """The base model with the saved adapter on it; `model.disable_adapter()` gives the base back."""
    return PeftModel.from_pretrained(load_model(settings), str(adapter))


def trainable_by_part(model):
    """Trainable and all parameters per part of the model: {"vision" | "connector" | "language" | "head": (trainable, all)}.

    4-bit matrices count the weights they stand for, not the bytes they are packed in.
    """
    parts = {name: [0, 0] for name in ("vision", "connector", "language", "head")}
    for name, parameter in model.named_parameters():
        size = parameter.quant_state.shape.numel() if getattr(parameter, "quant_state", None) else parameter.numel()
        part = parts[part_of(name)]
        part[0] += size * parameter.requires_grad
        part[1] += size
    return {name: tuple(counts) for name, counts in parts.items()}


def part_of(name):
    """Which part of the model a parameter or module belongs to, by its name."""
    if "lm_head" in name:
        return "head"
    if any(word in name for word in ("connector", "projector", "merger")):
        return "connector"
    return "vision" if "vision" in name or "visual" in name else "language"
