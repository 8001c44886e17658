"""The tools that set up, and that select, scrub and re-home notebooks; kernels start in slow/."""

import hashlib
import re
import shutil
import subprocess
import sys
from unittest import mock

import nbformat
import pytest
from nbformat.v4 import new_output
from notebook_repository import save, small_repository

from tools import notebooks, setup
from tools.notebooks import ROOT, WIDGET

# tools/setup.py


@pytest.fixture
def environment(tmp_path):
    """Make a repository as set-up leaves it: an empty lock, and this Python as its `.venv`."""
    (tmp_path / "requirements.lock").write_text("")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    stamp = hashlib.sha256(b"").hexdigest()
    (tmp_path / ".venv" / "requirements.sha256").write_text(f"{stamp}\n")
    return tmp_path


def test_setup_returns_at_once_when_the_stamp_is_current(environment, capfd):
    with mock.patch.object(subprocess, "run", side_effect=AssertionError("nothing is to be run")):
        setup.main(environment)
    assert capfd.readouterr() == ("", "")
    assert not (environment / "build").exists()


def test_setup_installs_a_changed_lock_and_stamps_last(environment):
    (environment / "requirements.lock").write_text("new==1.0\n")
    stamp = environment / ".venv" / "requirements.sha256"
    commands = []

    def failing(command, **options):
        if "-m" in command:
            assert not stamp.exists(), "an interrupted set-up must leave no stamp"
        if "uv" in command:
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0)

    def working(command, **options):
        commands.append(" ".join(command))
        return subprocess.CompletedProcess(command, 0)

    with mock.patch.object(subprocess, "run", failing):
        with pytest.raises(subprocess.CalledProcessError):
            setup.main(environment)
    assert not stamp.exists()
    with mock.patch.object(subprocess, "run", working):
        setup.main(environment)
    assert stamp.read_text().strip() == hashlib.sha256(b"new==1.0\n").hexdigest()
    assert setup.UV in commands[-2]
    assert commands[-1].endswith(f"--requirement {environment / 'requirements.lock'}")


def test_setup_looks_for_a_fitting_python():
    for version, name in (((3, 9, 2), "python3.12"), ((3, 14, 0), "python3.11")):
        there = {name: f"/usr/bin/{name}"}
        assert setup.choose_python(version, there.get) == f"/usr/bin/{name}"


def test_setup_names_what_to_install_for_an_old_python():
    with pytest.raises(SystemExit, match=r"3\.11 to 3\.13"):
        setup.choose_python((3, 9, 2), lambda name: None)


def test_setup_names_the_package_that_lacks_venv(tmp_path):
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match="python3-venv"):
        setup.check_venv_module(str(python))


# tools/notebooks.py


@pytest.fixture
def repository(tmp_path):
    with small_repository(tmp_path) as root:
        yield root


def test_select(repository):
    folder = repository / "notebooks"
    with pytest.raises(SystemExit):
        notebooks.select([], folder)
    paths = [save(repository, name, "1") for name in ("01_one", "02_two")]
    assert notebooks.select([], folder) == paths
    assert notebooks.select(["02", "notebooks/02_two.ipynb"], folder) == paths[1:]
    with pytest.raises(SystemExit, match="03"):
        notebooks.select(["03"], folder)


def test_a_notebook_is_stale_until_it_carries_its_own_stamp(repository):
    path = save(repository, "01_one", "print(1)")
    assert notebooks.stale([path], repository) == [path]
    notebook = nbformat.read(path, 4)
    stamp = notebooks.digest(notebook, repository)
    notebook.metadata["tutorial"] = {"digest": stamp}
    nbformat.write(notebook, path)
    assert notebooks.stale([path], repository) == []


def test_the_notebook_that_trains_runs_before_those_that_use_its_adapter(repository):
    training = save(repository, "01_train", "1")
    using = save(repository, "02_use", "2", inputs=["notebooks/01_train.ipynb"])
    other = save(repository, "03_other", "3")
    assert notebooks.with_their_adapters([using], repository) == [training, using]
    assert notebooks.with_their_adapters([other], repository) == [other]


def test_keep_drops_what_is_left_of_a_widget():
    left = {WIDGET: {}, "text/plain": "Loading weights:   0%|          | 0/108 [00:00<?, ?it/s]"}
    assert not notebooks.keep(new_output("display_data", data=left))
    left = {WIDGET: {}, "text/plain": "interactive(children=(Dropdown(description='profile'"}
    assert not notebooks.keep(new_output("display_data", data=left))
    text = {WIDGET: {}, "text/plain": "2,000 pairs"}
    assert notebooks.keep(new_output("display_data", data=text))


def test_keep_drops_progress_bars_and_empty_outputs():
    bars = "\r 10%|█         | 1/10 [00:01<00:09,  1.0it/s]\r100%|██████████| 10/10 [00:10<00:00]\n"
    assert not notebooks.keep(new_output("stream", name="stderr", text=bars))
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


def test_badges_move_every_address_and_keep_the_stamp(repository):
    set_up = notebooks.bootstrap(repository)
    path = save(repository, "01_one", set_up, "other = 'before/tutorial-data'")
    notebook = nbformat.read(path, 4)
    colab = "https://colab.research.google.com/github/{}/blob/main/notebooks/01_one.ipynb"
    notebook.cells[0].source = colab.format("before/tutorial")
    nbformat.write(notebook, path)
    readme = "https://github.com/{}.git https://{}.github.io/tutorial/ before/tutorial"
    (repository / "README.md").write_text(readme.format("before/tutorial", "before"))
    notebooks.badges("somebody/tutorial", repository)
    moved = nbformat.read(path, 4)
    assert moved.cells[0].source == colab.format("somebody/tutorial")
    assert moved.cells[1].source == notebooks.bootstrap(repository)
    assert 'REPOSITORY = "somebody/tutorial"' in moved.cells[1].source
    assert moved.cells[2].source == "other = 'before/tutorial-data'"
    moved_readme = (repository / "README.md").read_text()
    assert moved_readme == readme.format("somebody/tutorial", "somebody")
    assert notebooks.digest(moved, repository) == notebooks.digest(notebook, repository)
    with pytest.raises(SystemExit, match="owner/name"):
        notebooks.badges("nonsense", repository)


def test_badges_leave_no_trace_of_the_old_repository(tmp_path):
    copy = tmp_path / "copy"
    other = [".git", ".venv", "build", "runs", "__pycache__", ".*_cache", "*.parquet"]
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*other))
    old = re.escape(notebooks.home(copy)["repository"]).replace("/", "(/|.github.io/)")
    notebooks.badges("somebody/fork", copy)
    for path in copy.rglob("*"):
        if path.is_file():
            assert not re.search(old.encode(), path.read_bytes()), path.name
    assert notebooks.home(copy)["repository"] == "somebody/fork"
    readme = (copy / "README.md").read_text(encoding="utf-8")
    assert "https://codespaces.new/somebody/fork)" in readme
    assert "https://somebody.github.io/fork/" in readme
    for path in (copy / "notebooks").glob("*.ipynb"):
        first = nbformat.read(path, 4).cells[0].source
        blob = f"somebody/fork/blob/main/notebooks/{path.name}"
        for badge in (
            f"(https://colab.research.google.com/github/{blob})",
            f"(https://kaggle.com/kernels/welcome?src=https://github.com/{blob})",
        ):
            assert badge in first
            assert badge in readme
