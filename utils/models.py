"""Load the processor and the model, with or without an adapter, and tell what trains in it."""

import json
import os
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from utils.families import complete_template, limit, limit_tiles
from utils.settings import EMBEDDED_MODEL, locate, verify_embedded


def compute_dtype():
    """Return the type to compute in: bfloat16 or float16 on a GPU, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    # A T4 emulates bfloat16, which is slow.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def device_map():
    """Return where this process puts its model: on its own GPU if several processes train.

    A single process spreads it over the available GPUs. Return None on a CPU.
    """
    if not torch.cuda.is_available():
        return None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return {"": int(os.environ.get("LOCAL_RANK", 0))}
    return "auto"


@contextmanager
def loading(settings):
    """Add the model's name and a suggested fix to any loading error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{settings.model} does not fit on this GPU: {error} Set four_bit=True, close other "
            "notebooks that use the GPU, or choose the profile of a smaller model. Notebook 06 "
            "estimates the memory of each."
        ) from error
    except OSError as error:
        raise OSError(
            f"cannot load {settings.model}, revision {settings.model_revision}: {error} Check "
            "model and model_revision in the profile, and the network. Without a network only the "
            "embedded model and cached models load."
        ) from error


def source(settings):
    """Return what `from_pretrained` needs to find the profile's model."""
    return {
        "pretrained_model_name_or_path": locate(settings.model),
        "revision": settings.model_revision,
        "trust_remote_code": False,  # code that comes with a model is never run
    }


def load_processor(settings):
    """Load tokenizer, image processor and chat template, held to the profile's pixel budget.

    Raise OSError if they cannot be loaded, ValueError if there is no chat template.
    """
    if settings.model == EMBEDDED_MODEL:
        verify_embedded("model")
    with loading(settings):
        processor = AutoProcessor.from_pretrained(**source(settings))
        config = AutoConfig.from_pretrained(**source(settings))
    processor = limit(processor, config, settings.pixel_budget)
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{settings.model} has no chat template, so it was not trained to answer questions: "
            "choose its instruction-tuned variant"
        )
    return complete_template(processor)


def load_model(settings):
    """Load the profile's model with frozen weights.

    With `settings.four_bit` the matrices of the language model are in nf4. All else is in
    `compute_dtype`. Raise OSError or torch.OutOfMemoryError if the model cannot be loaded.
    """
    if settings.model == EMBEDDED_MODEL:
        verify_embedded("model")
    dtype = compute_dtype()
    quantization = None
    if settings.four_bit:
        # FSDP shards floating-point tensors only, so packed weights must look like one.
        fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if fsdp else torch.uint8,
            llm_int8_skip_modules=list(settings.keep_in_full_precision),
        )
    with loading(settings):
        model = AutoModelForImageTextToText.from_pretrained(
            **source(settings),
            use_safetensors=True,  # a pickle may run code when it is opened
            dtype=dtype,
            quantization_config=quantization,
            device_map=device_map(),
        )
    model.requires_grad_(False)
    limit_tiles(model, settings.pixel_budget)
    return keep_gradients_flowing(model)


def keep_gradients_flowing(model):
    """Keep bitsandbytes from repacking 4-bit weights for inference. Return the model.

    On CPUs with AVX512-BF16 the first forward pass without gradient would repack every
    `Linear4bit` in place. From then on no gradient would pass through it, without any error.
    Seen with bitsandbytes 0.50.2.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def load_tuned(settings, adapter):
    """Load the base model with the saved adapter on it.

    Raise FileNotFoundError if one of the adapter's two files is missing, ValueError if they are
    damaged or belong to another model.
    """
    adapter = Path(adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            inside = adapter / "adapter"  # a run's folder holds one
            if inside.is_dir():
                advice = f"did you mean {inside}?"
            else:
                advice = "train the adapter with notebook 03 or python -m scripts.train"
            raise FileNotFoundError(f"{adapter / name} is missing: {advice}")
    model = load_model(as_trained(settings, adapter))
    try:
        with warnings.catch_warnings():
            # PEFT would only warn, and go on with a new adapter in the missing places.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(adapter))
    except (SafetensorError, RuntimeError, ValueError, UserWarning) as error:
        found = " ".join(str(error)[:300].split())
        raise ValueError(
            f"the adapter in {adapter} is damaged or was not trained on {settings.model}: {found}. "
            "Use an earlier checkpoint or train again. For an adapter of another model, choose "
            "the profile of that model."
        ) from error


def as_trained(settings, adapter):
    """Return `settings` in 4 or 16 bits, whichever a plan chose for the run that saved `adapter`.

    training.json beside the adapter says it. Without that file the settings stay.
    """
    record = adapter.parent / "training.json"
    if "four_bit" not in settings.planned or not record.exists():
        return settings
    trained = json.loads(record.read_text())["settings"]
    return replace(settings, four_bit=trained["four_bit"])


def load_merged(settings, adapter):
    """Load an ordinary model in 16 or 32 bits, with the saved adapter added to its weights.

    `save_pretrained` writes it as a checkpoint. Merging into 4-bit weights instead would round
    the sum to 4 bits again. Raise the errors of `load_tuned`.
    """
    wide = replace(settings, four_bit=False, planned=())
    return load_tuned(wide, adapter).merge_and_unload()


@contextmanager
def answering(model, adapter=True):
    """Run a block with `model` in eval mode, without gradient and, if asked, without its adapter.

    A model that has no adapter answers the same with `adapter=False`. Afterwards, also after an
    exception, the adapter and every module's train or eval mode are as before.
    """
    modes = [(module, module.training) for module in model.modules()]
    # PEFT makes an adapter trainable when it switches it back on, even one that was frozen.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    switched = nullcontext()
    if not adapter and hasattr(model, "disable_adapter"):
        switched = model.disable_adapter()
    try:
        model.eval()
        with torch.no_grad(), switched:
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def trainable_by_part(model):
    """Count the parameters of each part of the model: {part: (trainable, all)}.

    Parts are "vision", "connector", "language" and "head". A 4-bit matrix counts the weights it
    stands for, not the bytes they are packed in.
    """
    trainable = dict.fromkeys(("vision", "connector", "language", "head"), 0)
    total = dict(trainable)
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        if getattr(parameter, "quant_state", None):
            size = parameter.quant_state.shape.numel()
        part = part_of(name)
        total[part] += size
        if parameter.requires_grad:
            trainable[part] += size
    return {part: (trainable[part], total[part]) for part in total}


def part_of(name):
    """Return which part of the model the parameter or module called `name` belongs to."""
    if "lm_head" in name:
        return "head"
    if "connector" in name or "projector" in name or "merger" in name:
        return "connector"
    if "vision" in name or "visual" in name:
        return "vision"
    return "language"
