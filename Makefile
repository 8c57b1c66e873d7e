# `make report` and `make test` set up everything they need in .venv: only Python >= 3.11 is asked for.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# WHEELS=folder installs from wheels in a folder, for machines that reach no package registry
ifdef WHEELS
export UV_OFFLINE := 1
export UV_FIND_LINKS := $(abspath $(WHEELS))
export PIP_NO_INDEX := 1
export PIP_FIND_LINKS := $(abspath $(WHEELS))
endif

# threads of OpenBLAS, which JAX's LAPACK calls come from, would fight with XLA's for the cores
export OPENBLAS_NUM_THREADS ?= 1

# bytecode beside the environments, also where the shell writes none: the suite starts hundreds of
# processes, and each would compile all of JAX's Python anew
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX ?= $(CURDIR)/.venv/bytecode

BIN := .venv/bin
UV := $(BIN)/python -m uv
BIN_JAX := .venv-jax/bin
BIN_JAX11 := .venv-jax11/bin

# pytest workers: one a core, at most 4, because each holds its own compiled programs
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
# workers take long runs of neighbouring tests, so that most files make their fixtures once
IN_PARALLEL := -n $(WORKERS) --dist worksteal
PYTEST_ARGS ?=
PEERS_ARGS ?=
# of the suites: how many commits, or which ("v0.2.0 HEAD~30 HEAD", a range), further arguments of
# asv (-b Isotropy), what the page shows
COMMITS ?= 1
REVISIONS ?=
RESULTS ?= results/asv
BENCH_ARGS ?=

# most programs of the suite run once, on a few numbers: optimising them was half of its time.
# Forty steps of every structure are compiled as users do (`AS_USERS`); test-jax11 and test-slow are.
# $(call compiled_quickly,PYTHON): the flags for the JAX of this Python
compiled_quickly = XLA_FLAGS="$$($(1) tests/quick_flags.py)"

# $(call find_python,MINOR,COMMANDS): prints the first of the commands that runs as Python >= 3.MINOR.
# They are run, not only looked up: the shims of version managers are on PATH for absent versions.
find_python = for python in $(2); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, $(1)))' >/dev/null 2>&1; \
	  then echo "$$python"; break; fi; \
	done
PYENV_VERSIONS := $${PYENV_ROOT:-$$HOME/.pyenv}/versions
PYTHON ?= $(shell $(call find_python,11,python3 python3.11 python3.12 python3.13 python3.14))
PYTHON_JAX ?= $(shell $(call find_python,12,python3.12 $(PYENV_VERSIONS)/3.12*/bin/python3.12 \
	  python3.13 $(PYENV_VERSIONS)/3.13*/bin/python3.13 \
	  python3.14 $(PYENV_VERSIONS)/3.14*/bin/python3.14 python3))

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

.PHONY: report
report: .venv/.run ## every structure on real images beside theory: report/report.html (NATGRAD_DATA: the data)
	$(BIN)/natgrad report --out report

.PHONY: leaderboard
leaderboard: .venv/.run ## optimizers against frozen targets: leaderboard/leaderboard.html, in about 15 minutes
	$(BIN)/python -m benchmarks.leaderboard run --out leaderboard

