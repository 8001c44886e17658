"""What readers look at: every string escaped, images untouched, and bad input named.

tests/test_attacks.py sends texts through all of it that try to become more than text.
"""

import base64
import io
import re
from html.parser import HTMLParser

import ipywidgets
import pytest
from layout_files import text
from PIL import ExifTags, Image

from utils import display, images, layouts
from utils.display import (
    browse,
    difference_html,
    image_html,
    mark_html,
    mark_text,
    pair_html,
    show,
    side_by_side,
    side_by_side_html,
    side_by_side_text,
    table,
    table_html,
    table_text,
    text_html,
    tokens_html,
)

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def new_image(mode="RGB", size=(30, 20)):
    return Image.new(mode, size)


def pair(**changes):
    row = {
        "images": [new_image()],
        "prompt": [text("user", None, "What is it?")],
        "chosen": [text("assistant", "A red cup.")],
        "rejected": [text("assistant", "A blue cup.")],
    }
    return row | changes


class CountingRows:
    """A sequence that remembers which rows were read."""

    def __init__(self, count):
        self.count = count
        self.read = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        return pair(prompt=[text("user", None, f"Question {index}?")])


@pytest.fixture
def shown(monkeypatch):
    """The bundles that were displayed."""
    bundles = []
    monkeypatch.setattr(display, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def image_in(html):
    data = re.search(r"base64,([^\"]+)", html).group(1)
    return Image.open(io.BytesIO(base64.b64decode(data)))


def text_of(html):
    """The text of a page as a browser reads it, <br> as a line break."""
    pieces = []
    parser = HTMLParser()
    parser.handle_data = pieces.append
    parser.feed(html.replace("<br>", "\n"))
    parser.close()
    return "".join(pieces)


def marked(html, tag):
    return re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html)


# Text and images


def test_text_is_escaped_and_begins_no_formula():
    assert text_html('<b> & "it\'s"') == "&lt;b&gt; &amp; &quot;it&#x27;s&quot;"
    assert text_html("a\nb") == "a<br>b"
    assert text_html(r"$x$ \(y") == r"<span>$</span>x<span>$</span> <span>\</span>(y"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16"])
def test_an_image_of_any_mode_is_shown_and_not_changed(mode):
    image = new_image(mode, (400, 100))
    before = image.tobytes()
    shown = image_in(image_html(image, width=200))
    assert (shown.size, shown.mode) == ((200, 50), "RGB")
    assert (image.mode, image.size, image.tobytes()) == (mode, (400, 100), before)


def test_an_image_is_shown_upright_as_the_model_sees_it():
    sideways = Image.new("RGB", (40, 20))
    sideways.getexif()[ExifTags.Base.Orientation] = 6
    assert image_in(image_html(sideways)).size == (20, 40)


def test_the_smaller_of_png_and_jpeg_is_used():
    noise = Image.effect_noise((200, 200), 80)
    assert image_in(image_html(noise)).format == "JPEG"
    flat = new_image(size=(200, 200))
    assert image_in(image_html(flat)).format == "PNG"
    assert image_in(image_html(flat)).size == (200, 200)  # never enlarged: that only costs bytes


def test_what_is_no_image_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"dict.*cast_column"):
        image_html({"bytes": b""})


# Marked text


def test_spans_are_wrapped_in_any_order():
    html = mark_html("a<b> c", [(5, 6), (1, 4)])
    assert marked(html, "del") == ["&lt;b&gt;", "c"]
    assert text_of(html) == "a<b> c"
    assert mark_html("a\nb", []) == "a<br>b"
    assert mark_text("a<b> c", [(5, 6), (1, 4)]) == "a[[<b>]] [[c]]"


@pytest.mark.parametrize("spans", [[(0, 3), (2, 4)], [(-1, 2)], [(3, 7)], [(2, 2)], [(3, 1)]])
def test_wrong_spans_are_refused(spans):
    for mark in (mark_html, mark_text):
        with pytest.raises(ValueError, match="abcdef"):
            mark("abcdef", spans)


