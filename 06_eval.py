"""Evaluate models and BM25: nDCG@10 and Recall@100 by language and on average, with significance (Sec. 4).

Source  Sec. 4.1: MIRACL's metrics by trec_eval's own code (pytrec_eval) of what the run files hold;
        significance at p < 0.05: not the paper's t-test over all queries, which counts a language by its
        queries, but a bootstrap of the average over languages, with Holm's correction over all tests
Reads   DATA/qrels/<split>/<lang>.tsv, DATA/<split>.jsonl (query texts), DATA/corpus/<lang>.jsonl[.gz]
Writes  OUT/metrics.json, OUT/runs/<model>.<lang>.trec; the table goes to stdout
Usage   python 06_eval.py --data data/sample --models bm25 models/sample runs/sample/model \\
            --baseline models/sample --out runs/sample/eval
Cost    one embedding a passage and model, cached; finished runs stay when models or languages are added
"""
import json
import re
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytrec_eval

from common import (DataError, Output, Parser, corpus_files, fetch_passages, normalise, parse_line,
                    passage_text, positive_int, read_json, read_lines, read_qrels, read_queries, run, say,
                    short_name, text_key)
from encoder import encoder_flags, flags_given, model_digests
from search import Ensemble

MEASURES = {"ndcg@10": "ndcg_cut_10", "recall@100": "recall_100"}
DRAWS = 10_000  # bootstrap samples behind intervals and p, so that p is at least 0.0002
BLOCK = 1_000   # of them at once


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--data", required=True, metavar="FOLDER", help="made by 00_prepare_data.py")
    parser.add_argument("--split", default="dev", help="use DATA/SPLIT.jsonl and DATA/qrels/SPLIT")
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL_OR_bm25",
                        help="model folders, hub ids, and bm25")
    parser.add_argument("--baseline", nargs="+", default=[], metavar="MODEL",
                        help="some of --models, against each of which the others are tested (p < 0.05)")
    parser.add_argument("--min-relevance", type=positive_int, default=1, metavar="GRADE",
                        help="what is judged so or higher counts in recall; nDCG counts every grade")
    parser.add_argument("--depth", type=positive_int, default=100, help="passages per query in the run files")
    parser.add_argument("--bm25-tokenizer", metavar="MODEL",
                        help="its sub-words are BM25's terms; default: the first model's")
    parser.add_argument("--cache", default="cache", metavar="FOLDER", help="embeddings are kept here")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for metrics.json and runs/")
    encoder_flags(parser)
    return parser


def check_flags(args):
    """DataError where flags do not fit together; fills in those that hang on others."""
    args.baseline = list(dict.fromkeys(args.baseline))
    for baseline in args.baseline:
        if baseline not in args.models:
            raise DataError(f"--baseline {baseline} is not among --models; add it there")
    args.bm25_tokenizer = args.bm25_tokenizer or next((m for m in args.models if m != "bm25"), None)
    if args.depth < 100:
        raise DataError(f"--depth {args.depth}: Recall@100 needs at least 100; raise it")
    flags_given(args, args.models)  # DataError where --settings names none of them
    data = Path(args.data).absolute()
    made = read_json(data.with_name(f"{data.name}.meta.json")).get("arguments", {})
    if made.get("min_relevance", args.min_relevance) != args.min_relevance:
        say(f"--min-relevance {args.min_relevance} here, {made['min_relevance']} when {args.data} was made")


def names_of(models):
    """{model: its name in tables and files}: short, with the folder above it where two are the same."""
    short = [short_name(model) for model in models]
    names = {model: name if short.count(name) == 1 else "/".join(Path(model).absolute().parts[-2:])
             for model, name in zip(models, short)}
    if len(set(map(run_name, names.values()))) < len(models):
        raise DataError(f"--models: two of {' '.join(models)} have the same name; rename a folder")
    return names


# --------------------------------------------------------------------------- questions and judgments

def answerable(qrels, least=1):
    """The queries that count: those with a passage whose relevance is at least `least`."""
    return [query_id for query_id, judged in qrels.items() if max(judged.values()) >= least]


