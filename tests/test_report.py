"""06a_report.py: tables and figures from what the stages left, and nothing that is not there."""

import json
import re
import warnings

import numpy as np
import pytest
from conftest import load_stage

LANGS = "ar bn en es fa fi fr hi id ja ko ru sw te th zh".split()
STAGES = {
    "candidates.jsonl": "01_mine_candidates.py",
    "filtered.jsonl": "02_filter_false_negatives.py",
    "augmented.jsonl": "03_generate_negatives.py",
    "topics.jsonl": "04_cluster_topics.py",
    "model": "05_train.py",
}
TITLES = {"th": "กรุงเทพมหานคร", "ja": "東京", "fa": "تهران", "ko": "서울 🌏", "te": "హైదరాబాదు"}


@pytest.fixture(scope="module")
def report():
    return load_stage("06a_report")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), "utf-8")


def make_run(
    top,
    langs=("ja", "te", "th", "yo"),
    llm="offline-stand-in",
    encoder="BAAI/bge-m3",
    ours="model",
    baselines=("start",),
    **settings,
):
    """A run folder as the stages leave it: a language has gains of 1, 2, ... points, 10, 20, ... queries."""
    run = top / "run"
    rows = {
        name: {
            lang: {"ndcg@10": base + i / 100 * (name == ours), "recall@100": 0.9, "queries": 20}
            for i, lang in enumerate(langs, 1)
        }
        for name, base in (("bm25", 0.4), ("start", 0.5), (ours, 0.5))
    }
    for of_lang in rows.values():
        of_lang["avg"] = {
            m: float(np.mean([r[m] for r in of_lang.values()])) for m in ("ndcg@10", "recall@100")
        } | {"queries": 20 * len(langs)}
    gain = (1 + len(langs)) / 200
    write(
        run / "eval/metrics.json",
        {
            "settings": {
                "data": str(top / "data"),
                "split": "dev",
                "depth": 100,
                "limit": None,
                "baselines": list(baselines),
                "zero_shot": ["yo"] if "yo" in langs else [],
            }
            | settings,
            "models": rows,
            "tests": [
                {
                    "model": model,
                    "vs": vs,
                    "diff": gain + shift,
                    "p": 0.006,
                    "p_holm": 0.012 + shift,
                    "ci95": [gain + shift - 0.01, gain + shift + 0.01],
                    "by_lang": {
                        lang: {
                            "diff": i / 100 + shift,
                            "p": 0.2 if i > 1 else 0.03,
                            "ci95": [i / 100 + shift - 0.02, i / 100 + shift + 0.02],
                        }
                        for i, lang in enumerate(langs, 1)
                    },
                }
                for vs in baselines
                for model in ("start", ours)
                if model != vs
                for shift in [0 if vs == "start" else 0.1]
            ],
        },
    )
    meta = {"seconds": 12.5, "peak_memory_mb": 345, "counts": {}, "arguments": {}}
    for name, script in STAGES.items():
        write(
            run / f"{name}.meta.json",
            meta | {"script": script, "arguments": {"llm": llm, "encoder": encoder, "epochs": 2}},
        )
    write(
        run / "filtered.jsonl.meta.json",
        meta
        | {
            "script": "02_filter_false_negatives.py",
            "arguments": {"llm": llm},
            "counts": {
                "calls": {"asked": 777, "prompt_tokens": 8888, "completion_tokens": 999},
                "by_lang": {
                    lang: {
                        "candidates": 200 * i + 7,  # seven that people judged
                        "judged": 200 * i + 3,
                        "unjudged": 3,
                        "removed": 10 * i * i - 1,
                        "relabelled": 1,
                    }
                    for i, lang in enumerate(langs, 1)
                },
            },
        },
    )
    write(
        run / "augmented.jsonl.meta.json",
        meta
        | {
            "script": "03_generate_negatives.py",
            "arguments": {"llm": llm},
            "counts": {
                "calls": {"small": {"asked": 30, "cached": 4}, "large": {"asked": 5, "prompt_tokens": 60}}
            },
        },
    )
    write(run / "eval/metrics.json.meta.json", meta | {"script": "06_eval.py"})
    write(
        run / "model/train_log.jsonl",
        "".join(
            json.dumps(r) + "\n"
            for r in [
                *({"step": i, "epoch": i / 20, "lang": "th", "loss": 3 / i} for i in range(1, 41)),
                *(
                    {
                        "step": 20 * e,
                        "epoch": float(e),
                        "dev": {"th": {"loss": 1.5, "mrr@10": m}},
                        "dev_mrr@10": m,
                    }
                    for e, m in ((1, 0.81), (2, 0.62))
                ),
            ]
        ),
    )
    write(
        run / "topics.jsonl",
        "".join(
            json.dumps(
                {
                    "query_id": str(q),
                    "lang": lang,
                    "query": "?",
                    "topic": q % 3,
                    "positive_passages": [
                        {"docid": "1", "title": TITLES.get(lang, "Lagos | Abuja"), "text": "x"}
                    ],
                    "negative_passages": [
                        {
                            "docid": str(n),
                            "title": "",
                            "text": "x",
                            "source": "generated-query" if n == 2 else "mined",
                        }
                        for n in range(2, 6)
                    ],
                },
                ensure_ascii=False,
            )
            + "\n"
            for i, lang in enumerate(langs, 1)
            if lang != "yo"
            for q in range(10 * i)
        ),
    )
    write(
        top / "data.meta.json",
        {
            "script": "00_prepare_data.py",
            "counts": {"languages": {lang: {"passages": 100} for lang in langs}},
        },
    )
    return run


