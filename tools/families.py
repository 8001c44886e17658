"""Run tests/slow/test_families.py and record what it proves: `python -m tools.families`.

Writes results/families.json and the part of README.md between the two markers.
"""

import json
import sys
from pathlib import Path

import pytest

from utils import versions

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "results" / "families.json"
TESTS = ROOT / "tests" / "slow" / "test_families.py"
BEGIN = "<!-- families -->"
END = "<!-- /families -->"
LIBRARIES = ("transformers", "trl", "peft", "bitsandbytes", "torch")
SIGNS = {"passed": "✓", "skipped": "skipped", "failed": "**no**"}


class Recorder:
    """Keep what every family's test of every property says. A pytest plug-in.

    The docstring of such a test is "heading: meaning".
    """

    def __init__(self):
        self.items = {}  # {test id: (family, heading)}
        self.results = {
            "versions": versions(*LIBRARIES),
            "properties": {},
            "families": {},
            "not proven": {},
        }

    def pytest_itemcollected(self, item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "trial" in parameters:
            heading, _, meaning = item.function.__doc__.partition(": ")
            self.results["properties"][heading] = meaning
            self.items[item.nodeid] = (parameters["trial"], heading)

    def pytest_runtest_logreport(self, report):
        if report.nodeid in self.items:
            # An error before or after the test itself counts as well.
            if report.when == "call" or report.outcome != "passed":
                family, heading = self.items[report.nodeid]
                self.results["families"].setdefault(family, {})[heading] = report.outcome
        elif report.when == "call":
            for name, value in report.user_properties:
                if name == "why not":
                    family = report.nodeid.partition("[")[2].rstrip("]")
                    self.results["not proven"][family] = value


def table(results):
    """Return the README's part in Markdown.

    It names the families that pass. Folded below: a row per family, a column per property, what
    each property means, and what stops the other families.
    """
    headings = list(results["properties"])
    proven = []
    rows = []
    for family, outcomes in results["families"].items():
        if set(outcomes.values()) == {"passed"}:
            proven.append(family)
        signs = [SIGNS[outcomes[heading]] for heading in headings]
        rows.append(f"| {family} | {' | '.join(signs)} |")
    others = ", ".join(results["not proven"])
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "",
        f"All of it holds for {', '.join(proven)}; these library versions cannot train {others}.",
        "",
        f"<details><summary>{len(headings)} properties, family by family, and what stops the "
        "others</summary>",
        "",
        f"| | {' | '.join(headings)} |",
        f"|---|{'---|' * len(headings)}",
        *rows,
        "",
        *(f"- **{heading}**: {meaning}." for heading, meaning in results["properties"].items()),
        "",
        "Not proven, because these versions of the libraries do not allow it:",
        "",
        *(f"- **{family}**: {why}." for family, why in results["not proven"].items()),
        "",
        f"({used}; `python -m tools.families` runs the tests and rewrites this part.)",
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def main():
    """Run the tests, write the results, and exit with pytest's code."""
    recorder = Recorder()
    code = pytest.main(["-q", str(TESTS), f"--rootdir={ROOT}"], plugins=[recorder])
    if not recorder.results["families"]:
        sys.exit("no family was tested, so nothing was written: see pytest's output above")
    RESULTS.write_text(json.dumps(recorder.results, indent=1, ensure_ascii=False) + "\n")
    text = README.read_text()
    before = text.partition(BEGIN)[0]
    after = text.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n{table(recorder.results)}{END}{after}")
    sys.exit(code)


if __name__ == "__main__":
    main()
