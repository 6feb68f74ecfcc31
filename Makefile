# The work on this repository; `make help` lists the targets.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
UV := 0.13.9
RUN := runs/demo
WORKERS ?= 3
SEED ?= 1
COUNT ?= 100
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
ROUNDED := tests/emulator/test_bitsandbytes.py tests/client/test_rounded_weights.py

.PHONY: help setup demo test test-quick check protos tree docs bench mutants lock wheel clean

help: ## lists the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# A GPU user sets TORCH to the build that fits the driver, for example: make demo TORCH="torch==2.13.0 --index-url URL".
# torch is in no lock, since each build has hashes of its own; to hold it to one as well, TORCH="--require-hashes -r FILE".
LOCKED := --require-hashes --no-deps --requirement
$(BIN)/.ready: pyproject.toml requirements-dev.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(LOCKED) requirements-dev.lock
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	$(BIN)/pip check
	touch $@

setup: $(BIN)/.ready ## makes the virtual environment with pinned packages

demo: setup ## fetches model and texts once, then fine-tunes through an emulator, privately; report in runs/demo
	$(BIN)/offsite prepare --out runs/demo.toml
	rm -rf $(RUN)
	$(BIN)/offsite simulate runs/demo.toml --out $(RUN)

# bitsandbytes lies beside the environment: PEFT imports it wherever it finds it, 48 MB and a second for each process.
$(VENV)/extra/.ready: $(BIN)/.ready requirements-extra.lock
	$(BIN)/pip install --quiet $(LOCKED) requirements-extra.lock --upgrade --target $(VENV)/extra
	touch $@

# tests/schedule.py says which worker takes which tests. Three on two cores: a federation waits for half of its time.
test: setup $(VENV)/extra/.ready ## runs all tests: about fifty minutes on two cores
	$(PYTEST) -n $(WORKERS)
	OFFSITE_FAKE_DEVICE=1 $(PYTEST) -n $(WORKERS) tests/devices
	PYTHONPATH=$(VENV)/extra $(PYTEST) $(ROUNDED)

# Every test runs but for these three kinds, and of the large tables two rows each.
test-quick: setup ## runs the tests for the working day: no federation, nothing slow, no statistics, two cases of each
	$(PYTEST) -n $(WORKERS) --cases 2 -m "not processes and not slow and not statistical"

check: setup ## lint, format, types, import contracts, generated stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m offsite.protos.fresh

protos: setup ## generates the stubs from protos/*.proto
	$(BIN)/python -m offsite.protos.fresh --write

tree: setup ## draws docs/tree.md from the first line of each file
	$(BIN)/python -m tests.tree

docs: setup ## writes the generated pages of docs/ anew, and builds the site in build/site; a broken link fails
	$(BIN)/python -m tests.docs.generate
	$(BIN)/zensical build --strict --config-file mkdocs.yml

bench: setup $(VENV)/extra/.ready ## compares secure aggregation with Flower's and with CKKS in one process
	PYTHONPATH=$(VENV)/extra $(BIN)/python -m bench.secagg --sizes 1e6 1e7 --members 10

mutants: setup ## changes the code in small ways and counts what the tests notice; hours; SEED, COUNT
	HF_HUB_OFFLINE=1 $(BIN)/python -m bench.mutants --seed $(SEED) --count $(COUNT)

lock: ## writes the lock files: versions and hashes of all packages; UPGRADE=--upgrade takes the newest
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet uv==$(UV)
	build/lock/bin/python deploy/lock.py $(UPGRADE)

wheel: setup ## builds the wheel in dist, the same bytes on every machine
	$(BIN)/pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir dist .

clean: ## removes the virtual environment and run folders
	rm -rf $(VENV) runs dist
