"""Write the README's measured numbers from results/*.json, so that none is typed by hand.

Reads   README.md with two kinds of marks, and results/NAME.json
          <!-- table [VIEW] NAME ... -->  <!-- end -->       what is between the lines; VIEW is a function below, or follows from the file
          <!-- = NAME KEY/KEY/... [FORMAT] -->7.1<!-- / -->   one number in a sentence; FORMATS below
Writes  README.md; a file that is not there yet is shown as "not measured yet"
        --collect RUN NAME: results/NAME.json, RUN/eval/metrics.json with what each stage took, date, commit and machine;
                            results/figures/NAME-*.png, those figures of the report that the README shows
        --records RUN: results/records.json, for each stage one record of RUN, its lists of passages cut to one
Usage   python bench/readme_tables.py
        python bench/readme_tables.py --collect runs/sample sample
        make topics RUN=runs/records DEPTH=20 N=22 && python bench/readme_tables.py --records runs/records
"""

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "candidates": "01_mine_candidates.py",
    "filtered": "02_filter_false_negatives.py",
    "augmented": "03_generate_negatives.py",
    "topics": "04_cluster_topics.py",
}
FORMATS = {
    "": str,
    "%": lambda x: f"{100 * x:.1f}",
    "n": lambda x: f"{x:,}",
    "minutes": lambda s: f"{s / 60:.0f} minutes" if s >= 90 else "a minute",
    "GB": lambda mb: f"{mb / 1024:.1f} GB",
}


