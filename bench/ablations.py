"""What each part of the method brings: the rows of Tables 2, 3, 5, 6, 7 and 9, the N of Figure 3, languages
drawn in other proportions, and the batch size.

What    Every row starts from the same encoder and makes the same number of updates; a row differs from the
        full method in what its name says. Left out: no MIFT, which needs a generator tuned by
        03a_tune_generator.py (name it with --llm). The strategies of Table 2 and the path from naive to
        full train as the field does: mixed batches, no weights. Stage 2 has little to do where stage 1 leaves
        N negatives, so its own rows begin with --shallow candidates a query.
How     Rows share RUN's candidates, judgments, negatives and topics; what a row changes is made once by the
        stage itself. A row and seed is one run of 05_train.py and 06_eval.py, kept in WORK/scores as soon
        as it is there: a killed or stopped call (--minutes, --rows) goes on where it was. --jobs runs at a
        time, a thread each. Two rows are not trained: BM25 and the encoder that the others start from.
Reads   RUN/candidates.jsonl, filtered.jsonl, augmented.jsonl, topics.jsonl, DATA
Writes  OUT: a row each with mean and standard deviation over the seeds and where its negatives came from; and
        its difference to the rows of --against, each with interval and p of one bootstrap of the average over
        languages, which draws the queries of each language and the seeds (06_eval.py), p by Holm's correction
        over all rows; the table goes to stdout. The same for other collections (--also) and, where the
        untrained rows are there, for the hard queries, which both miss at rank 1; p corrected within each
Usage   make ablations DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl LANGS="sw te id ar zh"
        python bench/ablations.py --data data/minimiracl --run runs/minimiracl --encoder models/minimiracl
            --rows "full method" "batch of 8"
Cost    in OUT under "hours": wall time of the rows on two cores, two at a time
"""
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import (DataError, Parser, atomic, digest_file, digest_folder, dump, positive_float, positive_int,
                    read_queries, run, say, short_name)
from encoder import model_folder

STAND_IN = "offline-stand-in"
MIXED = ["--mixed", "--topic-power", "1"]
UNWEIGHTED = ["--weighting", "none"]
PLAIN = MIXED + UNWEIGHTED
NEGATIVES = 7  # hard negatives a query and step (Sec. 4.1)
BM25, BEFORE = "BM25", "before training"
NAIVE, FULL = "naive top-k", "full method"
HARD = "hard queries"
KEYS = {BEFORE: "to_before", NAIVE: "to_naive", FULL: "to_full"}  # of the differences in OUT
STRATEGIES = ("topk", "shifted", "abs", "margin", "percent")  # of 01_mine_candidates.py


class Row(NamedTuple):
    group: str
    negatives: str  # the file that Inputs makes
    flags: list     # of 05_train.py
    paper: float | None = None  # its nDCG@10 with BGE-M3


def weights(alpha, beta):
    return ["--alpha", alpha, "--beta", beta]


def powers(language, topic):
    return ["--language-power", language, "--topic-power", topic]


