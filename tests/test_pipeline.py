"""The whole pipeline on a cut of the sample, in all 16 languages, by the commands that the Makefile runs."""

import json
import re
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
from conftest import ROOT, load_stage, run_stage

LANGS = "ar bn en es fa fi fr hi id ja ko ru sw te th zh".split()


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def key(record):
    return record["lang"], record["query_id"]


def must(script, *args):
    done = run_stage(script, *args)
    assert done.returncode == 0, f"{script} ended with {done.returncode}: {done.stderr[-2000:]}"
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with data/, encoder/, run/ of a complete run: up to three training queries a language."""
    top = tmp_path_factory.mktemp("pipeline")
    data, encoder, run, cache = top / "data", top / "encoder", top / "run", top / "cache"
    must("00_prepare_data.py", "--source", "sample", "--limit", 3, "--out", data)
    must("sample/make_encoder.py", "--data", data, "--out", encoder, "--steps", 60)
    retrieve = ["--data", data, "--retrievers", "bm25", encoder, "--fusion", "rrf", "--cache", cache]
    must("01_mine_candidates.py", *retrieve, "--depth", 20, "--out", run / "candidates.jsonl")
    serve = ["--exec", sys.executable]
    must(
        "offline_llm.py",
        *serve,
        ROOT / "02_filter_false_negatives.py",
        "--input",
        run / "candidates.jsonl",
        "--llm",
        "offline-stand-in",
        "--cache",
        cache,
        "--out",
        run / "filtered.jsonl",
    )
    must(
        "offline_llm.py",
        *serve,
        ROOT / "03_generate_negatives.py",
        "--input",
        run / "filtered.jsonl",
        *retrieve,
        "--llm",
        "offline-stand-in",
        "--target",
        22,
        "--out",
        run / "augmented.jsonl",
    )
    must(
        "04_cluster_topics.py",
        "--input",
        run / "augmented.jsonl",
        "--encoder",
        encoder,
        "--topics",
        4,
        "--cache",
        cache,
        "--out",
        run / "topics.jsonl",
    )
    must(
        "05_train.py",
        "--input",
        run / "topics.jsonl",
        "--encoder",
        encoder,
        "--lr",
        1e-3,
        "--temperature",
        0.05,
        "--epochs",
        2,
        "--batch-size",
        8,
        "--log-batches",
        run / "batches.jsonl",
        "--out",
        run / "model",
    )
    evaluation = must(
        "06_eval.py",
        "--data",
        data,
        "--models",
        "bm25",
        encoder,
        run / "model",
        "--baseline",
        encoder,
        "--cache",
        cache,
        "--limit",
        4,
        "--out",
        run / "eval",
    )
    (top / "eval.txt").write_text(evaluation.stdout, "utf-8")
    return top


def test_texts_of_16_languages_survive_every_stage_byte_for_byte(made):
    corpus = {
        (lang, p["docid"]): (p["title"], p["text"])
        for lang in LANGS
        for p in read(ROOT / f"sample/data/corpus/{lang}.jsonl")
    }
    given = {key(r): r for r in read(ROOT / "sample/data/train.jsonl")}
    for stage in ("data/train", "run/candidates", "run/filtered", "run/augmented", "run/topics"):
        records = read(made / f"{stage}.jsonl")
        assert {r["lang"] for r in records} == set(LANGS)
        for record in records:
            assert record["query"] == given[key(record)]["query"]
            assert record["positive_passages"] == given[key(record)]["positive_passages"]
            for name in ("positive_passages", "negative_passages", "candidate_passages", "false_negatives"):
                for passage in record.get(name, []):
                    assert (passage["title"], passage["text"]) == corpus[record["lang"], passage["docid"]]


def test_records_keep_input_order(made):
    order = [key(r) for r in read(made / "data/train.jsonl")]
    for stage in ("candidates", "filtered", "augmented", "topics"):
        assert [key(r) for r in read(made / f"run/{stage}.jsonl")] == order


def test_a_positive_is_never_a_negative_and_every_query_has_exactly_n(made):
    for record in read(made / "run/topics.jsonl"):
        negatives = [p["docid"] for p in record["negative_passages"]]
        assert len(negatives) == 22 == len(set(negatives))
        for name in ("positive_passages", "false_negatives"):
            assert not set(negatives) & {p["docid"] for p in record[name]}
        assert {p["source"] for p in record["negative_passages"]} <= {
            "mined",
            "human",
            "generated-query",
            "random",
        }
        assert "candidate_passages" not in record


def test_short_queries_got_a_summary_and_a_new_query_in_their_language(made):
    import py3langid

    py3langid.set_languages(LANGS)
    new = [r for r in read(made / "run/augmented.jsonl") if r["generated_query"]]
    assert len({r["lang"] for r in new}) == 16  # 20 candidates cannot give 22 negatives
    right = [py3langid.classify(r["summary"])[0] == r["lang"] for r in new]
    assert np.mean(right) > 0.9


def test_no_candidate_is_a_positive_over_the_whole_sample(made, tmp_path):
    """Queries of the whole sample, mined with the cached embeddings of the cut."""
    must("00_prepare_data.py", "--source", "sample", "--out", tmp_path / "data")
    must(
        "01_mine_candidates.py",
        "--data",
        tmp_path / "data",
        "--retrievers",
        "bm25",
        made / "encoder",
        "--fusion",
        "rrf",
        "--cache",
        made / "cache",
        "--out",
        tmp_path / "candidates.jsonl",
    )
    must(
        "offline_llm.py",
        "--exec",
        sys.executable,
        ROOT / "02_filter_false_negatives.py",
        "--input",
        tmp_path / "candidates.jsonl",
        "--llm",
        "offline-stand-in",
        "--cache",
        made / "cache",
        "--out",
        tmp_path / "filtered.jsonl",
    )
    must(
        "offline_llm.py",
        "--exec",
        sys.executable,
        ROOT / "03_generate_negatives.py",
        "--input",
        tmp_path / "filtered.jsonl",
        "--data",
        tmp_path / "data",
        "--retrievers",
        "bm25",
        made / "encoder",
        "--fusion",
        "rrf",
        "--llm",
        "offline-stand-in",
        "--cache",
        made / "cache",
        "--out",
        tmp_path / "augmented.jsonl",
    )
    records = read(tmp_path / "augmented.jsonl")
    assert len(records) == len(read(ROOT / "sample/data/train.jsonl"))
    for before, record in zip(read(tmp_path / "candidates.jsonl"), records, strict=True):
        positives = {p["docid"] for p in record["positive_passages"]}
        texts = {p["text"] for p in record["positive_passages"]}
        assert len(before["candidate_passages"]) == 40
        assert len(record["negative_passages"]) == 30
        for passage in before["candidate_passages"] + record["negative_passages"]:
            assert passage["docid"] not in positives and passage["text"] not in texts


def test_the_filter_removes_planted_false_negatives(made):
    """Of the relevant candidates (sample/truth) most are removed; of the others few."""
    truth = defaultdict(set)
    for lang in LANGS:
        for line in (ROOT / f"sample/truth/train/{lang}.tsv").read_text("utf-8").splitlines():
            query_id, _, docid, _ = line.split("\t")
            truth[lang, query_id].add(docid)
    planted = removed = wrong = others = 0
    for record in read(made / "run/filtered.jsonl"):
        gone = {p["docid"] for p in record["false_negatives"]}
        kept = {p["docid"] for p in record["negative_passages"]}
        planted += len(truth[key(record)] & (gone | kept))
        removed += len(truth[key(record)] & gone)
        wrong += len(gone - truth[key(record)])
        others += len((gone | kept) - truth[key(record)])
    assert removed > 0.5 * planted > 0
    assert wrong < 0.15 * others


def test_evaluation_prints_every_language_and_model(made):
    text = (made / "eval.txt").read_text("utf-8")
    metrics = json.loads((made / "run/eval/metrics.json").read_text("utf-8"))
    assert list(metrics["models"]) == ["bm25", "encoder", "model"]
    for rows in metrics["models"].values():
        assert set(rows) == {*LANGS, "avg"}
        assert all(0 <= rows[lang][m] <= 1 for lang in rows for m in ("ndcg@10", "recall@100"))
        assert np.isclose(
            rows["avg"]["ndcg@10"], np.mean([rows[lang]["ndcg@10"] for lang in LANGS]), atol=1e-4
        )
    (test,) = [test for test in metrics["tests"] if test["model"] == "model"]
    assert test["vs"] == "encoder" and 0 < test["p"] <= test["p_holm"] <= 1
    for lang in (*LANGS, "avg"):
        assert f"\n{lang} " in text


def test_the_trained_model_gives_the_same_vectors_in_sentence_transformers(made):
    """Also with prefixes and CLS pooling, which the model folder must carry along."""
    from sentence_transformers import SentenceTransformer

    from encoder import Encoder

    encoder = Encoder(str(made / "run/model"), "cpu")
    encoder.prefix, encoder.pooling = {"query": "query: ", "passage": "passage: "}, "cls"
    encoder.save(made / "prefixed")
    texts = [r["query"] for r in read(made / "data/train.jsonl")]
    for folder in ("run/model", "prefixed"):
        ours, theirs = (
            Encoder(str(made / folder), "cpu"),
            SentenceTransformer(str(made / folder), device="cpu"),
        )
        for kind, encode in (("query", theirs.encode_query), ("passage", theirs.encode_document)):
            cosine = np.sum(ours.encode(texts, kind) * encode(texts), axis=1)
            assert cosine.min() > 0.9999


def in_datasets(path, cache, monkeypatch):
    """The file as people load it: with types inferred from the whole file, not from its first 10 MB."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=cache, chunksize=path.stat().st_size
    )


