"""Calls a second of stage 02 beside bare loops over the openai client, against a server that answers after 50 ms.

    python bench/judge_throughput.py [--calls 10000] [--concurrency 256] [--rounds 2]

Each line is a process of its own, in turn, over the same prompts (stage 02's, of 40 candidates a query):
  create            asyncio workers around client.chat.completions.create, the client as it comes
  create, aiohttp   the same with openai.DefaultAioHttpClient
  post, aiohttp     the same without response models: client.post(cast_to=object), the least one can do with this client
  stage 02          the whole stage: reads the records, builds prompts, digests, asks, parses, caches, writes
Ideal is concurrency / 50 ms. The server is a process of its own.

Measured with --calls 6000 on two idle cores (AMD EPYC), two rounds; CPU is the limit:
  create            300, 314 calls/s    3.51, 3.33 ms CPU a call
  create, aiohttp   621, 607            1.73, 1.80
  post, aiohttp     1073, 1231          1.06, 0.99
  stage 02          985, 1025           1.13, 1.08 (start-up included)
A profile of stage 02 gives 92% of its time to the client; ours is prompts 1.5%, parsing 1.3%, cache 1%, records 1%, start 2%.
"""
import argparse
import asyncio
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
N_CANDIDATES = 40


def serve(delay_s, port_file):
    content = json.dumps({"accuracy": 0, "completeness": 1})
    body = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                       "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
                       "usage": {"prompt_tokens": 600, "completion_tokens": 14, "total_tokens": 614}}).encode()
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    class Connection(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport, self.data = transport, b""

        def data_received(self, data):
            self.data += data
            while (end := self.data.find(b"\r\n\r\n")) >= 0:
                head = self.data[:end].lower()
                n = int(head[head.find(b"content-length:") + 15:].split(b"\r\n")[0])
                if len(self.data) < end + 4 + n:
                    return
                self.data = self.data[end + 4 + n:]
                asyncio.get_running_loop().call_later(delay_s, self.transport.write, reply)

    async def main():
        server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0, backlog=4096)
        Path(port_file + ".tmp").write_text(str(server.sockets[0].getsockname()[1]))
        os.replace(port_file + ".tmp", port_file)
        await server.serve_forever()
    asyncio.run(main())


def records(n_calls):
    text = "The city lies on the river and has been the seat of the government since the year nineteen hundred and five. " * 5
    for i in range(n_calls // N_CANDIDATES):
        def passage(docid, i=i):
            return {"docid": docid, "title": f"Title {docid}", "text": f"{docid} {text}"}
        yield {"query_id": f"q{i}", "lang": "en", "query": f"Which city is the capital number {i}?", "positive_passages": [passage(f"p{i}")],
               "negative_passages": [], "candidate_passages": [passage(f"{i}#{j}") for j in range(N_CANDIDATES)]}


async def bare(url, kind, n_calls, concurrency):
    import httpx2
    import openai

    from llm import JUDGMENT, judge_messages
    prompts = [judge_messages(r["query"], r["lang"], [c], r["positive_passages"][0]) for r in records(n_calls) for c in r["candidate_passages"]]
    http = None if kind == "create" else openai.DefaultAioHttpClient(limits=httpx2.Limits(max_connections=concurrency))
    client = openai.AsyncOpenAI(base_url=url, api_key="x", http_client=http, timeout=120)
    todo = iter(prompts)

    async def worker():
        for messages in todo:
            body = {"model": "m", "messages": messages, "response_format": JUDGMENT, "max_tokens": 64, "temperature": 0}
            if kind.startswith("create"):
                answer = (await client.chat.completions.create(**body)).choices[0].message.content
            else:
                answer = (await client.post("/chat/completions", cast_to=object, body=body))["choices"][0]["message"]["content"]
            json.loads(answer)
    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    seconds = time.perf_counter() - start
    await client.close()
    return seconds


def stage(url, n_calls, concurrency, folder):
    from conftest import load_stage
    path = Path(folder) / "in.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records(n_calls)))
    main = load_stage("02_filter_false_negatives").main
    import aiohttp, openai, httpx2  # noqa: E401, F401 - loaded before the clock starts, as for the bare loops
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        main(["--input", str(path), "--llm", "m", "--base-url", url, "--concurrency", str(concurrency), "--cache", f"{folder}/cache",
              "--out", f"{folder}/out.jsonl"])
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.delay, args.serve)
    if args.kind:
        with tempfile.TemporaryDirectory() as folder:
            seconds = (stage(args.url, args.calls, args.concurrency, folder) if args.kind == "stage 02" else
                       asyncio.run(bare(args.url, args.kind, args.calls, args.concurrency)))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps([seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024]))
        return
    os.environ.setdefault("OPENAI_API_KEY", "x")
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen([sys.executable, __file__, "--serve", f"{folder}/port", "--delay", str(args.delay)])
        try:
            while not Path(f"{folder}/port").exists():
                time.sleep(0.05)
            url = f"http://127.0.0.1:{Path(f'{folder}/port').read_text()}/v1"
            print(f"{args.calls} calls, concurrency {args.concurrency}, ideal {args.concurrency / args.delay:.0f} calls/s")
            for _ in range(args.rounds):
                for kind in ("create", "create, aiohttp", "post, aiohttp", "stage 02"):
                    done = subprocess.run([sys.executable, __file__, "--kind", kind, "--url", url, "--calls", str(args.calls),
                                           "--concurrency", str(args.concurrency)], stdout=subprocess.PIPE, check=True, text=True)
                    seconds, cpu, mb = json.loads(done.stdout)
                    print(f"{kind:<16} {args.calls / seconds:6.0f} calls/s  {1000 * cpu / args.calls:.2f} ms CPU a call  peak {mb} MB", flush=True)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
