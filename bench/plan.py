"""What the paper's setting on full MIRACL will need - disk, GPU hours, LLM calls, tokens, money - and the page SCALING.md.

How     counted work (MIRACL's sizes x measured averages) x measured rates, stage by stage. No GPU was at hand: GPU hours are an
        ESTIMATE, counted FLOPs / (--peak-tflops x --utilisation). Printing needs nothing but Python, and starts nothing
Reads   results/rates.json   averages and rates, each with how it was measured
Writes  nothing; --markdown: SCALING.md; --measure: results/rates.json
Usage   python bench/plan.py [--lang sw te] [--llm NAME] [--price-in P --price-out P] [--gpu-price P]     (`make miracl` does it first)
        python bench/plan.py --markdown
        make data DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl && python bench/plan.py --measure data/minimiracl
Cost    --measure (Linux): three minutes of CPU, 7 GB of memory, 3 GB of temporary disk
"""
import json
import os
import re
import sys
from argparse import SUPPRESS
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("bench", "sample", "tests"))]
from common import DataError, Parser, positive_int, run  # noqa: E402

# passages, training queries, their relevant passages, their judged passages, dev queries (the collection's own files; Sec. 4.1)
MIRACL = {
    "ar": (2_061_414, 3_495, 6_217, 25_382, 2_896), "bn": (297_265, 1_631, 3_859, 16_754, 411),
    "en": (32_893_221, 2_863, 7_899, 29_416, 799), "es": (10_373_953, 2_162, 10_025, 21_531, 648),
    "fa": (2_207_172, 2_107, 4_277, 21_844, 632), "fi": (1_883_509, 2_897, 4_928, 20_350, 1_271),
    "fr": (14_636_953, 1_143, 2_321, 11_426, 343), "hi": (506_264, 1_169, 2_469, 11_668, 350),
    "id": (1_446_315, 4_071, 12_505, 41_358, 960), "ja": (6_953_614, 3_477, 6_984, 34_387, 860),
    "ko": (1_486_752, 868, 1_973, 12_767, 213), "ru": (9_543_918, 4_683, 10_000, 33_921, 1_252),
    "sw": (131_924, 1_901, 2_687, 9_359, 482), "te": (518_079, 3_452, 4_119, 18_608, 828),
    "th": (542_166, 2_972, 4_778, 21_293, 733), "zh": (4_934_368, 1_312, 3_187, 13_113, 393)}
REMOVED, FROM_STAGE_2 = 0.195, 0.091            # the paper's shares: of candidates removed (Table 8), of final negatives from stage 2
LAYERS, WIDTH = 24, 1024                        # mE5-large and BGE-M3 are XLM-R large
BODY = LAYERS * (12 * WIDTH ** 2 + 13 * WIDTH)  # weights that every token meets: 302 million
WEIGHTS = BODY + (250_002 + 514 + 3) * WIDTH    # and with the embeddings: 559 million
BATCH, NEGATIVES, DEV_SHARE, DEV_QUERIES = 24, 7, 0.1, 100              # of stage 05
JUDGE_OUT, SUMMARY_OUT, QUERY_OUT, ANSWER_BYTES = 16, 256, 128, 95      # tokens of an answer: 02's estimate, 03's limits; in the cache
QUOTED = {  # what other scripts measured and say in their docstrings
    "prepare_s_per_million": ("00_prepare_data.py", r"a million passages: ([\d,]+) s"),
    "judge_calls_per_s": ("bench/judge_throughput.py", r"stage 02 +([\d,]+),"),
    "judge_mb": ("02_filter_false_negatives.py", r"([\d,]+) MB and [\d,]+ MB more for each million"),
    "judge_mb_per_million": ("02_filter_false_negatives.py", r"([\d,]+) MB more for each million"),
    "mine_mb": ("bench/mine_million.py", r"1,000,000 (?:dense )?[\d,]+ s, (?:peak )?([\d,]+) MB"),
    "train_mb": ("bench/train_memory.py", r"100,000 records \(.*?\):? ([\d,]+) MB")}

