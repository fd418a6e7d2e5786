# A machine with Python 3.11 to 3.13, make and a package index is all that is needed.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-slurm coverage mutants fuzz soak matrix lint format lock audit docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# $(call install,WHAT): by uv where it can be had (half a minute), else by pip (about three minutes). torch and
# torchvision come in one command, so that they fit each other. uv is told to trust what the system trusts, as pip does,
# or it fails behind a proxy with its own certificate.
define install
	@echo "setting up $(VENV): torch alone is about 3 GB, once"
	@if test -x $(BIN)/uv; then UV_SYSTEM_CERTS=1 $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e $(1); \
	else $(BIN)/python -m pip install --quiet -c constraints.txt -e $(1); fi
endef

$(BIN)/python:
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Python 3.11 to 3.13 is needed, this is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet uv || echo "no uv to be had: going on with pip"

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,'.[photos]')
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,'.[dev]')
	@touch $(VENV)/.core $(VENV)/.docs $@

# Apart from `dev`: with `datasets` comes pandas, which scikit-learn imports where it is, a second in each process.
$(VENV)/.all: pyproject.toml constraints.txt | $(VENV)/.dev
	$(call install,'.[huggingface]')
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,'.[docs]')
	@touch $@

install: $(VENV)/.core ## set up the virtual environment .venv

demo: $(VENV)/.core ## train ProPos on the embedded digits and show the clusters (two to three minutes)
	$(BIN)/deepclust train

# Tests that stand together run in one process where they can, so that the runs that they share are trained once.
test: $(VENV)/.dev lint ## lint, then every test but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m 'not slow'

test-all: $(VENV)/.dev $(VENV)/.all lint ## every test, with new random examples
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=search $(BIN)/pytest -n 2 --dist worksteal
	@if test "$$(id -u)" = 0 && test -e /etc/debian_version; then $(MAKE) test-slurm; \
	else echo "the tests of Slurm did not run: make test-slurm needs root on Debian"; fi

test-slurm: $(VENV)/.dev ## install and start a Slurm of two nodes on this machine (root, Debian), test with it, stop it
	tests/cluster/slurm.sh install
	OMP_NUM_THREADS=1 tests/cluster/slurm.sh run $(BIN)/pytest tests/cluster

# Data files are combined whether or not a test has failed; TESTS names some tests only.
coverage: $(VENV)/.dev ## which lines and branches the quick tests reach, their subprocesses included
	$(BIN)/coverage erase
	-OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 --dist worksteal -m 'not slow' $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# atheris, which makes the inputs up, comes over the environment and not into it; there are wheels for Linux.
fuzz: $(VENV)/.dev ## feed the readers of files of others for MINUTES=10 in all; READERS="image array" names some only
	OMP_NUM_THREADS=1 UV_SYSTEM_CERTS=1 $(BIN)/uv run --quiet --no-project --python $(BIN)/python --with atheris \
		python -m tests.fuzz --minutes $(or $(MINUTES),10) $(READERS)

soak: $(VENV)/.dev ## train, kill, go on, predict and sweep for MINUTES=60, and see that nothing grows (Linux)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --minutes $(or $(MINUTES),60)

matrix: $(VENV)/.dev ## quick tests on each Python, with the lowest and the newest dependencies; PYTHONS, TESTS name some
	$(BIN)/python -m tests.matrix $(if $(PYTHONS),--python $(PYTHONS)) $(if $(TESTS),--tests $(TESTS))

mutants: $(VENV)/.dev ## change a module or package at random places, and see whether the quick tests notice
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(or $(MODULE),deepclust/losses) \
		--sample $(or $(SAMPLE),36) --seed $(or $(SEED),0)

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## rewrite the code in the common style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Versions in constraints.txt stay where they can; for the newest: make lock UPGRADE=--upgrade
lock: | $(BIN)/python ## write the versions of all dependencies, for every system and Python, into constraints.txt
	UV_SYSTEM_CERTS=1 $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras $(UPGRADE) --no-annotate \
		--no-emit-index-url --custom-compile-command 'make lock' --output-file constraints.txt pyproject.toml

audit: | $(BIN)/python ## look for known vulnerabilities of the versions in constraints.txt (needs the network)
	@found=$$(UV_SYSTEM_CERTS=1 $(BIN)/uvx --quiet pip-audit --strict --progress-spinner off --disable-pip --no-deps \
		--requirement constraints.txt 2>&1); code=$$?; \
	case "$$found" in *"nown vulnerabilit"*) echo "$$found"; exit $$code;; *) echo "make audit needs uv, pip-audit from" \
		"a package index, and PyPI itself, which knows the vulnerabilities: $$(echo "$$found" | tail -n 1)"; exit 1;; esac

docs: $(VENV)/.docs ## build the documentation in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean: ## remove the virtual environment, the built documentation and the caches
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache
