"""Run, commit and re-home the notebooks: `python -m tools.notebooks run [names…] | commit [names…] | badges OWNER/NAME`."""

import argparse
import hashlib
import json
import os
import re
import socket
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert.preprocessors import ExecutePreprocessor
from traitlets.config import Config

from tools.setup import alone

ROOT = Path(__file__).resolve().parents[1]
TOKEN = re.compile(
    r"\b(?:hf_|ghp_|github_pat_|sk-)[\w-]{20,}"
)  # of the hub, of GitHub, of paid models
WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"\d+%\|| \[[\d:]+<|it/s\]|s/it\]")
QUIET = {
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "JUPYTER_PATH": f"{sys.prefix}/share/jupyter",  # this environment's python3 kernel, before any that the user installed
}
BOOTSTRAP = """\
import os
import sys
from pathlib import Path

REPOSITORY = "OWNER/NAME"
clone = Path.cwd() / REPOSITORY.split("/")[1]
found = [folder for folder in (clone, *clone.parents) if (folder / "utils" / "settings.py").exists()]
if not found:  # this notebook was opened on its own, as on Colab
    !git clone -q --depth 1 --branch BRANCH "https://github.com/{REPOSITORY}" "{clone}"
root = found[0] if found else clone
if "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
    # Before anything is imported: packages replaced later do not take effect.
    %pip install -q -r "{root}/requirements-colab.txt"
sys.path.insert(0, str(root))  # first, because others have a package called utils too
import utils  # before the large packages: it keeps their hints quiet"""


def home(root=ROOT):
    """`{"repository": "OWNER/NAME", "branch": …}` from pyproject.toml, the one place where both stand."""
    return tomllib.loads((root / "pyproject.toml").read_text())["tool"]["tutorial"]


def bootstrap(root=ROOT):
    """Source of the first code cell, the same in every notebook; it leaves `root`, the repository's folder, as a Path."""
    return BOOTSTRAP.replace("OWNER/NAME", home(root)["repository"]).replace(
        "BRANCH", home(root)["branch"]
    )


def digest(notebook, root=ROOT):
    """Sha256 of all that decides the outputs: the notebook's code, `utils/`, `embedded/` and the lock, names and contents."""
    code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    # Which repository a notebook is cloned from changes no output: a fork's `make badges` must not make every stamp stale.
    code = re.sub(r'^REPOSITORY = ".*"$', "REPOSITORY", code, flags=re.MULTILINE)
    files = [
        *root.glob("utils/*.py"),
        *root.glob("embedded/*.py"),
        root / "embedded" / "manifest.json",
        root / "requirements.lock",
    ]
    total = hashlib.sha256(code.encode())
    for file in sorted(files):
        total.update(
            f"\n{file.relative_to(root).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode()
        )
    return total.hexdigest()


