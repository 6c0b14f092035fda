# Every target does its own set-up; `make demo` and `make test` are the two commands of the README.
PYTHON ?= python3
BIN := .venv/bin
# Here the extension is built for the GPU that is there, or else for one kind to see that it compiles; `pip install` builds
# it for all kinds.
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -xE '[0-9]+\.[0-9]' | sort -u | tr '\n' ' ')
export I2I_DIST_CUDA_ARCHS ?= $(or $(GPU),9.0)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check build bench bench-kernels bench-scaling soak test-gpu clean

demo: .venv/installed  ## synthesise, pack, train DCLGAN on two processes, score: minutes on two cores
	$(BIN)/python -m i2i_dist.demo

test: .venv/tools  ## all tests that need no GPU and no patience
	$(BIN)/python -m pytest -m "not gpu and not soak"

check: .venv/tools  ## format, lint, types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

build: .venv/installed  ## build the extension again
	$(PIP) --no-build-isolation --no-deps --force-reinstall -e .

bench: .venv/installed  ## one training step of DCLGAN and of U-GAT-IT light beside the eager forms
	$(BIN)/python launchers/bench.py step --method dclgan
	$(BIN)/python launchers/bench.py step --method ugatit

bench-kernels: .venv/installed  ## the native ops on this machine, and docs/kernels.md from the figures
	$(BIN)/python launchers/bench.py kernels --json docs/kernels
	$(BIN)/python launchers/bench.py share --json docs/kernels
	$(BIN)/python launchers/bench.py report

SMALL_PIX2PIX := --set method.width=32 --set method.downs=6 --set data.crop_size=64 --set data.load_size=64
bench-scaling: .venv/installed  ## an update on 1, 2 and 4 ranks of this machine, and docs/scaling.md from the figures
	$(BIN)/python launchers/bench.py scaling --config configs/demo.yaml --json docs/scaling
	$(BIN)/python launchers/bench.py scaling --config configs/pix2pix_facades.yaml $(SMALL_PIX2PIX) --json docs/scaling
	$(BIN)/python launchers/bench.py scaling-page

soak: .venv/tools  ## the slow tests
	$(BIN)/python -m pytest -m "soak and not gpu" --timeout 3600

test-gpu: .venv/tools  ## the tests that need a CUDA device, on the kernels
	$(BIN)/python -m pytest -m gpu

clean:  ## remove what was built; runs and data sets stay
	rm -rf .venv build *.egg-info i2i_dist/*.so

# torch first: the extension and deepspeed are built against the one that is there, not against one of their own.
.venv/installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch numpy setuptools wheel ninja pybind11 packaging psutil
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation -e .
	touch $@

# By its name: the package is there, and is not built again.
.venv/tools: .venv/installed
	$(PIP) "i2i-dist[test,dev]"
	touch $@
