"""How good is the judge of stage 02, language by language? Against labels that exist, and against annotators.

Source  Sec. 3.3; App. C: three annotators check 100 eliminated passages a language (Fleiss' kappa 82.5%)
calibrate  judges a query's further positives and `human` negatives, one call each; by language, at --drop-at:
           the share that people call relevant, balanced accuracy (50: it does not judge), and with Wilson's
           95% intervals accuracy, negatives thrown away, false negatives let pass
sample     writes a shuffled, blind sheet (CSV) of removed and kept passages; annotators fill `relevant` with
           1 (it answers the question) or 0. OUT.key.csv holds the judge's answers and is not for them
score      reads the filled sheets: how far most annotators (no ties) agree with the judge, Fleiss' kappa
Usage   python 02a_check_judge.py calibrate --input data/sample/train.jsonl --llm Llama-3.1-70B-Instruct
        ... sample --input filtered.jsonl --out sheet.csv; ... score ann.csv bob.csv --key sheet.csv.key.csv
"""
import asyncio
import csv
import io
import random
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from common import (DataError, Parser, atomic, check_lang, dump, open_bytes, positive_int, progress,
                    read_queries, run, say)
from llm import digest, from_flags, in_order, judge_candidates, judge_flags


def build_parser():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=partial(Parser, __doc__),
                                     help="each explains its flags with --help")
    part = commands.add_parser("calibrate", help="judge pairs that people have judged").common_flags()
    part.add_argument("--input", required=True, metavar="FILE", help="train.jsonl, or Tevatron's layout")
    judge_flags(part)
    part.add_argument("--pairs", type=positive_int, default=200, help="most pairs of each kind per language")
    part.add_argument("--out", metavar="FILE", help="also write each pair and its judgment here, as JSONL")
    part = commands.add_parser("sample", help="write a sheet for annotators").common_flags()
    part.add_argument("--input", required=True, metavar="FILE", help="filtered.jsonl of stage 02")
    part.add_argument("--per-language", type=positive_int, default=100, help="rows: half removed, half kept")
    part.add_argument("--out", required=True, metavar="FILE", help="the sheet; its key goes to FILE.key.csv")
    part = commands.add_parser("score", help="compare filled sheets with the judge and each other")
    part.add_argument("sheets", nargs="+", metavar="SHEET", help="a filled sheet per annotator")
    part.add_argument("--key", required=True, metavar="FILE", help="the key that `sample` wrote")
    return parser


def share(hits):
    """'83.3 [55.2, 95.3] of 12': percent of (N,) bools with its 95% Wilson interval."""
    from statsmodels.stats.proportion import proportion_confint
    if not len(hits):
        return "-"
    low, high = proportion_confint(sum(hits), len(hits), alpha=0.05, method="wilson")
    return f"{100 * np.mean(hits):.1f} [{100 * low:.1f}, {100 * high:.1f}] of {len(hits)}"


def show(*rows):
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for row in rows:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())


def labelled_pairs(args):
    """[(number of the record, record, passage, whether it is relevant)], at most --pairs of a kind."""
    found = defaultdict(list)  # (lang, relevant) -> pairs
    for number, record in enumerate(read_queries(args.input, args.lang, args.limit)):
        positives = [p for p in record["positive_passages"] if p.get("source") != "relabelled"]
        known = {p["docid"] for p in positives}
        further = positives if args.no_reference else positives[1:]  # no passage is its own reference
        human = [p for p in record.get("negative_passages", []) if p.get("source") == "human"]
        found[record["lang"], True] += [(number, record, p, True) for p in further]
        found[record["lang"], False] += [(number, record, p, False) for p in human if p["docid"] not in known]
    drawn = []
    for (lang, relevant), pairs in sorted(found.items()):
        draw = random.Random(f"{args.seed}:{lang}:{relevant}")
        drawn += draw.sample(pairs, min(args.pairs, len(pairs)))
    return sorted(drawn, key=lambda pair: (pair[0], pair[2]["docid"]))


