# Every target sets itself up: a virtual environment, torch, and this package with its compiled kernels.
PYTHON ?= python3
# Installed first and by exact version: anything that resolves torch anew may fetch another build of it.
TORCH ?= torch==2.13.0
VENV ?= .venv

python := $(VENV)/bin/python
sources := $(wildcard csrc/*) setup.py pyproject.toml
# $(1): extras. The kernels are compiled against the torch of the environment, hence no build isolation.
install = $(python) -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[$(1)]'

.PHONY: demo test lint bench mutants clean

demo: $(VENV)/demo
	$(python) -m bench.demo

test: $(VENV)/test
	$(python) -m pytest

lint: $(VENV)/lint
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

bench: $(VENV)/demo $(VENV)/test
	$(python) -m bench.step_cost

# Breaks one term of the kernels at a time and shows that the tests notice.
mutants: $(VENV)/test
	$(python) -m tests.mutants

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(python) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(python) -m pip install --quiet --disable-pip-version-check 'setuptools>=77' wheel numpy
	touch $@

$(VENV)/demo $(VENV)/test $(VENV)/lint: $(VENV)/torch $(sources)
	$(call install,$(notdir $@))
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info vsgd_kernels/*.so
