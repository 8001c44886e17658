"""Run the course with the package versions that Colab has: `python -m tools.colab [notebooks…]`.

Installs Colab's stack in build/colab and executes notebooks 01 to 06, or those named. As in Colab,
the preinstalled versions of colab-preinstalled.txt come first, then requirements-colab.txt, which
must leave them alone, except for those that TRL itself upgrades.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.utils import canonicalize_name

from tools.setup import ROOT

PREINSTALLED = Path(__file__).with_name("colab-preinstalled.txt")
COURSE = ("01", "02", "03", "04", "05", "06")
UPGRADED_BY_TRL = {"datasets", "huggingface-hub", "pyarrow"}


def preinstalled():
    """Return {package: version} of what Colab brings."""
    lines = re.findall(r"^([\w-]+)==(\S+)", PREINSTALLED.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


def pip(python, *arguments):
    """Run pip of the environment of `python`. Raise CalledProcessError if it fails."""
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)


def installed(python):
    """Return {package: version} of the environment of `python`."""
    packages = json.loads(pip(python, "list", "--format=json").stdout)
    return {canonicalize_name(package["name"]): package["version"] for package in packages}


def changed(before, after):
    """Return {package: (old version, new version)} of those in `before` that differ in `after`."""
    differences = {}
    for name, version in before.items():
        if after.get(name) != version:
            differences[name] = (version, after.get(name))
    return differences


def main(notebooks):
    """Install the stack and run the notebooks.

    Exit with a message if the installation changes what Colab brings, otherwise with the code of
    the notebooks' run.
    """
    folder = ROOT / "build" / "colab"
    environment = folder / "venv"
    python = environment / "bin" / "python"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    uv = [sys.executable, "-m", "uv", "--no-config", "pip", "install", "-q"]
    subprocess.run([*uv, "--python", python, "-r", PREINSTALLED], check=True)
    pip(python, "install", "-q", "-r", ROOT / "requirements-colab.txt")

    differences = changed(preinstalled(), installed(python))
    print("changed by requirements-colab.txt:", flush=True)
    for name, (old, new) in differences.items():
        print(f"  {name} {old} → {new}", flush=True)
    touched = sorted(differences.keys() - UPGRADED_BY_TRL)
    if touched:
        sys.exit(f"requirements-colab.txt must leave {', '.join(touched)} as Colab has it")

    command = [python, "-m", "tools.notebooks", "run", *(notebooks or COURSE)]
    sys.exit(subprocess.run(command, cwd=ROOT).returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
