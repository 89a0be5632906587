# One environment, .venv, made the first time it is needed and again when pyproject.toml changes.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers
MUTMUT := $(VENV)/.mutmut
# Tried in this order; name another one with: make demo PYTHON=/path/to/python
PYTHON := python3 python3.11 python3.12 python3.13 python3.14 python

# Tests run on several cores, each in a process of its own; it is said why some are skipped.
PYTEST := -m pytest -n auto --maxprocesses=4 --dist=worksteal -rs

.DEFAULT_GOAL := help
.PHONY: help demo demo-seeds fine-tuning ablations test test-slow test-long test-lower test-coverage parity bench coverage mutants mutation check format docs docs-serve dist clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: $(READY) ## Train a tiny Flamingo on handwritten digits; writes runs/train_tiny
	@$(BIN)/python examples/train_tiny.py --out runs/train_tiny

demo-seeds: $(READY) ## Run the demo with five seeds, about ten minutes; writes the figures in docs/assets
	@$(BIN)/python docs/figures/few_shot.py

fine-tuning: $(READY) ## Fine-tune the models of demo-seeds, twenty minutes; writes the figures in docs/assets
	@$(BIN)/python docs/figures/fine_tuning.py

ablations: $(READY) ## Run the paper's ablations in miniature, two hours, can be stopped; writes docs/assets/ablations
	@$(BIN)/python docs/figures/ablations.py

test: $(READY) ## Run the tests, then those that must run without run-time shape checks
	@$(BIN)/python $(PYTEST)
	@$(BIN)/python $(PYTEST) -o addopts="" -m "unchecked and not slow" tests

test-slow: $(READY) ## Run the tests that take long, or need a tool of their own: lm-eval
	@$(BIN)/python $(PYTEST) -m "slow and not unchecked" tests docs
	@$(BIN)/python $(PYTEST) -o addopts="" -m "slow and unchecked" tests

test-long: $(READY) ## Run the tests with 2,000 examples a law instead of 50, and each language model with each backbone
	@HYPOTHESIS_PROFILE=long $(BIN)/python $(PYTEST) tests

test-lower: ## Run the tests, the slow ones too, with the oldest supported versions, in an environment of its own
	@$(MAKE) --no-print-directory test test-slow VENV=.venv-lower CONSTRAINTS="-c tests/lower.txt"

test-coverage: $(READY) ## Run the tests and count the lines of the package that they reach; fails under 95%
	@$(BIN)/python $(PYTEST) --cov=flamingo_blocks --cov-report=
	@$(BIN)/python $(PYTEST) -o addopts="" -m "unchecked and not slow" --cov=flamingo_blocks --cov-append --cov-fail-under=95 tests

parity: $(PEERS) ## Compare what is loaded with OpenFlamingo and flamingo-pytorch themselves, which it installs
	@$(BIN)/python $(PYTEST) tests/parity

bench: $(PEERS) ## Measure against other implementations, half an hour on one core; writes docs/benchmarks
	@$(BIN)/python -m benchmarks

coverage: $(READY) ## Try every language model and every backbone, up to an hour, can be stopped; writes docs/coverage
	@$(BIN)/python -m tests.coverage.language_models
	@$(BIN)/python -m tests.coverage.vision_encoders

mutants: $(READY) ## Show that each law can fail: put a bug in, see its test fail, half an hour; writes tests/README.md
	@$(BIN)/python tests/mutants.py

mutation: $(MUTMUT) ## Put 2,500 small bugs into the blocks, twenty minutes, can be stopped; says which no test sees
	@OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=mutation $(BIN)/python -m mutmut run
	@$(BIN)/python -m mutmut results
	@$(BIN)/python -m mutmut export-cicd-stats

check: $(READY) ## Check format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(READY) ## Format the code and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(READY) ## Build the documentation site into site/
	@$(BIN)/mkdocs build --strict

docs-serve: $(READY) ## Serve the documentation site while you edit it
	@$(BIN)/mkdocs serve

dist: $(READY) ## Build sdist and wheel into dist/, and try the wheel in an empty environment: 6 GB, some minutes
	@rm -rf dist
	@$(BIN)/python -m build
	@$(BIN)/python -m twine check --strict dist/*
	@$(BIN)/python -m tests.wheel dist/*.whl

clean: ## Remove what the other targets made, the environments too
	rm -rf .venv .venv-lower .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage dist mutants runs site

# The environment's own pip is not needed, so that neither Debian's python3-venv is.
$(READY): pyproject.toml
	@found=; usable=; \
	for python in $(PYTHON); do \
		version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
		found="$$found $$python ($$version)"; \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' && usable=$$python && break; \
	done; \
	if [ -z "$$usable" ]; then \
		echo "flamingo-blocks needs Python 3.11 or newer; found:$${found:- none}." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi; \
	if ! $$usable -m pip --version >/dev/null 2>&1; then \
		echo "$$usable has no pip: install it (Debian: apt install python3-pip), or name another Python with PYTHON=." >&2; \
		exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$usable: once, a few minutes, about 6 GB (most of it torch)."; \
	$$usable -m venv --without-pip $(VENV) && \
	$$usable -m pip --python $(BIN)/python install --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]'
	@touch $@

$(PEERS): $(READY) benchmarks/peers.txt
	@python=$$($(BIN)/python -c 'import sys; print(sys._base_executable)') && \
	$$python -m pip --python $(BIN)/python install --disable-pip-version-check --no-deps -r benchmarks/peers.txt
	@touch $@

$(MUTMUT): $(READY)
	@python=$$($(BIN)/python -c 'import sys; print(sys._base_executable)') && \
	$$python -m pip --python $(BIN)/python install --disable-pip-version-check 'mutmut>=3.8,<4'
	@touch $@
