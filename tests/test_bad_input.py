"""What no stage may let through: each malformed input ends with exit status 2 and one line, nothing written.

    BAD_INPUT_TABLE=inputs.md python -m pytest tests/test_bad_input.py     writes inputs and messages down
"""

import csv
import gc
import json
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from conftest import load_stage, run_stage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import sentence_transformers_files, word_model

import common

STAGES = {
    "00": "00_prepare_data",
    "01": "01_mine_candidates",
    "02": "02_filter_false_negatives",
    "02a": "02a_check_judge",
    "03": "03_generate_negatives",
    "03a": "03a_tune_generator",
    "04": "04_cluster_topics",
    "05": "05_train",
    "05a": "05a_export",
    "06": "06_eval",
    "06a": "06a_report",
    "make": "sample/make_encoder",
    "offline": "offline_llm",
}
LOADED = {}  # {stage: its module}
NOWHERE = "--llm judge --base-url http://127.0.0.1:9/v1"  # nothing listens: no case gets so far
COMMANDS = {
    "00 beir": "--source beir --root beir --lang sw --out out/data",
    "00 squad": "--source squad --root squad --out out/data",
    "00 tevatron": "--source tevatron --root data --out out/data",
    "00 miracl": "--source miracl --root miracl --out out/data",
    "01": "--data data --retrievers bm25 model --fusion rrf --depth 2 --out out/candidates.jsonl",
    "02": f"--input candidates.jsonl {NOWHERE} --out out/filtered.jsonl",
    "02 import": f"--input candidates.jsonl {NOWHERE} --batch-import answers.jsonl --out out/filtered.jsonl",
    "02a calibrate": f"calibrate --input candidates.jsonl {NOWHERE} --out out/pairs.jsonl",
    "02a sample": "sample --input filtered.jsonl --out out/sheet.csv",
    "02a score": "score sheet.csv --key key.csv",
    "03": f"--input filtered.jsonl --data data --retrievers bm25 --target 3 {NOWHERE} --out out/more.jsonl",
    "03a translate": f"--instructions chat.jsonl --translate sw {NOWHERE} --out out/mift.jsonl",
    "03a tune": "--base model --instructions alpaca.json --out out/generator",
    "04": "--input topics.jsonl --encoder model --topics 2 --out out/topics.jsonl",
    "05": "--input topics.jsonl --encoder model --negatives 2 --batch-size 2 --max-steps 1 --out out/model",
    "05a": "--input topics.jsonl --layout tevatron --out out/exported",
    "06": "--data data --models bm25 model --baseline bm25 --out out/eval",
    "06a": "--run run --out out/report",
    "make": "--data data --out out/model --steps 1 --vocab 300 --width 8",
    "offline": "",
}
# the file of training queries that a command reads, with all the fields that it needs
READERS = {
    "00 tevatron": "data/train.jsonl",
    "01": "data/train.jsonl",
    "02": "candidates.jsonl",
    "02a calibrate": "candidates.jsonl",
    "02a sample": "filtered.jsonl",
    "03": "filtered.jsonl",
    "04": "topics.jsonl",
    "05": "topics.jsonl",
    "05a": "topics.jsonl",
    "06": "data/dev.jsonl",
    "06a": "run/topics.jsonl",
}
FOLDER = object()  # instead of a file
WORDS = "Mji mkuu wa Kenya ni Nairobi mto ziwa ไทย เมือง แม่น้ำ ทะเล".split()


# --------------------------------------------------------------------------- a small run, and what ends it


def lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def passage(number, lang="sw", **more):
    text = f"{WORDS[number % 12]} {WORDS[(number + 3) % 12]} {number}"
    return {"docid": f"{lang}{number}#0", "title": f"T{number}", "text": text} | more


