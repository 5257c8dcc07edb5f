"""How good is the judge of stage 02, language by language? Against labels that exist, and against annotators.

Source  Sec. 3.3 has the judge; App. C checks 100 eliminated passages a language with three annotators (Fleiss' kappa 82.5%).
        The paper does not check languages in which the LLM is weak: `calibrate` does, before the money is spent.
calibrate  judges pairs whose answer people already gave: further positives of a query (its first, or with --reference best the
           closest other one, is the reference) and judged negatives (`source: human`). Prints for each language: accuracy;
           thrown away = share of true negatives that --drop-at removes (strictness); let pass = share of relevant passages that
           it would keep as negatives (1 - recall); each with its 95% Wilson interval. Answers are cached as those of 02 are.
sample     writes a shuffled, blind sheet (CSV) of removed and kept passages for annotators, who fill the column `relevant` with
           1 (the passage answers the question) or 0, and OUT.key.csv with what the judge said, which they must not see
score      reads one filled copy of the sheet per annotator and prints agreement with the judge and Fleiss' kappa by language
Usage   python 02a_check_judge.py calibrate --input data/sample/train.jsonl --llm Llama-3.1-70B-Instruct
        python 02a_check_judge.py sample --input runs/sample/filtered.jsonl --per-language 100 --out sheet.csv
        python 02a_check_judge.py score ann.csv bob.csv eve.csv --key sheet.csv.key.csv
Cost    calibrate: one call a pair, at most 2 x --pairs a language
"""
import asyncio
import csv
import random
from collections import Counter, defaultdict
from pathlib import Path

from common import DataError, Parser, atomic, dump, positive_int, progress, read_queries, run, say
from llm import LLM, in_order, judge_candidates, judge_flags

SHEET = ["item", "lang", "question", "known answer", "title", "passage", "relevant"]


def build_parser():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, help="what to do", parser_class=subparser)
    calibrate = commands.add_parser("calibrate", help="judge pairs that people have judged").common_flags()
    calibrate.add_argument("--input", required=True, metavar="FILE", help="train.jsonl or dev.jsonl of stage 00, or Tevatron's layout")
    judge_flags(calibrate)
    calibrate.add_argument("--pairs", type=positive_int, default=200, help="most relevant, and most irrelevant, pairs per language")
    calibrate.add_argument("--out", metavar="FILE", help="also write each pair and its judgment here, as JSONL")
    sample = commands.add_parser("sample", help="write a sheet for annotators").common_flags()
    sample.add_argument("--input", required=True, metavar="FILE", help="filtered.jsonl of stage 02")
    sample.add_argument("--per-language", type=positive_int, default=100, help="rows per language: half removed, half kept, where there are")
    sample.add_argument("--out", required=True, metavar="FILE", help="the sheet; its key goes to FILE.key.csv")
    score = commands.add_parser("score", help="compare filled sheets with the judge and each other")
    score.add_argument("sheets", nargs="+", metavar="SHEET", help="a filled sheet per annotator")
    score.add_argument("--key", required=True, metavar="FILE", help="the key that `sample` wrote")
    return parser


def subparser(prog):
    parser = Parser(__doc__)
    parser.prog = prog
    return parser


def share(part, whole):
    """'83.3 [55.2, 95.3] of 12': percent with its 95% Wilson interval."""
    from statsmodels.stats.proportion import proportion_confint
    if not whole:
        return "-"
    low, high = proportion_confint(part, whole, alpha=0.05, method="wilson")
    return f"{100 * part / whole:.1f} [{100 * low:.1f}, {100 * high:.1f}] of {whole}"


