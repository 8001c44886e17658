"""Turn preference pairs into conversations, rendered text and tokens, and check each step."""

from functools import lru_cache

from datasets import Dataset, Image
from PIL import Image as PillowImage
from trl import apply_chat_template
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from utils.images import image_size, read_image, upright_rgb
from utils.preferences import (
    REQUIRED_COLUMNS,
    TEXT_COLUMNS,
    refuse_special_tokens,
    require_columns,
    require_types,
    special_tokens,
)
from utils.progress import progress

ANSWERS = ("chosen", "rejected")
MESSAGES = ("prompt", *ANSWERS)


def prompt_messages(question):
    """Return the user's turn: the image, then the question. Raise ValueError if it is not text."""
    return [{"role": "user", "content": [{"type": "image"}, text_part(question, "the question")]}]


def answer_messages(answer, name="the answer"):
    """Return the assistant's turn. Raise ValueError with `name` if the answer is not text."""
    return [{"role": "assistant", "content": [text_part(answer, name)]}]


def text_part(text, name):
    # A template would write None as the word "None".
    if not isinstance(text, str):
        raise ValueError(
            f"{name} is {type(text).__name__}, not text: drop the row; preferences.check lists all "
            "such rows"
        )
    return {"type": "text", "text": text}


def conversation(row):
    """Return the texts of one row as messages, as `DPOTrainer` takes them beside the images."""
    question = row["question"]
    messages = {"prompt": prompt_messages(question)}
    for name in ANSWERS:
        messages[name] = answer_messages(row[name], described(f"{name} answer", question))
    return messages


def format_dataset(dataset, special_tokens=()):
    """Return rows for `DPOTrainer`: `image`, upright RGB; `prompt`, `chosen`, `rejected`, messages.

    Each row is made when it is read. No image is decoded, encoded again or written before that,
    whatever the size or the order of `dataset`, and whether it is loaded or streamed. Attaching a
    column after `shuffle` or `select` would write every image again.

    Reading a row raises ValueError when its image cannot be read or is too large, or when a text
    is missing. A stream does not go through `within_budget`, so there a text with one of
    `special_tokens` also raises it.
    """
    require_columns(dataset.column_names, "the data set to format")
    require_types(dataset.features, "the data set to format")
    columns = dataset.select_columns(REQUIRED_COLUMNS)
    columns = columns.cast_column("image", Image(decode=False))  # `read_image` decodes it
    if isinstance(dataset, Dataset):
        return columns.rename_column("question", "prompt").with_transform(with_messages)
    # `rename_column` would encode every image of a stream again.
    return columns.map(
        streamed,
        with_indices=True,
        remove_columns=["question"],
        fn_kwargs={"tokens": special_tokens},
    )


def with_messages(batch):
    """Return a batch of columns with its texts as messages and its images decoded.

    Columns that were not asked for are absent.
    """
    out = dict(batch)
    rows = len(next(iter(batch.values()), []))
    questions = batch.get("prompt", [None] * rows)
    if "prompt" in batch:
        out["prompt"] = [prompt_messages(question) for question in questions]
    for name in ANSWERS:
        if name in batch:
            out[name] = []
            for answer, question in zip(batch[name], questions, strict=True):
                out[name].append(answer_messages(answer, described(f"{name} answer", question)))
    if "image" in batch:
        out["image"] = []
        for stored, question in zip(batch["image"], questions, strict=True):
            out["image"].append(read_image(stored, described("image", question, stored)))
    return out


def streamed(row, number, tokens):
    """Return row `number` of a stream with its texts as messages and its image decoded."""
    try:
        for column in TEXT_COLUMNS:
            refuse_special_tokens(tokens, row[column] or "", column)
        name = described("image", row["question"], row["image"])
        return {**conversation(row), "image": read_image(row["image"], name)}
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error


def described(part, question, stored=None):
    """Return what an error calls a part of a row: with its file and question, where known."""
    name = f"the {part}"
    if isinstance(stored, dict) and stored.get("path"):
        name += f" {stored['path']}"
    if question:
        name += f" of the question {question[:80]!r}"
    return name


