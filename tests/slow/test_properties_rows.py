"""What holds in chat, tokens and own pairs for every text that hypothesis makes up."""

import csv
import io
import json
import re

import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from test_properties_texts import TEXTS

from utils import chat, layouts, models, preferences
from utils.preferences import REQUIRED_COLUMNS, TEXT_COLUMNS
from utils.settings import PROFILES

FEW = settings(max_examples=settings.default.max_examples // 5)  # for what takes long
SPECIAL = [
    "</s>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
    "<s>",
    "<unk>",
]
PLAIN = TEXTS.filter(lambda text: not any(token in text for token in SPECIAL))
RED = PillowImage.new("RGB", (8, 6), "red")
BLUE = PillowImage.new("RGB", (8, 6), "blue")


# chat


@pytest.fixture(scope="module")
def processor():
    found = models.load_processor(PROFILES["embedded"])
    assert preferences.special_tokens(found) == SPECIAL
    return found


def row_of(question, chosen, rejected):
    return {"image": RED, "question": question, "chosen": chosen, "rejected": rejected}


def formatted(row):
    return {"image": row["image"], **chat.conversation(row)}


@given(PLAIN, PLAIN, PLAIN)
def test_every_text_comes_back_out_of_chat_and_tokens_with_no_character_lost(
    processor, question, chosen, rejected
):
    row = row_of(question, chosen, rejected)
    decode = processor.tokenizer.decode
    rendered = chat.render(row, processor)
    batch = chat.training_batch([formatted(row)], processor)
    assert rendered["prompt"] == f"User:<image>{question}<end_of_utterance>\n"
    image = "<fake_token_around_image><global-img>" + 9 * "<image>" + "<fake_token_around_image>"
    for number, name in enumerate(chat.ANSWERS):
        ids = batch["input_ids"][number]
        real = batch["attention_mask"][number].bool()
        answer = batch["completion_mask"][number].bool()
        assert rendered[name] == f"Assistant: {row[name]}<end_of_utterance>\n"
        assert decode(ids[answer]) == f" {row[name]}<end_of_utterance>\n"
        assert decode(ids[real]) == f"User:{image}{question}<end_of_utterance>\n{rendered[name]}"
        assert (ids == chat.image_token_id(processor)).sum() == 9


@given(PLAIN, PLAIN, st.sampled_from(SPECIAL), st.sampled_from(TEXT_COLUMNS))
def test_a_special_token_is_refused_wherever_it_stands(processor, before, after, token, column):
    text = before + token + after
    row = {**row_of("Q?", "Yes.", "No."), column: text}
    with pytest.raises(ValueError, match=re.escape(token)):
        chat.training_batch([formatted(row)], processor)
    with pytest.raises(ValueError, match=re.escape(token)):
        chat.inference_batch([RED], [text], processor)


def true_length(row, processor):
    """Return the tokens of the longer of the two rendered chats, as the processor counts them."""
    rendered = chat.render(row, processor)
    lengths = []
    for name in chat.ANSWERS:
        text = rendered["prompt"] + rendered[name]
        batch = processor(images=[[RED]], text=[text], add_special_tokens=False)
        lengths.append(len(batch["input_ids"][0]))
    return max(lengths)


@given(PLAIN, PLAIN, PLAIN)
def test_the_tokens_counted_are_those_of_the_longer_chat(processor, question, chosen, rejected):
    row = row_of(question, chosen, rejected)
    # This also compares the prompt with inference.
    parts = chat.check_tokens(formatted(row), processor)
    longer = max(parts["chosen_tokens"], parts["rejected_tokens"])
    assert chat.count_tokens(formatted(row), processor) == true_length(row, processor)
    assert true_length(row, processor) == parts["prompt_tokens"] + longer
    assert parts["image_tokens"] == 9


@FEW
@given(
    st.lists(st.builds(row_of, PLAIN, PLAIN, PLAIN), min_size=1, max_size=5),
    st.integers(0, 4),
    st.integers(-1, 1),
)
def test_the_budget_keeps_exactly_the_rows_that_fit_and_names_the_others(
    processor, rows, which, more
):
    features = Features({"image": Image()} | dict.fromkeys(TEXT_COLUMNS, Value("string")))
    dataset = chat.format_dataset(Dataset.from_list(rows, features=features))
    lengths = [true_length(row, processor) for row in rows]
    budget = lengths[which % len(rows)] + more
    fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= budget]
    if not fitting:
        with pytest.raises(ValueError, match=f"{budget} tokens"):
            chat.within_budget(dataset, processor, budget)
        return
    kept, dropped = chat.within_budget(dataset, processor, budget)
    assert list(kept.remove_columns("image")) == [chat.conversation(row) for row in fitting]
    assert dropped == [number for number, length in enumerate(lengths) if length > budget]


