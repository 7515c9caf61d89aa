# One command for each thing a developer does; CI runs the same ones.
#
#   PYTHON       the interpreter that creates the environment   make demo PYTHON=python3.12
#   VENV         where the environment lives                    make demo VENV=/tmp/diffopt-env
#   TORCH_INDEX  a package index that holds the torch build you want (CPU or CUDA)
#   CONSTRAINTS  the tested set of versions                     make test CONSTRAINTS=constraints-gpu.txt

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt
PROMPT ?= a red apple, noto style
EXTRAS ?= ui,dev,training

BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(subst /,_,$(CONSTRAINTS))

.PHONY: help setup demo ui test check bench clean

help:
	@echo "make demo    set up and make a picture        make test    set up and run the tests"
	@echo "make ui      set up and open the page         make check   what CI checks: ruff, pyright, imports"
	@echo "make bench   measure stock against optimized  make clean   remove the environment and the output"

# Installs again only when what it installs from has changed.
$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "diffopt needs Python 3.11 or newer; $(PYTHON) is older. Try: make demo PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --index-url $(TORCH_INDEX) --constraint $(CONSTRAINTS) torch)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]' --constraint $(CONSTRAINTS)
	@rm -f $(VENV)/.ready-*
	@touch $@

setup: $(READY)

demo: setup
	$(BIN)/diffopt generate "$(PROMPT)" --model emoji --steps 20 --output out

ui: setup
	$(BIN)/python app.py

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

bench: setup
	$(BIN)/diffopt bench small

clean:
	rm -rf $(VENV) out
