"""Stages 02 to 05 run alone on a Tevatron-layout file written by hand."""

import json
import re
import sys
import unicodedata

import pytest
from conftest import ROOT, load_stage, run_stage

from common import DataError

PASSAGES = {
    "1#0": ("เมืองหลวง", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย"),
    "1#1": ("ไทย", "สกุลเงินของประเทศไทยคือบาท"),
    "2#0": ("서울", "대한민국의 수도는 서울이다."),
    "2#1": ("부산", "부산은 항구 도시이다."),
    "3#0": ("تهران", "پایتخت ایران تهران است."),
    "3#1": ("دماوند", "بلندترین کوه ایران دماوند است."),
    "4#0": ("", "富士山は日本で最も高い山です。🗻"),
    "4#1": ("東京", "日本の首都は東京です。"),
    "5#0": ("Nairobi", "Nairobi is the capital of Kenya."),
    "5#1": ("Mombasa", "Mombasa lies on the coast of Kenya."),
    "6#0": ("Kenya", "The capital city of Kenya is called Nairobi."),
    "6#1": ("Shilling", "People in Kenya pay with shillings."),
}


def passage(docid):
    return {"docid": docid, "title": PASSAGES[docid][0], "text": PASSAGES[docid][1]}


def record(query_id, query, positives, negatives, **more):
    return {
        "query_id": query_id,
        "query": query,
        "positive_passages": [passage(d) for d in positives],
        "negative_passages": [passage(d) for d in negatives],
        **more,
    }


@pytest.fixture
def tevatron(tmp_path):
    """Six records without lang, candidates, source, grade or topic, as Tevatron's own files are."""
    others = list(PASSAGES)
    records = [
        record("q1", "What is the capital of Kenya?", ["5#0"], ["6#0", "5#1", "6#1", "2#1"]),
        record("q2", "What do people in Kenya pay with?", ["6#1"], ["5#0", "5#1", "1#0", "4#1"]),
        record("q3", "대한민국의 수도는?", ["2#0"], ["2#1", "4#1", "3#0", "1#1"]),
        record("q4", "日本で最も高い山は?", ["4#0"], ["4#1", "3#1", "1#1", "5#1"]),
        record("q5", "پایتخت ایران کجاست؟", ["3#0"], ["3#1", "2#0", "4#1", "5#0"]),
        record("q6", "สกุลเงินของประเทศไทยคืออะไร", ["1#1"], ["1#0", "2#1", "6#1", "3#1"]),
    ]
    path = tmp_path / "hand.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    (tmp_path / "data/corpus").mkdir(parents=True)
    (tmp_path / "data/corpus/en.jsonl").write_text(
        "".join(json.dumps(passage(d), ensure_ascii=False) + "\n" for d in others), "utf-8"
    )
    return path


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "data/corpus").mkdir(parents=True)
    (folder / "data/corpus/en.jsonl").write_text(
        "".join(json.dumps(passage(d), ensure_ascii=False) + "\n" for d in PASSAGES), "utf-8"
    )
    done = run_stage(
        "sample/make_encoder.py",
        "--data",
        folder / "data",
        "--out",
        folder / "model",
        "--steps",
        5,
        "--vocab",
        400,
        "--width",
        32,
        "--batch-size",
        4,
    )
    assert done.returncode == 0, done.stderr
    return folder / "model"


def test_02_filters_negatives_that_nobody_judged(tevatron, tmp_path):
    done = run_stage(
        "offline_llm.py",
        "--exec",
        sys.executable,
        ROOT / "02_filter_false_negatives.py",
        "--input",
        tevatron,
        "--lang",
        "en",
        "--llm",
        "offline-stand-in",
        "--cache",
        tmp_path / "cache",
        "--out",
        tmp_path / "filtered.jsonl",
    )
    assert done.returncode == 0, done.stderr
    first = read(tmp_path / "filtered.jsonl")[0]
    assert first["lang"] == "en"
    assert [p["docid"] for p in first["false_negatives"]] == ["6#0"]  # the capital, in other words
    assert [p["docid"] for p in first["negative_passages"]] == ["5#1", "6#1", "2#1"]
    assert (
        first["false_negatives"][0]["grade"]
        == min(first["false_negatives"][0][k] for k in ("accuracy", "completeness"))
        > 0
    )


