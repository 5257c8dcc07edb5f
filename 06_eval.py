"""Evaluate models and BM25: nDCG@10 and Recall@100 by language and on average, with significance (Sec. 4).

Source  Sec. 4.1: MIRACL's metrics, computed by trec_eval's own code (pytrec_eval); paired t-test over the queries, p < 0.05.
Reads   DATA/qrels/<split>/<lang>.tsv, DATA/<split>.jsonl (query texts), DATA/corpus/<lang>.jsonl[.gz]
Writes  OUT/metrics.json, OUT/runs/<model>.<lang>.trec; the table goes to stdout
Usage   python 06_eval.py --data data/sample --models bm25 models/sample runs/sample/model --baseline models/sample --out runs/sample/eval
Cost    one embedding a passage and model, cached
"""
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from common import (DataError, Ensemble, Output, Parser, atomic, corpus_files, positive_int, read_lines, read_queries, run, say,
                    short_name)

MEASURES = {"ndcg@10": "ndcg_cut_10", "recall@100": "recall_100"}


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a folder made by 00_prepare_data.py")
    parser.add_argument("--split", default="dev", metavar="NAME", help="evaluate on DATA/NAME.jsonl and DATA/qrels/NAME (Sec. 4.1: dev)")
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL_OR_bm25", help="model folders, hub ids, and bm25")
    parser.add_argument("--baseline", metavar="MODEL", help="one of --models; the others are tested against it (p < 0.05, Sec. 4.1)")
    parser.add_argument("--depth", type=positive_int, default=100, help="passages per query in the run files, at least 100")
    parser.add_argument("--query-max-len", type=positive_int, default=64, help="tokens of a query that are read (Sec. 4.1)")
    parser.add_argument("--passage-max-len", type=positive_int, default=256, help="tokens of a passage that are read (Sec. 4.1)")
    parser.add_argument("--bm25-tokenizer", metavar="MODEL", help="its sub-words are BM25's terms; default: the first model's")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--cache", default="cache", metavar="FOLDER", help="embeddings are kept here")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for metrics.json and runs/")
    return parser


def read_qrels(path):
    """{query_id: {docid: relevance}} of a TREC qrels file."""
    qrels = defaultdict(dict)
    for number, line in read_lines(path):
        fields = line.decode("utf-8", "replace").split()
        if len(fields) != 4 or not fields[3].lstrip("-").isdecimal():
            raise DataError(f"{path}:{number}: got {len(fields)} fields, want 'query_id 0 docid relevance'; check the file")
        qrels[fields[0]][fields[2]] = int(fields[3])
    return dict(qrels)


def measure(qrels, ranking):
    """{query_id: {measure: value}} for every query of the qrels that has a relevant passage; one without results counts 0."""
    import pytrec_eval
    asked = [q for q, judged in qrels.items() if any(r > 0 for r in judged.values())]
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, set(MEASURES.values()))
    values = evaluator.evaluate({q: hits for q, hits in ranking.items() if hits})
    return {q: {name: values.get(q, {}).get(key, 0.0) for name, key in MEASURES.items()} for q in asked}


