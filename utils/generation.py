"""Batched answers from a model, with its adapter on or off."""

from contextlib import nullcontext

import torch

from utils.chat import inference_batch
from utils.progress import progress


@torch.no_grad()
def answer(
    model,
    processor,
    images,
    questions,
    settings,
    adapter=True,
    samples=None,
    temperature=1.0,
    max_new_tokens=None,
):
    """One answer per image and question, greedy; with `samples` a list of that many sampled answers each.

    `adapter=False` answers as the base model does, from the very same weights: no second model is loaded.
    """
    if len(images) != len(questions):
        raise ValueError(
            f"{len(images)} images but {len(questions)} questions: give one question per image"
        )
    was_training, answers = model.training, []
    model.eval()
    size = max(1, settings.generation_batch_size // (samples or 1))
    sampling = (
        {"do_sample": True, "num_return_sequences": samples, "temperature": temperature, "top_k": 0}
        if samples
        else {"do_sample": False}
    )
    starts = range(0, len(images), size)
    with (
        nullcontext()
        if adapter or not hasattr(model, "disable_adapter")
        else model.disable_adapter()
    ):
        for start in progress(starts, "answering"):
            batch = inference_batch(
                images[start : start + size], questions[start : start + size], processor
            ).to(model.device)
            length = max_new_tokens or settings.max_new_tokens
            generated = model.generate(
                **batch,
                max_new_tokens=length,
                pad_token_id=processor.tokenizer.pad_token_id,
                **sampling,
            )
            texts = processor.tokenizer.batch_decode(
                generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
            answers += [text.strip() for text in texts]
    model.train(was_training)
    if samples:
        return [answers[i : i + samples] for i in range(0, len(answers), samples)]
    return answers
