"""The bundled sample is what its script makes: hard negatives, planted false ones, and the truth."""

import filecmp
import json
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
from conftest import ROOT

SAMPLE = ROOT / "sample"


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def truth():
    relevant = defaultdict(set)
    for path in SAMPLE.glob("truth/train/*.tsv"):
        for line in path.read_text("utf-8").splitlines():
            query_id, _, docid, _ = line.split("\t")
            relevant[path.stem, query_id].add(docid)
    return relevant


def test_the_script_makes_the_same_bytes_again(tmp_path):
    subprocess.run([sys.executable, SAMPLE / "make_sample.py", "--out", tmp_path], check=True)
    for made in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        assert filecmp.cmp(made, SAMPLE / made.relative_to(tmp_path), shallow=False), made
    assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} == {
        p.relative_to(SAMPLE)
        for folder in ("data", "truth")
        for p in (SAMPLE / folder, *(SAMPLE / folder).rglob("*"))
    }


def test_size_and_unevenness():
    queries = Counter(r["lang"] for r in read(SAMPLE / "data/train.jsonl"))
    passages = {p.stem: len(read(p)) for p in SAMPLE.glob("data/corpus/*.jsonl")}
    assert len(queries) == len(passages) == 16
    assert (
        sum(queries.values()) / 16 >= 24
        and min(queries.values()) < 10
        and max(queries.values()) > 5 * min(queries.values())
    )
    assert sum(passages.values()) / 16 >= 60
    assert len(json.loads((SAMPLE / "facts.json").read_text("utf-8"))) >= 6  # topics
    assert sum(p.stat().st_size for p in SAMPLE.rglob("*") if p.is_file()) < 3_000_000


def test_at_least_a_quarter_of_the_queries_have_a_planted_false_negative(truth):
    records = read(SAMPLE / "data/train.jsonl")
    planted = 0
    for record in records:
        labelled = {p["docid"] for p in record["positive_passages"]}
        judged = {p["docid"] for p in record["negative_passages"]}
        relevant = truth[record["lang"], record["query_id"]]
        assert labelled and labelled <= relevant and not judged & relevant
        planted += bool(relevant - labelled)
    assert planted >= len(records) / 4


def test_every_entity_has_several_passages_and_no_text_is_left_unfilled():
    for path in SAMPLE.glob("data/corpus/*.jsonl"):
        corpus = read(path)
        assert set(Counter(p["docid"].split("#")[0] for p in corpus).values()) == {4}
        assert len({p["docid"] for p in corpus}) == len({p["text"] for p in corpus}) == len(corpus)
        assert not any("{" in p["text"] + p["title"] or "_" in p["text"] for p in corpus)


def test_scaled_collections_have_the_size_asked_for(tmp_path):
    for out in ("a", "b"):
        subprocess.run(
            [
                sys.executable,
                SAMPLE / "make_sample.py",
                "--scale",
                "1001",
                "--queries",
                "20",
                "--lang",
                "th",
                "--out",
                tmp_path / out,
            ],
            check=True,
        )
    corpus = read(tmp_path / "a/corpus/th.jsonl")
    assert len(corpus) == len({p["docid"] for p in corpus}) == 1001
    assert len(read(tmp_path / "a/train.jsonl")) == 20
    assert filecmp.cmp(tmp_path / "a/corpus/th.jsonl", tmp_path / "b/corpus/th.jsonl", shallow=False)
