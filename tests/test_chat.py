import dataclasses
import io

import pytest
from datasets import Image as ImageFeature
from families import FAMILIES, make_processor
from mixed_rows import (
    BATCHES,
    BLUE,
    IMAGE,
    NONE,
    ONE,
    ROWS,
    TURNS,
    TWO,
    WITH_SYSTEM,
    stored,
    text,
    turn,
)
from mixed_rows import dataset as mixed
from mixed_rows import row as mixed_row
from PIL import ExifTags, Image, ImageFile

from utils import chat, families, images, layouts, models, preferences
from utils.settings import PROFILES

# The row and the strings of the article that this project grew from, letter for letter.
QUESTION = "Who is more likely to use these tools a leather crafter or a paper crafter?"
CHOSEN = (
    "A leather crafter is more likely to use these tools. The image shows various crafting tools, "
    "including scissors and a hole punch, which are commonly used in leatherworking projects. "
    "Leather is a material that requires cutting, shaping, and precise hole-punching techniques to "
    "create desired designs or patterns. In contrast, paper crafters typically use different types "
    "of tools, such as adhesives, decorative papers, or specialized cutting machines like the "
    "Silhouette Cameo, for their projects."
)
REJECTED = (
    "A leather crafter is more likely to use these tools as they consist of a hole punch, "
    "scissors, and a knife. These items are typically used in crafting projects involving fabric "
    "or leather materials for various designs and patterns. Paper crafters may also benefit from "
    "some of these tools, but their primary focus would be on paper-related projects, which might "
    "require different types of tools such as paper cutters or scrapbooking supplies."
)


def article_row(image):
    return {
        "images": [image],
        "prompt": chat.prompt_messages(QUESTION),
        "chosen": chat.answer_messages(CHOSEN),
        "rejected": chat.answer_messages(REJECTED),
    }


@pytest.fixture(scope="module")
def train():
    return preferences.load("embedded/dataset", "train[:40]")


def test_the_seed_row_is_rendered_letter_for_letter(processor):
    picture = Image.new("RGB", (640, 480))
    formatted = chat.render(article_row(picture), processor)
    assert list(formatted) == ["images", "prompt", "chosen", "rejected"]
    assert formatted["images"] == [picture]
    assert formatted["prompt"] == f"User:<image>{QUESTION}<end_of_utterance>\n"
    assert formatted["chosen"] == f"Assistant: {CHOSEN}<end_of_utterance>\n"
    assert formatted["rejected"] == f"Assistant: {REJECTED}<end_of_utterance>\n"


def test_formatting_leaves_the_bytes_of_the_images_alone(train):
    rows = chat.format_dataset(train)
    assert rows.column_names == ["images", "prompt", "chosen", "rejected"]
    assert rows.with_format(None)["images"] == train.with_format(None)["images"]
    assert train.with_format(None)[3]["images"]["bytes"].startswith(b"\xff\xd8")


def test_formatting_decodes_and_writes_nothing(train, monkeypatch):
    monkeypatch.setattr(
        ImageFeature, "decode_example", lambda *_, **__: pytest.fail("an image was decoded")
    )
    monkeypatch.setattr(chat, "read_image", lambda *_: pytest.fail("an image was read"))
    files = train.cache_files
    few = chat.format_dataset(train.shuffle(seed=0).select(range(0, len(train), 2)))
    assert few.cache_files == files
    assert len(few.remove_columns("images")["chosen"]) == len(few)


@pytest.mark.parametrize("shuffled", [False, True])
def test_formatted_rows_are_the_loaded_ones_with_their_images_decoded(shuffled):
    order = [3, 0, 5] if shuffled else range(len(ROWS))
    rows = chat.format_dataset(mixed().select(order))
    assert_read_as(rows, [ROWS[number] for number in order])


def assert_read_as(rows, expected):
    count = 0
    for row, stored_row in zip(rows, expected, strict=True):
        assert list(row) == ["images", "prompt", "chosen", "rejected"]
        pixels = [(image.mode, image.tobytes()) for image in row["images"]]
        known = [images.read_image(image) for image in stored_row["images"]]
        assert pixels == [("RGB", image.tobytes()) for image in known]
        assert {**row, "images": None} == {**stored_row, "images": None}
        count += 1
    assert count > 0


def test_streamed_rows_are_the_same_rows(train):
    loaded = mixed().with_format(None)
    assert_read_as(chat.format_dataset(loaded.to_iterable_dataset()), ROWS)
    converted = loaded.to_iterable_dataset().map(lambda row: row)
    assert converted.column_names is None
    assert_read_as(chat.format_dataset(converted), ROWS)


