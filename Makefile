# Needlestream: `make help` explains. Each step does only what is not done yet.

DATA   ?= $(if $(wildcard input/* shards/manifest.json),input,demo/input)
# The demonstration stays in its own folder, demo/.
IS_DEMO := $(filter demo/input,$(DATA))
SHARDS ?= $(if $(IS_DEMO),demo/shards,shards)
RUN    ?= $(if $(IS_DEMO),demo/run,runs/$(PRESET))$(if $(FOLD),-folds)
PRESET ?= $(if $(IS_DEMO),demo,full)
FOLD   ?=
ARGS   ?=
$(foreach name,DATA SHARDS RUN,$(if $(word 2,$($(name))),\
  $(error $(name)=$($(name)): make cannot take paths with spaces; run the three steps by hand (docs/training.md))))
# Without FOLD one run in $(RUN), fold 0 held out; with FOLD=2 one in $(RUN)/fold2; with FOLD=all one in each $(RUN)/fold*.
IS_ALL  := $(filter all,$(FOLD))
HERE    := $(RUN)$(if $(filter-out all,$(FOLD)),/fold$(FOLD))
TRAINED := $(HERE)/$(if $(IS_ALL),cv,summary).json
WEIGHTS := $(HERE)$(if $(IS_ALL),/fold*)/best.safetensors
# With PYTHON=... that interpreter is used as it is; otherwise .venv is made and filled.
ifdef PYTHON
  READY :=
  READY_DEV :=
  READY_BENCH :=
else
  PYTHON    := .venv/bin/python
  READY     := .venv/installed
  READY_DEV := .venv/installed-dev
  READY_BENCH := .venv/installed-bench
endif
BASE_PYTHON ?= python3
# What torch and DALI are built for: CUDA 13 or 12, or cpu. Unset: as .venv has it, or the newest that the driver runs.
# Not `?=`: on clusters an environment variable CUDA often names a folder.
CUDA   :=
REQUIREMENTS_13  := requirements.txt
REQUIREMENTS_12  := requirements-cuda12.txt
REQUIREMENTS_cpu := requirements-cpu.txt
$(if $(filter-out 13 12 cpu,$(CUDA)),$(error CUDA=$(CUDA): expected 13, 12 or cpu))
DRIVER_FILE ?= /proc/driver/nvidia/version
PIP_INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check
# Half of the cadences have bright needles: enough for a small model to learn from in minutes.
DEMO_SIMULATE := --train 1500 --test 300 --positive-share 0.5 --snr-min 300 --snr-max 3000 --seed 0
# The demonstration trains on cadences without needles, to which training adds signals.
DEMO_BACKGROUNDS := --backgrounds 3000 --seed 1
# A simulated observation that takes about a minute: two coarse channels of a quarter of the real width.
OBSERVE_SIMULATE := --coarse-channels 2 --nfpc 262144 --needles 8 --interference 6 --snr-min 60 --snr-max 300 --seed 1
OBSERVED := demo/observation
$(if $(word 2,$(OBSERVED)),$(error OBSERVED=$(OBSERVED): make cannot take paths with spaces; run the steps by hand (docs/observations.md)))
OBSERVE_WEIGHTS ?= none
BACKGROUNDS ?= $(if $(IS_DEMO),demo/background-shards)

# Each of these files is written at once or not at all: make need not, and must not, delete one on Ctrl-C.
.PRECIOUS: $(OBSERVED)/files/truth.csv $(OBSERVED)/shards/manifest.json $(OBSERVED)/candidates.report.html demo/input/train_labels.csv demo/backgrounds/sample_submission.csv demo/background-shards/manifest.json $(SHARDS)/manifest.json $(TRAINED) $(HERE)/submission.csv
.PHONY: help install shards train infer observe test fuzz chaos bench peers needles recipes skies curve weights weights-fine learning-check bench-check gpu-check lint format clean

help:
	@echo 'make install  make .venv and install into it; most targets below do so too'
	@echo 'make shards   pack the data into WebDataset shards'
	@echo 'make train    train a model on the shards (packs first if needed)'
	@echo 'make infer    write submission.csv (packs and trains first if needed)'
	@echo 'make observe  search six simulated telescope files for candidates'
	@echo 'make test     run the tests'
	@echo 'make lint     check style, types and imports'
	@echo 'make fuzz     read 10,000 damaged files'
	@echo 'make chaos    kill runs 40 times'
	@echo 'make bench    measure loading, training, prediction and packing against others'
	@echo 'make peers    train and predict with loops of other projects (1 hour, estimated)'
	@echo 'make needles  train and judge recipes (half an hour on two cores);'
	@echo '              ARGS="--real DIR": judge them on real needles too'
	@echo 'make weights  train the weights that come with the program (23 minutes)'
	@echo 'make weights-fine  train weights for fine products (15 minutes, estimated)'
	@echo 'make curve    train on ever more cadences (an hour on two cores)'
	@echo 'make recipes  train with one choice changed at a time (half an hour)'
	@echo 'make skies    train on real skies too; needs ARGS="--real DIR"'
	@echo 'make learning-check  check that each preset can learn (5 minutes)'
	@echo 'make gpu-check  run the GPU tests and short benchmarks (8 minutes)'
	@echo 'make clean    remove the demonstration (demo/) and nothing else'
	@echo
	@echo 'Without data in input/ (train_labels.csv, train/, sample_submission.csv, test/)'
	@echo 'a demonstration data set is simulated under demo/.'
	@echo
	@echo 'DATA=$(DATA)  SHARDS=$(SHARDS)  RUN=$(RUN)  PRESET=$(PRESET)'
	@echo 'FOLD=2        hold out fold 2, not fold 0'
	@echo 'FOLD=all      train every fold: scores of all training data, and predictions'
	@echo '              averaged over all folds'
	@echo 'BACKGROUNDS=DIR  shards without needles, to which training adds signals'
	@echo 'ARGS="..."    more options for the step that is run; see for example'
	@echo '              $(PYTHON) train.py --help'
	@echo 'CUDA=12       torch and DALI for NVIDIA drivers 525 to 579; 13: from 580 on;'
	@echo '              cpu: without CUDA. Unset: what the driver can run'
	@echo 'PYTHON=...    use an interpreter that has all packages, not .venv'

.venv/bin/python:
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: $(BASE_PYTHON) is too old, expected Python 3.11 or newer; give BASE_PYTHON=...'; exit 1; }
	$(BASE_PYTHON) -m venv .venv

# Holds the name of the requirements file for .venv. The .venv of an earlier version lacks it, and is for CUDA 13.
# CUDA 13 needs driver 580 or newer, CUDA 12 needs 525: https://docs.nvidia.com/deploy/cuda-compatibility
.venv/requirements: $(if $(CUDA),$(if $(filter $(REQUIREMENTS_$(CUDA)),$(file < .venv/requirements)),,FORCE)) | .venv/bin/python
	@file=''; driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -Eo '^[0-9]+\.' | head -n 1); \
	driver=$${driver:-$$(grep -Eo '\b[0-9]{3}\.[0-9]' $(DRIVER_FILE) 2>/dev/null | head -n 1)}; driver=$${driver%%.*}; \
	if [ -n '$(CUDA)' ]; then file=$(REQUIREMENTS_$(CUDA)); why='as asked for'; \
	elif [ -e .venv/installed ]; then file=$$(cat .venv/installed); why='as .venv has them'; \
	elif [ -z "$$driver" ]; then why='no NVIDIA driver found; they run on the CPU too'; \
	elif [ "$$driver" -ge 580 ]; then why="driver $$driver is 580 or newer"; \
	elif [ "$$driver" -ge 525 ]; then file=$(REQUIREMENTS_12); why="driver $$driver is older than 580"; \
	else why="driver $$driver is older than 525, too old for any: update it, or use the CPU alone"; fi; \
	file=$${file:-$(REQUIREMENTS_13)}; echo $$file > $@; \
	echo "torch, DALI: of $$file ($$why; make CUDA=13, 12 or cpu chooses others)"

FORCE:

# $(call install,FILE...): install the file that .venv/requirements names, and FILE... without their `-r` lines.
define install
@echo "installing $$(cat .venv/requirements) $(1) into .venv (about 7 GB, a few minutes)"
@$(if $(1),grep -hv '^-r ' $(1),:) > .venv/further.txt
@$(PIP_INSTALL) -r $$(cat .venv/requirements) -r .venv/further.txt || { $(NO_CPU_BUILDS); rm .venv/requirements; exit 1; }
endef
NO_CPU_BUILDS = grep -qv cpu .venv/requirements || echo \
  'error: pip offers no torch without CUDA here; give it an index that does (PIP_EXTRA_INDEX_URL; its address is at' \
  'https://pytorch.org/get-started/locally), or leave CUDA=cpu out: the builds with CUDA run on a CPU too' >&2

.venv/installed: requirements.txt requirements-cuda12.txt requirements-cpu.txt .venv/requirements | .venv/bin/python
	$(call install)
	@cp .venv/requirements $@

.venv/installed-dev: requirements-dev.txt requirements.txt requirements-cuda12.txt requirements-cpu.txt .venv/requirements | .venv/bin/python
	$(call install,requirements-dev.txt)
	@cp .venv/requirements .venv/installed
	@cp .venv/requirements $@

.venv/installed-bench: requirements-bench.txt requirements-dev.txt requirements.txt requirements-cuda12.txt requirements-cpu.txt .venv/requirements | .venv/bin/python
	$(call install,requirements-bench.txt requirements-dev.txt)
	$(PIP_INSTALL) --no-deps mosaicml-streaming==0.13.0
	@cp .venv/requirements .venv/installed
	@cp .venv/requirements .venv/installed-dev
	@cp .venv/requirements $@

install: $(READY)

demo/input/train_labels.csv: | $(READY)
	@echo 'input/ has no data: simulating a demonstration data set under demo/'
	$(PYTHON) -m shard_tools simulate --out demo/input $(DEMO_SIMULATE)

demo/backgrounds/sample_submission.csv: | $(READY)
	$(PYTHON) -m shard_tools simulate --out demo/backgrounds $(DEMO_BACKGROUNDS)

demo/background-shards/manifest.json: demo/backgrounds/sample_submission.csv | $(READY)
	$(PYTHON) -m shard_tools pack --input demo/backgrounds --out demo/background-shards

$(SHARDS)/manifest.json: $(if $(IS_DEMO),demo/input/train_labels.csv) | $(READY)
	$(PYTHON) -m shard_tools pack --input $(DATA) --out $(SHARDS)$(if $(filter shards,$(MAKECMDGOALS)), $(ARGS))
	$(PYTHON) -m shard_tools info $(SHARDS)

$(TRAINED): $(SHARDS)/manifest.json $(if $(IS_DEMO),demo/background-shards/manifest.json) | $(READY)
	$(PYTHON) train.py --shards $(SHARDS)$(if $(BACKGROUNDS), --backgrounds $(BACKGROUNDS)) --run-dir $(HERE) --preset $(PRESET)$(if $(FOLD), --fold $(FOLD)) --resume$(if $(filter train,$(MAKECMDGOALS)), $(ARGS))

$(HERE)/submission.csv: $(TRAINED) | $(READY)
	$(PYTHON) infer.py --shards $(SHARDS) --weights $(WEIGHTS) --tta --out $@$(if $(filter infer,$(MAKECMDGOALS)), $(ARGS))

shards: $(SHARDS)/manifest.json
	@echo 'shards:      $(SHARDS)'

train: $(TRAINED)
	@echo 'run:         $(HERE)  (weights: $(WEIGHTS))'

infer: $(HERE)/submission.csv
	@echo 'done:        $(HERE)/submission.csv'
	@ls $(HERE)/report.html $(HERE)/submission.report.html 2>/dev/null | sed 's/^/report:      /; s/$$/  (open it in a browser)/'
	$(if $(IS_DEMO),@echo 'The same cadences with the weights that come with the program:')
	$(if $(IS_DEMO),@$(PYTHON) infer.py --shards $(SHARDS) --weights needlestream --tta --out demo/needlestream.csv)

# Files of an interrupted simulation are removed only under demo/: elsewhere they may be the user's, and are refused.
$(OBSERVED)/files/truth.csv: | $(READY)
	$(if $(filter demo/observation,$(OBSERVED)),rm -rf $(OBSERVED)/files)
	$(PYTHON) -m shard_tools simulate-observation --out $(OBSERVED)/files $(OBSERVE_SIMULATE)

$(OBSERVED)/shards/manifest.json: $(OBSERVED)/files/truth.csv | $(READY)
	$(PYTHON) -m shard_tools ingest $(foreach name,A1 B A2 C A3 D,$(OBSERVED)/files/$(name).h5) --out $(OBSERVED)/shards

$(OBSERVED)/candidates.report.html: $(OBSERVED)/shards/manifest.json | $(READY)
	$(PYTHON) infer.py --shards $(OBSERVED)/shards --weights $(OBSERVE_WEIGHTS) --candidates $(OBSERVED)/candidates.csv$(if $(filter observe,$(MAKECMDGOALS)), $(ARGS))

observe: $(OBSERVED)/candidates.report.html
	@echo 'Which of the simulated needles are among the candidates:'
	@$(PYTHON) -m shard_tools recall $(OBSERVED)/candidates.csv $(OBSERVED)/files/truth.csv --each
	@echo 'candidates:  $(OBSERVED)/candidates.csv'
	@echo 'report:      $(OBSERVED)/candidates.report.html  (open it in a browser)'

# All tests of a file run in the same process, because they share what was trained or packed for that file.
test: $(READY_DEV)
	$(PYTHON) -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

fuzz: $(READY_DEV)
	$(PYTHON) -m tests.fuzz --mutants 10000 $(ARGS)

chaos: $(READY_DEV)
	$(PYTHON) -m tests.chaos --kills 20 $(ARGS)

bench: $(READY_BENCH)
	$(PYTHON) benchmarks/loader_bench.py --peers all --workloads raw canvas train tta $(ARGS)
	$(PYTHON) benchmarks/train_bench.py
	$(PYTHON) benchmarks/train_bench.py --what infer
	$(PYTHON) benchmarks/pack_bench.py
	$(PYTHON) benchmarks/report.py --readme docs/performance.md --recipe docs/recipe.md

# Once with the model of the preset demo, and once with a plain Swin on the canvas of the preset seed. Epochs of 768
# cadences, so that what an epoch costs by itself counts little; batches of 16, so that all loops fit into 24 GB.
peers: $(READY_BENCH)
	$(PYTHON) benchmarks/train_bench.py --peers all --cadences 768 $(ARGS)
	$(PYTHON) benchmarks/train_bench.py --peers all --what infer $(ARGS)
	$(PYTHON) benchmarks/train_bench.py --peers all --preset seed --model swin_nano --batch-size 16 $(ARGS)
	$(PYTHON) benchmarks/train_bench.py --peers all --preset seed --model swin_nano --what infer $(ARGS)
	$(PYTHON) benchmarks/report.py --readme docs/performance.md --recipe docs/recipe.md

needles: $(READY_DEV)
	$(PYTHON) benchmarks/needle_bench.py $(ARGS)
	$(PYTHON) benchmarks/report.py --readme docs/performance.md --recipe docs/recipe.md

learning-check: $(READY_DEV)
	$(PYTHON) benchmarks/learning_check.py $(ARGS)

recipes: $(READY_DEV)
	$(PYTHON) benchmarks/recipe_changes.py $(ARGS)
	$(PYTHON) benchmarks/report.py --readme docs/performance.md --recipe docs/recipe.md

skies: $(READY_DEV)
	$(PYTHON) benchmarks/real_skies.py $(ARGS)
	$(PYTHON) benchmarks/report.py --readme docs/performance.md --recipe docs/recipe.md

curve: $(READY_DEV)
	$(PYTHON) benchmarks/learning_curve.py $(ARGS)
	$(PYTHON) benchmarks/report.py --readme docs/performance.md --recipe docs/recipe.md

weights: $(READY_DEV)
	$(PYTHON) benchmarks/learning_curve.py --cadences 200000 --runs 1 --keep training/needlestream.safetensors $(ARGS)

# Finished trainings are kept in the work folder, so an interrupted run resumes.
weights-fine: $(READY_DEV)
	$(PYTHON) benchmarks/fine_weights.py --work-dir $(or $(TMPDIR),/tmp)/needlestream-fine --keep training/needlestream-fine.safetensors $(ARGS)

# Checks only ratios, with limits far below what a quiet machine reaches: what fails here is broken, not merely slow.
bench-check: export NEEDLESTREAM_HISTORY := $(or $(TMPDIR),/tmp)/needlestream-bench-check.jsonl
bench-check: $(READY_DEV)
	$(PYTHON) benchmarks/loader_bench.py --quick --check --check-margin 0.4
	$(PYTHON) benchmarks/train_bench.py --cadences 64 --rounds 3 --check --check-margin 0.7
	$(PYTHON) benchmarks/pack_bench.py --cadences 300 --rounds 3 --check --check-margin 0.4

# Installs nothing, because a machine with a GPU may have no network. PYTHON=python3 names its own interpreter.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

lint: $(READY_DEV)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	PYTHONPATH=. $(PYTHON) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

format: $(READY_DEV)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf demo
