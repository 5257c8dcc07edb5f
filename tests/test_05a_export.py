"""05a_export.py: every training query in its language's file, no positive among the negatives."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, load_stage, run_stage

export = load_stage("05a_export")
TEXTS = {"th": "กรุงเทพ เป็นเมืองหลวง", "fa": "تهران پایتخت ایران 🙂", "zh-Hant": "臺北是首都"}


def passage(docid, text, title="T"):
    return {"docid": docid, "title": title, "text": text, "source": "mined"}


@pytest.fixture
def topics(tmp_path):
    records = []
    for lang, text in TEXTS.items():
        for q in range(3):
            negatives = [passage(f"n{j}", f"{text} n{j}") for j in range(4 + (lang == "fa"))]
            positives = [passage("p0", f"{text} p0"), passage("p1", f"{text} P1", "")]
            if lang == "th":
                negatives[1]["text"] = f"{text}  p1"  # a positive's text, but for case and white space
                negatives.append(passage("p0", "another text under a positive's docid"))
            records.append(
                {
                    "query_id": str(q),
                    "lang": lang,
                    "query": f"{text} {q}?",
                    "topic": q,
                    "positive_passages": positives,
                    "negative_passages": negatives,
                }
            )
    path = tmp_path / "topics.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def exported(topics, layout, *flags):
    """{lang: the lines of its file} and the meta."""
    out = topics.parent / layout
    export.main(["--input", str(topics), "--layout", layout, "--out", str(out), *flags])
    lines = {
        path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in out.iterdir()
    }
    return lines, json.loads((topics.parent / f"{layout}.meta.json").read_text("utf-8"))


def test_flagembedding(topics):
    lines, meta = exported(topics, "flagembedding")
    assert (
        {lang: len(of) for lang, of in lines.items()} == dict.fromkeys(TEXTS, 3) == meta["counts"]["by_lang"]
    )
    assert meta["counts"]["positives_left_out"] == 6
    th = lines["th"][0]
    assert th["query"] == TEXTS["th"] + " 0?" and th["pos"] == [f"T\n{TEXTS['th']} p0", f"{TEXTS['th']} P1"]
    assert th["neg"] == [f"T\n{TEXTS['th']} n{j}" for j in (0, 2, 3)]
    assert len(lines["fa"][0]["neg"]) == 5


def test_sentence_transformers_has_the_same_columns_in_every_row(topics):
    lines, meta = exported(topics, "sentence-transformers")
    columns = ["anchor", "positive", "negative_1", "negative_2", "negative_3"]
    assert meta["counts"]["fewest_negatives"] == 3
    assert {tuple(line) for of in lines.values() for line in of} == {tuple(columns)}
    assert lines["fa"][2]["negative_3"] == f"T\n{TEXTS['fa']} n2"


def test_tevatron_is_read_by_the_stages(topics):
    from common import read_queries

    lines, _ = exported(topics, "tevatron", "--lang", "fa")
    assert list(lines) == ["fa"] and list(lines["fa"][0]) == [
        "query_id",
        "query",
        "positive_passages",
        "negative_passages",
    ]
    records = list(read_queries(topics.parent / "tevatron/fa.jsonl", ["fa"]))
    assert [len(r["negative_passages"]) for r in records] == [5, 5, 5]


def test_bad_input_is_one_line_and_leaves_nothing(topics):
    records = [json.loads(line) for line in topics.read_text("utf-8").splitlines()]
    for change, words in (({"lang": "../up"}, "../up"), ({"negative_passages": []}, "has no negatives")):
        topics.write_text("".join(json.dumps(r | change) + "\n" for r in records[:1]), "utf-8")
        done = run_stage(
            "05a_export.py", "--input", topics, "--layout", "tevatron", "--out", topics.parent / "out"
        )
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert {path.name for path in topics.parent.iterdir()} == {"topics.jsonl"}


def test_it_loads_no_torch():
    code = (
        "import sys; from conftest import load_stage; load_stage('05a_export'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.stdout.strip() == "False", done.stderr
