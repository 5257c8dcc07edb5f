"""A real encoder: how long and how fast to train it, and whether sentence-transformers scores it the same.

What    curve: a grid of learning rates and steps, each point a run of its own whose rate falls to 0 at its
        end, read on the training queries that 05_train.py holds out: MRR@10 over the passages of all held-out
        queries of a language. No dev query is read. Zero steps are the encoder before training.
        check: a trained model by sentence-transformers' own InformationRetrievalEvaluator, beside 06_eval.py.
        The rows themselves, what they forget and the hard queries are bench/ablations.py's.
How     A point is kept in WORK as soon as it is there: a killed or stopped call (--minutes) goes on where it
        was. --jobs runs at a time, a thread each.
Reads   curve: a file of training records with topics; check: a model, DATA, and EVAL/metrics.json of it
Writes  OUT: settings and points, or nDCG@10 and Recall@100 by both; a table goes to stdout
Usage   python bench/real_encoder.py curve --input runs/e5/topics.jsonl --work runs/e5/curve
            --encoder intfloat/multilingual-e5-small
        python bench/real_encoder.py check --model runs/e5/model --data data/minimiracl --eval runs/e5/eval
Cost    curve: the sum of its steps, 10-25 s each on one core; check: one encoding of the corpora
"""
import json
import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ablations import ROOT, load_evaluation, stage

from common import (DataError, Parser, atomic, digest_file, digest_folder, positive_float, positive_int,
                    read_json, read_passages, read_queries, read_shards, run, say, short_name)
from encoder import model_folder

MEASURES = ("ndcg@10", "recall@100")
SAME = 0.002  # of nDCG@10 and Recall@100: what two evaluations of one model may differ by


def build_parser():
    parser = Parser(__doc__)
    parts = parser.add_subparsers(dest="part", required=True, parser_class=lambda **_: Parser(__doc__))
    flag = parts.add_parser("curve").add_argument
    flag("--input", required=True, metavar="FILE", help="training records with topics")
    flag("--encoder", required=True, metavar="MODEL", help="where each point starts")
    flag("--lr", nargs="+", type=positive_float, default=[5e-6, 2e-5, 5e-5], help="highest learning rates")
    flag("--steps", nargs="+", type=positive_int, default=[26, 52, 104],
         help="updates in which it falls to 0")
    flag("--train-flags", default="--passage-max-len 128 --chunk-tokens 4096", metavar="FLAGS",
         help="further flags of 05_train.py, in one word")
    flag("--seed", type=int, default=13, help="of the batches and the held-out queries")
    flag("--minutes", type=float, default=1e9, help="begin no point after so many; the next call goes on")
    flag("--jobs", type=positive_int, default=2, help="points at a time, each with one thread")
    flag("--work", type=Path, required=True, metavar="FOLDER", help="for points that are there")
    flag("--out", type=Path, default=ROOT / "results/real-encoder-curve.json", metavar="FILE")
    flag = parts.add_parser("check").add_argument
    flag("--model", required=True, metavar="FOLDER", help="a sentence-transformers folder")
    flag("--data", required=True, metavar="FOLDER", help="a folder made by 00_prepare_data.py")
    flag("--eval", required=True, type=Path, metavar="FOLDER", help="what 06_eval.py made of the model")
    flag("--lang", nargs="+", metavar="CODE", help="only these languages of it")
    flag("--out", type=Path, default=ROOT / "results/real-encoder-check.json", metavar="FILE")
    return parser


def save(path, content):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")


# --------------------------------------------------------------------------- learning rate and steps

def one_point(args, lr, steps):
    """Train for so many steps (0: one that changes nothing); the held-out MRR@10 goes to WORK."""
    name, started = f"{lr:g}-{steps}", time.time()
    model = args.work / name / "model"
    stage(ROOT / "05_train.py", "--input", args.input, "--encoder", args.encoder, "--seed", args.seed,
          "--epochs", 10_000, "--lr", lr if steps else 1e-30, "--max-steps", steps or 1,
          *shlex.split(args.train_flags), "--out", model)
    last = json.loads((model / "train_log.jsonl").read_text("utf-8").splitlines()[-1])
    save(args.work / f"{name}.json", {"lr": lr, "steps": steps, "dev_mrr@10": last["dev_mrr@10"],
                                      "dev": last["dev"], "seconds": round(time.time() - started)})
    shutil.rmtree(model.parent)
    say(f"{steps} steps at {lr:g}: held-out MRR@10 {last['dev_mrr@10']}")


