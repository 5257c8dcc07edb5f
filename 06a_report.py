"""Report of a run: tables beside the paper's, and figures.

Source  Sec. 4: Tables 1, 8 and 13 of the paper, as far as the run has them. The paper's numbers stand beside ours only
        where the data is full MIRACL; elsewhere they are shown for reference and marked as not comparable.
Reads   RUN/eval/metrics.json, RUN/*.jsonl.meta.json, RUN/topics.jsonl, RUN/model.log.jsonl, RUN/model.meta.json, and
        DATA.meta.json beside the evaluated collection; what is not there is left out, and the report says so
Writes  OUT/report.md, OUT/figures/*.png; no number in them is typed by hand but the paper's, which are in PAPER below
Usage   python 06a_report.py --run runs/sample --out runs/sample/eval
        --lang shows these languages only, --limit counts the first N training queries; nothing is drawn, so --seed is idle
Cost    seconds; one pass over topics.jsonl
"""
import json
import re
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from common import (LANGUAGES, DataError, Output, Parser, atomic, parse_line, read_lines, read_queries, run,
                    short_name)

LANGS = "ar bn en es fa fi fr hi id ja ko ru sw te th zh".split()  # the paper's order
PAPER_NDCG = {name: dict(zip(["avg", *LANGS], map(float, row.split()))) for name, row in {  # Table 1, nDCG@10
    "BM25": "39.4 48.1 50.8 35.1 31.9 33.3 55.1 18.3 45.8 44.9 36.9 41.9 33.4 38.3 49.4 48.4 18.0",
    "mBERT": "39.9 46.2 42.8 37.6 44.8 46.2 45.9 41.8 38.6 27.8 41.4 40.1 39.8 29.2 34.4 33.2 48.9",
    "mDPR": "41.5 49.9 44.3 39.4 47.8 48.0 47.2 42.5 38.3 27.2 43.9 41.9 40.7 29.9 35.6 35.8 51.2",
    "mE5": "66.5 76.0 75.9 52.9 52.9 59.0 77.8 54.5 62.0 52.9 70.6 66.5 67.4 74.9 84.6 80.2 56.0",
    "BGE": "69.2 78.4 80.0 56.9 56.1 60.9 78.6 58.3 59.5 56.1 72.8 69.9 70.1 78.7 86.2 82.6 62.7",
    "Ours mBERT": "57.9 66.2 65.5 48.8 48.5 52.7 64.8 53.4 45.4 44.9 61.9 56.2 55.5 64.3 76.3 67.4 54.8",
    "Ours mDPR": "66.8 75.7 74.1 55.9 55.8 61.6 75.8 60.7 53.8 52.1 71.2 67.8 65.1 73.9 84.2 74.8 65.9",
    "Ours mE5": "67.4 77.2 76.7 52.1 52.4 59.8 77.6 56.2 61.7 53.4 71.5 68.3 67.2 75.4 84.8 80.9 62.9",
    "Ours BGE": "70.6 80.6 80.8 57.6 57.4 62.2 79.6 59.8 61.4 57.5 74.6 71.8 71.6 79.6 87.3 83.2 65.3"}.items()}
PAPER_RECALL = {"BM25": 78.7, "mBERT": 77.8, "mDPR": 78.8, "mE5": 94.4, "BGE": 95.6,  # Recall@100, average of 16 languages
                "Ours mBERT": 87.8, "Ours mDPR": 94.4, "Ours mE5": 94.8, "Ours BGE": 95.9}
PAPER_REMOVED = dict(zip(["avg", *LANGS], map(float, (  # Table 8, eliminated false negatives, % of candidates
    "19.5 17.3 9.4 32.6 19.7 19.8 18.2 27.3 17.1 20.9 22.9 19.7 24.5 12.0 12.1 12.1 21.3").split())))
PAPER_STAGE2 = 9.1  # % of the final negatives that come from stage 2
PAPER_BACKBONES = [("bge-m3", "BGE"), ("e5-large", "mE5"), ("mdpr", "mDPR"), ("bert-base-multilingual", "mBERT")]
# MIRACL's sizes, to recognise it: passages in millions, dev queries
MIRACL_PASSAGES = dict(zip(LANGS, map(float, "2.1 0.30 32.9 10.4 2.2 1.9 14.6 0.51 1.4 7.0 1.5 9.5 0.13 0.52 0.54 4.9".split())))
MIRACL_DEV = dict(zip(LANGS, map(int, "2896 411 799 648 632 1271 343 350 960 860 213 1252 482 828 733 393".split())))

