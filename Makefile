# Everything a fresh checkout needs: `make demo` and `make test` build their own environment in .venv.
# Only Python >= 3.11 must be there; another one: make demo PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/demo
ARGS   ?=
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.synapse_arch
PEERS  := $(VENV)-peers
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check

export PYTHONUNBUFFERED := 1
.DEFAULT_GOAL := help
.PHONY: help venv test check format demo serve bench peers gpu paper clean

help:  ## show this
	@echo "synapse_arch: make TARGET"
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  %-8s %s\n", $$1, $$2}'

venv: $(STAMP)  ## create .venv with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or later, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): name another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) has no venv or ensurepip module: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install torch --constraint constraints.txt
	@$(PIP) install --editable '.[train,dev,paper]' --constraint constraints.txt
	@touch $@

test: $(STAMP)  ## run the whole test suite
	@$(BIN)/python -m pytest --quiet $(ARGS)

check: $(STAMP)  ## lint, formatting, types, import direction, the paper as its results say
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted as the house does: run 'make format'" >&2; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/python -m pytest --quiet tests/test_imports.py tests/paper/test_text.py

format: $(STAMP)  ## put every file into the house format
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

# accelerate's own process ignores Ctrl-C; the training process under it catches it, saves and stops.
demo: $(STAMP)  ## train the tiny model on Python's own source (10 minutes on 2 cores), sample, look inside
	@trap '' INT; $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --dynamo_backend no \
	  --mixed_precision no recipes/train.py --preset tiny --out $(OUT) $(ARGS)

serve: $(STAMP)  ## serve the demo's model: API and page at http://127.0.0.1:8000 (another one: ARGS="--model FOLDER")
	@trap '' INT; $(BIN)/python -m serving $(ARGS)

bench: $(STAMP)  ## measure the core: exactness, streaming, speed, memory, linearity
	@$(BIN)/python -m benchmarks.core $(ARGS)

# An environment of their own, which sees the packages of .venv but adds nothing to them.
$(PEERS)/.installed: $(STAMP) benchmarks/peers/requirements.txt
	@$(BIN)/python -m venv $(PEERS)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > $$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/house.pth
	@$(PEERS)/bin/python -m pip --quiet --disable-pip-version-check install --no-deps -r benchmarks/peers/requirements.txt
	@touch $@

peers: $(PEERS)/.installed  ## measure speed beside other people's functions and models, and the machine's limits
	@$(PEERS)/bin/python -m benchmarks.peers $(ARGS)

gpu: $(STAMP)  ## check and measure the GPU: parity, training, decoding, ops (small sizes on a CPU: ARGS=--quick)
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

paper: $(STAMP)  ## build the paper (text, tables, figures, PDF) from paper/results
	@$(BIN)/python -m paper.build

clean:  ## remove the environment and the caches, keep runs/
	@rm -rf $(VENV) $(PEERS) .mypy_cache .pytest_cache .ruff_cache .hypothesis
