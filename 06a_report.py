"""Report of a run: its tables beside the paper's, and figures.

Source  Sec. 4: Tables 1, 8 and 13, with the paper's numbers (paper.json) beside ours as a reference
Reads   RUN/eval/metrics.json, RUN/*.meta.json, RUN/topics.jsonl, RUN/model/train_log.jsonl; what is not there
        is left out, and the report says so
Writes  OUT/report.md, OUT/figures/{scores,removed,loss}.png; "ours" is the last of 06_eval.py's --models
Usage   python 06a_report.py --run runs/sample --out runs/sample/eval
        --lang shows these languages only, --limit counts the first N training queries; --seed is idle
Cost    seconds; one pass over topics.jsonl
"""
import contextlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from common import (LANGUAGES, DataError, Output, Parser, atomic, digest_file, digest_folder, parse_line,
                    read_json, read_lines, read_queries, run, short_name)

PAPER = json.loads(Path(__file__).with_name("paper.json").read_text("utf-8"))
ELIMINATED = PAPER["eliminated"] | {"all": PAPER["eliminated"]["avg"]}
BACKBONES = {"bge-m3": "BGE", "e5-large": "mE5", "mdpr": "mDPR", "bert-base-multilingual": "mBERT"}
FILES = {"filtered": "filtered.jsonl.meta.json", "augmented": "augmented.jsonl.meta.json",
         "model": "model.meta.json", "metrics": "eval/metrics.json",
         "records": "topics.jsonl", "log": "model/train_log.jsonl"}  # in RUN
MADE_FROM = [("candidates.jsonl", "filtered.jsonl", "02_filter_false_negatives.py"),
             ("filtered.jsonl", "augmented.jsonl", "03_generate_negatives.py"),
             ("augmented.jsonl", "topics.jsonl", "04_cluster_topics.py"),
             ("topics.jsonl", "model", "05_train.py")]
HATCHES = ["////", "....", "xxxx", "--", "||"]  # of bars that are not ours


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--run", required=True, metavar="FOLDER", help="what the stages left, eval/ among it")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for report.md and figures/")
    return parser


# --------------------------------------------------------------------------- what the stages left

def read_run(folder, lang=None, limit=None):
    """({name: content, empty where there is none}, [files that were read])."""
    paths = {name: folder / file for name, file in FILES.items()}
    there = [path for path in paths.values() if path.is_file()]
    if not there:
        raise DataError(f"{folder}: none of the stages' files is there; check --run")
    found = {name: read_json(path) for name, path in paths.items() if path.suffix == ".json"}
    if isinstance(found["metrics"].get("tests"), dict):
        raise DataError(f"{paths['metrics']}: made by an earlier 06_eval.py; run it again")
    found |= {"lang": lang, "log": [], "records": {}}
    if paths["log"] in there:
        found["log"] = [parse_line(paths["log"], *numbered) for numbered in read_lines(paths["log"])]
    if paths["records"] in there:
        found["records"] = count_records(paths["records"], lang, limit)
    found["stale"] = stale(folder)
    return found, there


def stale(folder):
    """[what of a run is not of what it was made from], which the meta files tell by digests."""
    said = []
    seen = read_json(folder / "eval/metrics.json.meta.json").get("models", {})
    if seen and (folder / "model").is_dir() and digest_folder(folder / "model") not in seen.values():
        said.append("`eval/` is not of the model that is in `model/` now: run 06_eval.py again")
    for source, made, script in MADE_FROM:
        used = [entry["digest"] for entry in read_json(folder / f"{made}.meta.json").get("inputs", [])]
        if used and (folder / source).is_file() and digest_file(folder / source) not in used:
            said.append(f"`{made}` was not made from `{source}` as it is now: run {script} again")
    return said


def count_records(path, lang, limit):
    """{sources: {lang: Counter}, titles: {topic: Counter}, langs: {topic: languages}} of topics.jsonl."""
    counts = {"sources": defaultdict(Counter), "titles": defaultdict(Counter), "langs": defaultdict(set)}
    for record in read_queries(path, lang, limit):
        negatives = record.get("negative_passages", [])
        counts["sources"][record["lang"]].update(p.get("source", "unknown") for p in negatives)
        if type(record.get("topic", 0)) is not int:
            raise DataError(f"{path}: query {record['query_id']!r}: 'topic' is no whole number; make it with "
                            "04_cluster_topics.py")
        if "topic" in record:
            counts["titles"][record["topic"]][record["positive_passages"][0].get("title", "")] += 1
            counts["langs"][record["topic"]].add(record["lang"])
    return counts


def shown(found, langs):
    """Those of the languages that --lang asks for: the paper's in its order, then others."""
    langs = {lang for lang in langs if lang in (found["lang"] or langs)} - {"avg"}
    return [lang for lang in PAPER["languages"] if lang in langs] + sorted(langs - set(PAPER["languages"]))


