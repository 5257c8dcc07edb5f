"""Stage 03: exactly N negatives, guards on what the LLM writes, kills and resumes; over a real socket."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny_lm
from conftest import ROOT, load_stage, run_stage

import offline_llm
from common import DataError
from sample import stand_in

LANGS = ["sw", "th"]
GIBBERISH = "zxqv bnmk lkjh qqww vvbn wqxz jjkq xzvb"
ENGLISH = "This answer is in the English language, whatever the question was about."


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")


class Server:
    """offline_llm.py's answers over HTTP; `reply` may replace a text, `seen` holds all requests, in order."""

    def __init__(self):
        self.seen, self.reply, self.before = [], lambda kind, text: text, lambda: None
        self.finish = "stop"
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1  # no 40 ms waits

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.seen.append(body)
                server.before()
                answer = offline_llm.complete(json.dumps(body))
                message = answer["choices"][0]["message"]
                message["content"] = server.reply(kind_of(body), message["content"])
                answer["choices"][0]["finish_reason"] = server.finish
                data = json.dumps(answer).encode()
                try:
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client was killed

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def kind_of(body):
    """judge, summary, query or written: what a request asks for."""
    user = body["messages"][-1]["content"]
    signs = {"judge": "Candidate passage", "written": "Passage that answers it", "query": "\nSummary:"}
    return next((kind for kind, sign in signs.items() if sign in user), "summary")


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def data(tmp_path):
    """A cut of the sample in Swahili and Thai: data/, and in.jsonl whose queries have no negatives yet."""
    for lang in LANGS:
        (tmp_path / "data/corpus").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f"sample/data/corpus/{lang}.jsonl", tmp_path / "data/corpus")
    records = [
        r | {"negative_passages": []} for r in read(ROOT / "sample/data/train.jsonl") if r["lang"] in LANGS
    ]
    write(tmp_path / "in.jsonl", [r for r in records if int(r["query_id"]) < 6])
    return tmp_path


def arguments(top, server, *more, target=12, out="out.jsonl", source="in.jsonl", cache="cache"):
    fixed = ["--retrievers", "bm25", "--llm", "m", "--base-url", server.url, "--target", target]
    paths = ["--input", top / source, "--data", top / "data", "--cache", top / cache, "--out", top / out]
    return list(map(str, [*paths, *fixed, *more]))


def generate(top, server, *more, **kwargs):
    """Run the stage in this process; (records, counts of the meta file)."""
    load_stage("03_generate_negatives").main(arguments(top, server, *more, **kwargs))
    out = top / kwargs.get("out", "out.jsonl")
    return read(out), json.loads(out.with_name(out.name + ".meta.json").read_text("utf-8"))["counts"]


def outcomes(counts):
    return sum((Counter(row["outcomes"]) for row in counts["by_lang"].values()), Counter())


# --------------------------------------------------------------------------- exactly N, and which


def check(records, target):
    for record in records:
        negatives, relevant = (
            record["negative_passages"],
            record["positive_passages"] + record["false_negatives"],
        )
        assert len(negatives) == target
        assert len({p["docid"] for p in negatives}) == len({p["text"] for p in negatives}) == target
        assert not {p["docid"] for p in negatives} & {p["docid"] for p in relevant}
        assert not {p["text"] for p in negatives} & {p["text"] for p in relevant}


@pytest.mark.parametrize("mode", ["retrieve", "write"])
def test_every_query_gets_exactly_n_that_are_new_and_judged(data, server, mode):
    records, counts = generate(data, server, "--mode", mode)
    check(records, 12)
    source = "generated-query" if mode == "retrieve" else "written"
    added = [p for r in records for p in r["negative_passages"] if p["source"] == source]
    assert added and all(p["grade"] == 0 for p in added)
    if mode == "retrieve":
        assert all(r["summary"] and r["generated_query"] for r in records)
    assert [(r["lang"], r["query_id"]) for r in records] == [
        (r["lang"], r["query_id"]) for r in read(data / "in.jsonl")
    ]
    assert counts["still_short"] == 0 and len(counts["examples"]) == 5


