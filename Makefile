# Two commands from nothing but Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo check test real-model test-real gpu lint clean

demo: $(VENV)/.installed
	$(BIN)/python train_rm.py --demo

# While working: lint, structure and every test that starts no script, in less than two minutes on two cores.
check: lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" tests

# Everything. A file stays in one process, which makes its trainings once; tests/conftest.py has the slowest go first.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests

# A small pretrained model (95 MB to download), and the tests that want it.
real-model: $(VENV)/.installed
	$(BIN)/python bench/real_model.py real-model

test-real: real-model $(VENV)/.installed-dev
	SMOLLM2_DIR=real-model $(BIN)/python -m pytest -m real tests

# What only an NVIDIA card can show, in ten minutes. QWEN3_DIR and HH_RLHF_DIR: see docs/benchmarks.md.
gpu: $(VENV)/.installed-dev
	$(BIN)/python bench/on_gpu.py --json on_gpu.json

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# a stamp, not the interpreter: a creation that failed half-way leaves one
$(VENV)/.created:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.installed: requirements.txt $(VENV)/.created
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache __pycache__ */__pycache__ */*/__pycache__