STAGES = {"candidates": "01_mine_candidates.py", "filtered": "02_filter_false_negatives.py", "augmented": "03_generate_negatives.py",
          "topics": "04_cluster_topics.py", "model": "05_train.py"}
STAND_IN = "offline-stand-in"
STAND_IN_NOTE = "negatives judged by the offline stand-in, classical text matching, not by a language model"


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--run", required=True, metavar="FOLDER", help="what the stages left: candidates, filtered, ..., model, eval/")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for report.md and figures/")
    return parser


# --------------------------------------------------------------------------- what the stages left

def read_json(path, missing, made_by):
    if not path.is_file():
        missing.append(f"`{path.name}` is not there ({made_by})")
        return {}
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); make it again with {made_by}") from None


def gather(folder, lang=None, limit=None):
    """({name: content, empty where its file is missing}, [files that were read], [what is missing, in words])."""
    missing = []
    paths = {name: folder / (f"{name}.meta.json" if name == "model" else f"{name}.jsonl.meta.json") for name in STAGES}
    paths |= {"metrics": folder / "eval/metrics.json", "eval": folder / "eval/metrics.json.meta.json"}
    found = {name: read_json(path, missing, STAGES.get(name, "06_eval.py")) for name, path in paths.items()}
    if data := found["metrics"].get("settings", {}).get("data"):
        paths["data"] = Path(data).with_name(Path(data).name + ".meta.json")
    found["data"] = read_json(paths["data"], missing, "00_prepare_data.py") if "data" in paths else {}
    paths |= {"log": folder / "model.log.jsonl", "records": folder / "topics.jsonl"}
    found["log"], found["records"] = [], None
    if paths["log"].is_file():
        found["log"] = [parse_line(paths["log"], *line) for line in read_lines(paths["log"])]
    if paths["records"].is_file():
        found["records"] = count_records(paths["records"], lang, limit)
    missing += [f"`{paths[name].name}` is not there ({made_by})" for name, made_by in (("log", STAGES["model"]), ("records", STAGES["topics"]))
                if not paths[name].is_file()]
    if not any(path.is_file() for path in paths.values()):
        raise DataError(f"{folder}: none of the stages' files is there; check --run")
    found["stand_in"] = any(STAND_IN in (found[s].get("arguments", {}).get(key) for key in ("llm", "judge_llm", "cascade_llm"))
                            for s in STAGES)
    if lang:
        keep_languages(found, lang)
    return found, [p for p in paths.values() if p.is_file()], missing


def keep_languages(found, langs):
    """Leave only these languages in the metrics and in the filter's counts; what was tested over all has no p then."""
    metrics, filtered = found["metrics"], found["filtered"].get("counts", {})
    filtered["by_lang"] = {lang: c for lang, c in filtered.get("by_lang", {}).items() if lang in langs}
    for name, rows in metrics.get("models", {}).items():
        shown = {lang: row for lang, row in rows.items() if lang in langs}
        if not shown:
            raise DataError(f"--lang {' '.join(langs)}: none of them was evaluated; there are {' '.join(x for x in rows if x != 'avg')}")
        average = {key: float(np.mean([row[key] for row in shown.values()])) for key in ("ndcg@10", "recall@100")}
        if len(shown) < len(rows) - 1 and name in metrics["tests"]:
            test = metrics["tests"][name]
            test["by_lang"] = {lang: test["by_lang"][lang] for lang in shown}
            test |= {"avg_diff": float(np.mean([of["diff"] for of in test["by_lang"].values()])), "p": None, "ci95": None}
        metrics["models"][name] = shown | {"avg": average | {"queries": sum(row["queries"] for row in shown.values())}}


def count_records(path, lang=None, limit=None):
    """{queries, sources, topics: {lang: ...}, titles: {topic: Counter}} of topics.jsonl."""
    queries, sources, topics, titles = Counter(), defaultdict(Counter), defaultdict(Counter), defaultdict(Counter)
    for record in read_queries(path, lang, limit):
        queries[record["lang"]] += 1
        sources[record["lang"]].update(p.get("source", "unknown") for p in record.get("negative_passages", []))
        if "topic" in record:
            topics[record["lang"]][record["topic"]] += 1
            titles[record["topic"]][record["positive_passages"][0].get("title", "")] += 1
    return {"queries": queries, "sources": sources, "topics": topics, "titles": titles}


