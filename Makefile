# Everything that is done with this repository. `make help` lists it.
#
# Each target makes the environment that it needs, on a machine with Python 3.11 or newer and make.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
SAGAS  ?= 300
KILLS  ?= 10
SEED   ?=
SEEDS  ?= 20000
MODE   ?= quick

BUF_VERSION := 1.75.0

VENV_PROTOS := $(VENV)-protos
PY          := $(VENV)/bin/python
PY_PROTOS   := $(VENV_PROTOS)/bin/python
READY        := $(VENV)/.ready
READY_PROTOS := $(VENV_PROTOS)/.ready

# Without our own settings a machine's could make pip talkative, or a check depend on the machine.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.SUFFIXES:
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test check check-style check-types check-layers check-protos check-exports \
        check-docs check-buf format protos constraints bench bench-scale soak simulate crash-points \
        cuts planted-bugs clean

help: ## list the targets and the variables
	@echo "make TARGET [VARIABLE=value ...]"
	@echo
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
	  while IFS='|' read -r target text; do printf '  %-14s %s\n' "$$target" "$$text"; done
	@echo
	@echo "  PYTHON=python3   the interpreter that environments are made with (3.11 or newer)"
	@echo "  VENV=.venv       where the environment is"
	@echo "  ARGS=            further arguments for test and for what runs a script"
	@echo "  SAGAS=300 KILLS=10 SEED=   how much soak does, and its seed (test takes SEED too)"
	@echo "  SEEDS=20000 SEED=          how many schedules simulate plays; with SEED that one alone"
	@echo "  MODE=quick       how far the property tests of test search: quick, long or night;"
	@echo "                   what soak does: saga (default) or 2pc"

# ------------------------------------------------------------------------------ environments

setup: $(READY) ## make the environment (the other targets do it when they need it)
	@echo "$(VENV) is ready"

# Usage: $(call make_venv,FOLDER). Keeps one that works, since it may be in use; makes it otherwise,
# and says in one line why if that can't be done.
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$($(PYTHON) -c 'import sys; print("Python %d.%d" % sys.version_info[:2])' 2>/dev/null || echo "no Python"); \
	  echo "amends needs Python 3.11 or newer, and $(PYTHON) is $$found: give another, as in make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) lacks the module venv: install it first (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
	@echo "installing into $(1) (once; about a minute)"
	@$(1)/bin/python -m pip install --quiet 'pip>=25.1'
endef

$(READY): pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[runtime,postgres,psycopg]' --group dev
	@touch $@

# The group pins its members, so the constraints (made for another protobuf) are left out; only
# wheels, because building the generator from source takes half an hour and then mostly fails.
$(READY_PROTOS): pyproject.toml
	$(call make_venv,$(VENV_PROTOS))
	@$(PY_PROTOS) -m pip install --quiet --only-binary :all: --group protos || { \
	  echo "the pinned protobuf generator could not be installed; it has wheels for Python 3.11 to 3.13, so try make $(or $(MAKECMDGOALS),protos) PYTHON=python3.13" >&2; exit 1; }
	@touch $@

# ------------------------------------------------------------------------------- what it does

demo: $(READY) ## start everything, play the scenes, kill the runtime, audit the ledgers
	@$(PY) scripts/demo.py $(ARGS)

# Four processes also on two cores: much of their time is waiting for the processes that they start.
# Each begins with a quarter of the tests in their order, so that a module's fixtures are made once;
# who has done its part takes half of what another has left. And bytecode is kept, whatever this
# shell says: hundreds of processes are started, and compiling is a third of each one's start.
test: $(READY) ## run the tests (ARGS: arguments of pytest)
	@PYTHONDONTWRITEBYTECODE= $(PY) -m pytest --numprocesses=4 --dist=worksteal --hypothesis-profile=$(MODE) $(if $(SEED),--hypothesis-seed=$(SEED)) $(ARGS)

bench: $(READY) ## compare with the naive loop (ARGS=--telemetry, --parts or --micro: what parts cost)
	@$(PY) scripts/bench.py $(ARGS)

bench-scale: $(READY) ## sizes and bad days (ARGS="--only recovery overload", --million)
	@$(PY) scripts/bench_scale.py $(ARGS)

