"""05a_export.py: every training query in its language's file, no positive among the negatives."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, load_stage, run_stage
from tiny_models import sentence_transformer

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
                negatives += [
                    passage("p0", f"{text} p0"),
                    passage("n9", f"{text.upper()}  n0", "other title"),
                ]
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


def test_a_copy_of_a_known_false_negative_is_no_negative(topics):
    records = [json.loads(line) for line in topics.read_text("utf-8").splitlines()]
    for record in records:
        known = record["negative_passages"][-1]
        record["false_negatives"] = [known | {"docid": "other"}]
    topics.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    lines, _ = exported(topics, "tevatron")
    for of_lang in lines.values():
        for line in of_lang:
            (known,) = [r["false_negatives"] for r in records if r["query"] == line["query"]]
            assert known[0]["text"] not in [p["text"] for p in line["negative_passages"]]


def test_flagembedding(topics):
    lines, meta = exported(topics, "flagembedding")
    assert (
        {lang: len(of) for lang, of in lines.items()} == dict.fromkeys(TEXTS, 3) == meta["counts"]["by_lang"]
    )
    assert meta["counts"]["relevant_left_out"] == 6 and meta["counts"]["copies_left_out"] == 3
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


def test_what_a_row_cannot_hold_is_counted(topics):
    _, meta = exported(topics, "sentence-transformers")
    assert meta["counts"]["further_positives_left_out"] == 9  # of each of nine queries its second
    assert meta["counts"]["further_negatives_left_out"] == 3 * 1 + 3 * 2  # zh-Hant 4, fa 5, th 3


def test_an_answer_to_the_same_question_under_another_id_is_no_negative(tmp_path):
    path = tmp_path / "topics.jsonl"
    records = [
        {
            "query_id": name,
            "lang": "sw",
            "query": text,
            "positive_passages": [passage(f"p{name}", f"jibu {name}")],
            "negative_passages": [passage("pa", "jibu a"), passage("pb", "jibu b"), passage("n", "lingine")],
        }
        for name, text in (("a", "Nani mfalme?"), ("b", "NANI  mfalme?"), ("c", "Nani rais?"))
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    lines, meta = exported(path, "flagembedding")
    assert [line["neg"] for line in lines["sw"]] == [
        ["T\nlingine"],
        ["T\nlingine"],
        ["T\njibu a", "T\njibu b", "T\nlingine"],
    ]
    assert meta["counts"]["relevant_left_out"] == 4


def test_documents_of_a_title_alone_are_told_apart(tmp_path):
    path = tmp_path / "topics.jsonl"
    record = {
        "query_id": "1",
        "lang": "fi",
        "query": "?",
        "positive_passages": [passage("p", "", "Turku")],
        "negative_passages": [
            passage("n0", "", "Oulu"),
            passage("n1", "", "Pori"),
            passage("n2", "", "TURKU"),
        ],
    }
    path.write_text(json.dumps(record) + "\n", "utf-8")
    lines, _ = exported(path, "flagembedding")
    assert lines["fi"] == [{"query": "?", "pos": ["Turku\n"], "neg": ["Oulu\n", "Pori\n"]}]


def test_sentence_transformers_trains_a_step_on_its_export(topics, tmp_path):
    from datasets import load_dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer import losses

    exported(topics, "sentence-transformers")
    files = sorted((topics.parent / "sentence-transformers").glob("*.jsonl"))
    reading = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    data = {path.stem: load_dataset("json", data_files=str(path), **reading) for path in files}
    assert {lang: len(of) for lang, of in data.items()} == dict.fromkeys(TEXTS, 3)
    words = [word for text in TEXTS.values() for word in text.split()]
    model = SentenceTransformer(sentence_transformer(tmp_path / "model", words), device="cpu")
    before = [parameter.clone() for parameter in model.parameters()]
    arguments = Arguments(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=data, loss=losses.MultipleNegativesRankingLoss(model)
    )
    trainer.train()
    assert any((a != b).any() for a, b in zip(before, model.parameters(), strict=True))


def run_export(topics, out, *flags):
    done = run_stage("05a_export.py", "--input", topics, "--layout", "tevatron", "--out", out, *flags)
    return done.returncode, done.stderr


def test_a_damaged_export_is_made_again(topics):
    out = topics.parent / "out"
    run_export(topics, out)
    whole = (out / "th.jsonl").read_bytes()
    assert "is up to date" in run_export(topics, out)[1]
    (out / "th.jsonl").write_text("garbage")
    (out / "fa.jsonl").unlink()
    assert "a file is missing or was changed, making it again" in run_export(topics, out)[1]
    assert (out / "th.jsonl").read_bytes() == whole and (out / "fa.jsonl").is_file()
    assert "is up to date" in run_export(topics, out)[1]


@pytest.mark.parametrize("flags", [["--limit", "1"], ["--limit", "1", "--overwrite"]])
def test_what_others_put_into_an_output_folder_is_not_lost(topics, flags):
    out = topics.parent / "out"
    run_export(topics, out)
    (out / "trained").mkdir()
    (out / "trained/model.bin").write_text("weeks")
    (out / "README.md").write_text("a card may be edited")
    assert "is up to date" in run_export(topics, out)[1]
    status, told = run_export(topics, out, *flags)
    assert status == 2 and "holds trained/model.bin, which this script did not make; move it away" in told
    (out / "trained/model.bin").rename(topics.parent / "model.bin")
    assert run_export(topics, out, *flags)[0] == 0 and len((out / "th.jsonl").read_text().splitlines()) == 1


def test_a_damaged_meta_file_is_no_leave_to_delete(topics):
    out = topics.parent / "out"
    run_export(topics, out)
    (topics.parent / "out.meta.json").write_text("[")
    assert "make it with --overwrite" in run_export(topics, out)[1]
    (topics.parent / "out.meta.json").unlink(missing_ok=True)
    for flags in ([], ["--overwrite"]):
        status, told = run_export(topics, out, *flags)
        assert status == 2 and "holds fa.jsonl, which this script did not make; move it away" in told


def test_a_folder_with_the_input_in_it_is_not_replaced(topics):
    for out in (topics.parent, f"{topics.parent}/no/.."):
        status, told = run_export(topics, out, "--overwrite")
        assert status == 2 and "is where the input lies" in told and topics.is_file()


def test_a_link_to_a_folder_stays_one(topics):
    real, link = topics.parent / "real", topics.parent / "link"
    real.mkdir()
    link.symlink_to(real)
    for flags in (["--overwrite"], [], ["--limit", "1"]):
        assert run_export(topics, link, *flags)[0] == 0
    assert link.is_symlink() and len((real / "th.jsonl").read_text().splitlines()) == 1
    linked = topics.parent / "linked.jsonl"
    linked.symlink_to(topics.parent / "a.jsonl")
    model = sentence_transformer(topics.parent / "bert", ["a", "b", "c"])
    stage = ["--input", topics, "--encoder", model, "--cache", topics.parent / "cache", "--out", linked]
    done = run_stage("04_cluster_topics.py", *stage, "--topics", 1)
    assert done.returncode == 0 and linked.is_symlink() and (topics.parent / "a.jsonl").is_file()
    assert (topics.parent / "linked.jsonl.meta.json").is_file()
