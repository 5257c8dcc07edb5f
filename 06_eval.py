"""Evaluate models and BM25: nDCG@10 and Recall@100 by language and on average, with significance (Sec. 4).

Source  Sec. 4.1: MIRACL's metrics, computed by trec_eval's own code (pytrec_eval) from the run files as they are written;
        paired t-test over all queries, p < 0.05; a bootstrap interval of the average over languages
Reads   DATA/qrels/<split>/<lang>.tsv, DATA/<split>.jsonl (query texts), DATA/corpus/<lang>.jsonl[.gz]
Writes  OUT/metrics.json, OUT/runs/<model>.<lang>.trec; the table goes to stdout
Usage   python 06_eval.py --data data/sample --models bm25 models/sample runs/sample/model --baseline models/sample \
            --out runs/sample/eval
Cost    one embedding a passage and model, cached; a finished run file is not made again when models or languages are added
"""
import hashlib
import heapq
import json
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import numpy as np

from common import (DataError, Output, Parser, atomic, check_passage, corpus_files, parse_line, positive_int,
                    read_lines, read_queries, run, say, short_name)
from search import Ensemble

MEASURES = {"ndcg@10": "ndcg_cut_10", "recall@100": "recall_100"}
DRAWS = 1000  # bootstrap samples behind the 95% interval


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a folder made by 00_prepare_data.py")
    parser.add_argument("--split", default="dev", metavar="NAME", help="evaluate on DATA/NAME.jsonl and DATA/qrels/NAME (Sec. 4.1: dev)")
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL_OR_bm25", help="model folders, hub ids, and bm25")
    parser.add_argument("--baseline", metavar="MODEL", help="one of --models; the others are tested against it (p < 0.05, Sec. 4.1)")
    parser.add_argument("--pool", choices=["full", "judged"], default="full",
                        help="search the whole corpus, or, for a quick look, only judged passages and --pool-sample others: "
                             "scores come out too high and compare with nothing but the same pool")
    parser.add_argument("--pool-sample", type=positive_int, default=10_000, metavar="N",
                        help="unjudged passages drawn for --pool judged, a language")
    parser.add_argument("--depth", type=positive_int, default=100, help="passages per query in the run files, at least 100")
    parser.add_argument("--query-max-len", type=positive_int, default=64, help="tokens of a query that are read (Sec. 4.1)")
    parser.add_argument("--passage-max-len", type=positive_int, default=256, help="tokens of a passage that are read (Sec. 4.1)")
    parser.add_argument("--bm25-tokenizer", metavar="MODEL", help="its sub-words are BM25's terms; default: the first model's")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--cache", default="cache", metavar="FOLDER", help="embeddings are kept here")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for metrics.json and runs/")
    return parser


# --------------------------------------------------------------------------- judgments, pool, runs

def read_qrels(path):
    """{query_id: {docid: relevance}} of a TREC qrels file."""
    qrels = defaultdict(dict)
    for number, line in read_lines(path):
        fields = line.decode("utf-8", "replace").split()
        if len(fields) != 4 or not fields[3].lstrip("-").isdecimal():
            raise DataError(f"{path}:{number}: got {len(fields)} fields, want 'query_id 0 docid relevance'; check the file")
        qrels[fields[0]][fields[2]] = int(fields[3])
    return dict(qrels)


