"""bench/judge_quality.py: what is hidden, how the simulated judge errs, and that a stopped run goes on."""

import json
import sys
from collections import Counter

import pytest
from conftest import ROOT, load_stage, run_stage

sys.path.insert(0, str(ROOT / "bench"))


@pytest.fixture(scope="module")
def bench():
    return load_stage("bench/judge_quality")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def collection(data):
    """Two Thai and two Swahili questions; Thai 1 has three positives, and passage 9 is relevant to it in
    the truth only."""
    passages = [
        {"docid": str(i), "title": "ช้าง" if i % 2 else "", "text": f"ข้อความ {i} 🐘"} for i in range(12)
    ]
    for lang in ("th", "sw"):
        write(
            data / f"corpus/{lang}.jsonl",
            "".join(
                json.dumps(p | {"text": f"{lang} {p['text']}"}, ensure_ascii=False) + "\n" for p in passages
            ),
        )
    positives = {("th", "1"): "135", ("th", "2"): "2", ("sw", "1"): "46", ("sw", "2"): "7"}
    write(
        data / "train.jsonl",
        "".join(
            json.dumps(
                {
                    "query_id": q,
                    "lang": lang,
                    "query": f"{lang} {q}?",
                    "positive_passages": [
                        passages[int(i)] | {"text": f"{lang} {passages[int(i)]['text']}"} for i in docids
                    ],
                    "negative_passages": [],
                },
                ensure_ascii=False,
            )
            + "\n"
            for (lang, q), docids in positives.items()
        ),
    )
    write(data / "dev.jsonl", "")
    write(data / "qrels/dev/th.tsv", "")
    write(data.parent / "truth/train/th.tsv", "1\t0\t9\t1\n1\t0\t8\t0\n2\t0\t2\t1\n")
    write(data.parent / "truth/train/sw.tsv", "1\t0\t4\t1\n")


def args_of(bench, top, *more):
    return bench.build_parser().parse_args(
        [
            "--data",
            str(top / "data"),
            "--truth",
            str(top / "truth"),
            "--encoder",
            "none",
            "--out",
            str(top / "out"),
            "--plant",
            "0",
            *more,
        ]
    )


def text_of(top, lang, docid):
    for line in (top / f"data/corpus/{lang}.jsonl").read_text("utf-8").splitlines():
        p = json.loads(line)
        if p["docid"] == docid:
            return f"{p['title']}\n{p['text']}" if p["title"] else p["text"]


def test_one_positive_is_kept_and_the_hidden_ones_are_known_to_the_judge(bench, tmp_path):
    collection(tmp_path / "data")
    kept = set()
    for seed in range(8):
        relevant = bench.hide(args_of(bench, tmp_path), seed, tmp_path / f"s{seed}")
        assert relevant["th", "1"] == {"1", "3", "5", "9"}
        records = [
            json.loads(line) for line in (tmp_path / f"s{seed}/train.jsonl").read_text("utf-8").splitlines()
        ]
        assert [len(r["positive_passages"]) for r in records] == [1] * 4
        kept.add(records[0]["positive_passages"][0]["docid"])
    assert kept == {"1", "3", "5"}  # 9 is true, but was never a label
    judge = bench.labelled_judge(json.loads((tmp_path / "s0/truth.json").read_text("utf-8")), error=0)
    grades = {docid: judge("th 1?", None, text_of(tmp_path, "th", docid)) for docid in map(str, range(12))}
    assert {d for d, a in grades.items() if a == {"accuracy": 2, "completeness": 2}} == {"1", "3", "5", "9"}
    assert {d for d, a in grades.items() if a == {"accuracy": 0, "completeness": 0}} == set(
        map(str, range(12))
    ) - {"1", "3", "5", "9"}


def test_planted_positives_are_in_the_corpus_and_known_to_the_judge_alone(bench, tmp_path):
    collection(tmp_path / "data")
    relevant = bench.hide(args_of(bench, tmp_path, "--plant", "2"), 13, tmp_path / "s")
    record = json.loads((tmp_path / "s/train.jsonl").read_text("utf-8").splitlines()[1])
    assert (record["lang"], record["query_id"]) == ("th", "2")
    lines = (tmp_path / "s/corpus/th.jsonl").read_text("utf-8").splitlines()
    planted = [p for p in map(json.loads, lines) if p["docid"].startswith("planted:2:")]
    assert len(lines) == 12 + 4 and len(planted) == 2
    text = record["positive_passages"][0]["text"]
    assert all(sorted(p["text"].split()) == sorted(text.split()) != p["text"].split() for p in planted)
    assert {p["docid"] for p in planted} < relevant["th", "2"] == {"2", "planted:2:0", "planted:2:1"}
    judge = bench.labelled_judge(json.loads((tmp_path / "s/truth.json").read_text("utf-8")), error=0)
    assert judge("th 2?", None, planted[1]["text"])["accuracy"] == 2  # its positive has no title
    assert judge("th 1?", None, planted[1]["text"])["accuracy"] == 0


