"""What readers look at: every string escaped, pictures untouched, and bad input named."""

import base64
import io
import re
from html.parser import HTMLParser

import ipywidgets
import pytest
from PIL import ExifTags, Image

from utils import display
from utils.display import (
    browse,
    difference_html,
    image_html,
    mark_html,
    pair_html,
    show,
    side_by_side_html,
    table_html,
    tokens_html,
)

NASTY = [
    "<script>alert(1)</script>",
    '"><img src=x onerror="alert(1)">',
    "' onmouseover='alert(1)",
    "</td></table>",
    "&lt;b&gt;",
    "<!--",
]
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def picture(mode="RGB", size=(30, 20)):
    return Image.new(mode, size)


def pair(**changes):
    return {
        "image": picture(),
        "question": "What is it?",
        "chosen": "A red cup.",
        "rejected": "A blue cup.",
    } | changes


class CountingRows:
    """A sequence that remembers which rows were read."""

    def __init__(self, count):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        return pair(question=f"Question {index}?")


@pytest.fixture
def shown(monkeypatch):
    bundles = []
    monkeypatch.setattr(display, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def picture_in(html):
    return Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html).group(1))))


class Seen(HTMLParser):
    """The text, tags and attributes of a page as a browser reads them."""

    def __init__(self):
        super().__init__()
        self.text, self.tags, self.attributes = "", [], set()

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        self.text += "\n" * (tag == "br")


def text_of(html):
    seen = Seen()
    seen.feed(html)
    seen.close()
    return seen


@pytest.mark.parametrize("nasty", NASTY)
def test_every_text_is_shown_as_text(nasty):
    pages = [
        difference_html(nasty, "other", "ins"),
        mark_html(nasty, [(1, 3)]),
        pair_html(pair(question=nasty, chosen=nasty + "a", rejected=nasty + "b"), nasty),
        side_by_side_html(
            [
                {
                    "image": picture(),
                    "truth": nasty,
                    "answers": {nasty: (nasty, [(0, 2)])},
                    "note": nasty,
                }
            ]
        ),
        tokens_html([nasty.replace(" ", "_")], ["prompt"]),
        table_html([{nasty: nasty}], caption=nasty),
    ]
    for page in pages:
        seen = text_of(page)
        assert nasty.replace(" ", "_") in seen.text.replace(" ", "_")
        assert set(seen.tags) <= {
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "caption",
            "img",
            "ins",
            "del",
            "strong",
            "br",
            "span",
            "div",
            "p",
        }
        assert seen.attributes <= {"style", "title", "alt", "src", "width", "rowspan", "scope"}
    assert [page.count("<img") for page in pages] == [0, 0, 1, 1, 0, 0]
    assert text_of(image_html(picture(), alt=nasty)).attributes == {"alt", "width", "style", "src"}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16"])
def test_a_picture_of_any_mode_is_shown_and_not_changed(mode):
    image = picture(mode, (400, 100))
    before = image.tobytes()
    shown = picture_in(image_html(image, width=200))
    assert (shown.size, shown.mode) == ((200, 50), "RGB")
    assert (image.mode, image.size, image.tobytes()) == (mode, (400, 100), before)


def test_a_picture_is_shown_upright_as_the_model_sees_it():
    sideways = Image.new("RGB", (40, 20))
    sideways.getexif()[ExifTags.Base.Orientation] = 6
    assert picture_in(image_html(sideways)).size == (20, 40)


def test_the_smaller_of_png_and_jpeg_is_used():
    noise = Image.effect_noise((200, 200), 80)
    assert picture_in(image_html(noise)).format == "JPEG"
    flat = picture(size=(200, 200))
    assert picture_in(image_html(flat)).format == "PNG"
    assert picture_in(image_html(flat)).size == (200, 200)  # never enlarged: that only costs bytes


def test_what_is_no_picture_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"dict.*cast_column"):
        image_html({"bytes": b""})


def marked(html, tag):
    return re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html)


