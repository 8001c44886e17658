"""Turn preference pairs into rendered text, tokens and batches, and check each step.

A row is TRL's: `images`, a list of none, one or several; `prompt`, `chosen` and `rejected`, lists
of messages. The content of a message is a list of parts, texts and places of images.
"""

from functools import lru_cache, partial

from datasets import Dataset
from jinja2 import TemplateError
from PIL import Image as PillowImage
from trl import apply_chat_template
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from utils.images import image_size, read_image, upright_rgb
from utils.layouts import COLUMNS, MESSAGES, PROBLEM, stored_batch, text_of
from utils.preferences import refuse_special_tokens, special_tokens
from utils.progress import progress

ANSWERS = ("chosen", "rejected")
IMAGE_CHARACTERS = 1000  # an image makes a row longer by about so many: 250 tokens of four


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
    """Return the messages of one row, as `DPOTrainer` takes them beside the images.

    Columns that are not in `row` are left out. Raises ValueError when a text is missing.
    """
    question = last_question(row)
    messages = {}
    for column in MESSAGES:
        if column in row:
            part = "prompt" if column == "prompt" else f"{column} answer"
            require_texts(row[column], described(part, question))
            messages[column] = row[column]
    return messages


def require_texts(messages, name):
    """Raise ValueError with `name` when there is no message or when one lacks its text."""
    if not messages:
        raise ValueError(f"{name} is missing: drop the row; preferences.check lists all such rows")
    for message in messages:
        for part in message["content"]:
            if part["type"] == "text":
                text_part(part.get("text"), name)


def last_question(row):
    """Return what the user asks last in a row, or an empty text."""
    for turn in reversed(row.get("prompt") or []):
        if turn["role"] == "user":
            return " ".join(part["text"] for part in turn["content"] if part.get("text"))
    return ""


def places_of(messages):
    """Return how many images `messages` have a place for."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def described(part, question, stored=None):
    """Return what an error calls a part of a row: with its file and question, where known."""
    name = f"the {part}"
    if isinstance(stored, dict) and stored.get("path"):
        name += f" {stored['path'][:80]}"
    if question:
        name += f" of the question {question[:80]!r}"
    return name


def format_dataset(dataset, pixel_budget=None, special_tokens=()):
    """Return rows for `DPOTrainer`: upright RGB images, and messages whose parts are complete.

    Each row is made when it is read. No image is decoded, encoded again or written before that,
    whatever the size or the order of `dataset`, and whether it is loaded or streamed. Attaching a
    column after `shuffle` or `select` would write every image again. Other columns are left out,
    except `rejected_images`.

    Reading a row raises ValueError when an image cannot be read or is too large, when a text is
    missing, when there are more or fewer images than places for them, and when `preferences.load`
    noted a problem. A stream does not go through `within_budget`, so there a text with one of
    `special_tokens` also raises it.

    Args:
        pixel_budget: larger images are reduced to so many pixels when they are read.
    """
    names = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know them
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise ValueError(
            f"the data set to format: no column {', '.join(missing)}; it has {', '.join(names)}. "
            "Read it with preferences.load, or layouts.as_rows(dataset)"
        )
    taken = [column for column in (*COLUMNS, "rejected_images", PROBLEM) if column in names]
    dataset = dataset.select_columns(taken)
    if isinstance(dataset, Dataset):
        return dataset.with_transform(partial(formatted_batch, pixel_budget=pixel_budget))
    return dataset.map(
        streamed_row,
        with_indices=True,
        remove_columns=taken,
        fn_kwargs={"pixel_budget": pixel_budget, "tokens": special_tokens},
    )


def formatted_batch(batch, pixel_budget):
    """Return a batch of stored columns as `formatted_row` makes its rows."""
    batch = stored_batch(batch)
    columns = {name: [] for name in batch if name != PROBLEM}
    for values in zip(*batch.values(), strict=True):
        row = formatted_row(dict(zip(batch, values, strict=True)), pixel_budget)
        for name, column in columns.items():
            column.append(row[name])
    return columns


def streamed_row(row, number, pixel_budget, tokens):
    """Return row `number` of a stream as `formatted_row` makes it, without any of `tokens`."""
    try:
        batch = formatted_batch({name: [value] for name, value in row.items()}, pixel_budget)
        read = {name: values[0] for name, values in batch.items()}
        require_plain_text(read, tokens)
        return read
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error


def formatted_row(row, pixel_budget):
    """Return a row with its images decoded. Columns that were not asked for are absent."""
    read = complete(row)
    for column in ("images", "rejected_images"):
        if column not in row:
            continue
        read[column] = []
        for stored, name in named_images(row, column):
            read[column].append(read_image(stored, name, pixel_budget))
    return read


def complete(row):
    """Return the messages of a row and its `images` as they are.

    Raises ValueError when `preferences.load` noted a problem, when a text is missing, and when
    there are more or fewer images than places for them.
    """
    question = last_question(row)
    if row.get(PROBLEM):
        raise ValueError(f"{described('row', question)} cannot be read: {row[PROBLEM]}")
    checked = conversation(row)
    if "images" not in row:
        return checked
    checked["images"] = row["images"]
    if "prompt" in row and places_of(row["prompt"]) != len(checked["images"]):
        raise ValueError(
            f"{described('row', question)} has {len(checked['images'])} images and "
            f"{places_of(row['prompt'])} places for them in its prompt: drop the row"
        )
    return checked


def named_images(row, column="images"):
    """Return a list of (image, what an error calls it) for each image of a row."""
    stored_images = row[column] or []
    question = last_question(row)
    named = []
    for number, stored in enumerate(stored_images, start=1):
        part = "image"
        if len(stored_images) > 1:
            part = f"image {number} of {len(stored_images)}"
        named.append((stored, described(part, question, stored)))
    return named


def render(row, processor):
    """Return one row as the chat template writes it: `prompt`, `chosen`, `rejected` as texts.

    `images` stay as they are. An answer is rendered together with its prompt and the prompt is
    then cut off, because some templates, such as Qwen's, would put a system turn before an answer
    that is rendered alone.

    Raises ValueError when the template changes the prompt.
    """
    messages = conversation(row)
    prompt = processor.apply_chat_template(messages["prompt"], tokenize=False)
    rendered = {"images": row["images"], "prompt": prompt}
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
    sequences first, then the rejected ones. A batch without any image has no `pixel_values`.
    Raises ValueError when a text contains a special token of the model.
    """
    tokens = special_tokens(processor)
    for row in rows:
        require_plain_text(row, tokens)
    return DataCollatorForVisionPreference(processor)([dict(row) for row in rows])


