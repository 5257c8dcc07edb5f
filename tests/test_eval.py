"""06_eval.py: the written runs are the truth: trec_eval, ir_measures and a brute-force search agree."""

import json
import math
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import load_stage

SUBJECTS = {
    "th": ["สิงโต", "ช้าง", "กาแฟ", "ดอยอินทนนท์", "ทะเลสาบสงขลา", "กรุงเทพมหานคร 🌊"],
    "sw": ["Simba", "Tembo", "Kahawa", "Mlima Kenya", "Ziwa Viktoria", "Nairobi"],
}


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(
            line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) + "\n" for line in lines
        ),
        "utf-8",
    )


def collection(data):
    """150 passages a language, each text there five times; queries 5 and 6 have no relevant one."""
    dev = []
    for lang, subjects in SUBJECTS.items():
        passages = [
            {
                "docid": f"{i % 7}#{i}",
                "title": subjects[i % 30 % 6],
                "text": f"{subjects[i % 30 % 5]} {subjects[i % 30 % 3]} {i % 30}",
            }
            for i in range(150)
        ]
        write(data / f"corpus/{lang}.jsonl", passages)
        write(
            data / f"qrels/dev/{lang}.tsv",
            [
                f"{q}\t0\t{passages[i]['docid']}\t{int(q < 5 and i % 4 > 0)}\n"
                for q in range(6)
                for i in range(q, 150, 6 + q)
            ],
        )
        dev += [
            {
                "query_id": str(q),
                "lang": lang,
                "query": f"{subjects[q]} {subjects[q - 1]}",
                "positive_passages": passages[:1],
            }
            for q in range(6)
        ]
    write(data / "dev.jsonl", dev)
    write(data / "train.jsonl", [r | {"negative_passages": []} for r in dev if r["lang"] == "sw"])


@pytest.fixture(scope="module")
def stage():
    return load_stage("06_eval")


@pytest.fixture(scope="module")
def made(tmp_path_factory, stage):
    """data/, two encoders a and b, and an evaluation of them and BM25 in eval/."""
    top = tmp_path_factory.mktemp("eval")
    collection(top / "data")
    encoder = load_stage("sample/make_encoder")
    for name, seed in (("a", 1), ("b", 2)):
        encoder.main(
            [
                "--data",
                str(top / "data"),
                "--out",
                str(top / name),
                "--vocab",
                "600",
                "--width",
                "32",
                "--steps",
                "0",
                "--seed",
                str(seed),
            ]
        )
    evaluate(stage, top, top / "eval", "bm25", top / "a", top / "b", "--baseline", top / "a")
    return top


def evaluate(stage, top, out, *models_and_flags):
    stage.main(
        [
            str(a)
            for a in (
                "--data",
                top / "data",
                "--cache",
                top / "cache",
                "--out",
                out,
                "--device",
                "cpu",
                "--models",
                *models_and_flags,
            )
        ]
    )
    return json.loads((out / "metrics.json").read_text("utf-8"))


def lines_of(path):
    return [line.split() for line in path.read_text("utf-8").splitlines()]


def test_metrics_are_trec_evals_on_the_written_runs_and_the_official_qrels(made):
    import pytrec_eval

    metrics = json.loads((made / "eval/metrics.json").read_text("utf-8"))["models"]
    for lang in SUBJECTS:
        with open(made / f"data/qrels/dev/{lang}.tsv") as file:
            qrels = pytrec_eval.parse_qrel(file)
        answerable = [q for q in qrels if max(qrels[q].values()) > 0]
        assert len(answerable) == 5 < len(qrels)
        for model in ("bm25", "a", "b"):
            with open(made / f"eval/runs/{model}.{lang}.trec") as file:
                values = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10", "recall_100"}).evaluate(
                    pytrec_eval.parse_run(file)
                )
            for name, key in (("ndcg@10", "ndcg_cut_10"), ("recall@100", "recall_100")):
                mean = sum(values.get(q, {}).get(key, 0) for q in answerable) / 5
                assert metrics[model][lang][name] == pytest.approx(mean, abs=6e-6)
            assert metrics[model][lang]["queries"] == 5
    for model, rows in metrics.items():
        assert rows["avg"]["ndcg@10"] == pytest.approx(
            (rows["th"]["ndcg@10"] + rows["sw"]["ndcg@10"]) / 2, abs=1.1e-5
        ), model