NODES = (1, 8, 16, 64)  # GPUs
# cpu_s: on the measured machine; with G GPUs max((gpu_s + side_s) / G, floor_s) + fixed_s; gpu_s counts as GPU hours
Row = namedtuple("Row", "stage work formula splits disk memory cpu_s gpu_s side_s floor_s fixed_s", defaults=(0,) * 5)


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--lang", nargs="+", choices=MIRACL, default=list(MIRACL), metavar="CODE", help="languages with training queries")
    parser.add_argument("--retrievers", nargs="+", default=["intfloat/multilingual-e5-large", "BAAI/bge-m3"], metavar="MODEL_OR_bm25",
                        help="the ensemble of stage 01; every model is counted as XLM-R large")
    parser.add_argument("--encoder", default="BAAI/bge-m3", metavar="MODEL", help="model to train and to compare with")
    parser.add_argument("--llm", default="meta-llama/Llama-3.1-70B-Instruct", metavar="NAME",
                        help="judge and generator; its size is read from the name (70B), without one it counts as hosted")
    parser.add_argument("--depth", type=positive_int, default=40, help="candidates a query, k in Sec. 4.1")
    parser.add_argument("--target", type=positive_int, default=30, help="negatives a query, N in Sec. 4.1")
    parser.add_argument("--epochs", type=positive_int, default=20, help="passes over the training queries (Sec. 4.1)")
    parser.add_argument("--root", default="hub", metavar="FOLDER", help="where stage 00 will find MIRACL; the hub needs HF_TOKEN")
    parser.add_argument("--peak-tflops", type=float, default=989, help="ASSUMED: bf16 TFLOP/s of a GPU at most, an H100 SXM's by its maker")
    parser.add_argument("--utilisation", type=float, default=0.3, help="ASSUMED: share of it that is reached, 0 to 1")
    parser.add_argument("--price-in", type=float, metavar="P", help="price of a million prompt tokens; none: no money for tokens")
    parser.add_argument("--price-out", type=float, metavar="P", help="price of a million completion tokens")
    parser.add_argument("--gpu-price", type=float, metavar="P", help="price of a GPU hour; none: no money for GPUs")
    parser.add_argument("--confirmed", action="store_true", help="after the plan, exit 2 where the run would lack its server or token")
    parser.add_argument("--markdown", action="store_true", help="write SCALING.md")
    parser.add_argument("--measure", metavar="DATA", help="measure averages on DATA (mini-MIRACL from stage 00) and rates on this machine")
    parser.add_argument("--bm25", nargs=3, help=SUPPRESS)
    return parser


# --------------------------------------------------------------------------- counted work

def total(table, weights):
    """Sum of weight x average over languages; one that was not measured (th) counts as the mean of the others."""
    return sum(n * table.get(lang, sum(table.values()) / len(table)) for lang, n in weights.items())


def count(args, averages):
    """{what: how much} of the whole run, in the order of the stages."""
    passages, queries, relevant, judged, dev = ({lang: MIRACL[lang][i] for lang in args.lang} for i in range(5))
    tokens, even = averages["tokens"], dict.fromkeys(args.lang, 1 / len(args.lang))
    held = {lang: max(1, round(DEV_SHARE * n)) for lang, n in queries.items()}
    dense, n = set(args.retrievers) - {"bm25"}, sum(queries.values())
    work = {
        "passages": sum(passages.values()), "training queries": n, "relevant passages": sum(relevant.values()),
        "judged passages": sum(judged.values()), "dev queries": sum(dev.values()),
        "corpus bytes": total(averages["bytes"], passages), "bytes of judged passages": total(averages["bytes"], judged),
        "bytes of a passage for each query": total(averages["bytes"], queries),
        "vector bytes of an encoder, fp16": 2 * WIDTH * sum(passages.values()),
        "encoders in 01": len(dense), "new encoders in 06": len({args.encoder} - dense) + 1,  # the trained model is always new
        "passage tokens": total(tokens["passage"], passages), "tokens of relevant passages": total(tokens["passage"], relevant),
        "pairs in 01": sum(queries[lang] * passages[lang] for lang in args.lang),
        "pairs in 06": sum(dev[lang] * passages[lang] for lang in args.lang),
        # at most: a mined candidate that people judged is not asked for
        "judge calls in 02": n * args.depth, "prompt tokens in 02": args.depth * total(tokens["judge"], queries),
        # instructions, question and reference are the same in a query's calls: a prefix cache reads them once
        "of them spared by a prefix cache": (args.depth - 1) * total(tokens["judge, shared"], queries),
        "completion tokens in 02": JUDGE_OUT * n * args.depth,
        # one summary and one query for each training query at most; and judging what keeps the paper's share
        "negatives from 03": round(FROM_STAGE_2 * args.target * n), "generating calls in 03": 2 * n}
    work["judge calls in 03"] = round(work["negatives from 03"] / (1 - REMOVED))
    work["prompt tokens in 03"] = (total(tokens["summarise"], queries) + (averages["ask"] + SUMMARY_OUT) * n
                                   + work["judge calls in 03"] * total(tokens["judge"], queries) / n)
    work["completion tokens in 03"] = (SUMMARY_OUT + QUERY_OUT) * n + JUDGE_OUT * work["judge calls in 03"]
    # languages are drawn uniformly: a training query is of the average language, not the average query
    work["training steps"] = args.epochs * -(-(n - sum(held.values())) // BATCH)
    work["training tokens"] = work["training steps"] * BATCH * (total(tokens["query"], even) + (1 + NEGATIVES) * total(tokens["passage"], even))
    work["validation tokens"] = args.epochs * (args.target + work["relevant passages"] / n) * total(
        tokens["passage"], {lang: min(DEV_QUERIES, n_held) for lang, n_held in held.items()})
    return work


def billions(llm):
    """70 for Llama-3.1-70B-Instruct; 0 where the name does not say: then it is somebody else's server."""
    size = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z0-9])", llm.lower())
    return float(size[1]) if size else 0