def test_given_negatives_that_are_positives_false_negatives_or_repeated_are_replaced(data, server):
    record = read(data / "in.jsonl")[0]
    others = [
        p
        for p in read(data / f"data/corpus/{record['lang']}.jsonl")
        if p["docid"] != record["positive_passages"][0]["docid"]
    ]
    positive, false_negative = record["positive_passages"][0], others[0]
    bad = [
        positive,
        positive | {"docid": "copy"},
        false_negative,
        false_negative | {"docid": "copy2"},
        others[1],
        others[1],
        others[1] | {"docid": "copy3"},
        others[1] | {"docid": "copy4", "title": "Another title"},
    ]
    write(data / "in.jsonl", [record | {"negative_passages": bad, "false_negatives": [false_negative]}])
    (out,), _ = generate(data, server)
    check([out], 12)
    assert out["negative_passages"][0]["docid"] == others[1]["docid"]
    assert not {"copy", "copy2", "copy3", "copy4"} & {p["docid"] for p in out["negative_passages"]}


def test_what_answers_the_same_question_under_another_id_is_no_negative(data, server):
    first, second, *_ = read(data / "in.jsonl")
    twin = first | {"query_id": "twin", "query": f" {first['query'].upper()}"}
    twin["positive_passages"] = second["positive_passages"]
    write(data / "in.jsonl", [first, twin])
    out, _ = generate(data, server, "--no-judge-new", target=40)
    answers = {p["docid"] for record in (first, twin) for p in record["positive_passages"]}
    assert not any(p["docid"] in answers for record in out for p in record["negative_passages"])


def test_candidates_that_nobody_judged_are_no_input(data, server):
    rows = read(data / "in.jsonl")
    write(data / "in.jsonl", [rows[0] | {"candidate_passages": rows[0]["positive_passages"]}])
    done = run_stage("03_generate_negatives.py", *arguments(data, server))
    assert done.returncode == 2 and "in.jsonl:1: candidates that nobody has judged; run 02_" in done.stderr


def test_a_judge_that_does_not_judge_is_told_and_not_made_up_for_at_random(data, server):
    server.reply = lambda kind, text: "I would rather not say." if kind == "judge" else text
    with pytest.raises(DataError, match="new passages got no usable judgment .unparsable., more than"):
        generate(data, server)
    assert not (data / "out.jsonl").exists()


def test_a_query_that_is_announced_and_explained_is_the_query(data, server):
    server.reply = lambda kind, text: f"Here is a query:\n\n{text}\n\nIt asks." if kind == "query" else text
    announced, _ = generate(data, server)
    server.reply = lambda kind, text: text
    plain, _ = generate(data, server, out="plain.jsonl", cache="other")
    queries = [[record["generated_query"] for record in records] for records in (announced, plain)]
    assert queries[0] == queries[1] and any(queries[0])


def test_queries_that_are_not_short_cost_no_call_and_keep_their_first_n(data, server):
    write(data / "full.jsonl", generate(data, server)[0])
    n_asked = len(server.seen)
    records, counts = generate(data, server, source="full.jsonl", out="again.jsonl", target=9)
    assert len(server.seen) == n_asked and counts["short_at_first"] == 0
    assert sum(row["given_left_out"] for row in counts["by_lang"].values()) == 3 * len(records)  # of 12
    assert [r["negative_passages"] for r in records] == [
        r["negative_passages"][:9] for r in read(data / "full.jsonl")
    ]


def test_passages_judged_relevant_become_false_negatives(data, server):
    server.reply = lambda kind, text: '{"accuracy": 2, "completeness": 1}' if kind == "judge" else text
    records, counts = generate(data, server)
    assert all(
        {p["source"] for p in r["negative_passages"]} == {"random"} and r["false_negatives"] for r in records
    )
    check(records, 12)
    assert outcomes(counts)["found: judged relevant"] == sum(len(r["false_negatives"]) for r in records)
    records, _ = generate(data, server, "--drop-at", 2)
    assert all(
        p["grade"] == 1 for r in records for p in r["negative_passages"] if p["source"] == "generated-query"
    )