def draw_pool(args, qrels, digests):
    """A folder in the cache with corpus/<lang>.jsonl: every judged passage and a random --pool-sample of the others.

    The draw hangs on seed, language and docid alone. Memory holds the pool, not the corpus.
    """
    kept = {lang: sorted({docid for judged in of_lang.values() for docid in judged}) for lang, of_lang in qrels.items()}
    key = json.dumps([kept, args.pool_sample, args.seed, digests], sort_keys=True)
    folder = Path(args.cache) / "pools" / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    for lang in qrels:
        path, judged = folder / "corpus" / f"{lang}.jsonl", set(kept[lang])
        if path.is_file():
            continue
        lines, sample, row = {}, [], 0  # sample: heap of (-hash, row, line), so that its head is the first to leave
        for file in corpus_files(args.data, lang):
            for number, line in read_lines(file):
                passage = parse_line(file, number, line)
                check_passage(passage, f"{file}:{number}")
                docid, line, row = passage["docid"], line.rstrip(b"\n") + b"\n", row + 1
                if docid in judged:
                    lines[row] = line
                    continue
                drawn = int.from_bytes(hashlib.blake2b(f"{args.seed}:{lang}:{docid}".encode(), digest_size=8).digest())
                (heapq.heappush if len(sample) < args.pool_sample else heapq.heappushpop)(sample, (-drawn, row, line))
        lines |= {row: line for _, row, line in sample}
        with atomic(path) as temporary:
            temporary.write_bytes(b"".join(lines[row] for row in sorted(lines)))
    return folder


def run_lines(ranking, tag):
    """TREC run lines of {query_id: [(docid, score)]}, ranked as trec_eval ranks them whatever the rank column says.

    That is by score as a float32, ties by docid descending; scores have six decimals.
    """
    for query_id, hits in ranking.items():
        hits = [(docid, f"{score:.6f}") for docid, score in hits]
        for rank, (docid, score) in enumerate(sorted(hits, key=lambda h: (np.float32(h[1]), h[0]), reverse=True), 1):
            if len(f"{query_id} {docid}".split()) != 2:
                raise DataError(f"query {query_id!r}, passage {docid!r}: white space in an id cannot be written as a TREC run; "
                                "rename it in the source")
            yield f"{query_id} Q0 {docid} {rank} {score} {tag}\n"


def run_name(name, lang):
    return f"{name.replace('/', '_')}.{lang}.trec"


def read_run(path):
    """{query_id: {docid: score}} of a TREC run file."""
    ranking = defaultdict(dict)
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            query_id, _, docid, _, score, _ = line.split()
            ranking[query_id][docid] = float(score)
    return dict(ranking)


def measure(qrels, ranking):
    """{query_id: {measure: value}} for every query of the qrels that has a relevant passage; one without results counts 0."""
    import pytrec_eval
    asked = [q for q, judged in qrels.items() if any(r > 0 for r in judged.values())]
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, set(MEASURES.values()))
    values = evaluator.evaluate({q: hits for q, hits in ranking.items() if hits})
    return {q: {name: values.get(q, {}).get(key, 0.0) for name, key in MEASURES.items()} for q in asked}


def evaluate(model, name, args, queries, qrels, digests, data):
    """{lang: {query_id: {measure: value}}} of one model, loaded at most once; makes the run files that are missing."""
    tokenizer = args.bm25_tokenizer if model == "bm25" else None
    ensemble, results = None, {}
    for lang in sorted(qrels):
        path = Path(args.out) / "runs" / run_name(name, lang)
        # what this run file hangs on, and no more: it outlives other models, languages and baselines
        own = Namespace(overwrite=args.overwrite, model=name, bm25_terms=tokenizer and short_name(tokenizer), limit=args.limit,
                        depth=args.depth, query_max_len=args.query_max_len, passage_max_len=args.passage_max_len,
                        pool=args.pool == "judged" and [args.pool_sample, args.seed], corpus=digests[lang])
        output = Output(own, [Path(args.data) / f"{args.split}.jsonl", Path(args.data) / "qrels" / args.split / f"{lang}.tsv"],
                        [m for m in (model, tokenizer) if m], out=path)
        if not output.is_done():
            ensemble = ensemble or Ensemble([model], data, args.cache, device=args.device, bm25_tokenizer=tokenizer,
                                            query_max_len=args.query_max_len, passage_max_len=args.passage_max_len)
            asked = [q for q in qrels[lang] if q in queries[lang]]
            hits, _ = ensemble.search(lang, [queries[lang][q] for q in asked], args.depth)
            tag = path.name.removesuffix(f".{lang}.trec") + ("-judged-pool" if args.pool == "judged" else "")
            output.write_lines(run_lines({q: [(h["docid"], h["score"]) for h in found] for q, found in zip(asked, hits)}, tag))
        results[lang] = measure(qrels[lang], read_run(path))
    return results


