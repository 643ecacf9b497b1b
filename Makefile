# Every target does its own set-up; a second `make` installs nothing. `make help` lists them.

SHELL := /bin/bash
PYTHON := .venv/bin/python
INSTALL := -m pip install --quiet --disable-pip-version-check
INSTALLED := .venv/.installed
COATNET := .venv/bin/coatnet
# One thread a process: the tests run in two processes, and two cores is what everybody has. Each takes a half in one
# piece, so that most fixtures are made once.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest
PYTEST_ARGS ?= -n 2 --dist worksteal
SYSTEM_PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11
# Exact versions, for a repeatable installation; empty for the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# All but mlflow and wandb, which no test needs, and executorch, ray and spark, whose tests are skipped without them.
EXTRAS := heic,tiff,hub,parquet,shards,datasets,tensorboard,openvino,onnx,int8,serve,tune,sklearn,benchmarks
# The oldest versions that pyproject.toml allows, in an environment of their own.
OLDEST := .venv-oldest/bin/python
OLDEST_PYTHON ?= python3.11
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-docs test-nightly test-faults test-gpu fuzz test-oldest check format bench docs release-check clean

help:
	@echo 'make demo           train on 10,000 images of clothes, report, classify three: four minutes'
	@echo 'make test           the tests (make test-slow: those of more than some ten seconds;'
	@echo '                    make test-docs: the programs of the documentation and the examples;'
	@echo '                    make test-nightly: those of minutes, and of large packages, if installed;'
	@echo '                    make test-faults: kills, full disks, lost processes, with a table of outcomes)'
	@echo 'make fuzz           hostile inputs for every reader, a minute (FUZZ_SECONDS=3600 make fuzz: an hour)'
	@echo 'make test-gpu       what a GPU computes beside a CPU, on a machine that has one'
	@echo 'make test-oldest    the tests with the oldest dependencies allowed, in .venv-oldest (6 GB)'
	@echo 'make check          format, lint, types and architecture'
	@echo 'make format         rewrite the files as make check wants them'
	@echo 'make bench          our speed beside timm'\''s'
	@echo 'make docs           the documentation as a site in build/docs, with search, readable without a network'
	@echo 'make release-check  build wheel and sdist, install the wheel alone, predict with it (6 GB)'
	@echo 'make clean          remove what the tools left (environments and runs stay)'

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
	    for python in $(SYSTEM_PYTHON); do \
	        "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	        python=; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo 'coatnet needs Python 3.11 or newer with its venv module (on Debian: apt-get install python3-venv);' \
	             'name one with: make SYSTEM_PYTHON=/path/to/python3' >&2; \
	        exit 1; \
	    fi; \
	    echo "Creating .venv with $$python"; \
	    "$$python" -m venv --clear .venv; \
	fi
	@echo 'Installing coatnet and what it needs into .venv (once; a few minutes, mostly PyTorch) ...'
	@$(PYTHON) $(INSTALL) 'pip>=25.1' $(CONSTRAINTS:%=-c %)
	@$(PYTHON) $(INSTALL) -e '.[$(EXTRAS)]' --group dev $(CONSTRAINTS:%=-c %)
	@touch $@

demo: $(INSTALLED)
	@$(COATNET) train fashion-mnist --data fashion-mnist-small --model coatnet-femto-64 --out $(DEMO) --max_minutes 3.8
	@echo
	@$(COATNET) evaluate $(DEMO)/bundle --data fashion-mnist-small
	@echo
	@echo 'Three images that the model has not seen:'
	@$(COATNET) predict $(DEMO)/bundle examples/images --top-k 3
	@echo
	@echo 'What $(DEMO) holds: report.html (open it in a browser), report.md, curves.png, predictions.csv, bundle/ (the finished model).'
	@echo 'Next (`. .venv/bin/activate` first, or write .venv/bin/coatnet):'
	@echo '  coatnet train --data path/to/folder --out runs/mine            your own images, a folder for each class'
	@echo '  coatnet evaluate $(DEMO)/bundle --data fashion-mnist-small   the same measurement again'
	@echo '  coatnet models                                                 the family, up to the CoAtNet-7 of the paper'
	@echo '  rm -r $(DEMO) && make demo                                   the demo from nothing'

test: $(INSTALLED)
	@$(PYTEST) -m 'not slow and not nightly and not docs and not faults' $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	@$(PYTEST) -m 'slow and not nightly' $(PYTEST_ARGS)

test-docs: $(INSTALLED)
	@$(PYTEST) -m 'docs and not nightly' $(PYTEST_ARGS)

test-nightly: $(INSTALLED)
	@$(PYTEST) -m nightly --timeout=7200

# One after the other: they take times, and each uses two processes or the whole disk.
test-faults: $(INSTALLED)
	@$(PYTEST) -m faults tests/faults

# What it finds is kept in tests/fuzz/found, which `make test` reads.
fuzz: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(PYTHON) -m tests.fuzz

# GPU_PYTHON names an environment whose torch sees the GPU, such as `make test-gpu GPU_PYTHON=python3`.
GPU_PYTHON ?= $(PYTHON)
test-gpu: $(if $(filter $(PYTHON),$(GPU_PYTHON)),$(INSTALLED))
	@PYTHONPATH=src $(GPU_PYTHON) -m pytest -m gpu tests/gpu

# Warnings of the dependencies about each other and about Python are no errors here: they would not be mended any more.
test-oldest: .venv-oldest/.installed
	@OMP_NUM_THREADS=1 $(OLDEST) -m pytest -o filterwarnings=default -m 'not nightly and not faults' $(PYTEST_ARGS)

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	@$(OLDEST_PYTHON) -m venv --clear .venv-oldest
	@echo 'Installing the oldest dependencies into .venv-oldest ...'
	@$(OLDEST) $(INSTALL) 'pip>=25.1'
	@$(OLDEST) $(INSTALL) -e '.[$(EXTRAS)]' --group test -c constraints-oldest.txt
	@touch $@

check: $(INSTALLED)
	@.venv/bin/ruff format --check
	@.venv/bin/ruff check
	@.venv/bin/pyrefly check
	@$(PYTEST) -q tests/test_architecture.py

release-check: $(INSTALLED)
	@$(PYTHON) scripts/check_release.py

format: $(INSTALLED)
	@.venv/bin/ruff format
	@.venv/bin/ruff check --fix

bench: $(INSTALLED)
	@$(PYTHON) benchmarks/model.py

docs: $(INSTALLED)
	@$(PYTHON) -m sphinx --quiet --fail-on-warning --keep-going --jobs 2 -b html docs build/docs
	@echo 'The documentation: build/docs/index.html'

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