def make_report(report, run, *flags):
    report.main([str(a) for a in ("--run", run, "--out", run / "eval", *flags)])
    return (run / "eval/report.md").read_text("utf-8")


def section(text, heading):
    return re.search(rf"^## {heading}.*?(?=^## |\Z)", text, re.M | re.S).group()


def row(text, first):
    return [
        c.strip()
        for c in next(line for line in text.splitlines() if line.startswith(f"| {first}"))
        .strip("|")
        .split("|")
    ]


def test_every_part_shows_the_numbers_of_the_stages(report, tmp_path):
    text = make_report(report, make_run(tmp_path))
    scores = section(text, "Scores by language")
    assert "Ours is 2.5 nDCG@10 above start on average: better in 4 of 4 languages" in scores
    assert row(scores, "Telugu (te)")[:8] == [
        "Telugu (te)",
        "20",
        "40.0",
        "50.0",
        "52.0",
        "+2.0",
        "+0.0 to +4.0",
        "0.200",
    ]
    assert row(scores, "Japanese (ja)")[7] == "**0.030**"
    assert row(scores, "Yoruba (yo, zero-shot)")[4] == "54.0"
    assert row(scores, "**avg of 4**")[2:8] == [
        "40.0",
        "50.0",
        "52.5",
        "+2.5",
        "+1.5 to +3.5",
        "**0.012**",
    ]
    assert row(scores, "**avg of the 3 with training data**")[2:6] == [
        "40.0",
        "50.0",
        "52.0",
        "+2.0",
    ]
    removed = section(text, "False negatives removed")
    assert row(removed, "Telugu (te)") == ["Telugu (te)", "400", "40", "10.0", "12.1"]
    assert row(removed, "**all**") == ["**all**", "2000", "300", "15.0", "19.5"]
    assert "finds 15.0% of the candidates false negatives, from 5.0% (ja) to 20.0% (yo)" in removed
    assert row(section(text, "Where the negatives"), "**all**") == [
        "**all**",
        "240",
        "25.00",
        "75.00",
        "25.00",
    ]
    topics = section(text, "Topics")
    assert row(topics, "0")[:4] == ["0", "21", "35.0", "3"]
    assert all(TITLES[lang] in row(topics, "0")[4] for lang in ("th", "ja", "te"))
    assert "MRR@10 0.81, at the end 0.62" in section(text, "Training")


def test_each_baseline_has_its_columns_and_its_clause(report, tmp_path):
    """Only tests of the last model: the metrics also hold one of start against bm25."""
    text = section(make_report(report, make_run(tmp_path, baselines=("start", "bm25"))), "Scores by language")
    header = row(text, "language")
    assert header[5:11] == ["`model` - `start`", "95% interval", "p", "`model` - `bm25`", "95% interval", "p"]
    assert [name.split(":")[0] for name in header[11:]] == ["paper"] * 3
    assert row(text, "Telugu (te)")[5:11] == [
        "+2.0",
        "+0.0 to +4.0",
        "0.200",
        "+12.0",
        "+10.0 to +14.0",
        "0.200",
    ]
    assert row(text, "**avg of 4**")[5:11] == [
        "+2.5",
        "+1.5 to +3.5",
        "**0.012**",
        "+12.5",
        "+11.5 to +13.5",
        "0.112",
    ]
    assert (
        "Ours is 2.5 nDCG@10 above start on average: better in 4 of 4 languages; "
        "12.5 nDCG@10 above bm25 on average: better in 4 of 4 languages"
    ) in text
    recall = text[text.index("### Recall") :]
    assert "interval" not in recall


