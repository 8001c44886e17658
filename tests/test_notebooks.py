"""What can be known of the committed notebooks without running them."""

import ast
import re
from collections import defaultdict
from functools import cache
from statistics import median

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tools.notebooks import ROOT, TOKEN, WIDGET, bootstrap, digest, home, without_pictures

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
MACHINE_PATH = r"/(?:work|root|home|tmp)/"
NOT_ON_THE_MAIN_PATH = r"\blogin\(|\b(?:auth|cli) login\b|push_to_hub\s*=\s*True|\bwandb\b|!\s*pip\b|pip install\s.*(?:-U\b|--upgrade\b)"


@cache
def read(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(path):
    return [output for cell in code_cells(path) for output in cell.outputs]


def markdown(path):
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def lines(cell):
    return len([line for line in cell.source.splitlines() if line.strip()])


def tree(cell):
    return ast.parse(TransformerManager().transform_cell(cell.source))


def links(text):
    """Targets of Markdown and HTML links in `text`, without anchors."""
    targets = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(
        r"""(?:href|src)=["']([^"']+)""", text
    )
    return [target.split("#")[0] for target in targets if target.split("#")[0]]


def relative(targets):
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def test_there_are_notebooks():
    assert PATHS, (
        "notebooks/ is empty: every other test here would pass without looking at anything"
    )
    numbers = [path.stem[:2] for path in PATHS]
    assert len(set(numbers)) == len(numbers) and all(
        re.fullmatch("0[1-9]|10", number) for number in numbers
    )


@every_notebook
def test_valid(path):
    nbformat.validate(read(path))
    assert (read(path).nbformat, read(path).nbformat_minor) == (4, 5)


@every_notebook
def test_every_code_cell_parses(path):
    for number, cell in enumerate(code_cells(path), start=1):
        try:
            assert tree(cell).body, f"code cell {number} is empty"
        except SyntaxError as error:
            pytest.fail(f"code cell {number}: {error}\n{cell.source}")


@every_notebook
def test_executed_once_from_top_to_bottom(path):
    assert [cell.execution_count for cell in code_cells(path)] == list(
        range(1, len(code_cells(path)) + 1)
    )
    assert not [output for output in outputs(path) if output.output_type == "error"]


@every_notebook
def test_outputs_are_fresh(path):
    stamp = read(path).metadata.get("tutorial", {}).get("digest")
    assert stamp == digest(read(path)), (
        "its code, utils/, embedded/ or the lock changed since it ran: make notebooks"
    )


@every_notebook
def test_names_no_machine(path):
    assert not re.findall(
        rf".{{0,40}}{MACHINE_PATH}.{{0,40}}", without_pictures(path.read_text(encoding="utf-8"))
    )


@every_notebook
def test_holds_no_access_token(path):
    assert not TOKEN.search(without_pictures(path.read_text(encoding="utf-8")))


@every_notebook
def test_size(path):
    assert path.stat().st_size < 500_000
    assert not [cell.source for cell in read(path).cells if lines(cell) > 40]
    assert median(map(lines, code_cells(path))) <= 8
    assert 15 <= len(code_cells(path)) <= 45


@every_notebook
def test_no_widget_state(path):
    assert "widgets" not in read(path).metadata
    assert not [output for output in outputs(path) if WIDGET in output.get("data", {})]


@every_notebook
def test_one_parameters_cell(path):
    tagged = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert re.search(r'^PROFILE = "embedded"', tagged[0].source, flags=re.MULTILINE)


@every_notebook
def test_starts_with_the_bootstrap_cell(path):
    assert code_cells(path)[0].source == bootstrap(), (
        "copy it: python -c 'from tools.notebooks import bootstrap; print(bootstrap())'"
    )


@every_notebook
def test_anatomy(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    file = f"{home()['repository']}/blob/{home()['branch']}/notebooks/{path.name}"
    assert f"https://colab.research.google.com/github/{file}" in links(first.source)
    assert f"https://kaggle.com/kernels/welcome?src=https://github.com/{file}" in links(
        first.source
    )
    assert re.search(r"^#+ What you saw", markdown(path), flags=re.MULTILINE)
    assert markdown(path).count("<details") >= 2


@every_notebook
def test_links(path):
    here = relative(links(markdown(path)))
    assert not [target for target in here if not (path.parent / target).exists()]
    position = PATHS.index(path)
    neighbours = {
        neighbour.name
        for neighbour in [
            *PATHS[max(position - 1, 0) : position],
            *PATHS[position + 1 : position + 2],
        ]
    }
    assert neighbours <= set(here), "it must link to the notebooks before and after it"


@every_notebook
def test_needs_no_account_and_upgrades_nothing(path):
    assert not [
        cell.source for cell in code_cells(path) if re.search(NOT_ON_THE_MAIN_PATH, cell.source)
    ]


def test_a_function_is_taught_in_one_notebook():
    taught = defaultdict(set)
    for path in PATHS:
        for node in (node for cell in code_cells(path) for node in tree(cell).body):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                taught[node.name].add(path.name)
    assert not {name: sorted(where) for name, where in taught.items() if len(where) > 1}, (
        "import it from utils/ the second time"
    )


def test_readme_lists_the_notebooks():
    rows = [
        line
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    listed = [re.search(r"\((?:\./)?notebooks/([\w.-]+\.ipynb)\)", row) for row in rows]
    assert [match[1] for match in listed if match] == [path.name for path in PATHS]