def test_flags_change_what_is_asked(data, server):
    def asked(*flags):
        server.seen.clear()
        generate(
            data,
            server,
            "--limit",
            3,
            *flags,
            target=6,
            out=f"{len(flags)}{flags[:1]}.jsonl",
            cache=f"c{flags}",
        )
        return Counter(map(kind_of, server.seen)), server.seen[:]

    usual, _ = asked()
    assert asked("--no-judge-new")[0]["judge"] == 0 < usual["judge"]
    votes, bodies = asked("--votes", "3")
    assert votes["judge"] == 3 * usual["judge"] and {
        b.get("seed") for b in bodies if kind_of(b) == "judge"
    } == {0, 1, 2}
    assert all("Reference" in b["messages"][1]["content"] for b in bodies if kind_of(b) == "judge")
    assert not any(
        "Reference" in b["messages"][1]["content"]
        for b in asked("--no-reference")[1]
        if kind_of(b) == "judge"
    )
    seeds = {b["seed"] for b in asked("--seed", "14")[1] if kind_of(b) == "summary"}
    assert (
        not seeds & {b["seed"] for b in bodies if kind_of(b) == "summary"} and len(seeds) == usual["summary"]
    )
    assert all(
        (b["temperature"], b["top_p"], b["max_tokens"]) == (0.7, 0.9, 256)
        for b in bodies
        if kind_of(b) == "summary"
    )
    assert all(
        (b["temperature"], b["top_p"], b["max_tokens"]) == (0.7, 0.9, 128)
        for b in bodies
        if kind_of(b) == "query"
    )
    server.reply = lambda kind, text: '{"accuracy": 2, "completeness": 2}' if kind == "judge" else text
    assert asked("--rounds", "1")[0]["summary"] < asked("--rounds", "2")[0]["summary"]
    assert all(b["model"] == ("j" if kind_of(b) == "judge" else "m") for b in asked("--judge-llm", "j")[1])


def test_written_text_must_be_judged_0_whatever_drop_at_says(data, server):
    server.reply = lambda kind, text: '{"accuracy": 1, "completeness": 1}' if kind == "judge" else text
    records, counts = generate(data, server, "--mode", "write", "--drop-at", 2, "--max-drift", 1)
    assert {p["source"] for r in records for p in r["negative_passages"]} == {"random"}
    assert outcomes(counts)["written rejected: judged relevant"] > 0


@pytest.mark.parametrize("target, most", [(1, 0), (3, 1), (12, 6)])
def test_at_most_half_is_written(data, server, target, most):
    def reply(kind, text):
        if kind != "written":
            return text
        return random.Random(len(server.seen)).choice(SENTENCES) + " " + text

    server.reply = reply
    records, _ = generate(
        data, server, "--mode", "write", "--max-drift", 1, "--concurrency", 1, target=target
    )
    written = [[p for p in r["negative_passages"] if p["source"] == "written"] for r in records]
    assert max(map(len, written)) <= most and (most == 0 or any(written))
    for record, passages in zip(records, written):
        assert {p["title"] for p in passages} <= {record["positive_passages"][0]["title"]}


SENTENCES = [p["text"] for lang in LANGS for p in read(ROOT / f"sample/data/corpus/{lang}.jsonl")]


# --------------------------------------------------------------------------- guards


@pytest.mark.parametrize("mode", ["retrieve", "write"])
@pytest.mark.parametrize("reason", ["gibberish", "language", "repeats", "refused", "empty", "loop"])
def test_a_model_that_drifts_changes_no_record_and_the_exit_says_so(data, server, mode, reason):
    def reply(kind, text):
        body = server.seen[-1]["messages"][-1]["content"]
        passage = json.loads(body.rsplit(": ", 1)[1])
        return {"judge": text}.get(kind) or {
            "gibberish": GIBBERISH,
            "language": ENGLISH,
            "repeats": passage,
            "empty": " ",
            "refused": "I'm sorry, but I can't help with that.",
            "loop": passage.split()[0] * 40,
        }[reason]

    server.reply = reply
    with pytest.raises(load_stage("03_generate_negatives").DataError) as error:
        generate(data, server, "--mode", mode, "--concurrency", 1)
    said = str(error.value)
    assert "the guards rejected" in said and "--max-drift" in said and "nothing was written" in said
    wanted = {"gibberish": "language|gibberish", "repeats": "repeats", "loop": "gibberish|language"}.get(
        reason, reason
    )
    assert any(f"rejected: {w}" in said for w in wanted.split("|"))
    assert not (data / "out.jsonl").exists()


