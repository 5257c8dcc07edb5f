"""Evaluate models and BM25: nDCG@10 and Recall@100 by language and on average, with significance (Sec. 4).

Source  Sec. 4.1: MIRACL's metrics by trec_eval's own code (pytrec_eval) from the run files as they are;
        paired t-test over all queries, p < 0.05; a bootstrap interval of the average over languages
Reads   DATA/qrels/<split>/<lang>.tsv, DATA/<split>.jsonl (query texts), DATA/corpus/<lang>.jsonl[.gz]
Writes  OUT/metrics.json, OUT/runs/<model>.<lang>.trec; the table goes to stdout
Usage   python 06_eval.py --data data/sample --models bm25 models/sample runs/sample/model \\
            --baseline models/sample --out runs/sample/eval
Cost    one embedding a passage and model, cached; finished runs stay when models or languages are added
"""
import hashlib
import json
from argparse import Namespace
from array import array
from collections import defaultdict
from pathlib import Path

import numpy as np

from common import (DataError, Output, Parser, atomic, corpus_files, dump, fetch_passages, positive_int,
                    read_lines, read_passages, read_queries, read_shards, run, say, short_name)
from encoder import encoder_flags, flags_given
from search import Ensemble, check_settings

MEASURES = {"ndcg@10": "ndcg_cut_10", "recall@100": "recall_100"}
DRAWS = 1000  # bootstrap samples behind the 95% interval


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--data", required=True, metavar="FOLDER", help="made by 00_prepare_data.py")
    parser.add_argument("--split", default="dev", help="use DATA/SPLIT.jsonl and DATA/qrels/SPLIT")
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL_OR_bm25",
                        help="model folders, hub ids, and bm25")
    parser.add_argument("--baseline", metavar="MODEL",
                        help="one of --models; the others are tested against it (p < 0.05, Sec. 4.1)")
    parser.add_argument("--pool", choices=["full", "judged"], default="full",
                        help="search the whole corpus, or, for a quick look, only judged passages and "
                             "--pool-sample others: scores are too high, comparable within one pool only")
    parser.add_argument("--pool-sample", type=positive_int, default=10_000, metavar="N",
                        help="unjudged passages drawn for --pool judged, a language")
    parser.add_argument("--depth", type=positive_int, default=100, help="passages per query in the run files")
    parser.add_argument("--bm25-tokenizer", metavar="MODEL",
                        help="its sub-words are BM25's terms; default: the first model's")
    parser.add_argument("--cache", default="cache", metavar="FOLDER", help="embeddings are kept here")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for metrics.json and runs/")
    encoder_flags(parser)
    return parser


def check_flags(args):
    if args.baseline and args.baseline not in args.models:
        raise DataError(f"--baseline {args.baseline} is not among --models")
    if args.depth < 100:
        raise DataError(f"--depth {args.depth}: Recall@100 needs at least 100")
    check_settings(args.settings, args.models)


def names_of(models):
    """{model: its name in tables and files}: short, with the folder above it where two are the same."""
    short = [short_name(model) for model in models]
    names = {model: name if short.count(name) == 1 else "/".join(Path(model).resolve().parts[-2:])
             for model, name in zip(models, short)}
    if len(set(names.values())) < len(models):
        raise DataError(f"--models: two of {' '.join(models)} have the same name; rename a folder")
    return names


# --------------------------------------------------------------------------- questions, judgments, pool

def read_qrels(path):
    """{query_id: {docid: relevance}} of a TREC qrels file."""
    qrels = defaultdict(dict)
    for number, line in read_lines(path):
        fields = line.decode("utf-8", "replace").split()
        if len(fields) != 4 or not fields[3].lstrip("-").isdecimal():
            raise DataError(f"{path}:{number}: got {len(fields)} fields, want 'query_id 0 docid relevance'; "
                            "check the file")
        qrels[fields[0]][fields[2]] = int(fields[3])
    return qrels


def answerable(qrels):
    """The queries that count: those with a relevant passage."""
    return [query_id for query_id, judged in qrels.items() if max(judged.values()) > 0]


