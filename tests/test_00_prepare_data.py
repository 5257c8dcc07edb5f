"""00_prepare_data.py on small inputs of every layout, and on mini-MIRACL where it is beside the project."""

import gzip
import json
import re
import subprocess
import sys
import unicodedata

import pytest
from conftest import ROOT, load_stage, run_stage

SCRIPT = "00_prepare_data.py"
MINI = ROOT.parent / "shared" / "data" / "minimiracl"

# texts that a careless reader or writer changes: combining marks, joiners, line separators, escapes, an emoji
TEXTS = {
    "th": "น้ำ ดื่ม\u200bสะอาด กรุงเทพฯ",
    "ko": "서울 (NFD: 서울)",
    "fa": "می‌خواهم کتاب‌ها",
    "ja": "東京　ﾄｳｷｮｳ　①㌢",
    "en": ' "q\\uote" \t e\u0301 é \u2028 😀 👩‍🔬 <b>&amp;</b> ',
}


def write(path, content):
    """Bytes, a text, or a list of records as JSONL; gzipped where the name ends in .gz."""
    if isinstance(content, list):
        content = "".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" for i, r in enumerate(content))
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)


def read(path):
    return [json.loads(line) for line in path.read_bytes().decode().removesuffix("\n").split("\n")]


def passage(docid, text="text", title="", **more):
    return {"docid": docid, "title": title, "text": text, **more}


def query(query_id, positives, negatives=(), lang="sw", **more):
    return {
        "query_id": query_id,
        "lang": lang,
        "query": f"query {query_id}",
        "positive_passages": list(positives),
        "negative_passages": list(negatives),
        **more,
    }


