"""Configure the book: README and notebooks, with their committed outputs, as pages.

`make book` builds it. The pages need no network.
"""

import json
import re
import shutil
from fnmatch import fnmatch

from ipython_pygments_lexers import IPython3Lexer

from tools.notebooks import ROOT, home  # found because `python -m sphinx` starts in the root

HOME = home()
GITHUB = f"https://github.com/{HOME['repository']}"
BADGE = re.compile(r"\[!\[([^]]*)\](?:\(https?:[^)]*\)|\[\w+\])\]")
# A relative link, as in [text](folder/file#anchor): the file, and what follows it.
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])([^)\s#]+)([^)\s]*)(?=\))")
CONTENTS = (ROOT / "docs" / "contents.md").read_text(encoding="utf-8")

project = "vlm-dpo"
html_title = "Preference-tune a vision language model"
extensions = ["myst_nb", "sphinx-mathjax-offline", "sphinxcontrib.bibtex"]
bibtex_bibfiles = ["references.bib"]
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/glossary.md",
    "docs/references.md",
    "embedded/README.md",
    "tests/README.md",
    "notebooks/*.ipynb",
]
exclude_patterns = [".*", "build", "runs"]
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "sphinx_book_theme"
html_show_search_summary = False  # a page opened as a file may not fetch others
html_static_path = ["book.css"]
html_css_files = ["book.css"]
html_context = {"default_mode": "auto"}
html_theme_options = {
    "repository_url": GITHUB,
    "repository_branch": HOME["branch"],
    "use_repository_button": True,
    "navbar_persistent": [],  # a second search field, above the one in the sidebar
    "footer_content_items": [],
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
}


def prepare(app, docname, source):
    """Change the source of a page to what the book needs.

    Badges become links. Links to files that have no page lead to GitHub. The README gets the table
    of contents.
    """

    def book_address(match):
        file, anchor = match.groups()
        place = (ROOT / docname).parent.joinpath(file).resolve()
        # It is code, such as functions[0](x), or a wrong link, which Sphinx will name.
        if not place.exists():
            return match[0]
        name = place.relative_to(ROOT).as_posix()
        has_page = any(fnmatch(name, pattern) for pattern in include_patterns)
        if has_page or place.suffix == ".png":
            return match[0]
        kind = "tree" if place.is_dir() else "blob"
        return f"{GITHUB}/{kind}/{HOME['branch']}/{name}{anchor}"

    text = source[0]
    if docname.startswith("notebooks/"):
        text = numbered(text, docname)
    text = BADGE.sub(r"[\1]", text)  # as images they would be fetched from another host
    text = LINK.sub(book_address, text)
    if docname == root_doc:
        text += f"\n\n{CONTENTS}"
    source[0] = text


def numbered(text, docname):
    """Return a notebook with its number in the title, and its set-up cell folded."""
    notebook = json.loads(text)
    number = docname.removeprefix("notebooks/")[:2]
    title = notebook["cells"][0]["source"]
    title[0] = title[0].replace("# ", f"# {number} · ", 1)
    setup_cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    setup_cell["metadata"]["tags"] = ["hide-input"]
    return json.dumps(notebook, ensure_ascii=False)


def finish(app, error):
    """Copy the front page to index.html, which a folder's address shows."""
    if not error and app.builder.name == "html":
        shutil.copy(app.outdir / "README.html", app.outdir / "index.html")


def setup(app):
    """Connect the functions above to Sphinx, which calls this one by its name."""
    app.add_lexer("python", IPython3Lexer)  # code cells may hold `!git` and `%pip`
    app.connect("source-read", prepare)
    app.connect("build-finished", finish)
