# install  the package and its tools into .venv        demo      the main job on synthetic data, set-up included
# test     the suite of minutes, set-up included       test-all  lint, test, and the slow tests
# lint     ruff, mypy, import-linter                   bench     NAME=ingest: one benchmark, ratio printed
# chaos    SEEDS=50: the long kill campaign
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 50
# Tests that kill processes, serve, run whole clusters, watch the golden tables or race for a lock (on an S3 server whose
# conditional put is not quite one step): two at a time would disturb each other.
ALONE := tests/benchmarks tests/chaos tests/integration tests/serving tests/storage

.PHONY: install demo test test-all lint bench chaos clean

install: $(VENV)/installed

# The marker is written last: a set-up that was interrupted starts again.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "raypipe needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/raypipe dataset synthetic --folder build/demo/data --users 500 --items 400 --events 30000
	$(BIN)/raypipe nightly --config jobs/nightly-demo.yaml

test: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(addprefix --ignore ,$(ALONE))
	$(BIN)/python -m pytest -m "not slow" $(ALONE)

test-all: lint test
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m tests.benchmarks.$(NAME) $(ARGS)

chaos: install
	CHAOS_SEEDS=$(SEEDS) $(BIN)/python -m pytest tests/chaos -m chaos -s --timeout 0

clean:
	rm -rf build
