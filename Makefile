# make pretrain: set up, build, and run the main job on demo data. make test: set up, build, and run the tests.
# Both work in .venv and are safe to repeat. TORCH picks another torch: make test TORCH="torch==2.11.0".

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
DATA ?= demo_data
RECIPE ?= --arch tiny --batch-size 32 --clip-seconds 2 --steps 2500 --lr 4e-3 --momentum 0.99 --hidden 1024 \
	--bank-size 512 --final-weight-decay 0.04 --warmup-steps 200 --drop-path 0 --log-every 50

BIN := $(VENV)/bin
# For the tests alone, a gigabyte, where torch brings none: the triton whose machine code they inspect.
TRITON := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),triton==3.6.0)
# says which torch and which Python the environment was made with: another one makes it anew
READY := $(VENV)/.ready-$(subst /,_,$(TORCH))-$(notdir $(PYTHON))
TESTABLE := $(READY)-tests
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check

# python with torch, for the gpu targets: they install nothing and need no network
GPU_PYTHON ?= python3
GPU_CHECKS := gpu-memcheck gpu-racecheck gpu-synccheck

.PHONY: help env build test test-all pretrain c2f bench lint format sanitize clean
GPU_OPS := gpu-bench-samples gpu-bench-attention gpu-bench-tokens
GPU_STEPS := gpu-bench-small gpu-bench-base
.PHONY: gpu gpu-build gpu-test gpu-bench-ops gpu-bench-step gpu-profile gpu-tune gpu-sanitize
.PHONY: $(GPU_CHECKS) $(GPU_OPS) $(GPU_STEPS)

help:
	@echo "make pretrain   set up .venv, build, render demo audio, pretrain ATST-Frame, probe it, draw pictures"
	@echo "make c2f        ATST-C2F on demo audio: fine-tuned and distilled encoders side by side, three seeds"
	@echo "make test       set up .venv, build, run the tests"
	@echo "make test-all   the same with the long tests, and the C++ kernels under AddressSanitizer and UBSan"
	@echo "make bench      benchmarks beside what one would call otherwise; one JSON under benchmarks/results/"
	@echo "make lint       ruff, clang-format, mypy;   make format: rewrite"
	@echo "make gpu        build for the GPU of this machine, with the torch of GPU_PYTHON; then its parts, each meant to"
	@echo "                take less than ten minutes: gpu-test (the tests, Triton's kernels among them), gpu-bench-ops"
	@echo "                (gpu-bench-samples, gpu-bench-attention, gpu-bench-tokens: operators), gpu-bench-step"
	@echo "                (gpu-bench-small and gpu-bench-base: whole steps beside plain PyTorch at its best), gpu-profile"
	@echo "                (where a step's time goes), gpu-sanitize (gpu-memcheck, gpu-racecheck, gpu-synccheck:"
	@echo "                compute-sanitizer over the CUDA kernels)"
	@echo "make gpu-tune   time every configuration of the Triton kernels; OPS='frame_attention rows' takes only those"
	@echo "make clean      remove the build (keeps .venv, $(DATA) and runs)"

# torch goes in first and alone: the build needs its headers, and the extras must not choose another one.
# tinysoundfont goes in without pyaudio, which it declares but needs only to play through a sound card.
$(READY): pyproject.toml
	@echo "== environment: $(VENV), $(TORCH)"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed; name one with PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	$(PIP) install -q "setuptools>=77" wheel "pybind11>=2.13" "ninja>=1.11"
	$(PIP) install -q --no-deps tinysoundfont==0.3.7
	$(PIP) install --no-build-isolation -e ".[train,eval,demo,test]"
	@rm -f $(VENV)/.ready*
	@touch "$@"

$(TESTABLE): $(READY)
	$(if $(TRITON),$(PY) -c "import triton" 2> /dev/null || $(PIP) install -q "$(TRITON)")
	@touch "$@"

env: $(READY)

build: env
	@echo "== build"
	@$(PY) setup.py -q build_ext --inplace

# A small encoder for some minutes, so that two cores finish all of it in a quarter of an hour; every step that is
# already done is skipped or continued when the target is repeated.
pretrain: build
	@echo "== demo audio: $(DATA)"
	@$(BIN)/atst-fast demo-data --out $(DATA)
	@echo "== pretraining ATST-Frame: $(RUN)"
	@$(BIN)/atst-fast pretrain --data $(DATA)/pretrain --out $(RUN) $(RECIPE)
	@echo "== probing what it learned"
	@$(BIN)/atst-fast probe --run $(RUN) --data $(DATA)

# as many processes as there are cores, at most eight; what one has left over the others take
SIDE_BY_SIDE := -n auto --maxprocesses 8 --dist worksteal
# Two pretrainings, then for each of three seeds three trainings on labels of clips and three on labels of frames.
c2f: build
	@echo "== demo audio: $(DATA)"
	@$(BIN)/atst-fast demo-data --out $(DATA)
	@echo "== ATST-Clip, ATST-Frame and ATST-C2F side by side: runs/c2f"
	@$(PY) -m benchmarks.c2f --data $(DATA) --out runs/c2f

test: build $(TESTABLE)
	@echo "== tests"
	$(PY) -m pytest tests benchmarks $(SIDE_BY_SIDE) -m "not long" $(if $(REQUIRE),--require $(REQUIRE)) -rs --durations=5

test-all: build $(TESTABLE)
	@echo "== all tests"
	$(PY) -m pytest tests benchmarks $(SIDE_BY_SIDE) -rs --durations=15
	$(MAKE) sanitize

