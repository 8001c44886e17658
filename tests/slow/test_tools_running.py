"""The tools that run notebooks in real kernels, and set-up cells that find, clone and install."""

import json
import re
import subprocess
import sys

import nbformat
import pytest
from notebook_repository import save, small_repository

from tools import notebooks, setup
from tools.notebooks import ROOT, WIDGET

COLAB = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')"
KAGGLE = "import os\nos.environ['KAGGLE_KERNEL_RUN_TYPE'] = 'Interactive'"


@pytest.fixture
def repository(tmp_path):
    with small_repository(tmp_path) as root:
        yield root


def executed(build, name):
    return nbformat.read(build / "notebooks" / f"{name}.ipynb", 4)


def test_the_second_one_says_that_it_waits(tmp_path):
    lock = tmp_path / "build" / "lock"
    code = "import pathlib, sys; from tools.setup import alone\n"
    code += "with alone(pathlib.Path(sys.argv[1]), 'set-up'): print('in')"
    with setup.alone(lock, "set-up"):
        command = [sys.executable, "-c", code, str(lock)]
        second = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert second.stdout.readline().strip()
        assert second.poll() is None
    assert second.communicate(timeout=1800)[0] == "in\n"


def test_run_writes_results_and_timings_and_leaves_the_source(repository, capsys):
    first = save(repository, "01_one", "import os\nos.getcwd()")
    second = save(repository, "02_two", "print('two')")
    before = [first.read_bytes(), second.read_bytes()]
    build = repository / "build"
    timings = notebooks.run([first, second], build)
    assert list(timings) == ["01_one", "02_two"]
    written = json.loads((build / "timings.json").read_text())
    total = written.pop("total")
    assert written == timings
    assert total >= max(timings.values())
    assert [first.read_bytes(), second.read_bytes()] == before
    done = executed(build, "01_one")
    assert done.cells[1].outputs[0].data["text/plain"] == repr(str(build / "notebooks"))
    assert "execution" not in done.cells[1].metadata
    assert re.fullmatch(r"01_one +[\d.]+ s\n02_two +[\d.]+ s\n", capsys.readouterr().out)


def test_a_widget_runs_headless_and_leaves_no_state(repository):
    interact = "from ipywidgets import interact\ninteract(lambda number: number, number=(0, 3));"
    path = save(repository, "01_one", interact, "print('after it')")
    notebooks.run([path], repository / "build")
    done = executed(repository / "build", "01_one")
    assert done.cells[2].outputs[0].text == "after it\n"
    assert "widgets" not in done.metadata


def test_run_stops_at_a_failure_and_keeps_what_ran(repository):
    first = save(repository, "01_one", "print('so far')", "int('no number')", "print('never')")
    second = save(repository, "02_two", "print('two')")
    with pytest.raises(SystemExit) as stopped:
        notebooks.run([first, second], repository / "build")
    message = str(stopped.value)  # a SystemExit with a text prints it and exits with 1
    for fact in ("01_one.ipynb", "int('no number')", "ValueError: invalid literal"):
        assert fact in message
    assert "\x1b" not in message
    kinds = []
    for cell in executed(repository / "build", "01_one").cells[1:]:
        kinds.append([output.output_type for output in cell.outputs])
    assert kinds == [["stream"], ["error"], []]
    assert not (repository / "build" / "notebooks" / "02_two.ipynb").exists()
    assert "01_one" not in json.loads((repository / "build" / "timings.json").read_text())


def test_run_uses_this_environment_whatever_kernel_the_user_installed(repository, monkeypatch):
    kernel = repository / "data" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    other = {"argv": ["/bin/false"], "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(other))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(repository / "data"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    notebooks.run(
        [save(repository, "01_one", "import sys\nprint(sys.prefix)")], repository / "build"
    )
    output = executed(repository / "build", "01_one").cells[1].outputs[0]
    assert output.text.strip() == sys.prefix


