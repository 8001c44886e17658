"""Run, commit and re-home the notebooks.

python -m tools.notebooks run [NAMES…] | commit [NAMES… | --all] | badges OWNER/NAME
"""

import argparse
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
from tools.stamp import digest, inputs

ROOT = Path(__file__).resolve().parents[1]
# Access tokens of the hub, of GitHub and of paid models.
TOKEN = re.compile(r"\b(?:hf_|ghp_|github_pat_|sk-)[\w-]{20,}")
WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"\d+%\|| \[[\d:]+<|it/s\]|s/it\]")
WIDGET_NAME = re.compile(r"\w+\(children=")  # what a widget leaves as text
KEPT_METADATA = ("cellView", "jupyter", "tags")
QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # This environment's python3 kernel comes before any that the user installed.
    "JUPYTER_PATH": f"{sys.prefix}/share/jupyter",
}
BOOTSTRAP = """\
import os
import sys
from pathlib import Path

REPOSITORY = "OWNER/NAME"
clone = Path.cwd() / REPOSITORY.split("/")[1]
folders = (clone, *clone.parents)
found = [path for path in folders if (path / "utils/settings.py").exists()]
if not found:  # this notebook was opened on its own, as on Colab
    !git clone -q --depth 1 -b BRANCH https://github.com/{REPOSITORY} "{clone}"
root = found[0] if found else clone
if "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
    # Before anything is imported: packages replaced later do not take effect.
    %pip install -q -r "{root}/requirements-colab.txt"
sys.path.insert(0, str(root))  # first, because others have a package utils too
import utils  # before the large packages: it keeps their hints quiet"""


def home(root=ROOT):
    """Return `{"repository": "OWNER/NAME", "branch": …}` from pyproject.toml, their only home."""
    return tomllib.loads((root / "pyproject.toml").read_text())["tool"]["tutorial"]


def bootstrap(root=ROOT):
    """Return the source of the first code cell, the same in every notebook.

    It leaves `root`, the repository's folder, as a Path.
    """
    place = home(root)
    cell = BOOTSTRAP.replace("OWNER/NAME", place["repository"])
    return cell.replace("BRANCH", place["branch"])