def render(row, processor):
    """Return one row as the chat template writes it.

    `images` is a list with one decoded image; `prompt`, `chosen` and `rejected` are texts. An
    answer is rendered together with its prompt and the prompt is then cut off, because some
    templates, such as Qwen's, would put a system turn before an answer that is rendered alone.

    Raises ValueError when the template changes the prompt.
    """
    messages = conversation(row)
    prompt = processor.apply_chat_template(messages["prompt"], tokenize=False)
    rendered = {"images": [row["image"]], "prompt": prompt}
    for name in ANSWERS:
        whole = processor.apply_chat_template(messages["prompt"] + messages[name], tokenize=False)
        if not whole.startswith(prompt):
            raise ValueError(
                "the chat template changes the prompt when an answer follows: "
                f"{whole!r} does not begin with {prompt!r}"
            )
        rendered[name] = whole[len(prompt) :]
    return rendered


def training_batch(rows, processor):
    """Return what `DPOTrainer` feeds the model for formatted `rows`, made by its own collator.

    `input_ids`, `attention_mask` and `completion_mask` have shape (2 × rows, tokens): the chosen
    sequences first, then the rejected ones. Raises ValueError when a text contains a special token
    of the model.
    """
    tokens = special_tokens(processor)
    for row in rows:
        require_plain_text(row, tokens)
    return DataCollatorForVisionPreference(processor)([dict(row) for row in rows])


def require_plain_text(row, tokens):
    """Raise ValueError when a text of a formatted row contains one of `tokens`."""
    for name in MESSAGES:
        refuse_special_tokens(tokens, row[name][-1]["content"][-1]["text"], name)


def inference_batch(images, questions, processor):
    """Return prompts for `generate`, padded on the left, that end where the answer begins.

    There is one image and one question per row. Images of any mode are seen as in training, by
    `images.upright_rgb`. Raises ValueError unless each image has its question, and when a question
    contains a special token of the model.
    """
    if not images or len(images) != len(questions):
        raise ValueError(
            f"{len(images)} images and {len(questions)} questions: give at least one image, and "
            "one question for each"
        )
    tokens = special_tokens(processor)
    nested = []
    texts = []
    for number, (image, question) in enumerate(zip(images, questions, strict=True)):
        messages = prompt_messages(question)
        refuse_special_tokens(tokens, question, "question")
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        texts.append(text)
        nested.append([upright_rgb(image, f"image {number}")])
    return processor(
        images=nested,
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )


def token_kinds(row, processor):
    """Return, for each answer, the tokens of one formatted row and what each belongs to.

    The result is {"chosen": (tokens, kinds), "rejected": …}. Tokens are strings; kinds are
    "prompt", "image", "chosen" or "rejected".
    """
    batch = training_batch([row], processor)
    image_id = image_token_id(processor)
    views = {}
    for number, name in enumerate(ANSWERS):
        real = batch["attention_mask"][number].bool()
        ids = batch["input_ids"][number][real].tolist()
        answer = batch["completion_mask"][number][real].tolist()
        kinds = []
        for token, in_answer in zip(ids, answer, strict=True):
            if in_answer:
                kinds.append(name)
            elif token == image_id:
                kinds.append("image")
            else:
                kinds.append("prompt")
        views[name] = ([processor.tokenizer.decode([token]) for token in ids], kinds)
    return views


def image_token_id(processor):
    """Return the id that stands for a piece of an image in `input_ids`."""
    # Gemma 3's tokenizer comes first: its processor names the token that starts an image.
    for source in (processor.tokenizer, processor):
        if getattr(source, "image_token_id", None) is not None:
            return source.image_token_id
    return processor.tokenizer.convert_tokens_to_ids(processor.image_token)


def check_tokens(row, processor):
    """Compare the training tokens of one formatted row with inference, and count them.

    Returns {"prompt_tokens", "image_tokens", "chosen_tokens", "rejected_tokens"}; the image tokens
    are part of the prompt.

    Raises ValueError when the training prompt is not the inference prompt, token for token, or
    when an answer does not end with the chat template's end of a turn.
    """
    batch = training_batch([row], processor)
    tokenizer = processor.tokenizer
    question = row["prompt"][0]["content"][-1]["text"]
    expected = inference_batch([row["image"]], [question], processor)["input_ids"][0].tolist()
    counts = {
        "prompt_tokens": len(expected),
        "image_tokens": expected.count(image_token_id(processor)),
    }
    known = "An answer."
    sample = {"image": None, "question": "A question?", "chosen": known, "rejected": known}
    turn_end = render(sample, processor)["chosen"].rpartition(known)[2].strip()
    for number, name in enumerate(ANSWERS):
        ids = batch["input_ids"][number]
        real = batch["attention_mask"][number].bool()
        answer = batch["completion_mask"][number].bool()
        prompt = ids[real & ~answer].tolist()
        if prompt != expected:
            trained = tokenizer.decode(prompt)
            used = tokenizer.decode(expected)
            raise ValueError(
                f"the training prompt {trained!r} is not the inference prompt {used!r}"
            )
        text = tokenizer.decode(ids[answer])
        if not text.strip().endswith(turn_end):
            raise ValueError(
                f"the {name} answer does not end with {turn_end!r}, so the model never learns to "
                f"stop: {text[-60:]!r}"
            )
        counts[f"{name}_tokens"] = int(answer.sum())
    return counts