def show(header, rows):
    """Print a table with aligned columns."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())


# ---- calibrate

def labelled_pairs(args):
    """[(record, [(passage, whether people call it relevant)])]; at most --pairs of each kind a language, drawn by seed."""
    found = defaultdict(list)  # (lang, relevant) -> [(number of the record, passage)]
    records = list(read_queries(args.input, args.lang, args.limit))
    for number, record in enumerate(records):
        positives = record["positive_passages"]
        known = {p["docid"] for p in positives}
        # without a reference the first positive can be judged, too; with one, a passage is not its own reference
        found[record["lang"], True] += [(number, p) for p in positives[0 if args.no_reference else 1:]]
        found[record["lang"], False] += [(number, p) for p in record.get("negative_passages", [])
                                         if p.get("source") == "human" and p["docid"] not in known]
    drawn = defaultdict(list)
    for (lang, relevant), passages in sorted(found.items()):
        for number, passage in random.Random(f"{args.seed}:{lang}:{relevant}").sample(passages, min(args.pairs, len(passages))):
            drawn[number].append((passage, relevant))
    return [(records[number], sorted(pairs, key=lambda pair: pair[0]["docid"])) for number, pairs in sorted(drawn.items())]


async def judge_pairs(args, asked):
    """[(record, passage, relevant, verdict, reason)], and the client's statistics."""
    results, bar = [], progress(desc="calibrate", unit=" pairs", total=sum(len(pairs) for _, pairs in asked))
    async with LLM(args.llm, args.cache, args.base_url, args.concurrency, args.timeout) as llm:
        async def judge_query(query):
            record, pairs = query
            answers = await judge_candidates(llm, record, [passage for passage, _ in pairs], args)
            return [(record, *pair, *answer) for pair, answer in zip(pairs, answers)]
        async for answers in in_order(asked, judge_query, 4 * args.concurrency):
            results += answers
            bar.update(len(answers))
    bar.close()
    return results, dict(llm.stats)


def calibrate(args):
    asked = labelled_pairs(args)
    if not asked:
        raise DataError(f"{args.input}: no query has a second positive or a negative of source 'human'; take a file with judgments")
    results, stats = asyncio.run(judge_pairs(args, asked))
    table, lines = defaultdict(Counter), []
    for record, passage, relevant, verdict, reason in results:
        for counts in (table[record["lang"]], table["all"]):
            kind = "relevant" if relevant else "irrelevant"
            counts[f"{kind} unjudged" if verdict is None else f"{kind} {'removed' if verdict['grade'] >= args.drop_at else 'kept'}"] += 1
        lines.append({"lang": record["lang"], "query_id": record["query_id"], "docid": passage["docid"], "relevant": relevant}
                     | (verdict or {"unjudged": reason}))
    rows = []
    for lang in sorted(table, key=lambda name: (name == "all", name)):
        c = table[lang]
        positives, negatives = c["relevant removed"] + c["relevant kept"], c["irrelevant removed"] + c["irrelevant kept"]
        rows.append([lang, share(c["relevant removed"] + c["irrelevant kept"], positives + negatives),
                     share(c["irrelevant removed"], negatives), share(c["relevant kept"], positives),
                     c["relevant unjudged"] + c["irrelevant unjudged"]])
    show(["lang", "accuracy %", "negatives thrown away %", "false negatives let pass %", "unjudged"], rows)
    if args.out:
        write_text(args, args.out, lambda file: file.writelines(map(dump, lines)))
    say(f"calibrate: {len(results)} pairs, {args.llm} at --drop-at {args.drop_at}, " + ", ".join(f"{k} {v}" for k, v in stats.items()))


# ---- sample

def write_text(args, path, write):
    if Path(path).exists() and not args.overwrite:
        raise DataError(f"{path} exists; pass --overwrite or another --out")
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8-sig" if str(path).endswith(".csv") else "utf-8", newline="") as file:
        write(file)