def stages(args, rates):
    """(work, a Row for each stage)."""
    w, rate = count(args, rates["averages"]), {name: value for name, (value, _) in rates["rates"].items()}
    n_01, n_06, tokens, model = w["encoders in 01"], w["new encoders in 06"], w["passage tokens"], 4 * WEIGHTS
    gpu = lambda flop: flop / (args.peak_tflops * 1e12 * args.utilisation)  # noqa: E731
    listed = lambda n: n * w["bytes of a passage for each query"] + w["bytes of judged passages"]  # noqa: E731  n passages a query
    largest, size, encode_s = max(MIRACL[lang][0] for lang in args.lang), 1e9 * billions(args.llm), 1 / rate["encode_tokens_per_s"]
    prepare, search = w["passages"] * rate["prepare_s_per_million"] / 1e6, w["pairs in 01"] / rate["search_pairs_per_s"] * n_01
    bm25 = w["passages"] * rate["bm25_s_per_passage"] + w["pairs in 06"] * rate["bm25_s_per_pair"]
    calls = {"02": w["judge calls in 02"], "03": w["generating calls in 03"] + w["judge calls in 03"]}
    asked = {stage: w[f"prompt tokens in {stage}"] + w[f"completion tokens in {stage}"] for stage in calls}
    client = {stage: n / rate["judge_calls_per_s"] for stage, n in calls.items()}
    topics, train = gpu(2 * BODY * w["tokens of relevant passages"]), gpu(BODY * (6 * w["training tokens"] + 2 * w["validation tokens"]))
    widest = BATCH * (64 + 256 * (1 + NEGATIVES))  # tokens of a batch at most
    on_gpu = f"{(16 * WEIGHTS + 34 * WIDTH * LAYERS * widest) / 1e9:.0f} GB (16 bytes a weight, 34 x {WIDTH:,} x {LAYERS} a token, see `--chunk-tokens`)"
    servers, vectors = "the LLM's servers; one client asks", w["vector bytes of an encoder, fp16"]
    return w, [
        Row("00 data", f"{w['passages']:,} passages", "seconds a million passages", "nothing",
            w["corpus bytes"] * (1 + rate["gzip_share"]) + listed(0), f"{8 * largest / 1e9:.2f} GB: 8 bytes a passage of the largest language",
            cpu_s=prepare, fixed_s=prepare),
        Row("01 mine", f"{n_01} x {tokens / 1e9:.1f} G tokens, {n_01} x {w['pairs in 01'] / 1e9:.0f} G pairs", "2 x body x tokens; tokenising",
            "everything (`torchrun`)", n_01 * (vectors + model) + listed(args.depth),
            f"{rate['mine_mb'] / 1e3 + n_01 * model / 1e9:.1f} GB: {rate['mine_mb'] / 1e3:.1f} as measured, and the encoders",
            cpu_s=n_01 * tokens * encode_s + search, gpu_s=gpu(2 * BODY * n_01 * tokens), side_s=n_01 * tokens / rate["tokenise_tokens_per_s"]),
        Row("02 judge", f"{calls['02']:,} calls, {asked['02'] / 1e9:.2f} G tokens", "2 x LLM x tokens; calls a second of the client",
            servers, listed(args.depth) + ANSWER_BYTES * calls["02"],
            f"{(rate['judge_mb'] + rate['judge_mb_per_million'] * calls['02'] / 1e6) / 1e3:.1f} GB: as measured, by the million answers",
            cpu_s=client["02"], gpu_s=gpu(2 * size * asked["02"]), floor_s=client["02"]),
        Row("03 generate", f"{calls['03']:,} calls, {asked['03'] / 1e9:.2f} G tokens, at most", "as 02", f"{servers}, and searches",
            listed(args.target) + ANSWER_BYTES * calls["03"], "as 01",
            cpu_s=client["03"] + search, gpu_s=gpu(2 * size * asked["03"]), floor_s=client["03"]),
        Row("04 topics", f"{w['relevant passages']:,} passages", "2 x body x tokens", "nothing",
            listed(args.target) + 2 * WIDTH * w["relevant passages"], f"{model / 1e9:.1f} GB: the encoder",
            cpu_s=w["tokens of relevant passages"] * encode_s, gpu_s=topics, floor_s=topics),
        Row("05 train", f"{w['training steps']:,} steps, {w['training tokens'] / 1e9:.1f} G tokens; {w['validation tokens'] / 1e9:.1f} G to validate",
            "6 x body x tokens; 2 x to validate", f"everything (`torchrun`, `--gather`), among {BATCH} at most: one query each",
            5 * model,  # the checkpoint with Adam's two moments, the best, and the model
            f"{rate['train_mb'] / 1e3 + model / 1e9:.1f} GB: {rate['train_mb'] / 1e3:.1f} as measured, and the encoder; on the GPU an estimated {on_gpu}",
            cpu_s=w["training tokens"] / rate["train_tokens_per_s"] + w["validation tokens"] * encode_s, gpu_s=train, floor_s=train / BATCH),
        Row("06 evaluate", f"{n_06} x {tokens / 1e9:.1f} G tokens, 2 x {w['pairs in 06'] / 1e9:.0f} G pairs, BM25",
            "as 01; BM25's seconds a passage and pair",
            "encoding, if 01 runs first under `torchrun` with `--retrievers RUN/model`: 06 finds its vectors",
            n_06 * vectors + rate["bm25_disk_bytes_per_passage"] * w["passages"],
            f"{rate['bm25_memory_bytes_per_passage'] * largest / 1e9:.0f} GB: BM25's index of the largest language is built in memory; else as 01",
            cpu_s=n_06 * tokens * encode_s + 2 * w["pairs in 06"] / rate["search_pairs_per_s"] + bm25,
            gpu_s=gpu(2 * BODY * n_06 * tokens), side_s=n_06 * tokens / rate["tokenise_tokens_per_s"], fixed_s=bm25)]


