"""Topics: deterministic, by size, across or within languages; the file is streamed."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from conftest import load_stage

stage = load_stage("04_cluster_topics")


class StandInVectors:
    """The tests are about clusters, so the vectors are given: two themes, each shifted by its language."""

    def __init__(self, *_, **__):
        self.read = []

    def passage_text(self, passage):
        return passage["text"]

    def report_cut(self):
        pass

    def encode_cached(self, texts, kind, cache):
        assert kind == "passage"
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
    monkeypatch.setattr(stage, "from_flags", StandInVectors)
    records, n = [], 0
    for lang, sizes in (("ko", (40, 20)), ("th", (30, 10)), ("fa", (3, 2))):
        for theme, size in zip(("river", "food"), sizes):
            for _ in range(size):
                n += 1
                texts = [
                    {"docid": f"{n}-{j}", "title": "", "text": f"{theme} {lang} {n + 1000 * j}"}
                    for j in range(1 + n % 2)
                ]
                records.append(
                    {
                        "query_id": str(n),
                        "lang": lang,
                        "query": "ข้อ 🙂",
                        "positive_passages": texts,
                        "negative_passages": [],
                    }
                )
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (tmp_path / "augmented.jsonl").write_text("".join(lines), "utf-8")
    return tmp_path


def topics(made, out, *flags):
    (made / "encoder").mkdir(exist_ok=True)
    stage.main(
        [
            "--input",
            str(made / "augmented.jsonl"),
            "--encoder",
            str(made / "encoder"),
            "--cache",
            str(made / "cache"),
            "--out",
            str(made / out),
            *map(str, flags),
        ]
    )
    return [json.loads(line) for line in (made / out).read_text("utf-8").splitlines()]


def theme(record):
    return record["positive_passages"][0]["text"].split()[0]


def test_a_query_is_the_mean_of_all_its_positives_at_unit_length():
    records = [
        {
            "lang": "ko",
            "positive_passages": [
                {"docid": str(n), "title": "", "text": f"{theme} ko {n}"} for n, theme in enumerate(themes)
            ],
        }
        for themes in (["food"], ["river", "river", "river", "food"], ["river"])
    ]
    langs, vectors = stage.embed(records, StandInVectors(), None)
    expected = np.array([[0, 1, 3], [0.75, 0.25, 3], [1, 0, 3]])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert langs.tolist() == ["ko"] * 3 and np.allclose(vectors[:, :3], expected, atol=0.01)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


def test_a_passage_is_read_as_the_encoder_joins_title_and_text():
    class Joins(StandInVectors):
        def passage_text(self, passage):
            return f"{passage['text']} {passage['title']}"

    records = [{"lang": "ko", "positive_passages": [{"docid": "1", "title": "1", "text": "food ko"}]}]
    assert stage.embed(records, Joins(), None)[1].shape == (1, 8)


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
    assert {(r["lang"], theme(r), r["topic"]) for r in records} == {
        (lang, t, n + 2 * number)  # no topic of two languages
        for number, lang in enumerate(("fa", "ko", "th"))
        for n, t in enumerate(("river", "food"))
    }
    topics(made, "d.jsonl", "--topics", 12, "--per-language")
    said = capsys.readouterr().err
    assert re.search("fa: 5 queries give [3-5] of 12 topics", said)
    assert "fa: 5 queries are fewer than the 12 topics" in said


def test_same_seed_same_bytes_whatever_the_block(made, monkeypatch):
    topics(made, "e.jsonl", "--topics", 5)
    monkeypatch.setattr(stage, "BLOCK", 7)
    topics(made, "f.jsonl", "--topics", 5)
    assert (made / "e.jsonl").read_bytes() == (made / "f.jsonl").read_bytes()
    assert len(set(r["topic"] for r in topics(made, "g.jsonl", "--topics", 5, "--seed", 1))) == 5


def test_a_topic_of_few_queries_is_warned_of_once(made, capsys, monkeypatch):
    topics(made, "h.jsonl", "--topics", 2)
    assert "of the queries" not in capsys.readouterr().err
    monkeypatch.setattr(stage, "cluster", lambda vectors, *_: np.array([0] * (len(vectors) - 1) + [1]))
    topics(made, "i.jsonl", "--topics", 2)
    assert capsys.readouterr().err.count("1 topics hold under 1% of the queries ([1])") == 1


def test_records_are_kept_but_for_the_topic(made):
    given = [json.loads(line) for line in (made / "augmented.jsonl").read_text("utf-8").splitlines()]
    kept = [
        {k: v for k, v in record.items() if k != "topic"} for record in topics(made, "j.jsonl", "--topics", 2)
    ]
    assert kept == given


def test_telling_titles_are_frequent_here_and_rare_elsewhere(capsys):
    stage.summarise(
        np.array(["ko", "ko", "th", "th", "th"]),
        np.array([0, 0, 0, 1, 1]),
        {0: Counter({"한강": 2, "도시": 1}), 1: Counter({"도시": 1, "ช้าง": 1})},
    )
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "topic 0: 3 queries (ko 2, th 1): 한강; 도시"
