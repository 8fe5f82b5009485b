# `make help` lists what there is to do. Each target makes its environment on first use: `.venv`, and
# `.venv-demo`, `.venv-peers`, `.venv-frameworks` and `.venv-crewai` for what their names say alone.

PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
# Interpreters that `make test-wheel` installs into, and further options such as `--extra openai`.
WHEEL_PYTHONS ?= $(PYTHON)
WHEEL_ARGS ?=

# Workers read modules that others have compiled, also where Python is told to keep none.
export PYTHONDONTWRITEBYTECODE :=

VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# Named after what pyproject.toml says, not after its date: a fresh checkout, a switched branch or
# a touched file costs nothing, and without a network everything works from the second time on.
INSTALLED := .installed-$(firstword $(shell cksum pyproject.toml))
STAMP := $(VENV)/$(INSTALLED)
DEMO_STAMP := $(VENV)-demo/$(INSTALLED)
PEERS_STAMP := $(VENV)-peers/$(INSTALLED)
FRAMEWORKS_STAMP := $(VENV)-frameworks/$(INSTALLED)
CREWAI_STAMP := $(VENV)-crewai/$(INSTALLED)

# What the tests must cover to the last branch: the core, as pyproject.toml's import contract lists it.
CORE := __init__ $(shell sed -n '/^source_modules/,/^]/s/.*"asyncbucket[.]\(.*\)".*/\1/p' pyproject.toml)
comma := ,
empty :=
CORE_FILES := $(subst $(empty) $(empty),$(comma),$(CORE:%=asyncbucket/%.py) $(CORE:%=asyncbucket/%/*))
# What stands beside the core: `make test` doesn't trace it, for that takes time.
OTHERS := $(filter-out $(CORE) py __pycache__,$(basename $(notdir $(wildcard asyncbucket/*))))
OTHER_FILES := $(subst $(empty) $(empty),$(comma),$(OTHERS:%=asyncbucket/%.py) $(OTHERS:%=asyncbucket/%/*))
# The folders whose tests cover the core; in the others no test is traced.
MEASURED := engine feedback http stores batch telemetry
# Those that run long are spread evenly, and a sixth of the time is waiting: three for two processors.
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) \* 3 / 2)
SPREAD := --dist worksteal
# Where tests are that wait on the machine's clock: to read all the others takes every worker seconds.
REAL_CLOCK := $(shell grep -rl --include='test_*.py' --exclude-dir=frameworks 'real_clock' tests)

# What the type checkers read: folders that hold a module already.
SOURCES := asyncbucket tests $(patsubst %/,%,$(sort $(dir $(wildcard benchmarks/*.py examples/*.py))))

.DEFAULT_GOAL := help
.PHONY: help demo test coverage fuzz mutants test-lowest test-wheel lint format bench peers frameworks docs links build clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO_STAMP) ## Run agents under a provider's limits, without asyncbucket and with it
	@$(VENV)-demo/bin/asyncbucket demo $(DEMO_ARGS)

# What waits on the machine's clock runs last: it is idle for most of the time, so four at once.
test: $(STAMP) ## Run all tests; the core must be covered to the last branch
	@$(PY) -m coverage erase
	MEASURED='$(MEASURED)' $(PY) -m coverage run --omit='$(OTHER_FILES)' -m pytest -n $(WORKERS) $(SPREAD) -m 'not real_clock' $(PYTEST_ARGS)
	@$(PY) -m coverage combine --quiet
	@rm -f .coverage.*  # of processes that were killed
	@# What is covered is shown whether or not these pass.
	$(PY) -m pytest -n 4 $(SPREAD) -m real_clock $(REAL_CLOCK) $(PYTEST_ARGS); failed=$$?; \
	$(PY) -m coverage report --include='$(CORE_FILES)' --fail-under=100 && exit $$failed

coverage: $(STAMP) ## Run all tests and show what they cover, outside the core, too
	@$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest -n auto $(SPREAD) $(PYTEST_ARGS)
	@$(PY) -m coverage combine --quiet
	@rm -f .coverage.*  # of processes that were killed
	$(PY) -m coverage report --fail-under=95

fuzz: $(STAMP) ## Play random histories of limiters against an oracle, for ten minutes or SECONDS
	$(PY) tests/engine/fuzz.py --seconds $(or $(SECONDS),600)

mutants: $(STAMP) ## Change the core in hundreds of ways, and look which no test notices
	@$(PY) $(PIP_INSTALL) 'mutmut>=3.8'
	$(VENV)/bin/mutmut run
	$(VENV)/bin/mutmut results

test-lowest: $(STAMP) ## Run the tests with the oldest dependencies that pyproject.toml allows
	@$(PYTHON) -m venv $(VENV)-lowest
	@$(PY) $(PIP_INSTALL) uv
	$(PY) -m uv pip compile --quiet --no-annotate --no-header --resolution lowest-direct \
	    --python $(VENV)-lowest/bin/python --extra dev --extra all \
	    --output-file $(VENV)-lowest/lowest.txt pyproject.toml
	$(VENV)-lowest/bin/python $(PIP_INSTALL) -c $(VENV)-lowest/lowest.txt -e '.[dev,all]'
	@# Old libraries deprecate each other; nobody will mend them, so those warnings are let through.
	$(VENV)-lowest/bin/python -m pytest -W default::DeprecationWarning $(PYTEST_ARGS)

lint: $(STAMP) ## Check style, types and architecture
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(SOURCES)
	$(VENV)/bin/basedpyright $(SOURCES)
	$(VENV)/bin/lint-imports --no-logo

format: $(STAMP) ## Format the code and mend what can be mended
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP) ## Measure against the peers; tables and plots go to benchmarks/results
	$(PY) -m benchmarks

peers: $(PEERS_STAMP) ## Measure against the peers that make LLM calls; token-throttle needs Python 3.12
	$(VENV)-peers/bin/python -m benchmarks.four29

# Apart from `make test`, for the packages take 1.7 GB.
frameworks: $(FRAMEWORKS_STAMP) $(CREWAI_STAMP) $(STAMP) ## Run each example of docs/frameworks.md with the real package, and audit
	$(VENV)-frameworks/bin/python -m pytest -n 2 $(SPREAD) tests/frameworks $(PYTEST_ARGS)
	$(VENV)-crewai/bin/python -m pytest tests/frameworks -k 'CrewAI or mcp' $(PYTEST_ARGS)
	$(PY) -m pytest tests/frameworks -k llama_index $(PYTEST_ARGS)

docs: $(STAMP) ## Build the documentation; warnings and pages that are hard to read are errors
	@$(PY) tests/docs/reading.py
	$(PY) -m sphinx --quiet --fresh-env --fail-on-warning -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

links: $(STAMP) ## Look whether what the documentation links to is still there
	$(PY) -m sphinx --quiet -b linkcheck docs docs/_build/links

build: $(STAMP) ## Build the wheel and the source distribution, without a network
	@rm -rf dist
	$(PY) -m build --no-isolation --outdir dist .

test-wheel: build ## Install the wheel with each extra alone, and ask what it promises
	$(PY) tests/packaging/matrix.py dist $(WHEEL_PYTHONS:%=--python %) $(WHEEL_ARGS)

clean: ## Remove environments, caches and everything built
	rm -rf $(VENV) $(VENV)-* build dist htmlcov docs/_build .coverage .coverage.* .hypothesis
	rm -rf mutants .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Install an extra of this tree into an environment: $(call install,environment,extra,pip's options)
define install
	@test -x $(1)/bin/python || { echo "making $(1)"; $(PYTHON) -m venv $(1); }
	@$(1)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "asyncbucket needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "installing dependencies into $(1) (first run only)"
	@$(1)/bin/python $(PIP_INSTALL) $(3) -e '.[$(2)]'
	@rm -f $(1)/.installed-*
	@touch $@
endef

$(STAMP): pyproject.toml
	$(call install,$(VENV),dev$(comma)all,--quiet)

# Packages are shown as they come. Python compiles what it imports: all of LlamaIndex is far more than that.
$(DEMO_STAMP): pyproject.toml
	$(call install,$(VENV)-demo,cli,--no-compile)

$(PEERS_STAMP): pyproject.toml
	$(call install,$(VENV)-peers,peers,--quiet)

$(FRAMEWORKS_STAMP): pyproject.toml
	$(call install,$(VENV)-frameworks,frameworks,--quiet)

$(CREWAI_STAMP): pyproject.toml
	$(call install,$(VENV)-crewai,crewai,--quiet)
