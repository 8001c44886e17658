"""Answers from a model in batches: generated texts, and the probabilities of yes and no."""

import numpy as np
import torch

from utils.chat import answer_messages, inference_batch, prompt_messages
from utils.models import answering
from utils.progress import progress

DESCRIBE = "Describe the image."


def answer(
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

    With `adapter=False` the same weights answer as the base model: no second model is loaded.
    `max_new_tokens` is that of the settings unless given. Raises ValueError when the numbers of
    images and questions differ.
    """
    if len(images) != len(questions):
        raise ValueError(
            f"{len(images)} images but {len(questions)} questions: give one question per image"
        )
    size = settings.generation_batch_size
    options = {
        "max_new_tokens": max_new_tokens or settings.max_new_tokens,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "do_sample": False,
    }
    if samples:
        size = max(1, size // samples)  # a batch holds every sample of its images
        options["do_sample"] = True
        options["num_return_sequences"] = samples
        options["temperature"] = temperature
        options["top_k"] = 0

    answers = []
    with answering(model, adapter):
        for start in progress(range(0, len(images), size), "answering"):
            part = slice(start, start + size)
            batch = inference_batch(images[part], questions[part], processor).to(model.device)
            generated = model.generate(**batch, **options)
            new_tokens = generated[:, batch["input_ids"].shape[1] :]
            texts = processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            answers += [text.strip() for text in texts]
    if samples:
        return [answers[start : start + samples] for start in range(0, len(answers), samples)]
    return answers


def yes_and_no(settings, model, processor, images, questions):
    """Return p(yes) and p(no) for each question, an array (questions, 2).

    They come from the softmax over the first token of the answer.
    """
    lead, yes, no = answer_tokens(processor)
    found = []
    size = settings.generation_batch_size
    with answering(model):
        for start in progress(range(0, len(images), size), "judging"):
            part = slice(start, start + size)
            batch = inference_batch(images[part], questions[part], processor).to(model.device)
            ids = batch["input_ids"]
            mask = batch["attention_mask"]
            # Let the answer begin as every answer does, so that yes or no comes next.
            lead_ids = torch.tensor(lead, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
            batch["input_ids"] = torch.cat([ids, lead_ids], dim=1)
            batch["attention_mask"] = torch.cat([mask, torch.ones_like(lead_ids)], dim=1)
            output = model.generate(
                **batch,
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=processor.tokenizer.pad_token_id,
            )
            probabilities = output.logits[0].float().softmax(-1)
            p_yes = probabilities[:, yes].sum(1)
            p_no = probabilities[:, no].sum(1)
            found.append(torch.stack([p_yes, p_no], dim=1).cpu())
    if not found:
        return np.zeros((0, 2))
    return torch.cat(found).numpy()


def answer_tokens(processor):
    """Return the tokens that begin every answer, the ids that begin a yes, and those of a no.

    All are read from the chat template. With some tokenizers the space after "Assistant:" is a
    token of its own: it says nothing, so it counts among the tokens that begin every answer.
    Raises ValueError when the template changes the prompt as soon as an answer follows.
    """
    question = prompt_messages("")
    prompt_text = processor.apply_chat_template(
        question, add_generation_prompt=True, tokenize=False
    )
    prompt = processor.tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    texts = {}
    rows = {}
    for word in ("Yes", "yes", "No", "no"):
        conversation = question + answer_messages(word)
        texts[word] = processor.apply_chat_template(conversation, tokenize=False)
        rows[word] = processor.tokenizer(texts[word], add_special_tokens=False)["input_ids"]

    first = 0  # the first place at which a yes differs from a no
    while rows["Yes"][first] == rows["No"][first]:
        first += 1
    beginning = rows["Yes"][:first]
    if beginning[: len(prompt)] != prompt:
        raise ValueError(
            "the chat template changes the prompt when an answer follows: "
            f"{prompt_text!r} is not how {texts['Yes']!r} begins"
        )
    # A lowercase spelling counts where it, too, is one token after the same beginning.
    ids = {"yes": set(), "no": set()}
    for word, row in rows.items():
        if row[:first] == beginning:
            ids[word.lower()].add(row[first])
    return beginning[len(prompt) :], sorted(ids["yes"]), sorted(ids["no"])
