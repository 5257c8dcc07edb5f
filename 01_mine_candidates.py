"""Mine hard-negative candidates for each training query with an ensemble of retrievers (Sec. 3.3).

Source  Sec. 3.3: V = E(f_1) o ... o E(f_z) scores passages; its top k = 40 but positives are candidates.
        E, the feature layer, is left open there: here it is the L2-normalised embedding, so the score of
        the concatenation is the (weighted) sum of cosines - exact, and nothing to train.
        Table 2: the five usual strategies write negative_passages directly, for stages 04 and 05.
Reads   DATA/train.jsonl, DATA/corpus/<lang>.jsonl[.gz]
Writes  candidates.jsonl: the records + candidate_passages [{docid, title, text, score, ranks}], best first
Usage   python 01_mine_candidates.py --data data/sample --retrievers bm25 models/sample --fusion rrf \\
            --out runs/sample/candidates.jsonl
        torchrun --nproc-per-node 8 01_mine_candidates.py ...   the same bytes; nodes share the --cache folder
Cost    vectors are cached by model, settings and shard: another depth or fusion loads no model, takes seconds
"""
import tempfile
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import numpy as np

from common import (DataError, Output, Parser, batched, corpus_files, dump, fetch_passages, finite,
                    normalise, passage_text, positive_int, read_queries, run, say, text_key, whole)
from encoder import model_digests
from search import candidate, ensemble_flags, from_flags, world

EXTRA = 24       # passages asked for beyond --depth at first, to stand in for those that are not allowed
PAIRS = 100_000  # of query and passage that a search holds at a time; bounds memory, does not change results


def build_parser():
    parser = Parser(__doc__).common_flags()
    ensemble_flags(parser)
    parser.add_argument("--queries", metavar="FILE", help="other training queries than DATA/train.jsonl")
    parser.add_argument("--depth", type=positive_int, default=40, help="candidates per query, k in Sec. 4.1")
    parser.add_argument("--strategy", default="ensemble",
                        choices=["ensemble", "topk", "shifted", "abs", "margin", "percent"],
                        help="ensemble: candidates for 02; the others, of Table 2, write negatives: topk: "
                             "the top k as they are; shifted: the top k after skipping --shift; abs: the "
                             "best that score under --max-score; margin: the best under the lowest "
                             "positive's score minus --margin; percent: the best under --percent of it. "
                             "Scores of several retrievers add up, --weights .5 .5 gives their mean")
    parser.add_argument("--shift", type=whole, default=10, help="ranks to skip under --strategy shifted")
    parser.add_argument("--max-score", type=finite, default=0.6, help="score under --strategy abs")
    parser.add_argument("--margin", type=finite, default=0.15, help="below the positive, --strategy margin")
    parser.add_argument("--percent", type=finite, default=0.9, help="of the positive, --strategy percent")
    parser.add_argument("--exclude-same-article", action="store_true",
                        help="no candidate from a positive's article")
    parser.add_argument("--article-separator", default="#", metavar="TEXT",
                        help="what stands between article and passage in a docid, for --exclude-same-article")
    parser.add_argument("--out", required=True, metavar="FILE", help="candidates.jsonl")
    return parser


def ceilings(ensemble, records, args):
    """(N,) what a negative must score less than under the strategies abs, margin and percent of Table 2."""
    if args.strategy == "abs":
        return np.full(len(records), args.max_score)
    lowest = np.full(len(records), np.inf)
    if args.strategy in ("margin", "percent"):
        pairs = [(i, passage) for i, record in enumerate(records) for passage in record["positive_passages"]]
        queries = [records[i]["query"] for i, _ in pairs]
        scores = ensemble.similarity(queries, [passage for _, passage in pairs])
        np.minimum.at(lowest, [i for i, _ in pairs], scores)
    if args.strategy == "percent":
        return lowest - (1 - args.percent) * np.abs(lowest)  # also right for a score below 0
    return lowest - args.margin


def article(docid, args):
    return docid.rpartition(args.article_separator)[0] or docid


