"""Topics: deterministic, by size, across or within languages; the file is streamed."""
import json
import re

import numpy as np
import pytest
from conftest import load_stage

stage = load_stage("04_cluster_topics")


class StandInVectors:
    """The tests are about clusters, so the vectors are given: two themes, each shifted by its language."""

    def __init__(self, *_, **__):
        self.calls = 0

    def encode_cached(self, texts, kind, cache):
        self.calls += 1
        theme = {"river": 0, "food": 1}
        lang = {"ko": 2, "th": 3, "fa": 4}
        vectors = np.zeros((len(texts), 8), np.float32)
        for row, text in enumerate(texts):
            words = text.split()
            vectors[row, theme[words[0]]], vectors[row, lang[words[1]]] = 1.0, 3.0
            vectors[row, 5:] = np.random.default_rng(int(words[2])).normal(0, 0.05, 3)
        return vectors.astype(np.float16)


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "Encoder", StandInVectors)
    records, n = [], 0
    for lang, sizes in (("ko", (40, 20)), ("th", (30, 10)), ("fa", (3, 2))):
        for theme, size in zip(("river", "food"), sizes):
            for _ in range(size):
                n += 1
                texts = [{"docid": f"{n}-{j}", "title": "", "text": f"{theme} {lang} {n + 1000 * j}"} for j in range(1 + n % 2)]
                records.append({"query_id": str(n), "lang": lang, "query": "ข้อ 🙂", "positive_passages": texts, "negative_passages": []})
    (tmp_path / "augmented.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return tmp_path


def topics(made, out, *flags):
    (made / "encoder").mkdir(exist_ok=True)
    stage.main(["--input", str(made / "augmented.jsonl"), "--encoder", str(made / "encoder"), "--cache", str(made / "cache"), "--out", str(made / out), *map(str, flags)])
    return [json.loads(line) for line in (made / out).read_text("utf-8").splitlines()]


def theme(record):
    return record["positive_passages"][0]["text"].split()[0]


def test_a_query_is_the_mean_of_all_its_positives():
    records = [{"lang": "ko", "positive_passages": [{"docid": str(n), "title": "", "text": f"{theme} ko {n}"} for n, theme in enumerate(themes)]}
               for themes in (["food"], ["river", "river", "river", "food"], ["river"])]
    (langs, vectors), = stage.embed(records, StandInVectors(), None)
    assert langs == ["ko"] * 3 and np.allclose(vectors[:, :3], [[0, 1, 3], [0.75, 0.25, 3], [1, 0, 3]], atol=1e-3)


def test_languages_pull_topics_apart_and_centring_brings_themes_together(made, capsys):
    by_language = topics(made, "a.jsonl", "--topics", 3)
    assert len({(r["lang"], r["topic"]) for r in by_language}) == 3  # vectors cluster by language
    meta = json.loads((made / "a.jsonl.meta.json").read_text("utf-8"))["counts"]
    assert meta["nmi_topic_language"] == 1.0 and meta["by_lang"]["ko"] == {"0": 60}
    by_theme = topics(made, "b.jsonl", "--topics", 2, "--remove-language-mean")
    assert len({(theme(r), r["topic"]) for r in by_theme}) == 2
    assert json.loads((made / "b.jsonl.meta.json").read_text("utf-8"))["counts"]["nmi_topic_language"] < 0.05
    said = capsys.readouterr().err
    assert "topic 0: 73 queries (fa 3, ko 40, th 30)" in said and "normalised mutual information" in said


def test_per_language_clusters_each_alone_by_size(made, capsys):
    records = topics(made, "c.jsonl", "--topics", 2, "--per-language")
    assert {(r["lang"], theme(r), r["topic"]) for r in records} == {(lang, t, n) for lang in ("ko", "th", "fa") for n, t in enumerate(("river", "food"))}
    topics(made, "d.jsonl", "--topics", 12, "--per-language")
    said = capsys.readouterr().err
    assert re.search("fa: 5 queries give [3-5] of 12 topics", said) and "fa: 5 queries are fewer than the 12 topics" in said


def test_same_seed_same_bytes_whatever_the_block(made, monkeypatch):
    topics(made, "e.jsonl", "--topics", 5)
    monkeypatch.setattr(stage, "BLOCK", 7)
    topics(made, "f.jsonl", "--topics", 5)
    assert (made / "e.jsonl").read_bytes() == (made / "f.jsonl").read_bytes()


def test_clusters_fitted_to_a_sample_still_label_every_query(made, monkeypatch):
    monkeypatch.setattr(stage, "FIT", 60)
    records = topics(made, "g.jsonl", "--topics", 2, "--remove-language-mean")
    assert len(records) == 105 and len({(theme(r), r["topic"]) for r in records}) == 2


def test_records_are_kept_but_for_the_topic(made):
    given = [json.loads(line) for line in (made / "augmented.jsonl").read_text("utf-8").splitlines()]
    assert [{k: v for k, v in r.items() if k != "topic"} for r in topics(made, "h.jsonl", "--topics", 2)] == given


def test_telling_titles_are_frequent_here_and_rare_elsewhere(capsys):
    from collections import Counter
    stage.summarise(np.array(["ko", "ko", "th", "th", "th"]), np.array([0, 0, 0, 1, 1]),
                    {0: Counter({"한강": 2, "도시": 1}), 1: Counter({"도시": 1, "ช้าง": 1})})
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "topic 0: 3 queries (ko 2, th 1): 한강; 도시"
