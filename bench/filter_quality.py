"""How well did the filter do? Its removed and kept candidates beside the sample's complete truth.

Reads   RUN/candidates.jsonl, RUN/filtered.jsonl of a run on the sample; sample/truth/train/<lang>.tsv
Writes  a line a language on stdout: candidates, planted false negatives among them, precision and recall of
        the removal
Usage   python bench/filter_quality.py runs/sample
"""
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

TRUTH = Path(__file__).resolve().parent.parent / "sample" / "truth" / "train"


def read_truth():
    relevant = defaultdict(set)
    for path in TRUTH.glob("*.tsv"):
        for line in path.read_text("utf-8").splitlines():
            query_id, _, docid, _ = line.split("\t")
            relevant[path.stem, query_id].add(docid)
    return relevant


def count(run, relevant):
    """{lang: Counter(candidates, planted, removed, right)}; planted: relevant, but not labelled."""
    table = defaultdict(Counter)
    with open(f"{run}/candidates.jsonl", encoding="utf-8") as before, \
            open(f"{run}/filtered.jsonl", encoding="utf-8") as after:
        for mined, filtered in zip(map(json.loads, before), map(json.loads, after), strict=True):
            truth = relevant[mined["lang"], mined["query_id"]]
            candidates = {p["docid"] for p in mined["candidate_passages"]}
            removed = {p["docid"] for p in filtered["false_negatives"]}
            table[mined["lang"]].update(candidates=len(candidates), planted=len(candidates & truth),
                                        removed=len(removed), right=len(removed & truth))
    return table


def main(run):
    table = count(run, read_truth())
    table["all"] = sum(table.values(), Counter())
    print("lang  candidates  planted   share  removed  precision  recall")
    for lang, n in sorted(table.items(), key=lambda row: (row[0] == "all", row[0])):
        print(f"{lang:<5}{n['candidates']:>11}{n['planted']:>9}{n['planted'] / n['candidates']:>8.1%}"
              f"{n['removed']:>9}{n['right'] / max(1, n['removed']):>11.1%}"
              f"{n['right'] / max(1, n['planted']):>8.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