def test_runs_and_qrels_load_in_ir_measures_to_the_same_metrics(made):
    import ir_measures

    metrics = json.loads((made / "eval/metrics.json").read_text("utf-8"))["models"]
    measures = {"ndcg@10": ir_measures.nDCG @ 10, "recall@100": ir_measures.R @ 100}
    for lang in SUBJECTS:
        # ir_measures counts queries without relevant passages as 0 and trec_eval does not: take them out
        rows = lines_of(made / f"data/qrels/dev/{lang}.tsv")
        answerable = {q for q, _, _, relevance in rows if relevance == "1"}
        qrels = [ir_measures.Qrel(q, d, int(r)) for q, _, d, r in rows if q in answerable]
        for model in ("bm25", "a", "b"):
            found = ir_measures.calc_aggregate(
                list(measures.values()),
                qrels,
                ir_measures.read_trec_run(str(made / f"eval/runs/{model}.{lang}.trec")),
            )
            for name, measure in measures.items():
                assert metrics[model][lang][name] == pytest.approx(found[measure], abs=6e-6)


def brute_force(passages, queries, docids, depth):
    """Per query [(docid, score)] in float64, in plain loops: best first, ties to the smaller docid."""
    found = []
    for query in queries:
        scored = [
            (round(math.fsum(float(x) * float(y) for x, y in zip(query, passage)), 6), docid)
            for passage, docid in zip(passages, docids)
        ]
        found.append([(docid, score) for score, docid in sorted(scored, key=lambda s: (-s[0], s[1]))][:depth])
    return found


def in_order(hits):
    return sorted(hits, key=lambda hit: (-hit[1], hit[0]))


def test_a_brute_force_search_in_float64_gives_the_same_run(made, stage, tmp_path):
    for lang in SUBJECTS:
        cache = tmp_path / lang  # of one model and one language: its files need no key to be found
        evaluate(
            stage,
            made,
            tmp_path / f"eval.{lang}",
            made / "a",
            "--lang",
            lang,
            "--cache",
            cache,
            "--depth",
            "103",
        )
        vectors = {kind: np.load(*cache.glob(f"embeddings/*/{kind}-*.npy")) for kind in ("passage", "query")}
        docids = [
            json.loads(line)["docid"]
            for line in (made / f"data/corpus/{lang}.jsonl").read_text("utf-8").splitlines()
        ]
        assert vectors["passage"].shape[0] == 150 and vectors["query"].shape[0] == 6
        run = defaultdict(list)
        for query_id, _, docid, _, score, _ in lines_of(tmp_path / f"eval.{lang}/runs/a.{lang}.trec"):
            run[query_id].append((docid, float(score)))
        expected = brute_force(vectors["passage"], vectors["query"], docids, 104)
        assert len(run) == 6
        for query_id, best in zip(sorted(run), expected):
            assert [docid for docid, _ in in_order(run[query_id])] == [docid for docid, _ in best[:103]]
            for (_, score), (_, wanted) in zip(in_order(run[query_id]), best):
                assert abs(score - wanted) < 1.5e-6  # float32 products, rounded to six decimals
        assert any(best[102][1] == best[103][1] for best in expected)  # a tie across the cut


def test_the_rank_column_is_trec_evals_order(made):
    """nDCG@10 by hand from the rank column is what is reported, though trec_eval never reads that column."""
    metrics = json.loads((made / "eval/metrics.json").read_text("utf-8"))["models"]
    for lang in SUBJECTS:
        relevance = defaultdict(dict)
        for q, _, docid, grade in lines_of(made / f"data/qrels/dev/{lang}.tsv"):
            relevance[q][docid] = int(grade)
        for model in ("a", "b", "bm25"):
            gain = defaultdict(float)
            for q, _, docid, rank, _, _ in lines_of(made / f"eval/runs/{model}.{lang}.trec"):
                if int(rank) <= 10:
                    gain[q] += relevance[q].get(docid, 0) / math.log2(int(rank) + 1)
            answerable = [q for q in relevance if any(relevance[q].values())]
            ideal = {
                q: sum(1 / math.log2(i + 2) for i in range(min(10, sum(relevance[q].values()))))
                for q in answerable
            }
            mean = sum(gain[q] / ideal[q] for q in answerable) / len(answerable)
            assert metrics[model][lang]["ndcg@10"] == pytest.approx(mean, abs=6e-6)