def require_plain_text(row, tokens):
    """Raise ValueError when a text of a formatted row contains one of `tokens`."""
    for name in MESSAGES:
        refuse_special_tokens(tokens, text_of(row[name]), name)


def prompt_batch(rows, processor):
    """Return the prompts of `rows` for `generate`, padded on the left; an answer begins at the end.

    A row has `images` and `prompt`, as formatted rows do. Images of any mode are seen as in
    training, by `images.upright_rgb`. Raises ValueError when a prompt contains a special token of
    the model.
    """
    tokens = special_tokens(processor)
    texts = []
    nested = []
    count = 0
    for row in rows:
        refuse_special_tokens(tokens, text_of(row["prompt"]), "prompt")
        texts.append(
            processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        )
        upright = []
        for image in row["images"]:
            upright.append(upright_rgb(image, f"image {count}"))
            count += 1
        nested.append(upright)
    return processor(
        images=nested if count else None,
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )


def inference_batch(images, questions, processor):
    """Return `prompt_batch` of one image and one question per row.

    Raises ValueError unless each image has its question, and when a question contains a special
    token of the model.
    """
    if not images or len(images) != len(questions):
        raise ValueError(
            f"{len(images)} images and {len(questions)} questions: give at least one image, and "
            "one question for each"
        )
    rows = []
    for image, question in zip(images, questions, strict=True):
        rows.append({"images": [image], "prompt": prompt_messages(question)})
    return prompt_batch(rows, processor)


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

    Returns {"prompt_tokens", "image_tokens", "chosen_tokens", "rejected_tokens"}; the prompt is
    all turns before the answer, and the image tokens are part of it.

    Raises ValueError when the training prompt is not the inference prompt, token for token, or
    when an answer does not end with the chat template's end of a turn.
    """
    batch = training_batch([row], processor)
    tokenizer = processor.tokenizer
    expected = prompt_batch([row], processor)["input_ids"][0].tolist()
    counts = {
        "prompt_tokens": len(expected),
        "image_tokens": expected.count(image_token_id(processor)),
    }
    turn_end = end_of_turn(processor)
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


def end_of_turn(processor):
    """Return what the chat template writes after an answer, without white space around it."""
    known = "An answer."
    answer = answer_messages(known)
    sample = {"images": [], "prompt": prompt_messages("q"), "chosen": answer, "rejected": answer}
    return render(sample, processor)["chosen"].rpartition(known)[2].strip()


def count_tokens(row, processor, pixel_budget=None):
    """Return the length in tokens of the longer sequence of a formatted row, images included.

    It is the length that the collator gives the row, but no image is processed: the processor
    says how many tokens an image of that size takes.

    Images are Pillow images, or still stored as {"bytes", "path"}; then only the header is read,
    and `pixel_budget` says to what `format_dataset` reduces them. Raises ValueError when that is
    impossible, or when a text contains a special token.
    """
    require_plain_text(row, special_tokens(processor))
    sizes = []
    for image, name in named_images(row):
        sizes.append(image_size(image, name, pixel_budget))
    try:
        rendered = apply_chat_template({name: row[name] for name in MESSAGES}, processor)
    except TemplateError as error:
        prompt = described("prompt", last_question(row))
        raise ValueError(f"the chat template refuses {prompt}: {error}") from error
    # The collator, too, tokenizes an answer apart from its prompt.
    answers = [rendered[name] for name in ANSWERS]
    chosen, rejected = processor.tokenizer(answers, add_special_tokens=False)["input_ids"]
    return prompt_length(rendered["prompt"], sizes, processor) + max(len(chosen), len(rejected))


def prompt_length(prompt, sizes, processor):
    """Return the length in tokens of a rendered prompt with images of these (width, height)."""
    if not sizes:
        return len(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if counts_image_tokens(processor, processor.image_processor):
        return counted_length(prompt, sizes, processor)
    return processed_length(prompt, sizes, processor)


@lru_cache(maxsize=8)
def counts_image_tokens(processor, image_processor):
    """Return whether `counted_length` is right for a processor, as blank images show.

    It is wrong for Idefics2 and SmolVLM, which lack the method; for Gemma 3, which also puts line
    breaks around an image; for LLaVA-OneVision, which does not tile several images of a row; and
    for an Idefics3 whose tokenizer lacks the marks of the tiles.
    `image_processor` is the processor's own: a new one is asked again.
    """
    if not hasattr(processor, "_get_num_multimodal_tokens"):
        return False
    for sizes in ([(1000, 600)], [(1000, 600), (300, 900)]):  # large enough for several tiles
        places = [{"type": "image"} for _ in sizes]
        content = [*places, text_part("What is it?", "the question")]
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, tokenize=False)
        counted = counted_length(prompt, sizes, processor)
        if counted != processed_length(prompt, sizes, processor):
            return False
    return True


def counted_length(prompt, sizes, processor):
    """Return the length of a prompt as the processor counts it, without the images.

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

    Raises ValueError with the number of a row that reading would refuse, except for such a file,
    or that contains a special token, and when no row is left.
    """
    rows = dataset.with_transform(stored_batch)  # without decoding their images
    pixel_budget = pixel_budget_of(dataset)
    kept = []
    dropped = []
    for number in progress(range(len(dataset)), "counting tokens"):
        try:
            length = count_tokens(complete(rows[number]), processor, pixel_budget)
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


def stored_texts(rows):
    """Return the messages of formatted rows as a `Dataset`. No image is read."""
    return rows.with_transform(stored_batch).select_columns(list(MESSAGES))


def longest_first(texts):
    """Return the numbers of the rows of `stored_texts`, about the longest first."""
    sizes = []
    for row in texts:
        answer = max(len(text_of(row["chosen"])), len(text_of(row["rejected"])))
        images = IMAGE_CHARACTERS * places_of(row["prompt"])
        sizes.append(len(text_of(row["prompt"])) + images + answer)
    return sorted(range(len(sizes)), key=lambda number: sizes[number], reverse=True)


def pixel_budget_of(dataset):
    """Return the pixel budget to which `format_dataset` has the images of `dataset` reduced."""
    transform = dataset.format["format_kwargs"].get("transform")
    return getattr(transform, "keywords", {}).get("pixel_budget")
