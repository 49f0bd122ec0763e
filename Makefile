# Needs python3 (3.11 or newer), make and git. `make` alone lists the targets.
PYTHON   ?= python3
VENV     ?= .venv
BIN      := $(VENV)/bin
# The torch that is tested. Any torch of at least 2.6 that the interpreter already has is used instead: nothing pulls a second one.
# Without a GPU the build for CPUs is a tenth of the size: make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH    ?= torch==2.13.0
CONFIG   ?=
EXECUTOR ?= slurm
SET      ?=
# Options of `crosscoder cluster start`: `make cluster CLUSTER=--pretend` offers three nodes with five fake GPUs.
CLUSTER  ?=
# More words for pytest; CI says --require-slurm, which makes a Slurm test that is left out an error.
PYTEST   ?=
CROSSCODER := $(BIN)/crosscoder
DEMO := $(foreach stage,tokenize count cache train evaluate features,configs/demo/$(stage).yaml)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast end-to-end check format lint types tokenize count cache train evaluate features generate chain jobs accelerators tensorboard cluster cluster-stop sweep clean

help:  ## list the targets
	@grep -hE '^[a-z -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1 ~ / / ? "STAGE" : $$1, $$2}'
	@echo '  STAGE, chain and sweep take EXECUTOR=slurm|local|debug (sweep: no debug) and SET="key=value ..."'

HAS_TORCH := import importlib.metadata as m; v = m.version("torch").split("."); raise SystemExit((int(v[0]), int(v[1])) < (2, 6))

install: $(VENV)/installed  ## set up .venv with the tested versions

$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $$($(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null && echo --system-site-packages) $(VENV)
	@$(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || { echo "installing $(TORCH)"; $(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH); }
	@echo "installing requirements.txt into $(VENV)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

demo: install  ## the whole pipeline on real text, on this machine, in under five minutes
	@$(BIN)/python -m pipeline.demo.standard_library_text '{data}/text/demo'
	@$(CROSSCODER) submit --executor debug $(DEMO)
	@echo
	@$(CROSSCODER) report train/demo

# Files are dealt out in the order of tests/conftest.py: those that wait for Slurm first.
# Twenty times in a row, until one fails, in a shell: for i in `seq 20`; do make test || break; done
TESTS := $(BIN)/python -m pytest -q --dist loadfile --no-loadscope-reorder

test: install  ## all tests but the long ones, no network needed
	@echo "about 7 minutes on 2 idle cores; make test-fast leaves out the tests on a real Slurm"
	$(TESTS) -n 4 -m "not end_to_end" $(PYTEST)

test-fast: install  ## the same without the tests on a real Slurm
	@echo "about 2 minutes on 2 idle cores"
	$(TESTS) -n auto --maxprocesses 8 -m "not end_to_end and not slurm" $(PYTEST)

end-to-end: install  ## whole stages in sequence
	@echo "about 4 minutes on 2 idle cores"
	$(BIN)/python -m pytest -q -m end_to_end $(PYTEST)

check: lint types test end-to-end  ## all that CI runs: format, lint, types, tests; changes nothing

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

format: install  ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

tokenize count cache train evaluate features generate: install  ## submit one stage, tokenize to evaluate, features or generate: CONFIG=file.yaml
	@$(CROSSCODER) submit $(or $(CONFIG),configs/demo/$@.yaml) --executor $(EXECUTOR) $(SET)

chain: install  ## submit several, each waiting for what it reads: CONFIG="a.yaml b.yaml"; else the demo's six
	@$(if $(CONFIG),,$(BIN)/python -m pipeline.demo.standard_library_text --if-missing '{data}/text/demo')
	@$(CROSSCODER) submit $(or $(CONFIG),$(DEMO)) --executor $(EXECUTOR) $(SET)

jobs: install  ## my queued and running jobs
	@$(CROSSCODER) jobs

accelerators: install  ## GPUs of every machine configured
	@$(CROSSCODER) accelerators

cluster: install  ## start a private Slurm over this machine's cores and GPUs
	@$(CROSSCODER) cluster start $(CLUSTER)

cluster-stop: install  ## stop it; what was queued waits for the next start
	@$(CROSSCODER) cluster stop

sweep: install  ## submit a sweep: CONFIG=configs/sweeps/file.yaml
	@$(CROSSCODER) sweep $(CONFIG) --executor $(EXECUTOR) $(SET)

tensorboard: install  ## TensorBoard over all runs
	$(BIN)/tensorboard --logdir "$${RUNS:-$$($(BIN)/python -c 'from pipeline.config.site_file import load_site; print(load_site().runs)')}" --port $${PORT:-6006}

clean:  ## remove the virtual environment and caches; data and runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