# MODE=quick is the default, for the tests.
SOAK_MODE = $(if $(filter-out quick,$(MODE)),--mode $(MODE))

soak: $(READY) ## kill processes under load, then audit the books (MODE=2pc: two-phase commits)
	@$(PY) scripts/soak.py $(SOAK_MODE) --sagas $(SAGAS) --kills $(KILLS) $(if $(SEED),--seed $(SEED)) $(ARGS)

simulate: $(READY) ## play schedules of faults in virtual time; with SEED: one again, with its trace
	@$(PY) scripts/simulate.py $(if $(SEED),--seed $(SEED),--seeds $(SEEDS)) $(ARGS)

crash-points: $(READY) ## die at every commit and every call, and again at each of the recovery
	@$(PY) scripts/crash_points.py $(ARGS)

cuts: $(READY) ## cut the stream to a participant at every byte of a batch; then audit
	@$(PY) scripts/cut_streams.py $(if $(SEED),--seed $(SEED)) $(ARGS)

planted-bugs: $(READY) ## plant bugs in a copy of the source, and see which test finds each
	@$(PY) scripts/planted_bugs.py $(ARGS)

# ---------------------------------------------------------------------------- what must hold

check: check-style check-types check-layers check-protos check-exports check-docs check-buf ## check style, types, layers, generated files, exports, protos
	@echo "all checks passed"

check-style: $(READY)
	@echo "style"
	@$(PY) -m ruff check --quiet
	@$(PY) -m ruff format --check --quiet || { \
	  $(PY) -m ruff format --check; echo "run make format" >&2; exit 1; }

check-types: $(READY)
	@echo "types"
	@$(PY) -m mypy --no-error-summary participants runtime scripts tests

check-layers: $(READY)
	@echo "layers"
	@report=$$($(VENV)/bin/lint-imports --no-logo 2>&1) || { echo "$$report" >&2; exit 1; }

check-protos: $(READY_PROTOS)
	@echo "generated code"
	@$(PY_PROTOS) scripts/gen_protos.py --check

check-exports: $(READY)
	@echo "exports"
	@report=$$($(PY) -m pytest --quiet tests/test_exports.py 2>&1) || { echo "$$report" >&2; exit 1; }

check-docs: $(READY)
	@echo "generated documents"
	@$(PY) scripts/draw_states.py --check
	@$(PY) scripts/gen_cli_docs.py --check
	@$(PY) scripts/gen_metrics_docs.py --check

# Asking buf for its version first tells a missing buf, which is skipped, from a finding, which fails.
check-buf:
	@echo "protos"
	@if ! command -v npx >/dev/null 2>&1; then \
	  echo "  buf lint skipped: no npm"; \
	elif ! npx --yes --loglevel=error @bufbuild/buf@$(BUF_VERSION) --version </dev/null >/dev/null 2>&1; then \
	  echo "  buf lint skipped: npm could not fetch @bufbuild/buf $(BUF_VERSION)"; \
	else \
	  npx --yes --loglevel=error @bufbuild/buf@$(BUF_VERSION) lint </dev/null; \
	fi

# ------------------------------------------------------------------------------ what it writes

format: $(READY) ## format the code and mend what can be mended
	@$(PY) -m ruff check --fix --quiet || true
	@$(PY) -m ruff format --quiet

protos: $(READY_PROTOS) ## generate participants/amends/v1 from protos/
	@$(PY_PROTOS) scripts/gen_protos.py

constraints: ## write constraints.txt anew: the newest versions that pyproject.toml allows
	$(call make_venv,build/venv-constraints)
	@build/venv-constraints/bin/python -m pip install --quiet --editable '.[runtime,postgres,psycopg]' --group dev
	@{ echo "# The versions that the Makefile installs. Made by 'make constraints'."; \
	   build/venv-constraints/bin/python -m pip freeze --exclude-editable; } > build/constraints.txt
	@mv build/constraints.txt constraints.txt
	@rm -rf build/venv-constraints
	@echo "wrote constraints.txt"

clean: ## remove all that make and the tools have made, the environments too
	@rm -rf $(VENV) $(VENV_PROTOS) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find participants runtime scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
