"""Servers that answer what none should, over a real socket: that costs its prompt at most, and no run."""

import asyncio
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from faulty_server import Running, answer
from test_02_filter import filter_, key, meta, read, records, write  # noqa: F401 - key: a fixture

import common
import llm

N = 24  # calls of two records


def good(body, **more):
    message = {"role": "assistant", "content": json.dumps(answer(body["messages"][-1]["content"]))}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {"choices": [choice], "model": body["model"]} | more


def judged(tmp_path, manner, *flags, **settings):
    """The output of stage 02 where the n-th call (from 1) is answered by manner(server, writer, body, n)."""
    write(tmp_path / "in.jsonl", records(2, 12, 0))
    with Running(**settings) as server:

        async def respond(body, writer):
            return await manner(server, writer, body, len(server.bodies))

        server.respond = respond
        return filter_(tmp_path, server.url, *flags), server


async def half_an_emoji(server, writer, body, n):
    if n % 7 == 3:
        return server.send(writer, 400, {"error": {"message": "prompt is too long: abc \ud83d"}})
    return server.send(writer, 200, good(body, model="m\ud800"))


def test_half_an_emoji_in_an_error_or_a_name_is_written_as_a_question_mark(tmp_path):
    out, _ = judged(tmp_path, half_an_emoji, "--max-unjudged", 1, models=[{"id": "judge", "root": "r\ud800"}])
    assert meta(out)["unjudged"] == 4 and sum(meta(out)[f] for f in ("kept", "removed")) == N - 4
    (told,) = {one["reason"] for record in read(out) for one in record["unjudged"]}
    assert told.endswith("prompt is too long: abc ?")


async def too_deep(server, writer, body, n):
    raw = '{"choices":' + "[" * 100_000 + "]" * 100_000 + "}"
    return server.send(writer, 200, raw if n == 3 else good(body))


async def too_many_tokens(server, writer, body, n):
    return server.send(writer, 200, good(body, usage={"prompt_tokens": 10**400, "completion_tokens": 1}))


@pytest.mark.parametrize("manner", [too_deep, too_many_tokens])
def test_what_no_answer_can_be_ends_no_run(tmp_path, manner):
    out, _ = judged(tmp_path, manner)
    assert meta(out)["unjudged"] == 0 and meta(out)["calls"]["judge"].get("prompt_tokens", 0) == 0


async def dripping(server, writer, body, n):
    if n != 3:
        return server.send(writer, 200, good(body))
    writer.write(b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"1\r\n \r\n")
        await writer.drain()
        await asyncio.sleep(0.2)
    return False


def test_an_answer_that_drips_is_late(tmp_path, capsys):
    out, server = judged(tmp_path, dripping, "--timeout", 1)
    assert meta(out)["unjudged"] == 0 and len(server.bodies) == N + 1
    assert "no answer in 1 s" in capsys.readouterr().err


async def another_name_each_time(server, writer, body, n):
    return server.send(writer, 200, good(body, model=f"model-{n}"))


def test_a_server_of_many_names_fills_no_log(tmp_path, capsys):
    judged(tmp_path, another_name_each_time)
    told = capsys.readouterr().err
    assert told.count("are used together") == 1 and told.count("model-") < 8


async def a_mirror(server, writer, body, n):
    return server.send(writer, 200, {"headers": server.heads[-1], "data": "x"})


async def a_mirror_in_the_name(server, writer, body, n):
    said = [line for line in server.heads[-1].splitlines() if line.lower().startswith("authorization")]
    return server.send(writer, 200, good(body, model=f"proxy for {said[0]}"))


def test_a_server_that_mirrors_the_key_has_it_in_no_message_or_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key-12345")
    monkeypatch.setattr(llm.LLM, "TRIAL", 20)
    with pytest.raises(common.DataError, match=r"are broken, such as .*Bearer \*\*\*") as error:
        judged(tmp_path, a_mirror)
    _, server = judged(tmp_path, a_mirror_in_the_name)
    assert any("sk-secret" in head for head in server.heads)
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "sk-secret" not in str(error.value) + capsys.readouterr().err and b"sk-secret" not in files
    assert b"Bearer ***" in files


def test_a_judgment_is_short():
    """A megabyte would keep regular expressions busy for hours."""
    assert llm.parse_judgment('{"accuracy": 0, "completeness": 0}' + " " * 1_000_000 + ".") is None
    assert llm.parse_judgment("accuracy" + " " * 1_000_000) is None
    assert llm.parse_judgment("{" * 1_000_000) is None
    assert llm.parse_judgment('{"accuracy": 0, "completeness": 0}' + " " * 5_000)
    assert llm.parse_judgment("It is so. " * 2_000 + 'Thus {"accuracy": 0, "completeness": 0}')
    assert llm.parse_judgment('```json\n{"accuracy": 0, "completeness": 0}\n```')


BUG = """
import sys
sys.path.insert(0, "tests")
import common
from conftest import load_stage

def dump(record):
    raise RuntimeError("a bug")

stage = load_stage("02_filter_false_negatives")
common.dump = dump
common.run(lambda: stage.main(sys.argv[1:]))
"""


def test_a_bug_in_what_reads_the_answers_ends_the_process(tmp_path):
    """The event loop of a suspended generator would wait for a thread that can no longer start."""
    write(tmp_path / "in.jsonl", records(3, 5, 0))
    flags = f"--input {tmp_path}/in.jsonl --llm judge --cache {tmp_path}/cache --out {tmp_path}/out.jsonl"
    with Running() as server:
        command = [sys.executable, "-c", BUG, *flags.split(), "--base-url", server.url]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "RuntimeError: a bug" in done.stderr


def test_stderr_may_be_closed_or_full(tmp_path):
    write(tmp_path / "in.jsonl", records(1, 3, 0))
    command = f"{sys.executable} {ROOT}/02_filter_false_negatives.py --input in.jsonl --llm judge --cache c"
    with Running() as server:
        env = os.environ | {"OPENAI_BASE_URL": server.url}
        closed = subprocess.run(["sh", "-c", f"{command} --out a.jsonl 2>&-"], cwd=tmp_path, env=env)
        full = subprocess.run(["sh", "-c", f"{command} --out b.jsonl 2>/dev/full"], cwd=tmp_path, env=env)
    assert closed.returncode == 0 and len(read(tmp_path / "a.jsonl")) == 1
    assert full.returncode == 2
