# make demo          train the paper's network on digits with every kind of feedback, and plot the result
# make test          the tests that every change must pass, and the notebooks
# make docs          build the site into site/, strictly: a link that leads nowhere is an error
# make dist          build wheel and source distribution into dist/, and check them
# make test-all      all tests, lint included
# make test-nightly  the property tests with many fresh random examples
# make lint          style, types, spelling, and who imports whom

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two test processes on two cores: with more threads each, they would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

NOTEBOOKS := $(PYTEST) --nbmake analysis/notebooks

.PHONY: docs dist demo test test-all test-nightly lint install clean

demo: $(VENV)/.demo
	$(BIN)/python recipes/liao2016/demo.py

docs: install
	$(BIN)/python -m mkdocs build --strict

dist: install
	rm -rf dist build
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

test: install
	$(PYTEST) -m "not slow"
	$(NOTEBOOKS)

test-all: install lint
	$(PYTEST)
	$(NOTEBOOKS)

test-nightly: install
	$(PYTEST) -m hypothesis --hypothesis-profile=nightly

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python -m pytest -q tests/test_imports.py

install: $(VENV)/.installed

# The sizes were measured on Linux with Python 3.11 and torch 2.14, whose CUDA libraries are most of them.
$(VENV)/.installed: pyproject.toml
	@echo "Installing feedbackhook[dev] into $(VENV), once: 190 packages, about 7 GB on disk,"
	@echo "of which PyTorch with its CUDA libraries is 5.5 GB. This takes minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) ".[dev]"
	@touch $@ $(VENV)/.demo

$(VENV)/.demo: pyproject.toml
	@echo "Installing feedbackhook[experiments] into $(VENV), once: 70 packages, about 6 GB on disk,"
	@echo "of which PyTorch with its CUDA libraries is 5.5 GB. This takes minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) ".[experiments]"
	@touch $@

clean:
	rm -rf $(VENV) runs site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
