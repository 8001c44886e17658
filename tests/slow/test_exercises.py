"""The solutions of the exercises, run as a reader would run them at the end of the notebook."""

import re

import pytest

from tests.taught import prepared, solutions

TEACHING = ("01", "02", "03", "04", "05", "06")


@pytest.mark.parametrize("number", TEACHING)
def test_the_solutions_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = solutions(number)
    assert len(found) >= 2
    names = prepared(number)
    for solution in found:
        assert re.search(r"^\s*assert ", solution, flags=re.MULTILINE), "a solution checks itself"
        exec(compile(solution, f"solution in notebook {number}", "exec"), dict(names))