def texts(record):
    """What a trainer reads of a record; `datasets` gives fields that only other records have as None."""
    of = {k: record.get(k) for k in ("query_id", "lang", "query", "summary", "generated_query", "topic")}
    lists = ("positive_passages", "negative_passages", "candidate_passages", "false_negatives")
    return of | {
        k: [(p["docid"], p["title"], p["text"], p.get("source"), p.get("grade")) for p in record.get(k) or []]
        for k in lists
    }


@pytest.mark.parametrize(
    "name", ["data/train", "run/candidates", "run/filtered", "run/augmented", "run/topics"]
)
def test_training_files_load_in_datasets_to_the_same_texts(made, name, tmp_path, monkeypatch):
    loaded = in_datasets(made / f"{name}.jsonl", tmp_path, monkeypatch)
    assert [texts(r) for r in loaded] == [texts(r) for r in read(made / f"{name}.jsonl")]


def test_a_field_that_comes_late_in_a_large_file_loads_in_datasets(made, tmp_path, monkeypatch):
    """Above 10 MB, without chunksize, a summary that is null there would make a column of nulls."""
    records = read(made / "run/topics.jsonl")
    early = [r | {"summary": None, "generated_query": None, "false_negatives": []} for r in records]
    copies = 1 + 11_000_000 // (made / "run/topics.jsonl").stat().st_size
    with open(tmp_path / "topics.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in early * copies + records)
    loaded = in_datasets(tmp_path / "topics.jsonl", tmp_path / "cache", monkeypatch)
    assert len(loaded) == len(early) * copies + len(records)
    assert [texts(r) for r in loaded.select(range(len(loaded) - len(records), len(loaded)))] == [
        texts(r) for r in records
    ]


@pytest.mark.parametrize("layout", ["flagembedding", "sentence-transformers", "tevatron"])
def test_exported_layouts_load_in_datasets_to_the_same_texts(made, layout, tmp_path, monkeypatch):
    out = tmp_path / "exported"
    must("05a_export.py", "--input", made / "run/topics.jsonl", "--layout", layout, "--out", out)
    files = sorted(out.rglob("*.jsonl"))
    assert [path.stem for path in files] == LANGS
    for path in files:
        assert list(in_datasets(path, tmp_path / "cache", monkeypatch)) == read(path)


def test_a_second_run_redoes_nothing(made):
    before = (made / "run/topics.jsonl").read_bytes()
    done = must(
        "04_cluster_topics.py",
        "--input",
        made / "run/augmented.jsonl",
        "--encoder",
        made / "encoder",
        "--topics",
        4,
        "--cache",
        made / "cache",
        "--out",
        made / "run/topics.jsonl",
    )
    assert "up to date" in done.stderr
    assert (made / "run/topics.jsonl").read_bytes() == before
    done = must(
        "04_cluster_topics.py",
        "--input",
        made / "run/augmented.jsonl",
        "--encoder",
        made / "encoder",
        "--topics",
        3,
        "--cache",
        made / "cache",
        "--out",
        made / "run/topics3.jsonl",
    )
    assert "up to date" not in done.stderr


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("0*.py")))
def test_help_explains_every_flag(script):
    stage = load_stage(script.removesuffix(".py"))
    parser = stage.build_parser()
    for action in parser._actions:
        assert action.help, f"{script} {action.option_strings}"
    command = [sys.executable, "-X", "importtime", ROOT / script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout and "Sec." in done.stdout
    slow = "torch|faiss|sentence_transformers|transformers|sklearn|scipy"  # they take seconds
    assert not re.findall(rf"\| +({slow})$", done.stderr, re.M)


def test_usage_errors_are_one_line_and_exit_status_2():
    for args in (["--no-such-flag"], ["--epochs", "0"]):
        done = run_stage("05_train.py", "--input", "x", "--encoder", "y", "--out", "z", *args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
