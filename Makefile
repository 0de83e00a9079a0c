# Everything runs in .venv, which `setup` makes and keeps up to date; `make help` lists the targets.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# The Python to build .venv with (3.10 to 3.12). An existing .venv keeps its own unless another one is named.
PYTHON ?= $(shell $(BIN)/python -c 'import os, sys; print(os.path.realpath(sys.executable))' 2>/dev/null || echo python3)

CONSTRAINTS := requirements/constraints.txt
# Satisfies the opencv-python that dependencies ask for with opencv-python-headless (the reason is in its file).
OPENCV := requirements/opencv-python
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS)

# Packages of the tasks that are there; a new one has to be installed (setup.py maps them).
TASK_PACKAGES := $(wildcard classification/piip_cls llava/piip_llava)

# Written last, so an interrupted set-up is never taken for complete. It names the folder it was made in: a copied or
# moved tree builds a new one (the scripts in $(BIN) hold absolute paths) instead of running the code of the tree it came
# from. So does a PYTHON of another version than the environment's.
STAMP := $(VENV)/.piip-setup
# There while packages are being put in place: found at the start of a set-up, it means that one was cut off half-way.
BUSY := $(VENV)/.piip-busy
MINOR := import sys; print("%d.%d" % sys.version_info[:2])
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR) $(shell $(PYTHON) -c '$(MINOR)' 2>/dev/null))
.PHONY: $(STAMP)
endif

# One test process per core, at most 8: each imports torch. Threads would only fight for the same cores.
TEST_ARGS ?=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

DEMO_ARGS ?=

.PHONY: help setup demo demo-seg demo-cls demo-llava test test-all lint format tables clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=python3.12 (for setup), TEST_ARGS='-k name' (for test), DEMO_ARGS='--help' (for demo)"

setup: $(STAMP) ## make .venv ready: the tested versions of everything that demo, test and lint need

$(STAMP): setup.py $(CONSTRAINTS) $(OPENCV)/pyproject.toml Makefile $(addsuffix /__init__.py,$(TASK_PACKAGES))
	@rm -f $@
	@case "$$($(PYTHON) -c '$(MINOR)' 2>/dev/null)" in 3.10|3.11|3.12) ;; *) \
		echo "PIIP needs Python 3.10, 3.11 or 3.12; '$(PYTHON)' says: $$($(PYTHON) -V 2>&1 | head -n 1)." \
		"Name another one: make setup PYTHON=python3.11" >&2; exit 1;; esac
	@echo "==> 1/3 virtual environment in $(VENV) ($$($(PYTHON) -V))"
	@if [ "$$($(BIN)/python -c 'import pip; $(MINOR)' 2>/dev/null)" != "$$($(PYTHON) -c '$(MINOR)')" ] \
		|| ! grep -qsF '$(CURDIR)/$(VENV)' $(BIN)/activate || [ -e $(BUSY) ]; then \
		rm -f $(BIN)/activate; \
		if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv --clear $(VENV); \
		else $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip install -q pip --target \
			"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; fi; fi
	@$(PIP_INSTALL) -q --upgrade pip
	@echo "==> 2/3 packages, in the versions of $(CONSTRAINTS) (a few GB the first time, most of it torch)"
	@$(BIN)/python -c 'import importlib.metadata as m; import sys; sys.exit("headless" not in m.version("opencv-python"))' \
		2>/dev/null || $(BIN)/python -m pip uninstall -q -y opencv-python opencv-python-headless 2>/dev/null
	@touch $(BUSY); $(PIP_INSTALL) --build-constraint $(CONSTRAINTS) ./$(OPENCV) -e '.[all]'; \
		status=$$?; [ $$status -gt 128 ] || rm -f $(BUSY); exit $$status
	@echo "==> 3/3 check"
	@$(BIN)/python -m pip check
	@$(BIN)/python -c 'import cv2, mmcv, mmdet, mmseg, transformers, piip; print("piip", piip.__version__, "is ready")'
	@echo "$(CURDIR) $$($(BIN)/python -c '$(MINOR)')" > $@

demo: setup ## train, evaluate and draw with a small three-branch detector on real images (CPU, about 10 minutes)
	$(BIN)/python tools/demo.py $(DEMO_ARGS)

demo-seg: setup ## the same with a small segmentor (CPU, about 10 minutes)
	$(BIN)/python tools/demo.py --task segmentation $(DEMO_ARGS)

demo-cls: setup ## train and evaluate a small three-branch classifier on real images (CPU, about 7 minutes)
	$(BIN)/python tools/demo_cls.py $(DEMO_ARGS)

demo-llava: setup ## train a tiny PIIP-LLaVA in both stages and ask it about held-out images (CPU, about 7 minutes)
	$(BIN)/python tools/demo_llava.py $(DEMO_ARGS)

test: setup ## run the tests, without the slow ones
	$(PYTEST) -m "not slow" $(TEST_ARGS)

test-all: setup ## run every test
	$(PYTEST) $(TEST_ARGS)

lint: setup ## check style, types and duplicate code; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pylint piip $(TASK_PACKAGES)

format: setup ## format the code and repair what lint can repair by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: setup ## count the costs of every published row anew and rewrite the tables of the READMEs
	$(BIN)/python tools/make_tables.py --costs

clean: ## remove caches and build products; .venv, data and results stay
	rm -rf build dist ./*.egg-info $(OPENCV)/build $(OPENCV)/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