def test_rejected_answers_are_asked_again_with_another_seed_and_counted(data, server):
    """Every first try is in English; the second is good."""
    tried, kinds = Counter(), Counter()

    def reply(kind, text):
        if kind == "judge":
            return text
        prompt = server.seen[-1]["messages"][-1]["content"]
        tried[prompt] += 1
        kinds[kind] += tried[prompt] == 1
        return ENGLISH if tried[prompt] == 1 else text

    server.reply = reply
    records, counts = generate(data, server, "--concurrency", 1)
    check(records, 12)
    assert {k: outcomes(counts)[f"{k} rejected: language"] for k in ("summary", "query")} == kinds
    assert kinds["summary"] >= len(records)
    assert not any(ENGLISH in (r["summary"], r["generated_query"]) for r in records)
    prompts = [(b["messages"][-1]["content"], b["seed"]) for b in server.seen if kind_of(b) != "judge"]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Mji wa Nairobi uko nchini Kenya na una watu wengi wanaofanya biashara.", None),
        ("Nairobi is a city in Kenya with many people who trade there every day.", "language"),
        (GIBBERISH, "language|gibberish"),
        ("na na na na na na na na na na na na na na na", "gibberish"),
        ("I cannot help with this.", "refused"),
        ("Mji.", "length"),
        ("Mji mkubwa wa Kenya " * 90, "gibberish|length"),
    ],
)
def test_guards(data, text, reason):
    stage = load_stage("03_generate_negatives")
    guard = stage.Guard(
        data / "data", "sw", ["Mji mkuu wa Kenya ni upi?", "Watu wa Nairobi wanafanya biashara gani?"]
    )
    assert guard.reason(text, "written") in (reason.split("|") if reason else [None])
    assert reason or guard.reason(text, "written", [text + " Tena."]) == "repeats"


def test_passages_of_people_pass_the_guards(data):
    stage = load_stage("03_generate_negatives")
    for lang in LANGS:
        questions = [r["query"] for r in read(data / "in.jsonl") if r["lang"] == lang]
        guard = stage.Guard(data / "data", lang, questions)
        assert all(
            guard.reason(p["text"], "written") is None for p in read(data / f"data/corpus/{lang}.jsonl")
        )
        assert all(guard.reason(q, "query") is None for q in questions)


def test_repeating_is_sharing_most_runs_of_five_letters():
    stage = load_stage("03_generate_negatives")
    assert stage.repeats("Nairobi ni mji", ["x", "nairobi  NI mji"])
    assert not stage.repeats("Nairobi ni mji", ["Nairobi ni jina", ""]) and not stage.repeats("Nairobi", [])
    # abcde bcdef cdefg defgh | efghi: 4 of 5 in common is enough, 4 of 6 is not
    assert stage.repeats("abcdefgh", ["abcdefghi"]) and not stage.repeats("abcdefgh", ["abcdefghij"])


# --------------------------------------------------------------------------- garbage, and texts of people

SENTENCE_END = re.compile(r"[.!?。！？।۔؟]+(?:\s|$)|[。！？]")


def first_sentences(text, n=2):
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    return text[: ends[n - 1]].strip() if len(ends) >= n else text


def garbage(record, other, stage, draw):
    """{what: (query or summary, text)}: what models that drift answer, mostly in the record's language."""
    question, passage = record["query"], stage.passage_text(record["positive_passages"][0])
    language = stage.common.LANGUAGES[record["lang"]]
    summary = first_sentences(record["positive_passages"][0]["text"])
    words = passage.split() if len(passage.split()) > 20 else list(passage)
    word = draw.choice(words[:20])
    number = draw.randrange(1, 2000)
    return {
        "prompt": ("query", stage.ASK.format(language=language).split(". ")[draw.randrange(1, 4)]),
        "prompt of the summary": ("summary", stage.SUMMARISE.format(language=language)[-160:]),
        "a label": ("query", draw.choice(["Input:", "Question:", "Summary:", "Output: 1", "Answer:"])),
        "a label and text": ("query", f"Summary: {summary[:60]}"),
        "labels": ("summary", f'Question: "{question}" Passage: "{passage[:200]}"'),
        "marks": ("query", draw.choice(["<start_of_turn>", "<|im_start|>user", "[INST]"]) + question),
        "marks at the end": ("summary", f"{summary}<|eot_id|><|start_header_id|>user"),
        "numbering": ("query", draw.choice(["1) A)", "1. 2. 3. 4.", "A) B) C) D)", f"1. {question}"])),
        "numbers": ("query", " ".join(str(number + i) for i in range(draw.randrange(5, 30)))),
        "numbers as a summary": ("summary", f"{number} " * 40),
        "a word again": ("query", " ".join([word] * draw.randrange(6, 20))),
        "words again": ("summary", " ".join([*words[:4], "", ""] * 12)),
        "English": ("query", draw.choice(["What is the capital of France?", "How many people live there?"])),
        "cut out": ("query", " ".join(passage.split())[: draw.randrange(25, 60)]),
        "the summary": ("query", first_sentences(summary, 1)),
        "another question": ("query", other["query"]),
        "another subject": ("summary", first_sentences(other["positive_passages"][0]["text"])),
        "the question": ("summary", question),
        "a link": ("query", f"https://{record['lang']}.example.org/wiki/{word}"),
        "HTML": ("query", f"<b>{word}</b> <br/> {question}"),
        "JSON": ("query", json.dumps({"question": question}, ensure_ascii=False)),
        "an apology": ("query", draw.choice(["I'm sorry, I cannot help.", "As an AI, I do not know."])),
    }


