# make all            the whole pipeline on the bundled sample: no key, no GPU, no network after the install; 3 minutes on two cores
# make all DATA_SOURCE=miracl LANGS="sw te" RETRIEVERS="intfloat/multilingual-e5-large BAAI/bge-m3" FUSION=concat ENCODER=BAAI/bge-m3 LLM=NAME
#                     the same on real data and models, with the server that OPENAI_BASE_URL and OPENAI_API_KEY name
# make all ENCODER=intfloat/multilingual-e5-small
#                     the same with a real encoder, from the hub or a folder of it; stage 05 tells how long it takes
# make miracl         the paper's setting on full MIRACL: prints disk, GPU hours, calls, tokens, money, and stops; CONFIRM=1 starts it
# make test           the tests (10 to 15 minutes on two cores)
# make data | candidates | filtered | augmented | topics | model | eval     up to one stage
# make ablations      the rows of the paper's tables on $(DATA) and $(RUN), three seeds; resumable, under two hours on two cores
# make judge-quality  how good must the judge be? a labelled simulation on $(DATA); resumable, under half an hour on two cores
# make bench          speed and memory, beside sentence-transformers on $(DATA), and of mining, judging and training; hours on two cores
# make soak SECONDS=3600   kills, full disks, second copies, torn files at random, over all stages: nothing may be lost
# make sample         write sample/data and sample/truth again from the fact tables, to the same bytes
# make clean          remove what `make all` made for $(DATA) and $(RUN); the cache of embeddings and answers stays

ifneq ($(filter miracl,$(MAKECMDGOALS)),)  # the paper's setting where it is not the default; what the command line or the environment sets wins
export DATA_SOURCE ?= miracl
export LANGS ?= ar bn en es fa fi fr hi id ja ko ru sw te th zh
export RETRIEVERS ?= intfloat/multilingual-e5-large BAAI/bge-m3
export ENCODER ?= BAAI/bge-m3
export LLM ?= meta-llama/Llama-3.1-70B-Instruct
export EVAL_MODELS ?= $(ENCODER) $(RUN)/model
export POWER ?= 0
export KIND ?= paper
endif

# Variables, each to be set on the command line:
DATA_SOURCE ?= sample
# ^ sample, miracl, beir, squad or tevatron (00_prepare_data.py)
DATA_ROOT ?=
# ^ folder or file with the source; empty: the hub for miracl, the bundled files for sample
LANGS ?=
# ^ languages, as in LANGS="sw te"; empty: all there are
empty :=
space := $(empty) $(empty)
# the root's last folder, as a name: blanks in DATA_ROOT are fine, a target of make cannot have any
PLAIN = $(patsubst %.json,%,$(patsubst %.jsonl,%,$(patsubst %.gz,%,$1)))
NAME := $(if $(DATA_ROOT),$(call PLAIN,$(notdir $(abspath $(subst $(space),_,$(strip $(DATA_ROOT)))))),$(DATA_SOURCE))
$(if $(NAME),,$(error DATA_ROOT=$(DATA_ROOT) has no name; set DATA and RUN, or another DATA_ROOT))
DATA ?= data/$(NAME)
# ^ the prepared collection; one that is there, of no DATA_SOURCE that you name, is used as it is
RUN ?= runs/$(COLLECTION)
# ^ what the stages make
ENCODER ?= models/$(COLLECTION)
# ^ encoder to start from; the default is a small one, built on the spot from the collection itself
RETRIEVERS ?= bm25 $(ENCODER)
# ^ the ensemble of stage 01
FUSION ?= $(if $(filter bm25,$(RETRIEVERS)),rrf,concat)
# ^ rrf where bm25 is in the ensemble, else concat (Sec. 3.3)
LLM ?= offline-stand-in
# ^ judge and generator; the default is offline_llm.py, classical methods that only stand in for a language model
DEPTH ?= 40
# ^ candidates per query
N ?= 30
# ^ negatives per query
TOPICS ?= 12
# ^ clusters
KIND ?= $(if $(SMALL),small,$(if $(filter %bge-m3 %multilingual-e5-large,$(ENCODER:%/=%)),paper,pretrained))
# ^ of settings of the training: small, made on the spot; paper, of its encoders (Sec. 4.1); pretrained, any other (results/real-encoder-curve.json)
EPOCHS ?= $(EPOCHS_$(KIND))
# ^ passes over the training queries
BATCH ?= 24
# ^ queries a step
POWER ?= 0.5
# ^ languages, and topics in a batch, are drawn by their share of the training queries to this power; 0: uniformly (Sec. 3.5)
SEED ?= 13
# ^ seed of every random draw
DTYPE ?=
# ^ of encoding and training: fp32, the default on a CPU, or bf16, on CUDA; CPUs with avx512_bf16 or amx_bf16 are faster in it
GPUS ?= 1
# ^ processes of stages 01 and 05, a GPU each where there are some; in training they share the BATCH
EVAL_MODELS ?= bm25 $(ENCODER) $(RUN)/model
# ^ what stage 06 compares, ENCODER among them; make miracl leaves bm25 out: its index of English MIRACL would need about 141 GB of memory
CACHE ?= cache
# ^ embeddings and answers
JUDGE ?=
# ^ make judge-quality: more flags of bench/judge_quality.py, as in JUDGE="--weak sw te"
SECONDS ?= 3600
# ^ make soak: how long
PEERS ?=
# ^ make bench: more flags of bench/peers.py, as in PEERS="--encoder FOLDER --subjects encode train"
CONFIRM ?=
# ^ make miracl: 1 starts the run
PRICE_IN ?=
# ^ make miracl: price of a million prompt tokens
PRICE_OUT ?=
# ^ make miracl: price of a million completion tokens
GPU_PRICE ?=
# ^ make miracl: price of a GPU hour
PLAN ?=
# ^ make miracl: more flags of bench/plan.py, as in PLAN="--utilisation 0.4"

