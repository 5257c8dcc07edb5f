"""A chat server over a real socket that misbehaves on purpose, for the tests and bench/judge_faults.py.

    python tests/faulty_server.py --port-file F [--faults 0.3] [--stall 30] [--delay 0] [--log F]

Answers judge calls by a digest of the prompt, so the right answers are known without a model. A share of the
replies is bad, drawn by request and attempt, one of KINDS. --log gets a line for each good answer that was
sent whole: the digest of its prompt.
"""
import argparse
import asyncio
import hashlib
import json
import os
import random
import re
from collections import Counter

KINDS = ["429", "429 Retry-After", "500", "503", "dropped", "stall", "truncated", "prose", "types", "range",
         "empty", "no choices", "html", "cut body", "refused"]


def scores(text):
    """The judgment of a passage: any function of its text will do."""
    digest = hashlib.sha256(text.encode()).digest()
    return {"accuracy": digest[0] % 3 if digest[2] % 4 == 0 else 0, "completeness": digest[1] % 3}


def answer(prompt):
    """The right answer to a judge prompt."""
    found = re.search(r"^Candidate passage: (.*)$", prompt, re.MULTILINE)
    return scores(json.loads(found[1])) if found else {"accuracy": 0, "completeness": 0}


def spoiled(kind, text, draw):
    """(text, finish_reason, refusal) of an answer that is well-formed HTTP and no usable judgment."""
    if kind == "truncated":
        return text[: len(text) // 2], draw.choice(["stop", "length"]), None
    if kind == "prose":  # two different judgments: ambiguous
        other = json.dumps(json.loads(text) | {"accuracy": (json.loads(text)["accuracy"] + 1) % 3})
        text = f"First I thought {other}, but it is {text}."
    elif kind == "types":
        wrong = draw.choice([r'\1"\2 of 2"', r"\1true", r"\1\2.5", r"\1null"])
        text = re.sub(r'("accuracy": )(\d)', wrong, text)
    elif kind == "range":
        text = re.sub(r'("accuracy": )\d', draw.choice([r"\g<1>3", r"\g<1>-1", r"\g<1>99"]), text)
    elif kind == "empty":
        text = draw.choice(["", " \n", None])
    elif kind == "refused":
        return None, "stop", "I cannot help with that."
    return text, "stop", None


class Server:
    def __init__(
        self,
        faults=0.0,
        stall=30.0,
        delay=0.0,
        log=None,
        schema=True,
        seed=13,
        status=None,
        message="no",
        retry_after=None,
        never=None,
        models=None,
    ):
        self.faults, self.stall, self.delay, self.schema, self.seed = faults, stall, delay, schema, seed
        self.status, self.message, self.retry_after = (
            status,
            message,
            retry_after,
        )  # status: always answer this one
        self.answers_as = None  # the model's name in the answers; None: as asked for
        self.models = models  # what /v1/models lists
        self.never = never  # prompts with this word get an empty answer each time
        self.log = open(log, "a", encoding="utf-8") if log else None
        self.seen, self.kinds, self.bodies, self.heads = Counter(), Counter(), [], []

    async def connection(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                if head.startswith("GET"):
                    self.send(writer, 200 if self.models else 404, {"data": self.models})
                    continue
                body = json.loads(
                    await reader.readexactly(int(re.search(r"content-length: (\d+)", head, re.I)[1]))
                )
                if len(self.bodies) < 20000:
                    self.bodies.append(body)
                    self.heads.append(head)
                if not await self.respond(body, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def respond(self, body, writer):
        """Send one reply; False where the connection is to be dropped."""
        prompt = body["messages"][-1]["content"]
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
        self.seen[key] += 1
        draw = random.Random(f"{self.seed}:{key}:{self.seen[key]}")
        kind = draw.choice(KINDS) if draw.random() < self.faults else "good"
        if self.status:
            kind = "refusal"
        self.kinds[kind] += 1
        if self.delay:
            await asyncio.sleep(self.delay)
        if not self.schema and "response_format" in body:
            return self.refuse(writer, 400, "response_format is not supported")
        if kind == "refusal":
            return self.refuse(writer, self.status, self.message, self.retry_after)
        if kind == "stall":
            await asyncio.sleep(self.stall)
            return False
        if kind == "dropped":
            if draw.random() < 0.5:
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
                writer.write(head + b'{"choi')
                await writer.drain()
            return False
        if kind[:3].isdecimal():
            return self.refuse(writer, int(kind[:3]), "come back later", kind.endswith("After"))
        if kind == "html":
            return self.send(writer, 200, "<html>gateway</html>", kind="text/html")
        if kind == "cut body":
            return self.send(writer, 200, '{"id": "x", "choices": [{"mess')
        if kind == "no choices":
            return self.send(writer, 200, {"id": "x", "choices": None})
        text = "" if self.never and self.never in prompt else json.dumps(answer(prompt))
        text, finish, refusal = spoiled(kind, text, draw)
        message = {"role": "assistant", "content": text, "refusal": refusal}
        reply = {"id": "x", "object": "chat.completion", "created": 0,
                 "model": self.answers_as or body["model"],
                 "choices": [{"index": 0, "finish_reason": finish, "message": message}],
                 "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}}
        self.send(writer, 200, reply)
        if kind == "good" and self.log:
            await writer.drain()
            # without max_tokens: a larger one asks the same again
            # and without the sentence that says what was wrong with the last answer
            shown = prompt.partition("\n\nYour last answer")[0]
            asked = json.dumps([body["model"], body["messages"][0], shown, body.get("seed")])
            self.log.write(hashlib.sha256(asked.encode()).hexdigest()[:16] + "\n")
            self.log.flush()
        return True

    def refuse(self, writer, status, message, retry_after=None):
        headers = f"Retry-After: {int(retry_after)}\r\n" if retry_after else ""
        return self.send(writer, status, {"error": {"message": message}}, headers)

    def send(self, writer, status, body, headers="", kind="application/json"):
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{headers}Content-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        return True

    async def serve(self, ready):
        """Serve until cancelled; ready(base_url) is called once the port is open."""
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0, backlog=2048, limit=1 << 22)
        ready(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        async with server:
            await server.serve_forever()


class Running:
    """`with Running(faults=0.3) as server:` serves from a thread; server.url is its base URL."""

    def __init__(self, **settings):
        self.server = Server(**settings)

    def __enter__(self):
        import threading

        up = threading.Event()
        self.loop = asyncio.new_event_loop()

        def ready(url):
            self.server.url = url
            up.set()

        def work():
            self.task = self.loop.create_task(self.server.serve(ready))
            try:
                self.loop.run_until_complete(self.task)
            except asyncio.CancelledError:
                self.loop.run_until_complete(end())

        async def end():  # connections that still stall
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        assert up.wait(10), "the server did not start"
        return self.server

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(10)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--port-file", required=True, help="gets the base URL")
    parser.add_argument("--faults", type=float, default=0.3, help="share of bad replies")
    parser.add_argument("--stall", type=float, default=30, help="seconds of a stall")
    parser.add_argument("--delay", type=float, default=0, help="seconds before each reply")
    parser.add_argument("--log", help="gets a line per good answer")
    parser.add_argument("--no-schema", action="store_true", help="refuse response_format")
    args = parser.parse_args()

    def ready(url):
        with open(args.port_file + ".tmp", "w", encoding="utf-8") as file:
            file.write(url)
        os.replace(args.port_file + ".tmp", args.port_file)

    asyncio.run(Server(args.faults, args.stall, args.delay, args.log, not args.no_schema).serve(ready))


if __name__ == "__main__":
    main()
