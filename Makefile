# Everything from a fresh clone with Python 3.11 and make. `.venv` is made and filled by the first target that needs it,
# and again only when requirements.txt or pyproject.toml change.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
PYTEST_FLAGS ?= --numprocesses=auto --dist=loadfile

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all stress stress-long exact selftest real clients models compare bench gpu measure check format wheel clean

help:  ## say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP)  ## finetune the tiny model of the package, and show what it learned
	$(BIN)/python -m lora_alpaca.demo

test: check  ## check the code and run all tests but the slow ones
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow and not clients"

test-all: check  ## check the code and run every test but those of other programs; what CI runs
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not clients"

stress: $(STAMP)  ## the tests that draw cases at random, in their long form, and a share of all faults: half an hour
	STRESS=1 $(BIN)/python -m pytest --numprocesses=auto tests/data/test_properties.py tests/data/test_fuzz.py
	STRESS=1 $(BIN)/python -m pytest --numprocesses=auto tests/hostile/test_links.py
	$(BIN)/python tests/hostile
	$(BIN)/python tests/faults stress

stress-long: $(STAMP)  ## the same with a thousand kills and all faults; resumes where it was stopped
	STRESS=1 $(BIN)/python -m pytest --numprocesses=auto tests/data/test_properties.py tests/data/test_fuzz.py
	$(BIN)/python tests/faults stress-long

exact: $(STAMP)  ## compare the gradients of packs with plain transformers, in every combination
	$(BIN)/python -m pytest $(PYTEST_FLAGS) tests/exact.py

selftest: $(STAMP)  ## put faults into copies of the library, one by one; the self-test must find each: ten minutes
	$(BIN)/python -m pytest tests/selftest/injected.py

real: $(STAMP)  ## fetch a small pretrained model, once, and run the tests that need it: five minutes
	$(BIN)/python tests/real_model.py
	$(BIN)/python -m pytest -m real tests/test_real_model.py

clients: $(STAMP)  ## install what serves models, each in an environment of its own, and try exports on it: half an hour
	$(BIN)/python tests/clients/environments.py
	$(BIN)/python tests/real_model.py
	$(BIN)/python tests/clients

models: $(STAMP)  ## write docs/models.md anew: what the families train, export and answer
	MODELS=write $(BIN)/python -m pytest tests/test_families.py

compare: $(STAMP)  ## compare adapters byte for byte with those of a version: make compare OLD=COMMIT
	@test -n "$(OLD)" || { echo "name a commit or a folder: make compare OLD=COMMIT [NEW=COMMIT]"; exit 1; }
	$(BIN)/python tests/compare_versions.py $(OLD) $(NEW)

bench: $(STAMP)  ## time a training step against what else there is, five minutes
	$(BIN)/python benchmarks/training.py --quick

gpu: $(STAMP)  ## measure a card: nine stages, ten minutes at most, and the table of docs/benchmarks.md
	$(BIN)/python benchmarks/gpu.py

measure: $(STAMP)  ## count files and lines of each room, and name what is long
	$(BIN)/python docs/measure_rooms.py

check: $(STAMP)  ## lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)  ## put the code into its form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: $(STAMP)  ## build dist/*.whl
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## remove the environment and what the tools left
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "no python3.11 and no python3 found; name one: make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	@touch $@
