"""The pair browser in a real JupyterLab: it loads, reacts to mouse and keyboard, runs no script from the data, and leaves a static page."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: run `make test`, or pip install playwright")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: run `make test`, or pip install jupyterlab")

import nbformat
from nbconvert import HTMLExporter

from tests.browser import CHROMIUM, browser_page, command, jupyter_lab, open_notebook

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: install one, on Debian `apt install chromium`"),
]

QUESTION = """What is <b>it</b>? <script>window.injected = 1</script><img src="x" onerror="window.injected = 1">"""
CELLS = [
    f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\nprint('python', sys.executable)",
    f"""from PIL import Image
from utils.display import browse
rows = [{{"image": Image.new("RGB", (216, 216), colour), "question": "What is it?", "chosen": f"A {{colour}} cup.",
         "rejected": "A kite."}} for colour in ("red", "green", "blue")]
rows[0]["question"] = {QUESTION!r}
browse(rows)""",
    "from utils.plots import training_curves\ntraining_curves([{'step': 1, 'loss': 0.7}, {'step': 2, 'loss': 0.6}])",
    "print('all', 'done')",
]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """A notebook that JupyterLab has run: its page, the errors of the page's scripts, and its file."""
    folder = tmp_path_factory.mktemp("browser")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    file = folder / "pairs.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS], metadata=kernel), file)
    with jupyter_lab(folder) as address, browser_page() as (page, errors):
        open_notebook(page, address(file.name))
        command(page, "notebook:run-all-cells")
        page.get_by_text("all done", exact=True).wait_for(timeout=60_000)
        yield page, errors, file


def wait_for_pair(page, number):
    page.locator(".widget-html").get_by_text(f"Pair {number} of 3", exact=True).wait_for(timeout=15_000)


def test_the_kernel_is_this_python(notebook):
    page, _, _ = notebook
    assert page.get_by_text(re.compile(r"^python /")).inner_text().split(maxsplit=1)[1].strip() == sys.executable


def test_next_and_previous_turn_the_page(notebook):
    page, errors, _ = notebook
    page.get_by_label("Pair", exact=True).fill("1")
    page.keyboard.press("Enter")
    wait_for_pair(page, 1)
    page.get_by_role("button", name="Next").click()
    wait_for_pair(page, 2)
    assert "A green cup." in page.locator(".widget-html").inner_text()
    page.get_by_role("button", name="Previous").click()
    wait_for_pair(page, 1)
    assert errors == []


def test_the_keyboard_is_enough(notebook):
    page, errors, _ = notebook
    number = page.get_by_label("Pair", exact=True)
    number.fill("3")
    page.keyboard.press("Enter")
    wait_for_pair(page, 3)
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


def test_no_script_of_the_data_runs(notebook):
    page, errors, _ = notebook
    page.get_by_label("Pair", exact=True).fill("1")
    page.keyboard.press("Enter")
    wait_for_pair(page, 1)
    assert QUESTION in page.locator(".widget-html").inner_text()
    assert page.evaluate("window.injected === undefined")
    assert errors == []


def test_a_picture_is_shown_in_full_and_a_figure_once(notebook):
    page, _, _ = notebook
    assert page.locator(".widget-html img").bounding_box()["width"] == 216
    assert page.locator(".jp-RenderedImage img").count() == 1


def test_without_a_kernel_the_first_pair_remains(notebook):
    page, _, file = notebook
    command(page, "docmanager:save")
    assert "widgets" not in nbformat.read(file, as_version=4).metadata
    static = file.with_suffix(".html")
    static.write_text(HTMLExporter().from_filename(file)[0], encoding="utf-8")
    reader = page.context.new_page()
    page.context.set_offline(True)  # the page asks for MathJax, which is not what this is about
    try:
        reader.goto(static.as_uri())
        reader.get_by_text("Pair 1 of 3", exact=True).wait_for(timeout=15_000)
        assert QUESTION in reader.locator("body").inner_text()
        assert reader.locator("table img").bounding_box()["width"] == 216
        assert reader.evaluate("window.injected === undefined")
    finally:
        page.context.set_offline(False)
        reader.close()
