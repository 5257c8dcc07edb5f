"""How good must the judge be? nDCG@10 after training on negatives filtered by a judge with a set error rate.

What    A LABELLED SIMULATION, not a language model. Training keeps one positive a query and hides the
        others, which are then known false negatives in the corpus; these are so few, a percent or two of the
        candidates, that --plant more are made of the kept one: its text, begun in the middle. A local
        endpoint judges from the labels
        (--truth: the sample's complete truth; else people's positives, everything else counts as
        irrelevant) and errs at the given rate: of a relevant passage (grade 2) it says 0 or 1, of an
        irrelevant one (grade 0) 1 or 2, each half of the times. --drop-at 1 (Sec. 3.3) then removes more of
        both, --drop-at 2 (appendix) less. `relabelled`: what is of grade 2 becomes a positive (02's
        --relabel-at 2), and grade 1 is removed.
How     Stages 01 and 04 once a seed, then 02, 05 and 06 for each judge. In place of stage 03, a query that
        a bad judge leaves with fewer than 7 negatives gets random ones (counted as `filled`). Every row of
        the result is kept as soon as it is there: a killed or stopped run (--minutes) goes on where it was
        when started again.
Beside  `none`: nothing is removed; `stand-in`: offline_llm.py judges; `0`: a perfect judge; the encoder
        before training
Writes  OUT.json (rows, summary, reading), OUT.png
Usage   make judge-quality
        make judge-quality DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl LANGS="sw te id ar zh"
        JUDGE="--weak sw te"
Cost    a row is a run of 02, 05 and 06 with one thread, --jobs at a time
"""

import asyncio
import hashlib
import json
import random
import shutil
import sys
import time
from argparse import REMAINDER
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from threading import Lock

import numpy as np
from ablations import ROOT, stage

from common import (DataError, Parser, atomic, corpus_files, dump, passage_text, positive_int, read_lines,
                    read_passages, read_queries, run, say)

NEGATIVES = 7  # hard negatives a query and step (Sec. 4.1)
KIND = ("judge", "drop_at", "weak", "relabel")


def build_parser():
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--data", metavar="FOLDER", help="a folder made by 00_prepare_data.py")
    flag("--truth", metavar="FOLDER",
         help="qrels of every relevant passage, <split>/<lang>.tsv; default: the positives in --data")
    flag("--encoder", metavar="MODEL", help="where training starts")
    flag("--lang", nargs="+", metavar="CODE", help="use only these languages")
    flag("--errors", nargs="+", type=float, default=[0, 0.1, 0.2, 0.4],
         help="error rates of the judge, 0 to 1")
    flag("--weak", nargs="+", metavar="CODE", default=[], help="languages in which the judge is worse")
    flag("--weak-error", type=float, default=0.4,
         help="its error rate there; elsewhere it is the lowest of --errors above 0")
    flag("--seeds", nargs="+", type=int, default=[13, 14, 15],
         help="of the kept positives, the errors and the training")
    flag("--depth", type=positive_int, default=20, help="candidates per query")
    flag("--plant", type=int, default=2, help="further hidden positives that are made a query")
    flag("--epochs", type=positive_int, default=3, help="of training")
    flag("--train-flags", nargs="+", metavar="FLAG", default=["lr=1e-3", "temperature=0.05"],
         help="further flags of 05_train.py, as name=value")
    flag("--jobs", type=positive_int, default=2, help="rows at a time, each with one thread")
    flag("--minutes", type=float, help="start no further row after so long")
    flag("--work", metavar="FOLDER", help="for what the stages make; default: runs/<name of OUT>")
    flag("--out", metavar="NAME", help="NAME.json and NAME.png")
    flag("--answer", metavar="FILE",
         help="(used by this script) serve answers from this file while --exec runs")
    flag("--error", type=float, default=0.0, help="(used by this script) error rate of the served judge")
    flag("--seed", type=int, default=13, help="(used by this script) of its errors")
    flag("--exec", nargs=REMAINDER, dest="command", help="(used by this script) the command")
    return parser


