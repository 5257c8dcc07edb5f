"""This project and sentence-transformers in turn, on the same texts and model: seconds, memory, equal work.

encode    passages, mixed and one language after the other   Encoder.encode | encode_document
train     a step: 24 queries, 1 + 7 passages                 05_train.py | its trainer and losses
mine      a corpus, and again with other settings            01_mine_candidates.py | mine_hard_negatives
evaluate  given vectors: rankings to a file, two measures    06_eval.py | InformationRetrievalEvaluator
judge     calls at a concurrency of 256                      02_filter_false_negatives.py | openai's client
startup   each script's --help                               | import sentence_transformers
linear    ten times the passages or calls                    this project alone

How     a measurement is a process of its own; the sides take turns; medians over rounds. The clock starts
        after the imports ("start-up included": before), for encode and train after a warm-up. Memory is the
        process's peak, its CPU that of all threads. Work that is
        not equal (tokens without padding, vectors, first loss without dropout, passages mined, nDCG@10) is
        an error. Threads that wait sleep on both sides, or their waiting would count as CPU time
Writes  results/peers.json, a part for each model and device; cases that are not run again stay
Usage   python bench/peers.py --data data/minimiracl [--encoder FOLDER] [--subjects encode mine]
        python bench/peers.py --data data/minimiracl --device cuda
        python bench/peers.py --data data/minimiracl --beside CHECKOUT    another checkout of this project
Cost    two quiet cores: more than two hours, most of it for mine; a training step needs up to 20 GB
"""
import gc
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from functools import partial, wraps
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_WAIT_POLICY": "passive"}  # `common` adds to it, for this project alone
# The least cosine to its vectors, the most by which the first loss differs, the least share of the mined
# passages that are the same: those whose scores tie to the fp16 of our files may change places
LIMITS = {"fp32": {"cosine": 0.99999, "loss": 1e-4, "mined": 0.95},
          "bf16": {"cosine": 0.999, "loss": 1e-3, "mined": 0.5}}
TEMPERATURE = 0.02
WHOLE = ", start-up included"
LIBRARIES = ("torch", "transformers", "sentence-transformers", "faiss-cpu")
MEASURED = {"cpu_s": 3, "wall_s": 3, "peak_mb": 0, "peak_gpu_mb": 0}  # and digits


# --------------------------------------------------------------------------- one side, in its own process

def on_cuda():
    import torch
    return torch.cuda.is_available()


