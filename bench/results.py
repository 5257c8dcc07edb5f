"""Write RESULTS.md, and the README's measured numbers, from results/*.json: none of them is typed by hand.

Reads   results/NAME.json, and README.md with two kinds of marks
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
PAGE = """# Results

Everything that was measured, also what did not help. Made by `python bench/results.py` from
`results/*.json`, never by hand; a test fails where it is not. The corpora are small (mini-MIRACL is a cut
of MIRACL, the sample was written for this project) and the judge is a stand-in and no language model, so
the numbers tell what the pipeline does and do not compare with published ones. What the paper's setting
needs on full MIRACL is counted in [SCALING.md](SCALING.md).

In the tables of scores `bm25` is the lexical baseline, `model` the full method; the model that has no
difference is the encoder it starts from, made by `sample/make_encoder.py` from the passages alone.
Differences come with interval and p of a bootstrap of the average over languages, p after Holm's correction
over the table. `*`: no training queries in this language.

## A real encoder

`multilingual-e5-small` instead of the one made on the spot. Its makers' training data is said to include
MIRACL's training set, so its row is called "before training" and not "zero-shot". Learning rate and number of
updates go by training queries that are held out from training, not by dev queries:

```bash
make topics DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl LANGS="sw te id ar zh" \\
    ENCODER=intfloat/multilingual-e5-small RUN=runs/e5-five
python bench/real_encoder.py curve --input runs/e5-five/topics.jsonl \\
    --encoder intfloat/multilingual-e5-small --work runs/e5-five/curve --train-flags "--language-power 0.5 \\
    --topic-power 0.5 --passage-max-len 128 --chunk-tokens 4096 --dtype bf16"
```

{{curve real-encoder-curve}}

