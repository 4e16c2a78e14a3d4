# `make demo` and `make test` each set themselves up: uv where it is installed, else venv and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := train,export,docs,dev

.PHONY: demo demo-detection demo-segmentation test test-fast lint parity docs clean

$(VENV)/.ready: pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
	  test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) $(VENV); \
	  uv pip install --quiet --python $(BIN)/python -e ".[$(EXTRAS)]" -c constraints.txt; \
	else \
	  test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]" -c constraints.txt; \
	fi
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m zoo.tools.demo

demo-detection demo-segmentation: demo-%: $(VENV)/.ready
	$(BIN)/python -m zoo.tools.demo_dense $*

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

parity: $(VENV)/.ready
	$(BIN)/python -m tests.parity

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
