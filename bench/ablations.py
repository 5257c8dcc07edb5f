"""What each part of the method brings: the rows of Tables 2, 3, 5, 6, 7 and 9, the N of Figure 3, and the
batch size.

What    Every row starts from the same encoder and trains the same number of queries; a row differs from the
        full method in what its name says. Left out: no MIFT, which needs a generator tuned by
        03a_tune_generator.py (name it with --llm). The strategies of Table 2 and the path from naive to
        full train as the field does: mixed batches, no weights.
How     Rows share RUN's candidates, judgments, negatives and topics; what a row changes is made once by the
        stage itself. A row and seed is one run of 05_train.py and 06_eval.py, kept in WORK/scores as soon
        as it is there: a killed or stopped call (--minutes, --rows) goes on where it was. --jobs runs at a
        time, a thread each.
Reads   RUN/candidates.jsonl, filtered.jsonl, augmented.jsonl, topics.jsonl, DATA
Writes  OUT: a row each with mean and standard deviation over the seeds, the difference to the full method,
        and p of the paired t-test over queries (nDCG@10 of a query averaged over the seeds, as in Sec. 4
        otherwise); the table goes to stdout
Usage   make ablations DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl LANGS="sw te id ar zh"
        python bench/ablations.py --data data/minimiracl --run runs/minimiracl --encoder models/minimiracl
            --rows "full method" "batch of 8"
Cost    in OUT under "hours": wall time of the rows on two cores, two at a time
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Lock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import (
    DataError,
    Parser,
    atomic,
    digest_file,
    digest_folder,
    dump,
    positive_int,
    read_lines,
    read_queries,
    run,
    say,
    short_name,
)
from encoder import model_folder

STAND_IN = "offline-stand-in"
MIXED, UNWEIGHTED = ["--mixed", "--topic-power", "1"], ["--weighting", "none"]
PLAIN = MIXED + UNWEIGHTED
NEGATIVES = 7  # hard negatives a query and step (Sec. 4.1)
FULL = "full method"
STRATEGIES = ("topk", "shifted", "abs", "margin", "percent")  # of 01_mine_candidates.py
ROWS = {  # name: (group, negatives, flags of 05_train.py, the paper's nDCG@10 with BGE-M3 or None)
    FULL: ("", "augmented", [], 70.6),
    "naive top-k": ("Table 2", "topk", PLAIN, 67.6),
    "top-k shifted by 10": ("Table 2", "shifted", PLAIN, 67.8),
    "score under 0.6": ("Table 2", "abs", PLAIN, 67.8),
    "margin of 0.15 to the positive": ("Table 2", "margin", PLAIN, 67.9),
    "under 90% of the positive": ("Table 2", "percent", PLAIN, 68.1),
    "naive top-k, filtered": ("step by step", "filtered", PLAIN, None),
    "... and brought to N by generation (no stage 3)": ("step by step", "augmented", PLAIN, 68.8),
    "no stage 1 (labelled negatives, then generation)": ("Tables 3, 5, 6", "labelled", [], 66.9),
    "no LLM judgment": ("Tables 3, 5, 6", "topk", [], 67.5),
    "no reference in the prompt": ("Tables 3, 5, 6", "noreference", [], 68.1),
    "no stage 2": ("Tables 3, 5, 6", "filtered", [], 68.5),
    "negatives written, not retrieved (no PDBG)": ("Tables 3, 5, 6", "written", [], 69.2),
    "no topic balance": ("Table 7", "augmented", ["--topic-power", "1"], 70.3),
    "no same-language batches": ("Table 7", "augmented", ["--mixed"], 69.4),
    "neither": ("Table 7", "augmented", MIXED, 68.5),
    "no weights": ("Table 9", "augmented", UNWEIGHTED, None),
    "alpha 0.55, beta 0.40": ("Table 9", "augmented", ["--alpha", "0.55", "--beta", "0.40"], 69.5),
    "alpha 0.55, beta 0.20": ("Table 9", "augmented", ["--alpha", "0.55", "--beta", "0.20"], 68.6),
    "alpha 0.45, beta 0.20": ("Table 9", "augmented", ["--alpha", "0.45", "--beta", "0.20"], 69.9),
    "N = 10": ("Figure 3", "N10", [], None),
    "N = 20": ("Figure 3", "N20", [], None),
    "N = 40": ("Figure 3", "N40", [], None),
    "N = 50": ("Figure 3", "N50", [], None),
    "batch of 8": ("batch size", "augmented", ["--batch-size", "8"], None),
    "batch of 64": ("batch size", "augmented", ["--batch-size", "64"], None),
}


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a folder made by 00_prepare_data.py")
    parser.add_argument(
        "--run", required=True, type=Path, metavar="FOLDER", help="what the stages made of it"
    )
    parser.add_argument("--encoder", required=True, metavar="MODEL", help="where every row starts")
    parser.add_argument(
        "--retrievers",
        nargs="+",
        metavar="MODEL_OR_bm25",
        help="ensemble of stages 01 and 03; default: bm25 and --encoder",
    )
    parser.add_argument("--fusion", choices=["concat", "rrf"], default="rrf", help="of the ensemble")
    parser.add_argument(
        "--llm",
        default=STAND_IN,
        metavar="NAME",
        help="judge and generator, served at OPENAI_BASE_URL; default: offline_llm.py",
    )
    parser.add_argument("--lang", nargs="+", metavar="CODE", help="use only these languages")
    parser.add_argument("--target", type=positive_int, default=30, help="N, negatives a query (Sec. 4.1)")
    parser.add_argument(
        "--epochs",
        type=positive_int,
        default=2,
        help="of every row; few, so that all rows take under two hours",
    )
    parser.add_argument(
        "--train-flags",
        default="--lr 1e-3 --temperature 0.05",
        metavar="FLAGS",
        help="further flags of 05_train.py, in one word",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[13, 14, 15],
        help="of the training: batches, choice of negatives, held-out queries",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(ROWS),
        metavar="NAME",
        help="only these; the others keep what they have",
    )
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="begin no run after so many; the next call goes on"
    )
    parser.add_argument("--jobs", type=positive_int, default=2, help="runs at a time, each with one thread")
    parser.add_argument(
        "--cache", default="cache", metavar="FOLDER", help="the stages' cache: embeddings and answers"
    )
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="inputs and scores of the rows; default: RUN/ablations"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results/ablations.json", metavar="FILE", help="the table as JSON"
    )
    return parser


def stage(*command):
    """Run a script of the project with one thread; its bad end ends this one."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise DataError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr[-600:]}")


