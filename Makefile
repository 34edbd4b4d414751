# make demo | test | lint | bench | pretrain; each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 1
# In order: later ones are trained on what earlier ones give.
NETS ?= clip clip_cells vae u2netp unet unet:more controlnet_canny lora
PIN := -c constraints.txt --disable-pip-version-check -q

.PHONY: demo test lint bench pretrain setup setup-test clean

setup: $(VENV)/.ready
setup-test: $(VENV)/.ready-test

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	@echo "setting up $(VENV) (some minutes the first time)"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "error: Python 3.11 or newer is needed: make PYTHON=python3.12"; \
	  exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install $(PIN) -e .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@$(BIN)/python -m pip install $(PIN) torch==2.13.0
	@$(BIN)/python -m pip install $(PIN) -e ".[test]"
	@touch $@

demo: setup
	@$(BIN)/python launch/demo.py --seeds $(SEEDS)

test: setup-test
	@$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

bench: setup-test
	@for script in retrieval input_pipeline train_step; do \
	  $(BIN)/python benchmarks/$$script.py || exit 1; done

# "unet:more" is a preset, in a run folder of its own: runs/pretrain_unet_more.
pretrain: setup
	@for net in $(NETS); do file=$${net%%:*}; preset=$${net#$$file}; \
	  $(BIN)/python launch/pretrain.py \
	  --config configs/pretrain_$$file.py$$preset \
	  --workdir runs/pretrain_$$file$${preset:+_$${preset#:}} \
	  || exit 1; done

clean:
	rm -rf $(VENV) runs data
