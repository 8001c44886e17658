"""Run what a notebook defines, and the solutions of its exercises, without running the notebook."""

import ast
import re

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from utils.settings import ROOT

SOLUTION = re.compile(r"<summary>Solution</summary>\s+```python\n(.*?)```", re.DOTALL)


def notebook_path(number):
    """Return the path of the notebook with this number, such as "03"."""
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    return path


def code_cells(number):
    """Return the code cells of a notebook as (Python source, tags)."""
    cells = []
    for cell in nbformat.read(notebook_path(number), as_version=4).cells:
        if cell.cell_type == "code":
            source = TransformerManager().transform_cell(cell.source)
            cells.append((source, cell.metadata.get("tags", [])))
    return cells


def assigned_name(node):
    """Return the name that an assignment (also `|=`) gives a value, else None."""
    target = None
    if isinstance(node, ast.Assign):
        target = node.targets[0]
    elif isinstance(node, ast.AugAssign):
        target = node.target
    return target.id if isinstance(target, ast.Name) else None


def definitions(number, namespace, names=()):
    """Return `namespace` with a notebook's functions and classes, and what it assigns to `names`.

    `namespace` holds what they use: the modules, and the values of the notebook's variables.
    """
    wanted = []
    for source, _ in code_cells(number):
        for node in ast.parse(source).body:
            defines = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if defines or assigned_name(node) in names:
                wanted.append(node)
    name = notebook_path(number).name
    exec(compile(ast.Module(wanted, type_ignores=[]), name, "exec"), namespace)
    return namespace


def solutions(number):
    """Return the code of a notebook's folded solutions, in order."""
    notebook = nbformat.read(notebook_path(number), as_version=4)
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found += SOLUTION.findall(cell.source)
    return found


def prepared(number):
    """Return the names that a notebook's exercises may use.

    They come from its import cell, its parameters, and its cells with the tag "for-exercises".
    """
    namespace = {"root": ROOT, "__name__": "notebook"}
    for position, (source, tags) in enumerate(code_cells(number)):
        imports = position == 1  # cell 0 finds the repository
        if imports or "parameters" in tags or "for-exercises" in tags:
            exec(compile(source, f"{number}, code cell {position}", "exec"), namespace)
    return namespace
