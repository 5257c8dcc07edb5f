"""A classical stand-in for a language model: an OpenAI-compatible chat server that needs no model.

It lets the pipeline run end to end on a fresh machine, over a real socket with the real client. IT IS NOT A
LANGUAGE MODEL: it compares words and numbers, and picks and cuts sentences (sample/stand_in.py). Its output
shows that the plumbing works, not what the method is worth; every answer says so in `system_fingerprint`.

Reads   POST /v1/chat/completions; the last user message has lines `Label: "JSON string"` (answer_task).
        Other lines are ignored, other tasks refused with 400. Also GET /v1/models and GET /health.
Usage   python offline_llm.py --port 0            prints its base URL, serves until SIGTERM
        python offline_llm.py --exec make all     serves while the command runs
Cost    one core, 60 MB, 0.5 ms a judge call with its HTTP

Answers depend on the request alone: no memory, no chance, no clock (`created` is 0; temperature and seed
change nothing). Token counts are an estimate: UTF-8 bytes / 4 rounded up, plus 4 a message.
"""
import argparse
import asyncio
import json
import math
import os
import re
import signal
import sys
import traceback
import zlib

from common import Parser
from sample.stand_in import judge, summarise, write_negative, write_query

FINGERPRINT = "offline-stand-in: classical methods, no language model"
MAX_BODY = 4 * 1024 * 1024  # bytes; more is answered 413


# ---- the chat protocol

class RequestError(Exception):
    """What the client is told in OpenAI's error body; param names the field to mend."""

    def __init__(self, message, param=None, code=None, status=400):
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


REFERENCE = "Reference passage"
LABEL = re.compile(r"^(Question|Reference passage|Candidate passage|Passage that answers it|Passage|Summary)"
                   r"(?: \([^)\n]*\))?:[ \t]*(.*)$", re.MULTILINE)


def read_labels(message):
    """{label: value} of the lines `Label: "JSON string"`; a passage cannot leave its JSON string."""
    values = {}
    for label, raw in LABEL.findall(message):
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, str):
            raise RequestError(f'line "{label}:" needs a JSON string, got {raw[:60]!r}', "messages")
        if label in values:
            raise RequestError(f'line "{label}:" is there twice; give each value once', "messages")
        values[label] = value
    return values


def answer_task(message):
    """The answer to a user message: a dict (to be sent as JSON) for the judge's task, else plain text."""
    match read_labels(message):
        case {"Question": question, "Candidate passage": candidate, **more} if set(more) <= {REFERENCE}:
            return judge(question, more.get(REFERENCE), candidate)  # Sec. 3.3
        case {"Question": question, "Passage": passage, **more} if not more:
            return summarise(question, passage)  # Sec. 3.4: the sentences that cover the question best
        case {"Summary": summary, **more} if not more:
            return write_query(summary)  # Sec. 3.4: its telling words and numbers, in order
        case {"Question": question, "Passage that answers it": passage, **more} if not more:
            return write_negative(question, passage)  # the sentences that cover the question least
        case given:
            raise RequestError("this stand-in is no language model and does not know this task (labels: "
                               f"{', '.join(given) or 'none'}); see offline_llm.py --help, or use a real "
                               "server", "messages", code="unknown_task")


def whole_number(body, name, default):
    value = default if body.get(name) is None else body[name]
    if type(value) is not int or not 1 <= value <= 1 << 30:
        raise RequestError(f"{name} is {value!r}; it must be a whole number from 1", name)
    return value


def message_text(message):
    """The text of one chat message, whose content is a string or a list of text parts."""
    try:
        content = message["content"]
        return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    except (TypeError, LookupError):
        raise RequestError("each message needs content: a string or text parts", "messages") from None


def check_format(response_format, answer):
    """Refuses a response_format that the answer would break, rather than answer in another shape."""
    match response_format:
        case None | {"type": "text"}:
            return
        case {"type": "json_object"} if isinstance(answer, dict):
            return
        case {"type": "json_schema", "json_schema": {"schema": {**schema}}} if isinstance(answer, dict):
            if set(schema.get("required", [])) <= set(answer):
                return
    shape = f"as JSON with {', '.join(answer)}" if isinstance(answer, dict) else "in plain text"
    raise RequestError(f"this task is answered {shape}", "response_format")