def test_a_passage_that_is_the_query_is_left_out_and_one_that_only_has_its_id_is_not(stage, tmp_path, capsys):
    texts = {"a": "punda milia wana mistari", "b": "punda milia wana mistari mingi", "c": "simba wana nywele"}
    passages = [{"docid": docid, "title": "", "text": text} for docid, text in texts.items()]
    write(tmp_path / "data/corpus/sw.jsonl", passages)
    queries = {"a": "Punda milia wana  mistari", "c": "punda milia"}  # a is passage a, c is not passage c
    more = {"lang": "sw", "positive_passages": passages[1:2], "negative_passages": []}
    write(tmp_path / "data/dev.jsonl", [{"query_id": q, "query": text} | more for q, text in queries.items()])
    write(tmp_path / "data/qrels/dev/sw.tsv", ["a\t0\tb\t1\n", "c\t0\tb\t1\n"])
    evaluate(stage, tmp_path, tmp_path / "eval", "bm25")
    run = [line.split() for line in (tmp_path / "eval/runs/bm25.sw.trec").read_text("utf-8").splitlines()]
    assert [docid for query_id, _, docid, *_ in run if query_id == "a"] == ["b", "c"]
    assert [docid for query_id, _, docid, *_ in run if query_id == "c"] == ["a", "b"]
    assert "1 queries found themselves" in capsys.readouterr().err


def test_scores_that_are_one_float32_are_ranked_by_docid_descending(stage):
    # 40.000000 and 40.000001 are two numbers in the file and one in trec_eval's float32
    hits = [("a", 0, 40.000001), ("b", 1, 40.0), ("c", 2, 39.5)]
    lines = [line.split() for line in stage.run_lines({"q": hits}, "tag")]
    assert [(docid, rank) for _, _, docid, rank, _, _ in lines] == [("b", "1"), ("a", "2"), ("c", "3")]
    import pytrec_eval

    values = pytrec_eval.RelevanceEvaluator({"q": {"b": 1}}, {"recip_rank"}).evaluate(
        {"q": {"a": 40.000001, "b": 40.0, "c": 39.5}}
    )
    assert values["q"]["recip_rank"] == 1


def test_a_query_without_results_counts_zero_and_one_without_relevant_passages_does_not_count(stage):
    qrels = {"found": {"a": 1}, "nothing": {"a": 1}, "no relevant": {"a": 0}}
    values = stage.measure(qrels, {"found": {"a": 0.5, "b": 0.4}, "nothing": {}, "no relevant": {"a": 0.5}})
    assert values == {
        "found": {"ndcg@10": 1.0, "recall@100": 1.0},
        "nothing": {"ndcg@10": 0.0, "recall@100": 0.0},
    }


def test_interval_and_p_are_of_one_bootstrap_of_the_average_over_languages(stage):
    rng = np.random.default_rng(0)
    differences = {"sw": rng.normal(0.1, 0.4, (1, 80)), "th": rng.normal(0.05, 0.3, (1, 30))}
    found = stage.bootstrap(differences, seed=13)
    means = {lang: of_lang.mean() for lang, of_lang in differences.items()}
    assert found["sw"]["diff"] == pytest.approx(means["sw"], abs=1e-5)
    assert found["avg"]["diff"] == pytest.approx((means["sw"] + means["th"]) / 2, abs=1e-5)
    # nearly normal: 1.96 standard errors, and the p of a z test
    errors = {lang: np.std(of_lang) / math.sqrt(of_lang.size) for lang, of_lang in differences.items()}
    errors["avg"] = math.hypot(errors["sw"], errors["th"]) / 2
    for lang, error in errors.items():
        low, high = found[lang]["ci95"]
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)
        z = abs(found[lang]["diff"]) / error
        assert found[lang]["p"] == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.25)
    assert stage.bootstrap(differences, seed=13) == found != stage.bootstrap(differences, seed=14)
    nothing = stage.bootstrap({"sw": np.zeros((1, 5))}, seed=13)
    assert nothing["avg"] == {"diff": 0, "p": 1, "ci95": [0, 0]}
    assert stage.bootstrap({"sw": np.ones((1, 5))}, seed=13)["avg"]["p"] == 0.0002


