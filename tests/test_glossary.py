"""The glossary and the bibliography: what is linked exists, and exists once."""

import re

from tests.taught import notebook_path
from tests.test_notebooks import PATHS, TEACHING, markdown
from utils.settings import ROOT

GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
REFERENCES = (ROOT / "docs" / "references.bib").read_text(encoding="utf-8")
TERMS = re.findall(r"^## (.+)$", GLOSSARY, flags=re.MULTILINE)


def anchor(heading):
    """Return the anchor that GitHub and the book give to a heading."""
    return heading.lower().replace(" ", "-")


def test_every_linked_term_is_explained():
    texts = [markdown(path) for path in PATHS]
    texts.append((ROOT / "README.md").read_text(encoding="utf-8"))
    linked = set()
    for text in texts:
        linked |= set(re.findall(r"glossary\.md#([\w-]+)", text))
    assert len(linked) > 30
    assert linked <= {anchor(term) for term in TERMS}


def test_a_term_is_explained_once_and_in_order():
    assert TERMS == sorted(set(TERMS), key=str.lower)
    for number in re.findall(r"\[([\d, ]+)\]$", GLOSSARY, flags=re.MULTILINE):
        for one in number.split(", "):
            assert notebook_path(one).exists()


def test_what_is_recommended_is_in_the_bibliography():
    keys = re.findall(r"^@\w+\{(\w+),", REFERENCES, flags=re.MULTILINE)
    assert len(keys) == len(set(keys))
    known = set(re.findall(r"url = \{([^}]+)\}", REFERENCES))
    for path in TEACHING:
        section = markdown(path).split("## Further reading")[1].split("\n---\n")[0]
        links = re.findall(r"\]\((https?:[^)]+)\)", section)
        assert 2 <= len(links) <= 5
        assert set(links) <= known, path.name
