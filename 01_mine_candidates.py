"""Mine hard-negative candidates for each training query with an ensemble of retrievers (Sec. 3.3).

Source  Sec. 3.3: V = E(f_1) o ... o E(f_z) scores the passages, the top k = 40 minus the positives are the candidates.
        Table 2: the five usual strategies, which write negative_passages directly, so that stages 04 and 05 can follow.
        E, the feature layer, is left open there: here it is the L2-normalised embedding, so the score of the
        concatenation is the (weighted) sum of cosines - exact, and nothing to train.
Reads   DATA/train.jsonl, DATA/corpus/<lang>.jsonl[.gz]
Writes  candidates.jsonl: the records + candidate_passages [{docid, title, text, score, scores, ranks}], best first
Usage   python 01_mine_candidates.py --data data/sample --retrievers bm25 models/sample --fusion rrf --out runs/sample/candidates.jsonl
        torchrun --nproc-per-node 8 01_mine_candidates.py ...   the same bytes; nodes share the --cache folder
Cost    embeddings are cached by model, settings and corpus shard: another depth, strategy, fusion or weight encodes nothing
"""
import tempfile
from collections import Counter, defaultdict

import numpy as np

from common import (DataError, Output, Parser, corpus_files, dump, fetch_passages, normalise, positive_int,
                    read_queries, run, say)
from encoder import SETTINGS_HELP
from search import Ensemble, world

EXTRA = 24  # passages asked for beyond --depth at first, to stand in for those that are not allowed

# Table 2, with the paper's best settings as defaults. "percent" and "margin" look at the lowest-scored positive.
BASELINES = {"topk": "the top k as they are", "shifted": "the top k after skipping --shift",
             "abs": "the best that score under --max-score", "margin": "the best under the positive's score minus --margin",
             "percent": "the best under --percent of the positive's score"}


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a folder made by 00_prepare_data.py")
    parser.add_argument("--queries", metavar="FILE", help="other training queries than DATA/train.jsonl")
    parser.add_argument("--retrievers", nargs="+", required=True, metavar="MODEL_OR_bm25",
                        help="model folders, hub ids, and bm25; the paper: intfloat/multilingual-e5-large BAAI/bge-m3")
    parser.add_argument("--weights", nargs="+", type=float, help="weight of each retriever in the fusion; default: 1 each")
    parser.add_argument("--fusion", choices=["concat", "rrf"], default="concat",
                        help="concat: sum of cosines (Sec. 3.3); rrf: reciprocal ranks, needed with bm25")
    parser.add_argument("--depth", type=positive_int, default=40, help="candidates per query, k in Sec. 4.1")
    parser.add_argument("--strategy", choices=["ensemble", *BASELINES], default="ensemble",
                        help="ensemble: candidates for stage 02; the others, baselines of Table 2, write negatives: "
                             + "; ".join(f"{k}: {v}" for k, v in BASELINES.items()))
    parser.add_argument("--shift", type=int, default=10, help="ranks to skip under --strategy shifted (Table 2)")
    parser.add_argument("--max-score", type=float, default=0.6, help="score under --strategy abs (Table 2); several retrievers' "
                        "scores add up, --weights .5 .5 gives their mean")
    parser.add_argument("--margin", type=float, default=0.15, help="below the positive's score, --strategy margin (Table 2)")
    parser.add_argument("--percent", type=float, default=0.9, help="share of the positive's score, --strategy percent (Table 2)")
    parser.add_argument("--exclude-same-article", action="store_true",
                        help="no candidate from a positive's article (docids ARTICLE#PASSAGE)")
    parser.add_argument("--query-max-len", type=positive_int, default=64, help="tokens of a query that are read (Sec. 4.1)")
    parser.add_argument("--passage-max-len", type=positive_int, default=256, help="tokens of a passage that are read (Sec. 4.1)")
    parser.add_argument("--settings", nargs="+", default=[], metavar="[MODEL:]KEY=VALUE", help=SETTINGS_HELP)
    parser.add_argument("--bm25-tokenizer", metavar="MODEL", help="its sub-words are BM25's terms; default: the first dense retriever's")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--cache", default="cache", metavar="FOLDER", help="embeddings are kept here")
    parser.add_argument("--out", required=True, metavar="FILE", help="candidates.jsonl")
    return parser


def mine(ensemble, lang, records, depth, args, below=None):
    """For each record its `depth` best passages that are allowed: a list of [{docid, title, text, score, scores, ranks}].

    Never a labelled positive, under its own docid or another; with --exclude-same-article nothing from its article.
    below: (N,) only passages scoring less. Looks deeper for those records whose list is not full yet.
    """
    mined, rankings, pending, asked = [None] * len(records), None, list(range(len(records))), depth + EXTRA
    while pending:
        found, ranked = ensemble.search(lang, [records[i]["query"] for i in pending], asked, None if below is None else below[pending])
        rankings = rankings or ranked
        passages = fetch_passages(args.data, lang, {hit["row"] for hits in found for hit in hits})
        short = []
        for i, hits in zip(pending, found):
            positives = records[i]["positive_passages"]
            docids, texts = {p["docid"] for p in positives}, {normalise(p["text"]) for p in positives}
            articles = {article(d) for d in docids} if args.exclude_same_article else ()
            mined[i] = [passages[hit["row"]] | {k: hit[k] for k in ("score", "scores", "ranks")} for hit in hits
                        if hit["docid"] not in docids and normalise(passages[hit["row"]]["text"]) not in texts
                        and article(hit["docid"]) not in articles][:depth]
            if len(mined[i]) < depth and len(hits) == asked:
                short.append(i)
        pending, asked = short, 4 * asked
    return rankings, mined