def read_questions(args, queries_path, qrels_paths):
    """{lang: {query_id: text}} and {lang: {query_id: {docid: relevance}}}, --limit queries a language."""
    queries = defaultdict(dict)
    for record in read_queries(queries_path, args.lang, args.limit):
        queries[record["lang"]][record["query_id"]] = record["query"]
    qrels = {}
    for path in sorted(qrels_paths.glob("*.tsv")):
        if not (args.lang or path.stem in queries):
            say(f"{path}: no query of {queries_path} is in {path.stem}; left out")
    for lang in sorted(queries):
        path = qrels_paths / f"{lang}.tsv"
        judged = read_qrels(path)
        qrels[lang] = {q: judged[q] for q in judged if not args.limit or q in queries[lang]}
        asked = answerable(qrels[lang], args.min_relevance)
        if not asked:
            raise DataError(f"{path}: no query with a relevant passage; make it again, or leave {lang} out")
        n_unknown = len(set(asked) - set(queries[lang]))
        if n_unknown:
            say(f"{path}: {n_unknown} queries are not in {queries_path}; they count 0")
        n_left_out = len(queries[lang].keys() - set(asked))
        if n_left_out:
            say(f"{queries_path}: {n_left_out} {lang} queries have no relevant passage in {path}; left out")
    return queries, qrels


# --------------------------------------------------------------------------- runs and measures

def run_name(name):
    """Of a model in the names of files and in the lines of a run, whose columns blanks would shift."""
    return re.sub(r"[\s/]", "_", name)


def run_path(out, name, lang):
    return Path(out) / "runs" / f"{run_name(name)}.{lang}.trec"


def run_lines(ranking, tag):
    """TREC run lines of {query_id: [(docid, row, score)]}, in trec_eval's order, which reads no rank:

    by score (of six decimals, as a float32), ties by docid descending.
    """
    for query_id, hits in ranking.items():
        for text in [query_id, *(docid for docid, _, _ in hits)]:
            if text.split() != [text]:
                raise DataError(f"query {query_id!r}: white space in the id {text!r} cannot be written as a "
                                "TREC run; rename it in the source")
        scores = np.array([score for _, _, score in hits], np.float32).tolist()
        ranked = sorted(((read, docid, score) for read, (docid, _, score) in zip(scores, hits)), reverse=True)
        for rank, (_, docid, score) in enumerate(ranked, 1):
            yield f"{query_id} Q0 {docid} {rank} {score:.6f} {tag}\n"


def without_itself(lang, queries, hits, args):
    """Each query's hits (docid, row, score) without the passage that is the query itself (ArguAna):

    it has the query's id and text.
    """
    own = {row: q for q, found in zip(queries, hits) for docid, row, _ in found if docid == q}
    passages = fetch_passages(args.data, lang, own) if own else {}
    itself = {(own[row], passage["docid"]) for row, passage in passages.items()
              if normalise(queries[own[row]]) in (text_key(passage), normalise(passage_text(passage)))}
    if itself:
        say(f"{lang}: {len(itself)} queries found themselves, which is left out")
    return [[hit for hit in found if (q, hit[0]) not in itself][:args.depth]
            for q, found in zip(queries, hits)]


def make_runs(model, name, args, queries, qrels, inputs, digests):
    """([meta], {lang: measures}) of a model's run files, made where they are missing; it is loaded once.

    A run hangs on what is in `own` and its inputs alone: it outlives other models, languages and baselines.
    """
    tokenizer = args.bm25_tokenizer if model == "bm25" else None
    reading = flags_given(args, args.models)
    own = {key: getattr(args, key) for key in ("overwrite", "limit", "depth", "min_relevance")} | reading
    own |= {"model": name, "bm25_terms": tokenizer and short_name(tokenizer)}
    models = model_digests([model, tokenizer])
    ensemble = None
    metas = []
    values = {}
    for lang in inputs:
        output = Output(Namespace(**own, corpus=digests[lang]), inputs[lang], models,
                        run_path(args.out, name, lang))
        if output.is_done():
            values[lang] = measure_run(qrels[lang], output.path, args.min_relevance)
        else:
            ensemble = ensemble or Ensemble([model], args.data, args.cache, bm25_tokenizer=tokenizer,
                                            **reading)
            texts = list(queries[lang].values())
            ensemble.ask(texts)
            hits, = ensemble.rank(lang, texts, args.depth + 1).values()
            hits = without_itself(lang, queries[lang], hits, args)
            for settings, cut in ensemble.encodings({lang: texts}).values():
                output.meta |= {"encoder": settings, "cut": cut}
            judged = {docid for of_query in qrels[lang].values() for docid, grade in of_query.items()
                      if grade >= args.min_relevance}
            lost = ensemble.not_in_corpus(lang, judged)
            if lost == judged:
                raise DataError(f"{inputs[lang][1]}: the corpus has none of the {len(judged)} relevant "
                                f"passages, such as {min(lost)}; take files that belong together")
            output.meta["not_in_corpus"] = len(lost)
            ranking = dict(zip(queries[lang], hits))
            output.write_lines(run_lines(ranking, run_name(name)))
            values[lang] = measure(qrels[lang], scores_of(ranking), args.min_relevance)
        metas.append(json.loads(output.meta_path.read_text("utf-8")))
    return metas, values


