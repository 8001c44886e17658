"""A hundred attacks through everything that makes HTML, Markdown or a widget out of text, in JupyterLab and in the page it exports.

No script runs, no request leaves, and the attack can be read, letter for letter.
"""

import re

import pytest

pytest.importorskip(
    "playwright.sync_api",
    reason="playwright is not installed: run `make test`, or pip install playwright",
)
pytest.importorskip(
    "jupyterlab", reason="JupyterLab is not installed: run `make test`, or pip install jupyterlab"
)

from nbconvert import HTMLExporter

from tests.attacks import ATTACKS, CARELESS, FIRST_LATER, armed
from tests.browser import (
    CHROMIUM,
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

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium on the PATH: install one, on Debian `apt install chromium`",
    ),
]

START = """\
import dataclasses, json, tempfile
from pathlib import Path
from IPython.display import Markdown
from PIL import Image
from tests.attacks import ATTACKS
from utils import display, memory, model_card, preflight, sliders

picture = Image.new("RGB", (40, 40), "teal")

def show(make):
    display.show("".join(f"<div>{make(attack)}</div>" for attack in ATTACKS), "")

def pair(attack):
    return {"image": picture, "question": attack, "chosen": attack + "a", "rejected": "b" + attack}

def answers(attack):
    return {"image": picture, "truth": attack, "answers": {attack: (attack, [(1, 3)])}, "note": attack}"""
CELLS = {  # what a cell shows → its code
    "text": "show(display.text_html)",
    "marks": "show(lambda attack: display.mark_html(attack, [(0, 1), (3, len(attack))], 'ins'))",
    "differences": "show(lambda attack: display.difference_html(attack, 'script on 1', 'del'))",
    "pictures": "show(lambda attack: display.image_html(picture, alt=attack))",
    "pairs": "show(lambda attack: display.pair_html(pair(attack), attack))",
    "side by side": "show(lambda attack: display.side_by_side_html([answers(attack)]))",
    "tokens": "show(lambda attack: display.tokens_html([attack, *attack.split(), *[attack] * 4], ['chosen'] * (5 + len(attack.split()))))",
    "tables": "show(lambda attack: display.table_html([{attack: attack}], caption=attack))",
    "preflight": """preflight.show([
    {"check": attack, "result": result, "found": attack, "what to do": attack}
    for attack, result in zip(ATTACKS, 20 * ["ok", "ok", "ok", "warning", "failed"])
])""",
    # Which architecture and which drawing it is does not matter here, and a hundred drawings would take long.
    "charts": """\
small, chart = memory.architecture("embedded/model"), sliders.memory_figure({"weights": 1})
memory.architecture, sliders.memory_figure = lambda name: small, lambda *_: chart
named = {attack: dataclasses.replace(sliders.PROFILES["embedded"], profile=attack, model=attack) for attack in ATTACKS}
show(lambda attack: sliders.memory_html(named[attack], "bf16", 96))""",
    "cards": """\
figure = {"mean": 0.1, "low": 0.1, "high": 0.1, "p": 0.1}
evaluation = {side: dict.fromkeys(share.METRICS, 0.1) for side in ("base", "dpo")}
evaluation |= {"difference": dict.fromkeys(share.METRICS, figure), "n": 5}

def card(attack):
    run = Path(tempfile.mkdtemp())
    settings = dict.fromkeys(share.SETTINGS, attack) | {"dataset": "embedded/dataset", "evaluation_dataset": attack}
    record = {"settings": settings, "final": {}, "steps": attack, "pairs": 1, "seconds": 1, "versions": {attack: attack}}
    (run / "training.json").write_text(json.dumps(record))
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return model_card.model_card(run)

Markdown("\\n\\n".join(map(card, ATTACKS)))""",
    "sliders": "sliders.PROFILES.update(named)\nsliders.memory_sliders(named[ATTACKS[0]])",
    "browser": "display.browse([pair(attack) for attack in ATTACKS])",
}
NUMBER = {name: number for number, name in enumerate(CELLS, 2)}
READABLE = set(CELLS) - {
    "pictures",
    "charts",
    "sliders",
    "browser",
}  # what shows all attacks as text, and at once
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
    """The notebook, run: its page, its file, and what it asked for and opened until now."""
    folder, address, page, errors = lab
    file = new_notebook(folder / "attacks.ipynb", [START, *CELLS.values()])
    heard = shut_in(page, origin(address))
    open_notebook(page, address(file.name))
    run_all(page)
    return page, file, heard, errors


def origin(address):
    """The server's address, from what gives a notebook's."""
    return re.match("http://[^/]+/", address(""))[0]


