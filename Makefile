# Two commands from a fresh clone with only Python: make demo, make test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_JOBS ?= auto
MINUTES ?= 10

.PHONY: demo test check lint format types bench fuzz peers guests guests-elf soak clean help

help:
	@echo "make demo    install, and compare spinlocks on 8 vCPUs over 8, 4 and 2 physical CPUs"
	@echo "make test    install, and run all tests"
	@echo "make check   format, lint, types and tests: before each push"
	@echo "make peers   Debian's QEMU and gdb, which some tests compare with (needs root)"
	@echo "make guests  Linux guests in out/guests, from Debian's packages"
	@echo "make fuzz    hostile guests for an hour, each in a child process"
	@echo "make soak    a storm in a Linux guest, MINUTES=10 on each clock"
	@echo "make bench   this project beside bare Unicorn, QEMU and SimPy, as ratios"

$(STAMP): pyproject.toml setup.py $(wildcard aiovm/engine/unicorn/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[plot,trace,test,lint]"
	touch $@

demo: $(STAMP)
	@mkdir -p out
	$(BIN)/aiovm locks --vcpus 8 --pcpus 8,4,2 --no-ple --duration 60ms --plot out/locks.png --json out/locks.json
	@echo "picture: out/locks.png   rows: out/locks.json"

test: $(STAMP)
	$(BIN)/python -m pytest -n $(PYTEST_JOBS) --dist worksteal -q

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

# All checks run, all failures are listed.
check: $(STAMP)
	@status=0; for step in lint types test; do $(MAKE) --no-print-directory $$step || status=1; done; exit $$status

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[bench]"
	$(BIN)/python -m benchmarks

# Another hour: make fuzz SEED=100000
fuzz: $(STAMP)
	$(BIN)/python scripts/fuzz.py --seconds 3600 --seed $(or $(SEED),0)

# What the tests marked "peer" compare with. Without them those tests are skipped, but fail where CI is set.
peers:
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends qemu-system-x86 gdb >/dev/null

guests: $(STAMP)
	$(BIN)/python scripts/make_guests.py

soak: $(STAMP)
	PYTHONPATH=. $(BIN)/python tests/linux_storm.py --minutes $(MINUTES) --clock wall
	PYTHONPATH=. $(BIN)/python tests/linux_storm.py --minutes $(MINUTES) --clock virtual

guests-elf:
	$(MAKE) -C aiovm/guests

clean:
	rm -rf $(VENV) build out *.egg-info
