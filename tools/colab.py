"""Colab's stack on this machine: python -m tools.colab [notebooks…] installs it in build/colab and runs 01 to 06 (or those) with it.

As in Colab, the preinstalled versions come first (colab-preinstalled.txt), then requirements-colab.txt, which must leave them
as they are but for what TRL itself upgrades.
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
    """{package: version} of Colab."""
    return {
        canonicalize_name(name): version
        for name, version in re.findall(r"^([\w-]+)==(\S+)", PREINSTALLED.read_text(), re.MULTILINE)
    }


def pip(python, *arguments):
    return subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )


def installed(python):
    """{package: version} of that environment."""
    return {
        canonicalize_name(each["name"]): each["version"]
        for each in json.loads(pip(python, "list", "--format=json").stdout)
    }


def changed(before, after):
    """{package: (version before, version after)} of what Colab brings and an installation did not leave alone."""
    return {
        name: (version, after.get(name))
        for name, version in before.items()
        if after.get(name) != version
    }


def main(notebooks):
    """SystemExit when the installation touches what Colab brings, or a notebook fails."""
    folder = ROOT / "build" / "colab"
    python = folder / "venv" / "bin" / "python"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "uv",
            "--no-config",
            "pip",
            "install",
            "-q",
            "--python",
            python,
            "-r",
            PREINSTALLED,
        ],
        check=True,
    )
    pip(python, "install", "-q", "-r", ROOT / "requirements-colab.txt")
    differences = changed(preinstalled(), installed(python))
    print(
        "changed by requirements-colab.txt:",
        *(f"{name} {old} → {new}" for name, (old, new) in differences.items()),
        flush=True,
    )
    if touched := differences.keys() - UPGRADED_BY_TRL:
        sys.exit(f"requirements-colab.txt must leave {', '.join(sorted(touched))} as Colab has it")
    sys.exit(
        subprocess.run(
            [python, "-m", "tools.notebooks", "run", *(notebooks or COURSE)], cwd=ROOT
        ).returncode
    )


if __name__ == "__main__":
    main(sys.argv[1:])
