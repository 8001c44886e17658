"""The house: requirements agree, layers hold, and the tools that set up, run and commit do what they promise."""

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from packaging.requirements import Requirement

from tools import colab, notebooks, setup
from tools.notebooks import ROOT, WIDGET

# From the ground up; a module imports only from those before it.
LAYERS = [
    "progress",
    "settings",
    "images",
    "pixel_budget",
    "preferences",
    "own_data",
    "chat",
    "models",
    "memory",
    "flops",
    "claims",
    "statistics",
    "hallucination",
    "official_files",
    "generation",
    "evaluation",
    "preference_making",
    "make_pairs",
    "ask",
    "shared_prefix",
    "reference_cache",
    "display",
    "trial_step",
    "trainer_checks",
    "preflight",
    "checkpoints",
    "training",
    "rewards",
    "share",
    "plots",
    "sliders",
    "callbacks",
    "train",
]
GROUND = {
    "utils.versions",
    "embedded.scenes",
    "embedded.drawing",
}  # the drawn world, which any layer may use
NOT_FROM_COLAB = {"jupyterlab", *colab.UPGRADED_BY_TRL}  # Colab is the notebook itself


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return {
        Requirement(line).name: Requirement(line)
        for line in lines
        if line and not line.startswith("#")
    }


def lock():
    return dict(
        re.findall(
            r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE
        )
    )


def test_environment_yml_lists_the_requirements():
    listed = re.findall(
        r"^      - (.*)$", (ROOT / "environment.yml").read_text(), flags=re.MULTILINE
    )
    assert listed == [
        str(line)
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if not line.startswith("#")
    ]


@pytest.mark.parametrize(
    "requirement",
    requirements("requirements.txt").values(),
    ids=lambda requirement: requirement.name,
)
def test_requirement_admits_the_lock_and_colab(requirement):
    assert lock()[requirement.name] in requirement.specifier
    if requirement.name in NOT_FROM_COLAB:
        return
    if requirement.name in colab.preinstalled():
        assert colab.preinstalled()[requirement.name] in requirement.specifier
    else:
        assert requirements("requirements-colab.txt")[requirement.name] == requirement