def test_columns_that_were_not_asked_for_are_absent():
    rows = chat.format_dataset(mixed(idx=(list(range(6)), layouts.Value("int64"))))
    assert rows.column_names == ["images", "prompt", "chosen", "rejected"]
    assert rows.remove_columns("images")[2] == {name: TWO[name] for name in layouts.MESSAGES}
    assert [image.size for image in rows.select_columns(["images"])[2]["images"]] == [
        (60, 20),
        (20, 50),
    ]
    assert rows[:0] == {"images": [], "prompt": [], "chosen": [], "rejected": []}


def test_large_images_are_reduced_as_they_are_read_and_counted_so(monkeypatch):
    """Qwen-VL's processor, here with a larger budget of its own, sees the difference."""
    monkeypatch.setattr(images, "NO_PHOTOGRAPH", 0)  # pixels up to which no image is reduced
    processor = families.complete_template(make_processor(FAMILIES["Qwen2-VL"]))
    large = [stored("red", 60, 10), stored("blue", 10, 80), stored("green", 16, 8)]
    loaded = mixed([mixed_row([image], ONE["prompt"]) for image in large])
    rows = chat.format_dataset(loaded, 256)
    sizes = [row["images"][0].size for row in rows]
    assert sizes == [images.image_size(image, pixel_budget=256) for image in large]
    assert sizes[0] != (60, 10) and sizes[2] == (16, 8)
    lengths = [collated(row, processor) for row in rows]
    unreduced = [collated(row, processor) for row in chat.format_dataset(loaded)]
    assert max(lengths) < min(unreduced[:2])
    assert chat.within_budget(rows, processor, max(lengths)) == (rows, [])
    _, dropped = chat.within_budget(chat.format_dataset(loaded), processor, max(lengths))
    assert dropped == [0, 1]
    streamed = chat.format_dataset(loaded.with_format(None).to_iterable_dataset(), 256)
    assert [row["images"][0].size for row in streamed] == sizes


# Rows that cannot be used


MISSING = {"type": "text", "text": None}
ASKED = "'What is it?'"
LOST = [{"bytes": None, "path": "lost.png"}]
NO_ANSWER = {**ONE, "rejected": [turn("assistant", MISSING)]}
NO_QUESTION = {**NONE, "prompt": [turn("user", MISSING)]}
TWO_PLACES = mixed_row([BLUE], [turn("user", IMAGE, IMAGE, text("What is it?"))])
SECOND_LOST = {**TWO, "images": [BLUE, *LOST]}
UNREAD = {"images": [BLUE], "prompt": [], "chosen": [], "rejected": [], "problem": "no prompt"}


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        (NO_ANSWER, ("rejected answer", ASKED, "not text")),
        ({**ONE, "chosen": []}, ("chosen answer", ASKED, "missing")),
        (NO_QUESTION, ("prompt", "not text")),
        (TWO_PLACES, (ASKED, "1 images", "2 places")),
        ({**ONE, "images": LOST}, ("image lost.png", ASKED)),
        (SECOND_LOST, ("image 2 of 2 lost.png", "'And differ in?'")),
        (UNREAD, ("cannot be read: no prompt",)),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, facts, processor):
    loaded = mixed([ONE, row])
    rows = chat.format_dataset(loaded)
    stream = iter(chat.format_dataset(loaded.with_format(None).to_iterable_dataset()))
    assert rows[0] == next(stream)
    messages = []
    for read in (
        lambda: rows[1],
        lambda: next(stream),
        lambda: chat.within_budget(rows, processor, 256),
    ):
        with pytest.raises(ValueError) as raised:
            read()
        messages.append(str(raised.value))
    for fact in facts:
        assert all(fact in message for message in messages), messages
    assert all(message.startswith("row 1: ") for message in messages[1:])


def test_a_data_set_in_another_layout_is_refused():
    raw = mixed().remove_columns("prompt")
    for dataset in (raw, raw.with_format(None).to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"no column prompt; .*preferences\.load"):
            chat.format_dataset(dataset)


def test_images_of_rejected_answers_are_kept_for_who_asks_for_them():
    second = ([[BLUE], None, [], [], [], []], layouts.IMAGE_LIST)
    rows = chat.format_dataset(mixed(rejected_images=second))
    assert rows.column_names[-1] == "rejected_images"
    assert [image.size for image in rows[0]["rejected_images"]] == [(60, 20)]
    assert rows[1]["rejected_images"] == []


