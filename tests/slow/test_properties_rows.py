"""What holds in chat, tokens and own pairs for every text that hypothesis makes up."""

import csv
import io
import json
import re

import pytest
from datasets import Dataset, Features, Image, List
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from test_properties_texts import TEXTS

from utils import chat, models, preferences, text_files
from utils.images import file_bytes
from utils.layouts import MESSAGE_LIST, MESSAGES, PLACEHOLDER
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
FEATURES = Features({"images": List(Image()), **dict.fromkeys(MESSAGES, MESSAGE_LIST)})


# chat


@pytest.fixture(scope="module")
def processor():
    found = models.load_processor(PROFILES["embedded"])
    assert preferences.special_tokens(found) == SPECIAL
    return found


def row_of(question, chosen, rejected):
    """Return a formatted row."""
    return {
        "images": [RED],
        "prompt": chat.prompt_messages(question),
        "chosen": chat.answer_messages(chosen),
        "rejected": chat.answer_messages(rejected),
    }


@given(PLAIN, PLAIN, PLAIN)
def test_every_text_comes_back_out_of_chat_and_tokens_with_no_character_lost(
    processor, question, chosen, rejected
):
    row = row_of(question, chosen, rejected)
    decode = processor.tokenizer.decode
    rendered = chat.render(row, processor)
    batch = chat.training_batch([row], processor)
    assert rendered["prompt"] == f"User:<image>{question}<end_of_utterance>\n"
    image = "<fake_token_around_image><global-img>" + 9 * "<image>" + "<fake_token_around_image>"
    for number, (name, said) in enumerate([("chosen", chosen), ("rejected", rejected)]):
        ids = batch["input_ids"][number]
        real = batch["attention_mask"][number].bool()
        answer = batch["completion_mask"][number].bool()
        assert rendered[name] == f"Assistant: {said}<end_of_utterance>\n"
        assert decode(ids[answer]) == f" {said}<end_of_utterance>\n"
        assert decode(ids[real]) == f"User:{image}{question}<end_of_utterance>\n{rendered[name]}"
        assert (ids == chat.image_token_id(processor)).sum() == 9


@given(PLAIN, PLAIN, st.sampled_from(SPECIAL), st.sampled_from(MESSAGES))
def test_a_special_token_is_refused_wherever_it_stands(processor, before, after, token, column):
    text = before + token + after
    row = row_of("Q?", "Yes.", "No.")
    row[column][-1]["content"][-1]["text"] = text
    with pytest.raises(ValueError, match=re.escape(token)):
        chat.training_batch([row], processor)
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
    parts = chat.check_tokens(row, processor)
    longer = max(parts["chosen_tokens"], parts["rejected_tokens"])
    assert chat.count_tokens(row, processor) == true_length(row, processor)
    assert true_length(row, processor) == parts["prompt_tokens"] + longer
    assert parts["image_tokens"] == 9


@FEW
@given(
    st.lists(st.tuples(PLAIN, PLAIN, PLAIN), min_size=1, max_size=5),
    st.integers(0, 4),
    st.integers(-1, 1),
)
def test_the_budget_keeps_exactly_the_rows_that_fit_and_names_the_others(
    processor, texts, which, more
):
    rows = [row_of(*three) for three in texts]
    dataset = chat.format_dataset(Dataset.from_list(rows, features=FEATURES))
    lengths = [true_length(row, processor) for row in rows]
    budget = lengths[which % len(rows)] + more
    fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= budget]
    if not fitting:
        with pytest.raises(ValueError, match=f"{budget} tokens"):
            chat.within_budget(dataset, processor, budget)
        return
    kept, dropped = chat.within_budget(dataset, processor, budget)
    assert list(kept.select_columns(list(MESSAGES))) == [chat.conversation(row) for row in fitting]
    assert dropped == [number for number, length in enumerate(lengths) if length > budget]


# files of pairs