# own pairs

CELLS = TEXTS | st.sampled_from(["A cup.", "A dog.", " "])
IMAGES = st.sampled_from(["red.png", "blue.png"])
TABLES = st.lists(
    st.fixed_dictionaries({"image": IMAGES, **dict.fromkeys(TEXT_COLUMNS, CELLS)}), max_size=4
)
CUTS = [b"\\ud800", b'"', b"\n", b",", b'"chosen": "", ', b"[" * 5000, b"1" * 5000, b"../"]
DAMAGE = st.binary(max_size=4) | st.sampled_from(CUTS)
# From where, how much is removed, what is put there.
EDITS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9), DAMAGE), max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    RED.save(path / "red.png")
    BLUE.save(path / "blue.png")
    return path


def written(rows, kind):
    """Return (the bytes of the table, the line at which each row begins)."""
    if kind == "jsonl":
        header = ""
        lines = []
        for number, row in enumerate(rows):
            lines.append(json.dumps(row, ensure_ascii=number % 2 == 0) + "\n")
    else:
        header = csv_line(REQUIRED_COLUMNS)
        lines = [csv_line([row[column] for column in REQUIRED_COLUMNS]) for row in rows]
    text = header
    starts = []
    for line in lines:
        starts.append(1 + text.count("\n"))
        text += line
    return text.encode(), starts


def csv_line(values):
    file = io.StringIO()
    csv.writer(file).writerow(values)
    return file.getvalue()


def load(folder, data, kind):
    for name in layouts.NAMES:
        (folder / name).unlink(missing_ok=True)
    (folder / f"pairs.{kind}").write_bytes(data)
    return layouts.load_folder(folder)


def lines_refused(error, data):
    """Return the lines that an error names, each of which the file has."""
    lines = [int(line) for line in re.findall(r"^line (\d+): ", str(error), flags=re.MULTILINE)]
    assert all(1 <= line <= data.count(b"\n") + 1 for line in lines)
    return lines


def is_wrong(rows, number):
    row = rows[number]
    swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    repeated = row in rows[:number] or swapped in rows[: number + 1]
    return repeated or not all(row[column].strip() for column in TEXT_COLUMNS)


def without_image(row):
    return {column: row[column] for column in TEXT_COLUMNS}


@given(TABLES, st.sampled_from(["csv", "jsonl"]))
@example(
    [{"image": "red.png", "question": "What?", "chosen": "A \ufffd cup.", "rejected": "A dog."}],
    "csv",
)  # valid UTF-8
def test_a_table_is_read_letter_for_letter_or_refused_with_the_lines_at_fault(folder, rows, kind):
    data, starts = written(rows, kind)
    wrong = {start for number, start in enumerate(starts) if is_wrong(rows, number)}
    if wrong or not rows:
        with pytest.raises(ValueError, match=rf"pairs\.{kind}") as error:
            load(folder, data, kind)
        assert set(lines_refused(error.value, data)) == wrong
    else:
        dataset = load(folder, data, kind)
        assert list(dataset.remove_columns("image")) == [without_image(row) for row in rows]
        stored = [(folder / row["image"]).read_bytes() for row in rows]
        assert list(preferences.image_bytes(dataset)) == stored


@given(TABLES, st.sampled_from(["csv", "jsonl"]), EDITS)
@example(
    [],
    "jsonl",
    [(0, 0, b'{"image": "red.png", "question": "?", "chosen": "\\ud800", "rejected": "No."}')],
)
@example([], "jsonl", [(0, 0, b'{"chosen": "Yes.", "chosen": "No."}')])
@example([], "csv", [(0, 99, b'image,question,chosen,rejected\nred.png,"What?')])
def test_a_damaged_table_is_read_or_refused_by_line_and_nothing_else(folder, rows, kind, edits):
    data = written(rows, kind)[0]
    for start, length, new in edits:
        data = data[:start] + new + data[start + length :]
    try:
        assert len(load(folder, data, kind))
    except ValueError as refusal:
        assert "0 pairs read, 0 problems" in str(refusal) or lines_refused(refusal, data)
