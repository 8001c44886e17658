"""Make or re-use `.venv` with exactly what `requirements.lock` says: `python3 tools/setup.py`.

Standard library only, and plain enough to start on an old Python, so that it can say what to install.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:
    sys.exit(
        "Windows is not supported directly: use WSL (https://learn.microsoft.com/windows/wsl/install)."
    )

ROOT = Path(__file__).resolve().parents[1]
OLDEST, NEWEST = (3, 11), (3, 13)
UV = "uv==0.13.9"
INSTALL_PYTHON = "install Python 3.11 to 3.13 (Debian, Ubuntu: sudo apt install python3 python3-venv; macOS: brew install python@3.13)"


@contextlib.contextmanager
def alone(lock, work):
    """Hold the file `lock` while the block runs; where another process holds it, say that `work` waits for it, and wait."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                "{}: another one is at work in this folder, waiting for it to end".format(work),
                flush=True,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back, also when the process is killed


def choose_python(version=sys.version_info, which=shutil.which):
    """Path of a Python that the lock supports: this one if its `version` fits, otherwise the newest that `which` finds.

    Ends the program with what to install where there is none.
    """
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return getattr(
            sys, "_base_executable", sys.executable
        )  # not the one of an activated .venv, which may be remade
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = which("python3.{}".format(minor))
        if found:
            return found
    sys.exit(
        "python3 is Python {}.{}, and there is no python3.11 to python3.13 beside it: {}.".format(
            *version[:2], INSTALL_PYTHON
        )
    )


def check_venv_module(python):
    """End the program with what to install where `python` cannot make environments, as on Debian without python3-venv."""
    if subprocess.run(
        [python, "-c", "import venv, ensurepip"], stderr=subprocess.DEVNULL
    ).returncode:
        sys.exit(
            "{} lacks venv and ensurepip. Debian, Ubuntu: sudo apt install python3-venv (or pythonX.Y-venv).".format(
                python
            )
        )


def usable(python):
    """Whether `python`, of an environment made earlier, still runs, has pip and a version that the lock supports."""
    check = "import sys, pip; sys.exit(not {} <= sys.version_info[:2] <= {})".format(OLDEST, NEWEST)
    return (
        python.exists()
        and not subprocess.run([str(python), "-c", check], stderr=subprocess.DEVNULL).returncode
    )


def main(root=ROOT):
    """Bring `root/.venv` up to `root/requirements.lock`; returns at once, silently, when it is already there."""
    venv, lock = root / ".venv", root / "requirements.lock"
    python, stamp = venv / "bin" / "python", venv / "requirements.sha256"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()

    def current():
        return python.exists() and stamp.exists() and stamp.read_text().strip() == digest

    if current():
        return
    with alone(root / "build" / "setup.lock", "set-up"):
        if current():  # the other one has done it meanwhile
            return
        if not usable(python):
            base = choose_python()
            check_venv_module(base)
            subprocess.run([base, "-m", "venv", "--clear", str(venv)], check=True)
        if stamp.exists():
            stamp.unlink()
        print(
            "Installing requirements.lock into .venv: about 5.5 GB, some minutes the first time",
            flush=True,
        )
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV],
            check=True,
        )
        uv = [
            str(python),
            "-m",
            "uv",
            "pip",
            "install",
            "--quiet",
            "--python",
            str(python),
            "--requirement",
            str(lock),
        ]
        subprocess.run(uv, check=True, cwd=str(root))
        temporary = stamp.with_suffix(".new")
        temporary.write_text(digest + "\n")
        os.replace(
            str(temporary), str(stamp)
        )  # last of all: an interrupted set-up leaves no stamp and is redone


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(
            "Set-up failed at `{}`; its message stands above. Run it again: what is there is re-used.".format(
                " ".join(error.cmd)
            )
        )
