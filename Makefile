# make demo: fine-tune the bundled checkpoint on data that needs no download, beside the same from
# scratch. make test: the tests. make bench: speed beside other implementations, under 10 minutes
# on 2 idle cores. All set up first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint format venv clean
demo: .venv/runtime
	$(BIN)/python train.py --name demo --overwrite @recipes/demo.txt
	$(BIN)/python train.py --name demo_scratch --overwrite @recipes/demo.txt \
	  --pretrained_dir none --model_type ViT-Mini_8
	$(BIN)/python curves.py "pre-trained=logs/demo" "from scratch=logs/demo_scratch" \
	  --output output/demo.png --title "ViT-Mini_8 on handwritten digits"

test: .venv/dev
	$(BIN)/python -m pytest

bench: .venv/dev
	$(BIN)/python benchmarks/throughput.py --batch 4 --minutes 8

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: .venv/dev

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/runtime: requirements.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt requirements-export.txt requirements-datasets.txt \
  requirements-notebook.txt .venv/runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv output logs
