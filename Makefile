# Every target sets itself up: a virtual environment, torch, and this package with its compiled kernels.
PYTHON ?= python3
# Installed first and by exact version: anything that resolves torch anew may fetch another build of it.
TORCH ?= torch==2.13.0
# Imports torchvision, of which there is no build for every torch; its tests do without.
TIMM ?= timm==1.0.31
VENV ?= .venv
INTEGRATIONS ?= .venv-integrations

python := $(VENV)/bin/python
sources := $(wildcard csrc/*) setup.py pyproject.toml
pip := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-integrations lint bench mutants clean

demo: $(VENV)/demo
	$(python) -m bench.demo

test: $(VENV)/test
	$(python) -m pytest --numprocesses auto --maxprocesses 8 --dist loadgroup

# The optimizers inside of the trainers that people use, each in the version of the extra `integrations`.
test-integrations: $(INTEGRATIONS)/test
	$(INTEGRATIONS)/bin/python -m pytest tests/integrations

lint: $(VENV)/lint
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

bench: $(VENV)/demo $(VENV)/test
	$(python) -m bench.step_cost

# Breaks one term of the kernels at a time and shows that the tests notice.
mutants: $(VENV)/test
	$(python) -m tests.mutants

$(VENV)/torch $(INTEGRATIONS)/torch: %/torch:
	$(PYTHON) -m venv $*
	$*/bin/python $(pip) $(TORCH)
	$*/bin/python $(pip) 'setuptools>=77' wheel numpy ninja
	touch $@

# The kernels are compiled against the torch of the environment, hence no build isolation; ninja is there too.
$(VENV)/demo $(VENV)/test: $(VENV)/torch $(sources)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(python) $(pip) --no-build-isolation --editable '.[$(notdir $@)]'
	touch $@

# An isolated build sees no torch and compiles nothing.
$(VENV)/lint: $(VENV)/torch pyproject.toml
	$(python) $(pip) --editable '.[lint]'
	touch $@

# Nor does this: the kernels are those that $(VENV)/test left in vsgd_kernels/.
$(INTEGRATIONS)/test: $(INTEGRATIONS)/torch $(VENV)/test pyproject.toml
	$(INTEGRATIONS)/bin/python $(pip) --editable '.[integrations]'
	$(INTEGRATIONS)/bin/python $(pip) --no-deps $(TIMM)
	touch $@

clean:
	rm -rf $(VENV) $(INTEGRATIONS) build *.egg-info vsgd_kernels/*.so
