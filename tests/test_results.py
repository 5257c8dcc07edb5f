"""RESULTS.md and the README's tables are what bench/results.py writes from results/*.json."""

import json
import re
import shlex
import sys

import pytest
from conftest import ROOT, load_stage

sys.path.insert(0, str(ROOT / "bench"))
import results  # noqa: E402

PAGE = (ROOT / "RESULTS.md").read_text("utf-8")


def test_the_page_is_made_again_to_the_same_bytes():
    assert results.page() == PAGE
    readme = (ROOT / "README.md").read_text("utf-8")
    assert results.fill(readme) == readme


def test_every_result_is_on_the_page():
    text = results.PAGE + (ROOT / "README.md").read_text("utf-8")
    for path in (ROOT / "results").glob("*.json"):
        if path.stem not in ("records", "rates"):  # the README's records; SCALING.md's rates
            assert re.search(rf"\{{\{{\w+ (\S+ )*{path.stem}\b", text), path
    for path in (ROOT / "results").rglob("*.png"):
        assert f"({path.relative_to(ROOT)})" in PAGE, path


def test_no_number_of_the_page_is_typed_by_hand():
    """Numbers in the script's own text are names, flags with their values, and the units of tokens."""
    text = re.sub(r"^```bash\n.*?^```$", "", results.PAGE, flags=re.M | re.S)
    text = re.sub(r"\{\{.*?\}\}|`[^`]*`|\*\*[^*]*\*\*|bytes / 4|16 languages", "", text)
    assert re.findall(r".*\d.*", text) == []


def test_a_missing_result_is_said_to_be_missing():
    for view in ("scores", "figure", "figures", "ablations", "main"):
        text = results.table(view, "no-such-file")
        assert "Not measured yet" in text and "results/no-such-file.json" in text
    assert "no-such-file" not in results.table("costs", "sample", "no-such-file")


def test_the_readmes_table_has_bm25_the_start_and_the_path_from_naive_to_full():
    rows = results.table("main", "minimiracl-5", "ablations").splitlines()[2:]
    called = [row.split(" | ")[0].strip("| ") for row in rows if row.startswith("|")]
    assert called[:2] == ["BM25", "encoder it starts from"]
    assert called[2:] == [
        "naive top-k",
        "naive, filtered",
        "naive, filtered, brought to N (no stage 3)",
        "full method",
        "full method, drawn by share^0.5",
    ]
    full = next(row for row in results.load("ablations")["ablations"] if row["name"] == "full method")
    assert f"**{full['ndcg@10']:.1f}**" in rows[5] and f"{full['to_naive']['diff']:+.1f} [" in rows[5]


def test_the_main_table_of_ablations_alone_has_their_untrained_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    test = {"diff": 1.25, "ci95": [0.5, 2.0], "p_holm": 0.004}
    same = {"ndcg@10": 80.0, "recall@100": 99.0, "by_lang": {"sw": 80.0}, "sd": 0.5, "seeds": 3}
    rows = [same | {"name": "before training", "group": "not trained", "to_before": None, "to_naive": None},
            same | {"name": "full method", "group": "step by step", "to_before": test, "to_naive": None},
            same | {"name": "another", "group": "Table 2", "to_before": test, "to_naive": test}]  # fmt: skip
    of_sample = {"full method": {"ndcg@10": 70.0, "sd": 2.0, "to_naive": test}}
    further = {"sample": {"queries": 5, "rows": of_sample}}
    results.save("real", {"langs": ["sw"], "queries": 7, "ablations": rows, "further": further})
    assert results.table("main", "real").splitlines() == [
        "| nDCG@10 | avg | R@100 | to before | sw | sample | to naive |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| before training | 80.0 | 99.0 |  | 80.0 |  |  |",
        "| full method | **80.0** ± 0.5 | 99.0 | +1.2 [+0.5, +2.0], p 0.004 | 80.0 | 70.0 ± 2.0 | "
        "+1.2 [+0.5, +2.0], p 0.004 |",
        "",
        "7 dev queries, 5 of sample; trained rows: mean and standard deviation of 3 seeds, difference with "
        "95% interval and p after Holm's correction",
    ]


def test_a_number_that_is_not_there_yet_is_said_to_be_missing():
    assert results.number("no-such-file", "total/seconds", "minutes") == "not measured yet"