$(if $(word 2,$(DATA_ROOT)),$(info DATA_ROOT has a blank: what is made of it is called $(NAME)))
override DATA := $(DATA:%/=%)
COLLECTION := $(notdir $(abspath $(DATA)))
# the encoder, where it is the one that is built here
SMALL := $(if $(filter $(abspath models/$(COLLECTION)),$(abspath $(ENCODER))),models/$(COLLECTION))
# whether DATA is there already and is no sample, while no source is named
FROM_SAMPLE := $(shell grep -l '"source": "sample"' $(DATA).meta.json 2>/dev/null)
MADE := $(shell grep -l '"script": "00_prepare_data.py"' $(DATA).meta.json 2>/dev/null)
KEPT := $(and $(filter file,$(origin DATA_SOURCE)),$(if $(DATA_ROOT)$(FROM_SAMPLE),,yes),$(wildcard $(DATA)/train.jsonl))
# the settings of KIND; chunks of tokens take 6 GB of memory where whole batches take 17
EPOCHS_small := 8
EPOCHS_paper := 20
EPOCHS_pretrained := 1
TRAIN_small := --lr 1e-3 --temperature 0.05
TRAIN_paper :=
TRAIN_pretrained := --lr 2e-5 --negatives $(if $(filter 1 2,$(N)),$(N),3) --passage-max-len 128 --chunk-tokens 4096
TRAIN ?= $(TRAIN_$(KIND))
LESS := $(if $(findstring --negatives,$(TRAIN)),,$(if $(filter 1 2 3 4 5 6,$(N)),--negatives $(N)))
PYTHON ?= python3
PY := .venv/bin/python
READ := $(if $(DTYPE),--dtype $(DTYPE))
COMMON := --seed $(SEED) $(if $(LANGS),--lang $(LANGS))
SEEDS := --seeds $(SEED) $(shell expr $(SEED) + 1) $(shell expr $(SEED) + 2)
# for many short runs: as many epochs as their scripts say, unless EPOCHS is given
SOME_EPOCHS := $(if $(and $(SMALL),$(filter file,$(origin EPOCHS))),,--epochs $(EPOCHS))
$(if $(shell test "$(GPUS)" -ge 1 2>/dev/null && echo yes),,$(error GPUS=$(GPUS): want a whole number of at least 1))
# what starts 01 and 05
SPREAD := $(if $(filter 1,$(GPUS)),$(PY),.venv/bin/torchrun --nproc-per-node $(GPUS) --standalone)
$(foreach path,DATA RUN CACHE,$(if $(word 2,$($(path))),$(error $(path)="$($(path))" has a blank, which make takes for two files: choose another path)))
$(foreach path,DATA RUN CACHE,$(if $($(path)),,$(error $(path) is empty: name a folder)))
$(if $(filter $(ENCODER),$(EVAL_MODELS)),,$(error EVAL_MODELS="$(EVAL_MODELS)" has not ENCODER=$(ENCODER), which the others are compared with: add it))
SERVED := $(PY) $(if $(filter offline-stand-in,$(LLM)),offline_llm.py --exec $(PY))

.PHONY: all miracl data encoder candidates filtered augmented topics model eval ablations judge-quality bench test soak sample clean help FORCE
FORCE:

# Every stage is started each time: it knows by the digests of its inputs, models and arguments whether it has work to do.
all: eval

data: $(DATA)/train.jsonl
encoder: $(SMALL)
candidates filtered augmented topics: %: $(RUN)/%.jsonl
model: $(RUN)/model
eval: $(RUN)/eval/metrics.json

# Needs no .venv: the plan comes before anything is installed, downloaded or paid for.
miracl:
	@$(PYTHON) bench/plan.py $(if $(LANGS),--lang $(LANGS)) --retrievers $(RETRIEVERS) --encoder $(ENCODER) --llm $(LLM) \
	    --depth $(DEPTH) --target $(N) --epochs $(EPOCHS) $(if $(DATA_ROOT),--root "$(DATA_ROOT)") $(if $(PRICE_IN),--price-in $(PRICE_IN)) $(if $(PRICE_OUT),--price-out $(PRICE_OUT)) \
	    $(if $(GPU_PRICE),--gpu-price $(GPU_PRICE)) --eval-models $(EVAL_MODELS) $(PLAN) $(if $(filter 1,$(CONFIRM)),--confirmed)
	$(if $(filter 1,$(CONFIRM)),@$(MAKE) all)

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