def make_inputs(args, names):
    """WORK/<name>.jsonl for the negatives that rows ask for, each with RUN's topics; a stage that is done
    does nothing."""
    topics = {
        (r["lang"], r["query_id"]): r["topic"] for r in read_queries(args.run / "topics.jsonl", args.lang)
    }
    lang = ["--lang", *args.lang] if args.lang else []
    served = [ROOT / "offline_llm.py", "--exec", sys.executable] if args.llm == STAND_IN else []
    ensemble, llm = (
        ["--retrievers", *args.retrievers, "--fusion", args.fusion],
        ["--llm", args.llm, "--cache", args.cache],
    )
    dense = [r for r in args.retrievers if r != "bm25"] or [args.encoder]
    mean = [
        "--retrievers",
        *dense,
        "--fusion",
        "concat",
        "--weights",
        *[1 / len(dense)] * len(dense),
    ]  # --max-score, --margin are of the mean cosine

    def mine(name):
        flags = ensemble if name in ("topk", "shifted") else mean
        stage(
            ROOT / "01_mine_candidates.py",
            "--data",
            args.data,
            *flags,
            "--strategy",
            name,
            "--depth",
            args.target,
            "--bm25-tokenizer",
            args.encoder,
            "--cache",
            args.cache,
            "--out",
            args.work / f"{name}.mined.jsonl",
            *lang,
        )
        return args.work / f"{name}.mined.jsonl"

    def generate(name, source, target, *flags):
        stage(
            *served,
            ROOT / "03_generate_negatives.py",
            "--input",
            source,
            "--data",
            args.data,
            *ensemble,
            *llm,
            "--target",
            target,
            "--out",
            args.work / f"{name}.made.jsonl",
            *flags,
            *lang,
        )
        return args.work / f"{name}.made.jsonl"

    def without_reference():
        path = args.work / "noreference.filtered.jsonl"
        stage(
            *served,
            ROOT / "02_filter_false_negatives.py",
            "--input",
            args.run / "candidates.jsonl",
            "--no-reference",
            *llm,
            "--out",
            path,
            *lang,
        )
        return generate("noreference", path, args.target, "--no-reference")

    filtered = args.run / "filtered.jsonl"
    makers = {
        "filtered": lambda: filtered,
        "augmented": lambda: args.run / "augmented.jsonl",
        "noreference": without_reference,
        "labelled": lambda: generate("labelled", Path(args.data) / "train.jsonl", args.target),
        "written": lambda: generate("written", filtered, args.target, "--mode", "write"),
    }
    for name in names:
        n = int(name[1:]) if name.startswith("N") else args.target
        source = (
            makers[name]()
            if name in makers
            else mine(name)
            if name in STRATEGIES
            else generate(name, filtered, n)
        )
        path = args.work / f"{name}.jsonl"
        with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for record in read_queries(source, args.lang):
                if name in STRATEGIES:
                    record.pop("false_negatives", None)  # they know none, so they mask none
                if len(record["negative_passages"]) < NEGATIVES:
                    continue  # such a query is left out of the row, as the field's miners do
                file.write(
                    dump(
                        record
                        | {
                            "topic": topics[record["lang"], record["query_id"]],
                            "negative_passages": record["negative_passages"][:n],
                        }
                    )
                )
        say(f"{path}: made")


