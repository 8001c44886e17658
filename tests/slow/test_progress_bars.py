"""Progress bars in interactive sessions, and none in log files and headless runs."""

import os
import pty
import subprocess
import sys
import termios

import nbformat
import pytest
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


@pytest.mark.parametrize(("code", "printed"), [(CODE, "36\n"), (LOAD, "loaded\n")])
def test_a_log_file_gets_no_bar(code, printed):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert (done.stdout, done.stderr) == (printed, "")


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


@pytest.mark.parametrize(("code", "printed"), [(CODE, "36\n"), (LOAD, "loaded\n")])
def test_a_notebook_gets_one_unless_it_runs_headless(code, printed):
    for changes, bars in (({}, 1), ({"TQDM_DISABLE": "1"}, 0)):
        outputs = run_cell(code, environment(**changes))
        widgets = [output for output in outputs if WIDGET in output.get("data", {})]
        streams = [output.text for output in outputs if output.output_type == "stream"]
        assert len(widgets) == bars
        assert streams == [printed]
