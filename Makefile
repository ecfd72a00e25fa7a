# make demo: from a fresh clone to a trained ViT, its figures and its speed.  make test: the tests.
# Both make .venv on first use. PYTHON=... picks the interpreter, TESTS="tests/test_attention.py -k bias" the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
TESTS ?=

.PHONY: demo test lint format aot bench-smoke results tune gpu gpu-dry clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	@$(BIN)/python examples/demo.py --out runs/demo

test: $(VENV)/.built
	@$(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# Compiles every Triton kernel for sm_80, sm_90 and sm_100 without a GPU, with floor times; fails on spills.
aot: $(VENV)/.built
	$(BIN)/python -m vitfast.kernels.aot --out build/aot.json

# A minute of small benchmarks, compared with the committed ones. A ratio that fell is printed, and is no failure, as machines
# differ and have other users; a benchmark that does not run, or a wrong result of ours, is one.
bench-smoke: $(VENV)/.built
	@$(BIN)/vitfast bench --preset smoke --out runs/bench-smoke --check benchmarks/results || test $$? -eq 1

# Every benchmark and sweep of this machine in about 55 minutes of its time alone, and what README and docs show of it. Goes on
# where it was stopped. RESULTS=benchmarks/results/NAME for a name of your own.
RESULTS ?=
export RESULTS
results: $(VENV)/.built
	@folder=$${RESULTS:-benchmarks/results/$$($(BIN)/python -m vitfast.benchmarks.machine)}; \
	$(BIN)/vitfast bench all --out "$$folder" $(if $(MINUTES),--minutes $(MINUTES))
	@$(BIN)/vitfast bench report benchmarks/results --into README.md docs/performance.md

# On a GPU: measures the products against the library's and the search space of every other kernel, and rewrites
# kernels/product_table.py and kernels/tile_table.py. Prints how long it may take; TUNE="--kernel attention_forward --dtype
# bfloat16" for a part. Uses PYTHON as it is.
TUNE ?=
tune:
	PYTHONPATH=. $(PYTHON) -m vitfast.kernels.tune $(TUNE)

# On a GPU, under ten minutes: build, parity, benchmarks; at most eight files in OUT. Uses PYTHON as it is, no .venv.
OUT ?= runs/gpu
gpu:
	PYTHONPATH=. $(PYTHON) -m vitfast.benchmarks.gpu --out $(OUT)

# The same way at tiny sizes on the CPU, to find a typo before the GPU does.
gpu-dry: $(VENV)/.built
	PYTHONPATH=. $(BIN)/python -m vitfast.benchmarks.gpu --dry --out runs/gpu-dry

clean:
	rm -rf build $(VENV) vitfast/*.so

$(VENV)/.installed: pyproject.toml .ci/environment
	@PYTHON="$(PYTHON)" .ci/environment $(VENV)
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(SOURCES)
	@mkdir -p build
	@echo "vitfast: building the extension (log: build/log.txt)"
	@$(BIN)/python setup.py build_ext --inplace >build/log.txt 2>&1 || { tail -n 40 build/log.txt; exit 1; }
	@touch $@