ROWS = {
    BM25: Row("not trained", "", [], 39.4),
    BEFORE: Row("not trained", "", [], 69.2),
    NAIVE: Row("step by step", "topk", PLAIN, 67.6),
    "naive, filtered": Row("step by step", "filtered", PLAIN),
    "naive, filtered, brought to N (no stage 3)": Row("step by step", "augmented", PLAIN, 68.8),
    FULL: Row("step by step", "augmented", [], 70.6),
    "full method, drawn by share^0.5": Row("step by step", "augmented", powers("0.5", "0.5")),
    "languages by share^0.5": Row("languages and topics drawn", "augmented", powers("0.5", "0")),
    "languages by share": Row("languages and topics drawn", "augmented", powers("1", "0")),
    "languages by share^0.5, no topic balance": Row("languages and topics drawn", "augmented",
                                                    powers("0.5", "1")),
    "top-k shifted by 10": Row("Table 2", "shifted", PLAIN, 67.8),
    "score under 0.6": Row("Table 2", "abs", PLAIN, 67.8),
    "margin of 0.15 to the positive": Row("Table 2", "margin", PLAIN, 67.9),
    "under 90% of the positive": Row("Table 2", "percent", PLAIN, 68.1),
    "no stage 1 (labelled negatives, then generation)": Row("Tables 3, 5, 6", "labelled", [], 66.9),
    "no LLM judgment": Row("Tables 3, 5, 6", "topk", [], 67.5),
    "no reference in the prompt": Row("Tables 3, 5, 6", "noreference", [], 68.1),
    "false negatives as positives": Row("Tables 3, 5, 6", "relabelled", []),
    "false negatives as positives, drawn by share^0.5": Row("Tables 3, 5, 6", "relabelled",
                                                            powers("0.5", "0.5")),
    "few candidates": Row("stage 2, few candidates", "shallow", []),
    "few candidates, no stage 2": Row("stage 2, few candidates", "shallowfiltered", [], 68.5),
    "few candidates, written, not retrieved (no PDBG)": Row("stage 2, few candidates", "written", [], 69.2),
    "no topic balance": Row("Table 7", "augmented", ["--topic-power", "1"], 70.3),
    "no same-language batches": Row("Table 7", "augmented", ["--mixed"], 69.4),
    "neither": Row("Table 7", "augmented", MIXED, 68.5),
    "no weights": Row("Table 9", "augmented", UNWEIGHTED),
    "alpha 0.55, beta 0.40": Row("Table 9", "augmented", weights("0.55", "0.40"), 69.5),
    "alpha 0.55, beta 0.20": Row("Table 9", "augmented", weights("0.55", "0.20"), 68.6),
    "alpha 0.45, beta 0.20": Row("Table 9", "augmented", weights("0.45", "0.20"), 69.9),
    "N = 10": Row("Figure 3", "N10", []),
    "N = 20": Row("Figure 3", "N20", []),
    "N = 40": Row("Figure 3", "N40", []),
    "N = 50": Row("Figure 3", "N50", []),
    "batch of 8": Row("batch size", "augmented", ["--batch-size", "8"]),
    "batch of 64": Row("batch size", "augmented", ["--batch-size", "64"]),
}


def build_parser():
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--data", required=True, metavar="FOLDER", help="a folder made by 00_prepare_data.py")
    flag("--run", required=True, type=Path, metavar="FOLDER", help="what the stages made of it")
    flag("--encoder", required=True, metavar="MODEL", help="where every row starts")
    flag("--retrievers", nargs="+", metavar="MODEL_OR_bm25",
         help="ensemble of stages 01 and 03; default: bm25 and --encoder")
    flag("--fusion", choices=["concat", "rrf"], default="rrf", help="of the ensemble")
    flag("--llm", default=STAND_IN, metavar="NAME",
         help="judge and generator, served at OPENAI_BASE_URL; default: offline_llm.py")
    flag("--lang", nargs="+", metavar="CODE", help="use only these languages")
    flag("--target", type=positive_int, default=30, help="N, negatives a query (Sec. 4.1)")
    flag("--shallow", type=positive_int, default=20, help="candidates a query where stage 2 is measured")
    flag("--epochs", type=positive_float, default=4, help="passes over the queries; every row makes as many "
         "updates as these are in batches of --batch-size")
    flag("--batch-size", type=positive_int, default=24, help="queries a step (Sec. 4.1)")
    flag("--train-flags", default="--lr 1e-3 --temperature 0.05", metavar="FLAGS",
         help="further flags of 05_train.py, in one word")
    flag("--read-flags", default="", metavar="FLAGS",
         help="further flags of 01, 03 and 06, in one word: how the encoder reads, such as --dtype bf16")
    flag("--also", nargs="+", default=[], metavar="FOLDER",
         help="other collections to evaluate on, in all their languages: is anything forgotten?")
    flag("--against", nargs="+", choices=list(KEYS), default=[NAIVE, FULL], metavar="NAME",
         help="rows to which the others' differences are taken")
    flag("--seeds", nargs="+", type=int, default=[13, 14, 15],
         help="of the training: batches, choice of negatives, held-out queries")
    flag("--rows", nargs="+", choices=list(ROWS), metavar="NAME",
         help="only these; the others keep what they have")
    flag("--minutes", type=float, default=1e9, help="begin no run after so many; the next call goes on")
    flag("--jobs", type=positive_int, default=2, help="runs at a time, each with one thread")
    flag("--cache", default="cache", metavar="FOLDER", help="the stages' cache: embeddings and answers")
    flag("--work", type=Path, metavar="FOLDER", help="inputs and scores of the rows; default: RUN/ablations")
    flag("--out", type=Path, default=ROOT / "results/ablations.json", metavar="FILE",
         help="the table as JSON")
    return parser


