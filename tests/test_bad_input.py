"""Bad input is refused with a clear error, or reported and counted: the cases of bad_input.py."""

import re

import bad_input
import pytest
from bad_input import DROPPED, EMBEDDED, GOOD, KEPT, LATE, OTHER, QUICK, ROWS, pairs
from datasets import Value

from utils import chat, preferences


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_a_bad_row(case, processor):
    row = {**OTHER, **case.change}
    rows = pairs(GOOD, row)
    tokens = preferences.special_tokens(processor)
    reported = {case.problem: [1]} if case.problem else {}
    assert preferences.check(rows, special_tokens=tokens) == reported
    sound, dropped = preferences.without_problems(rows, tokens)
    assert dropped == reported
    assert len(sound) == (1 if case.problem else 2)

    formatted = chat.format_dataset(rows)
    stream = chat.format_dataset(rows.to_iterable_dataset(), tokens)
    if case.outcome not in (KEPT, DROPPED, LATE):
        names_row = rf"^row 1: .*{re.escape(case.outcome)}"
        with pytest.raises(ValueError, match=names_row):
            chat.within_budget(formatted, processor, EMBEDDED.token_budget)
        with pytest.raises(ValueError, match=names_row):
            list(stream)
        return

    kept, dropped = chat.within_budget(formatted, processor, EMBEDDED.token_budget)
    assert dropped == ([1] if case.outcome == DROPPED else [])
    assert len(kept) + len(dropped) == len(rows)
    if case.outcome == LATE:
        with pytest.raises(ValueError, match=re.escape(bad_input.QUESTION)):
            kept[1]
        with pytest.raises(ValueError, match=r"^row 1: "):
            list(stream)
    elif case.outcome == KEPT:
        assert_seen_and_read(kept[1], row, processor)


def assert_seen_and_read(formatted, row, processor):
    """The image is one that people see, and no character of the answer is lost."""
    tokens, kinds = chat.token_kinds(formatted, processor)["chosen"]
    assert len(tokens) == len(kinds)
    assert kinds.count("image") == 9
    assert formatted["image"].mode == "RGB"
    assert formatted["image"].size != (6, 8)  # which the turned one has before it is turned
    batch = chat.training_batch([formatted], processor)
    ids = batch["input_ids"][0][batch["completion_mask"][0].bool()]
    assert processor.tokenizer.decode(ids) == f" {row['chosen']}<end_of_utterance>\n"


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_bad_input_other_than_a_row(case, tmp_path, monkeypatch, processor):
    place = bad_input.Place(tmp_path, monkeypatch, processor)
    try:
        with pytest.raises(case.error, match=re.escape(case.fact)):
            case.act(place)
    finally:
        place.close()


def test_what_the_check_says_of_columns_and_of_no_rows():
    renamed = pairs(GOOD).rename_column("chosen", "winner")
    assert preferences.check(renamed) == {"missing column chosen": []}
    numbers = bad_input.typed("question", Value("int64"), 7)
    assert preferences.check(numbers) == {"column question is Value('int64'), not text": []}
    assert preferences.check(pairs(GOOD).select([])) == {"no rows": []}


def test_more_columns_are_left_out_and_one_row_is_enough(processor):
    rows = pairs(GOOD).add_column("more", [1])
    assert preferences.check(rows) == {}
    kept, dropped = chat.within_budget(chat.format_dataset(rows), processor, EMBEDDED.token_budget)
    assert kept.column_names == ["image", "prompt", "chosen", "rejected"]
    assert (len(kept), dropped) == (1, [])


def test_an_image_of_the_test_rows_is_reported():
    assert preferences.check(pairs(GOOD, OTHER), pairs(OTHER)) == {"image also held out": [1]}


def test_the_list_names_every_case():
    text = bad_input.as_markdown()
    for case in [*ROWS, *QUICK, *bad_input.WITH_A_MODEL]:
        assert f"| {case.name.replace('<', '&lt;')} |" in text
