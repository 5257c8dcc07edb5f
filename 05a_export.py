"""Write the training queries in another trainer's layout, a file a language: a batch can hold one.

Source  none: for training elsewhere on what 00-04 made, without the batches and weights of Sec. 3.5
Reads   topics.jsonl of stage 04, or any file in Tevatron's layout
Writes  OUT/<lang>.jsonl
            flagembedding          {query, pos: [text], neg: [text]}
            sentence-transformers  {anchor, positive, negative_1, ...}: as many as every query has
            tevatron               {query_id, query, positive_passages, negative_passages}
        A text is title, line break, text. Negatives that are a positive, by docid or text, are left out.
Usage   python 05a_export.py --input runs/sample/topics.jsonl --layout flagembedding --out runs/sample/fe
Cost    reads the file twice, holds one record at a time
"""
import contextlib
import shutil

from common import DataError, Output, Parser, atomic_folder, dump, normalise, passage_text, read_queries, run


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--input", required=True, metavar="FILE", help="topics.jsonl, or Tevatron's layout")
    parser.add_argument("--layout", required=True, help="whose",
                        choices=["flagembedding", "sentence-transformers", "tevatron"])
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a file a language")
    return parser


def hard_negatives(record):
    """The negatives that are not, by docid or text, one of the positives."""
    positives = record["positive_passages"]
    docids = {p["docid"] for p in positives}
    texts = {normalise(p["text"]) for p in positives}
    return [p for p in record.get("negative_passages", [])
            if p["docid"] not in docids and normalise(p["text"]) not in texts]


def convert(record, layout, width):
    """The record as the trainer reads it; width: the columns of negatives that every row has."""
    positives, negatives = record["positive_passages"], hard_negatives(record)
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
    width = None
    n_false = 0
    for record in read_queries(args.input, args.lang, args.limit):
        n_negatives = len(hard_negatives(record))
        n_false += len(record.get("negative_passages", [])) - n_negatives
        width = n_negatives if width is None else min(width, n_negatives)
        if width == 0:
            raise DataError(f"{args.input}: {record['lang']} query {record['query_id']!r} has no negatives; "
                            "bring all to N with 03_generate_negatives.py")
    by_lang = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(atomic_folder(args.out))
        files = {}
        for record in read_queries(args.input, args.lang, args.limit):
            lang = record["lang"]
            if lang not in files:
                file = open(folder / f"{lang}.jsonl", "w", encoding="utf-8", newline="\n")
                files[lang] = stack.enter_context(file)
            files[lang].write(dump(convert(record, args.layout, width)))
            by_lang[lang] = by_lang.get(lang, 0) + 1
        shutil.rmtree(args.out, ignore_errors=True)  # never beside the meta of another
        output.finish(queries=sum(by_lang.values()), positives_left_out=n_false, fewest_negatives=width,
                      by_lang=dict(sorted(by_lang.items())))


if __name__ == "__main__":
    run(main)