def stage(*command):
    """Run a script of the project with one thread; its bad end ends this one."""
    done = subprocess.run([sys.executable, *map(str, command)], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise DataError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr[-600:]}")


# --------------------------------------------------------------------------- what the rows train on

class Inputs:
    """Makes WORK/<name>.jsonl for the negatives that rows ask for; a stage that is done does nothing."""

    def __init__(self, args):
        self.args = args
        self.lang = ["--lang", *args.lang] if args.lang else []
        self.served = [ROOT / "offline_llm.py", "--exec", sys.executable] if args.llm == STAND_IN else []
        self.ensemble = ["--retrievers", *args.retrievers, "--fusion", args.fusion]
        self.reading = shlex.split(args.read_flags)
        self.llm = ["--llm", args.llm, "--cache", args.cache]

    def mine(self, name):
        """Of one of Table 2's strategies; --max-score and --margin are of the mean cosine."""
        args, flags = self.args, self.ensemble
        if name not in ("topk", "shifted"):
            dense = [retriever for retriever in args.retrievers if retriever != "bm25"] or [args.encoder]
            mean = [1 / len(dense)] * len(dense)
            flags = ["--retrievers", *dense, "--fusion", "concat", "--weights", *mean]
        path = args.work / f"{name}.mined.jsonl"
        stage(ROOT / "01_mine_candidates.py", "--data", args.data, *flags, "--strategy", name, "--depth",
              args.target, "--bm25-tokenizer", args.encoder, "--cache", args.cache, "--out", path,
              *self.reading, *self.lang)
        return path

    def filter(self, name, *flags, candidates=None):
        path = self.args.work / f"{name}.filtered.jsonl"
        candidates = candidates or self.args.run / "candidates.jsonl"
        stage(*self.served, ROOT / "02_filter_false_negatives.py", "--input", candidates, *self.llm, "--out",
              path, *flags, *self.lang)
        return path

    def generate(self, name, source, *flags, target=None):
        path = self.args.work / f"{name}.made.jsonl"
        stage(*self.served, ROOT / "03_generate_negatives.py", "--input", source, "--data", self.args.data,
              *self.ensemble, *self.llm, "--target", target or self.args.target, "--out", path, *flags,
              *self.reading, *self.lang)
        return path

    def shallow(self):
        """Stage 02's result for the first --shallow candidates."""
        path = self.args.work / "shallow.candidates.jsonl"
        with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for record in read_queries(self.args.run / "candidates.jsonl", self.args.lang):
                few = record["candidate_passages"][:self.args.shallow]
                file.write(dump(record | {"candidate_passages": few}))
        return self.filter("shallow", candidates=path)

    def source(self, name):
        """The file that holds the negatives of this name."""
        filtered = self.args.run / "filtered.jsonl"
        if name in STRATEGIES:
            return self.mine(name)
        if name.startswith("N"):
            return self.generate(name, filtered, target=int(name[1:]))
        if name == "filtered":
            return filtered
        if name == "augmented":
            return self.args.run / "augmented.jsonl"
        if name == "noreference":
            return self.generate(name, self.filter(name, "--no-reference"), "--no-reference")
        if name == "relabelled":
            return self.generate(name, self.filter(name, "--relabel-at", 2))
        if name == "labelled":
            return self.generate(name, Path(self.args.data) / "train.jsonl")
        if name == "written":
            return self.generate(name, self.shallow(), "--mode", "write")
        return self.generate(name, self.shallow()) if name == "shallow" else self.shallow()

    def make(self, names):
        """Each with RUN's topics, cut to N; where negatives came from is counted in <name>.sources.json."""
        args = self.args
        topic_of = {(record["lang"], record["query_id"]): record["topic"]
                    for record in read_queries(args.run / "topics.jsonl", args.lang)}
        for name in filter(None, names):
            n = int(name[1:]) if name.startswith("N") else args.target
            source, sources, n_queries = self.source(name), Counter(), 0
            with atomic(args.work / f"{name}.jsonl") as path, open(path, "w", encoding="utf-8") as file:
                for record in read_queries(source, args.lang):
                    negatives = record["negative_passages"][:n]
                    if name in STRATEGIES:
                        record.pop("false_negatives", None)  # they know none, so they mask none
                    if len(negatives) < NEGATIVES:
                        continue  # such a query is left out of the row, as the field's miners do
                    topic = topic_of[record["lang"], record["query_id"]]
                    file.write(dump(record | {"topic": topic, "negative_passages": negatives}))
                    sources.update(passage.get("source", "mined") for passage in negatives)
                    n_queries += 1
            counts = {"train_queries": n_queries, "sources": dict(sorted(sources.items()))}
            (args.work / f"{name}.counts.json").write_text(json.dumps(counts), "utf-8")
            say(f"{name}: {counts}")