def query(number, lang, **more):
    record = {
        "query_id": f"q{number}",
        "lang": lang,
        "query": f"{WORDS[number]} {WORDS[number + 1]}?",
        "positive_passages": [passage(number, lang)],
        "negative_passages": [passage(n, lang, source="human") for n in (6, 7)],
    }
    return record | more


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder in which every command ends well; its cache holds vectors and an index."""
    top = tmp_path_factory.mktemp("whole")
    queries = [query(n, lang) for lang in ("sw", "th") for n in (1, 2, 3)]
    mined = [passage(4, score=0.5, ranks={"bm25": 1})]
    gone = [passage(5, grade=2, accuracy=2, completeness=2)]
    squad = [{"context": "Nairobi.", "qas": [{"id": f"s{n}", "question": "Nani?"}]} for n in (1, 2)]
    scores = {lang: {"ndcg@10": 0.5, "recall@100": 0.5, "queries": 3} for lang in ("sw", "th", "avg")}
    parted = {"negative_passages": [passage(8)], "false_negatives": gone}
    told = {"models": {"bm25": scores, "model": scores}, "tests": [], "settings": {"zero_shot": []}}
    counts = {"counts": {"by_lang": {"sw": {"judged": 3, "removed": 1}}}, "arguments": {"llm": "judge"}}
    texts = {
        "data/train.jsonl": lines(*queries),
        "data/dev.jsonl": lines(*(q | {"query": q["query"] + " lini"} for q in queries)),
        "candidates.jsonl": lines(*(q | {"candidate_passages": mined} for q in queries)),
        "filtered.jsonl": lines(*(q | parted for q in queries)),
        "topics.jsonl": lines(*(q | {"topic": n % 2} for n, q in enumerate(queries))),
        "beir/corpus.jsonl": lines(*({"_id": f"b{n}"} | passage(n) for n in range(9))),
        "beir/queries.jsonl": lines(*({"_id": f"q{n}", "text": f"Nani {n}?"} for n in range(4))),
        "beir/qrels/dev.tsv": "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\tb{n}\t1\n" for n in range(4)),
        "squad/x.sw.json": json.dumps({"data": [{"title": "T", "paragraphs": squad}]}),
        "answers.jsonl": lines({"custom_id": "0" * 32, "response": {"body": {}}, "error": None}),
        "chat.jsonl": lines({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}),
        "alpaca.json": json.dumps([{"instruction": "Summarise.", "input": "x", "output": "y"}] * 3),
        "sheet.csv": "item,relevant\nsw-1,1\nsw-2,0\n",
        "key.csv": "item,lang,removed\nsw-1,sw,1\nsw-2,sw,0\n",
        "run/topics.jsonl": lines(*(q | {"topic": n % 2} for n, q in enumerate(queries))),
        "run/eval/metrics.json": json.dumps(told),
        "run/filtered.jsonl.meta.json": json.dumps(counts),
        "run/model/train_log.jsonl": lines(*({"step": n, "loss": 1 / n} for n in range(1, 9))),
    }
    for lang in ("sw", "th"):
        texts[f"data/corpus/{lang}.jsonl"] = lines(*(passage(n, lang) for n in range(10)))
        texts[f"data/qrels/dev/{lang}.tsv"] = "".join(f"q{n}\t0\t{lang}{n}#0\t1\n" for n in (1, 2, 3))
        for split in ("train", "dev"):
            topics, qrels = (f"miracl/miracl/miracl-v1.0-{lang}/{kind}/{kind}.miracl-v1.0-{lang}-{split}.tsv"
                             for kind in ("topics", "qrels"))  # fmt: skip
            texts[topics] = "".join(f"{split}{n}\tNani {n} {split}?\n" for n in (1, 2))
            texts[qrels] = "".join(f"{split}{n}\tQ0\t{lang}{n}#0\t1\n" for n in (1, 2))
        docs = f"miracl/miracl-corpus/miracl-corpus-v1.0-{lang}/docs-0.jsonl"
        texts[docs] = lines(*(passage(n, lang) for n in range(9)))
    for name, text in texts.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text, "utf-8")
    sentence_transformers_files(word_model(top / "model", WORDS), "mean", True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    here = os.getcwd()
    os.chdir(top)
    main("01", COMMANDS["01"].split())
    main("06", COMMANDS["06"].split())
    shutil.rmtree("out")
    os.chdir(here)
    return top


def main(command, argv):
    stage = STAGES[command.split()[0]]
    if stage not in LOADED:
        LOADED[stage] = load_stage(stage)
    sys.argv[0] = f"{stage}.py"
    return LOADED[stage].main(argv)


@pytest.fixture
def work(whole, tmp_path, monkeypatch):
    """A copy of that folder, deep enough that "../.." is still inside tmp_path, as the working directory."""
    top = tmp_path / "a/b/work"
    shutil.copytree(whole, top)
    monkeypatch.chdir(top)
    monkeypatch.setattr(sys, "argv", [""])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield top
    for number, handler in handlers.items():
        signal.signal(number, handler)


def put(files):
    """Change files: new content, a function of the old one, a FOLDER, or None: gone. Names may have a *."""
    for name, content in files.items():
        for path in sorted(Path().glob(name)) or [Path(name)]:
            content_now = content
            if callable(content):
                content_now = content(path.read_bytes() if binary(path) else path.read_text("utf-8"))
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            if content_now is FOLDER:
                path.mkdir()
            elif isinstance(content_now, bytes):
                path.write_bytes(content_now)
            elif content_now is not None:
                path.write_text(content_now, "utf-8")


def binary(path):
    return path.suffix in (".npy", ".safetensors") or "bm25" in path.parts


def contents(top):
    """{path: bytes} of all files but the cache's and locks."""
    paths = [path for path in top.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in paths
            if "cache" not in path.relative_to(top).parts and path.suffix != ".lock"}  # fmt: skip


def steers(text):
    """Whether a terminal would obey some of a text, or show it in another order."""
    return any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in "\u202a\u202b\u202d\u202e\u2067"
               for c in text.replace("\n", ""))  # fmt: skip


def ends(command, flags, capsys):
    """(exit status, what stands on stderr) of a command with more flags, in this process."""
    capsys.readouterr()
    gc.disable()  # else garbage of earlier tests may be closed deep in a recursion, which tells it on stderr
    try:
        with pytest.raises(SystemExit) as ended:
            common.run(lambda: main(command, [*COMMANDS[command].split(), *flags]))
    finally:
        gc.enable()
    return ended.value.code or 0, capsys.readouterr().err


def refused(command, flags, top, capsys, late=False):
    """The one line with which a command refuses its input, leaving everything as it was.

    late: a stage has told something before, for it could know only after some of the work.
    """
    before = contents(top)
    started = time.monotonic()
    status, said = ends(command, flags, capsys)
    assert time.monotonic() - started < 10
    assert status == 2, said
    before_it, _, said = said.rpartition("\n")[0].rpartition("\n")
    assert bool(before_it) == late, before_it
    assert len(said) < 1500 and not steers(said), said
    assert "; " in said and "Traceback" not in said + before_it, said
    assert contents(top) == before
    return said


def told(name, said):
    """A row of the table that BAD_INPUT_TABLE names."""
    if "BAD_INPUT_TABLE" in os.environ:
        with open(os.environ["BAD_INPUT_TABLE"], "a", encoding="utf-8") as file:
            file.write(f"| `{name.replace('|', '/')}` | `{said.replace('|', '/')}` |\n")


# --------------------------------------------------------------------------- a bad record, in every stage


def second(**fields):
    """The second record with other fields; None: without them."""

    def change(text):
        first, line, *rest = text.splitlines(keepends=True)
        record = {key: value for key, value in (json.loads(line) | fields).items() if value is not None}
        return "".join([first, json.dumps(record) + "\n", *rest])

    return change


def positive(**fields):
    """The same of its positive passage."""
    return lambda text: second(positive_passages=[passage(2) | fields])(text)


def line(content):
    """These bytes as the second line."""

    def change(text):
        first, _, *rest = text.encode().splitlines(keepends=True)
        return b"".join([first, content + b"\n", *rest])

    return change


