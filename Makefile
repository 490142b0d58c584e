# make demo: from made-up data to a grounded sentence. make test: the test suite. make fuzz: damaged files for every
# reader. All make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
# TensorRT-RTX comes as Linux x86-64 wheels; elsewhere its tests skip and say so.
EXTRAS := $(shell [ "$$(uname -sm)" = "Linux x86_64" ] && echo cpu,openvino,plot,video,hdf5,serve,corpus,triton,train,export,engine,rtx,docs,dev || echo cpu,openvino,plot,video,hdf5,serve,corpus,triton,train,export,engine,docs,dev)

# The Python API of TensorRT 10 and 11 without its libraries: tests hold the names we use against it. Two versions of one
# package cannot share a folder, nor constraints.txt, so each has its own and is pinned here.
BINDINGS_10.16 := 10.16.1.11
BINDINGS_11.4 := 11.4.0.106
BINDINGS := $(shell [ "$$(uname -sm)" = "Linux x86_64" ] && echo $(VENV)/bindings/10.16/ready $(VENV)/bindings/11.4/ready)

# The C++ headers of ONNX Runtime for tests/test_cpp_example.py, which no wheel has: those of Debian 13.
HEADERS := $(VENV)/onnxruntime-headers

.PHONY: demo docs test test-portable fuzz lint wheel environment bindings pytriton headers clean

environment: $(VENV)/ready
	@$(MAKE) --no-print-directory bindings || echo "TensorRT's bindings cannot be had; their tests will skip and say so."

bindings: $(BINDINGS)

# constraints.txt pins everything, so that today's environment is tomorrow's.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

$(VENV)/bindings/%/ready: Makefile | $(VENV)/ready
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) tensorrt-cu13-bindings==$(BINDINGS_$*)
	touch $@

# The Triton server inside nvidia-pytriton, in an environment of its own: its Python backend crashes with NumPy 2. Not of
# `environment`; without it tests/runtime/triton/test_server.py skips and says so.
pytriton: $(VENV)/pytriton/ready

$(VENV)/pytriton/ready: Makefile | $(VENV)/ready
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check nvidia-pytriton==0.7.0 numpy==1.26.4 onnxruntime==1.32.0 nltk==3.10.4
	touch $@

# apt has directories of its own here, so that the packages of this machine stay as they are.
headers: $(HEADERS)/ready

APT = apt-get -qq -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts=$(CURDIR)/$(@D)/sources \
	-o Dir::State::Lists=$(CURDIR)/$(@D)/lists -o Dir::Cache=$(CURDIR)/$(@D)/cache

$(HEADERS)/ready: Makefile
	rm -rf $(@D)
	mkdir -p $(@D)/sources $(@D)/lists/partial $(@D)/cache/archives/partial
	sed '/^$$/,$$d; s/^Suites:.*/Suites: trixie/' /etc/apt/sources.list.d/debian.sources > $(@D)/sources/debian.sources
	$(APT) update
	cd $(@D) && $(APT) download libonnxruntime-dev && dpkg-deb -x libonnxruntime-dev_*.deb .
	rm -rf $(@D)/lists $(@D)/cache
	touch $@

# tests/conftest.py puts the slowest files first; xdist would sort by the number of tests. Without bytecode files, pytest
# rewrites every assertion in each process anew, which takes 8 s.
test: environment
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What depends on how kernels round, with the kernels of other CPUs than this machine's: of torch (ATEN, oneDNN) and of
# NumPy (OpenBLAS), in one thread and in two. ONNX Runtime has no such switch; tests/runtime/backends/test_exact_int8.py computes its
# kernels in NumPy instead.
PORTABLE := tests/train/network/test_losses.py tests/train/network/test_model.py tests/train/training/test_trainer.py tests/train/training/test_stage_trainer.py \
	tests/train/training/test_distributed.py \
	tests/calib tests/runtime/backends/test_exact_int8.py tests/runtime/core/test_decoding.py \
	tests/export/tracing/test_exportable_model.py tests/export/parity/test_compare.py tests/calib/graph/test_half_precision.py tests/calib/graph/test_split_model.py \
	tests/export/test_to_onnx.py tests/export/build/test_reduced_precision.py tests/calib/graph/test_unroll_lstm.py
OLD_CPU := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem OMP_NUM_THREADS=1
AVX2_CPU := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell OMP_NUM_THREADS=2

test-portable: environment
	$(OLD_CPU) $(BIN)/python -m pytest -n 2 --dist loadfile $(PORTABLE)
	$(AVX2_CPU) $(BIN)/python -m pytest $(PORTABLE)

# 500 damaged files for each reader, 25,000 in all. CASES and FIRST choose others.
CASES ?= 500
FIRST ?= 0
fuzz: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing --cases $(CASES) --first $(FIRST)

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: environment
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

docs: environment
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: environment
	$(BIN)/python examples/demo.py $(DEMO)

clean:
	rm -rf $(VENV) $(DEMO)
