# Every target sets up what it needs, once: .venv from constraints.txt, the extension, DeepSpeed's CPU
# communication op. A later call checks time stamps and starts at once.
#
#   make run PYTHON=python3.12          another interpreter for .venv (3.10 or later)
#   make test ARGS="-k commit -x"       arguments for the command behind a target
#   make train DS_ACCELERATOR=cuda      DeepSpeed on GPUs; without it on CPU and gloo, on every machine

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help metrics run train run-worlds test test-long matrix compat torture bench bench-quick bench-gpu bench-megatron bench-megatron-lm bench-push megatron-lm sanitize fuzz lint format clean ready

PYTHON ?= python3
ARGS ?=
HOST := .venv/openrlhf/.installed
HOSTS_OF_MEGATRON := .venv/megatron_hosts/.installed
HOSTS := .venv/hosts/.installed
LOG := .venv/setup.log
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu)
OUTER_PATH := $(PATH)

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1
# For scripts that import from examples/ and from each other, wherever they lie.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

run: ready ## the demonstration: train, kill in the middle of a save, resume on the same losses
	@python -m examples.rlvr.demo $(ARGS)

run-worlds: ready ## actor and critic as two torchrun jobs whose steps commit together
	@python -m examples.rlvr.demo --worlds $(ARGS)

train: ready ## the plain job in runs/train; started again, it resumes
	@torchrun --standalone --nproc-per-node 2 -m examples.rlvr.train --config configs/rlvr.yaml $(ARGS)

test: ready $(HOST) ## all tests that need no GPU, in less than 10 minutes on 2 cores
	@python -m pytest $(ARGS)

test-long: ready $(HOST) $(HOSTS) ## what `make test` leaves out: the same in more depth, and the matrix
	@python -m pytest -m "long or matrix" $(ARGS)

matrix: ready ## every Megatron layout against every other on 2 and 4 ranks, about ten minutes
	@python -m pytest -m matrix tests/test_megatron_matrix.py -v $(ARGS)

compat: ready ## the core tests with other versions: ROWS="newest oldest", ROWS=short, or all, for hours; fills docs/support.md
	@python tests/compat/run.py --rows "$(or $(ROWS),all)" $(ARGS)

megatron-lm: ready $(HOSTS_OF_MEGATRON) ## Megatron-LM's own pretrain_gpt.py, and the modules of verl and ms-swift: make megatron-lm MEGATRON_LM=/a/checkout
	$(need_megatron_lm)
	@python -m pytest tests/test_megatron_lm.py tests/test_megatron_hosts.py -v $(ARGS)

N ?= 1000
torture: ready ## kill runs N times (default 1000) at every point that has a name and at others: a table, and what was lost
	@python tests/torture.py --kills $(N) $(ARGS)

sanitize: ready ## the extension under AddressSanitizer and UBSan, then ThreadSanitizer: some minutes
	@$(call sanitized,address$(comma)undefined,asan,PYTHONMALLOC=malloc,)
	@$(call sanitized,thread,tsan,,--deselect $(FORKS))

fuzz: ready ## hostile bytes into every parser, for SECONDS=300; guided by coverage if atheris is installed
	@python tests/fuzz_parsers.py --seconds $(or $(SECONDS),300) $(ARGS)

bench: .venv/.bench ## how fast a state moves to disk and back, beside the peers: tables, build/bench.json and .png
	@python -m benchmarks.movement $(ARGS)

bench-quick: .venv/.bench ## the same in about a minute, with a smaller state
	@python -m benchmarks.movement --quick $(ARGS)

bench-gpu: ready ## what a save of CUDA tensors costs, on a machine with a GPU: tables and build/bench-gpu.json
	@python -m benchmarks.gpu $(ARGS)

bench-megatron: ready ## how long a Megatron save holds up training: stock's and ours
	@python benchmarks/megatron_stall.py $(ARGS)

bench-megatron-lm: ready $(HOSTS_OF_MEGATRON) ## the same in Megatron-LM's own training loop
	$(need_megatron_lm)
	@python benchmarks/megatron_lm_stall.py $(ARGS)

bench-push: ready ## what pushing to the Hub costs the training loop
	@python benchmarks/push_cost.py $(ARGS)