def rejected(guard, stage, record, kind, text):
    """The guard's word on a text, as it is asked for a query or a summary of the record's first positive."""
    positive = record["positive_passages"][0]
    passage = stage.passage_text(positive)
    if kind == "summary":
        return guard.reason(text, kind, [record["query"]], passage)
    about = f"{passage}\n{first_sentences(positive['text'])}"
    return guard.reason(text, kind, [record["query"], positive["text"], passage], about)


def other_subject(record, records, draw):
    """A record of the same language with no article in common."""
    titles = {p["title"] for p in record["positive_passages"]}
    return draw.choice([r for r in records if not titles & {p["title"] for p in r["positive_passages"]}])


def passing(stage, guard, records, draw):
    """(what passes, what there was): counts by kind of garbage, for these records of one language."""
    passed, n = Counter(), Counter()
    for record in records:
        wrong = garbage(record, other_subject(record, records, draw), stage, draw)
        for what, (kind, text) in wrong.items():
            if what != "English" or guard.lang != "en":
                n[what] += 1
                passed[what] += rejected(guard, stage, record, kind, text) is None
    return passed, n


def guard_of(stage, data, records):
    return stage.Guard(data, records[0]["lang"], [record["query"] for record in records][:40])


def own_questions_and_summaries(stage, guard, records):
    """(Counter of the guard's words on people's questions, and on their positives' first sentences)"""
    questions, summaries = Counter(), Counter()
    for record in records:
        positive = record["positive_passages"][0]
        passage = stage.passage_text(positive)
        summary = first_sentences(positive["text"])
        questions[guard.reason(record["query"], "query", [positive["text"]], f"{passage}\n{summary}")] += 1
        summaries[guard.reason(summary, "summary", [record["query"]], passage)] += 1
    return questions, summaries


def test_garbage_of_many_kinds_is_rejected(capsys):
    """In five languages of the sample; what is about something else may share its words by chance."""
    stage = load_stage("03_generate_negatives")
    passed, n = Counter(), Counter()
    for lang in ("ar", "en", "id", "te", "zh"):
        records = [r for r in read(ROOT / "sample/data/train.jsonl") if r["lang"] == lang][:10]
        guard = guard_of(stage, ROOT / "sample/data", records)
        of_lang, n_of_lang = passing(stage, guard, records, random.Random(lang))
        passed += of_lang
        n += n_of_lang
    chance = ("another question", "another subject")
    assert not {what: k for what, k in passed.items() if k and what not in chance}
    assert all(passed[what] <= 0.3 * n[what] for what in chance), passed
    assert len(n) == 22 and passed.total() < 0.02 * n.total()


@pytest.mark.parametrize("lang", "ar bn en es fa fi fr hi id ja ko ru sw te zh".split())
def test_questions_of_people_pass_and_garbage_does_not(lang, minimiracl):
    """mini-MIRACL: of en 2 of 66 questions are refused, whose positives are misjudged (the Death Star)."""
    stage = load_stage("03_generate_negatives")
    data, by_lang = minimiracl
    records = by_lang[lang][:200]
    guard = guard_of(stage, data, records)
    questions, summaries = own_questions_and_summaries(stage, guard, records)
    passed, n = passing(stage, guard, records[:60], random.Random(lang))
    print(lang, len(records), questions, summaries, passed, n.total())
    most = 2 if lang == "en" else 0.02 * len(records)
    assert len(records) - questions[None] <= most
    assert len(records) - summaries[None] <= 0.02 * len(records)
    assert passed.total() < 0.025 * n.total()


@pytest.fixture(scope="module")
def minimiracl(tmp_path_factory):
    """(data folder, {lang: records}) of real questions, where mini-MIRACL is at hand."""
    root = ROOT.parent / "shared/data/minimiracl"
    if not root.is_dir():
        pytest.skip("mini-MIRACL is not beside the project (../shared/data/minimiracl)")
    data = tmp_path_factory.mktemp("minimiracl") / "data"
    done = run_stage("00_prepare_data.py", "--source", "miracl", "--root", root, "--out", data)
    assert done.returncode == 0, done.stderr
    by_lang = defaultdict(list)
    for split in ("train", "dev"):
        for record in read(data / f"{split}.jsonl"):
            by_lang[record["lang"]].append(record)
    return data, by_lang