def roles(found):
    """(ours, baseline) among the evaluated models: the run's own model, or the last; and what it was tested against."""
    metrics = found["metrics"]
    dense = [m for m in metrics["models"] if m != "bm25"]
    baseline = metrics["settings"].get("baseline") or next((t["vs"] for t in metrics["tests"].values()), None)
    ours = next((m for m in dense if m.rpartition("/")[2] == "model"), None) or ([m for m in dense if m != baseline] or [None])[-1]
    return ours, baseline


def shown_as(model, ours, baseline):
    """A model's name in figures."""
    return {"bm25": "BM25", ours: f"ours ({ours})", baseline: f"baseline ({baseline})"}.get(model, model)


def backbone(found):
    """The paper's name of the encoder that was trained, or None."""
    encoder = str(found["model"].get("arguments", {}).get("encoder", "")).lower()
    return next((name for part, name in PAPER_BACKBONES if part in encoder), None)


def full_miracl(found):
    """The languages whose collection and questions are those of MIRACL's dev split, whole."""
    settings = found["metrics"]["settings"]
    if settings["split"] != "dev" or settings.get("pool", "full") != "full" or settings.get("limit"):
        return set()
    sizes = found["data"].get("counts", {}).get("languages", {})
    rows = next(iter(found["metrics"]["models"].values()))
    return {lang for lang in LANGS if lang in rows and lang in sizes
            and abs(sizes[lang]["passages"] / 1e6 / MIRACL_PASSAGES[lang] - 1) < 0.05 and rows[lang]["queries"] == MIRACL_DEV[lang]}


# --------------------------------------------------------------------------- tables

def markdown(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows])


def p_text(p):
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def p_cell(p):
    if p is None:
        return "–"
    text = p_text(p).removeprefix("= ")
    return f"**{text}**" if p < 0.05 else text


def by_paper_order(langs):
    return [lang for lang in LANGS if lang in langs] + sorted(set(langs) - set(LANGS))


def averages(rows, zero_shot):
    """[(label, [languages])]: all, and where some are zero-shot those with and without training data alone."""
    langs = [lang for lang in rows if lang != "avg"]
    parts = [(f"avg of {len(langs)}", langs)]
    trained = [lang for lang in langs if lang not in zero_shot]
    return parts + [(f"avg of the {len(p)} {text}", p) for text, p in (
        ("with training data", trained), ("zero-shot", [lang for lang in langs if lang in zero_shot])) if 0 < len(p) < len(langs)]


def score_table(found, measure, numbers, paper, mark):
    """Markdown: one measure of every model by language, with differences and p where tested, the paper's rows beside them."""
    metrics, zero_shot = found["metrics"]["models"], found["metrics"]["settings"]["zero_shot"]
    ours, baseline = roles(found)
    test = found["metrics"]["tests"].get(ours) if measure == "ndcg@10" else None
    rows = next(iter(metrics.values()))
    langs = by_paper_order([lang for lang in rows if lang != "avg"])
    header = ["language", "queries", *(f"`{m}`" for m in metrics)]
    header += [f"`{ours}` - `{baseline}`", "95% interval", "p"] if test else []
    table = []
    for lang in langs:
        label = f"{LANGUAGES.get(lang, lang)} ({lang}{', zero-shot' if lang in zero_shot else ''})"
        of_lang = test and test["by_lang"][lang]
        tested = [f"{100 * of_lang['diff']:+.1f}", interval(of_lang.get("ci95")), p_cell(of_lang["p"])] if test else []
        table.append([label, rows[lang]["queries"], *(f"{100 * metrics[m][lang][measure]:.1f}" for m in metrics), *tested,
                      *(numbers[n].get(lang, "–") for n in paper)])
    for label, part in averages(rows, zero_shot):
        mean = {m: 100 * np.mean([metrics[m][lang][measure] for lang in part]) for m in metrics}
        tested = [f"**{mean[ours] - mean[baseline]:+.1f}**", "", ""] if test else []
        if test and len(part) == len(langs):
            tested[1:] = interval(test["ci95"]), p_cell(test["p"])
        table.append([f"**{label}**", sum(rows[lang]["queries"] for lang in part), *(f"**{x:.1f}**" for x in mean.values()), *tested,
                      *(paper_average(numbers[n], part) for n in paper)])
    return markdown([*header, *(mark + n for n in paper)], table)


