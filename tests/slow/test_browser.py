"""Widgets, tables and figures in a real JupyterLab.

With mouse and keyboard, in both themes, in a narrow window, and without a kernel. axe-core looks at
what the notebook shows; JupyterLab around it is not ours.
"""

import re
import sys

import pytest

pytest.importorskip(
    "playwright.sync_api",
    reason="playwright is not installed: run `make test`, or pip install playwright",
)
pytest.importorskip(
    "axe_playwright_python",
    reason="axe-core is not installed: run `make test`, or pip install axe-playwright-python",
)
pytest.importorskip(
    "jupyterlab", reason="JupyterLab is not installed: run `make test`, or pip install jupyterlab"
)

import nbformat
from axe_playwright_python.base import AXE_SCRIPT
from browser import (
    CHROMIUM,
    browser_page,
    command,
    jupyter_lab,
    new_notebook,
    open_notebook,
    output,
    run_all,
)
from nbconvert import HTMLExporter

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium on the PATH: install one, on Debian `apt install chromium`",
    ),
]

QUESTION = """What is <b>it</b>? Is it $2 or $3?"""
WHICH_PYTHON = "print('python', sys.executable)"
PAIRS = f"""
from PIL import Image
from utils import chat, display

rows = []
for color in ("red", "green", "blue"):
    question = "What is it?" if rows else {QUESTION!r}
    rows.append({{
        "images": [Image.new("RGB", (216, 216), color)],
        "prompt": chat.prompt_messages(question),
        "chosen": chat.answer_messages(f"A {{color}} cup."),
        "rejected": chat.answer_messages("A kite."),
    }})
display.browse(rows)
"""
# As in notebook 06: the chart for a profile's own values, then one that redraws itself.
CHART = """
import dataclasses
from ipywidgets import BoundedIntText, interact
from utils import memory, plots
from utils.settings import PROFILES

def chart(profile, precision, rank, side, pairs):
    changed = dataclasses.replace(PROFILES[profile], lora_rank=rank, batch_size=pairs)
    components = memory.estimate(changed, 256, precision, side)
    title = f"{profile}, weights in {precision}, LoRA rank {rank}, {pairs} pairs"
    return plots.memory_figure(components, title)

own = PROFILES["embedded"]
own_side = memory.image_side(own)
chart("embedded", "nf4", own.lora_rank, own_side, own.batch_size)
"""
CONTROLS = """
interact(
    chart,
    profile=list(PROFILES),
    precision=list(memory.PRECISIONS),
    rank=BoundedIntText(own.lora_rank, 1, 256),
    side=BoundedIntText(own_side, 28, 1960),
    pairs=BoundedIntText(own.batch_size, 1, 32),
);
"""
SIDE_BY_SIDE = """
long = "A red cup and a kite on the left of it. " * 4
answers = {"base": (long, [(14, 20)]), "tuned": ("A red cup.", [])}
row = {"image": rows[0]["images"][0], "truth": "a red cup", "answers": answers}
display.side_by_side([row, row])
"""
TABLES = """
tokens = ["User", *["<image>"] * 9, "\\n", " cup", " can"]
kinds = ["prompt", *["image"] * 9, "prompt", "chosen", "rejected"]
display.show(display.tokens_html(tokens, kinds), "tokens")
display.table([{"metric": "CHAIR", "base": 18.1}, {"metric": "recall", "base": 96.9}], "Before")
"""
WIDE_TABLE = """
checks = []
for result in ("ok", "warning", "failed"):
    words = {"found": "none at 3 of 9 tensors of " + "a_long_name_" * 9, "what to do": "load again"}
    checks.append({"check": "gradients", "result": result, **words})
display.table(checks, "Preflight")
"""
FIGURE = """
from utils.plots import training_curves
training_curves([{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}])
"""
CELLS = [WHICH_PYTHON, PAIRS, CHART, CONTROLS, SIDE_BY_SIDE, TABLES, WIDE_TABLE, FIGURE]
# Whatever sticks out of the notebook to the right and has no ancestor there that scrolls.
UNREACHABLE = """outputs => outputs.flatMap(output => {
    const edge = output.closest(".jp-Notebook").getBoundingClientRect().right + 1;
    const reaches = element => element.getBoundingClientRect().right <= edge;
    const scrolls = element => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
    const isLost = element => {
        if (reaches(element) || element.classList.contains("jp-collapseHeadingButton")) {
            return false;
        }
        let above = element.parentElement;
        while (above !== output.parentElement) {
            if (scrolls(above) && reaches(above)) return false;
            above = above.parentElement;
        }
        return true;
    };
    const elements = output.querySelectorAll("td, th, img, button, select, input");
    return [...elements].filter(isLost).map(element => element.outerHTML.slice(0, 200));
})"""


