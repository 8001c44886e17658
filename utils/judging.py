"""How likely a model answers yes or no, for many questions about few images."""

import itertools

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from utils.chat import answer_messages, inference_batch, prompt_messages
from utils.generation import NEUTRAL, processed_once, refuse_overflow
from utils.images import upright_rgb
from utils.models import answering
from utils.packed_rows import (
    TEXT_TENSORS,
    PackedRows,
    fits_window,
    token_positions,
    why_not_shared,
)
from utils.progress import progress
from utils.vision import backbone_of

QUESTIONS_IN_ROW = 64  # at most so many questions about an image share a row


def yes_and_no(settings, model, processor, images, questions):
    """Return p(yes) and p(no) for each question, an array (questions, 2).

    They come from the softmax over the first token of the answer. An image that occurs several
    times in `images`, as the same object, is processed once. Where the model can, all questions
    about it share one row, which computes the image and what the questions begin with once.
    Raises ValueError when the numbers of images and questions differ, and when the model computes
    no numbers.
    """
    if len(images) != len(questions):
        raise ValueError(
            f"{len(images)} images but {len(questions)} questions: give one question per image"
        )
    lead, yes, no = answer_tokens(processor)
    images = upright_once(images)
    found = np.zeros((len(images), 2), dtype=np.float32)
    size = settings.generation_batch_size
    shares = why_not_shared(model.config) is None
    if shares:
        batches = one_image_batches(images, QUESTIONS_IN_ROW)
    else:
        batches = one_size_batches(images, size)

    def batch_of(numbers):
        shown = [images[number] for number in numbers]
        asked = [questions[number] for number in numbers]
        return begin_answers(inference_batch(shown, asked, processor), lead)

    with answering(model), processed_once(processor):
        for numbers in progress(batches, "judging"):
            logits = None
            if shares:
                logits = logits_of_shared_row(model, batch_of(numbers))
            if logits is None:
                parts = []
                for start in range(0, len(numbers), size):
                    batch = batch_of(numbers[start : start + size])
                    parts.append(logits_of_rows(model, batch, processor.tokenizer.pad_token_id))
                logits = torch.cat(parts)
            probabilities = refuse_overflow(None, logits).float().softmax(-1)
            p_yes = probabilities[:, yes].sum(1)
            p_no = probabilities[:, no].sum(1)
            found[numbers] = torch.stack([p_yes, p_no], dim=1).cpu().numpy()
    return found


def begin_answers(batch, lead):
    """Return `batch` with the tokens `lead`, with which every answer begins, behind each row.

    Yes or no then comes next.
    """
    ids = batch["input_ids"]
    lead_ids = torch.tensor(lead, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
    longer = dict(batch)
    for name in TEXT_TENSORS:
        if name not in batch:
            continue
        added = torch.zeros_like(lead_ids)  # text is 0 in the tensors that tell images from text
        if name == "input_ids":
            added = lead_ids
        elif name == "attention_mask":
            added = torch.ones_like(lead_ids)
        longer[name] = torch.cat([batch[name], added], dim=1)
    return longer


def logits_of_rows(model, batch, pad_token):
    """Return the logits (rows, vocabulary) of what follows each row of `batch`."""
    options = NEUTRAL | {
        "max_new_tokens": 1,
        "pad_token_id": pad_token,
        "do_sample": False,
        "top_k": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    return model.generate(**inputs, **options).logits[0]


def logits_of_shared_row(model, batch):
    """Return the same as `logits_of_rows` from one row that holds what all rows share only once.

    All rows of `batch`, which is on the CPU, are about the same image. None when they cannot share
    a row: a part of the image comes after what they share, or a row is longer than the model's
    sliding window.
    """
    backbone = backbone_of(model)
    config = backbone.config.get_text_config()
    rows = padded_on_the_right(batch)
    ids = rows["input_ids"]
    lengths = rows["attention_mask"].sum(1).tolist()
    shared = min(common_beginning(ids), min(lengths) - 1)
    is_image = ids[0] == model.config.image_token_id
    if is_image[shared:].any() or not fits_window(config, max(lengths)):
        return None

    questions = len(ids)
    group = tuple(range(questions))
    packing = PackedRows([group], [shared], lengths, [1], ids.shape[1], ids.device)
    packed = {}
    for name, value in batch.items():
        # The tensors of images hold the one image again and again, once for each question.
        packed[name] = value[: len(value) // questions]
        if name in rows:
            packed[name] = packing.pack(rows[name])
    positions = token_positions(backbone, rows, batch.get("image_grid_thw"))
    packed["position_ids"] = packing.pack(positions)
    packed["attention_mask"] = packing.mask(
        config._attn_implementation, backbone.dtype, packed.get("token_type_ids")
    )
    packed["logits_to_keep"] = packing.moved + torch.tensor(lengths) - 1  # the last of each row
    # Only now: before, `batch` has a copy of the image for every question.
    inputs = {name: value.to(model.device) for name, value in packed.items()}
    return model(**inputs, use_cache=False).logits[0]


def padded_on_the_right(batch):
    """Return the text tensors of `batch`, which is padded on the left, padded on the right."""
    is_real = batch["attention_mask"].bool()
    rows = {}
    for name in TEXT_TENSORS:
        if name in batch:
            texts = [row[real] for row, real in zip(batch[name], is_real, strict=True)]
            rows[name] = pad_sequence(texts, batch_first=True)
    return rows


def common_beginning(ids):
    """Return with how many tokens all rows of `ids` (rows, T) begin alike."""
    is_alike = (ids == ids[0]).all(dim=0)
    return int(is_alike.cumprod(dim=0).sum())


def one_image_batches(images, size):
    """Return lists of at most `size` positions in `images`, those of a list with the same image."""
    positions = {}
    for number, image in enumerate(images):
        positions.setdefault(id(image), []).append(number)
    batches = []
    for numbers in positions.values():
        for start in range(0, len(numbers), size):
            batches.append(numbers[start : start + size])
    return batches


def upright_once(images):
    """Return `images` as `upright_rgb` does; the same object stays the same object."""
    made = {}
    for number, image in enumerate(images):
        if id(image) not in made:
            made[id(image)] = upright_rgb(image, f"image {number}")
    return [made[id(image)] for image in images]


def one_size_batches(images, size):
    """Return lists of at most `size` positions in `images`, each position once.

    The images of a list have the same width and height, so that `processed_once` can put their
    pixels together. The same image comes in a row. Otherwise the order is that of `images`.
    """
    first = {}
    for number, image in enumerate(images):
        first.setdefault(id(image), number)

    def place(number):
        image = images[number]
        return image.size, first[id(image)]

    batches = []
    for _, run in itertools.groupby(sorted(range(len(images)), key=place), lambda n: place(n)[0]):
        numbers = list(run)
        for start in range(0, len(numbers), size):
            batches.append(numbers[start : start + size])
    return batches


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