def test_a_short_passage_may_be_its_own_summary_but_no_query(data, server):
    """Of one sentence there is nothing to leave out; a long passage that is repeated is no summary."""
    stage = load_stage("03_generate_negatives")
    records = [r for r in read(data / "in.jsonl") if r["lang"] == "sw"]
    passage = records[0]["positive_passages"][0]
    assert len(passage["text"]) <= stage.SHORT[3]
    server.reply = lambda kind, text: passage["text"] if kind == "summary" else text
    write(data / "in.jsonl", records[:1])
    (record,), counts = generate(data, server)
    assert record["summary"] == passage["text"] and record["generated_query"]
    long = passage | {"text": " ".join([passage["text"], *SENTENCES[:2]])}
    assert len(long["text"]) > stage.SHORT[3]
    server.reply = lambda kind, text: long["text"] if kind == "summary" else text
    write(data / "in.jsonl", [records[0] | {"positive_passages": [long]}])
    with pytest.raises(stage.DataError, match="'summary rejected: repeats': 3"):
        generate(data, server, out="long.jsonl", cache="cache-long")


# --------------------------------------------------------------------------- servers, the drift report


def test_the_judge_may_have_a_server_of_its_own(data, server, capsys):
    judge = Server()
    try:
        _, counts = generate(data, server, "--judge-llm", "j", "--judge-base-url", judge.url)
    finally:
        judge.http.shutdown()
        judge.http.server_close()
    assert {kind_of(b) for b in server.seen} == {"summary", "query"}
    assert {kind_of(b) for b in judge.seen} == {"judge"} and {b["model"] for b in judge.seen} == {"j"}
    printed = capsys.readouterr().err
    assert f"m: {len(server.seen)} calls" in printed and f"j: {len(judge.seen)} calls" in printed
    assert counts["calls"]["j"]["asked"] == len(judge.seen)
    assert counts["calls"]["m"]["asked"] == len(server.seen)
    generate(data, server, "--judge-llm", "j", out="again.jsonl")  # the same answers, from anywhere


def test_settings_and_version_are_the_generators(data, server):
    settings = '{"top_p": 0.5, "reasoning_effort": "low"}'
    generate(data, server, "--judge-llm", "j", "--llm-settings", settings)
    assert {b.get("reasoning_effort") for b in server.seen if kind_of(b) != "judge"} == {"low"}
    assert {b["top_p"] for b in server.seen if kind_of(b) != "judge"} == {0.5}
    assert not any("reasoning_effort" in b for b in server.seen if kind_of(b) == "judge")
    n = Counter(map(kind_of, server.seen))
    flags = ["--judge-llm", "j", "--llm-settings", settings, "--llm-version", "2"]
    generate(data, server, *flags, out="b.jsonl")
    again = Counter(map(kind_of, server.seen)) - n
    assert again == {"summary": n["summary"], "query": n["query"]}  # the judge's are kept


THOUGHTS = [
    ("<think>\n", "</think>\n\n"),
    ("", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("analysis", "assistantfinal"),
]


def test_of_a_generator_that_thinks_only_the_answer_is_used(data, server):
    usual, _ = generate(data, server)
    for number, (opening, end) in enumerate(THOUGHTS):
        thought = f"{opening}Okay, the user wants me to summarise.\nQuestion: which?\n{end}"
        server.reply = lambda kind, text, thought=thought: thought + text
        given, _ = generate(data, server, out=f"thought-{number}.jsonl", cache=f"cache-{number}")
        assert given == usual, opening


def test_a_generator_that_is_cut_off_is_told_so(data, server):
    """Its summaries never end: none is used, and the reason is the server's, not a guard's."""
    server.finish = "length"
    with pytest.raises(load_stage("03_generate_negatives").DataError, match="'summary rejected: cut off': "):
        generate(data, server, "--llm-settings", '{"max_tokens": 20}')
    assert not (data / "out.jsonl").exists()


def test_a_server_that_is_slow_is_waited_for_as_long_as_told(data, server, capsys):
    late = iter([True])
    server.before = lambda: next(late, False) and time.sleep(0.6)
    records, _ = generate(data, server, "--timeout", "0.3", "--concurrency", 1)
    check(records, 12)
    assert "no answer in 0.3 s" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["first", "best"])
