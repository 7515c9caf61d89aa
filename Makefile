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

# What reports need, beside the environment and not in it: diffusers imports scipy where it is, which slows every start.
REPORT := $(VENV)/report-libraries

.PHONY: help setup demo ui test check bench report clean

help:
	@echo "make demo    set up and make a picture        make test    set up and run the tests"
	@echo "make ui      set up and open the page         make check   what CI checks: ruff, pyright, imports"
	@echo "make bench   measure stock against optimized  make report  make reports/ and README's table from the records"
	@echo "make clean   remove the environment and the output"

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

test: setup $(REPORT)/.ready-plots
	PYTHONPATH=$(REPORT) $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

$(REPORT)/.ready: pyproject.toml $(CONSTRAINTS) | $(READY)
	rm -rf $(REPORT)
	$(BIN)/python -m pip install --quiet --no-deps --target $(REPORT) --constraint $(CONSTRAINTS) scipy
	@touch $@

$(REPORT)/.ready-plots: $(REPORT)/.ready
	$(BIN)/python -m pip install --quiet --target $(REPORT) --upgrade --constraint $(CONSTRAINTS) matplotlib jinja2 scikit-image
	@touch $@

check: setup $(REPORT)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache
	PYTHONPATH=$(REPORT) $(BIN)/diffopt report readme --check

report: setup $(REPORT)/.ready-plots
	PYTHONPATH=$(REPORT) $(BIN)/diffopt report render --output reports
	PYTHONPATH=$(REPORT) $(BIN)/diffopt report readme

bench: setup
	$(BIN)/diffopt bench small

clean:
	rm -rf $(VENV) out