# --------------------------------------------------------------------------- the labels and the judge

def fingerprint(text):
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def hide(args, seed, folder):
    """A collection in folder like --data but with one positive a query; truth.json has the fingerprints of
    all relevant passages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("qrels", "dev.jsonl"):
        if not (folder / name).exists():
            (folder / name).symlink_to((Path(args.data) / name).resolve())
    records, relevant = [], defaultdict(set)
    for record in read_queries(Path(args.data) / "train.jsonl", args.lang):
        positives = {p["docid"]: p for p in record["positive_passages"]}
        relevant[record["lang"], record["query_id"]] |= set(positives)
        kept = random.Random(f"{seed}:{record['lang']}:{record['query_id']}").choice(sorted(positives))
        records.append(record | {"positive_passages": [positives[kept]]})
    langs = sorted({lang for lang, _ in relevant})
    for lang in langs if args.truth else []:
        path = Path(args.truth) / "train" / f"{lang}.tsv"
        for number, line in read_lines(path):
            fields = line.decode().split()
            if len(fields) != 4:
                raise DataError(f"{path}:{number}: got {len(fields)} fields, want 'query_id 0 docid "
                                "relevance'; check the file")
            if int(fields[3]) > 0 and (lang, fields[0]) in relevant:
                relevant[lang, fields[0]].add(fields[2])
    texts = {}
    for lang in langs:
        plant(args, lang, [r for r in records if r["lang"] == lang], relevant, folder)
        wanted = {docid for (of_lang, _), docids in relevant.items() if of_lang == lang for docid in docids}
        passages = (p for file in corpus_files(folder, lang) for p in read_passages(file, read_lines(file)))
        texts |= {(lang, p["docid"]): fingerprint(passage_text(p)) for p in passages if p["docid"] in wanted}
    truth = {}
    for r in records:
        docids = relevant[r["lang"], r["query_id"]]
        truth[r["query"]] = {"lang": r["lang"], "relevant": sorted(texts[r["lang"], d] for d in docids)}
    for name, lines in (("train.jsonl", map(dump, records)),
                        ("truth.json", [json.dumps(truth, ensure_ascii=False)])):
        with atomic(folder / name) as temporary:
            temporary.write_text("".join(lines), "utf-8")
    return {(lang, query_id): docids for (lang, query_id), docids in relevant.items()}


def plant(args, lang, records, relevant, folder):
    """Write the corpus of a language with --plant more positives a query, which only `relevant` knows."""
    passages = [p for file in corpus_files(args.data, lang) for p in read_passages(file, read_lines(file))]
    planted = []
    for record in records:
        positive = record["positive_passages"][0]
        for number in range(args.plant):
            docid = f"planted:{record['query_id']}:{number}"
            middle = len(positive["text"]) * (number + 1) // (args.plant + 1)
            middle = max(middle, positive["text"].find(" ", middle))  # else in the middle of a word
            text = f"{positive['text'][middle:].strip()} {positive['text'][:middle]}"
            planted.append({"docid": docid, "title": positive.get("title", ""), "text": text})
            relevant[lang, record["query_id"]].add(docid)
    with atomic(folder / "corpus" / f"{lang}.jsonl") as path:
        path.write_text("".join(map(dump, passages + planted)), "utf-8")


def labelled_judge(truth, error, weak=(), weak_error=0.0, seed=13):
    """judge(question, reference, candidate) that answers from truth and errs at the rate of the question's
    language."""

    def judge(question, reference, candidate):
        known = truth.get(question, {"lang": None, "relevant": ()})
        grade = 2 if fingerprint(candidate) in known["relevant"] else 0
        draw = random.Random(f"{seed}:{question}:{candidate}")  # the same errors at a higher rate, and more
        if draw.random() < (weak_error if known["lang"] in weak else error):
            grade = draw.choice([other for other in (0, 1, 2) if other != grade])
        return {"accuracy": grade, "completeness": grade}

    return judge


def answer(args):
    """Run the command beside an endpoint that speaks offline_llm.py's protocol; a negative error rate: it
    finds nothing relevant."""
    import offline_llm
    from sample import stand_in

    truth = json.loads(Path(args.answer).read_text("utf-8"))
    offline_llm.FINGERPRINT = "labelled simulation: answers from known labels, no language model"
    stand_in.judge = (
        labelled_judge(truth, args.error, args.weak, args.weak_error, args.seed)
        if args.error >= 0
        else lambda question, reference, candidate: {"accuracy": 0, "completeness": 0}
    )
    return asyncio.run(offline_llm.serve(0, args.command))


# --------------------------------------------------------------------------- the rows

def judges(args):
    """[{judge, drop_at, weak, relabel}] of one seed, in the order in which they are run."""
    kinds = [("none", 1, False, False), ("stand-in", 1, False, False), ("stand-in", 1, False, True)]
    for error in args.errors:
        kinds.append((error, 1, False, False))
        if error:  # else there is no grade 1
            kinds.append((error, 2, False, False))
        kinds.append((error, 1, False, True))
    elsewhere = min((error for error in args.errors if error), default=0)
    kinds += [(elsewhere, drop_at, True, False) for drop_at in (1, 2) if args.weak]
    return [dict(zip(KIND, kind)) for kind in kinds]


def prepare(args, seed, folder):
    """Mined candidates with topics, from one positive a query."""
    data = folder / "data"
    hide(args, seed, data)
    lang = ["--lang", *args.lang] if args.lang else []
    common = ["--cache", folder.parent / "cache", "--seed", seed, *lang]
    stage(ROOT / "01_mine_candidates.py", "--data", data, "--retrievers", "bm25", args.encoder, "--fusion",
          "rrf", "--depth", args.depth, "--out", folder / "candidates.jsonl", *common)
    stage(ROOT / "04_cluster_topics.py", "--input", folder / "candidates.jsonl", "--encoder", args.encoder,
          "--out", folder / "topics.jsonl", *common)


def judge_name(row):
    return f"{row['judge']}{'-weak' if row['weak'] else ''}"


def variant(row):
    return f"{row['drop_at']}{'-relabelled' if row['relabel'] else ''}"


def one_row(args, seed, row, folder):
    """Filter, train, evaluate: the row with its figures."""
    name = judge_name(row)
    top = folder / name / variant(row)
    filtering = [ROOT / "02_filter_false_negatives.py", "--input", folder / "topics.jsonl", "--llm",
                 f"simulated-{name}", "--drop-at", row["drop_at"], "--cache", folder / name, "--seed", seed,
                 "--out", top / "filtered.jsonl", *(["--relabel-at", 2] if row["relabel"] else [])]
    if row["judge"] == "stand-in":
        stage(ROOT / "offline_llm.py", "--exec", sys.executable, *filtering)
    else:
        error = -1 if row["judge"] == "none" else row["judge"]
        weak = ["--weak", *args.weak, "--weak-error", args.weak_error] if row["weak"] else []
        stage(__file__, "--answer", folder / "data/truth.json", "--error", error, *weak, "--seed", seed,
              "--exec", sys.executable, *filtering)
    flags = [word for flag in args.train_flags for word in ("--" + flag).split("=", 1)]
    n_filled = fill(args, top / "filtered.jsonl", top / "filled.jsonl", seed)
    stage(ROOT / "05_train.py", "--input", top / "filled.jsonl", "--encoder", args.encoder, "--epochs",
          args.epochs, "--negatives", NEGATIVES, *flags, "--seed", seed, "--out", top / "model")
    found = evaluate(args, top / "model", top, top / "cache")
    truth = json.loads((folder / "data/truth.json").read_text("utf-8"))
    return row | {"seed": seed, "filled": n_filled, **removal(top / "filtered.jsonl", truth), **found}


def fill(args, source, target, seed):
    """Bring every record to NEGATIVES with random passages of its language, in place of stage 03; returns
    how many were drawn."""
    docids = {}
    n_filled = 0
    with atomic(target) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in read_queries(source):
            lang, negatives = record["lang"], record["negative_passages"]
            if len(negatives) < NEGATIVES:
                if lang not in docids:
                    docids[lang] = [p for path in corpus_files(args.data, lang)
                                    for p in read_passages(path, read_lines(path))]
                known = {p["docid"] for key in ("positive_passages", "negative_passages", "false_negatives")
                         for p in record[key]}
                free = [p for p in docids[lang] if p["docid"] not in known]
                n_missing = min(len(free), NEGATIVES - len(negatives))
                drawn = random.Random(f"{seed}:{lang}:{record['query_id']}").sample(free, n_missing)
                record["negative_passages"] = negatives + [p | {"source": "random"} for p in drawn]
                n_filled += len(drawn)
            file.write(dump(record))
    return n_filled


def evaluate(args, model, top, cache):
    lang = ["--lang", *args.lang] if args.lang else []
    stage(ROOT / "06_eval.py", "--data", args.data, "--models", model, "--cache", cache, "--out",
          top / "eval", *lang)
    rows = next(iter(json.loads((top / "eval/metrics.json").read_text("utf-8"))["models"].values()))
    return {"ndcg@10": rows["avg"]["ndcg@10"],
            "by_lang": {lang: r["ndcg@10"] for lang, r in rows.items() if lang != "avg"}}


def removal(path, truth):
    """{candidates, hidden (relevant ones among them), removed, right}: what the filter did to the known
    false negatives. They are known by text, as by the judge: two queries may have one positive, and so one
    text among what is planted for them."""
    counts = {"candidates": 0, "hidden": 0, "removed": 0, "right": 0}
    for record in read_queries(path):
        known = truth[record["query"]]["relevant"]
        relabelled = [p for p in record["positive_passages"] if p.get("source") == "relabelled"]
        removed = [fingerprint(passage_text(p)) in known for p in record["false_negatives"] + relabelled]
        kept = [fingerprint(passage_text(p)) in known for p in record["negative_passages"]]
        for key, value in (("candidates", len(removed) + len(kept)), ("hidden", sum(removed) + sum(kept)),
                           ("removed", len(removed)), ("right", sum(removed))):
            counts[key] += value
    return counts


# --------------------------------------------------------------------------- summary and figure

def summarise(result):
    """[{judge, drop_at, weak, relabel, mean, sd, seeds, gain, p, half, ...}] over the seeds; gain is over no
    filter, seed by seed, p of its t-test, half of its 95% interval's width."""
    groups = defaultdict(dict)
    for row in result["rows"]:
        groups[tuple(row[key] for key in KIND)][row["seed"]] = row
    without, curve = groups.get(("none", 1, False, False), {}), []
    for kind, rows in groups.items():
        values = np.array([100 * r["ndcg@10"] for r in rows.values()])
        gains = [round(100 * (r["ndcg@10"] - without[s]["ndcg@10"]), 6)
                 for s, r in rows.items() if s in without]
        total = {k: sum(r[k] for r in rows.values()) for k in ("candidates", "hidden", "removed", "right")}
        curve.append({
            **dict(zip(KIND, kind)),
            "mean": round(float(values.mean()), 2),
            "sd": round(float(values.std(ddof=1)), 2) if len(values) > 1 else None,
            "seeds": len(values),
            "gain": round(float(np.mean(gains)), 2) if gains else None,
            "p": p_of(gains),
            "half": half_width(gains),
            "precision": round(total["right"] / total["removed"], 3) if total["removed"] else None,
            "recall": round(total["right"] / total["hidden"], 3) if total["hidden"] else None})
    return curve


