# make quickstart: post-train the shipped tiny Stable Diffusion 3 on this machine, and report
# make test:       the test suite
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test check install clean
quickstart: .venv/ready
	$(BIN)/posttrain run quickstart

test: .venv/ready-dev
	$(BIN)/python -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

check: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo --no-cache

# torch first and pinned: on a Linux CPU a free range would fetch several GB of CUDA
.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

install: .venv/ready

clean:
	rm -rf .venv build *.egg-info