.PHONY: test
test: .venv/.dev ## the test suite, without the slow tests
	$(call compiled_quickly,$(BIN)/python) \
	  $(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow" $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: .venv/.dev ## the tests at the sizes of the papers; minutes each
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

.PHONY: test-jax
test-jax: .venv/.dev ## the tests of models, structures and kernels on Python >= 3.12 and the newest JAX
	@if [ -z "$(PYTHON_JAX)" ]; then \
	  echo "make test-jax: no Python >= 3.12 found, nothing tested (set PYTHON_JAX to name one)"; \
	else \
	  $(MAKE) PYTHON_JAX="$(PYTHON_JAX)" test-jax-found; \
	fi

.PHONY: test-jax-found
test-jax-found: .venv-jax/.dev
	@$(BIN_JAX)/python -c 'import platform, jax; print("Python", platform.python_version(), "JAX", jax.__version__)'
	$(call compiled_quickly,$(BIN_JAX)/python) \
	  $(BIN_JAX)/python -m pytest $(IN_PARALLEL) -m "not slow" $(JAX_TESTS) $(PYTEST_ARGS)

# the part of the suite that a release of JAX can break through neural-tangents
KERNEL_TESTS := $(addprefix tests/ntk_analysis/test_, neural_tangents.py infinite_width.py analytic.py)

# what a release of JAX can break: capture, structures, optimizers, kernels, compiled steps. The rest
# works on NumPy, files and text, or on JAX in the same way as these: of structures the battery on
# dense layers and the forty steps, which hold momentum and adaptive damping, of shared weights the
# steps, of tables the signals, of eight devices the steps, of linear models the flows beside their
# references, of loops the steps without averages, of other models their Jacobians, of benchmarks
# what XLA says of a compiled step
JAX_TESTS := tests/natgrad_flax $(addprefix --ignore=tests/natgrad_flax/, losses \
	$(addprefix test_, damping.py geometry.py install.py renamed.py) \
	costs/test_describe.py costs/test_programs.py devices/test_devices_work.py \
	$(addprefix optimizer/test_, checks.py averages_bad_input.py information.py quadratic_model.py) \
	$(addprefix structures/test_, ekfac.py identities.py paper_settings.py structures.py \
	weight_sharing.py) \
	$(addprefix linear/test_, deep_linear.py deep_linear_descent.py diagonal_network.py logistic.py \
	matrix_factorization.py)) \
	$(addprefix --deselect=tests/natgrad_flax/, signals/test_styles.py::test_steps \
	signals/test_lookup.py::test_structures_are_those_of_one_hot_inputs \
	structures/test_stacked_layers.py::test_averages_of_a_loop) -k "not -mixed-" \
	$(addprefix tests/benchmarks/test_, memory_benchmark.py kernel_benchmark.py \
	leaderboard_trial.py) \
	$(KERNEL_TESTS) tests/ntk_analysis/test_kernels.py

.PHONY: test-jax11
test-jax11: .venv/.dev ## the tests of neural-tangents on JAX 0.11, where there is Python >= 3.12
	@if [ -z "$(PYTHON_JAX)" ]; then \
	  echo "make test-jax11: no Python >= 3.12 found, nothing tested (set PYTHON_JAX to name one)"; \
	else \
	  $(MAKE) PYTHON_JAX="$(PYTHON_JAX)" test-jax11-found; \
	fi

.PHONY: test-jax11-found
test-jax11-found: .venv-jax11/.dev
	$(BIN_JAX11)/python -m pytest $(IN_PARALLEL) -m "not slow" $(KERNEL_TESTS) $(PYTEST_ARGS)

.PHONY: lint
lint: .venv/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: .venv/.dev ## sorts imports and formats
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: .venv/.bench ## the asv suite on the last commit, the last COMMITS or the REVISIONS, within 10 minutes each (NATGRAD_BENCH_PROFILE: another size)
	@commits=$$(git rev-list $(if $(REVISIONS),--no-walk=unsorted $(REVISIONS),--first-parent -n $(COMMITS) HEAD)); \
	machine=$$($(BIN)/python -m benchmarks.machine); set -x; \
	PATH="$(CURDIR)/$(BIN):$$PATH" NATGRAD_BENCH_MACHINE="$$machine" \
	  $(BIN)/asv run --machine "$$machine" --show-stderr $(BENCH_ARGS) HASHFILE:- <<< "$$commits"

.PHONY: bench-keep
bench-keep: .venv/.bench ## the same, and puts what this machine has measured into results/asv, to be committed
	@failed=0; $(MAKE) bench || failed=$$?; \
	mkdir -p results/asv; \
	cp -R ".asv/results/$$($(BIN)/python -m benchmarks.machine)" .asv/results/benchmarks.json results/asv/; \
	exit $$failed # of asv: 2 where a suite failed on one of the commits

.PHONY: bench-site
bench-site: .venv/.bench ## the results in results/asv, or in RESULTS, as a page that needs no network: .asv/html/index.html
	$(BIN)/python -m benchmarks.asv_site --results $(RESULTS) --out .asv/html

.PHONY: bench-check
bench-check: .venv/.bench ## every suite of this working tree at its smallest size, nothing kept
	@machine=$$($(BIN)/python -m benchmarks.machine); set -x; \
	PATH="$(CURDIR)/$(BIN):$$PATH" $(call compiled_quickly,$(BIN)/python) NATGRAD_BENCH_PROFILE=smoke \
	  $(BIN)/asv run --machine "$$machine" --python=same --quick --dry-run --show-stderr

.PHONY: peers
peers: .venv/.run .venv-peers-jax/.ready .venv-peers-torch/.ready ## our K-FAC beside that of kfac-jax, curvlinops and nngeometry: natgrad-peers/results.md
	$(BIN)/python -m benchmarks.peer_comparison --out natgrad-peers $(PEERS_ARGS)

.PHONY: gpu
gpu: .venv/.gpu ## on a machine with a GPU: the figures, steps and suites that compare devices, in ten minutes: results/gpu-*.json
	$(BIN)/python -m benchmarks.gpu

.PHONY: docs
docs: .venv/.docs .venv/.bench ## the documentation as a folder that a browser opens without a network: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.PHONY: dist
dist: .venv/.uv ## wheel and source distribution of this version: dist/
	rm -rf dist
	$(UV) build --quiet --python $(BIN)/python --out-dir dist .
	$(UV) tool run --quiet --python $(BIN)/python twine check --strict dist/*.whl dist/*.tar.gz

.PHONY: clean
clean: ## removes what make made; benchmark results stay
	rm -rf .venv .venv-jax .venv-jax11 .venv-peers-jax .venv-peers-torch report site .docs build dist natgrad.egg-info .asv/env .asv/html
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments. The stamps depend on pyproject.toml, so a new requirement is installed by itself.

.venv/.uv:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "natgrad needs Python 3.11 or newer: install one, or name it with PYTHON=..." >&2; exit 1; \
	fi
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	@touch $@

.venv/.run: .venv/.uv pyproject.toml
	$(UV) pip install --quiet --python $(BIN)/python -e '.[report,neural-tangents]'
	@touch $@

.venv/.dev: .venv/.uv pyproject.toml
	$(UV) pip install --quiet --python $(BIN)/python -e '.[dev]'
	@touch $@ .venv/.run

.venv/.bench: .venv/.uv pyproject.toml
	$(UV) pip install --quiet --python $(BIN)/python -e '.[bench]'
	@touch $@

.venv/.docs: .venv/.uv pyproject.toml
	$(UV) pip install --quiet --python $(BIN)/python -e '.[docs]'
	@touch $@

.venv/.gpu: .venv/.bench
	$(UV) pip install --quiet --python $(BIN)/python 'jax[cuda12]'
	@touch $@

.venv-jax/.dev: .venv/.uv pyproject.toml
	"$(PYTHON_JAX)" -m venv --clear .venv-jax
	$(UV) pip install --quiet --python $(BIN_JAX)/python -e '.[dev]'
	@touch $@

.venv-jax11/.dev: .venv/.uv pyproject.toml
	"$(PYTHON_JAX)" -m venv --clear .venv-jax11
	$(UV) pip install --quiet --python $(BIN_JAX11)/python -e '.[dev]' 'jax==0.11.*'
	@touch $@

# kfac-jax does not import on the JAX of natgrad
.venv-peers-jax/.ready: .venv/.uv
	"$(PYTHON)" -m venv --clear .venv-peers-jax
	$(UV) pip install --quiet --python .venv-peers-jax/bin/python kfac-jax==0.0.8 'jax==0.7.*'
	@touch $@

# gigabytes of CUDA with it, unless UV_TORCH_BACKEND=cpu asks uv for PyTorch without
.venv-peers-torch/.ready: .venv/.uv pyproject.toml
	"$(PYTHON)" -m venv --clear .venv-peers-torch
	$(UV) pip install --quiet --python .venv-peers-torch/bin/python -e '.[peers]'
	@touch $@