def write_run(path, ranking, tag):
    with atomic(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for query_id, hits in ranking.items():
                # trec_eval ignores the rank column: it sorts by score, then by docid descending
                for rank, (docid, score) in enumerate(sorted(hits.items(), key=lambda h: (h[1], h[0]), reverse=True), 1):
                    file.write(f"{query_id} Q0 {docid} {rank} {score:.6f} {tag}\n")


def significance(model, baseline):
    """Paired t-test and bootstrap interval of nDCG@10: {avg_diff, p, ci95, by_lang} for two {lang: {query: {measure: x}}}."""
    from scipy.stats import ttest_rel
    by_lang, differences = {}, []
    for lang in model:
        a = np.array([model[lang][q]["ndcg@10"] for q in model[lang]])
        b = np.array([baseline[lang][q]["ndcg@10"] for q in model[lang]])
        differences.append(a - b)
        p = ttest_rel(a, b).pvalue if len(a) > 1 and (a != b).any() else 1.0
        by_lang[lang] = {"diff": round(float((a - b).mean()), 4), "p": round(float(p), 6)}
    pooled = np.concatenate(differences)
    p = ttest_rel(pooled, np.zeros_like(pooled)).pvalue if (pooled != 0).any() else 1.0
    draw = np.random.default_rng(13)
    means = np.mean([[d[draw.integers(len(d), size=len(d))].mean() for d in differences] for _ in range(1000)], axis=1)
    return {"avg_diff": round(float(np.mean([d.mean() for d in differences])), 4), "p": float(f"{p:.3g}"),
            "ci95": [round(float(x), 4) for x in np.percentile(means, [2.5, 97.5])], "by_lang": by_lang}


def evaluate(name, args, queries, qrels):
    """{lang: {query_id: {measure: value}}} of one model; writes its run files."""
    single = Ensemble([name], args.data, args.cache, device=args.device, bm25_tokenizer=args.bm25_tokenizer,
                      query_max_len=args.query_max_len, passage_max_len=args.passage_max_len)
    results = {}
    for lang in sorted(qrels):
        asked = [q for q in qrels[lang] if q in queries[lang]]
        hits, _ = single.search(lang, [queries[lang][q] for q in asked], max(100, args.depth))
        ranking = {q: {h["docid"]: h["score"] for h in found} for q, found in zip(asked, hits)}
        write_run(Path(args.out) / "runs" / f"{file_name(name)}.{lang}.trec", ranking, file_name(name))
        results[lang] = measure(qrels[lang], ranking)
    return results


def file_name(model):
    return short_name(model).replace("/", "_")


def table(metrics, tests, zero_shot):
    """The result as text: a row a language, nDCG@10 / Recall@100 of each model."""
    names = list(metrics)
    langs = [lang for lang in metrics[names[0]] if lang != "avg"]
    width = max(18, *(len(n) + 2 for n in names))
    lines = ["nDCG@10 / Recall@100 (%)", f"{'lang':<8}{'queries':>8}" + "".join(f"{n:>{width}}" for n in names)]
    for lang in [*langs, "avg"]:
        cells = [f"{100 * metrics[n][lang]['ndcg@10']:.1f} / {100 * metrics[n][lang]['recall@100']:.1f}" for n in names]
        mark = "*" if lang in zero_shot else ""
        lines.append(f"{lang + mark:<8}{metrics[names[0]][lang]['queries']:>8}" + "".join(f"{c:>{width}}" for c in cells))
    if zero_shot:
        lines.append("* zero-shot: no training queries in this language")
    for name, test in tests.items():
        lines.append(f"{name} - {test['vs']}: {100 * test['avg_diff']:+.1f} nDCG@10, 95% interval {100 * test['ci95'][0]:+.1f} to "
                     f"{100 * test['ci95'][1]:+.1f}, paired t-test p = {test['p']:.3g}" + (" (significant)" if test["p"] < 0.05 else ""))
    return "\n".join(lines)


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.baseline and args.baseline not in args.models:
        raise DataError(f"--baseline {args.baseline} is not among --models")
    if len({file_name(m) for m in args.models}) < len(args.models):
        raise DataError(f"--models: two of {' '.join(args.models)} have the same name; rename a folder")
    if "bm25" in args.models and not args.bm25_tokenizer:
        args.bm25_tokenizer = next((m for m in args.models if m != "bm25"), None)
    queries_path = Path(args.data) / f"{args.split}.jsonl"
    queries = defaultdict(dict)
    for record in read_queries(queries_path, args.lang):
        if not args.limit or len(queries[record["lang"]]) < args.limit:
            queries[record["lang"]][record["query_id"]] = record["query"]
    qrels_files = {lang: Path(args.data) / "qrels" / args.split / f"{lang}.tsv" for lang in queries}
    qrels = {lang: {q: j for q, j in read_qrels(path).items() if not args.limit or q in queries[lang]}
             for lang, path in qrels_files.items()}
    output = Output(args, [queries_path, *qrels_files.values(), *(p for lang in queries for p in corpus_files(args.data, lang))],
                    args.models, out=Path(args.out) / "metrics.json")
    if output.is_done():
        metrics = json.loads(output.path.read_text("utf-8"))
        print(table(metrics["models"], metrics["tests"], metrics["settings"]["zero_shot"]))
        return
    train = Path(args.data) / "train.jsonl"
    trained = {r["lang"] for r in read_queries(train)} if train.is_file() else set()
    values, metrics = {}, {}
    for name in args.models:
        values[short_name(name)] = found = evaluate(name, args, queries, qrels)
        rows = {lang: {m: round(float(np.mean([v[m] for v in of_lang.values()])), 5) for m in MEASURES} | {"queries": len(of_lang)}
                for lang, of_lang in found.items()}
        rows["avg"] = {m: round(float(np.mean([rows[lang][m] for lang in found])), 5) for m in MEASURES}
        rows["avg"]["queries"] = sum(len(v) for v in found.values())
        metrics[short_name(name)] = rows
        say(f"{short_name(name)}: nDCG@10 {100 * rows['avg']['ndcg@10']:.1f}, Recall@100 {100 * rows['avg']['recall@100']:.1f}")
    tests = {n: {"vs": short_name(args.baseline), **significance(values[n], values[short_name(args.baseline)])}
             for n in values if args.baseline and n != short_name(args.baseline)}
    zero_shot = sorted(lang for lang in qrels if trained and lang not in trained)
    result = {"settings": {"data": args.data, "split": args.split, "depth": max(100, args.depth), "zero_shot": zero_shot},
              "models": metrics, "tests": tests}
    output.write_lines([json.dumps(result, ensure_ascii=False, indent=1) + "\n"])
    print(table(metrics, tests, zero_shot))
    output.finish(models=len(metrics), languages=len(qrels), queries=sum(map(len, queries.values())))


if __name__ == "__main__":
    run(main)