def score_tables(found):
    """Markdown: nDCG@10 and Recall@100, and how the paper's columns are to be read."""
    full, ours = full_miracl(found), backbone(found)
    langs = {lang for lang in next(iter(found["metrics"]["models"].values())) if lang != "avg"}
    paper = ["BM25", ours or "BGE", f"Ours {ours or 'BGE'}"]
    comparable = ours and full == langs
    mark = "paper: " if comparable else "reference, not comparable: "
    text = ["### nDCG@10, %", score_table(found, "ndcg@10", PAPER_NDCG, paper, mark)]
    if found["metrics"]["tests"]:
        text.append("p: two-sided paired t-test over the queries; bold: p < 0.05, as in the paper. That of the average pools the queries of "
                    "all languages; those of single languages are not corrected for their number. Interval: bootstrap, queries drawn "
                    "again within each language.")
    recall = {name: {"avg": average} for name, average in PAPER_RECALL.items()}
    text += ["### Recall@100, %", score_table(found, "recall@100", recall, paper, mark)]
    if comparable:
        return "\n\n".join([*text, f"The paper's rows are of the same data and backbone ({ours})."])
    why = f"of which only {' '.join(sorted(full))} are here" if full else "and this run is of other data"
    other = "" if ours else "; the trained encoder is none of the paper's either, so its best (BGE-M3) is shown"
    return "\n\n".join([*text, "**The paper's columns are a reference, not a comparison**: they are of full MIRACL (dev split, 16 languages, "
                                f"90 million passages), {why}{other}."])


def paper_average(numbers, langs):
    """The paper's average over the same languages, where it has them all."""
    if set(langs) == set(LANGS):
        return numbers["avg"]
    return f"{np.mean([numbers[lang] for lang in langs]):.1f}" if all(lang in numbers for lang in langs) else "–"


def interval(ci95):
    return f"{100 * ci95[0]:+.1f} to {100 * ci95[1]:+.1f}" if ci95 else "–"


def removed_share(found):
    """{lang: % of the candidates that the judge removed}; `avg` is of all candidates, as Table 8's must be.

    Its 19.5 is its languages' mean weighted by their training queries (19.46), not their plain mean (19.18).
    """
    by_lang = found["filtered"].get("counts", {}).get("by_lang", {})
    share = {lang: 100 * c.get("removed", 0) / c["candidates"] for lang, c in by_lang.items() if c.get("candidates")}
    if not share:
        return {}
    removed, candidates = (sum(c.get(key, 0) for c in by_lang.values()) for key in ("removed", "candidates"))
    return {"avg": 100 * removed / candidates, **{lang: share[lang] for lang in by_paper_order(share)}}


def removed_table(found):
    share, by_lang = removed_share(found), found["filtered"]["counts"]["by_lang"]
    rows = [[f"{LANGUAGES.get(lang, lang)} ({lang})", by_lang[lang]["candidates"], by_lang[lang].get("removed", 0), f"{share[lang]:.1f}",
             PAPER_REMOVED.get(lang, "–")] for lang in share if lang != "avg"]
    total = [sum(c.get(key, 0) for c in by_lang.values()) for key in ("candidates", "removed")]
    rows.append(["**all**", *total, f"**{share['avg']:.1f}**", f"**{PAPER_REMOVED['avg']}**"])
    return markdown(["language", "candidates", "removed", "removed, %", "Table 8 (its data and judge), %"], rows)


def sources_table(found):
    """Markdown: where the final negatives come from, by language, in %."""
    sources = found["records"]["sources"]
    kinds = [k for k in ("human", "mined", "generated-query", "written") if any(k in c for c in sources.values())]
    kinds += sorted({k for c in sources.values() for k in c} - set(kinds))
    def row(name, counts):
        total = max(1, sum(counts.values()))
        stage2 = counts["generated-query"] + counts["written"]
        return [name, sum(counts.values()), *(f"{100 * counts[k] / total:.2f}" for k in kinds), f"{100 * stage2 / total:.2f}"]
    rows = [row(f"{LANGUAGES.get(lang, lang)} ({lang})", sources[lang]) for lang in by_paper_order(sources)]
    rows.append(row("**all**", sum(sources.values(), Counter())))
    return (markdown(["language", "negatives", *(f"{k}, %" for k in kinds), "from stage 2, %"], rows)
            + f"\n\nThe paper: {PAPER_STAGE2}% of the final negatives come from stage 2 (generated), on average.")