def test_02_keeps_what_people_judged_without_a_call(tevatron, tmp_path):
    records = read(tevatron)
    for r in records:
        for p in r["negative_passages"]:
            p["source"] = "human"
    tevatron.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    done = run_stage(
        "02_filter_false_negatives.py",
        "--input",
        tevatron,
        "--lang",
        "en",
        "--llm",
        "none",
        "--base-url",
        "http://127.0.0.1:9/v1",
        "--cache",
        tmp_path / "cache",
        "--out",
        tmp_path / "filtered.jsonl",
    )  # nobody listens there
    assert done.returncode == 0, done.stderr
    assert all(len(r["negative_passages"]) == 4 for r in read(tmp_path / "filtered.jsonl"))


def test_03_brings_hand_written_records_to_n(tevatron, encoder, tmp_path):
    done = run_stage(
        "offline_llm.py",
        "--exec",
        sys.executable,
        ROOT / "03_generate_negatives.py",
        "--input",
        tevatron,
        "--lang",
        "en",
        "--data",
        tmp_path / "data",
        "--retrievers",
        encoder,
        "--llm",
        "offline-stand-in",
        "--target",
        6,
        "--cache",
        tmp_path / "cache",
        "--max-drift",
        1,
        "--out",
        tmp_path / "augmented.jsonl",
    )  # most are no English at all
    assert done.returncode == 0, done.stderr
    for r in read(tmp_path / "augmented.jsonl"):
        docids = [p["docid"] for p in r["negative_passages"]]
        assert len(docids) == len(set(docids)) == 6
        assert not set(docids) & {p["docid"] for p in r["positive_passages"]}


def test_04_and_05_take_hand_written_records(tevatron, encoder, tmp_path):
    done = run_stage(
        "04_cluster_topics.py",
        "--input",
        tevatron,
        "--lang",
        "en",
        "--encoder",
        encoder,
        "--topics",
        2,
        "--cache",
        tmp_path / "cache",
        "--out",
        tmp_path / "topics.jsonl",
    )
    assert done.returncode == 0, done.stderr
    assert {r["topic"] for r in read(tmp_path / "topics.jsonl")} == {0, 1}
    for source, flags in (
        (tmp_path / "topics.jsonl", []),
        (tevatron, ["--lang", "en", "--topic-power", "1"]),
    ):
        done = run_stage(
            "05_train.py",
            "--input",
            source,
            "--encoder",
            encoder,
            "--negatives",
            4,
            "--batch-size",
            4,
            "--epochs",
            1,
            "--out",
            tmp_path / "model",
            *flags,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "model/model.safetensors").is_file()


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda r: r.pop("positive_passages"), "hand.jsonl:2: query 'q2' has no positive_passages"),
        (lambda r: r.update(query=" "), "hand.jsonl:2: 'query' is \" \""),
        (
            lambda r: r["negative_passages"][0].update(text="", title=""),
            "hand.jsonl:2: negative_passages: passage '5#0': 'text' is",
        ),
        (lambda r: r.update(query_id=7), "hand.jsonl:2: 'query_id' is 7"),
        (lambda r: r.update(query_id="q1"), "hand.jsonl:2: query 'q1' (en) is there twice"),
    ],
)
def test_bad_records_stop_every_stage(tevatron, encoder, tmp_path, change, complaint):
    records = read(tevatron)
    change(records[1])
    tevatron.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    for script, flags in (
        ("02_filter_false_negatives", ["--llm", "x", "--base-url", "http://127.0.0.1:9/v1"]),
        ("04_cluster_topics", ["--encoder", encoder]),
        ("05_train", ["--encoder", encoder, "--topic-power", "1", "--negatives", 4]),
    ):
        arguments = [
            "--input",
            tevatron,
            "--lang",
            "en",
            *flags,
            "--cache",
            tmp_path / "cache",
            "--out",
            tmp_path / "out.jsonl",
        ]
        if script == "05_train":
            arguments = [a for a in arguments if a not in ("--cache", tmp_path / "cache")]
        with pytest.raises(DataError, match=re.escape(complaint)):
            load_stage(script).main([str(a) for a in arguments])
        assert not (tmp_path / "out.jsonl").exists()


