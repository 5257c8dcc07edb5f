"""Stage 01 and search: on scores that can be worked out by hand, and against slow references."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load_stage, run_stage
from tiny_models import random_bert, save_tokenizer, word_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import common
import encoder
import search
from common import DataError
from search import BM25, Ensemble

stage = load_stage("01_mine_candidates")
mine = stage.main
WORDS = "a b c d e x y z w".split()
DRIVER = """
import sys, importlib.util
sys.path.insert(0, {root!r})
import common
import encoder
common.SHARD = 8
encoder.CPU_TOKENS = 1
spec = importlib.util.spec_from_file_location("stage", {root!r} + "/01_mine_candidates.py")
stage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage)
"""


@pytest.fixture(scope="module", autouse=True)
def one_text_a_batch():
    """Vectors hang in their last bits on what they are encoded with: what differs here is search's own."""
    before = encoder.CPU_TOKENS
    encoder.CPU_TOKENS = 1
    yield
    encoder.CPU_TOKENS = before


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")


def read(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def passage(docid, text, title=""):
    return {"docid": docid, "title": title, "text": text}


# cosines with the query "a b c d" by word_model: (words in common) / 4
CORPUS = [
    passage("1#0", "a b c d"),
    passage("1#1", "a b c x"),
    passage("2#0", " A b  c D"),
    passage("3#2", "y b a x"),
    passage("3#10", "a b x y"),
    passage("4#0", "a x y z"),
    passage("5#0", "x y z w"),
    passage("6#0", "c d e w"),
]
COSINE = {"1#0": 1, "1#1": 0.75, "3#10": 0.5, "3#2": 0.5, "6#0": 0.5, "4#0": 0.25, "5#0": 0}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with data/ (the corpus above) and two encoders, the second of which also knows A and D."""
    top = tmp_path_factory.mktemp("words")
    write(top / "data/corpus/en.jsonl", CORPUS)
    write(
        top / "data/train.jsonl",
        [
            {
                "query_id": "q",
                "lang": "en",
                "query": "a b c d",
                "positive_passages": [CORPUS[0]],
                "negative_passages": [CORPUS[5] | {"source": "human"}],
            }
        ],
    )
    word_model(top / "first", WORDS)
    word_model(top / "second", [*WORDS, "A", "D"])
    return top


def run_mine(words, tmp_path, *flags, retrievers=("first",), data=None, queries=None):
    out = tmp_path / "out.jsonl"
    extra = ["--queries", str(queries)] if queries else []
    mine(
        [
            "--data",
            str(data or words / "data"),
            "--retrievers",
            *(r if r == "bm25" else str(words / r) for r in retrievers),
            "--device",
            "cpu",
            "--cache",
            str(tmp_path / "cache"),
            "--out",
            str(out),
            "--overwrite",
            *extra,
            *map(str, flags),
        ]
    )
    return read(out)


def mined(records):
    return [
        (p["docid"], p["score"])
        for p in records[0].get("candidate_passages") or records[0]["negative_passages"]
    ]


def test_candidates_come_best_first_without_positives_or_their_text_and_ties_by_docid(words, tmp_path):
    found = mined(run_mine(words, tmp_path))
    assert [d for d, _ in found] == ["1#1", "3#10", "3#2", "6#0", "4#0", "5#0"]  # "3#10" < "3#2" as bytes
    assert all(abs(score - COSINE[docid]) < 1e-3 for docid, score in found)
    one = read(words / "data/train.jsonl")[0]
    write(
        tmp_path / "one.jsonl", [one | {"positive_passages": [passage("elsewhere", "\uff21\u3000B\nc d")]}]
    )  # full-width A and space
    assert (
        mined(run_mine(words, tmp_path, queries=tmp_path / "one.jsonl")) == found
    )  # neither "1#0" nor "2#0", though not labelled here


def test_each_strategy_keeps_what_its_definition_says(words, tmp_path):
    def docids(*flags, **kwargs):
        return [d for d, _ in mined(run_mine(words, tmp_path, *flags, **kwargs))]

    assert docids("--strategy", "topk", "--depth", 3) == ["1#1", "3#10", "3#2"]
    assert docids("--strategy", "shifted", "--shift", 2, "--depth", 2) == ["3#2", "6#0"]
    assert docids("--strategy", "abs") == ["3#10", "3#2", "6#0", "4#0", "5#0"]  # < 0.6
    assert docids("--strategy", "abs", "--max-score", 0.3, "--depth", 1) == ["4#0"]
    assert docids("--strategy", "margin") == ["1#1", "3#10", "3#2", "6#0", "4#0", "5#0"]  # < 1 - 0.15
    assert docids("--strategy", "margin", "--margin", 0.4) == ["3#10", "3#2", "6#0", "4#0", "5#0"]
    assert docids("--strategy", "percent", "--percent", 0.4) == ["4#0", "5#0"]  # < 0.4
    assert (
        docids("--strategy", "percent")[0] == "1#1"
        and docids("--strategy", "percent", "--percent", 0.75)[0] == "3#10"
    )
    defaults = vars(
        load_stage("01_mine_candidates").build_parser().parse_args("--data x --retrievers x --out x".split())
    )
    assert [defaults[k] for k in ("depth", "shift", "max_score", "margin", "percent")] == [
        40,
        10,
        0.6,
        0.15,
        0.9,
    ]  # the paper's
    two = read(words / "data/train.jsonl")[0]
    two["positive_passages"].append(passage("elsewhere", "b x y a"))  # 0.5, and not in the corpus
    write(tmp_path / "two.jsonl", [two])
    # the lowest-scored positive counts; "3#10" and "3#2" have other texts than it, but the same cosine
    assert docids("--strategy", "margin", queries=tmp_path / "two.jsonl") == ["4#0", "5#0"]  # < 0.5 - 0.15
    assert docids("--strategy", "percent", "--percent", 0.4, queries=tmp_path / "two.jsonl") == ["5#0"]
    assert run_mine(words, tmp_path, "--strategy", "topk")[0]["negative_passages"][0]["source"] == "mined"


def test_each_method_flag_changes_the_output(words, tmp_path):
    assert "1#1" not in dict(mined(run_mine(words, tmp_path, "--exclude-same-article")))
    assert len(mined(run_mine(words, tmp_path, "--depth", 2))) == 2
    both = run_mine(words, tmp_path, retrievers=("first", "second"))
    assert abs(mined(both)[0][1] - 1.5) < 2e-3
    assert set(both[0]["candidate_passages"][0]) == {"docid", "title", "text", "score", "ranks"}
    assert both[0]["candidate_passages"][0]["ranks"] == {"first": 2, "second": 2}  # after the positive
    weighted = run_mine(words, tmp_path, "--weights", 1, 0.5, retrievers=("first", "second"))
    assert abs(mined(weighted)[0][1] - 1.125) < 2e-3
    fused = run_mine(words, tmp_path, "--fusion", "rrf", retrievers=("first", "bm25"))
    best = fused[0]["candidate_passages"][0]
    assert (
        best["docid"] == "1#1"
        and abs(best["score"] - sum(1 / (60 + rank) for rank in best["ranks"].values())) < 1e-6
    )
    assert set(best["ranks"]) == {"first", "bm25"}
    prefixed = run_mine(words, tmp_path, "--settings", "query_prefix=w w w w ")
    assert mined(prefixed)[0][0] == "6#0"
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text("utf-8"))
    assert meta["encoders"]["first"]["max_len"] == {"query": 64, "passage": 128}
    first_word = {
        flag: mined(run_mine(words, tmp_path, flag, 1)) for flag in ("--query-max-len", "--passage-max-len")
    }
    assert [d for d, _ in first_word["--query-max-len"]] == [
        "1#1",
        "3#10",
        "3#2",
        "4#0",
        "5#0",
        "6#0",
    ]  # "a" is in the first four
    assert [d for d, _ in first_word["--passage-max-len"]] == [
        "1#1",
        "3#10",
        "4#0",
        "6#0",
        "3#2",
        "5#0",
    ]  # a, a, a, c, y, x
    assert all(
        abs(dict(found)["1#1"] - 0.5) < 1e-3 and abs(dict(found)["5#0"]) < 1e-3
        for found in first_word.values()
    )
    without = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "x": 3}, "[UNK]"))
    without.normalizer = normalizers.Replace(Regex("[cd]"), "")
    without.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=without, unk_token="[UNK]").save_pretrained(tmp_path / "a and b")
    lexical = [
        {d for d, _ in mined(run_mine(words, tmp_path, *flags, retrievers=("bm25",)))}
        for flags in ([], ["--bm25-tokenizer", tmp_path / "a and b"])
    ]
    assert lexical == [
        {"1#1", "3#10", "3#2", "4#0", "6#0"},
        {"1#1", "3#10", "3#2", "4#0"},
    ]  # "6#0" has neither a nor b
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text("utf-8"))
    assert meta["models"].keys() == {"0 a and b"}  # changed in place, it is another one


def test_the_summary_tells_what_each_retriever_finds(words, tmp_path):
    run_mine(words, tmp_path, "--depth", 7, "--fusion", "rrf", retrievers=("first", "bm25"))
    row = json.loads((tmp_path / "out.jsonl.meta.json").read_text("utf-8"))["counts"]["by_lang"]["en"]
    assert row["queries"] == 1 and row["candidates"] == 6
    assert row["first recall@7 of positives"] == 1.0 and row["first mean rank of positives found"] == 1.0
    assert row["first recall@7 of judged negatives"] == 1.0  # "4#0" comes seventh
    assert row["overlap"] == 1.0  # the seven that have a word of the query
    run_mine(words, tmp_path, "--depth", 5, "--fusion", "rrf", retrievers=("first", "bm25"))
    row = json.loads((tmp_path / "out.jsonl.meta.json").read_text("utf-8"))["counts"]["by_lang"]["en"]
    assert row["candidates"] == 5 and row["first recall@5 of judged negatives"] == 0.0
    assert row["overlap"] == 0.667  # BM25 knows "2#0", whose letters are large, in place of "3#2": 4 of 6
    two = read(words / "data/train.jsonl")[0]
    two["positive_passages"] += [CORPUS[3], passage("elsewhere", "w w")]
    write(tmp_path / "two.jsonl", [two])
    run_mine(words, tmp_path, "--depth", 3, queries=tmp_path / "two.jsonl")
    row = json.loads((tmp_path / "out.jsonl.meta.json").read_text("utf-8"))["counts"]["by_lang"]["en"]
    assert (
        row["first recall@3 of positives"] == 0.333 and row["first mean rank of positives found"] == 2.5
    )  # first, fourth, not in the corpus


def test_one_text_is_one_candidate_and_the_query_itself_is_none(words, tmp_path, capfd):
    more = [passage("8#0", "A b c\u3000x"), passage("9#0", "", "a b"), passage("9#1", "", "a x")]
    more += [passage("9#2", "a b c", "d"), passage("9#3", "c")]
    write(tmp_path / "data/corpus/en.jsonl", [*CORPUS, *more])
    record = read(words / "data/train.jsonl")[0] | {"query": "a b  c"}
    titled = record | {
        "query_id": "titled",
        "query": "d\na b c",
        "positive_passages": [passage("p", "", "z")],
    }
    write(tmp_path / "data/train.jsonl", [record, titled])
    found = run_mine(words, tmp_path, data=tmp_path / "data")
    docids = [p["docid"] for p in found[0]["candidate_passages"]]
    assert "1#1" in docids and "8#0" not in docids  # "A b c x" in full width and large letters is "a b c x"
    assert "9#2" not in docids  # titles alone are told apart; the end of a query is not the query
    assert {"9#0", "9#1", "9#3"} < set(docids)
    assert "9#2" not in [p["docid"] for p in found[1]["candidate_passages"]]  # title and text are the query
    row = json.loads((tmp_path / "out.jsonl.meta.json").read_text("utf-8"))["counts"]["by_lang"]["en"]
    assert row["left out, the query itself"] == 2
    assert row["left out, duplicates of a candidate's text"] == 3  # "8#0" twice, "2#0" for the second
    assert "left out, the query itself 2" in capfd.readouterr().err


def test_what_answers_the_same_question_under_another_id_is_no_candidate(words, tmp_path):
    record = read(words / "data/train.jsonl")[0]
    twin = record | {"query_id": "twin", "query": "A b  C d", "positive_passages": [CORPUS[1]]}
    other = record | {"query_id": "other", "query": "a b", "positive_passages": [CORPUS[4]]}
    write(tmp_path / "three.jsonl", [record, twin, other])
    first, second, third = run_mine(words, tmp_path, queries=tmp_path / "three.jsonl")
    for of_question in (first, second):
        assert not {"1#0", "1#1"} & {p["docid"] for p in of_question["candidate_passages"]}
    assert {"1#0", "1#1"} < {p["docid"] for p in third["candidate_passages"]}
    row = json.loads((tmp_path / "out.jsonl.meta.json").read_text("utf-8"))["counts"]["by_lang"]["en"]
    assert row["queries that ask the same as another (their positives are shared)"] == 1


def test_docids_that_do_not_tell_the_article_are_said(words, tmp_path, capfd):
    record = read(words / "data/train.jsonl")[0]
    apart = [p | {"docid": p["docid"].replace("#", "_")} for p in CORPUS]
    write(tmp_path / "data/corpus/en.jsonl", apart)
    write(tmp_path / "data/train.jsonl", [record | {"positive_passages": apart[:1]}])
    with pytest.raises(DataError, match="1 of 1 positives, such as '1_0', have no '#'.* --article-separator"):
        run_mine(words, tmp_path, "--exclude-same-article", data=tmp_path / "data")
    assert "1_1" in dict(mined(run_mine(words, tmp_path, data=tmp_path / "data")))
    flags = "--exclude-same-article", "--article-separator", "_"
    found = dict(mined(run_mine(words, tmp_path, *flags, data=tmp_path / "data")))
    assert "1_1" not in found and "3_2" in found
    mixed = [apart[0], passage("alone", "c c")]
    write(tmp_path / "data/train.jsonl", [record | {"positive_passages": mixed}])
    run_mine(words, tmp_path, *flags, data=tmp_path / "data")
    assert "1 of 2 positives, such as 'alone', have no '_'" in capfd.readouterr().err


def test_a_collection_without_training_queries_is_told_so(words, tmp_path):
    shutil.copytree(words / "data", tmp_path / "data")
    (tmp_path / "data/train.jsonl").rename(tmp_path / "data/dev.jsonl")
    with pytest.raises(DataError, match="has no training queries; name others with --queries"):
        run_mine(words, tmp_path, data=tmp_path / "data")
    assert run_mine(words, tmp_path, data=tmp_path / "data", queries=tmp_path / "data/dev.jsonl")


def random_collection(folder, n_passages, n_queries, lang="en", seed=0):
    draw = random.Random(seed)
    corpus = [
        passage(
            f"{i // 3}#{i % 3}",
            " ".join(draw.choices(WORDS, k=draw.randint(2, 12))),
            draw.choice(["", "a b", "z"]),
        )
        for i in range(n_passages)
    ]
    records = [
        {
            "query_id": str(i),
            "lang": lang,
            "query": " ".join(draw.choices(WORDS, k=draw.randint(1, 6))),
            "positive_passages": draw.sample(corpus, draw.randint(1, 3)),
            "negative_passages": [],
        }
        for i in range(n_queries)
    ]
    return corpus, records


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """150 passages of 9 words with many ties, 25 queries, two random BERTs."""
    top = tmp_path_factory.mktemp("collection")
    corpus, records = random_collection(top, 150, 25)
    write(top / "data/corpus/en.jsonl", corpus)
    write(top / "data/train.jsonl", records)
    random_bert(top / "first", WORDS, seed=1)
    random_bert(top / "second", WORDS, seed=2)
    return top


FLAG_SETS = [
    ["--fusion", "rrf", "--depth", "20"],
    ["--weights", "1", "0.7", "--depth", "15"],
    ["--strategy", "margin", "--margin", "0.01", "--depth", "10"],
]
RETRIEVERS = [["first", "second", "bm25"], ["first", "second"], ["first", "second"]]


def arguments(top, data, cache, out):
    """One argument list for each of FLAG_SETS."""
    return [
        [
            "--data",
            str(data),
            "--retrievers",
            *(r if r == "bm25" else str(top / r) for r in names),
            "--cache",
            str(cache),
            "--device",
            "cpu",
            "--out",
            str(out / f"{i}.jsonl"),
            *flags,
        ]
        for i, (flags, names) in enumerate(zip(FLAG_SETS, RETRIEVERS))
    ]


@pytest.fixture(scope="module")
def expected(collection, tmp_path_factory):
    """The outputs of an undisturbed run of one process."""
    out = tmp_path_factory.mktemp("expected")
    for flags in arguments(collection, collection / "data", out / "cache", out):
        mine(flags)
    return [(out / f"{i}.jsonl").read_bytes() for i in range(len(FLAG_SETS))]


def test_results_do_not_depend_on_blocks_shards_or_files(collection, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SHARD", 7)
    monkeypatch.setattr(stage, "PAIRS", 100)
    corpus = read(collection / "data/corpus/en.jsonl")
    write(tmp_path / "data/train.jsonl", read(collection / "data/train.jsonl"))
    for number, (start, end) in enumerate([(0, 11), (11, 90), (90, 150)]):
        path = tmp_path / f"data/corpus/en/part{number}.jsonl"
        write(path, corpus[start:end])
        if number == 1:
            with gzip.open(f"{path}.gz", "wb") as file:
                file.write(b"\n" + path.read_bytes())
            path.unlink()
    for i, flags in enumerate(arguments(collection, tmp_path / "data", tmp_path / "cache", tmp_path)):
        mine(flags)
        assert (tmp_path / f"{i}.jsonl").read_bytes() == expected[i]


def test_two_processes_under_torchrun_give_the_bytes_of_one(collection, expected, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(
        DRIVER.format(root=str(ROOT))
        + f"for flags in {arguments(collection, collection / 'data', tmp_path / 'cache', tmp_path)!r}:\n"
        "    stage.main(flags)\n",
        "utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(driver)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for i, content in enumerate(expected):
        assert (tmp_path / f"{i}.jsonl").read_bytes() == content
    meta = json.loads((tmp_path / "0.jsonl.meta.json").read_text("utf-8"))
    assert meta["processes"] == 2


def test_an_error_of_one_process_under_torchrun_ends_all_with_its_line(collection, tmp_path):
    shutil.copytree(collection / "data", tmp_path / "data")
    lines = (tmp_path / "data/corpus/en.jsonl").read_text("utf-8").splitlines()
    lines[12] = lines[12][:-5]  # of the second shard, which the second process encodes
    (tmp_path / "data/corpus/en.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    flags = arguments(collection, tmp_path / "data", tmp_path / "cache", tmp_path)[1]
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT)) + f"common.run(lambda: stage.main({flags!r}))\n", "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(driver)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode and "en.jsonl:13: not a JSON object" in done.stderr
    assert not (tmp_path / "1.jsonl").exists()


KILLED = (
    DRIVER
    + """
import json, os, random, signal, time
import torch, transformers
from pathlib import Path
forward = encoder.Encoder.forward
def slow(self, *args):  # so that the kills fall into the encoding
    time.sleep(0.02)
    return forward(self, *args)
encoder.Encoder.forward = slow
transformers.AutoModel, transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast
draw, flags, seen, partial = random.Random(4), {flags!r}, {{}}, 0
for kill in range(11):
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        stage.main(flags)
        os._exit(0)
    if kill < 10:
        shards = len(list(Path({cache!r}).glob("embeddings/*/passage*.npy")))
        until = time.time() + 60
        wanted = shards + draw.randint(0, 5)  # wait for so many more shards, then a random moment
        while time.time() < until and len(list(Path({cache!r}).glob("embeddings/*/passage*.npy"))) < wanted:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    now = {{str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in Path({cache!r}).glob("*/**/*.npy")}}
    assert all(now[p] == state for p, state in seen.items()), "a finished shard was encoded again"
    partial += 0 < len(now) and os.WIFSIGNALED(status)
    seen = now
assert status == 0, status
print(json.dumps([partial, len(seen)]))
"""
)


def test_a_killed_run_goes_on_with_the_next_shard_and_ends_with_the_same_bytes(
    collection, expected, tmp_path
):
    flags = arguments(collection, collection / "data", tmp_path / "cache", tmp_path)[1]
    driver = tmp_path / "driver.py"
    driver.write_text(KILLED.format(root=str(ROOT), flags=flags, cache=str(tmp_path / "cache")), "utf-8")
    done = subprocess.run(
        [sys.executable, str(driver)],
        capture_output=True,
        text=True,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    partial, n_arrays = json.loads(done.stdout.splitlines()[-1])
    assert partial >= 5 and n_arrays == 19 * 3 + 2  # 19 shards: docids and two encoders; the queries twice
    assert (tmp_path / "1.jsonl").read_bytes() == expected[1]
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_another_depth_strategy_or_fusion_encodes_nothing_and_a_changed_file_its_shard_only(
    collection, tmp_path, monkeypatch
):
    monkeypatch.setattr(common, "SHARD", 50)
    data, cache, encoded = tmp_path / "data", tmp_path / "cache", []
    shutil.copytree(collection / "data", data)
    encode_file = encoder.Encoder.encode_file

    def noted(self, path, texts, kind, *bar):
        if not Path(path).is_file():
            encoded.append((kind, len(texts)))
        return encode_file(self, path, texts, kind, *bar)

    monkeypatch.setattr(encoder.Encoder, "encode_file", noted)
    runs = arguments(collection, data, cache, tmp_path)
    mine(runs[1])
    records = read(data / "train.jsonl")
    n_queries = len({r["query"] for r in records})
    n_positives = len({p["docid"] for r in records for p in r["positive_passages"]})
    assert encoded == [("query", n_queries)] * 2 + [("passage", 50)] * 6
    encoded.clear()
    for flags in (
        runs[0],
        runs[2],
        [*runs[1], "--depth", "5", "--overwrite"],
        [*runs[1], "--strategy", "topk", "--overwrite"],
    ):
        mine(flags)
    assert encoded == [("passage", n_positives)] * 2  # "margin" compares with the positives
    encoded.clear()
    shutil.move(collection / "first", collection / "renamed")  # the weights count, not the name
    mine(
        [
            *[str(collection / "renamed") if f == str(collection / "first") else f for f in runs[1]],
            "--overwrite",
        ]
    )
    shutil.move(collection / "renamed", collection / "first")
    assert encoded == []
    corpus = read(data / "corpus/en.jsonl")
    corpus[70]["text"] = "a new text"
    write(data / "corpus/en.jsonl", corpus)
    mine(runs[1])
    assert encoded == [("passage", 50)] * 2  # one shard of three, by two encoders
    encoded.clear()
    mine([*runs[1], "--settings", "first:pooling=cls", "--overwrite"])
    assert encoded == [("query", n_queries)] + [("passage", 50)] * 3


def test_who_finds_all_vectors_in_the_cache_loads_no_model_and_tells_the_same(
    collection, tmp_path, monkeypatch, capsys
):
    flags = ["--data", str(collection / "data"), "--retrievers", str(collection / "first"), "--cache",
             str(tmp_path / "cache"), "--out", str(tmp_path / "out.jsonl"), "--device", "cpu",
             "--query-max-len", "2", "--passage-max-len", "3"]  # fmt: skip
    mine(flags)
    meta = tmp_path / "out.jsonl.meta.json"
    first, said = json.loads(meta.read_text("utf-8")), capsys.readouterr().err
    assert first["encoders"]["first"]["max_len"] == {"query": 2, "passage": 3} and "were cut at 2" in said
    monkeypatch.setattr(encoder, "load_model", None)
    monkeypatch.setattr(stage, "PAIRS", 100)  # other groups
    mine([*flags, "--depth", "7", "--overwrite"])
    again, said_again = json.loads(meta.read_text("utf-8")), capsys.readouterr().err
    assert (again["encoders"], again["cut"]) == (first["encoders"], first["cut"])
    assert [line for line in said_again.splitlines() if "were cut" in line] == [
        line for line in said.splitlines() if "were cut" in line
    ]
    command = f"import sys; sys.argv[1:] = {[*flags, '--overwrite']}; import runpy, atexit\n"
    command += "atexit.register(lambda: print([name in sys.modules for name in ('torch', 'faiss')]))\n"
    command += f"runpy.run_path({str(ROOT / '01_mine_candidates.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "[False, True]\n", done.stderr


def test_faiss_knows_an_amd_processor_unless_the_user_says_which_it_is():
    cpu = Path("/proc/cpuinfo").read_text()
    amd = "AuthenticAMD" in cpu and "avx2" in cpu
    tell = "import os, search; print(os.environ.get('OPENBLAS_CORETYPE'))"
    told = []
    for user in ({}, {"OPENBLAS_CORETYPE": "Zen"}):
        env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"} | user
        done = subprocess.run([sys.executable, "-c", tell], cwd=ROOT, env=env, capture_output=True, text=True)
        told.append(done.stdout.strip())
    assert told == ["Haswell" if amd else "None", "Zen"]


def test_a_record_is_mined_alike_alone_and_among_others(collection, expected, tmp_path):
    records = read(collection / "data/train.jsonl")
    asked = [record["query"] for record in records]
    once = [record for record in records if asked.count(record["query"]) == 1]  # others share positives
    for record in once[5:8]:
        write(tmp_path / "one.jsonl", [record])
        for i, flags in enumerate(arguments(collection, collection / "data", tmp_path / "cache", tmp_path)):
            mine([*flags, "--queries", str(tmp_path / "one.jsonl")])
            wanted = [
                line
                for line in expected[i].decode().splitlines()
                if json.loads(line)["query_id"] == record["query_id"]
            ]
            assert (tmp_path / f"{i}.jsonl").read_text("utf-8").splitlines() == wanted


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: write(
                t / "data/train.jsonl", [read(t / "data/train.jsonl")[0] | {"positive_passages": []}]
            ),
            r"train\.jsonl:1: query '0' has no positive_passages; drop it",
        ),
        (
            lambda t: append(t, '{"docid": "n", "title": "", "text": " "}'),
            r"en\.jsonl:151: passage 'n': 'text' is \" \"; want",
        ),
        (
            lambda t: append(t, '{"docid": "2#1", "text": "x x x x"}'),
            r"corpus/en\.jsonl: docid '2#1' is there twice; drop or rename",
        ),
        (
            lambda t: append(t, '{"docid": "n", "text": "a'),
            r"en\.jsonl:151: not a JSON object .*half-written",
        ),
        (
            lambda t: (t / "data/corpus/en.jsonl").write_bytes(
                (t / "data/corpus/en.jsonl").read_bytes() + b'{"docid": "\xff"}\n'
            ),
            r"en\.jsonl:151: not valid UTF-8 .*convert",
        ),
        (
            lambda t: (t / "data/corpus/en.jsonl").rename(t / "data/corpus/de.jsonl"),
            r"corpus/en\.jsonl not found; .*--lang",
        ),
        (
            lambda t: (t / "first/tokenizer.json").unlink(),
            r"first: no encoder .*; fetch or save the model again",
        ),
        (
            lambda t: cut(next(t.glob("cache/embeddings/*/passage*.npy"))),
            r"passage-.*\.npy: cannot be read .*; delete it",
        ),
        (
            lambda t: cut(next(t.glob("cache/corpus/*.npy"))),
            r"corpus/.*\.npy: cannot be read .*; delete it",
        ),
    ],
)
def test_bad_input_is_one_line_with_place_and_remedy_and_keeps_what_was_made(
    collection, tmp_path, damage, message
):
    for name in ("data", "first", "second"):
        shutil.copytree(collection / name, tmp_path / name)
    flags = arguments(tmp_path, tmp_path / "data", tmp_path / "cache", tmp_path)[1]
    mine(flags)
    made, before = sorted((tmp_path / "cache/embeddings").rglob("*.npy")), (tmp_path / "1.jsonl").read_bytes()
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        mine([*flags, "--overwrite"])
    assert "\n" not in str(error.value)
    assert set(made) <= set((tmp_path / "cache/embeddings").rglob("*.npy"))
    assert (tmp_path / "1.jsonl").read_bytes() == before and not list(tmp_path.glob(".*.tmp"))


def append(top, line):
    with open(top / "data/corpus/en.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def test_a_cut_off_gzip_corpus_and_wrong_flags_end_with_status_2(collection, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(collection / "data", data)
    plain = data / "corpus/en.jsonl"
    (data / "corpus/en.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes())[:-20])
    plain.unlink()
    done = run_stage("01_mine_candidates.py", *arguments(collection, data, tmp_path / "cache", tmp_path)[1])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "en.jsonl.gz:" in done.stderr.splitlines()[-1] and "fetch it again" in done.stderr.splitlines()[-1]
    for flags in (
        ["--retrievers", "bm25", "first"],
        ["--retrievers", "first", "--weights", "1", "2"],
        ["--retrievers", "bm25", "--strategy", "abs"],
        ["--retrievers", "first", "--settings", "third:pooling=cls"],
    ):
        flags = [str(collection / f) if f == "first" else f for f in flags]
        with pytest.raises(DataError, match="--"):
            mine(
                [
                    "--data",
                    str(collection / "data"),
                    "--out",
                    str(tmp_path / "x.jsonl"),
                    "--cache",
                    str(tmp_path / "cache"),
                    *flags,
                ]
            )


def test_texts_that_are_cut_are_counted_with_vectors_made_and_with_vectors_from_the_cache(
    words, tmp_path, capfd
):
    for _ in range(2):
        run_mine(words, tmp_path, "--passage-max-len", 3, "--query-max-len", 3)
        meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text("utf-8"))
        assert meta["cut"] == {"first": {"query": 1, "passage": len(CORPUS)}}
        told = capfd.readouterr().err
        assert "cut at 3 tokens" in told
    run_mine(words, tmp_path)
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text("utf-8"))
    assert meta["cut"] == {"first": {"query": 0, "passage": 0}} and "cut at" not in capfd.readouterr().err


# --------------------------------------------------------------------------- search against brute force


def ranked(scores, docids):
    """[[(score, docid)] by query], all passages, in plain Python: best first, ties to the smaller docid."""
    return [sorted(zip(row.round(6).tolist(), docids), key=lambda hit: (-hit[0], hit[1])) for row in scores]


@pytest.mark.parametrize("n_queries", [1, 7, 30])  # faiss takes other ways below 20 queries
def test_nearest_is_brute_force_in_float64_with_ties_by_docid_whatever_the_blocks(n_queries):
    draw = np.random.default_rng(n_queries)
    different = (draw.normal(size=(60, 32)) / 6).astype(np.float16)
    block = different[draw.integers(60, size=500)].astype(np.float32)  # each vector about eight times
    queries = (draw.normal(size=(n_queries, 32)) / 6).astype(np.float16).astype(np.float32)
    docids = np.array([f"{n}#x".encode() for n in draw.permutation(500)])
    expected = ranked(queries.astype(np.float64) @ block.astype(np.float64).T, docids.tolist())
    seen = []
    for size, k in ((500, 37), (500, 3), (64, 37), (5, 37), (500, 600)):
        parts = []
        for at in range(0, 500, size):
            scores, names, rows = search.nearest(queries, block[at : at + size], docids[at : at + size], k)
            parts = [search.best([*parts, (scores, names, rows + at)], k)]
        scores, names, rows = parts[0]
        assert scores.shape == (n_queries, min(k, 500)) and (docids[rows] == names).all()
        for row, found, best in zip(scores, names, expected):
            assert found.tolist() == [docid for _, docid in best[:k]]
            assert np.abs(row - [score for score, _ in best[:k]]).max() < 3e-6
        seen.append(scores)
    assert np.array_equal(seen[0], seen[2]) and np.array_equal(seen[0], seen[3])


def test_scores_do_not_depend_on_what_else_is_compared():
    """faiss.knn's own do: of these, every hundredth differs at six decimals (two cores of an AMD EPYC)."""
    draw = np.random.default_rng(0)
    block = (draw.normal(size=(16_384, 768)) / 28).astype(np.float16).astype(np.float32)
    queries = (draw.normal(size=(1000, 768)) / 28).astype(np.float16).astype(np.float32)
    docids = np.array([str(n).encode() for n in range(len(block))])
    together = search.nearest(queries, block, docids, 80)
    for start, end in ((0, 1), (0, 19), (100, 200), (0, 700)):
        alone = search.nearest(queries[start:end], block, docids, 80)
        assert all(np.array_equal(few, many[start:end]) for few, many in zip(alone, together))


@pytest.mark.parametrize(
    ("names", "fusion", "weights"),
    [
        (["first"], "concat", None),
        (["first", "second"], "concat", [1.0, 0.4]),
        (["second", "first"], "rrf", [0.5, 2.0]),
    ],
)
def test_search_is_brute_force_in_float64(collection, tmp_path, names, fusion, weights):
    folders = [str(collection / name) for name in names]
    ensemble = Ensemble(folders, collection / "data", tmp_path, fusion, weights, device="cpu")
    queries = [record["query"] for record in read(collection / "data/train.jsonl")]
    corpus = read(collection / "data/corpus/en.jsonl")
    docids = [p["docid"] for p in corpus]
    vectors = {
        name: [
            encoder.Encoder(str(collection / name), "cpu")
            .encode(texts, kind)
            .astype(np.float16)
            .astype(np.float64)
            for texts, kind in (
                (queries, "query"),
                ([p.get("title") and f"{p['title']}\n{p['text']}" or p["text"] for p in corpus], "passage"),
            )
        ]
        for name in names
    }
    own = {name: ranked(q @ p.T, docids) for name, (q, p) in vectors.items()}
    depth = 12
    hits, ranks = ensemble.search("en", queries, depth)
    rankings = {name: [list(of_query[name]) for of_query in ranks] for name in names}
    assert all(list(of.values()) == list(range(1, len(of) + 1)) for of in ranks[0].values())
    if len(names) == 1:
        expected = own[names[0]]
    elif fusion == "concat":
        unit = {
            name: [v / np.linalg.norm(v, axis=1, keepdims=True) for v in pair]
            for name, pair in vectors.items()
        }
        expected = ranked(sum(w * unit[n][0] @ unit[n][1].T for n, w in zip(names, weights)), docids)
        own = {name: ranked(q @ p.T, docids) for name, (q, p) in unit.items()}
    else:
        scores = np.zeros((len(queries), len(docids)))
        for q in range(len(queries)):
            for name, weight in zip(names, weights):
                for rank, docid in enumerate(rankings[name][q], 1):
                    scores[q, docids.index(docid)] += weight / (60 + rank)
        expected = ranked(scores, docids)
    looked_for = 2 * depth if len(names) > 1 else depth
    for q, of_query in enumerate(hits):
        assert_alike([(score, docid) for docid, _, score in of_query], expected[q], depth)
        for name in names:
            scores = {docid: score for score, docid in own[name][q]}
            assert_alike([(scores[docid], docid) for docid in rankings[name][q]], own[name][q], looked_for)
        assert all(docids[row] == docid for docid, row, _ in of_query)


def assert_alike(found, expected, depth):
    """The same list, but for places that differ by less than the rounding of float32 products."""
    assert len(found) == depth
    for (score, docid), (wanted, name) in zip(found, expected):
        assert abs(score - wanted) < 3e-6 and (
            docid == name or any(abs(s - score) < 3e-6 and d == docid for s, d in expected)
        )


# --------------------------------------------------------------------------- BM25's terms


class Alone:
    encoders = {}


# Hindi, Bengali, Telugu, Tamil, Thai, Arabic, Hebrew, Burmese, Latin with a mark that no letter has
PAIRS = [
    ("\u0915\u0940\u0932", "\u0915\u0947\u0932"),
    ("\u0995\u09b2\u09be", "\u0995\u09b2\u09bf"),
    ("\u0c15\u0c32\u0c41", "\u0c15\u0c41\u0c32\u0c41"),
    ("\u0b95\u0bb2\u0bcd", "\u0b95\u0bb2\u0bbf"),
    ("\u0e19\u0e49\u0e33", "\u0e19\u0e35\u0e49"),
    ("\u0643\u064e\u062a\u0628", "\u0643\u064f\u062a\u0628"),
    ("\u05d1\u05b7\u05dc", "\u05d1\u05b5\u05dc"),
    ("\u1018\u102c\u101e\u102c", "\u1018\u102f\u101e\u102f"),
    ("n\u0303\u0324o", "n\u0303o"),
    (
        "\u0935\u093f\u0926\u094d\u092f\u093e\u0930\u094d\u0925\u0940",
        "\u0935\u093f\u0926\u094d\u092f\u093e\u0930\u094d\u0925\u093f",
    ),
]  # its fifth letter's mark


@pytest.mark.parametrize("pair", PAIRS)
def test_words_that_differ_by_a_mark_are_different_terms_without_a_tokenizer(pair):
    left, right = BM25(Alone()).terms(list(pair))
    assert left != right and left and right


# Burmese, Khmer, Lao, Thai; Turkish; Hindi with a joiner; Persian with a non-joiner; NFD; full width
FOUND = [
    (
        "\u1019\u103c\u1014\u103a\u1019\u102c\u1014\u102d\u102f\u1004\u103a\u1004\u1036",
        "\u1014\u102d\u102f\u1004\u103a\u1004\u1036",
    ),
    (
        "\u179a\u17b6\u1787\u1792\u17b6\u1793\u17b8\u1797\u17d2\u1793\u17c6\u1796\u17c1\u1789",
        "\u1797\u17d2\u1793\u17c6\u1796\u17c1\u1789",
    ),
    ("\u0e9b\u0eb0\u0ec0\u0e97\u0e94\u0ea5\u0eb2\u0ea7", "\u0ea5\u0eb2\u0ea7"),
    ("\u0e1b\u0e23\u0e30\u0e40\u0e17\u0e28\u0e44\u0e17\u0e22", "\u0e44\u0e17\u0e22"),
    ("\u0130stanbul", "istanbul"),
    ("\u0915\u094d\u200d\u0937", "\u0915\u094d\u0937"),
    ("\u06a9\u062a\u0627\u0628\u200c\u0647\u0627", "\u06a9\u062a\u0627\u0628"),
    (unicodedata.normalize("NFD", "\uc11c\uc6b8 Vi\u1ec7t"), "\uc11c\uc6b8 vi\u1ec7t"),
    ("\uff2e\uff41\uff49\uff52\uff4f\uff42\uff49", "nairobi"),
    ("\u6211\u7231Python\u7f16\u7a0b", "Python"),  # among letters without spaces
    ("\u51fa\u751f\u4e8e1987\u5e74", "1987"),
    ("\u0e43\u0e0a\u0e49Facebook\u0e17\u0e38\u0e01", "Facebook"),
    ("Mate30\u624b\u673a", "\u624b\u673a"),
]


@pytest.mark.parametrize(("text", "word"), FOUND)
def test_a_word_is_found_in_a_text_of_its_script_without_a_tokenizer(text, word):
    of_text, of_word = BM25(Alone()).terms([text, word])
    assert of_word and set(of_word) <= set(of_text)


def test_a_positive_whose_docid_is_another_text_in_the_corpus_is_refused(words, tmp_path):
    rows = [json.loads(line) for line in (words / "data/train.jsonl").read_text("utf-8").splitlines()]
    rows[0]["positive_passages"][0]["text"] = "something else"
    (tmp_path / "q.jsonl").write_text(json.dumps(rows[0]) + "\n", "utf-8")
    with pytest.raises(DataError, match="a positive, has another text in the corpus"):
        run_mine(words, tmp_path, "--queries", tmp_path / "q.jsonl", "--depth", 50)


def test_languages_and_corpora_that_are_not_what_they_seem_are_told(tmp_path, capsys):
    from common import corpus_files, read_queries

    line = {"query_id": "1", "lang": "sw", "query": "q", "positive_passages": [{"docid": "d", "text": "t"}]}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    for _ in range(2):
        assert len(list(read_queries(tmp_path / "in.jsonl", ["sw", "xx"]))) == 1
    assert capsys.readouterr().err.count("in.jsonl: no queries in xx") == 1  # a thing once
    for name in ("sw.jsonl", "te/a.jsonl", "te/b.jsonl.gz", "th.jsonl", "th.jsonl.gz", "id.jsonl",
                 "id/a.jsonl", "ko/a.jsonl", "ko/b.jsonl.zst"):  # fmt: skip
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_text("")
    assert [len(corpus_files(tmp_path, lang)) for lang in ("sw", "te")] == [1, 2]
    for lang in ("th", "id", "ko"):
        with pytest.raises(DataError, match=f"for {lang}; want one CODE.jsonl"):
            corpus_files(tmp_path, lang)


def test_sub_words_of_marks_alone_and_bytes_of_letters_are_terms_and_punctuation_is_not(tmp_path):
    save_tokenizer(tmp_path / "words", ["\u0915", "\u0940", "\u0947", "?", "\u0964", "7", "\u2581"])
    words = BM25(Alone(), str(tmp_path / "words"))
    assert words.terms(["\u0915 \u0940 ?", "\u0915 \u0947 \u0964", "7 \u2581 unknown"]) == [
        ["\u0915", "\u0940"],
        ["\u0915", "\u0947"],
        ["7", "unkno"],  # what it does not know counts as without a tokenizer
    ]
    tokenizer = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "bytes")
    of_bytes = BM25(Alone(), str(tmp_path / "bytes"))
    left, right, dots = of_bytes.terms(
        ["\u0bb8", "\u0bb4", "?!."]
    )  # of three bytes, the last of which look like symbols
    assert left != right and dots == []


