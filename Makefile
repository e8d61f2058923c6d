# `make demo` and `make test` do all the set-up; both can be run again at any time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test faults fuzz engines lint bench clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(STAMP)

demo: $(STAMP)  ## compress, verify, convert and merge real adapters into the real MiniLM
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## lint, types and every test that needs no GPU
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto

faults: $(STAMP)  ## kill and fail system calls at every write and rename, fill disks (Linux, strace)
	$(BIN)/python -m pytest -m faults

fuzz: $(STAMP)  ## mutated input for every reader, FUZZ_SECONDS each (atheris; inputs that fail are kept in fuzz-failures/)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,fuzz]'
	$(BIN)/python tests/fuzz/run.py

engines: $(STAMP)  ## vLLM's own loader and a real llama.cpp read what `convert --for` writes (tests/test_engine_proofs.py)
	$(BIN)/python -m pytest -m engines

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

bench: $(STAMP)  ## side-by-side measurements; prints tables for benchmarks/RESULTS.md
	$(BIN)/python benchmarks/vblora_topk.py
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/pack.py --quick
	$(BIN)/python benchmarks/convert.py

clean:
	rm -rf $(VENV) demo-out build dist