def test_what_is_removed_is_right_by_its_text(bench, tmp_path):
    """Of two queries with one positive, what is planted for the one is relevant for the other."""
    twin = {"docid": "planted:2:0", "title": "", "text": "the same"}
    other = twin | {"docid": "5", "text": "another"}
    record = {"query_id": "1", "lang": "th", "query": "?", "positive_passages": [twin | {"docid": "1"}],
              "negative_passages": [other | {"docid": "6", "text": "hidden"}], "false_negatives": [twin, other]}
    path = tmp_path / "filtered.jsonl"
    path.write_text(json.dumps(record) + "\n")
    truth = {"?": {"lang": "th", "relevant": [bench.fingerprint("the same"), bench.fingerprint("hidden")]}}
    counts = {"candidates": 3, "hidden": 2, "removed": 2, "right": 1}
    assert bench.removal(path, truth) == counts


def test_the_judge_errs_at_the_rate_of_the_language(bench):
    texts = [f"passage {i}" for i in range(2000)]
    truth = {
        q: {"lang": lang, "relevant": [bench.fingerprint(t) for t in texts[::2]]}
        for q, lang in (("a", "th"), ("b", "sw"))
    }
    judge = bench.labelled_judge(truth, error=0.1, weak=["sw"], weak_error=0.4, seed=13)
    for question, rate in (("a", 0.1), ("b", 0.4)):
        for first, right in ((0, 2), (1, 0)):
            counts = Counter(judge(question, None, t)["accuracy"] for t in texts[first::2])
            assert counts[right] / 1000 == pytest.approx(1 - rate, abs=0.04)
            assert counts[1] / 1000 == pytest.approx(rate / 2, abs=0.03)  # half of the errors are a 1
    more = bench.labelled_judge(truth, error=0.3, seed=13)
    wrong = [t for i, t in enumerate(texts) if judge("a", None, t)["accuracy"] != 2 * (i % 2 == 0)]
    assert all(
        more("a", None, t) == judge("a", None, t) for t in wrong
    )  # a worse judge makes the same errors, and more
    assert any(
        bench.labelled_judge(truth, error=0.1, seed=14)("a", None, t) != judge("a", None, t) for t in texts
    )


def test_it_answers_over_a_real_socket(bench, tmp_path):
    collection(tmp_path / "data")
    bench.hide(args_of(bench, tmp_path), 13, tmp_path / "s")
    messages = [
        [
            {
                "role": "user",
                "content": f"Question: {json.dumps('th 1?')}\nCandidate passage: "
                f"{json.dumps(text_of(tmp_path, 'th', docid))}",
            }
        ]
        for docid in ("2", "9")
    ]
    client = (
        "import openai; ask = openai.OpenAI().chat.completions.create; "
        f"print([ask(model='m', messages=m).choices[0].message.content for m in {messages!r}])"
    )
    for error, grade in (("0", 2), ("-1", 0)):
        done = run_stage(
            "bench/judge_quality.py",
            "--answer",
            tmp_path / "s/truth.json",
            "--error",
            error,
            "--exec",
            sys.executable,
            "-c",
            client,
        )
        assert done.returncode == 0, done.stderr
        first, second = (json.loads(answer) for answer in eval(done.stdout))
        assert first == {"accuracy": 0, "completeness": 0} and second == {
            "accuracy": grade,
            "completeness": grade,
        }


