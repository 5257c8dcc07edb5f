"""What the paper's setting on full MIRACL will need: disk, GPU hours, LLM calls, tokens, money; SCALING.md.

How     counted work (MIRACL's sizes x measured averages) x measured rates, by stage. No GPU was at hand:
        GPU hours are an ESTIMATE, counted FLOPs / (--peak-tflops x --utilisation). It needs only Python
Reads   paper.json           MIRACL's sizes, the paper's shares and hyperparameters
        results/rates.json   averages and rates, each with how it was measured (bench/measure_rates.py)
Writes  nothing; --markdown: SCALING.md
Usage   python bench/plan.py [--lang sw te] [--llm NAME] [--price-in P --price-out P] [--gpu-price P]
        python bench/plan.py --markdown          (`make miracl` begins with the first)
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

PAPER = json.loads((ROOT / "paper.json").read_text("utf-8"))
MIRACL = PAPER["sizes"]
REMOVED = PAPER["eliminated"]["avg"] / 100  # of the candidates (Table 8)
FROM_STAGE_2 = PAPER["from_stage_2"] / 100  # of the final negatives
LAYERS, WIDTH = 24, 1024  # mE5-large and BGE-M3 are XLM-R large
BODY = LAYERS * (12 * WIDTH**2 + 13 * WIDTH)  # weights that every token meets: 302 million
WEIGHTS = BODY + (250_002 + 514 + 3) * WIDTH  # and with the embeddings: 559 million
BATCH, NEGATIVES, DEV_SHARE, DEV_QUERIES = 24, 7, 0.1, 100  # of stage 05
JUDGE_OUT, SUMMARY_OUT, QUERY_OUT = 16, 256, 128  # tokens of an answer: 02's estimate, 03's limits
ANSWER_BYTES = 95  # in the cache
NODES = (1, 8, 16, 64)  # GPUs
# cpu_s: on the measured machine. With G GPUs: max((gpu_s + side_s) / G, floor_s) + fixed_s; gpu_s: GPU hours
Row = namedtuple(
    "Row", "stage work formula splits disk memory cpu_s gpu_s side_s floor_s fixed_s", defaults=(0,) * 5
)


def build_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--lang",
        nargs="+",
        choices=MIRACL,
        default=list(MIRACL),
        metavar="CODE",
        help="languages with training queries",
    )
    add(
        "--retrievers",
        nargs="+",
        default=["intfloat/multilingual-e5-large", "BAAI/bge-m3"],
        metavar="MODEL_OR_bm25",
        help="the ensemble of stage 01; every model is counted as XLM-R large",
    )
    add("--encoder", default="BAAI/bge-m3", metavar="MODEL", help="model to train and to compare with")
    add(
        "--llm",
        default="meta-llama/Llama-3.1-70B-Instruct",
        metavar="NAME",
        help="judge and generator; its size is read from the name (70B), without one it counts as hosted",
    )
    add("--depth", type=positive_int, default=40, help="candidates a query, k in Sec. 4.1")
    add("--target", type=positive_int, default=30, help="negatives a query, N in Sec. 4.1")
    add("--epochs", type=positive_int, default=20, help="passes over the training queries (Sec. 4.1)")
    add("--root", default="hub", metavar="FOLDER", help="where 00 will find MIRACL; the hub needs HF_TOKEN")
    add(
        "--eval-models",
        nargs="+",
        metavar="MODEL_OR_bm25",
        help="what stage 06 compares; default: bm25, --encoder, the trained model",
    )
    add(
        "--peak-tflops",
        type=float,
        default=989,
        help="ASSUMED: bf16 TFLOP/s of a GPU at most, an H100 SXM's by its maker",
    )
    add("--utilisation", type=float, default=0.3, help="ASSUMED: share of it that is reached, 0 to 1")
    add("--price-in", type=float, metavar="P", help="price of a million prompt tokens")
    add("--price-out", type=float, metavar="P", help="price of a million completion tokens")
    add("--gpu-price", type=float, metavar="P", help="price of a GPU hour")
    add(
        "--confirmed",
        action="store_true",
        help="after the plan, exit 2 where the run would lack its server or token",
    )
    add("--markdown", action="store_true", help="write SCALING.md")
    return parser


def total(table, weights):
    """Sum of weight x average over languages; one not measured (th) counts as the mean of the others."""
    mean = sum(table.values()) / len(table)
    return sum(n * table.get(lang, mean) for lang, n in weights.items())


def count(args, averages):
    """{what: how much} of the whole run, in the order of the stages."""
    sizes = {key: {lang: MIRACL[lang][key] for lang in args.lang} for key in MIRACL["sw"]}
    passages, queries, dev = sizes["passages"], sizes["train_queries"], sizes["dev_queries"]
    tokens = averages["tokens"]
    even = dict.fromkeys(args.lang, 1 / len(args.lang))
    held = {lang: max(1, round(DEV_SHARE * n)) for lang, n in queries.items()}
    dense = set(args.retrievers) - {"bm25"}
    compared = set(args.eval_models or [args.encoder, "the trained model"]) - {"bm25"}
    n = sum(queries.values())
    work = {
        "passages": sum(passages.values()),
        "training queries": n,
        "relevant passages": sum(sizes["relevant"].values()),
        "judged passages": sum(sizes["judged"].values()),
        "dev queries": sum(dev.values()),
        "corpus bytes": total(averages["bytes"], passages),
        "bytes of judged passages": total(averages["bytes"], sizes["judged"]),
        "bytes of a passage for each query": total(averages["bytes"], queries),
        "vector bytes of an encoder, fp16": 2 * WIDTH * sum(passages.values()),
        "encoders in 01": len(dense),
        "encoders in 06": len(compared),
        "new encoders in 06": len(compared - dense),
        "passage tokens": total(tokens["passage"], passages),
        "tokens of relevant passages": total(tokens["passage"], sizes["relevant"]),
        "pairs in 01": sum(queries[lang] * passages[lang] for lang in args.lang),
        "pairs in 06": sum(dev[lang] * passages[lang] for lang in args.lang),
        # at most: a mined candidate that people judged is not asked for
        "judge calls in 02": n * args.depth,
        "prompt tokens in 02": args.depth * total(tokens["judge"], queries),
        # instructions, question and reference are the same in a query's calls: a prefix cache reads them once
        "of them spared by a prefix cache": (args.depth - 1) * total(tokens["judge, shared"], queries),
        "completion tokens in 02": JUDGE_OUT * n * args.depth,
        # one summary and one query for each training query at most; and judging what keeps the paper's share
        "negatives from 03": round(FROM_STAGE_2 * args.target * n),
        "generating calls in 03": 2 * n,
    }
    judged = round(work["negatives from 03"] / (1 - REMOVED))
    work["judge calls in 03"] = judged
    work["prompt tokens in 03"] = (
        total(tokens["summarise"], queries)
        + (averages["ask"] + SUMMARY_OUT) * n
        + judged * total(tokens["judge"], queries) / n
    )
    work["completion tokens in 03"] = (SUMMARY_OUT + QUERY_OUT) * n + JUDGE_OUT * judged
    # languages are drawn uniformly: a training query is of the average language, not the average query
    work["training steps"] = args.epochs * -(-(n - sum(held.values())) // BATCH)
    query_tokens = total(tokens["query"], even) + (1 + NEGATIVES) * total(tokens["passage"], even)
    work["training tokens"] = work["training steps"] * BATCH * query_tokens
    validated = {lang: min(DEV_QUERIES, n_held) for lang, n_held in held.items()}
    a_query = args.target + work["relevant passages"] / n  # passages that validation ranks
    work["validation tokens"] = args.epochs * a_query * total(tokens["passage"], validated)
    return work


def billions(llm):
    """70 for Llama-3.1-70B-Instruct; 0 where the name does not say: then it is somebody else's server."""
    size = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z0-9])", llm.lower())
    return float(size[1]) if size else 0