def test_the_judge_of_new_passages_sees_the_reference_that_is_asked_for(data, server, which):
    import llm

    record = read(data / "in.jsonl")[0]
    corpus = read(data / f"data/corpus/{record['lang']}.jsonl")
    own = record["positive_passages"][0]["docid"]
    record["positive_passages"] += [p for p in corpus if p["docid"] != own][:9]
    write(data / "in.jsonl", [record])
    generate(data, server, "--reference", which)
    shown = set()
    for body in server.seen:
        if kind_of(body) == "judge":
            values = stand_in.read_labels(body["messages"][1]["content"])
            title, _, text = values["Candidate passage"].partition("\n")
            candidate = {"docid": "", "title": title, "text": text}
            wanted = llm.choose_reference(record, candidate, which)
            assert values[stand_in.REFERENCE] == llm.passage_text(wanted)
            shown.add(wanted["docid"])
    assert len(shown) == 1 if which == "first" else len(shown) > 1


def test_relabelled_positives_are_positives(data, server):
    """Those of --relabel-at 2 in stage 02: summarised in their turn, no negatives."""
    record = read(data / "in.jsonl")[0]
    corpus = read(data / f"data/corpus/{record['lang']}.jsonl")
    own = record["positive_passages"][0]
    new = next(p for p in corpus if p["docid"] != own["docid"] and p["title"] == own["title"])
    new |= {"source": "relabelled", "accuracy": 2, "completeness": 2, "grade": 2}
    record |= {"positive_passages": [own, new], "negative_passages": [new | {"docid": "copy"}]}
    write(data / "in.jsonl", [record])
    server.reply = lambda kind, text: '{"accuracy": 2, "completeness": 2}' if kind == "judge" else text
    (out,), _ = generate(data, server, "--rounds", 2, "--max-drift", 1)
    assert out["positive_passages"] == [own, new]
    assert not {new["text"], own["text"]} & {p["text"] for p in out["negative_passages"]}
    asked = [b["messages"][1]["content"] for b in server.seen if kind_of(b) == "summary"]
    assert any(json.dumps(new["text"], ensure_ascii=False)[1:-1] in prompt for prompt in asked)


def test_generated_negatives_are_shown_beside_random_ones(data, server, tmp_path, capsys, monkeypatch):
    encoder = tiny_lm.make(tmp_path / "encoder", SENTENCES, steps=0)
    flags = ["--retrievers", "bm25", encoder, "--fusion", "rrf"]
    records, counts = generate(data, server, *flags)
    for lang in LANGS:
        table = counts["by_lang"][lang]["cosines"]
        assert counts["by_lang"][lang]["sources"].get("random", 0) == 0  # none was needed
        assert table["random"]["n"] > 20 and set(table) == {"generated-query", "random"}
    assert "mean cosines of negatives: {'generated-query': " in capsys.readouterr().err
    stage = load_stage("03_generate_negatives")
    far = {"n": 9, "query": 0.1, "positive": 0.1}
    monkeypatch.setattr(stage, "cosines", lambda *_: {"generated-query": far, "random": far})
    stage.main(arguments(data, server, *flags, out="far.jsonl"))
    assert "sw: warning: generated-query negatives are no closer to the queries" in capsys.readouterr().err


# --------------------------------------------------------------------------- bad input, cache, cost


def test_a_target_larger_than_the_corpus_is_an_error(data, server):
    with pytest.raises(load_stage("03_generate_negatives").DataError, match="cannot give 500 negatives"):
        generate(data, server, target=500)
    passages = read(data / "data/corpus/sw.jsonl")  # what is relevant can be no negative either
    record = next(r for r in read(data / "in.jsonl") if r["lang"] == "sw")
    known = {p["docid"] for p in record["positive_passages"]}
    record["false_negatives"] = [p for p in passages if p["docid"] not in known][:9]
    write(data / "in.jsonl", [record])
    n = len(passages) - len(record["positive_passages"])
    with pytest.raises(load_stage("03_generate_negatives").DataError, match=f"cannot give {n} negatives"):
        generate(data, server, target=n)
    assert server.seen == []
    with pytest.raises(load_stage("03_generate_negatives").DataError, match="the guards rejected"):
        generate(data, server, "--mode", "write", target=n)  # where the texts are written


