# Every target creates what it needs; `make demo` and `make test` are the two to start with.
# The GPU targets use the interpreter at hand (GPU_PYTHON) and fetch nothing.

PYTHON     ?= python3
GPU_PYTHON ?= python3
VENV       ?= .venv
BIN        := $(VENV)/bin
PIP        := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints/cpu.txt
INSTALLED  := $(VENV)/.installed
BUILT      := $(VENV)/.built
SOURCES    := $(wildcard csrc/*.* csrc/*/*.*)
EMULATED   := build/emulated/_native.so
WORKERS    ?= 2
PYTEST     = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=5
ON_GPU      = PYTHONPATH=.:python $(GPU_PYTHON)
GPU_ARCH   ?= $(shell $(GPU_PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
GPU_NAME   ?= $(shell $(GPU_PYTHON) -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
GPU_WORKERS ?= 12
# What counts most comes first; what a call costs the CPU is not asked of a GPU. A folder beside its files would undo the order.
GPU_BENCHES := $(patsubst %,benchmarks/test_%.py,pooling scoring head depth_gate experts loss)
ALONE      := tests/kernels/test_gpu.py tests/adajudge/test_scoring_gpu.py
TODAY      := $(shell date +%F)
# Hundreds of processes import torch and transformers, which pip has not compiled: the first one leaves the bytecode.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-ray test-triton test-sanitizers test-arm lint build-gpu test-gpu bench bench-gpu bench-check judge clean

setup: $(BUILT)

# The build's own needs first, and no isolation: both builds then use the same pybind11, and the second finds the
# objects of the first, which are compiled while torch is fetched. What nobody imports is not compiled to bytecode.
$(INSTALLED): pyproject.toml setup.py native_build.py constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77' pybind11 ninja
	$(BIN)/python setup.py --quiet build_ext --inplace & $(PIP) torch && wait $$!
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

# What changed in csrc/ is compiled again.
$(BUILT): $(INSTALLED) $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# Two of the example rows are malformed on purpose: exit code 1 says so, anything else is a failure.
demo: $(BUILT)
	@mkdir -p out
	$(BIN)/adajudge score examples/pairs.jsonl --output out/demo.jsonl --table; test $$? -eq 1
	@echo; echo "The same from Python, examples/score.py:"; echo
	$(BIN)/python examples/score.py

test: lint
	$(PYTEST)
	$(BIN)/python -m benchmarks.check --short
	TRITON_INTERPRET=1 $(PYTEST) -k triton-cpu \
		tests/adajudge/test_judge_on_triton.py tests/kernels
	$(BIN)/python tests/cuda/emulated_module.py
	ADAJUDGE_TEST_MODULE=$(EMULATED) $(PYTEST) tests/kernels \
		-k 'cuda-cpu and not sequence_attention and not rms_norm and not swiglu' --ignore-glob='*/test_attention*'

# Ray is a third of a gigabyte: only who wants it installs it.
test-ray: $(BUILT)
	$(PIP) 'ray[data]>=2.60'
	$(BIN)/python -m pytest -n 0 tests/adajudge/test_scoring_ray.py

# Every Triton kernel for every architecture: minutes on a machine that has compiled none.
test-triton: $(BUILT)
	$(PYTEST) -m 'not gpu' tests/kernels/test_triton_compile.py

# The C++ test of the kernels with every check, on every instruction set of this processor and with every schedule of CUDA's
# emulated threads.
test-sanitizers: $(BUILT)
	$(BIN)/python tests/cpp/run.py --sanitize address,undefined

# The same program for ARM, in an emulator: Debian's g++-aarch64-linux-gnu and qemu-user.
test-arm: $(BUILT)
	CXX=aarch64-linux-gnu-g++ $(BIN)/python tests/cpp/run.py --folder build/cpp-arm \
		--under "qemu-aarch64 -L /usr/aarch64-linux-gnu"

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The module with kernels for the GPU at hand, by the interpreter at hand; the usual targets build all of it again.
build-gpu:
	@rm -f $(BUILT)
	TORCH_CUDA_ARCH_LIST=$(GPU_ARCH) ADAJUDGE_BUILD_CUDA=1 $(GPU_PYTHON) setup.py --quiet build_ext --inplace

# Kernels are compiled by many processes at once, into Triton's cache; tests that measure or fill the GPU's memory go alone.
test-gpu: build-gpu
	@status=0; \
	$(ON_GPU) -m pytest tests -m gpu $(ALONE:%=--ignore=%) -n $(GPU_WORKERS) --dist worksteal --durations=5 || status=1; \
	$(ON_GPU) -m pytest $(ALONE) -m gpu --durations=5 || status=1; \
	exit $$status

# One file of results for each device, the newest; the report is of all of them.
bench: $(BUILT)
	@mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/cpu-$(TODAY).json
	@find benchmarks/results -name 'cpu-*.json' ! -name '*-$(TODAY).json' -delete
	$(BIN)/python -m benchmarks.report --readme README.md

# What has not begun within the seconds is skipped: results are written at the end, and what counts most comes first. A case
# that fails costs only itself.
bench-gpu: build-gpu
	@mkdir -p benchmarks/results
	@status=0; name=$(GPU_NAME); \
	$(ON_GPU) -m pytest $(GPU_BENCHES) --benchmark-only --device cuda --within 400 \
		--benchmark-json=benchmarks/results/$$name-$(TODAY).json || status=1; \
	find benchmarks/results -name "$$name-*.json" ! -name '*-$(TODAY).json' -delete; \
	$(ON_GPU) -m benchmarks.report --readme README.md || status=1; \
	exit $$status

# Fails where our side has become slow beside eager.
bench-check: $(BUILT)
	$(BIN)/python -m benchmarks.check

# The built-in judge from nothing: world, backbone, heads, baselines, card. Under 30 minutes on 2 cores.
judge: $(BUILT)
	$(BIN)/python -m adajudge.builtin.build

clean:
	rm -rf $(VENV) out build dist *.egg-info adajudge_kernels/_native*
