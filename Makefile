# On a fresh machine: `make demo` shows what DataFlex does, `make test` runs the tests. Needs Python >= 3.11 with venv, and pip.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
export HF_HUB_OFFLINE = 1

# LLaMA-Factory excludes current TRL, hence an environment of its own (several GB), kept until what is to be installed changes.
LLAMAFACTORY_HASH = $(shell $(PYTHON) -c "import hashlib; print(hashlib.sha256(b''.join(open(f, 'rb').read() for f in ('constraints-llamafactory.txt', 'pyproject.toml'))).hexdigest()[:12])")
LLAMAFACTORY_VENV ?= $(HOME)/.cache/dataflex/llamafactory-$(LLAMAFACTORY_HASH)

.PHONY: demo test test-all test-kill test-llamafactory check format docs clean

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[trl]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/python -m dataflex.demo

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest

# All that CI runs: `make check`, `make test`, the tests that take minutes, runs that are killed, and everything with LLaMA-Factory.
test-all: check
	$(MAKE) test
	$(VENV)/bin/python -m pytest -m long
	$(MAKE) test-kill
	$(MAKE) test-llamafactory

# Runs that are killed, or whose checkpoint is damaged, and resumed; `tests/kill/campaign.py --kills 200` is the long form.
test-kill: $(VENV)/installed-dev
	$(VENV)/bin/python tests/kill/campaign.py --kills 32
	$(VENV)/bin/python tests/kill/damage.py --every 5

$(LLAMAFACTORY_VENV)/installed:
	$(PYTHON) -m venv $(LLAMAFACTORY_VENV)
	$(LLAMAFACTORY_VENV)/bin/python -m pip install --quiet --constraint constraints-llamafactory.txt --editable ".[llamafactory,test]"
	touch $@

# PYTHONPATH, since the environment may have been made from another checkout. Tests of several processes run in `make test` alone: they take
# long, and transformers 5.6 itself cannot load an optimizer in several CPU processes ("don't know how to restore data location ... cpu:0").
test-llamafactory: $(LLAMAFACTORY_VENV)/installed
	PYTHONPATH=$(CURDIR)/src $(LLAMAFACTORY_VENV)/bin/python -m pytest tests/backend_llamafactory
	PYTHONPATH=$(CURDIR)/src $(LLAMAFACTORY_VENV)/bin/python -m pytest tests/train -m "not distributed and not long"

check: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/installed-dev
	$(VENV)/bin/python -m dataflex.cli reference > docs/reference.md

clean:
	rm -rf $(VENV) $(LLAMAFACTORY_VENV) demo_output build dist