def prepare(source, root, out, *args, **kwargs):
    done = run_stage(SCRIPT, "--source", source, "--root", root, "--out", out, *args, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stderr


def refused(source, root, out, *args, **kwargs):
    """The one line of a run that stops on bad input and leaves nothing behind."""
    done = run_stage(SCRIPT, "--source", source, "--root", root, "--out", out, *args, **kwargs)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and not out.exists() and not list(out.parent.glob(".*.tmp"))
    return done.stderr.splitlines()[-1]


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def bad(root, name, content):
    """Put one bad file into an input; gives back its path."""
    write(root / name, content)
    return root / name


# --------------------------------------------------------------------------- MIRACL


def miracl(root, langs=("th",)):
    """Per language 12 passages over docs-0, docs-2 and docs-10; two train queries, one dev query."""
    for lang in langs:
        corpus = root / "miracl-corpus" / f"miracl-corpus-v1.0-{lang}"
        for shard in range(11):
            more = [passage("0#1", TEXTS[lang])] if shard == 0 else []
            write(
                corpus / f"docs-{shard}.jsonl.gz",
                [passage(f"{shard}#0", f"text {shard}", f"title {shard}"), *more],
            )
        base = root / "miracl" / f"miracl-v1.0-{lang}"
        write(base / "topics" / f"topics.miracl-v1.0-{lang}-train.tsv", f"q#1\t{TEXTS[lang]}\n007\tagent?\n")
        write(
            base / "qrels" / f"qrels.miracl-v1.0-{lang}-train.tsv",
            "007\tQ0\t10#0\t1\n007\tQ0\t2#0\t0\nq#1\tQ0\t1#0\t0\nq#1\tQ0\t0#1\t1\n",
        )
        write(base / "topics" / f"topics.miracl-v1.0-{lang}-dev.tsv.gz", "3\tdev?\n")
        write(base / "qrels" / f"qrels.miracl-v1.0-{lang}-dev.tsv.gz", "3\tQ0\t3#0\t1\n")
    return root


def test_miracl_records_are_what_the_judgments_say(tmp_path):
    prepare("miracl", miracl(tmp_path / "in"), tmp_path / "out")
    first, second = read(tmp_path / "out" / "train.jsonl")
    assert list(first) == ["query_id", "lang", "query", "positive_passages", "negative_passages"]
    assert first == query(
        "q#1", [passage("0#1", TEXTS["th"])], [passage("1#0", "text 1", "title 1", source="human")], "th"
    ) | {"query": TEXTS["th"]}
    assert list(first["negative_passages"][0]) == ["docid", "title", "text", "source"]
    assert second["query_id"] == "007"  # a string, in topics order
    qrels = (tmp_path / "out/qrels/train/th.tsv").read_text()
    assert qrels == "q#1\t0\t1#0\t0\nq#1\t0\t0#1\t1\n007\t0\t10#0\t1\n007\t0\t2#0\t0\n"
    assert [r["query_id"] for r in read(tmp_path / "out" / "dev.jsonl")] == ["3"]
    docids = [p["docid"] for p in read(tmp_path / "out" / "corpus" / "th.jsonl")]
    assert docids == ["0#0", "0#1"] + [f"{n}#0" for n in range(1, 11)]  # docs-2 before docs-10


def test_texts_survive_byte_for_byte(tmp_path):
    langs = sorted(TEXTS)
    prepare("miracl", miracl(tmp_path / "in", langs), tmp_path / "out")
    for record, lang in zip(read(tmp_path / "out" / "train.jsonl")[::2], langs, strict=True):
        assert (
            record["lang"] == lang
            and record["query"] == record["positive_passages"][0]["text"] == TEXTS[lang]
        )
        corpus = (tmp_path / "out" / "corpus" / f"{lang}.jsonl").read_bytes()
        assert json.dumps(TEXTS[lang], ensure_ascii=False).encode() in corpus  # not escaped either


def test_what_is_not_in_the_corpus_is_left_out_and_counted(tmp_path):
    root = miracl(tmp_path / "in")
    qrels = root / "miracl/miracl-v1.0-th/qrels/qrels.miracl-v1.0-th-train.tsv"
    write(qrels, "q#1\tQ0\tgone#1\t1\nq#1\tQ0\t1#0\t0\n007\tQ0\t2#0\t1\n007\tQ0\tgone#2\t0\n")
    write(
        root / "miracl-corpus/miracl-corpus-v1.0-th/docs-0.jsonl.gz",
        [passage("0#0", " "), passage("0#1", "a")],
    )
    table = prepare("miracl", root, tmp_path / "out")
    assert [r["query_id"] for r in read(tmp_path / "out" / "train.jsonl")] == ["007"]
    assert (tmp_path / "out/qrels/train/th.tsv").read_text() == "007\t0\t2#0\t1\n"
    told = table.splitlines()[-2].removeprefix("th: ").split(", ")
    assert sorted(told) == [
        "1 dev",
        "1 empty passages",
        "1 queries without a positive",
        "1 train",
        "11 passages",
        "2 judgments of passages not in the corpus (left out of the metrics)",
        "2 positives",
    ]
    counts = json.loads((tmp_path / "out.meta.json").read_text())["counts"]["languages"]["th"]
    assert counts["empty passages"] == 1 and counts["train"] == 1


def test_a_language_without_train_gets_corpus_and_dev(tmp_path):
    root = miracl(tmp_path / "in", ["ko"])
    for path in root.rglob("*-train.tsv"):
        path.unlink()
    assert "train queries 0, dev queries 1" in prepare("miracl", root, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["corpus", "dev.jsonl", "qrels"]


def test_lang_and_limit(tmp_path):
    prepare(
        "miracl",
        miracl(tmp_path / "in", ["th", "ko", "fa"]),
        tmp_path / "out",
        "--lang",
        "ko",
        "fa",
        "--limit",
        1,
    )
    assert [(r["lang"], r["query_id"]) for r in read(tmp_path / "out" / "train.jsonl")] == [
        ("fa", "q#1"),
        ("ko", "q#1"),
    ]
    assert len(read(tmp_path / "out" / "dev.jsonl")) == 2
    assert len((tmp_path / "out/qrels/train/ko.tsv").read_text().splitlines()) == 2
    assert not (tmp_path / "out/corpus/th.jsonl").exists()


TOPICS, QRELS = (f"miracl/miracl-v1.0-th/{k}/{k}.miracl-v1.0-th-train.tsv" for k in ("topics", "qrels"))
DOCS = "miracl-corpus/miracl-corpus-v1.0-th/docs-1.jsonl.gz"


@pytest.mark.parametrize(
    "name, content, line, said",
    [
        (TOPICS, "q#1\tok\n007-no-tab\n", 2, "'text' is missing; want a string"),
        (TOPICS, "q#1\tok\n007\t \n", 2, "'text' is \" \"; want a string that is not empty"),
        (TOPICS, "q#1\tok\n007\tok\nq#1\tagain\n", 3, "query 'q#1' is there twice"),
        (TOPICS, b"q#1\tok\n007\t\xff\n", 2, "not valid UTF-8"),
        (TOPICS, "q 1\tok\n", 1, "id 'q 1' has white space"),
        (QRELS, "q#1\tQ0\t1#0\n", 1, "relevance is '1#0'"),
        (QRELS, "q#1\t1#0\n", 1, "got 2 columns, want query_id (0) docid relevance"),
        (QRELS, "q#1\tQ0\t1#0\t1\t9\n", 1, "got 5 columns, want"),
        (QRELS, "q#1\tQ0\t1#0\t1\nq#1\tQ0\t2#0\t0.5\n", 2, "relevance is '0.5'"),
        (QRELS, "q#1\tQ0\t1#0\t1\nq#1\tQ0\t1#0\t0\n", 2, "judges docid '1#0' twice"),
        (QRELS, "nobody\tQ0\t1#0\t1\n", 1, "query 'nobody' is not among the queries"),
        (DOCS, [passage("1#0"), passage("0#1")], 2, "docid '0#1' has another text at"),
        (DOCS, [passage("1#0"), {"docid": "1#1", "title": "t"}], 2, "'text' is missing"),
        (DOCS, [passage("1#0"), passage([7])], 2, "'docid' is [7]; want a string"),
        (DOCS, [passage("1#0"), passage("1#1", title=8)], 2, "'title' is 8"),
        (DOCS, '{"docid": "1#0", "text": "a"}\n{"docid": "1#1", "te', 2, "not a JSON object"),
        (DOCS, b'{"docid": "1#0", "text": "\xff"}\n', 1, "not valid UTF-8"),
        (DOCS, r'{"docid": "1#0", "text": "\ud800"}' + "\n", 1, "not valid UTF-8"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, name, content, line, said):
    path = bad(miracl(tmp_path / "in"), name, content)
    message = refused("miracl", tmp_path / "in", tmp_path / "out")
    assert message.startswith(f"{path}:{line}: ") and said in message and "; " in message


def test_missing_pieces_are_named(tmp_path):
    root, out = miracl(tmp_path / "in"), tmp_path / "out"
    assert "no zz there, but th;" in refused("miracl", root, out, "--lang", "zz")
    (root / "miracl-corpus/miracl-corpus-v1.0-th/docs-4.jsonl.gz").unlink()
    assert "docs-4.jsonl not found; fetch it" in refused("miracl", root, out)
    root = miracl(tmp_path / "in")
    (root / QRELS).unlink()
    assert f"{QRELS} not found; fetch it" in refused("miracl", root, out)
    cut = miracl(tmp_path / "in") / DOCS
    cut.write_bytes(cut.read_bytes()[:-9])
    assert re.match(f"{re.escape(str(cut))}:.*cannot be read", refused("miracl", root, out))
    assert "nowhere: no miracl there" in refused("miracl", tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    assert "no files laid out as --help tells there" in refused("miracl", tmp_path / "empty", out)
    assert run_stage(SCRIPT, "--source", "squad", "--out", out).returncode == 2
    assert run_stage(SCRIPT, "--source", "miracl", "--out", out, "--langs", "th").returncode == 2


def hub(httpserver, root, home, refusal=None):
    """Serve root as the hub would, or refuse to give it; returns the environment that leads there."""
    for repo in ("miracl", "miracl-corpus"):
        files = {
            p.relative_to(root / repo).as_posix(): p.read_bytes()
            for p in (root / repo).rglob("*")
            if p.is_file()
        }
        commit, listed = "1" * 40, [{"rfilename": name} for name in files]
        httpserver.expect_request(f"/api/datasets/miracl/{repo}/revision/main").respond_with_json(
            {"id": f"miracl/{repo}", "sha": commit, "siblings": listed}
        )
        httpserver.expect_request(f"/api/datasets/miracl/{repo}/tree/{commit}").respond_with_json(
            [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
        )
        for name, content in files.items():
            httpserver.expect_request(f"/datasets/miracl/{repo}/resolve/{commit}/{name}").respond_with_data(
                **refusal
                or {
                    "response_data": content,
                    "headers": {"X-Repo-Commit": "1" * 40, "ETag": f'"{abs(hash(content))}"'},
                }
            )
    return {
        "HF_ENDPOINT": httpserver.url_for(""),
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_OFFLINE": "0",
    }


def test_the_hub_gives_the_same_as_a_copy(tmp_path, httpserver):
    root = miracl(tmp_path / "in", ["th", "ko"])
    environment = hub(httpserver, root, tmp_path / "home")
    prepare("miracl", "hub", tmp_path / "hub", "--lang", "th", env=environment)
    prepare("miracl", root, tmp_path / "copy", "--lang", "th")
    assert tree(tmp_path / "hub") == tree(tmp_path / "copy")
    assert any(request.headers.get("authorization") == "Bearer hf_secret" for request, _ in httpserver.log)
    assert not any("-ko" in request.path for request, _ in httpserver.log)


@pytest.mark.parametrize("status, code", [(401, "RepoNotFound"), (403, "GatedRepo")])
def test_a_gated_hub_tells_what_to_do(tmp_path, httpserver, status, code):
    refusal = {
        "response_data": "",
        "status": status,
        "headers": {"X-Error-Code": code, "X-Error-Message": "restricted"},
    }
    environment = hub(httpserver, miracl(tmp_path / "in"), tmp_path / "home", refusal)
    message = refused("miracl", "hub", tmp_path / "out", env=environment)
    assert "accept the terms at https://huggingface.co/datasets/miracl/miracl and set HF_TOKEN" in message
    assert "hf_secret" not in message


def test_offline_is_one_line(tmp_path):
    done = run_stage(SCRIPT, "--source", "miracl", "--out", tmp_path / "out", env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "check the network and HF_HUB_OFFLINE, or point --root" in done.stderr


# --------------------------------------------------------------------------- BEIR


def beir(root, gz=""):
    write(
        root / f"corpus.jsonl{gz}",
        [
            {"_id": "d1", "title": "", "text": TEXTS["ja"], "metadata": {"url": "x"}},
            {"_id": "d2", "title": "題", "text": "二"},
            {"_id": "d3", "title": "", "text": " "},
        ],
    )
    write(root / f"queries.jsonl{gz}", [{"_id": f"q{n}", "text": f"問 {n}"} for n in range(4)])
    header = "query-id\tcorpus-id\tscore\n"
    write(root / f"qrels/train.tsv{gz}", header + "q2\td1\t2\nq2\td2\t0\nq0\td3\t1\n")
    write(root / f"qrels/test.tsv{gz}", header + "q1\td2\t1\n")
    return root


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_beir(tmp_path, gz):
    said = prepare("beir", beir(tmp_path / "in", gz), tmp_path / "out", "--lang", "ja")
    assert "no qrels/dev.tsv, so dev is qrels/test.tsv" in said and "1 empty passages" in said
    assert read(tmp_path / "out/train.jsonl") == [
        query("q2", [passage("d1", TEXTS["ja"])], [passage("d2", "二", "題", source="human")], "ja")
        | {"query": "問 2"}
    ]
    assert [r["query_id"] for r in read(tmp_path / "out/dev.jsonl")] == ["q1"]
    assert (tmp_path / "out/qrels/train/ja.tsv").read_text() == "q2\t0\td1\t2\nq2\t0\td2\t0\n"
    assert read(tmp_path / "out/corpus/ja.jsonl") == [passage("d1", TEXTS["ja"]), passage("d2", "二", "題")]


def test_beir_prefers_dev_and_can_do_without_train(tmp_path):
    root = beir(tmp_path / "in")
    (root / "qrels/train.tsv").unlink()
    write(root / "qrels/dev.tsv", "query-id\tcorpus-id\tscore\nq3\td1\t1\n")
    said = prepare("beir", root, tmp_path / "out", "--lang", "ja")
    assert "train queries 0" in said and "test.tsv" not in said
    assert [r["query_id"] for r in read(tmp_path / "out/dev.jsonl")] == ["q3"]
    assert not (tmp_path / "out/train.jsonl").exists()


def test_beir_judgments_name_the_id_that_beir_has(tmp_path):
    root = beir(tmp_path / "in")
    write(
        root / "corpus.jsonl",
        [{"_id": "d1", "docid": "d2", "text": "one"}, {"_id": "d2", "docid": "x", "text": "two"}],
    )
    prepare("beir", root, tmp_path / "out", "--lang", "ja")
    assert read(tmp_path / "out/train.jsonl")[0]["positive_passages"] == [passage("d1", "one")]


def test_min_relevance_says_which_grade_is_a_positive(tmp_path):
    root = beir(tmp_path / "in")
    write(root / "qrels/train.tsv", "query-id\tcorpus-id\tscore\nq2\td1\t2\nq2\td2\t1\nq3\td2\t1\n")
    for grade, positives, negatives in ((1, ["d1", "d2"], []), (2, ["d1"], ["d2"])):
        out = tmp_path / f"out{grade}"
        prepare("beir", root, out, "--lang", "ja", "--min-relevance", grade)
        record = read(out / "train.jsonl")[0]
        assert [p["docid"] for p in record["positive_passages"]] == positives
        assert [(p["docid"], p["source"]) for p in record["negative_passages"]] == [
            (d, "human") for d in negatives
        ]
        assert (out / "qrels/train/ja.tsv").read_text().startswith("q2\t0\td1\t2\nq2\t0\td2\t1\n")
    assert [r["query_id"] for r in read(out / "train.jsonl")] == ["q2"]  # q3 has no positive of grade 2


def test_beir_errors(tmp_path):
    root, out = beir(tmp_path / "in"), tmp_path / "out"
    assert "needs --lang CODE" in refused("beir", root, out)
    assert "needs --lang CODE" in refused("beir", root, out, "--lang", "ja", "ko")
    path = bad(root, "queries.jsonl", [{"_id": "q0", "text": "a"}, {"id": "q1", "text": "b"}])
    assert refused("beir", root, out, "--lang", "ja").startswith(f"{path}:2: '_id' is missing")
    path = bad(beir(root), "qrels/train.tsv", "query-id\tcorpus-id\tscore\nq0\td1\n")
    assert refused("beir", root, out, "--lang", "ja").startswith(f"{path}:2: got 2 columns, want")
    write(root / "qrels/train.tsv", "q0\td9\t1\n")
    write(root / "qrels/test.tsv", "q1\td9\t1\n")
    assert "no query has a positive (relevance 1) there" in refused("beir", root, out, "--lang", "ja")
    (root / "corpus.jsonl").unlink()
    assert "corpus.jsonl not found" in refused("beir", root, out, "--lang", "ja")


# --------------------------------------------------------------------------- SQuAD


def squad(root, n_articles=20, lang="ko"):
    """Articles of two paragraphs; article 1 repeats a paragraph of article 0; article 2 is in two files."""
    articles = [
        {
            "title": f"제목 {n}",
            "paragraphs": [
                {
                    "context": f"문단 {n}-{k} 😀",
                    "qas": [
                        {"id": f"{n}-{k}-{q}", "question": f"질문 {n}{k}{q}?", "answers": [{"text": "문단"}]}
                        for q in "ab"
                    ],
                }
                for k in range(2)
            ],
        }
        for n in range(n_articles)
    ]
    articles[1]["paragraphs"][1]["context"] = articles[0]["paragraphs"][0]["context"]
    articles[1]["paragraphs"][0]["qas"].append(
        {"id": "none", "question": "?", "is_impossible": True, "answers": []}
    )
    again = [
        {"title": "제목 2", "paragraphs": [{"context": "더", "qas": [{"id": "2-x", "question": "질문?"}]}]}
    ]
    write(root / f"train.{lang}.json.gz", json.dumps({"version": "1", "data": articles}))
    write(root / f"dev.{lang}.json", json.dumps({"data": again}, ensure_ascii=False))
    return root


def test_squad(tmp_path):
    said = prepare("squad", squad(tmp_path / "in"), tmp_path / "out")
    corpus = read(tmp_path / "out/corpus/ko.jsonl")
    assert corpus[:3] == [
        passage("0#0", "더", "제목 2"),
        passage("1#0", "문단 0-0 😀", "제목 0"),
        passage("1#1", "문단 0-1 😀", "제목 0"),
    ]
    assert len(corpus) == 40  # 41 paragraphs, two of them equal
    assert "2 of 20 articles held out" in said and "1 unanswerable questions" in said
    assert said.count("dev.ko.json: its articles, too, are divided into train and dev") == 1
    train, dev = read(tmp_path / "out/train.jsonl"), read(tmp_path / "out/dev.jsonl")
    assert len(train) + len(dev) == 81
    by_id = {r["query_id"]: r for r in train + dev}
    assert (
        by_id["1-1-a"]["positive_passages"]
        == by_id["0-0-b"]["positive_passages"]
        == [passage("1#0", "문단 0-0 😀", "제목 0")]
    )


@pytest.mark.parametrize("seed", range(6))
def test_no_article_and_no_passage_is_in_train_and_dev(tmp_path, seed):
    prepare("squad", squad(tmp_path / "in", n_articles=4), tmp_path / "out", "--seed", seed)
    for key in ("title", "docid"):
        train, dev = (
            {p[key] for r in read(tmp_path / "out" / f"{split}.jsonl") for p in r["positive_passages"]}
            for split in ("train", "dev")
        )
        assert train and dev and not train & dev


def test_a_squad_table_as_lines_is_read(tmp_path):
    rows = [{"id": f"q{n}", "title": f"t{n}", "context": f"문단 {n}", "question": f"질문 {n}?",
             "answers": {"text": ["문단"]}} for n in range(20)]  # fmt: skip
    for name in ("a.ko.jsonl", "b.ko.json"):
        write(tmp_path / name / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        said = prepare("squad", tmp_path / name, tmp_path / "out", "--overwrite")
        assert "2 of 20 articles held out" in said and "20 passages" in said
    write(tmp_path / "in/korquad.val.json", "[]")
    assert "want NAME.CODE.json" in refused("squad", tmp_path / "in", tmp_path / "out2")


def test_grades_of_its_own_output_are_kept(tmp_path):
    prepare("beir", beir(tmp_path / "in"), tmp_path / "one", "--lang", "ja")
    prepare("tevatron", tmp_path / "one", tmp_path / "two")
    for name in ("qrels/train/ja.tsv", "qrels/dev/ja.tsv"):
        one, two = ((tmp_path / out / name).read_text("utf-8") for out in ("one", "two"))
        assert sorted(one.splitlines()) == sorted(two.splitlines()) and one
    assert "\t2\n" in (tmp_path / "two/qrels/train/ja.tsv").read_text("utf-8")


def test_judgments_of_passages_that_a_record_does_not_bring_are_kept(tmp_path):
    write(tmp_path / "in/corpus/sw.jsonl", "".join(json.dumps(passage(d, f"text {d}")) + "\n" for d in "abc"))
    row = {"query_id": "1", "lang": "sw", "query": "q", "positive_passages": [passage("a", "text a")]}
    for name in ("train", "dev"):
        write(tmp_path / f"in/{name}.jsonl", json.dumps(row | {"query": name}) + "\n")
    write(tmp_path / "in/qrels/train/sw.tsv", "1\t0\ta\t2\n1\t0\tb\t1\n1\t0\tc\t0\n")
    prepare("tevatron", tmp_path / "in", tmp_path / "out")
    (made,) = read(tmp_path / "out/train.jsonl")
    assert [p["docid"] for p in made["positive_passages"]] == ["a", "b"]
    assert [p["docid"] for p in made["negative_passages"]] == ["c"]
    assert len((tmp_path / "out/qrels/train/sw.tsv").read_text().splitlines()) == 3


def test_languages_that_differ_in_case_alone_and_tables_are_refused(tmp_path):
    passages = '[{"docid": "d", "text": "t"}]'
    line = '{"query_id": "%s", "lang": "%s", "query": "q", "positive_passages": ' + passages + "}\n"
    write(tmp_path / "in/train.jsonl", line % ("1", "zh") + line % ("2", "ZH"))
    assert "two of ZH zh differ in case alone" in refused("tevatron", tmp_path / "in", tmp_path / "out")
    write(tmp_path / "queries.tsv", "1\twhat\n")
    assert "queries.tsv:1: a table" in refused("tevatron", tmp_path / "queries.tsv", tmp_path / "out")


def test_new_docids_go_to_every_list(tmp_path):
    passages = {"candidate_passages": [{"docid": "c0", "text": "one"}]}
    rows = [{"query_id": str(n), "lang": "sw", "query": f"q{n}", "positive_passages":
             [{"docid": "p0", "text": f"text {n}"}]} | passages for n in range(2)]  # fmt: skip
    write(tmp_path / "in/train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    prepare("tevatron", tmp_path / "in", tmp_path / "out", "--docids-from-texts")
    (made, *_) = read(tmp_path / "out/train.jsonl") + read(tmp_path / "out/dev.jsonl")
    assert len(made["candidate_passages"][0]["docid"]) == 16


def test_squad_split_depends_on_the_seed_alone(tmp_path):
    dev = set()
    for seed in range(4):
        prepare("squad", squad(tmp_path / "in"), tmp_path / f"out{seed}", "--seed", seed)
        dev.add((tmp_path / f"out{seed}/dev.jsonl").read_bytes())
    assert len(dev) > 1
    prepare("squad", tmp_path / "in", tmp_path / "again", "--seed", 3, env={"PYTHONHASHSEED": "5"})
    assert tree(tmp_path / "again") == tree(tmp_path / "out3")
    prepare("squad", tmp_path / "in", tmp_path / "cut", "--seed", 3, "--limit", 2)
    assert (tmp_path / "cut/dev.jsonl").read_bytes() == (tmp_path / "out3/dev.jsonl").read_bytes()
    assert read(tmp_path / "cut/train.jsonl") == read(tmp_path / "out3/train.jsonl")[:2]


def test_held_out_is_a_tenth_and_at_least_one_of_two():
    held_out = load_stage("00_prepare_data").held_out
    sizes = [len(held_out({"sw": [str(k) for k in range(n)]}, 13, "keys")) for n in (1, 2, 20, 100)]
    assert sizes == [0, 1, 2, 10]
    keys = [str(k) for k in range(50)]
    held = held_out({"sw": keys}, 13, "keys")
    assert held == held_out({"sw": keys[::-1]}, 13, "keys") != held_out({"sw": keys}, 14, "keys")
    assert held == held_out({"sw": keys, "te": keys}, 13, "keys")  # translations


def test_a_file_that_changes_its_language_is_prepared_again(tmp_path):
    prepare("squad", squad(tmp_path / "in"), tmp_path / "out")
    for path in list((tmp_path / "in").iterdir()):
        path.rename(path.with_name(path.name.replace(".ko.", ".ja.")))
    prepare("squad", tmp_path / "in", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out/corpus").iterdir()] == ["ja.jsonl"]


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "not a JSON object"),
        ('{"a": 1}', "KeyError('data'); want SQuAD's"),
        ('{"data": [{"title": "t"}]}', "data[0]: 'id' is missing"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "data[0]: 'context' is missing"),
        ('{"data": [{"paragraphs": 5}]}', "data[0]: TypeError"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": [5], "question": "q"}]}]}]}',
            "'id' is [5]",
        ),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "5", "question": "q"}, '
            '{"id": "5", "question": "r"}]}]}]}',
            "query '5' is there twice",
        ),
    ],
)
def test_squad_errors(tmp_path, content, said):
    path = bad(tmp_path / "in", "x.ko.json", content)
    message = refused("squad", tmp_path / "in", tmp_path / "out")
    assert message.startswith(str(path)) and said in message


# --------------------------------------------------------------------------- Tevatron


def tevatron(path, n_queries=20, lang=None):
    records = [
        query(f"{n}", [passage(f"p{n}", TEXTS["fa"])], [passage("shared", "نه", score=0.5)])
        for n in range(n_queries)
    ]
    write(
        path,
        [
            {k: v for k, v in r.items() if k != "lang"} | {"lang": lang}
            if lang
            else {k: v for k, v in r.items() if k != "lang"}
            for r in records
        ],
    )
    return path


def test_tevatron_from_one_file(tmp_path):
    said = prepare("tevatron", tevatron(tmp_path / "any.jsonl.gz"), tmp_path / "out", "--lang", "fa")
    assert "2 of 20 queries held out as dev" in said
    train, dev = read(tmp_path / "out/train.jsonl"), read(tmp_path / "out/dev.jsonl")
    assert (
        len(train) == 18
        and len(dev) == 2
        and not {r["query_id"] for r in train} & {r["query_id"] for r in dev}
    )
    n = train[0]["query_id"]
    assert train[0] == query(n, [passage(f"p{n}", TEXTS["fa"])], [passage("shared", "نه", score=0.5)], "fa")
    assert list(train[0]) == ["query_id", "lang", "query", "positive_passages", "negative_passages"]
    assert [p["docid"] for p in read(tmp_path / "out/corpus/fa.jsonl")][:3] == ["p0", "shared", "p1"]
    assert "shared" not in (tmp_path / "out/qrels/train/fa.tsv").read_text()  # unjudged


def test_tevatron_with_dev_and_corpus(tmp_path):
    root = tmp_path / "in"
    tevatron(root / "train.jsonl", 3, lang="fa")
    corpus = [{"docid": "p0", "text": TEXTS["fa"]}, passage("p1", TEXTS["fa"]), passage("other")]
    write(
        root / "dev.jsonl",
        [query("d", [corpus[0]], [corpus[1] | {"source": "human"}], "fa", subset="s")],
    )
    write(root / "corpus.jsonl.gz", corpus)
    said = prepare("tevatron", root, tmp_path / "out")
    assert [p["docid"] for p in read(tmp_path / "out/corpus/fa.jsonl")] == ["p0", "p1", "other"]
    assert [r["query_id"] for r in read(tmp_path / "out/train.jsonl")] == ["0", "1"]
    assert "1 judgments of passages not in the corpus" in said and "1 queries without a positive" in said
    assert (tmp_path / "out/qrels/dev/fa.tsv").read_text() == "d\t0\tp0\t1\nd\t0\tp1\t0\n"
    assert read(tmp_path / "out/dev.jsonl")[0]["subset"] == "s"  # fields of its own stay


def test_what_this_script_wrote_can_be_prepared_again_with_its_whole_corpus(tmp_path):
    prepare("miracl", miracl(tmp_path / "in", ["th", "ko"]), tmp_path / "out")
    prepare("tevatron", tmp_path / "out", tmp_path / "again")
    again, out = (
        {n: sorted(b.splitlines()) for n, b in tree(tmp_path / folder).items()} for folder in ("again", "out")
    )
    assert again == out  # but for the order of a query's judgments


def test_flagembeddings_records_are_read(tmp_path):
    write(
        tmp_path / "bge.jsonl",
        [{"query": f"q{n}", "pos": ["นำ้", f"p{n}"], "neg": ["shared"]} for n in range(3)],
    )
    prepare("tevatron", tmp_path / "bge.jsonl", tmp_path / "out", "--lang", "th")
    records = read(tmp_path / "out/train.jsonl") + read(tmp_path / "out/dev.jsonl")
    assert sorted(r["query_id"] for r in records) == ["1", "2", "3"]
    assert [[p["text"] for p in r["positive_passages"]][0] for r in records] == ["นำ้"] * 3
    assert len({r["negative_passages"][0]["docid"] for r in records}) == 1  # one text is one docid
    assert len(read(tmp_path / "out/corpus/th.jsonl")) == 5


def test_two_texts_under_one_docid_are_an_error_that_names_both_lines(tmp_path):
    records = [query("1", [passage("a", "x")]), query("2", [passage("b")], [passage("a", "y")])]
    path = bad(tmp_path, "t.jsonl", records)
    message = refused("tevatron", path, tmp_path / "out")
    assert message.startswith(f"{path}:2: docid 'a' has another text at {path}:1; rename one, or take")
    records[1] = query("2", [passage("a", "y")])
    path = bad(tmp_path / "beside", "train.jsonl", records)
    write(tmp_path / "beside/corpus.jsonl", [passage("a", "x"), passage("b")])
    message = refused("tevatron", tmp_path / "beside", tmp_path / "out")
    assert message.startswith(f"{path}:2: docid 'a' has another text in the corpus")


def test_docids_that_number_the_passages_of_a_record_are_made_anew(tmp_path):
    records = [query(f"{n}", [passage("p0", f"x {n}")], [passage("n0", "shared")]) for n in range(4)]
    write(tmp_path / "t.jsonl", records)
    prepare("tevatron", tmp_path / "t.jsonl", tmp_path / "out", "--docids-from-texts")
    corpus = {p["docid"]: p["text"] for p in read(tmp_path / "out/corpus/sw.jsonl")}
    assert sorted(corpus.values()) == ["shared", "x 0", "x 1", "x 2", "x 3"]
    for record in read(tmp_path / "out/train.jsonl"):
        assert corpus[record["positive_passages"][0]["docid"]] == f"x {record['query_id']}"


def test_a_passage_is_not_both_positive_and_negative(tmp_path):
    negatives = [passage("a"), passage("b", "b"), passage("b", "b")]
    write(tmp_path / "t.jsonl", [query("1", [passage("a")], negatives)])
    said = prepare("tevatron", tmp_path / "t.jsonl", tmp_path / "out")
    record = read(tmp_path / "out/train.jsonl")[0]
    assert [p["docid"] for p in record["positive_passages"]] == ["a"]
    assert [p["docid"] for p in record["negative_passages"]] == ["b"]
    assert "2 negatives that their query has already" in said


def test_an_answer_is_no_negative_whatever_the_docid_and_whatever_the_id_of_the_question(tmp_path):
    def asked(query_id, text, positive, *negatives):
        return query(query_id, [passage(positive, f"x {positive}")], negatives) | {"query": text}

    others = [passage(d, f"x {d}") for d in "abcd"]
    copy = passage("e", "X  b\n", source="human")
    records = [asked("1", "Nani?", "a", *others[1:]), asked("2", "NANI? ", "b", copy, *others[::3])]
    write(tmp_path / "in/dev.jsonl", [asked("4", "Wapi?", "a")])
    write(tmp_path / "in/train.jsonl", [*records, asked("3", "Nini?", "c", *others)])
    said = prepare("tevatron", tmp_path / "in", tmp_path / "out")
    negatives = {
        r["query_id"]: [p["docid"] for p in r["negative_passages"]]
        for r in read(tmp_path / "out/train.jsonl")
    }
    assert negatives == {"1": ["c", "d"], "2": ["d"], "3": ["a", "b", "d"]}
    # of the first "b", of the second "a" and "e", which has its positive's text
    assert "3 negatives with a positive's text, or that answer the question under another id" in said
    assert "2\t0\te\t0\n" in (tmp_path / "out/qrels/train/sw.tsv").read_text()  # the judgment stays


def test_docids_from_texts_is_refused_where_it_can_do_nothing(tmp_path):
    root, out = beir(tmp_path / "in"), tmp_path / "out"
    assert "for --source tevatron" in refused("beir", root, out, "--lang", "ja", "--docids-from-texts")
    write(tmp_path / "t/train.jsonl", [query("1", [passage("a")])])
    write(tmp_path / "t/corpus.jsonl", [passage("a")])
    message = refused("tevatron", tmp_path / "t", out, "--docids-from-texts")
    assert f"docids are those of {tmp_path / 't/corpus.jsonl'}" in message
    twice = [{"_id": "d1", "text": "one"}, {"_id": "d1", "text": "two"}]
    write(root / "corpus.jsonl", twice)
    assert refused("beir", root, out, "--lang", "ja").endswith("; rename one")


def test_what_is_there_instead_of_a_language_or_a_layout_is_told(tmp_path):
    write(tmp_path / "t.jsonl", [query("1", [passage("a")])])
    assert "no te there, but sw" in refused(
        "tevatron", tmp_path / "t.jsonl", tmp_path / "out", "--lang", "te"
    )
    triplet = {"query_id": "1", "lang": "sw", "anchor": "q", "positive": "p", "negative": "n"}
    path = bad(tmp_path, "u.jsonl", [triplet])
    message = refused("tevatron", path, tmp_path / "out")
    assert message.startswith(f"{path}:1: query_id lang anchor positive negative: neither positive_passages")


@pytest.mark.parametrize(
    "records, said",
    [
        (
            [query("1", [passage("a", "x")]), query("2", [passage("a", "y")])],
            ":2: docid 'a' has another text at",
        ),
        ([{"lang": "sw", "query": "q", "pos": "a text", "neg": []}], "'positive_passages' is no list"),
        (
            [{"query_id": "1", "query": "q", "positive_document_ids": ["a"]}],
            "positive_document_ids have no texts",
        ),
        ([query("1", [passage("a")]), query("1", [passage("b")])], ":2: query '1' is there twice"),
        ([query("1", [passage("a")]), query("2", [])], ":2: query '2' has no positive_passages"),
        ([query("1", [passage("a")]), query([2], [passage("b")])], ":2: 'query_id' is [2]"),
        ([query("1", [passage("a")], [5])], ":1: negative_passages: a passage is 5; want"),
        ([query("1", [passage("a", "")])], ":1: positive_passages: passage 'a': 'text' is \"\""),
        ([query("1", [passage("a")], lang="../x")], "cannot name a file"),
        ([{"query_id": "1", "query": "q", "positive_passages": [passage("a")]}], ":1: no 'lang'"),
    ],
)
def test_tevatron_errors(tmp_path, records, said):
    path = bad(tmp_path, "t.jsonl", records)
    message = refused("tevatron", path, tmp_path / "out")
    assert message.startswith(str(path)) and said in message


# --------------------------------------------------------------------------- what people bring


def article(title, *paragraphs):
    """A SQuAD article of (context, [questions]); a question is (id, text) or has more fields."""
    made = []
    for context, questions in paragraphs:
        qas = [
            q if isinstance(q, dict) else {"id": q[0], "question": q[1], "answers": ["x"]} for q in questions
        ]
        made.append({"context": context, "qas": qas})
    return {"title": title, "paragraphs": made}


def write_squad(root, **articles):
    for lang, of_lang in articles.items():
        write(root / f"x.{lang}.json", json.dumps({"data": of_lang}))
    return root


def splits(out, key="query_id"):
    return [{r[key] for r in read(out / f"{split}.jsonl")} for split in ("train", "dev")]


def test_a_paragraph_spelt_in_another_way_is_one_passage(tmp_path):
    spelt = ["제목 서울", unicodedata.normalize("NFD", "제목 서울"), "제목  서울\n"]
    articles = [article(f"T{n}", (text, [(f"q{n}", f"질문 {n}")])) for n, text in enumerate(spelt)]
    articles += [article(f"U{n}", (f"다른 {n}", [(f"r{n}", f"물음 {n}")])) for n in range(3)]
    for seed in range(4):
        prepare("squad", write_squad(tmp_path / "in", ko=articles), tmp_path / "out", "--seed", seed)
        assert len(read(tmp_path / "out/corpus/ko.jsonl")) == 4
        train, dev = splits(tmp_path / "out")
        assert dev and {"q0", "q1", "q2"} in (train & {"q0", "q1", "q2"}, dev & {"q0", "q1", "q2"})


@pytest.mark.parametrize("how", ["same titles", "translated titles", "another order", "fewer articles"])
def test_translations_are_held_out_together(tmp_path, how):
    def translated(lang):
        made = [
            article(f"T{n}", *((f"{lang} {n} {k}", [(f"q{n}-{k}", f"{lang}? {n}{k}")]) for k in range(3)))
            for n in range(30)
        ]
        if lang == "de" and how == "translated titles":
            made = [a | {"title": f"de {a['title']}"} for a in made]
        if lang == "de" and how == "another order":
            made = [a | {"title": ""} for a in made[::-1]]
        return made[7:] if lang == "de" and how == "fewer articles" else made

    root = write_squad(tmp_path / "in", en=translated("en"), de=translated("de"), es=translated("es"))
    prepare("squad", root, tmp_path / "out")
    train, dev = splits(tmp_path / "out")
    assert dev and not train & dev


def test_translated_records_and_one_question_under_several_ids_are_held_out_together(tmp_path):
    def asked(n, lang, text):
        return query(f"{n}", [passage(f"p{n}", f"{lang} {n}")], lang=lang) | {"query": text}

    records = [
        asked(n, lang, f"{lang} {n // 3}?" + " " * (n % 3)) for lang in ("sw", "te") for n in range(60)
    ]
    write(tmp_path / "t.jsonl", records)
    prepare("tevatron", tmp_path / "t.jsonl", tmp_path / "out")
    train, dev = splits(tmp_path / "out")
    assert len(dev) == 6 and not train & dev
    train, dev = splits(tmp_path / "out", "query")
    assert not {" ".join(q.split()) for q in train} & {" ".join(q.split()) for q in dev}


def test_a_question_in_both_of_two_given_splits_is_told(tmp_path):
    root = beir(tmp_path / "in")
    write(
        root / "queries.jsonl",
        [{"_id": "q1", "text": "Qué  es"}, {"_id": "q2", "text": "que\u0301 es".upper()}],
    )
    write(root / "qrels/train.tsv", "q2\td1\t1\n")
    write(root / "qrels/test.tsv", "q1\td1\t1\n")
    said = prepare("beir", root, tmp_path / "out", "--lang", "es")
    assert "1 train queries with the same text as a dev query" in said


@pytest.mark.parametrize(
    "fields, answerable",
    [
        ({"answers": [{"text": "x", "answer_start": 0}]}, True),
        ({"answers": {"text": ["x"], "answer_start": [0]}, "is_impossible": "False"}, True),
        ({"answers": ["x"], "is_impossible": 0, "plausible_answers": []}, True),
        ({}, True),  # as in test sets
        ({"answers": []}, False),
        ({"answers": None}, False),
        ({"answers": [{"text": " "}]}, False),
        ({"answers": [{"text": None}]}, False),
        ({"answers": {"text": [], "answer_start": []}}, False),
        ({"plausible_answers": [{"text": "x"}]}, False),
        ({"answers": [{"text": "x"}], "is_impossible": True}, False),
        ({"answers": [{"text": "x"}], "is_impossible": "True"}, False),
    ],
)
def test_unanswerable_questions_in_all_their_spellings(fields, answerable):
    assert load_stage("00_prepare_data").has_answer({"id": "1", "question": "?"} | fields) == answerable


@pytest.mark.parametrize("layout", ["list", "paragraphs", "questions", "columns", "BOM", "pretty"])
def test_squad_files_of_other_layouts(tmp_path, layout):
    articles = [article(f"T{n}", (f"c{n}", [(n, f"q{n}?")])) for n in range(4)]
    flat = [
        {"id": n, "title": f"T{n}", "context": f"c{n}", "question": f"q{n}?", "answers": ["x"]}
        for n in range(4)
    ]
    content = {
        "list": articles,
        "paragraphs": [a["paragraphs"][0] | {"title": a["title"]} for a in articles],
        "questions": flat,
        "columns": [q | {"answers": {"text": ["x"], "answer_start": [0]}} for q in flat],
    }.get(layout, {"data": articles})
    text = json.dumps(content, indent=1 if layout == "pretty" else None)
    write(tmp_path / "in/x.sw.json", "\ufeff" * (layout == "BOM") + text)
    prepare("squad", tmp_path / "in", tmp_path / "out")
    assert read(tmp_path / "out/corpus/sw.jsonl") == [passage(f"{n}#0", f"c{n}", f"T{n}") for n in range(4)]
    train, dev = splits(tmp_path / "out")
    assert train | dev == {"0", "1", "2", "3"} and len(dev) == 1


def test_squad_files_whose_names_have_no_language(tmp_path):
    squad(tmp_path / "in")
    for name in ("dev-v2.0.json", "squad.dev.json", "x.json"):
        path = tmp_path / "in" / name
        write(path, (tmp_path / "in/dev.ko.json").read_bytes())
        message = refused("squad", tmp_path / "in", tmp_path / "out")
        assert message.startswith(f"{path}: want NAME.CODE.json[.gz]") and "--lang CODE" in message
        path.unlink()
    for path in list((tmp_path / "in").iterdir()):
        path.rename(path.with_name(path.name.replace(".ko.", "-v1.")))
    prepare("squad", tmp_path / "in", tmp_path / "out", "--lang", "ko")
    assert len(read(tmp_path / "out/corpus/ko.jsonl")) == 40
    prepare("squad", tmp_path / "in/dev-v1.json", tmp_path / "out", "--lang", "ko")
    assert len(read(tmp_path / "out/corpus/ko.jsonl")) == 1


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    root = beir(tmp_path / "in")
    prepare("beir", root, tmp_path / "plain", "--lang", "ja")
    for path in root.rglob("*.*"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    prepare("beir", root, tmp_path / "marked", "--lang", "ja")
    assert tree(tmp_path / "plain") == tree(tmp_path / "marked")
    write(tmp_path / "th" / TOPICS, "\ufeffq#1\ta\n")
    root = miracl(tmp_path / "th2")
    write(root / TOPICS, "\ufeffq#1\ta\n007\tb\n")
    prepare("miracl", root, tmp_path / "out")
    assert read(tmp_path / "out/train.jsonl")[0]["query_id"] == "q#1"


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
@pytest.mark.parametrize("n_lines", [1, 3])
def test_utf_16_and_other_packers_are_named(tmp_path, name, n_lines):
    root, out = beir(tmp_path / "in"), tmp_path / "out"
    lines = (root / name).read_text("utf-8").splitlines(keepends=True)[-n_lines:]
    (root / name).write_bytes("".join(lines).encode("utf-16"))
    message = refused("beir", root, out, "--lang", "ja")
    assert message.startswith(f"{root / name}:1: not valid UTF-8") and "convert the file" in message
    (root / name).rename(root / f"{name}.zst")
    message = refused("beir", root, out, "--lang", "ja")
    assert message.startswith(f"{root / name}.zst:1: not valid UTF-8") and "unpack it" in message


@pytest.mark.parametrize(
    "qrels",
    [
        "query-id\tcorpus-id\tscore\nq2\td1\t2\nq2\td2\t-1\n",
        "qid docid rel\nq2 d1 2\nq2 d2 -1\n",
        "q2 0 d1 2\nq2 Q0 d2 -1\n",
        "query_id\titer\tdocument_id\trelevance\r\nq2\t0\td1\t 2 \r\nq2\t0\td2\t-1.0\r\n",
        "q2\td1\t2.0\n\nq2\td1\t2\nq2\td2\t-1\n",  # one judgment twice, the same
    ],
)
def test_qrels_of_other_layouts(tmp_path, qrels):
    root = beir(tmp_path / "in")
    write(root / "qrels/train.tsv", qrels)
    prepare("beir", root, tmp_path / "out", "--lang", "ja")
    assert (tmp_path / "out/qrels/train/ja.tsv").read_text() == "q2\t0\td1\t2\nq2\t0\td2\t-1\n"
    record = read(tmp_path / "out/train.jsonl")[0]
    assert [p["docid"] for p in record["positive_passages"] + record["negative_passages"]] == ["d1", "d2"]


def test_ids_that_are_numbers_are_strings_of_them(tmp_path):
    root = tmp_path / "in"
    write(root / "corpus.jsonl", [{"_id": 1, "text": "one"}, {"_id": 2.0, "title": None, "text": "two"}])
    write(root / "queries.jsonl", [{"_id": 7, "text": "?"}])
    write(root / "qrels/test.tsv", "7\t1\t1\n7\t2\t0\n")
    prepare("beir", root, tmp_path / "out", "--lang", "sw")
    record = read(tmp_path / "out/dev.jsonl")[0]
    assert record["query_id"] == "7" and record["positive_passages"] == [passage("1", "one")]
    assert record["negative_passages"] == [passage("2", "two", source="human")]
    write(
        tmp_path / "t.jsonl", [query(n, [passage(n, f"x{n}")], [passage(10 + n, f"y{n}")]) for n in range(3)]
    )
    prepare("tevatron", tmp_path / "t.jsonl", tmp_path / "out2")
    assert {p["docid"] for p in read(tmp_path / "out2/corpus/sw.jsonl")} == {"0", "1", "2", "10", "11", "12"}


def test_a_title_without_a_text_is_a_document(tmp_path):
    root = beir(tmp_path / "in")
    corpus = [{"_id": "d1", "title": "題", "text": ""}, {"_id": "d2", "title": "二", "text": None}]
    write(root / "corpus.jsonl", [*corpus, {"_id": "d3", "title": " ", "text": ""}])
    said = prepare("beir", root, tmp_path / "out", "--lang", "ja")
    assert read(tmp_path / "out/corpus/ja.jsonl") == [passage("d1", "", "題"), passage("d2", "", "二")]
    assert "1 empty passages" in said
    assert read(tmp_path / "out/train.jsonl")[0]["positive_passages"] == [passage("d1", "", "題")]


def test_flagembeddings_scores_and_prompts_do_no_harm(tmp_path):
    more = {"pos_scores": [1.5], "neg_scores": [0.1], "prompt": "Represent", "type": "normal"}
    records = [
        {"query": f"q{n}", "pos": [f"p{n}"], "neg": [f"n{n}", f"n{n} ", f"p{n}"]} | more for n in range(3)
    ]
    write(tmp_path / "bge.jsonl", records)
    said = prepare("tevatron", tmp_path / "bge.jsonl", tmp_path / "out", "--lang", "th")
    for record in read(tmp_path / "out/train.jsonl"):
        assert [p["text"][0] for p in record["positive_passages"] + record["negative_passages"]] == ["p", "n"]
    assert "6 negatives that their query has already" in said


def test_a_relevance_that_nothing_has_is_named(tmp_path):
    message = refused("beir", beir(tmp_path / "in"), tmp_path / "out", "--lang", "ja", "--min-relevance", 3)
    assert "no query has a positive (relevance 3) there" in message and "another --min-relevance" in message
    question = {"id": "1", "question": "?", "answers": []}
    root = write_squad(tmp_path / "squad", sw=[article("T", ("c", [question]))])
    done = run_stage(SCRIPT, "--source", "squad", "--root", root, "--out", tmp_path / "out")
    assert done.returncode == 2 and "sw: 1 unanswerable questions, 1 passages" in done.stderr


# --------------------------------------------------------------------------- sample; the folder as a whole


def test_the_sample_is_copied_whole(tmp_path):
    done = run_stage(SCRIPT, "--source", "sample", "--out", tmp_path / "out")
    assert done.returncode == 0 and tree(tmp_path / "out") == tree(ROOT / "sample/data")
    run_stage(SCRIPT, "--source", "sample", "--out", tmp_path / "cut", "--lang", "th", "--limit", 1)
    assert [r["lang"] for r in read(tmp_path / "cut/train.jsonl")] == ["th"]
    assert sorted(tree(tmp_path / "cut")) == [
        "corpus/th.jsonl",
        "dev.jsonl",
        "qrels/dev/th.tsv",
        "qrels/train/th.tsv",
        "train.jsonl",
    ]
    assert "--source sample" not in refused("sample", tmp_path, tmp_path / "no")


def test_the_input_is_not_overwritten(tmp_path):
    root = beir(tmp_path / "in")
    before = tree(root)
    done = run_stage(SCRIPT, "--source", "beir", "--root", root, "--out", root, "--lang", "ja", "--overwrite")
    assert done.returncode == 2 and "where the input lies" in done.stderr and tree(root) == before


def test_a_finished_output_is_kept_and_a_changed_one_made_again(tmp_path):
    root, out = miracl(tmp_path / "in"), tmp_path / "out"
    prepare("miracl", root, out)
    (out / "mine.txt").write_text("kept")
    before = tree(out), (out / "train.jsonl").stat().st_ino
    assert "is up to date" in prepare("miracl", root, out)
    assert (tree(out), (out / "train.jsonl").stat().st_ino) == before
    assert "is missing or was changed" not in prepare("miracl", root, out, "--overwrite")
    assert (out / "train.jsonl").stat().st_ino != before[1] and tree(out) == before[0]
    (out / "dev.jsonl").write_text("")
    assert "a file is missing or was changed" in prepare("miracl", root, out) and tree(out) == before[0]
    write(root / TOPICS, "q#1\tchanged\n007\tagent?\n")
    assert "changed, making it again" in prepare("miracl", root, out)
    assert read(out / "train.jsonl")[0]["query"] == "changed"
    assert "changed, making it again" in prepare("miracl", root, out, "--limit", 1)


def test_what_others_put_into_the_folder_stays_at_every_depth(tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # empty, as a volume that was mounted is
    prepare("miracl", miracl(tmp_path / "in"), out)
    write(out / "notes/corpus/x.txt", "x")
    write(out / "notes/train.jsonl", "mine")
    (out / "link").symlink_to(tmp_path / "nowhere")
    (out / "folder").symlink_to(tmp_path / "in")
    prepare("miracl", tmp_path / "in", out, "--limit", 1)
    assert tree(out / "notes") == {"corpus/x.txt": b"x", "train.jsonl": b"mine"}
    assert (out / "link").is_symlink() and (out / "folder").is_symlink()


@pytest.mark.parametrize("name", ["corpus/de.jsonl", "qrels/dev/de.tsv"])
def test_what_others_put_where_it_would_be_replaced_is_told(tmp_path, name):
    out = tmp_path / "out"
    prepare("miracl", miracl(tmp_path / "in"), out)
    write(out / name, "mine")
    done = run_stage(SCRIPT, "--source", "miracl", "--root", tmp_path / "in", "--out", out, "--limit", 1)
    assert done.returncode == 2 and f"holds {name}, which this script did not make" in done.stderr
    assert (out / name).read_text() == "mine"


def test_a_collection_of_another_source_is_not_replaced(tmp_path):
    """As `make all DATA=FOLDER` would, whose default source is the sample."""
    out = tmp_path / "out"
    prepare("miracl", miracl(tmp_path / "in"), out)
    before = tree(out)
    done = run_stage(SCRIPT, "--source", "sample", "--lang", "sw", "--out", out)
    assert done.returncode == 2 and "out was made from --source miracl; pass --overwrite" in done.stderr
    assert tree(out) == before


def test_the_temporary_files_of_a_longer_name_are_not_taken_for_leavings(tmp_path):
    for name in (".out.v2.123.tmp", ".out.v2.old", ".out.123.tmp", ".out.meta.json.123.tmp"):
        write(tmp_path / name / "train.jsonl", "x")
    prepare("miracl", miracl(tmp_path / "in"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".out.v2.123.tmp", ".out.v2.old"]


def test_languages_are_a_set(tmp_path):
    root, out = miracl(tmp_path / "in", ["ko", "th"]), tmp_path / "out"
    prepare("miracl", root, out, "--lang", "th", "ko")
    assert "up to date" in prepare("miracl", root, out, "--lang", "ko", "th", "ko")
    path = tmp_path / "out.meta.json"  # as it was before they were
    meta = json.loads(path.read_text("utf-8"))
    meta["arguments"] |= {"lang": ["th", "ko", "th"], "answer_tokens": 16}
    path.write_text(json.dumps(meta))
    assert "up to date" in prepare("miracl", root, out, "--lang", "ko", "th")


def test_a_bad_input_leaves_a_finished_output_alone(tmp_path):
    root, out = miracl(tmp_path / "in"), tmp_path / "out"
    prepare("miracl", root, out)
    before = tree(out)
    write(root / QRELS, "q#1\tQ0\n")
    assert run_stage(SCRIPT, "--source", "miracl", "--root", root, "--out", out).returncode == 2
    assert tree(out) == before


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    write(tmp_path / "out/train.jsonl", "mine")
    done = run_stage(
        SCRIPT, "--source", "miracl", "--root", miracl(tmp_path / "in"), "--out", tmp_path / "out"
    )
    assert done.returncode == 2 and "--overwrite" in done.stderr
    assert tree(tmp_path / "out") == {"train.jsonl": b"mine"}


@pytest.mark.parametrize("where, nth", [("stage.Collection.add_part", 2), ("Path.rename", 1)])
def test_a_killed_run_can_be_started_again(tmp_path, where, nth):
    """Killed in the second language, or after the old folder is gone, before the new one is in place."""
    root, out = miracl(tmp_path / "in", ["ko", "th"]), tmp_path / "out"
    prepare("miracl", root, out, "--limit", 1)
    prepare("miracl", root, tmp_path / "whole")
    holder, name = where.rsplit(".", 1)
    code = (
        f"import os, sys; from pathlib import Path; sys.argv[0] = {SCRIPT!r}\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from conftest import load_stage\n"
        "stage = load_stage('00_prepare_data'); calls = []\n"
        f"whole = {where}\n"
        f"def until(*a): return os._exit(9) if calls.append(1) or len(calls) == {nth} else whole(*a)\n"
        f"setattr({holder}, {name!r}, until)\n"
        f"stage.main(['--source', 'miracl', '--root', {str(root)!r}, '--out', {str(out)!r}])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    prepare("miracl", root, out)
    assert tree(out) == tree(tmp_path / "whole")


def test_two_runs_at_once_both_end_well(tmp_path):
    root, out = miracl(tmp_path / "in", ["ko", "th"]), tmp_path / "out"
    command = [sys.executable, ROOT / SCRIPT, "--source", "miracl", "--root", root, "--out", out]
    runs = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    prepare("miracl", root, tmp_path / "alone")
    assert tree(out) == tree(tmp_path / "alone") and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.skipif(not MINI.is_dir(), reason=f"mini-MIRACL is not at {MINI}")
def test_mini_miracl_in_swahili_has_the_counts_of_its_readme(tmp_path):
    prepare("miracl", MINI, tmp_path / "out", "--lang", "sw")
    row = next(line for line in (MINI / "README.md").read_text().splitlines() if line.startswith("| sw |"))
    cells = [float(cell.replace(",", "")) for cell in row.strip("| ").split("|")[1:]]
    n_passages, _, n_train, n_judged, per_train, n_dev, n_dev_judged, per_dev = cells
    assert len(read(tmp_path / "out/corpus/sw.jsonl")) == n_passages == 3597
    for split, n, judged, per_query in (
        ("train", n_train, n_judged, per_train),
        ("dev", n_dev, n_dev_judged, per_dev),
    ):
        records = read(tmp_path / "out" / f"{split}.jsonl")
        assert len(records) == n
        assert round(sum(len(r["positive_passages"]) for r in records) / n, 2) == per_query
        assert sum(len(r["positive_passages"]) + len(r["negative_passages"]) for r in records) == judged
        assert len((tmp_path / f"out/qrels/{split}/sw.tsv").read_text().splitlines()) == judged