def complete(body):
    """The chat.completion object for the parsed body of a request."""
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise RequestError("the body must be an object with a non-empty list of messages", "messages")
    if not isinstance(body.get("model"), str):
        raise RequestError("model must be a string; any name will do here", "model")
    if body.get("stream"):
        raise RequestError("this stand-in does not stream; leave stream out", "stream")
    n_choices = min(whole_number(body, "n", 1), 128)
    max_tokens = whole_number(body, "max_tokens", 1 << 30)
    limit = 4 * whole_number(body, "max_completion_tokens", max_tokens)  # in bytes, 4 a token
    texts = [message_text(message) for message in body["messages"]]
    asked = [text for text, message in zip(texts, body["messages"]) if message.get("role") == "user"]
    if not asked:
        raise RequestError("no message has the role user", "messages")
    answer = answer_task(asked[-1])
    check_format(body.get("response_format"), answer)
    data = (json.dumps(answer) if isinstance(answer, dict) else answer).encode("utf-8", "replace")
    n_prompt = sum(4 + math.ceil(len(text.encode("utf-8", "replace")) / 4) for text in texts)
    n_completion = n_choices * math.ceil(min(len(data), limit) / 4)
    content = data[:limit].decode("utf-8", "ignore")
    choice = {"message": {"role": "assistant", "content": content, "refusal": None}, "logprobs": None,
              "finish_reason": "stop" if len(data) <= limit else "length"}
    return {"id": f"chatcmpl-offline-{zlib.crc32(data):08x}", "object": "chat.completion", "created": 0,
            "model": body["model"], "system_fingerprint": FINGERPRINT,
            "choices": [{"index": i, **choice} for i in range(n_choices)],
            "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_completion,
                      "total_tokens": n_prompt + n_completion}}


# ---- the server

def application():
    """Its three routes; every error has OpenAI's body."""
    from aiohttp import web

    async def chat(request):
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {error}") from None
        return complete(body)

    async def models(_):
        return {"object": "list", "data": [
            {"id": "offline-stand-in", "object": "model", "created": 0, "owned_by": FINGERPRINT}]}

    async def health(_):
        return {"status": "ok", "system_fingerprint": FINGERPRINT}

    def as_response(answer, status=200, headers=None):
        data = json.dumps(answer).encode()  # ASCII: a lone surrogate in a request does no harm
        return web.Response(body=data, status=status, headers=headers, content_type="application/json")

    @web.middleware
    async def as_json(request, handler):
        headers = {}
        try:
            return as_response(await handler(request))
        except RequestError as known:
            error = known
        except web.HTTPException as found:  # no such route or method, a body too large
            error = RequestError(f"{request.method} {request.path}: {found.text}", status=found.status)
            headers = {name: value for name, value in found.headers.items() if name == "Allow"}
        except Exception:  # a bug of ours: its traceback goes to stderr, and the client is told
            traceback.print_exc()
            error = RequestError("a bug in offline_llm.py; see its stderr", status=500)
        return as_response(error.body, error.status, headers)

    app = web.Application(client_max_size=MAX_BODY, middlewares=[as_json])
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", health)
    return app


async def run_command(command, url, on_signal):
    """The exit status of a command that finds the server in its environment."""
    no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    no_proxy = f"{no_proxy},127.0.0.1".strip(",")  # a proxy cannot reach this machine
    env = {"OPENAI_API_KEY": "offline", **os.environ, "OPENAI_BASE_URL": url,
           "NO_PROXY": no_proxy, "no_proxy": no_proxy}
    try:
        child = await asyncio.create_subprocess_exec(*command, env=env)
    except OSError as error:
        print(f"offline_llm.py: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126  # as a shell says it

    def pass_on(number):
        at_terminal = number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()
        if child.returncode is None and not at_terminal:  # a terminal's Ctrl-C reaches it by itself
            child.send_signal(number)
    on_signal(pass_on)
    status = await child.wait()
    return status if status >= 0 else 128 - status


async def serve(port, command):
    """Serves until a signal comes, or as long as the command runs; returns the exit status."""
    from aiohttp import web
    runner = web.AppRunner(application(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    print(f"offline_llm.py: {FINGERPRINT}; serving {url}", file=sys.stderr, flush=True)

    def on_signal(work):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, work, number)
    if command:
        return await run_command(command, url, on_signal)
    stopped = asyncio.Event()
    on_signal(lambda _: stopped.set())
    print(url, flush=True)
    await stopped.wait()
    return 0


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--port", type=int, default=0, help="port of 127.0.0.1; 0 takes a free one")
    parser.add_argument("--exec", nargs=argparse.REMAINDER, metavar="COMMAND", dest="command",
                        help="run this command (all that follows is its own), OPENAI_BASE_URL pointing here "
                             "and OPENAI_API_KEY if it is unset; pass signals on; exit with its status, "
                             "128 + the signal that ended it, 126 or 127 if it cannot be run")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is not None and not args.command:
        parser.error("--exec needs a command")
    try:
        return asyncio.run(serve(args.port, args.command))
    except (OSError, OverflowError) as error:
        parser.error(f"cannot serve on port {args.port}: {error}; try --port 0")


if __name__ == "__main__":
    sys.exit(main())