# The whole package again under build/sanitize, its extension with both sanitizers; the interpreter itself has none,
# so their runtime is preloaded, and leaks of the interpreter are not ours to report.
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined
sanitize: build
	@echo "== C++ kernels under AddressSanitizer and UBSan"
	@CXXFLAGS="-g -O1 -fno-omit-frame-pointer $(SANITIZE)" LDFLAGS="$(SANITIZE)" \
		$(PY) setup.py -q build_py --build-lib build/sanitize build_ext --build-lib build/sanitize --build-temp build/sanitize-objects
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize:. \
		$(BIN)/pytest --import-mode=importlib tests/ops tests/nn tests/test_optim.py -m "not long"

lint: env
	$(PIP) install -q -e ".[lint]" --no-build-isolation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

bench: build
	$(PY) -m pytest benchmarks --benchmark-enable
	$(PY) -m benchmarks.plot

# In the source tree itself: nothing is installed, so the folder that pyproject.toml maps to atst_fast.kernels is linked
# to where Python looks for it. GPU_PYTHON may be a path, which has to hold in another folder too.
GPU_PY := $(if $(findstring /,$(GPU_PYTHON)),$(abspath $(GPU_PYTHON)),$(GPU_PYTHON))
GPU_ENV := PATH="$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin" PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}"
GPU := $(GPU_ENV) $(GPU_PY)
GPU_PLOT := $(GPU) -m benchmarks.plot || echo "no picture was drawn (it needs matplotlib)"
gpu: gpu-test gpu-bench-ops gpu-bench-step gpu-profile gpu-sanitize
gpu-sanitize: $(GPU_CHECKS)
.NOTPARALLEL: gpu gpu-sanitize gpu-bench-ops gpu-bench-step

# From build/, so that a setuptools too old for pyproject.toml will do; then copied, for another build may have put its
# own extension there. A copy over a file would change it under a process that has loaded it.
gpu-build:
	@archs=$$($(GPU) -m benchmarks.card) || exit 1; echo "== build for the GPUs here: $$archs"; \
		ln -sfn ../kernels atst_fast/kernels && mkdir -p build && cd build && rm -rf lib.gpu && \
		$(GPU_ENV) TORCH_CUDA_ARCH_LIST="$$archs" $(GPU_PY) ../setup.py -q build_ext --build-lib lib.gpu --build-temp temp.gpu && \
		cp --remove-destination lib.gpu/atst_fast/_C.*.so ../atst_fast/
	@$(GPU) -c "import atst_fast; cuda = atst_fast.build_info()['cuda']; print('CUDA kernels:', cuda); \
		raise SystemExit(cuda.startswith('none'))"

gpu-test: gpu-build
	@echo "== tests, those on the GPU among them"
	$(GPU) -m pytest tests -m "not long" -rs --durations=10

# One tool of compute-sanitizer each, over our kernels (in namespace atst) in the tests that are marked for it: each runs
# a hundred times slower. API errors are left to the tests, for torch provokes some on purpose. memcheck sees an access
# beyond an allocation where each is CUDA's own.
gpu-memcheck: export PYTORCH_NO_CUDA_MEMORY_CACHING = 1
$(GPU_CHECKS): gpu-%: gpu-build
	@echo "== kernels under compute-sanitizer: $*"
	@$(GPU_ENV) command -v compute-sanitizer > /dev/null || { echo "$@ needs compute-sanitizer (CUDA toolkit) in PATH"; exit 1; }
	$(GPU_ENV) timeout -k 10 540 compute-sanitizer --tool $* --kernel-name kns=4atst --report-api-errors no \
		--error-exitcode 1 --target-processes all $(GPU_PY) -m pytest tests/cuda -m "gpu and sanitize" -rs --durations=5

# In three parts, for peers are compiled: what works on samples and parameters, attention, and all else on tokens.
SAMPLES := log_mel or kaldi_fbank or augment_views or ema
gpu-bench-samples: ITEMS = $(SAMPLES)
gpu-bench-attention: ITEMS = frame_attention
gpu-bench-tokens: ITEMS = not ($(SAMPLES) or frame_attention)
gpu-bench-ops: $(GPU_OPS)
$(GPU_OPS): gpu-build
	@echo "== operators on the GPU: $(@:gpu-bench-%=%)"
	$(GPU) -m pytest benchmarks/bench_ops.py -m gpu -k "$(ITEMS)" --benchmark-enable $(if $(COMMIT),--commit $(COMMIT)) -rs
	@$(GPU_PLOT)

# One size at a time: torch.compile tunes the peer's kernels for minutes. What it found stays in its cache.
gpu-bench-step: $(GPU_STEPS)
$(GPU_STEPS): gpu-bench-%: gpu-build
	@echo "== training steps on the GPU: $*"
	$(GPU) -m pytest benchmarks/gpu/bench_step.py -k $* --benchmark-enable $(if $(COMMIT),--commit $(COMMIT)) -rs
	@$(GPU_PLOT)

# not by the command line, which needs a package that a GPU's Python may lack
PROFILE := build/profile
gpu-profile: gpu-build
	@echo "== where the time of a training step goes: $(PROFILE)"
	$(GPU) -c "from pathlib import Path; from atst_fast.train.profile import *; \
		profile(ProfileConfig(out=Path('$(PROFILE)'), arch='base', batch_size=144))"

gpu-tune: gpu-build
	@echo "== configurations of the Triton kernels"
	$(GPU) -m benchmarks.gpu.tune $(OPS) $(if $(COMMIT),--commit $(COMMIT))

clean:
	rm -rf build atst_fast/_C.*.so atst_fast/kernels *.egg-info
