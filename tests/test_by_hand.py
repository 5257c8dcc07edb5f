"""A collection that can be worked out by hand, through the real commands: 00, 01, 06 and 05a.

Every passage and query has four words, and the encoder's cosine is that of word counts (word_model): words in
common / 4. So each score below is 1, 0.75, 0.5, 0.25 or 0, and everything follows by counting.
"""

import json
from math import log2

import pytest
from conftest import run_stage
from tiny_models import word_model

CORPUS = {
    "sw0": "nairobi mji mkuu kenya",
    "sw1": "nairobi mji mkuu mto",
    "hi0": "दिल्ली राजधानी भारत नगर",
    "hi1": "दिल्ली राजधानी भारत mto",
    "th0": "กรุงเทพ เมือง หลวง ไทย",
    "th1": "กรุงเทพ  เมือง หลวง ไทย ",  # the text of th0, but for its blanks
    "ko0": "서울 수도 한국 도시",
    "ko1": "서울 수도 nairobi mto",
    "fa0": "تهران پایتخت ایران شهر",
    "fa1": "تهران mto nairobi kenya",
}
QUERIES = {
    "itself": "nairobi mji mkuu kenya",  # the text of sw0
    "thai": "กรุงเทพ เมือง ไทย mto",
    "korean": "서울 수도 한국 nairobi",
    "persian": "تهران پایتخت mto kenya",
    "nobody": "नगर शहर mto kenya",
}
# grade 2 and more is a positive; the passage "gone" is not in the corpus
TRAIN = {"itself": {"sw1": 2, "fa1": 0}, "thai": {"th0": 3, "hi1": 1, "gone": 2}, "nobody": {"hi0": 1}}
DEV = {"korean": {"ko0": 2, "ko1": 1, "gone": 2}, "persian": {"fa0": 3, "th0": 1, "sw1": 0}}


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def command(script, *args):
    done = run_stage(script, *args)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the collection as 00 makes it, and the encoder."""
    top = tmp_path_factory.mktemp("hand")
    write(top / "in/corpus.jsonl", [{"_id": d, "title": "", "text": text} for d, text in CORPUS.items()])
    write(top / "in/queries.jsonl", [{"_id": q, "text": text} for q, text in QUERIES.items()])
    for split, qrels in (("train", TRAIN), ("dev", DEV)):
        rows = [f"{q}\t{d}\t{grade}\n" for q, of_query in qrels.items() for d, grade in of_query.items()]
        (top / "in/qrels").mkdir(exist_ok=True)
        (top / f"in/qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows), "utf-8")
    words = {word for text in [*CORPUS.values(), *QUERIES.values()] for word in text.split()}
    word_model(top / "words", sorted(words))
    flags = ["--source", "beir", "--root", top / "in", "--lang", "mul", "--min-relevance", 2]
    (top / "said").write_text(command("00_prepare_data.py", *flags, "--out", top / "data").stderr, "utf-8")
    return top


def test_the_collection(made):
    said = (made / "said").read_text("utf-8")
    assert "2 judgments of passages not in the corpus" in said  # "gone" of "thai" and of "korean"
    assert "1 queries without a positive" in said  # "nobody" has grade 1 alone
    assert "10 passages" in said and "2 train" in said and "2 dev" in said
    itself, thai = read(made / "data/train.jsonl")
    assert [[p["docid"] for p in r["positive_passages"]] for r in (itself, thai)] == [["sw1"], ["th0"]]
    assert [[p["docid"] for p in r["negative_passages"]] for r in (itself, thai)] == [["fa1"], ["hi1"]]
    qrels = (made / "data/qrels/train/mul.tsv").read_text("utf-8")
    assert qrels == "itself\t0\tsw1\t2\nitself\t0\tfa1\t0\nthai\t0\tth0\t3\nthai\t0\thi1\t1\n"
    qrels = (made / "data/qrels/dev/mul.tsv").read_text("utf-8")
    assert qrels == (
        "korean\t0\tko0\t2\nkorean\t0\tko1\t1\n"
        "persian\t0\tfa0\t3\npersian\t0\tth0\t1\npersian\t0\tsw1\t0\n"
    )


# "itself": sw0 1 is the query, sw1 0.75 its positive; then fa1 (nairobi kenya), ko1 (nairobi), and of the
#           passages without a common word those with the smallest docids
# "thai":   th0 0.75 is its positive, th1 0.75 the same text; then all that have "mto", by docid
CANDIDATES = {
    "itself": [("fa1", 0.5), ("ko1", 0.25), ("fa0", 0), ("hi0", 0)],
    "thai": [("fa1", 0.25), ("hi1", 0.25), ("ko1", 0.25), ("sw1", 0.25)],
}


def mine(made, tmp_path, *flags):
    common = ["--data", made / "data", "--retrievers", made / "words", "--depth", 4, "--device", "cpu"]
    done = command(
        "01_mine_candidates.py",
        *common,
        "--cache",
        tmp_path / "cache",
        "--out",
        tmp_path / "out.jsonl",
        *flags,
    )
    return done.stderr, read(tmp_path / "out.jsonl")


def test_candidates(made, tmp_path):
    said, records = mine(made, tmp_path)
    for record in records:
        found = record["candidate_passages"]
        expected = CANDIDATES[record["query_id"]]
        assert [p["docid"] for p in found] == [docid for docid, _ in expected]
        assert [p["score"] for p in found] == pytest.approx([score for _, score in expected], abs=1e-3)
    assert "left out, the query itself 1" in said
    # of both queries the positive is among the four best: second and first, in the mean 1.5
    assert "words recall@4 of positives 1.0, words mean rank of positives found 1.5" in said


def test_exports(made, tmp_path):
    mine(made, tmp_path, "--strategy", "topk")
    rows = {
        query_id: {
            "query": QUERIES[query_id],
            "pos": [CORPUS[positive]],
            "neg": [CORPUS[docid] for docid, _ in CANDIDATES[query_id]],
        }
        for query_id, positive in (("itself", "sw1"), ("thai", "th0"))
    }
    for layout in ("flagembedding", "sentence-transformers", "tevatron"):
        flags = ["--input", tmp_path / "out.jsonl", "--layout", layout, "--out", tmp_path / layout]
        command("05a_export.py", *flags)
        assert [path.name for path in (tmp_path / layout).iterdir()] == ["mul.jsonl"]
    assert read(tmp_path / "flagembedding/mul.jsonl") == list(rows.values())
    columns = ["anchor", "positive", "negative_1", "negative_2", "negative_3", "negative_4"]
    expected = [dict(zip(columns, [row["query"], *row["pos"], *row["neg"]])) for row in rows.values()]
    assert read(tmp_path / "sentence-transformers/mul.jsonl") == expected
    itself, thai = read(tmp_path / "tevatron/mul.jsonl")
    assert itself == {
        "query_id": "itself",
        "query": QUERIES["itself"],
        "positive_passages": [{"docid": "sw1", "title": "", "text": CORPUS["sw1"]}],
        "negative_passages": [
            {"docid": docid, "title": "", "text": CORPUS[docid]} for docid, _ in CANDIDATES["itself"]
        ],
    }
    assert [p["docid"] for p in thai["negative_passages"]] == ["fa1", "hi1", "ko1", "sw1"]


# By cosine; among equals trec_eval takes the larger docid first:
#   korean   ko1 .75, ko0 .75, then sw1 sw0 fa1 .25: gains 1, 2 where 2, 1 is best; both relevant are found
#   persian  fa1 .75, fa0 .5, then sw1 sw0 ko1 hi1 .25, then th1 th0: gains 0, 3, and 1 in place 8; best 3, 1
# By BM25 (all passages are equally long; a word's weight falls with the passages that have it):
#   korean   ko0 has the rare word that ko1 has not, so gains 2, 1
#   persian  fa1 before fa0 (three words against two); th0 has no word of the query and is not found
BY_HAND = {
    "words": {
        "korean": ((1 / log2(2) + 2 / log2(3)) / (2 / log2(2) + 1 / log2(3)), 1.0),
        "persian": ((3 / log2(3) + 1 / log2(9)) / (3 / log2(2) + 1 / log2(3)), 1.0),
    },
    "bm25": {"korean": (1.0, 1.0), "persian": ((3 / log2(3)) / (3 / log2(2) + 1 / log2(3)), 0.5)},
}


def test_metrics(made, tmp_path):
    assert [round(ndcg, 4) for ndcg, _ in BY_HAND["words"].values()] == [0.8597, 0.6082]
    out = tmp_path / "eval"
    flags = [
        "--models",
        made / "words",
        "bm25",
        "--device",
        "cpu",
        "--cache",
        tmp_path / "cache",
        "--out",
        out,
    ]
    command("06_eval.py", "--data", made / "data", *flags)
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))["models"]
    for name, values in BY_HAND.items():
        row = metrics[name]["mul"]
        assert row["queries"] == 2
        assert row["ndcg@10"] == pytest.approx(sum(ndcg for ndcg, _ in values.values()) / 2, abs=1e-5)
        assert row["recall@100"] == pytest.approx(sum(recall for _, recall in values.values()) / 2, abs=1e-5)
        assert metrics[name]["avg"] == row
    ranks = [line.split()[0::2][:2] for line in (out / "runs/words.mul.trec").read_text("utf-8").splitlines()]
    assert [docid for query_id, docid in ranks if query_id == "korean"][:5] == [
        "ko1",
        "ko0",
        "sw1",
        "sw0",
        "fa1",
    ]