def p_of(gains):
    """Two-sided p of the t-test that gains of several seeds are 0 on average; None for fewer than two."""
    from scipy.stats import ttest_1samp

    if len(gains) < 2:
        return None
    return float(np.mean(gains) == 0) if np.ptp(gains) == 0 else round(float(ttest_1samp(gains, 0).pvalue), 4)


def half_width(gains):
    """Half of the width of the 95% interval of the mean of some seeds' gains; None for fewer than two."""
    from scipy.stats import t

    if len(gains) < 2:
        return None
    return round(float(t.ppf(0.975, len(gains) - 1) * np.std(gains, ddof=1) / len(gains) ** 0.5), 2)


def told(points):
    """`10%: +0.5 (p 0.04), ...` of the gains of a judge's error rates."""
    return ", ".join(f"{'perfect' if c['judge'] == 0 else format(c['judge'], '.0%')}: {c['gain']:+.1f} "
                     f"(p {c['p']:.2g})" for c in points)


def reading(curve):
    """What the curve shows, by strictness, and which differences it cannot show."""
    numbers = [c for c in curve if not isinstance(c["judge"], str) and not c["weak"] and c["p"] is not None]
    if not numbers:
        return []
    kinds = {
        "removing from grade 1 on": [c for c in numbers if c["drop_at"] == 1 and not c["relabel"]],
        "removing grade 2 only": [c for c in numbers if c["drop_at"] == 2],
        "relabelling grade 2 as positives, removing grade 1": [c for c in numbers if c["relabel"]],
    }
    sentences = [f"nDCG@10 over no filter by the judge's error rate, {kind}: "
                 f"{told(sorted(of, key=judge_of))}." for kind, of in kinds.items() if of]
    halves = [c["half"] for c in numbers]
    n_seeds = max(c["seeds"] for c in numbers)
    return [*sentences, f"With {n_seeds} seeds the 95% intervals of these differences reach "
            f"{min(halves):.1f} to {max(halves):.1f} points to either side (median {np.median(halves):.1f}): "
            "smaller ones are not shown here, and none is corrected for the number of rows."]


