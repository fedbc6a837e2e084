# make demo  trains a small, complete DeepSeek-V3 on this machine and shows it working (three minutes on two cores with AVX-512 BF16)
# make test  installs Debian's Chromium for the chat page's tests if it is missing (as root, by apt-get);
#            format, lint, types, layers and the whole test suite
# make bench speed against transformers, on this machine
# make bench-gpu  every kernel and a training step in FP8, on a CUDA device
# Each sets up .venv from pyproject.toml with the exact versions of constraints.txt; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test browser bench bench-gpu clean
.DELETE_ON_ERROR:

demo: .venv/run.stamp
	$(BIN)/dsv3 run tiny

test: .venv/test.stamp browser
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --summary=none
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

bench: .venv/test.stamp
	$(BIN)/python -m bench.train_step
	$(BIN)/python -m bench.decode
	$(BIN)/python -m bench.moe_scaling
	$(BIN)/python -m bench.kernels

bench-gpu: .venv/test.stamp
	$(BIN)/python -m bench.gpu

browser:
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
		|| echo "no chromium: the chat page's tests will fail; install the package chromium (apt-get install chromium)"

.venv/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "dsv3 needs Python 3.11 to 3.13, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv .venv

.venv/run.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[post,serve]'
	@touch $@

.venv/test.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[test]'
	@touch $@ .venv/run.stamp

clean:
	rm -rf .venv build *.egg-info
