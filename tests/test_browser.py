"""Widgets, tables and figures in a real JupyterLab: mouse, keyboard, both themes, a narrow window, and what remains without a kernel.

axe-core looks at what the notebook shows; JupyterLab around it is not ours.
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
from nbconvert import HTMLExporter

from tests.browser import (
    CHROMIUM,
    browser_page,
    command,
    jupyter_lab,
    new_notebook,
    open_notebook,
    output,
    run_all,
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium on the PATH: install one, on Debian `apt install chromium`",
    ),
]

QUESTION = """What is <b>it</b>? Is it $2 or $3?"""
PAIRS, SLIDERS, SIDE, TABLES, FIGURE, PREFLIGHT = range(
    2, 8
)  # the cells; before them: the path, and which Python it is
CELLS = [
    "print('python', sys.executable)",
    f"""from PIL import Image
from utils import display
rows = [{{"image": Image.new("RGB", (216, 216), colour), "question": "What is it?", "chosen": f"A {{colour}} cup.",
         "rejected": "A kite."}} for colour in ("red", "green", "blue")]
rows[0]["question"] = {QUESTION!r}
display.browse(rows)""",
    "from utils import sliders\nsliders.memory_sliders(sliders.PROFILES['embedded'])",
    """answers = {"base": ("A red cup and a kite on the left of it. " * 4, [(14, 20)]), "after DPO": ("A red cup.", [])}
display.show(display.side_by_side_html([{"image": rows[0]["image"], "truth": "a red cup", "answers": answers}] * 2), "two scenes")""",
    """kinds = ["prompt", *["image"] * 9, "prompt", "chosen", "rejected"]
display.show(display.tokens_html(["User", *["<image>"] * 9, "\\n", " cup", " can"], kinds), "tokens")
display.show(display.table_html([{"metric": "CHAIR", "base": 18.1}, {"metric": "recall", "base": 96.9}], caption="Before"), "table")""",
    "from utils.plots import training_curves\ntraining_curves([{'step': 1, 'loss': 0.7}, {'step': 2, 'loss': 0.6}])",
    """from utils import preflight
words = {"found": "none at 3 of 9 tensors", "what to do": "load the model again"}
preflight.show([{"check": "gradients", "result": result, **words} for result in ("ok", "warning", "failed")])""",
]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """A notebook that JupyterLab has run: its page, the errors of the page's scripts, and its file."""
    folder = tmp_path_factory.mktemp("browser")
    file = new_notebook(folder / "widgets.ipynb", CELLS)
    with jupyter_lab(folder) as address, browser_page() as (page, errors):
        open_notebook(page, address(file.name))
        command(
            page, "application:toggle-left-area"
        )  # the list of files, which leaves a narrow window no room
        run_all(page)
        yield page, errors, file


@pytest.fixture(scope="module")
def reader(notebook):
    """The saved notebook as nbconvert's HTML, in a page of its own without network: it asks for MathJax, not what this is about."""
    page, _, file = notebook
    command(page, "docmanager:save")
    static = file.with_suffix(".html")
    static.write_text(HTMLExporter().from_filename(file)[0], encoding="utf-8")
    reader = page.context.new_page()
    reader.route("http*://**", lambda route: route.abort())
    reader.goto(static.as_uri())
    yield reader
    reader.close()


def assert_accessible(page):
    page.evaluate(AXE_SCRIPT)
    found = page.evaluate("axe.run('.jp-OutputArea-output', {resultTypes: ['violations']})")[
        "violations"
    ]
    assert [
        (rule["id"], node["html"][:300], node["failureSummary"])
        for rule in found
        for node in rule["nodes"]
    ] == []


def wait_for_pair(page, number):
    page.locator(".widget-html").get_by_text(f"Pair {number} of 3", exact=True).wait_for(
        timeout=15_000
    )


def to_pair(page, number):
    page.get_by_label("Pair", exact=True).fill(str(number))
    page.keyboard.press("Enter")
    wait_for_pair(page, number)


def test_the_kernel_is_this_python(notebook):
    page, _, _ = notebook
    assert (
        page.get_by_text(re.compile(r"^python /")).inner_text().split(maxsplit=1)[1].strip()
        == sys.executable
    )


def test_next_and_previous_turn_the_page(notebook):
    page, errors, _ = notebook
    to_pair(page, 1)
    page.get_by_role("button", name="Next").click()
    wait_for_pair(page, 2)
    assert "A green cup." in output(page, PAIRS).inner_text()
    page.get_by_role("button", name="Previous").click()
    wait_for_pair(page, 1)
    assert QUESTION in output(page, PAIRS).inner_text()
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