def read_questions(args, queries_path, qrels_paths):
    """{lang: {query_id: text}} and {lang: {query_id: {docid: relevance}}}, --limit queries a language."""
    queries = defaultdict(dict)
    for record in read_queries(queries_path, args.lang, args.limit):
        queries[record["lang"]][record["query_id"]] = record["query"]
    qrels = {}
    for lang in sorted(queries):
        path = qrels_paths / f"{lang}.tsv"
        judged = read_qrels(path)
        qrels[lang] = {q: judged[q] for q in judged if not args.limit or q in queries[lang]}
        asked = answerable(qrels[lang])
        if not asked:
            raise DataError(f"{path}: no query with a relevant passage; make it again, or leave {lang} out")
        n_unknown = len(set(asked) - set(queries[lang]))
        if n_unknown:
            say(f"{path}: {n_unknown} queries are not in {queries_path}; they count 0")
    return queries, qrels


def draw_pool(args, qrels, digests):
    """A folder in the cache with corpus/<lang>.jsonl: every judged passage and --pool-sample others."""
    key = json.dumps([qrels, args.pool_sample, args.seed, digests], sort_keys=True)
    folder = Path(args.cache) / "pools" / hashlib.blake2b(key.encode()).hexdigest()[:32]
    for lang, of_lang in qrels.items():
        path = folder / "corpus" / f"{lang}.jsonl"
        if not path.is_file():
            judged = {docid for of_query in of_lang.values() for docid in of_query}
            passages = fetch_passages(args.data, lang, pool_rows(args, lang, judged)).values()
            with atomic(path) as temporary:
                temporary.write_text("".join(map(dump, passages)), "utf-8")
    return folder


def pool_rows(args, lang, judged):
    """Rows of the pool in a corpus; the draw hangs on seed, language and docid alone."""
    draws = array("Q")  # the judged have the smallest; memory holds eight bytes a passage
    for path, lines in read_shards(args.data, lang):
        for passage in read_passages(path, lines):
            digest = hashlib.blake2b(f"{args.seed}:{lang}:{passage['docid']}".encode()).digest()
            draws.append(0 if passage["docid"] in judged else int.from_bytes(digest[:8]))
    order = np.argsort(draws, kind="stable")
    return order[:draws.count(0) + args.pool_sample].tolist()


# --------------------------------------------------------------------------- runs and measures

def run_path(out, name, lang):
    return Path(out) / "runs" / f"{name.replace('/', '_')}.{lang}.trec"


def run_lines(ranking, tag):
    """TREC run lines of {query_id: [(docid, score)]}, in trec_eval's order, which reads no rank:

    by score (of six decimals, as a float32), ties by docid descending.
    """
    for query_id, hits in ranking.items():
        ranked = sorted(((np.float32(f"{score:.6f}"), docid, score) for docid, score in hits), reverse=True)
        for rank, (_, docid, score) in enumerate(ranked, 1):
            if len(f"{query_id} {docid}".split()) != 2:
                raise DataError(f"query {query_id!r}, passage {docid!r}: white space in an id cannot be "
                                "written as a TREC run; rename it in the source")
            yield f"{query_id} Q0 {docid} {rank} {score:.6f} {tag}\n"


def make_runs(model, name, args, queries, inputs, digests, data):
    """[meta] of a model's run files by language, made where they are missing; the model is loaded once.

    A run hangs on what is in `own` and its inputs alone: it outlives other models, languages and baselines.
    """
    tokenizer = args.bm25_tokenizer if model == "bm25" else None
    pool = [args.pool_sample, args.seed] if args.pool == "judged" else None
    reading = flags_given(args)
    own = {"overwrite": args.overwrite, "limit": args.limit, "depth": args.depth, **reading,
           "model": name, "pool": pool, "bm25_terms": tokenizer and short_name(tokenizer)}
    ensemble = None
    metas = []
    for lang in inputs:
        output = Output(Namespace(**own, corpus=digests[lang]), inputs[lang],
                        [m for m in (model, tokenizer) if m], run_path(args.out, name, lang))
        if not output.is_done():
            ensemble = ensemble or Ensemble([model], data, args.cache, bm25_tokenizer=tokenizer, **reading)
            hits, _ = ensemble.search(lang, list(queries[lang].values()), args.depth)
            ranking = {query_id: [(hit["docid"], hit["score"]) for hit in found]
                       for query_id, found in zip(queries[lang], hits)}
            for encoder, cut in ensemble.count_cut([lang], list(queries[lang].values())).items():
                output.meta |= {"encoder": ensemble.encoders[encoder].settings(), "cut": cut}
            output.write_lines(run_lines(ranking, name.replace("/", "_") + ("-judged-pool" if pool else "")))
        metas.append(json.loads(output.meta_path.read_text("utf-8")))
    return metas


