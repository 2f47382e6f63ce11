# make run    install into .venv, then run the study on the shipped model
# make test   install into .venv, then run the whole test suite and the style check
# make train  train the shipped model and its companions anew (hours on a CPU; a killed run goes on where it stopped)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python

.PHONY: run test train clean
.DELETE_ON_ERROR:

run: .venv/installed
	$(PY) flamingo_paper_exploration.py
	$(PY) flamingo_optimization.py

test: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m pytest

train: .venv/installed
	$(PY) train_mini_flamingo.py
	$(PY) train_companions.py

.venv/installed: requirements.txt requirements-peers.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	$(PY) -m pip install --quiet --no-deps -r requirements-peers.txt
	touch $@

clean:
	rm -rf .venv