def test_a_special_token_in_any_turn_is_refused(processor):
    hidden = turn("assistant", text("A <image> tree."))
    row = {**TURNS, "prompt": [TURNS["prompt"][0], hidden, TURNS["prompt"][2]]}
    loaded = mixed([ONE, row])
    rows = chat.format_dataset(loaded)
    tokens = preferences.special_tokens(processor)
    stream = chat.format_dataset(
        loaded.with_format(None).to_iterable_dataset(), special_tokens=tokens
    )
    for act in (
        lambda: chat.training_batch([rows[1]], processor),
        lambda: chat.prompt_batch([rows[1]], processor),
        lambda: chat.within_budget(rows, processor, 256),
        lambda: list(stream),
    ):
        with pytest.raises(ValueError, match="contains <image>"):
            act()


def test_turns_that_the_chat_template_refuses_are_named():
    processor = families.complete_template(make_processor(FAMILIES["Gemma 3"]))
    rows = chat.format_dataset(mixed([ONE, WITH_SYSTEM]))
    with pytest.raises(ValueError, match=r"^row 1: .*template .*'What is it\?'.* alternate"):
        chat.within_budget(rows, processor, 256)


# Training and inference


def test_training_prompt_is_the_inference_prompt(train, processor):
    rows = chat.format_dataset(train)
    counts = [chat.check_tokens(row, processor) for row in rows]
    assert all(count["image_tokens"] == 9 for count in counts)
    assert all(count["chosen_tokens"] > 2 for count in counts)


@pytest.mark.parametrize("row", ROWS)
def test_so_it_is_for_turns_and_images_of_any_number(row, processor):
    formatted = chat.format_dataset(mixed([row]))[0]
    counts = chat.check_tokens(formatted, processor)
    assert counts["image_tokens"] == 9 * len(row["images"])
    prompt = chat.prompt_batch([formatted], processor)
    assert prompt["input_ids"].shape[1] == counts["prompt_tokens"]
    spoken = processor.tokenizer.decode(prompt["input_ids"][0])
    assert spoken.endswith("Assistant:")
    for message in row["prompt"]:
        assert layouts.text_of([message]).splitlines()[0] in spoken
    assert ("pixel_values" in prompt) == bool(row["images"])


def test_a_prompt_of_other_turns_in_training_is_found(processor, monkeypatch):
    right = chat.prompt_batch

    def last_turn_only(rows, processor):
        return right([{**row, "prompt": row["prompt"][-1:]} for row in rows], processor)

    formatted = chat.format_dataset(mixed([WITH_SYSTEM]))[0]
    monkeypatch.setattr(chat, "prompt_batch", last_turn_only)
    with pytest.raises(ValueError, match=r"System: Be brief.* is not the inference prompt"):
        chat.check_tokens(formatted, processor)


def test_prompts_with_and_without_images_are_asked_in_one_batch(processor):
    rows = list(chat.format_dataset(mixed()))
    together = chat.prompt_batch(rows, processor)
    for number, row in enumerate(rows):
        alone = chat.prompt_batch([row], processor)["input_ids"][0]
        real = together["attention_mask"][number].bool()
        assert together["input_ids"][number][real].equal(alone)
        assert real[-1]
    pictures = (together["pixel_values"] != 0).flatten(2).any(2).sum(1)
    assert pictures.tolist() == [len(row["images"]) for row in rows]


def test_one_image_and_one_question_are_such_a_prompt(processor):
    row = chat.format_dataset(mixed([ONE]))[0]
    batch = chat.inference_batch(row["images"], ["What is it?"], processor)
    for name, value in chat.prompt_batch([row], processor).items():
        assert batch[name].equal(value), name


@pytest.mark.parametrize("case", BATCHES)
def test_a_training_batch_holds_rows_as_they_are_alone(case, processor):
    rows = list(chat.format_dataset(mixed(BATCHES[case])))
    batch = chat.training_batch(rows, processor)
    for number, row in enumerate(rows):
        alone = chat.training_batch([row], processor)
        for side in range(2):
            place = side * len(rows) + number
            for name in ("input_ids", "completion_mask"):
                real = batch[name][place][batch["attention_mask"][place].bool()]
                expected = alone[name][side][alone["attention_mask"][side].bool()]
                assert real.equal(expected), name
    assert ("pixel_values" in batch) == (case != "text alone")


