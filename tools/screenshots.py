"""Take the README's picture of the pair browser again: `python -m tools.screenshots [FOLDER]`.

It is taken in JupyterLab, on the embedded data set. Needs a Chromium.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from tests.browser import (
    browser_page,
    command,
    jupyter_lab,
    new_notebook,
    open_notebook,
    output,
    run_all,
)
from tools.notebooks import ROOT

CELL = """
from utils import display, preferences
from utils.settings import PROFILES

settings = PROFILES["embedded"]
display.browse(preferences.load_part(settings, "train"))
"""
COLORS = 128  # enough for drawings, and a third of the bytes


def take(place, file):
    """Write what the page shows at `place` to `file`, without the margin on the right and below."""
    image = Image.open(io.BytesIO(place.screenshot())).convert("RGB")
    colors = image.getcolors(image.width * image.height)
    _, background = max(colors)  # the most frequent
    empty = Image.new("RGB", image.size, background)
    _, _, right, bottom = ImageChops.difference(image, empty).getbbox()
    cropped = image.crop((0, 0, min(right + 8, image.width), bottom))
    cropped.quantize(COLORS).save(file, optimize=True)


def main(folder):
    """Write pair_browser.png to `folder`."""
    with tempfile.TemporaryDirectory() as place:
        notebook = new_notebook(Path(place) / "screenshots.ipynb", [CELL.strip()])
        with jupyter_lab(place) as address, browser_page() as (page, _):
            # All of it at once: at the lower edge runs a line of JupyterLab's.
            page.set_viewport_size({"width": 1280, "height": 1600})
            open_notebook(page, address(notebook.name))
            command(page, "application:toggle-left-area")  # the list of files
            run_all(page)
            shown = output(page, 1)  # the first cell finds the repository
            shown.locator("img").wait_for()
            take(shown.locator(".widget-vbox"), folder / "pair_browser.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
