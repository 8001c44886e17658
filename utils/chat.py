"""From a preference pair to a conversation, to rendered text, to tokens; and the checks that all of it is right."""

from datasets import Dataset, Image
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from utils.images import read, upright_rgb
from utils.preferences import (
    REQUIRED_COLUMNS,
    TEXT_COLUMNS,
    refuse_special_tokens,
    require_columns,
    require_types,
    special_tokens,
)
from utils.progress import progress


def prompt_messages(question):
    """The user's turn: the image, then the question. ValueError when that is no text."""
    return [{"role": "user", "content": [{"type": "image"}, text_part(question, "the question")]}]


def answer_messages(answer, name="the answer"):
    """The assistant's turn. ValueError with `name` when the answer is no text."""
    return [{"role": "assistant", "content": [text_part(answer, name)]}]


def text_part(text, name):
    if not isinstance(text, str):  # a template would write None as the word "None"
        raise ValueError(
            f"{name} is {type(text).__name__}, not text: drop the row; preferences.check lists all such rows"
        )
    return {"type": "text", "text": text}


def conversation(row):
    """The texts of one row as messages: what `DPOTrainer` takes beside the images."""
    answers = {
        name: answer_messages(row[name], named(f"{name} answer", row["question"]))
        for name in ("chosen", "rejected")
    }
    return {"prompt": prompt_messages(row["question"])} | answers


def format_dataset(dataset, special_tokens=()):
    """Rows for `DPOTrainer`: `image` (upright, RGB), and `prompt`, `chosen`, `rejected` as messages.

    All of it is made when a row is read, so no image is decoded, re-encoded or written, whatever the size or the order of
    `dataset`: also after `shuffle` and `select` (where re-attaching a column would rewrite every image), also when it streams.
    A row whose image cannot be read or is too large, or that lacks a text, raises ValueError then. A stream does not go through
    `within_budget`: there a text with one of `special_tokens` raises as well.
    """
    require_columns(dataset.column_names, "the data set to format")
    require_types(dataset.features, "the data set to format")
    columns = dataset.select_columns(REQUIRED_COLUMNS).cast_column(
        "image", Image(decode=False)
    )  # `read` decodes
    if isinstance(dataset, Dataset):
        return columns.rename_column("question", "prompt").with_transform(with_messages)
    # `rename_column` would encode every image of a stream anew.
    return columns.map(
        streamed,
        with_indices=True,
        remove_columns=["question"],
        fn_kwargs={"tokens": special_tokens},
    )


def with_messages(batch):
    """A batch of columns with its images decoded and its texts as messages."""
    questions = batch.get("prompt") or [None] * max(map(len, batch.values()), default=0)
    make = {
        "prompt": lambda text, _: prompt_messages(text),
        "chosen": lambda text, question: answer_messages(text, named("chosen answer", question)),
        "rejected": lambda text, question: answer_messages(
            text, named("rejected answer", question)
        ),
        "image": lambda image, question: read(image, named("image", question, image)),
    }
    return batch | {
        name: [make[name](*pair) for pair in zip(batch[name], questions, strict=True)]
        for name in make
        if name in batch
    }


def streamed(row, number, tokens):
    """The same for row `number` of a stream."""
    try:
        for column in TEXT_COLUMNS:
            refuse_special_tokens(tokens, row[column] or "", column)
        return conversation(row) | {
            "image": read(row["image"], named("image", row["question"], row["image"]))
        }
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error


def named(part, question, stored=None):
    """What an error calls a part of a row: with its question, and the name of the file that is `stored`, where they are known."""
    path = stored.get("path") if isinstance(stored, dict) else None
    return f"the {part}{f' {path}' if path else ''}{f' of the question {question[:80]!r}' if question else ''}"


def render(row, processor):
    """One row as the chat template writes it: `images` (a list with one decoded image), `prompt`, `chosen`, `rejected` as text.

    An answer is rendered together with its prompt and the prompt is then cut off: rendered alone, some templates
    (Qwen's) would put a system turn in front of it. Raises ValueError when the template changes the prompt.
    """
    messages = conversation(row)
    prompt = processor.apply_chat_template(messages["prompt"], tokenize=False)
    rendered = {"images": [row["image"]], "prompt": prompt}
    for name in ("chosen", "rejected"):
        whole = processor.apply_chat_template(messages["prompt"] + messages[name], tokenize=False)
        if not whole.startswith(prompt):
            raise ValueError(
                f"the chat template changes the prompt when an answer follows: {prompt!r} is not how {whole!r} begins"
            )
        rendered[name] = whole[len(prompt) :]
    return rendered


def training_batch(rows, processor):
    """What `DPOTrainer` feeds the model for `rows` of `format_dataset`: its own collator, chosen rows first, then rejected.
    ValueError when a text holds a special token of the model."""
    tokens = special_tokens(processor)
    for name, text in (
        (name, row[name][-1]["content"][-1]["text"])
        for row in rows
        for name in ("prompt", "chosen", "rejected")
    ):
        refuse_special_tokens(tokens, text, name)
    return DataCollatorForVisionPreference(processor)([dict(row) for row in rows])


