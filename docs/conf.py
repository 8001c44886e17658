"""The book: README and notebooks, with their committed outputs, as pages that need no network. `make book` builds it."""

import json
import re
import shutil
from fnmatch import fnmatch

from ipython_pygments_lexers import IPython3Lexer

from tools.notebooks import ROOT, home  # found because `python -m sphinx` starts in the root

HOME = home()
GITHUB = f"https://github.com/{HOME['repository']}"
BADGE = re.compile(r"\[!\[([^]]*)\](?:\(https?:[^)]*\)|\[\w+\])\]")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])([^)\s#]+)([^)\s]*)(?=\))")
CONTENTS = (ROOT / "docs" / "contents.md").read_text(encoding="utf-8")

project = "vlm-dpo"
html_title = "Preference-tune a vision language model"
extensions = ["myst_nb", "sphinx-mathjax-offline"]
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
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
    """The source of a page as the book has it: no badge, links to files that are no page lead to GitHub, contents after the README."""

    def address(match):
        place = (ROOT / docname).parent.joinpath(match[1]).resolve()
        if (
            not place.exists()
        ):  # no link but code, such as functions[0](x), or a wrong link, which Sphinx will name
            return match[0]
        name = place.relative_to(ROOT).as_posix()
        if place.suffix == ".png" or any(fnmatch(name, pattern) for pattern in include_patterns):
            return match[0]
        return f"{GITHUB}/{'tree' if place.is_dir() else 'blob'}/{HOME['branch']}/{name}{match[2]}"

    text = numbered(source[0], docname) if docname.startswith("notebooks/") else source[0]
    text = BADGE.sub(r"[\1]", text)  # as pictures they would be fetched from another host
    source[0] = LINK.sub(address, text) + (f"\n\n{CONTENTS}" if docname == root_doc else "")


def numbered(text, docname):
    """A notebook with its number in the title, as the texts speak of it, and its set-up cell folded."""
    notebook = json.loads(text)
    title = notebook["cells"][0]["source"]
    title[0] = title[0].replace("# ", f"# {docname.partition('/')[2][:2]} · ", 1)
    setup_cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    setup_cell["metadata"]["tags"] = ["hide-input"]
    return json.dumps(notebook, ensure_ascii=False)


def finish(app, error):
    """The front page is also index.html, which a folder's address shows."""
    if not error and app.builder.name == "html":
        shutil.copy(app.outdir / "README.html", app.outdir / "index.html")


def setup(app):
    app.add_lexer("python", IPython3Lexer)  # code cells may hold `!git` and `%pip`
    app.connect("source-read", prepare)
    app.connect("build-finished", finish)
