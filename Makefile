# make train   set up a virtual environment and train a BabyLlama (resumes an interrupted run)
# make test    set it up and run the tests
# make lint    ruff and mypy
# make docs    build the site into build/site; look at it with: python3 -m http.server -d build/site
# make gpu-bundle   what scripts/gpu_check.py needs on a machine without a network (docs/gpu_check.md)
# make audit   known vulnerabilities of what was installed (pip-audit; it asks pypi.org)
#
# PYTHON=python3.12 chooses the interpreter, ARGS="--max_steps 500" passes flags to the training script.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/installed-from-$(CONSTRAINTS)
TORCH := $(shell sed -n 's/^torch==//p' $(CONSTRAINTS))

.PHONY: train test lint gpu-bundle audit setup clean

train: setup
	$(PY) scripts/train_babyllama.py --resume --overwrite $(ARGS)

test: setup
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -n auto $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

.PHONY: docs
# Not with --quiet, which would hide warnings from --strict.
docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

gpu-bundle: setup
	$(PY) scripts/gpu_bundle.py --output gpu-bundle $(ARGS)

audit: setup
	@$(VENV)-audit/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)-audit
	@$(VENV)-audit/bin/python -m pip install -q pip-audit
	$(VENV)-audit/bin/pip-audit --progress-spinner off --skip-editable --path $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

setup: $(STAMP)

# A virtual environment that was cut short or moved is made anew. Where there is no GPU, PyTorch's CPU build: from pip's
# own sources if they hold it, else from PyTorch's through uv, else whatever pip finds (several gigabytes).
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is missing or older than 3.10; choose another with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); } \
		|| { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV) (some minutes the first time) ..."
	@if command -v nvidia-smi >/dev/null 2>&1 || [ "$$(uname -s)" != Linux ]; then \
		$(PY) -m pip install -q "torch==$(TORCH)"; \
	else \
		$(PY) -m pip install -q "torch==$(TORCH)+cpu" 2>/dev/null \
		|| { $(PY) -m pip install -q uv && $(PY) -m uv pip install -q --python $(PY) --torch-backend=cpu "torch==$(TORCH)"; } \
		|| $(PY) -m pip install -q "torch==$(TORCH)"; \
	fi
	$(PY) -m pip install -q -c $(CONSTRAINTS) -e ".[test,lint]"
	@touch $@

# The extra "docs", by name: with -e ".[docs]" pip would build this package again, which takes longer than all the rest.
$(STAMP)-docs: $(STAMP)
	$(PY) -m pip install -q -c $(CONSTRAINTS) mkdocs-material "mkdocstrings[python]"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-audit runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