def clock():
    """[CPU seconds of all threads, wall seconds] of this process; what a GPU was asked for is done."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    started = int(ticks) / os.sysconf("SC_CLK_TCK")
    return np.array([time.process_time(), time.clock_gettime(time.CLOCK_BOOTTIME) - started])


def begin(job):
    """The clock once all imports are made; 0 where the whole process counts, as its user waits for it."""
    if job["whole"]:
        return 0
    if job["root"]:
        import search  # noqa: F401 - its environment comes before faiss
    else:
        import datasets  # noqa: F401
        import sentence_transformers  # noqa: F401 - ours loads none for vectors that are there
    import faiss  # noqa: F401
    import pytrec_eval  # noqa: F401
    gc.freeze()  # nor is the collector's walk through what was imported of the work
    return clock()


def told(seconds, fed=(), **more):
    """What the process prints of its work."""
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    torch = sys.modules.get("torch")
    on_gpu = torch.cuda.max_memory_allocated() >> 20 if torch else 0
    fed = {name: int(n) for name, n in dict(fed).items()}
    return {"cpu_s": seconds[0], "wall_s": seconds[1], "peak_mb": int(peak) >> 10, "peak_gpu_mb": on_gpu,
            **fed, **more}


def count_tokens():
    """{tokens, with padding}, of what any SentenceTransformer is fed from now on."""
    from sentence_transformers import SentenceTransformer
    fed = Counter()
    forward = SentenceTransformer.forward

    @wraps(forward)
    def counted(self, features, **kwargs):
        fed["tokens"] += features["attention_mask"].sum()
        fed["with padding"] += features["input_ids"].numel()
        return forward(self, features, **kwargs)

    SentenceTransformer.forward = counted
    return fed


def load_peer(job, max_len):
    import torch
    from sentence_transformers import SentenceTransformer
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]]
    model = SentenceTransformer(job["encoder"], device=job["device"], model_kwargs={"dtype": dtype})
    model.max_seq_length = max_len
    return model


def stage(job, name):
    """A numbered script of the job's checkout."""
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location(f"stage_{name}", f"{job['root']}/{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def encode(job):
    groups = json.loads(Path(job["texts"]).read_text("utf-8"))
    fed = count_tokens()
    if job["root"]:
        from encoder import Encoder
        encode = partial(Encoder(job["encoder"], job["device"], dtype=job["dtype"]).encode, kind="passage")
    else:
        encode = load_peer(job, 256).encode_document
    encode(groups[0][:32])
    fed.clear()
    start = clock()
    vectors = np.concatenate([encode(group) for group in groups])
    seconds = clock() - start
    np.save(job["out"], vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return told(seconds, fed)


def train(job):
    """Of a step, the first left out: the clock is read when an optimiser, of either side, has stepped."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    fed = count_tokens()
    ends = []
    register_optimizer_step_post_hook(lambda *_: ends.append(clock()))
    loss = train_ours(job) if job["root"] else train_peer(job)
    return told((ends[-1] - ends[0]) / max(1, len(ends) - 1), fed, loss=loss)


def train_flags(job):
    """What decides the batches of stage 05: of one language, each as often as it has queries, no weights."""
    return ["--input", f"{job['data']}/topics.jsonl", "--encoder", job["encoder"], "--batch-size",
            str(job["batch"]), "--dev-share", "0", "--weighting", "none", "--language-power", "1",
            "--topic-power", "1"]


def train_ours(job):
    chunks = ["--chunk-tokens", str(16 * job["max_len"])] if job["cached"] else []  # the peer's: 32 texts
    stage(job, "05_train").main(
        [*train_flags(job), "--max-steps", str(job["steps"] + 1), "--temperature", str(TEMPERATURE),
         "--device", job["device"], "--dtype", job["dtype"], "--query-max-len", str(job["max_len"]),
         "--passage-max-len", str(job["max_len"]), "--overwrite", "--out", job["out"], *chunks])
    return json.loads(Path(job["out"], "train_log.jsonl").open().readline())["loss"]


def train_peer(job):
    """Its trainer as it comes, with the batches of ours in the same order."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import losses
    from torch.utils.data import BatchSampler, SequentialSampler
    model = load_peer(job | {"dtype": "fp32"}, job["max_len"])  # bf16 is autocast on both sides
    rows = json.loads(Path(job["data"], "rows.json").read_text("utf-8"))[:(job["steps"] + 1) * job["batch"]]
    names = ["query", "positive", *(f"negative_{n}" for n in range(1, 8))]
    prompts = dict.fromkeys(names, model.prompts.get("document") or "")
    loss = losses.MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    if job["cached"]:
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)

    def in_order(dataset, batch_size, drop_last, **_):
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    args = SentenceTransformerTrainingArguments(
        job["out"], max_steps=job["steps"] + 1, per_device_train_batch_size=job["batch"],
        bf16=job["dtype"] == "bf16", use_cpu=job["device"] == "cpu", logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, prompts=prompts | {"query": model.prompts.get("query") or ""},
        batch_sampler=in_order)
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    trainer = SentenceTransformerTrainer(model, args, train_dataset=Dataset.from_dict(columns), loss=loss)
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def mine(job):
    """From the files to the mined file, the model's loading included; writes {query: [docid]}, best first."""
    run = mine_ours if job["root"] else mine_peer
    fed = {}
    if not job["again"]:
        shutil.rmtree(job["cache"], ignore_errors=True)
        fed = count_tokens()
    start = begin(job)
    docids = run(job)
    seconds = clock() - start
    Path(job["out"]).write_text(json.dumps(docids()), "utf-8")
    return told(seconds, fed)


def mine_ours(job):
    how = ["--strategy", "topk", "--depth", "40"]
    if job["again"]:
        how = ["--strategy", "shifted", "--shift", "10", "--depth", "30"]
    path = f"{job['cache']}/mined.jsonl"
    stage(job, "01_mine_candidates").main(
        ["--data", job["data"], "--retrievers", job["encoder"], *how, "--cache", job["cache"], "--out", path,
         "--device", job["device"], "--dtype", job["dtype"], "--query-max-len", "256", "--overwrite"])

    def docids():
        records = map(json.loads, open(path, encoding="utf-8"))
        return {record["query"]: [p["docid"] for p in record["negative_passages"]] for record in records}
    return docids


def mine_peer(job):
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives
    how = {"range_min": 10, "num_negatives": 30} if job["again"] else {"num_negatives": 40}
    corpus = {p["text"]: p["docid"] for p in read_jsonl(f"{job['data']}/corpus/en.jsonl")}
    records = read_jsonl(f"{job['data']}/train.jsonl")
    pairs = Dataset.from_dict({"query": [record["query"] for record in records],
                               "positive": [record["positive_passages"][0]["text"] for record in records]})
    mined = mine_hard_negatives(pairs, load_peer(job, 256), corpus=list(corpus), output_format="n-tuple",
                                use_faiss=True, cache_folder=job["cache"], verbose=False, **how)
    mined.to_json(f"{job['cache']}/mined.jsonl", force_ascii=False)
    return lambda: {row["query"]: [corpus[row[f"negative_{n}"]] for n in range(1, how["num_negatives"] + 1)]
                    for row in mined}


def evaluate(job):
    """From the files - passages, queries, judgments, vectors - to the figures and a file of the rankings."""
    run = evaluate_ours if job["root"] else evaluate_peer
    start = begin(job)
    found = run(job)
    return told(clock() - start, **found)


def evaluate_ours(job):
    from search import Ensemble
    evaluation = stage(job, "06_eval")
    args = Namespace(data=job["data"], depth=100, lang=None, limit=None)
    folder = Path(job["data"])
    queries, qrels = evaluation.read_questions(args, folder / "dev.jsonl", folder / "qrels/dev")
    ensemble = Ensemble([job["encoder"]], job["data"], job["cache"], device="cpu", dtype="fp32")
    hits, = ensemble.rank("en", list(queries["en"].values()), 101).values()
    ranking = dict(zip(queries["en"], evaluation.without_itself("en", queries["en"], hits, args)))
    Path(job["out"]).write_text("".join(evaluation.run_lines(ranking, "ours")), "utf-8")
    values = {"en": evaluation.measure(qrels["en"], evaluation.scores_of(ranking))}
    return {name: evaluation.averages(values)["avg"][name] for name in ("ndcg@10", "recall@100")}


def evaluate_peer(job):
    import torch
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    class Given:
        """A model that knows the vectors of its texts, in their order."""
        similarity_fn_name, similarity = "cosine", staticmethod(cos_sim)
        model_card_data = Namespace(set_evaluation_metrics=lambda *_: None)

        def encode_query(self, texts, **_):
            return torch.from_numpy(np.load(f"{job['data']}/queries.npy").astype(np.float32))

        def encode_document(self, texts, **_):
            return torch.from_numpy(np.load(f"{job['data']}/passages.npy").astype(np.float32))

    corpus = {p["docid"]: p["text"] for p in read_jsonl(f"{job['data']}/corpus/en.jsonl")}
    queries = {record["query_id"]: record["query"] for record in read_jsonl(f"{job['data']}/dev.jsonl")}
    lines = Path(job["data"], "qrels/dev/en.tsv").read_text().splitlines()
    relevant = {line.split()[0]: {line.split()[2]} for line in lines}
    found = InformationRetrievalEvaluator(queries, corpus, relevant, accuracy_at_k=[10], mrr_at_k=[10],
                                          precision_recall_at_k=[100], write_csv=False,
                                          write_predictions=True)(Given(), job["out"])
    return {name: round(found[f"cosine_{name}"], 5) for name in ("ndcg@10", "recall@100")}


def judge(job):
    """bench/judge_throughput.py for one kind of client."""
    command = [sys.executable, str(ROOT / "bench/judge_throughput.py"), "--calls", str(job["calls"]),
               "--concurrency", "256", "--rounds", "1", "--kinds", job["kind"]]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rate, ms, peak = map(float, re.search(r"(\d+) calls/s +([\d.]+) ms CPU .* (\d+) MB", text).groups())
    return told([ms * job["calls"] / 1000, job["calls"] / rate], peak_mb=round(peak))


def startup(job):
    start = time.perf_counter()
    subprocess.run([sys.executable, *job["command"]], check=True, stdout=subprocess.DEVNULL)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = [usage.ru_utime + usage.ru_stime, time.perf_counter() - start]
    return told(seconds, peak_mb=usage.ru_maxrss >> 10)


# --------------------------------------------------------------------------- texts and model

def read_jsonl(path):
    with open(path, encoding="utf-8") as lines:
        return list(map(json.loads, lines))


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def make_encoder(folder, texts):
    """6 layers x 384 with random weights, and a BPE vocabulary of these texts."""
    import torch
    from tokenizers import SentencePieceBPETokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    torch.manual_seed(13)
    tokenizer = SentencePieceBPETokenizer()
    tokenizer.train_from_iterator(texts, 30_000, show_progress=False, special_tokens=["<pad>", "<unk>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token="<pad>", unk_token="<unk>",
                            model_max_length=512).save_pretrained(folder)
    BertModel(BertConfig(vocab_size=30_000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                         intermediate_size=1536)).save_pretrained(folder)


def read_texts(data):
    """({lang: its passages' texts, each once, shuffled}, [training record])."""
    from common import corpus_languages, passage_text, read_passages, read_queries, read_shards
    texts = {}
    for lang in corpus_languages(data):
        passages = [p for path, lines in read_shards(data, lang) for p in read_passages(path, lines)]
        texts[lang] = list(dict.fromkeys(map(passage_text, passages)))
        random.Random(f"13:{lang}").shuffle(texts[lang])
    return texts, list(read_queries(f"{data}/train.jsonl"))


def in_turn(texts):
    """A text of each language, then another of each, until there are none."""
    return [text for some in zip_longest(*texts.values()) for text in some if text]


def make_training(folder, texts, records, job):
    """topics.jsonl with seven random negatives a query; rows.json: its texts in the order of the batches.

    No negative is the positive of another query, which stage 05 would leave out of the loss.
    """
    from common import passage_text
    positives = {passage_text(p) for record in records for p in record["positive_passages"]}
    pool = {lang: [text for text in some if text not in positives] for lang, some in texts.items()}
    of_lang = Counter(record["lang"] for record in records)
    docids = {}
    rows = {}
    topics = []
    for record in records:
        key = record["lang"], record["query_id"]
        if of_lang[record["lang"]] < job["batch"]:  # its batches would not be full
            continue
        chosen = random.Random(str(key)).sample(pool[record["lang"]], 7)
        rows[key] = [record["query"], passage_text(record["positive_passages"][0]), *chosen]
        passages = [{"docid": str(docids.setdefault(text, len(docids))), "title": "", "text": text}
                    for text in rows[key][1:]]
        topics.append(record | {"positive_passages": passages[:1], "negative_passages": passages[1:]})
    write_jsonl(folder / "topics.jsonl", topics)
    plan = folder / "batches.jsonl"
    stage(job, "05_train").main([*train_flags(job), "--max-steps", "0", "--log-batches", str(plan),
                                 "--out", "-"])
    order = [rows[key] for batch in read_jsonl(plan)[:job["steps"] + 1]
             for key in zip(batch["langs"], batch["query_ids"])]
    (folder / "rows.json").write_text(json.dumps(order), "utf-8")


def make_corpus(folder, texts, records, n_queries, n_passages):
    """A collection of one language: questions, then beginnings of passages, of a positive each.

    Returns "queries x passages", as many as there are of those asked for.
    """
    from common import passage_text
    pool = in_turn(texts)
    pairs = {record["query"]: passage_text(record["positive_passages"][0]) for record in records}
    pairs = {text[:80]: text for text in pool if len(text) > 200} | pairs
    pairs = dict(list(pairs.items())[-n_queries:])
    passages = list(dict.fromkeys([*pairs.values(), *pool]))[:max(n_queries, n_passages)]
    docid = {text: str(i) for i, text in enumerate(passages)}
    write_jsonl(folder / "corpus/en.jsonl", [{"docid": docid[text], "title": "", "text": text}
                                             for text in passages])
    questions = [{"query_id": f"q{i}", "lang": "en", "query": query, "negative_passages": [],
                  "positive_passages": [{"docid": docid[text], "title": "", "text": text}]}
                 for i, (query, text) in enumerate(pairs.items())]
    write_jsonl(folder / "train.jsonl", questions)
    write_jsonl(folder / "dev.jsonl", questions)
    (folder / "qrels/dev").mkdir(parents=True)
    (folder / "qrels/dev/en.tsv").write_text("".join(
        f"{q['query_id']}\t0\t{q['positive_passages'][0]['docid']}\t1\n" for q in questions), "utf-8")
    return f"{len(questions)} x {len(passages)}"


def give_vectors(folder, encoder, cache):
    """Random vectors of make_corpus's texts, a query's near its positive's: .npy files and in our cache."""
    from search import Ensemble
    records = read_jsonl(folder / "train.jsonl")
    place = {p["text"]: i for i, p in enumerate(read_jsonl(folder / "corpus/en.jsonl"))}
    positives = [place[record["positive_passages"][0]["text"]] for record in records]
    ensemble = Ensemble([encoder], folder, cache, device="cpu", dtype="fp32")
    ours = next(iter(ensemble.encoders.values()))
    draw = np.random.default_rng(13)
    passages = draw.standard_normal((len(place), ours.model.get_embedding_dimension()), np.float32)
    queries = passages[positives] + 4 * draw.standard_normal((len(records), passages.shape[1]), np.float32)
    rows = {"passage": place, "query": {record["query"]: i for i, record in enumerate(records)}}
    given = {"passage": passages, "query": queries}
    for kind, vectors in given.items():
        given[kind] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    np.save(folder / "passages.npy", given["passage"])
    np.save(folder / "queries.npy", given["query"])

    def fill(vectors, texts, kind, bar=None):
        vectors[:] = given[kind][[rows[kind][text] for text in texts]]

    ours.fill = fill
    ensemble.rank("en", [record["query"] for record in records], 101)


def without_dropout(encoder, folder):
    """A copy of the model whose first loss is the same whoever computes it."""
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {name: 0.0 for name in config if "dropout" in name and config[name]}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return str(folder)


# --------------------------------------------------------------------------- cases: {name: {side: job}}

def beside(args, **job):
    """The job of each side: this checkout, its peer, another checkout where one is named."""
    sides = {"ours": str(ROOT), "peer": "", "other checkout": args.beside}
    return {side: job | {"root": root} for side, root in sides.items() if root is not None}


def encode_cases(work, args):
    mixed = in_turn(args.texts)[:args.passages]
    chosen = set(mixed)
    by_lang = [[text for text in some if text in chosen] for some in args.texts.values()]
    cases = {}
    for name, groups in (("mixed", [mixed]), ("one language after the other", by_lang)):
        path = work / f"{name[:3]}.json"
        path.write_text(json.dumps(groups), "utf-8")
        for dtype in LIMITS:
            cases[f"encode {len(mixed)} passages, {name}, {dtype}"] = beside(
                args, do="encode", texts=str(path), dtype=dtype)
    return cases


def train_cases(work, args):
    job = {"root": str(ROOT), "do": "train", "data": str(work), "encoder": args.encoder, "batch": args.batch,
           "steps": args.steps}
    make_training(work, args.texts, args.records, job)
    job["check"] = {"encoder": without_dropout(args.encoder, work / "no-dropout"), "steps": 0}
    return {f"train, {max_len} tokens{', gradients cached' * cached}, {dtype}":
            beside(args, **job | {"max_len": max_len, "cached": cached, "dtype": dtype})
            for max_len in args.max_len for cached in (False, True) for dtype in LIMITS}


def mine_cases(work, args):
    size = make_corpus(work / "mine", args.texts, args.records, *args.mine)
    cases = {}
    for dtype, again, whole in (("fp32", False, False), ("fp32", True, False), ("fp32", True, True),
                                ("bf16", False, False)):  # again: given vectors, no dtype
        name = f"mine {size}{', again' * again}{WHOLE * whole}, {dtype}"
        cases[name] = beside(args, do="mine", data=str(work / "mine"), dtype=dtype, again=again, whole=whole)
        for side, job in cases[name].items():
            job["cache"] = f"{work}/cache.{side}.{dtype}"
    return cases


def evaluate_cases(work, args):
    size = make_corpus(work / "evaluate", args.texts, args.records, *args.mine)
    give_vectors(work / "evaluate", args.encoder, work / "given")
    return {f"evaluate {size}{WHOLE * whole}": beside(args, do="evaluate", data=str(work / "evaluate"),
                                                      cache=str(work / "given"), dtype="fp32", whole=whole)
            for whole in (False, True)}


def judge_cases(work, args):
    kinds = {"ours": "stage 02", "peer": "create"}
    return {f"judge {args.calls} calls": {side: {"do": "judge", "calls": args.calls, "kind": kind}
                                          for side, kind in kinds.items()}}


def startup_cases(work, args):
    commands = {"import sentence_transformers": ["-c", "import sentence_transformers"]}
    commands |= {f"{path.name} --help": [str(path), "--help"] for path in sorted(ROOT.glob("0*.py"))}
    return {"start-up": {name: {"do": "startup", "command": command} for name, command in commands.items()}}


def linear_cases(work, args):
    """Sides are sizes here; ratios are of the larger."""
    encode = next(iter(encode_cases(work, args).values()))["ours"]
    some = [json.loads(Path(encode["texts"]).read_text("utf-8"))[0][::10]]
    (work / "tenth.json").write_text(json.dumps(some), "utf-8")
    n_passages = min(args.mine[1], sum(map(len, args.texts.values())))
    n_queries = n_passages // 100
    for n in (n_passages // 10, n_passages):
        make_corpus(work / f"mine-{n}", args.texts, args.records, n_queries, n)
    mine = {"do": "mine", "root": str(ROOT), "dtype": "fp32", "again": False, "whole": False,
            "cache": f"{work}/cache"}
    return {
        "ten times, encode": {"a tenth": encode | {"texts": str(work / "tenth.json")}, "all": encode},
        "ten times, mine": {"a tenth": mine | {"data": f"{work}/mine-{n_passages // 10}"},
                            "all": mine | {"data": f"{work}/mine-{n_passages}"}},
        "ten times, judge": {side: {"do": "judge", "kind": "stage 02", "calls": n}
                             for side, n in (("a tenth", args.calls // 10), ("all", args.calls))}}


SUBJECTS = {"encode": encode_cases, "train": train_cases, "mine": mine_cases, "evaluate": evaluate_cases,
            "judge": judge_cases, "startup": startup_cases, "linear": linear_cases}


# --------------------------------------------------------------------------- turns, medians, equal work

def one(job):
    """What a process of its own tells of this job."""
    command = [sys.executable, __file__, "--one", json.dumps(job)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{json.dumps(job)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def nearness(job, other, told, of_other):
    """(what, how near, is that enough) of two processes' work: their jobs, and what they told and left."""
    limit = LIMITS[job["dtype"]]
    if job["do"] == "encode":
        cosines = (np.load(f"{job['out']}.npy") * np.load(f"{other['out']}.npy")).sum(1)
        return "smallest cosine", float(cosines.min()), cosines.min() >= limit["cosine"]
    if job["do"] == "mine":
        mined, others = (json.loads(Path(of["out"]).read_text("utf-8")) for of in (job, other))
        shares = [len(set(mined.get(query, ())) & set(found)) / len(found) for query, found in others.items()]
        equal = set(mined) == set(others) and np.mean(shares) >= limit["mined"]
        return "share of the same passages", float(np.mean(shares)), equal
    key, most = ("loss", limit["loss"]) if job["do"] == "train" else ("ndcg@10", 1e-4)
    difference = abs(told[key] - of_other[key])
    return f"difference of {key}", difference, difference <= most


def same_work(name, jobs, found):
    """{side: {tokens, what: how near}} to ours; DataError where the work is not equal."""
    from common import DataError
    near = {}
    for side in set(jobs) - {"ours"}:
        tokens = {of: found[of].get("tokens") for of in ("ours", side)}
        if len(set(tokens.values())) > 1:
            raise DataError(f"{name}: the work is not equal, tokens: {tokens}; the times would say nothing")
        what, value, equal = nearness(jobs["ours"], jobs[side], found["ours"], found[side])
        if not equal:
            raise DataError(f"{name}: the work is not equal, {what} (ours, {side}): {value}; the times would "
                            "say nothing")
        near[side] = {"tokens": tokens["ours"], what: value}
    return near


def measure(cases, args):
    """Yield (name, {sides, ratios, rounds, equal}) of a case once more timed: sides take turns, cases too."""
    from common import say
    rounds = {name: {side: [] for side in jobs} for name, jobs in cases.items()}
    equal = {}
    for _ in range(args.rounds):
        for name, jobs in cases.items():
            for side, job in jobs.items():
                rounds[name][side].append(one(job))
                say(f"{name}, {side}: {json.dumps(rounds[name][side][-1])}")
            if name not in equal and "dtype" in jobs.get("ours", ()):
                checked = {side: one(job | job["check"]) if "check" in job else rounds[name][side][0]
                           for side, job in jobs.items()}
                equal[name] = same_work(name, jobs, checked)
                say(f"{name}: equal work: {json.dumps(equal[name])}")
            yield name, figures(rounds[name]) | {"equal": equal.get(name)}


def figures(rounds):
    """Medians of each side, each side's over the first's, and all that was timed."""
    sides = {side: {key: round(float(np.median([told[key] for told in found])), digits)
                    for key, digits in MEASURED.items()} for side, found in rounds.items()}
    first, *others = sides
    ratios = {side: {key: round(sides[side][key] / sides[first][key], 2) for key in MEASURED
                     if sides[first][key]} for side in others}
    return {"sides": sides, "ratios": ratios, "rounds": rounds}


def table(result):
    """Markdown of results/peers.json: a row a case, side and the one before it in the case."""
    from results import markdown
    header = ["", "CPU s", "wall s", "peak MB"] * 2 + ["ratio: CPU", "wall", "peak"]
    parts = []
    for where, part in result.items():
        rows = []
        for name, case in part["cases"].items():
            (first, figures), *others = case["sides"].items()
            cells = [[f"{of['cpu_s']:.2f}", f"{of['wall_s']:.2f}", f"{of['peak_mb']:.0f}"]
                     for of in (figures, *(of for _, of in others))]
            for (side, _), of_side in zip(others, cells[1:]):
                ratio = [f"**{case['ratios'][side][key]:.2f}**" for key in ("cpu_s", "wall_s", "peak_mb")]
                rows.append([f"{name}: {first}", *cells[0], side, *of_side, *ratio])
        n_rounds = {len(of_side) for case in part["cases"].values() for of_side in case["rounds"].values()}
        run = part["run"] | {"rounds": " to ".join(map(str, sorted(n_rounds)))}
        told = ", ".join(f"{name} {value}" for name, value in run.items() if value)
        parts += [f"**{where}**: {told}", *([markdown(header, rows)] if rows else [])]
    return "\n\n".join(parts)


def build_parser():
    from common import Parser, positive_int
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--data", required=True, metavar="FOLDER", help="made by 00_prepare_data.py")
    flag("--encoder", metavar="FOLDER", help="default: 6 layers x 384 with random weights, made on the spot")
    flag("--device", choices=["cpu", "cuda"], default="cpu")
    flag("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    flag("--rounds", type=positive_int, default=3, help="of each side")
    flag("--passages", type=positive_int, default=2000, help="to encode")
    flag("--steps", type=positive_int, default=4, help="of training, after a first that is not timed")
    flag("--batch", type=positive_int, default=24, help="queries a step")
    flag("--max-len", type=positive_int, nargs="+", default=[128], help="tokens read in training")
    flag("--mine", type=positive_int, nargs=2, default=[5000, 20_000], metavar=("QUERIES", "PASSAGES"))
    flag("--calls", type=positive_int, default=6000, help="of the judge")
    flag("--beside", metavar="CHECKOUT", help="another checkout of this project")
    flag("--out", type=Path, default=ROOT / "results/peers.json", metavar="FILE")
    return parser


def prepared(subject, work, args):
    """The cases of a subject, each job with its model, device and output."""
    work.mkdir()
    cases = SUBJECTS[subject](work, args)
    for number, jobs in enumerate(cases.values()):
        for side, job in jobs.items():
            out = f"{work}/{number}.{side.replace(' ', '-')}"
            jobs[side] = {"encoder": args.encoder, "device": args.device, "out": out} | job
    return cases


def main(argv=None):
    import results
    from common import short_name
    args = build_parser().parse_args(argv)
    found = json.loads(args.out.read_text("utf-8")) if args.out.is_file() else {}
    model = short_name(args.encoder) if args.encoder else "6 layers x 384, random weights"
    part = found.setdefault(f"{model}, {args.device}", {"cases": {}})
    part["run"] = results.made_by("") | {name: version(name) for name in LIBRARIES}
    if args.device == "cuda" and not on_cuda():
        part["run"] = {"not run": "no GPU was at hand"}
        args.subjects = []
    args.texts, args.records = read_texts(args.data)
    with tempfile.TemporaryDirectory() as folder:
        if not args.encoder and set(args.subjects) & {"encode", "train", "mine", "evaluate", "linear"}:
            args.encoder = f"{folder}/encoder"
            make_encoder(args.encoder, [text for some in args.texts.values() for text in some])
        for subject in args.subjects:
            for name, case in measure(prepared(subject, Path(folder, subject), args), args):
                part["cases"][name] = case
                args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        job = json.loads(sys.argv[2])
        if job.get("root"):
            sys.path.insert(0, job["root"])
            import common  # noqa: F401 - its environment comes before torch, as in every stage
        print(json.dumps(globals()[job["do"]](job)))
    else:
        sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
        from common import run
        run(main)