Three seeds a row, the same number of updates, the same evaluation. The filter by people's labels is no row:
what they judged relevant is a positive of its query, which mining takes out of every list of candidates, so
it removes nothing; what a perfect judge brings is [simulated](#how-good-must-the-judge-be) with hidden
positives. The sample is what the models were not trained on. `--dtype bf16` is for CPUs that have it
(`avx512_bf16`, `amx_bf16`); on others leave it out.

```bash
make data  # of the sample
python bench/ablations.py --data data/minimiracl --run runs/e5-five \\
    --encoder intfloat/multilingual-e5-small --epochs 1 --also data/sample --read-flags "--dtype bf16" \\
    --train-flags "--lr 2e-5 --passage-max-len 128 --chunk-tokens 4096 --dtype bf16" \\
    --against "before training" "naive top-k" --out results/real-encoder.json --rows BM25 "before training" \\
    "naive top-k" "naive, filtered" "full method, drawn by share^0.5" "full method" \\
    "false negatives as positives, drawn by share^0.5"
```

{{ablations real-encoder}}

Further rows, of the other strategies for negatives: `--rows "top-k shifted by 10" "score under 0.6"
"margin of 0.15 to the positive" "under 90% of the positive"`. The same rows one by one, with one seed:

```bash
make all DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl LANGS="sw te id ar zh" \\
    ENCODER=intfloat/multilingual-e5-small RUN=runs/e5-five
python 01_mine_candidates.py --data data/minimiracl --retrievers bm25 intfloat/multilingual-e5-small \\
    --fusion rrf --strategy topk --depth 30 --out runs/e5-five/rows/negatives.jsonl
python 05_train.py --input runs/e5-five/rows/negatives.jsonl --encoder intfloat/multilingual-e5-small \\
    --mixed --topic-power 1 --weighting none --epochs 1 --lr 2e-5 --passage-max-len 128 --chunk-tokens 4096 \\
    --out runs/e5-five/rows/naive
python 05_train.py --input runs/e5-five/filtered.jsonl --encoder intfloat/multilingual-e5-small --mixed \\
    --topic-power 1 --weighting none --epochs 1 --lr 2e-5 --passage-max-len 128 --chunk-tokens 4096 \\
    --out runs/e5-five/rows/filtered
python 05_train.py --input runs/e5-five/topics.jsonl --encoder intfloat/multilingual-e5-small --epochs 1 \\
    --lr 2e-5 --passage-max-len 128 --chunk-tokens 4096 --out runs/e5-five/rows/power-0
python offline_llm.py --exec python 02_filter_false_negatives.py --input runs/e5-five/candidates.jsonl \\
    --llm offline-stand-in --relabel-at 2 --out runs/e5-five/rows/filtered.jsonl
python offline_llm.py --exec python 03_generate_negatives.py --input runs/e5-five/rows/filtered.jsonl \\
    --data data/minimiracl --retrievers bm25 intfloat/multilingual-e5-small --fusion rrf \\
    --llm offline-stand-in --out runs/e5-five/rows/augmented.jsonl
python 04_cluster_topics.py --input runs/e5-five/rows/augmented.jsonl \\
    --encoder intfloat/multilingual-e5-small --out runs/e5-five/rows/topics.jsonl
python 05_train.py --input runs/e5-five/rows/topics.jsonl --encoder intfloat/multilingual-e5-small \\
    --language-power 0.5 --topic-power 0.5 --epochs 1 --lr 2e-5 --passage-max-len 128 --chunk-tokens 4096 \\
    --out runs/e5-five/rows/relabelled
python 06_eval.py --data data/minimiracl --out runs/e5-five/eval --models bm25 \\
    intfloat/multilingual-e5-small runs/e5-five/rows/naive runs/e5-five/rows/filtered \\
    runs/e5-five/rows/power-0 runs/e5-five/rows/relabelled runs/e5-five/model \\
    --baseline intfloat/multilingual-e5-small runs/e5-five/rows/naive
python 06a_report.py --run runs/e5-five --out runs/e5-five/eval
python bench/results.py --collect runs/e5-five minimiracl-5-e5
```

{{scores minimiracl-5-e5}}

{{figures minimiracl-5-e5 scores removed loss}}

The full method's model, evaluated by sentence-transformers:

```bash
python bench/real_encoder.py check --model runs/e5-five/model --data data/minimiracl --eval runs/e5-five/eval
```

{{check real-encoder-check}}

All languages of mini-MIRACL; German and Yoruba have no training queries:

```bash
make topics DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl DATA=data/minimiracl-all \\
    ENCODER=intfloat/multilingual-e5-small RUN=runs/e5-all
python bench/ablations.py --data data/minimiracl-all --run runs/e5-all \\
    --encoder intfloat/multilingual-e5-small --epochs 1 --read-flags "--dtype bf16" \\
    --train-flags "--lr 2e-5 --passage-max-len 128 --chunk-tokens 4096 --dtype bf16" \\
    --against "before training" "naive top-k" --out results/real-encoder-all.json --rows BM25 \\
    "before training" "naive top-k" "naive, filtered" "full method, drawn by share^0.5"
```

{{ablations real-encoder-all}}

### The sample with a real encoder

```bash
make all ENCODER=intfloat/multilingual-e5-small RUN=runs/e5
python bench/results.py --collect runs/e5 sample-e5
```

{{scores sample-e5}}

## The sample, 16 languages

```bash
make all
python bench/results.py --collect runs/sample sample
```

{{scores sample}}

{{figures sample scores removed loss}}

## mini-MIRACL, five languages

```bash
make all DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl LANGS="sw te id ar zh"
```

and the usual recipe beside it: the best candidates as negatives, mixed batches, no weights.

```bash
python 01_mine_candidates.py --data data/minimiracl --retrievers bm25 models/minimiracl --fusion rrf \\
    --strategy topk --depth 30 --out runs/minimiracl/naive/negatives.jsonl
python 05_train.py --input runs/minimiracl/naive/negatives.jsonl --encoder models/minimiracl --mixed \\
    --topic-power 1 --weighting none --epochs 8 --lr 1e-3 --temperature 0.05 --out runs/minimiracl/naive/naive
python 06_eval.py --data data/minimiracl --models bm25 models/minimiracl runs/minimiracl/naive/naive \\
    runs/minimiracl/model --baseline models/minimiracl runs/minimiracl/naive/naive --out runs/minimiracl/eval
python 06a_report.py --run runs/minimiracl --out runs/minimiracl/eval
python bench/results.py --collect runs/minimiracl minimiracl-5
```

{{scores minimiracl-5}}

{{figures minimiracl-5 scores removed loss}}

## mini-MIRACL, all languages

```bash
make all DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl
python bench/results.py --collect runs/minimiracl minimiracl
```

{{scores minimiracl}}

## What it costs

Seconds and peak memory of each stage in these runs; LLM calls and tokens are those of the stand-in, whose
tokens are bytes / 4.

{{costs sample sample-e5 minimiracl-5 minimiracl-5-e5}}

## From naive negatives to the full method, fifteen languages

Every language of mini-MIRACL that has training queries, with the path from naive negatives to the full
method, languages drawn in other proportions, and batches without topics or weights. With the updates of four
epochs:

```bash
LANGS="ar bn en es fa fi fr hi id ja ko ru sw te zh"
make topics DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl LANGS="$LANGS" RUN=runs/fifteen
python bench/ablations.py --data data/minimiracl --run runs/fifteen --encoder models/minimiracl \\
    --out results/ablations-15-4.json --lang $LANGS --rows "naive top-k" "naive, filtered" \\
    "naive, filtered, brought to N (no stage 3)" "full method" "full method, drawn by share^0.5" \\
    "languages by share^0.5" "languages by share" "languages by share^0.5, no topic balance" \\
    "no topic balance" "no weights"
```

{{ablations ablations-15-4}}

The naive row and the full ones with the updates of sixteen epochs (`--epochs 16`), after which they no
longer differ measurably:

{{ablations ablations-15-16}}

`make` trains as the row that is drawn by the root of the shares; `POWER=0` is the paper's reading. That was
chosen on this table, which its interval does not count. Filter and generation have little to do here: the
stand-in finds few false negatives, so few queries are short of negatives.

## What each part brings

Rows of the paper's ablation tables and of its sweep of N, and the batch size, on mini-MIRACL; `--rows NAME`
of `bench/ablations.py` makes one.

```bash
make ablations DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl LANGS="sw te id ar zh"
```

{{ablations ablations}}

## How good must the judge be?

A labelled simulation, no language model: training keeps one positive a query and hides the others, a local
endpoint judges from the labels and errs at a set rate. Two further positives are planted a query. On the
sample:

```bash
make judge-quality JUDGE="--errors 0 0.2"
```

{{reading judge-quality-sample}}

{{figure judge-quality-sample}}

{{judge_quality judge-quality-sample}}

On mini-MIRACL:

```bash
make judge-quality DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl LANGS="sw te id ar zh" \\
    JUDGE="--errors 0 0.1 0.3 --weak sw te --epochs 2"
```

{{reading judge-quality-minimiracl}}

{{figure judge-quality-minimiracl}}

{{judge_quality judge-quality-minimiracl}}

## Beside sentence-transformers

The same work on the same texts and model, in turn: vectors, first loss, mined passages and scores are
compared before a time counts. A ratio is the second over the first: beside a peer, above one is in favour
of this project; for ten times the size it is the growth.

```bash
make bench DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl LANGS="sw te id ar zh"
```

{{peers peers}}

## A record after all stages

A line of `topics.jsonl` as `make topics RUN=runs/records DEPTH=20 N=22` wrote it; of each list one passage is
shown.

{{record topics}}

## Reproduction log

{{log}}

Add your run, also one that disagrees: `python bench/results.py --collect RUN NAME --by YOU`.
"""


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
    the start may be those of a run named first."""
    by_rows = load(names[-1])
    langs, shown = by_rows["langs"], ("not trained", "step by step")
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
                         *[""] * len(keys), *(f"{100 * of_lang[lang]['ndcg@10']:.1f}" for lang in langs)])
    for row in wanted:
        trained = row["group"] == "step by step"
        sd = f" ± {row['sd']:.1f}" if trained and row["sd"] is not None else ""
        score = f"**{row['ndcg@10']:.1f}**" if trained else f"{row['ndcg@10']:.1f}"
        rows.append([row["name"], score + sd, f"{row['recall@100']:.1f}",
                     *(told(row.get(key)) for key in keys),
                     *(f"{row['by_lang'][lang]:.1f}" for lang in langs)])
    header = ["nDCG@10", "avg", "R@100", *(key.replace("_", " ") for key in keys), *langs]
    n_seeds = max(row["seeds"] for row in by_rows["ablations"])
    return (f"{markdown(header, rows)}\n\n{by_rows['queries']} dev queries; trained rows: mean and standard "
            f"deviation of {n_seeds} seeds, difference with 95% interval and p after Holm's correction")


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
