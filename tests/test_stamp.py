"""A notebook's stamp covers what can change its outputs, and nothing else. Tried on a copy."""

import json
import shutil

import nbformat
import pytest

from tools.notebooks import ROOT
from tools.stamp import PACKAGES, code_of, digest, imported_names

NAMES = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
TRAINING = "03_train_with_qlora_dpo"


@pytest.fixture
def copy(tmp_path):
    """Return a copy of everything that a stamp may cover."""
    for folder in (*PACKAGES, "benchmarks", "notebooks", "configs", "results"):
        kinds = shutil.ignore_patterns("__pycache__", "*.parquet", "*.safetensors", "*.png")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=kinds)
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    return tmp_path


def notebook(name, root):
    return nbformat.read(root / "notebooks" / f"{name}.ipynb", as_version=4)


def made_stale(root, change):
    """Return the names of the notebooks whose stamp `change()` changes."""
    before = {name: digest(notebook(name, root), root) for name in NAMES}
    change()
    return {name for name in NAMES if digest(notebook(name, root), root) != before[name]}


def that_declare(word, root):
    """Return the names of the notebooks that declare an input with `word` in its name."""
    found = set()
    for name in NAMES:
        inputs = notebook(name, root).metadata["tutorial"].get("inputs", [])
        if any(word in declared for declared in inputs):
            found.add(name)
    return found


def append(path, text):
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def edit_first_code_cell(name, root, edit):
    """Apply `edit` to the source of the notebook's second code cell, after the set-up cell."""
    changed = notebook(name, root)
    cells = [cell for cell in changed.cells if cell.cell_type == "code"]
    cells[1].source = edit(cells[1].source)
    nbformat.write(changed, root / "notebooks" / f"{name}.ipynb")


def test_a_comment_a_docstring_or_layout_makes_nothing_stale(copy):
    def change():
        for package in PACKAGES:
            for path in (copy / package).glob("*.py"):
                text = path.read_text(encoding="utf-8")
                other = text.replace('"""', '"""Reworded: ', 1)
                path.write_text(f"# A comment.\n\n{other}\n# Another.\n", encoding="utf-8")

    assert made_stale(copy, change) == set()


def test_prose_and_comments_of_a_notebook_do_not_make_it_stale(copy):
    def change():
        changed = notebook(TRAINING, copy)
        changed.cells[0].source += "\n\nMore words."
        nbformat.write(changed, copy / "notebooks" / f"{TRAINING}.ipynb")
        edit_first_code_cell(TRAINING, copy, lambda source: f"# A comment.\n{source}")

    assert made_stale(copy, change) == set()


def test_code_that_no_notebook_imports_makes_nothing_stale(copy):
    assert made_stale(copy, lambda: append(copy / "scripts" / "ask.py", "\nnew = 1\n")) == set()


def test_code_of_the_model_card_makes_the_last_notebook_stale(copy):
    path = copy / "utils" / "model_card.py"
    assert made_stale(copy, lambda: append(path, "\nnew = 1\n")) == {NAMES[-1]}


def test_code_that_a_module_imports_counts_as_well(copy):
    path = copy / "embedded" / "drawing.py"  # notebooks reach it through embedded.scenes
    stale = made_stale(copy, lambda: append(path, "\nnew = 1\n"))
    assert "04_compare_side_by_side" in stale


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("configs/accelerate", "two_processes.yaml"),
        ("configs", "qwen2.5-vl-3b-instruct.json"),
        ("results/embedded", "evaluation-seed3.json"),
    ],
)
def test_a_changed_file_makes_those_stale_that_declare_it(copy, folder, file):
    declaring = that_declare(f"{folder}/", copy)
    if folder == "configs":
        declaring -= that_declare("configs/accelerate/", copy) - that_declare("configs/*", copy)
    assert declaring
    assert made_stale(copy, lambda: append(copy / folder / file, "\n")) == declaring


def test_a_new_result_of_a_declared_pattern_counts(copy):
    place = copy / "results" / "embedded" / "evaluation-seed9.json"
    stale = made_stale(copy, lambda: place.write_text(json.dumps({})))
    assert stale == that_declare("results/embedded/*", copy)


def test_the_training_notebook_s_code_makes_those_stale_that_use_its_adapter(copy):
    def change():
        edit_first_code_cell(TRAINING, copy, lambda source: f"{source}\nnew = 1")

    using = that_declare(TRAINING, copy)
    assert using
    assert made_stale(copy, change) == {TRAINING} | using


@pytest.mark.parametrize("name", ["embedded/manifest.json", "requirements.lock"])
def test_the_data_and_the_lock_make_all_stale(copy, name):
    assert made_stale(copy, lambda: append(copy / name, "\n")) == set(NAMES)


def test_a_declared_file_that_does_not_exist_is_named(copy):
    changed = notebook(TRAINING, copy)
    changed.metadata["tutorial"]["inputs"] = ["results/lost.json"]
    with pytest.raises(FileNotFoundError, match=r"results/lost\.json"):
        digest(changed, copy)


def test_code_is_told_from_what_surrounds_it():
    plain = "def double(value):\n    return 2 * value\n"
    commented = (
        '"""Title."""\n\ndef double(value):  # twice\n    """Say it."""\n    return 2*value\n'
    )
    assert code_of(plain) == code_of(commented)
    assert code_of(plain) != code_of(plain.replace("2", "3"))
    assert code_of("'a value, no docstring'.split()") != code_of("'another value'.split()")


def test_imports_are_seen_in_every_form():
    source = (
        "import re, utils.chat\nfrom utils import memory\ndef late():\n    import embedded.build\n"
    )
    assert {"utils.chat", "utils.memory", "embedded.build"} <= imported_names(source)
