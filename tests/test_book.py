"""The book that `make book` builds: complete, in order, every link leads somewhere, and nothing comes from another host."""

import json
import re
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from tools.notebooks import ROOT, home

pytest.importorskip("myst_nb", reason="myst-nb is not installed: run `make test`")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: run `make test`")
from tests.browser import CHROMIUM, browser_page  # noqa: E402

NOTEBOOKS = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)
in_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: install one, on Debian `apt install chromium`"),
]
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