# --------------------------------------------------------------------------- significance and table

def paired_p(difference):
    """Two-sided p of the paired t-test for (N,) differences of the same queries; 1 where it is not defined."""
    from scipy.stats import ttest_1samp
    if len(difference) < 2 or not difference.any():
        return 1.0
    return 0.0 if np.ptp(difference) == 0 else float(f"{ttest_1samp(difference, 0).pvalue:.3g}")


def significance(model, baseline, seed):
    """Paired t-test and bootstrap interval of nDCG@10: {avg_diff, p, ci95, by_lang} for two {lang: {query: {measure: x}}}.

    avg_diff is the difference of the averages over languages, ci95 its interval when queries are drawn again within each
    language; p is of the t-test over the queries of all languages, each counting the same.
    """
    differences = {lang: np.array([values["ndcg@10"] - baseline[lang][q]["ndcg@10"] for q, values in of_lang.items()])
                   for lang, of_lang in model.items()}
    draw = np.random.default_rng(seed)
    means = {lang: d[draw.integers(len(d), size=(DRAWS, len(d)))].mean(1) for lang, d in differences.items()}  # (DRAWS,) each
    interval = lambda drawn: [round(float(x), 5) for x in np.percentile(drawn, [2.5, 97.5])]  # noqa: E731
    return {"avg_diff": round(float(np.mean([d.mean() for d in differences.values()])), 5),
            "p": paired_p(np.concatenate(list(differences.values()))), "ci95": interval(np.mean(list(means.values()), axis=0)),
            "by_lang": {lang: {"diff": round(float(d.mean()), 5), "p": paired_p(d), "ci95": interval(means[lang])}
                        for lang, d in differences.items()}}


def table(result):
    """The result as text: a row a language, nDCG@10 / Recall@100 of each model."""
    settings, metrics = result["settings"], result["models"]
    names = list(metrics)
    langs = [lang for lang in metrics[names[0]] if lang != "avg"]
    zero_shot = settings["zero_shot"]
    width = max(18, *(len(n) + 2 for n in names))
    lines = ["nDCG@10 / Recall@100 (%)" + (f", {settings['pool_note']}" if settings["pool"] == "judged" else ""),
             f"{'lang':<8}{'queries':>8}" + "".join(f"{n:>{width}}" for n in names)]
    for lang in [*langs, "avg"]:
        cells = [f"{100 * metrics[n][lang]['ndcg@10']:.1f} / {100 * metrics[n][lang]['recall@100']:.1f}" for n in names]
        mark = "*" if lang in zero_shot else ""
        lines.append(f"{lang + mark:<8}{metrics[names[0]][lang]['queries']:>8}" + "".join(f"{c:>{width}}" for c in cells))
    if zero_shot:
        lines.append("* zero-shot: no training queries in this language")
    for name, test in result["tests"].items():
        lines.append(f"{name} - {test['vs']}: {100 * test['avg_diff']:+.1f} nDCG@10, 95% interval {100 * test['ci95'][0]:+.1f} to "
                     f"{100 * test['ci95'][1]:+.1f}, paired t-test p = {test['p']:.3g}" + (" (significant)" if test["p"] < 0.05 else ""))
    return "\n".join(lines)


def names_of(models):
    """{model: its name in tables and files}: the folder's name or hub id, with the folder above it where two are the same."""
    short = [short_name(m) for m in models]
    names = {m: n if short.count(n) == 1 else "/".join(Path(m).resolve().parts[-2:]) for m, n in zip(models, short)}
    if len(set(names.values())) < len(models):
        raise DataError(f"--models: two of {' '.join(models)} have the same name; rename a folder")
    return names


