import dataclasses
import io

import pytest
from datasets import Image as ImageFeature
from PIL import ExifTags, Image, ImageFile

from utils import chat, models, preferences
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


@pytest.fixture(scope="module")
def train():
    return preferences.load("embedded/dataset", "train[:40]")


def test_the_seed_row_is_rendered_letter_for_letter(processor):
    picture = Image.new("RGB", (640, 480))
    row = {"image": picture, "question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}
    formatted = chat.render(row, processor)
    assert list(formatted) == ["images", "prompt", "chosen", "rejected"]
    assert formatted["images"] == [picture]
    assert formatted["prompt"] == f"User:<image>{QUESTION}<end_of_utterance>\n"
    assert formatted["chosen"] == f"Assistant: {CHOSEN}<end_of_utterance>\n"
    assert formatted["rejected"] == f"Assistant: {REJECTED}<end_of_utterance>\n"


def test_formatting_leaves_the_bytes_of_the_images_alone(train):
    rows = chat.format_dataset(train)
    assert list(preferences.image_bytes(rows)) == list(preferences.image_bytes(train))
    assert rows.column_names == ["image", "prompt", "chosen", "rejected"]
    stored = train.cast_column("image", ImageFeature(decode=False))
    assert rows.with_format(None)[3]["image"] == stored[3]["image"]


def test_formatting_decodes_and_writes_nothing(train, monkeypatch):
    monkeypatch.setattr(
        ImageFeature, "decode_example", lambda *_, **__: pytest.fail("an image was decoded")
    )
    monkeypatch.setattr(chat, "read_image", lambda *_: pytest.fail("an image was read"))
    files = train.cache_files
    mixed = chat.format_dataset(train.shuffle(seed=0).select(range(0, len(train), 2)))
    assert mixed.cache_files == files
    assert len(mixed.remove_columns("image")["chosen"]) == len(mixed)


def test_formatting_keeps_every_text(train):
    texts = train.remove_columns("image")
    rows = chat.format_dataset(train).remove_columns("image")
    assert len(rows) == len(texts)
    for row, formatted in zip(texts, rows, strict=True):
        assert formatted == chat.conversation(row)


def test_shuffled_selected_and_streamed_rows_are_the_same_rows(train):
    order = [3, 0, 5]
    rows = chat.format_dataset(train.select(order))
    streamed = list(chat.format_dataset(train.to_iterable_dataset()))
    for row, number in zip(rows, order, strict=True):
        for formatted in (row, streamed[number]):
            assert formatted.pop("image").tobytes() == train[number]["image"].tobytes()
            assert formatted == chat.conversation(train[number])


def test_training_prompt_is_the_inference_prompt(train, processor):
    rows = chat.format_dataset(train)
    counts = [chat.check_tokens(row, processor) for row in rows]
    assert all(count["image_tokens"] == 9 for count in counts)
    assert all(count["chosen_tokens"] > 2 for count in counts)


def test_an_answer_rendered_alone_may_bring_a_system_turn(processor, monkeypatch):
    """`render` cuts the prompt off instead, because Qwen2-VL's template adds a system turn."""
    template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    monkeypatch.setattr(processor, "chat_template", template)
    row = {"image": None, "question": "q", "chosen": "a", "rejected": "b"}
    assert "system" in processor.apply_chat_template(chat.answer_messages("a"), tokenize=False)
    assert chat.render(row, processor)["chosen"] == "<|im_start|>assistant\na<|im_end|>\n"


def test_a_template_that_changes_the_prompt_is_refused(processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", "{{ messages | length }}")
    with pytest.raises(ValueError, match="template"):
        chat.render({"image": None, "question": "q", "chosen": "a", "rejected": "b"}, processor)


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
        assert "".join(answer).strip().startswith(train[0][name])


def collated(row, processor):
    return chat.training_batch([row], processor)["input_ids"].shape[1]


def test_rows_over_the_budget_are_dropped_and_named(train, processor):
    """In any order of the rows, which a table of stored images does not know."""
    mixed = train.shuffle(seed=1).select(range(30))
    for rows in (chat.format_dataset(train), chat.format_dataset(mixed)):
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
    texts = chat.conversation({"question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED})
    for size in ((1, 1), (8, 6), (72, 72), (100, 30), (30, 100), (640, 480), (3, 300)):
        row = {"image": Image.new("RGB", size), **texts}
        assert chat.count_tokens(row, processor) == collated(row, processor)


def test_a_turned_image_counts_as_the_upright_one_does():
    processor = models.load_processor(dataclasses.replace(PROFILES["embedded"], pixel_budget=20736))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    Image.new("RGB", (30, 100)).save(file, "JPEG", exif=exif)
    texts = chat.conversation({"question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED})
    stored = {"image": {"bytes": file.getvalue(), "path": None}, **texts}
    upright = {"image": Image.new("RGB", (100, 30)), **texts}
    lying = {"image": Image.new("RGB", (30, 100)), **texts}
    assert chat.count_tokens(stored, processor) == collated(upright, processor)
    assert collated(upright, processor) != collated(lying, processor)
