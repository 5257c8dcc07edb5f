"""What the paper's setting on full MIRACL will need - disk, GPU hours, LLM calls, tokens, money - and the page SCALING.md.

How     counted work (MIRACL's sizes x measured averages) x measured rates, stage by stage. No GPU was at hand: GPU hours are an
        ESTIMATE, counted FLOPs / (--peak-tflops x --utilisation). Needs nothing but Python, and starts nothing
Reads   results/rates.json   averages and rates, each with how it was measured (bench/measure_rates.py)
Writes  nothing; --markdown: SCALING.md
Usage   python bench/plan.py [--lang sw te] [--llm NAME] [--price-in P --price-out P] [--gpu-price P]     (`make miracl` does it first)
        python bench/plan.py --markdown
"""
import json
import os
import re
import sys
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import DataError, Parser, positive_int, run  # noqa: E402

# passages, training queries, their relevant passages, their judged passages, dev queries (the collection's own files; Sec. 4.1)
MIRACL = {
    "ar": (2_061_414, 3_495, 6_217, 25_382, 2_896), "bn": (297_265, 1_631, 3_859, 16_754, 411), "en": (32_893_221, 2_863, 7_899, 29_416, 799),
    "es": (10_373_953, 2_162, 10_025, 21_531, 648), "fa": (2_207_172, 2_107, 4_277, 21_844, 632), "fi": (1_883_509, 2_897, 4_928, 20_350, 1_271),
    "fr": (14_636_953, 1_143, 2_321, 11_426, 343), "hi": (506_264, 1_169, 2_469, 11_668, 350), "id": (1_446_315, 4_071, 12_505, 41_358, 960),
    "ja": (6_953_614, 3_477, 6_984, 34_387, 860), "ko": (1_486_752, 868, 1_973, 12_767, 213), "ru": (9_543_918, 4_683, 10_000, 33_921, 1_252),
    "sw": (131_924, 1_901, 2_687, 9_359, 482), "te": (518_079, 3_452, 4_119, 18_608, 828), "th": (542_166, 2_972, 4_778, 21_293, 733),
    "zh": (4_934_368, 1_312, 3_187, 13_113, 393)}
REMOVED, FROM_STAGE_2 = 0.195, 0.091            # the paper's shares: of candidates removed (Table 8), of final negatives from stage 2
LAYERS, WIDTH = 24, 1024                        # mE5-large and BGE-M3 are XLM-R large
BODY = LAYERS * (12 * WIDTH ** 2 + 13 * WIDTH)  # weights that every token meets: 302 million
WEIGHTS = BODY + (250_002 + 514 + 3) * WIDTH    # and with the embeddings: 559 million
BATCH, NEGATIVES, DEV_SHARE, DEV_QUERIES = 24, 7, 0.1, 100              # of stage 05
JUDGE_OUT, SUMMARY_OUT, QUERY_OUT, ANSWER_BYTES = 16, 256, 128, 95      # tokens of an answer: 02's estimate, 03's limits; in the cache
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
    parser.add_argument("--eval-models", nargs="+", metavar="MODEL_OR_bm25", help="what stage 06 compares; default: bm25, --encoder, the trained model")
    parser.add_argument("--peak-tflops", type=float, default=989, help="ASSUMED: bf16 TFLOP/s of a GPU at most, an H100 SXM's by its maker")
    parser.add_argument("--utilisation", type=float, default=0.3, help="ASSUMED: share of it that is reached, 0 to 1")
    for flag, of in (("--price-in", "a million prompt tokens"), ("--price-out", "a million completion tokens"), ("--gpu-price", "a GPU hour")):
        parser.add_argument(flag, type=float, metavar="P", help=f"price of {of}; without it no money is computed for them")
    parser.add_argument("--confirmed", action="store_true", help="after the plan, exit 2 where the run would lack its server or token")
    parser.add_argument("--markdown", action="store_true", help="write SCALING.md")
    return parser


def total(table, weights):
    """Sum of weight x average over languages; one that was not measured (th) counts as the mean of the others."""
    return sum(n * table.get(lang, sum(table.values()) / len(table)) for lang, n in weights.items())