# --------------------------------------------------------------------------- a run

def updates(args):
    """As many steps as --epochs are of the queries that 05_train.py does not hold out, about nine in ten."""
    n_queries = sum(1 for _ in read_queries(args.run / "topics.jsonl", args.lang))
    return math.ceil(args.epochs * 0.9 * n_queries / args.batch_size)


def train(args, name, seed, folder):
    """Train a row with one seed; returns its model, made in folder."""
    row = ROWS[name]
    stage(ROOT / "05_train.py", "--input", args.work / f"{row.negatives}.jsonl", "--encoder", args.encoder,
          "--seed", seed, "--epochs", 10_000, "--max-steps", updates(args), "--batch-size", args.batch_size,
          *shlex.split(args.train_flags), *row.flags, "--out", folder / "model")
    return folder / "model"


def evaluate(args, model, cache, data, lang, out):
    """{lang: {query_id: {measure: value}}} of a model, or bm25, on the dev queries of a collection."""
    stage(ROOT / "06_eval.py", "--data", data, "--models", model, "--bm25-tokenizer", args.encoder, "--cache",
          cache, "--out", out, *shlex.split(args.read_flags), *(["--lang", *lang] if lang else []))
    evaluation, values = load_evaluation(), {}
    evaluation.MEASURES["ndcg@1"] = "ndcg_cut_1"  # 0 where rank 1 is no answer: what is hard
    for path in sorted((out / "runs").glob("*.trec")):
        lang = path.name.split(".")[-2]
        qrels = evaluation.read_qrels(Path(data) / "qrels/dev" / f"{lang}.tsv")
        values[lang] = evaluation.measure_run(qrels, path)
    return values


def one_run(args, name, seed):
    """Train and evaluate a row with one seed; what evaluate() gives goes to WORK/scores."""
    folder = args.work / f"row-{list(ROWS).index(name)}-{seed}"
    started = time.time()
    model, cache, counts = {BM25: "bm25", BEFORE: args.encoder}.get(name), args.cache, {}
    if model is None:
        model, cache = train(args, name, seed, folder), folder / "cache"
        counts = json.loads((args.work / f"{ROWS[name].negatives}.counts.json").read_text("utf-8"))
    trained = time.time() - started
    values = evaluate(args, model, cache, args.data, args.lang, folder / "eval")
    also = {short_name(data): evaluate(args, model, cache, data, None, folder / "also" / short_name(data))
            for data in args.also}
    result = {"values": values, "also": also, **counts, "train_seconds": round(trained),
              "seconds": round(time.time() - started)}
    with atomic(score_path(args, name, seed)) as temporary:
        temporary.write_text(json.dumps(result), "utf-8")
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