define need_megatron_lm
$(call need,test -f "$$MEGATRON_LM/pretrain_gpt.py",MEGATRON_LM names no checkout of Megatron-LM. Get one: git clone --depth 1 -b core_v0.16.1 https://github.com/NVIDIA/Megatron-LM ../Megatron-LM; then: make $@ MEGATRON_LM=../Megatron-LM)
endef

# ThreadSanitizer itself dies of a fork that starts threads.
FORKS := tests/test_native.py::test_a_forked_child_is_refused_and_ends_in_peace

# $(call sanitized,sanitizers,library,environment,arguments): build the extension for them into build/, beside the one in use,
# and run its tests there. They import no torch, in which sanitizers find what is not ours. Python itself leaks.
define sanitized
set -e; echo "== $(1)"; base=build/$(2); mkdir -p build; \
ROLL_CKPT_CUDA=0 ROLL_CKPT_CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=$(1)" \
	python setup.py -q build --build-base $$base --build-lib $$base/lib >$$base.log 2>&1 || { tail -n 25 $$base.log >&2; exit 1; }; \
$(3) LD_PRELOAD="$$(g++ -print-file-name=lib$(2).so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 PYTHONPATH=$$base/lib \
	pytest --noconftest -o addopts= -W ignore::pytest.PytestUnknownMarkWarning tests/test_native.py $(4) $(ARGS)
endef

metrics: ## the house in figures, each beside its bound; needs nothing but Python
	@$(OUTER_PYTHON) tests/metrics.py $(ARGS)

lint: .venv/.installed ## ruff, mypy, clang-format
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(CSRC)

format: .venv/.installed ## write all code in the format that lint wants
	ruff check --fix-only .
	ruff format .
	clang-format -i $(CSRC)

clean: ## remove what set-up and builds made; runs/ stays
	rm -rf .venv build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache roll_ckpt/native/*.so
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# ---- set-up ---------------------------------------------------------------------------------------------

# $(call step,what,command): one line of progress. The noise goes to the log, whose end is shown on failure.
define step
@printf '  %-50s' '$(1)'; start=$$SECONDS; \
if { $(2); } >>$(LOG) 2>&1 </dev/null; then echo "$$((SECONDS - start)) s"; else \
	echo failed; tail -n 25 $(LOG) >&2; \
	echo "Set-up failed at: $(1). The lines above are the end of $(LOG). Mend the cause, then run the same command again; 'make clean' starts from nothing." >&2; \
	exit 1; fi
endef

# $(call need,test,what to do): stops with a sentence where a tool is missing.
define need
@$(1) >/dev/null 2>&1 || { echo "$(2)" >&2; exit 1; }
endef

OUTER_PYTHON = PATH="$(OUTER_PATH)" $(PYTHON)
TOOLS := pip setuptools wheel pybind11 ninja packaging
PIP := python -m pip install --no-input --disable-pip-version-check -c constraints.txt

# torch comes before anything that asks for it, so that no resolver and no build environment gets another one.
.venv/.torch: constraints.txt
	$(call need,$(OUTER_PYTHON) -c '',There is no $(PYTHON) here. Install Python 3.10 or later or name one: make PYTHON=/path/to/python3 …)
	$(call need,$(OUTER_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3$(comma) 10))',$(PYTHON) is too old: roll_ckpt needs Python 3.10 or later. Name another one: make PYTHON=python3.12 …)
	$(call need,$(OUTER_PYTHON) -c 'import ensurepip$(comma) venv',$(PYTHON) has no venv module. Install it (Debian and Ubuntu: python3-venv).)
	$(call need,test -f "$$($(OUTER_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h",The headers of $(PYTHON) are missing. Install them (Debian and Ubuntu: python3-dev).)
	$(call need,command -v g++,There is no g++ here. Install a C++20 compiler (Debian and Ubuntu: g++).)
	@mkdir -p .venv; : >$(LOG); echo "Setting up .venv, once; details in $(LOG)"
	$(call step,Python environment,$(OUTER_PYTHON) -m venv .venv)
	$(call step,pip and build tools,$(PIP) $(TOOLS))
	$(call step,torch and numpy,$(PIP) torch numpy)
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml setup.py roll_ckpt/activation/startup.py $(CSRC)
	$(call step,roll_ckpt$(comma) its extension and what it needs,$(PIP) $(if $(filter .venv/.torch pyproject.toml,$?),,--no-deps) --no-build-isolation -e '.[deepspeed$(comma)megatron$(comma)hub$(comma)examples$(comma)dev]')
	@touch $@

# Peers are measured, never needed.
.venv/.bench: .venv/.installed
	$(call step,the peers that are measured,$(PIP) --no-build-isolation -e '.[bench]')
	@touch $@

# A host that is tested, never needed. The package alone, which is pure Python and tagged for one version; what it asks
# for needs GPUs. Where it cannot be had, its test is skipped.
$(HOST): .venv/.installed
	$(call step,OpenRLHF$(comma) for its test,{ $(PIP) --target $(@D) --upgrade --no-deps --only-binary :all: --python-version 3.11 --abi cp311 --platform manylinux1_x86_64 openrlhf && touch $@; } || echo 'No OpenRLHF: tests/test_openrlhf.py is skipped')

# The same for what calls Megatron-core: each is needed for one module of it. Megatron-LM itself asks for six.
$(HOSTS_OF_MEGATRON): .venv/.installed
	$(call step,verl$(comma) ms-swift$(comma) six$(comma) for their tests,$(PIP) --target $(@D) --upgrade --no-deps --only-binary :all: verl ms-swift six && touch $@)

# Launchers that are tested, never needed: Ray and a notebook kernel, in a folder of their own.
$(HOSTS): .venv/.installed
	$(call step,Ray and a notebook kernel$(comma) for their tests,{ $(PIP) --target $(@D) --upgrade ray ipykernel jupyter_client && touch $@; } || echo 'No Ray: its part of tests/test_launchers.py is skipped')

# DeepSpeed would compile this at the first start of every fresh machine, for half a minute, in all ranks at once.
.venv/.comm_op: .venv/.torch | .venv/.installed
	@rm -f .venv/torch_extensions/*/lock
	$(call step,CPU communication op of DeepSpeed,DS_ACCELERATOR=cpu python -c "$(BUILD_COMM_OP)")
	@touch $@

BUILD_COMM_OP := from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()
comma := ,

# Every start of DeepSpeed takes the op's lock file for a moment. A process killed in that moment leaves it
# behind, and each later start would wait for it for ever: remove a lock that no process holds open.
ready: .venv/.installed .venv/.comm_op
	@for lock in .venv/torch_extensions/*/lock; do \
		if [ -e "$$lock" ] && ! ls -l /proc/[0-9]*/fd 2>/dev/null | grep -qF -- "-> $$(realpath "$$lock")"; then rm -f "$$lock"; fi; \
	done