def test_trl_upgrades_datasets_on_colab():
    needed = [Requirement(line) for line in importlib.metadata.requires("trl")]
    ours = requirements("requirements.txt")["datasets"].specifier
    lower = [
        clause.version
        for need in needed
        if need.name == "datasets"
        for clause in need.specifier
        if clause.operator == ">="
    ]
    assert lower
    assert lower[0] in ours


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
    assert (lock()["torch"], lock()["torchvision"]) == (
        "2.14.1",
        "0.29.1",
    )  # the pair that imports with and without a GPU
    assert {"pytest", "ruff", "playwright", "nbclient", "nbconvert", "nbformat"} <= set(lock())
    assert not re.findall(
        r"^.*(?:index-url|find-links|://|file:| @ |/\w+/).*$", text, flags=re.MULTILINE
    )


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted((ROOT / "utils").glob("*.py")) if path.stem != "__init__"]
)
def test_module_is_thin_and_keeps_its_layer(name):
    text = (ROOT / "utils" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 200, "a module that long is doing two things"
    assert name in LAYERS, "give it its place in LAYERS and in the design"
    allowed = GROUND | {f"utils.{below}" for below in LAYERS[: LAYERS.index(name)]}
    assert imported(text) <= allowed


def imported(text):
    """Modules of this repository that the source `text` imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = f"utils.{node.module or ''}".rstrip(".") if node.level else node.module
            whole = package in ("utils", "embedded")
            found |= {f"{package}.{alias.name}" for alias in node.names} if whole else {package}
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()}
    return {name for name in found if name.split(".")[0] in ours}


def test_imported_sees_every_form():
    absolute = "import re, utils.chat\nfrom utils import memory\nfrom utils.plots import figure\n"
    text = absolute + "def late():\n    from . import train\n    import embedded.build\n"
    assert imported(text) == {
        "utils.chat",
        "utils.memory",
        "utils.plots",
        "scripts.train",
        "embedded.build",
    }


def test_no_file_names_a_machine():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone")
    found, looked_at = [], 0
    for path in (
        ROOT / name for name in listed.stdout.split("\0") if name and not name.startswith("tests/")
    ):
        content = path.read_bytes() if path.is_file() else b"\0"
        if b"\0" not in content:  # text
            looked_at += 1
            found += [
                f"{path.name}: {line}"
                for line in re.findall(
                    r".{0,40}(?<![\w.])/(?:work|root|home)/.{0,40}", content.decode()
                )
            ]
    assert looked_at > 10
    assert not found


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("tutorial", "-m tools.notebooks run"),
        ("test-colab", "-m tools.colab"),
        ("notebooks", "-m tools.notebooks commit"),
        ("test", "-m pytest"),
        ("lab", "-m jupyterlab notebooks"),
        ("check", "ruff check"),
        ("check", "ruff format --check"),
        ("check", "tests/test_notebooks.py tests/test_house.py"),
        ("lock", "requirements.txt --group dev --output-file requirements.lock"),
        ("badges", 'tools.notebooks badges "somebody/fork"'),
    ],
)
def test_make_target(target, command):
    planned = subprocess.run(
        ["make", "-n", target, "REPOSITORY=somebody/fork"], cwd=ROOT, capture_output=True, text=True
    )
    assert "tools/setup.py" in planned.stdout, planned.stderr
    assert command in planned.stdout


def test_make_alone_lists_the_targets():
    printed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    targets = (
        "help setup tutorial test test-colab lab notebooks check lock book audit badges".split()
    )
    assert re.findall(r"^  make ([\w-]+)", printed, flags=re.MULTILINE) == targets


# tools/setup.py


@pytest.fixture
def environment(tmp_path):
    """A repository whose lock is empty and whose `.venv` is this Python: what a set-up would leave."""
    (tmp_path / "requirements.lock").write_text("")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".venv" / "requirements.sha256").write_text(hashlib.sha256(b"").hexdigest() + "\n")
    return tmp_path


def test_setup_returns_at_once_when_the_stamp_is_current(environment, capfd):
    with mock.patch.object(subprocess, "run", side_effect=AssertionError("nothing is to be run")):
        setup.main(environment)
    assert capfd.readouterr() == ("", "")
    assert not (environment / "build").exists()


def test_setup_installs_a_changed_lock_and_stamps_last(environment, capfd):
    (environment / "requirements.lock").write_text("new==1.0\n")
    stamp = environment / ".venv" / "requirements.sha256"

    def fake(command, **options):
        commands.append(" ".join(command))
        if "-m" in command:
            assert not stamp.exists(), "an interrupted set-up must leave no stamp"
        if "uv" in command and fail:
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0)

    commands, fail = [], True
    with mock.patch.object(subprocess, "run", fake), pytest.raises(subprocess.CalledProcessError):
        setup.main(environment)
    assert not stamp.exists()

    commands, fail = [], False
    with mock.patch.object(subprocess, "run", fake):
        setup.main(environment)
    assert stamp.read_text().strip() == hashlib.sha256(b"new==1.0\n").hexdigest()
    assert commands[-2].endswith(f"-m pip install --quiet --disable-pip-version-check {setup.UV}")
    assert commands[-1].endswith(f"--requirement {environment / 'requirements.lock'}")
    assert "5.5 GB" in capfd.readouterr().out


def test_setup_looks_for_a_fitting_python():
    assert (
        setup.choose_python((3, 9, 2), {"python3.12": "/usr/bin/python3.12"}.get)
        == "/usr/bin/python3.12"
    )
    assert (
        setup.choose_python((3, 14, 0), {"python3.11": "/usr/bin/python3.11"}.get)
        == "/usr/bin/python3.11"
    )


def test_setup_names_what_to_install_for_an_old_python():
    with pytest.raises(
        SystemExit,
        match=r"python3 is Python 3\.9.*install Python 3\.11 to 3\.13.*apt install python3",
    ):
        setup.choose_python((3, 9, 2), lambda name: None)


def test_setup_names_the_package_that_lacks_venv(tmp_path):
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match="apt install python3-venv"):
        setup.check_venv_module(str(python))


def test_second_one_says_that_it_waits(tmp_path):
    code = "import pathlib, sys; from tools.setup import alone\nwith alone(pathlib.Path(sys.argv[1]), 'set-up'): print('in')"
    with setup.alone(tmp_path / "build" / "lock", "set-up"):
        command = [sys.executable, "-c", code, str(tmp_path / "build" / "lock")]
        second = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert "waiting" in second.stdout.readline()
        assert second.poll() is None
    assert second.communicate(timeout=30)[0] == "in\n"


# tools/notebooks.py


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small repository with what a digest covers; whatever a run puts into the environment is taken out again."""
    for name in (
        "utils/chat.py",
        "embedded/scenes.py",
        "embedded/manifest.json",
        "requirements.lock",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.tutorial]\nrepository = "before/tutorial"\nbranch = "main"\n'
    )
    (tmp_path / "notebooks").mkdir()
    with mock.patch.dict(os.environ):
        yield tmp_path


