import json

import ipywidgets
import pytest
from PIL import Image

from utils import review
from utils.paired_statistics import share_interval

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
ATTACK = "<script>alert(1)</script> $x$"


@pytest.fixture
def folder(tmp_path):
    """A picture and three claims about it."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    lines = []
    for claim, accepted in (("It is red.", True), (ATTACK, False), ("It is blue.", True)):
        lines.append({"image": "a.png", "claim": claim, "accepted": accepted, "person": None})
    review.write_lines(tmp_path, lines)
    return tmp_path


@pytest.fixture
def shown(monkeypatch):
    """The bundles that were displayed."""
    bundles = []
    monkeypatch.setattr(review, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def persons(folder):
    return [line["person"] for line in review.read_lines(folder)]


# Drawing


def told(accepted, rejected):
    claims = [("a.png", f"Right {number}.", True) for number in range(accepted)]
    return claims + [("b.png", f"Wrong {number}.", False) for number in range(rejected)]


@pytest.mark.parametrize(
    ("accepted", "rejected", "number", "expected"),
    [
        (50, 50, 20, (10, 10)),
        (50, 3, 20, (17, 3)),
        (3, 50, 20, (3, 17)),
        (2, 3, 20, (2, 3)),
        (50, 50, 7, (4, 3)),
    ],
)
def test_half_of_the_drawn_claims_are_accepted_ones_where_possible(
    tmp_path, accepted, rejected, number, expected
):
    drawn = review.draw_claims(tmp_path, told(accepted, rejected), number, seed=0)
    lines = review.read_lines(tmp_path)
    verdicts = [line["accepted"] for line in lines]
    assert (verdicts.count(True), verdicts.count(False)) == expected
    assert drawn == len(lines) == len({line["claim"] for line in lines})
    assert persons(tmp_path) == [None] * drawn


def test_the_same_seed_draws_the_same_in_an_order_that_does_not_tell(tmp_path):
    drawn = []
    for seed in (0, 0, 1):
        review.draw_claims(tmp_path, told(30, 30), 20, seed)
        drawn.append(review.read_lines(tmp_path))
    assert drawn[0] == drawn[1] != drawn[2]
    verdicts = [line["accepted"] for line in drawn[0]]
    assert verdicts not in (sorted(verdicts), sorted(verdicts, reverse=True))


# Agreement


def test_wilson_s_interval_is_that_of_the_textbook():
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    expected = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (count, total), interval in expected.items():
        assert share_interval(count, total) == pytest.approx(interval, abs=1e-4)
    assert share_interval(0, 0) == (0, 1)


def judged(folder, accepted, rejected):
    """Write a review; `accepted` and `rejected` are (right, wrong, open) verdicts of the judge."""
    lines = []
    for verdict, (right, wrong, left) in ((True, accepted), (False, rejected)):
        for person in [verdict] * right + [not verdict] * wrong + [None] * left:
            claim = f"Claim {len(lines)}."
            lines.append({"image": "a.png", "claim": claim, "accepted": verdict, "person": person})
    review.write_lines(folder, lines)


def test_agreement_is_told_apart_for_accepted_and_rejected_claims(tmp_path):
    judged(tmp_path, accepted=(16, 4, 1), rejected=(3, 7, 0))
    found = review.agreement(tmp_path)
    assert found["accepted"] | {"low": 0, "high": 0} == {
        "claims": 20, "right": 16, "share": 0.8, "low": 0, "high": 0
    }  # fmt: skip
    assert found["rejected"]["share"] == 0.3
    assert found["accepted"]["low"] == pytest.approx(0.584, abs=1e-3)
    text = review.as_text(found)
    assert "of 20 accepted claims the judge judged 16 rightly (58% to 92%)" in text
    assert "of 10 rejected claims the judge judged 3 rightly" in text


@pytest.mark.parametrize(
    ("accepted", "rejected", "worth"),
    [
        ((16, 4, 0), (16, 4, 0), True),
        ((16, 4, 0), (15, 5, 0), False),  # 75%
        ((8, 2, 0), (16, 4, 0), False),  # 80%, but of ten, so that chance is not ruled out
        ((20, 0, 0), (0, 0, 9), False),  # nobody looked at a rejected claim
        ((40, 0, 0), (10, 10, 0), False),  # 83% overall
    ],
)
def test_pairs_are_worth_training_on_if_the_judge_is_right_about_both_kinds(
    tmp_path, accepted, rejected, worth
):
    judged(tmp_path, accepted, rejected)
    assert review.is_worth_training(review.agreement(tmp_path)) == worth


# The file


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="--review"):
        review.agreement(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"image": "a.png"}', '{"image":"a","claim":"b","accepted":1,"person":2}']
)
def test_a_line_that_is_wrong_is_named(folder, text):
    path = folder / review.REVIEW_FILE
    path.write_text(path.read_text() + text + "\n")
    with pytest.raises(ValueError, match="line 4"):
        review.read_lines(folder)


# The widget


def controls(bundle):
    """The buttons and the page of a widget that was displayed."""
    widgets = ipywidgets.widgets.widget._instances
    bar, page = widgets[bundle[WIDGET_VIEW]["model_id"]].children
    return {button.description: button for button in bar.children}, page


def test_every_click_is_saved_at_once_and_shows_the_next_claim(folder, shown):
    review.verdicts(folder)
    buttons, page = controls(shown[0])
    assert "It is red." in page.value and "<img" in page.value
    buttons["Accept"].click()
    assert persons(folder) == [True, None, None]
    buttons["Next"].click()
    assert "It is blue." in page.value
    buttons["Reject"].click()
    assert persons(folder) == [True, None, False]
    assert "alert(1)" in page.value  # back to the claim that was skipped
    buttons["Previous"].click()
    assert "You said: accept" in page.value
    buttons["Reject"].click()  # a verdict can be changed
    assert persons(folder) == [False, None, False]

    shown.clear()
    review.verdicts(folder)  # opened again, it goes on with what is open
    assert "alert(1)" in controls(shown[0])[1].value


def test_buttons_have_names_and_none_is_disabled(folder, shown):
    review.verdicts(folder)
    buttons, _ = controls(shown[0])
    assert list(buttons) == ["Accept", "Reject", "Previous", "Next"]
    assert all(button.tooltip and not button.disabled for button in buttons.values())


def test_the_judge_s_verdict_is_nowhere_shown(folder, shown):
    review.verdicts(folder)
    lines = review.read_lines(folder)
    for line in lines:
        line["accepted"] = not line["accepted"]
    review.write_lines(folder, lines)
    review.verdicts(folder)
    for kind in ("text/html", "text/plain"):
        assert shown[0][kind] == shown[1][kind]


def test_without_a_kernel_the_first_claim_and_a_table_of_all_remain(folder, shown):
    review.verdicts(folder)
    assert set(shown[0]) == {WIDGET_VIEW, "text/html", "text/plain"}
    for kind in ("text/html", "text/plain"):
        assert "It is red." in shown[0][kind] and "It is blue." in shown[0][kind]
    assert "<img" in shown[0]["text/html"] and "<table" in shown[0]["text/html"]


def test_strangers_texts_are_escaped(folder, shown):
    lines = review.read_lines(folder)
    lines[0] |= {"image": "<b>.png", "claim": ATTACK}
    review.write_lines(folder, lines)
    review.verdicts(folder)
    _, page = controls(shown[0])
    for html in (page.value, shown[0]["text/html"]):
        assert "<script>" not in html and "<b>" not in html and "&lt;script&gt;" in html
        assert "$x$" not in html  # MathJax would typeset it


def test_no_picture_outside_the_folder_is_shown(folder, shown):
    inside = folder / "inside"
    inside.mkdir()
    line = {"image": "../a.png", "claim": "It is red.", "accepted": True, "person": None}
    (inside / review.REVIEW_FILE).write_text(json.dumps(line) + "\n")
    review.verdicts(inside)
    assert "outside" in shown[0]["text/html"] and "<img" not in shown[0]["text/html"]
