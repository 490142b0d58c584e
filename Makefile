# make demo: from made-up data to a grounded sentence. make test: the test suite. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
# TensorRT-RTX comes as Linux x86-64 wheels; elsewhere its tests skip and say so.
EXTRAS := $(shell [ "$$(uname -sm)" = "Linux x86_64" ] && echo cpu,plot,train,export,engine,rtx,dev || echo cpu,plot,train,export,engine,dev)

.PHONY: demo test lint environment clean

environment: $(VENV)/ready

# constraints.txt pins everything, so that today's environment is tomorrow's.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

test: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: environment
	$(BIN)/python examples/demo.py $(DEMO)

clean:
	rm -rf $(VENV) $(DEMO)