def count(args, averages):
    """{what: how much} of the whole run, in the order of the stages."""
    passages, queries, relevant, judged, dev = ({lang: MIRACL[lang][i] for lang in args.lang} for i in range(5))
    tokens, even = averages["tokens"], dict.fromkeys(args.lang, 1 / len(args.lang))
    held = {lang: max(1, round(DEV_SHARE * n)) for lang, n in queries.items()}
    dense, n = set(args.retrievers) - {"bm25"}, sum(queries.values())
    compared = set(args.eval_models or [args.encoder, "the trained model"]) - {"bm25"}
    work = {
        "passages": sum(passages.values()), "training queries": n, "relevant passages": sum(relevant.values()),
        "judged passages": sum(judged.values()), "dev queries": sum(dev.values()),
        "corpus bytes": total(averages["bytes"], passages), "bytes of judged passages": total(averages["bytes"], judged),
        "bytes of a passage for each query": total(averages["bytes"], queries),
        "vector bytes of an encoder, fp16": 2 * WIDTH * sum(passages.values()),
        "encoders in 01": len(dense), "encoders in 06": len(compared), "new encoders in 06": len(compared - dense),
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
    gpu = lambda flop: flop / (args.peak_tflops * 1e12 * args.utilisation)  # noqa: E731
    listed = lambda n: n * w["bytes of a passage for each query"] + w["bytes of judged passages"]  # noqa: E731  n passages a query
    largest, model, vectors = max(MIRACL[lang][0] for lang in args.lang), 4 * WEIGHTS, w["vector bytes of an encoder, fp16"]
    prepare = w["passages"] * rate["prepare_s_per_million"] / 1e6
    # one encoder reads the corpus
    n_01, n_06, tokens = w["encoders in 01"], w["new encoders in 06"], w["passage tokens"]
    encode_cpu, encode_gpu, tokenise = tokens / rate["encode_tokens_per_s"], gpu(2 * BODY * tokens), tokens / rate["tokenise_tokens_per_s"]
    search, compare = (w[f"encoders in {stage}"] * w[f"pairs in {stage}"] / rate["search_pairs_per_s"] for stage in ("01", "06"))
    with_bm25 = "bm25" in (args.eval_models or ["bm25"])
    bm25 = with_bm25 * (w["passages"] * rate["bm25_s_per_passage"] + w["pairs in 06"] * rate["bm25_s_per_pair"])
    indexed = f"{rate['bm25_memory_bytes_per_passage'] * largest / 1e9:.0f} GB"
    # the LLM reads and writes, one client asks
    n_02, n_03 = w["judge calls in 02"], w["generating calls in 03"] + w["judge calls in 03"]
    tokens_02, tokens_03 = (w[f"prompt tokens in {stage}"] + w[f"completion tokens in {stage}"] for stage in ("02", "03"))
    client_02, client_03 = (n / rate["judge_calls_per_s"] for n in (n_02, n_03))
    llm, servers = 2e9 * billions(args.llm), "the LLM's servers; one client asks"
    topics, train = gpu(2 * BODY * w["tokens of relevant passages"]), gpu(BODY * (6 * w["training tokens"] + 2 * w["validation tokens"]))
    widest = BATCH * (64 + 256 * (1 + NEGATIVES))  # tokens of a batch at most
    on_gpu = f"{(16 * WEIGHTS + 34 * WIDTH * LAYERS * widest) / 1e9:.0f} GB (16 bytes a weight, 34 x {WIDTH:,} x {LAYERS} a token, see `--chunk-tokens`)"
    return w, [
        Row("00 data", f"{w['passages']:,} passages", "seconds a million passages",
            "nothing", w["corpus bytes"] * (1 + rate["gzip_share"]) + listed(0),
            f"{8 * largest / 1e9:.2f} GB: 8 bytes a passage of the largest language",
            cpu_s=prepare, fixed_s=prepare),
        Row("01 mine", f"{n_01} x {tokens / 1e9:.1f} G tokens, {n_01} x {w['pairs in 01'] / 1e9:.0f} G pairs", "2 x body x tokens; tokenising",
            "everything (`torchrun`)", n_01 * (vectors + model) + listed(args.depth),
            f"{rate['mine_mb'] / 1e3 + n_01 * model / 1e9:.1f} GB: {rate['mine_mb'] / 1e3:.1f} as measured, and the encoders",
            cpu_s=n_01 * encode_cpu + search, gpu_s=n_01 * encode_gpu, side_s=n_01 * tokenise),
        Row("02 judge", f"{n_02:,} calls, {tokens_02 / 1e9:.2f} G tokens", "2 x LLM x tokens; calls a second of the client",
            servers, listed(args.depth) + ANSWER_BYTES * n_02,
            f"{(rate['judge_mb'] + rate['judge_mb_per_million'] * n_02 / 1e6) / 1e3:.1f} GB: as measured, by the million answers",
            cpu_s=client_02, gpu_s=gpu(llm * tokens_02), floor_s=client_02),
        Row("03 generate", f"{n_03:,} calls, {tokens_03 / 1e9:.2f} G tokens, at most", "as 02",
            f"{servers}, and searches", listed(args.target) + ANSWER_BYTES * n_03, "as 01",
            cpu_s=client_03 + search, gpu_s=gpu(llm * tokens_03), floor_s=client_03),
        Row("04 topics", f"{w['relevant passages']:,} passages", "2 x body x tokens",
            "nothing", listed(args.target) + 2 * WIDTH * w["relevant passages"], f"{model / 1e9:.1f} GB: the encoder",
            cpu_s=w["tokens of relevant passages"] / rate["encode_tokens_per_s"], gpu_s=topics, floor_s=topics),
        Row("05 train", f"{w['training steps']:,} steps, {w['training tokens'] / 1e9:.1f} G tokens; {w['validation tokens'] / 1e9:.1f} G to validate",
            "6 x body x tokens; 2 x to validate", f"everything (`torchrun`, `--gather`), among {BATCH} at most: one query each",
            5 * model,  # the checkpoint with Adam's two moments, the best, and the model
            f"{rate['train_mb'] / 1e3 + model / 1e9:.1f} GB: {rate['train_mb'] / 1e3:.1f} as measured, and the encoder; on the GPU an estimated {on_gpu}",
            cpu_s=w["training tokens"] / rate["train_tokens_per_s"] + w["validation tokens"] / rate["encode_tokens_per_s"], gpu_s=train, floor_s=train / BATCH),
        Row("06 evaluate", f"{n_06} x {tokens / 1e9:.1f} G tokens, {w['encoders in 06']} x {w['pairs in 06'] / 1e9:.0f} G pairs{', BM25' * with_bm25}",
            "as 01" + "; BM25's seconds a passage and pair" * with_bm25,
            "encoding, if 01 runs first under `torchrun` with `--retrievers RUN/model`: 06 finds its vectors",
            n_06 * vectors + with_bm25 * rate["bm25_disk_bytes_per_passage"] * w["passages"],
            f"{indexed}: BM25's index of the largest language is built in memory; else as 01" if with_bm25 else
            f"as 01, without BM25, whose index would need {indexed}",
            cpu_s=n_06 * encode_cpu + compare + bm25, gpu_s=n_06 * encode_gpu, side_s=n_06 * tokenise, fixed_s=bm25)]


def wall(row, n_gpus):
    """Seconds on n GPUs: what is shared out, no faster than its floor, and what one process does alone."""
    return max((row.gpu_s + row.side_s) / n_gpus, row.floor_s) + row.fixed_s


def span(seconds):
    """A duration in the largest unit of which there are at least two."""
    unit, size = next((u for u in (("years", 31_536_000), ("days", 86_400), ("h", 3600), ("min", 60)) if seconds >= 2 * u[1]), ("s", 1))
    return f"{seconds / size:,.{1 if seconds < 10 * size else 0}f} {unit}"


def gigabytes(n):
    return f"{n / 1e9:,.{1 if n < 1e10 else 0}f} GB"


def show(args, rates):
    """The plan as lines."""
    (w, rows), size = stages(args, rates), billions(args.llm)
    hours = {row.stage[:2]: row.gpu_s / 3600 for row in rows}
    llm, encoders = hours.pop("02") + hours.pop("03"), sum(hours.values())
    n_in, n_out = (w[f"{kind} tokens in 02"] + w[f"{kind} tokens in 03"] for kind in ("prompt", "completion"))
    spared = llm * w["of them spared by a prefix cache"] / (n_in + n_out)
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
        f"LLM calls    {w['judge calls in 02'] + w['judge calls in 03'] + w['generating calls in 03']:,} at most, {w['judge calls in 02']:,} of them in 02",
        f"tokens       {n_in / 1e6:,.0f} M prompt, {n_out / 1e6:,.0f} M completion",
        f"money        {', '.join(money) or 'not computed: give PRICE_IN and PRICE_OUT (of a million tokens), GPU_PRICE (of an hour)'}", "",
        f"GPU hours are an ESTIMATE, not measured: counted FLOPs / ({args.peak_tflops:g} TFLOP/s x {args.utilisation:g}), both ASSUMED. See SCALING.md."]