COLUMNS = ("image", "question", "chosen", "rejected")
CELLS = TEXTS.filter(lambda text: PLACEHOLDER not in text)
CELLS |= st.sampled_from(["A cup.", "A dog.", " "])
IMAGES = st.sampled_from(["red.png", "blue.png"])
TABLES = st.lists(
    st.fixed_dictionaries({"image": IMAGES, **dict.fromkeys(COLUMNS[1:], CELLS)}), max_size=4
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
    """Return the bytes of a table."""
    if kind == "csv":
        lines = [csv_line(COLUMNS)]
        lines += [csv_line([row[column] for column in COLUMNS]) for row in rows]
    else:
        lines = []
        for number, row in enumerate(rows):
            lines.append(json.dumps(row, ensure_ascii=number % 2 == 0) + "\n")
    return "".join(lines).encode()


def csv_line(values):
    file = io.StringIO()
    csv.writer(file).writerow(values)
    return file.getvalue()


def load(folder, data, kind):
    """Return the rows, and what is wrong with each, warnings left out.

    They are read from a stream: what is loaded is written to the cache first, which takes longer.
    """
    for name in text_files.ENDINGS:
        (folder / f"pairs{name}").unlink(missing_ok=True)
    (folder / f"pairs.{kind}").write_bytes(data)
    rows = list(preferences.load(str(folder), streaming=True))
    found = []
    for problems in preferences.row_problems(rows):
        found.append([problem for problem in problems if problem not in preferences.WARNINGS])
    return rows, found


def problems_of(rows, number):
    """Return what is wrong with a row, in the order in which `check` looks for it."""
    row = rows[number]
    found = []
    for column in COLUMNS[1:]:
        if not row[column].strip():
            found.append(f"empty {column}".replace("question", "prompt"))
    if row["chosen"] == row["rejected"]:
        found.append("chosen equals rejected")
    swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    if swapped in rows[:number] and swapped != row:
        found.append("preferred both ways")
    if row in rows[:number]:
        found.append("duplicate pair")
    return found


@given(TABLES, st.sampled_from(["csv", "jsonl"]))
@example(
    [{"image": "red.png", "question": "What?", "chosen": "A \ufffd cup.", "rejected": "A dog."}],
    "csv",
)  # valid UTF-8
def test_a_table_is_read_letter_for_letter_and_its_problems_have_their_rows(folder, rows, kind):
    data = written(rows, kind)
    if not rows:
        with pytest.raises(ValueError, match=rf"pairs\.{kind}: no row"):
            load(folder, data, kind)
        return
    loaded, found = load(folder, data, kind)
    for number, (read, row) in enumerate(zip(loaded, rows, strict=True)):
        assert [preferences.text_of(read[name]) for name in MESSAGES] == [
            row[column] for column in COLUMNS[1:]
        ]
        assert found[number] == problems_of(rows, number)
        (image,) = read["images"]
        assert file_bytes(image) == (folder / row["image"]).read_bytes()


@given(TABLES, st.sampled_from(["csv", "jsonl"]), EDITS)
@example(
    [],
    "jsonl",
    [(0, 0, b'{"image": "red.png", "question": "?", "chosen": "\\ud800", "rejected": "No."}')],
)
@example([], "jsonl", [(0, 0, b'{"chosen": "Yes.", "chosen": "No."}')])
@example([], "jsonl", [(0, 0, b'{"image": "red.png", "\\ud800": 1}\n"\\ud800"')])
@example([], "csv", [(0, 99, b'image,question,chosen,rejected\nred.png,"What?')])
def test_a_damaged_table_is_read_or_its_lines_are_named_and_nothing_else(folder, rows, kind, edits):
    data = written(rows, kind)
    for start, length, new in edits:
        data = data[:start] + new + data[start + length :]
    try:
        loaded, found = load(folder, data, kind)
    except ValueError as refusal:
        assert f"pairs.{kind}" in str(refusal)
        return
    for number, row in enumerate(loaded):
        problem = row["problem"]
        if problem:
            assert found[number] == [problem]
            line = int(re.match(r"line (\d+): ", problem)[1])
            assert 1 <= line <= data.count(b"\n") + 1
            problem.encode()  # it can be stored
        else:
            assert row["prompt"][-1]["role"] == "user" and len(row["images"]) < 2
