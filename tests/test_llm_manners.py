"""Servers of every manner, over a real socket: what a judgment costs, whether it is right, how the run ends.

    python tests/test_llm_manners.py      prints the table
"""

import asyncio
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from faulty_server import Running, answer
from test_02_filter import answers, filter_, key, meta, read, records, write  # noqa: F401 - key: a fixture

import common
import llm

DRAFT = '{"accuracy": 2, "completeness": 2}'
TOO_LONG = {
    "vllm": "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens "
    "(8936 in the messages, 64 in the completion). Please reduce the length of the messages.",
    "vllm, newer": "'max_tokens' or 'max_completion_tokens' is too large: 64. This model's maximum context "
    "length is 8192 tokens and your request has 8180 input tokens.",
    "llama.cpp": "the request exceeds the available context size, try increasing it",
    "tgi": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: "
    "5000 `inputs` tokens",
    "gemini": "The input token count (1400000) exceeds the maximum number of tokens allowed (1048576).",
}


busy = []  # when the last calls came


def refuse(name, value="not supported with this model"):
    return 400, {"error": {"message": f"Unsupported parameter: '{name}' is {value}.", "param": name}}


def reply(manner, body, number):
    """(status, body) of the number-th call; the right judgment is known from the prompt."""
    right = answer(body["messages"][-1]["content"].partition("\n\nYour last answer")[0])
    text = json.dumps(right)
    budget = body.get("max_tokens") or body.get("max_completion_tokens") or 10**6
    finish = "stop"
    more = {}
    kind, _, what = manner.partition(": ")
    if kind == "refuses" and what in body:
        return refuse(what)
    if kind == "like gpt-5" and "max_tokens" in body:
        return refuse("max_tokens", "not supported with this model. Use 'max_completion_tokens' instead")
    if kind == "like gpt-5" and body.get("temperature", 1) != 1:
        return refuse("temperature")
    if kind == "no system" and body["messages"][0]["role"] == "system":
        return int(what[:3]), {"error": {"message": what[5:], "code": int(what[:3])}}
    if kind == "422" and "seed" in body:
        told = {"loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": body}
        return 422, {"detail": [told]}
    if kind == "quota" and number > 5:
        return 403, {"error": {"message": "Key limit exceeded (monthly limit). Manage it in the settings"}}
    if kind == "too long" and number % 5 == 3:
        return 400, {"error": {"message": TOO_LONG[what], "code": 400}}
    if kind == "error in 200" and number % 3 == 1:
        return 200, {"error": {"message": "Upstream error: model overloaded", "code": 502}}
    if kind == "error in a choice" and number % 3 == 1:  # OpenRouter's
        error = {"code": 502, "message": "Upstream error: model overloaded"}
        message = {"role": "assistant", "content": ""}
        return 200, {"choices": [{"message": message, "finish_reason": "error", "error": error}]}
    if kind == "always error in 200":
        return 200, {"error": {"message": "Upstream error: model overloaded", "code": 502}}
    third, fifth = number % 3 == 1, number % 5 == 3
    if kind == "ends" and third and "Your last answer" not in body["messages"][-1]["content"]:
        text, finish = f"A first thought would be {DRAFT}, but the candidate is about", what
    if kind == "rate in 200" and third:
        return 200, {"error": {"code": 429, "message": "Rate limit exceeded: free-models-per-min."}}
    if kind == "no choices" and third:
        return 200, {"choices": []}
    if kind == "passing" and third:
        return int(what), {"error": {"message": "Request cancelled, try again", "code": int(what)}}
    if kind == "moderation" and fifth:
        return int(what[:3]), {"error": {"message": what[5:], "code": int(what[:3])}}
    if kind == "at most 4096 tokens" and (fifth or budget > 4096):
        told = f"max_tokens is too large: {budget}. This model supports at most 4096 completion tokens."
        if budget > 4096:
            return 400, {"error": {"message": told, "param": "max_tokens"}}
        text, finish = text[:5], "length"
    if kind == "thinks first" and budget < 1500:
        told = "Could not finish the message because max_tokens or model output limit was reached."
        return 400, {"error": {"message": told}}
    if kind == "lists what it takes" and "seed" in body:
        told = "Unknown parameter seed. Supported are max_tokens, temperature, top_p and response_format."
        return 400, {"error": {"message": told}}
    if kind == "busy":
        now = time.monotonic()
        busy[:] = [at for at in busy if at > now - 0.5]
        if len(busy) >= 8:  # calls in half a second
            return 429, {"error": {"message": "Rate limit reached", "code": 429}}
        busy.append(now)
    if kind == "tags":
        opening, closing = what.split()
        text = f"{opening}\nPerhaps {DRAFT}? No.\n{closing}\n\n{text}"
    if kind == "draft" and "Your last answer" not in body["messages"][-1]["content"]:
        text = what.replace("DRAFT", DRAFT)
    if kind == "think":
        text = f"<think>\nPerhaps {DRAFT}? No.\n</think>\n\n{text}"
    elif kind == "think, not opened":
        text = f"Perhaps {DRAFT}? No.\n</think>\n\n{text}"
    elif kind == "think, never closed":
        text = f"<think>\nPerhaps {DRAFT}? No. Then"
    elif kind == "reasoning parser":
        more = {"reasoning_content": f"Perhaps {DRAFT}?"}
        if budget < 1500:
            text, finish = None, "length"
    elif kind == "think, cut off":
        if budget < 1500:
            text, finish = f"<think>\nPerhaps {DRAFT}? No.", "length"
        else:
            text = f"<think>\nPerhaps {DRAFT}? No.\n</think>\n\n{text}"
    elif kind == "parts":
        draft = {"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]}
        text = [draft, {"type": "text", "text": text}]
    elif kind == "extra key":
        text = json.dumps(right | {"explanation": "It names the {capital}."})
    elif kind == "strings":
        text = json.dumps({name: str(score) for name, score in right.items()})
    elif kind == "floats":
        text = json.dumps({name: float(score) for name, score in right.items()})
    elif kind == "list":
        text = json.dumps([right])
    elif kind == "prose":
        text = f"The passage is about a city. My judgment: {text}. It is {{sic}} so."
    elif kind == "fence":
        text = f"```json\n{text}\n```"
    elif kind == "needs telling" and "Your last answer was unparsable" not in body["messages"][-1]["content"]:
        text = f"{text} or {json.dumps({name: 2 - score for name, score in right.items()} | {'accuracy': 9})}"
    elif kind == "never usable":
        text = f"Well, {number} things can be said."
    elif kind == "always cut off":
        text, finish = f"{text} {{", "length"
    elif kind == "always 0":
        text = '{"accuracy": 0, "completeness": 0}'
    message = {"role": "assistant", "content": text, "refusal": None} | more
    choices = [{"message": message, "finish_reason": finish}]
    usage = {"prompt_tokens": 100, "completion_tokens": 20}
    return 200, {"id": "x", "model": body["model"], "choices": choices, "usage": usage}


class Manner:
    """`with Manner("think") as server:`, whose bodies are the requests."""

    def __init__(self, manner):
        self.bodies = []
        busy = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with busy:
                    outer.bodies.append(body)
                    status, out = reply(manner, body, len(outer.bodies))
                data = json.dumps(out).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

            def handle_error(self, *_):
                pass  # a client that went away

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def judged(folder, manner, *flags, n=3):
    """(calls, candidates, judgments right, unjudged, exit status) of stage 02 beside such a server."""
    write(folder / "in.jsonl", records(n, 20, 0))
    status = 0
    with Manner(manner) as server:
        try:
            filter_(folder, server.url, "--max-unjudged", 0.25, *flags)
        except common.DataError as error:
            status = str(error)
    right = unjudged = 0
    for record in read(folder / "out.jsonl") if not status else []:
        unjudged += len(record.get("unjudged", []))
        for passage in record["negative_passages"] + record["false_negatives"]:
            prompt = llm.judge_messages("?", "en", passage)[1]["content"]
            right += passage["grade"] == min(answer(prompt).values())
    return len(server.bodies), 20 * n, right, unjudged, status


PLAIN = ["plain", "think", "think, not opened", "parts", "extra key", "strings", "floats", "list", "prose",
         "fence"]
LEARNED = {  # calls beyond one a candidate
    "reasoning parser": 1, "think, cut off": 1, "refuses: max_tokens": 1, "refuses: temperature": 1,
    "refuses: response_format": 1, "like gpt-5": 2, "no system: 400, System role not supported": 1,
    "no system: 500, Conversation roles must alternate user/assistant/user/assistant/...": 1,
    "no system: 400, 'messages[0].role' does not support 'system' with this model": 1}


@pytest.mark.parametrize("manner", [*PLAIN, *LEARNED])
def test_a_manner_costs_no_judgment_and_is_learned_once(tmp_path, manner):
    assert judged(tmp_path, manner) == (60 + LEARNED.get(manner, 0), 60, 60, 0, 0)


ENDS = ["max_tokens", "MAX_TOKENS", "model_length", "insufficient_system_resource", "abort", "SAFETY",
        "error: x"]
TAGS = ["<thought> </thought>", "<THINK> </THINK>", "<|START_THINKING|> <|END_THINKING|>",
        "<reasoning> </reasoning>", "<seed:think> </seed:think>"]
DRAFTS = ['Draft DRAFT -> final {"accuracy": 0, "completeness": 0,}',
          "DRAFT Final: accuracy 0, completeness 0", "DRAFT, no: {'accuracy': 0, 'completeness': 0}"]


@pytest.mark.parametrize("manner", [f"tags: {tags}" for tags in TAGS])
def test_thoughts_in_the_tags_of_other_models_are_no_answer(tmp_path, manner):
    assert judged(tmp_path, manner) == (60, 60, 60, 0, 0)


@pytest.mark.parametrize("manner", [f"ends: {finish}" for finish in ENDS] + [f"draft: {d}" for d in DRAFTS])
def test_what_ended_badly_and_a_draft_beside_an_answer_are_no_judgments(tmp_path, manner):
    calls, n, right, unjudged, status = judged(tmp_path, manner)
    assert (right, unjudged, status) == (n, 0, 0) and n < calls <= 2 * n + 1


PASSING = [f"passing: {status}" for status in (408, 424, 498, 499)]


@pytest.mark.parametrize("manner", ["rate in 200", "no choices", *PASSING])
def test_trouble_that_passes_is_waited_out(tmp_path, manner, monkeypatch):
    monkeypatch.setattr(llm.random, "uniform", lambda *_: 0.05)
    calls, n, right, unjudged, status = judged(tmp_path, manner, n=1)
    assert (right, unjudged, status) == (n, 0, 0) and n < calls <= 2 * n


@pytest.mark.parametrize("told", ["403: requires moderation and your input was flagged",
                                  "400: Content Exists Risk", "403: <html>blocked by the firewall</html>"])
def test_a_prompt_that_is_always_refused_ends_no_run_be_it_the_first(tmp_path, told):
    calls, n, right, unjudged, status = judged(tmp_path, f"moderation: {told}")
    assert (calls, right, unjudged, status) == (n, n - n // 5, n // 5, 0)
    with Manner(f"moderation: {told}") as server:  # now nothing else is to be asked
        server.bodies += [{}, {}]
        filter_(tmp_path, server.url, "--max-unjudged", 0.25, "--concurrency", 1)
    assert meta(tmp_path / "out.jsonl")["unjudged"] <= n // 5


def test_more_tokens_than_the_server_takes_are_not_asked_for(tmp_path):
    calls, n, right, unjudged, status = judged(tmp_path, "at most 4096 tokens")
    assert status == 0 and right + unjudged == n and unjudged <= n // 5


def test_a_model_whose_thoughts_do_not_fit_gets_more_tokens(tmp_path):
    assert judged(tmp_path, "thinks first") == (61, 60, 60, 0, 0)


def test_of_the_parameters_that_a_refusal_names_the_first_is_left_out(tmp_path, capsys):
    with Manner("lists what it takes") as server:
        write(tmp_path / "in.jsonl", records(1, 4, 0))
        filter_(tmp_path, server.url, "--votes", 2)
    assert {"max_tokens", "temperature", "response_format"} <= server.bodies[-1].keys()
    assert "seed" not in server.bodies[-1]


def test_a_host_that_takes_few_calls_at_a_time_sets_the_pace(tmp_path, monkeypatch):
    monkeypatch.setattr(llm.LLM, "RETRIES", 10)
    monkeypatch.setattr(llm.random, "uniform", lambda *_: 0.05)
    calls, n, right, unjudged, status = judged(tmp_path, "busy")
    assert (right, unjudged, status) == (n, 0, 0)


@pytest.mark.parametrize("settings", ['{"messages": []}', '{"model": "x"}', '{"n": 4}', '{"stream": true}',
                                      '{"extra_body": {}}', '{"seed": "x"}'])
def test_settings_that_are_no_settings_are_refused(tmp_path, settings, capsys):
    with pytest.raises(SystemExit):
        judged(tmp_path, "plain", "--llm-settings", settings)
    assert "leave it out" in capsys.readouterr().err


def test_votes_differ_by_seed_whatever_the_users_and_most_must_be_usable(tmp_path):
    write(tmp_path / "in.jsonl", records(1, 2, 0))
    with Manner("plain") as server:
        filter_(tmp_path, server.url, "--votes", 3, "--llm-settings", '{"seed": 2}')
    assert sorted({body["seed"] for body in server.bodies}) == [2, 3, 4] and len(server.bodies) == 6
    with Manner("plain") as server:  # for a host that takes none
        filter_(tmp_path, server.url, "--votes", 3, "--llm-settings", '{"seed": null}')
    assert len(server.bodies) == 6 and not any("seed" in body for body in server.bodies)
    passage = records(1)[0]["candidate_passages"][0]

    class Votes:
        def __init__(self, usable):
            self.usable = usable

        async def ask(self, *_, seed, **__):
            usable = seed in self.usable
            return ({"accuracy": 1, "completeness": 1}, None) if usable else (None, "refused")

    for usable, verdict in (((0, 1), {"accuracy": 1, "completeness": 1, "grade": 1}), ((2,), None)):
        found, reason = asyncio.run(llm.judge(Votes(usable), "q", "sw", passage, votes=3))
        assert found == verdict and (found or reason == "refused")


def test_an_empty_address_is_that_of_openai(tmp_path, monkeypatch):
    async def address():
        asker = llm.LLM("m", tmp_path)
        asker._connect()
        await asker.client.close()
        return str(asker.client.base_url)

    monkeypatch.setenv("OPENAI_BASE_URL", "")
    assert asyncio.run(address()) == "https://api.openai.com/v1/"


@pytest.mark.parametrize("headers, seconds", [({"retry-after": "2.5"}, 2.5), ({"retry-after": "7"}, 7),
                                              ({}, 0), ({"retry-after": "soon"}, 0),
                                              ({"retry-after": "Mon, 01 Jan 99999 00:00:00 GMT"}, 0)])
def test_how_long_a_server_asks_to_wait(headers, seconds):
    assert llm.retry_after(headers) == seconds
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 57 < llm.retry_after({"retry-after": date}) <= 60


@pytest.mark.parametrize("manner", ["refuses: seed", "422: seed"])
def test_a_seed_that_is_refused_is_left_out(tmp_path, manner):
    calls, n, right, unjudged, status = judged(tmp_path, manner, "--votes", 2)
    assert (calls, unjudged, status) == (2 * n + 1, 0, 0) and right == n


def test_top_p_and_what_else_is_set_is_sent_kept_apart_and_dropped_if_refused(tmp_path):
    settings = json.dumps({"top_p": 0.5, "reasoning_effort": "low", "response_format": None})
    assert judged(tmp_path, "refuses: top_p", "--llm-settings", settings) == (61, 60, 60, 0, 0)
    with Manner("plain") as server:
        filter_(tmp_path, server.url, "--llm-settings", settings, out="again.jsonl")
        assert not server.bodies
        filter_(tmp_path, server.url, out="other.jsonl")
        assert len(server.bodies) == 60
        export = tmp_path / "batch.jsonl"
        settings = '{"max_completion_tokens": 99}'
        filter_(tmp_path, server.url, "--llm-settings", settings, "--batch-export", export)
    body = read(export)[0]["body"]
    assert body["max_completion_tokens"] == 99


def test_a_budget_that_the_user_sets_is_sent_as_it_is(tmp_path):
    with Manner("reasoning parser") as server:
        write(tmp_path / "in.jsonl", records(1, 4, 0))
        filter_(tmp_path, server.url, "--llm-settings", '{"max_completion_tokens": 1600}')
    assert len(server.bodies) == 4
    assert all(b["max_completion_tokens"] == 1600 and "max_tokens" not in b for b in server.bodies)


@pytest.mark.parametrize("words", TOO_LONG)
def test_a_prompt_that_is_too_long_is_unjudged_with_the_servers_words(tmp_path, words):
    calls, n, right, unjudged, status = judged(tmp_path, f"too long: {words}")
    assert (calls, right, unjudged, status) == (n, n - n // 5, n // 5, 0)
    told = f"refused by the server: 400: {TOO_LONG[words]}"
    assert meta(tmp_path / "out.jsonl")["reasons"] == {told: n // 5}


def test_any_400_after_an_answer_is_about_its_prompt(tmp_path):
    TOO_LONG["odd"] = "wrong in a way that nobody foresaw, perhaps max_tokens must be at least 1"
    try:
        assert judged(tmp_path, "too long: odd") == (60, 60, 48, 12, 0)
    finally:
        del TOO_LONG["odd"]


def test_a_quota_that_is_used_up_is_no_fault_of_the_prompt(tmp_path):
    """Told as 403 with the word exceeded: after some refusals in a row the run ends, to be started again."""
    calls, _, _, _, status = judged(tmp_path, "quota", "--concurrency", 1)
    assert "the server refuses (403: Key limit exceeded" in status and calls < 20


def test_one_question_twice_at_once_is_asked_once(tmp_path):
    twins = [record | {"query_id": f"{n}"} for record in records(1, 8, 0) for n in range(4)]
    write(tmp_path / "in.jsonl", twins)
    with Running(delay=0.05) as server:
        filter_(tmp_path, server.url)
    assert len(server.bodies) == 8
    judgments = [r["negative_passages"] + r["false_negatives"] for r in read(tmp_path / "out.jsonl")]
    assert all(judgment == judgments[0] for judgment in judgments) and len(judgments[0]) == 8


@pytest.mark.parametrize("manner", ["error in 200", "error in a choice"])
def test_an_error_in_a_200_is_waited_out_or_told(tmp_path, monkeypatch, manner):
    calls, n, right, unjudged, status = judged(tmp_path, manner, n=1)
    assert (right, unjudged, status) == (n, 0, 0) and calls < 2 * n
    calls_of_judge = meta(tmp_path / "out.jsonl")["calls"]["judge"]
    assert "empty answers" not in calls_of_judge  # it is the server's fault, no model's
    monkeypatch.setattr(llm.LLM, "RETRIES_AT_FIRST", 1)
    calls, *_, status = judged(tmp_path, "always error in 200", "--cache", tmp_path / "c2", "--overwrite")
    assert calls == 2 and "keeps failing (200: Upstream error: model overloaded)" in status


def test_a_misread_model_is_told_what_was_wrong_once(tmp_path):
    assert judged(tmp_path, "needs telling", n=1) == (40, 20, 20, 0, 0)


@pytest.mark.parametrize("manner, words", [
    ("never usable", "100% of 200 answers are of no use; 200 are unparsable, such as 'Well, "),
    ("think, never closed", "are empty, .*chat template"),
    ("always cut off", "are cut off, .*max_tokens.*16000"),
])
def test_a_server_that_never_answers_usably_is_left_early(tmp_path, manner, words):
    calls, *_, status = judged(tmp_path, manner, n=100)
    assert calls <= 300
    with pytest.raises(AssertionError, match=words):
        assert False, status
    assert "what was answered is in" in status


def test_a_judge_that_says_the_same_to_all_is_told(tmp_path, capsys):
    judged(tmp_path, "always 0", n=11)
    assert "the first 200 verdicts are all alike ({0: 200, 1: 0, 2: 0})" in capsys.readouterr().err
    judged(tmp_path, "plain", "--cache", tmp_path / "c2", "--overwrite", n=11)
    assert "alike" not in capsys.readouterr().err


def test_a_lost_connection_is_no_slow_answer(tmp_path, capsys):
    write(tmp_path / "in.jsonl", records(2, 20, 0))
    with Running() as server:
        lost = iter([True] * 10)

        async def respond(body, writer, usual=server.respond):
            if len(server.bodies) > 30 and next(lost, False):
                return False
            return await usual(body, writer)

        server.respond = respond
        filter_(tmp_path, server.url)
    assert "no answer in" not in capsys.readouterr().err and next(lost, None) is None


def test_a_slow_server_is_kept_busy_and_asked_nothing_twice(tmp_path):
    """One call at a time, 64 asked for: at 2 s a call and 120 s of patience all 64 would take 128 s."""
    write(tmp_path / "in.jsonl", records(10, 20, 0))
    with Running() as server:
        turn = asyncio.Lock()

        async def respond(body, writer, usual=server.respond):
            async with turn:  # also for a client that went away
                await asyncio.sleep(0.03)
                return await usual(body, writer)

        server.respond = respond
        start = time.time()
        filter_(tmp_path, server.url, "--timeout", 1.8, "--concurrency", 64)
        seconds = time.time() - start
    asked = Counter(json.dumps(body["messages"]) for body in server.bodies)
    assert len(asked) == 200 and max(asked.values()) == 1
    assert 200 > 0.8 * seconds / 0.031


def test_calls_that_time_out_are_told_and_halved(tmp_path, capsys):
    write(tmp_path / "in.jsonl", records(2, 20, 0))
    with Running(delay=0.05) as server:
        busy = Counter()

        async def respond(body, writer, usual=server.respond):
            busy["now"] += 1
            busy[busy["now"]] += 1
            try:
                if busy["now"] > 4:  # as a server that shares its time among too many
                    await asyncio.sleep(0.6)
                return await usual(body, writer)
            finally:
                busy["now"] -= 1

        server.respond = respond
        filter_(tmp_path, server.url, "--timeout", 0.3, "--concurrency", 64)
    printed = capsys.readouterr().err
    limits = [int(n) for n in re.findall(r"no answer in 0.3 s; .* at most (\d+) at once", printed)]
    assert limits and limits[-1] <= 8 and all(b <= a / 2 for a, b in zip(limits, limits[1:]))
    assert re.search(r"; \d+ times no answer in 0.3 s", printed)


def test_relabelled_candidates_become_positives(tmp_path, capsys):
    write(tmp_path / "in.jsonl", records(20))
    with Running() as server:
        plain = read(filter_(tmp_path, server.url, "--rejudge-human"))
        out = filter_(tmp_path, server.url, "--rejudge-human", "--relabel-at", 2, out="new.jsonl")
    rows = read(out)
    n = Counter()
    for before, after, source in zip(plain, rows, records(20)):
        assert after["positive_passages"][:2] == before["positive_passages"] == source["positive_passages"]
        new = after["positive_passages"][2:]
        human = {p["docid"] for p in source["negative_passages"]}
        best = {p["docid"] for p in before["false_negatives"] if p["grade"] == 2}
        assert {p["docid"] for p in new} == best - human
        assert all(p["source"] == "relabelled" and p["grade"] == 2 for p in new)
        n[after["lang"]] += len(new)
    assert n["sw"] and n["th"] and meta(out)["relabelled"] == n.total()
    assert f"relabelled as positives {n['sw']}" in capsys.readouterr().err


# ---- which model answered


def served(root):
    return [{"id": "judge", "object": "model", "root": root}, {"id": "other", "root": "x"}]


def test_two_models_behind_one_name_are_told_and_never_mixed(tmp_path, capsys):
    write(tmp_path / "in.jsonl", records(2))
    with Running(models=served("/models/a")) as server:
        filter_(tmp_path, server.url)
        assert len(server.bodies) == 38 and "answered by /models/a" in capsys.readouterr().err
        server.models = served("/models/b")
        filter_(tmp_path, server.url, out="b.jsonl")
        printed = capsys.readouterr().err
        assert len(server.bodies) == 76 and "answers of /models/a in" in printed
        assert "/models/b answers now" in printed and "answered by /models/b" in printed
        server.models = served("/models/a")  # and both are kept
        filter_(tmp_path, server.url, "--overwrite")
        assert len(server.bodies) == 76


def test_a_version_tells_models_apart_that_the_server_does_not(tmp_path, capsys):
    write(tmp_path / "in.jsonl", records(2))
    with Running() as server:
        filter_(tmp_path, server.url)
        filter_(tmp_path, server.url, "--llm-version", "tuned again", out="b.jsonl")
        assert len(server.bodies) == 76
        filter_(tmp_path, server.url, "--llm-version", "tuned again", "--drop-at", 2, out="c.jsonl")
        filter_(tmp_path, server.url, "--drop-at", 2, out="d.jsonl")
        assert len(server.bodies) == 76
    assert "used together" not in capsys.readouterr().err


def test_a_model_that_changes_its_name_in_the_answers_is_told(tmp_path, capsys):
    write(tmp_path / "in.jsonl", records(2))
    with Running() as server:
        server.answers_as = "judge-2024-05"
        filter_(tmp_path, server.url, "--lang", "sw")
        server.answers_as = "judge-2024-08"
        filter_(tmp_path, server.url, out="b.jsonl")
    assert "judge-2024-05 and judge-2024-08 are used together; --llm-version" in capsys.readouterr().err


def test_answers_of_an_earlier_run_count_and_are_dated(tmp_path, capsys):
    write(tmp_path / "in.jsonl", records(1))
    with Running() as server:
        first = filter_(tmp_path, server.url).read_bytes()
        with llm.contextlib.closing(llm.sqlite3.connect(tmp_path / "cache/llm/judge.sqlite")) as db:
            db.execute("UPDATE answers SET time = 1700000000")
            db.commit()
        capsys.readouterr()
        assert filter_(tmp_path, server.url, out="b.jsonl").read_bytes() == first and len(server.bodies) == 19
    assert "19 answers from the cache" in (printed := capsys.readouterr().err) and "from 2023-11-1" in printed


def test_a_run_tells_early_what_it_will_take(tmp_path, capsys):
    write(tmp_path / "in.jsonl", records(8))
    with Running() as server:
        filter_(tmp_path, server.url, "--price-in", 1, "--concurrency", 2)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("forecast")]
    assert told == ["forecast of the whole run: 152 calls, 15,200 prompt and 1,520 completion tokens, "
                    "0.02 money"]


def main():
    import contextlib
    import io
    import os
    import tempfile
    from pathlib import Path

    os.environ.setdefault("OPENAI_API_KEY", "x")
    manners = [*PLAIN, *LEARNED, "422: seed", *(f"too long: {words}" for words in TOO_LONG), "error in 200",
               "needs telling", "think, never closed", "always cut off", "never usable"]
    print(f"{'manner of the server':<26} calls/judgment  right      unjudged  exit status")
    for manner in manners:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            flags = ["--votes", 2] if "seed" in manner else []
            n_records = 100 if manner in manners[-3:] else 3
            calls, n, right, unjudged, status = judged(Path(folder), manner, *flags, n=n_records)
        cost = f"{calls / n / (2 if flags else 1):.2f}" if not status else f"{calls} calls"
        status = f"2: {status[:90]}" if status else 0
        print(f"{manner:<26} {cost:<15} {right:4} of {n:<4} {unjudged:<8} {status}", flush=True)


if __name__ == "__main__":
    main()


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Accra.", "Accra."),
        ("<think>Hm.</think> Accra. <think>Was that", " Accra. "),
        ("[THINK]Is it Accra", ""),
        ("<|channel|>analysis<|message|>Is it Accra?<|end|>", ""),
        ("<|channel|>final<|message|>Accra.<|return|>", "Accra."),
        ("analysisIs it Accra?assistantfinalAccra.", "Accra."),
        ("An analysis of the assistantfinal", "An analysis of the assistantfinal"),
    ],
)
def test_thoughts_are_no_part_of_an_answer(text, answer):
    assert llm.without_thoughts(text) == answer
