"""Answers that a model generates, in batches."""

import itertools
from contextlib import contextmanager

import numpy as np
import torch
from transformers import BatchFeature

from utils.chat import inference_batch
from utils.families import PACKED_FAMILIES
from utils.models import answering
from utils.packed_rows import TEXT_TENSORS
from utils.progress import progress
from utils.settings import digest
from utils.vision import backbone_of

DESCRIBE = "Describe the image."

# `generate` takes every setting that it is not given from the file generation_config.json of the
# model. Those in circulation have top_p 0.001 or top_k 1, with which all samples are one, and a
# repetition penalty, with which greedy answers are not the likeliest. So each is given here, at the
# value that leaves the probabilities of the tokens as the model computes them: DPO trains those.
NEUTRAL = {
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,  # it would hide what `refuse_overflow` finds
    "renormalize_logits": None,
    "guidance_scale": None,
    "watermarking_config": None,
    "prompt_lookup_num_tokens": None,
    "stop_strings": None,
    "max_time": None,
    "num_return_sequences": 1,
}
OTHER_DTYPE = (
    "load the model in another dtype: torch.bfloat16 or torch.float32 instead of torch.float16, "
    "whose numbers end at 65,504"
)


def answer(settings, model, processor, images, questions, adapter=True, **options):
    """Return the texts of `generated`: one per question, or a list of them with `samples`.

    `options` are those of `generated`.
    """
    made = generated(settings, model, processor, images, questions, adapter, **options)
    if options.get("samples"):
        return [texts_of(answers) for answers in made]
    return texts_of(made)


def texts_of(answers):
    """Return the texts of answers as `generated` gives them."""
    return [made["text"] for made in answers]


def generated(
    settings,
    model,
    processor,
    images,
    questions,
    adapter=True,
    samples=None,
    temperature=1.0,
    max_new_tokens=None,
):
    """Return one greedy answer per image and question, or a list of `samples` sampled ones each.

    An answer is {"text", "ended"}. `ended` is whether the model ended it; if not, it was cut at
    `max_new_tokens`, which is that of the settings unless given. With `adapter=False` the same
    weights answer as the base model: no second model is loaded. The model's generation_config
    changes no probability.

    Raises ValueError when the numbers of images and questions differ, and when the model computes
    no numbers or nothing but one character again and again.
    """
    if len(images) != len(questions):
        raise ValueError(
            f"{len(images)} images but {len(questions)} questions: give one question per image"
        )
    size = settings.generation_batch_size
    # In families in which that was compared, the samples of a prompt share its computation.
    repeats = samples and model.config.model_type in PACKED_FAMILIES
    options = NEUTRAL | {
        "max_new_tokens": max_new_tokens or settings.max_new_tokens,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "logits_processor": [refuse_overflow],
        "do_sample": False,
        "top_k": None,
    }
    if samples:
        size = max(1, size // samples)  # a batch holds every sample of its images
        options["do_sample"] = True
        if not repeats:
            options["num_return_sequences"] = samples
        options["temperature"] = temperature
        options["top_k"] = 0  # as many as there are

    answers = []
    with answering(model, adapter):
        for start in progress(range(0, len(images), size), "answering"):
            part = slice(start, start + size)
            batch = inference_batch(images[part], questions[part], processor).to(model.device)
            if repeats:
                batch = repeated(model, batch, samples, options)
            tokens = model.generate(**batch, **options)
            new_tokens = tokens[:, batch["input_ids"].shape[1] :]
            texts = processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            texts = [text.strip() for text in texts]
            if samples:
                refuse_noise(texts)
            for text, ended in zip(texts, has_ended(model, new_tokens), strict=True):
                answers.append({"text": text, "ended": ended})
    if samples:
        return [answers[start : start + samples] for start in range(0, len(answers), samples)]
    return answers


def repeated(model, batch, samples, options):
    """Return what `generate` needs to continue each row of `batch` `samples` times.

    The rows go through the model once: a cache holds all of their tokens but the last, and so the
    images. `options` are those of `generate`.
    """
    texts = {name: batch[name] for name in TEXT_TENSORS if name in batch}
    beginnings = {name: rows[:, :-1] for name, rows in texts.items()}
    once = {"max_new_tokens": 1, "do_sample": False, "top_k": None}
    once["return_dict_in_generate"] = True
    computed = model.generate(**{**batch, **beginnings}, **{**options, **once})
    name = "cache" if "cache" in computed else "past_key_values"  # before transformers 5.24
    cache = computed[name]
    cache.batch_repeat_interleave(samples)
    backbone = backbone_of(model)
    if getattr(backbone, "rope_deltas", None) is not None:  # Qwen's, of each row
        backbone.rope_deltas = backbone.rope_deltas.repeat_interleave(samples, dim=0)
    again = {text: rows.repeat_interleave(samples, dim=0) for text, rows in texts.items()}
    return again | {name: cache}


def has_ended(model, new_tokens):
    """Return, for each row of `new_tokens`, whether it holds a token that ends an answer.

    `new_tokens` has shape (answers, tokens), without the prompts.
    """
    ends = torch.tensor(model.generation_config.eos_token_id, device=new_tokens.device)
    return torch.isin(new_tokens, ends).any(dim=1).tolist()


def refuse_overflow(token_ids, logits):
    """Return `logits`, shape (answers, vocabulary). Raise ValueError where they are no numbers.

    `generate` calls it before each token. Without it, a greedy answer would be made of token 0,
    which is "!" in many vocabularies, and sampling would stop with an error of CUDA.
    """
    if not logits.max().isfinite():  # the maximum of anything and NaN is NaN
        raise ValueError(
            f"the model computes {logits.max().item()} instead of numbers in {logits.dtype}: "
            f"{OTHER_DTYPE}"
        )
    return logits


def refuse_noise(texts):
    """Raise ValueError if every text is one character again and again, like "!!!!!!"."""
    for text in texts:
        if len(text) < 4 or len(set(text)) > 1 or text[0].isalnum():
            return
    raise ValueError(
        f"the model answers nothing but {texts[0][:20]!r}, as models do whose numbers overflow: "
        f"{OTHER_DTYPE}"
    )


@contextmanager
def processed_once(processor):
    """Within the block, let `processor` process each image once, however many texts are about it.

    Large photographs take longer to resize and to cut than a question about them to answer. The
    images of one call must have the same size, as `one_size_batches` sees to. Only what the last
    call needed is kept.
    """
    image_processor = processor.image_processor
    process = image_processor.preprocess
    kept = {}  # what an image is → what it became

    def shared(images, *arguments, **options):
        singles = [image[0] if isinstance(image, list) else image for image in images]
        # By its pixels, because some processors copy every image first.
        seen = {}
        for image in singles:
            if id(image) not in seen:
                seen[id(image)] = (image.size, digest(image.tobytes()))
        keys = [seen[id(image)] for image in singles]
        for key in kept.keys() - set(keys):
            del kept[key]
        for key, image in zip(keys, singles, strict=True):
            if key not in kept:
                kept[key] = process([[image]], *arguments, **options)
        return joined([kept[key] for key in keys])

    image_processor.preprocess = shared  # an attribute of this object hides the method
    try:
        yield
    finally:
        del image_processor.preprocess


def joined(features):
    """Return what an image processor gives for several images, from what it gives for each."""
    together = {}
    for name, first in features[0].items():
        values = [each[name] for each in features]
        if isinstance(first, torch.Tensor):
            together[name] = torch.cat(values)
        elif isinstance(first, np.ndarray):
            together[name] = np.concatenate(values)
        else:
            together[name] = list(itertools.chain.from_iterable(values))
    return BatchFeature(together)