def test_seeds_are_drawn_too(stage):
    queries = np.full((1, 400), 0.0)
    runs = np.array([[-0.1], [0.0], [0.1]]) + queries  # the seeds differ, the queries do not
    assert stage.bootstrap({"sw": runs}, seed=13)["avg"]["ci95"] == pytest.approx([-0.1, 0.1], abs=0.04)
    assert stage.bootstrap({"sw": runs[1:2]}, seed=13)["avg"]["ci95"] == [0, 0]


def test_holms_correction_is_that_of_a_calculation_by_hand(stage):
    # 0.01 x 4, 0.02 x 3, 0.03 x 2 = 0.06 (not under the one before), 0.9 x 1
    assert stage.holm([0.03, 0.01, 0.9, 0.02]) == [0.06, 0.04, 0.9, 0.06]
    assert stage.holm([0.5, 0.6]) == [1.0, 1.0] and stage.holm([]) == []


def test_each_model_is_tested_against_each_baseline_and_a_pair_once(stage):
    values = {
        model: {"sw": {str(q): {"ndcg@10": base + q / 100} for q in range(9)}}
        for model, base in (("bm25", 0.5), ("start", 0.3), ("model", 0.6))
    }
    tests = stage.significance(values, ["start", "bm25"], seed=13)
    assert [(t["model"], t["vs"], t["diff"]) for t in tests] == [
        ("bm25", "start", 0.2),
        ("model", "start", 0.3),
        ("model", "bm25", 0.1),
    ]
    assert [t["p_holm"] for t in tests] == pytest.approx([3 * t["p"] for t in tests])
    assert tests[0]["by_lang"]["sw"]["diff"] == 0.2


def test_one_more_model_or_language_encodes_and_searches_only_what_is_new(
    made, stage, monkeypatch, tmp_path, capfd
):
    import encoder
    import search

    done = []
    find, load, make = search.Ensemble.rank, encoder.Encoder.__init__, encoder.Encoder.encode_file
    monkeypatch.setattr(
        search.Ensemble,
        "rank",
        lambda self, lang, *a, **k: done.append(("search", self.names[0], lang)) or find(self, lang, *a, **k),
    )
    monkeypatch.setattr(
        encoder.Encoder,
        "__init__",
        lambda self, name, *a, **k: done.append(("load", name[-1])) or load(self, name, *a, **k),
    )
    monkeypatch.setattr(
        encoder.Encoder,
        "encode_file",
        lambda self, path, texts, kind, *a: (
            (Path(path).is_file() or done.append(("encode", self.name, kind)))
            or make(self, path, texts, kind, *a)
        ),
    )
    cache, out = ["--cache", tmp_path / "cache"], tmp_path / "eval"
    evaluate(stage, made, out, made / "a", *cache)
    assert done.count(("load", "a")) == 1  # for two languages
    assert sorted(done) == sorted(
        [
            ("load", "a"),
            *[("search", "a", lang) for lang in SUBJECTS],
            *[("encode", "a", kind) for kind in ("passage", "query")] * 2,
        ]
    )
    done.clear()
    evaluate(stage, made, out, made / "a", made / "b", "--baseline", made / "a", *cache, "--lang", "th")
    assert set(done) == {
        ("load", "b"),
        ("search", "b", "th"),
        ("encode", "b", "passage"),
        ("encode", "b", "query"),
    }
    done.clear()
    capfd.readouterr()
    evaluate(stage, made, out, made / "a", made / "b", "--baseline", made / "a", *cache, "--lang", "th")
    assert not done and "b - a:" in capfd.readouterr().out  # the table is shown again
    (out / "runs/b.th.trec").unlink()
    evaluate(stage, made, out, made / "a", made / "b", "--baseline", made / "a", *cache, "--lang", "th")
    assert done == [("load", "b"), ("search", "b", "th")] and (out / "runs/b.th.trec").is_file()


def test_a_language_whose_queries_are_some_of_anothers_is_evaluated_and_counted(made, stage, tmp_path):
    collection(tmp_path / "data")
    dev = [json.loads(line) for line in (tmp_path / "data/dev.jsonl").read_text("utf-8").splitlines()]
    thai = [record for record in dev if record["lang"] == "sw"][:5]  # the words are Swahili's
    write(tmp_path / "data/dev.jsonl", [*dev[6:], *[record | {"lang": "th"} for record in thai]])
    metrics = evaluate(stage, tmp_path, tmp_path / "eval", made / "a")
    assert metrics["models"]["a"]["th"]["queries"] == metrics["models"]["a"]["sw"]["queries"] == 5
    assert metrics["settings"]["cut"]["a"] == {"query": 0, "passage": 0}


