"""What can be known of the committed notebooks without running them."""

import ast
import functools
import re
from collections import defaultdict

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tools.notebooks import ROOT, TOKEN, WIDGET, bootstrap, home, stale, without_images

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
TEACHING = [path for path in PATHS if path.stem[:2] <= "06"]
teaching = pytest.mark.parametrize("path", TEACHING, ids=lambda path: path.stem)
# The number of the notebook that explains a word. No earlier one uses it.
FIRST_IN = {"adapter": 3, "QLoRA": 3, "CHAIR": 4, "POPE": 4, "recall": 4, "hinge": 5, "IPO": 5}
MACHINE_PATH = r"/(?:work|root|home|tmp)/"
NOT_ON_THE_MAIN_PATH = [
    r"\blogin\(",
    r"\b(?:auth|cli) login\b",
    r"push_to_hub\s*=\s*True",
    r"\bwandb\b",
    r"!\s*pip\b",
    r"pip install\s.*(?:-U\b|--upgrade\b)",
]


@functools.cache
def read(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(path):
    return [output for cell in code_cells(path) for output in cell.outputs]


def markdown(path):
    texts = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    return "\n\n".join(texts)


def tree(cell):
    return ast.parse(TransformerManager().transform_cell(cell.source))


def links(text):
    """Return the targets of Markdown and HTML links in `text`, without anchors."""
    targets = re.findall(r"\]\(<?([^)\s>]+)", text)
    targets += re.findall(r"""(?:href|src)=["']([^"']+)""", text)
    without_anchors = [target.split("#")[0] for target in targets]
    return [target for target in without_anchors if target]


def relative(targets):
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def test_there_are_notebooks():
    assert PATHS, "notebooks/ is empty: every other test here would pass without a look at anything"
    numbers = [path.stem[:2] for path in PATHS]
    assert len(set(numbers)) == len(numbers)
    assert all(number.isdigit() for number in numbers)


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
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [output for output in outputs(path) if output.output_type == "error"]


@every_notebook
def test_outputs_are_fresh(path):
    assert not stale([path]), "what decides its outputs has changed since it ran: make notebooks"


@every_notebook
def test_declares_the_files_it_reads(path):
    """A stamp knows of results, configurations and adapters only what the metadata declare."""
    declared = " ".join(read(path).metadata["tutorial"].get("inputs", []))
    code = "\n".join(cell.source for cell in code_cells(path)[1:])
    for folder in ("results", "configs"):
        if re.search(rf'"{folder}["/]|\b{folder}/', code):
            assert folder in declared
    if 'output / "adapter"' in code and not path.stem.startswith("03"):
        assert "03_train_with_qlora_dpo.ipynb" in declared


@every_notebook
def test_names_no_machine(path):
    text = without_images(path.read_text(encoding="utf-8"))
    assert not re.findall(rf".{{0,40}}{MACHINE_PATH}.{{0,40}}", text)


@every_notebook
def test_holds_no_access_token(path):
    assert not TOKEN.search(without_images(path.read_text(encoding="utf-8")))


@every_notebook
def test_is_small_enough_to_be_shown(path):
    assert path.stat().st_size < 500_000


@every_notebook
def test_no_widget_state(path):
    assert "widgets" not in read(path).metadata
    assert not [output for output in outputs(path) if WIDGET in output.get("data", {})]


@every_notebook
def test_no_progress_bar_of_a_headless_run(path):
    texts = [str(output.get("text", "")) + str(output.get("data", "")) for output in outputs(path)]
    assert not [text for text in texts if re.search(r"\d+%\|", text)]


@every_notebook
def test_one_parameters_cell(path):
    tagged = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert re.search(r'^PROFILE = "embedded"', tagged[0].source, flags=re.MULTILINE)


@every_notebook
def test_starts_with_the_bootstrap_cell(path):
    copy = "python -c 'from tools.notebooks import bootstrap; print(bootstrap())'"
    assert code_cells(path)[0].source == bootstrap(), f"copy what this prints: {copy}"


@every_notebook
def test_anatomy(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    file = f"{home()['repository']}/blob/{home()['branch']}/notebooks/{path.name}"
    targets = links(first.source)
    assert f"https://colab.research.google.com/github/{file}" in targets
    assert f"https://kaggle.com/kernels/welcome?src=https://github.com/{file}" in targets
    assert re.search(r"^#+ What you saw", markdown(path), flags=re.MULTILINE)
    assert "<details" in markdown(path)


@every_notebook
def test_code_fits_the_page_of_the_book(path):
    lines = []
    for cell in code_cells(path)[1:]:  # all but the first, which has a long address
        lines += cell.source.splitlines()
    for block in re.findall(r"```python\n(.*?)```", markdown(path), flags=re.DOTALL):
        lines += block.splitlines()
    assert not [line for line in lines if len(line) > 80]


@teaching
def test_teaches_with_a_diagram_questions_exercises_and_further_reading(path):
    text = markdown(path)
    assert any("diagrams." in cell.source for cell in code_cells(path))
    assert text.count("<summary>Answer</summary>") == 3
    assert text.count("<summary>Solution</summary>") == 2
    for heading in ("Check yourself", "Exercises", "Further reading"):
        assert f"\n## {heading}" in text


@teaching
def test_no_word_comes_before_its_notebook(path):
    """01 to 04 are read in one sitting: nothing is named before it is explained."""
    number = int(path.stem[:2])
    # What links to a notebook may bear its name.
    text = re.sub(r"\[[^]]*\]\([^)]*\)", "", markdown(path))
    for word, first in FIRST_IN.items():
        if number < first:
            assert not re.findall(rf".*\b{word}\b.*", text, flags=re.IGNORECASE)


@every_notebook
def test_links(path):
    here = relative(links(markdown(path)))
    assert not [target for target in here if not (path.parent / target).exists()]
    position = PATHS.index(path)
    neighbors = PATHS[max(position - 1, 0) : position] + PATHS[position + 1 : position + 2]
    for neighbor in neighbors:
        assert neighbor.name in here, "it must link to the notebooks before and after it"


@every_notebook
def test_notebooks_are_referred_to_by_a_number_that_exists(path):
    numbers = {other.stem[:2] for other in PATHS}
    named = re.findall(r"\bnotebooks? (\d\d)\b", markdown(path), flags=re.IGNORECASE)
    assert set(named) <= numbers


@every_notebook
def test_needs_no_account_and_upgrades_nothing(path):
    for cell in code_cells(path):
        assert not re.search("|".join(NOT_ON_THE_MAIN_PATH), cell.source)


def test_a_function_is_taught_in_one_notebook():
    taught = defaultdict(set)
    for path in PATHS:
        for cell in code_cells(path):
            for node in tree(cell).body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    taught[node.name].add(path.name)
    twice = {name: sorted(where) for name, where in taught.items() if len(where) > 1}
    assert not twice, "import it from utils/ the second time"


def test_readme_lists_the_notebooks():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    listed = [re.search(r"\((?:\./)?notebooks/([\w.-]+\.ipynb)\)", row) for row in rows]
    assert [match[1] for match in listed if match] == [path.name for path in PATHS]
