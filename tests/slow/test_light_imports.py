"""Notebook 01 needs figures, and none of what takes seconds to load."""

import subprocess
import sys

from utils.settings import ROOT


def test_drawing_does_not_load_transformers():
    code = "import sys, utils.plots; print('transformers' in sys.modules)"
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=1800,
    )
    assert child.stdout == "False\n"