def table(head, lines):
    """Markdown of a table; head: its columns, with | between them."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ([head], ["---"] * (head.count(" | ") + 1), *lines))


def markdown(args, rates):
    """SCALING.md."""
    w, rows = stages(args, rates)
    walls, vectors, averages = {n: [wall(r, n) for r in rows] for n in NODES}, w["vector bytes of an encoder, fp16"], rates["averages"]["tokens"]
    by_stage = table("stage | counted work | formula | this machine, measured rates | one GPU, estimate | disk | memory of a process",
                     [(r.stage, r.work, r.formula, span(r.cpu_s), span(one), gigabytes(r.disk), r.memory) for r, one in zip(rows, walls[1])]
                     + [("all", "", "", span(sum(r.cpu_s for r in rows)), span(sum(walls[1])), gigabytes(sum(r.disk for r in rows)), "")])
    by_gpus = table(f"stage | 1 GPU | {' | '.join(f'{n} GPUs' for n in NODES[1:])} | what is shared out",
                    [(r.stage, *map(span, times), r.splits) for r, *times in zip(rows, *walls.values())]
                    + [("all", *(span(sum(of_all)) for of_all in walls.values()), "")])
    counted = table("what | how much", [(name, f"{n:,.0f}") for name, n in w.items()])
    measured = table("what | value | how", [(name.replace("_", " "), f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}", how)
                                            for name, (value, how) in rates["rates"].items()])
    tokens = table(f"tokens, mean of a language | {' | '.join(averages['passage'])}",
                   [(name, *(f"{n:.0f}" for n in of_lang.values())) for name, of_lang in averages.items()])
    return f"""# Scaling: the paper's setting on full MIRACL

