# Two commands: `make reproduce` runs the lab book, `make test` checks it. Both build .venv on first use.
SCALE    ?= laptop#   a file of notebooks/scales: laptop, smoke, ...
NOTEBOOK ?=#          one notebook, by number or name; empty for all
JOBS     ?= 2#        CPU cores; a notebook takes two
VENV     ?= .venv
PROJECT  ?= .
SNAKEMAKE_ARGS ?=#    passed on, for example --executor slurm --jobs 20
LAB_ARGS       ?=
TEST_ARGS      ?=

PY    := $(VENV)/bin/python
READY := $(VENV)/.ready
RUN   := $(PY) -m steerkit.run
GRAPH := $(PY) -m snakemake --snakefile Snakefile --directory $(PROJECT) --cores $(JOBS) --keep-going --rerun-incomplete \
         --rerun-triggers input --nolock $(if $(SNAKEMAKE_ARGS),,--quiet all) --config scale=$(SCALE) $(if $(NOTEBOOK),notebook=$(NOTEBOOK))
IS_311 := import sys; sys.exit(sys.version_info[:2] != (3, 11))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export JUPYTER_PREFER_ENV_PATH := 1
export PYTHONUNBUFFERED := 1
# as in steerkit/__init__.py, for what loads torch first
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 1000

.PHONY: help reproduce model test lab bench publish lint clean
.DEFAULT_GOAL := help

help:
	@echo "make reproduce [SCALE=laptop] [NOTEBOOK=01] [JOBS=2]   run the notebooks; results in runs/, figures in figures/"
	@echo "make test      run the tests"
	@echo "make lab       open the notebooks in JupyterLab"
	@echo "make bench     measure the speed"
	@echo "make publish   copy executed laptop notebooks into notebooks/"
	@echo "make lint      check the style"
	@echo "make clean     remove runs/ and caches (.venv and the model stay)"

$(READY): requirements.lock pyproject.toml
	@python=; for p in python3.11 python3 python; do \
	  if command -v $$p >/dev/null 2>&1 && $$p -c '$(IS_311)' 2>/dev/null; then python=$$p; break; fi; done; \
	if [ -x $(PY) ]; then :; \
	elif [ -n "$$python" ]; then echo "making $(VENV) with $$python"; $$python -m venv $(VENV); \
	else echo "Python 3.11 is needed, and none of python3.11, python3 and python is one: install it and call make again" >&2; exit 1; fi
	@echo "installing requirements.lock into $(VENV) (some minutes the first time)"
	@$(PY) -m pip install --quiet -r requirements.lock
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@$(PY) -m pip check
	@touch $@

model: $(READY)
	@$(PY) -m steerkit.fetch

reproduce: $(READY) model
	@$(RUN) status $(NOTEBOOK) --scale $(SCALE) --root $(PROJECT)
	@code=0; $(GRAPH) $(SNAKEMAKE_ARGS) || code=$$?; \
	$(RUN) table --scale $(SCALE) --root $(PROJECT) || code=$$?; exit $$code

test: $(READY)
	@$(PY) -m pytest $(TEST_ARGS)

lab: $(READY)
	@$(PY) -m jupyterlab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks $(LAB_ARGS)

bench: $(READY) model
	@for script in benchmarks/*.py; do echo "$$script"; $(PY) $$script || exit 1; done

publish: $(READY)
	@$(RUN) publish --scale laptop --root $(PROJECT)

lint: $(READY)
	@$(PY) -m ruff check .

clean:
	rm -rf runs .snakemake .pytest_cache .ruff_cache build dist
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