def load(name):
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def markdown(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


# --------------------------------------------------------------------------- views: each gets the names after its own


def scores(name):
    """A row a model, nDCG@10 by language, both measures on average, and the test against the baseline."""
    result = load(name)
    models, tests, zero_shot = result["models"], result["tests"], result["settings"]["zero_shot"]
    langs = [lang for lang in next(iter(models.values())) if lang != "avg"]
    rows = []
    for model, of_lang in models.items():
        test = tests.get(model)
        rows.append(
            [
                model,
                f"**{100 * of_lang['avg']['ndcg@10']:.1f}**",
                f"{100 * of_lang['avg']['recall@100']:.1f}",
                *(f"{100 * of_lang[lang]['ndcg@10']:.1f}" for lang in langs),
                f"{100 * test['avg_diff']:+.1f} ({test['p']:.1g})" if test else "",
            ]
        )
    queries = next(iter(models.values()))["avg"]["queries"]
    return (
        markdown(
            [
                "nDCG@10",
                "avg",
                "R@100",
                *(lang + "*" * (lang in zero_shot) for lang in langs),
                "difference (p)",
            ],
            rows,
        )
        + f"\n\n{queries} dev queries"
        + ("; * no training queries in this language" if zero_shot else "")
    )


def costs(*names):
    """What each stage took, a pair of columns a collection, with the sizes below."""
    found = {name: load(name) for name in names}
    names = [name for name in names if found[name] and "stages" in found[name]]
    scripts = sorted({script for name in names for script in found[name]["stages"]})
    rows = [
        [f"`{script}`", *(cell for name in names for cell in pair(found[name]["stages"].get(script)))]
        for script in scripts
    ]
    rows.append(["**all**", *(cell for name in names for cell in pair(found[name]["total"]))])
    for key in (
        "passages",
        "train_queries",
        "dev_queries",
        "llm_calls",
        "prompt_tokens",
        "completion_tokens",
    ):
        rows.append(
            [
                key.replace("_", " ").replace("llm", "LLM"),
                *(cell for name in names for cell in (f"{found[name]['sizes'][key]:,}", "")),
            ]
        )
    return markdown(["", *(head for name in names for head in (f"{name}, s", "peak MB"))], rows)


def pair(took):
    return (
        (f"{took['seconds']:,.{took['seconds'] < 10:d}f}", f"{took['peak_memory_mb']:,}")
        if took
        else ("", "")
    )


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
        if made := result.get("made"):
            models = [
                f"{name} {100 * of_lang['avg']['ndcg@10']:.1f}"
                for name, of_lang in result.get("models", {}).items()
            ]
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


def bench(module):
    """The table of a bench script, beside the code that made its numbers: its table(result)."""
    return lambda name: importlib.import_module(module).table(load(name))


VIEWS = {view.__name__: view for view in (scores, costs, record, figure, reading, figures, log)}
SHAPES = {
    "models": scores,
    "ablations": bench("ablations"),
    "summary": bench("judge_quality"),
}  # what a file is, by a key that it has


def table(*words):
    """What stands between `<!-- table WORDS -->` and `<!-- end -->`."""
    view, names = (VIEWS[words[0]], words[1:]) if words[0] in VIEWS else (None, words)
    files = ["records"] if view is record else names[:1] if view is figures else names
    if missing := [name for name in files if load(name) is None]:
        if view is not costs:
            return f"*Not measured yet: `results/{missing[0]}.json` is to come.*"
    return (view or next(SHAPES[key] for key in load(names[0]) if key in SHAPES))(*names)


def number(name, path, form=""):
    value = load(name)
    for key in path.split("/"):
        value = value[key]
    return FORMATS[form](value)


def fill(text):
    text = re.sub(
        r"(<!-- table (.+?) -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{table(*m[2].split())}\n{m[3]}",
        text,
        flags=re.S,
    )
    return re.sub(r"(<!-- = (.+?) -->).*?(<!-- / -->)", lambda m: m[1] + number(*m[2].split()) + m[3], text)


# --------------------------------------------------------------------------- what a run leaves


def made(by="maintainers"):
    """When, from which commit, on which machine, by whom."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    cpu = (
        re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
        if Path("/proc/cpuinfo").exists()
        else None
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit,
        "by": by,
        "machine": f"{len(os.sched_getaffinity(0))} cores, {cpu[1] if cpu else 'unknown CPU'}, {memory:.0f} GB",
    }


def collect(run, name, by):
    result = json.loads((run / "eval/metrics.json").read_text("utf-8"))
    metas = [
        Path(result["settings"]["data"] + ".meta.json"),
        *run.glob("*.meta.json"),
        *run.glob("eval/*.meta.json"),
    ]
    metas = sorted((json.loads(path.read_text("utf-8")) for path in metas), key=lambda meta: meta["script"])
    calls = [
        of for meta in metas for of in (meta["counts"].get("calls") or {}).values() if isinstance(of, dict)
    ]
    stages = {meta["script"]: {key: meta[key] for key in ("seconds", "peak_memory_mb")} for meta in metas}
    data = metas[0]["counts"]
    result |= {
        "stages": stages,
        "sizes": {
            **{key: data[key] for key in ("passages", "train_queries", "dev_queries")},
            **{
                to: sum(of.get(key, 0) for of in calls)
                for to, key in (
                    ("llm_calls", "asked"),
                    ("prompt_tokens", "prompt_tokens"),
                    ("completion_tokens", "completion_tokens"),
                )
            },
        },
    }
    result["total"] = {
        "seconds": round(sum(of["seconds"] for of in stages.values()), 1),
        "peak_memory_mb": max(of["peak_memory_mb"] for of in stages.values()),
    }
    result["made"] = made(by) | {"versions": next(meta["versions"] for meta in metas if "versions" in meta)}
    titles = re.findall(
        r"^!\[(.*)\]\(figures/(\w+)\.png\)$", (run / "eval/report.md").read_text("utf-8"), re.M
    )
    shown = " ".join(
        re.findall(
            rf"<!-- table figures {re.escape(name)} (.+?) -->", (ROOT / "README.md").read_text("utf-8")
        )
    ).split()
    result["figures"] = {key: title for title, key in titles if key in shown}
    (ROOT / "results/figures").mkdir(exist_ok=True)
    for key in result["figures"]:
        shutil.copyfile(run / f"eval/figures/{key}.png", ROOT / f"results/figures/{name}-{key}.png")
    save(name, result)


def collect_records(run):
    """A query for which all stages had something to do, as each of them left it: in English, surely judged, short."""
    lines = {
        stage: {
            (r["lang"], r["query_id"]): r
            for r in map(json.loads, open(run / f"{stage}.jsonl", encoding="utf-8"))
        }
        for stage in STAGES
    }
    telling = [
        key
        for key, r in lines["topics"].items()
        if r["false_negatives"]
        and r["generated_query"]
        and any(p["source"] == "generated-query" for p in r["negative_passages"])
    ]
    key = min(
        telling,
        key=lambda key: (
            key[0] != "en",
            -lines["topics"][key]["false_negatives"][0]["grade"],
            len(json.dumps(short(lines["topics"][key]))),
            key,
        ),
    )
    save("records", {stage: short(of_stage[key]) for stage, of_stage in lines.items()})


def short(record):
    """The record with one passage of each list: the first, or the first that stage 03 found."""

    def one(passages):
        return ([p for p in passages if p.get("source") == "generated-query"] or passages)[:1]

    return {key: one(value) if isinstance(value, list) else value for key, value in record.items()}


def save(name, result):
    (ROOT / "results" / f"{name}.json").write_text(
        json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8"
    )


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
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
