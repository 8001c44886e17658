.DEFAULT_GOAL := help
.PHONY: help setup tutorial test test-colab lab notebooks check lock book audit badges
PYTHON := .venv/bin/python
BOOK := build/book

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s%s\n", $$1, $$2}' Makefile

setup: ## .venv from requirements.lock; every other target does it too
	@command -v python3 >/dev/null || { echo "python3 is missing: install Python 3.11 to 3.13" \
		"(Debian, Ubuntu: sudo apt install python3 python3-venv; macOS: brew install python@3.13)" >&2; exit 1; }
	@python3 tools/setup.py

tutorial: setup ## run every notebook into build/notebooks/, offline, on any CPU
	@$(PYTHON) -m tools.notebooks run

# Two processes, each with one thread: see tests/conftest.py.
test: setup ## all tests
	@$(PYTHON) -m pytest -q -n 2 --dist worksteal

test-colab: setup ## notebooks 01 to 06 on the versions that Colab has, installed in build/colab
	@$(PYTHON) -m tools.colab

lab: setup ## open the notebooks in JupyterLab
	@$(PYTHON) -m jupyterlab notebooks

notebooks: setup ## run the stale notebooks (ALL=1: all) and put them back with their outputs, to be committed
	@$(PYTHON) -m tools.notebooks commit $(if $(ALL),--all)

check: setup ## style, and the quick tests: about a minute
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m pytest -q -n 2 --dist worksteal --ignore=tests/slow

# Pins that still fit are kept; delete requirements.lock first to move every one.
lock: setup ## bring requirements.lock up to requirements.txt and pyproject.toml
	@$(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
		--custom-compile-command "make lock" requirements.txt --group dev --output-file requirements.lock

book: setup ## the notebooks, with their outputs, as a website in build/book/; a link that leads nowhere is an error
	@rm -rf $(BOOK)
	@$(PYTHON) -m sphinx -b html -c docs -d $(BOOK)-doctrees --fresh-env --fail-on-warning --nitpicky --quiet . $(BOOK)
	@echo "$(BOOK)/index.html"

# Strict: without it, an index that answers for no package at all passes as "No known vulnerabilities".
audit: setup ## known vulnerabilities of what requirements.lock installs on this system; needs the package index
	@$(PYTHON) -m uv tool run pip-audit==2.10.1 --requirement requirements.lock --no-deps --disable-pip --strict --progress-spinner off

badges: setup ## REPOSITORY=owner/name: point badges and clone addresses to a fork
	@$(PYTHON) -m tools.notebooks badges "$(REPOSITORY)"
