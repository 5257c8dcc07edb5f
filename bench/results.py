"""Write RESULTS.md, and the README's measured numbers, from results/*.json: none of them is typed by hand.

Reads   results/NAME.json, bench/RESULTS.in.md, and README.md with two kinds of marks
          <!-- table VIEW NAME ... -->  <!-- end -->          what is between the lines; of VIEWS below
          <!-- = NAME KEY/KEY/... [FORMAT] -->7.1<!-- / -->   one number in a sentence; FORMATS below
Writes  RESULTS.md, README.md; a result that is not there yet is shown as "not measured yet"
        --collect RUN NAME: results/NAME.json, RUN/eval/metrics.json with what each stage took, date, commit,
                            machine; results/figures/NAME-*.png, the figures of its report
        --records RUN: results/records.json, for each stage one record of RUN, its lists cut to one passage
Usage   python bench/results.py
        python bench/results.py --collect runs/sample sample
        make topics RUN=runs/records DEPTH=20 N=22 && python bench/results.py --records runs/records
"""

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))  # for the tables that are written beside what measures them
STAGES = ("candidates", "filtered", "augmented", "topics")
SIZES = ("passages", "train_queries", "dev_queries", "llm_calls", "prompt_tokens", "completion_tokens")
FORMATS = {
    "": str,
    "%": lambda x: f"{100 * x:.1f}",
    "n": lambda x: f"{x:,}",
    "minutes": lambda s: f"{s / 60:.0f} minutes" if s >= 90 else "a minute",
    "GB": lambda mb: f"{mb / 1024:.1f} GB",
}
PAGE = (ROOT / "bench/RESULTS.in.md").read_text("utf-8")  # with {{VIEW NAME ...}} for its tables


