# Two commands do the work: `make repro` and `make test`. Both set up what they need.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
THREADS ?= 2
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

repro: $(BIN)/.synced  ## Rebuild everything that is stale, stages side by side (JOBS=n)
	python -m pipelines.run -j $(JOBS)

flow: $(BIN)/.synced  ## The same as a Prefect flow
	python -m pipelines.flows -j $(JOBS)

serve: $(BIN)/.synced  ## Prefect's server, a worker and the schedules, at http://127.0.0.1:4200
	python -m pipelines.serve

test: $(BIN)/.synced  ## Run the tests (minutes)
	python -m pytest -q -m "not slow"

test-slow: $(BIN)/.synced  ## Run the long tests too: kills, many processes, servers
	python -m pytest -q

lint: $(BIN)/.synced  ## Check style, format and types
	ruff check .
	ruff format --check .
	mypy

doctor: $(BIN)/.synced  ## Say what is wrong with this machine, and what to do about it
	python -m pipelines.doctor

ui: $(BIN)/.synced  ## Open the tracked runs in MLflow, at the address that it tells
	exec python -m pipelines.ui

benchmark: $(BIN)/.synced  ## Time samplers, MEG, flows and orchestration beside their peers (THREADS=n)
	uv pip install -q --python $(BIN)/python --group benchmark
	python -m benchmarks.samplers --threads $(THREADS)
	python -m benchmarks.meg --threads $(THREADS)
	python -m benchmarks.flow --threads $(THREADS)
	python -m benchmarks.orchestration

$(BIN)/.synced: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	command -v uv >/dev/null || { $(BIN)/python -m ensurepip >/dev/null && $(BIN)/python -m pip install -q uv; }
	uv pip install -q --compile-bytecode --require-hashes --python $(BIN)/python -r requirements.lock
	touch $@

.PHONY: help repro flow serve test test-slow lint doctor ui benchmark