def save(root, name, *sources):
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(
        new_notebook(cells=[new_markdown_cell("# A title"), *map(new_code_cell, sources)]), path
    )
    return path


def test_run_writes_results_and_timings_and_leaves_the_source(repository, capsys):
    paths = [
        save(repository, "01_one", "import os\nos.getcwd()"),
        save(repository, "02_two", "print('two')"),
    ]
    before = [path.read_bytes() for path in paths]
    timings = notebooks.run(paths, repository / "build")
    assert json.loads((repository / "build" / "timings.json").read_text()) == timings
    assert list(timings) == ["01_one", "02_two"]
    assert 0 < timings["01_one"] < 300
    assert [path.read_bytes() for path in paths] == before
    done = nbformat.read(repository / "build" / "notebooks" / "01_one.ipynb", 4)
    assert done.cells[1].outputs[0].data["text/plain"] == repr(
        str(repository / "build" / "notebooks")
    )
    assert "execution" not in done.cells[1].metadata
    assert re.fullmatch(r"01_one +[\d.]+ s\n02_two +[\d.]+ s\n", capsys.readouterr().out)


def test_run_stops_at_a_failure_and_keeps_what_ran(repository, capsys):
    first = save(repository, "01_one", "print('so far')", "int('no number')", "print('never')")
    with pytest.raises(SystemExit) as stopped:
        notebooks.run([first, save(repository, "02_two", "print('two')")], repository / "build")
    message = str(stopped.value)  # a SystemExit with a text prints it and exits with 1
    assert "01_one.ipynb" in message
    assert "int('no number')" in message
    assert "ValueError: invalid literal" in message
    assert "\x1b" not in message
    kept = nbformat.read(repository / "build" / "notebooks" / "01_one.ipynb", 4).cells[1:]
    assert [[output.output_type for output in cell.outputs] for cell in kept] == [
        ["stream"],
        ["error"],
        [],
    ]
    assert not (repository / "build" / "notebooks" / "02_two.ipynb").exists()
    assert json.loads((repository / "build" / "timings.json").read_text()) == {}


