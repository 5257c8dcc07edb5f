"""Mine hard-negative candidates for each training query with an ensemble of retrievers (Sec. 3.3).

Source  Sec. 3.3: V = E(f_1) o ... o E(f_z) scores the passages, the top k = 40 minus the positives are the candidates.
        Table 2: the five usual strategies, which write negative_passages directly, so that stages 04 and 05 can follow.
        E, the feature layer, is left open there: here it is the L2-normalised embedding, so the score of the
        concatenation is the (weighted) sum of cosines - exact, and nothing to train.
Reads   DATA/train.jsonl, DATA/corpus/<lang>.jsonl[.gz]
Writes  candidates.jsonl: the records + candidate_passages [{docid, title, text, score, scores, ranks}], best first
Usage   python 01_mine_candidates.py --data data/sample --retrievers bm25 models/sample --fusion rrf --out runs/sample/candidates.jsonl
Cost    embeddings are cached by model, settings and corpus shard: another depth, strategy or fusion encodes nothing
"""
from collections import defaultdict

from common import (DataError, Ensemble, Output, Parser, corpus_files, fetch_passages, normalise, passage_text,
                    positive_int, read_queries, run, say)

# Table 2, with the paper's best settings as defaults. "percent" and "margin" look at the lowest-scored positive.
BASELINES = {"topk": "the top k as they are", "shifted": "the top k after skipping --shift",
             "abs": "score under --max-score", "margin": "score under the positive's minus --margin",
             "percent": "score under --percent of the positive's"}


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
    parser.add_argument("--max-score", type=float, default=0.6, help="highest cosine under --strategy abs (Table 2)")
    parser.add_argument("--margin", type=float, default=0.15, help="cosine below the positive's, --strategy margin (Table 2)")
    parser.add_argument("--percent", type=float, default=0.9, help="share of the positive's score, --strategy percent (Table 2)")
    parser.add_argument("--exclude-same-article", action="store_true",
                        help="no candidate from a positive's article (docids ARTICLE#PASSAGE)")
    parser.add_argument("--query-max-len", type=positive_int, default=64, help="tokens of a query that are read (Sec. 4.1)")
    parser.add_argument("--passage-max-len", type=positive_int, default=256, help="tokens of a passage that are read (Sec. 4.1)")
    parser.add_argument("--bm25-tokenizer", metavar="MODEL", help="its sub-words are BM25's terms; default: the first dense retriever's")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--cache", default="cache", metavar="FOLDER", help="embeddings are kept here")
    parser.add_argument("--out", required=True, metavar="FILE", help="candidates.jsonl")
    return parser


def allowed(hit, passage, record, same_article):
    """Never a positive, under its own docid or another; optionally nothing from its article."""
    positives = record["positive_passages"]
    if any(hit["docid"] == p["docid"] for p in positives):
        return False
    if same_article and any(hit["docid"].split("#")[0] == p["docid"].split("#")[0] for p in positives):
        return False
    text = normalise(passage["text"])
    return all(text != normalise(p["text"]) for p in positives)


def mine(ensemble, lang, records, depth, data, same_article=False):
    """For each record its `depth` best passages that are allowed: a list of [{docid, title, text, score, scores, ranks}]."""
    extra = max(len(r["positive_passages"]) for r in records) + 8
    n_passages = sum(len(d) for d in ensemble.index(lang)[1])
    while True:
        found, rankings = ensemble.search(lang, [r["query"] for r in records], depth + extra)
        texts = fetch_passages(data, lang, {hit["row"] for hits in found for hit in hits})
        mined = [[texts[hit["row"]] | {k: hit[k] for k in ("score", "scores", "ranks")}
                  for hit in hits if allowed(hit, texts[hit["row"]], record, same_article)]
                 for record, hits in zip(records, found)]
        short = [hits for kept, hits in zip(mined, found) if len(kept) < depth and len(hits) == depth + extra]
        if not short or depth + extra >= n_passages:
            return rankings, [candidates[:depth] for candidates in mined]
        extra *= 4  # many copies of a positive, or a whole article left out: look deeper


def baseline(candidates, positive_score, args):
    """The candidates that a strategy of Table 2 keeps as negatives, best first."""
    if args.strategy == "topk":
        return candidates
    if args.strategy == "shifted":
        return candidates[args.shift:]
    limit = {"abs": args.max_score, "margin": positive_score - args.margin,
             "percent": positive_score * args.percent if positive_score > 0 else positive_score}[args.strategy]
    return [c for c in candidates if c["score"] < limit]


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.strategy in ("abs", "margin", "percent") and (args.fusion == "rrf" or "bm25" in args.retrievers):
        raise DataError(f"--strategy {args.strategy} compares cosines; use dense retrievers and --fusion concat")
    queries = args.queries or f"{args.data}/train.jsonl"
    records = list(read_queries(queries, args.lang, args.limit))
    by_lang = defaultdict(list)
    for record in records:
        by_lang[record["lang"]].append(record)
    output = Output(args, [queries, *(path for lang in by_lang for path in corpus_files(args.data, lang))], args.retrievers)
    if output.is_done():
        return
    ensemble = Ensemble(args.retrievers, args.data, args.cache, args.fusion, args.weights, args.device,
                        args.bm25_tokenizer, args.query_max_len, args.passage_max_len)
    output.meta["encoders"] = {e.name: {"pooling": e.pooling, "prefix": e.prefix, "max_len": e.max_len}
                               for e in ensemble.encoders.values()}
    # abs, margin and percent look for the best that pass, so they need a longer list than they keep
    depth = args.depth + args.shift if args.strategy == "shifted" else \
        5 * args.depth if args.strategy in ("abs", "margin", "percent") else args.depth
    mined, table = {}, {}
    for lang, asked in sorted(by_lang.items()):
        rankings, candidates = mine(ensemble, lang, asked, depth, args.data, args.exclude_same_article)
        scores = [None] * len(asked)
        if args.strategy in ("margin", "percent"):
            pairs = [(i, p) for i, r in enumerate(asked) for p in r["positive_passages"]]
            values = ensemble.similarity([asked[i]["query"] for i, _ in pairs], [passage_text(p) for _, p in pairs])
            scores = [min(v for (j, _), v in zip(pairs, values) if j == i) for i in range(len(asked))]
        if args.strategy != "ensemble":
            candidates = [baseline(c, score, args)[:args.depth] for c, score in zip(candidates, scores)]
        mined |= {(lang, r["query_id"]): c for r, c in zip(asked, candidates)}
        table[lang] = summarise(asked, rankings, candidates, args.depth)
        say(f"{lang}: " + ", ".join(f"{k} {v}" for k, v in table[lang].items()))
    output.write(attach(record, mined[record["lang"], record["query_id"]], args.strategy) for record in records)
    output.finish(queries=len(records), candidates=sum(map(len, mined.values())), by_lang=table)


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
        row[f"{name} mean rank"] = round(sum(ranks) / len(ranks), 1) if ranks else None
        if any(human):
            found_human = sum(len(wanted & set(found[:depth])) for found, wanted in zip(ranking, human))
            row[f"{name} recall@{depth} of judged negatives"] = round(found_human / sum(map(len, human)), 3)
    tops = [[set(found[:depth]) for found in per_query] for per_query in zip(*rankings.values())]
    if len(rankings) > 1:
        row["overlap"] = round(sum(len(set.intersection(*t)) / max(1, len(set.union(*t))) for t in tops) / len(tops), 3)
    return row


if __name__ == "__main__":
    run(main)