def read_questions(args, queries_path):
    """({lang: {query_id: text}}, {lang: {query_id: {docid: relevance}}}) of the split, cut to --limit queries a language."""
    queries = defaultdict(dict)
    for record in read_queries(queries_path, args.lang):
        if not args.limit or len(queries[record["lang"]]) < args.limit:
            queries[record["lang"]][record["query_id"]] = record["query"]
    qrels = {}
    for lang in sorted(queries):
        path = Path(args.data) / "qrels" / args.split / f"{lang}.tsv"
        qrels[lang] = {q: judged for q, judged in read_qrels(path).items() if not args.limit or q in queries[lang]}
        answerable = {q for q, judged in qrels[lang].items() if any(r > 0 for r in judged.values())}
        if not answerable:
            raise DataError(f"{path}: no query with a relevant passage; make it again, or leave {lang} out with --lang")
        if answerable - set(queries[lang]):
            say(f"{path}: {len(answerable - set(queries[lang]))} queries are not in {queries_path}; they count 0")
    return queries, qrels


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.baseline and args.baseline not in args.models:
        raise DataError(f"--baseline {args.baseline} is not among --models")
    if args.depth < 100:
        raise DataError(f"--depth {args.depth}: Recall@100 needs at least 100")
    names = names_of(args.models)
    if "bm25" in args.models and not args.bm25_tokenizer:
        args.bm25_tokenizer = next((m for m in args.models if m != "bm25"), None)
    queries_path = Path(args.data) / f"{args.split}.jsonl"
    queries, qrels = read_questions(args, queries_path)
    corpus = {lang: corpus_files(args.data, lang) for lang in qrels}
    qrels_files = [Path(args.data) / "qrels" / args.split / f"{lang}.tsv" for lang in qrels]
    output = Output(args, [queries_path, *qrels_files, *(p for of_lang in corpus.values() for p in of_lang)],
                    args.models, out=Path(args.out) / "metrics.json")
    runs = [Path(args.out) / "runs" / run_name(name, lang) for name in names.values() for lang in qrels]
    if output.is_done() and all(path.is_file() for path in runs):
        print(table(json.loads(output.path.read_text("utf-8"))))
        return
    digest = {i["path"]: i["digest"] for i in output.meta["inputs"]}
    digests = {lang: [digest[str(p)] for p in of_lang] for lang, of_lang in corpus.items()}
    train = Path(args.data) / "train.jsonl"
    trained = {r["lang"] for r in read_queries(train)} if train.is_file() else set()
    settings = {"data": args.data, "split": args.split, "depth": args.depth, "limit": args.limit, "baseline": names.get(args.baseline),
                "zero_shot": sorted(lang for lang in qrels if trained and lang not in trained), "pool": args.pool}
    data = args.data
    if args.pool == "judged":
        data = draw_pool(args, qrels, digests)
        settings |= {"pool_sample": args.pool_sample, "pool_note": "JUDGED POOL, not the whole corpus: judged passages and up to "
                     f"{args.pool_sample} drawn ones a language; higher than on the whole corpus, compare only with the same pool"}
    values, metrics = {}, {}
    for model, name in names.items():
        values[name] = found = evaluate(model, name, args, queries, qrels, digests, data)
        rows = {lang: {m: round(float(np.mean([v[m] for v in of_lang.values()])), 5) for m in MEASURES} | {"queries": len(of_lang)}
                for lang, of_lang in found.items()}
        rows["avg"] = {m: round(float(np.mean([rows[lang][m] for lang in found])), 5) for m in MEASURES}
        rows["avg"]["queries"] = sum(len(v) for v in found.values())
        metrics[name] = rows
        say(f"{name}: nDCG@10 {100 * rows['avg']['ndcg@10']:.1f}, Recall@100 {100 * rows['avg']['recall@100']:.1f}")
    baseline = names.get(args.baseline)
    tests = {n: {"vs": baseline, **significance(values[n], values[baseline], args.seed)} for n in values if baseline and n != baseline}
    result = {"settings": settings, "models": metrics, "tests": tests}
    output.write_lines([json.dumps(result, ensure_ascii=False, indent=1) + "\n"])
    print(table(result))
    output.finish(models=len(metrics), languages=len(qrels), queries=sum(map(len, queries.values())))


if __name__ == "__main__":
    run(main)