def place(page, cell):
    """The outputs of one of CELLS; before them is the cell that finds the repository."""
    return output(page, 1 + CELLS.index(cell))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder that JupyterLab serves, what gives a notebook's address, a page and its errors."""
    folder = tmp_path_factory.mktemp("browser")
    with jupyter_lab(folder) as address, browser_page() as (page, errors):
        yield folder, address, page, errors


@pytest.fixture(scope="module")
def notebook(lab):
    """A notebook that JupyterLab has run: its page, the errors of its scripts, and its file."""
    folder, address, page, errors = lab
    file = new_notebook(folder / "widgets.ipynb", [cell.strip() for cell in CELLS])
    open_notebook(page, address(file.name))
    # The list of files leaves a narrow window no room.
    command(page, "application:toggle-left-area")
    run_all(page)
    return page, errors, file


@pytest.fixture(scope="module")
def reader(notebook):
    """The saved notebook as nbconvert's HTML, in a page of its own without network."""
    page, _, file = notebook
    command(page, "docmanager:save")
    static = file.with_suffix(".html")
    static.write_text(HTMLExporter().from_filename(file)[0], encoding="utf-8")
    reader = page.context.new_page()
    # The page asks for MathJax, which is not what this is about.
    reader.route("http*://**", lambda route: route.abort())
    reader.goto(static.as_uri())
    yield reader
    reader.close()


def assert_accessible(page):
    page.evaluate(AXE_SCRIPT)
    options = "{resultTypes: ['violations']}"
    found = page.evaluate(f"axe.run('.jp-OutputArea-output', {options})")
    problems = []
    for rule in found["violations"]:
        for node in rule["nodes"]:
            problems.append((rule["id"], node["html"][:300], node["failureSummary"]))
    assert problems == []


def wait_for_pair(page, number):
    page.locator(".widget-html").get_by_text(f"Pair {number} of 3", exact=True).wait_for()


def to_pair(page, number):
    page.get_by_label("Pair", exact=True).fill(str(number))
    page.keyboard.press("Enter")
    wait_for_pair(page, number)


def chart(page, cell):
    """What a memory chart says: its alternative text."""
    return place(page, cell).locator("img").get_attribute("alt")


def wait_for_chart(page, words):
    place(page, CONTROLS).locator(f'img[alt*="{words}"]').wait_for()


def test_an_error_in_a_cell_is_noticed(lab):
    """Or a notebook that stops early would look fine below."""
    folder, address, page, _ = lab
    file = new_notebook(folder / "wrong.ipynb", ["raise ValueError('a cup')"])
    wrong = page.context.new_page()
    open_notebook(wrong, address(file.name))
    with pytest.raises(AssertionError, match="a cup"):
        run_all(wrong)
    wrong.close()


def test_the_kernel_is_this_python(notebook):
    page, _, _ = notebook
    printed = page.get_by_text(re.compile(r"^python /")).inner_text()
    assert printed.split(maxsplit=1)[1].strip() == sys.executable


def test_next_and_previous_turn_the_page(notebook):
    page, errors, _ = notebook
    to_pair(page, 1)
    page.get_by_role("button", name="Next").click()
    wait_for_pair(page, 2)
    assert "A green cup." in place(page, PAIRS).inner_text()
    page.get_by_role("button", name="Previous").click()
    wait_for_pair(page, 1)
    assert QUESTION in place(page, PAIRS).inner_text()
    assert errors == []


def test_the_keyboard_is_enough_for_the_pairs(notebook):
    page, errors, _ = notebook
    to_pair(page, 3)
    page.get_by_role("button", name="Previous").focus()
    page.keyboard.press("Enter")
    wait_for_pair(page, 2)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    wait_for_pair(page, 3)
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    wait_for_pair(page, 2)
    assert errors == []