def test_a_word_of_a_byte_level_tokenizer_is_one_term_wherever_it_stands(tmp_path):
    """As GPT-2's and Qwen's, whose sub-words hold the blank before them, and punctuation with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["Mji wa Nairobi ( mji ) , Nairobi 。 "] * 9 + ["nairobi mji"] * 9
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([*texts, *map(str.casefold, texts)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "bpe")
    terms = BM25(Alone(), str(tmp_path / "bpe")).terms(["Nairobi", "mji\nNairobi", "wa ( , 。", "?"])
    assert terms == [["Ġnairobi"], ["Ġmji", "Ġnairobi"], ["Ġwa"], []]
    steps = [pre_tokenizers.Split(Regex(mark), "isolated") for mark in "\n!,-;:"]  # as DeepSeek's, of seven
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "steps")
    assert BM25(Alone(), str(tmp_path / "steps")).of_bytes


def test_a_corpus_without_a_word_has_no_bm25(tmp_path):
    write(tmp_path / "corpus/sw.jsonl", [{"docid": "1", "title": "", "text": "🙂🙂"}])
    with pytest.raises(DataError, match="corpus/sw: no passage has a word; leave bm25 out"):
        Ensemble(["bm25"], tmp_path, tmp_path / "cache").rank("sw", ["nini"], 3)


def test_a_tokenizer_that_tells_no_offsets_is_refused_in_one_line(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path / "python")
    with pytest.raises(DataError, match="tells no offsets"):
        BM25(Alone(), str(tmp_path / "python"))


MINIMIRACL = ROOT.parent / "shared/data/minimiracl"


@pytest.mark.skipif(not MINIMIRACL.is_dir(), reason="mini-MIRACL is not beside the project")
def test_fused_scores_equal_a_brute_force_reference_on_swahili(tmp_path):
    """Vectors of SentenceTransformer.encode, float64 products, a plain sort: nothing of the stage's."""
    from sentence_transformers import SentenceTransformer

    load_stage("00_prepare_data").main(
        ["--source", "miracl", "--root", str(MINIMIRACL), "--lang", "sw", "--out", str(tmp_path / "data")]
    )
    corpus = read(tmp_path / "data/corpus/sw.jsonl")  # a third of it is enough
    positives = {p["docid"] for r in read(tmp_path / "data/train.jsonl") for p in r["positive_passages"]}
    kept = [p for i, p in enumerate(corpus) if i % 5 == 0 or p["docid"] in positives]
    lines = [json.dumps(p, ensure_ascii=False) + "\n" for p in kept]
    (tmp_path / "data/corpus/sw.jsonl").write_text("".join(lines), "utf-8")
    for seed, name in enumerate(("first", "second")):
        make = [
            sys.executable,
            ROOT / "sample/make_encoder.py",
            "--data",
            tmp_path / "data",
            "--out",
            tmp_path / name,
            "--steps",
            0,
            "--max-passages",
            400,
            "--width",
            128 + 64 * seed,
            "--vocab",
            4000,
            "--seed",
            seed,
        ]
        subprocess.run(list(map(str, make)), check=True, capture_output=True)
    weights, depth = [1.0, 0.6], 40
    mine(
        [
            "--data",
            str(tmp_path / "data"),
            "--retrievers",
            str(tmp_path / "first"),
            str(tmp_path / "second"),
            "--weights",
            "1",
            "0.6",
            "--cache",
            str(tmp_path / "cache"),
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "out.jsonl"),
        ]
    )
    found, corpus = read(tmp_path / "out.jsonl"), read(tmp_path / "data/corpus/sw.jsonl")
    scores = 0
    for weight, name in zip(weights, ("first", "second")):
        model = SentenceTransformer(str(tmp_path / name), device="cpu")
        model.max_seq_length = 256
        passages = model.encode([f"{p['title']}\n{p['text']}" for p in corpus]).astype(np.float64)
        model.max_seq_length = 64
        queries = model.encode([r["query"] for r in found]).astype(np.float64)
        scores = scores + weight * queries @ passages.T

    def simple(text):
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

    plain = [simple(p["text"]) for p in corpus]
    place = {p["docid"]: i for i, p in enumerate(corpus)}
    for record, row in zip(found, scores, strict=True):
        alike = [r for r in found if simple(r["query"]) == simple(record["query"])]  # under other ids too
        positives = {place[p["docid"]] for r in alike for p in r["positive_passages"]}
        texts = {plain[i] for i in positives} | {simple(record["query"])}
        first = {}  # {text: the best row that has it}
        for i in sorted(range(len(corpus)), key=lambda i: -row[i]):
            first.setdefault(plain[i], i)
        best = [i for text, i in first.items() if text not in texts][:depth]
        ours = [place[p["docid"]] for p in record["candidate_passages"]]
        assert len(ours) == depth
        assert np.abs(np.array([p["score"] for p in record["candidate_passages"]]) - row[ours]).max() < 1e-3
        for i in set(ours) ^ set(best):  # only a tie at the last place, at the precision of fp16 vectors
            assert abs(row[i] - row[best[-1]]) < 5e-4