def scores_of(ranking):
    """{query_id: {docid: score}} of {query_id: [(docid, row, score)]}: what its run file holds."""
    return {query_id: {docid: score for docid, _, score in hits} for query_id, hits in ranking.items()}


def measure(qrels, run, least=1):
    """{query_id: {measure: value}} of each query with a relevant passage; one without results counts 0."""
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, set(MEASURES.values()), relevance_level=least)
    values = evaluator.evaluate({query_id: hits for query_id, hits in run.items() if hits})
    return {query_id: {name: values.get(query_id, {}).get(key, 0.0) for name, key in MEASURES.items()}
            for query_id in answerable(qrels, least)}


def measure_run(qrels, path, least=1):
    with open(path, encoding="utf-8") as lines:
        return measure(qrels, pytrec_eval.parse_run(lines), least)


def mean(values):
    return round(float(np.mean(list(values))), 5)


def averages(values):
    """{lang or "avg": {measure: mean, queries: n}}; avg is the mean over languages."""
    rows = {lang: {name: mean(v[name] for v in of_lang.values()) for name in MEASURES}
            | {"queries": len(of_lang)} for lang, of_lang in values.items()}
    avg = {name: mean(row[name] for row in rows.values()) for name in MEASURES}
    return rows | {"avg": avg | {"queries": sum(map(len, values.values()))}}


# --------------------------------------------------------------------------- significance and table

