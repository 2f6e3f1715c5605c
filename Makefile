# Everything happens in a virtual environment of the project's own: no root, no GPU needed.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
ENGINES ?= .engines
# Where the marks of `make test` are.
READERS_TESTS = tests/lesson tests/kernels tests/speedups tests/checkpoints/test_weight_files.py

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:\t/'

demo: $(VENV)/runs  ## a dozen fairy tales at once, from one pool of blocks
	$(RUN) generate.py

serve: $(VENV)/serves  ## OpenAI's API at http://127.0.0.1:8000/v1; make serve ARGS="--port 8080"
	$(RUN) -m serving.server $(ARGS)

test: $(VENV)/tests  ## what a reader runs: the lesson's tests and one a kernel
	$(RUN) -m pytest -q -n 2 -m "(lesson or oracle or regression) and not slow" $(READERS_TESTS)

check: $(VENV)/tests $(VENV)/triton-3.6.0 $(VENV)/transformers  ## everything: formatting, types, the slow tests too
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	other=$(abspath $(VENV)/triton-3.6.0); test ! -d $$other/triton || \
	export PAGEDGPT_OTHER_TRITON=$$other; \
	export PAGEDGPT_OTHER_TRANSFORMERS=$(abspath $(VENV)/transformers); $(RUN) -m pytest -n 2

test-gpt2: $(VENV)/tests  ## the real GPT-2 against published facts: fetches 0.5 GB, wants PAGEDGPT_DATA
	PAGEDGPT_TEST_GPT2=1 HF_HUB_OFFLINE=0 TRANSFORMERS_OFFLINE=0 $(RUN) -m pytest -rs tests/checkpoints/test_gpt2.py

bench: $(VENV)/runs  ## the same tokens without a cache, contiguous and paged: benchmark_results.csv
	$(RUN) benchmark.py

# An environment for each engine that `benchmark.py engines` compares. One that cannot be built (no
# package for this system, no compiler for llama.cpp) does not stop the others.
engines: $(patsubst requirements-engines/%.txt,$(ENGINES)/%/built,$(wildcard requirements-engines/*.txt))  ## vLLM, OpenVINO .. for benchmark.py engines: 5 GB; make engines ENGINES=folder

$(ENGINES)/%/built: requirements-engines/%.txt
	$(PYTHON) -m venv $(ENGINES)/$*
	-$(ENGINES)/$*/bin/python -m pip install --quiet --no-deps -r $< && touch $@

notebook: $(VENV)/tests  ## the charts again: from your benchmark_results.csv, else the committed rows
	PYTHONPATH=.:tests $(RUN) tests/plots/test_notebook.py

gpu-check:  ## on a machine with a GPU, no .venv: OUT=folder for the results, 570 seconds at most
	$(PYTHON) -m experiments.gpu_check

gpu-rehearsal: $(VENV)/tests  ## its stages on a CPU, with few numbers: half a minute
	$(RUN) -m experiments.gpu_check --rehearse

train: $(VENV)/runs  ## make the shipped model again: make train TEXT=folder_of_txt (an hour or more)
	MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=34359738368 \
	$(RUN) -m checkpoints.train_tiny --text $(TEXT) --resume

$(VENV)/runs: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/serves: $(VENV)/runs requirements-serve.txt
	$(RUN) -m pip install --quiet -r requirements-serve.txt
	touch $@

$(VENV)/tests: $(VENV)/serves requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

# An older Triton beside the installed one: the kernels must compile with both. Where it can't be had
# (it exists for Linux only) the folder stays empty, and the tests that want it are skipped.
$(VENV)/triton-3.6.0: $(VENV)/tests
	-$(RUN) -m pip install --quiet --no-deps --target $@ triton==3.6.0
	mkdir -p $@
	touch $@

# The oldest and the newest transformers that PagedCache works with, for a process of their own. The
# oldest needs older packages than the installed one. A folder that can't be had does not exist, and
# its tests are skipped.
$(VENV)/transformers: $(VENV)/tests
	-$(RUN) -m pip install --quiet --no-deps --target $@/5.5.0 transformers==5.5.0 \
	huggingface_hub==1.31.0 tokenizers==0.22.2 httpx==0.28.1 httpcore==1.0.9
	-$(RUN) -m pip install --quiet --no-deps --target $@/5.24.0 transformers==5.24.0
	mkdir -p $@
	touch $@

.PHONY: help demo serve test check test-gpt2 bench engines notebook gpu-check gpu-rehearsal train
