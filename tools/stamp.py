"""A notebook's stamp: one digest of everything that can change its outputs, and of nothing else.

It covers the notebook's own code; the code of the modules it imports, directly or indirectly; the
files it declares in its metadata, `tutorial.inputs`; the embedded manifest; and the lock. Comments,
docstrings and layout change no output, so they are left out.
"""

import ast
import functools
import hashlib
import re

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

PACKAGES = ("utils", "embedded", "scripts")  # what a notebook may import of this repository
ALWAYS = ("embedded/manifest.json", "requirements.lock")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def digest(notebook, root):
    """Return the stamp of `notebook` (an nbformat node) in the repository at `root`: 64 hex digits.

    Raises FileNotFoundError for a declared file that does not exist.
    """
    total = hashlib.sha256()
    for ingredient in sorted(ingredients(notebook, root)):
        total.update(ingredient.encode() + b"\n")
    return total.hexdigest()


def ingredients(notebook, root):
    """Return what the stamp covers as a set of lines "name digest"."""
    lines = code_lines(notebook, root)
    for name in [*ALWAYS, *inputs(notebook)]:
        for path in declared(name, root):
            if path.suffix == ".ipynb":
                # What it leaves in runs/ is the work of its code, not of the results it plots.
                lines |= code_lines(nbformat.read(path, as_version=4), root)
            else:
                lines.add(line(path, root))
    return lines


def inputs(notebook):
    """Return the files that a notebook declares, as paths or patterns relative to the root."""
    return notebook.metadata.get("tutorial", {}).get("inputs", [])


def code_lines(notebook, root):
    """Return the lines of a notebook's own code and of the modules that it imports."""
    source = "\n".join(python_of(cell) for cell in notebook.cells if cell.cell_type == "code")
    lines = {f"code {code_digest(source)}"}
    for path in with_what_they_import(imported(source, root), root):
        lines.add(line(path, root))
    return lines


def line(path, root):
    """Return the line of one file: of a module its code, of another file its bytes."""
    if path.suffix == ".py":
        content = code_digest(path.read_text(encoding="utf-8"))
    else:
        content = sha256(path.read_bytes())
    return f"{path.relative_to(root).as_posix()} {content}"


def declared(name, root):
    """Return the files that `name` means, a path or a pattern relative to `root`.

    A pattern may match nothing yet; a plain path that does not exist raises FileNotFoundError.
    """
    if "*" in name:
        return sorted(root.glob(name))
    if not (root / name).is_file():
        raise FileNotFoundError(f"{name} does not exist: correct tutorial.inputs in the metadata")
    return [root / name]


def python_of(cell):
    """Return a code cell as plain Python: magics and `!` become function calls.

    Which repository a notebook is cloned from changes no output, so a fork's name is left out.
    """
    source = re.sub(r'^REPOSITORY = ".*"$', "REPOSITORY", cell.source, flags=re.MULTILINE)
    return transformed(source)


@functools.cache
def transformed(source):
    return TransformerManager().transform_cell(source)


def code_of(source):
    """Return the code of `source` as text without comments, docstrings and layout.

    `ast.dump` would do, but prints the same tree differently from one Python to the next.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return written_out(tree)


def written_out(value):
    """Write out a syntax tree, leaving out what is empty: a newer Python has more empty fields."""
    if isinstance(value, list):
        return "[" + " ".join(written_out(item) for item in value) + "]"
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = []
    for name, field in ast.iter_fields(value):
        if field is not None and field != []:
            fields.append(f"{name}={written_out(field)}")
    return f"{type(value).__name__}({' '.join(fields)})"


@functools.cache
def code_digest(source):
    return sha256(code_of(source))


def sha256(content):
    if isinstance(content, str):
        content = content.encode()
    return hashlib.sha256(content).hexdigest()


def with_what_they_import(paths, root):
    """Return `paths` and all files of this repository that they import, directly or indirectly."""
    found = set()
    waiting = set(paths)
    while waiting:
        path = waiting.pop()
        found.add(path)
        waiting |= imported(path.read_text(), root) - found
    return found


def imported(source, root):
    """Return the files of this repository that `source` imports itself, also inside functions."""
    files = set()
    for name in imported_names(source):
        parts = name.split(".")
        if parts[0] not in PACKAGES:
            continue
        # Importing a module runs its package first. The last part may be a function, not a file.
        for count in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:count])
            for path in (place / "__init__.py", place.with_suffix(".py")):
                if path.is_file():
                    files.add(path)
    return files


@functools.cache
def imported_names(source):
    """Return the dotted names that `source` imports: of `from a import b` both "a" and "a.b"."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names
