"""The README's pictures, taken again in JupyterLab from the embedded data: `python -m tools.screenshots [FOLDER]`. Needs a Chromium."""

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

START = "from utils import display, preferences, sliders\nfrom utils.settings import PROFILES\nsettings = PROFILES['embedded']"
CELLS = {  # name of the picture → what it shows
    "pair_browser": "display.browse(preferences.load(settings.dataset, settings.train_split))",
    "memory_sliders": "sliders.memory_sliders(PROFILES['smolvlm'])",
}
COLOURS = 128  # enough for drawings, and a third of the bytes


def take(place, file):
    """Write what the page shows at `place` to `file`, without the empty margin on the right and below."""
    picture = Image.open(io.BytesIO(place.screenshot())).convert("RGB")
    _, background = max(picture.getcolors(picture.width * picture.height))
    _, _, right, bottom = ImageChops.difference(
        picture, Image.new("RGB", picture.size, background)
    ).getbbox()
    picture.crop((0, 0, min(right + 8, picture.width), bottom)).quantize(COLOURS).save(
        file, optimize=True
    )


def main(folder):
    with tempfile.TemporaryDirectory() as place:
        notebook = new_notebook(Path(place) / "screenshots.ipynb", [START, *CELLS.values()])
        with jupyter_lab(place) as address, browser_page() as (page, _):
            page.set_viewport_size(
                {"width": 1280, "height": 1600}
            )  # all of it at once: at the lower edge runs a line of JupyterLab's
            open_notebook(page, address(notebook.name))
            command(page, "application:toggle-left-area")  # the list of files
            run_all(page)
            for cell, name in enumerate(CELLS, 2):  # the first two show nothing
                output(page, cell).locator("img").wait_for()
                take(output(page, cell).locator(".widget-vbox"), folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
