# Every target creates what it needs; `make demo` and `make test` are the two to start with.
# The GPU targets use the interpreter at hand (GPU_PYTHON) and fetch nothing.

PYTHON     ?= python3
GPU_PYTHON ?= python3
VENV       ?= .venv
BIN        := $(VENV)/bin
INSTALLED  := $(VENV)/.installed
WORKERS    ?= 2

.PHONY: setup demo test lint test-gpu bench bench-gpu judge clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints/cpu.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e '.[dev]'
	@touch $@

# Two of the example rows are malformed on purpose: exit code 1 says so, anything else is a failure.
demo: $(INSTALLED)
	@mkdir -p out
	$(BIN)/adajudge score examples/pairs.jsonl --output out/demo.jsonl --table; test $$? -eq 1
	@echo; echo "The same from Python, examples/score.py:"; echo
	$(BIN)/python examples/score.py

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --durations=5
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --durations=5 -k triton-cpu \
		tests/kernels tests/adajudge/test_judge_on_triton.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-gpu:
	PYTHONPATH=.:python $(GPU_PYTHON) -m pytest tests -m gpu

bench: $(INSTALLED)
	@mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/cpu.json

bench-gpu:
	@mkdir -p benchmarks/results
	PYTHONPATH=.:python $(GPU_PYTHON) -m pytest benchmarks --benchmark-only --device cuda \
		--benchmark-json=benchmarks/results/gpu.json

# The built-in judge from nothing: world, backbone, heads, baselines, card. Under 30 minutes on 2 cores.
judge: $(INSTALLED)
	$(BIN)/python -m adajudge.builtin.build

clean:
	rm -rf $(VENV) out build dist *.egg-info
