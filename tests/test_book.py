"""The book that `make book` builds: complete, in order, every link leads somewhere, and nothing comes from another host."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

pytest.importorskip("myst_nb", reason="myst-nb is not installed: run `make test`")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed: run `make test`")

from tests.browser import CHROMIUM, browser_page
from tools.notebooks import ROOT, home

NOTEBOOKS = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


class Page(HTMLParser):
    """A page's `links`, what is `loaded` with it, its `anchors`, the `attributes` of each <a>, and its folded `answers`."""

    def __init__(self, path):
        super().__init__()
        self.path, self.links, self.loaded, self.anchors, self.attributes = (
            path,
            [],
            [],
            {"", "top"},
            [],
        )
        self.answers, self.folded = [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        if tag == "a":
            self.attributes.append(attributes)
        elif tag != "form":
            names = ("src", "href", "srcset", "data", "poster", "action")
            self.loaded += [attributes[name] for name in names if attributes.get(name)]
        if tag == "details" and not {"sd-dropdown", "hide"} & set(
            attributes.get("class", "").split()
        ):  # the theme's own
            self.folded = True
            self.answers.append("")
        elif self.folded:
            self.answers[-1] += f"<{tag} {attributes.get('class', '')}>"

    def handle_endtag(self, tag):
        self.folded = self.folded and tag != "details"

    def handle_data(self, data):
        if self.folded:
            self.answers[-1] += data

    def link(self, **wanted):
        """The address of the one <a> with these attributes."""
        found = [each["href"] for each in self.attributes if wanted.items() <= each.items()]
        assert len(found) == 1, (self.path, wanted, found)
        return found[0]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The folder of the book, built once, by this Python."""
    folder = tmp_path_factory.mktemp("book") / "book"
    command = ["make", "--old-file=setup", "book", f"PYTHON={sys.executable}", f"BOOK={folder}"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(book):
    return {
        path: Page(path) for path in sorted(book.rglob("*.html")) if "_static" not in path.parts
    }


def page(pages, name):
    return next(page for path, page in pages.items() if path.stem == name)


def test_every_notebook_has_a_page_and_they_are_in_order(book, pages):
    at, order = book / "README.html", []
    while following := [each for each in pages[at].attributes if each.get("class") == "right-next"]:
        before, at = at, (at.parent / following[0]["href"]).resolve()
        order.append(at.stem)
        assert (at.parent / pages[at].link(**{"class": "left-prev"})).resolve() == before
    assert order[: len(NOTEBOOKS)] == NOTEBOOKS
    assert (book / "index.html").read_bytes() == (book / "README.html").read_bytes()


def test_every_link_inside_the_book_leads_somewhere(book, pages):
    wrong, seen = [], 0
    for path, page in pages.items():
        for target in page.links:
            if re.match(r"[a-z]+:", target):
                continue
            place, _, anchor = target.partition("#")
            file = (path.parent / unquote(place.split("?")[0])).resolve() if place else path
            seen += 1
            if not file.is_file() or (file in pages and unquote(anchor) not in pages[file].anchors):
                wrong.append(f"{path.relative_to(book)}: {target}")
    assert seen > 100
    assert not wrong


def test_links_to_files_of_the_repository_lead_to_github(pages):
    blob = f"https://github.com/{home()['repository']}/blob/{home()['branch']}/"
    files = {
        link.removeprefix(blob)
        for page in pages.values()
        for link in page.links
        if link.startswith(blob)
    }
    assert {"utils/settings.py", "benchmarks/streaming.py", "LICENSE"} <= files
    assert not [file for file in files if not (ROOT / file).is_file()]
    assert (
        f"{blob.replace('/blob/', '/tree/')}results/embedded"
        in page(pages, "04_compare_side_by_side").links
    )


def test_nothing_is_loaded_from_another_host(book, pages):
    loaded = [(path.name, target) for path, page in pages.items() for target in page.loaded]
    assert len(loaded) > 10 * len(pages)
    assert not [
        (name, target) for name, target in loaded if re.match(r"//|(?!data:)[a-z]+:", target)
    ]
    styles = [path.read_text(encoding="utf-8") for path in book.rglob("*.css")]
    assert styles and not [
        found
        for text in styles
        for found in re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//.*""", text)
    ]


@every_notebook
def test_a_notebook_opens_in_colab(pages, name):
    address = f"https://colab.research.google.com/github/{home()['repository']}/blob/{home()['branch']}/notebooks/{name}.ipynb"
    assert page(pages, name).link(title="Launch on Colab") == address


@every_notebook
def test_answers_are_folded_and_their_code_is_set_as_code(pages, name):
    source = "\n".join(
        cell.source
        for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
        if cell.cell_type == "markdown"
    )
    written = re.findall(r"<details.*?</details>", source, flags=re.DOTALL)
    answers = page(pages, name).answers
    assert len(answers) == len(written)
    assert ["highlight" in answer for answer in answers] == ["```" in text for text in written]
    assert not [answer for answer in answers if "```" in answer]


def test_the_search_index_knows_the_notebooks(book):
    text = (book / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    found = index["terms"]["checkpoint"]
    assert "notebooks/03_train_with_qlora_dpo" in [index["docnames"][number] for number in found]


@pytest.fixture
def browser():
    """A page of Chromium; afterwards: no script failed, and nothing was asked of another host."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH: install one, on Debian `apt install chromium`")
    with browser_page() as (page, errors):
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.on(
            "console",
            lambda message: errors.append(message.text) if message.type == "error" else None,
        )
        yield page
        page.wait_for_load_state("networkidle")
        assert requests and not [url for url in requests if not url.startswith(("file:", "data:"))]
        assert errors == []


def address(book, name):
    return Path(book, name).as_uri()


@pytest.mark.browser
def test_formulas_are_typeset(book, browser):
    browser.goto(address(book, "notebooks/05_dpo_loss_by_hand.html"))
    browser.locator("div.math mjx-container").first.wait_for(timeout=60_000)
    assert browser.locator(".math").count() == browser.locator(".math mjx-container").count() > 2
    assert browser.locator("mjx-merror").count() == 0
    assert "mathcal" not in browser.locator("main").inner_text()


@pytest.mark.browser
def test_an_answer_unfolds(book, browser):
    browser.goto(address(book, "notebooks/05_dpo_loss_by_hand.html"))
    answer = browser.locator("details", has=browser.locator("pre")).first
    assert not answer.locator("pre").is_visible()
    answer.locator("summary").click()
    assert answer.locator("pre").is_visible()


@pytest.mark.browser
def test_search_finds_a_word(book, browser):
    browser.goto(address(book, "search.html") + "?q=preflight")
    result = browser.locator("#search-results a", has_text="Train with QLoRA DPO").first
    result.wait_for(timeout=60_000)
    result.click()
    browser.wait_for_url("**/03_train_with_qlora_dpo.html*")


@pytest.mark.browser
def test_light_dark_and_narrow(book, browser):
    colours = set()
    for scheme in ("light", "dark"):
        browser.emulate_media(color_scheme=scheme)
        browser.goto(address(book, "index.html"))
        colours.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
    browser.set_viewport_size({"width": 480, "height": 900})
    for path in sorted(book.rglob("*.html")):
        if "_static" not in path.parts:
            browser.goto(path.as_uri())
            assert browser.evaluate("document.documentElement.scrollWidth") <= 480, path.name
