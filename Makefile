# `make quickstart` and `make test` are all the set-up: each builds the virtual environment first.
VENV ?= .venv
PYTHON ?= python3
RUN ?= runs/quickstart
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow test-oldest lint format environment clean

quickstart: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" recipes/quickstart.sh $(RUN)

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n 2 --dist loadscope --durations=15 -m 'not slow'

# Launchers with several processes, kills and resumes, DeepSpeed: what takes minutes rather than milliseconds.
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q --durations=15 -m slow

# What touches transformers' interfaces, with the oldest release that pyproject.toml allows.
OLDEST = $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)

test-oldest:
	$(MAKE) environment VENV=$(VENV)-oldest PIN="transformers==$(OLDEST)"
	$(VENV)-oldest/bin/python -m pytest -q -n 2 --dist loadscope -m 'not slow' \
		tests/ops tests/decoding tests/models tests/evaluation tests/export tests/training tests/programs

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

environment: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@start=$$(date +%s); \
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test]' $(PIN) && \
	echo "installed in $$(( $$(date +%s) - start )) s"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest build *.egg-info