async def judge_pairs(args, pairs):
    """[{lang, query_id, docid, relevant, and accuracy, completeness, grade or unjudged}], and the client."""
    async def judge_pair(pair):
        _, record, passage, relevant = pair
        (verdict, reason), = await judge_candidates(llm, record, [passage], args)
        return {"lang": record["lang"], "query_id": record["query_id"], "docid": passage["docid"],
                "relevant": relevant} | (verdict or {"unjudged": reason})
    async with from_flags(args) as llm:
        results = in_order(progress(pairs, desc="calibrate", unit=" pairs"), judge_pair, 4 * args.concurrency)
        return [result async for result in results], llm


def rates(results, drop_at):
    """A row of the table, from judged pairs."""
    judged = [pair for pair in results if "grade" in pair]
    relevant = np.array([pair["relevant"] for pair in judged], bool)            # (N,) say people
    removed = np.array([pair["grade"] >= drop_at for pair in judged], bool)     # (N,) by the judge
    found = removed[relevant]
    thrown = removed[~relevant]
    base = f"{100 * relevant.mean():.1f}" if judged else "-"
    balanced = f"{50 * (found.mean() + (~thrown).mean()):.1f}" if len(found) and len(thrown) else "-"
    return [base, balanced, share(removed == relevant), share(thrown), share(~found),
            len(results) - len(judged)]


def calibrate(args):
    if args.out:
        check_new(args, args.out)  # before the money is spent
    pairs = labelled_pairs(args)
    if not pairs:
        raise DataError(f"{args.input}: no second positive, no `human` negative; take a file with judgments")
    results, llm = asyncio.run(judge_pairs(args, pairs))
    rows = [["lang", "relevant %", "balanced accuracy %", "accuracy %", "negatives thrown away %",
             "false negatives let pass %", "unjudged"]]
    for lang in sorted({pair["lang"] for pair in results}):
        rows.append([lang, *rates([pair for pair in results if pair["lang"] == lang], args.drop_at)])
    show(*rows, ["all", *rates(results, args.drop_at)])
    if args.out:
        with atomic(args.out) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(map(dump, results))
    grades = Counter(pair["grade"] for pair in results if "grade" in pair)
    kinds = {pair["relevant"] for pair in results if "grade" in pair}
    if len(grades) == 1 and len(kinds) == 2:
        say(f"{args.llm}: all {grades.total()} verdicts are alike (grade {max(grades)}): it does not judge")
    say(f"{llm.summary()}\ncalibrate: {len(results)} pairs at --drop-at {args.drop_at}, {dict(llm.stats)}")


def check_new(args, path):
    if Path(path).resolve() == Path(args.input).resolve():
        raise DataError(f"{path} is the input; choose another --out")
    if Path(path).is_dir() or Path(path).exists() and not args.overwrite:
        raise DataError(f"{path} exists; pass --overwrite (for a file) or another --out")


def cell(value):
    """What a record holds for a spreadsheet, which must not take it for a formula."""
    return f"'{value}" if str(value).startswith(("=", "+", "-", "@", "\t", "\r")) else value


