"""A hundred attacks in JupyterLab and in the page it exports.

They go through everything that makes HTML, Markdown or a widget out of text. No script runs, no
request leaves, and the attack can be read, letter for letter.
"""

import re
import time

import pytest

pytest.importorskip(
    "playwright.sync_api",
    reason="playwright is not installed: run `make test`, or pip install playwright",
)
pytest.importorskip(
    "jupyterlab", reason="JupyterLab is not installed: run `make test`, or pip install jupyterlab"
)

from attacks import ATTACKS, CARELESS, FIRST_LATER, armed
from browser import (
    CHROMIUM,
    SECONDS,
    browser_page,
    command,
    injected,
    jupyter_lab,
    new_notebook,
    open_notebook,
    output,
    run_all,
    shut_in,
)
from nbconvert import HTMLExporter

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium on the PATH: install one, on Debian `apt install chromium`",
    ),
]

START = """
import json
import tempfile
from pathlib import Path

from IPython.display import Markdown
from ipywidgets import interact
from PIL import Image

from tests.attacks import ATTACKS
from utils import chat, display, evaluation, model_card, plots

image = Image.new("RGB", (40, 40), "teal")

def show(make):
    display.show("".join(f"<div>{make(attack)}</div>" for attack in ATTACKS), "")

def pair(attack):
    return {
        "images": [image, {"bytes": b"", "path": attack}],
        "prompt": [*chat.answer_messages(attack), *chat.prompt_messages(attack)],
        "chosen": chat.answer_messages(attack + "a"),
        "rejected": chat.answer_messages("b" + attack),
        "problem": attack,
    }

def answers(attack):
    said = {attack: (attack, [(1, 3)])}
    return {"image": image, "truth": attack, "answers": said, "note": attack}

def tokens(attack):
    pieces = [attack, *attack.split(), *[attack] * 4]
    return display.tokens_html(pieces, ["chosen"] * len(pieces))
"""
TEXT = "show(display.text_html)"
MARKS = "show(lambda attack: display.mark_html(attack, [(0, 1), (3, len(attack))], 'ins'))"
DIFFERENCES = "show(lambda attack: display.difference_html(attack, 'script on 1', 'del'))"
IMAGES = "show(lambda attack: display.image_html(image, alt=attack))"
PAIRS = "show(lambda attack: display.pair_html(pair(attack), attack))"
SIDE_BY_SIDE = "show(lambda attack: display.side_by_side_html([answers(attack)]))"
TOKENS = "show(tokens)"
TABLES = "show(lambda attack: display.table_html([{attack: attack}], caption=attack))"
ONE_TABLE = "display.table([{'attack': attack, attack: 1} for attack in ATTACKS], 'All')"
# Which figure it is does not matter here, and a hundred drawings would take long.
FIGURES = """
figure = plots.memory_figure({"weights": 1})
show(lambda attack: plots.figure_html(figure, attack))
"""
CARDS = """
one = {"mean": 0.1, "low": 0.1, "high": 0.1, "p": 0.1}
evaluated = {
    "base": dict.fromkeys(evaluation.METRICS, 0.1),
    "tuned": dict.fromkeys(evaluation.METRICS, 0.1),
    "difference": dict.fromkeys(evaluation.METRICS, one),
    "n": 5,
}

def card(attack):
    run = Path(tempfile.mkdtemp())
    settings = dict.fromkeys(model_card.CARD_SETTINGS, attack)
    settings["dataset"] = "embedded/dataset"
    settings["evaluation_dataset"] = attack
    record = {
        "settings": settings,
        "final": {},
        "steps": attack,
        "pairs": 1,
        "seconds": 1,
        "versions": {attack: attack},
    }
    (run / "training.json").write_text(json.dumps(record))
    (run / "evaluation.json").write_text(json.dumps(evaluated))
    return model_card.text(run)

Markdown("\\n\\n".join(card(attack) for attack in ATTACKS))
"""
MENU = """
def named(profile):
    return plots.memory_figure({"weights": 1e9}, profile)

interact(named, profile=ATTACKS);
"""
BROWSER = "display.browse([pair(attack) for attack in ATTACKS])"
# What shows all attacks as text, and at once.
READABLE = [TEXT, MARKS, DIFFERENCES, PAIRS, SIDE_BY_SIDE, TOKENS, TABLES, ONE_TABLE, CARDS]
CELLS = [START, *READABLE, IMAGES, FIGURES, MENU, BROWSER]
CDN = "https://cdnjs.cloudflare.com/ajax/libs/"
TEMPLATE_ASKS = {
    f"{CDN}require.js/2.1.10/require.min.js",
    f"{CDN}mathjax/2.7.7/latest.js?config=TeX-AMS_CHTML-full,Safe",
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacks")
    with jupyter_lab(folder) as address, browser_page() as (page, errors):
        yield folder, address, page, errors


@pytest.fixture(scope="module")
def notebook(lab):
    """The notebook, run: its page, its file, what it asked for and opened, and script errors."""
    folder, address, page, errors = lab
    file = new_notebook(folder / "attacks.ipynb", [cell.strip() for cell in CELLS])
    heard = shut_in(page, origin(address))
    open_notebook(page, address(file.name))
    run_all(page)
    return page, file, heard, errors


def origin(address):
    """The server's address, from what gives a notebook's."""
    return re.match("http://[^/]+/", address(""))[0]


def place(page, cell):
    """The outputs of one of CELLS; before them is the cell that finds the repository."""
    return output(page, 1 + CELLS.index(cell))


def squeezed(text):
    """`text` without white space and what HTML has no letter for, which pages show as they like."""
    return re.sub(r"[\s\0\ufffd·↵]", "", text)


def assert_readable(where, text, attacks=ATTACKS):
    text = squeezed(text)
    assert [attack for attack in attacks if squeezed(attack) not in text] == [], where


def assert_nothing_happened(page, heard, but=()):
    # Not "networkidle", which a page opened as a file sometimes never reaches.
    page.wait_for_load_state("load")
    page.wait_for_timeout(500)  # milliseconds, for requests that come late
    asked, dialogs = heard
    assert injected(page) == set(), page.url
    assert set(asked) - set(but) == set(), page.url
    assert dialogs == [], page.url
    formulas = page.locator(".jp-OutputArea-output mjx-container")
    assert formulas.count() == 0, "text was typeset as a formula"


def fitting(attack):
    """The careless pages where `attack` may work: a whole tag needs no way out of anything."""
    if re.match("<[a-z]", attack, re.IGNORECASE):
        return CARELESS[:1]
    return CARELESS


def test_the_attacks_would_work():
    """Each that works at once does so in a page that takes it as it is, or we would prove nothing.

    The others wait for a click, another reader or an old browser.
    """
    documents = []
    for attack in ATTACKS[:FIRST_LATER]:
        for careless in fitting(attack):
            documents.append(careless.format(attack))
    missing = set(range(FIRST_LATER))
    end = time.monotonic() + SECONDS
    with browser_page() as (page, _):
        asked, _ = shut_in(page)
        page.set_content("<body></body>")
        page.evaluate(
            """documents => documents.forEach(source => {
                const frame = document.createElement("iframe");
                frame.srcdoc = source;
                document.body.append(frame);
            })""",
            documents,
        )
        while missing and time.monotonic() < end:
            page.wait_for_timeout(250)
            missing -= injected(page)
            for address in asked:
                found = re.match(r"http://attack\.invalid/(\d+)", address)
                if found:
                    missing.discard(int(found[1]))
    assert [ATTACKS[number] for number in missing] == []


def test_what_is_not_escaped_is_noticed(lab):
    """Or the tests below would be blind."""
    folder, address, page, _ = lab
    raw = armed("<img src=x: onerror=RUN><img src=URL> $x$", 1)
    file = new_notebook(folder / "raw.ipynb", [f"from IPython.display import HTML\nHTML({raw!r})"])
    careless = page.context.new_page()
    heard = shut_in(careless, origin(address))
    open_notebook(careless, address(file.name))
    run_all(careless)
    careless.locator(".jp-OutputArea-output mjx-container").wait_for(state="attached")
    assert injected(careless) == {1}
    assert "http://attack.invalid/1" in heard[0]
    with pytest.raises(AssertionError):
        assert_nothing_happened(careless, heard)
    careless.close()


def test_no_attack_gets_its_way_in_jupyterlab(notebook):
    page, _, heard, errors = notebook
    assert_nothing_happened(page, heard)
    assert errors == []
    for cell in READABLE:
        assert_readable(cell, place(page, cell).inner_text())


@pytest.mark.parametrize("cell", [IMAGES, FIGURES])
def test_alternative_texts_are_the_attacks(notebook, cell):
    page, *_ = notebook
    images = place(page, cell).locator("img")
    alts = images.evaluate_all("images => images.map(image => image.alt)")
    for attack, alt in zip(ATTACKS, alts, strict=True):
        assert squeezed(attack) == squeezed(alt)


def test_leafing_through_all_of_them_runs_none(notebook):
    page, _, heard, errors = notebook
    shown = place(page, BROWSER)
    for number, attack in enumerate(ATTACKS, 1):
        shown.get_by_text(f"Pair {number} of {len(ATTACKS)}", exact=True).wait_for()
        assert_readable("browser", shown.locator(".widget-html").inner_text(), [attack])
        shown.get_by_role("button", name="Next").click()
    assert_nothing_happened(page, heard)
    assert errors == []


def test_choosing_profiles_named_so_runs_none(notebook):
    page, _, heard, errors = notebook
    menu = place(page, MENU).get_by_label("profile")
    options = menu.locator("option").all_inner_texts()
    assert_readable("menu", "".join(options))
    drawn = """start => [...document.querySelectorAll('.jp-OutputArea-output img')].some(
        image => image.alt.startsWith(start))"""
    for number in range(1, len(ATTACKS), 9):
        menu.select_option(index=number)
        title = ", ".join(ATTACKS[number].splitlines())
        page.wait_for_function(drawn, arg=f"{title}: weights")
    assert_nothing_happened(page, heard)
    assert errors == []


def test_no_attack_gets_its_way_in_the_page_that_nbconvert_makes(notebook):
    page, file, *_ = notebook
    command(page, "docmanager:save")
    static = file.with_suffix(".html")
    static.write_text(HTMLExporter().from_filename(file)[0], encoding="utf-8")
    reader = page.context.new_page()
    heard = shut_in(reader, static.as_uri())
    reader.goto(static.as_uri())
    assert_nothing_happened(reader, heard, but=TEMPLATE_ASKS)
    for cell in READABLE:
        assert_readable(cell, place(reader, cell).inner_text())
    reader.close()