def topics_table(found):
    """Markdown: each topic's size and the titles that are most its own."""
    records = found["records"]
    overall = sum(records["titles"].values(), Counter())
    total = sum(overall.values())
    rows = []
    for topic, titles in sorted(records["titles"].items()):
        size = sum(titles.values())
        telling = sorted((t for t in titles if t), key=lambda t: (-titles[t] ** 2 / overall[t], t))[:6]
        langs = sum(topic in of_lang for of_lang in records["topics"].values())
        shown = ", ".join(" ".join(t.replace("|", "/").split()) for t in telling)
        rows.append([topic, size, f"{100 * size / total:.1f}", langs, shown])
    return markdown(["topic", "queries", "%", "languages", "titles that are most its own"], rows)


def training_table(found):
    model, log = found["model"], found["log"]
    steps = [r for r in log if "loss" in r]
    dev = [r for r in log if "dev" in r]
    arguments, counts = model.get("arguments", {}), model.get("counts", {})
    rows = [[key.replace("_", " "), f"`{arguments[key]}`"] for key in (
        "encoder", "epochs", "batch_size", "negatives", "lr", "temperature", "alpha", "beta", "weighting", "weight_on",
        "language_sampling", "seed")
        if arguments.get(key) is not None]
    rows += [[key.replace("_", " "), value] for key, value in counts.items() if not isinstance(value, (dict, list))]
    if steps:
        tenth = max(1, len(steps) // 10)
        first, last = (np.mean([r["loss"] for r in part]) for part in (steps[:tenth], steps[-tenth:]))
        rows.append(["mean loss of the first and last tenth of the steps", f"{first:.3f}, {last:.3f}"])
    if dev:
        best = max(dev, key=lambda r: r["dev_mrr@10"])
        rows.append(["dev MRR@10, best and last epoch",
                     f"{best['dev_mrr@10']:.3f} (epoch {best['epoch']:g}), {dev[-1]['dev_mrr@10']:.3f}"])
    return markdown(["training", "value"], rows)


def cost_table(found):
    """Markdown: time, memory, LLM calls and tokens of each stage, as its meta file has them."""
    rows = []
    for name in ("data", *STAGES, "eval"):
        if meta := found[name]:
            calls = meta.get("counts", {}).get("calls") or {}
            by_model = [of for of in calls.values() if isinstance(of, dict)]  # a cascade asks two models
            calls = sum(map(Counter, by_model), Counter()) if by_model else calls
            rows.append([f"`{meta.get('script', name)}`", meta.get("seconds", "–"), meta.get("peak_memory_mb", "–"),
                         *(calls.get(k, "") for k in ("asked", "cached", "prompt_tokens", "completion_tokens"))])
    return markdown(["stage", "seconds", "peak MB", "LLM calls", "from cache", "prompt tokens", "completion tokens"], rows) + (
        "\n\nSeconds and tokens are of the last start of a stage: what an earlier start had cached or finished is not in them.")


# --------------------------------------------------------------------------- figures: grey values, hatches and markers tell things apart

LOOKS = [{"color": "white", "hatch": "////"}, {"color": "0.75", "hatch": "...."}, {"color": "0.25"}]  # BM25 or paper, baseline, ours


def drawable(text):
    """The text with `?` for what the figures' font has no glyph for: model folders may be named in any script."""
    from matplotlib.font_manager import findfont, get_font
    font = get_font(findfont("DejaVu Sans"))  # comes with matplotlib
    return "".join(c if font.get_char_index(ord(c)) else "?" for c in text)


def canvas(title, note, width=11, height=4.5, panels=1):
    """(figure, axes) with the finding as the title and, where there is one, a note below it."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams |= {"font.size": 10, "hatch.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = pyplot.subplots(1, panels, figsize=(width, height), layout="constrained")
    lines = []
    for part in [drawable(title)] + ([f"({note})"] if note else []):
        n_lines = 1 + len(part) // (width * 10)
        lines += textwrap.wrap(part, len(part) // n_lines + 10)  # lines of like length
    figure.suptitle("\n".join(lines), fontsize=11)
    return figure, axes


def save(figure, path):
    from matplotlib import pyplot
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def bars(axis, labels, series, unit):
    """Grouped bars: series is [(name, values or None, look)]."""
    width, places = 0.8 / len(series), np.arange(len(labels))
    for i, (name, values, look) in enumerate(series):
        values = [np.nan if v is None else v for v in values]
        axis.bar(places + (i - (len(series) - 1) / 2) * width, values, width, label=drawable(name), edgecolor="black",
                 linewidth=0.6, **look)
    axis.set_xticks(places, labels)
    axis.set_ylabel(unit)
    axis.legend(ncols=len(series), frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    axis.margins(x=0.01)


def scores_figure(found, path, note):
    metrics, zero_shot = found["metrics"]["models"], found["metrics"]["settings"]["zero_shot"]
    ours, baseline = roles(found)
    shown = [(m, look) for m, look in zip(("bm25", baseline, ours), LOOKS) if m in metrics]
    langs = by_paper_order([lang for lang in metrics[shown[-1][0]] if lang != "avg"])
    value = {m: {lang: 100 * metrics[m][lang]["ndcg@10"] for lang in [*langs, "avg"]} for m, _ in shown}
    if test := found["metrics"]["tests"].get(ours):
        gains = [test["by_lang"][lang]["diff"] for lang in langs]
        side = "above" if test["avg_diff"] > 0 else "below"
        title = (f"Ours is {abs(100 * test['avg_diff']):.1f} nDCG@10 {side} the baseline ({baseline}) on average"
                 + (f" (p {p_text(test['p'])})" if test["p"] is not None else "") + f": better in {sum(g > 0 for g in gains)} of {len(langs)} languages")
        if "bm25" in metrics:
            title += f", better than BM25 in {sum(value[ours][lang] > value['bm25'][lang] for lang in langs)}"
    else:
        title = ", ".join(f"{m}: {value[m]['avg']:.1f}" for m, _ in shown) + " nDCG@10 on average"
    figure, axis = canvas(title, note)
    labels = [lang + ("*" if lang in zero_shot else "") for lang in langs] + ["avg"]
    bars(axis, labels, [(shown_as(m, ours, baseline), [*value[m].values()], look) for m, look in shown], "nDCG@10 (%)")
    axis.axvline(len(langs) - 0.5, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel("language" + (" (* zero-shot: no training queries)" if zero_shot else ""))
    save(figure, path)
    return title


def gain_figure(found, path, note):
    ours, baseline = roles(found)
    by_lang = found["metrics"]["tests"][ours]["by_lang"]
    sizes = found["records"]["queries"]
    langs = by_paper_order(by_lang)
    trained = [lang for lang in langs if sizes[lang]]
    title = f"Gain over the baseline ({baseline}) against training size"
    if len({sizes[lang] for lang in trained}) > 3:
        from scipy.stats import spearmanr
        rho, p = spearmanr([sizes[lang] for lang in trained], [by_lang[lang]["diff"] for lang in trained])
        trend = "grows with" if p < 0.05 and rho > 0 else "falls with" if p < 0.05 else "does not depend measurably on"
        title = (f"The gain over the baseline ({baseline}) {trend} the training queries of a language "
                 f"(Spearman {rho:+.2f}, p {p_text(p)}, {len(trained)} languages)")
    figure, axis = canvas(title, note, width=8, height=5)
    lowest = min(sizes[lang] for lang in trained) / 2 if trained else 1
    for group, marker, face, label in ((trained, "o", "0.25", "95% interval over the queries"),
                                       ([lang for lang in langs if not sizes[lang]], "s", "white", "zero-shot (0 training queries)")):
        if group:
            x, y = [sizes[lang] or lowest for lang in group], np.array([100 * by_lang[lang]["diff"] for lang in group])
            ends = np.array([[100 * e for e in by_lang[lang].get("ci95", [by_lang[lang]["diff"]] * 2)] for lang in group])
            axis.errorbar(x, y, np.maximum(0, [y - ends[:, 0], ends[:, 1] - y]), fmt=marker, color="black", mfc=face, ecolor="0.6",
                          elinewidth=1, label=label)
            for lang, at, gain in zip(group, x, y):  # of two points that all but coincide, the lower is named below
                close = any(abs(np.log(at / b)) < 0.05 and 0 <= other - gain < 3 and name != lang for name, b, other in zip(group, x, y))
                axis.annotate(lang, (at, gain), xytext=(5, -12 if close else 4), textcoords="offset points")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if lowest < t <= 1.5 * max(sizes.values())]
    zero = {lowest: "0"} if len(trained) < len(langs) else {}  # a logarithm has no place for it: left of all others
    axis.set_xticks([*zero, *ticks], [*zero.values(), *map(str, ticks)])
    axis.minorticks_off()
    axis.set_xlabel("training queries of the language (log scale)")
    axis.set_ylabel("gain in nDCG@10 (points)")
    axis.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    save(figure, path)
    return title


def loss_figure(found, path, note):
    steps, dev = [r for r in found["log"] if "loss" in r], [r for r in found["log"] if "dev" in r]
    loss = np.array([r["loss"] for r in steps])
    window = max(1, len(loss) // 20)
    smooth = np.convolve(loss, np.ones(window) / window, "valid")
    title = f"Training loss falls from {smooth[0]:.2f} to {smooth[-1]:.2f}" if smooth[-1] < smooth[0] else \
        f"Training loss does not fall: {smooth[0]:.2f} to {smooth[-1]:.2f}"
    if dev:
        best = max(dev, key=lambda r: r["dev_mrr@10"])
        title += (f"; held-out queries are ranked best after epoch {best['epoch']:g} of {steps[-1]['epoch']:g}: "
                  f"MRR@10 {best['dev_mrr@10']:.2f}" + (f", at the end {dev[-1]['dev_mrr@10']:.2f}" if best is not dev[-1] else ""))
    figure, axes = canvas(title, note, panels=2 if dev else 1)
    axis = axes[0] if dev else axes
    axis.plot([r["step"] for r in steps], loss, ".", color="0.7", markersize=3, label="one step (one language)")
    axis.plot([r["step"] for r in steps][window - 1:], smooth, "-", color="black", label=f"mean of {window} steps")
    if dev:
        axis.plot([r["step"] for r in dev], [np.mean([of["loss"] for of in r["dev"].values()]) for r in dev], "s--", color="black",
                  mfc="white", label="held-out queries, mean of languages")
        axes[1].plot([r["epoch"] for r in dev], [r["dev_mrr@10"] for r in dev], "s-", color="black", mfc="white")
        axes[1].set_ylim(0, 1)
        axes[1].set_xlabel("epoch")
        axes[1].set_ylabel("MRR@10 of held-out queries (0 to 1)")
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("loss (nats)")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    save(figure, path)
    return title


def removed_figure(found, path, note):
    share = removed_share(found)
    langs = [lang for lang in share if lang != "avg"]
    top, low = max(langs, key=share.get), min(langs, key=share.get)
    title = (f"The judge removes {share['avg']:.1f}% of the candidates, from {share[low]:.1f}% ({low}) to {share[top]:.1f}% ({top}); "
             f"the paper's, on its data, {PAPER_REMOVED['avg']}%")
    figure, axis = canvas(title, note)
    shown = [*langs, "avg"]
    bars(axis, [*langs, "all"], [("paper, Table 8 (full MIRACL, its judge)", [PAPER_REMOVED.get(lang) for lang in shown], LOOKS[0]),
                                 ("this run", [share[lang] for lang in shown], LOOKS[2])], "removed candidates (%)")
    axis.axvline(len(langs) - 0.5, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel("language")
    save(figure, path)
    return title


def topics_figure(found, path, note):
    topics = found["records"]["topics"]
    langs, numbers = by_paper_order(topics), sorted({t for of_lang in topics.values() for t in of_lang})
    share = np.array([[100 * topics[lang][t] / sum(topics[lang].values()) for t in numbers] for lang in langs])  # (languages, topics)
    total = sum(topics.values(), Counter())
    biggest, nmi = max(numbers, key=lambda t: total[t]), found["topics"].get("counts", {}).get("nmi_topic_language")
    everywhere = sum(bool((share[:, i] > 0).all()) for i in range(len(numbers)))
    title = (f"{everywhere} of {len(numbers)} topics are in every language; the largest holds "
             f"{100 * total[biggest] / total.total():.0f}% of the queries")
    if nmi is not None:
        title += f"; topic and language share {nmi:.2f} of their information (NMI, 0 to 1)"
    figure, axis = canvas(title, note, width=9, height=1.6 + 0.3 * len(langs))
    axis.imshow(share, cmap="Greys", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(share):
        if value:
            axis.text(column, row, f"{value:.0f}" if value >= 0.5 else "<1", ha="center", va="center", fontsize=8,
                      color="white" if value > 55 else "black")
    axis.set_yticks(range(len(langs)), langs)
    axis.set_xticks(range(len(numbers)), numbers)
    axis.set_xlabel("topic, largest first (cells: % of the language's training queries; blank: none)")
    axis.set_ylabel("language")
    save(figure, path)
    return title


# --------------------------------------------------------------------------- the report

def notes(found):
    """What a reader must know before the numbers: [(short form, for the captions of these figures, sentence)]."""
    said, settings = [], found["metrics"].get("settings", {})
    if found["stand_in"]:
        said.append((STAND_IN_NOTE, ("scores", "gain", "removed", "loss"),
                     "**The offline stand-in judged and wrote here**: classical text matching (`offline_llm.py`), not a language model. "
                     "What was removed, generated and learned shows that the pipeline works, and says nothing about the method with a real model."))
    encoder = found["model"].get("arguments", {}).get("encoder")
    if encoder and (Path(encoder) / "build.json").is_file():
        said.append(("", (), f"The encoder `{encoder}` is a small one without attention layers, built from this collection; "
                     "it is no pretrained model."))
    if settings.get("pool") == "judged":
        said.append(("on a judged pool, not the whole corpus", ("scores", "gain"), f"**Scores are on a {settings['pool_note']}.**"))
    if settings.get("limit"):
        said.append((f"{settings['limit']} queries a language", ("scores", "gain"),
                     f"**Only the first {settings['limit']} queries of a language were evaluated.**"))
    return said


def compose(found, missing, folder, out):
    """The report's text; makes the figures. A part whose files are missing is named as left out."""
    records, metrics = found["records"], found["metrics"]
    tested = metrics and metrics["tests"].get(roles(found)[0])
    parts = [("Scores by language (Table 1)", metrics, score_tables, ("scores", scores_figure)),
             ("Gain against training size", tested and records, None, ("gain", gain_figure)),
             ("False negatives removed by the judge (Table 8)", removed_share(found), removed_table, ("removed", removed_figure)),
             ("Where the negatives come from", records, sources_table, None),
             ("Topics by language (Table 13)", records and records["topics"], topics_table, ("topics", topics_figure)),
             ("Training", found["model"], training_table, any("loss" in r for r in found["log"]) and ("loss", loss_figure)),
             ("Cost", any(found[stage] for stage in (*STAGES, "eval")), cost_table, None)]
    said = notes(found)
    text, left_out = [], []
    for heading, content, table, figure in parts:
        if not content:
            left_out.append(heading)
            continue
        text.append(f"## {heading}")
        if figure:
            name, draw = figure
            note = "; ".join(short for short, figures, _ in said if name in figures)
            title = draw(found, out / "figures" / f"{name}.png", note)
            text.append(f"![{title}](figures/{name}.png)\n\n*{title}.{f' ({note})' if note else ''}*")
        if table:
            text.append(table(found))
    head = [f"# Report of `{short_name(folder)}`", *(sentence for *_, sentence in said)]
    if metrics:
        settings = metrics["settings"]
        head.append(f"Data `{settings['data']}`, split `{settings['split']}`; made by `06a_report.py` from what the stages left in `{folder}`.")
    if left_out:
        head.append(f"**Left out**: {'; '.join(left_out)}.")
    if missing:
        head.append("Missing files: " + "; ".join(missing) + ".")
    return "\n\n".join(head + text) + "\n"


def main(argv=None):
    args = build_parser().parse_args(argv)
    folder, out = Path(args.run), Path(args.out)
    found, inputs, missing = gather(folder, args.lang, args.limit)
    output = Output(args, inputs, out=out / "report.md")
    if output.is_done() and all((out / link).is_file() for link in re.findall(r"\((figures/\w+\.png)\)", output.path.read_text("utf-8"))):
        return
    text = compose(found, missing, folder, out)
    output.write_lines([text])
    output.finish(figures=text.count("](figures/"), missing=len(missing))


if __name__ == "__main__":
    run(main)