def test_differing_words_are_marked():
    chosen, rejected = (
        "On the left there is a red cup.",
        "On the left there is a blue bottle. At the top there is a kite.",
    )
    assert marked(difference_html(chosen, rejected, "ins"), "ins") == ["red cup"]
    assert marked(difference_html(rejected, chosen, "del"), "del") == [
        "blue bottle",
        "At the top there is a kite.",
    ]
    assert marked(difference_html(chosen, chosen, "ins"), "ins") == []
    assert marked(difference_html("", chosen, "ins"), "ins") == []
    assert text_of(difference_html("a\n  b", "c", "ins")).text == "a\n  b"


def test_a_pair_tells_chosen_from_rejected_in_words():
    page = pair_html(pair(), "Pair 1 of 1")
    assert (
        text_of(page).text == "Pair 1 of 1\nWhat is it?✔ Chosen\nA red cup.✘ Rejected\nA blue cup."
    )
    assert (marked(page, "ins"), marked(page, "del")) == (["red"], ["blue"])


@pytest.mark.parametrize("column", ["image", "question", "chosen", "rejected"])
def test_a_missing_column_is_named(column):
    row = pair()
    del row[column]
    with pytest.raises(ValueError, match=f"Pair 7.*{column}.*rename_column"):
        pair_html(row, "Pair 7")


def test_messages_in_place_of_text_are_named():
    with pytest.raises(ValueError, match=r"Pair 7: 'chosen' is of type list"):
        pair_html(pair(chosen=[{"role": "assistant", "content": "A cup."}]), "Pair 7")


def test_the_browser_is_one_bundle_with_a_fallback_and_no_state(shown):
    rows = CountingRows(3)
    browse(rows)
    (bundle,) = shown
    assert set(bundle) == {WIDGET_VIEW, "text/html", "text/plain"}
    assert set(bundle[WIDGET_VIEW]) == {"version_major", "version_minor", "model_id"}
    assert "Pair 1 of 3" in bundle["text/html"] and "Question 0?" in bundle["text/html"]
    assert "3 preference pairs" in bundle["text/plain"]


def controls(bundle):
    bar, page = ipywidgets.widgets.widget._instances[bundle[WIDGET_VIEW]["model_id"]].children
    return *bar.children, page


def test_leafing_reads_only_the_row_on_show(shown):
    rows = CountingRows(1_000_000)
    browse(rows)
    previous, following, number, page = controls(shown[0])
    following.click()
    assert (number.value, "Question 1?" in page.value) == (2, True)
    previous.click()
    previous.click()  # the ends are joined
    assert "Pair 1000000 of 1000000" in page.value
    following.click()
    number.value = 5_000_000  # a number out of bounds is brought back into them
    assert number.value == 1_000_000
    assert rows.read == [0, 1, 0, 999_999, 0, 999_999]


def test_there_must_be_a_pair_to_browse():
    with pytest.raises(ValueError, match="no pair to browse"):
        browse([])


def test_spans_are_wrapped_in_any_order():
    html = mark_html("a<b> c", [(5, 6), (1, 4)])
    assert marked(html, "del") == ["&lt;b&gt;", "c"]
    assert text_of(html).text == "a<b> c"
    assert mark_html("a\nb", []) == "a<br>b"


@pytest.mark.parametrize("spans", [[(0, 3), (2, 4)], [(-1, 2)], [(3, 7)], [(2, 2)], [(3, 1)]])
def test_wrong_spans_are_refused(spans):
    with pytest.raises(ValueError, match=r"span .* of 'abcdef'"):
        mark_html("abcdef", spans)


def test_only_known_marks_are_made():
    with pytest.raises(ValueError, match="'script'"):
        mark_html("abc", [(0, 1)], "script")


