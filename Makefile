# make demo    install what is pinned into .venv, fetch the model, measure four formats, print one table
# make test    lint, types, tests: what .ci/run calls
# make engines exports, read and run by the engines themselves: 5 GB of environments in .peers, half an hour the first time
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

export HYDRA_FULL_ERROR := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test engines clean

demo: $(STAMP)
	$(BIN)/kvcfg eval cache.kv_cache_format=bfloat16,float8_e4m3fn,int8,gauss4 -m

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest  # small models wait longer for a second thread than they compute

engines: $(STAMP)
	tests/engines/setup.sh .peers
	OMP_NUM_THREADS=1 $(BIN)/pytest -m engines tests/engines

# torch comes first and pinned: anything looser may bring gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
