"""What each part of the method brings, on mini-MIRACL: negatives, batches, weights, batch size (the rows of Table 7 and a sweep).

Every row starts from the same encoder and trains the same number of queries. The rows share the outputs of stages 01 to 04;
each (row, seed) is one run of 05_train.py and 06_eval.py, and is skipped when the results already hold it.

make topics eval DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl LANGS="sw te id ar zh"
python bench/ablate_training.py --data data/minimiracl --run runs/minimiracl --encoder models/minimiracl
Cost    two cores: about a minute a row and seed
"""
import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
MIXED, UNWEIGHTED = ["--no-same-language", "--no-topic-balance"], ["--weighting", "none"]
ROWS = {  # name: (negatives, flags of 05_train.py)
    "naive top-k": ("naive", MIXED + UNWEIGHTED),
    "+ filter (stage 1)": ("filtered", MIXED + UNWEIGHTED),
    "+ generation (stage 2)": ("augmented", MIXED + UNWEIGHTED),
    "+ batches and weights: full": ("augmented", []),
    "full, no judge (naive top-k)": ("naive", []),
    "full, no stage 2": ("filtered", []),
    "full, no topic balance": ("augmented", ["--no-topic-balance"]),
    "full, no same-language": ("augmented", ["--no-same-language"]),
    "full, neither": ("augmented", MIXED),
    "full, no weights": ("augmented", UNWEIGHTED),
    "full, batch 8": ("augmented", ["--batch-size", "8"]),
    "full, batch 64": ("augmented", ["--batch-size", "64"]),
}


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def make_inputs(run, work):
    """naive.jsonl, filtered.jsonl, augmented.jsonl: the same queries and topics, each with its negatives."""
    topics = {(r["lang"], r["query_id"]): r["topic"] for r in read(run / "topics.jsonl")}
    for name, stage in (("naive", "candidates"), ("filtered", "filtered"), ("augmented", "augmented")):
        with open(work / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for record in read(run / f"{stage}.jsonl"):
                if name == "naive":  # knows no false negatives, so it masks none
                    record["negative_passages"] = record.pop("candidate_passages")
                    record.pop("false_negatives", None)
                record["negative_passages"] = record["negative_passages"][:30]
                record["topic"] = topics[record["lang"], record["query_id"]]
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def table(results):
    """A row a setting: mean and standard deviation over the seeds, the difference from the full method, each language."""
    runs, langs = results["runs"], results["langs"]
    lines = ["| nDCG@10 | avg | sd | seeds | to full | R@100 | " + " | ".join(langs) + " |", "|---" * (6 + len(langs)) + "|"]
    full = [r["avg"]["ndcg@10"] for r in runs.get("+ batches and weights: full", {}).values()]
    for name in ("start", *ROWS):
        rows = list(runs.get(name, {}).values())
        if rows:
            avg = [100 * r["avg"]["ndcg@10"] for r in rows]
            cells = [f"{mean(avg):.1f}", f"{stdev(avg):.1f}" if len(avg) > 1 else "", str(len(avg)),
                     f"{mean(avg) - 100 * mean(full):+.1f}" if full else "", f"{100 * mean(r['avg']['recall@100'] for r in rows):.1f}",
                     *(f"{100 * mean(r[lang]['ndcg@10'] for r in rows):.1f}" for lang in langs)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True), parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--encoder", required=True), parser.add_argument("--seeds", nargs="+", default=["13", "14", "15"])
    parser.add_argument("--epochs", default="3"), parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--results", type=Path, default=ROOT / "results/ablate_training.json")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many; the next call goes on")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()
    results = json.loads(args.results.read_text("utf-8")) if args.results.exists() else {"runs": {}, "seconds": 0}
    if not args.table:
        args.work.mkdir(parents=True, exist_ok=True)
        make_inputs(args.run, args.work)
    settings = ["--lr", "1e-3", "--temperature", "0.05", "--epochs", args.epochs]
    results |= {"settings": settings, "rows": {name: [negatives, *flags] for name, (negatives, flags) in ROWS.items()}}
    jobs = [("start", "-")] + [(name, seed) for seed in args.seeds for name in ROWS]
    begun = time.time()
    for name, seed in [] if args.table else jobs:
        if time.time() - begun > 60 * args.minutes:
            break
        if seed in results["runs"].get(name, {}):
            continue
        model, out = args.work / "model", args.work / "eval"
        shutil.rmtree(model, ignore_errors=True)
        evaluate = [sys.executable, ROOT / "06_eval.py", "--data", args.data, "--models", args.encoder if name == "start" else model,
                    "--cache", args.work / "cache", "--out", out, "--overwrite"]
        commands = [evaluate]
        if name != "start":
            negatives, flags = ROWS[name]
            commands = [[sys.executable, ROOT / "05_train.py", "--input", args.work / f"{negatives}.jsonl", "--encoder", args.encoder,
                         "--seed", seed, *settings, *flags, "--out", model, "--overwrite"], evaluate]
        started = time.time()
        for command in commands:
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        (scores,) = json.loads((out / "metrics.json").read_text("utf-8"))["models"].values()
        shutil.rmtree(args.work / "cache")
        results["langs"] = [lang for lang in scores if lang != "avg"]
        results["runs"].setdefault(name, {})[seed] = scores | {"seconds": round(time.time() - started)}
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