def test_an_answer_rendered_alone_may_bring_a_system_turn(processor, monkeypatch):
    """`render` cuts the prompt off instead, because Qwen2-VL's template adds a system turn."""
    template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    monkeypatch.setattr(processor, "chat_template", template)
    assert "system" in processor.apply_chat_template(ONE["chosen"], tokenize=False)
    assert chat.render(ONE, processor)["chosen"] == "<|im_start|>assistant\nA cup.<|im_end|>\n"


def test_a_template_that_changes_the_prompt_is_refused(processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", "{{ messages | length }}")
    with pytest.raises(ValueError, match="template"):
        chat.render(ONE, processor)


def test_an_answer_without_an_end_is_refused(processor, train, monkeypatch):
    row = chat.format_dataset(train)[0]
    whole = chat.training_batch([row], processor)
    whole["completion_mask"][:, -4:] = 0
    whole["attention_mask"][:, -4:] = 0
    monkeypatch.setattr(chat, "training_batch", lambda *_: whole)
    with pytest.raises(ValueError, match=r"rejected answer .*'<end_of_utterance>'"):
        chat.check_tokens(row, processor)


def test_token_kinds_cover_prompt_image_and_answer(train, processor):
    views = chat.token_kinds(chat.format_dataset(train)[0], processor)
    for name, (tokens, kinds) in views.items():
        assert len(tokens) == len(kinds)
        assert set(kinds) == {"prompt", "image", name}
        answer = [token for token, kind in zip(tokens, kinds, strict=True) if kind == name]
        assert "".join(answer).strip().startswith(layouts.text_of(train[0][name]))
    views = chat.token_kinds(chat.format_dataset(mixed([TWO]))[0], processor)
    assert views["rejected"][1].count("image") == 18
    views = chat.token_kinds(chat.format_dataset(mixed([NONE]))[0], processor)
    assert set(views["rejected"][1]) == {"prompt", "rejected"}


def collated(row, processor):
    return chat.training_batch([row], processor)["input_ids"].shape[1]


def test_rows_over_the_budget_are_dropped_and_named(train, processor):
    """In any order of the rows, which a table of stored images does not know."""
    shuffled = train.shuffle(seed=1).select(range(30))
    for loaded in (train, shuffled, mixed()):
        rows = chat.format_dataset(loaded)
        lengths = [collated(row, processor) for row in rows]
        budget = sorted(lengths)[len(lengths) // 2]
        kept, dropped = chat.within_budget(rows, processor, budget)
        fitting = [number for number, length in enumerate(lengths) if length <= budget]
        assert dropped == [number for number, length in enumerate(lengths) if length > budget]
        assert list(kept) == list(rows.select(fitting))
        assert chat.within_budget(rows, processor, 10_000) == (rows, [])


def test_no_image_is_decoded_to_count_tokens(train, processor, monkeypatch):
    rows = chat.format_dataset(train)
    chat.within_budget(rows, processor, 10_000)  # asks once whether the processor can count
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    monkeypatch.setattr(type(processor), "__call__", lambda *_, **__: pytest.fail("processed"))
    assert chat.within_budget(rows, processor, 10_000) == (rows, [])


@pytest.mark.parametrize("side", [72, 144, 216])
def test_counted_tokens_are_the_collators_for_images_of_any_size(side):
    """With one tile the processor's own count is right, with more of them it is not."""
    profile = dataclasses.replace(PROFILES["embedded"], pixel_budget=side * side)
    processor = models.load_processor(profile)
    trusted = chat.counts_image_tokens(processor, processor.image_processor)
    assert trusted == (side == 72)
    sizes = ((1, 1), (8, 6), (72, 72), (100, 30), (30, 100), (640, 480), (3, 300))
    for size in sizes:
        row = article_row(Image.new("RGB", size))
        assert chat.count_tokens(row, processor) == collated(row, processor)
    for first, second in zip(sizes, reversed(sizes), strict=True):
        row = {**TWO, "images": [Image.new("RGB", first), Image.new("RGB", second)]}
        assert chat.count_tokens(row, processor) == collated(row, processor)


def test_a_turned_image_counts_as_the_upright_one_does():
    processor = models.load_processor(dataclasses.replace(PROFILES["embedded"], pixel_budget=20736))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    Image.new("RGB", (30, 100)).save(file, "JPEG", exif=exif)
    turned = article_row({"bytes": file.getvalue(), "path": None})
    upright = article_row(Image.new("RGB", (100, 30)))
    lying = article_row(Image.new("RGB", (30, 100)))
    assert chat.count_tokens(turned, processor) == collated(upright, processor)
    assert collated(upright, processor) != collated(lying, processor)