def test_run_uses_this_environment_whatever_kernel_the_user_installed(repository, monkeypatch):
    kernel = repository / "data" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "Python 3", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(repository / "data"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    notebooks.run(
        [save(repository, "01_one", "import sys\nprint(sys.prefix)")], repository / "build"
    )
    assert (
        nbformat.read(repository / "build" / "notebooks" / "01_one.ipynb", 4)
        .cells[1]
        .outputs[0]
        .text.strip()
        == sys.prefix
    )


def test_select(repository, monkeypatch):
    with pytest.raises(SystemExit, match="No notebook at all"):
        notebooks.select([], repository / "notebooks")
    paths = [save(repository, name, "1") for name in ("01_one", "02_two")]
    assert notebooks.select([], repository / "notebooks") == paths
    assert notebooks.select(["02", "notebooks/02_two.ipynb"], repository / "notebooks") == paths[1:]
    with pytest.raises(SystemExit, match="03"):
        notebooks.select(["03"], repository / "notebooks")


def test_commit_scrubs_and_stamps_the_embedded_run(repository):
    widget = f"from IPython.display import display\ndisplay({{'{WIDGET}': {{'model_id': 'x'}}, 'text/html': '<b>pair</b>'}}, raw=True)"
    path = save(
        repository, "01_one", "import os\nos.environ['VLM_DPO_PROFILE']", widget, "print('é')"
    )
    notebooks.commit([path], repository / "build", repository)
    text, committed = path.read_text(), nbformat.read(path, 4)
    assert "é" in text
    assert text.endswith("}\n")
    assert text.startswith('{\n "cells"')
    assert committed.cells[1].outputs[0].data["text/plain"] == "'embedded'"
    assert committed.cells[2].outputs[0].data == {"text/html": "<b>pair</b>"}
    assert [cell.id for cell in committed.cells] == [
        "01_one-00",
        "01_one-01",
        "01_one-02",
        "01_one-03",
    ]
    assert set(committed.metadata) == {"kernelspec", "language_info", "tutorial"}
    assert committed.metadata.tutorial.digest == notebooks.digest(committed, repository)
    notebooks.commit([path], repository / "build", repository)
    assert path.read_text() == text, "the same run again must give no diff"


def test_commit_puts_nothing_back_if_one_output_names_the_machine(repository):
    paths = [
        save(repository, "01_one", "print('good')"),
        save(repository, "02_two", "print(1)", "import os\nprint('in', os.getcwd())"),
    ]
    before = [path.read_bytes() for path in paths]
    with pytest.raises(SystemExit, match=r"02_two\.ipynb, code cell 2"):
        notebooks.commit(paths, repository / "build", repository)
    assert [path.read_bytes() for path in paths] == before


def test_commit_puts_nothing_back_if_an_output_holds_an_access_token(repository):
    path = save(repository, "01_one", "print('logged in with', 'hf' + '_' + 'a' * 34)")
    before = path.read_bytes()
    with pytest.raises(
        SystemExit, match=r"01_one\.ipynb, code cell 1 or its output holds an access token"
    ):
        notebooks.commit([path], repository / "build", repository)
    assert path.read_bytes() == before


def test_commit_keeps_an_edit_made_during_the_run(repository):
    path = save(
        repository,
        "01_one",
        "from pathlib import Path",
        "Path('../../notebooks/01_one.ipynb').open('a').write(' ')",
    )
    with pytest.raises(SystemExit, match="changed during the run"):
        notebooks.commit([path], repository / "build", repository)
    assert path.read_text().endswith(" ")


def test_keep_drops_what_is_left_of_a_progress_bar_s_widget():
    left = {WIDGET: {}, "text/plain": "Loading weights:   0%|          | 0/108 [00:00<?, ?it/s]"}
    assert not notebooks.keep(new_output("display_data", data=left))
    assert notebooks.keep(
        new_output("display_data", data={WIDGET: {}, "text/plain": "2,000 pairs"})
    )


def test_keep_drops_progress_bars_and_empty_outputs():
    bars = "\r 10%|█         | 1/10 [00:01<00:09,  1.0it/s]\r100%|██████████| 10/10 [00:10<00:00,  1.0it/s]\n"
    stream = new_output("stream", name="stderr", text=bars)
    assert not notebooks.keep(stream)
    stream = new_output("stream", name="stderr", text=bars + "UserWarning: look here\n")
    assert notebooks.keep(stream)
    assert stream.text.strip() == "UserWarning: look here"
    assert not notebooks.keep(new_output("display_data", data={WIDGET: {}}))
    assert notebooks.keep(new_output("stream", name="stdout", text="100%| is printed here\n"))


def test_machine_place(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "abc")
    assert notebooks.machine_place(r'"on\nabc, here"') == "abc"
    assert notebooks.machine_place(f"at {ROOT}/utils") == str(ROOT)
    assert notebooks.machine_place("abcd in runs/embedded/ " + "/abc/" * 100) is None
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    assert notebooks.machine_place("localhost") is None


@pytest.mark.parametrize(
    "name", ["utils/chat.py", "embedded/scenes.py", "embedded/manifest.json", "requirements.lock"]
)
def test_digest_changes_with_what_decides_the_outputs(repository, name):
    notebook = nbformat.read(save(repository, "01_one", "print(1)"), 4)
    before = notebooks.digest(notebook, repository)
    (repository / name).write_text("changed")
    assert notebooks.digest(notebook, repository) != before


def test_digest_is_of_code_not_of_prose(repository):
    notebook = nbformat.read(save(repository, "01_one", "print(1)"), 4)
    before = notebooks.digest(notebook, repository)
    notebook.cells[0].source = "# Another title"
    assert notebooks.digest(notebook, repository) == before
    notebook.cells[1].source = "print(2)"
    assert notebooks.digest(notebook, repository) != before


def test_badges_move_every_address_and_keep_the_stamp(repository):
    path = save(
        repository, "01_one", notebooks.bootstrap(repository), "other = 'before/tutorial-data'"
    )
    notebook = nbformat.read(path, 4)
    notebook.cells[
        0
    ].source = (
        "https://colab.research.google.com/github/before/tutorial/blob/main/notebooks/01_one.ipynb"
    )
    nbformat.write(notebook, path)
    (repository / "README.md").write_text(
        "https://github.com/before/tutorial.git https://before.github.io/tutorial/ before/tutorial"
    )
    notebooks.badges("somebody/fork", repository)
    moved = nbformat.read(path, 4)
    assert (
        moved.cells[0].source
        == "https://colab.research.google.com/github/somebody/fork/blob/main/notebooks/01_one.ipynb"
    )
    assert moved.cells[1].source == notebooks.bootstrap(repository)
    assert 'REPOSITORY = "somebody/fork"' in moved.cells[1].source
    assert moved.cells[2].source == "other = 'before/tutorial-data'"
    moved_readme = (repository / "README.md").read_text()
    assert (
        moved_readme
        == "https://github.com/somebody/fork.git https://somebody.github.io/fork/ before/tutorial"
    )
    assert notebooks.digest(moved, repository) == notebooks.digest(notebook, repository)
    with pytest.raises(SystemExit, match="owner/name"):
        notebooks.badges("nonsense", repository)


def test_badges_leave_no_trace_of_the_old_repository(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(".git", ".venv", "build", "runs", "__pycache__", ".*_cache"),
    )
    old = notebooks.home(copy)["repository"]
    notebooks.badges("somebody/fork", copy)
    texts = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert not [
        path
        for path, text in texts.items()
        if re.search(re.escape(old).replace("/", "(/|.github.io/)").encode(), text)
    ]
    assert notebooks.home(copy)["repository"] == "somebody/fork"
    readme = (copy / "README.md").read_text(encoding="utf-8")
    assert "https://codespaces.new/somebody/fork)" in readme
    assert "https://somebody.github.io/fork/" in readme
    for path in (copy / "notebooks").glob("*.ipynb"):
        first = nbformat.read(path, 4).cells[0].source
        for badge in notebook_badges(path.name, "somebody/fork"):
            assert badge in first
            assert badge in readme


def notebook_badges(name, repository):
    blob = f"{repository}/blob/main/notebooks/{name}"
    return (
        f"(https://colab.research.google.com/github/{blob})",
        f"(https://kaggle.com/kernels/welcome?src=https://github.com/{blob})",
    )


COLAB = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')"
KAGGLE = "import os\nos.environ['KAGGLE_KERNEL_RUN_TYPE'] = 'Interactive'"


@pytest.mark.parametrize("place", [COLAB, KAGGLE, None], ids=["Colab", "Kaggle", "here"])
def test_bootstrap_finds_the_repository_and_installs_only_on_colab_and_kaggle(repository, place):
    (repository / "utils" / "settings.py").write_text("")
    pip = "from IPython import get_ipython\nget_ipython().register_magic_function(lambda line: print('pip', line), magic_name='pip')"
    path = save(
        repository,
        "01_one",
        place or "pass",
        pip,
        notebooks.bootstrap(repository),
        "print(root, sys.path[0])",
    )
    notebooks.run([path], repository / "build")
    cells = nbformat.read(repository / "build" / "notebooks" / "01_one.ipynb", 4).cells
    assert cells[-1].outputs[0].text == f"{repository} {repository}\n"
    printed = "".join(output.text for output in cells[3].outputs)
    assert printed == (
        f'pip install -q -r "{repository}/requirements-colab.txt"\n' if place else ""
    )


def test_bootstrap_clones_where_there_is_no_repository(repository, tmp_path_factory, monkeypatch):
    """git is told to take a folder for github.com; the second run of the cell finds the clone that the first one made."""
    source, alone = (
        tmp_path_factory.mktemp("github") / "before" / "tutorial",
        tmp_path_factory.mktemp("alone"),
    )
    (source / "utils").mkdir(parents=True)
    (source / "utils" / "settings.py").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (
        ["init", "-q", "-b", "main"],
        ["add", "."],
        [*identity, "commit", "-q", "-m", "first"],
    ):
        subprocess.run(["git", *command], cwd=source, check=True)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{source.parents[1]}/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/")
    cell = notebooks.bootstrap(repository)
    notebooks.run([save(repository, "01_one", cell, cell, "print(root, sys.path[0])")], alone)
    cells = nbformat.read(alone / "notebooks" / "01_one.ipynb", 4).cells
    clone = alone / "notebooks" / "tutorial"
    assert cells[-1].outputs[0].text == f"{clone} {clone}\n"
    assert (clone / "utils" / "settings.py").exists()
    assert [cell.outputs for cell in cells[1:3]] == [[], []]
