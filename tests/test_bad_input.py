"""Bad input is refused with a clear error, or reported and counted: the cases of bad_input.py."""

import re

import bad_input
import pytest
from bad_input import DROPPED, EMBEDDED, GOOD, KEPT, LATE, OTHER, QUICK, ROWS, as_stored, pairs

from utils import chat, layouts, preferences


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_a_bad_row(case, processor):
    row = {**OTHER, **case.change}
    rows = pairs(GOOD, row)
    refused = case.outcome not in (KEPT, DROPPED, LATE)
    reported = preferences.check(rows, processor=processor)
    if case.problem or not refused:
        assert reported == ({case.problem: [1]} if case.problem else {})
    else:
        (problem,) = reported
        assert case.outcome in problem
        assert reported[problem] == [1]
    sound, found = preferences.without_problems(rows, processor)
    assert found == reported
    assert len(sound) == (2 if set(reported) <= set(preferences.WARNINGS) else 1)

    formatted = chat.format_dataset(rows)
    stream = as_stored(GOOD, row).to_iterable_dataset()
    tokens = preferences.special_tokens(processor)
    stream = chat.format_dataset(
        layouts.as_rows(stream, root=bad_input.FOLDER), special_tokens=tokens
    )
    if refused:
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
    (image,) = formatted["images"]
    assert image.mode == "RGB"
    assert image.size != (6, 8)  # which the turned one has before it is turned
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


def test_more_columns_stay_and_are_not_formatted(processor):
    rows = layouts.as_rows(as_stored(GOOD).add_column("more", [1]))
    assert rows["more"][:] == [1]
    assert preferences.check(rows) == {}
    kept, dropped = chat.within_budget(chat.format_dataset(rows), processor, EMBEDDED.token_budget)
    assert set(kept.column_names) == {"images", "prompt", "chosen", "rejected"}
    assert (len(kept), dropped) == (1, [])


def test_the_list_names_every_case():
    text = bad_input.as_markdown()
    for case in [*ROWS, *QUICK, *bad_input.WITH_A_MODEL]:
        assert f"| {case.name.replace('<', '&lt;')} |" in text