def judge_of(row):
    return row["judge"]


def table(result):
    """Markdown: a row a judge and strictness."""
    lines = ["| judge | drops at | nDCG@10 | sd | to no filter | precision | recall |", "|---|" + "---:|" * 6]
    names = {"none": "no filter", "stand-in": "the offline stand-in", 0: "perfect"}
    weak = f"; {100 * result['settings']['weak_error']:.0f}% in {' '.join(result['settings']['weak'])}"
    for c in result["summary"]:
        name = names.get(c["judge"]) or f"errs in {100 * c['judge']:.0f}%" + weak * c["weak"]
        name += ", grade 2 relabelled" * c["relabel"]
        forms = {"sd": "{:.1f}", "gain": "{:+.1f}", "precision": "{:.2f}", "recall": "{:.2f}"}
        cells = ["" if c[key] is None else form.format(c[key]) for key, form in forms.items()]
        drop_at = "" if c["judge"] in ("none", 0) else c["drop_at"]
        lines.append(f"| {name} | {drop_at} | {c['mean']:.1f} | " + " | ".join(cells) + " |")
    n_seeds = max((c["seeds"] for c in result["summary"]), default=0)
    settings, before = result["settings"], 100 * result["start"]["ndcg@10"]
    note = ("Precision and recall of what is removed, beside the known false negatives; before training: "
            f"{before:.1f}. {n_seeds} seeds, {settings['epochs']} epochs.")
    return "\n".join([*lines, "", note])