def test_the_keyboard_is_enough_for_the_memory_chart(notebook):
    page, errors, _ = notebook
    place(page, CONTROLS).get_by_label("profile").select_option("embedded")
    wait_for_chart(page, "embedded, weights in")
    before = chart(page, CONTROLS)
    place(page, CONTROLS).get_by_label("precision").focus()
    # JupyterLab keeps plain arrow keys for its cells: Alt opens the menu.
    page.keyboard.press("Alt+ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    wait_for_chart(page, "weights in bf16")
    page.keyboard.press("Tab")
    rank = int(re.search(r"LoRA rank (\d+)", before)[1])
    page.keyboard.press("ArrowUp")
    wait_for_chart(page, f"LoRA rank {rank + 1},")
    assert chart(page, CONTROLS).rpartition("total")[2] != before.rpartition("total")[2]
    assert errors == []


def test_another_profile_redraws_the_chart(notebook):
    page, errors, _ = notebook
    image = place(page, CONTROLS).locator("img")
    place(page, CONTROLS).get_by_label("profile").select_option("embedded")
    wait_for_chart(page, "embedded, weights in")
    before = image.get_attribute("src")
    place(page, CONTROLS).get_by_label("profile").select_option("qwen")
    wait_for_chart(page, "qwen, weights in")
    assert image.get_attribute("src") != before
    assert errors == []


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_outputs_are_accessible_in_both_themes(notebook, theme):
    page, _, _ = notebook
    command(page, "apputils:change-theme", theme=theme)
    page.wait_for_function("theme => document.body.dataset.jpThemeName === theme", arg=theme)
    assert_accessible(page)


def test_an_image_is_shown_in_full_and_a_figure_once(notebook):
    page, _, _ = notebook
    assert place(page, PAIRS).locator("img").bounding_box()["width"] == 216
    assert place(page, FIGURE).count() == 1
    assert place(page, FIGURE).locator("img").count() == 1
    assert "DPO loss" in place(page, FIGURE).locator("img").get_attribute("alt")


@pytest.mark.parametrize("width", [480, 360])
def test_a_narrow_window_cuts_nothing_off(notebook, width):
    """Every control lies in the window, and what is wider than its output can be scrolled to."""
    page, _, _ = notebook
    wide = page.viewport_size
    page.set_viewport_size({"width": width, "height": 900})
    try:
        page.wait_for_function(
            "width => document.querySelector('.jp-Notebook').clientWidth < width", arg=width
        )
        right = page.locator(".jp-Notebook").evaluate(
            "notebook => notebook.getBoundingClientRect().right"
        )
        for cell in (PAIRS, CONTROLS):
            for control in place(page, cell).locator("button, input, select").all():
                control.scroll_into_view_if_needed()
                box = control.bounding_box()
                assert box["x"] + box["width"] <= right + 1, control.inner_text()
            for button in place(page, cell).get_by_role("button").all():
                fits = "button => button.scrollWidth <= button.clientWidth"
                assert button.evaluate(fits), "a button's name is cut off"
        for cell in CELLS:
            assert place(page, cell).evaluate_all(UNREACHABLE) == [], cell
        to_pair(page, 1)
        page.get_by_role("button", name="Next").click()
        wait_for_pair(page, 2)
    finally:
        page.set_viewport_size(wide)


def test_no_widget_state_is_saved(notebook, reader):
    assert "widgets" not in nbformat.read(notebook[2], as_version=4).metadata


def test_without_a_kernel_the_first_pair_and_the_profiles_chart_remain(reader):
    first = place(reader, PAIRS).inner_text()
    assert "Pair 1 of 3" in first
    assert QUESTION in first
    assert place(reader, PAIRS).locator("img").bounding_box()["width"] == 216
    assert chart(reader, CHART).startswith("embedded, weights in nf4")
    assert "total" in chart(reader, CHART)
    assert place(reader, CHART).locator("img").evaluate("image => image.naturalWidth") > 300


def test_the_exported_page_is_accessible(reader):
    assert_accessible(reader)
