# Every target is one line that works without make, once `python3 -m tools.environment` has made .venv:
#   .venv/bin/python -m maskops bench | -m pytest | -m tools.lint | -m tools.package | -m tests.mutate
# PYTHON=python3.12  another Python          TORCH='torch==2.11.0'  another torch (any arguments of pip install)
# VENV=/disk/venv    another place           CXX=clang++            another compiler
# FUZZ_SECONDS=900   for each target and property of `make fuzz`
PYTHON ?= python3
VENV ?= .venv
FUZZ_SECONDS ?= 15
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
export VENV TORCH

.PHONY: bench bench-full gpu test grid lint package compile compile-everyday mutate sanitize instruction-sets fuzz coverage ci clean

bench: $(READY)
	$(RUN) -m maskops bench --chart bench.png --json bench.json

bench-full: $(READY)
	$(RUN) -m maskops bench --full --chart bench.png --json bench.json

# On a machine with a GPU, without network and without .venv: PYTHON has torch, Triton and pytest.
gpu:
	$(PYTHON) -m tools.gpu

test: $(READY)
	$(RUN) -m pytest -n auto --dist worksteal

grid: $(READY)
	$(RUN) -m pytest -n auto -m grid

lint: $(READY)
	$(RUN) -m tools.lint

package: $(READY)
	$(RUN) -m tools.package

compile: $(READY)
	$(RUN) -m tools.compilation

compile-everyday: $(READY)
	$(RUN) -m tools.compilation --everyday

mutate: $(READY)
	$(RUN) -m tests.mutate

sanitize: $(READY)
	$(RUN) -m tools.sanitize

instruction-sets: $(READY)
	$(RUN) -m tools.instruction_sets

fuzz: $(READY)
	$(RUN) -m tools.fuzz --seconds $(FUZZ_SECONDS)
	$(RUN) -m tests.fuzz --seconds $(FUZZ_SECONDS)

coverage: $(READY)
	$(RUN) -m tools.coverage

ci: test lint package sanitize instruction-sets compile-everyday

clean:
	rm -rf $(VENV) build dist *.egg-info maskops/_native.so maskops/_build_report.json bench.png bench.json

$(READY): pyproject.toml setup.py tools/environment.py $(shell find csrc -type f)
	@$(PYTHON) -m tools.environment