def one_run(args, name, seed):
    """Train and evaluate a row with one seed; {lang: {query_id: {measure: value}}} goes to WORK/scores."""
    folder = args.work / f"row-{list(ROWS).index(name)}-{seed}"
    _, negatives, flags, _ = ROWS[name]
    lang = ["--lang", *args.lang] if args.lang else []
    started = time.time()
    stage(
        ROOT / "05_train.py",
        "--input",
        args.work / f"{negatives}.jsonl",
        "--encoder",
        args.encoder,
        "--seed",
        seed,
        "--epochs",
        args.epochs,
        *shlex.split(args.train_flags),
        *flags,
        "--out",
        folder / "model",
    )
    stage(
        ROOT / "06_eval.py",
        "--data",
        args.data,
        "--models",
        folder / "model",
        "--cache",
        folder / "cache",
        "--out",
        folder / "eval",
        *lang,
    )
    evaluation = load_evaluation()
    values = {}
    for path in sorted((folder / "eval/runs").glob("*.trec")):
        of_lang = path.name.split(".")[-2]
        qrels = evaluation.read_qrels(Path(args.data) / "qrels/dev" / f"{of_lang}.tsv")
        values[of_lang] = evaluation.measure_run(qrels, path)
    with atomic(score_path(args, name, seed)) as temporary:
        temporary.write_text(
            json.dumps(
                {
                    "values": values,
                    "train_queries": sum(1 for _ in read_lines(args.work / f"{negatives}.jsonl")),
                    "seconds": round(time.time() - started),
                }
            ),
            "utf-8",
        )
    shutil.rmtree(folder)
    say(f"{name}, seed {seed}: nDCG@10 {100 * average(values, 'ndcg@10'):.1f}, {time.time() - started:.0f} s")


def score_path(args, name, seed):
    return args.work / "scores" / f"{name.replace(' ', '-').replace('/', '-')}.{seed}.json"


