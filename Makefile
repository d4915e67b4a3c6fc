# A fresh machine needs only Python 3.11, 3.12 or 3.13: each target creates .venv and installs its packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Every page is read again, so that every warning is printed again.
SPHINX := --quiet --fresh-env --keep-going --doctree-dir docs/_build/doctrees
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help fit test slow check format docs links upgrade tensorboard clean

help:  ## List the targets
	@sed -nE 's/^([a-z]+):.*## +(.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

fit: $(VENV)/.installed  ## Train the default network; ARGS="--epochs 1" passes options
	@$(BIN)/trainer fit $(ARGS)

test: $(VENV)/.installed-dev  ## Run the tests (offline, about three minutes on two cores)
	$(BIN)/python -m pytest $(ARGS)

slow: $(VENV)/.installed-dev  ## Run the slow tests: whole processes, killed and resumed
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(VENV)/.installed-dev  ## Lint, formatting, types, layers of imports, private names, spelling, prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_private_names.py
	$(BIN)/codespell *.md docs/*.md trainer scripts configs
	$(BIN)/proselint --config .proselintrc.json check *.md docs/*.md

format: $(VENV)/.installed-dev  ## Fix lint and formatting where possible
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev  ## Build the documentation in docs/_build/html, check its links
	$(BIN)/sphinx-build $(SPHINX) --fail-on-warning --builder html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

links: $(VENV)/.installed-dev  ## Check the links of the documentation to other sites
	$(BIN)/sphinx-build $(SPHINX) --builder linkcheck docs docs/_build/links

upgrade: $(BIN)/python  ## Write constraints.txt with newer packages, and test them; ARGS="keras=3.16" moves a bound
	$(BIN)/python scripts/upgrade.py $(ARGS)
	@$(MAKE) --no-print-directory check test ARGS=

tensorboard: $(VENV)/.installed  ## Open TensorBoard on the runs
	$(BIN)/trainer tensorboard

clean:  ## Remove the environment and caches; runs and data stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info build docs/_build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "expected Python 3.11 to 3.13, received %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV)

# The stamp is written last: an interrupted installation is continued.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing trainer and its packages into $(VENV) (about 2.5 GB, once)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing packages for tests and checks into $(VENV) (once)"
	@$(PIP) --editable '.[dev]'
	@touch $@