def evaluated(found):
    """(ours, {model: {lang: scores}}, [the test of ours against each baseline], languages)."""
    models = found["metrics"]["models"]
    ours = list(models)[-1]
    tests = [test if test["model"] == ours else turned(test) for test in found["metrics"]["tests"]
             if ours in (test["model"], test["vs"])]
    return ours, models, tests, shown(found, models[ours])


def turned(test):
    """A test of another model against ours, as one of ours against it."""
    def mirrored(of):
        return of | {"diff": 0 - of["diff"], "ci95": [0 - end for end in reversed(of["ci95"])]}
    by_lang = {lang: mirrored(of) for lang, of in test["by_lang"].items()}
    return mirrored(test) | {"model": test["vs"], "vs": test["model"], "by_lang": by_lang}


# --------------------------------------------------------------------------- tables

def markdown(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def plain(text):
    """Words of the data in a table: one line, no mark-up."""
    return re.sub(r"[\\`*_\[\]<>|!]", r"\\\g<0>", " ".join(text.split()))


def named(lang, note=""):
    return "**all**" if lang == "all" else f"{LANGUAGES.get(lang, lang)} ({lang}{note})"


def score_table(found, measure, paper):
    """Markdown: a measure of every model by language, the paper's beside it: {column: {lang: value}}."""
    ours, models, tests, langs = evaluated(found)
    tests = tests if measure == "ndcg@10" else []
    header = ["language", "queries", *(f"`{model}`" for model in models)]
    for test in tests:
        header += [f"`{ours}` - `{test['vs']}`", "95% interval", "p"]
    rows = []
    for name, part in table_rows(found, langs).items():
        mean = {model: 100 * np.mean([of[lang][measure] for lang in part]) for model, of in models.items()}
        row = [name, sum(models[ours][lang]["queries"] for lang in part)]
        row += [f"{value:.1f}" for value in mean.values()]
        for test in tests:
            row += [f"{mean[ours] - mean[test['vs']]:+.1f}", *tested(test, name, part)]
        rows.append(row + [paper_average(of, part) for of in paper.values()])
    return markdown(header + [f"paper: {column}" for column in paper], rows)


def table_rows(found, langs):
    """{name: languages} of each language and of the averages, the zero-shot languages apart."""
    zero_shot = [lang for lang in langs if lang in found["metrics"]["settings"]["zero_shot"]]
    trained = [lang for lang in langs if lang not in zero_shot]
    rows = {named(lang, ", zero-shot" if lang in zero_shot else ""): [lang] for lang in langs}
    rows[f"**avg of {len(langs)}**"] = langs
    if trained and zero_shot:
        rows[f"**avg of the {len(trained)} with training data**"] = trained
        rows[f"**avg of the {len(zero_shot)} zero-shot**"] = zero_shot
    return rows


def tested(test, name, part):
    """[95% interval in points, p], bold below 0.05; empty where these languages were not tested together."""
    if not name.startswith("**avg"):
        interval, p = test["by_lang"][part[0]]["ci95"], test["by_lang"][part[0]]["p"]
    elif len(part) == len(test["by_lang"]):
        interval, p = test["ci95"], test["p_holm"]
    else:
        return ["", ""]
    told = "< 0.001" if p < 0.001 else f"{p:.3f}"
    return [" to ".join(f"{100 * end:+.1f}" for end in interval), f"**{told}**" if p < 0.05 else told]


def paper_average(of_model, langs):
    """The paper's average over the same languages, where it has them all."""
    if set(langs) == set(PAPER["languages"]):
        return of_model["avg"]
    return f"{np.mean([of_model[lang] for lang in langs]):.1f}" if set(langs) <= set(of_model) else "–"


def score_tables(found):
    """Markdown: nDCG@10 and Recall@100, and how the columns are to be read."""
    encoder = str(found["model"].get("arguments", {}).get("encoder", "")).lower()
    backbone = next((name for part, name in BACKBONES.items() if part in encoder), "BGE")
    columns = ["BM25", backbone, f"Ours {backbone}"]
    ndcg = {column: PAPER["results"][column] for column in columns}
    recall = {column: {"avg": PAPER["recall@100"][column]} for column in columns}
    how = ("Interval and two-sided p: bootstrap of each language's queries, for the average of the mean over "
           "languages. Bold: p < 0.05, for the average after Holm's correction over all tests of the run, "
           "for a language not corrected for their number.")
    said = ("**The paper's columns are a reference**: of full MIRACL (dev split, 16 languages, 90 million "
            f"passages) and {backbone}. Only a run of the same data and encoder compares with them.")
    return "\n\n".join(["### nDCG@10, %", score_table(found, "ndcg@10", ndcg), how,
                        "### Recall@100, %", score_table(found, "recall@100", recall), said])


def by_language(found, counts):
    """{lang: Counter} of the languages shown, and `all` of them together."""
    counts = {lang: Counter(counts[lang]) for lang in shown(found, counts)}
    return counts | {"all": sum(counts.values(), Counter())}


def removed_shares(found):
    """{lang: (judged, found false, %)} of the judge; `all` is of all languages' together, as in Table 8.

    Those that people judged are no matter of the judge; those relabelled as positives are found false, too.
    """
    counts = by_language(found, found["filtered"].get("counts", {}).get("by_lang", {}))
    shares = {}
    for lang, of in counts.items():
        n_judged = of["judged"] - of["unjudged"]
        n_false = of["removed"] + of["relabelled"]
        if n_judged:
            shares[lang] = n_judged, n_false, 100 * n_false / n_judged
    return shares


def removed_table(found):
    rows = [[named(lang), judged, n_false, f"{share:.1f}", ELIMINATED.get(lang, "–")]
            for lang, (judged, n_false, share) in removed_shares(found).items()]
    return markdown(["language", "judged", "false negatives", "%", "Table 8, % (its data and judge)"], rows)


def sources_table(found):
    """Markdown: where the final negatives come from, by language, in %."""
    sources = by_language(found, found["records"]["sources"])
    kinds = sorted(sources["all"])
    rows = []
    for lang, counts in sources.items():
        numbers = [*(counts[kind] for kind in kinds), counts["generated-query"] + counts["written"]]
        shares = [f"{100 * n / max(1, counts.total()):.2f}" for n in numbers]
        rows.append([named(lang), counts.total(), *shares])
    heads = (f"{plain(kind)}, %" for kind in [*kinds, "from stage 2"])
    table = markdown(["language", "negatives", *heads], rows)
    return f"{table}\n\nIn the paper {PAPER['from_stage_2']}% of the negatives come from stage 2, on average."


def topics_table(found):
    """Markdown: each topic's size, languages, and the titles that are most its own."""
    titles = found["records"]["titles"]
    overall = sum(titles.values(), Counter())
    rows = []
    for topic, own in sorted(titles.items()):
        telling = sorted(set(own) - {""}, key=lambda title: (-own[title] ** 2 / overall[title], title))[:6]
        names = ", ".join(map(plain, telling))
        share = f"{100 * own.total() / overall.total():.1f}"
        rows.append([topic, own.total(), share, len(found["records"]["langs"][topic]), names])
    return markdown(["topic", "queries", "%", "languages", "titles that are most its own"], rows)


# --------------------------------------------------------------------------- figures, readable in grey

def make_figure(draw, found, note):
    """(title, figure): its finding as the title and a note below it."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams |= {"hatch.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    title = draw(found, figure.subplots())
    figure.suptitle(f"{title}\n{note}".strip(), fontsize=11, wrap=True)
    return title, figure


def draw_bars(axis, labels, series, unit):
    """Grouped bars of {name: values}, the last of them ours; the last label, all languages, stands apart."""
    n_others = len(series) - 1
    greys = np.linspace(0.25, 1, len(series))[::-1].astype(str)
    hatches = [*(HATCHES * n_others)[:n_others], None]
    axis.grouped_bar(series, tick_labels=labels, group_spacing=0.25 * len(series), colors=greys,
                     hatch=hatches, edgecolor="black", linewidth=0.6)
    axis.axvline(len(labels) - 1.5, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="language (* zero-shot: no training queries)", ylabel=unit)
    axis.legend(ncols=len(series), frameon=False, loc="lower left", bbox_to_anchor=(0, 1))


def scores_figure(found, axis):
    ours, models, tests, langs = evaluated(found)
    names = ["bm25", *(test["vs"] for test in tests), ours]
    scores = {name: [100 * of_model[lang]["ndcg@10"] for lang in langs]
              for name, of_model in models.items() if name in names}
    for values in scores.values():
        values.append(np.mean(values))
    title = ", ".join(f"{name}: {values[-1]:.1f}" for name, values in scores.items()) + " nDCG@10 on average"
    gains = {test["vs"]: np.subtract(scores[ours], scores[test["vs"]]) for test in tests}
    said = [f"{abs(gain[-1]):.1f} nDCG@10 {'above' if gain[-1] > 0 else 'below'} {name} on average: "
            f"better in {sum(gain[:-1] > 0)} of {len(langs)} languages" for name, gain in gains.items()]
    if said:
        title = f"Ours is {'; '.join(said)}"
    labels = [lang + "*" if lang in found["metrics"]["settings"]["zero_shot"] else lang for lang in langs]
    draw_bars(axis, [*labels, "avg"], scores, "nDCG@10 (%)")
    return title


def removed_figure(found, axis):
    share = {lang: percent for lang, (_, _, percent) in removed_shares(found).items()}
    by_share = sorted(set(share) - {"all"}, key=share.get)
    low, top = by_share[0], by_share[-1]
    title = (f"The judge finds {share['all']:.1f}% of the candidates false negatives, from {share[low]:.1f}% "
             f"({low}) to {share[top]:.1f}% ({top}); the paper's, on its data, {ELIMINATED['all']}%")
    series = {"paper, Table 8 (full MIRACL, its judge)": [ELIMINATED.get(lang, np.nan) for lang in share],
              "this run": list(share.values())}
    draw_bars(axis, list(share), series, "false negatives among the judged (%)")
    return title


def loss_figure(found, axis):
    steps = np.array([(line["step"], line["loss"]) for line in found["log"] if "loss" in line])  # (N, 2)
    dev = [line for line in found["log"] if line.get("dev")]  # empty where no query was held out
    window = max(1, len(steps) // 20)
    smooth = np.convolve(steps[:, 1], np.ones(window) / window, "valid")
    title = f"Training loss goes from {smooth[0]:.2f} to {smooth[-1]:.2f}"
    if dev:
        best = max(reversed(dev), key=lambda line: line["dev_mrr@10"])  # the last of equals, as 05 keeps
        title += (f"; held-out queries rank best after epoch {best['epoch']:g} of {dev[-1]['epoch']:g}: "
                  f"MRR@10 {best['dev_mrr@10']:.2f}, at the end {dev[-1]['dev_mrr@10']:.2f}")
    axis.plot(*steps.T, ".", color="0.7", markersize=3, label="one step (one language)")
    axis.plot(steps[window - 1:, 0], smooth, "-", color="black", label=f"mean of {window} steps")
    axis.set(xlabel="optimiser step", ylabel="loss (nats)")
    axis.legend(frameon=False)
    return title


# --------------------------------------------------------------------------- the report

def notes(found):
    """{note below figures: sentence on top}: what a reader must know before the numbers."""
    said = {sentence.partition(":")[0].replace("`", ""): f"**{sentence}.**" for sentence in found["stale"]}
    settings = found["metrics"].get("settings", {})
    arguments = [value for stage in ("filtered", "augmented")
                 for value in found[stage].get("arguments", {}).values()]
    if "offline-stand-in" in arguments:
        said["negatives judged by the offline stand-in, text matching, not by a language model"] = (
            "**The offline stand-in judged and wrote here**: text matching (`offline_llm.py`), no language "
            "model. What was removed, generated and learned shows that the pipeline works; it says nothing "
            "about the method with a real model.")
    if settings.get("limit"):
        first = f"the first {settings['limit']} queries of a language"
        said[first] = f"**Only {first} were evaluated.**"
    return said


@contextlib.contextmanager
def as_written(path):
    """What a file holds that its stage does not write is told with its name."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not as its stage writes it ({error!r}); make it again") from error


