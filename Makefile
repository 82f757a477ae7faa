# The README's two commands. Both need Python 3.11, 3.12 or 3.13 and make, nothing else.
#   make quickstart   train the embedded tiny model on this machine and write its report
#   make test         lint, type-check and test, in ten minutes
#   make test-slow    the tests that take longer; make test-all both
#   make docs         the documentation as a site with search, below build/docs

PYTHON ?= $(shell for v in 3.12 3.13 3.11; do command -v python$$v >/dev/null 2>&1 && python$$v -c '' >/dev/null 2>&1 && echo python$$v && break; done || true)
PYTHON := $(or $(PYTHON),python3)
VENV := .venv
BIN := $(VENV)/bin
# Over a hundred processes of the tests import the same files: compiled once, wherever this is set.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder
# A second quickstart gets a folder of its own.
NAME ?= tiny-ocr$(if $(wildcard runs/tiny-ocr),-$(shell date +%m%d-%H%M%S))

.PHONY: quickstart test test-slow test-all docs install clean

quickstart: install
	@$(BIN)/flowgrpo-ray train tiny-ocr --set name=$(NAME)
	@echo "then:   flowgrpo-ray train tiny-ocr-nft   (DiffusionNFT: the same in 25 iterations)"

test: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright
	@$(PYTEST)

test-slow: install
	@$(PYTEST) -m 'slow and not gpu'

test-all: test test-slow

docs: install
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[docs]'
	@$(BIN)/python docs/build_site.py

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit(f"Python 3.11, 3.12 or 3.13 is needed, this is {v[0]}.{v[1]}; name one with: make PYTHON=/path/to/python3.11 ...")'
	@echo "installing into $(VENV) (about 7 GB: the torch of the registry carries its CUDA libraries)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
