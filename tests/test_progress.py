"""Bars where somebody looks on, silence where nobody does."""

import os
import pty
import subprocess
import sys
import termios

import nbformat
from nbclient import NotebookClient

from utils.progress import progress
from utils.settings import ROOT

CODE = "import utils\nfrom utils.progress import progress\nprint(sum(progress(range(9), 'adding')))"
WIDGET = "application/vnd.jupyter.widget-view+json"


def loud():
    return {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}


def test_all_items_come_in_order():
    assert (
        list(progress(range(7), "counting")) == list(range(7))
        and list(progress([], "nothing")) == []
    )


def test_a_log_file_gets_no_bar():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=loud(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("36\n", "")


def test_a_terminal_gets_one():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))  # a bar in a window of no width is none
    os.set_blocking(ours, False)
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=loud(),
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=60,
    )
    assert done.stdout == b"36\n" and b"adding" in os.read(ours, 4096)
    os.close(theirs)
    os.close(ours)


def test_a_notebook_gets_one_unless_it_is_run_without_a_reader():
    for variables, bars in ((loud(), 1), (loud() | {"TQDM_DISABLE": "1"}, 0)):
        cell = nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{CODE}")
        NotebookClient(nbformat.v4.new_notebook(cells=[cell]), timeout=60).execute(env=variables)
        assert sum(WIDGET in output.get("data", {}) for output in cell.outputs) == bars
        assert [output.text for output in cell.outputs if output.output_type == "stream"] == [
            "36\n"
        ]
