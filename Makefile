# `make demo` runs the main job, on drawings and on photographs, `make test` the tests; both make their own environment in .venv first.
PYTHON ?= python3
VENV := .venv
JOBS ?= 2
READY := $(VENV)/.ready

.PHONY: demo test fuzz bench lint clean

$(READY): pyproject.toml $(wildcard plugins/*/pyproject.toml)
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: install Python 3.11 or newer"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, this is `$(PYTHON) --version`: set PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "the venv module is missing: on Debian, apt install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -e '.[dev]' $(foreach plugin,$(wildcard plugins/*/pyproject.toml),-e ./$(dir $(plugin)))
	touch $@

demo: $(READY)
	$(VENV)/bin/mergekit-vl run recipes/mergetune_coop.yaml
	$(VENV)/bin/mergekit-vl run recipes/photos.yaml

# two workers with one thread each: most tests start processes that load torch, and wait for it
test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

# 10,000 headers and indexes, 5,000 pickles and zips ...: the counts stand in tests/fuzz
fuzz: $(READY)
	MERGEKIT_VL_FUZZ=1 $(VENV)/bin/python -m pytest tests/fuzz

# format, lint, types and layers
lint: $(READY)
	$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest tests/test_layers.py

clean:
	rm -rf $(VENV) runs