def stages(args, rates):
    """(work, a Row for each stage)."""
    w = count(args, rates["averages"])
    rate = {name: value for name, (value, _) in rates["rates"].items()}
    return w, [
        data_row(args, w, rate),
        mine_row(args, w, rate),
        *llm_rows(args, w, rate),
        topics_row(args, w, rate),
        train_row(args, w, rate),
        evaluate_row(args, w, rate),
    ]


def gpu_seconds(args, flop):
    return flop / (args.peak_tflops * 1e12 * args.utilisation)


def listed(w, n):
    """Bytes of a file of records with n passages a query."""
    return n * w["bytes of a passage for each query"] + w["bytes of judged passages"]


def largest(args):
    return max(MIRACL[lang]["passages"] for lang in args.lang)


def encoders_memory(rate, n):
    own = rate["mine_mb"] / 1e3
    return f"{own + 4e-9 * n * WEIGHTS:.1f} GB: {own:.1f} as measured, and the encoders"


def data_row(args, w, rate):
    seconds = w["passages"] * rate["prepare_s_per_million"] / 1e6
    return Row(
        "00 data",
        f"{w['passages']:,} passages",
        "seconds a million passages",
        "nothing",
        w["corpus bytes"] * (1 + rate["gzip_share"]) + listed(w, 0),
        f"{8 * largest(args) / 1e9:.2f} GB: 8 bytes a passage of the largest language",
        cpu_s=seconds,
        fixed_s=seconds,
    )