# --------------------------------------------------------------------------- the table

def differences(of_row, reference):
    """{lang: (seeds, queries)} of nDCG@10, a row's minus its reference's, by the same seeds."""
    def of(scores, lang):
        return np.array([[v["ndcg@10"] for v in s["values"][lang].values()] for s in scores])
    return {lang: of(of_row, lang) - of(reference, lang) for lang in of_row[0]["values"]}


def compare(scores, seeds, reference):
    """{name: {diff, ci95, p}} in points, of the trained rows that have the reference's seeds."""
    evaluation = load_evaluation()
    found = {}
    for name, of_row in scores.items():
        tested = name != reference and name not in (BM25, BEFORE) and reference in scores
        if tested and seeds[name] == seeds[reference]:
            test = evaluation.bootstrap(differences(of_row, scores[reference]), seed=0)["avg"]
            found[name] = {"diff": round(100 * test["diff"], 2), "p": test["p"],
                           "ci95": [round(100 * bound, 2) for bound in test["ci95"]]}
    return found


def compared(scores, seeds, against):
    """{name: means in points, and the differences to the rows of against, p by Holm over all of them}."""
    found = {KEYS[reference]: compare(scores, seeds, reference) for reference in against}
    tests = [test for of_rows in found.values() for test in of_rows.values()]
    for test, p in zip(tests, load_evaluation().holm([test["p"] for test in tests])):
        test["p_holm"] = p
    rows = {}
    for name, of_row in scores.items():
        ndcg = [100 * average(s["values"], "ndcg@10") for s in of_row]
        recall = [100 * average(s["values"], "recall@100") for s in of_row]
        by_lang = {lang: np.mean([average({lang: s["values"][lang]}, "ndcg@10") for s in of_row])
                   for lang in of_row[0]["values"]}
        rows[name] = {"ndcg@10": round(float(np.mean(ndcg)), 2),
                      "recall@100": round(float(np.mean(recall)), 2),
                      "sd": round(float(np.std(ndcg, ddof=1)), 2) if len(ndcg) > 1 else None,
                      **{key: of_rows.get(name) for key, of_rows in found.items()},
                      "by_lang": {lang: round(100 * value, 2) for lang, value in by_lang.items()}}
    return rows


def further(scores):
    """{what: scores as on the dev queries}: on the hard ones, and on the collections of --also."""
    found = {}
    if BM25 in scores and BEFORE in scores:
        untrained = [scores[name][0]["values"] for name in (BM25, BEFORE)]
        hard = {lang: [q for q in of_lang if not any(values[lang][q]["ndcg@1"] for values in untrained)]
                for lang, of_lang in untrained[0].items()}
        found[HARD] = {
            name: [{"values": {lang: {q: s["values"][lang][q] for q in asked}
                               for lang, asked in hard.items() if asked}} for s in of_row]
            for name, of_row in scores.items()}
    for also in next(iter(scores.values()))[0].get("also", {}):
        found[also] = {name: [{"values": s["also"][also]} for s in of_row] for name, of_row in scores.items()}
    return {what: of_rows for what, of_rows in found.items() if next(iter(of_rows.values()))[0]["values"]}


def n_queries(scores):
    return sum(map(len, next(iter(scores.values()))[0]["values"].values()))


