"""Progress bars in interactive sessions, and none in log files and headless runs."""

import os
import pty
import subprocess
import sys
import termios

import nbformat
from nbclient import NotebookClient

from utils.settings import ROOT

CODE = "import utils\nfrom utils.progress import progress\nprint(sum(progress(range(9), 'adding')))"
LOAD = """import utils
from utils import models, settings
models.load_model(settings.load("embedded"))
print("loaded")"""
WIDGET = "application/vnd.jupyter.widget-view+json"
LIMIT = 1800  # seconds


def environment(**changes):
    """Return this process's environment without what switches bars off, and with `changes`."""
    names = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, **changes}


def run_cell(code, variables):
    """Run one cell in a kernel of its own; return its outputs."""
    cell = nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, timeout=LIMIT).execute(env=variables)
    return cell.outputs


def widgets_and_text(outputs):
    widgets = [output for output in outputs if WIDGET in output.get("data", {})]
    texts = [output.text for output in outputs if output.output_type == "stream"]
    return widgets, "".join(texts)


def test_a_log_file_gets_no_bar():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert (done.stdout, done.stderr) == ("36\n", "")


def test_a_terminal_gets_one():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))  # tqdm draws nothing in a window of no width
    os.set_blocking(ours, False)
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=LIMIT,
    )
    assert done.stdout == b"36\n"
    assert b"adding" in os.read(ours, 4096)
    os.close(theirs)
    os.close(ours)


def test_a_notebook_gets_one_unless_it_runs_headless():
    for changes, bars in (({}, 1), ({"TQDM_DISABLE": "1"}, 0)):
        widgets, printed = widgets_and_text(run_cell(CODE, environment(**changes)))
        assert (len(widgets), printed) == (bars, "36\n")


def test_a_model_is_loaded_without_a_bar_when_a_notebook_runs_headless():
    widgets, printed = widgets_and_text(run_cell(LOAD, environment(TQDM_DISABLE="1")))
    assert (len(widgets), printed) == (0, "loaded\n")
