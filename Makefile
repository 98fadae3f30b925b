# `make demo` and `make test` set up .venv themselves; the rest is for working on the package.
PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check

# torchao, which the tests of quantised layers need, would report each GPU library that it cannot load.
export TORCHAO_FORCE_SKIP_LOADING_SO_FILES := 1

.PHONY: demo test quick drift lint types fix docs bench report release-check clean

demo: .venv/.installed
	.venv/bin/metalora demo

# worksteal leaves a file to one process, and its fixtures with it, until the other has nothing left to do.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist worksteal

test: .venv/.installed-test
	$(PYTEST)

# What most changes touch, in a minute: the tuner, files, data and metrics.
quick: .venv/.installed-test
	$(PYTEST) tests/tuner tests/checkpoint tests/data tests/metrics tests/test_files.py tests/test_errors.py

# The suite against the newest releases of what tests/test_hosts.py watches, all else as constraints.txt pins it (torch is
# large). TESTS="tests/test_hosts.py tests/tuner" runs a part.
HOSTS := accelerate diffusers huggingface_hub peft safetensors transformers
TESTS ?=
drift:
	test -x .venv-drift/bin/python || $(PYTHON) -m venv .venv-drift
	for host in $(HOSTS) tokenizers hf-xet; do echo "^$$host=="; done | grep -vf - constraints.txt > .venv-drift/constraints.txt
	$(subst .venv,.venv-drift,$(PIP)) install -q -U -c .venv-drift/constraints.txt $(HOSTS) -e '.[data,face,test]'
	$(subst .venv,.venv-drift,$(PYTEST)) $(TESTS)

lint: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.installed-test
	.venv/bin/mypy

fix: .venv/.installed-test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: .venv/.installed-docs
	.venv/bin/zensical build --strict

bench: .venv/.installed
	mkdir -p build
	.venv/bin/python benchmarks/render.py
	.venv/bin/python benchmarks/layer.py --small --no-compile --out build/layer.json
	.venv/bin/python benchmarks/evaluation.py --small --output build/evaluation

report: .venv/.installed
	rm -rf build/people build/report build/rank-4
	.venv/bin/python benchmarks/embedded_down.py --output build/rank-4
	.venv/bin/metalora demo-data build/people --split held-out --subjects 4 --images_per_subject 5 --conditions
	.venv/bin/metalora evaluate --config benchmarks/report.yaml
	mkdir -p docs/results/report
	cp build/report/report.html build/report/report.md docs/results/report/

# Versions, wheel and sdist, empty environments on each Python, the lowest versions that pyproject.toml allows: .ci/release.
release-check:
	.ci/release

clean:
	rm -rf .venv .venv-drift site .mypy_cache .ruff_cache .pytest_cache

# The constraints hold the exact versions that are tested, torch included.
.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt -e .
	touch $@

.venv/.installed-test: .venv/.installed
	$(PIP) install -q -c constraints.txt -e '.[data,face,test]'
	touch $@

.venv/.installed-docs: .venv/.installed
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	touch $@
