"""Let an LLM find the candidates that answer the query: they are false negatives, and are removed (Sec. 3.3).

Source  Sec. 3.3: NC_q = {d : LLM(q, d+, d) = 0}. The judge sees the query and a known positive as reference and scores
        information accuracy and completeness, 0 to 2 each; the grade is the lower one. The main text keeps grade 0 only
        (--drop-at 1, default); the appendix calls only 2 a false negative (--drop-at 2).
Reads   candidates.jsonl of stage 01, or any file in Tevatron's layout: then its negatives without `source: human` are judged
Writes  filtered.jsonl: the records; negative_passages = kept [+ source, grade], false_negatives = removed [+ accuracy,
        completeness, grade]; no candidate_passages
Usage   python 02_filter_false_negatives.py --input runs/sample/candidates.jsonl --llm Llama-3.1-70B-Instruct --out runs/sample/filtered.jsonl
        (OPENAI_BASE_URL and OPENAI_API_KEY name the server, as for every OpenAI client)
Cost    one call a candidate (MIRACL: 40,203 x 40 = 1.6 million); --dry-run tells before anything is spent
"""
import asyncio
from collections import Counter, defaultdict

from common import LLM, DataError, Output, Parser, in_order, judge, judge_messages, positive_int, progress, read_queries, run, say


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--input", required=True, metavar="FILE", help="candidates.jsonl, or training data in Tevatron's layout")
    parser.add_argument("--llm", required=True, metavar="NAME", help="model name at the server; the paper: Llama-3.1-70B-Instruct or gpt-4o")
    parser.add_argument("--base-url", metavar="URL", help="the server; default: OPENAI_BASE_URL")
    parser.add_argument("--concurrency", type=positive_int, default=64, help="calls under way at once")
    parser.add_argument("--votes", type=positive_int, default=1,
                        help="judgments per candidate; one at temperature 0, several at 0.7, ties go to the higher grade")
    parser.add_argument("--drop-at", type=int, choices=[1, 2], default=1,
                        help="lowest grade that is removed: 1 as in Sec. 3.3, 2 as in the appendix")
    parser.add_argument("--no-reference", action="store_true", help="do not show the judge a positive (ablation of Table 6)")
    parser.add_argument("--max-unjudged", type=float, default=0.01,
                        help="highest share, 0 to 1, of candidates without a usable answer; they are left out of the negatives")
    parser.add_argument("--dry-run", action="store_true", help="print what it would cost and stop")
    parser.add_argument("--cache", default="cache", metavar="FOLDER", help="answers are kept here: nothing is paid for twice")
    parser.add_argument("--out", required=True, metavar="FILE", help="filtered.jsonl")
    return parser


def split(record):
    """(passages to judge, passages people judged non-relevant): candidates, or negatives nobody has judged."""
    negatives = record.get("negative_passages", [])
    human = [p for p in negatives if p.get("source") == "human"]
    candidates = record.get("candidate_passages", [p for p in negatives if p.get("source") != "human"])
    positives = {p["docid"] for p in record["positive_passages"]}
    return [c for c in candidates if c["docid"] not in positives], [p for p in human if p["docid"] not in positives]


async def filter_record(llm, record, args):
    """The record with its candidates judged: (record, Counter of what became of them)."""
    candidates, human = split(record)
    human_ids = {p["docid"] for p in human}
    reference = None if args.no_reference else record["positive_passages"][0]
    to_judge = [c for c in candidates if c["docid"] not in human_ids]
    answers = await asyncio.gather(*(judge(llm, record["query"], record["lang"], c, reference, args.votes) for c in to_judge))
    verdict = {c["docid"]: a for c, a in zip(to_judge, answers)}
    kept, removed, counts = [], [], Counter()
    for passage in candidates:
        if passage["docid"] in human_ids:
            kept.append(passage | {"source": "human", "grade": 0})
            counts["human"] += 1
        elif (answer := verdict[passage["docid"]]) is None:
            counts["unjudged"] += 1  # it may be a false negative: left out, asked again in the next run
        else:
            counts[f"grade {answer['grade']}"] += 1
            if answer["grade"] < args.drop_at:
                kept.append(passage | {"source": passage.get("source", "mined"), "grade": answer["grade"]})
            else:
                removed.append(passage | answer)
    # judged negatives that no retriever found follow the mined ones: they are sure, but easier
    mined = {p["docid"] for p in candidates}
    kept += [p | {"grade": 0} for p in human if p["docid"] not in mined]
    counts |= {"candidates": len(candidates), "removed": len(removed), "kept": len(kept)}
    record = {k: v for k, v in record.items() if k not in ("candidate_passages", "negative_passages", "false_negatives")}
    return record | {"negative_passages": kept, "false_negatives": removed}, counts


def estimate(args):
    """Print calls and tokens of a run: about 4 bytes a token in Latin script, fewer characters elsewhere."""
    calls = tokens = 0
    for record in read_queries(args.input, args.lang, args.limit):
        candidates, human = split(record)
        human_ids = {p["docid"] for p in human}
        reference = None if args.no_reference else record["positive_passages"][0]
        for candidate in candidates:
            if candidate["docid"] not in human_ids:
                calls += args.votes
                tokens += args.votes * sum(len(m["content"].encode()) // 4 for m in judge_messages(
                    record["query"], record["lang"], candidate, reference))
    print(f"{calls} calls, about {tokens} prompt tokens (estimated, bytes / 4) and {calls * 16} completion tokens")


async def filter_all(args, output, table):
    bar = progress(desc="judge", unit="candidate")
    async with LLM(args.llm, args.cache, args.base_url, args.concurrency) as llm:
        records = read_queries(args.input, args.lang, args.limit)
        finished = []
        window = max(4, args.concurrency // 8)  # queries: the candidates of one are asked together (prefix caching)
        async for record, counts in in_order(records, lambda r: filter_record(llm, r, args), window):
            table[record["lang"]].update(counts)
            bar.update(counts["candidates"])
            finished.append(record)
        bar.close()
        return finished, dict(llm.stats)


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.dry_run:
        estimate(args)
        return
    output = Output(args, [args.input])
    if output.is_done():
        return
    table = defaultdict(Counter)
    records, calls = asyncio.run(filter_all(args, output, table))
    total = sum(table.values(), Counter())
    for lang, counts in sorted(table.items()):
        judged = max(1, counts["candidates"])
        say(f"{lang}: {counts['candidates']} candidates, removed {counts['removed']} ({100 * counts['removed'] / judged:.1f}%), "
            f"kept {counts['kept']}, human {counts['human']}, unjudged {counts['unjudged']}")
    if total["unjudged"] > args.max_unjudged * total["candidates"]:
        raise DataError(f"{args.input}: {total['unjudged']} of {total['candidates']} candidates got no usable answer from "
                        f"{args.llm}; run again to ask for them again, or raise --max-unjudged")
    if not total["kept"]:
        raise DataError(f"{args.input}: 0 of {total['candidates']} candidates kept at --drop-at {args.drop_at}; "
                        "try --drop-at 2, or look at the judge's answers")
    output.write(records)
    output.finish(queries=len(records), candidates=total["candidates"], removed=total["removed"], kept=total["kept"],
                  unjudged=total["unjudged"], calls=calls, by_lang={k: dict(v) for k, v in sorted(table.items())})


if __name__ == "__main__":
    run(main)
