"""A hundred attacks through everything that makes HTML out of text, without a browser.

Whatever the text, the page has the tags and attributes that we wrote, it loads nothing, and the
attack can be read, letter for letter. tests/slow/test_attacks_in_a_browser.py watches a real one.
"""

from html.parser import HTMLParser

import pytest
from attacks import ATTACKS
from layout_files import text
from PIL import Image

from utils import display, plots

TAGS = {
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
ATTRIBUTES = {"style", "title", "alt", "src", "width", "rowspan", "scope"}
IMAGE = Image.new("RGB", (40, 40), "teal")


class Page(HTMLParser):
    """The text, tags, attributes and styles of a page, as a browser reads them."""

    def __init__(self, html):
        super().__init__()
        self.text = ""
        self.tags = set()
        self.attributes = set()
        self.styles = []
        self.sources = []
        self.alts = []
        self.feed(html)
        self.close()

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "br":
            self.text += "\n"
        for name, value in attributes:
            self.attributes.add(name)
            if name == "style":
                self.styles.append(value)
            if name == "src":
                self.sources.append(value)
            if name == "alt":
                self.alts.append(value)

    def handle_comment(self, data):
        raise AssertionError(f"a comment hides {data!r}")

    def handle_decl(self, declaration):
        raise AssertionError(f"a declaration hides {declaration!r}")

    unknown_decl = handle_pi = handle_decl


def read_safely(html):
    """Return the page of `html`, after a look that it holds nothing but what we wrote."""
    page = Page(html)
    assert page.tags <= TAGS
    assert page.attributes <= ATTRIBUTES
    assert all("url" not in style and "expression" not in style for style in page.styles)
    assert all(source.startswith("data:image/") for source in page.sources)
    return page


def squeezed(text):
    """Return `text` without white space and the signs that stand for it in boxes of tokens."""
    return "".join(text.replace("·", "").replace("↵", "").split())


def test_text_and_its_marks():
    for attack in ATTACKS:
        assert read_safely(display.text_html(attack)).text == attack
        for tag in ("ins", "del"):
            marked = display.mark_html(attack, [(0, 1), (3, len(attack))], tag)
            assert read_safely(marked).text == attack
            different = display.difference_html(attack, "script on 1", tag)
            assert read_safely(different).text == attack


def test_an_image_carries_it_as_its_alternative_text():
    for attack in ATTACKS:
        assert read_safely(display.image_html(IMAGE, alt=attack)).alts == [attack]


def test_a_figure_carries_it_as_its_alternative_text():
    figure, _ = plots.new_figure(height=1)
    figure.savefig = lambda file, **options: file.write(b"")  # drawing is not what this is about
    for attack in ATTACKS:
        assert read_safely(plots.figure_html(figure, attack)).alts == [attack]


def test_pairs_and_answers():
    for attack in ATTACKS:
        row = {
            "images": [IMAGE, {"bytes": None, "path": attack}],
            "prompt": [text(role, attack) for role in ("system", "user", "assistant", "user")],
            "chosen": [text("assistant", f"{attack}a")],
            "rejected": [text("assistant", f"b{attack}")],
            "problem": attack,
        }
        page = read_safely(display.pair_html(row, attack))
        assert page.text.count(attack) >= 8  # and in what is wrong with the second image
        assert page.alts == [f"Image 1 of 2 for the question: {attack}"]

        answers = {attack: (attack, [(1, 3)])}
        row = {"image": IMAGE, "truth": attack, "answers": answers, "note": attack}
        page = read_safely(display.side_by_side_html([row]))
        assert page.text.count(attack) == 4
        assert page.alts == [f"Image that shows: {attack}"]


def test_tokens():
    for attack in ATTACKS:
        tokens = [attack, *attack.split()]
        page = read_safely(display.tokens_html(tokens, ["chosen"] * len(tokens)))
        assert squeezed(attack) in squeezed(page.text)


def test_tables():
    for attack in ATTACKS:
        page = read_safely(display.table_html([{attack: attack}], caption=attack))
        assert page.text == attack * 3


def test_what_is_not_escaped_is_noticed():
    """Or the tests above would be blind."""
    for attack in ("<script>x</script>", "<img src=x: onerror=x>", "<!--x-->", "<img src=x:>"):
        with pytest.raises(AssertionError):
            read_safely(f"<p>{attack}</p>")