def test_two_texts_under_one_docid_stop_every_stage(tevatron, encoder, tmp_path):
    records = read(tevatron)
    records[3]["negative_passages"][2]["text"] = (
        "another text"  # "1#1", a negative of the third, the sixth's positive
    )
    tevatron.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    words = f"{tevatron}:4: docid '1#1' has another text at {tevatron}:3; make new docids: "
    words += "00_prepare_data.py --source tevatron --docids-from-texts"
    for script, *flags in (
        ("02_filter_false_negatives", "--llm", "x", "--base-url", "http://127.0.0.1:9/v1"),
        ("04_cluster_topics", "--encoder", encoder),
        ("05_train", "--encoder", encoder, "--topic-power", "1", "--negatives", 4),
        ("05a_export", "--layout", "tevatron"),
    ):
        arguments = ["--input", tevatron, "--lang", "en", *flags, "--out", tmp_path / "out"]
        with pytest.raises(DataError, match=re.escape(words)):
            load_stage(script).main([str(a) for a in arguments])
        assert not (tmp_path / "out").exists()


def test_the_remedy_against_two_texts_under_one_docid_helps(tmp_path, encoder):
    records = [
        {
            "query_id": str(n),
            "lang": "en",
            "query": f"question {n}",
            "positive_passages": [{"docid": "p0", "title": "", "text": f"answer {n}"}],
            "negative_passages": [
                {"docid": f"n{i}", "title": "", "text": f"other {n} {i}"} for i in range(2)
            ],
        }
        for n in range(12)
    ]
    path = tmp_path / "numbered.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    flags = ["--encoder", encoder, "--topic-power", 1, "--negatives", 2, "--batch-size", 5, "--dev-share", 0]
    flags += ["--max-steps", 0, "--epochs", 1, "--out", tmp_path / "model"]
    flags = [*map(str, flags), "--log-batches", str(tmp_path / "batches.jsonl")]
    train = load_stage("05_train").main
    with pytest.raises(DataError, match="--docids-from-texts"):
        train(["--input", str(path), *flags])
    done = run_stage(
        "00_prepare_data.py",
        "--source",
        "tevatron",
        "--docids-from-texts",
        "--root",
        path,
        "--out",
        tmp_path / "data",
    )
    assert done.returncode == 0, done.stderr
    train(["--input", str(tmp_path / "data/train.jsonl"), *flags])
    sizes = [len(batch["query_ids"]) for batch in read(tmp_path / "batches.jsonl")]
    assert sizes == [5] * len(sizes)  # not one query a batch, which all share "p0"


def test_what_answers_the_same_question_under_another_id_is_masked_in_training(tevatron, tmp_path):
    records = read(tevatron)[:3]
    records[1]["query"] = (
        " WHAT is the capital of Kenya? "  # "q2" as "q1"; its positive is "6#1", that of "q1" "5#0"
    )
    tevatron.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    stage = load_stage("05_train")
    flags = ["--input", tevatron, "--lang", "en", "--encoder", "x", "--topic-power", 1, "--negatives", 4]
    args = stage.build_parser().parse_args([*map(str, flags), "--out", str(tmp_path / "m")])
    queries = stage.read_index(args)
    assert set(queries[0].marks) == set(queries[1].marks) and not set(queries[0].marks) & set(
        queries[2].marks
    )
    with open(tevatron, "rb") as file:
        twin, other = stage.read_records(file, queries[1:])
    passages, target, masked = stage.collate([twin, other], [0, 0], args)
    docids = [p["docid"] for p in passages]
    assert [docids[i] for i, mask in enumerate(masked[0]) if mask] == [
        "5#0"
    ]  # its own negative, the other's answer
    assert not masked[1].any() and [docids[i] for i in target] == ["6#1", "2#0"]


