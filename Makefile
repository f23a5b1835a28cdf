# make demo: fine-tune on data that needs no download. make test: the tests. make bench: speed
# beside other implementations, under 10 minutes on 2 idle cores. All set up first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint format venv clean
demo: .venv/runtime
	$(BIN)/python train.py --name demo --overwrite --dataset digits --model_type ViT-Ti_4 --pretrained_dir none \
	  --img_size 16 --train_batch_size 64 --learning_rate 0.1 --num_steps 300 --warmup_steps 30 \
	  --crop_min_area 0.7 --eval_every 50 --eval_batch_size 120

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

.venv/dev: requirements-dev.txt .venv/runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv output logs
