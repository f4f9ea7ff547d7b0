# `make` lists the targets. Each makes what it needs: .venv from requirements.lock, and servers for tests: Redis, PostgreSQL.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint bench bench-gate bench-peers api lock redis postgres compiler hiredis clean

help: ## list the targets
	@echo "make TARGET [ARGS=\"…\"]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(READY) ## watch real flight events flow; ARGS="--events 20000 --speed max -o json"
	@$(BIN)/millstream demo $(ARGS)

test: $(READY) redis postgres compiler hiredis ## run the tests; ARGS="-k house -x"
	@$(BIN)/python -m pytest --numprocesses 4 --dist worksteal $(ARGS)

lint: $(READY) ## check format, rules and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

bench: $(READY) redis hiredis ## measure, beside the engine's own limit; ARGS="handle latency --broker redis"
	@$(BIN)/python benchmarks/run.py $(ARGS)

bench-gate: $(READY) redis hiredis ## fail where an event takes more bytecodes than recorded, or below 85 % of a recorded ratio
	@$(BIN)/python -m benchmarks.bytecodes --gate
	@$(BIN)/python benchmarks/run.py --gate $(ARGS)

bench-peers: $(READY) redis hiredis ## measure, and other frameworks beside us, each in an environment of its own
	@$(BIN)/python benchmarks/run.py --broker redis $(ARGS) --peers

api: $(READY) ## write tests/public_api.txt anew, after the public API was changed on purpose
	@$(BIN)/python -m tests.public_api > tests/public_api.txt.new
	@mv tests/public_api.txt.new tests/public_api.txt

lock: ## renew the pins in requirements.lock; needs uv
	@scripts/lock.sh

clean: ## remove .venv and all caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

redis: $(READY)
	@scripts/redis.sh $(VENV)

postgres:
	@scripts/postgres.sh

compiler:
	@scripts/compiler.sh

hiredis:
	@scripts/hiredis.sh

# The stamp is written last: a setup that was cut off is done again.
$(READY): requirements.lock pyproject.toml scripts/setup.sh
	@scripts/setup.sh $(VENV)
	@touch $@