def inference_batch(images, questions, processor):
    """Prompts for `generate`: one image and one question a row, padded on the left, ending where the answer begins.

    Images in any mode, seen as in training (`images.upright_rgb`). ValueError unless each has its question, or when a question
    holds a special token of the model."""
    if not images or len(images) != len(questions):
        raise ValueError(
            f"{len(images)} images and {len(questions)} questions: give one image, or more, and one question for each"
        )
    messages, tokens = (
        [prompt_messages(question) for question in questions],
        special_tokens(processor),
    )
    for question in questions:
        refuse_special_tokens(tokens, question, "question")
    texts = [
        processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        for message in messages
    ]
    nested = [[upright_rgb(image, f"image {number}")] for number, image in enumerate(images)]
    return processor(
        images=nested,
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )


def token_kinds(row, processor):
    """Per answer the tokens of one formatted row and what each belongs to.

    {"chosen": (tokens, kinds), "rejected": …}; tokens are strings, kinds are "prompt", "image", "chosen" or "rejected".
    """
    batch, tokenizer = training_batch([row], processor), processor.tokenizer
    image_id = image_token_id(processor)
    views = {}
    for name, ids, mask, answer in zip(
        ("chosen", "rejected"),
        batch["input_ids"],
        batch["attention_mask"],
        batch["completion_mask"],
        strict=True,
    ):
        real = mask.bool()
        kinds = [
            name if in_answer else "image" if i == image_id else "prompt"
            for i, in_answer in zip(ids[real], answer[real], strict=True)
        ]
        views[name] = ([tokenizer.decode([i]) for i in ids[real]], kinds)
    return views


def image_token_id(processor):
    """The id that stands for a piece of an image in `input_ids`."""
    if (
        getattr(processor.tokenizer, "image_token_id", None) is not None
    ):  # Gemma 3's processor names the start of an image instead
        return processor.tokenizer.image_token_id
    if getattr(processor, "image_token_id", None) is not None:
        return processor.image_token_id
    return processor.tokenizer.convert_tokens_to_ids(processor.image_token)


def check_tokens(row, processor):
    """Compare the training tokens of one formatted row with inference; returns how many there are.

    {"prompt_tokens", "image_tokens" (a part of the prompt), "chosen_tokens", "rejected_tokens"}.

    Raises ValueError when the training prompt is not token for token the inference prompt, or an answer does not
    end with the end-of-turn text of the chat template.
    """
    batch = training_batch([row], processor)
    question = row["prompt"][0]["content"][-1]["text"]
    expected = inference_batch([row["image"]], [question], processor)["input_ids"][0].tolist()
    turn_end = (
        render({"image": None, "question": "q", "chosen": "a", "rejected": "a"}, processor)[
            "chosen"
        ]
        .rpartition("a")[2]
        .strip()
    )
    counts = {
        "prompt_tokens": len(expected),
        "image_tokens": expected.count(image_token_id(processor)),
    }
    for name, ids, mask, answer in zip(
        ("chosen", "rejected"),
        batch["input_ids"],
        batch["attention_mask"],
        batch["completion_mask"],
        strict=True,
    ):
        prompt = ids[mask.bool() & ~answer.bool()].tolist()
        if prompt != expected:
            trained, used = processor.tokenizer.decode(prompt), processor.tokenizer.decode(expected)
            raise ValueError(
                f"the training prompt is not the inference prompt: {trained!r} against {used!r}"
            )
        text = processor.tokenizer.decode(ids[answer.bool()])
        if not text.strip().endswith(turn_end):
            raise ValueError(
                f"the {name} answer does not end with {turn_end!r}, so the model never learns to stop: {text[-60:]!r}"
            )
        counts[f"{name}_tokens"] = int(answer.sum())
    return counts


def count_tokens(row, processor):
    """Length in tokens of the longer of a formatted row's two sequences, image tokens included."""
    return training_batch([row], processor)["input_ids"].shape[1]


def within_budget(dataset, processor, token_budget):
    """(`dataset` without the rows longer than `token_budget`, the numbers of the rows dropped). Nothing is truncated:

    a cut inside the image tokens stops training with an error, a cut inside an answer teaches the model not to stop.
    ValueError with its number for a row that cannot be read or holds a special token, and when no row is left.
    """
    numbers = progress(range(len(dataset)), "counting tokens")
    too_long = [
        number for number in numbers if tokens_at(dataset, number, processor) > token_budget
    ]
    if len(too_long) == len(dataset):
        raise ValueError(
            f"of {len(dataset)} rows none is within the budget of {token_budget} tokens: raise token_budget, or take others"
        )
    if not too_long:
        return dataset, []
    dropped = set(too_long)
    return dataset.select(
        [number for number in range(len(dataset)) if number not in dropped]
    ), too_long


def tokens_at(dataset, number, processor):
    """`count_tokens` of row `number`; what is wrong with it is said with the number."""
    try:
        return count_tokens(dataset[number], processor)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
