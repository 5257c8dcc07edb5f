"""Stage 01: on records whose scores can be worked out by hand, and against a slow reference that shares no code with it."""
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
from tiny_models import random_bert, word_model

import common
import encoder
import search
from common import DataError

mine = load_stage("01_mine_candidates").main
WORDS = "a b c d e x y z w".split()
DRIVER = """
import sys, importlib.util
sys.path.insert(0, {root!r})
import common
import encoder
common.SHARD = 8
spec = importlib.util.spec_from_file_location("stage", {root!r} + "/01_mine_candidates.py")
stage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage)
"""


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")


def read(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def passage(docid, text, title=""):
    return {"docid": docid, "title": title, "text": text}


# cosines with the query "a b c d" by word_model: (words in common) / 4
CORPUS = [passage("1#0", "a b c d"), passage("1#1", "a b c x"), passage("2#0", " A b  c D"), passage("3#2", "y b a x"),
          passage("3#10", "a b x y"), passage("4#0", "a x y z"), passage("5#0", "x y z w"), passage("6#0", "c d e w")]
COSINE = {"1#0": 1, "1#1": .75, "3#10": .5, "3#2": .5, "6#0": .5, "4#0": .25, "5#0": 0}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with data/ (the corpus above) and two encoders, the second of which also knows A and D."""
    top = tmp_path_factory.mktemp("words")
    write(top / "data/corpus/en.jsonl", CORPUS)
    write(top / "data/train.jsonl", [{"query_id": "q", "lang": "en", "query": "a b c d", "positive_passages": [CORPUS[0]],
                                      "negative_passages": [CORPUS[5] | {"source": "human"}]}])
    word_model(top / "first", WORDS)
    word_model(top / "second", [*WORDS, "A", "D"])
    return top


def run_mine(words, tmp_path, *flags, retrievers=("first",), data=None, queries=None):
    out = tmp_path / "out.jsonl"
    extra = ["--queries", str(queries)] if queries else []
    mine(["--data", str(data or words / "data"), "--retrievers", *(r if r == "bm25" else str(words / r) for r in retrievers), "--device", "cpu",
          "--cache", str(tmp_path / "cache"), "--out", str(out), "--overwrite", *extra, *map(str, flags)])
    return read(out)


def mined(records):
    return [(p["docid"], p["score"]) for p in records[0].get("candidate_passages") or records[0]["negative_passages"]]


def test_candidates_come_best_first_without_positives_or_their_text_and_ties_by_docid(words, tmp_path):
    found = mined(run_mine(words, tmp_path))
    assert [d for d, _ in found] == ["1#1", "3#10", "3#2", "6#0", "4#0", "5#0"]  # "3#10" < "3#2" as bytes
    assert all(abs(score - COSINE[docid]) < 1e-3 for docid, score in found)
    one = read(words / "data/train.jsonl")[0]
    write(tmp_path / "one.jsonl", [one | {"positive_passages": [passage("elsewhere", "\uff21\u3000B\nc d")]}])  # full-width A and space
    assert mined(run_mine(words, tmp_path, queries=tmp_path / "one.jsonl")) == found  # neither "1#0" nor "2#0", though not labelled here


def test_each_strategy_keeps_what_its_definition_says(words, tmp_path):
    def docids(*flags, **kwargs):
        return [d for d, _ in mined(run_mine(words, tmp_path, *flags, **kwargs))]
    assert docids("--strategy", "topk", "--depth", 3) == ["1#1", "3#10", "3#2"]
    assert docids("--strategy", "shifted", "--shift", 2, "--depth", 2) == ["3#2", "6#0"]
    assert docids("--strategy", "abs") == ["3#10", "3#2", "6#0", "4#0", "5#0"]              # < 0.6
    assert docids("--strategy", "abs", "--max-score", 0.3, "--depth", 1) == ["4#0"]
    assert docids("--strategy", "margin") == ["1#1", "3#10", "3#2", "6#0", "4#0", "5#0"]    # < 1 - 0.15
    assert docids("--strategy", "margin", "--margin", 0.4) == ["3#10", "3#2", "6#0", "4#0", "5#0"]
    assert docids("--strategy", "percent", "--percent", 0.4) == ["4#0", "5#0"]              # < 0.4
    assert docids("--strategy", "percent")[0] == "1#1" and docids("--strategy", "percent", "--percent", 0.75)[0] == "3#10"
    defaults = vars(load_stage("01_mine_candidates").build_parser().parse_args("--data x --retrievers x --out x".split()))
    assert [defaults[k] for k in ("depth", "shift", "max_score", "margin", "percent")] == [40, 10, 0.6, 0.15, 0.9]  # the paper's
    two = read(words / "data/train.jsonl")[0]
    two["positive_passages"].append(passage("elsewhere", "b x y a"))                        # 0.5, and not in the corpus
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
    assert both[0]["candidate_passages"][0]["scores"] == pytest.approx({"first": .75, "second": .75}, abs=1e-3)
    assert both[0]["candidate_passages"][0]["ranks"] == {"first": 2, "second": 2}  # after the positive
    weighted = run_mine(words, tmp_path, "--weights", 1, 0.5, retrievers=("first", "second"))
    assert abs(mined(weighted)[0][1] - 1.125) < 2e-3
    fused = run_mine(words, tmp_path, "--fusion", "rrf", retrievers=("first", "bm25"))
    best = fused[0]["candidate_passages"][0]
    assert best["docid"] == "1#1" and abs(best["score"] - sum(1 / (60 + rank) for rank in best["ranks"].values())) < 1e-6
    assert set(best["ranks"]) == {"first", "bm25"}
    prefixed = run_mine(words, tmp_path, "--settings", "query_prefix=w w w w ")
    assert mined(prefixed)[0][0] == "6#0"
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text("utf-8"))
    assert meta["encoders"]["first"]["pooling"] == "mean" and meta["encoders"]["first"]["max_len"] == {"query": 64, "passage": 128}
    first_word = {flag: mined(run_mine(words, tmp_path, flag, 1)) for flag in ("--query-max-len", "--passage-max-len")}
    assert [d for d, _ in first_word["--query-max-len"]] == ["1#1", "3#10", "3#2", "4#0", "5#0", "6#0"]    # "a" is in the first four
    assert [d for d, _ in first_word["--passage-max-len"]] == ["1#1", "3#10", "4#0", "6#0", "3#2", "5#0"]  # a, a, a, c, y, x
    assert all(abs(dict(found)["1#1"] - .5) < 1e-3 and abs(dict(found)["5#0"]) < 1e-3 for found in first_word.values())
    word_model(tmp_path / "a and b", ["a", "b"])
    lexical = [{d for d, _ in mined(run_mine(words, tmp_path, *flags, retrievers=("bm25",)))} for flags in ([], ["--bm25-tokenizer", tmp_path / "a and b"])]
    assert lexical == [{"1#1", "3#10", "3#2", "4#0", "6#0"}, {"1#1", "3#10", "3#2", "4#0"}]  # "6#0" has neither a nor b


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
    assert row["first recall@3 of positives"] == 0.333 and row["first mean rank of positives found"] == 2.5  # first, fourth, not in the corpus


def random_collection(folder, n_passages, n_queries, lang="en", seed=0):
    draw = random.Random(seed)
    corpus = [passage(f"{i // 3}#{i % 3}", " ".join(draw.choices(WORDS, k=draw.randint(2, 12))), draw.choice(["", "a b", "z"]))
              for i in range(n_passages)]
    records = [{"query_id": str(i), "lang": lang, "query": " ".join(draw.choices(WORDS, k=draw.randint(1, 6))),
                "positive_passages": draw.sample(corpus, draw.randint(1, 3)), "negative_passages": []} for i in range(n_queries)]
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


FLAG_SETS = [["--fusion", "rrf", "--depth", "20"], ["--weights", "1", "0.7", "--depth", "15"],
             ["--strategy", "margin", "--margin", "0.01", "--depth", "10"]]
RETRIEVERS = [["first", "second", "bm25"], ["first", "second"], ["first", "second"]]


def arguments(top, data, cache, out):
    """One argument list for each of FLAG_SETS."""
    return [["--data", str(data), "--retrievers", *(r if r == "bm25" else str(top / r) for r in names), "--cache", str(cache), "--device", "cpu",
             "--out", str(out / f"{i}.jsonl"), *flags] for i, (flags, names) in enumerate(zip(FLAG_SETS, RETRIEVERS))]


@pytest.fixture(scope="module")
def expected(collection, tmp_path_factory):
    """The outputs of an undisturbed run of one process."""
    out = tmp_path_factory.mktemp("expected")
    for flags in arguments(collection, collection / "data", out / "cache", out):
        mine(flags)
    return [(out / f"{i}.jsonl").read_bytes() for i in range(len(FLAG_SETS))]


def test_results_do_not_depend_on_blocks_shards_or_files(collection, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SHARD", 7)
    monkeypatch.setattr(search, "QUERY_BLOCK", 4)
    monkeypatch.setattr(search, "PAIR_BLOCK", 5)
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
    driver.write_text(DRIVER.format(root=str(ROOT)) + f"for flags in {arguments(collection, collection / 'data', tmp_path / 'cache', tmp_path)!r}:\n"
                      "    stage.main(flags)\n", "utf-8")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(driver)],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for i, content in enumerate(expected):
        assert (tmp_path / f"{i}.jsonl").read_bytes() == content
    meta = json.loads((tmp_path / "0.jsonl.meta.json").read_text("utf-8"))
    assert meta["processes"] == 2


KILLED = DRIVER + """
import json, os, random, signal, time
import torch, transformers
from pathlib import Path
encode = encoder.Encoder.encode
def slow(self, texts, kind):  # so that the kills fall into the encoding
    time.sleep(0.02)
    return encode(self, texts, kind)
encoder.Encoder.encode = slow
transformers.AutoModel, transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast, transformers.BertModel
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


def test_a_killed_run_goes_on_with_the_next_shard_and_ends_with_the_same_bytes(collection, expected, tmp_path):
    flags = arguments(collection, collection / "data", tmp_path / "cache", tmp_path)[1]
    driver = tmp_path / "driver.py"
    driver.write_text(KILLED.format(root=str(ROOT), flags=flags, cache=str(tmp_path / "cache")), "utf-8")
    done = subprocess.run([sys.executable, str(driver)], capture_output=True, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    assert done.returncode == 0, done.stderr[-3000:]
    partial, n_arrays = json.loads(done.stdout.splitlines()[-1])
    assert partial >= 5 and n_arrays == 19 * 3 + 2  # 19 shards: docids and two encoders; the queries twice
    assert (tmp_path / "1.jsonl").read_bytes() == expected[1]
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_another_depth_strategy_or_fusion_encodes_nothing_and_a_changed_file_its_shard_only(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SHARD", 50)
    data, cache, encoded = tmp_path / "data", tmp_path / "cache", []
    shutil.copytree(collection / "data", data)
    encode = encoder.Encoder.encode
    monkeypatch.setattr(encoder.Encoder, "encode", lambda self, texts, kind: encoded.append((kind, len(texts))) or encode(self, texts, kind))
    runs = arguments(collection, data, cache, tmp_path)
    mine(runs[1])
    n_queries = len({r["query"] for r in read(data / "train.jsonl")})
    assert encoded == [("passage", 50)] * 6 + [("query", n_queries)] * 2
    encoded.clear()
    for flags in (runs[0], runs[2], [*runs[1], "--depth", "5", "--overwrite"], [*runs[1], "--strategy", "topk", "--overwrite"]):
        mine(flags)
    assert encoded == []
    shutil.move(collection / "first", collection / "renamed")  # the weights count, not the name
    mine([*[str(collection / "renamed") if f == str(collection / "first") else f for f in runs[1]], "--overwrite"])
    shutil.move(collection / "renamed", collection / "first")
    assert encoded == []
    corpus = read(data / "corpus/en.jsonl")
    corpus[70]["text"] = "a new text"
    write(data / "corpus/en.jsonl", corpus)
    mine(runs[1])
    assert encoded == [("passage", 50)] * 2  # one shard of three, by two encoders
    encoded.clear()
    mine([*runs[1], "--settings", "first:pooling=cls", "--overwrite"])
    assert encoded == [("passage", 50)] * 3 + [("query", n_queries)]


def test_a_record_is_mined_alike_alone_and_among_others(collection, expected, tmp_path):
    for record in read(collection / "data/train.jsonl")[7:9]:
        write(tmp_path / "one.jsonl", [record])
        for i, flags in enumerate(arguments(collection, collection / "data", tmp_path / "cache", tmp_path)):
            mine([*flags, "--queries", str(tmp_path / "one.jsonl")])
            wanted = [line for line in expected[i].decode().splitlines() if json.loads(line)["query_id"] == record["query_id"]]
            assert (tmp_path / f"{i}.jsonl").read_text("utf-8").splitlines() == wanted


@pytest.mark.parametrize(("damage", "message"), [
    (lambda t: write(t / "data/train.jsonl", [read(t / "data/train.jsonl")[0] | {"positive_passages": []}]),
     r"train\.jsonl:1: query '0' has no positive_passages; drop it or label one"),
    (lambda t: append(t, '{"docid": "n", "title": "", "text": " "}'), r"en\.jsonl:151: passage 'n': 'text' is \" \"; want"),
    (lambda t: append(t, '{"docid": "2#1", "text": "a"}'), r"en\.jsonl:151: docid '2#1' is there twice, first in .*en\.jsonl:8; .*drop or rename"),
    (lambda t: append(t, '{"docid": "n", "text": "a'), r"en\.jsonl:151: not a JSON object .*half-written"),
    (lambda t: (t / "data/corpus/en.jsonl").write_bytes((t / "data/corpus/en.jsonl").read_bytes() + b'{"docid": "\xff"}\n'),
     r"en\.jsonl:151: not valid UTF-8 .*convert"),
    (lambda t: (t / "data/corpus/en.jsonl").rename(t / "data/corpus/de.jsonl"), r"corpus/en\.jsonl not found; .*--lang"),
    (lambda t: (t / "first/tokenizer.json").unlink(), r"first: no tokenizer .*; fetch the model again"),
    (lambda t: cut(next(t.glob("cache/embeddings/*/passage*.npy"))), r"passage-.*\.npy: cannot be read .*; delete this file"),
    (lambda t: cut(next(t.glob("cache/corpus/*.npy"))), r"corpus/.*\.npy: cannot be read .*; delete this file")])
def test_bad_input_is_one_line_with_place_and_remedy_and_keeps_what_was_made(collection, tmp_path, damage, message):
    for name in ("data", "first", "second"):
        shutil.copytree(collection / name, tmp_path / name)
    flags = arguments(tmp_path, tmp_path / "data", tmp_path / "cache", tmp_path)[1]
    mine(flags)
    made, before = sorted((tmp_path / "cache/embeddings").rglob("*.npy")), (tmp_path / "1.jsonl").read_bytes()
    damage(tmp_path)
    for path in (tmp_path / "cache/corpus").glob("*.unique"):
        path.unlink()
    with pytest.raises(DataError, match=message) as error:
        mine([*flags, "--overwrite"])
    assert "\n" not in str(error.value)
    assert sorted((tmp_path / "cache/embeddings").rglob("*.npy")) == made
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
    assert "en.jsonl.gz:" in done.stderr.splitlines()[-1] and "fetch or make the file again" in done.stderr.splitlines()[-1]
    for flags in (["--retrievers", "bm25", "first"], ["--retrievers", "first", "--weights", "1", "2"], ["--retrievers", "first", "--shift", "-1"],
                  ["--retrievers", "bm25", "--strategy", "abs"], ["--retrievers", "first", "--settings", "third:pooling=cls"]):
        flags = [str(collection / f) if f == "first" else f for f in flags]
        with pytest.raises(DataError, match="--"):
            mine(["--data", str(collection / "data"), "--out", str(tmp_path / "x.jsonl"), "--cache", str(tmp_path / "cache"), *flags])


MINIMIRACL = ROOT.parent / "shared/data/minimiracl"


@pytest.mark.skipif(not MINIMIRACL.is_dir(), reason="mini-MIRACL is not beside the project")
def test_fused_scores_equal_a_brute_force_reference_on_swahili(tmp_path):
    """Vectors of SentenceTransformer.encode, all products in float64, a plain sort: nothing shared with the stage."""
    from sentence_transformers import SentenceTransformer
    load_stage("00_prepare_data").main(["--source", "miracl", "--root", str(MINIMIRACL), "--lang", "sw", "--out", str(tmp_path / "data")])
    for seed, name in enumerate(("first", "second")):
        make = [sys.executable, ROOT / "sample/make_encoder.py", "--data", tmp_path / "data", "--out", tmp_path / name, "--steps", 0, "--max-passages", 400,
                "--width", 128 + 64 * seed, "--vocab", 4000, "--seed", seed]
        subprocess.run(list(map(str, make)), check=True, capture_output=True)
    weights, depth = [1.0, 0.6], 40
    mine(["--data", str(tmp_path / "data"), "--retrievers", str(tmp_path / "first"), str(tmp_path / "second"), "--weights", "1", "0.6",
          "--cache", str(tmp_path / "cache"), "--device", "cpu", "--out", str(tmp_path / "out.jsonl")])
    found, corpus = read(tmp_path / "out.jsonl"), read(tmp_path / "data/corpus/sw.jsonl")
    scores = 0
    for weight, name in zip(weights, ("first", "second")):
        model = SentenceTransformer(str(tmp_path / name), device="cpu")
        model.max_seq_length = 256
        passages = model.encode([f"{p['title']}\n{p['text']}" for p in corpus]).astype(np.float64)
        model.max_seq_length = 64
        queries = model.encode([r["query"] for r in found]).astype(np.float64)
        scores = scores + weight * queries @ passages.T
    plain = [" ".join(unicodedata.normalize("NFKC", p["text"]).casefold().split()) for p in corpus]
    place = {p["docid"]: i for i, p in enumerate(corpus)}
    for record, row in zip(found, scores, strict=True):
        positives = {place[p["docid"]] for p in record["positive_passages"]}
        texts = {plain[i] for i in positives}
        allowed = [i for i in range(len(corpus)) if i not in positives and plain[i] not in texts]
        best = sorted(allowed, key=lambda i: -row[i])[:depth]
        ours = [place[p["docid"]] for p in record["candidate_passages"]]
        assert len(ours) == depth
        assert np.abs(np.array([p["score"] for p in record["candidate_passages"]]) - row[ours]).max() < 1e-3
        for i in set(ours) ^ set(best):  # only a tie at the last place, at the precision of fp16 vectors
            assert abs(row[i] - row[best[-1]]) < 5e-4
