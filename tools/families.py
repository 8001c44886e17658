"""`python -m tools.families`: run tests/test_families.py, write what it proved to results/families.json and into the README."""

import json
import sys
from pathlib import Path

import pytest

from utils import versions

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS, TESTS = (
    ROOT / "README.md",
    ROOT / "results" / "families.json",
    "tests/test_families.py",
)
BEGIN, END = "<!-- families -->", "<!-- /families -->"
LIBRARIES = ("transformers", "trl", "peft", "bitsandbytes", "torch")
SIGNS = {"passed": "✓", "skipped": "skipped", "failed": "**no**"}


class Recorder:
    """A pytest plug-in that keeps what every family's test of every property said."""

    def __init__(self):
        self.items, self.results = (
            {},
            {"versions": versions(*LIBRARIES), "properties": {}, "families": {}, "not proven": {}},
        )

    def pytest_itemcollected(self, item):
        family = getattr(item, "callspec", None) and item.callspec.params.get("trial")
        if family:
            heading, _, meaning = item.function.__doc__.partition(": ")
            self.results["properties"][heading] = meaning
            self.items[item.nodeid] = family, heading

    def pytest_runtest_logreport(self, report):
        if report.nodeid in self.items and (report.when == "call" or report.outcome != "passed"):
            family, heading = self.items[report.nodeid]
            self.results["families"].setdefault(family, {})[heading] = report.outcome
        elif report.when == "call":
            for name, why in report.user_properties:
                if name == "why not":
                    self.results["not proven"][report.nodeid.partition("[")[2].rstrip("]")] = why


def table(results):
    """Markdown: which families pass; folded, a row per family, a column per property, what each means, and what stops the others."""
    headings = list(results["properties"])
    whole = [
        family
        for family, proven in results["families"].items()
        if set(proven.values()) == {"passed"}
    ]
    lines = [
        "",
        f"All of it holds for {', '.join(whole)}; these library versions cannot train {', '.join(results['not proven'])}.",
    ]
    lines += [
        "",
        f"<details><summary>{len(headings)} properties, family by family, and what stops the others</summary>",
    ]
    lines += ["", f"| | {' | '.join(headings)} |", f"|---|{'---|' * len(headings)}"]
    for family, proven in results["families"].items():
        lines.append(f"| {family} | {' | '.join(SIGNS[proven[heading]] for heading in headings)} |")
    lines += [
        "",
        *(f"- **{heading}**: {meaning}." for heading, meaning in results["properties"].items()),
    ]
    lines += ["", "Not proven, because these versions of the libraries do not allow it:", ""]
    lines += [f"- **{family}**: {why}." for family, why in results["not proven"].items()]
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"({used}; `python -m tools.families` runs the tests and rewrites this part.)",
            "",
            "</details>",
            "",
        ]
    )


def between_markers(text):
    return text.partition(BEGIN)[2].partition(END)[0].removeprefix("\n")


def main():
    recorder = Recorder()
    arguments = [
        "-q",
        str(ROOT / TESTS),
        f"--rootdir={ROOT}",
        f"--deselect={TESTS}::test_the_readme_shows_the_committed_results",
    ]
    code = pytest.main(arguments, plugins=[recorder])
    if not recorder.results["families"]:
        sys.exit("no test of a family ran: nothing was written")
    RESULTS.write_text(json.dumps(recorder.results, indent=1, ensure_ascii=False) + "\n")
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table(recorder.results)}{END}{after}")
    sys.exit(code)


if __name__ == "__main__":
    main()