def bootstrap(differences, seed):
    """{lang or "avg": {diff, ci95, p}} for {lang: (S, N) differences of S runs and N queries}.

    diff is the mean over the queries of a language, for "avg" the mean over languages. Each draw takes, with
    replacement, S of the runs (training seeds) and N of each language's queries; the interval and the
    two-sided p are of the same draws.
    """
    rng = np.random.default_rng(seed)
    n_runs = len(next(iter(differences.values())))
    runs = rng.integers(n_runs, size=(DRAWS, n_runs))                                      # (B, S)
    drawn = {}
    for lang, values in differences.items():
        n = values.shape[1]
        means = [values[:, rng.integers(n, size=(BLOCK, n))].mean(2).T for _ in range(DRAWS // BLOCK)]
        drawn[lang] = np.take_along_axis(np.concatenate(means), runs, 1).mean(1)           # (B,)
    drawn["avg"] = np.mean(list(drawn.values()), axis=0)
    diff = {lang: values.mean() for lang, values in differences.items()}
    diff["avg"] = np.mean(list(diff.values()))
    found = {}
    for lang, of_lang in drawn.items():
        low, high = np.percentile(of_lang, [2.5, 97.5])
        n_beyond = 1 + min((of_lang <= 0).sum(), (of_lang >= 0).sum())
        p = min(1, 2 * n_beyond / (1 + DRAWS))
        found[lang] = {"diff": round(float(diff[lang]), 5), "p": round(float(p), 5),
                       "ci95": [round(float(low), 5), round(float(high), 5)]}
    return found


def holm(p_values):
    """The p of several tests after Holm's correction (1979), in their order."""
    from statsmodels.stats.multitest import multipletests
    return multipletests(p_values, method="holm")[1].round(5).tolist()


def significance(values, baselines, seed):
    """A test of each model against each baseline, for {model: {lang: {query_id: {measure: value}}}}."""
    ndcg = {model: {lang: np.array([[of_query["ndcg@10"] for of_query in of_lang.values()]])  # (1, N)
                    for lang, of_lang in of_model.items()} for model, of_model in values.items()}
    tests = []
    for number, baseline in enumerate(baselines):
        for model in values:
            if model not in baselines[:number + 1]:  # a pair of baselines is one test
                differences = {lang: ndcg[model][lang] - ndcg[baseline][lang] for lang in ndcg[model]}
                found = bootstrap(differences, seed)
                tests.append({"model": model, "vs": baseline, **found.pop("avg"), "by_lang": found})
    for test, p in zip(tests, holm([test["p"] for test in tests])):
        test["p_holm"] = p
    return tests


def table(result):
    """The result as text: a row a language, nDCG@10 / Recall@100 of each model, and what to know of it."""
    settings = result["settings"]
    metrics = result["models"]
    width = max(18, *(len(name) + 2 for name in metrics))
    lines = ["nDCG@10 / Recall@100 (%)",
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
    if settings["bm25_terms"]:
        lines.append(f"bm25's terms are the sub-words of {settings['bm25_terms']}")
    if settings["min_relevance"] > 1:
        lines.append(f"relevant is what is judged {settings['min_relevance']} or higher")
    lost = ", ".join(f"{lang} {n}" for lang, n in settings["not_in_corpus"].items() if n)
    if lost:
        lines.append(f"relevant passages that the corpus has not, so nothing finds them: {lost}")
    for test in result["tests"]:
        low, high = test["ci95"]
        mark = " (significant)" if test["p_holm"] < 0.05 else ""
        lines.append(f"{test['model']} - {test['vs']}: {100 * test['diff']:+.1f} nDCG@10, 95% interval "
                     f"{100 * low:+.1f} to {100 * high:+.1f}, p = {test['p_holm']:.2g}{mark}")
    if result["tests"]:
        lines.append("interval and p: bootstrap over the queries of each language; p by Holm's correction")
    return "\n".join(lines)


def describe(args, baselines, qrels):
    """The settings that metrics.json begins with."""
    train = Path(args.data) / "train.jsonl"
    told = args.lang[0] if len(args.lang or ()) == 1 else None  # where the records do not say
    lines = read_lines(train) if train.is_file() else ()
    trained = {parse_line(train, *line).get("lang", told) for line in lines} or qrels
    settings = {key: getattr(args, key) for key in ("data", "split", "depth", "limit", "min_relevance")}
    terms = args.bm25_tokenizer and short_name(args.bm25_tokenizer) if "bm25" in args.models else None
    zero_shot = [lang for lang in qrels if lang not in trained]
    return settings | {"baselines": baselines, "zero_shot": zero_shot, "bm25_terms": terms, "encoders": {},
                       "cut": {}}


def main(argv=None):
    args = build_parser().parse_args(argv)
    check_flags(args)
    names = names_of(args.models)
    queries_path = Path(args.data) / f"{args.split}.jsonl"
    qrels_paths = Path(args.data) / "qrels" / args.split
    queries, qrels = read_questions(args, queries_path, qrels_paths)
    asked = {lang: {q: queries[lang][q] for q in qrels[lang] if q in queries[lang]} for lang in qrels}
    inputs = {lang: [queries_path, qrels_paths / f"{lang}.tsv"] for lang in qrels}
    corpus = {lang: corpus_files(args.data, lang) for lang in qrels}
    train = [path for path in [Path(args.data) / "train.jsonl"] if path.is_file()]  # tells what is zero-shot
    output = Output(args, [path for lang in qrels for path in inputs[lang] + corpus[lang]] + train,
                    model_digests([*args.models, args.bm25_tokenizer]), Path(args.out) / "metrics.json")
    done = output.is_done()
    digest = {entry["path"]: entry["digest"] for entry in output.meta["inputs"]}
    digests = {lang: [digest[str(path)] for path in paths] for lang, paths in corpus.items()}
    baselines = [names[model] for model in args.baseline]
    settings = describe(args, baselines, qrels)
    values = {}
    for model, name in names.items():
        metas, values[name] = make_runs(model, name, args, asked, qrels, inputs, digests)
        settings["not_in_corpus"] = {lang: meta.get("not_in_corpus", 0) for lang, meta in zip(qrels, metas)}
        if model != "bm25":
            settings["encoders"][name] = metas[0]["encoder"]
            settings["cut"][name] = {k: sum(m["cut"][k] for m in metas) for k in ("query", "passage")}
    tests = significance(values, baselines, args.seed)
    result = {"settings": settings, "models": {n: averages(v) for n, v in values.items()}, "tests": tests}
    if not done:
        output.write_lines([json.dumps(result, ensure_ascii=False, indent=1) + "\n"])
        output.finish(models=len(names), languages=len(qrels), queries=sum(map(len, queries.values())))
    print(table(result))


if __name__ == "__main__":
    run(main)
