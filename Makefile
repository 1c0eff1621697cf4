# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS ?= 2
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test nightly fuzz lint types golden bench venv

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## compile the shipped language model, stream text from it, compare with eager PyTorch
	$(BIN)/python examples/demo.py

test: $(READY) ## run the tests; ARGS="-k name" selects some, JOBS=4 uses more processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

nightly: $(READY) ## run the tests that take too long for every change
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m nightly $(ARGS)

fuzz: $(READY) ## random graphs through every pass and backend; SECONDS=28800 SEED=7 for a night
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60) --seed $(or $(SEED),0) $(ARGS)

lint: $(READY) ## check style with ruff
	$(BIN)/ruff check .

# mypy does not follow the folder mapping of an editable install, so it checks an installed copy.
types: $(READY) ## check types with mypy --strict
	rm -rf build/lib build/types
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/types .
	MYPYPATH=build/types $(BIN)/mypy --strict -p sylvester

golden: $(READY) ## rewrite tests/golden from actual output, to be reviewed with git diff
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --update-golden $(ARGS)

bench: $(READY) ## time every installed peer beside us; WORKS="S-decode zoo" ENGINES="sylvester onnxruntime" choose
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@mkdir -p out
	$(BIN)/python -m benchmarks.suite --json out/bench.json --svg out/bench.svg \
	  $(if $(WORKS),--works $(WORKS)) $(if $(ENGINES),--engines $(ENGINES)) $(ARGS)

venv: $(READY)

# The CPU wheels of torch are used where their index answers: the default wheels for Linux carry CUDA.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@extra=""; curl -fsIm 5 $(TORCH_INDEX)/torch/ >/dev/null 2>&1 && extra="--extra-index-url $(TORCH_INDEX)"; \
	set -x; $(BIN)/python -m pip install --quiet --disable-pip-version-check $$extra -c constraints.txt -e '.[dev]'
	@touch $@
