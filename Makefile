# make demo      train the paper's network on digits under every kind of feedback, and draw the result
# make test      the tests that every change must pass, and the notebooks
# make test-all  all tests, and the checks of style and types
# make lint      style and types alone

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two test processes on two cores: more threads in each would only wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

NOTEBOOKS := $(PYTEST) --nbmake analysis/notebooks

.PHONY: demo test test-all lint install clean

demo: install
	$(BIN)/python recipes/liao2016/demo.py

test: install
	$(PYTEST) -m "not slow"
	$(NOTEBOOKS)

test-all: install lint
	$(PYTEST)
	$(NOTEBOOKS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@echo "Installing feedbackhook and PyTorch into $(VENV): some gigabytes and minutes, this once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
