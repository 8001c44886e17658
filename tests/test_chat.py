import pytest
from datasets import Image as ImageFeature
from PIL import Image

from utils import chat, preferences

# The row and the strings of the article that this project grew from, letter for letter.
QUESTION = "Who is more likely to use these tools a leather crafter or a paper crafter?"
CHOSEN = (
    "A leather crafter is more likely to use these tools. The image shows various crafting tools, including scissors and a hole "
    "punch, which are commonly used in leatherworking projects. Leather is a material that requires cutting, shaping, and precise "
    "hole-punching techniques to create desired designs or patterns. In contrast, paper crafters typically use different types of "
    "tools, such as adhesives, decorative papers, or specialized cutting machines like the Silhouette Cameo, for their projects."
)
REJECTED = (
    "A leather crafter is more likely to use these tools as they consist of a hole punch, scissors, and a knife. These items are "
    "typically used in crafting projects involving fabric or leather materials for various designs and patterns. Paper crafters "
    "may also benefit from some of these tools, but their primary focus would be on paper-related projects, which might require "
    "different types of tools such as paper cutters or scrapbooking supplies."
)


@pytest.fixture(scope="module")
def train():
    return preferences.load("embedded/dataset", "train[:40]")


def test_the_seed_row_is_rendered_letter_for_letter(processor):
    picture = Image.new("RGB", (640, 480))
    formatted = chat.render(
        {"image": picture, "question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}, processor
    )
    assert list(formatted) == ["images", "prompt", "chosen", "rejected"]
    assert formatted["images"] == [picture] and formatted["images"][0].size == (640, 480)
    assert formatted["prompt"] == f"User:<image>{QUESTION}<end_of_utterance>\n"
    assert formatted["chosen"] == f"Assistant: {CHOSEN}<end_of_utterance>\n"
    assert formatted["rejected"] == f"Assistant: {REJECTED}<end_of_utterance>\n"


def test_formatting_leaves_the_bytes_of_the_images_alone(train):
    rows = chat.format_dataset(train)
    assert list(preferences.image_bytes(rows)) == list(preferences.image_bytes(train))
    assert rows.column_names == ["image", "prompt", "chosen", "rejected"]
    assert (
        rows.with_format(None)[3]["image"]
        == train.cast_column("image", ImageFeature(decode=False))[3]["image"]
    )


def test_formatting_decodes_and_writes_nothing(train, monkeypatch, tmp_path):
    monkeypatch.setattr(
        ImageFeature, "decode_example", lambda *_, **__: pytest.fail("an image was decoded")
    )
    monkeypatch.setattr(chat, "read", lambda *_: pytest.fail("an image was read"))
    files = train.cache_files
    mixed = chat.format_dataset(train.shuffle(seed=0).select(range(0, len(train), 2)))
    assert mixed.cache_files == files
    assert len(mixed.remove_columns("image")["chosen"]) == len(mixed)


def test_formatting_keeps_every_text(train):
    for row, formatted in zip(
        train.remove_columns("image"),
        chat.format_dataset(train).remove_columns("image"),
        strict=True,
    ):
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
    assert all(c["image_tokens"] == 9 and c["chosen_tokens"] > 2 for c in counts)


def test_an_answer_rendered_alone_may_bring_a_system_turn(processor):
    """Why `render` cuts the prompt off instead: the template of Qwen2-VL inserts a default system turn."""
    template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    original, processor.chat_template = processor.chat_template, template
    try:
        row = {"image": None, "question": "q", "chosen": "a", "rejected": "b"}
        assert "system" in processor.apply_chat_template(chat.answer_messages("a"), tokenize=False)
        assert chat.render(row, processor)["chosen"] == "<|im_start|>assistant\na<|im_end|>\n"
    finally:
        processor.chat_template = original


def test_a_template_that_changes_the_prompt_is_refused(processor):
    original, processor.chat_template = processor.chat_template, "{{ messages | length }}"
    try:
        with pytest.raises(ValueError, match="changes the prompt when an answer follows"):
            chat.render({"image": None, "question": "q", "chosen": "a", "rejected": "b"}, processor)
    finally:
        processor.chat_template = original


def test_an_answer_without_an_end_is_refused(processor, train, monkeypatch):
    row = chat.format_dataset(train)[0]
    whole = chat.training_batch([row], processor)
    whole["completion_mask"][:, -4:], whole["attention_mask"][:, -4:] = 0, 0
    monkeypatch.setattr(chat, "training_batch", lambda *_: whole)
    with pytest.raises(ValueError, match="never learns to stop"):
        chat.check_tokens(row, processor)


def test_token_kinds_cover_prompt_image_and_answer(train, processor):
    views = chat.token_kinds(chat.format_dataset(train)[0], processor)
    for name, (tokens, kinds) in views.items():
        assert len(tokens) == len(kinds) and set(kinds) == {"prompt", "image", name}
        assert (
            "".join(t for t, k in zip(tokens, kinds, strict=True) if k == name)
            .strip()
            .startswith(train[0][name])
        )


def test_rows_over_the_budget_are_dropped_and_named(train, processor):
    rows = chat.format_dataset(train)
    lengths = [chat.count_tokens(row, processor) for row in rows]
    budget = sorted(lengths)[len(lengths) // 2]
    kept, dropped = chat.within_budget(rows, processor, budget)
    assert dropped == [i for i, n in enumerate(lengths) if n > budget] and len(kept) + len(
        dropped
    ) == len(rows)
    assert chat.within_budget(rows, processor, 10_000) == (rows, [])