Made by `python bench/plan.py --markdown` from `results/rates.json`, never by hand; `python bench/measure_rates.py --data data/minimiracl` measures the
rates again. `make miracl` prints the same count, without BM25, for the languages, models and prices that you set. Nobody has run all of this yet:
**counted** is the work; **measured** are averages and rates, on {rates['machine']}, by processor seconds over cores, since
other work ran there too; **estimated** is what concerns GPUs, of which none was at hand: counted FLOPs / ({args.peak_tflops:g} TFLOP/s x {args.utilisation:g}), an H100's bf16
peak and a utilisation, both assumed (`--peak-tflops`, `--utilisation`).

## Each stage

{by_stage}

Body: the {BODY / 1e6:.0f} million weights of an encoder that every token meets. LLM: {args.llm}, {2 * billions(args.llm):g} GB in bf16, so it needs
several GPUs; for this machine its time is the client's alone, for GPUs that of prompts read in full and of decoding as efficient as reading.
A prefix cache spares {w['of them spared by a prefix cache'] / w['prompt tokens in 02']:.0%} of 02's prompt tokens. Not counted: attention's own products (a few per cent), downloads,
reading the vectors ({gigabytes(vectors)} an encoder and search), search on a GPU (minutes), answers that are asked for again. 01's memory was measured
at a million passages (`bench/mine_million.py` tells how it grew up to there); by design it grows by 8 bytes a passage. BM25's does grow with
the corpus, to {rows[-1].memory.split(":")[0]}, and it takes {span(rows[-1].fixed_s)} of one process: so `make miracl` leaves it out, and 06 needs what 01 needs, unless `EVAL_MODELS` names `bm25`.

## More GPUs and nodes

{by_gpus}

A node is 8 GPUs; exchange of gradients is not counted, tokenising is, at this machine's rate for each GPU. `make miracl GPUS=8` starts
01 and 05 under `torchrun`, a process for each GPU of the node, and each other stage as one process; 05's batch stays the same, shared by `--gather`.
On several nodes start 01 and 05 yourself: `make` then finds 01 done, but would train again what more processes trained, so go on with 06 by hand.
Disk is the same for any number of GPUs: all nodes see one `--cache`. Memory is each process's.

## Counted work

{counted}

{w['training queries']:,} queries x {args.depth} candidates = {w['judge calls in 02']:,} judge calls, fewer where people judged the candidate.
03: {FROM_STAGE_2:.1%} of the final negatives come from it and {REMOVED:.1%} of what it finds is removed, the paper's shares; a summary and a query for
every training query is the most that first tries can take.

## Measured

{measured}

{tokens}

{rates["averages"]["how"]}
"""


def main(argv=None):
    args = build_parser().parse_args(argv)
    if not (args.peak_tflops > 0 and 0 < args.utilisation <= 1):
        raise DataError(f"--peak-tflops {args.peak_tflops:g} --utilisation {args.utilisation:g}: want more than 0, and a share up to 1")
    rates = json.loads((ROOT / "results/rates.json").read_text("utf-8"))
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
