# Expert Atlas: two commands do all the work, on a machine with Python 3.11+ and make.
#   make demo   captures real text with a tiny Mixtral on the CPU and draws the report
#   make test   runs the whole suite
#   make docs   builds the documentation as a site, docs/_build/index.html
#   make pictures  creates the pictures of README and docs again
#   make chaos  runs the long tests of faults and prints a table of the results
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs pictures chaos check bench families lock clean

demo: $(BIN)/expert-atlas
	$(BIN)/python jobs/demo.py

test: $(BIN)/expert-atlas
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=15

chaos: .venv/ready
	$(BIN)/python tests/chaos.py

check: .venv/ready docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings are errors: a broken link or reference fails.
docs: .venv/ready
	$(BIN)/sphinx-build --jobs auto --nitpicky --fail-on-warning --keep-going --quiet docs docs/_build

bench: .venv/ready
	$(BIN)/python tests/benchmarks/cpu.py
	$(BIN)/python tests/benchmarks/inference.py

# Captures a tiny model of every mixture-of-experts family in transformers, and writes the table of docs/models.md;
# then plants faults in each, and runs --dry_run and jobs/quantize.py on it.
families: .venv/ready
	$(BIN)/python tests/benchmarks/families_survey.py
	$(BIN)/python tests/benchmarks/families_faults.py
	$(BIN)/python tests/benchmarks/families_commands.py

# Creates the pictures of README and docs again, from the demo's store; needs Chromium.
pictures: .venv/ready
	$(BIN)/python tests/pictures.py

# The environment: exactly the locked versions, hashes checked. uv is fetched into the environment itself.
.venv/ready: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Expert Atlas needs Python 3.11 to 3.13, but {sys.executable} is {v[0]}.{v[1]}: run make PYTHON=/path/to/python3.11")'
	@if [ -L .venv ]; then echo "error: .venv is a link to $$(readlink .venv), which creating it again would empty: remove the link, or run make there" >&2; exit 1; fi
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@touch $@

# The command expert-atlas, which runs the scripts of this folder; built with the environment's own setuptools.
$(BIN)/expert-atlas: .venv/ready pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# Writes requirements.lock from pyproject.toml: all platforms, with hashes, without addresses.
lock:
	uv pip compile --universal --generate-hashes --no-header --all-extras --python-version 3.11 pyproject.toml -o requirements.lock

clean:
	rm -rf .venv .pytest_cache docs/_build demo.zarr demo.zarr.results demo.html