def write(path, text):
    """Write all of `text` or nothing: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def select(names, folder):
    """Return the paths of the notebooks in `folder`, in order; with `names` only those.

    A name is `03`, `03_train_with_qlora_dpo`, a file name or a path. SystemExit lists the
    notebooks where a name fits none.
    """
    paths = sorted(folder.glob("*.ipynb"))
    wanted = [Path(name).name.removesuffix(".ipynb") for name in names]
    unknown = [name for name in wanted if not any(path.stem.startswith(name) for path in paths)]
    if unknown or not paths:
        there = ", ".join(path.stem for path in paths)
        missing = ", ".join(unknown) or "at all"
        raise SystemExit(f"No notebook {missing} in {folder.name}/; there are: {there}")
    if not wanted:
        return paths
    return [path for path in paths if path.stem.startswith(tuple(wanted))]


def run(paths, build=ROOT / "build"):
    """Execute each notebook of `paths` in the folder `build/notebooks` and write it there.

    Returns the seconds of each by name; `build/timings.json` holds them too, and their "total".
    The first notebook that fails is kept as far as it ran, and its traceback ends the program.
    """
    folder = build / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(QUIET)
    timings = {}
    begun = time.monotonic()
    with alone(build / "tutorial.lock", "notebooks"):
        for path in paths:
            print(f"{path.stem:<36}", end="", flush=True)
            notebook = nbformat.read(path, as_version=4)
            start = time.monotonic()
            try:
                execute(notebook, folder)
                timings[path.stem] = round(time.monotonic() - start, 1)
            except (CellExecutionError, DeadKernelError) as error:
                message = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
                kept = f"{path.name}, as far as it ran, is in {folder}"
                raise SystemExit(f"failed\n{kept}\n\n{message}") from None
            finally:
                write(folder / path.name, nbformat.writes(notebook) + "\n")
                total = {"total": round(time.monotonic() - begun, 1)}
                write(build / "timings.json", json.dumps(timings | total, indent=1) + "\n")
            print(f"{timings[path.stem]:8.1f} s", flush=True)
    return timings


def execute(notebook, folder):
    """Run all cells of `notebook`, in place, in a fresh kernel whose working directory is `folder`.

    The kernel is that of this environment.
    """
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # After a failure, cells that did not run must not show an older run's outputs.
            cell.outputs = []
            cell.execution_count = None
    with tempfile.TemporaryDirectory() as sockets:
        # Sockets of their own: the default path is relative, and TCP warns.
        channel = {"transport": "ipc", "ip": f"{sockets}/kernel"}
        preprocessor = ExecutePreprocessor(
            kernel_name="python3",
            config=Config({"KernelManager": channel}),
            timeout=-1,
            iopub_timeout=60,  # a busy machine sends outputs late; the default of 4 s drops them
            coalesce_streams=True,
            store_widget_state=True,  # without it, `interact` fails in nbclient
            record_timing=False,
        )
        preprocessor.preprocess(notebook, {"metadata": {"path": str(folder)}})
    notebook.metadata.pop("widgets", None)  # shows as nothing or as an error nearly everywhere


def stale(paths, root=ROOT):
    """Return those of `paths` whose stamp no longer fits what decides their outputs."""
    found = []
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        if notebook.metadata.get("tutorial", {}).get("digest") != digest(notebook, root):
            found.append(path)
    return found


def with_their_adapters(paths, root=ROOT):
    """Return `paths` and, before them, the notebooks that they declare as inputs.

    What a declared notebook left in `runs/` may come from older code, so it runs again.
    """
    needed = set(paths)
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        for name in inputs(notebook):
            if name.endswith(".ipynb"):
                needed.add(root / name)
    return sorted(needed)


def commit(paths, build=ROOT / "build", root=ROOT):
    """Run `paths` on the embedded default and put them back scrubbed and stamped.

    All of them are put back, or none: SystemExit names what one of them lacks. A notebook whose
    adapter they use runs before them, but is not put back unless it is one of `paths`.
    """
    os.environ["VLM_DPO_PROFILE"] = "embedded"
    before = {path: path.read_bytes() for path in paths}
    run(with_their_adapters(paths, root), build)
    ready = {}
    for path in paths:
        notebook = nbformat.read(build / "notebooks" / path.name, as_version=4)
        ready[path] = nbformat.writes(scrub(notebook, path.stem, root)) + "\n"
    changed = [path.name for path in paths if path.read_bytes() != before[path]]
    if changed:
        names = ", ".join(changed)
        raise SystemExit(f"{names} changed during the run, nothing was committed: run it again.")
    for path, text in ready.items():
        write(path, text)


def scrub(notebook, name, root=ROOT):
    """Return a clean run of `notebook`, stamped, in the form that gives small diffs.

    SystemExit names the cell where an output names this machine or shows an access token.
    """
    for position, cell in enumerate(notebook.cells):
        cell.id = f"{name}-{position:02d}"[-64:]
        cell.metadata = {key: cell.metadata[key] for key in KEPT_METADATA if key in cell.metadata}
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code_cells, start=1):
        cell.execution_count = count
        cell.outputs = [output for output in cell.outputs if keep(output)]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
        where = f"{name}.ipynb, code cell {count}"
        place = machine_place(json.dumps(cell.outputs, ensure_ascii=False), root)
        if place:
            raise SystemExit(
                f"{where}: an output names this machine ({place}). Print a relative path."
            )
        if TOKEN.search(without_images(cell.source + json.dumps(cell.outputs))):
            raise SystemExit(f"{where} or its output shows an access token: revoke the token.")
    notebook.nbformat_minor = 5  # the first with cell ids
    version = ".".join(notebook.metadata.language_info.version.split(".")[:2])
    tutorial = {"digest": digest(notebook, root)}
    if inputs(notebook):
        tutorial["inputs"] = inputs(notebook)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"file_extension": ".py", "name": "python", "version": version},
        "tutorial": tutorial,
    }
    return notebook


def keep(output):
    """Drop widget views and progress bars from `output`, in place; tell whether any is left."""
    if output.output_type == "stream":
        if output.name == "stderr":
            lines = output.text.splitlines(keepends=True)
            output.text = "".join(line for line in lines if not PROGRESS.search(line))
        return bool(output.text.strip())
    if output.output_type == "error":
        return True
    data = output.get("data", {})
    data.pop(WIDGET, None)
    if set(data) == {"text/plain"}:
        text = data["text/plain"]
        return not (PROGRESS.search(text) or WIDGET_NAME.match(text))
    return bool(data)


def without_images(text):
    """Return `text` without long runs of base64, in which any short word turns up by chance."""
    return re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)


def machine_place(text, root=ROOT):
    """Return the first folder or host name of this machine in `text`, or None.

    `text` may be JSON.
    """
    folders = {str(root), str(Path.home()), tempfile.gettempdir(), "/tmp/"} - {"/"}
    # The longest first: of two that begin alike, the whole one is named.
    patterns = [re.escape(place) for place in sorted(folders, key=len, reverse=True)]
    host = re.escape(socket.gethostname() or "localhost")
    patterns.append(rf"\b(?!localhost\b){host}\b")
    found = re.search("|".join(patterns), without_images(text).replace(r"\n", "\n"))
    return found.group() if found else None


def badges(repository, root=ROOT):
    """Write `repository` ("owner/name") wherever the old one stands.

    That is pyproject.toml, the badges, the addresses of clone and book, and the set-up cells.
    """
    if not re.fullmatch(r"[\w-]+/[\w.-]+", repository):
        raise SystemExit(f"{repository!r} is not owner/name: make badges REPOSITORY=owner/name")
    old = home(root)["repository"]
    before = r'(github\.com/|/github/|codespaces\.new/|repository = "|REPOSITORY = \\")'
    place = re.compile(rf"{before}{re.escape(old)}(?![\w-])")
    book = re.compile(rf"\b{re.escape(old.replace('/', '.github.io/'))}(?![\w-])")
    files = [root / "pyproject.toml", root / "README.md", *sorted(root.glob("notebooks/*.ipynb"))]
    for path in files:
        text = path.read_text(encoding="utf-8")
        text = place.sub(lambda match: match[1] + repository, text)
        write(path, book.sub(repository.replace("/", ".github.io/"), text))


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="execute into build/notebooks/")
    running.add_argument("names", nargs="*", help="which, for example 03 (default: all)")
    committing = commands.add_parser("commit", help="execute, scrub and stamp notebooks/")
    committing.add_argument("names", nargs="*", help="which (default: those that are stale)")
    committing.add_argument("--all", action="store_true", help="every notebook, stale or not")
    moving = commands.add_parser("badges", help="rewrite the repository everywhere")
    moving.add_argument("repository", help="owner/name")
    options = parser.parse_args()
    if options.command == "badges":
        badges(options.repository)
        return
    paths = select(options.names, ROOT / "notebooks")
    if options.command == "run":
        run(paths)
        return
    if not (options.names or options.all):
        paths = stale(paths)
        if not paths:
            print("every notebook is up to date; --all runs them all the same")
            return
    commit(paths)


if __name__ == "__main__":
    main()