def curve(args):
    settings = {"input": digest_file(args.input), "encoder": digest_folder(model_folder(args.encoder)),
                "name": short_name(args.encoder), "train_flags": args.train_flags, "seed": args.seed}
    known = args.work / "settings.json"
    if known.is_file() and read_json(known) != settings:
        raise DataError(f"{known}: the points there are of other settings; give another --work, or remove it")
    args.work.mkdir(parents=True, exist_ok=True)
    save(known, settings)
    begun = time.time()

    def do(point):
        wanted = not (args.work / f"{point[0]:g}-{point[1]}.json").is_file()
        if wanted and time.time() - begun < 60 * args.minutes:
            one_point(args, *point)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(do, [(0.0, 0)] + [(lr, steps) for steps in args.steps for lr in args.lr]))
    points = [read_json(path) for path in args.work.glob("*-*.json")]
    if not points:
        raise DataError(f"{args.work}: no point has ended yet; give it more --minutes")
    points.sort(key=lambda point: (point["steps"], point["lr"]))
    save(args.out, {"settings": settings, "points": points})
    print(curve_table({"settings": settings, "points": points}))


def curve_table(result):
    """Markdown: a row for each number of steps, a column for each learning rate."""
    score = {(point["lr"], point["steps"]): point["dev_mrr@10"] for point in result["points"]}
    rates, lengths = sorted({lr for lr, _ in score if lr}), sorted({steps for _, steps in score if steps})
    lines = ["| held-out MRR@10 | " + " | ".join(f"{lr:g}" for lr in rates) + " |",
             "|---" + "|---:" * len(rates) + "|"]
    for steps in lengths:
        found = [score.get((lr, steps)) for lr in rates]
        cells = ["" if value is None else f"{100 * value:.1f}" for value in found]
        lines.append(f"| {steps} steps | " + " | ".join(cells) + " |")
    before = [f"Before training: {100 * score[0.0, 0]:.1f}. "] if (0.0, 0) in score else []
    n_queries = sum(of_lang["queries"] for of_lang in result["points"][0]["dev"].values())
    return "\n".join([*lines, "", *before, f"{n_queries} held-out training queries, one seed."])


# --------------------------------------------------------------------------- by the field's own evaluator

def theirs(model, lang, queries, corpus, relevant):
    """{ndcg@10, recall@100} by InformationRetrievalEvaluator, of texts by id and {query_id: {docid}}."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    evaluator = InformationRetrievalEvaluator(queries, corpus, relevant, name=lang, ndcg_at_k=[10],
                                              precision_recall_at_k=[100], write_csv=False)
    found = evaluator(model)
    return {measure: round(float(found[f"{lang}_cosine_{measure}"]), 5) for measure in MEASURES}


def check(args):
    from sentence_transformers import SentenceTransformer
    metrics = read_json(args.eval / "metrics.json")
    used = metrics["settings"]["encoders"][short_name(args.model)]
    model = SentenceTransformer(args.model)
    model.max_seq_length = used["max_len"]["passage"]
    evaluation, rows = load_evaluation(), {}
    for lang, ours in metrics["models"][short_name(args.model)].items():
        if lang == "avg" or lang not in (args.lang or [lang]):
            continue
        qrels = evaluation.read_qrels(Path(args.data) / "qrels/dev" / f"{lang}.tsv")
        asked = evaluation.answerable(qrels)
        queries = {r["query_id"]: r["query"] for r in read_queries(Path(args.data) / "dev.jsonl", [lang])}
        corpus = {p["docid"]: f"{p['title']}{used['title_join']}{p['text']}" if p.get("title") else p["text"]
                  for path, lines in read_shards(args.data, lang)
                  for p in read_passages(path, lines)}
        relevant = {q: {docid for docid, relevance in qrels[q].items() if relevance > 0} for q in asked}
        rows[lang] = {"ours": {measure: ours[measure] for measure in MEASURES},
                      "theirs": theirs(model, lang, {q: queries[q] for q in asked}, corpus, relevant)}
        say(f"{lang}: {rows[lang]}")
    result = {"langs": rows, "largest": round(max(abs(row["ours"][measure] - row["theirs"][measure])
                                                  for row in rows.values() for measure in MEASURES), 5)}
    save(args.out, result)
    print(check_table(result))
    if result["largest"] > SAME:
        raise DataError(f"{args.out}: the two differ by {100 * result['largest']:.2f} points, want at most "
                        f"{100 * SAME:.1f}; is {args.eval} of this model and --data?")


def check_table(result):
    """Markdown: a row a measure and evaluator, a column a language."""
    rows = result["langs"]
    lines = ["| | " + " | ".join(rows) + " |", "|---" + "|---:" * len(rows) + "|"]
    for measure, called in zip(MEASURES, ("nDCG@10", "R@100")):
        for who, script in (("ours", "`06_eval.py`"), ("theirs", "`InformationRetrievalEvaluator`")):
            cells = " | ".join(f"{100 * row[who][measure]:.2f}" for row in rows.values())
            lines.append(f"| {called}, {script} | {cells} |")
    return "\n".join([*lines, "", f"Largest difference: {100 * result['largest']:.2f} points."])


def main(argv=None):
    args = build_parser().parse_args(argv)
    {"curve": curve, "check": check}[args.part](args)


if __name__ == "__main__":
    run(main)