def chart(page):
    """What the memory chart says: its alternative text."""
    return output(page, SLIDERS).locator("img").get_attribute("alt")


def wait_for_chart(page, *words):
    for word in words:
        output(page, SLIDERS).locator(f'img[alt*="{word}"]').wait_for(timeout=15_000)


def test_the_keyboard_is_enough_for_the_memory_sliders(notebook):
    page, errors, _ = notebook
    output(page, SLIDERS).get_by_label("Profile").select_option("embedded")
    wait_for_chart(page, "model, weights in nf4")
    before, picture = chart(page), output(page, SLIDERS).locator("img").get_attribute("src")
    output(page, SLIDERS).get_by_label("Profile").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowUp")  # nf4 is the last of the weights
    wait_for_chart(page, "weights in bf16")
    page.keyboard.press("Tab")
    rank = int(re.search(r"LoRA rank (\d+)", before)[1])
    page.keyboard.press("ArrowRight")
    wait_for_chart(page, f"LoRA rank {rank + 1},")
    assert chart(page).rpartition("total")[2] != before.rpartition("total")[2]
    assert output(page, SLIDERS).locator("img").get_attribute("src") != picture
    assert errors == []


def test_another_profile_moves_the_sliders(notebook):
    page, errors, _ = notebook
    output(page, SLIDERS).get_by_label("Profile").select_option("qwen")
    wait_for_chart(page, "Qwen2.5-VL-3B-Instruct", "total")
    output(page, SLIDERS).get_by_label("Profile").select_option("embedded")
    wait_for_chart(page, "model, weights in")
    assert errors == []


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_outputs_are_accessible_in_both_themes(notebook, theme):
    page, _, _ = notebook
    command(page, "apputils:change-theme", theme=theme)
    page.wait_for_function("theme => document.body.dataset.jpThemeName === theme", arg=theme)
    assert_accessible(page)


def test_a_picture_is_shown_in_full_and_a_figure_once(notebook):
    page, _, _ = notebook
    assert output(page, PAIRS).locator("img").bounding_box()["width"] == 216
    assert output(page, FIGURE).count() == 1 and output(page, FIGURE).locator("img").count() == 1
    assert "DPO loss" in output(page, FIGURE).locator("img").get_attribute("alt")


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
        for cell in (PAIRS, SLIDERS):
            for control in (
                output(page, cell)
                .locator("button, input, select, .noUi-handle, .widget-readout")
                .all()
            ):
                control.scroll_into_view_if_needed()
                box = control.bounding_box()
                assert box["x"] + box["width"] <= right + 1, control.inner_text()
            for button in output(page, cell).get_by_role("button").all():
                assert button.evaluate("button => button.scrollWidth <= button.clientWidth"), (
                    "a button's name is cut off"
                )
        for cell in range(PAIRS, PREFLIGHT + 1):
            assert output(page, cell).evaluate_all(UNREACHABLE) == [], CELLS[cell - 1]
        to_pair(page, 1)
        page.get_by_role("button", name="Next").click()
        wait_for_pair(page, 2)
    finally:
        page.set_viewport_size(wide)


# Whatever sticks out of the notebook to the right and has no ancestor there that scrolls.
UNREACHABLE = """outputs => outputs.flatMap(output => [...output.querySelectorAll("td, th, img, button, select, input")].filter(element => {
    const edge = output.closest(".jp-Notebook").getBoundingClientRect().right + 1;
    if (element.getBoundingClientRect().right <= edge || element.classList.contains("jp-collapseHeadingButton")) return false;
    for (let above = element.parentElement; above !== output.parentElement; above = above.parentElement) {
        const scrolls = ["auto", "scroll"].includes(getComputedStyle(above).overflowX);
        if (scrolls && above.getBoundingClientRect().right <= edge) return false;
    }
    return true;
}).map(element => element.outerHTML.slice(0, 200)))"""


def test_no_widget_state_is_saved(notebook, reader):
    assert "widgets" not in nbformat.read(notebook[2], as_version=4).metadata


def test_without_a_kernel_the_first_pair_and_the_profiles_chart_remain(reader):
    assert (
        "Pair 1 of 3" in output(reader, PAIRS).inner_text()
        and QUESTION in output(reader, PAIRS).inner_text()
    )
    assert output(reader, PAIRS).locator("img").bounding_box()["width"] == 216
    assert chart(reader).startswith("model, weights in nf4") and "total" in chart(reader)
    assert output(reader, SLIDERS).locator("img").evaluate("image => image.naturalWidth") > 300


def test_the_exported_page_is_accessible(reader):
    assert_accessible(reader)
