# make demo                 answers with and without the plugin, side by side, on the CPU
# make check                lint, types, and all tests without an engine: before every commit
# make engine-test T=...    one test that starts an engine, as T=tests/engine/test_greedy.py -k jacobi
# make test                 every test but the long ones, as CI runs them
# make full                 the long ones; stamps them in tests/full.json, which make test checks
# make figures              figures of README.md and docs/ from benchmarks/results
# make check-vllm           is all we take from vLLM in the source of every supported version?
# BACKEND=cuda make ...     the same with vLLM for NVIDIA GPUs

PYTHON ?= python3
export BACKEND ?= cpu
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
IN_PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
T ?=

.PHONY: demo check test full engine-test figures check-vllm lint types setup clean

demo:
	@$(PYTHON) scripts/setup.py --demo
	@$(BIN)/vllm-specplus demo

check: lint types
	$(PYTEST) $(IN_PARALLEL) -m "not engine and not slow" $(PYTEST_ARGS)

test: setup
	$(PYTEST) $(IN_PARALLEL) $(PYTEST_ARGS)

# Beside a CPU build of torch, torchvision breaks what imports it: it stays apart, for some tests.
full: setup
	@test -d build/torchvision || $(BIN)/python -m pip install --quiet --no-deps \
		--target build/torchvision torchvision==0.28.0
	$(PYTEST) $(IN_PARALLEL) --full $(PYTEST_ARGS)

engine-test: setup
	@test -n "$(T)" || { echo "name a test: make engine-test T='tests/engine/test_greedy.py -k jacobi'"; exit 2; }
	$(PYTEST) -x $(T)

# Needs no more than Python.
figures:
	@$(PYTHON) scripts/figures.py

check-vllm: setup
	$(BIN)/python scripts/check_vllm.py --installed --wheel 0.32.0 --wheel 0.33.0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Returns at once when nothing changed.
setup:
	@$(PYTHON) scripts/setup.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
