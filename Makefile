# `make demo` and `make test` do everything from a fresh checkout; the rest is for developers.

PYTHON ?= python3
# What the development environment pins. Override to try others, for example
#   make test PINS="torch==2.10.0 triton==3.6.0 'numpy<2.4'"
PINS ?= torch==2.13.0 triton==3.6.0 'numpy<2.4'

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt longrope_kernels/_version.py \
	$(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cmake')

.PHONY: demo test test-compiled test-newest-triton test-oldest-transformers benchmark report lint format docs clean

demo: $(VENV)/demo.stamp
	$(BIN)/longrope demo

# One process a core, so one thread each; what threads do is tested in processes of its own.
test: $(VENV)/test.stamp test-newest-triton test-oldest-transformers test-compiled
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses auto --dist loadfile

# What Triton compiles for sm_90 and sm_80, where there is no GPU to run it: tests/ptx runs it.
COMPILED := -m pytest -q --numprocesses auto --dist worksteal -k "compiled or triton"
test-compiled: $(VENV)/test.stamp
	LONGROPE_PTX=90 OMP_NUM_THREADS=1 $(BIN)/python $(COMPILED) tests/test_compiled.py \
		tests/test_triton.py tests/test_triton_decode.py tests/test_rotary_forward.py
	LONGROPE_PTX=80 OMP_NUM_THREADS=1 $(BIN)/python $(COMPILED) tests/test_compiled.py \
		tests/test_triton_decode.py

# The kernels with the newest Triton there is, beside the pinned one.
test-newest-triton: $(VENV)/test.stamp $(VENV)/newest-triton.stamp
	PYTHONPATH=$(VENV)/newest-triton $(BIN)/python -m pytest -q tests/test_triton.py

# Generation with the oldest transformers that pyproject.toml allows, beside the newest.
test-oldest-transformers: $(VENV)/test.stamp $(VENV)/oldest-transformers.stamp
	PYTHONPATH=$(VENV)/oldest-transformers OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q \
		tests/test_models_generate.py

benchmark: $(VENV)/test.stamp
	$(BIN)/python -m pytest benchmarks --benchmark-only

# Tests, benchmarks and a page about this machine, under reports/.
report: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.report

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site demo-output *.egg-info longrope_kernels/_*.so

# The pins come first: with them in place nothing below brings another torch.
$(VENV)/pins.stamp: Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(PINS)
	touch $@

$(VENV)/demo.stamp: $(VENV)/pins.stamp $(BUILD_INPUTS)
	$(PIP) --editable '.[demo,triton]' $(PINS)
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) --group test $(PINS)
	touch $@

$(VENV)/lint.stamp: $(VENV)/demo.stamp
	$(PIP) --group lint $(PINS)
	touch $@

$(VENV)/docs.stamp: $(VENV)/pins.stamp
	$(PIP) --group docs $(PINS)
	touch $@

$(VENV)/newest-triton.stamp: $(VENV)/pins.stamp
	rm -rf $(VENV)/newest-triton
	$(PIP) --target $(VENV)/newest-triton --no-deps triton
	touch $@

# With the packages of which it needs older ones than the newest does.
$(VENV)/oldest-transformers.stamp: $(VENV)/pins.stamp
	rm -rf $(VENV)/oldest-transformers
	$(PIP) --target $(VENV)/oldest-transformers --no-deps transformers==5.6.0 \
		'huggingface_hub<2' 'tokenizers<=0.23.0' 'httpx<1' 'httpcore<2'
	touch $@
