"""What holds in HTML for every text that hypothesis makes up."""

import re
from html.parser import HTMLParser

from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image as PillowImage

from utils import display

PIECES = ["User:", "Assistant: ", "<b>", "</td>", "&lt;", '"', "{{ 7 * 7 }}", "{% if %}"]
PIECES += ["<|im_end|>", "<image", "<s", ">", "\0", "\n", "\r\n", " ", "👩‍🚀", "e\u0301"]
PIECES += ["\u202eכוס\u202c", "\ufeff", "\ufffd", "\u2028", "cup, ", "a red cup."]
CHARACTERS = st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"])
TEXTS = st.lists(CHARACTERS, max_size=20).map("".join)
RED = PillowImage.new("RGB", (8, 6), "red")


class Page(HTMLParser):
    """What a browser makes of HTML: text, tags, and where marks and cells begin and end.

    A <br> is a line break in the text.
    """

    def __init__(self, html):
        super().__init__()
        self.text = ""
        self.tags = []
        self.spans = []
        self.alts = []
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
    first = Page(display.difference_html(text, other, "ins"))
    second = Page(display.difference_html(other, text, "del"))
    assert (first.text, second.text) == (text, other)
    assert {*first.tags, *second.tags} <= {"ins", "del", *ALWAYS}
    assert bool(first.spans or second.spans) == (words(text) != words(other))
    for page, one, another in ((first, text, other), (second, other, text)):
        # The words stand in the other text, in the same order: `in` consumes the iterator.
        left = iter(words(another))
        assert all(word in left for word in words(one, page.spans))


def words(text, without=()):
    """Return the words and marks of `text` that do not lie in one of the spans."""
    found = []
    for word in re.finditer(r"\w+|[^\w\s]", text):
        if not any(start <= word.start() < end for start, end in without):
            found.append(word.group())
    return found


@given(TEXTS, TEXTS, TEXTS)
def test_no_text_adds_a_tag_to_a_table_or_leaves_its_cell(first, second, name):
    assume(name)
    page = Page(display.table_html([{"a": first, name: second}, {"a": second}], caption=name))
    cells = [first, second, second, ""] if name != "a" else [second, second]
    assert [page.text[start:end] for start, end in page.spans] == cells
    columns = len(cells) // 2
    layout = ["table", "caption", "thead", "tr", *["th"] * columns, "tbody"]
    layout += 2 * ["tr", *["td"] * columns]
    assert [tag for tag in page.tags if tag not in ALWAYS] == layout
    assert Page(display.image_html(RED, alt=first)).alts == [first]
