"""bench/ablations.py: what each row trains on, what the table says, and that a killed run goes on to the
same result."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, load_stage, run_stage
from scipy.stats import ttest_rel
from test_readme_commands import cut_sample, write

from common import DataError, passage_text
from encoder import Encoder

bench = load_stage("bench/ablations")
NAMES = list(dict.fromkeys(row.negatives for row in bench.ROWS.values() if row.negatives))
DEPTH, FEW, N = 6, 5, 10  # so every query is short of negatives after stage 02
TWO = ["naive top-k", "full method"]


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def docids(passages):
    return [p["docid"] for p in passages]


def here(*command):
    """A stage with its own code, but in this process: torch is loaded once, not twenty times."""
    words = [str(word) for word in command]
    at = max(i for i, word in enumerate(words) if word.endswith(".py"))
    load_stage(Path(words[at]).stem).main(words[at + 1 :])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data/, encoder/ and run/: stages 01 to 04 on the cut, six candidates and then ten
    negatives a query."""
    top = tmp_path_factory.mktemp("ablations")
    server = subprocess.Popen(
        [sys.executable, ROOT / "offline_llm.py", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", server.stdout.readline().strip())
        patch.setenv("OPENAI_API_KEY", "offline")
        data, encoder, run, cache = top / "data", top / "encoder", top / "run", ["--cache", top / "cache"]
        cut_sample(data, ["sw", "th"])
        load_stage("sample/make_encoder").main(
            ["--data", str(data), "--out", str(encoder), "--steps", "10", "--width", "64"]
        )
        ensemble, llm = (
            ["--data", data, "--retrievers", "bm25", encoder, "--fusion", "rrf", *cache],
            ["--llm", bench.STAND_IN],
        )
        here("01_mine_candidates.py", *ensemble, "--depth", DEPTH, "--out", run / "candidates.jsonl")
        here(
            "02_filter_false_negatives.py",
            "--input",
            run / "candidates.jsonl",
            *llm,
            *cache,
            "--out",
            run / "filtered.jsonl",
        )
        here(
            "03_generate_negatives.py",
            "--input",
            run / "filtered.jsonl",
            *ensemble,
            *llm,
            "--target",
            N,
            "--out",
            run / "augmented.jsonl",
        )
        here(
            "04_cluster_topics.py",
            "--input",
            run / "augmented.jsonl",
            "--encoder",
            encoder,
            "--topics",
            3,
            *cache,
            "--out",
            run / "topics.jsonl",
        )
        yield top
    server.send_signal(signal.SIGTERM)
    server.wait(timeout=10)
    server.stdout.close()


def command(top, work, *more):
    return [
        str(word)
        for word in (
            "--data",
            top / "data",
            "--run",
            top / "run",
            "--encoder",
            top / "encoder",
            "--target",
            N,
            "--shallow",
            FEW,
            "--epochs",
            1,
            "--batch-size",
            4,
            "--train-flags",
            "--lr 1e-3 --temperature 0.05",
            "--cache",
            top / "cache",
            "--jobs",
            1,
            "--work",
            work,
            "--out",
            work / "result.json",
            *more,
        )
    ]


def parsed(top, work, *more):
    args = bench.build_parser().parse_args(command(top, work, *more))
    args.retrievers = args.retrievers or ["bm25", args.encoder]
    return args


# ---- what the rows train on


@pytest.fixture(scope="module")
def inputs(made):
    """{name: its records}, for the negatives of every row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "stage", here)
        patch.setattr(bench, "NEGATIVES", 1)  # so that no query of this small cut is left out
        bench.Inputs(parsed(made, made / "inputs")).make(NAMES)
    return {name: read(made / f"inputs/{name}.jsonl") for name in NAMES}


def test_every_row_trains_the_same_queries_with_the_runs_topics(made, inputs):
    topics = [(r["lang"], r["query_id"], r["query"], r["topic"]) for r in read(made / "run/topics.jsonl")]
    assert len(topics) == 12 and len({topic for *_, topic in topics}) == 3
    for name, records in inputs.items():
        assert [(r["lang"], r["query_id"], r["query"], r["topic"]) for r in records] == topics, name
        for record in records:
            negatives = docids(record["negative_passages"])
            assert len(negatives) == len(set(negatives)) > 0 and not set(negatives) & set(
                docids(record["positive_passages"])
            )


def test_mined_negatives_follow_their_strategy(made, inputs):
    encoder = Encoder(str(made / "encoder"), "cpu")

    def cosine(record, passages):
        return (
            encoder.encode([record["query"]], "query")[0]
            @ encoder.encode([passage_text(p) for p in passages], "passage").T
        )

    for i, candidates in enumerate(read(made / "run/candidates.jsonl")):
        of = {name: inputs[name][i] for name in ("topk", "shifted", "abs", "margin", "percent")}
        assert all(
            "false_negatives" not in record
            and {p["source"] for p in record["negative_passages"]} == {"mined"}
            for record in of.values()
        )
        top, shifted = of["topk"]["negative_passages"], of["shifted"]["negative_passages"]
        assert (
            docids(top)[:DEPTH] == docids(candidates["candidate_passages"]) and len(top) == len(shifted) == N
        )
        assert not set(docids(top)) & set(docids(shifted)) and max(p["score"] for p in shifted) <= min(
            p["score"] for p in top
        )
        positive = cosine(candidates, candidates["positive_passages"]).min()
        for name, limit in (
            ("abs", 0.6),
            ("margin", positive - 0.15),
            ("percent", positive - 0.1 * abs(positive)),
        ):
            assert cosine(candidates, of[name]["negative_passages"]).max() < limit + 1e-3, name


def test_limits_of_strategies_are_of_the_mean_cosine_whatever_the_number_of_retrievers(
    made, inputs, tmp_path, monkeypatch
):
    shutil.copytree(made / "encoder", tmp_path / "twin")
    monkeypatch.setattr(bench, "stage", here)
    monkeypatch.setattr(bench, "NEGATIVES", 1)
    args = parsed(made, tmp_path, "--retrievers", "bm25", made / "encoder", tmp_path / "twin")
    bench.Inputs(args).make(["margin"])
    assert [docids(r["negative_passages"]) for r in read(tmp_path / "margin.jsonl")] == [
        docids(r["negative_passages"]) for r in inputs["margin"]
    ]


def test_false_negatives_that_the_data_knows_are_not_masked_for_mined_negatives(
    made, inputs, tmp_path, monkeypatch
):
    shutil.copytree(made / "data", tmp_path / "data")
    records = read(tmp_path / "data/train.jsonl")
    records[0]["false_negatives"] = inputs["topk"][0]["negative_passages"][:1]
    write(tmp_path / "data/train.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    monkeypatch.setattr(bench, "stage", here)
    bench.Inputs(parsed(made, tmp_path / "work", "--data", tmp_path / "data")).make(["topk"])
    assert read(tmp_path / "work/topk.jsonl") == inputs["topk"]


def test_a_query_with_fewer_negatives_than_a_step_takes_is_left_out(made, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "stage", here)
    bench.Inputs(parsed(made, tmp_path)).make(["filtered"])
    kept = [r for r in inputs["filtered"] if len(r["negative_passages"]) >= 7]
    assert read(tmp_path / "filtered.jsonl") == kept and len(kept) < 12


def test_filtered_negatives_are_candidates_and_peoples_without_the_false_ones(made, inputs):
    removed = 0
    for record, candidates in zip(inputs["filtered"], read(made / "run/candidates.jsonl"), strict=True):
        false = docids(record["false_negatives"])
        mined = [d for d in docids(candidates["candidate_passages"]) if d not in false]
        human = [d for d in docids(candidates["negative_passages"]) if d not in mined + false]
        assert docids(record["negative_passages"]) == mined + human
        removed += len(false)
    assert removed > 0


def test_augmented_rows_train_on_the_runs_own_records(made, inputs):
    assert inputs["augmented"] == read(made / "run/topics.jsonl")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("N")])
def test_rows_of_n_have_exactly_n_negatives_the_filtered_first(inputs, name):
    n = int(name[1:])
    for record, filtered in zip(inputs[name], inputs["filtered"], strict=True):
        negatives = docids(record["negative_passages"])
        assert len(negatives) == n and negatives[: len(filtered["negative_passages"])] == docids(
            filtered["negative_passages"]
        )
        assert not set(negatives) & set(docids(record["false_negatives"]))


def test_without_stage_1_peoples_negatives_come_first_and_nothing_is_mined(made, inputs):
    kept = 0
    for record, given in zip(inputs["labelled"], read(made / "data/train.jsonl"), strict=True):
        human = docids(given["negative_passages"])
        assert (
            docids(record["negative_passages"])[: len(human)] == human[:N]
            and len(record["negative_passages"]) == N
        )
        assert {p["source"] for p in record["negative_passages"][len(human) :]} <= {
            "generated-query",
            "random",
        }
        kept += len(human)
    assert kept > 0


def test_stage_2_is_measured_from_few_candidates(made, inputs):
    for i, candidates in enumerate(read(made / "run/candidates.jsonl")):
        few, deep = inputs["shallowfiltered"][i], inputs["filtered"][i]
        first = docids(candidates["candidate_passages"])[:FEW]
        mined = [p["docid"] for p in few["negative_passages"] if p["source"] == "mined"]
        assert mined == [d for d in docids(deep["negative_passages"]) if d in first and d in mined]
        assert len(mined) <= FEW and len(inputs["shallow"][i]["negative_passages"]) == N
    generated = [p["source"] == "generated-query" for r in inputs["shallow"] for p in r["negative_passages"]]
    assert sum(generated) > 0


def test_the_relabelled_row_makes_positives_of_the_highest_grade(made, inputs):
    meta = json.loads((made / "inputs/relabelled.filtered.jsonl.meta.json").read_text("utf-8"))
    assert meta["arguments"]["relabel_at"] == 2
    assert all(len(record["negative_passages"]) == N for record in inputs["relabelled"])


def test_where_negatives_came_from_is_counted(made, inputs):
    counts = json.loads((made / "inputs/shallow.counts.json").read_text("utf-8"))
    assert counts["train_queries"] == 12 and sum(counts["sources"].values()) == 12 * N
    assert counts["sources"]["generated-query"] == sum(
        p["source"] == "generated-query" for r in inputs["shallow"] for p in r["negative_passages"]
    )


def test_every_row_makes_the_same_number_of_updates(made, tmp_path, monkeypatch):
    asked = []

    def stage(*command):
        asked.append([str(word) for word in command])
        raise DataError("enough")

    monkeypatch.setattr(bench, "stage", stage)
    args = parsed(made, tmp_path, "--epochs", 4)
    for name in ("full method", "batch of 64", "naive top-k"):
        with pytest.raises(DataError, match="enough"):
            bench.one_run(args, name, 13)
    steps = [command[command.index("--max-steps") + 1] for command in asked]
    assert steps == ["11"] * 3  # 4 epochs of nine tenths of 12 queries in batches of 4
    assert asked[1][-4:-2] == ["--batch-size", "64"]  # the row's own comes last, and counts


def test_without_pdbg_what_is_short_is_written(inputs):
    sources = [p["source"] for record in inputs["written"] for p in record["negative_passages"]]
    assert sources.count("written") > 0 and "generated-query" not in sources
    assert all(len(record["negative_passages"]) == N for record in inputs["written"])


def test_without_reference_neither_candidates_nor_new_passages_are_judged_with_one(made, inputs):
    for name in ("filtered", "made"):
        assert (
            json.loads((made / f"inputs/noreference.{name}.jsonl.meta.json").read_text("utf-8"))["arguments"][
                "no_reference"
            ]
            is True
        )
    assert all(len(record["negative_passages"]) == N for record in inputs["noreference"])


def test_a_stage_that_asks_a_model_is_served_the_stand_in(made, inputs, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL")
    bench.Inputs(parsed(made, tmp_path, "--cache", tmp_path / "cache")).make(["N20"])
    assert read(tmp_path / "N20.jsonl") == inputs["N20"]


def test_a_stage_that_fails_ends_the_whole_with_its_own_words():
    with pytest.raises(
        DataError, match="05_train.py --no-such-flag ended with 2: .*the following arguments are required"
    ):
        bench.stage(ROOT / "05_train.py", "--no-such-flag")


def test_a_file_of_the_run_that_changed_is_read_again_whatever_its_date(made, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "NEGATIVES", 1)
    shutil.copytree(made / "run", tmp_path / "run")
    args = parsed(made, tmp_path / "work", "--run", tmp_path / "run")
    bench.Inputs(args).make(["filtered"])
    records = read(tmp_path / "run/filtered.jsonl")
    records[0]["negative_passages"] = records[0]["negative_passages"][:2]
    write(tmp_path / "run/filtered.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    os.utime(tmp_path / "run/filtered.jsonl", (0, 0))  # as from a backup that keeps dates
    bench.Inputs(args).make(["filtered"])
    assert len(read(tmp_path / "work/filtered.jsonl")[0]["negative_passages"]) == 2


# ---- a killed run, and one in parts


def start_and_kill(arguments, begun):
    """Start the script and kill it with all its stages as soon as begun() holds."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "bench/ablations.py", *arguments],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.time() + 300
        while not begun():
            assert process.poll() is None and time.time() < until
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def values(path):
    return json.loads(path.read_text("utf-8"))["values"]


def test_a_killed_run_goes_on_to_the_result_of_an_undisturbed_one(made, tmp_path, monkeypatch, capsys):
    work = tmp_path / "killed"
    rows = ["--seeds", 13, "--rows", *TWO]
    first, second = (work / f"scores/{name.replace(' ', '-')}.13.json" for name in TWO)
    start_and_kill(
        command(made, work, *rows), (work / "row-5-13/model.checkpoint/train_log.jsonl").exists
    )  # the second row is training
    assert first.is_file() and not second.exists()
    before = first.stat()
    done = run_stage("bench/ablations.py", *command(made, work, *rows))
    assert done.returncode == 0, done.stderr
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert sorted(p.name for p in (work / "scores").iterdir()) == [
        "full-method.13.json",
        "naive-top-k.13.json",
        "settings.json",
    ]
    assert not list(work.glob("row-*"))

    monkeypatch.setattr(bench, "stage", here)
    bench.main(command(made, tmp_path / "whole", *rows))
    for path in (first, second):
        assert values(path) == values(tmp_path / "whole/scores" / path.name)
    results = [
        json.loads((folder / "result.json").read_text("utf-8")) for folder in (work, tmp_path / "whole")
    ]
    assert results[0].pop("hours") >= 0 and results[1].pop("hours") >= 0
    assert results[0] == results[1] and [row["name"] for row in results[0]["ablations"]] == TWO
    assert results[0]["queries"] == 8 and results[0]["langs"] == ["sw", "th"]
    assert capsys.readouterr().out.endswith(done.stdout) and done.stdout.startswith("| | nDCG@10 |")


@pytest.fixture
def invented(made, monkeypatch):
    """Runs take no time and give invented scores; the list of those that were asked for."""
    asked = []

    def one_run(args, name, seed):
        asked.append((name, seed))
        write(
            bench.score_path(args, name, seed), scores(sw=[0.5 + seed / 100, 0.6], th=[0.4 + len(name) / 100])
        )

    monkeypatch.setattr(bench, "one_run", one_run)
    monkeypatch.setattr(bench.Inputs, "make", lambda self, names: asked.append(tuple(names)))
    return asked


def scores(**langs):
    """A file of WORK/scores: the nDCG@10 of the queries of each language."""
    return json.dumps(
        {
            "values": {
                lang: {f"{lang}{i}": {"ndcg@10": x, "recall@100": 1.0, "ndcg@1": float(x > 0.5)}
                       for i, x in enumerate(of_lang)}
                for lang, of_lang in langs.items()
            },
            "train_queries": 12,
            "sources": {"mined": 9, "human": 3},
            "seconds": 90,
        }
    )


def test_rows_run_in_parts_and_none_twice(made, tmp_path, invented):
    bench.main(command(made, tmp_path, "--seeds", 1, 2, "--rows", "full method"))
    assert invented == [("augmented",), ("full method", 1), ("full method", 2)]
    invented.clear()
    bench.main(command(made, tmp_path, "--seeds", 1, 2, "--rows", *TWO, "batch of 8"))
    assert invented == [
        ("topk", "augmented"),
        ("naive top-k", 1),
        ("batch of 8", 1),
        ("naive top-k", 2),
        ("batch of 8", 2),
    ]
    invented.clear()
    bench.main(command(made, tmp_path, "--seeds", 1, 2, "--rows", "no weights", "--minutes", 0))
    assert invented == [("augmented",)]
    result = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert [(row["name"], row["seeds"]) for row in result["ablations"]] == [
        ("naive top-k", 2),
        ("full method", 2),
        ("batch of 8", 2),
    ]


def test_no_minutes_and_no_scores_make_no_table(made, tmp_path, invented, capsys):
    with pytest.raises(DataError, match="no run has ended yet"):
        bench.main(command(made, tmp_path, "--minutes", 0))
    assert not (tmp_path / "result.json").exists() and capsys.readouterr().out == ""


def test_scores_of_other_settings_are_refused_in_one_line(made, tmp_path, invented):
    bench.main(command(made, tmp_path, "--seeds", 1, "--rows", "full method"))
    for other in (
        ["--epochs", 2],
        ["--train-flags=--lr 1e-4"],
        ["--target", 11],
        ["--lang", "sw"],
        ["--fusion", "concat"],
    ):
        done = run_stage("bench/ablations.py", *command(made, tmp_path, "--minutes", 0, *other))
        assert (
            done.returncode == 2
            and done.stdout == ""
            and len(done.stderr.splitlines()) == 1
            and "other settings" in done.stderr
        ), other


def test_a_run_without_topics_is_refused_in_one_line(made, tmp_path):
    done = run_stage("bench/ablations.py", *command(made, tmp_path, "--run", tmp_path / "nothing"))
    assert (
        done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "04_cluster_topics.py" in done.stderr
    )


# ---- the summary


@pytest.fixture
def summary(tmp_path):
    """Rows on two Swahili queries and a Thai one."""
    rows = {
        "naive top-k": {1: ([0.4, 0.8], [0.3]), 2: ([0.4, 0.6], [0.5])},  # averages 0.45 and 0.5
        "full method": {1: ([0.6, 0.8], [0.5]), 2: ([0.8, 0.8], [0.7])},  # (0.7 + 0.5) / 2 = 0.6 and 0.75
        "few candidates, no stage 2": {1: ([0.3, 0.6], [0.25]), 2: ([0.5, 0.6], [0.45])},  # 0.35, 0.5
        "no topic balance": {1: ([0.1, 0.1], [0.1])},
        "no weights": {1: ([0.6, 0.8], [0.5]), 3: ([0.6, 0.8], [0.5])},
    }
    args = SimpleNamespace(work=tmp_path, seeds=[1, 2, 3], jobs=2, against=TWO)
    for name, of_row in rows.items():
        for seed, (sw, th) in of_row.items():
            write(bench.score_path(args, name, seed), scores(sw=sw, th=th))
    found = bench.summarise(args, {"epochs": 2, "updates": 99, "batch_size": 24})
    return {row["name"]: row for row in found["ablations"]}, found


def test_mean_deviation_and_differences_are_those_of_a_calculation_by_hand(summary):
    rows, found = summary
    full, naive, shallow = (rows[n] for n in ("full method", "naive top-k", "few candidates, no stage 2"))
    assert (full["ndcg@10"], full["sd"], full["to_full"], full["paper_diff"]) == (67.5, 10.61, None, None)
    assert (naive["ndcg@10"], naive["sd"], naive["to_naive"], naive["paper_diff"]) == (47.5, 3.54, None, -3.0)
    assert full["by_lang"] == {"sw": 75.0, "th": 60.0} and full["recall@100"] == 100
    assert (full["to_naive"]["diff"], naive["to_full"]["diff"]) == (20.0, -20.0)
    assert (shallow["to_naive"]["diff"], shallow["to_full"]["diff"]) == (-5.0, -25.0)
    assert (found["queries"], found["runs"], found["hours"]) == (3, 9, round(9 * 90 / 3600 / 2, 2))


def test_interval_and_p_draw_queries_and_seeds_together(summary):
    rows, _ = summary
    # full - naive: sw (seed 1) 0.2 0.0, (seed 2) 0.4 0.2; th 0.2, 0.2: no draw is negative, the least is
    # both times seed 1 and the second query: (0.0 + 0.2) / 2, the most seed 2 and the first: (0.4 + 0.2) / 2
    test = rows["full method"]["to_naive"]
    assert test["ci95"] == [10.0, 30.0] and test["p"] == 0.0002
    # naive - few: sw 0.1 0.2, -0.1 0.0; th 0.05, 0.05: (-0.1 + 0.05) / 2 to (0.2 + 0.05) / 2, on both sides
    test = rows["few candidates, no stage 2"]["to_naive"]
    assert test["ci95"] == [-12.5, 2.5] and 0.05 < test["p"] < 0.5
    # five tests: full and few against naive, naive and few against full, by Holm
    p = {n: rows["full method"]["to_naive"]["p_holm"] for n in ("full",)}
    assert p["full"] == pytest.approx(4 * 0.0002)
    assert rows["few candidates, no stage 2"]["to_naive"]["p_holm"] == test["p"]  # the largest


def test_a_row_with_other_seeds_is_not_compared(summary):
    fewer, others = (summary[0][name] for name in ("no topic balance", "no weights"))
    assert (fewer["seeds"], fewer["ndcg@10"], fewer["sd"], fewer["to_full"]) == (1, 10.0, None, None)
    assert (others["seeds"], others["to_full"], others["to_naive"]) == (2, None, None)


def test_the_table_marks_what_is_significant_and_shows_the_papers_difference(summary):
    text = bench.table(summary[1])
    lines = text.splitlines()
    assert lines[0] == (
        "| | nDCG@10 | sd | to naive | 95% interval | p | to full | 95% interval | p "
        "| paper, to full | R@100 | sw | th |"
    )
    assert lines[2] == "| *step by step* |" + " |" * 12
    assert lines[3] == (
        "| naive top-k | 47.5 | 3.5 |  |  |  | **-20.0** | -30.0 to -10.0 | 0.0008 | -3.0 | 100.0 "
        "| 55.0 | 40.0 |"
    )
    assert lines[4] == (
        "| full method | 67.5 | 10.6 | **+20.0** | +10.0 to +30.0 | 0.0008 |  |  |  |  | 100.0 "
        "| 75.0 | 60.0 |"
    )
    assert "Significantly above naive negatives: full method (+20.0)." in text
    assert "3 dev queries, 2 seeds, 99 updates of 24 queries (2 epochs)." in text
    assert "| negatives, % | human | mined |" in lines
    assert "| naive top-k | 25.0 | 75.0 |" in lines


# ---- rows that are not trained, further sets


def test_untrained_rows_and_other_collections_are_what_06_eval_says(made, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "stage", here)
    cut_sample(tmp_path / "fi", ["fi"])
    rows = ["--rows", bench.BM25, bench.BEFORE, "full method", "--seeds", 13, "--also", tmp_path / "fi"]
    bench.main(command(made, tmp_path, *rows, "--against", bench.BEFORE))
    result = json.loads((tmp_path / "result.json").read_text("utf-8"))
    bm25, before, full = result["ablations"]
    assert [row["train_queries"] for row in (bm25, before, full)] == [0, 0, 12]
    assert bm25["to_before"] is before["to_before"] is None and full["to_before"]["p_holm"] <= 1
    fi = result["further"]["fi"]
    assert fi["queries"] == 4 and set(fi["rows"]["full method"]["by_lang"]) == {"fi"}
    for data, found in ((made / "data", [bm25, before]), (tmp_path / "fi", list(fi["rows"].values())[:2])):
        models = ["bm25", made / "encoder"]
        here(ROOT / "06_eval.py", "--data", data, "--models", *models, "--cache", made / "cache", "--out",
             tmp_path / "eval" / data.name)  # fmt: skip
        metrics = json.loads((tmp_path / "eval" / data.name / "metrics.json").read_text("utf-8"))["models"]
        for row, of in zip(found, metrics.values(), strict=True):
            assert row["ndcg@10"] == pytest.approx(100 * of["avg"]["ndcg@10"], abs=0.01)
            assert row["recall@100"] == pytest.approx(100 * of["avg"]["recall@100"], abs=0.01)


def test_hard_queries_are_those_that_both_untrained_rows_miss_at_rank_1(tmp_path):
    """scores() has an answer at rank 1 where nDCG@10 is above 0.5."""
    rows = {
        bench.BM25: ([0.4, 0.8, 0.1], [0.9]),  # misses sw0 and sw2, no Thai one
        bench.BEFORE: ([0.3, 0.2, 0.6], [0.2]),  # misses sw0, sw1 and th0
        "naive top-k": ([0.4, 0.8, 0.9], [0.3]),
        "full method": ([0.9, 0.8, 0.9], [0.3]),
    }
    args = SimpleNamespace(work=tmp_path, seeds=[1], jobs=1, against=[bench.BEFORE, bench.NAIVE])
    for name, (sw, th) in rows.items():
        write(bench.score_path(args, name, 1), scores(sw=sw, th=th))
    result = bench.summarise(args, {"epochs": 1, "updates": 9, "batch_size": 24})
    hard = result["further"][bench.HARD]
    assert hard["queries"] == 1 and {n: row["ndcg@10"] for n, row in hard["rows"].items()} == {
        bench.BM25: 40.0, bench.BEFORE: 30.0, "naive top-k": 40.0, "full method": 90.0}  # fmt: skip
    assert hard["rows"]["full method"]["to_naive"]["diff"] == 50.0
    text = bench.table(result)
    assert "| | nDCG@10 | sd | to before | 95% interval | p | to naive |" in text
    assert "| hard queries | nDCG@10 | sd | to before |" in text and "both miss at rank 1" in text
    assert "Significantly above the encoder before training: " in text


def test_without_hard_queries_there_is_no_such_table(tmp_path):
    args = SimpleNamespace(work=tmp_path, seeds=[1], jobs=1, against=TWO)
    for name in (bench.BM25, bench.BEFORE, *TWO):
        write(bench.score_path(args, name, 1), scores(sw=[0.9]))
    result = bench.summarise(args, {"epochs": 1, "updates": 9, "batch_size": 24})
    assert result["further"] == {} and "hard queries" not in bench.table(result)
