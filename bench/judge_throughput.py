"""Calls a second of stage 02 beside bare loops over the openai client; the server answers after 50 ms.

    python bench/judge_throughput.py [--calls 10000] [--concurrency 256] [--rounds 2] [--beside CHECKOUT]

Each line is a process of its own, in turn, over the same prompts (stage 02's, of 40 candidates a query):
  create            asyncio workers around client.chat.completions.create, the client as it comes
  create, aiohttp   the same with openai.DefaultAioHttpClient
  post, aiohttp     the same without response models: client.post(cast_to=object)
  stage 02          the whole stage: reads the records, builds prompts, digests, asks, parses, stores, writes
  beside            stage 02 of another checkout of this project
Ideal is concurrency / 50 ms. The server is a process of its own.

Measured with --calls 6000 on two idle cores (AMD EPYC), two rounds; CPU is the limit:
  create            300, 314 calls/s    3.51, 3.33 ms CPU a call
  create, aiohttp   621, 607            1.73, 1.80
  post, aiohttp     1073, 1231          1.06, 0.99
  stage 02          985, 1025           1.13, 1.08 (start-up included)
With answers in SQLite stage 02 takes 1.00-1.05 times the CPU time that it took with answers in JSON lines
(--beside, three rounds in turn). Nine tenths of it are the client's.
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
KINDS = ["create", "create, aiohttp", "post, aiohttp", "stage 02"]
N_CANDIDATES = 40
TEXT = "The city lies on the river and has been the seat of the government since nineteen hundred and five. "


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="lines to measure")
    parser.add_argument("--beside", metavar="CHECKOUT", help="another checkout: measure its stage 02")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    return parser


class Connection(asyncio.Protocol):
    """HTTP as bare as it gets: every request gets the same reply after a while."""

    def __init__(self, delay_s, reply):
        self.delay_s = delay_s
        self.reply = reply
        self.data = b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            head = self.data[:end].lower()
            _, found, length = head.partition(b"content-length:")  # GET /models has none
            n = int(length.split(b"\r\n")[0]) if found else 0
            if len(self.data) < end + 4 + n:
                return
            self.data = self.data[end + 4 + n:]
            asyncio.get_running_loop().call_later(self.delay_s, self.transport.write, self.reply)


async def serve(delay_s, port_file):
    message = {"role": "assistant", "content": json.dumps({"accuracy": 0, "completeness": 1})}
    body = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                       "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                       "usage": {"prompt_tokens": 600, "completion_tokens": 14}}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(delay_s, head + body), "127.0.0.1", 0, backlog=4096)
    Path(port_file + ".tmp").write_text(str(server.sockets[0].getsockname()[1]))
    os.replace(port_file + ".tmp", port_file)
    await server.serve_forever()


def passage(docid):
    return {"docid": docid, "title": f"Title {docid}", "text": f"{docid} {TEXT * 5}"}


def records(n_calls):
    for i in range(n_calls // N_CANDIDATES):
        yield {"query_id": f"q{i}", "lang": "en", "query": f"Which city is the capital number {i}?",
               "positive_passages": [passage(f"p{i}")], "negative_passages": [],
               "candidate_passages": [passage(f"{i}#{j}") for j in range(N_CANDIDATES)]}


async def bare(args):
    """Seconds of a loop that only asks."""
    import httpx2
    import openai

    from llm import JUDGMENT, judge_messages
    prompts = [judge_messages(record["query"], "en", candidate, record["positive_passages"][0])
               for record in records(args.calls) for candidate in record["candidate_passages"]]
    http = None
    if "aiohttp" in args.kind:
        http = openai.DefaultAioHttpClient(limits=httpx2.Limits(max_connections=args.concurrency))
    client = openai.AsyncOpenAI(base_url=args.url, api_key="x", http_client=http, timeout=120)
    todo = iter(prompts)

    async def worker():
        for messages in todo:
            body = {"model": "m", "messages": messages, "response_format": JUDGMENT, "max_tokens": 64,
                    "temperature": 0}
            if args.kind.startswith("create"):
                answer = (await client.chat.completions.create(**body)).choices[0].message.content
            else:
                answer = await client.post("/chat/completions", cast_to=object, body=body)
                answer = answer["choices"][0]["message"]["content"]
            json.loads(answer)
    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(args.concurrency)))
    seconds = time.perf_counter() - start
    await client.close()
    return seconds


def stage(args, folder):
    """Seconds of the whole stage 02."""
    from conftest import load_stage
    path = Path(folder) / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(args.calls)))
    main = load_stage("02_filter_false_negatives").main
    import aiohttp  # noqa: F401 - loaded before the clock starts, as for the bare loops
    import httpx2  # noqa: F401
    import openai  # noqa: F401
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        main(["--input", str(path), "--llm", "m", "--base-url", args.url, "--concurrency",
              str(args.concurrency), "--cache", f"{folder}/cache", "--out", f"{folder}/out.jsonl"])
    return time.perf_counter() - start


def child(args):
    """One line's work, in a process of its own."""
    root = args.beside if args.kind == "beside" else str(ROOT)
    sys.path[:0] = [root, f"{root}/tests"]
    with tempfile.TemporaryDirectory() as folder:
        seconds = stage(args, folder) if args.kind in ("stage 02", "beside") else asyncio.run(bare(args))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024]))


def main():
    args = build_parser().parse_args()
    if args.serve:
        return asyncio.run(serve(args.delay, args.serve))
    if args.kind:
        return child(args)
    os.environ.setdefault("OPENAI_API_KEY", "x")
    kinds = args.kinds + ["beside"] * bool(args.beside)
    with tempfile.TemporaryDirectory() as folder:
        port = Path(folder) / "port"
        server = subprocess.Popen([sys.executable, __file__, "--serve", port, "--delay", str(args.delay)])
        try:
            while not port.exists():
                time.sleep(0.05)
            ideal = args.concurrency / args.delay
            print(f"{args.calls} calls, concurrency {args.concurrency}, ideal {ideal:.0f} calls/s")
            for kind in kinds * args.rounds:
                command = [sys.executable, __file__, "--kind", kind, "--calls", str(args.calls),
                           "--concurrency", str(args.concurrency),
                           "--url", f"http://127.0.0.1:{port.read_text()}/v1"]
                command += ["--beside", args.beside] if args.beside else []
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                seconds, cpu, mb = json.loads(done.stdout)
                print(f"{kind:<16} {args.calls / seconds:6.0f} calls/s  "
                      f"{1000 * cpu / args.calls:.2f} ms CPU a call  peak {mb} MB", flush=True)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