def check_articles(records, args):
    """--exclude-same-article can do nothing for positives whose docid does not tell the article."""
    docids = [passage["docid"] for record in records for passage in record["positive_passages"]]
    without = [docid for docid in docids if not args.article_separator or args.article_separator not in docid]
    if without:
        told = (f"--exclude-same-article: {len(without)} of {len(docids)} positives, such as {without[0]!r}, "
                f"have no {args.article_separator!r} in their docid")
        if len(without) == len(docids):
            raise DataError(f"{told}; name what stands after the article with --article-separator")
        say(f"{told}, each counts as an article of its own")


def answers(records):
    """{question: positives of all queries that ask it}, whatever their ids."""
    found = defaultdict(list)
    for record in records:
        found[normalise(record["query"])] += record["positive_passages"]
    return found


def allowed(question, positives, hits, ranks, passages, texts, depth, args):
    """(candidates, left out): the first `depth` hits that may be candidates, {why: n} of others above them.

    passages and texts (their text_key) are by row. A positive is known by docid or text. A document may be
    the query itself, as in BEIR's ArguAna.
    """
    docids = {passage["docid"] for passage in positives}
    known = {text_key(passage) for passage in positives}
    articles = {article(docid, args) for docid in docids} if args.exclude_same_article else set()
    candidates, left_out, taken = [], Counter(), set()
    for docid, row, score in hits:
        passage, text = passages[row], texts[row]
        if docid in docids and text not in known:
            raise DataError(f"{args.data}: docid {docid!r}, a positive, has another text in the corpus; "
                            "make both anew with 00_prepare_data.py")
        if text in known:
            continue
        if articles and article(docid, args) in articles:
            left_out["left out, of a positive's article"] += 1
        elif question.endswith(text) and question in (text, normalise(passage_text(passage))):
            left_out["left out, the query itself"] += 1
        elif text in taken:
            left_out["left out, duplicates of a candidate's text"] += 1
        else:
            taken.add(text)
            candidates.append(candidate(passage, score, ranks))
        if len(candidates) == depth:
            break
    return candidates, left_out