def wall(row, n_gpus):
    """Seconds on n GPUs: what is shared out, no faster than its floor, and what one process does alone."""
    return max((row.gpu_s + row.side_s) / n_gpus, row.floor_s) + row.fixed_s


# --------------------------------------------------------------------------- output

def span(seconds):
    """A duration in the largest unit of which there are at least two."""
    unit, size = next((u for u in (("years", 31_536_000), ("days", 86_400), ("h", 3600), ("min", 60)) if seconds >= 2 * u[1]), ("s", 1))
    return f"{seconds / size:,.{1 if seconds < 10 * size else 0}f} {unit}"


def gigabytes(n):
    return f"{n / 1e9:,.{1 if n < 1e10 else 0}f} GB"


def show(args, rates):
    """The plan as lines."""
    w, rows = stages(args, rates)
    hours, size = {row.stage[:2]: row.gpu_s / 3600 for row in rows}, billions(args.llm)
    llm, encoders = hours.pop("02") + hours.pop("03"), sum(hours.values())
    n_in, n_out = (w[f"{kind} tokens in 02"] + w[f"{kind} tokens in 03"] for kind in ("prompt", "completion"))
    spared = llm * w["of them spared by a prefix cache"] / (n_in + n_out)
    n_calls = w["judge calls in 02"] + w["judge calls in 03"] + w["generating calls in 03"]
    priced = args.price_in is not None or args.price_out is not None
    money = [f"{((args.price_in or 0) * n_in + (args.price_out or 0) * n_out) / 1e6:,.0f} for tokens"] * priced
    if args.gpu_price is not None:
        money.append(f"{args.gpu_price * encoders:,.0f} for the encoders' GPUs")
        if size and not priced:  # who pays for tokens does not pay for the LLM's GPUs
            money.append(f"{args.gpu_price * llm:,.0f} for the LLM's GPUs")
    return [
        f"{len(args.lang)} languages ({' '.join(args.lang)}); retrievers {' '.join(args.retrievers)}; trained {args.encoder}; LLM {args.llm}", "",
        *(f"{row.stage:<12} {row.work:<70} {gigabytes(row.disk):>8}" for row in rows), "",
        f"disk         {gigabytes(sum(row.disk for row in rows))}; {gigabytes(w['vector bytes of an encoder, fp16'])} of vectors for each of "
        f"{w['encoders in 01'] + w['new encoders in 06']} encoders",
        f"memory       {'; '.join(row.stage[:2] + ' ' + row.memory.split(':')[0] for row in rows)}",
        f"GPU hours    {encoders:,.1f} for the encoders ({', '.join(f'{stage} {h:,.1f}' for stage, h in hours.items() if h)}); "
        + (f"{llm:,.0f} for the LLM, {llm - spared:,.0f} with a prefix cache" if size else "none for the LLM: its name tells no size, as of a hosted one"),
        f"LLM calls    {n_calls:,} at most, {w['judge calls in 02']:,} of them in 02",
        f"tokens       {n_in / 1e6:,.0f} M prompt, {n_out / 1e6:,.0f} M completion",
        f"money        {', '.join(money) or 'not computed: give PRICE_IN and PRICE_OUT (of a million tokens), GPU_PRICE (of an hour)'}", "",
        f"GPU hours are an ESTIMATE, not measured: counted FLOPs / ({args.peak_tflops:g} TFLOP/s x {args.utilisation:g}), both ASSUMED. See SCALING.md."]


