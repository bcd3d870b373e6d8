# Everything runs in .venv of this checkout, which the first target that needs it creates.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed  ## Attack a ResNet-50 and a small CNN four ways, print the tables, write the picture.
	$(BIN)/gradprune demo

test: .venv/installed  ## The whole test suite.
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: .venv/installed  ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# Tests compare attacks with these. By their metadata they want old releases of what is installed.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps torchattacks foolbox adversarial-robustness-toolbox
	touch $@

clean:
	rm -rf .venv build dist *.egg-info demo-output