def test_answers_stand_side_by_side():
    rows = [
        {
            "image": picture(),
            "truth": "a cup",
            "answers": {"base": ("a cup, a kite", [(7, 13)]), "after DPO": ("a cup", [])},
        },
        {
            "image": picture(),
            "truth": "a car",
            "answers": {"after DPO": ("a car", []), "base": ("a bus", [(0, 5)])},
            "note": "found",
        },
    ]
    page = side_by_side_html(rows)
    assert re.findall(r"<th [^>]*>(.*?)</th>", page) == [
        "Image",
        "Truth",
        "base",
        "after DPO",
        "Note",
    ]
    assert marked(page, "del") == ["a kite", "a bus"]
    assert [line.count("<td") for line in page.split("<tr>")] == [0, 0, 5, 5]
    assert "Note" not in side_by_side_html(rows[:1])


def test_side_by_side_names_the_row_that_differs():
    row = {"image": picture(), "truth": "", "answers": {"base": ("", [])}}
    with pytest.raises(ValueError, match=r"row 1 .* tuned"):
        side_by_side_html([row, row | {"answers": {"tuned": ("", [])}}])
    with pytest.raises(ValueError, match="rows is empty"):
        side_by_side_html([])


def boxes(html):
    return re.findall(r'<span title="(\w+)"[^>]*>(.*?)</span>', html)


def test_long_runs_of_a_token_are_folded():
    tokens = ["User", ":", *["<image>"] * 64, *["na"] * 3, "\n", " cup", " can"]
    kinds = ["prompt"] * 2 + ["image"] * 64 + ["prompt"] * 4 + ["chosen", "rejected"]
    page = tokens_html(tokens, kinds)
    found = boxes(page)
    assert found[:6] == [
        ("prompt", "User"),
        ("prompt", ":"),
        ("image", "&lt;image&gt; × 64"),
        *[("prompt", "na")] * 3,
    ]
    assert found[6:9] == [("prompt", "↵"), ("chosen", "·cup"), ("rejected", "·can")]
    assert found[9:] == [
        (kind, kind) for kind in ("prompt", "image", "chosen", "rejected")
    ]  # the legend


def test_a_run_ends_where_the_kind_changes():
    assert boxes(tokens_html(["x"] * 8, ["chosen"] * 4 + ["rejected"] * 4))[:2] == [
        ("chosen", "x × 4"),
        ("rejected", "x × 4"),
    ]


def test_kinds_differ_without_colour():
    styles = {
        re.search(r"border:(\S+ \w+)", display.token_box("x", kind)).group(1)
        for kind in display.KINDS
    }
    assert len(styles) == len(display.KINDS) == 4


def test_wrong_kinds_are_refused():
    with pytest.raises(ValueError, match="2 tokens have 1 kinds"):
        tokens_html(["a", "b"], ["prompt"])
    with pytest.raises(ValueError, match=r"answer.*use one of prompt"):
        tokens_html(["a"], ["answer"])


def test_a_table_aligns_its_numbers_to_the_right():
    rows = [
        {"metric": "CHAIR-i", "base": "21.4 %", "n": 500, "p": 1e-05},
        {"metric": "Recall", "base": "−3.1 %", "p": float("nan")},
    ]
    page = table_html(rows, caption="Before & after")
    assert re.findall(r'<th scope="col" style="text-align:(\w+)">(\w+)', page) == [
        ("left", "metric"),
        ("right", "base"),
        ("right", "n"),
        ("right", "p"),
    ]
    assert re.findall(r"<td[^>]*>(.*?)</td>", page) == [
        "CHAIR-i",
        "21.4 %",
        "500",
        "1e-05",
        "Recall",
        "−3.1 %",
        "",
        "nan",
    ]
    assert "Before &amp; after" in page
    assert re.findall(r"<td[^>]*>(.*?)</td>", table_html(rows, columns=["n", "metric"])) == [
        "500",
        "CHAIR-i",
        "",
        "Recall",
    ]


def test_a_table_needs_rows_and_known_columns():
    with pytest.raises(ValueError, match="rows have no column"):
        table_html([])
    with pytest.raises(ValueError, match=r"rows have a, .* asks for b"):
        table_html([{"a": 1}], columns=["b"])


def test_show_gives_html_and_text(shown):
    show("<p>hello</p>", "hello")
    assert shown == [{"text/html": "<p>hello</p>", "text/plain": "hello"}]