def markdown(args, rates):
    """SCALING.md."""
    w, rows = stages(args, rates)
    every, vectors = lambda seconds: span(sum(map(seconds, rows))), gigabytes(w["vector bytes of an encoder, fp16"])
    averages = rates["averages"]["tokens"]

    def table(head, lines):
        return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])

    by_stage = table(["stage", "counted work", "formula", "this machine, measured rates", "one GPU, estimate", "disk", "memory of a process"],
                     [(r.stage, r.work, r.formula, span(r.cpu_s), span(wall(r, 1)), gigabytes(r.disk), r.memory) for r in rows]
                     + [("all", "", "", every(lambda r: r.cpu_s), every(lambda r: wall(r, 1)), gigabytes(sum(r.disk for r in rows)), "")])
    by_gpus = table(["stage", *(f"{n} GPU{'s' * (n > 1)}" for n in NODES), "what is shared out"],
                    [(r.stage, *(span(wall(r, n)) for n in NODES), r.splits) for r in rows]
                    + [("all", *(every(lambda r: wall(r, n)) for n in NODES), "")])
    measured = table(["what", "value", "how"], [(name.replace("_", " "), f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}", how)
                                                for name, (value, how) in rates["rates"].items()])
    tokens = table(["tokens, mean of a language", *averages["passage"]],
                   [(name, *(f"{n:.0f}" for n in of_lang.values())) for name, of_lang in averages.items()])
    return f"""# Scaling: the paper's setting on full MIRACL

Made by `python bench/plan.py --markdown` from `results/rates.json`, never by hand. `python bench/plan.py --measure data/minimiracl` measures
the rates again, and `make miracl` prints the same count for the languages, models and prices that you set. Nobody has run all of this yet:
**counted** is the work; **measured** are averages and rates, on {rates['machine']}, by
processor seconds over cores, since other work ran there too; **estimated** is what concerns GPUs, of which none was at hand:
counted FLOPs / ({args.peak_tflops:g} TFLOP/s x {args.utilisation:g}), an H100's bf16 peak and a utilisation, both assumed (`--peak-tflops`, `--utilisation`).

## Each stage

{by_stage}

Body: the {BODY / 1e6:.0f} million weights of an encoder that every token meets. LLM: {args.llm}, {2 * billions(args.llm):g} GB in bf16, so it needs
several GPUs; for this machine its time is the client's alone, for GPUs that of prompts read in full and of decoding as efficient as reading.
A prefix cache spares {w['of them spared by a prefix cache'] / w['prompt tokens in 02']:.0%} of 02's prompt tokens. Not counted: attention's own products (a few per cent), downloads,
reading the vectors ({vectors} an encoder and search), search on a GPU (minutes), answers that are asked for again. 01's memory was measured
at a million passages (`bench/mine_million.py` tells how it grew up to there); by design it grows by 8 bytes a passage. BM25's does grow
with the corpus: `06_eval.py` without `bm25` among its `--models` needs what 01 needs.

## More GPUs and nodes

{by_gpus}

A node is 8 GPUs; exchange of gradients is not counted, tokenising is, at this machine's rate for each GPU. `make` starts one process a stage.
Run 01 under `torchrun` yourself and it finds 01 done; a model that 05 trained under `torchrun` it would train again, so go on with 06 by hand.
Disk is the same for any number of GPUs: all nodes see one `--cache`. Memory is each process's.

## Counted work

{table(["what", "how much"], [(name, f"{n:,.0f}") for name, n in w.items()])}

{w['training queries']:,} queries x {args.depth} candidates = {w['judge calls in 02']:,} judge calls, fewer where people judged the candidate.
03: {FROM_STAGE_2:.1%} of the final negatives come from it and {REMOVED:.1%} of what it finds is removed, the paper's shares; a summary and a query for
every training query is the most that first tries can take.

## Measured

{measured}

{tokens}

{rates["averages"]["how"]}
"""