def cell(text):
    """Text of a passage for a spreadsheet, which must not take it for a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def sample(args):
    by_lang = defaultdict(lambda: ([], []))
    for record in read_queries(args.input, args.lang, args.limit, need=("negative_passages", "false_negatives")):
        for removed, passages in enumerate((record["negative_passages"], record["false_negatives"])):
            by_lang[record["lang"]][removed].extend((record, p, removed) for p in passages if p.get("source") != "human")
    rows = []
    for lang, (kept, removed) in sorted(by_lang.items()):
        draw = random.Random(f"{args.seed}:{lang}")
        n_removed = min(len(removed), max(args.per_language // 2, args.per_language - len(kept)))
        chosen = draw.sample(removed, n_removed) + draw.sample(kept, min(len(kept), args.per_language - n_removed))
        draw.shuffle(chosen)
        rows += [(f"{lang}-{i}", lang, *row) for i, row in enumerate(chosen, 1)]
    if not rows:
        raise DataError(f"{args.input}: nothing was removed or kept by a judge; run 02_filter_false_negatives.py")

    def write_sheet(file):
        sheet = csv.writer(file)
        sheet.writerow(SHEET)
        sheet.writerows([item, lang, cell(record["query"]), cell(record["positive_passages"][0]["text"]), cell(p.get("title", "")),
                         cell(p["text"]), ""] for item, lang, record, p, _ in rows)

    def write_key(file):
        key = csv.writer(file)
        key.writerow(["item", "lang", "query_id", "docid", "removed", "grade"])
        key.writerows([item, lang, record["query_id"], p["docid"], removed, p.get("grade", "")] for item, lang, record, p, removed in rows)
    write_text(args, args.out, write_sheet)
    write_text(args, args.out + ".key.csv", write_key)
    say(f"{args.out}: {len(rows)} rows, {sum(r[-1] for r in rows)} of them removed by the judge; {args.out}.key.csv: the judge's "
        "answers, not for annotators")


# ---- score

def read_csv(path, columns):
    """[(line, row)] of a CSV file that has these columns."""
    if not Path(path).is_file():
        raise DataError(f"{path} not found; make it with 02a_check_judge.py sample")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: no CSV file in UTF-8 ({error}); save it as such") from None
    if missing := set(columns) - set(reader.fieldnames or ()):
        raise DataError(f"{path}:1: column {min(missing)!r} is missing; keep the columns of the sheet, separated by commas")
    return rows


def score(args):
    import numpy as np
    from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa
    key = {row["item"]: row for _, row in read_csv(args.key, ["item", "lang", "removed"])}
    labels = defaultdict(dict)  # item -> {annotator: 0 or 1}
    for annotator, path in enumerate(args.sheets):
        for line, row in read_csv(path, ["item", "relevant"]):
            label = (row["relevant"] or "").strip()
            if row["item"] not in key:
                raise DataError(f"{path}:{line}: item {row['item']!r} is not in {args.key}; give the key of this sheet")
            if annotator in labels[row["item"]]:
                raise DataError(f"{path}:{line}: item {row['item']!r} is there twice; keep one row")
            if label not in ("0", "1", ""):
                raise DataError(f"{path}:{line}: relevant is {label!r}; want 1 (it answers the question), 0, or nothing")
            if label:
                labels[row["item"]][annotator] = int(label)
    rows = []
    for lang in sorted({row["lang"] for row in key.values()}) + ["all"]:
        items = [item for item, row in key.items() if lang in (row["lang"], "all") and labels.get(item)]
        agree, ratings = defaultdict(list), []
        for item in items:
            votes, removed = list(labels[item].values()), key[item]["removed"] == "1"
            if 2 * sum(votes) != len(votes):  # a tie decides nothing
                agree[removed].append((2 * sum(votes) > len(votes)) == removed)
            if len(votes) == len(args.sheets):
                ratings.append(votes)
        kappa = float("nan")
        if len(args.sheets) > 1 and len(set(sum(ratings, []))) > 1:  # one label only: chance agreement is 1, kappa undefined
            kappa = fleiss_kappa(aggregate_raters(np.array(ratings), n_cat=2)[0])
        rows.append([lang, len(items), share(sum(agree[True] + agree[False]), len(agree[True] + agree[False])),
                     share(sum(agree[True]), len(agree[True])), share(sum(agree[False]), len(agree[False])),
                     "-" if np.isnan(kappa) else f"{kappa:.3f} of {len(ratings)}"])
    show(["lang", "rated", "agreement with judge %", "of removed: relevant %", "of kept: irrelevant %", "Fleiss' kappa"], rows)
    say(f"score: {len(args.sheets)} annotators, majority against the judge; ties and empty cells are left out")


def main(argv=None):
    args = build_parser().parse_args(argv)
    {"calibrate": calibrate, "sample": sample, "score": score}[args.command](args)


if __name__ == "__main__":
    run(main)