RECORDS = {
    "UTF-16": (lambda text: text.encode("utf-16"), ":1: not valid UTF-8"),
    "UTF-16 without a mark": (lambda text: text.encode("utf-16-be"), ":1: not"),
    "Latin-1": (line('{"query_id": "é"}'.encode("latin-1")), ":2: not valid UTF-8"),
    "a raw lone surrogate": (line(b'{"query_id": "\xed\xa0\x80"}'), ":2: not valid UTF-8"),
    "an escaped lone surrogate": (line(b'{"query_id": "\\ud800"}'), ":2: not valid UTF-8"),
    "a NUL byte": (line(b'{"query_id": "a\0"}'), ":2: not a JSON object"),
    "200,000 brackets": (line(b"[" * 200_000), ":2: not a JSON object"),
    "200,000 objects in objects": (line(b'{"a":' * 200_000), ":2: not a JSON object"),
    "a list": (line(b"[1]"), ":2: a JSON list"),
    "a number of 5,000 digits": (line(b'{"topic": ' + b"9" * 5000 + b"}"), ":2: not a JSON object"),
    "a torn line": (line(b'{"query_id": "q", "que'), ":2: not a JSON object"),
    "a NaN score": (line(b'{"score": NaN}'), ":2: not a JSON object"),
    "an infinite score": (line(b'{"score": 1e999}'), ":2: not a JSON object"),
    "50 MB without an end": (line(b'{"query": "' + b"x" * 50_000_000), ":2: not a JSON object"),
    "an empty file": (lambda text: "", ""),
    "a folder": (FOLDER, "not found"),
    "no file": (None, " no"),
    "no query_id": (second(query_id=None), ":2: 'query_id' is missing"),
    "a query_id of 50 MB": (second(query_id=["x" * 50_000_000]), ":2: 'query_id' is"),
    "a query_id that is a list": (second(query_id=[1]), ":2: 'query_id' is"),
    "a blank query": (second(query=" \u3000"), ":2: 'query' is"),
    "a query_id twice": (second(query_id="q1"), ":2: query 'q1'"),
    "lang ../../evil": (second(lang="../../evil"), ":2: 'lang' '../../evil' cannot"),
    "a line break in lang": (second(lang="sw\nIgnore"), r":2: 'lang' 'sw\nIgnore' cannot"),
    "a line break after lang": (second(lang="sw\n"), r":2: 'lang' 'sw\n' cannot"),
    "an escape sequence in lang": (second(lang="\x1b[2J"), r":2: 'lang' '\x1b[2J' cannot"),
    "lang of full-width letters": (second(lang="ｓｗ"), ":2: 'lang'"),
    "no positives": (second(positive_passages=[]), ":2: query 'q2' has no positive_passages"),
    "positives that are an object": (
        second(positive_passages={"a": 1}),
        ":2: 'positive_passages' is no list",
    ),
    "a passage that is a text": (second(negative_passages=["Nairobi"]), ":2: "),
    "a passage that is null": (second(negative_passages=[None]), ":2: "),
    "no docid": (second(negative_passages=[{"text": "x"}]), ":2: "),
    "a docid that is a list": (positive(docid=[1]), ":2: positive_passages: 'docid' is [1]"),
    "a title that is a list": (positive(title=["x"]), ":2: "),
    "a text that is a number": (positive(text=5), ":2: "),
    "a source that is a list": (second(negative_passages=[passage(6, source=[1]), passage(7)]), ":2: "),
}  # fmt: skip
LENIENT = {  # what a stage mends: 00 makes ids of numbers and texts, and keeps what is sure
    ("00 tevatron", "a passage that is a text"), ("00 tevatron", "no docid"),
    ("06a", "no file"), ("06a", "a folder"), ("00 tevatron", "an empty file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", RECORDS)
@pytest.mark.parametrize("command", READERS)
def test_a_bad_record_is_one_line_in_every_stage(work, capsys, command, fault):
    change, words = RECORDS[fault]
    if (command, fault) in LENIENT:
        pytest.skip("not bad for this stage")
    path = READERS[command]
    put({path: change})
    said = refused(command, [], work.parent.parent.parent, capsys)
    told(f"{command}: {fault}", said)
    assert words in said and (fault == "no file" or Path(path).name in said)


# --------------------------------------------------------------------------- other files, flags, folders


def cut(share):
    """Files of that share of their bytes."""
    return lambda data: data[: int(share * len(data))]


def add(text):
    return lambda before: before + text


def asked(more):
    """A file of SQuAD's with one question, which has more."""
    return f'[{{"context": "x", "qas": [{{"id": "1", "question": "?", {more}}}]}}]'


def in_language(lang):
    return lambda text: lines(json.loads(text) | {"lang": lang})


CASES = [  # (command, what is wrong: {file: content} or [flags], what the line must hold; after "…": late)
    # 00: layouts of others
    ("00 beir", {"beir/corpus.jsonl": add('{"_id": "b 1", "text": "x"}\n')},
     "corpus.jsonl:10: id 'b 1' has white space"),
    ("00 beir", {"beir/corpus.jsonl": add('{"_id": "b\\t1", "text": "x"}\n')},
     r"corpus.jsonl:10: id 'b\t1' has white"),
    ("00 beir", {"beir/corpus.jsonl": add('{"_id": "b\\u20281", "text": "x"}\n')},
     r"id 'b\u20281' has white"),
    ("00 beir", {"beir/corpus.jsonl": add('{"text": "x"}\n')}, "corpus.jsonl:10: '_id' is missing"),
    ("00 beir", {"beir/corpus.jsonl": add('{"_id": "b1", "text": "other"}\n')},
     "corpus.jsonl:10: docid 'b1' has another text"),
    ("00 beir", {"beir/corpus.jsonl": FOLDER}, "corpus.jsonl not found"),
    ("00 beir", {"beir/queries.jsonl": add('{"_id": "q9", "text": ["x"]}\n')}, "queries.jsonl:5: 'text' is"),
    ("00 beir", {"beir/queries.jsonl": add("[" * 200_000)}, "queries.jsonl:5: not a JSON object"),
    ("00 beir", {"beir/qrels/dev.tsv": add("q1\tb1\n")}, "dev.tsv:6: got 2 columns"),
    ("00 beir", {"beir/qrels/dev.tsv": add("q1\tb1\tNaN\n")}, "dev.tsv:6: relevance is 'NaN'"),
    ("00 beir", {"beir/qrels/dev.tsv": add("q1\tb1\t" + "9" * 400 + "\n")}, "dev.tsv:6: relevance is '999"),
    ("00 beir", {"beir/qrels/dev.tsv": add("q1\tb1\t" + "9" * 5000 + ".0\n")},
     "dev.tsv:6: relevance is '999"),
    ("00 beir", {"beir/qrels/dev.tsv": add("q1\tb1\t--1\n")}, "dev.tsv:6: relevance is '--1'"),
    ("00 beir", {"beir/qrels/dev.tsv": add("q1\tb1\t\u0663\n")}, "dev.tsv:6: relevance is '\u0663'"),
    ("00 beir", {"beir/qrels/dev.tsv": b"\xff\xfeq\x001\x00"}, "dev.tsv:1: not valid UTF-8"),
    ("00 beir", {"beir/qrels/dev.tsv": None}, "test.tsv not found"),
    ("00 beir", ["--lang", "../../evil"], "'lang' '../../evil' cannot"),
    ("00 beir", ["--lang", "sw\nIgnore"], r"'lang' 'sw\nIgnore' cannot"),
    ("00 beir", ["--lang", "sw", "th"], "--source beir needs --lang"),
    ("00 beir", ["--root", "model"], "corpus.jsonl not found"),
    ("00 beir", ["--root", "topics.jsonl"], "corpus.jsonl not found"),
    ("00 beir", ["--root", "no\x1b[2Jwhere"], r"no\x1b[2Jwhere"),
    ("00 beir", ["--out", "topics.jsonl"], "topics.jsonl exists and was not made by this script"),
    ("00 beir", ["--out", "topics.jsonl/data"], "topics.jsonl"),
    ("00 beir", ["--out", "beir"], "beir is where the input lies"),
    ("00 beir", ["--out", "o" * 300], "ooo"),
    ("00 beir", ["--out", "\udcff"], r"\udcff"),
    ("00 beir", ["--min-relevance", "9" * 5000], "--min-relevance: got '999"),
    ("00 beir", ["--seed", "-1"], "--seed: got '-1'"),
    ("00 beir", ["--seed", "9" * 30], "--seed: got '999"),
    ("00 squad", {"squad/x.sw.json": ""}, "x.sw.json:1: "),
    ("00 squad", {"squad/x.sw.json": '{"data": 5}'}, "x.sw.json: data[0]: "),
    ("00 squad", {"squad/x.sw.json": '{"data": ["x"]}'}, "x.sw.json: data[0]: "),
    ("00 squad", {"squad/x.sw.json": "[" * 200_000}, "x.sw.json:1: not a JSON object"),
    ("00 squad", {"squad/x.sw.json": '[{"title": ["T"], "paragraphs": []}]'}, "x.sw.json: data[0]: "),
    ("00 squad", {"squad/x.sw.json": '[{"context": 5, "qas": [{"id": "1", "question": "?"}]}]'},
     "'context' is 5"),
    ("00 squad", {"squad/x.sw.json": asked('"answers": 5')},
     "data[0]: "),
    ("00 squad", {"squad/x.sw.json": asked('"answers": [{"text": 5}]')},
     "data[0]: "),
    ("00 squad", {"squad/x.sw.json": '[{"context": "x", "qas": [{"id": "1\\n2", "question": "?"}]}]'},
     r"id '1\n2' has white space"),
    ("00 squad", {"squad/evil.json": "[]"}, "evil.json: want NAME.CODE.json"),
    ("00 squad", ["--lang", "xx"], "squad: no xx there, but sw"),
    ("00 tevatron", {"data/corpus/sw.jsonl": cut(0.5)}, "sw.jsonl:"),
    ("00 tevatron", {"data/train.jsonl": second(positive_passages=None, pos=[1])}, "train.jsonl:2: "),
    ("00 miracl", {"miracl/miracl-corpus/miracl-corpus-v1.0-sw/docs-9.jsonl": "{}"},
     "docs-1.jsonl not found"),
    ("00 miracl", {"miracl/miracl/*sw/topics/*dev*": "x"}, "dev.tsv:1: 'text' is missing"),
    # 01, and what 01, 03, 04, 05 and 06 share: corpora, models, the cache
    ("01", {"data/corpus/sw.jsonl": add("[" * 200_000)}, "sw.jsonl:11: not a JSON object"),
    ("01", {"data/corpus/sw.jsonl": add('{"docid": "n", "text": "\\udfff"}\n')},
     "sw.jsonl:11: not valid UTF-8"),
    ("01", {"data/corpus/sw.jsonl": add('{"docid": "n", "title": 1, "text": "x"}\n')},
     "sw.jsonl:11: passage 'n': 'title' is 1"),
    ("01", {"data/corpus/sw.jsonl": add(lines(passage(1)))}, "docid 'sw1#0' is there twice"),
    ("01", {"data/corpus/sw.jsonl": ""}, "sw.jsonl: no passages"),
    ("01", {"data/corpus/sw.jsonl": FOLDER}, "sw.jsonl not found"),
    ("01", ["--data", "topics.jsonl"], "topics.jsonl/train.jsonl not found"),
    ("01", ["--lang", "../../evil"], "'lang' '../../evil' cannot"),
    ("01", ["--lang", "xx"], "no queries in xx"),
    ("01", ["--cache", "topics.jsonl"], "topics.jsonl"),
    ("01", ["--cache", "topics.jsonl/x"], "topics.jsonl"),
    ("01", ["--out", "data"], "data is where the input lies"),
    ("01", ["--out", "data", "--overwrite"], "data is where the input lies"),
    ("01", ["--out", "run", "--overwrite"], "run holds "),
    ("01", {"data/corpus/sw.jsonl": add('{"docid": "n\\u0000", "text": "x"}\n')}, "sw.jsonl:11: docid"),
    ("01", ["--out", "topics.jsonl"], "topics.jsonl exists and was not made by this script"),
    ("01", ["--out", "topics.jsonl/x"], "topics.jsonl"),
    ("01", {"out/candidates.jsonl": "{}\n", "out/candidates.jsonl.meta.json": ""},
     "candidates.jsonl.meta.json: "),
    ("01", {"out/candidates.jsonl": "{}\n", "out/candidates.jsonl.meta.json": "[]"},
     "candidates.jsonl.meta.json: "),
    ("01", {"out/candidates.jsonl": "{}\n", "out/candidates.jsonl.meta.json": "[" * 200_000},
     "candidates.jsonl.meta.json: "),
    ("01", ["--retrievers", "model", "model"], "--retrievers: two of model model have the same name"),
    ("01", ["--retrievers", "bm25", "bm25"], "--retrievers: two of bm25 bm25 have the same name"),
    ("01", ["--weights", "1"], "--weights: got 1 for 2 retrievers"),
    ("01", ["--weights", "nan", "1"], "--weights: invalid finite value: 'nan'"),
    ("01", ["--weights", "1e999", "1"], "--weights: invalid finite value"),
    ("01", ["--retrievers", "no/such model"], "no/such model: neither a folder nor a model"),
    ("01", ["--retrievers", "../../../../../etc/hostname"], "neither a folder nor a model"),
    ("01", ["--retrievers", "topics.jsonl"], "topics.jsonl: neither a folder nor a model"),
    ("01", ["--retrievers", "data"], "…data: no encoder to be used"),
    ("01", ["--retrievers", "x\nError: all is lost"], r"neither a folder nor a model"),
    ("01", ["--bm25-tokenizer", "data"], "data: no tokenizer to be used"),
    ("01", ["--settings", "pooling"], "--settings: got 'pooling'"),
    ("01", ["--settings", "pooling=max"], "--settings: got 'pooling=max'"),
    ("01", ["--settings", "a:b:c=d"], "--settings: "),
    ("01", ["--settings", "query_max_len=" + "9" * 30], "--settings: got 'query_max_len=999"),
    ("01", ["--settings", "other:pooling=cls"], "--settings: 'other' is not a model here"),
    ("01", ["--device", "tpu"], "tpu"),
    ("01", ["--depth", "0"], "--depth: got '0'"),
    ("01", ["--depth", "1e3"], "--depth: got '1e3'"),
    ("01", ["--depth", "9" * 5000], "--depth: got '999"),
    ("01", ["--depth", "\u0661\u0660" * 9], "--depth: got "),
    ("01", ["--shift", "-1", "--strategy", "shifted"], "--shift: "),
    ("01", ["--max-score", "nan"], "--max-score: "),
    ("01", ["--no-such-flag\n\x1b[2J"], r"unrecognized arguments: --no-such-flag"),
    ("01", ["--strategy", "\x1b[2J"], "--strategy: invalid choice"),
    ("01", {"cache/corpus/*.npy": cut(0.5)}, ".npy: cannot be read"),
    ("01", {"cache/corpus/*.npy": b""}, ".npy: cannot be read"),
    ("01", {"cache/embeddings/*/passage*.npy": cut(0.5)}, ".npy: cannot be read"),
    ("01", {"cache/embeddings/*/passage*.npy": b"\x93NUMPY"}, ".npy: cannot be read"),
    ("01", {"cache/embeddings/*/passage*.cut": ""}, "….cut: cannot be read"),
    ("01", {"cache/embeddings/*/passage*.cut": None}, "….cut: cannot be read"),
    ("01", {"cache/embeddings/*/query*.cut": "1 2"}, "….cut: cannot be read"),
    ("01", {"cache/embeddings/*/*.json": cut(0.5)}, "….json: no settings to be used"),
    ("01", {"cache/embeddings/*/*.json": "{}"}, "….json: no settings to be used"),
    ("01", {"cache/bm25/*/*": ""}, "cache/bm25/"),
    ("01", {"cache/bm25/*/*": None}, "cache/bm25/"),
    ("01", {"cache/bm25/*/*": cut(0.5)}, "cache/bm25/"),
    ("04", {"model/config.json": "[]"}, "model"),
    ("04", {"model/config.json": ""}, "model"),
    ("04", {"model/config_sentence_transformers.json": "[]"}, "config_sentence_transformers.json"),
    ("04", {"model/config_sentence_transformers.json": '{"prompts": ["x"]}'}, "model"),
    ("04", {"model/config_sentence_transformers.json": '{"prompts": {"document": 5}}'}, "model"),
    ("04", {"model/config_sentence_transformers.json": '{"similarity_fn_name": ["x"]}'},
     "model: no settings"),
    ("04", {"model/modules.json": "{}"}, "model: no encoder"),
    ("04", {"model/model.safetensors": cut(0.5), "cache": None}, "model: no encoder"),
    ("04", {"model/tokenizer.json": "[" * 200_000}, "model: no encoder"),
    ("04", ["--topics", "-3"], "--topics: got '-3'"),
    ("04", ["--seed", "1.5"], "--seed: got '1.5'"),
    ("04", ["--encoder", ""], "…no encoder to be used"),
    # 02, 02a, 03, 03a: the server and its cache
    ("02", ["--base-url", "nonsense"], "--base-url or OPENAI_BASE_URL is 'nonsense'"),
    ("02", ["--base-url", "http://"], "http"),
    ("02", ["--base-url", "http://[::1"], "http"),
    ("02", ["--base-url", "http://x\ny/v1"], "http"),
    ("02", ["--llm", "m" * 300], "mmm"),
    ("02", ["--cache", "topics.jsonl"], "topics.jsonl"),
    ("02", {"cache/llm/judge.sqlite": FOLDER}, "judge.sqlite"),
    ("02", {"cache/llm/judge.sqlite": "no database, but longer than the head of one" * 9},
     "judge.sqlite: file is not a database"),
    ("02", ["--llm-settings", "[]"], "--llm-settings: "),
    ("02", ["--llm-settings", "5"], "--llm-settings: "),
    ("02", ["--llm-settings", '{"temperature": NaN}'], "--llm-settings: "),
    ("02", ["--llm-settings", "[" * 100_000], "--llm-settings: "),
    ("02", ["--llm-settings", "\x1b[2J"], "--llm-settings: "),
    ("02", ["--votes", "9" * 9], "--votes: got '999999999'"),
    ("02", ["--drop-at", "3"], "--drop-at: invalid choice"),
    ("02", ["--max-unjudged", "nan"], "--max-unjudged: "),
    ("02", ["--price-in", "nan"], "--price-in: "),
    ("02", ["--timeout", "inf"], "--timeout: "),
    ("02", ["--batch-export", "data", "--overwrite"], "data"),
    ("02 import", {"answers.jsonl": "[]\n"}, "answers.jsonl:1: a JSON list"),
    ("02 import", {"answers.jsonl": '{"custom_id": 5}\n'}, "answers.jsonl:1: no batch result"),
    ("02 import", {"answers.jsonl": '{"custom_id": "a", "response": "x"}\n'},
     "answers.jsonl:1: no batch result"),
    ("02 import", {"answers.jsonl": add("[" * 200_000)}, "answers.jsonl:2: not a JSON object"),
    ("02 import", {"answers.jsonl": FOLDER}, "answers.jsonl not found"),
    ("02a calibrate", ["--out", "data", "--overwrite"], "data"),
    ("02a calibrate", ["--pairs", "x"], "--pairs: got 'x'"),
    ("02a sample", ["--out", "data"], "data exists"),
    ("02a score", {"sheet.csv": "item,relevant\nsw-1,maybe\n"}, "sheet.csv:2: relevant is 'maybe'"),
    ("02a score", {"sheet.csv": "item,relevant\n\x1b[2J,1\n"}, r"sheet.csv:2: item '\x1b[2J' is not in"),
    ("02a score", {"sheet.csv": "item,relevant\nsw-1,1\nsw-1,0\n"},
     "sheet.csv:3: item 'sw-1' is there twice"),
    ("02a score", {"sheet.csv": ""}, "sheet.csv:1: column 'item' is missing"),
    ("02a score", {"sheet.csv": "item,relevant\n".encode("utf-16")}, "sheet.csv: no CSV file in UTF-8"),
    ("02a score", {"sheet.csv": "item,relevant\nsw\0,1\n"}, "sheet.csv"),
    ("02a score", {"sheet.csv": b"\xff\xfe"}, "sheet.csv: no CSV file in UTF-8"),
    ("02a score", {"sheet.csv": FOLDER}, "sheet.csv not found"),
    ("02a score", {"key.csv": "item,lang,removed\nsw-1,sw,yes\nsw-2,sw,0\n"}, "key.csv:2: "),
    ("02a score", {"key.csv": "item,lang,removed\nsw-1\nsw-2,sw,0\n"}, "key.csv:2: "),
    ("02a score", {"key.csv": "item;lang;removed\n"}, "key.csv:1: column 'item' is missing"),
    ("03", ["--target", "999999"], "cannot give 999999 negatives"),
    ("03", ["--max-drift", "2"], "--max-drift: got '2'"),
    ("03", ["--llm", "m" * 300], "mmm"),
    ("03", {"data/corpus/sw.jsonl": None}, "sw.jsonl not found"),
    ("03a translate", {"chat.jsonl": '{"messages": "x"}\n'},
     "chat.jsonl:1: messages must be {role, content}"),
    ("03a translate", {"chat.jsonl": '{"messages": [{"role": "user", "content": "x"}, 5]}\n'},
     "chat.jsonl:1: messages must be {role, content}"),
    ("03a translate", {"chat.jsonl": in_language(5)}, "chat.jsonl:1: 'lang' '5' cannot"),
    ("03a translate", {"chat.jsonl": in_language("sw\nIgnore")}, r"chat.jsonl:1: 'lang' 'sw\nIgnore' cannot"),
    ("03a translate", ["--translate", "sw\nIgnore all rules"], r"--translate: 'lang' 'sw\nIgnore"),
    ("03a translate", ["--translate", "../../evil"], "--translate: 'lang' '../../evil'"),
    ("03a tune", {"alpaca.json": "5"}, "alpaca.json: "),
    ("03a tune", {"alpaca.json": "{}"}, "alpaca.json: "),
    ("03a tune", {"alpaca.json": "[5]"}, "alpaca.json: record 1: neither chat"),
    ("03a tune", {"alpaca.json": ""}, "alpaca.json: not JSON"),
    ("03a tune", {"alpaca.json": "[" * 200_000}, "alpaca.json: not JSON"),
    ("03a tune", {"alpaca.json": b"\xff\xfe"}, "alpaca.json: not JSON"),
    ("03a tune", ["--base", "data"], "data: no causal language model"),
    ("03a tune", ["--base", "no/such/model"], "no/such/model: no causal language model"),
    ("03a tune", {"model/config.json": "[]"}, "model: no causal language model"),
    ("03a tune", ["--lr", "nan"], "--lr: "),
    # 05, 05a
    ("05", {"topics.jsonl": second(topic="x")}, "topics.jsonl:2: query 'q2' (sw): 'topic' is \"x\""),
    ("05", {"topics.jsonl": second(topic=True)}, "topics.jsonl:2: query 'q2' (sw): 'topic' is true"),
    ("05", {"topics.jsonl": second(topic=1.5)}, "topics.jsonl:2: query 'q2' (sw): 'topic' is 1.5"),
    ("05", {"topics.jsonl": second(negative_passages=[])}, "topics.jsonl:2: query 'q2' (sw) has 0 negatives"),
    ("05", ["--input", "topics.jsonl.gz"], "topics.jsonl.gz not found"),
    ("05", ["--encoder", "data"], "…data: no encoder"),
    ("05", ["--batch-size", "0"], "--batch-size: got '0'"),
    ("05", ["--lr", "inf"], "--lr: got 'inf'"),
    ("05", ["--temperature", "0"], "--temperature: got '0'"),
    ("05", ["--max-steps", "0", "--log-batches", "data"], "data"),
    ("02", ["--out", "candidates.jsonl", "--overwrite"], "candidates.jsonl is where the input lies"),
    ("04", ["--out", "topics.jsonl", "--overwrite"], "topics.jsonl is where the input lies"),
    ("04", ["--out", "model/topics.jsonl"], "model/topics.jsonl lies in the model model"),
    ("01", ["--retrievers", "model", "--out", "model/candidates.jsonl"], "lies in the model model"),
    ("04", ["--out", "filtered.jsonl"], "filtered.jsonl exists and was not made by this script"),
    ("04", {"filtered.jsonl.meta.json": '{"script": "02_filter_false_negatives.py"}', "out/topics.jsonl": "x",
            "out/topics.jsonl.meta.json": '{"script": "01_mine_candidates.py"}'},
     "topics.jsonl exists and was not made by this script"),
    ("05", ["--out", "topics.jsonl"], "topics.jsonl is where the input lies"),
    ("05", ["--dtype", "int4"], "--dtype: invalid choice"),
    ("05", {"out/model.checkpoint/last.pt": b"torn"}, "last.pt"),
    ("05a", ["--layout", "other"], "--layout: invalid choice"),
    ("05a", {"topics.jsonl": second(negative_passages=[])}, "topics.jsonl: sw query 'q2' has no negatives"),
    ("05a", ["--out", "topics.jsonl/x"], "topics.jsonl"),
    # 06, 06a
    ("06", {"data/qrels/dev/sw.tsv": "q1\t0\tsw1#0\t--1\n"}, "sw.tsv:1: "),
    ("06", {"data/qrels/dev/sw.tsv": "q1\t0\tsw1#0\n"}, "sw.tsv:1: relevance is 'sw1#0'"),
    ("06", {"data/qrels/dev/sw.tsv": "q1\t0\tsw1#0\t" + "9" * 5000 + "\n"}, "sw.tsv:1: "),
    ("06", {"data/qrels/dev/sw.tsv": "q1\t0\tsw1#0\t" + "9" * 20 + "\n"}, "sw.tsv:1: "),
    ("06", {"data/qrels/dev/sw.tsv": "q1\t0\tsw1#0\t1.5\n"}, "sw.tsv:1: "),
    ("06", {"data/qrels/dev/sw.tsv": "q1\tsw1#0\n"}, "sw.tsv:1: got 2 columns"),
    ("06", {"data/qrels/dev/sw.tsv": "q1\t0\tsw1#0\t1\n".encode("utf-16")}, "sw.tsv:1: "),
    ("06", {"data/qrels/dev/sw.tsv": ""}, "sw.tsv: no query with a relevant passage"),
    ("06", {"data/qrels/dev/sw.tsv": FOLDER}, "sw.tsv not found"),
    ("06", ["--split", "../../../evil"], "evil.jsonl not found"),
    ("06", ["--models", "model", "model", "--baseline", "model"],
     "--models: two of model model have the same name"),
    ("06", ["--baseline", "other"], "--baseline other is not among --models"),
    ("06", ["--depth", "10"], "--depth 10: Recall@100 needs at least 100"),
    ("06", ["--out", "topics.jsonl"], "topics.jsonl"),
    ("06", ["--seed", "-1"], "--seed: got '-1'"),
    ("06", {"out/eval/metrics.json": "{}", "out/eval/metrics.json.meta.json": "[]"},
     "metrics.json.meta.json: "),
    ("06a", {"run/eval/metrics.json": "[]"}, "metrics.json: not JSON"),
    ("06a", {"run/eval/metrics.json": '{"models": 5}'}, "metrics.json"),
    ("06a", {"run/eval/metrics.json": '{"models": {"bm25": {"sw": 5}}, "tests": [], "settings": {}}'},
     "metrics.json"),
    ("06a", {"run/filtered.jsonl.meta.json": '{"counts": 5}'}, "filtered.jsonl.meta.json"),
    ("06a", {"run/filtered.jsonl.meta.json": '{"counts": {"by_lang": {"sw": {"candidates": "x"}}}}'},
     "filtered.jsonl.meta.json"),
    ("06a", {"run/model/train_log.jsonl": '{"step": "x", "loss": "y"}\n'}, "train_log.jsonl"),
    ("06a", {"run/model/train_log.jsonl": '{"loss": 1}\n'}, "train_log.jsonl"),
    ("06a", {"run/topics.jsonl": second(topic=[1])}, "topics.jsonl"),
    ("06a", {"run/topics.jsonl": second(topic="x")}, "topics.jsonl"),
    ("06a", ["--run", "nowhere"], "nowhere: none of the stages' files is there"),
    ("06a", ["--run", "topics.jsonl"], "topics.jsonl: none of the stages' files is there"),
    ("06a", ["--out", "topics.jsonl"], "topics.jsonl"),
    # the stand-in and the encoder
    ("offline", ["--port", "x"], "--port: invalid int value"),
    ("offline", ["--port", "99999"], "port"),
    ("offline", ["--port", "-5"], "offline_llm.py: "),
    ("offline", ["--exec"], "--exec needs a command"),
    ("offline", ["--exec", "/no/such\x1b[2J"], "…No such file or directory"),
    ("offline", ["--exec", "data/"], "…offline_llm.py: "),
    ("make", ["--lang", "../../evil"], "'lang' '../../evil' cannot"),
    ("make", ["--lang", "xx"], "xx.jsonl not found"),
    ("make", ["--data", "model"], "corpus not found"),
    ("make", ["--lr", "nan"], "--lr"),
    ("make", ["--steps", "-1"], "--steps"),
    ("make", ["--width", "0"], "--width: got '0'"),
    ("make", ["--seed", "9" * 30], "--seed: got '999"),
    ("make", ["--out", "data"], "data exists and was not made by make_encoder.py"),
    ("make", {"out/model/build.json": ""}, "build.json: "),
    ("make", {"out/model/build.json": "[]"}, "build.json: "),
    ("make", {"data/corpus/sw.jsonl": "[" * 200_000}, "sw.jsonl:1: not a JSON object"),
    ("make", {"data/corpus/sw.jsonl": "", "data/corpus/th.jsonl": ""}, "sw.jsonl: no passages"),
]  # fmt: skip


def case_name(case):
    command, wrong, *_ = case
    what = wrong if isinstance(wrong, list) else [f"{name} {content!r}" for name, content in wrong.items()]
    name = f"{command}: {' '.join(ascii(word)[1:-1] for word in what)}"
    return re.sub(r"<(?:function )?<?(\w+).*", r"\1", name)[:90]


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_malformed_input_is_one_line(work, capsys, case):
    command, wrong, words = case
    put(wrong if isinstance(wrong, dict) else {})
    flags = wrong if isinstance(wrong, list) else []
    said = refused(command, flags, work.parent.parent.parent, capsys, late=words.startswith("…"))
    told(case_name(case), said)
    assert words.removeprefix("…") in said


# --------------------------------------------------------------------------- what is odd, and taken

ODD = "\u202eevil\u202c \u200bzero\u200d\u200c width\ufeff اردو"
TAKEN = [  # (command, what is odd, file of the output, what it holds)
    ("05a", {"topics.jsonl": lambda text: "\ufeff" + text}, "out/exported/sw.jsonl", '"q1"'),
    ("05a", {"topics.jsonl": lambda text: text.replace("\n", "\r\n")}, "out/exported/sw.jsonl", '"q1"'),
    ("05a", {"topics.jsonl": lambda text: text.replace("\n", "\n \u3000\n".replace("\u3000", ""))},
     "out/exported/th.jsonl", '"q1"'),
    ("05a", {"topics.jsonl": second(query=ODD)}, "out/exported/sw.jsonl", ODD),
    ("05a", {"topics.jsonl": positive(title=ODD, text=ODD)}, "out/exported/sw.jsonl", ODD),
    ("05a", {"topics.jsonl": second(query_id=ODD)}, "out/exported/sw.jsonl", ODD),
    ("05a", {"topics.jsonl": second(query_id="../../../evil\n\t")},
     "out/exported/sw.jsonl", '"../../../evil\\n\\t"'),
    ("05a", {"topics.jsonl": positive(docid="/../../evil\0.")},
     "out/exported/sw.jsonl", '"/../../evil\\u0000."'),
    ("05a", {"topics.jsonl": positive(text="\x1b[2J\x07")}, "out/exported/sw.jsonl", r"\u001b[2J\u0007"),
    ("05a", {"topics.jsonl": positive(text="x" * 20_000_000)}, "out/exported/sw.jsonl", "x" * 20_000_000),
    ("05a", {"topics.jsonl": second(lang="tlh-Latn")}, "out/exported/tlh-Latn.jsonl", '"q2"'),
    ("05a", {"topics.jsonl": second(topic=10**30, more={"a": [None]})}, "out/exported/sw.jsonl", '"q2"'),
    ("00 beir", {"beir/corpus.jsonl": lambda text: "\ufeff" + text},
     "out/data/corpus/sw.jsonl", '"docid": "b0"'),
    ("00 beir", {"beir/qrels/dev.tsv": lambda text: "\ufeff" + text},
     "out/data/qrels/dev/sw.tsv", "q0\t0\tb0\t1"),
    ("00 beir", {"beir/corpus.jsonl": add('{"_id": "../../../evil", "text": "x"}\n')},
     "out/data/corpus/sw.jsonl", '"../../../evil"'),
    ("00 miracl", {"miracl/miracl-corpus/miracl-corpus-v1.0-sw/docs-x.jsonl": "{}"},
     "out/data/train.jsonl", '"train1"'),
    ("01", {"data/corpus/sw.jsonl": add('{"docid": "../../evil\\n", "text": "Kenya"}\n')},
     "out/candidates.jsonl", '"q1"'),
    ("01", {"data/corpus/a b\n.jsonl": "{}", "data/corpus/.jsonl": "{}"}, "out/candidates.jsonl", '"q1"'),
    ("make", {"data/corpus/a b\n.jsonl": "{}", "data/corpus/.jsonl": "{}"},
     "out/model/build.json", '"sw", "th"'),
    ("06a", {"run/topics.jsonl": positive(title="| # \x1b[2J\n[x](y)")}, "out/report/report.md", "Topics"),
]  # fmt: skip


@pytest.mark.parametrize("case", TAKEN, ids=case_name)
def test_what_is_odd_comes_through_as_it_is(work, capsys, case):
    command, odd, name, words = case
    put(odd)
    top = work.parent.parent.parent
    before = contents(top)
    started = time.monotonic()
    status, said = ends(command, [], capsys)
    assert status == 0 and time.monotonic() - started < 10, said
    assert not steers(said)
    after = contents(top)
    assert before.items() <= after.items()
    assert all(path.is_relative_to(work / "out") for path in after.keys() - before.keys())
    assert words in Path(name).read_text("utf-8")


def test_no_cell_of_a_sheet_is_a_formula(work, capsys):
    signs = "=1+1", "+1", "-1", "@x", "\t=1", "\r=1"
    records = [
        query(n, "sw", query_id=sign, query=sign, false_negatives=[],
              positive_passages=[passage(n, docid=sign, text=sign)],
              negative_passages=[passage(7, docid=f"{sign}-", title=sign, text=sign, grade=sign)])
        for n, sign in enumerate(signs)
    ]  # fmt: skip
    put({"filtered.jsonl": lines(*records)})
    assert ends("02a sample", [], capsys)[0] == 0
    for name in ("out/sheet.csv", "out/sheet.csv.key.csv"):
        with open(name, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) == 7
        assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


# --------------------------------------------------------------------------- drawn inputs

VALUES = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=9)
KEYS = st.sampled_from(
    "query_id lang query positive_passages docid title text source topic counts by_lang sw arguments inputs "
    "digest models tests settings zero_shot prompts response body choices custom_id error data qas".split()
) | st.text(max_size=3)
JSON = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=9
)
drawn = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def either(command, files, capsys, flags=()):
    """A command takes such files, or refuses them in one line; never with a traceback, which fails a test."""
    old = {name: Path(name).read_bytes() if Path(name).is_file() else None for name in files}
    put(files)
    status, said = ends(command, flags, capsys)
    assert status in (0, 2), said
    if status:
        assert "; " in said.splitlines()[-1] and "Traceback" not in said
    assert not steers(said), said
    put(old)
    shutil.rmtree("out", ignore_errors=True)


