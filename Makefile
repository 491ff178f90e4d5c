# make demo          answers with and without the plugin, side by side, on the CPU
# make test          the test suite
# BACKEND=cuda make  the same with vLLM for NVIDIA GPUs

PYTHON ?= python3
export BACKEND ?= cpu
BIN := .venv/bin

.PHONY: demo test lint setup clean

demo: setup
	$(BIN)/vllm-specplus demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Returns at once when nothing changed.
setup:
	@$(PYTHON) scripts/setup.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
