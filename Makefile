PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo tune test test-torch test-gpu sanitize static lint types docs format doctor clean

help: ## Print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt mhc_tile/_version.py
	@echo "Setting up $(VENV), once: torch, TileLang and the tools (about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## Train residual, HC and mHC on real text, write a report with pictures
	$(BIN)/mhc-tile demo

tune: $(READY) ## Fit the kernels to the GPU of this machine
	$(BIN)/mhc-tile autotune --preset paper

test: $(READY) ## Run every test that needs no GPU, in parallel
	$(BIN)/python -m pytest -n auto -m "not gpu" --durations 10

# A torch wants a CUDA runtime and a setuptools of its own; the pinned runtime, whose headers nvcc
# reads, takes its place.
test-torch: ## Run these tests with another torch: make test-torch TORCH=2.10.0
	@$(if $(TORCH),,$(error test-torch: TORCH must be a version, as in make test-torch TORCH=2.10.0))
	@mkdir -p build && grep -Ev '^(torch|setuptools|nvidia-.*)==' constraints.txt > build/constraints.txt
	@$(PYTHON) -m venv build/torch-$(TORCH)
	build/torch-$(TORCH)/bin/python -m pip install -qq --disable-pip-version-check -c build/constraints.txt -e '.[dev]' torch==$(TORCH)
	build/torch-$(TORCH)/bin/python -m pip install -qq --disable-pip-version-check --no-deps `grep ^nvidia- constraints.txt`
	build/torch-$(TORCH)/bin/python -m pytest -n auto -m "not gpu" --durations 10

test-gpu: $(READY) ## Run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

sanitize: $(READY) ## Run every kernel under compute-sanitizer (needs a GPU and the CUDA toolkit)
	for tool in memcheck initcheck "racecheck --kernel-name-exclude kns=pre_backward_persistent"; do compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python tests/sanitize.py || exit 1; done

static: $(READY) ## Compare registers, shared memory, launches and bytes with perf/static/ (no GPU)
	$(BIN)/mhc-tile perf gate --static

lint: $(READY) ## Check style and formatting
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY) ## Check types, in links that give every package its installed place (editors follow them)
	rm -rf build/types && mkdir -p build/types/mhc_tile
	ln -s $(addprefix $(CURDIR)/,$(filter-out mhc_tile/__pycache__,$(wildcard mhc_tile/*)) kernels autotune perf) build/types/mhc_tile
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml mhc_tile

docs: $(READY) ## Build the documentation in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@! grep -rlE '<(script|link|img|iframe)[^>]+(src|href)="https?:' build/docs || { echo "docs: pages must load nothing from the network"; exit 1; }

format: $(READY) ## Format, and fix what can be fixed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

doctor: $(READY) ## Name what is here, what is missing, and what to do about it
	$(BIN)/mhc-tile doctor

clean: ## Remove the virtual environment, builds and caches; keep runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache && find . -name __pycache__ -prune -exec rm -rf {} +
