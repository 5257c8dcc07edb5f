"""bench/real_encoder.py on a tiny encoder: the curve goes on where it was, and sentence-transformers' own
evaluator gives a trained model the scores of 06_eval.py. The README's real encoder runs on a cut, where there
is one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_stage, run_stage
from test_readme import BLOCK, README
from test_readme_commands import cut_sample, lines, project  # noqa: F401

from common import DataError

sys.path.insert(0, str(ROOT / "bench"))
bench = load_stage("bench/real_encoder")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """data/, encoder/, and train.jsonl with ten negatives a query and topics."""
    top = tmp_path_factory.mktemp("real")
    cut_sample(top / "data", ["sw", "th"])
    load_stage("sample/make_encoder").main(
        ["--data", str(top / "data"), "--out", str(top / "encoder"), "--steps", "10", "--width", "64"]
    )
    records = []
    for record in map(json.loads, lines(top / "data/train.jsonl")):
        corpus = list(map(json.loads, lines(top / f"data/corpus/{record['lang']}.jsonl")))
        positives = {p["docid"] for p in record["positive_passages"]}
        negatives = [p for p in corpus if p["docid"] not in positives][::7][:10]
        records.append(record | {"negative_passages": negatives, "topic": 0})
    (top / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return top


def curve(top, work, *more):
    return ["curve", "--input", top / "train.jsonl", "--encoder", top / "encoder", "--lr", 1e-3,
            "--steps", 1, "--train-flags", "--batch-size 4", "--jobs", 1, "--work", work,
            "--out", work / "curve.json", *more]  # fmt: skip


def test_a_curve_has_every_point_and_the_start_and_makes_none_twice(made, tmp_path):
    done = run_stage("bench/real_encoder.py", *curve(made, tmp_path))
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "curve.json").read_text("utf-8"))["points"]
    assert [(p["steps"], p["lr"]) for p in points] == [(0, 0), (1, 1e-3)]
    assert all(0 <= p["dev_mrr@10"] <= 1 and set(p["dev"]) == {"sw", "th"} for p in points)
    assert "| held-out MRR@10 | 0.001 |" in done.stdout and "Before training: " in done.stdout
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # no model stays
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-*.json")}
    next(iter(kept)).unlink()
    again = run_stage("bench/real_encoder.py", *curve(made, tmp_path))
    assert again.stdout == done.stdout
    assert sum(path.stat().st_mtime_ns != before for path, before in kept.items()) == 1
    other = run_stage("bench/real_encoder.py", *curve(made, tmp_path, "--seed", 14))
    assert other.returncode == 2 and "other settings" in other.stderr and len(other.stderr.splitlines()) == 1


def test_no_minutes_make_no_curve(made, tmp_path):
    with pytest.raises(DataError, match="no point has ended yet"):
        bench.main(list(map(str, curve(made, tmp_path, "--minutes", 0))))


@pytest.fixture(scope="module")
def evaluated(made):
    """A trained model, with 06_eval.py's scores."""
    load_stage("05_train").main(list(map(str, (
        "--input", made / "train.jsonl", "--encoder", made / "encoder", "--max-steps", 3, "--lr", 1e-2,
        "--batch-size", 4, "--out", made / "model"))))  # fmt: skip
    load_stage("06_eval").main(list(map(str, (
        "--data", made / "data", "--models", made / "model", "--cache", made / "cache",
        "--out", made / "eval"))))  # fmt: skip
    return made


def check(top, *more):
    return list(map(str, ("check", "--model", top / "model", "--data", top / "data", "--eval", top / "eval",
                          "--out", top / "check.json", *more)))  # fmt: skip


def test_sentence_transformers_evaluator_gives_a_trained_model_the_same_scores(evaluated, capsys):
    bench.main(check(evaluated))
    result = json.loads((evaluated / "check.json").read_text("utf-8"))
    assert set(result["langs"]) == {"sw", "th"} and result["largest"] <= bench.SAME
    assert 0 < result["langs"]["sw"]["theirs"]["ndcg@10"] < 1
    assert "Largest difference" in capsys.readouterr().out


def test_scores_that_differ_are_an_error(evaluated, tmp_path):
    metrics = json.loads((evaluated / "eval/metrics.json").read_text("utf-8"))
    metrics["models"]["model"]["sw"]["ndcg@10"] += 0.01
    (tmp_path / "metrics.json").write_text(json.dumps(metrics), "utf-8")
    with pytest.raises(DataError, match="the two differ by 1.0. points"):
        bench.main(check(evaluated, "--eval", tmp_path))


def real_encoder(tmp_path):
    """A folder of multilingual-e5-small: E5_SMALL, models/, or made by the shared tool."""
    folder = Path(os.environ.get("E5_SMALL") or ROOT / "models/multilingual-e5-small")
    tool = ROOT.parent / "shared/tools/real_models.py"
    if not folder.is_dir():
        if not tool.is_file():
            pytest.skip(f"no multilingual-e5-small: neither {folder}, nor E5_SMALL, nor {tool}")
        folder = tmp_path / "multilingual-e5-small"
        if subprocess.run([sys.executable, tool, "e5", "--out", folder], cwd=tmp_path).returncode:
            pytest.skip("multilingual-e5-small cannot be downloaded")
    return folder.resolve()


def test_the_readmes_real_encoder_runs_on_a_cut(project, tmp_path):  # noqa: F811
    """The folder in place of the hub's id, on one language."""
    folder = real_encoder(tmp_path)
    (command,) = [block for _, _, block in BLOCK.findall(README) if "ENCODER=intfloat/multi" in block]
    shutil.rmtree(project / "sample/data")
    cut_sample(project / "sample/data", ["sw"])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["bash", "-euc", command.replace("intfloat/multilingual-e5-small", str(folder))],
        cwd=project, env=env | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((project / "runs/e5/eval/metrics.json").read_text("utf-8"))["models"]
    before, after = (scores[name]["avg"]["ndcg@10"] for name in (folder.name, "model"))
    assert before > 0.8 and after > before - 0.05  # a real retriever, and nothing was broken
    arguments = json.loads((project / "runs/e5/model.meta.json").read_text("utf-8"))["arguments"]
    assert (arguments["lr"], arguments["epochs"], arguments["passage_max_len"]) == settings()
    assert re.search(r"05_train.py .* --encoder \S+ --epochs 1 ", done.stdout)


def settings():
    """(learning rate, epochs, tokens of a passage) of a pretrained encoder, as the Makefile says."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    flags = re.search(r"^TRAIN_pretrained := --lr (\S+) .*--passage-max-len (\d+)", makefile, re.M)
    epochs = re.search(r"^EPOCHS_pretrained := (\d+)", makefile, re.M)
    return float(flags[1]), int(epochs[1]), int(flags[2])
