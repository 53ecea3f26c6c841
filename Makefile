# make quickstart: post-train the shipped tiny Stable Diffusion 3 on this machine, and report
# make test:       the test suite
# make docs:       the documentation site, in site/; make docs-serve shows it while you write
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test check docs docs-serve install clean
quickstart: .venv/ready
	$(BIN)/posttrain run quickstart

test: .venv/ready-dev
	$(BIN)/python -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

check: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo --no-cache

docs: .venv/ready-dev
	$(BIN)/zensical build --clean --strict

docs-serve: .venv/ready-dev
	$(BIN)/zensical serve

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
	rm -rf .venv build site .cache *.egg-info