def draw(result, path):
    """The curve as a figure that can be read in black and white."""
    import textwrap

    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    curve, weak_error = result["summary"], result["settings"]["weak_error"]
    pyplot.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    looks = {(1, False): ("o-", "0.0"), (2, False): ("s--", "0.45"), (1, True): ("^-", "0.0"),
             (2, True): ("v--", "0.45")}
    for (drop_at, weak), (style, color) in looks.items():
        points = [c for c in curve if not isinstance(c["judge"], str) and c["weak"] == weak
                  and not c["relabel"]]
        points = [c for c in points if c["drop_at"] == drop_at or c["judge"] == 0 and not weak]
        points.sort(key=judge_of)
        label = f"--drop-at {drop_at}"
        if weak:
            label += f", error {100 * weak_error:.0f}% in {' '.join(result['settings']['weak'])}"
        if points:
            axis.errorbar([100 * c["judge"] for c in points], [c["mean"] for c in points],
                          [c["sd"] or 0 for c in points], fmt=style, color=color, capsize=3, label=label,
                          mfc="white" if weak or drop_at == 2 else color)
    called = {"none": "no filter", "stand-in": "the offline stand-in judges"}
    flat = [c for c in curve if isinstance(c["judge"], str) and not c["relabel"]]
    for c, style in zip(flat, (":", "-.")):
        axis.axhline(c["mean"], color="black", linestyle=style, linewidth=1, label=called[c["judge"]])
    before = f"before training: {100 * result['start']['ndcg@10']:.1f}"
    axis.plot([], [], " ", label=before)  # far below: a line would flatten the rest
    n_seeds = max((c["seeds"] for c in curve), default=0)
    axis.set_xlabel("error rate of the simulated judge (%)")
    axis.set_ylabel(f"nDCG@10 (%), average of {len(result['start']['by_lang'])} languages")
    perfect = next((c for c in curve if c["judge"] == 0 and not c["relabel"] and c["gain"] is not None), None)
    title = f"A perfect judge is worth {perfect['gain']:+.1f} nDCG@10" if perfect else "unfinished"
    title += f" (labelled simulation, not a language model; mean and sd of {n_seeds} seeds)"
    axis.set_title(textwrap.fill(title, 85), fontsize=10)
    axis.legend(frameon=False, fontsize=9)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.command:
        return answer(args)
    for name in ("data", "encoder", "out"):
        if not getattr(args, name):
            raise DataError(f"--{name} is needed; see --help")
    started, path = time.time(), Path(f"{args.out}.json")
    work = Path(args.work or ROOT / "runs" / path.stem).resolve()
    args.data, args.encoder, args.truth = (
        p and str(Path(p).resolve()) if p and Path(p).exists() else p
        for p in (args.data, args.encoder, args.truth)
    )
    settings = {"data": Path(args.data).name, "encoder": Path(args.encoder).name, "truth": bool(args.truth)}
    names = ("lang", "depth", "plant", "epochs", "train_flags", "weak", "weak_error")
    settings |= {name: getattr(args, name) for name in names}
    result = json.loads(path.read_text("utf-8")) if path.is_file() else {"settings": settings, "rows": []}
    if result["settings"] != settings:
        raise DataError(f"{path} was made with other settings ({result['settings']}); give another --out, or "
                        "remove it")

    def save():
        result["summary"] = summarise(result)
        result["reading"] = reading(result["summary"])
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8")

    if "start" not in result:
        result["start"] = evaluate(args, args.encoder, work / "start", work / "cache")
        save()
    done, saving = {(*(r[key] for key in KIND), r["seed"]) for r in result["rows"]}, Lock()
    todo = {seed: [r for r in judges(args) if (*r.values(), seed) not in done] for seed in args.seeds}

    def do(seed, rows, folder):
        """The rows of one judge, one after the other: they share its answers."""
        for row in rows:
            if args.minutes and time.time() - started > 60 * args.minutes:
                return
            made = one_row(args, seed, row, folder)
            with saving:
                result["rows"].append(made)
                order = [*map(str, judges(args))]
                result["rows"].sort(key=lambda r: (r["seed"], order.index(str({k: r[k] for k in row}))))
                save()
            shutil.rmtree(folder / judge_name(row) / variant(row))  # the row is what is kept
            say(dump({k: v for k, v in made.items() if k != "by_lang"}).strip())

    for seed, rows in todo.items():
        if rows and not (args.minutes and time.time() - started > 60 * args.minutes):
            folder = work / f"seed-{seed}"
            prepare(args, seed, folder)
            with ThreadPoolExecutor(args.jobs) as pool:
                of_judges = [list(of) for _, of in groupby(rows, judge_name)]
                list(pool.map(lambda of_judge: do(seed, of_judge, folder), of_judges))
    n_rows = len(args.seeds) * len(judges(args))
    if len(result["rows"]) < n_rows:
        say(f"{path}: {len(result['rows'])} of {n_rows} rows are there; start again to go on")
        return
    save()
    draw(result, Path(f"{args.out}.png"))
    print("\n".join(result["reading"]))


if __name__ == "__main__":
    run(main)