def count_tokens(row, processor):
    """Return the length in tokens of the longer sequence of a formatted row, image included.

    It is the length that the collator gives the row, but the image is not processed: the processor
    says how many tokens an image of that size takes.

    The image is a Pillow image, or still stored as {"bytes", "path"}; then only its header is
    read. Raises ValueError when that is impossible, or when a text contains a special token.
    """
    require_plain_text(row, special_tokens(processor))
    sizes = []
    for image in row["images"] if "images" in row else [row["image"]]:
        if isinstance(image, PillowImage.Image):
            sizes.append(image.size)
        else:
            question = row["prompt"][-1]["content"][-1]["text"]
            sizes.append(image_size(image, described("image", question, image)))
    rendered = apply_chat_template({name: row[name] for name in MESSAGES}, processor)
    # The collator, too, tokenizes an answer apart from its prompt.
    answers = [rendered[name] for name in ANSWERS]
    chosen, rejected = processor.tokenizer(answers, add_special_tokens=False)["input_ids"]
    return prompt_length(rendered["prompt"], sizes, processor) + max(len(chosen), len(rejected))


def prompt_length(prompt, sizes, processor):
    """Return the length in tokens of a rendered prompt with images of these (width, height)."""
    if counts_image_tokens(processor, processor.image_processor):
        return counted_length(prompt, sizes, processor)
    return processed_length(prompt, sizes, processor)


@lru_cache(maxsize=8)
def counts_image_tokens(processor, image_processor):
    """Return whether `counted_length` is right for a processor, as one blank image shows.

    It is wrong for Idefics2 and SmolVLM, which lack the method; for Gemma 3, which also puts line
    breaks around an image; and for an Idefics3 whose tokenizer lacks the marks of the tiles.
    `image_processor` is the processor's own: a new one is asked again.
    """
    if not hasattr(processor, "_get_num_multimodal_tokens"):
        return False
    prompt = processor.apply_chat_template(prompt_messages("What is it?"), tokenize=False)
    sizes = [(1000, 600)]  # large enough for several tiles
    counted = counted_length(prompt, sizes, processor)
    return counted == processed_length(prompt, sizes, processor)


def counted_length(prompt, sizes, processor):
    """Return the length of a prompt as the processor counts it, without an image.

    The method is private to transformers, but serving engines rely on it too.
    """
    ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    counted = processor._get_num_multimodal_tokens(
        image_sizes=[(height, width) for width, height in sizes]
    )
    # Each image is still one token in the prompt.
    return len(ids) - len(sizes) + sum(counted["num_image_tokens"])


def processed_length(prompt, sizes, processor):
    """Return the length of a prompt whose images, here blank ones, are processed."""
    blank = [PillowImage.new("RGB", size) for size in sizes]
    batch = processor(images=[blank], text=[prompt], add_special_tokens=False, return_tensors="pt")
    return batch["input_ids"].shape[1]


def within_budget(dataset, processor, token_budget):
    """Return (`dataset` without the rows longer than `token_budget`, the numbers of those rows).

    Nothing is truncated: a cut inside the image tokens stops training with an error, and a cut
    inside an answer teaches the model not to stop. No image is decoded either, so a file that is
    damaged behind its header is kept. `preferences.check` finds it, and reading the row raises.

    Raises ValueError with the number of a row whose image has no readable header or is too large,
    that lacks a text, or that contains a special token, and when no row is left.
    """
    texts = dataset.select_columns(list(MESSAGES))
    stored = dataset.with_format(None).select_columns(["image"])
    stored = stored.cast_column("image", Image(decode=False))
    kept = []
    dropped = []
    for number in progress(range(len(dataset)), "counting tokens"):
        try:
            row = {**texts[number], **stored[number]}
            length = count_tokens(row, processor)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        if length <= token_budget:
            kept.append(number)
        else:
            dropped.append(number)
    if not kept:
        raise ValueError(
            f"of {len(dataset)} rows none is within the budget of {token_budget} tokens: raise "
            "token_budget, or use other rows"
        )
    return (dataset.select(kept) if dropped else dataset), dropped