def test_a_query_with_too_few_negatives_is_filled_with_other_passages(bench, tmp_path):
    collection(tmp_path / "data")
    source = tmp_path / "filtered.jsonl"
    texts = [json.loads(line) for line in (tmp_path / "data/corpus/th.jsonl").read_text("utf-8").splitlines()]
    records = [
        {
            "query_id": str(n),
            "lang": "th",
            "query": "?",
            "positive_passages": texts[:1],
            "negative_passages": texts[1 : 1 + n],
            "false_negatives": texts[9:11],
        }
        for n in (2, 7, 8)
    ]
    write(source, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    assert bench.fill(args_of(bench, tmp_path), source, tmp_path / "filled.jsonl", 13) == 5
    filled = [json.loads(line) for line in (tmp_path / "filled.jsonl").read_text("utf-8").splitlines()]
    assert [len(r["negative_passages"]) for r in filled] == [7, 7, 8] and filled[1:] == records[1:]
    docids = [p["docid"] for p in filled[0]["negative_passages"]]
    assert len(set(docids)) == 7 and not set(docids) & {"0", "9", "10"} and docids[:2] == ["1", "2"]
    assert {p["source"] for p in filled[0]["negative_passages"][2:]} == {"random"}


def row(judge, drop_at, seed, ndcg, weak=False, relabel=False):
    return {
        "judge": judge,
        "drop_at": drop_at,
        "weak": weak,
        "relabel": relabel,
        "seed": seed,
        "candidates": 100,
        "hidden": 10,
        "removed": 8,
        "right": 6,
        "ndcg@10": ndcg,
    }


def test_the_summary_pairs_seeds_and_the_reading_follows_from_it(bench):
    rows = [
        row("none", 1, 1, 0.50),
        row("none", 1, 2, 0.40),
        row(0, 1, 1, 0.56),
        row(0, 1, 2, 0.48),
        row(0.2, 1, 1, 0.49),
        row(0.2, 1, 2, 0.39),
        row(0.2, 2, 1, 0.52),
        row(0.2, 2, 2, 0.42),
        row(0, 1, 1, 0.58, relabel=True),
        row(0, 1, 2, 0.48, relabel=True),
    ]
    curve = {(c["judge"], c["drop_at"], c["relabel"]): c for c in bench.summarise({"rows": rows})}
    perfect = curve[0, 1, False]
    assert (perfect["mean"], perfect["gain"]) == (52.0, 7.0) and perfect["sd"] == pytest.approx(5.66)
    assert perfect["half"] == 12.71  # 12.706 (t, one degree of freedom) x sd 1.414 / sqrt 2
    assert curve[0.2, 2, False]["precision"] == 0.75 and curve[0.2, 2, False]["recall"] == 0.6
    strict, mild, relabelled, power = bench.reading(list(curve.values()))
    assert strict.endswith("removing from grade 1 on: perfect: +7.0 (p 0.09), 20%: -1.0 (p 0).")
    assert mild.endswith("removing grade 2 only: 20%: +2.0 (p 0).")
    assert relabelled.endswith("removing grade 1: perfect: +8.0 (p 0).")
    assert "With 2 seeds the 95% intervals of these differences reach 0.0 to 12.7 points" in power


def test_a_stopped_run_goes_on_with_the_rows_that_are_missing(bench, tmp_path, monkeypatch):
    """The stages are replaced here: that they run is what the script is for, and takes minutes."""
    collection(tmp_path / "data")
    asked, stop_at = [], 4

    def one_row(args, seed, row, folder):
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        asked.append((row["judge"], row["drop_at"], row["relabel"], seed))
        (folder / str(row["judge"]) / bench.variant(row)).mkdir(parents=True)
        return row | {
            "seed": seed,
            "candidates": 9,
            "hidden": 3,
            "removed": 2,
            "right": 2,
            "ndcg@10": 0.5 + seed / 100,
            "by_lang": {"th": 0.5},
        }

    monkeypatch.setattr(bench, "one_row", one_row)
    monkeypatch.setattr(bench, "prepare", lambda *a: None)
    monkeypatch.setattr(bench, "evaluate", lambda *a: {"ndcg@10": 0.4, "by_lang": {"th": 0.4, "sw": 0.4}})
    command = [
        "--data",
        str(tmp_path / "data"),
        "--encoder",
        "none",
        "--errors",
        "0",
        "0.2",
        "--seeds",
        "1",
        "2",
        "--jobs",
        "1",
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(KeyboardInterrupt):
        bench.main(command)
    assert (
        len(json.loads((tmp_path / "out.json").read_text("utf-8"))["rows"]) == 4
        and not (tmp_path / "out.png").exists()
    )
    stop_at = None
    bench.main(command)
    kinds = [("none", 1, False), ("stand-in", 1, False), ("stand-in", 1, True), (0, 1, False), (0, 1, True)]
    kinds += [(0.2, 1, False), (0.2, 2, False), (0.2, 1, True)]
    assert asked == [(*kind, seed) for seed in (1, 2) for kind in kinds]  # none twice
    result = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert (
        len(result["rows"]) == 16
        and len(result["summary"]) == 8
        and (tmp_path / "out.png").stat().st_size > 10_000
    )
    bench.main(command)
    assert len(asked) == 16
    from common import DataError

    with pytest.raises(DataError, match="other settings"):
        bench.main([*command, "--epochs", "4"])