def test_queries_that_do_not_count_are_told(made, stage, tmp_path, capsys):
    shutil.copytree(made / "data", tmp_path / "data")
    qrels = tmp_path / "data/qrels/dev/th.tsv"
    lines = qrels.read_text("utf-8").splitlines(keepends=True)
    lines = [line for line in lines if not line.startswith("4\t")]
    qrels.write_text("".join(lines) + "x\t0\t0#0\t1\n", "utf-8")
    evaluate(stage, tmp_path, tmp_path / "eval", made / "a", "--lang", "th")
    said = capsys.readouterr().err
    assert "1 queries are not in" in said and "dev.jsonl: 2 th queries have no relevant passage" in said


def test_languages_without_training_queries_are_marked_zero_shot(made):
    assert json.loads((made / "eval/metrics.json").read_text("utf-8"))["settings"]["zero_shot"] == ["th"]


def test_models_of_one_name_are_told_apart_by_their_folder(stage, tmp_path):
    for run in ("one", "two"):
        (tmp_path / run / "model").mkdir(parents=True)
    models = [str(tmp_path / run / "model") for run in ("one", "two")]
    assert list(stage.names_of([*models, "BAAI/bge-m3"]).values()) == [
        "one/model",
        "two/model",
        "BAAI/bge-m3",
    ]
    assert stage.run_path("eval", "BAAI/bge-m3", "sw") == Path("eval/runs/BAAI_bge-m3.sw.trec")


def test_bad_input_is_told_in_one_line(made, stage, tmp_path):
    from common import DataError

    with pytest.raises(DataError, match="--depth 50: Recall@100 needs"):
        evaluate(stage, made, tmp_path, made / "a", "--depth", "50")
    with pytest.raises(DataError, match="not among --models"):
        evaluate(stage, made, tmp_path, made / "a", "--baseline", "bm25")
    with pytest.raises(DataError, match="white space"):
        list(stage.run_lines({"q": [("a b", 0, 1.0)]}, "tag"))
    bad = tmp_path / "bad"
    collection(bad / "data")
    write(bad / "data/qrels/dev/th.tsv", ["0\t0\t0#0\t0\n"])
    with pytest.raises(DataError, match="th.tsv: no query with a relevant passage"):
        evaluate(stage, bad, tmp_path, made / "a")
    for line, told in (
        ("0\t0#1\n", "th.tsv:2: got 2 columns"),
        ("0\t0\t0#0\t0\n", "th.tsv:2: query '0' judges docid '0#0' twice"),
    ):
        write(bad / "data/qrels/dev/th.tsv", ["0\t0\t0#0\t1\n", line])
        with pytest.raises(DataError, match=told):
            evaluate(stage, bad, tmp_path, made / "a")
    write(bad / "data/qrels/dev/th.tsv", ["0\t0\tgone\t1\n", "1\t0\t0#0\t0\n"])
    with pytest.raises(DataError, match="th.tsv: the corpus has none of the 1 relevant passages, such as g"):
        evaluate(stage, bad, tmp_path, made / "a")
    # twice, though no ranking has both
    passages = [{"docid": f"{i % 149}", "title": "", "text": f"w{i}"} for i in range(150)]
    write(bad / "data/corpus/th.jsonl", passages)
    with pytest.raises(DataError, match="corpus/th.jsonl: docid '0' is there twice"):
        evaluate(stage, bad, tmp_path, "bm25", "--bm25-tokenizer", made / "a")


def test_an_output_in_a_model_would_change_the_model(made, stage):
    from common import DataError

    with pytest.raises(DataError, match="a/eval/metrics.json lies in the model .*/a, which would be another"):
        evaluate(stage, made, made / "a/eval", made / "a")


def test_settings_are_read_also_where_no_model_could_have_any(made, stage, tmp_path):
    from common import DataError

    for setting in ("nonsense", "bm25:pooling=cls"):
        with pytest.raises(DataError, match="--settings: "):
            evaluate(stage, made, tmp_path, "bm25", "--settings", setting)


def test_a_baseline_named_twice_is_one(made, stage, tmp_path):
    twice = ["--baseline", made / "a", made / "a"]
    found = evaluate(stage, made, tmp_path, "bm25", made / "a", made / "b", *twice)
    assert found == json.loads((made / "eval/metrics.json").read_text("utf-8"))