def test_a_difference_to_each_baseline_is_shown_and_that_of_two_baselines_once(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    scores = {"sw": {"ndcg@10": 0.5, "recall@100": 1.0, "queries": 2}}
    tests = [("bm25", "start", -0.1), ("model", "start", 0.2), ("model", "bm25", 0.3)]
    found = {
        "settings": {"zero_shot": [], "baselines": ["start", "bm25"]},
        "models": {name: scores | {"avg": scores["sw"]} for name in ("bm25", "start", "model")},
        "tests": [
            {"model": model, "vs": vs, "diff": diff, "ci95": [diff - 0.01, diff + 0.01], "p_holm": 0.02}
            for model, vs, diff in tests
        ],
    }
    results.save("some", found)
    lines = results.table("scores", "some").splitlines()
    assert lines[0] == "| nDCG@10 | avg | R@100 | to start | to bm25 | sw |"
    assert "| -10.0 [-11.0, -9.0], p 0.02 |  |" in lines[2]  # bm25
    assert "|  |  |" in lines[3]  # start: its difference to bm25 is told in the line before
    assert "| +20.0 [+19.0, +21.0], p 0.02 | +30.0 [+29.0, +31.0], p 0.02 |" in lines[4]


def test_commands_use_flags_that_exist():
    text = PAGE.replace("\\\n", " ").replace("$LANGS", "sw te")
    found = re.findall(r"^python (?:offline_llm.py --exec python )?(0\d\w+\.py) (.*)$", text, re.M)
    assert len(found) == 12
    for script, arguments in found:
        load_stage(script.removesuffix(".py")).build_parser().parse_args(shlex.split(arguments))
    found = re.findall(r"^python bench/(ablations|real_encoder).py (.*)$", text, re.M)
    parsed = [load_stage(f"bench/{script}").build_parser().parse_args(shlex.split(arguments))
              for script, arguments in found]
    assert len(parsed) == 7 and [len(one.rows) for one in parsed if hasattr(one, "rows")] == [5, 10, 5]
    assert parsed[-2].lang == ["sw", "te"]
    assert {"before training", "naive top-k"} <= set(parsed[0].rows) & set(parsed[0].against)


@pytest.fixture
def run(tmp_path):
    """What a run leaves that --collect reads."""

    def write(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")

    meta = {"seconds": 2.5, "peak_memory_mb": 100, "counts": {}, "versions": {"torch": "2"}}
    counts = {"passages": 10, "train_queries": 4, "dev_queries": 2}
    calls = {"llm": {"asked": 7, "prompt_tokens": 70, "completion_tokens": 9}}
    scores = {"sw": {"ndcg@10": 0.5, "recall@100": 1.0, "queries": 2}}
    write(tmp_path / "data.meta.json", meta | {"script": "00_prepare_data.py", "counts": counts})
    write(
        tmp_path / "run/filtered.jsonl.meta.json",
        meta | {"script": "02_filter.py", "counts": {"calls": calls}},
    )
    write(
        tmp_path / "run/eval/metrics.json.meta.json", meta | {"script": "06_eval.py", "peak_memory_mb": 300}
    )
    write(
        tmp_path / "run/eval/metrics.json",
        {
            "settings": {"data": str(tmp_path / "data"), "zero_shot": [], "baselines": []},
            "tests": [],
            "models": {"bm25": scores | {"avg": scores["sw"]}},
        },
    )
    write(tmp_path / "run/eval/report.md", "# Report\n\n![bm25: 50.0](figures/scores.png)\n")
    write(tmp_path / "run/eval/figures/scores.png", "a figure")
    return tmp_path / "run"


def test_a_run_is_collected(run, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    results.collect(run, "mine", "me")
    made = results.load("mine")
    assert made["sizes"] == {
        "passages": 10,
        "train_queries": 4,
        "dev_queries": 2,
        "llm_calls": 7,
        "prompt_tokens": 70,
        "completion_tokens": 9,
    }
    assert made["total"] == {"seconds": 7.5, "peak_memory_mb": 300} and made["made"]["by"] == "me"
    assert (tmp_path / "results/figures/mine-scores.png").read_text() == "a figure"
    assert (
        results.table("figures", "mine", "scores", "loss") == "![bm25: 50.0](results/figures/mine-scores.png)"
    )
    assert "| bm25 | **50.0** | 100.0 | 50.0 |" in results.table("scores", "mine")
    assert "`results/mine.json` | bm25 50.0 | me |" in results.table("log")
    assert "| `02_filter.py` | 2.5 | 100 |" in results.table("costs", "mine")