def mine_row(args, w, rate):
    n, tokens = w["encoders in 01"], w["passage tokens"]
    search = n * w["pairs in 01"] / rate["search_pairs_per_s"]
    return Row(
        "01 mine",
        f"{n} x {tokens / 1e9:.1f} G tokens, {n} x {w['pairs in 01'] / 1e9:.0f} G pairs",
        "2 x body x tokens; tokenising",
        "everything (`torchrun`)",
        n * (w["vector bytes of an encoder, fp16"] + 4 * WEIGHTS) + listed(w, args.depth),
        encoders_memory(rate, n),
        cpu_s=n * tokens / rate["encode_tokens_per_s"] + search,
        gpu_s=n * gpu_seconds(args, 2 * BODY * tokens),
        side_s=n * tokens / rate["tokenise_tokens_per_s"],
    )


def llm_rows(args, w, rate):
    """02 and 03: the LLM reads and writes, one client asks."""
    n_02, n_03 = w["judge calls in 02"], w["generating calls in 03"] + w["judge calls in 03"]
    tokens_02 = w["prompt tokens in 02"] + w["completion tokens in 02"]
    tokens_03 = w["prompt tokens in 03"] + w["completion tokens in 03"]
    client_02, client_03 = n_02 / rate["judge_calls_per_s"], n_03 / rate["judge_calls_per_s"]
    llm = 2e9 * billions(args.llm)  # FLOPs a token
    memory = (rate["judge_mb"] + (rate["judge_mb_at_a_million"] - rate["judge_mb"]) * n_02 / 1e6) / 1e3
    search = w["encoders in 01"] * w["pairs in 01"] / rate["search_pairs_per_s"]
    servers = "the LLM's servers; one client asks"
    return [
        Row(
            "02 judge",
            f"{n_02:,} calls, {tokens_02 / 1e9:.2f} G tokens",
            "2 x LLM x tokens; calls a second of the client",
            servers,
            listed(w, args.depth) + ANSWER_BYTES * n_02,
            f"{memory:.1f} GB: as measured, by the million answers",
            cpu_s=client_02,
            gpu_s=gpu_seconds(args, llm * tokens_02),
            floor_s=client_02,
        ),
        Row(
            "03 generate",
            f"{n_03:,} calls, {tokens_03 / 1e9:.2f} G tokens, at most",
            "as 02",
            f"{servers}, and searches",
            listed(w, args.target) + ANSWER_BYTES * n_03,
            "as 01",
            cpu_s=client_03 + search,
            gpu_s=gpu_seconds(args, llm * tokens_03),
            floor_s=client_03,
        ),
    ]


def topics_row(args, w, rate):
    seconds = gpu_seconds(args, 2 * BODY * w["tokens of relevant passages"])
    return Row(
        "04 topics",
        f"{w['relevant passages']:,} passages",
        "2 x body x tokens",
        "nothing",
        listed(w, args.target) + 2 * WIDTH * w["relevant passages"],
        f"{4e-9 * WEIGHTS:.1f} GB: the encoder",
        cpu_s=w["tokens of relevant passages"] / rate["encode_tokens_per_s"],
        gpu_s=seconds,
        floor_s=seconds,
    )


