# Everything runs in .venv, made on first use and reused. `make help` lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
# The torch that `make install` asks pip for; the default is the range in pyproject.toml. Any pip argument may stand
# here, such as an exact version or a wheel file: make install TORCH="torch==2.12.1"
TORCH  ?= $(shell sed -n 's/^ *"\(torch[<>=][^"]*\)",$$/\1/p' pyproject.toml)
# Set to 1 to take a CUDA build on a machine without a GPU.
ALLOW_CUDA ?=
EXTRAS ?= test
OUT    ?= out
# Parts of `make demo`, all where none is named: speed, served, lost, scaled.
PART   ?=
# What the GPU targets run with: any interpreter with torch, triton, transformers and pytest, plugins or not. Nothing is
# installed.
GPU_PYTHON ?= $(firstword $(wildcard $(VENV)/bin/python) $(shell command -v python || command -v python3))
GPU_PYTEST := -o addopts= --import-mode=importlib -m "not lossless and not slow and not lane and not processors"

RUN   := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_ARGS := $(if $(findstring --,$(TORCH)),$(TORCH),"$(TORCH)")
GPU   := $(wildcard /dev/nvidia0 /dev/nvidiactl /dev/dxg)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: gpu help install demo serve test lane lint format protos lossless processors cluster bench test-gpu bench-gpu train clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv and install the package with its test tools

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed; name one with: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml | $(VENV)/bin/python
ifeq ($(GPU)$(ALLOW_CUDA),)
	@if $(RUN)/python -m pip install --dry-run --quiet --report - $(TORCH_ARGS) 2>/dev/null | grep -q '"name": *"nvidia-'; then \
	  echo "This machine has no GPU, but pip would take a CUDA build of torch (gigabytes)."; \
	  echo "Point pip at a CPU build (its own configuration, or: make TORCH='torch==<version>+cpu --find-links <folder>'),"; \
	  echo "or take the CUDA build all the same: make ALLOW_CUDA=1 $(MAKECMDGOALS)"; exit 1; fi
endif
	$(RUN)/python -m pip install --quiet $(TORCH_ARGS)
	$(RUN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	@touch $@

demo: $(STAMP) ## Speed, served, lost shard, scaling: minutes, live; PART=speed, served, lost or scaled is one of them
	$(RUN)/jetflow demo $(addprefix --part ,$(PART)) --output $(OUT)/demo

serve: $(STAMP) ## Serve the embedded model over gRPC on port 9000 until Ctrl-C
	$(RUN)/jetflow serve

# One thread each for those of OpenMP: small models gain nothing by two, which spin where other commands could run.
test: lint ## Lint, then the tests, with a part of the lossless proof
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q
	$(MAKE) --no-print-directory lane

lane: $(STAMP) ## Commands and lossless cases as on other processors, without compiler, on one core; run last by `make test`
	$(RUN)/python -m pytest -q -m "lane and not slow" tests/lane

lint: $(STAMP) ## ruff, import contracts, mypy, dependencies
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/lint-imports
	$(RUN)/mypy
	$(RUN)/python -m pip check
	$(RUN)/python -m jetflow_cluster.bench.audit

format: $(STAMP) ## Rewrite the sources as `make lint` wants them
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

protos: $(STAMP) ## Generate the code of the API from protos/ into jetflow_cluster/rpc
	$(RUN)/python -m grpc_tools.protoc --proto_path=protos --python_out=. --pyi_out=. --grpc_python_out=. \
	  $(patsubst protos/%,%,$(wildcard protos/jetflow_cluster/rpc/*/*.proto))

lossless: $(STAMP) ## The whole proof that speculation changes no token (up to an hour)
	$(RUN)/python -m pytest -q -rP -m "not slow" tests/lossless tests/distribution

processors: $(STAMP) ## The C kernels on SSE4.2, AVX2 and aarch64 by QEMU, and on this processor (a minute)
	@PYTHONPATH=.:kernels:tests $(RUN)/python -m support.processors
	$(RUN)/python -m pytest -q -rs -m "processors or not processors" tests/kernels/test_processors.py

cluster: $(STAMP) ## The slow tests: served shapes, lost processes, cancels, fuzzed requests, the pages' commands, the image (half an hour)
	$(RUN)/python -m pytest -q -m slow tests/cluster tests/router tests/test_docs.py tests/test_failed_starts.py \
	  tests/test_image.py tests/test_wheel.py

bench: $(STAMP) ## Measure against transformers on this machine; figures in out/bench
	$(RUN)/jetflow bench offline --output $(OUT)/bench

gpu:
	@$(GPU_PYTHON) -c 'import torch, triton, transformers, pytest; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)' \
	  || { echo "GPU_PYTHON=$(GPU_PYTHON): a CUDA device, torch, triton, transformers and pytest are needed"; exit 1; }

test-gpu: gpu ## On a CUDA device, from a checkout without installation: kernels, lossless, ranks
	PYTHONPATH=.:kernels $(GPU_PYTHON) -m pytest $(GPU_PYTEST) -q -rsP tests/kernels/interpreted/*_cases.py tests/kernels/test_compilations.py tests/gpu

bench-gpu: gpu ## On a CUDA device: the kernels beside scaled_dot_product_attention and FlexAttention; figures in out/kernels
	for op in tree_attention qk_norm_rope_store commit_kv build_tree accept_tree; do \
	  PYTHONPATH=.:kernels $(GPU_PYTHON) kernels/benchmarks/$$op.py --output $(OUT)/kernels || exit 1; done

train: $(STAMP) ## Rebuild the embedded model from nothing; resumes where it stopped
	$(RUN)/python -m jetflow_cluster.training.recipe

clean: ## Remove caches and outputs, not .venv and not the training state in build/train
	rm -rf $(OUT) dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
