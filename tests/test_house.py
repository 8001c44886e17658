"""The house: which way things depend, names that mean one thing, and requirements that agree."""

import ast
import importlib.metadata
import re
import subprocess
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter

import nbformat
import pytest
from packaging.requirements import Requirement

from tools import colab
from tools.notebooks import ROOT
from tools.stamp import imported_names, python_of

# A folder and the folders of this repository that its files may import.
MAY_IMPORT = {
    "utils": {"utils"},
    "embedded": {"embedded"},
    "scripts": {"scripts", "utils", "embedded"},
    "notebooks": {"scripts", "utils", "embedded"},
    "benchmarks": {"benchmarks", "scripts", "utils", "embedded"},
    "tools": {"tools", "tests", "utils"},
}
BUILD = ROOT / "embedded" / "build.py"  # the only file of the drawn world that uses utils
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()}
MODULES = sorted((ROOT / "utils").glob("*.py"))
NOT_FROM_COLAB = {"jupyterlab", *colab.UPGRADED_BY_TRL}  # Colab is the notebook itself


def source_of(path):
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    return "\n".join(python_of(cell) for cell in notebook.cells if cell.cell_type == "code")


def sources(folder):
    return sorted([*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("*.ipynb")])


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_it_may(folder):
    assert sources(folder)
    for path in sources(folder):
        allowed = MAY_IMPORT[folder] | ({"utils"} if path == BUILD else set())
        used = {name.split(".")[0] for name in imported_names(source_of(path))} & FOLDERS
        assert used <= allowed, f"{path.name} imports {', '.join(sorted(used - allowed))}"


def imports_within_utils(path):
    names = {name.removeprefix("utils.").split(".")[0] for name in imported_names(source_of(path))}
    return names & {module.stem for module in MODULES} - {"__init__"}


def test_utils_has_no_circle():
    graph = {path.stem: imports_within_utils(path) for path in MODULES}
    assert any(graph.values())
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' → '.join(error.args[1])}")


def public_names(path):
    """Return the public names that a module defines at its top level."""
    names = set()
    for node in ast.parse(source_of(path)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return {name for name in names if not name.startswith("_")}


def test_a_name_that_recurs_is_always_written_with_its_module():
    homes = defaultdict(set)
    for folder in ("utils", "embedded"):
        for path in sources(folder):
            for name in public_names(path):
                homes[name].add(f"{folder}.{path.stem}")
    recurring = {name for name, modules in homes.items() if len(modules) > 1}
    for folder in (*MAY_IMPORT, "tests", "tests/slow"):
        for path in sources(folder):
            for node in ast.walk(ast.parse(source_of(path))):
                if isinstance(node, ast.ImportFrom):
                    bare = {alias.name for alias in node.names} & recurring
                    ours = {name for name in bare if node.module in homes[name]}
                    assert not ours, f"{path.name} imports {ours} of {node.module} without it"


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in found}


def lock():
    text = (ROOT / "requirements.lock").read_text()
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, flags=re.MULTILINE))


def test_environment_yml_lists_the_requirements():
    text = (ROOT / "environment.yml").read_text()
    listed = re.findall(r"^      - (.*)$", text, flags=re.MULTILINE)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert listed == [line for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("name", requirements("requirements.txt"))
def test_requirement_admits_the_lock_and_colab(name):
    requirement = requirements("requirements.txt")[name]
    assert lock()[name] in requirement.specifier
    if name in NOT_FROM_COLAB:
        return
    if name in colab.preinstalled():
        assert colab.preinstalled()[name] in requirement.specifier
    else:
        assert requirements("requirements-colab.txt")[name] == requirement


def test_trl_upgrades_datasets_on_colab():
    ours = requirements("requirements.txt")["datasets"].specifier
    lower_bounds = []
    for line in importlib.metadata.requires("trl"):
        needed = Requirement(line)
        if needed.name == "datasets":
            lower_bounds += [each.version for each in needed.specifier if each.operator == ">="]
    assert lower_bounds
    assert lower_bounds[0] in ours


def test_colab_installs_only_what_colab_lacks():
    assert not set(requirements("requirements-colab.txt")) & colab.preinstalled().keys()


def test_what_changes_on_colab_is_named():
    before = {"torch": "2.11.0", "datasets": "4.0.0", "pillow": "11.3.0", "peft": "0.20.0"}
    after = {"torch": "2.14.1", "datasets": "5.2.0", "pillow": "11.3.0", "trl": "1.16.0"}
    assert colab.changed(before, after) == {
        "torch": ("2.11.0", "2.14.1"),
        "datasets": ("4.0.0", "5.2.0"),
        "peft": ("0.20.0", None),
    }


def test_lock_is_complete_and_names_no_machine():
    text = (ROOT / "requirements.lock").read_text()
    # The pair that imports on machines with and without a GPU.
    assert (lock()["torch"], lock()["torchvision"]) == ("2.14.1", "0.29.1")
    assert {"pytest", "ruff", "playwright", "nbclient", "nbconvert", "nbformat"} <= set(lock())
    machine = r"^.*(?:index-url|find-links|://|file:| @ |/\w+/).*$"
    assert not re.findall(machine, text, flags=re.MULTILINE)


def test_no_file_names_a_machine():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone")
    found = []
    looked_at = 0
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if not path.is_file() or name.startswith("tests/"):
            continue
        content = path.read_bytes()
        if b"\0" in content:  # no text
            continue
        looked_at += 1
        machine = r".{0,40}(?<![\w.])/(?:work|root|home)/.{0,40}"
        found += [f"{name}: {line}" for line in re.findall(machine, content.decode())]
    assert looked_at > 10
    assert not found
