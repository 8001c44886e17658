"""A small repository with notebooks, for the tests of the tools."""

import contextlib
import os
from unittest import mock

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


@contextlib.contextmanager
def small_repository(root):
    """Make `root` a repository with what a stamp covers; give the environment back afterwards."""
    files = {
        "utils/__init__.py": "",
        "utils/chat.py": "turn = 1\n",
        "embedded/manifest.json": "{}",
        "requirements.lock": "",
        "pyproject.toml": '[tool.tutorial]\nrepository = "before/tutorial"\nbranch = "main"\n',
    }
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    (root / "notebooks").mkdir()
    with mock.patch.dict(os.environ):
        yield root


def save(root, name, *sources, inputs=()):
    """Write a notebook with a title and code cells of these `sources`; return its path."""
    path = root / "notebooks" / f"{name}.ipynb"
    cells = [new_markdown_cell("# A title")]
    cells += [new_code_cell(source) for source in sources]
    notebook = new_notebook(cells=cells)
    if inputs:
        notebook.metadata["tutorial"] = {"inputs": list(inputs)}
    nbformat.write(notebook, path)
    return path