def write(path, text):
    """Write all of `text` or nothing: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def select(names, folder):
    """Paths in `folder` in order; with `names` (`05`, `03_train_with_qlora_dpo`, its file name or path) only those."""
    paths = sorted(folder.glob("*.ipynb"))
    wanted = [Path(name).name.removesuffix(".ipynb") for name in names]
    unknown = [name for name in wanted if not any(path.stem.startswith(name) for path in paths)]
    if unknown or not paths:
        raise SystemExit(
            f"No notebook {', '.join(unknown) or 'at all'} in {folder.name}/; there are: {', '.join(p.stem for p in paths)}"
        )
    return [
        path for path in paths if not wanted or any(path.stem.startswith(name) for name in wanted)
    ]


def run(paths, build=ROOT / "build"):
    """Execute each notebook of `paths` with `build/notebooks` as its folder and write it there; returns seconds by name.

    `build/timings.json` holds the same. The first that fails is kept as far as it ran and ends the program with its traceback.
    """
    folder, timings = build / "notebooks", {}
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(QUIET)
    with alone(build / "tutorial.lock", "notebooks"):
        for path in paths:
            print(f"{path.stem:<36}", end="", flush=True)
            notebook, start = nbformat.read(path, as_version=4), time.monotonic()
            try:
                execute(notebook, folder)
                timings[path.stem] = round(time.monotonic() - start, 1)
            except (CellExecutionError, DeadKernelError) as error:
                message = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
                raise SystemExit(
                    f"failed\n{path.name}, as far as it ran, is in {folder}\n\n{message}"
                ) from None
            finally:
                write(folder / path.name, nbformat.writes(notebook) + "\n")
                write(build / "timings.json", json.dumps(timings, indent=1) + "\n")
            print(f"{timings[path.stem]:8.1f} s", flush=True)
    return timings


def execute(notebook, folder):
    """Run all cells of `notebook`, in place, in a fresh kernel of this environment whose working directory is `folder`."""
    for cell in notebook.cells:
        if (
            cell.cell_type == "code"
        ):  # after a failure, cells that did not run must not show an older run's outputs
            cell.outputs, cell.execution_count = [], None
    # iopub_timeout: on a busy machine outputs arrive late; the default of 4 s would drop them.
    options = {
        "timeout": -1,
        "iopub_timeout": 60,
        "coalesce_streams": True,
        "store_widget_state": False,
        "record_timing": False,
    }
    with (
        tempfile.TemporaryDirectory() as sockets
    ):  # of their own: the default path is relative, and TCP warns
        channel = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
        ExecutePreprocessor(kernel_name="python3", config=channel, **options).preprocess(
            notebook, {"metadata": {"path": str(folder)}}
        )


def commit(paths, build=ROOT / "build", root=ROOT):
    """Run `paths` on the embedded default and put them back scrubbed and stamped: all of them, or none if one is not fit."""
    os.environ["VLM_DPO_PROFILE"] = "embedded"
    before = {path: path.read_bytes() for path in paths}
    run(paths, build)
    ready = {
        path: nbformat.writes(
            scrub(nbformat.read(build / "notebooks" / path.name, 4), path.stem, root)
        )
        for path in paths
    }
    if changed := [path.name for path in paths if path.read_bytes() != before[path]]:
        raise SystemExit(
            f"{', '.join(changed)} changed during the run, nothing was committed: run it again."
        )
    for path, text in ready.items():
        write(path, text + "\n")


def scrub(notebook, name, root=ROOT):
    """A clean run of `notebook`, stamped, in the form that gives small diffs. SystemExit where an output names the machine or a token."""
    for position, cell in enumerate(notebook.cells):
        cell.id = f"{name}-{position:02d}"[-64:]
        cell.metadata = {
            key: value
            for key, value in cell.metadata.items()
            if key in ("cellView", "jupyter", "tags")
        }
    for count, cell in enumerate(
        (cell for cell in notebook.cells if cell.cell_type == "code"), start=1
    ):
        cell.execution_count, cell.outputs = (
            count,
            [output for output in cell.outputs if keep(output)],
        )
        for output in (output for output in cell.outputs if output.output_type == "execute_result"):
            output.execution_count = count
        if place := machine_place(json.dumps(cell.outputs, ensure_ascii=False), root):
            raise SystemExit(
                f"{name}.ipynb, code cell {count}: an output names this machine ({place}). Print a relative path."
            )
        if TOKEN.search(without_pictures(cell.source + json.dumps(cell.outputs))):
            raise SystemExit(
                f"{name}.ipynb, code cell {count} or its output holds an access token: revoke it, and log in by other means"
            )
    notebook.nbformat_minor = 5  # the first with cell ids
    version = ".".join(notebook.metadata.language_info.version.split(".")[:2])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"file_extension": ".py", "name": "python", "version": version},
        "tutorial": {"digest": digest(notebook, root)},
    }
    return notebook


def keep(output):
    """Drop widget views and progress bars from `output`, in place; returns whether anything is left."""
    if output.output_type == "stream":
        if output.name == "stderr":
            output.text = "".join(
                line for line in output.text.splitlines(keepends=True) if not PROGRESS.search(line)
            )
        return bool(output.text.strip())
    data = output.get("data", {})
    data.pop(WIDGET, None)
    bar = set(data) == {"text/plain"} and PROGRESS.search(
        data["text/plain"]
    )  # what is left of a progress bar's widget
    return output.output_type == "error" or (bool(data) and not bar)


def without_pictures(text):
    """`text` without long runs of base64, in which any short word turns up by chance."""
    return re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)


def machine_place(text, root=ROOT):
    """The first folder or host name of this machine in `text`, which may be JSON; None if there is none."""
    folders = [
        re.escape(place)
        for place in (str(root), str(Path.home()), tempfile.gettempdir(), "/tmp/")
        if place != "/"
    ]
    host = rf"\b(?!localhost\b){re.escape(socket.gethostname() or 'localhost')}\b"
    found = re.search("|".join([*folders, host]), without_pictures(text).replace(r"\n", "\n"))
    return found and found.group()


def badges(repository, root=ROOT):
    """Write `repository` (`owner/name`) wherever the old one stands: pyproject.toml, badges, clone and book addresses, constants."""
    if not re.fullmatch(r"[\w-]+/[\w.-]+", repository):
        raise SystemExit(
            f"{repository!r} is not of the form owner/name: make badges REPOSITORY=owner/name"
        )
    old = home(root)["repository"]
    place = re.compile(
        rf'(github\.com/|/github/|codespaces\.new/|repository = "|REPOSITORY = \\"){re.escape(old)}(?![\w-])'
    )
    book = re.compile(rf"\b{re.escape(old.replace('/', '.github.io/'))}(?![\w-])")
    for path in [
        root / "pyproject.toml",
        root / "README.md",
        *sorted(root.glob("notebooks/*.ipynb")),
    ]:
        text = place.sub(lambda match: match[1] + repository, path.read_text(encoding="utf-8"))
        write(path, book.sub(repository.replace("/", ".github.io/"), text))


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("run", "execute into build/notebooks/"),
        ("commit", "execute, scrub and stamp notebooks/"),
    ):
        commands.add_parser(command, help=text).add_argument(
            "names", nargs="*", help="which, for example 05 (default: all)"
        )
    commands.add_parser("badges", help="rewrite the repository everywhere").add_argument(
        "repository", help="owner/name"
    )
    chosen = parser.parse_args()
    if chosen.command == "badges":
        return badges(chosen.repository)
    {"run": run, "commit": commit}[chosen.command](select(chosen.names, ROOT / "notebooks"))


if __name__ == "__main__":
    main()
