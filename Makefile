# Two commands matter: `make demo` and `make test`.
PYTHON      ?= python3
CONSTRAINTS ?= constraints/cpu.txt
EXTRAS      ?= test
VENV        := .venv
MODELS      ?= .demo/models
STAMP       := $(VENV)/.installed

.PHONY: setup demo serve test check models clean

setup: $(STAMP)

# torch first and alone: a looser request would pull a CUDA build of several GB.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $$(grep '^torch==' $(CONSTRAINTS))
	$(VENV)/bin/pip install --quiet -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch $@

models: setup
	$(VENV)/bin/mball models prepare-demo $(MODELS)

demo: models
	$(VENV)/bin/mball demo deploy/examples/demo.yaml

serve: models
	$(VENV)/bin/mball serve --config deploy/examples/demo.yaml

check: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/check

test: check models
	$(VENV)/bin/pytest --cov --cov-report=term:skip-covered -m "not benchmark"

clean:
	rm -rf $(VENV) .demo