@drawn
@given(field=st.sampled_from("query_id lang query positive_passages topic".split()), value=JSON)
def test_any_value_in_any_field(work, capsys, field, value):
    either("05a", {"topics.jsonl": second(**{field: value})}, capsys)


@drawn
@given(field=st.sampled_from("docid title text source".split()), value=JSON)
def test_any_value_in_a_passage(work, capsys, field, value):
    negatives = [passage(6) | {field: value}, passage(7)]
    either("05a", {"topics.jsonl": second(negative_passages=negatives)}, capsys)


@drawn
@given(content=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_a_line(work, capsys, content):
    either("05a", {"topics.jsonl": line(content)}, capsys)
    either("02 import", {"answers.jsonl": content}, capsys, ["--max-unjudged", "1"])


FILES = {
    "run/eval/metrics.json": "06a",
    "run/filtered.jsonl.meta.json": "06a",
    "out/exported.meta.json": "05a",
    "squad/x.sw.json": "00 squad",
    "alpaca.json": "03a translate",
}


@drawn
@given(name=st.sampled_from(sorted(FILES)), content=JSON)
def test_any_json_as_a_file(work, capsys, name, content):
    files = {name: json.dumps(content)} | ({"out/exported/x": ""} if "exported" in name else {})
    flags = ["--instructions", "alpaca.json", "--translate", "en"] if name == "alpaca.json" else []
    either(FILES[name], files, capsys, flags)


CELLS = st.lists(st.sampled_from(["q1", "sw1#0", "0", "1", "sw", "sw-1"]) | st.text(max_size=6), max_size=5)


@drawn
@given(cells=CELLS, separator=st.sampled_from("\t, "))
def test_any_cells_of_a_table(work, capsys, cells, separator):
    row = separator.join(cells).encode("utf-8", "surrogatepass") + b"\n"
    either("00 beir", {"beir/qrels/dev.tsv": lambda text: text.encode() + row}, capsys)
    either("02a score", {"key.csv": lambda text: text.encode() + row}, capsys)
    either("02a score", {"sheet.csv": lambda text: text.encode() + row}, capsys)


FLAGS = "--seed --limit --lang --layout".split()


@drawn
@given(flag=st.sampled_from(FLAGS), value=st.text(max_size=6) | st.integers().map(str))
def test_any_text_after_a_flag(work, capsys, flag, value):
    either("05a", {}, capsys, [flag, value])


# --------------------------------------------------------------------------- as a user starts them


@pytest.mark.parametrize(
    "command, wrong",
    [
        ("00 beir", {"beir/qrels/dev.tsv": b"\xff"}),
        ("02", {"candidates.jsonl": line(b"[" * 200_000)}),
        ("02a score", {"sheet.csv": "item,relevant\nsw\x1b[2J,1\n"}),
        ("05a", {"topics.jsonl": second(lang="../../evil\n\x1b[2J")}),
        ("offline", {}),
    ],
)
def test_a_process_ends_the_same_way(work, command, wrong):
    put(wrong)
    flags = COMMANDS[command].split() or ["--port", "99999"]
    done = run_stage(f"{STAGES[command.split()[0]]}.py", *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "; " in done.stderr and not steers(done.stderr)