def train_row(args, w, rate):
    tokens, validated = w["training tokens"], w["validation tokens"]
    seconds = gpu_seconds(args, BODY * (6 * tokens + 2 * validated))
    widest = BATCH * (64 + 256 * (1 + NEGATIVES))  # tokens of a batch at most
    on_gpu = (16 * WEIGHTS + 34 * WIDTH * LAYERS * widest) / 1e9
    own = rate["train_mb"] / 1e3
    memory = (
        f"{own + 4e-9 * WEIGHTS:.1f} GB: {own:.1f} as measured, and the "
        f"encoder; on the GPU an estimated {on_gpu:.0f} GB (16 bytes a weight, 34 x {WIDTH:,} x {LAYERS} a "
        "token, see `--chunk-tokens`)"
    )
    return Row(
        "05 train",
        f"{w['training steps']:,} steps, {tokens / 1e9:.1f} G tokens; {validated / 1e9:.1f} G to validate",
        "6 x body x tokens; 2 x to validate",
        f"everything (`torchrun`), among {BATCH} at most: one query each",
        5 * 4 * WEIGHTS,  # the checkpoint with Adam's two moments, the best, and the model
        memory,
        gpu_s=seconds,
        floor_s=seconds / BATCH,
        cpu_s=tokens / rate["train_tokens_per_s"] + validated / rate["encode_tokens_per_s"],
    )


def evaluate_row(args, w, rate):
    n, tokens, pairs = w["new encoders in 06"], w["passage tokens"], w["pairs in 06"]
    search = w["encoders in 06"] * pairs / rate["search_pairs_per_s"]
    indexed = f"{rate['bm25_memory_bytes_per_passage'] * largest(args) / 1e9:.0f} GB"
    work = f"{n} x {tokens / 1e9:.1f} G tokens, {w['encoders in 06']} x {pairs / 1e9:.0f} G pairs"
    formula, memory = "as 01", f"as 01, without BM25, whose index would need {indexed}"
    bm25, index = 0, 0
    if "bm25" in (args.eval_models or ["bm25"]):
        work, formula = f"{work}, BM25", f"{formula}; BM25's seconds a passage and pair"
        memory = f"{indexed}: BM25's index of the largest language is built in memory; else as 01"
        bm25 = w["passages"] * rate["bm25_s_per_passage"] + pairs * rate["bm25_s_per_pair"]
        index = w["passages"] * rate["bm25_disk_bytes_per_passage"]
    return Row(
        "06 evaluate",
        work,
        formula,
        "encoding, if 01 runs first under `torchrun` with `--retrievers RUN/model`: 06 finds its vectors",
        n * w["vector bytes of an encoder, fp16"] + index,
        memory,
        cpu_s=n * tokens / rate["encode_tokens_per_s"] + search + bm25,
        fixed_s=bm25,
        gpu_s=n * gpu_seconds(args, 2 * BODY * tokens),
        side_s=n * tokens / rate["tokenise_tokens_per_s"],
    )


def wall(row, n_gpus):
    """Seconds on n GPUs: what is shared out, no faster than its floor, and what one process does alone."""
    return max((row.gpu_s + row.side_s) / n_gpus, row.floor_s) + row.fixed_s