def summarise(args, settings):
    """The rows that have scores, in points, with their differences to those of --against."""
    seeds = {name: [seed for seed in args.seeds if score_path(args, name, seed).is_file()] for name in ROWS}
    scores = {name: [json.loads(score_path(args, name, seed).read_text("utf-8")) for seed in of_row]
              for name, of_row in seeds.items() if of_row}
    if not scores:
        raise DataError(f"{args.work}: no run has ended yet, so there is no table; give it more --minutes")
    rows = []
    for name, row in compared(scores, seeds, args.against).items():
        first, paper = scores[name][0], ROWS[name].paper
        rows.append({"name": name, **ROWS[name]._asdict(), "seeds": len(scores[name]),
                     "train_queries": first.get("train_queries", 0), "sources": first.get("sources", {}),
                     **row,
                     "paper_diff": round(paper - ROWS[FULL].paper, 1) if paper and name != FULL else None})
    sets = {what: {"queries": n_queries(of_rows), "rows": compared(of_rows, seeds, args.against)}
            for what, of_rows in further(scores).items()}
    seconds = sum(s["seconds"] for of_row in scores.values() for s in of_row)
    return {"settings": settings, "langs": list(next(iter(scores.values()))[0]["values"]),
            "queries": n_queries(scores), "against": args.against, "runs": sum(map(len, scores.values())),
            "hours": round(seconds / 3600 / args.jobs, 2), "ablations": rows, "further": sets}


def cells(test):
    """A difference (bold where p by Holm is under 0.05), its interval and that p."""
    if test is None:
        return ["", "", ""]
    mark = "**" if test["p_holm"] < 0.05 else ""
    low, high = test["ci95"]
    return [f"{mark}{test['diff']:+.1f}{mark}", f"{low:+.1f} to {high:+.1f}", f"{test['p_holm']:.2g}"]


def table(result):
    """Markdown: a row a setting, the paper's difference beside ours; further sets; sources of negatives."""
    langs, rows = result["langs"], result["ablations"]
    against = result.get("against", [NAIVE, FULL])
    head = ["nDCG@10", "sd"]
    for reference in against:
        head += [KEYS[reference].replace("_", " "), "95% interval", "p"]
    head += ["paper, to full", "R@100", *langs]
    lines = [f"| | {' | '.join(head)} |", "|---" + "|---:" * len(head) + "|"]
    group = None
    for row in rows:
        if row["group"] != group:
            lines.append(f"| *{row['group']}* |" + " |" * len(head))
        group = row["group"]
        paper = "" if row["paper_diff"] is None else f"{row['paper_diff']:+.1f}"
        by_lang = [f"{row['by_lang'][lang]:.1f}" for lang in langs]
        lines.append("| " + " | ".join([row["name"], *scored(row, against), paper,
                                        f"{row['recall@100']:.1f}", *by_lang]) + " |")
    settings, n_seeds = result["settings"], max(row["seeds"] for row in rows)
    most = max(row["train_queries"] for row in rows)
    left_out = ", ".join(f"{row['name']}: {most - row['train_queries']} of {most}" for row in rows
                         if 0 < row["train_queries"] < most)
    lines += ["", reading(rows, against), "",
              f"{result['queries']} dev queries, {n_seeds} seeds, {settings['updates']} updates of "
              f"{settings['batch_size']} queries ({settings['epochs']} epochs). Interval and p: bootstrap of "
              "the average over languages, drawing queries within each language, and seeds; p after Holm's "
              "correction over the table, bold under 0.05. The paper's column is of full MIRACL and BGE-M3: "
              "the same rows, other data and models."]
    if left_out:
        lines += ["", f"Queries left with fewer than {NEGATIVES} negatives are not trained on ({left_out})."]
    for what, of_set in result.get("further", {}).items():
        lines += ["", *further_table(what, of_set, against)]
    return "\n".join([*lines, "", *sources_table(rows)])


def scored(row, against):
    """nDCG@10, its deviation, and the cells of each difference."""
    sd = "" if row["sd"] is None else f"{row['sd']:.1f}"
    tests = [cell for reference in against for cell in cells(row[KEYS[reference]])]
    return [f"{row['ndcg@10']:.1f}", sd, *tests]