def measure(qrels, ranking):
    """{query_id: {measure: value}} of each query with a relevant passage; one without results counts 0."""
    import pytrec_eval
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, set(MEASURES.values()))
    values = evaluator.evaluate({query_id: hits for query_id, hits in ranking.items() if hits})
    return {query_id: {name: values.get(query_id, {}).get(key, 0.0) for name, key in MEASURES.items()}
            for query_id in answerable(qrels)}


def measure_run(qrels, path):
    import pytrec_eval
    with open(path, encoding="utf-8") as lines:
        return measure(qrels, pytrec_eval.parse_run(lines))


def mean(values):
    return round(float(np.mean(list(values))), 5)


def averages(values):
    """{lang or "avg": {measure: mean, queries: n}}; avg is the mean over languages."""
    rows = {lang: {name: mean(v[name] for v in of_lang.values()) for name in MEASURES}
            | {"queries": len(of_lang)} for lang, of_lang in values.items()}
    avg = {name: mean(row[name] for row in rows.values()) for name in MEASURES}
    return rows | {"avg": avg | {"queries": sum(map(len, values.values()))}}


# --------------------------------------------------------------------------- significance and table

def paired_p(difference):
    """Two-sided p of the paired t-test for (N,) differences of one query each; 1 where it is not defined."""
    from scipy.stats import ttest_1samp
    if len(difference) < 2 or not difference.any():
        return 1.0
    return 0.0 if np.ptp(difference) == 0 else float(f"{ttest_1samp(difference, 0).pvalue:.3g}")


def interval(drawn):
    return [round(float(bound), 5) for bound in np.percentile(drawn, [2.5, 97.5])]


def significance(model, baseline, seed):
    """Paired t-test and bootstrap interval of nDCG@10 for two {lang: {query_id: {measure: value}}}.

    avg_diff is the difference of the averages over languages, ci95 its interval when queries are drawn again
    within each language; p is of the t-test over the queries of all languages, each counting the same.
    """
    rng = np.random.default_rng(seed)
    differences = {lang: np.array([of_lang[q]["ndcg@10"] - baseline[lang][q]["ndcg@10"] for q in of_lang])
                   for lang, of_lang in model.items()}
    drawn = {lang: d[rng.integers(len(d), size=(DRAWS, len(d)))].mean(1) for lang, d in differences.items()}
    by_lang = {lang: {"diff": mean(d), "p": paired_p(d), "ci95": interval(drawn[lang])}
               for lang, d in differences.items()}
    return {"avg_diff": mean(d.mean() for d in differences.values()),
            "p": paired_p(np.concatenate(list(differences.values()))),
            "ci95": interval(np.mean(list(drawn.values()), axis=0)), "by_lang": by_lang}