$(DATA)/train.jsonl: .venv/installed FORCE
	$(if $(KEPT),@echo "$(DATA) is used as it is",$(PY) 00_prepare_data.py --source $(DATA_SOURCE) $(if $(DATA_ROOT),--root "$(DATA_ROOT)") --out $(DATA) $(COMMON))

# The same for every SEED, as a model from the hub is: runs that differ in SEED may go side by side.
models/$(COLLECTION): $(DATA)/train.jsonl FORCE
	$(PY) sample/make_encoder.py --data $(DATA) --out $@ $(if $(LANGS),--lang $(LANGS))

$(RUN)/candidates.jsonl: $(DATA)/train.jsonl $(SMALL) FORCE
	$(SPREAD) 01_mine_candidates.py --data $(DATA) --retrievers $(RETRIEVERS) --fusion $(FUSION) --depth $(DEPTH) --cache $(CACHE) --out $@ $(COMMON) $(READ)

$(RUN)/filtered.jsonl: $(RUN)/candidates.jsonl FORCE
	$(SERVED) 02_filter_false_negatives.py --input $< --llm $(LLM) --cache $(CACHE) --out $@ $(COMMON)

$(RUN)/augmented.jsonl: $(RUN)/filtered.jsonl FORCE
	$(SERVED) 03_generate_negatives.py --input $< --data $(DATA) --retrievers $(RETRIEVERS) --fusion $(FUSION) --llm $(LLM) --target $(N) --cache $(CACHE) --out $@ $(COMMON) $(READ)

$(RUN)/topics.jsonl: $(RUN)/augmented.jsonl FORCE
	$(PY) 04_cluster_topics.py --input $< --encoder $(ENCODER) --topics $(TOPICS) --cache $(CACHE) --out $@ $(COMMON) $(READ)

$(RUN)/model: $(RUN)/topics.jsonl FORCE
	$(SPREAD) 05_train.py --input $< --encoder $(ENCODER) --epochs $(EPOCHS) --batch-size $(BATCH) --language-power $(POWER) --topic-power $(POWER) $(TRAIN) $(LESS) --out $@ $(COMMON) $(READ)

$(RUN)/eval/metrics.json: $(RUN)/model FORCE
	$(PY) 06_eval.py --data $(DATA) --models $(EVAL_MODELS) --baseline $(ENCODER) --cache $(CACHE) --out $(RUN)/eval $(COMMON) $(READ)
	@$(PY) 06a_report.py --run $(RUN) --out $(RUN)/eval $(COMMON)

ablations: $(RUN)/topics.jsonl
	$(PY) bench/ablations.py --data $(DATA) --run $(RUN) --encoder $(ENCODER) --retrievers $(RETRIEVERS) --fusion $(FUSION) --llm $(LLM) --target $(N) \
		$(if $(LANGS),--lang $(LANGS)) --train-flags="$(strip $(TRAIN) $(READ))" --read-flags="$(READ)" --batch-size $(BATCH) $(SOME_EPOCHS) $(SEEDS) --cache $(CACHE)

judge-quality: $(DATA)/train.jsonl $(SMALL)
	$(PY) bench/judge_quality.py --data $(DATA) $(if $(KEPT),,$(if $(filter sample,$(DATA_SOURCE)),--truth sample/truth)) --encoder $(ENCODER) \
		$(if $(LANGS),--lang $(LANGS)) --train-flags $(patsubst --%,%,$(subst =--, ,$(subst $(space),=,$(strip $(TRAIN) $(READ))))) batch-size=$(BATCH) \
		$(SOME_EPOCHS) $(SEEDS) $(JUDGE) --out results/judge-quality-$(COLLECTION)

bench: $(DATA)/train.jsonl $(SMALL)
	$(PY) bench/peers.py --data $(DATA) $(PEERS)
	$(PY) bench/results.py
	$(PY) bench/mine_million.py --work runs/million
	$(PY) bench/judge_throughput.py
	$(PY) bench/judge_faults.py
	$(PY) bench/judge_memory.py
	$(PY) bench/train_memory.py --encoder $(ENCODER)

test: .venv/installed
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

soak: .venv/installed
	$(PY) tests/test_faults.py --seconds $(SECONDS)

sample: .venv/installed
	$(PY) sample/make_sample.py

clean:
	rm -rf $(if $(KEPT),,$(if $(MADE),$(DATA) $(DATA).meta.json)) $(RUN) $(patsubst %/build.json,%,$(wildcard $(SMALL:%=%/build.json)))

help:
	@sed -n '/^# make /,/^$$/s/^# //p' Makefile
	@echo "Variables:"
	@awk '/^[A-Z_]+ \?=/{v=$$1; sub(/^[A-Z_]+ \?= ?/,""); d=$$0} /^# \^ /{sub(/^# \^ /,""); printf "  %-12s %s [%s]\n", v, $$0, d}' Makefile
