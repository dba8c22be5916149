# Everything from a bare Python 3.11: `make demo`, `make test`. `make` alone lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# ONNX Runtime reports its use, model names included, to its maker unless told not to
export ORT_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## this list
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' \
	  | awk -F'\t' '{ printf "  make %-16s %s\n", $$1, $$2 }'

# One environment for all targets, made again when pyproject.toml changes.
# --group needs pip 25.1; a Python 3.11 comes with an older one.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable . --group dev
	@touch $@

.PHONY: venv
venv: $(READY) ## the environment in .venv, which the other targets make by themselves

.PHONY: demo
demo: $(READY) ## prune a trained model through a real server, and see what became of it
	$(BIN)/python examples/demo.py

.PHONY: test
test: lint ## lint, then all tests
	$(BIN)/python -m pytest

.PHONY: lint
lint: $(READY) ## ruff, mypy and buf; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint

.PHONY: format
format: $(READY) ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: protos
protos: $(READY) ## generate secateur/v1 from protos/
	$(BIN)/python scripts/generate_stubs.py

.PHONY: bench
bench: $(READY) ## print the figures of the main job, on the models that are here
	$(BIN)/python benchmarks/main.py

.PHONY: wheel-test
wheel-test: $(READY) ## build the wheel, install it alone, and prune with it
	$(BIN)/python scripts/check_wheel.py

.PHONY: container
container: ## build the image `secateur` with Docker
	docker build -t secateur .

.PHONY: container-test
container-test: $(READY) ## build the image, run it as the README says, prune through it; see deploy/
	$(BIN)/python deploy/check_container.py

.PHONY: clean
clean: ## remove the environment, caches and what was built
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find secateur tests examples benchmarks scripts deploy -name __pycache__ -type d \
	  -prune -exec rm -rf {} + 2>/dev/null || true
