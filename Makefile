# Everything happens in $(VENV); a fresh machine needs only Python 3.11-3.13 and pip.
# Another interpreter: make install PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-faults lint bench docs

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## create .venv and install the package with its development tools (once)

demo: $(STAMP) ## compare methods on a small embedded task and print the table
	$(VENV)/bin/delta-run +experiment=demo hydra/launcher=joblib hydra.launcher.n_jobs=2
	$(VENV)/bin/delta-report results

PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

test: $(STAMP) ## run the tests, several at a time
	$(PYTEST)

test-all: $(STAMP) ## run also the tests marked slow, such as every command of the documentation
	$(PYTEST) -m "not faults"

test-faults: $(STAMP) ## inject every fault and many random ones (docs/reliability.md; a quarter of an hour)
	DELTA_FAULTS=1 $(PY) -m pytest -m "" $$(grep -o 'test_[a-z]*\.py' docs/reliability.md | sort -u | sed 's|^|tests/|')

bench: $(STAMP) ## measure speed and memory against the targets (an hour on a CPU; resumes)
	$(PY) scripts/bench.py

docs: $(STAMP) ## build the documentation into site/, which opens from disk
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

lint: $(STAMP) ## check style, types, the arrows between rooms, and prose
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/proselint --config .proselintrc.json check README.md CONTRIBUTING.md CHANGELOG.md docs/*.md

# A Python without ensurepip (Debian without python3-venv) still works: its own pip then installs into the new venv.
# setuptools comes first, in the tested version, and builds the package without fetching another one.
$(STAMP): pyproject.toml constraints.txt
	@py=$(PY); [ -x $$py ] || py=$(PYTHON); \
	$$py -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null || \
	{ echo "delta-transfer needs Python 3.11, 3.12 or 3.13, but $$py is $$(command -v $$py >/dev/null && $$py --version 2>&1 || echo missing); try: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
	{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install "pip>=23.1"; }
	$(PY) -m pip install -c constraints.txt setuptools
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@
