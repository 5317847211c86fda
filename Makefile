# Two commands: `make reproduce` runs the lab book, `make test` checks it. Both build .venv on first use.
SCALE    ?= laptop#   a file of notebooks/scales: laptop, smoke, ...
NOTEBOOK ?=#          one notebook, by number or name; empty for all
JOBS     ?= 2#        CPU cores; a notebook takes two, a test one
PYTHON   ?=#          the Python that .venv is made with; empty for the first of 3.11 to 3.13 found
VENV     ?= .venv
PROJECT  ?= .
SNAKEMAKE_ARGS ?=#    passed on, for example --executor slurm --jobs 20
LAB_ARGS       ?=
TEST_ARGS      ?=

PY    := $(VENV)/bin/python
READY := $(VENV)/.ready
RUN   := $(PY) -m steerkit.book.run
GRAPH := $(PY) -m snakemake --snakefile Snakefile --directory $(PROJECT) --cores $(JOBS) --keep-going --rerun-incomplete \
         --rerun-triggers input --nolock $(if $(SNAKEMAKE_ARGS),,--quiet all) --config scale=$(SCALE).yaml $(if $(NOTEBOOK),notebook=$(NOTEBOOK).ipynb)
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)
FITS    := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export JUPYTER_PREFER_ENV_PATH := 1
export PYTHONUNBUFFERED := 1
# as in steerkit/__init__.py, for what loads torch first
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 5000

.PHONY: help named planned reproduce model test lab bench publish readme lint clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:
	@echo "make reproduce [SCALE=laptop] [NOTEBOOK=01] [JOBS=2]   run the notebooks; results in runs/, figures in figures/"
	@echo "make test      run the tests"
	@echo "make lab       open the notebooks in JupyterLab"
	@echo "make bench     measure the speed"
	@echo "make publish   copy executed laptop notebooks into notebooks/, and their claims into data/ledger/ and README.md"
	@echo "make readme    write README's table of claims from data/ledger/"
	@echo "make lint      check the style"
	@echo "make clean     remove runs/ and caches (.venv and the model stay)"

$(READY): requirements.lock pyproject.toml
	@python=; for p in $(PYTHONS); do \
	  if command -v $$p >/dev/null 2>&1 && $$p -c '$(FITS)' 2>/dev/null; then python=$$p; break; fi; done; \
	if [ -x $(PY) ]; then :; \
	elif [ -n "$$python" ]; then echo "making $(VENV) with $$python"; $$python -m venv $(VENV); \
	else echo "Python 3.11, 3.12 or 3.13 is needed, and none was found among: $(PYTHONS). Install one and call make again" >&2; exit 1; fi
	@echo "installing requirements.lock into $(VENV) (some minutes the first time)"
	@$(PY) -m pip install --quiet -r requirements.lock
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@$(PY) -m pip check
	@touch $@

model: $(READY)
	@$(PY) -m steerkit.models.fetch

# Before anything is set up or fetched, with nothing but the shell; `status` says more, before the model is fetched.
named:
	@cd '$(PROJECT)/notebooks'; if [ ! -f 'scales/$(SCALE).yaml' ]; then \
	  echo "SCALE: expected one of" $$(cd scales; ls *.yaml | sed 's/\.yaml$$//')", got $(SCALE)" >&2; exit 2; fi; \
	if [ -z '$(NOTEBOOK)' ]; then exit 0; fi; \
	for name in '$(NOTEBOOK).ipynb' '$(NOTEBOOK)'_*.ipynb '0$(NOTEBOOK)'_*.ipynb; do if [ -f "$$name" ]; then exit 0; fi; done; \
	echo "NOTEBOOK: expected the name or number of one of" $$(ls *.ipynb | sed 's/\.ipynb$$//')", got $(NOTEBOOK)" >&2; exit 2

planned: $(READY)
	@$(RUN) status $(NOTEBOOK) --scale $(SCALE) --root $(PROJECT)

reproduce: named planned model
	@code=0; $(GRAPH) $(SNAKEMAKE_ARGS) || code=$$?; \
	$(RUN) table --scale $(SCALE) --root $(PROJECT) || code=$$?; exit $$code

test: $(READY)
	@OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses $(JOBS) --dist worksteal $(TEST_ARGS)

# Trusted, so that the tables of the saved notebooks keep their style: text on the left.
lab: $(READY)
	@$(PY) -m jupyter trust notebooks/*.ipynb >/dev/null
	@$(PY) -m jupyterlab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks $(LAB_ARGS)

bench: $(READY) model
	@for script in benchmarks/*.py; do echo "$$script"; $(PY) $$script || exit 1; done

publish: $(READY)
	@$(RUN) publish --scale $(SCALE) --root $(PROJECT); code=$$?; $(PY) -m steerkit.book.readme --root $(PROJECT) && exit $$code

readme: $(READY)
	@$(PY) -m steerkit.book.readme --root $(PROJECT)

lint: $(READY)
	@$(PY) -m ruff check .

clean:
	rm -rf runs .snakemake .pytest_cache .ruff_cache build dist
	find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