def test_only_known_marks_are_made():
    with pytest.raises(ValueError, match="'script'"):
        mark_html("abc", [(0, 1)], "script")


def test_differing_words_are_marked():
    chosen = "On the left there is a red cup."
    rejected = "On the left there is a blue bottle. At the top there is a kite."
    assert marked(difference_html(chosen, rejected, "ins"), "ins") == ["red cup"]
    assert marked(difference_html(rejected, chosen, "del"), "del") == [
        "blue bottle",
        "At the top there is a kite.",
    ]
    assert marked(difference_html(chosen, chosen, "ins"), "ins") == []
    assert marked(difference_html("", chosen, "ins"), "ins") == []
    assert text_of(difference_html("a\n  b", "c", "ins")) == "a\n  b"


# Pairs


def test_a_pair_tells_chosen_from_rejected_in_words():
    page = pair_html(pair(), "Pair 1 of 1")
    lines = "Pair 1 of 1What is it?✔ Chosen\nA red cup.✘ Rejected\nA blue cup."
    assert text_of(page) == lines
    assert marked(page, "ins") == ["red"]
    assert marked(page, "del") == ["blue"]


def stored(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def images_of(html):
    """The (alternative text, size) of every image."""
    found = []
    for tag in re.findall(r"<img[^>]*>", html):
        found.append((re.search(r'alt="([^"]*)"', tag)[1], image_in(tag).size))
    return found


def test_images_that_are_still_stored_are_shown_as_those_that_are_decoded():
    decoded = pair_html(pair(), "Pair 1")
    assert images_of(decoded) == [("Image for the question: What is it?", (30, 20))]
    assert pair_html(pair(images=[stored(new_image())]), "Pair 1") == decoded


def test_several_images_are_shown_in_their_order_and_have_their_place_in_the_text():
    row = pair(
        images=[stored(new_image(size=(9, 5))), new_image(size=(7, 6))],
        prompt=[text("user", "Is ", None, "the same as ", None, "?")],
    )
    page = pair_html(row, "Pair 1")
    assert [size for _, size in images_of(page)] == [(9, 5), (7, 6)]
    assert images_of(page)[1][0].startswith("Image 2 of 2 ")
    assert "Is  [image 1] the same as  [image 2] ?" in text_of(page)


def test_a_pair_without_an_image_says_so():
    page = pair_html(pair(images=[], prompt=[text("user", "What is a cup?")]), "Pair 1")
    assert images_of(page) == []
    assert text_of(page).startswith("(no image)Pair 1")


def test_every_turn_is_shown_with_its_role():
    turns = [
        text("system", "Be <brief>."),
        text("user", None, "Is it red?"),
        text("assistant", "Yes."),
        text("user", "And blue?"),
    ]
    page = pair_html(pair(prompt=turns), "Pair 1")
    lines = "System\nBe <brief>.User\nIs it red?Assistant\nYes.User\nAnd blue?✔ Chosen"
    assert lines in text_of(page)
    assert images_of(page)[0][0] == "Image for the question: And blue?"
    rows = int(re.search(r'rowspan="(\d+)"', page)[1])
    assert rows == page.count("<tr>") == 7


def test_what_is_wrong_with_a_row_is_shown_in_its_place():
    unread = {**layouts.unread("line 7: not JSON: <b>"), "images": []}
    page = pair_html(unread, "Pair 7")
    assert "line 7: not JSON: <b>" in text_of(page)
    assert "✔ Chosen" in text_of(page)


@pytest.mark.parametrize("broken", [{"bytes": b"<b>", "path": None}, {"bytes": b"", "path": "a"}])
def test_an_image_that_cannot_be_read_is_replaced_by_the_reason(broken):
    page = pair_html(pair(images=[broken, stored(new_image())]), "Pair 1")
    assert [alt for alt, _ in images_of(page)] == ["Image 2 of 2 for the question: What is it?"]
    assert text_of(page).startswith("Image 1 of 2 cannot be read")


def test_a_large_image_is_reduced_before_it_is_shown(monkeypatch):
    monkeypatch.setattr(display, "SHOWN_PIXELS", 400)
    monkeypatch.setattr(images, "NO_PHOTOGRAPH", 400)
    page = pair_html(pair(images=[new_image(size=(40, 40))]), "Pair 1")
    assert [size for _, size in images_of(page)] == [(20, 20)]


@pytest.mark.parametrize("column", ["images", "prompt", "chosen", "rejected"])
def test_a_missing_column_is_named(column):
    row = pair()
    del row[column]
    with pytest.raises(ValueError, match=f"Pair 7.*{column}"):
        pair_html(row, "Pair 7")


def test_the_browser_is_one_bundle_with_a_fallback_and_no_state(shown):
    browse(CountingRows(3))
    (bundle,) = shown
    assert set(bundle) == {WIDGET_VIEW, "text/html", "text/plain"}
    assert set(bundle[WIDGET_VIEW]) == {"version_major", "version_minor", "model_id"}
    assert "Pair 1 of 3" in bundle["text/html"]
    assert "Question 0?" in bundle["text/html"]
    assert "3" in bundle["text/plain"]


def controls(bundle):
    """The buttons, the number and the page of a browser that was displayed."""
    widgets = ipywidgets.widgets.widget._instances
    bar, page = widgets[bundle[WIDGET_VIEW]["model_id"]].children
    return *bar.children, page


def test_leafing_reads_only_the_row_on_show(shown):
    rows = CountingRows(1_000_000)
    browse(rows)
    previous_button, next_button, number, page = controls(shown[0])
    next_button.click()
    assert number.value == 2
    assert "Question 1?" in page.value
    previous_button.click()
    previous_button.click()  # the first pair follows the last
    assert "Pair 1000000 of 1000000" in page.value
    next_button.click()
    assert number.value == 1
    number.value = 5_000_000  # a number out of bounds is brought back into them
    assert number.value == 1_000_000
    assert rows.read == [0, 1, 0, 999_999, 0, 999_999]


def test_there_must_be_a_pair_to_browse():
    with pytest.raises(ValueError, match="empty"):
        browse([])


# Answers side by side


def two_answers():
    first = {
        "image": new_image(),
        "truth": "a cup",
        "answers": {"base": ("a cup, a kite", [(7, 13)]), "tuned": ("a cup", [])},
    }
    second = {
        "image": new_image(),
        "truth": "a car",
        "answers": {"tuned": ("a car", []), "base": ("a bus", [(0, 5)])},
        "note": "found",
    }
    return [first, second]


def test_answers_stand_side_by_side():
    rows = two_answers()
    page = side_by_side_html(rows)
    headers = re.findall(r"<th [^>]*>(.*?)</th>", page)
    assert headers == ["Image", "Truth", "base", "tuned", "Note"]
    assert marked(page, "del") == ["a kite", "a bus"]
    assert [line.count("<td") for line in page.split("<tr>")] == [0, 0, 5, 5]
    assert "Note" not in side_by_side_html(rows[:1])


def test_answers_can_be_read_as_plain_text(shown):
    rows = two_answers()
    side_by_side(rows)
    text = side_by_side_text(rows)
    assert shown == [{"text/html": side_by_side_html(rows), "text/plain": text}]
    first, second = text.split("\n\n")
    assert first.splitlines() == [
        "Truth: a cup",
        "base:  a cup, [[a kite]]",
        "tuned: a cup",
    ]
    assert "[[a bus]]" in second
    assert "found" in second


def test_side_by_side_names_the_row_that_differs():
    row = {"image": new_image(), "truth": "", "answers": {"base": ("", [])}}
    with pytest.raises(ValueError, match=r"row 1 .*tuned"):
        side_by_side_html([row, row | {"answers": {"tuned": ("", [])}}])
    with pytest.raises(ValueError, match="empty"):
        side_by_side([])


# Tokens


def boxes(html):
    return re.findall(r'<span title="(\w+)"[^>]*>(.*?)</span>', html)


def test_long_runs_of_a_token_are_folded():
    tokens = ["User", ":", *["<image>"] * 64, *["na"] * 3, "\n", " cup", " can"]
    kinds = ["prompt"] * 2 + ["image"] * 64 + ["prompt"] * 4 + ["chosen", "rejected"]
    found = boxes(tokens_html(tokens, kinds))
    assert found[:3] == [("prompt", "User"), ("prompt", ":"), ("image", "&lt;image&gt; × 64")]
    assert found[3:6] == [("prompt", "na")] * 3
    assert found[6:9] == [("prompt", "↵"), ("chosen", "·cup"), ("rejected", "·can")]
    legend = [(kind, kind) for kind in ("prompt", "image", "chosen", "rejected")]
    assert found[9:] == legend


def test_a_run_ends_where_the_kind_changes():
    found = boxes(tokens_html(["x"] * 8, ["chosen"] * 4 + ["rejected"] * 4))
    assert found[:2] == [("chosen", "x × 4"), ("rejected", "x × 4")]


def test_kinds_differ_without_color():
    styles = set()
    for kind in display.KINDS:
        box = display.token_box("x", kind)
        styles.add(re.search(r"border:(\S+ \w+)", box).group(1))
    assert len(styles) == len(display.KINDS)


def test_wrong_kinds_are_refused():
    with pytest.raises(ValueError, match=r"2 tokens.* 1 kinds"):
        tokens_html(["a", "b"], ["prompt"])
    with pytest.raises(ValueError, match="'answer'"):
        tokens_html(["a"], ["answer"])


# Tables

ROWS = [
    {"metric": "CHAIR-i", "base": "21.4 %", "n": 500, "p": 1e-05},
    {"metric": "Recall", "base": "−3.1 %", "p": float("nan")},
]


def test_a_table_aligns_its_numbers_to_the_right():
    page = table_html(ROWS, caption="Before & after")
    sides = re.findall(r'<th scope="col" style="text-align:(\w+)">', page)
    assert sides == ["left", "right", "right", "right"]
    assert re.findall(r"<td[^>]*>(.*?)</td>", page) == [
        *("CHAIR-i", "21.4 %", "500", "1e-05"),
        *("Recall", "−3.1 %", "", "nan"),
    ]
    assert "Before &amp; after" in page


def test_a_table_has_the_columns_that_are_asked_for():
    page = table_html(ROWS, columns=["n", "metric"])
    assert re.findall(r"<td[^>]*>(.*?)</td>", page) == ["500", "CHAIR-i", "", "Recall"]
    assert table_text(ROWS, columns=["n"]).split() == ["n", "---", "500"]


def test_a_table_is_aligned_as_plain_text_too():
    assert table_text(ROWS, caption="Before\nand after").splitlines() == [
        "Before and after",
        "metric     base    n      p",
        "-------  ------  ---  -----",
        "CHAIR-i  21.4 %  500  1e-05",
        "Recall   −3.1 %         nan",
    ]
    # A line break in a cell would move what is beside it.
    assert table_text([{"a": "x\r\ny", "b": 1}]).splitlines()[-1] == "x y  1"


def test_a_table_is_displayed_in_both_ways(shown):
    table(ROWS, "Before", columns=["metric"])
    html = table_html(ROWS, caption="Before", columns=["metric"])
    text = table_text(ROWS, caption="Before", columns=["metric"])
    assert shown == [{"text/html": html, "text/plain": text}]


def test_a_table_needs_rows_and_known_columns():
    with pytest.raises(ValueError, match="no column"):
        table([])
    with pytest.raises(ValueError, match=r"'b'.* a"):
        table([{"a": 1}], columns=["b"])


def test_show_gives_html_and_text(shown):
    show("<p>hello</p>", "hello")
    assert shown == [{"text/html": "<p>hello</p>", "text/plain": "hello"}]