def sample(args):
    pools = defaultdict(lambda: ([], []))  # lang -> kept, removed: [(record, passage)]
    need = "negative_passages", "false_negatives"
    for record in read_queries(args.input, args.lang, args.limit, need=need):
        relabelled = [p for p in record["positive_passages"] if p.get("source") == "relabelled"]
        parts = record["negative_passages"], record["false_negatives"] + relabelled
        for pool, passages in zip(pools[record["lang"]], parts):
            pool += [(record, p) for p in passages if p.get("source") != "human"]
    sheet = [["item", "lang", "question", "known answer", "title", "passage", "relevant"]]
    key = [["item", "lang", "query_id", "docid", "removed", "grade"]]
    for lang, (kept, removed) in sorted(pools.items()):
        draw = random.Random(f"{args.seed}:{lang}")
        n_removed = min(len(removed), max(args.per_language // 2, args.per_language - len(kept)))
        chosen = [(*row, 1) for row in draw.sample(removed, n_removed)]
        chosen += [(*row, 0) for row in draw.sample(kept, min(len(kept), args.per_language - n_removed))]
        draw.shuffle(chosen)
        for number, (record, p, was_removed) in enumerate(chosen, 1):
            item = f"{lang}-{number}-{digest([record['query_id'], p['docid']])[:6]}"  # in no other sheet
            texts = [record["query"], record["positive_passages"][0]["text"], p.get("title", ""), p["text"]]
            sheet.append([item, lang, *map(cell, texts), ""])
            told = [record["query_id"], p["docid"], was_removed, p.get("grade")]
            key.append([item, lang, *map(cell, told)])
    if len(sheet) == 1:
        raise DataError(f"{args.input}: no judge removed or kept anything; run 02_filter_false_negatives.py")
    tables = {args.out: sheet, f"{args.out}.key.csv": key}
    for path in tables:
        check_new(args, path)
    for path, rows in tables.items():  # utf-8-sig: spreadsheets want the mark
        with atomic(path) as temporary, open(temporary, "w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows(rows)
    say(f"{args.out}: {len(sheet) - 1} rows; {args.out}.key.csv: the judge's answers, not for annotators")


def read_csv(path, columns):
    """[(line, row)] of a CSV file that has these columns."""
    csv.field_size_limit(2**31 - 1)  # the longest passage
    try:
        with io.TextIOWrapper(open_bytes(path), "utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")  # Excel leaves out the commas of last, empty cells
            names = reader.fieldnames or ()
            rows = [(reader.line_num, row) for row in reader if any(map(row.get, columns))]
    except (UnicodeError, csv.Error, OSError, EOFError) as error:
        raise DataError(f"{path}: no CSV file in UTF-8 ({error}); save it as such") from None
    for column in columns:
        if column not in names:
            raise DataError(f"{path}:1: column {column!r} is missing; keep the sheet's columns, with commas")
    return rows


def read_labels(args, items):
    """{item: {annotator: 0 or 1}} of the filled sheets; an empty cell is no label."""
    labels = {item: {} for item in items}
    for annotator, path in enumerate(args.sheets):
        for line, row in read_csv(path, ["item", "relevant"]):
            item = row["item"]
            label = row["relevant"].strip()
            if item not in labels or annotator in labels[item]:
                why = "is there twice; keep one" if item in labels else f"is not in {args.key}; give its key"
                raise DataError(f"{path}:{line}: item {item!r} {why}")
            if label not in ("0", "1", ""):
                raise DataError(f"{path}:{line}: relevant is {label!r}; want 1 (it answers), 0, or nothing")
            if label:
                labels[item][annotator] = int(label)
    return labels


def kappa(ratings):
    """Fleiss' kappa of [[label by annotator] by item], or '-' where chance alone gives full agreement."""
    from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa
    if not ratings or len(ratings[0]) < 2 or len(set(sum(ratings, []))) < 2:
        return "-"
    return f"{fleiss_kappa(aggregate_raters(ratings, n_cat=2)[0]):.3f} of {len(ratings)}"


def score(args):
    key = {}
    for line, row in read_csv(args.key, ["item", "lang", "removed"]):
        key[row["item"]] = row
        check_lang(row["lang"], f"{args.key}:{line}")
        if row["removed"] not in ("0", "1"):
            raise DataError(f"{args.key}:{line}: removed is {row['removed'][:20]!r}; want 0 or 1, as it was")
    labels = read_labels(args, key)
    rows = [["lang", "rated", "agreement %", "of removed: relevant %", "of kept: irrelevant %", "kappa",
             "kappa of removed"]]  # the second is that of App. C
    for lang in [*sorted({row["lang"] for row in key.values()}), "all"]:
        items = [item for item, row in key.items() if lang in (row["lang"], "all") and labels[item]]
        agree = {"1": [], "0": []}  # removed by the judge -> [whether most annotators say so, too]
        for item in items:
            said = sum(labels[item].values()) / len(labels[item])
            if said != 0.5:  # a tie decides nothing
                agree[key[item]["removed"]].append((said > 0.5) == (key[item]["removed"] == "1"))
        complete = {item: list(labels[item].values()) for item in items
                    if len(labels[item]) == len(args.sheets)}
        of_removed = [said for item, said in complete.items() if key[item]["removed"] == "1"]
        shares = map(share, (agree["1"] + agree["0"], agree["1"], agree["0"]))
        rows.append([lang, len(items), *shares, kappa(list(complete.values())), kappa(of_removed)])
    show(*rows)


def main(argv=None):
    args = build_parser().parse_args(argv)
    {"calibrate": calibrate, "sample": sample, "score": score}[args.command](args)


if __name__ == "__main__":
    run(main)