def test_one_text_in_another_spelling_or_under_another_title_is_one_text(tevatron):
    from common import read_queries

    records = read(tevatron)
    korean = records[2]["positive_passages"][0]
    spelt = {"docid": korean["docid"], "text": unicodedata.normalize("NFD", korean["text"]) + " \n"}
    records[4]["negative_passages"].append(spelt)
    tevatron.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    assert len(list(read_queries(tevatron, ["en"]))) == 6


def test_limit_counts_the_queries_of_each_language_in_every_stage(tevatron, encoder, tmp_path):
    from common import read_queries

    records = [r | {"lang": lang} for r in read(tevatron) for lang in ("sw", "te", "th")]
    records = [r for r in records if (r["lang"], r["query_id"]) != ("te", "q1")]
    tevatron.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    wanted = [("sw", "q1"), ("th", "q1"), ("sw", "q2"), ("te", "q2"), ("th", "q2"), ("te", "q3")]
    assert [(r["lang"], r["query_id"]) for r in read_queries(tevatron, limit=2)] == wanted
    assert len(list(read_queries(tevatron, ["te", "sw"], 1))) == 2
    flags = ["--input", str(tevatron), "--limit", "2", "--out"]
    load_stage("04_cluster_topics").main(
        [
            *flags,
            str(tmp_path / "topics.jsonl"),
            "--encoder",
            str(encoder),
            "--cache",
            str(tmp_path),
            "--topics",
            "1",
        ]
    )
    assert [(r["lang"], r["query_id"]) for r in read(tmp_path / "topics.jsonl")] == wanted
    load_stage("05a_export").main([*flags, str(tmp_path / "fe"), "--layout", "flagembedding"])
    assert {p.stem: len(read(p)) for p in (tmp_path / "fe").iterdir()} == {"sw": 2, "te": 2, "th": 2}
    args = (
        load_stage("05_train")
        .build_parser()
        .parse_args([*flags, str(tmp_path / "m"), "--encoder", "x", "--topic-power", "1", "--negatives", "4"])
    )
    assert [(q.lang, q.query_id) for q in load_stage("05_train").read_index(args)] == wanted


def test_bad_input_is_one_line_and_exit_status_2(tevatron, tmp_path):
    tevatron.write_text(tevatron.read_text("utf-8") + '{"query_id": "q7", "que', "utf-8")
    done = run_stage(
        "02_filter_false_negatives.py",
        "--input",
        tevatron,
        "--lang",
        "en",
        "--llm",
        "x",
        "--base-url",
        "http://127.0.0.1:9/v1",
        "--max-unjudged",
        1,
        "--dry-run",
        "--out",
        tmp_path / "out.jsonl",
    )
    assert (
        done.returncode == 2
        and "hand.jsonl:7: not a JSON object" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ([], "no 'lang'; name the file's language with --lang CODE"),
        (["--lang", "en", "--negatives", "4"], "'topic' is null, want a whole number"),
        (["--lang", "en", "--negatives", "5"], "has 4 negatives, --negatives wants 5"),
    ],
)
def test_records_that_cannot_be_trained_on_say_what_to_do(tevatron, encoder, tmp_path, flags, complaint):
    with pytest.raises(DataError, match=re.escape(complaint)):
        load_stage("05_train").main(
            ["--input", str(tevatron), "--encoder", str(encoder), "--out", str(tmp_path / "m"), *flags]
        )