def span(seconds):
    """A duration in the largest unit of which there are at least two."""
    for unit, size in (("years", 31_536_000), ("days", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size or unit == "s":
            return f"{seconds / size:,.{1 if seconds < 10 * size and unit != 's' else 0}f} {unit}"


def gigabytes(n):
    return f"{n / 1e9:,.{1 if n < 1e10 else 0}f} GB"


def show(args, rates):
    """The plan as lines."""
    w, rows = stages(args, rates)
    size = billions(args.llm)
    hours = {row.stage[:2]: row.gpu_s / 3600 for row in rows}
    llm = hours.pop("02") + hours.pop("03")
    encoders = sum(hours.values())
    n_in = w["prompt tokens in 02"] + w["prompt tokens in 03"]
    n_out = w["completion tokens in 02"] + w["completion tokens in 03"]
    spared = llm * w["of them spared by a prefix cache"] / (n_in + n_out)
    calls = w["judge calls in 02"] + w["judge calls in 03"] + w["generating calls in 03"]
    n_vectors = w["encoders in 01"] + w["new encoders in 06"]
    of_encoders = ", ".join(f"{stage} {h:,.1f}" for stage, h in hours.items() if h)
    of_llm = "none for the LLM: its name tells no size, as of a hosted one"
    if size:
        of_llm = f"{llm:,.0f} for the LLM, {llm - spared:,.0f} with a prefix cache"
    return [
        f"{len(args.lang)} languages ({' '.join(args.lang)}); retrievers {' '.join(args.retrievers)}; "
        f"trained {args.encoder}; LLM {args.llm}",
        "",
        *(f"{row.stage:<12} {row.work:<70} {gigabytes(row.disk):>8}" for row in rows),
        "",
        f"disk         {gigabytes(sum(row.disk for row in rows))}; "
        f"{gigabytes(w['vector bytes of an encoder, fp16'])} of vectors for each of {n_vectors} encoders",
        f"memory       {'; '.join(row.stage[:2] + ' ' + row.memory.split(':')[0] for row in rows)}",
        f"GPU hours    {encoders:,.1f} for the encoders ({of_encoders}); {of_llm}",
        f"LLM calls    {calls:,} at most, {w['judge calls in 02']:,} of them in 02",
        f"tokens       {n_in / 1e6:,.0f} M prompt, {n_out / 1e6:,.0f} M completion",
        f"money        {money(args, n_in, n_out, encoders, llm if size else 0)}",
        "",
        f"GPU hours are an ESTIMATE, not measured: counted FLOPs / ({args.peak_tflops:g} TFLOP/s x "
        f"{args.utilisation:g}), both ASSUMED. See SCALING.md.",
    ]


def money(args, n_in, n_out, encoder_hours, llm_hours):
    parts = []
    priced = args.price_in is not None or args.price_out is not None
    if priced:
        parts.append(f"{((args.price_in or 0) * n_in + (args.price_out or 0) * n_out) / 1e6:,.0f} for tokens")
    if args.gpu_price is not None:
        parts.append(f"{args.gpu_price * encoder_hours:,.0f} for the encoders' GPUs")
        if llm_hours and not priced:  # who pays for tokens does not pay for the LLM's GPUs
            parts.append(f"{args.gpu_price * llm_hours:,.0f} for the LLM's GPUs")
    return (
        ", ".join(parts)
        or "not computed: give PRICE_IN and PRICE_OUT (of a million tokens), GPU_PRICE (of an hour)"
    )


# --------------------------------------------------------------------------- SCALING.md


def table(head, lines):
    """Markdown of a table; head: its columns, with | between them."""
    rule = ["---"] * (head.count(" | ") + 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ([head], rule, *lines))


def tables(rows, w, rates):
    """{name: Markdown} of the page's tables."""
    walls = {n: [wall(row, n) for row in rows] for n in NODES}
    by_stage = [
        (r.stage, r.work, r.formula, span(r.cpu_s), span(one), gigabytes(r.disk), r.memory)
        for r, one in zip(rows, walls[1])
    ]
    by_stage.append(
        (
            "all",
            "",
            "",
            span(sum(r.cpu_s for r in rows)),
            span(sum(walls[1])),
            gigabytes(sum(r.disk for r in rows)),
            "",
        )
    )
    by_gpus = [(r.stage, *map(span, times), r.splits) for r, *times in zip(rows, *walls.values())]
    by_gpus.append(("all", *(span(sum(of_all)) for of_all in walls.values()), ""))
    measured = []
    for name, (value, how) in rates["rates"].items():
        shown = f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
        measured.append((name.replace("_", " "), shown, how))
    averages = rates["averages"]["tokens"]
    tokens = [(name, *(f"{n:.0f}" for n in of_lang.values())) for name, of_lang in averages.items()]
    return {
        "stages": table(
            "stage | counted work | formula | this machine, measured rates | one GPU, estimate | disk | "
            "memory of a process",
            by_stage,
        ),
        "gpus": table(
            f"stage | 1 GPU | {' | '.join(f'{n} GPUs' for n in NODES[1:])} | what is shared out", by_gpus
        ),
        "work": table("what | how much", [(name, f"{n:,.0f}") for name, n in w.items()]),
        "rates": table("what | value | how", measured),
        "tokens": table(f"tokens, mean of a language | {' | '.join(averages['passage'])}", tokens),
    }


def markdown(args, rates):
    """SCALING.md."""
    w, rows = stages(args, rates)
    t = tables(rows, w, rates)
    vectors = gigabytes(w["vector bytes of an encoder, fp16"])
    spared = w["of them spared by a prefix cache"] / w["prompt tokens in 02"]
    return f"""# Scaling: the paper's setting on full MIRACL

Made by `python bench/plan.py --markdown` from `results/rates.json`, never by hand;
`python bench/measure_rates.py --data data/minimiracl` measures the rates again. `make miracl` prints the
same count, without BM25, for the languages, models and prices that you set. Nobody has run all of this
yet: **counted** is the work; **measured** are averages and rates, on {rates["machine"]}, by processor
seconds over cores, since other work ran there too; **estimated** is what concerns GPUs, of which none was
at hand: counted FLOPs / ({args.peak_tflops:g} TFLOP/s x {args.utilisation:g}), an H100's bf16 peak and a
utilisation, both assumed (`--peak-tflops`, `--utilisation`).

## Each stage

{t["stages"]}

Body: the {BODY / 1e6:.0f} million weights of an encoder that every token meets. LLM: {args.llm},
{2 * billions(args.llm):g} GB in bf16, so it needs several GPUs; for this machine its time is the client's
alone, for GPUs that of prompts read in full and of decoding as efficient as reading. A prefix cache
spares {spared:.0%} of 02's prompt tokens. Not counted: attention's own products (a few per cent),
downloads, reading the vectors ({vectors} an encoder and search), search on a GPU (minutes), answers that
are asked for again. 01's memory was measured at a million passages (`bench/mine_million.py` tells how it
grew up to there); by design it grows by 8 bytes a passage. BM25's does grow with the corpus, to
{rows[-1].memory.split(":")[0]}, and it takes {span(rows[-1].fixed_s)} of one process: so `make miracl`
leaves it out, and 06 needs what 01 needs, unless `EVAL_MODELS` names `bm25`.

## More GPUs and nodes

{t["gpus"]}

A node is 8 GPUs; exchange of gradients is not counted, tokenising is, at this machine's rate for each
GPU. `make miracl GPUS=8` starts 01 and 05 under `torchrun`, a process for each GPU of the node, and each
other stage as one process; 05's batch stays the same, shared out. On several nodes start 01 and 05
yourself. Disk is the same for any number of GPUs: all nodes see one `--cache`. Memory is each process's.

## Counted work

{t["work"]}

{w["training queries"]:,} queries x {args.depth} candidates = {w["judge calls in 02"]:,} judge calls,
fewer where people judged the candidate. 03: {FROM_STAGE_2:.1%} of the final negatives come from it and
{REMOVED:.1%} of what it finds is removed, the paper's shares; a summary and a query for every training
query is the most that first tries can take.

## Measured

{t["rates"]}

{t["tokens"]}

{rates["averages"]["how"]}
"""


def main(argv=None):
    args = build_parser().parse_args(argv)
    if not (args.peak_tflops > 0 and 0 < args.utilisation <= 1):
        raise DataError(
            f"--peak-tflops {args.peak_tflops:g} --utilisation {args.utilisation:g}: want more than 0, "
            "and a share up to 1"
        )
    rates = json.loads((ROOT / "results/rates.json").read_text("utf-8"))
    if args.markdown:
        (ROOT / "SCALING.md").write_text(markdown(args, rates), "utf-8")
        return
    print("\n".join(show(args, rates)))
    if not args.confirmed:
        print("Nothing was started: make miracl CONFIRM=1 starts it.")
        return
    if args.llm != "offline-stand-in" and not os.environ.get("OPENAI_BASE_URL"):
        raise DataError(
            "OPENAI_BASE_URL is not set: it names the LLM's server, such as http://localhost:8000/v1; "
            "nothing was started"
        )
    if args.root == "hub" and not os.environ.get("HF_TOKEN"):
        raise DataError(
            "HF_TOKEN is not set: MIRACL is gated, accept its terms at "
            "https://huggingface.co/datasets/miracl/miracl and set a token, or name a copy with "
            "DATA_ROOT; nothing was started"
        )


if __name__ == "__main__":
    run(main)
