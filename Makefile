PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo tune test test-torch test-gpu sanitize static lint types format doctor clean

help: ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt mhc_tile/_version.py
	@echo "Setting up $(VENV), once: torch, TileLang and the tools (about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## Train residual, HC and mHC on real text and write a report with pictures
	$(BIN)/mhc-tile demo

tune: $(READY) ## Fit the kernels to this machine's GPU
	$(BIN)/mhc-tile autotune --preset paper

test: $(READY) ## Every test that needs no GPU, in parallel
	$(BIN)/python -m pytest -n auto -m "not gpu" --durations 10

# A torch wants a CUDA runtime and a setuptools of its own; the pinned runtime, whose headers nvcc
# reads, takes its place.
test-torch: ## The same with another torch, in build/torch-VERSION: make test-torch TORCH=2.10.0
	@$(if $(TORCH),,$(error test-torch: TORCH must be a version, as in make test-torch TORCH=2.10.0))
	@mkdir -p build && grep -Ev '^(torch|setuptools|nvidia-.*)==' constraints.txt > build/constraints.txt
	@$(PYTHON) -m venv build/torch-$(TORCH)
	build/torch-$(TORCH)/bin/python -m pip install -qq --disable-pip-version-check -c build/constraints.txt -e '.[dev]' torch==$(TORCH)
	build/torch-$(TORCH)/bin/python -m pip install -qq --disable-pip-version-check --no-deps `grep ^nvidia- constraints.txt`
	build/torch-$(TORCH)/bin/python -m pytest -n auto -m "not gpu" --durations 10

test-gpu: $(READY) ## The GPU's tests, on a machine that has one
	$(BIN)/python -m pytest -m gpu

sanitize: $(READY) ## Every kernel under compute-sanitizer, on a machine with a GPU and the CUDA toolkit
	for tool in memcheck initcheck "racecheck --kernel-name-exclude kns=pre_backward_persistent"; do compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python tests/sanitize.py || exit 1; done

static: $(READY) ## Registers, shared memory, launches and bytes against perf/static/, without a GPU
	$(BIN)/mhc-tile perf gate --static

lint: $(READY) ## Style and formatting, as CI checks them
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY) ## Types, read from the wheel, where the packages have their installed places
	rm -rf build/types && $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w build/types .
	cd build/types && ../../$(BIN)/python -m zipfile -e *.whl . && ../../$(BIN)/mypy --config-file ../../pyproject.toml mhc_tile

format: $(READY) ## Format and mend what can be mended
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

doctor: $(READY) ## What is here, what is missing, how to mend it
	$(BIN)/mhc-tile doctor

clean: ## Remove the virtual environment, builds and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache && find . -name __pycache__ -prune -exec rm -rf {} +