def test_a_single_language_has_its_own_p_and_the_average_the_corrected_one(report, tmp_path):
    text = make_report(report, make_run(tmp_path, langs=("ja",)))
    assert row(text, "Japanese (ja)")[7] == "**0.030**" and row(text, "**avg of 1**")[7] == "**0.012**"


def test_without_a_baseline_the_title_gives_the_scores(report, tmp_path):
    text = section(make_report(report, make_run(tmp_path, baselines=())), "Scores by language")
    assert "bm25: 40.0, model: 52.5 nDCG@10 on average" in text and "95% interval" not in text


def test_metrics_of_an_earlier_version_are_told(report, tmp_path):
    from common import DataError

    run = make_run(tmp_path)
    metrics = json.loads((run / "eval/metrics.json").read_text("utf-8"))
    write(run / "eval/metrics.json", metrics | {"tests": {"model": {"vs": "start"}}})
    with pytest.raises(DataError, match="metrics.json: made by an earlier 06_eval.py; run it again"):
        make_report(report, run)


def test_bars_of_many_models_all_look_different(report):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    report.draw_bars(axis, ["th", "avg"], {str(i): [i, i] for i in range(6)}, "%")
    looks = {(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in axis.containers}
    assert len(looks) == 6 and not axis.containers[-1][0].get_hatch()


def test_figures_are_drawn_without_missing_glyphs_and_not_blank(report, tmp_path):
    from matplotlib import image

    run = make_run(tmp_path, langs=[*LANGS, "de", "yo"], ours="some/model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where a font lacks a glyph
        text = make_report(report, run)
    links = re.findall(r"!\[[^\]]+\]\((.+?)\)", text)
    assert links == [f"figures/{n}.png" for n in ("scores", "removed", "loss")]
    for link in links:
        pixels = image.imread(run / "eval" / link)[..., :3]
        assert pixels.shape[1] > 700 and 0.02 < (pixels < 0.9).any(-1).mean() < 0.9
        assert (np.ptp(pixels, axis=-1) < 0.01).all()  # grey only: what differs, differs on paper too


def test_a_long_title_and_note_stay_inside_the_figure(report):
    title = "Ours is 12.3 nDCG@10 above the encoder it was trained from: better in 16 of 16 languages"
    title = f"{title}, {title}"
    note = "(judged by text matching; only the first 5 queries of a language)"
    told, figure = report.make_figure(lambda found, axis: title, {}, note)
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert 0 < box.x0 and box.x1 < figure.bbox.width and box.width > 0.5 * figure.bbox.width
    assert told == title and figure.get_suptitle().replace("\n", " ") == f"{title} {note}"


def test_the_papers_columns_are_of_the_backbone_and_called_a_reference(report, tmp_path):
    def scores(name, encoder):
        run = make_run(tmp_path / name, langs=LANGS, encoder=encoder)
        return report.score_tables(report.read_run(run)[0])

    text = scores("bge", "BAAI/bge-m3")
    assert "| paper: BM25 | paper: BGE | paper: Ours BGE |" in text
    assert row(text, "Telugu (te)")[-3:] == ["49.4", "86.2", "87.3"]
    assert row(text, "**avg of 16**")[-3:] == ["39.4", "69.2", "70.6"]
    assert "**The paper's columns are a reference**" in text
    assert "paper: Ours mE5 |" in scores("e5", "intfloat/multilingual-e5-large")
    assert "paper: Ours BGE |" in scores("other", "models/sample")


def test_the_stand_in_and_a_limit_are_named_at_the_top_and_in_captions(report, tmp_path):
    text = make_report(report, make_run(tmp_path / "a"))
    assert "offline stand-in" in text.split("\n## ")[0]
    for heading in ("Scores", "False negatives", "Training"):
        assert re.search(r"^\*.*offline stand-in.*\*$", section(text, heading), re.M), heading
    text = make_report(report, make_run(tmp_path / "b", llm="gpt-4o", limit=5))
    assert "stand-in" not in text
    assert "first 5 queries of a language were evaluated" in text.split("\n## ")[0]
    assert re.search(r"^\*.*first 5 queries.*\*$", section(text, "Scores"), re.M)


@pytest.mark.parametrize("stage", ["filtered", "augmented"])
def test_the_stand_in_is_named_also_where_it_did_one_of_the_two_stages(report, tmp_path, stage):
    run = make_run(tmp_path, llm="gpt-4o")
    path = run / f"{stage}.jsonl.meta.json"
    meta = json.loads(path.read_text("utf-8"))
    write(path, meta | {"arguments": {"llm": "offline-stand-in"}})
    assert "offline stand-in" in make_report(report, run).split("\n## ")[0]


def test_parts_that_are_not_of_the_last_training_are_told(report, tmp_path):
    from common import digest_file, digest_folder

    run = make_run(tmp_path)
    (run / "model/config.json").write_text("{}")
    digests = {"model": digest_folder(run / "model"), "topics": digest_file(run / "topics.jsonl")}
    path = run / "filtered.jsonl"
    path.write_text("")
    augmented = json.loads((run / "augmented.jsonl.meta.json").read_text())
    digests["filtered"] = digest_file(path)
    for stale in (None, "model", "topics", "filtered"):
        now = digests | ({stale: "another"} if stale else {})
        (run / "eval/metrics.json.meta.json").write_text(json.dumps({"models": {"0 model": now["model"]}}))
        meta = json.loads((run / "model.meta.json").read_text()) | {"inputs": [{"digest": now["topics"]}]}
        (run / "model.meta.json").write_text(json.dumps(meta))
        augmented["inputs"] = [{"digest": now["filtered"]}, {"digest": "of a corpus"}]
        (run / "augmented.jsonl.meta.json").write_text(json.dumps(augmented))
        text = make_report(report, run, "--overwrite")
        assert ("`augmented.jsonl` was not made from `filtered.jsonl`" in text) == (stale == "filtered")
        assert ("`eval/` is not of the model" in text) == (stale == "model")
        assert ("`model` was not made from `topics.jsonl` as it is" in text) == (stale == "topics")


def test_a_part_that_has_become_stale_is_told_without_overwrite(report, tmp_path):
    run = make_run(tmp_path)
    make_report(report, run)
    write(run / "filtered.jsonl", "")
    meta = json.loads((run / "augmented.jsonl.meta.json").read_text("utf-8"))
    write(run / "augmented.jsonl.meta.json", meta | {"inputs": [{"digest": "x"}]})
    assert "was not made from `filtered.jsonl` as it is now" in make_report(report, run)
    write(run / "candidates.jsonl", "")
    meta = json.loads((run / "filtered.jsonl.meta.json").read_text("utf-8"))
    write(run / "filtered.jsonl.meta.json", meta | {"inputs": [{"digest": "x"}]})
    assert "was not made from `candidates.jsonl` as it is now" in make_report(report, run)
    (run / "candidates.jsonl").unlink()
    assert "candidates.jsonl" not in make_report(report, run)


def test_a_test_against_ours_is_shown_as_one_of_ours(report, tmp_path):
    run = make_run(tmp_path)
    straight = make_report(report, run)
    path = run / "eval/metrics.json"
    metrics = json.loads(path.read_text("utf-8"))
    metrics["tests"] = [report.turned(test) for test in metrics["tests"]]
    assert {test["vs"] for test in metrics["tests"]} == {"model"} and metrics["tests"][0]["diff"] < 0
    write(path, metrics)
    assert make_report(report, run, "--overwrite") == straight


def test_lang_and_limit_change_what_is_shown(report, tmp_path):
    run = make_run(tmp_path)
    text = make_report(report, run, "--lang", "te", "th")
    scores = section(text, "Scores")
    assert (
        "Japanese" not in text
        and "Ours is 2.5 nDCG@10 above start on average: better in 2 of 2 languages" in scores
    )
    assert row(scores, "**avg of 2**")[2:8] == ["40.0", "50.0", "52.5", "+2.5", "", ""]
    assert row(section(text, "False negatives"), "**all**")[1:4] == ["1000", "130", "13.0"]
    assert row(section(text, "Where the negatives"), "**all**")[1] == "200"
    assert row(section(make_report(report, run, "--limit", "7"), "Where the negatives"), "**all**")[1] == "84"
    (run / "topics.jsonl").unlink()
    assert "**Left out**: Scores by language (Table 1)" in make_report(report, run, "--lang", "fi")


def test_a_training_without_held_out_queries_has_its_loss_alone(report, tmp_path):
    run = make_run(tmp_path)
    last = {"step": 2, "epoch": 1.0, "lang": "th", "loss": 1.0, "dev": {}, "dev_mrr@10": None}
    lines = [{"step": 1, "epoch": 0.5, "lang": "th", "loss": 3.0}, last]
    write(run / "model/train_log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert "![Training loss goes from 3.00 to 1.00](" in make_report(report, run)


def test_what_the_data_say_is_no_mark_up_of_the_report(report, tmp_path):
    run = make_run(tmp_path)
    path = run / "topics.jsonl"
    source = "mined | x\\n\\n# Forged\\n<script>"
    text = path.read_text("utf-8").replace(TITLES["th"], "<img src=x> ![a](http://t) | b")
    path.write_text(text.replace('"source": "mined"', f'"source": "{source}"', 1), "utf-8")
    made = make_report(report, run)
    assert "\n# Forged" not in made and r"mined \| x # Forged \<script\>, %" in made
    assert r"\<img src=x\> \!\[a\](http://t) \| b" in made and "<img" not in made.replace(r"\<img", "")


def test_of_equal_epochs_the_last_is_told_as_the_best(report, tmp_path):
    """The one that stage 05 keeps."""
    run = make_run(tmp_path)
    lines = [{"step": n, "epoch": n, "loss": 1.0, "dev": {"th": {}}, "dev_mrr@10": m}
             for n, m in enumerate((0.7, 0.7, 0.6), 1)]
    write(run / "model/train_log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert "rank best after epoch 2 of 3" in make_report(report, run)


def test_what_is_missing_is_left_out_and_said(report, tmp_path):
    run = make_run(tmp_path)
    whole = make_report(report, run)
    assert "Left out" not in whole
    for name in ("filtered.jsonl.meta.json", "topics.jsonl", "model/train_log.jsonl"):
        (run / name).unlink()
    text = make_report(report, run)
    assert (
        "**Left out**: False negatives removed (Table 8); Where the negatives come from; Topics (Table 13); "
        "Training."
    ) in text
    assert "figures/loss.png" not in text and "## Training" not in text
    from common import DataError

    with pytest.raises(DataError, match="none of the stages' files"):
        make_report(report, tmp_path / "nothing")
    write(run / "eval/metrics.json", "{")
    with pytest.raises(DataError, match=r"metrics.json: not JSON"):
        make_report(report, run)


def test_a_finished_report_is_made_again_only_when_something_changed(report, tmp_path):
    run = make_run(tmp_path)
    make_report(report, run)
    figure, page = run / "eval/figures/scores.png", run / "eval/report.md"
    first, drawn = page.read_bytes(), figure.read_bytes()
    figure.write_bytes(b"marked")
    make_report(report, run)
    assert figure.read_bytes() == b"marked"
    make_report(report, run, "--overwrite")
    assert figure.read_bytes() == drawn and page.read_bytes() == first
    make_run(tmp_path, llm="gpt-4o")
    make_report(report, run)
    assert page.read_bytes() != first


def test_the_papers_numbers_agree_with_its_own_averages(report):
    paper = report.PAPER
    assert paper["languages"] == LANGS and list(paper) == ["about", *list(paper["about"])[1:]]
    for name, row_of in paper["results"].items():
        assert len(row_of) == 17 and name in paper["recall@100"]
        assert np.mean([row_of[lang] for lang in LANGS]) == pytest.approx(row_of["avg"], abs=0.11), name
    sizes = paper["sizes"]
    weights = [sizes[lang]["train_queries"] for lang in LANGS]
    assert np.average([paper["eliminated"][lang] for lang in LANGS], weights=weights) == pytest.approx(
        paper["eliminated"]["avg"], abs=0.05
    )
    best = max(paper["weights"], key=lambda row: row["ndcg@10"])
    assert best["ndcg@10"] == paper["ablations"]["full"]["ndcg@10"] == paper["results"]["Ours BGE"]["avg"]
    assert all(row["alpha"] + row["beta"] == pytest.approx(row["w"]) for row in paper["weights"])