def squeezed(text):
    """`text` without white space and what HTML has no letter for, which pages show as they like."""
    return re.sub(r"[\s\0\ufffd·↵]", "", text)


def assert_readable(where, text, attacks=ATTACKS):
    text = squeezed(text)
    assert [attack for attack in attacks if squeezed(attack) not in text] == [], where


def assert_nothing_happened(page, heard, but=()):
    page.wait_for_load_state("networkidle")
    asked, dialogs = heard
    assert (injected(page), set(asked) - set(but), dialogs) == (set(), set(), []), page.url
    assert page.locator(".jp-OutputArea-output mjx-container").count() == 0, (
        "text was typeset as a formula"
    )


def test_there_are_a_hundred_attacks_and_they_would_work():
    """Each of the first 65 gets its way in a page that puts it in as it is, or the tests below would prove nothing."""
    assert len(set(ATTACKS)) == 100
    with browser_page() as (page, _):
        asked, _ = shut_in(page)
        page.set_content("<body></body>")
        page.evaluate(
            """documents => documents.forEach(source => {
                const frame = document.createElement("iframe");
                frame.srcdoc = source;
                document.body.append(frame);
            })""",
            [
                careless.format(attack)
                for attack in ATTACKS[:FIRST_LATER]
                for careless in fitting(attack)
            ],
        )
        missing = set(range(FIRST_LATER))
        for _ in range(40):
            missing -= injected(page) | {
                int(number)
                for number in re.findall(r"http://attack\.invalid/(\d+)", " ".join(asked))
            }
            if not missing:
                break
            page.wait_for_timeout(250)
        assert [ATTACKS[number] for number in missing] == []


def fitting(attack):
    """The careless pages where `attack` may work: a whole tag needs no way out of anything first."""
    return CARELESS[:1] if re.match("<[a-z]", attack, re.IGNORECASE) else CARELESS


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
    assert injected(careless) == {1} and "http://attack.invalid/1" in heard[0]
    with pytest.raises(AssertionError):
        assert_nothing_happened(careless, heard)
    careless.close()


def test_no_attack_gets_its_way_in_jupyterlab(notebook):
    page, _, heard, errors = notebook
    assert_nothing_happened(page, heard)
    assert errors == []
    for name in READABLE:
        assert_readable(name, output(page, NUMBER[name]).inner_text())


def test_alternative_texts_are_the_attacks(notebook):
    page, *_ = notebook
    for name in ("pictures", "charts"):
        texts = (
            output(page, NUMBER[name])
            .locator("img")
            .evaluate_all("images => images.map(image => image.alt)")
        )
        assert len(texts) == len(ATTACKS)
        tails = ATTACKS if name == "pictures" else [attack.split("/")[-1] for attack in ATTACKS]
        assert all(
            squeezed(attack) in squeezed(text) for attack, text in zip(tails, texts, strict=True)
        )


def test_leafing_through_all_of_them_runs_none(notebook):
    page, _, heard, errors = notebook
    shown = output(page, NUMBER["browser"])
    for number, attack in enumerate(ATTACKS, 1):
        shown.get_by_text(f"Pair {number} of {len(ATTACKS)}", exact=True).wait_for(timeout=15_000)
        assert_readable("browser", shown.locator(".widget-html").inner_text(), [attack])
        shown.get_by_role("button", name="Next").click()
    assert_nothing_happened(page, heard)
    assert errors == []


def test_choosing_profiles_named_so_runs_none(notebook):
    page, _, heard, errors = notebook
    shown = output(page, NUMBER["sliders"])
    options = shown.get_by_label("Profile").locator("option").all_inner_texts()
    assert_readable("sliders", "".join(options))
    for attack in ATTACKS[1:100:9]:
        shown.get_by_label("Profile").select_option(
            index=len(options) - len(ATTACKS) + ATTACKS.index(attack)
        )
        drawn = "start => [...document.querySelectorAll('.widget-html img')].some(image => image.alt.startsWith(start))"
        page.wait_for_function(drawn, arg=f"{attack.split('/')[-1]}, weights in", timeout=15_000)
    assert_nothing_happened(page, heard)
    assert errors == []


def test_no_attack_gets_its_way_in_the_page_that_nbconvert_makes(notebook, lab):
    page, file, *_ = notebook
    command(page, "docmanager:save")
    static = file.with_suffix(".html")
    static.write_text(HTMLExporter().from_filename(file)[0], encoding="utf-8")
    reader = page.context.new_page()
    heard = shut_in(reader, static.as_uri())
    reader.goto(static.as_uri())
    assert_nothing_happened(reader, heard, but=TEMPLATE_ASKS)
    for name in READABLE:
        assert_readable(name, output(reader, NUMBER[name]).inner_text())
    reader.close()
