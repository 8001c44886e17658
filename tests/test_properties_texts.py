"""What holds for every text, on texts that hypothesis makes up: in chat and tokens, in tables of one's own, in HTML."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from utils import chat, display, layouts, models, preferences
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
PIECES = [
    "User:",
    "Assistant: ",
    "<b>",
    "</td>",
    "&lt;",
    '"',
    "{{ 7 * 7 }}",
    "{% if %}",
    "<|im_end|>",
    "<image",
    "<s",
    ">",
]
PIECES += [
    "\0",
    "\n",
    "\r\n",
    " ",
    "👩‍🚀",
    "e\u0301",
    "\u202eכוס\u202c",
    "\ufeff",
    "\ufffd",
    "\u2028",
    "cup, ",
    "a red cup.",
]
TEXTS = st.lists(
    st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"]), max_size=20
).map("".join)
PLAIN = TEXTS.filter(lambda text: not any(token in text for token in SPECIAL))
RED, BLUE = PillowImage.new("RGB", (8, 6), "red"), PillowImage.new("RGB", (8, 6), "blue")


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
    row, decode = row_of(question, chosen, rejected), processor.tokenizer.decode
    rendered, batch = chat.render(row, processor), chat.training_batch([formatted(row)], processor)
    assert rendered["prompt"] == f"User:<image>{question}<end_of_utterance>\n"
    for name, ids, real, answer in zip(
        ("chosen", "rejected"),
        batch["input_ids"],
        batch["attention_mask"].bool(),
        batch["completion_mask"].bool(),
        strict=True,
    ):
        assert rendered[name] == f"Assistant: {row[name]}<end_of_utterance>\n"
        assert decode(ids[answer]) == f" {row[name]}<end_of_utterance>\n"
        frame, piece = "<fake_token_around_image>", "<image>"
        assert (
            decode(ids[real])
            == f"User:{frame}<global-img>{piece * 9}{frame}{question}<end_of_utterance>\n{rendered[name]}"
        )
        assert (ids == chat.image_token_id(processor)).sum() == 9


@given(PLAIN, PLAIN, st.sampled_from(SPECIAL), st.sampled_from(TEXT_COLUMNS))
def test_a_special_token_is_refused_wherever_it_stands(processor, before, after, token, column):
    text = before + token + after
    row = row_of("Q?", "Yes.", "No.") | {column: text}
    with pytest.raises(ValueError, match=re.escape(token)):
        chat.training_batch([formatted(row)], processor)
    with pytest.raises(ValueError, match=re.escape(token)):
        chat.inference_batch([RED], [text], processor)


def true_length(row, processor):
    """Tokens of the longer of the two rendered chats, as the processor alone counts them."""
    rendered = chat.render(row, processor)
    texts = [rendered["prompt"] + rendered[name] for name in ("chosen", "rejected")]
    return max(
        len(processor(images=[[RED]], text=[text], add_special_tokens=False)["input_ids"][0])
        for text in texts
    )


@given(PLAIN, PLAIN, PLAIN)
def test_the_tokens_counted_are_those_of_the_longer_chat(processor, question, chosen, rejected):
    row = row_of(question, chosen, rejected)
    parts = chat.check_tokens(
        formatted(row), processor
    )  # which also compares the prompt with inference
    assert chat.count_tokens(formatted(row), processor) == true_length(row, processor)
    assert true_length(row, processor) == parts["prompt_tokens"] + max(
        parts["chosen_tokens"], parts["rejected_tokens"]
    )
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
        with pytest.raises(ValueError, match=f"of {len(rows)} rows none is within"):
            chat.within_budget(dataset, processor, budget)
        return
    kept, dropped = chat.within_budget(dataset, processor, budget)
    assert list(kept.remove_columns("image")) == [chat.conversation(row) for row in fitting]
    assert dropped == [number for number, length in enumerate(lengths) if length > budget]


# own pairs

CELLS = TEXTS | st.sampled_from(["A cup.", "A dog.", " "])
TABLES = st.lists(
    st.fixed_dictionaries(
        {"image": st.sampled_from(["red.png", "blue.png"])} | dict.fromkeys(TEXT_COLUMNS, CELLS)
    ),
    max_size=4,
)
DAMAGE = st.binary(max_size=4) | st.sampled_from(
    [b"\\ud800", b'"', b"\n", b",", b'"chosen": "", ', b"[" * 5000, b"1" * 5000, b"../"]
)
EDITS = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 9), DAMAGE), max_size=5
)  # from where, how much goes, what comes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    RED.save(path / "red.png"), BLUE.save(path / "blue.png")
    return path


def written(rows, kind):
    """(the bytes of the table, the line at which each row begins)."""
    if kind == "jsonl":
        lines = [
            json.dumps(row, ensure_ascii=number % 2 == 0) + "\n" for number, row in enumerate(rows)
        ]
    else:
        lines = []
        for values in [
            REQUIRED_COLUMNS,
            *([row[column] for column in REQUIRED_COLUMNS] for row in rows),
        ]:
            file = io.StringIO()
            csv.writer(file).writerow(values)
            lines.append(file.getvalue())
    starts = [1 + "".join(lines[:number]).count("\n") for number in range(len(lines))]
    return "".join(lines).encode(), starts[len(lines) - len(rows) :]


def load(folder, data, kind):
    for name in layouts.NAMES:
        (folder / name).unlink(missing_ok=True)
    (folder / f"pairs.{kind}").write_bytes(data)
    return layouts.load_folder(folder)


def lines_refused(error, data):
    """The lines that an error names, each of which the file has."""
    lines = [int(line) for line in re.findall(r"^line (\d+): ", str(error), flags=re.MULTILINE)]
    assert all(1 <= line <= data.count(b"\n") + 1 for line in lines)
    return lines


def is_wrong(rows, number):
    row = rows[number]
    swapped = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    return (
        row in rows[:number]
        or swapped in [*rows[:number], row]
        or not all(row[column].strip() for column in TEXT_COLUMNS)
    )


@given(TABLES, st.sampled_from(["csv", "jsonl"]))
@example(
    [{"image": "red.png", "question": "What?", "chosen": "A \ufffd cup.", "rejected": "A dog."}],
    "csv",
)  # valid UTF-8
def test_a_table_is_read_letter_for_letter_or_refused_with_the_lines_at_fault(folder, rows, kind):
    data, starts = written(rows, kind)
    wrong = {start for number, start in enumerate(starts) if is_wrong(rows, number)}
    if wrong or not rows:
        with pytest.raises(ValueError, match="problems") as error:
            load(folder, data, kind)
        assert set(lines_refused(error.value, data)) == wrong
    else:
        dataset = load(folder, data, kind)
        assert [
            {column: row[column] for column in TEXT_COLUMNS}
            for row in dataset.remove_columns("image")
        ] == [{column: row[column] for column in TEXT_COLUMNS} for row in rows]
        assert list(preferences.image_bytes(dataset)) == [
            (folder / row["image"]).read_bytes() for row in rows
        ]


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


# display


class Page(HTMLParser):
    """What a browser makes of HTML: its text (<br> as a line break), its tags, where marks and cells begin and end."""

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.spans, self.alts = "", [], [], []
        self.feed(html)
        self.close()

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.text += "\n" * (tag == "br")
        self.alts += [value for name, value in attributes if name == "alt"]
        if tag in ("ins", "del", "td"):
            self.spans.append((len(self.text),))

    def handle_endtag(self, tag):
        if tag in ("ins", "del", "td"):
            self.spans[-1] += (len(self.text),)


ALWAYS = {"br", "span"}  # a line break; what keeps $ and \\ from beginning a formula


@given(
    TEXTS, st.lists(st.integers(0, 60), unique=True).map(sorted), st.sampled_from(["ins", "del"])
)
def test_marked_text_is_the_text_with_exactly_the_spans_marked(text, edges, tag):
    edges = [edge for edge in edges if edge <= len(text)]
    spans = list(zip(edges[::2], edges[1::2], strict=False))
    page = Page(display.mark_html(text, spans[::-1], tag))
    assert (page.text, page.spans) == (text, spans)
    assert set(page.tags) <= {tag, *ALWAYS} and Page(display.text_html(text)).text == text


@given(TEXTS, TEXTS)
def test_the_words_left_unmarked_are_common_to_both_texts(text, other):
    pages = [
        Page(display.difference_html(text, other, "ins")),
        Page(display.difference_html(other, text, "del")),
    ]
    assert [page.text for page in pages] == [text, other] and {*pages[0].tags, *pages[1].tags} <= {
        "ins",
        "del",
        *ALWAYS,
    }
    assert bool(pages[0].spans or pages[1].spans) == (words(text) != words(other))
    for page, one, another in ((pages[0], text, other), (pages[1], other, text)):
        left = iter(words(another))
        assert all(word in left for word in words(one, page.spans)), (
            "they stand in the other text, in the same order"
        )


def words(text, without=()):
    """The words and marks of `text` that do not lie in one of the spans."""
    found = re.finditer(r"\w+|[^\w\s]", text)
    return [
        word.group()
        for word in found
        if not any(start <= word.start() < end for start, end in without)
    ]


@given(TEXTS, TEXTS, TEXTS)
def test_no_text_adds_a_tag_to_a_table_or_leaves_its_cell(first, second, name):
    assume(name)
    page = Page(display.table_html([{"a": first, name: second}, {"a": second}], caption=name))
    assert [page.text[slice(*span)] for span in page.spans] == (
        [first, second, second, ""] if name != "a" else [second, second]
    )
    rows, columns = 2, len(page.spans) // 2
    layout = [
        "table",
        "caption",
        "thead",
        "tr",
        *["th"] * columns,
        "tbody",
        *["tr", *["td"] * columns] * rows,
    ]
    assert [tag for tag in page.tags if tag not in ALWAYS] == layout
    assert Page(display.image_html(RED, alt=first)).alts == [first]