def further_table(what, of_set, against):
    """The rows on the hard queries or another collection, and what difference they could show."""
    head = ["nDCG@10", "sd"]
    for reference in against:
        head += [KEYS[reference].replace("_", " "), "95% interval", "p"]
    rows = of_set["rows"]
    tests = [row[KEYS[reference]] for row in rows.values() for reference in against]
    widths = [(test["ci95"][1] - test["ci95"][0]) / 2 for test in tests if test]
    power = f"; differences are known to within {max(widths):.1f} points" if widths else ""
    explained = (", those that BM25 and the encoder before training both miss at rank 1: so "
                 "chosen, differences to it come out too high, those between trained rows do not")
    lines = [f"| {what} | {' | '.join(head)} | R@100 |", "|---" + "|---:" * (len(head) + 1) + "|"]
    for name, row in rows.items():
        lines.append("| " + " | ".join([name, *scored(row, against), f"{row['recall@100']:.1f}"]) + " |")
    return [*lines, "", f"{of_set['queries']} queries{explained if what == HARD else ''}{power}."]


def sources_table(rows):
    """Where the negatives of each row came from, in percent."""
    kinds = sorted({kind for row in rows for kind in row["sources"]})
    lines = ["| negatives, % | " + " | ".join(kinds) + " |", "|---" + "|---:" * len(kinds) + "|"]
    for name, row in {row["negatives"]: row for row in rows if row["sources"]}.items():
        total = sum(row["sources"].values())
        shares = [f"{100 * row['sources'].get(kind, 0) / total:.1f}" for kind in kinds]
        of_rows = ", ".join(other["name"] for other in rows if other["negatives"] == name)
        lines.append(f"| {of_rows} | " + " | ".join(shares) + " |")
    return lines


def reading(rows, against):
    """What helped and what did not, in a few sentences; only corrected differences are named."""
    parts = []
    called = {BEFORE: "the encoder before training", NAIVE: "naive negatives", FULL: "the full method"}
    for reference in against:
        tests = {row["name"]: row[KEYS[reference]] for row in rows if row[KEYS[reference]]}
        for words, sign in (("above", 1), ("below", -1)):
            some = sorted((-sign * test["diff"], name) for name, test in tests.items()
                          if test["p_holm"] < 0.05 and sign * test["diff"] > 0)
            named = ", ".join(f"{name} ({tests[name]['diff']:+.1f})" for _, name in some)
            parts.append(f"Significantly {words} {called[reference]}: {named or 'none'}.")
        within = [test for test in tests.values() if test["p_holm"] >= 0.05]
        if within:
            widest = max(abs(test["diff"]) for test in within)
            parts.append(f"{len(within)} rows cannot be told from it on these data (differences up to "
                         f"{widest:.1f} points).")
    return " ".join(parts)


def main(argv=None):
    args = build_parser().parse_args(argv)
    args.work = args.work or args.run / "ablations"
    args.retrievers = args.retrievers or ["bm25", args.encoder]
    next(read_queries(args.run / "topics.jsonl", args.lang, need=["topic"]))  # or one line, if there is none
    settings = {"epochs": args.epochs, "batch_size": args.batch_size, "updates": updates(args),
                "train_flags": args.train_flags, "read_flags": args.read_flags,
                "also": [*map(short_name, args.also)], "target": args.target, "shallow": args.shallow,
                "lang": args.lang, "llm": args.llm, "retrievers": [*map(short_name, args.retrievers)],
                "fusion": args.fusion, "topics": digest_file(args.run / "topics.jsonl"),
                "dev": digest_file(Path(args.data) / "dev.jsonl"),
                "encoder": digest_folder(model_folder(args.encoder))}
    (args.work / "scores").mkdir(parents=True, exist_ok=True)
    known = args.work / "scores/settings.json"
    if known.is_file() and json.loads(known.read_text("utf-8")) != settings:
        raise DataError(f"{known}: the scores there are of other settings ({known.read_text('utf-8')}); give "
                        f"another --work, or remove {args.work}")
    with atomic(known) as temporary:
        temporary.write_text(json.dumps(settings), "utf-8")
    begun, rows, saving = time.time(), args.rows or list(ROWS), Lock()
    todo = [(name, seed) for seed in args.seeds for name in rows
            if not score_path(args, name, seed).is_file()]
    if todo:
        Inputs(args).make(dict.fromkeys(ROWS[name].negatives for name, _ in todo))

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
