# make demo: install, and run the main job on real trained weights.   make test: install, and pass every check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint slow bench gpu quality clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23.2"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps timm  # its torchvision has no CPU build beside this torch
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: $(STAMP) lint
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

bench: $(STAMP)
	for b in $(filter-out tools/bench_quality.py tools/bench_gpu.py, $(wildcard tools/bench_*.py)); do $(BIN)/python $$b || exit 1; done

gpu: $(STAMP)  # where there is a CUDA device, with a torch built for it
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python tools/bench_gpu.py

quality: $(STAMP)  # eleven hours
	$(BIN)/python tools/bench_quality.py

clean:
	rm -rf $(VENV) .cache demo build dist *.egg-info
