"""bench/peers.py: sides take turns on equal work, the result's shape, and unequal work is refused."""

import json
from statistics import median

import numpy as np
import pytest
import torch
from conftest import ROOT, load_stage, run_stage

TEXT = "Mji mkuu wa Kenya ni Nairobi, na ule wa Tanzania ni Dodoma; miji mikubwa iko kando ya bahari {}. "


@pytest.fixture
def data(tmp_path):
    """A collection of forty short passages and a question."""
    passages = [{"docid": str(n), "title": "", "text": TEXT.format(n) * (1 + n % 3)} for n in range(40)]
    record = {"query_id": "q", "lang": "sw", "query": "Mji mkuu?", "positive_passages": passages[:1]}
    (tmp_path / "data/corpus").mkdir(parents=True)
    (tmp_path / "data/corpus/sw.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages), "utf-8")
    (tmp_path / "data/train.jsonl").write_text(json.dumps(record | {"negative_passages": []}) + "\n", "utf-8")
    return tmp_path / "data"


def peers(data, *flags):
    return run_stage("bench/peers.py", "--data", data, "--out", data / "peers.json", *flags)


def test_sides_take_turns_and_the_figures_are_kept(data):
    done = peers(data, "--subjects", "judge", "--calls", 40, "--rounds", 2)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("judge 40 calls, ")]
    assert [line.split(", ")[1].split(":")[0] for line in lines] == ["ours", "peer"] * 2
    (where, part), = json.loads((data / "peers.json").read_text("utf-8")).items()
    assert where.endswith("random weights, cpu") and part["run"]["torch"] and part["run"]["machine"]
    (name, case), = part["cases"].items()
    assert name == "judge 40 calls" and list(case["sides"]) == ["ours", "peer"]
    for key in ("cpu_s", "wall_s", "peak_mb"):
        ours, peer = (median(told[key] for told in case["rounds"][side]) for side in ("ours", "peer"))
        rounding = 0.5 if key == "peak_mb" else 1e-3
        assert case["sides"]["ours"][key] == pytest.approx(ours, abs=rounding) and ours > 0
        assert case["ratios"]["peer"][key] == pytest.approx(peer / ours, rel=0.05)
    assert f"| {name}: ours |" in done.stdout


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return load_stage("bench/peers")


def compare(bench, folder, do, ours, peer):
    """What same_work says of what the two sides told and, in files, left."""
    jobs = {side: {"do": do, "dtype": "fp32", "out": f"{folder}/{side}"} for side in ("ours", "peer")}
    found = {}
    for side, (tokens, left) in (("ours", ours), ("peer", peer)):
        found[side] = {"tokens": tokens, "loss": left, "ndcg@10": left}
        np.save(folder / f"{side}.npy", np.array(left) if do == "encode" else 0)
        (folder / side).write_text(json.dumps(left))
    return bench.same_work("a case", jobs, found)["peer"]


def test_equal_work_is_told(bench, tmp_path):
    mined = {"q": ["2", "1"]}, {"q": ["1", "2"]}
    assert compare(bench, tmp_path, "mine", (7, mined[0]), (7, mined[1])) == {
        "tokens": 7, "share of the same passages": 1.0}
    near = compare(bench, tmp_path, "encode", (7, [[1.0, 0.0]]), (7, [[0.999999, 0.001]]))
    assert near["smallest cosine"] == pytest.approx(0.999999)


@pytest.mark.parametrize(("do", "ours", "peer", "why"), [
    ("train", (7, 0.5), (8, 0.5), "tokens: {'ours': 7, 'peer': 8}"),
    ("train", (7, 0.5), (7, 0.5002), "difference of loss"),
    ("evaluate", (None, 0.5), (None, 0.5002), "difference of ndcg@10"),
    ("encode", (7, [[1.0, 0.0]]), (7, [[0.9999, 0.01]]), "smallest cosine"),
    ("mine", (7, {"q": ["1", "2"]}), (7, {"q": ["1", "3"]}), "same passages"),
    ("mine", (7, {"q": ["1"], "r": ["1"]}), (7, {"q": ["1"]}), "same passages")])
def test_unequal_work_is_refused(bench, tmp_path, do, ours, peer, why):
    from common import DataError
    with pytest.raises(DataError, match="the work is not equal") as error:
        compare(bench, tmp_path, do, ours, peer)
    assert why in str(error.value)


def test_without_a_gpu_the_result_says_that_it_was_not_run_there(data):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = peers(data, "--device", "cuda")
    assert done.returncode == 0 and "cuda**: not run no GPU was at hand" in done.stdout