def test_commit_scrubs_and_stamps_the_embedded_run(repository):
    bundle = f"{{'{WIDGET}': {{'model_id': 'x'}}, 'text/html': '<b>pair</b>'}}"
    widget = f"from IPython.display import display\ndisplay({bundle}, raw=True)"
    profile = "import os\nos.environ['VLM_DPO_PROFILE']"
    path = save(repository, "01_one", profile, widget, "print('é')", inputs=["requirements.lock"])
    notebooks.commit([path], repository / "build", repository)
    text = path.read_text()
    committed = nbformat.read(path, 4)
    assert "é" in text
    assert text.startswith('{\n "cells"')
    assert text.endswith("}\n")
    assert committed.cells[1].outputs[0].data["text/plain"] == "'embedded'"
    assert committed.cells[2].outputs[0].data == {"text/html": "<b>pair</b>"}
    assert [cell.id for cell in committed.cells] == [f"01_one-0{number}" for number in range(4)]
    assert set(committed.metadata) == {"kernelspec", "language_info", "tutorial"}
    assert committed.metadata.tutorial.inputs == ["requirements.lock"]
    assert notebooks.stale([path], repository) == []
    notebooks.commit([path], repository / "build", repository)
    assert path.read_text() == text, "the same run again must give no diff"


def test_commit_runs_the_notebook_that_trains_but_leaves_it_as_it_is(repository):
    training = save(repository, "01_train", "open('adapter', 'w').write('new')")
    using = save(
        repository, "02_use", "print(open('adapter').read())", inputs=["notebooks/01_train.ipynb"]
    )
    before = training.read_bytes()
    notebooks.commit([using], repository / "build", repository)
    assert nbformat.read(using, 4).cells[1].outputs[0].text == "new\n"
    assert training.read_bytes() == before


def test_commit_puts_nothing_back_if_one_output_names_the_machine(repository):
    good = save(repository, "01_one", "print('good')")
    bad = save(repository, "02_two", "print(1)", "import os\nprint('in', os.getcwd())")
    before = [good.read_bytes(), bad.read_bytes()]
    with pytest.raises(SystemExit, match=r"02_two\.ipynb, code cell 2"):
        notebooks.commit([good, bad], repository / "build", repository)
    assert [good.read_bytes(), bad.read_bytes()] == before


def test_commit_puts_nothing_back_if_an_output_shows_an_access_token(repository):
    path = save(repository, "01_one", "print('logged in with', 'hf' + '_' + 'a' * 34)")
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"01_one\.ipynb, code cell 1"):
        notebooks.commit([path], repository / "build", repository)
    assert path.read_bytes() == before


def test_commit_keeps_an_edit_made_during_the_run(repository):
    edit = "from pathlib import Path\nPath('../../notebooks/01_one.ipynb').open('a').write(' ')"
    path = save(repository, "01_one", edit)
    with pytest.raises(SystemExit, match=r"01_one\.ipynb"):
        notebooks.commit([path], repository / "build", repository)
    assert path.read_text().endswith(" ")


@pytest.mark.parametrize("place", [COLAB, KAGGLE, None], ids=["Colab", "Kaggle", "here"])
def test_bootstrap_finds_the_repository_and_installs_only_on_colab_and_kaggle(repository, place):
    (repository / "utils" / "settings.py").write_text("")
    pip = "from IPython import get_ipython\n"
    pip += "say = lambda line: print('pip', line)\n"
    pip += "get_ipython().register_magic_function(say, magic_name='pip')"
    cells = [place or "pass", pip, notebooks.bootstrap(repository), "print(root, sys.path[0])"]
    notebooks.run([save(repository, "01_one", *cells)], repository / "build")
    done = executed(repository / "build", "01_one").cells
    assert done[-1].outputs[0].text == f"{repository} {repository}\n"
    printed = "".join(output.text for output in done[3].outputs)
    installs = f'pip install -q -r "{repository}/requirements-colab.txt"\n'
    assert printed == (installs if place else "")


def test_bootstrap_clones_where_there_is_no_repository(repository, tmp_path_factory, monkeypatch):
    """git takes a folder for github.com; the cell's second run finds the clone of the first."""
    source = tmp_path_factory.mktemp("github") / "before" / "tutorial"
    alone = tmp_path_factory.mktemp("alone")
    (source / "utils").mkdir(parents=True)
    for name in ("__init__", "settings"):
        (source / "utils" / f"{name}.py").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    commit = [*identity, "commit", "-q", "-m", "first"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], commit):
        subprocess.run(["git", *command], cwd=source, check=True)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{source.parents[1]}/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/")
    cell = notebooks.bootstrap(repository)
    notebooks.run([save(repository, "01_one", cell, cell, "print(root, sys.path[0])")], alone)
    cells = executed(alone, "01_one").cells
    clone = alone / "notebooks" / "tutorial"
    assert cells[-1].outputs[0].text == f"{clone} {clone}\n"
    assert (clone / "utils" / "settings.py").exists()
    assert [cell.outputs for cell in cells[1:3]] == [[], []]