def test_bad_input_is_one_line_and_exit_2(data, server):
    for record, flags, said in (
        ({"positive_passages": []}, (), "positive_passages"),
        ({}, ("--mode", "write", "--no-judge-new"), "--no-judge-new"),
        ({}, ("--no-judge-new", "--judge-llm", "j"), "--no-judge-new"),
        ({}, ("--max-drift", "2"), "number from 0 to 1"),
    ):
        write(data / "bad.jsonl", [read(data / "in.jsonl")[0] | record])
        done = run_stage("03_generate_negatives.py", *arguments(data, server, *flags, source="bad.jsonl"))
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and said in done.stderr, (
            done.stderr
        )
    assert server.seen == [] and not (data / "out.jsonl").exists()


def test_answers_of_another_model_are_not_used(data, server):
    generate(data, server)
    n_asked = len(server.seen)
    (cache,) = (data / "cache/llm").glob("m.*")
    shutil.copy(cache, cache.with_name(cache.name.replace("m.", "other.", 1)))
    generate(data, server, "--llm", "other", out="other.jsonl")
    assert len(server.seen) == 2 * n_asked


def test_a_dry_run_tells_the_calls_and_makes_nothing(data, server, capsys):
    load_stage("03_generate_negatives").main(arguments(data, server, "--dry-run"))
    text = capsys.readouterr().out
    n = len(read(data / "in.jsonl"))
    assert (
        text.startswith(f"{n} short queries: {n * 14} to ")
        and server.seen == []
        and not (data / "out.jsonl").exists()
    )
    generate(data, server)
    assert n * 14 <= len(server.seen) <= int(text.split(" to ")[1].split()[0])


def test_the_summary_gives_similarities_by_language_and_source(data, server, tmp_path):
    """Against a slow computation with the same encoder (here a small random Llama)."""
    import numpy as np

    from search import Ensemble

    encoder = tiny_lm.make(tmp_path / "encoder", SENTENCES, steps=0)
    flags = ["--fusion", "rrf", "--settings", "title_join= zxqv zxqv zxqv "]
    records, counts = generate(data, server, "--retrievers", "bm25", encoder, *flags)
    ensemble = Ensemble([str(encoder)], data / "data", data / "cache", settings=flags[3:])
    ours = ensemble.encoders["encoder"]
    for lang in LANGS:
        rows = [
            (r, p)
            for r in records
            if r["lang"] == lang
            for p in r["negative_passages"]
            if p["source"] == "generated-query"
        ]
        row = counts["by_lang"][lang]["cosines"]["generated-query"]
        negatives = ours.encode([ours.passage_text(p) for _, p in rows], "passage")
        for key, kind, text in (
            ("query", "query", lambda r: r["query"]),
            ("positive", "passage", lambda r: ours.passage_text(r["positive_passages"][0])),
        ):
            slow = np.mean([a @ b for a, b in zip(ours.encode([text(r) for r, _ in rows], kind), negatives)])
            assert row["n"] == min(50, len(rows)) and row[key] == pytest.approx(slow, abs=0.05)


# --------------------------------------------------------------------------- kills


def test_ten_kills_change_no_byte_and_no_answer_is_asked_twice(data, server):
    """The server kills the stage while it waits for an answer, ten times; earlier answers are cached."""
    whole, _ = generate(data, server, out="whole.jsonl", cache="cache-whole")
    moments = sorted(random.Random(5).sample(range(1, len(server.seen)), 10))
    server.seen.clear()
    process = None

    def before():
        if moments and len(server.seen) - killed - 1 == moments[0] - 1:
            moments.pop(0)
            process.kill()

    killed, server.before = 0, before
    while True:
        process = subprocess.Popen(
            [sys.executable, ROOT / "03_generate_negatives.py", *arguments(data, server, "--concurrency", 1)],
            env=os.environ | {"NO_PROXY": "127.0.0.1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        _, said = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -9, said
        assert not (data / "out.jsonl").exists()
        killed += 1
        server.seen.pop()  # the request that was never answered
    assert killed == 10
    assert (data / "out.jsonl").read_bytes() == (data / "whole.jsonl").read_bytes()
    bodies = [json.dumps(b, sort_keys=True) for b in server.seen]
    assert len(bodies) == len(set(bodies)) and len(whole) == len(read(data / "in.jsonl"))


def test_two_documents_of_a_title_alone_are_two_passages():
    stage = load_stage("03_generate_negatives")
    first, second = ({"docid": d, "title": f"Mada {d}", "text": ""} for d in "ab")
    assert not stage.marks(first) & stage.marks(second)
    assert stage.marks(first) & stage.marks({"docid": "c", "title": "", "text": "mada  A"})