def load(name):
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def markdown(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# --------------------------------------------------------------------------- views


def scores(name, called=None):
    """A row a model: both measures on average, the tests against the baselines, nDCG@10 by language."""
    result = load(name)
    models, zero_shot = result["models"], result["settings"]["zero_shot"]
    langs = [lang for lang in next(iter(models.values())) if lang != "avg"]
    baselines = result["settings"]["baselines"]
    tests = {(test["model"], test["vs"]): test for test in result["tests"]}
    tests |= {(vs, model): None for model, vs in tests}  # of a pair of baselines, told once
    called = called or {}
    rows = []
    for model, of_lang in models.items():
        differences = []
        for baseline in baselines:
            test = tests.get((model, baseline))
            if test is None:
                differences.append("")
                continue
            low, high = (f"{100 * bound:+.1f}" for bound in test["ci95"])
            differences.append(f"{100 * test['diff']:+.1f} [{low}, {high}], p {test['p_holm']:.2g}")
        rows.append([called.get(model, model), f"**{100 * of_lang['avg']['ndcg@10']:.1f}**",
                     f"{100 * of_lang['avg']['recall@100']:.1f}", *differences,
                     *(f"{100 * of_lang[lang]['ndcg@10']:.1f}" for lang in langs)])
    header = ["nDCG@10", "avg", "R@100", *(f"to {called.get(baseline, baseline)}" for baseline in baselines),
              *(lang + "*" * (lang in zero_shot) for lang in langs)]
    queries = next(iter(models.values()))["avg"]["queries"]
    note = "; * no training queries in this language" if zero_shot else ""
    if baselines:
        note += "; differences with 95% interval and p (Holm), by a bootstrap of the average over languages"
    return f"{markdown(header, rows)}\n\n{queries} dev queries{note}"


def main_table(*names):
    """The README's: the untrained rows and the path from naive to full, of the ablations named last; BM25 and
    the start may be those of a run named first. Of further sets of queries the average and what it gains on
    naive."""
    by_rows = load(names[-1])
    langs, shown = by_rows["langs"], ("not trained", "step by step")
    further = by_rows.get("further", {})
    wanted = [row for row in by_rows["ablations"] if row["group"] in shown]
    keys = [key for key in ("to_before", "to_naive") if any(row.get(key) for row in wanted)]
    rows = []
    for name in names[:-1]:
        result = load(name)
        called = {"bm25": "BM25", result["settings"]["baselines"][0]: "encoder it starts from"}
        for model, title in called.items():
            of_lang = result["models"][model]
            average = of_lang["avg"]
            rows.append([title, f"{100 * average['ndcg@10']:.1f}", f"{100 * average['recall@100']:.1f}",
                         *[""] * len(keys), *(f"{100 * of_lang[lang]['ndcg@10']:.1f}" for lang in langs),
                         *[""] * 2 * len(further)])
    for row in wanted:
        trained = row["group"] == "step by step"
        score = f"**{row['ndcg@10']:.1f}**" if trained else f"{row['ndcg@10']:.1f}"
        rows.append([row["name"], score + deviation(row, trained), f"{row['recall@100']:.1f}",
                     *(told(row.get(key)) for key in keys),
                     *(f"{row['by_lang'][lang]:.1f}" for lang in langs)])
        for of_set in further.values():
            found = of_set["rows"].get(row["name"])
            rows[-1] += ["", ""] if not found else [
                f"{found['ndcg@10']:.1f}{deviation(found, trained)}", told(found["to_naive"])]
    header = ["nDCG@10", "avg", "R@100", *(key.replace("_", " ") for key in keys), *langs]
    for what in further:
        header += [what, "to naive"]
    n_seeds = max(row["seeds"] for row in by_rows["ablations"])
    queries = "".join(f", {of_set['queries']} of {what}" for what, of_set in further.items())
    return (f"{markdown(header, rows)}\n\n{by_rows['queries']} dev queries{queries}; trained rows: mean and "
            f"standard deviation of {n_seeds} seeds, difference with 95% interval and p after Holm's "
            "correction")


def deviation(row, trained):
    """Of the seeds; without training there is none."""
    return f" ± {row['sd']:.1f}" if trained and row["sd"] is not None else ""


def told(test):
    """A difference, its interval and p."""
    if not test:
        return ""
    low, high = test["ci95"]
    return f"{test['diff']:+.1f} [{low:+.1f}, {high:+.1f}], p {test['p_holm']:.2g}"


def costs(*names):
    """What each stage took, a pair of columns a collection, with the sizes below."""
    found = {name: load(name) for name in names}
    found = {name: result for name, result in found.items() if result and "stages" in result}
    header = [""]
    for name in found:
        header += [f"{name}, s", "peak MB"]
    rows = []
    for script in sorted({script for result in found.values() for script in result["stages"]}):
        row = [f"`{script}`"]
        for result in found.values():
            row += took(result["stages"].get(script))
        rows.append(row)
    row = ["**all**"]
    for result in found.values():
        row += took(result["total"])
    rows.append(row)
    for key in SIZES:
        row = [key.replace("_", " ").replace("llm", "LLM")]
        for result in found.values():
            row += [f"{result['sizes'][key]:,}", ""]
        rows.append(row)
    return markdown(header, rows)


def took(stage):
    if not stage:
        return ["", ""]
    digits = 1 if stage["seconds"] < 10 else 0
    return [f"{stage['seconds']:,.{digits}f}", f"{stage['peak_memory_mb']:,}"]


def record(stage):
    """One line that the stage wrote."""
    return "```json\n" + json.dumps(load("records")[stage], ensure_ascii=False) + "\n```"


def figure(name):
    """results/NAME.png, described by the first sentence of its reading."""
    return f"![{' '.join(load(name)['reading'][:1])}](results/{name}.png)"


def reading(name):
    return " ".join(load(name)["reading"])


def figures(name, *wanted):
    """These figures of a collected run's report, each with its finding; before --collect there are none."""
    titles = load(name).get("figures", {})
    return "\n\n".join(
        f"![{titles[key]}](results/figures/{name}-{key}.png)" for key in wanted if key in titles
    )


def log():
    """Every result file that knows when, where and by whom it was made."""
    rows = []
    for path in sorted((ROOT / "results").glob("*.json")):
        result = load(path.stem)
        if "made" in result:
            made = result["made"]
            models = [f"{name} {100 * of['avg']['ndcg@10']:.1f}" for name, of in result["models"].items()]
            rows.append(
                [
                    made["date"],
                    f"`{made['commit']}`",
                    made["machine"],
                    f"`results/{path.name}`",
                    ", ".join(models),
                    made["by"],
                ]
            )
    return markdown(["date", "commit", "machine", "file", "nDCG@10, average", "who"], sorted(rows))


def ablations(name):
    return importlib.import_module("ablations").table(load(name))


def curve(name):
    return importlib.import_module("real_encoder").curve_table(load(name))


def check(name):
    return importlib.import_module("real_encoder").check_table(load(name))


def peers(name):
    return importlib.import_module("peers").table(load(name))


def judge_quality(name):
    return importlib.import_module("judge_quality").table(load(name))


VIEWS = {
    "scores": scores,
    "main": main_table,
    "costs": costs,
    "record": record,
    "figure": figure,
    "reading": reading,
    "figures": figures,
    "log": log,
    "ablations": ablations,
    "judge_quality": judge_quality,
    "curve": curve,
    "check": check,
    "peers": peers,
}


def table(view, *names):
    """What stands between `<!-- table VIEW NAMES -->` and `<!-- end -->`."""
    files = {"record": ["records"], "figures": names[:1], "costs": []}.get(view, names)
    missing = [name for name in files if load(name) is None]
    if missing:
        return f"*Not measured yet: `results/{missing[0]}.json` is to come.*"
    return VIEWS[view](*names)


def number(name, path, form=""):
    value = load(name)
    if value is None:
        return "not measured yet"
    for key in path.split("/"):
        value = value[key]
    return FORMATS[form](value)


def page():
    """RESULTS.md."""
    return re.sub(r"\{\{(.+?)\}\}", lambda found: table(*found[1].split()), PAGE)


def fill(text):
    """The README with its marks filled."""

    def filled(found):
        return f"{found[1]}{table(*found[2].split())}\n{found[3]}"

    text = re.sub(r"(<!-- table (.+?) -->\n).*?(<!-- end -->)", filled, text, flags=re.S)
    return re.sub(r"(<!-- = (.+?) -->).*?(<!-- / -->)", lambda m: m[1] + number(*m[2].split()) + m[3], text)


# --------------------------------------------------------------------------- what a run leaves


def made_by(who):
    """When, from which commit, on which machine, by whom."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"^model name\s*: (.*)", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{len(os.sched_getaffinity(0))} cores, {cpu[1] if cpu else 'unknown CPU'}, {memory:.0f} GB"
    return {"date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": commit, "by": who, "machine": machine}


def read(path):
    return json.loads(path.read_text("utf-8"))


def collect(run, name, who):
    result = read(run / "eval/metrics.json")
    metas = [
        Path(result["settings"]["data"] + ".meta.json"),
        *run.glob("*.meta.json"),
        *run.glob("eval/*.meta.json"),
    ]
    metas = sorted(map(read, metas), key=lambda meta: meta["script"])
    stages = {meta["script"]: {key: meta[key] for key in ("seconds", "peak_memory_mb")} for meta in metas}
    calls = [
        of for meta in metas for of in (meta["counts"].get("calls") or {}).values() if isinstance(of, dict)
    ]
    sizes = {key: metas[0]["counts"][key] for key in SIZES[:3]}
    sizes["llm_calls"] = sum(of.get("asked", 0) for of in calls)
    for key in SIZES[4:]:
        sizes[key] = sum(of.get(key, 0) for of in calls)
    total = {
        "seconds": round(sum(of["seconds"] for of in stages.values()), 1),
        "peak_memory_mb": max(of["peak_memory_mb"] for of in stages.values()),
    }
    versions = next(meta["versions"] for meta in metas if "versions" in meta)
    report = (run / "eval/report.md").read_text("utf-8")
    titles = {key: title for title, key in re.findall(r"^!\[(.*)\]\(figures/(\w+)\.png\)$", report, re.M)}
    (ROOT / "results/figures").mkdir(exist_ok=True)
    for key in titles:
        shutil.copyfile(run / f"eval/figures/{key}.png", ROOT / f"results/figures/{name}-{key}.png")
    save(
        name,
        result
        | {
            "stages": stages,
            "sizes": sizes,
            "total": total,
            "made": made_by(who) | {"versions": versions},
            "figures": titles,
        },
    )


def collect_records(run):
    """A query for which all stages had something to do, as each left it: in English, surely judged, short."""
    lines = {}
    for stage in STAGES:
        with open(run / f"{stage}.jsonl", encoding="utf-8") as file:
            lines[stage] = {(r["lang"], r["query_id"]): r for r in map(json.loads, file)}
    choices = []
    for key, found in lines["topics"].items():
        generated = any(p["source"] == "generated-query" for p in found["negative_passages"])
        if found["false_negatives"] and found["generated_query"] and generated:
            grade = found["false_negatives"][0]["grade"]
            choices.append((key[0] != "en", -grade, len(json.dumps(short(found))), key))
    key = min(choices)[-1]
    save("records", {stage: short(of_stage[key]) for stage, of_stage in lines.items()})


def short(record):
    """The record with one passage of each list: the first, or the first that stage 03 found."""
    cut = {}
    for key, value in record.items():
        if isinstance(value, list):
            value = ([p for p in value if p.get("source") == "generated-query"] or value)[:1]
        cut[key] = value
    return cut


def save(name, result):
    text = json.dumps(result, ensure_ascii=False, indent=1)
    (ROOT / "results" / f"{name}.json").write_text(text + "\n", "utf-8")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--collect", nargs=2, metavar=("RUN", "NAME"), help="first make results/NAME.json from a finished run"
    )
    parser.add_argument(
        "--records", type=Path, metavar="RUN", help="first make results/records.json from a run"
    )
    parser.add_argument("--by", default="maintainers", help="who made the run, for the reproduction log")
    args = parser.parse_args()
    if args.collect:
        collect(Path(args.collect[0]), args.collect[1], args.by)
    if args.records:
        collect_records(args.records)
    (ROOT / "RESULTS.md").write_text(page(), "utf-8")
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
