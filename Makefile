# Everything a fresh machine needs: each target makes the environment it runs in.
#
#   make demo     train, merge and verify small networks on real images, in under a minute
#   make test     lint, types and the test suite: what continuous integration runs
#   make soak     the long runs: 20,000 histories and simulations, kills, every seeded fault (an hour; docs/soak.md)
#   make differential  every deterministic method of mergekit beside ours (needs the registry once; docs/differential.md)
#   make demo-strategies   every strategy on real data: three networks of digits, their merges' accuracy
#   make bench    ratios to mergekit, crdt-merge, plain torch and the machine's floor (long; see benchmarks/)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet --editable

.PHONY: demo demo-strategies test check soak differential bench docs answers clean

demo: $(VENV)/demo.installed
	$(BIN)/crdtmerge demo

demo-strategies: $(VENV)/test.installed
	$(BIN)/python -m benchmarks.digits

test: check
	$(BIN)/python -m pytest -n 2

soak: $(VENV)/test.installed
	$(BIN)/python -m pytest -n 2 -m soak

differential: $(VENV)/test.installed
	benchmarks/peers.sh || echo "some peers are not available; without mergekit the tests fail"
	$(BIN)/python -m pytest -m differential tests/differential

check: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test.installed
	benchmarks/peers.sh || echo "some peers are not available; the table says which"
	$(BIN)/python -m benchmarks.merge --size big
	$(BIN)/python -m benchmarks.merge --size big --memory
	$(BIN)/python -m benchmarks.replica --ops 100000 --model .bench/big/ft1
	$(BIN)/python -m benchmarks.gossip
	$(BIN)/python -m benchmarks.paper_tier3

docs: $(VENV)/test.installed
	$(BIN)/python -m tests.house.cli_page > docs/cli.md
	$(BIN)/python -m tests.house.laws_page > docs/laws.md

answers: $(VENV)/test.installed
	$(BIN)/python -m tests.numerics.definitions

$(VENV)/%.installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) '.[$*]'
	touch $@

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .bench .peers .cross