# --------------------------------------------------------------------------- measuring: from here on the installed packages are needed

def cpu_seconds(work):
    """Processor seconds of work(), of all its threads: other work on the machine does not count."""
    from time import process_time
    start = process_time()
    work()
    return process_time() - start


def measure_averages(data, folder):
    """(averages, tokens of some passages, rates); the tokenizer that counts them is left in folder."""
    import zlib

    import make_encoder
    from conftest import load_stage
    from transformers import PreTrainedTokenizerFast

    from common import corpus_languages, dump, judge_messages, labelled, passage_text, read_queries
    passages = make_encoder.read_corpus(data, [lang for lang in corpus_languages(data) if lang in MIRACL], 1000, 13)
    tokeniser, generate = make_encoder.train_tokeniser(passages, 32_000, 13), load_stage("03_generate_negatives")
    PreTrainedTokenizerFast(tokenizer_object=tokeniser, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    n_tokens = lambda *texts: sum(len(tokeniser.encode(text, add_special_tokens=False).ids) for text in texts)  # noqa: E731
    texts, counted, lengths = [dump(p) for of_lang in passages.values() for p in of_lang], {}, []
    for lang, of_lang in passages.items():
        own = {"passage": [min(256, n_tokens(passage_text(p)) + 2) for p in of_lang], "query": [], "judge": [], "judge, shared": [], "summarise": []}
        for record, candidate in zip(read_queries(f"{data}/train.jsonl", [lang]), of_lang[:200]):
            system, user = (m["content"] for m in judge_messages(record["query"], lang, [candidate], record["positive_passages"][0]))
            asked = labelled(Question=record["query"], Passage=passage_text(record["positive_passages"][0]))
            own["query"].append(min(64, n_tokens(record["query"]) + 2))
            own["judge"].append(10 + n_tokens(system, user))  # 10: the chat template's own
            own["judge, shared"].append(10 + n_tokens(system, user.split("\nCandidate passage:")[0]))
            own["summarise"].append(10 + n_tokens(generate.SUMMARISE, asked))
        lengths += own["passage"][:50]
        for name, values in own.items():
            counted.setdefault(name, {})[lang] = round(sum(values) / len(values), 1)
    size = {lang: round(sum(len(dump(p).encode()) for p in of_lang) / len(of_lang), 1) for lang, of_lang in passages.items()}
    blob, seconds = "".join(texts).encode(), cpu_seconds(lambda: tokeniser.encode_batch_fast(texts)) / os.cpu_count()
    how = (f"Up to 1,000 passages and 200 training queries a language of {Path(data).name}, whose passages are cut at about 1,650 characters and stand "
           "near some question; Thai is not among them and counts as the mean of the others. Passages are cut at 256 tokens, queries at 64, as in "
           "Sec. 4.1; judge: instructions, question, reference and candidate. The tokenizer has 32,000 pieces and is trained on these passages by "
           "`sample/make_encoder.py`; XLM-R's and Llama's will count differently, Llama's most where it knows a script badly.")
    return {"tokens": counted, "ask": 10 + n_tokens(generate.ASK), "bytes": size, "how": how}, lengths, {
        "gzip_share": (len(zlib.compress(blob)) / len(blob), "size of a packed corpus over the unpacked"),
        "tokenise_tokens_per_s": (n_tokens(*texts) / seconds, "that tokenizer on both cores")}


def measure_speeds(folder, lengths):
    """{rate: (value, how)} of an XLM-R large with random weights and of exact search, by the stages' own code."""
    import numpy as np
    import torch
    from conftest import load_stage
    from train_speed import make_encoder

    from common import QUERY_BLOCK, SHARD, Best, Encoder, full_float32, unit
    make_encoder(folder, LAYERS, WIDTH)
    encoder, train, draw, cores = Encoder(str(folder), "cpu"), load_stage("05_train"), np.random.default_rng(13), os.cpu_count()
    texts = [" ".join(["w1"] * (n - 2)) for n in draw.choice(lengths, 24)]  # its tokenizer adds no special tokens
    encoder.encode(texts[:1], "passage")  # loads the model
    step = encoder.tokenize(["w1 " * 16, *texts[:1 + NEGATIVES]], "passage")  # one query and its passages
    encode_s = cpu_seconds(lambda: encoder.encode(texts, "passage")) / cores
    encoder.model.train()
    train_s = cpu_seconds(lambda: train.backward(encoder, step, lambda v: torch.logsumexp(v[:1] @ v[1:].T / 0.02, 1).sum())) / cores
    rates = {"encode_tokens_per_s": (sum(map(len, encoder.tokenize(texts, "passage"))) / encode_s,
                                     f"`Encoder.encode`, {LAYERS} x {WIDTH:,}, random weights, real lengths"),
             "train_tokens_per_s": (sum(map(len, step)) / train_s, "forward and backward of 05 at that shape, fp32: "
                                    f"one query, {1 + NEGATIVES} passages; without the optimiser")}
    encoder = train = None
    queries, *shards = (unit(draw.standard_normal((n, WIDTH), np.float32)) for n in (QUERY_BLOCK, *[SHARD] * 4))
    best, docids, asked = Best({"m": 1.0}, QUERY_BLOCK, 80), np.array([str(i).encode() for i in range(SHARD)]), torch.from_numpy(queries).float()

    def search(shard):
        wide = torch.from_numpy(np.array(shard)).float()
        best.offer(0, {"m": asked @ wide.T}, {"m": 2e-5}, {"m": queries}, {"m": shard}, 0, docids)
    with torch.inference_mode(), full_float32():
        search(shards[0])  # fills the lists; a corpus has hundreds of shards
        seconds = cpu_seconds(lambda: [search(shard) for shard in shards[1:]]) / cores
        rates["search_pairs_per_s"] = 3 * QUERY_BLOCK * SHARD / seconds, f"`Best` of 01, queries x passages x encoders, {WIDTH:,} dimensions"
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a = torch.ones(1024, 1024, dtype=dtype)
            a @ a
            seconds = cpu_seconds(lambda: [a @ a for _ in range(20)]) / cores
            rates[f"{name}_tflop_per_s"] = 20 * 2 * 1024 ** 3 / seconds / 1e12, "products of 1,024 x 1,024, for comparison"
    return rates


def measure_bm25(folder, data, stride):
    """In a process of its own: prints passages, seconds, peak memory, index bytes, seconds a query of BM25 over all languages as one."""
    from common import Ensemble, corpus_languages, read_queries, read_shards
    one, n = Path(folder) / stride, 0
    (one / "corpus").mkdir(parents=True)
    with open(one / "corpus/en.jsonl", "wb") as file:
        for lang, lines in ((lang, shard[::int(stride)]) for lang in corpus_languages(data) for _, shard in read_shards(data, lang)):
            n += sum(file.write(line.replace(b'"docid": "', f'"docid": "{lang}'.encode(), 1)) > 0 for _, line in lines)
    bm25 = Ensemble(["bm25"], one, one / "cache", bm25_tokenizer=f"{folder}/bpe").bm25
    queries = [q["query"] for q in read_queries(f"{data}/dev.jsonl")][:100]
    made = cpu_seconds(lambda: bm25.index("en"))
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # ru_maxrss starts at the parent's
    searched = cpu_seconds(lambda: bm25.search("en", queries, 100)) / len(queries)
    print(json.dumps([n, made, peak, sum(f.stat().st_size for f in (one / "cache/bm25").rglob("*.npy")), searched]))


def measure(data):
    """The content of results/rates.json."""
    import subprocess
    import tempfile

    import torch
    rates = {}
    for name, (path, pattern) in QUOTED.items():
        if not (match := re.search(pattern, (ROOT / path).read_text("utf-8"))):
            raise DataError(f"{path}: its docstring does not say {name} (wanted {pattern!r}); correct QUOTED in bench/plan.py")
        rates[name] = int(match[1].replace(",", "")), f"docstring of `{path}`"
    with tempfile.TemporaryDirectory() as folder:
        averages, lengths, more = measure_averages(data, f"{folder}/bpe")
        small, large = (json.loads(subprocess.run([sys.executable, __file__, "--bm25", folder, data, stride], check=True, capture_output=True,
                                                  text=True).stdout) for stride in ("4", "1"))
        rates |= more | measure_speeds(Path(folder) / "xlmr", lengths)
    n, *more = (b - a for a, b in zip(small, large))
    how = f"reading, checking and indexing {large[0]:,} passages of all languages as one corpus, less a quarter of it"
    for name, value in zip(("bm25_s_per_passage", "bm25_memory_bytes_per_passage", "bm25_disk_bytes_per_passage"), more):
        rates[name] = value / n, how
    rates["bm25_s_per_pair"] = large[4] / large[0], "100 queries there, queries x passages"
    cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    name = (re.findall(r"model name\s*: (.*)", cpuinfo) or ["an unknown processor"])[0]
    return {"machine": f"{os.cpu_count()} cores of {name}{' with avx512_bf16' * ('avx512_bf16' in cpuinfo)}, torch {torch.__version__}",
            "averages": averages, "rates": {key: [float(f"{value:.4g}"), how] for key, (value, how) in rates.items()}}


def main(argv=None):
    args = build_parser().parse_args(argv)
    path = ROOT / "results/rates.json"
    if args.bm25:
        return measure_bm25(*args.bm25)
    if args.measure:
        return path.write_text(json.dumps(measure(args.measure), indent=1) + "\n", "utf-8") and None
    if not (args.peak_tflops > 0 and 0 < args.utilisation <= 1):
        raise DataError(f"--peak-tflops {args.peak_tflops:g} --utilisation {args.utilisation:g}: want more than 0, and a share up to 1")
    rates = json.loads(path.read_text("utf-8"))
    if args.markdown:
        return (ROOT / "SCALING.md").write_text(markdown(args, rates), "utf-8") and None
    print("\n".join(show(args, rates)))
    if not args.confirmed:
        return print("Nothing was started: make miracl CONFIRM=1 starts it.")
    if args.llm != "offline-stand-in" and not os.environ.get("OPENAI_BASE_URL"):
        raise DataError("OPENAI_BASE_URL is not set: it names the LLM's server, such as http://localhost:8000/v1; nothing was started")
    if args.root == "hub" and not os.environ.get("HF_TOKEN"):
        raise DataError("HF_TOKEN is not set: MIRACL is gated, accept its terms at https://huggingface.co/datasets/miracl/miracl and set a token, "
                        "or name a copy with DATA_ROOT; nothing was started")


if __name__ == "__main__":
    run(main)