def mine(ensemble, lang, records, depth, args):
    """Yield (record, ranks, candidates, left out) of each: what each retriever found, what is allowed of it.

    Memory holds the passages of a group of records.
    """
    ensemble.ask([record["query"] for record in records])
    below = ceilings(ensemble, records, args)
    positives = answers(records)
    for rows in batched(range(len(records)), max(1, PAIRS // (depth + EXTRA))):
        group = [records[row] for row in rows]
        yield from zip(group, *mine_group(ensemble, lang, group, below[rows], positives, depth, args))


def mine_group(ensemble, lang, records, below, positives, depth, args):
    """(ranks, candidates, left out) of these records, lists; `depth` candidates of what is allowed.

    Looks deeper for the records whose list is not full yet.
    """
    questions = [normalise(record["query"]) for record in records]
    ranks = []
    mined = {}
    pending = range(len(records))
    asked = depth + EXTRA
    while pending:
        short = []
        fetched = max(depth + EXTRA, asked // 4)  # of the hits below the ceiling
        for some in batched(pending, max(1, PAIRS // asked)):
            found, ranked = ensemble.search(lang, [records[i]["query"] for i in some], asked)
            low = [[hit for hit in hits if hit[2] < below[i]][:fetched] for i, hits in zip(some, found)]
            passages = fetch_passages(args.data, lang, {row for hits in low for _, row, _ in hits})
            texts = {row: text_key(passage) for row, passage in passages.items()}
            for i, hits, of_query, everything in zip(some, low, ranked, found):
                mined[i] = allowed(questions[i], positives[questions[i]], hits, of_query, passages, texts,
                                   depth, args)
                if len(mined[i][0]) < depth and (len(everything) == asked or len(hits) == fetched):
                    short.append(i)
            if asked == depth + EXTRA:
                ranks += ranked
        pending = short
        asked *= 4
    candidates, left_out = zip(*(mined[i] for i in range(len(records))))
    return ranks, candidates, left_out


def counted(record, ranks, passages, depth):
    """The sums of a query that summarise makes means of."""
    positives = {passage["docid"] for passage in record["positive_passages"]}
    human = {p["docid"] for p in record.get("negative_passages", []) if p.get("source") == "human"}
    n = Counter(queries=1, candidates=len(passages), positives=len(positives), human=len(human))
    tops = []
    for name, rank_of in ranks.items():
        found = [rank_of[docid] for docid in positives if docid in rank_of]
        tops.append(set(islice(rank_of, depth)))
        n[name, "found"] = len(found)
        n[name, "ranks"] = sum(found)
        n[name, "positives"] = sum(rank <= depth for rank in found)
        n[name, "human"] = len(human & tops[-1])
    n["overlap"] = len(set.intersection(*tops)) / max(1, len(set.union(*tops)))
    return n


def summarise(n, names, n_repeated, depth):
    """What to look at before paying for the judge: how alike the retrievers are, and what they find again."""
    row = {"queries": n["queries"], "candidates": n["candidates"]}
    if n_repeated:
        row["queries that ask the same as another (their positives are shared)"] = n_repeated
    for name in names:
        row[f"{name} recall@{depth} of positives"] = round(n[name, "positives"] / n["positives"], 3)
        mean = n[name, "ranks"] / n[name, "found"] if n[name, "found"] else None
        row[f"{name} mean rank of positives found"] = mean and round(mean, 1)
        if n["human"]:
            row[f"{name} recall@{depth} of judged negatives"] = round(n[name, "human"] / n["human"], 3)
    if len(names) > 1:
        row["overlap"] = round(n["overlap"] / n["queries"], 3)
    return row


def with_passages(record, passages, strategy):
    if strategy == "ensemble":
        return record | {"candidate_passages": passages}
    return record | {"negative_passages": [passage | {"source": "mined"} for passage in passages]}


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.strategy in ("abs", "margin", "percent") and (args.fusion == "rrf" or "bm25" in args.retrievers):
        raise DataError(f"--strategy {args.strategy} compares cosines: dense retrievers, --fusion concat")
    queries = args.queries or f"{args.data}/train.jsonl"
    dev = f"{args.data}/dev.jsonl"
    if not args.queries and Path(dev).exists() and not Path(queries).exists():
        raise DataError(f"{args.data} has no training queries; name others with --queries, if need be {dev}")
    records = list(read_queries(queries, args.lang, args.limit))
    by_lang = defaultdict(list)
    for record in records:
        by_lang[record["lang"]].append(record)
    corpus = [path for lang in by_lang for path in corpus_files(args.data, lang)]
    output = Output(args, [queries, *corpus], model_digests([*args.retrievers, args.bm25_tokenizer]))
    if output.is_done():
        return
    if args.exclude_same_article:
        check_articles(records, args)
    ensemble = from_flags(args)
    skip = args.shift if args.strategy == "shifted" else 0
    lines = {}
    table = {}
    n_fewer = 0
    is_first = world()[0] == 0  # of torchrun's processes
    for lang, of_lang in sorted(by_lang.items()):
        n, left_out = Counter(), Counter()
        if is_first:
            lines[lang] = tempfile.TemporaryFile("w+", encoding="utf-8", dir=output.path.parent)
        for record, ranks, candidates, others in mine(ensemble, lang, of_lang, args.depth + skip, args):
            passages = candidates[skip:]
            if is_first:
                lines[lang].write(dump(with_passages(record, passages, args.strategy)))
            n.update(counted(record, ranks, passages, args.depth))
            left_out.update(others)
            n_fewer += len(passages) < args.depth
        n_repeated = len(of_lang) - len(answers(of_lang))
        table[lang] = summarise(n, ensemble.names, n_repeated, args.depth) | left_out
        if is_first:
            lines[lang].seek(0)
            say(f"{lang}: " + ", ".join(f"{key} {value}" for key, value in table[lang].items()))
    if is_first:
        asked = {lang: [record["query"] for record in of_lang] for lang, of_lang in by_lang.items()}
        encodings = ensemble.encodings(asked)
        for encoder in ensemble.encoders.values():
            encoder.report_cut()
        output.meta |= {"encoders": {name: settings for name, (settings, _) in encodings.items()},
                        "cut": {name: cut for name, (_, cut) in encodings.items()},
                        "device": ensemble.device, "processes": world()[1]}
        output.write_lines(next(lines[record["lang"]]) for record in records)
        output.finish(queries=len(records), candidates=sum(row["candidates"] for row in table.values()),
                      queries_with_fewer=n_fewer, by_lang=table)


if __name__ == "__main__":
    run(main)