def load_evaluation():
    spec = spec_from_file_location("evaluation", ROOT / "06_eval.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def average(values, measure):
    """Mean over languages of the mean over queries."""
    return float(np.mean([np.mean([v[measure] for v in of_lang.values()]) for of_lang in values.values()]))


def summarise(args, settings):
    """The rows that have scores: mean, sd and difference to the full method, in points, with the test's p."""
    seeds = {name: [seed for seed in args.seeds if score_path(args, name, seed).is_file()] for name in ROWS}
    scores = {
        name: [json.loads(score_path(args, name, seed).read_text("utf-8")) for seed in of_row]
        for name, of_row in seeds.items()
        if of_row
    }
    if not scores:
        raise DataError(f"{args.work}: no run has ended yet, so there is no table; give it more --minutes")
    per_query = {
        name: np.mean(
            [[v["ndcg@10"] for of_lang in s["values"].values() for v in of_lang.values()] for s in of_row],
            axis=0,
        )
        for name, of_row in scores.items()
    }
    langs, rows, p_of = list(next(iter(scores.values()))[0]["values"]), [], load_evaluation().paired_p
    full = np.mean([average(s["values"], "ndcg@10") for s in scores[FULL]]) if FULL in scores else None
    for name, of_row in scores.items():
        group, negatives, flags, paper = ROWS[name]
        ndcg = [average(s["values"], "ndcg@10") for s in of_row]
        compared = name != FULL and seeds[name] == seeds[FULL]
        rows.append(
            {
                "name": name,
                "group": group,
                "negatives": negatives,
                "flags": flags,
                "seeds": len(of_row),
                "train_queries": of_row[0]["train_queries"],
                "ndcg@10": round(100 * float(np.mean(ndcg)), 2),
                "sd": round(100 * float(np.std(ndcg, ddof=1)), 2) if len(ndcg) > 1 else None,
                "recall@100": round(
                    100 * float(np.mean([average(s["values"], "recall@100") for s in of_row])), 2
                ),
                "diff": round(100 * float(np.mean(ndcg) - full), 2) if compared else None,
                "p": p_of(per_query[name] - per_query[FULL]) if compared else None,
                "paper": paper,
                "paper_diff": round(paper - ROWS[FULL][3], 1) if paper and name != FULL else None,
                "by_lang": {
                    lang: round(
                        100
                        * float(
                            np.mean([[v["ndcg@10"] for v in s["values"][lang].values()] for s in of_row])
                        ),
                        2,
                    )
                    for lang in langs
                },
            }
        )
    seconds = sum(s["seconds"] for of_row in scores.values() for s in of_row)
    return {
        "settings": settings,
        "langs": langs,
        "queries": len(next(iter(per_query.values()))),
        "runs": sum(map(len, scores.values())),
        "hours": round(seconds / 3600 / args.jobs, 2),
        "ablations": rows,
    }


def table(result):
    """Markdown: a row a setting, the paper's difference beside ours."""
    langs = result["langs"]
    lines = [
        "| | nDCG@10 | sd | to full | p | paper, to full | R@100 | " + " | ".join(langs) + " |",
        "|---" + "|---:" * (6 + len(langs)) + "|",
    ]
    group = None
    for row in result["ablations"]:
        if row["group"] != group and row["group"]:
            lines.append(f"| *{row['group']}* |" + " |" * (6 + len(langs)))
        group = row["group"]
        mark = "**" if row["p"] is not None and row["p"] < 0.05 else ""
        cells = [
            f"{row['ndcg@10']:.1f}",
            "" if row["sd"] is None else f"{row['sd']:.1f}",
            "" if row["diff"] is None else f"{mark}{row['diff']:+.1f}{mark}",
            "" if row["p"] is None else f"{row['p']:.2g}",
            "" if row["paper_diff"] is None else f"{row['paper_diff']:+.1f}",
            f"{row['recall@100']:.1f}",
            *(f"{row['by_lang'][lang]:.1f}" for lang in langs),
        ]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    seeds, most = (max(row[key] for row in result["ablations"]) for key in ("seeds", "train_queries"))
    left_out = [
        f"{row['name']}: {most - row['train_queries']} of {most}"
        for row in result["ablations"]
        if row["train_queries"] < most
    ]
    short = (
        f"Queries left with fewer than {NEGATIVES} negatives are not trained on ({', '.join(left_out)}). "
        if left_out
        else ""
    )
    return "\n".join(lines) + (
        f"\n\n{reading(result)}\n\n{result['queries']} dev queries, {seeds} seeds, "
        f"{result['settings']['epochs']} epochs; bold: p < 0.05. "
        f"{short}The paper's column is of full MIRACL and BGE-M3: the same rows, other data and models."
    )


def reading(result):
    """What helped and what did not, in a sentence or two; only differences with p < 0.05 are named."""
    rows = [row for row in result["ablations"] if row["diff"] is not None]
    parts = []
    for words, sign in (("below", -1), ("above", 1)):
        some = sorted(
            (row for row in rows if row["p"] < 0.05 and sign * row["diff"] > 0),
            key=lambda row: sign * row["diff"],
            reverse=True,
        )
        named = ", ".join(f"{row['name']} ({row['diff']:+.1f})" for row in some)
        parts.append(f"Significantly {words} the full method: {named or 'none'}.")
    within = [row for row in rows if row["p"] >= 0.05]
    if within:
        widest = max(abs(row["diff"]) for row in within)
        parts.append(
            f"The other {len(within)} rows cannot be told from it on these data (differences up to "
            f"{widest:.1f} points)."
        )
    return " ".join(parts)


def main(argv=None):
    args = build_parser().parse_args(argv)
    args.work = args.work or args.run / "ablations"
    args.retrievers = args.retrievers or ["bm25", args.encoder]
    next(
        read_queries(args.run / "topics.jsonl", args.lang, need=["topic"])
    )  # stops in one line where the run is not there
    settings = {
        "epochs": args.epochs,
        "train_flags": args.train_flags,
        "target": args.target,
        "lang": args.lang,
        "llm": args.llm,
        "retrievers": [*map(short_name, args.retrievers)],
        "fusion": args.fusion,
        "topics": digest_file(args.run / "topics.jsonl"),
        "dev": digest_file(Path(args.data) / "dev.jsonl"),
        "encoder": digest_folder(model_folder(args.encoder)),
    }
    (args.work / "scores").mkdir(parents=True, exist_ok=True)
    known = args.work / "scores/settings.json"
    if known.is_file() and json.loads(known.read_text("utf-8")) != settings:
        raise DataError(
            f"{known}: the scores there are of other settings ({known.read_text('utf-8')}); give another "
            f"--work, or remove {args.work}"
        )
    with atomic(known) as temporary:
        temporary.write_text(json.dumps(settings), "utf-8")
    begun, rows, saving = time.time(), args.rows or list(ROWS), Lock()
    todo = [
        (name, seed) for seed in args.seeds for name in rows if not score_path(args, name, seed).is_file()
    ]
    if todo:
        make_inputs(args, dict.fromkeys(ROWS[name][1] for name, _ in todo))

    def do(job):
        if time.time() - begun < 60 * args.minutes:
            one_run(args, *job)
            save()

    def save():
        with saving:
            result = summarise(args, settings)
            with atomic(args.out) as temporary:
                temporary.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8")
        return result

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(do, todo))
    print(table(save()))


if __name__ == "__main__":
    run(main)