def compose(found, folder):
    """(the report's text, {name: figure}). A part whose files are missing is named as left out."""
    parts = [("Scores by language (Table 1)", "metrics",
              lambda found: found["metrics"] and evaluated(found)[-1], score_tables, "scores", scores_figure),
             ("False negatives removed (Table 8)", "filtered", removed_shares,
              removed_table, "removed", removed_figure),
             ("Where the negatives come from", "records", lambda found: found["records"],
              sources_table, "", None),
             ("Topics (Table 13)", "records", lambda found: found["records"].get("titles"),
              topics_table, "", None),
             ("Training", "log", lambda found: found["log"], None, "loss", loss_figure)]
    with as_written(folder):
        said = notes(found)
    note = f"({'; '.join(said)})" if said else ""
    left_out, text, figures = [], [], {}
    for heading, file, content, table, name, draw in parts:
        with as_written(folder / FILES[file]):
            if not content(found):
                left_out.append(heading)
                continue
            text.append(f"## {heading}")
            if name:
                title, figures[name] = make_figure(draw, found, note)
                text += [f"![{title}](figures/{name}.png)", f"*{f'{title}. {note}'.strip()}*"]
            if table:
                text.append(table(found))
    if left_out:
        text.insert(0, f"**Left out**: {'; '.join(left_out)}.")
    return "\n\n".join([f"# Report of `{short_name(folder)}`", *said.values(), *text]) + "\n", figures


def main(argv=None):
    args = build_parser().parse_args(argv)
    folder, out = Path(args.run), Path(args.out)
    found, inputs = read_run(folder, args.lang, args.limit)
    output = Output(args, inputs, out=out / "report.md")
    output.meta["arguments"]["stale"] = found["stale"]
    if output.is_done():
        return
    text, figures = compose(found, folder)
    for name, figure in figures.items():
        with atomic(out / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    output.write_lines([text])
    output.finish()


if __name__ == "__main__":
    run(main)