def article(docid):
    return docid.rpartition("#")[0] or docid


def positive_scores(ensemble, lang, records):
    """(N,) the score of each record's lowest-scored positive; the corpus's vectors serve, others are encoded."""
    pairs = [(i, p) for i, record in enumerate(records) for p in record["positive_passages"]]
    queries = [records[i]["query"] for i, _ in pairs]
    scores = ensemble.scores_of(lang, queries, [p["docid"] for _, p in pairs])
    missing = np.flatnonzero(np.isnan(scores))
    if len(missing):
        scores[missing] = ensemble.similarity([queries[m] for m in missing], [pairs[m][1] for m in missing])
    lowest = np.full(len(records), np.inf)
    np.minimum.at(lowest, [i for i, _ in pairs], scores)
    return lowest


def limits(ensemble, lang, records, args):
    """(N,) what a negative must score less than under the strategies abs, margin and percent of Table 2, else None."""
    if args.strategy == "abs":
        return np.full(len(records), args.max_score)
    if args.strategy == "margin":
        return positive_scores(ensemble, lang, records) - args.margin
    if args.strategy == "percent":
        positive = positive_scores(ensemble, lang, records)
        return positive - (1 - args.percent) * np.abs(positive)  # also right for a score below 0
    return None


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.strategy in ("abs", "margin", "percent") and (args.fusion == "rrf" or "bm25" in args.retrievers):
        raise DataError(f"--strategy {args.strategy} compares cosines; use dense retrievers and --fusion concat")
    if args.shift < 0:
        raise DataError(f"--shift: got {args.shift}, want at least 0")
    queries = args.queries or f"{args.data}/train.jsonl"
    records = list(read_queries(queries, args.lang, args.limit))
    by_lang = defaultdict(list)
    for record in records:
        by_lang[record["lang"]].append(record)
    output = Output(args, [queries, *(path for lang in by_lang for path in corpus_files(args.data, lang))], args.retrievers)
    if output.is_done():
        return
    ensemble = Ensemble(args.retrievers, args.data, args.cache, args.fusion, args.weights, args.device,
                        args.bm25_tokenizer, args.query_max_len, args.passage_max_len, args.settings)
    output.meta |= {"encoders": {name: encoder.settings() for name, encoder in ensemble.encoders.items()},
                    "device": ensemble.device, "processes": world()[1]}
    leader, skip = world()[0] == 0, args.shift if args.strategy == "shifted" else 0
    parts, table, counts = {}, {}, Counter()
    for lang, asked in sorted(by_lang.items()):
        rankings, mined = mine(ensemble, lang, asked, args.depth + skip, args, limits(ensemble, lang, asked, args))
        if leader:  # lines wait on disk until the records can be written in input order: memory holds one language's
            mined = [candidates[skip:] for candidates in mined]
            parts[lang] = tempfile.TemporaryFile()
            parts[lang].writelines(dump(attach(*pair, args.strategy)).encode() for pair in zip(asked, mined))
            parts[lang].seek(0)
            table[lang] = summarise(asked, rankings, mined, args.depth)
            counts["candidates"] += table[lang]["candidates"]
            counts["short"] += sum(len(candidates) < args.depth for candidates in mined)
            say(f"{lang}: " + ", ".join(f"{k} {v}" for k, v in table[lang].items()))
    if leader:
        output.write_lines(next(parts[record["lang"]]).decode() for record in records)
        output.finish(queries=len(records), candidates=counts["candidates"], queries_with_fewer=counts["short"], by_lang=table)


def attach(record, passages, strategy):
    if strategy == "ensemble":
        return record | {"candidate_passages": passages}
    return record | {"negative_passages": [p | {"source": "mined"} for p in passages]}


def summarise(records, rankings, kept, depth):
    """What to look at before paying for the judge: how alike the retrievers are, and what they find again."""
    positives = [{p["docid"] for p in r["positive_passages"]} for r in records]
    human = [{p["docid"] for p in r.get("negative_passages", []) if p.get("source") == "human"} for r in records]
    row = {"queries": len(records), "candidates": sum(map(len, kept))}
    for name, ranking in rankings.items():
        ranks = [found.index(d) + 1 for found, wanted in zip(ranking, positives) for d in wanted if d in found]
        row[f"{name} recall@{depth} of positives"] = round(sum(r <= depth for r in ranks) / sum(map(len, positives)), 3)
        row[f"{name} mean rank of positives found"] = round(sum(ranks) / len(ranks), 1) if ranks else None
        if any(human):
            found_human = sum(len(wanted & set(found[:depth])) for found, wanted in zip(ranking, human))
            row[f"{name} recall@{depth} of judged negatives"] = round(found_human / sum(map(len, human)), 3)
    tops = [[set(found[:depth]) for found in per_query] for per_query in zip(*rankings.values())]
    if len(rankings) > 1:
        row["overlap"] = round(sum(len(set.intersection(*t)) / max(1, len(set.union(*t))) for t in tops) / len(tops), 3)
    return row


if __name__ == "__main__":
    run(main)