def test_a_language_with_judgments_and_no_question_is_told(made, stage, tmp_path, capsys):
    shutil.copytree(made / "data", tmp_path / "data")
    path = tmp_path / "data/dev.jsonl"
    write(path, [record for record in map(json.loads, path.open("rb")) if record["lang"] == "sw"])
    assert "th" not in evaluate(stage, tmp_path, tmp_path, made / "a")["models"]["a"]
    assert re.search(r"th.tsv: no query of \S+dev.jsonl is in th; left out\n", capsys.readouterr().err)
    evaluate(stage, tmp_path, tmp_path / "sw", made / "a", "--lang", "sw")
    assert "th.tsv" not in capsys.readouterr().err


def test_relevant_passages_that_the_corpus_has_not_are_told(made, stage, tmp_path, capsys):
    shutil.copytree(made / "data", tmp_path / "data")
    path = tmp_path / "data/qrels/dev/th.tsv"
    path.write_text("\ufeff" + path.read_text("utf-8") + "0\t0\tgone\t1\n", "utf-8")
    before = json.loads((made / "eval/metrics.json").read_text("utf-8"))["models"]["a"]
    for _ in range(2):  # also when the runs are there
        found = evaluate(stage, tmp_path, tmp_path, made / "a", "--overwrite")
        assert found["settings"]["not_in_corpus"] == {"sw": 0, "th": 1}
        assert "passages that the corpus has not, so nothing finds them: th 1\n" in capsys.readouterr().out
        assert found["models"]["a"]["th"]["recall@100"] < before["th"]["recall@100"]
        assert found["models"]["a"]["th"]["queries"] == 5  # a byte-order mark is no part of an id


def test_recall_counts_from_the_relevance_asked_for(made, stage, tmp_path, capsys):
    shutil.copytree(made / "data", tmp_path / "data")
    for lang in SUBJECTS:
        rows = lines_of(tmp_path / f"data/qrels/dev/{lang}.tsv")
        graded = [[*row[:3], str(int(row[3]) * (1 + i % 2))] for i, row in enumerate(rows)]
        write(tmp_path / f"data/qrels/dev/{lang}.tsv", ["\t".join(row) + "\n" for row in graded])
    write(tmp_path / "data.meta.json", [{"arguments": {"min_relevance": 2}}])
    one = evaluate(stage, tmp_path, tmp_path, made / "a")["models"]
    assert "--min-relevance 1 here, 2 when" in capsys.readouterr().err
    with open(tmp_path / "data/qrels/dev/th.tsv", "a") as file:
        file.write("0\t0\tgone\t1\n")
    three = evaluate(stage, tmp_path, tmp_path, made / "a", "--min-relevance", "1")["settings"]
    capsys.readouterr()
    two = evaluate(stage, tmp_path, tmp_path, made / "a", "--min-relevance", "2")
    assert (three["not_in_corpus"]["th"], two["settings"]["not_in_corpus"]["th"]) == (1, 0)
    two = two["models"]
    said = capsys.readouterr()
    assert "when" not in said.err and "relevant is what is judged 2 or higher" in said.out
    assert one["a"]["avg"]["recall@100"] != two["a"]["avg"]["recall@100"]


def test_the_data_may_be_the_folder_one_is_in(made, stage, tmp_path, monkeypatch):
    monkeypatch.chdir(made / "data")
    flags = ["--data", ".", "--models", str(made / "a"), "--cache", str(made / "cache"), "--device", "cpu"]
    stage.main([*flags, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "metrics.json").read_text("utf-8"))["models"]["a"]
    assert found == json.loads((made / "eval/metrics.json").read_text("utf-8"))["models"]["a"]


def test_the_terms_of_bm25_are_named(made, stage, tmp_path, capsys):
    for models, terms in (((made / "a", "bm25"), "a"), (("bm25", made / "b"), "b"), ((made / "a",), None)):
        found = evaluate(stage, made, tmp_path / f"{terms}", *models)
        assert found["settings"]["bm25_terms"] == terms
        assert (f"bm25's terms are the sub-words of {terms}\n" in capsys.readouterr().out) == bool(terms)


