"""Create or update `.venv` to exactly what `requirements.lock` says: `python3 tools/setup.py`.

Uses the standard library only, and starts on an old Python, so that it can say what to install.
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
        "Windows is not supported directly: use WSL "
        "(https://learn.microsoft.com/windows/wsl/install)."
    )

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 11)
NEWEST = (3, 13)
UV = "uv==0.13.9"
INSTALL_PYTHON = (
    "install Python 3.11 to 3.13 (Debian, Ubuntu: sudo apt install python3 python3-venv; "
    "macOS: brew install python@3.13)"
)


@contextlib.contextmanager
def alone(lock, work):
    """Hold the file `lock` during a block.

    If another process holds it, say that `work` waits for it, and wait.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = "{}: another one is at work in this folder, waiting for it to end"
            print(message.format(work), flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, also when the process is killed


def choose_python(version=sys.version_info, which=shutil.which):
    """Return the path of a Python that the lock supports.

    This one if its `version` fits, otherwise the newest that `which` finds. Exit with what to
    install if there is none.
    """
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        # Not the Python of an activated .venv, which may be made anew.
        return getattr(sys, "_base_executable", sys.executable)
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = which("python3.{}".format(minor))
        if found:
            return found
    message = "python3 is Python {}.{}, and there is no python3.11 to python3.13 beside it: {}."
    sys.exit(message.format(version[0], version[1], INSTALL_PYTHON))


def check_venv_module(python):
    """Exit with what to install if `python` cannot make environments.

    Debian ships Python without python3-venv.
    """
    check = [python, "-c", "import venv, ensurepip"]
    if subprocess.run(check, stderr=subprocess.DEVNULL).returncode != 0:
        sys.exit(
            "{} lacks venv and ensurepip. Debian, Ubuntu: sudo apt install python3-venv "
            "(or pythonX.Y-venv).".format(python)
        )


def usable(python):
    """Return whether `python`, of an existing environment, runs, has pip, and fits the lock."""
    if not python.exists():
        return False
    check = "import sys, pip; sys.exit(not {} <= sys.version_info[:2] <= {})".format(OLDEST, NEWEST)
    return subprocess.run([str(python), "-c", check], stderr=subprocess.DEVNULL).returncode == 0


def main(root=ROOT):
    """Bring `root/.venv` up to `root/requirements.lock`. Return at once if it already is."""
    venv = root / ".venv"
    lock = root / "requirements.lock"
    python = venv / "bin" / "python"
    stamp = venv / "requirements.sha256"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()

    def is_current():
        return python.exists() and stamp.exists() and stamp.read_text().strip() == digest

    if is_current():
        return
    with alone(root / "build" / "setup.lock", "set-up"):
        if is_current():  # the process that held the lock has done it
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
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV]
        subprocess.run(pip, check=True)
        uv = [str(python), "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
        subprocess.run([*uv, "--requirement", str(lock)], check=True, cwd=str(root))
        # Last of all: an interrupted set-up leaves no stamp and is done again.
        temporary = stamp.with_suffix(".new")
        temporary.write_text(digest + "\n")
        os.replace(str(temporary), str(stamp))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(
            "Set-up failed at `{}`; its message is above. Run it again: it continues with what "
            "is already installed.".format(" ".join(error.cmd))
        )