def table(result):
    """The result as text: a row a language, nDCG@10 / Recall@100 of each model, and what to know of it."""
    settings = result["settings"]
    metrics = result["models"]
    width = max(18, *(len(name) + 2 for name in metrics))
    lines = ["nDCG@10 / Recall@100 (%)" + (f", {settings['pool_note']}" if "pool_note" in settings else ""),
             f"{'lang':<8}{'queries':>8}" + "".join(f"{name:>{width}}" for name in metrics)]
    for lang, first in next(iter(metrics.values())).items():
        rows = [of_model[lang] for of_model in metrics.values()]
        cells = [f"{100 * row['ndcg@10']:.1f} / {100 * row['recall@100']:.1f}" for row in rows]
        mark = "*" if lang in settings["zero_shot"] else ""
        lines.append(f"{lang + mark:<8}{first['queries']:>8}" + "".join(f"{cell:>{width}}" for cell in cells))
    if settings["zero_shot"]:
        lines.append("* zero-shot: no training queries in this language")
    read = {name: encoder["max_len"] for name, encoder in settings["encoders"].items()}
    for name, limit in read.items():
        cut = settings["cut"][name]
        told = [f"{limit[kind]} tokens of a {kind} ({cut[kind]} were cut)" for kind in ("query", "passage")]
        lines.append(f"{name} reads at most {' and '.join(told)}")
    if len(set(map(str, read.values()))) > 1:
        lines.append("models were read at different lengths, which may be a part of a difference")
    for name, test in result["tests"].items():
        low, high = test["ci95"]
        mark = " (significant)" if test["p"] < 0.05 else ""
        lines.append(f"{name} - {test['vs']}: {100 * test['avg_diff']:+.1f} nDCG@10, 95% interval "
                     f"{100 * low:+.1f} to {100 * high:+.1f}, paired t-test p = {test['p']:.3g}{mark}")
    return "\n".join(lines)


def describe(args, baseline, qrels):
    """The settings that metrics.json begins with."""
    train = Path(args.data) / "train.jsonl"
    trained = {record["lang"] for record in read_queries(train)} if train.is_file() else qrels
    settings = {key: getattr(args, key) for key in ("data", "split", "depth", "limit", "pool")}
    settings |= {"baseline": baseline, "zero_shot": [lang for lang in qrels if lang not in trained]}
    if args.pool == "judged":
        settings |= {"pool_sample": args.pool_sample, "pool_note": (
            f"JUDGED POOL, not the whole corpus: judged passages and up to {args.pool_sample} drawn ones a "
            "language; higher than on the whole corpus, compare only with the same pool")}
    return settings | {"encoders": {}, "cut": {}}


def main(argv=None):
    args = build_parser().parse_args(argv)
    check_flags(args)
    names = names_of(args.models)
    args.bm25_tokenizer = args.bm25_tokenizer or next((m for m in args.models if m != "bm25"), None)
    queries_path = Path(args.data) / f"{args.split}.jsonl"
    qrels_paths = Path(args.data) / "qrels" / args.split
    queries, qrels = read_questions(args, queries_path, qrels_paths)
    asked = {lang: {q: queries[lang][q] for q in qrels[lang] if q in queries[lang]} for lang in qrels}
    inputs = {lang: [queries_path, qrels_paths / f"{lang}.tsv"] for lang in qrels}
    corpus = {lang: corpus_files(args.data, lang) for lang in qrels}
    output = Output(args, [path for lang in qrels for path in inputs[lang] + corpus[lang]], args.models,
                    Path(args.out) / "metrics.json")
    done = output.is_done()
    digest = {entry["path"]: entry["digest"] for entry in output.meta["inputs"]}
    digests = {lang: [digest[str(path)] for path in paths] for lang, paths in corpus.items()}
    data = draw_pool(args, qrels, digests) if args.pool == "judged" else args.data
    baseline = names.get(args.baseline)
    settings = describe(args, baseline, qrels)
    values = {}
    for model, name in names.items():
        metas = make_runs(model, name, args, asked, inputs, digests, data)
        values[name] = {lang: measure_run(qrels[lang], run_path(args.out, name, lang)) for lang in qrels}
        if model != "bm25":
            settings["encoders"][name] = metas[0]["encoder"]
            settings["cut"][name] = {k: sum(m["cut"][k] for m in metas) for k in ("query", "passage")}
    tests = {name: {"vs": baseline, **significance(values[name], values[baseline], args.seed)}
             for name in values if baseline and name != baseline}
    result = {"settings": settings, "models": {n: averages(v) for n, v in values.items()}, "tests": tests}
    if not done:
        output.write_lines([json.dumps(result, ensure_ascii=False, indent=1) + "\n"])
        output.finish(models=len(names), languages=len(qrels), queries=sum(map(len, queries.values())))
    print(table(result))


if __name__ == "__main__":
    run(main)
