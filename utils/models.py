"""The model and its processor: loaded in 4 bit, with or without a tuned adapter, and what part of it trains."""

import os
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from utils.chat import answer_messages, prompt_messages
from utils.pixel_budget import limit, limit_tiles
from utils.settings import EMBEDDED_MODEL, locate, verify_embedded

# Jinja: what the template writes for the question, then the answer, then what the template writes after the answer.
AFTER_GENERATION_PROMPT = (
    "{% macro written(messages, add_generation_prompt) %}TEMPLATE{% endmacro %}"
    "{% if messages[-1]['role'] == 'assistant' and messages | length > 1 %}{% set answer = messages[-1]['content'][0]['text'] %}"
    "{{ written(messages[:-1], true) }}{{ answer }}{{ written(messages, false).rpartition(answer)[2] }}"
    "{% else %}{{ written(messages, add_generation_prompt) }}{% endif %}"
)


def compute_dtype():
    """bfloat16 where the GPU really has it (a T4 only emulates it), else float16; float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


def device_map():
    """Where this process puts its model: on its own GPU where several train, else on whatever GPUs it fits; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return (
        {"": int(os.environ.get("LOCAL_RANK", 0))}
        if int(os.environ.get("WORLD_SIZE", 1)) > 1
        else "auto"
    )


@contextmanager
def loading(settings):
    """Within it, an error says which model could not be loaded, and what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{settings.model} does not fit on this GPU: {error} What helps: four_bit=True, no other notebook on the GPU, or the profile "
            "of a smaller model; notebook 06 estimates what each needs"
        ) from error
    except OSError as error:
        raise OSError(
            f"{settings.model}, revision {settings.model_revision} cannot be loaded: {error} What helps: check the profile's model and "
            "model_revision, and the network; without it only the embedded model loads, and what the cache holds"
        ) from error


def source(settings):
    """What `from_pretrained` needs to know of the profile's model; code that its repository brings along is never run."""
    return {
        "pretrained_model_name_or_path": locate(settings.model),
        "revision": settings.model_revision,
        "trust_remote_code": False,
    }


def load_processor(settings):
    """Tokenizer, image processor and chat template of the profile's model. ValueError when it has no chat template."""
    if settings.model == EMBEDDED_MODEL:
        verify_embedded("model")
    with loading(settings):
        processor, config = (
            kind.from_pretrained(**source(settings)) for kind in (AutoProcessor, AutoConfig)
        )
    processor = limit(processor, config, settings.pixel_budget)
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{settings.model} has no chat template: it was not made to answer questions; choose its instruction-tuned variant"
        )
    return complete_template(processor)


def complete_template(processor):
    """Mend a chat template that serves for asking but not for training. Returns `processor`.

    - LLaVA-OneVision's writes a space before an answer that its generation prompt does not have, so that training and
      inference prompts differ: the answer now follows the generation prompt.
    - LLaVA 1.5's writes no token at the end of an answer, so that nothing would teach the model to stop: the tokenizer's
      end-of-sequence token is added.
    - Idefics2's and LLaVA's leave the first token of a text to the tokenizer, which TRL asks to add none: now they write it.
    """
    question, answer = prompt_messages("q"), answer_messages("An answer.")
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    whole = processor.apply_chat_template(question + answer, tokenize=False)
    if not whole.startswith(prompt):
        processor.chat_template = AFTER_GENERATION_PROMPT.replace(
            "TEMPLATE", processor.chat_template
        )
    tokenizer = processor.tokenizer
    end = tokenizer(whole.rpartition("An answer.")[2], add_special_tokens=False)["input_ids"]
    if not set(end) & tokenizer.added_tokens_decoder.keys():
        processor.chat_template += (
            "{% if messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        )
    if tokenizer("q")["input_ids"][0] == tokenizer.bos_token_id and not prompt.startswith(
        tokenizer.bos_token
    ):
        processor.chat_template = "{{ bos_token }}" + processor.chat_template
    return processor


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
        bnb_4bit_quant_storage=dtype
        if os.environ.get("ACCELERATE_USE_FSDP") == "true"
        else torch.uint8,  # FSDP shares out floats only
        llm_int8_skip_modules=list(settings.keep_in_full_precision),
    )
    with loading(settings):
        model = AutoModelForImageTextToText.from_pretrained(
            **source(settings),
            use_safetensors=True,  # a pickle may run code when it is opened
            dtype=dtype,
            quantization_config=four_bit if settings.four_bit else None,
            device_map=device_map(),
        )
    model.requires_grad_(False)
    return keep_gradients_flowing(limit_tiles(model, settings.pixel_budget))


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
    """The base model with the saved adapter on it; `model.disable_adapter()` gives the base back.

    FileNotFoundError when one of its two files is missing, ValueError when they are damaged or belong to another model.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(adapter) / name).is_file():
            inside = Path(adapter) / "adapter"  # a run's folder holds one
            advice = (
                f"did you mean {inside}?"
                if inside.is_dir()
                else "train the adapter with notebook 03 or python -m scripts.train"
            )
            raise FileNotFoundError(f"{Path(adapter) / name} is missing: {advice}")
    model = load_model(settings)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "error", message="Found missing adapter keys"
            )  # peft would go on without them
            return PeftModel.from_pretrained(model, str(adapter))
    except (SafetensorError, RuntimeError, ValueError, UserWarning) as error:
        found = " ".join(str(error)[:300].split())
        advice = "take the checkpoint before, or train again; one trained on another model needs that profile"
        raise ValueError(
            f"the adapter in {adapter} is damaged, or not one for {settings.model}: {found}. What helps: {advice}"
        ) from error


def load_merged(settings, adapter):
    """An ordinary model in 16 or 32 bit with the saved adapter added to its weights; `save_pretrained` writes it as a checkpoint.

    Merging into the 4-bit weights instead would round the sum to 4 bit again.
    """
    return load_tuned(replace(settings, four_bit=False), adapter).merge_and_unload()


def trainable_by_part(model):
    """Trainable and all parameters per part of the model: {"vision" | "connector" | "language" | "head": (trainable, all)}.

    4-bit matrices count the weights they stand for, not the bytes they are packed in.
    """
    parts = {name: [0, 0] for name in ("vision", "connector", "language", "head")}
    for name, parameter in model.named_parameters():
        size = (
            parameter.quant_state.shape.numel()
            if getattr(parameter, "quant_state", None)
            else parameter.numel()
        )
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
