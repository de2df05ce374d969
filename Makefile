# Two commands do everything on a fresh machine with Python: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test contacts setup lint types bindings tests slow test-gpu train-demo tune clean

help:
	@echo "make demo    set up, export the demo checkpoint, verify it, decode, print the speed table"
	@echo "make test    set up, then lint, types and tests"
	@echo "make contacts   meet outside things: a clean environment that pip fills, and the builder of TensorRT for RTX"
	@echo "make setup   fill $(VENV) with the pinned versions of constraints.txt"
	@echo "make slow    the tests that take minutes"
	@echo "make test-gpu   the acceptance suite, on whatever engines this machine has"
	@echo "make tune    ten minutes: make a CLLM of the committed parent, and compare the two"
	@echo "make train-demo   two hours and a half: the demo's model, from nothing"

demo: setup
	$(BIN)/cllm-export demo --force

test: lint types tests

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "setup 1 of 2: make an environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@echo "setup 2 of 2: install the pinned packages; pip names each, and the largest is torch"
	@(while sleep 25 > /dev/null 2>&1; do echo "setup 2 of 2: still installing"; done) & beat=$$!; trap "kill $$beat" EXIT; \
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt \
		"setuptools" --editable ".[cpu,train,evaluate,dev]"
	@touch $(READY)
	@echo "setup: $(VENV) is ready"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# In CI, nothing may be missing: each folder of tests must have run, and pip must get every binding.
ifeq ($(CI),true)
REQUIRED_FOLDERS := tests/unit tests/parity tests/e2e tests/tensorrt tests/tensorrt/rtx tests/acceptance
REQUIRED_BINDINGS := --required
NO_SKIPS := --no-skips
endif

# Published Python bindings that the doubles of TensorRT and CUDA are generated from; NVIDIA's licence, so they stay below
# build/. Tests that need one that pip could not get are skipped with that reason.
bindings: setup
	$(BIN)/python -m tests.tensorrt.install $(REQUIRED_BINDINGS)

tests: setup bindings
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --ignore tests/contacts -m "not slow and not gpu and not tensorrt" \
		$(addprefix --require-run ,$(REQUIRED_FOLDERS))

# What meets outside things and takes long: not part of `make test`. In CI a contact that is skipped fails.
contacts: setup
	$(BIN)/python -m pytest tests/contacts --require-run tests/contacts $(NO_SKIPS) -rs

# The acceptance suite, slow tests included; what this machine lacks is skipped with the reason.
test-gpu: setup bindings
	$(BIN)/python -m pytest tests/acceptance -rs

slow: setup
	$(BIN)/python -m pytest --ignore tests/contacts -m slow

# The demo's training from nothing, two hours and a half on one core; then what `examples/text_to_sql` holds can be replaced.
EXAMPLE := examples/text_to_sql
DATA := $(EXAMPLE)/build
RECIPE := --held-out $(DATA)/validation.jsonl --num-held-out 96 --optimizer muon --mixed-precision bf16 --threads 1

$(DATA)/train.jsonl: $(READY) $(EXAMPLE)/generate.py $(EXAMPLE)/questions.py $(EXAMPLE)/schemas.py
	$(BIN)/python $(EXAMPLE)/generate.py --output $(DATA)

train-demo: $(DATA)/train.jsonl
	$(BIN)/python $(EXAMPLE)/start.py --data $(DATA)/train.jsonl --output $(DATA)/start
	$(BIN)/cllm-export tune $(DATA)/start --prompts $(DATA)/train.jsonl --output $(DATA)/parent --force $(RECIPE) \
		--objective autoregressive --minutes 35 --batch-size 48 --learning-rate 0.003 --matrix-learning-rate 0.02
	$(BIN)/cllm-export tune $(DATA)/parent --prompts $(DATA)/train.jsonl --output $(DATA)/middle --force $(RECIPE) \
		--block-size 16 --block-size 8 --block-size 32 --minutes 60 --learning-rate 0.0018 --matrix-learning-rate 0.013 \
		--decay 0.85 --autoregressive-weight 2
	$(BIN)/cllm-export tune $(DATA)/middle --prompts $(DATA)/train.jsonl --output $(DATA)/checkpoint --force $(RECIPE) \
		--block-size 16 --block-size 8 --block-size 32 --minutes 45 --batch-size 24 --learning-rate 0.0007 \
		--matrix-learning-rate 0.005 --decay 1 --autoregressive-weight 3 --distance-weight 0.9
	$(BIN)/cllm-export evaluate $(DATA)/checkpoint --parent $(DATA)/parent --task prompts --data $(DATA)/held-out.jsonl

# Ten minutes on two idle cores: the committed parent becomes a CLLM that decodes blocks of 8, and the two are compared. By
# steps, not minutes: on a machine that works for others too it takes longer and comes to the same. The
# ordinary loss weighs enough, and near guesses count enough more than far ones, to keep the parent's quality on the way.
tune: $(DATA)/train.jsonl
	ACCELERATE_USE_CPU=true $(BIN)/python -m torch.distributed.run --nproc-per-node 2 --standalone -m cllm_export tune \
		$(EXAMPLE)/parent --prompts $(DATA)/train.jsonl --limit 30000 --output $(DATA)/tuned --force $(RECIPE) \
		--steps 480 --block-size 8 --num-windows 5 --batch-size 16 --autoregressive-weight 10 --distance-weight 0.7 \
		--learning-rate 0.0012 --matrix-learning-rate 0.008 --decay 0.95
	$(BIN)/cllm-export build $(EXAMPLE)/parent --output $(DATA)/parent-bundle --force
	$(BIN)/cllm-export build $(DATA)/tuned --output $(DATA)/tuned-bundle --force
	$(BIN)/cllm-export evaluate $(DATA)/tuned-bundle --parent $(DATA)/parent-bundle --task prompts \
		--data $(EXAMPLE)/prompts.jsonl

clean:
	rm -rf $(VENV) demo-bundle build *.egg-info
