# make search     install, then search (ARGS replaces the default arguments)
# make test       install, then run the tests, three files at once (ARGS goes to pytest)
# make lint       install, then ruff and mypy
# make clean      remove what make and the tools made; results/ stays
#
# Only Python 3.11 to 3.14, with its venv module, is needed. PYTHON=... names another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

search: ARGS ?= --task binary --samples 200

.DEFAULT_GOAL := search
.PHONY: search test lint clean
# Two pips in one environment would undo each other.
.NOTPARALLEL:

search: $(VENV)/.installed
	$(BIN)/python -m tune_steel.search $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp is written after its step has succeeded, so an interrupted install is done again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || { \
	  echo "make: $(PYTHON) must be Python 3.11 to 3.14 with its venv module (Debian: apt install python3-venv); make PYTHON=... names another" >&2; \
	  exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: EXTRAS :=
$(VENV)/.installed-test: EXTRAS := [test]
$(VENV)/.installed-dev: EXTRAS := [dev]
$(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing tune_steel$(EXTRAS) into $(VENV) (the first time takes minutes)"
	@$(PIP_INSTALL) -e '.$(EXTRAS)'
	@touch $@
