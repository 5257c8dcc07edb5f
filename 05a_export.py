"""Write the training queries in another trainer's layout, a file a language: a batch can hold one.

Source  none: for training elsewhere on what 00-04 made, without the batches and weights of Sec. 3.5
Reads   topics.jsonl of stage 04, or any file in Tevatron's layout
Writes  OUT/<lang>.jsonl
            flagembedding          {query, pos: [text], neg: [text]}
            sentence-transformers  {anchor, positive, negative_1, ...}: the first positive, and as many
                                   negatives as every query has; what that leaves out is counted
            tevatron               {query_id, query, positive_passages, negative_passages}
        A text is title, line break, text. Left out and counted: negatives with the text of a positive of the
        same question (be it under another id) or of another negative.
Usage   python 05a_export.py --input runs/sample/topics.jsonl --layout flagembedding --out runs/sample/fe
Cost    reads the file three times, holds one record at a time
"""
import contextlib
from collections import Counter, defaultdict

from common import (DataError, Output, Parser, atomic_folder, dump, normalise, passage_text, read_queries,
                    run, text_key)


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--input", required=True, metavar="FILE", help="topics.jsonl, or Tevatron's layout")
    parser.add_argument("--layout", required=True, help="whose",
                        choices=["flagembedding", "sentence-transformers", "tevatron"])
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a file a language")
    return parser


def question(record):
    return hash((record["lang"], normalise(record["query"])))


def hard_negatives(record, answers):
    """(negatives, {why: n} of those left out): those with no relevant passage's text, or that of another."""
    kept = {}
    counts = Counter()
    for passage in record.get("negative_passages", []):
        text = hash(text_key(passage))
        if text in answers[question(record)]:
            counts["relevant_left_out"] += 1
        elif kept.setdefault(text, passage) is not passage:
            counts["copies_left_out"] += 1
    return list(kept.values()), counts


def convert(record, negatives, layout, width):
    """The record as the trainer reads it; width: the columns of negatives that every row has."""
    positives = record["positive_passages"]
    if layout == "tevatron":
        return {"query_id": record["query_id"], "query": record["query"],
                "positive_passages": plain(positives), "negative_passages": plain(negatives)}
    pos, neg = [passage_text(p) for p in positives], [passage_text(p) for p in negatives]
    if layout == "flagembedding":
        return {"query": record["query"], "pos": pos, "neg": neg}
    columns = {f"negative_{number}": text for number, text in enumerate(neg[:width], 1)}
    return {"anchor": record["query"], "positive": pos[0], **columns}


def plain(passages):
    return [{"docid": p["docid"], "title": p.get("title", ""), "text": p["text"]} for p in passages]


def main(argv=None):
    args = build_parser().parse_args(argv)
    output = Output(args, [args.input])
    if output.is_done():
        return
    answers = defaultdict(set)  # {question: hashes of what answers it}, under whatever ids it is asked
    for record in read_queries(args.input, args.lang, args.limit, judged=True):
        relevant = record["positive_passages"] + record.get("false_negatives", [])
        answers[question(record)].update(hash(text_key(p)) for p in relevant)
    counts = Counter(relevant_left_out=0, copies_left_out=0)
    by_lang = Counter()
    widths = []
    for record in read_queries(args.input, args.lang, args.limit):
        negatives, left_out = hard_negatives(record, answers)
        if not negatives:
            raise DataError(f"{args.input}: {record['lang']} query {record['query_id']!r} has no negatives; "
                            "bring all to N with 03_generate_negatives.py")
        by_lang[record["lang"]] += 1
        widths.append(len(negatives))
        counts.update(left_out)
        if args.layout == "sentence-transformers":
            counts["further_positives_left_out"] += len(record["positive_passages"]) - 1
    width = min(widths)
    if args.layout == "sentence-transformers":
        counts["further_negatives_left_out"] = sum(widths) - width * len(widths)
    with atomic_folder(output.path) as folder:
        with contextlib.ExitStack() as stack:
            files = {}
            for lang in by_lang:
                file = open(folder / f"{lang}.jsonl", "w", encoding="utf-8", newline="\n")
                files[lang] = stack.enter_context(file)
            for record in read_queries(args.input, args.lang, args.limit):
                negatives, _ = hard_negatives(record, answers)
                files[record["lang"]].write(dump(convert(record, negatives, args.layout, width)))
        output.finish(folder, queries=len(widths), fewest_negatives=width, **counts,
                      by_lang=dict(sorted(by_lang.items())))


if __name__ == "__main__":
    run(main)