def test_a_blank_in_a_models_name_breaks_no_run_file(made, stage, tmp_path):
    from common import DataError

    shutil.copytree(made / "a", tmp_path / "my model")
    shutil.copytree(made / "a", tmp_path / "my_model")
    first = evaluate(stage, made, tmp_path / "eval", tmp_path / "my model")
    again = evaluate(stage, made, tmp_path / "eval", tmp_path / "my model", "bm25")  # reads its runs
    assert again["models"]["my model"] == first["models"]["my model"]
    assert {len(line) for line in lines_of(tmp_path / "eval/runs/my_model.sw.trec")} == {6}
    with pytest.raises(DataError, match="have the same name"):
        evaluate(stage, made, tmp_path / "eval", tmp_path / "my model", tmp_path / "my_model")


def test_what_changed_of_several_models_or_of_the_training_set_is_seen(made, stage, tmp_path):
    for place, name in (("x", "a"), ("y", "b")):
        shutil.copytree(made / name, tmp_path / place / "model")
    shutil.copytree(made / "data", tmp_path / "data")
    both = tmp_path / "x/model", tmp_path / "y/model"
    first = evaluate(stage, tmp_path, tmp_path / "eval", *both)
    assert first["settings"]["zero_shot"] == ["th"]
    for model in (made / "b", made / "a"):  # now the first, then the last is another one
        shutil.copytree(model, both[model == made / "a"], dirs_exist_ok=True)
        second = evaluate(stage, tmp_path, tmp_path / "eval", *both)
        assert second["models"] != first["models"]
        first = second
    dev = (tmp_path / "data/dev.jsonl").read_text("utf-8")
    (tmp_path / "data/train.jsonl").write_text(dev, "utf-8")
    assert evaluate(stage, tmp_path, tmp_path / "eval", *both)["settings"]["zero_shot"] == []


def test_the_report_reads_what_the_evaluation_wrote(made):
    load_stage("06a_report").main(["--run", str(made), "--out", str(made / "eval")])
    text = (made / "eval/report.md").read_text("utf-8")
    metrics = json.loads((made / "eval/metrics.json").read_text("utf-8"))
    for model, rows in metrics["models"].items():
        assert f"`{model}`" in text and f"{100 * rows['th']['ndcg@10']:.1f}" in text
    assert (
        "Thai (th, zero-shot)" in text and "Left out" in text and (made / "eval/figures/scores.png").is_file()
    )


def test_lengths_that_differ_and_texts_that_were_cut_are_told_also_of_cached_vectors_and_finished_runs(
    made, stage, tmp_path, capfd
):
    flags = [
        made / "a",
        made / "b",
        "--cache",
        tmp_path / "cache",
        "--settings",
        "b:passage_max_len=3",
        "--lang",
        "th",
    ]
    seen = []
    for out in ("one", "one", "two"):  # made; finished; vectors from the cache
        metrics = evaluate(stage, made, tmp_path / out, *flags)
        settings = metrics["settings"]
        shown = capfd.readouterr().out
        assert (
            settings["encoders"]["a"]["max_len"]["passage"]
            > settings["encoders"]["b"]["max_len"]["passage"]
            == 3
        )
        assert settings["cut"]["a"] == {"query": 0, "passage": 0} and settings["cut"]["b"]["passage"] > 100
        assert f"3 tokens of a passage ({settings['cut']['b']['passage']} were cut)" in shown
        assert "different lengths" in shown
        seen.append((settings["cut"], shown))
    assert seen[0] == seen[1] == seen[2]
    metrics = evaluate(stage, made, tmp_path / "same", made / "a", made / "b", "bm25", "--lang", "th")
    assert "different lengths" not in capfd.readouterr().out and set(metrics["settings"]["cut"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("flag", "value"), [("--settings", "query_prefix=w w w "), ("--query-max-len", "2"), ("--dtype", "bf16")]
)
def test_a_run_is_made_again_when_what_decides_its_vectors_changes(
    made, stage, tmp_path, flag, value, monkeypatch
):
    import search

    asked = []
    find = search.Ensemble.rank
    monkeypatch.setattr(search.Ensemble, "rank", lambda *a: asked.append(a[1]) or find(*a))
    common = (stage, made, tmp_path, made / "a", "--lang", "sw", "--cache", tmp_path / "cache")
    evaluate(*common)
    evaluate(*common)
    assert asked == ["sw"]
    evaluate(*common, flag, value)
    assert asked == ["sw", "sw"]
