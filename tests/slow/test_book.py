"""The book that `make book` builds: complete, in order, with working links, and self-contained."""

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

from browser import CHROMIUM, SECONDS, browser_page

from tools.notebooks import ROOT, home

NOTEBOOKS = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)
THEMES_OWN = {"sd-dropdown", "hide"}  # classes of <details> that the theme makes


class Page(HTMLParser):
    """What a page links to and loads, its anchors, and its folded answers."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.links = []
        self.loaded = []
        self.anchors = {"", "top"}
        self.attributes = []  # of each <a>
        self.answers = []
        self.folded = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        for name in ("id", "name"):
            if attributes.get(name):
                self.anchors.add(attributes[name])
        for name in ("href", "src"):
            if attributes.get(name):
                self.links.append(attributes[name])
        if tag == "a":
            self.attributes.append(attributes)
        elif tag != "form":
            for name in ("src", "href", "srcset", "data", "poster", "action"):
                if attributes.get(name):
                    self.loaded.append(attributes[name])
        classes = attributes.get("class", "")
        if tag == "details" and not THEMES_OWN & set(classes.split()):
            self.folded = True
            self.answers.append("")
        elif self.folded:
            self.answers[-1] += f"<{tag} {classes}>"

    def handle_endtag(self, tag):
        if tag == "details":
            self.folded = False

    def handle_data(self, data):
        if self.folded:
            self.answers[-1] += data

    def link(self, **wanted):
        """The address of the one <a> with these attributes."""
        found = [each["href"] for each in self.attributes if wanted.items() <= each.items()]
        assert len(found) == 1, (self.path, wanted, found)
        return found[0]


def on_github(kind):
    """The address of the repository's folders (kind "tree") or files (kind "blob") on GitHub."""
    return f"https://github.com/{home()['repository']}/{kind}/{home()['branch']}/"


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The folder of the book, built once, by this Python."""
    folder = tmp_path_factory.mktemp("book") / "book"
    command = ["make", "--old-file=setup", "book", f"PYTHON={sys.executable}", f"BOOK={folder}"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(book):
    """Path → Page of every page of the book."""
    paths = [path for path in sorted(book.rglob("*.html")) if "_static" not in path.parts]
    return {path: Page(path) for path in paths}


def page_of(pages, name):
    return next(page for path, page in pages.items() if path.stem == name)


def test_every_notebook_has_a_page_and_they_are_in_order(book, pages):
    order = []
    at = book / "README.html"
    while True:
        onward = [each for each in pages[at].attributes if each.get("class") == "right-next"]
        if not onward:
            break
        before = at
        at = (at.parent / onward[0]["href"]).resolve()
        order.append(at.stem)
        back = pages[at].link(**{"class": "left-prev"})
        assert (at.parent / back).resolve() == before
    assert order[: len(NOTEBOOKS)] == NOTEBOOKS
    assert (book / "index.html").read_bytes() == (book / "README.html").read_bytes()


def test_every_link_inside_the_book_leads_somewhere(book, pages):
    wrong = []
    seen = 0
    for path, page in pages.items():
        for target in page.links:
            if re.match(r"[a-z]+:", target):
                continue
            seen += 1
            place, _, anchor = target.partition("#")
            file = path
            if place:
                file = (path.parent / unquote(place.split("?")[0])).resolve()
            is_wrong = not file.is_file()
            if file in pages and unquote(anchor) not in pages[file].anchors:
                is_wrong = True
            if is_wrong:
                wrong.append(f"{path.relative_to(book)}: {target}")
    assert seen > len(pages)
    assert not wrong


def test_links_to_files_of_the_repository_lead_to_github(pages):
    files = []
    folders = []
    for page in pages.values():
        for link in page.links:
            if link.startswith(on_github("blob")):
                files.append(link.removeprefix(on_github("blob")).partition("#")[0])
            if link.startswith(on_github("tree")):
                folders.append(link.removeprefix(on_github("tree")).partition("#")[0])
    assert "LICENSE" in files
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


def test_nothing_is_loaded_from_another_host(book, pages):
    wrong = []
    seen = 0
    for path, page in pages.items():
        for target in page.loaded:
            seen += 1
            if re.match(r"//|(?!data:)[a-z]+:", target):
                wrong.append((path.name, target))
    assert seen > len(pages)
    styles = list(book.rglob("*.css"))
    assert styles
    for path in styles:
        text = path.read_text(encoding="utf-8")
        for found in re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//.*""", text):
            wrong.append((path.name, found))
    assert wrong == []


@every_notebook
def test_a_notebook_opens_in_colab(pages, name):
    colab = "https://colab.research.google.com/github"
    file = f"{home()['repository']}/blob/{home()['branch']}/notebooks/{name}.ipynb"
    assert page_of(pages, name).link(title="Launch on Colab") == f"{colab}/{file}"


@every_notebook
def test_answers_are_folded_and_their_code_is_set_as_code(pages, name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    written = re.findall(r"<details.*?</details>", "\n".join(texts), flags=re.DOTALL)
    answers = page_of(pages, name).answers
    for text, answer in zip(written, answers, strict=True):
        # A formula has the class "nohighlight".
        is_code = re.search(r"(?<!no)highlight", answer) is not None
        assert is_code == ("```" in text)
        assert "```" not in answer


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

        def hear(message):
            if message.type == "error":
                errors.append(message.text)

        page.on("request", lambda request: requests.append(request.url))
        page.on("console", hear)
        yield page
        # Not "networkidle", which a page opened as a file sometimes never reaches.
        page.wait_for_load_state("load")
        page.wait_for_timeout(500)  # milliseconds, for requests that come late
        assert requests
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
        assert errors == []


def address(book, name):
    return Path(book, name).as_uri()


@pytest.mark.browser
def test_formulas_are_typeset(book, browser):
    browser.goto(address(book, "notebooks/05_dpo_loss_by_hand.html"))
    browser.wait_for_function(
        """() => {
            const formulas = document.querySelectorAll('.math');
            const typeset = document.querySelectorAll('.math mjx-container');
            return formulas.length > 0 && typeset.length === formulas.length;
        }"""
    )
    assert browser.locator("mjx-merror").count() == 0
    assert "mathcal" not in browser.locator("main").inner_text()


@pytest.mark.browser
def test_an_answer_unfolds(book, browser):
    browser.goto(address(book, "notebooks/05_dpo_loss_by_hand.html"))
    answer = browser.locator("details", has=browser.locator("pre")).first
    assert not answer.locator("pre").is_visible()
    answer.locator("summary").click()
    answer.locator("pre").wait_for(state="visible")


@pytest.mark.browser
def test_search_finds_a_word(book, browser):
    browser.goto(address(book, "search.html") + "?q=preflight")
    browser.locator("#search-results a", has_text="Train with QLoRA DPO").first.click()
    browser.wait_for_url("**/03_train_with_qlora_dpo.html*")


@pytest.mark.browser
def test_light_dark_and_narrow(book, pages, browser):
    colors = set()
    for scheme in ("light", "dark"):
        browser.emulate_media(color_scheme=scheme)
        browser.goto(address(book, "index.html"))
        colors.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colors) == 2
    browser.set_viewport_size({"width": 480, "height": 900})
    for path in pages:
        browser.goto(path.as_uri())
        assert browser.evaluate("document.documentElement.scrollWidth") <= 480, path.name
