# Every target sets up .venv by itself: python3 (3.11 or newer) with its venv module and make are all that is needed.
PYTHON3 ?= python3
PYTHON := .venv/bin/python
READY := .venv/.ready
ARGS ?=

# Data sets that cannot be generated are looked for here; each is optional.
ifneq ($(wildcard ../shared/data/.),)
export KRONFISHER_DATA ?= $(abspath ../shared/data)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs gallery trainers site dist matrix release format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(READY)  ## estimate the Fisher of two small networks with every fit: table and figures
	$(PYTHON) -m kronfisher demo $(ARGS)

test: $(READY)  ## tests and docstring examples, in two processes; .ci/run adds the slow ones
	$(PYTHON) -m pytest -n 2 --dist worksteal $(ARGS)

check: $(READY)  ## style and types
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m pyright

bench: $(READY)  ## side by side with other libraries (makes its own environment)
	$(PYTHON) benchmarks/run.py $(ARGS)

docs: $(READY)  ## run the examples of the README and the documentation
	$(PYTHON) -m pytest --doctest-glob='*.md' README.md docs $(ARGS)

gallery: $(READY)  ## run the gallery's pages, and draw their pictures anew
	$(PYTHON) -m pytest --doctest-glob='*.md' docs/gallery --pictures $(ARGS)

trainers: $(READY)  ## run the pages about Lightning and TRL (makes its own environment)
	$(PYTHON) tools/trainers.py $(ARGS)

site:  ## the documentation as a site, built strictly (makes its own environment)
	$(PYTHON3) tools/documentation.py $(ARGS)

dist:  ## build wheel and source archive, install them beside torch and numpy alone, try every extra
	$(PYTHON3) tools/dist.py $(ARGS)

matrix:  ## tests with the oldest packages that are admitted, and with the newest on every Python found
	$(PYTHON3) tools/matrix.py $(ARGS)

release: $(READY)  ## what can be checked before a release, and what a person has to do then
	$(PYTHON) tools/release.py $(ARGS)

format: $(READY)  ## rewrite the files in the project's style
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format

clean:  ## remove what the targets made
	rm -rf .venv results build dist .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON3) -c 'import sys; sys.exit("kronfisher needs Python 3.11 or newer: make PYTHON3=/path/to/python3" if sys.version_info < (3, 11) else 0)'
	$(PYTHON3) -m venv .venv
	$(PYTHON) -m pip install --disable-pip-version-check -r constraints.txt
	$(PYTHON) -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	# laplace-torch brings torchvision. Nothing here needs it, and one built for another torch stops whatever imports it.
	$(PYTHON) -m pip uninstall --disable-pip-version-check --yes torchvision
	@touch $@
