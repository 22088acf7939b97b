# Everything runs in .venv, made with plain venv and pip. A stamp per extra says that it is
# installed; it is made again only when pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: demo test test-all check docs bench bench-quick clean

demo: $(VENV)/.installed-examples
	$(BIN)/python examples/digits.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=30 --doctest-modules tests hypergrad

# With torch, grain, ray, wandb and the dashboard: no test skips for want of a package.
test-all: $(VENV)/.installed-everything
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=30 --doctest-modules tests hypergrad

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Into site/: open site/index.html. A broken link is an error (not under --quiet, which hides it).
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The extra brings the PostgreSQL driver, too; without a server its rows say so.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.every

bench-quick: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.every --quick

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable, so that the sources are what runs, and both extras can share one environment.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
