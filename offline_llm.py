"""A classical stand-in for a language model: an OpenAI-compatible chat server that needs no model.

It lets the pipeline run end to end on a fresh machine, over a real socket with the real client. IT IS NOT A
LANGUAGE MODEL: it compares words and numbers, and picks and cuts sentences (sample/stand_in.py). Its output
shows that the plumbing works, not what the method is worth; every answer says so in `system_fingerprint`.

Reads   POST /v1/chat/completions; the last user message has lines `Label: "JSON string"` (stand_in.py).
        Other lines are ignored, other tasks refused with 400. Also GET /v1/models. Answers depend on the
        request alone: no memory, no chance, no clock (`created` is 0; temperature and seed change nothing).
        Token counts are an estimate: UTF-8 bytes / 4 rounded up, plus 4 a message
Usage   python offline_llm.py --port 0            prints its base URL, serves until SIGTERM
        python offline_llm.py --exec make all     serves while the command runs
Cost    one core, 60 MB, 0.5 ms a judge call with its HTTP
"""
import argparse
import asyncio
import json
import math
import os
import signal
import sys

from aiohttp import web

from common import Parser
from sample.stand_in import Unanswerable, answer_task

FINGERPRINT = "offline-stand-in: classical methods, no language model"
MAX_BODY = 4 * 1024 * 1024  # bytes; more is answered 413


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--port", type=int, default=0, help="port of 127.0.0.1; 0 takes a free one")
    parser.add_argument("--exec", nargs=argparse.REMAINDER, metavar="COMMAND", dest="command",
                        help="run this command (all that follows is its own), OPENAI_BASE_URL pointing here "
                             "and OPENAI_API_KEY if it is unset; pass SIGTERM on; exit with its status, "
                             "or 128 + the signal that ended it")
    return parser


# --------------------------------------------------------------------------- the chat protocol

def refusal(message, param=None, code=None):
    """To be raised: status 400 with OpenAI's error body; param names the field to mend."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return web.HTTPBadRequest(text=json.dumps({"error": error}), content_type="application/json")


def complete(body):
    """The chat.completion object for the body of a request; fields not named here are ignored."""
    try:
        body = json.loads(body)
        model = body["model"]
        texts = [message["content"] for message in body["messages"]]
        asked = [message["content"] for message in body["messages"] if message["role"] == "user"]
        max_tokens = int(body.get("max_completion_tokens") or body.get("max_tokens") or sys.maxsize)
        wants_json = (body.get("response_format") or {"type": "text"})["type"] != "text"
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise refusal(f"no chat request: {type(error).__name__}: {error}") from None
    if not asked or not all(isinstance(text, str) for text in texts):
        raise refusal("want messages {role, content}, one of the user among them, with texts as content",
                      "messages")
    try:
        answer = answer_task(asked[-1])
    except Unanswerable as error:
        message, code = error.args
        raise refusal(message, "messages", code) from None
    if wants_json and isinstance(answer, str):
        raise refusal("this task is answered in plain text", "response_format")
    text = answer if isinstance(answer, str) else json.dumps(answer)
    data = text.encode("utf-8", "replace")
    shown = data[:4 * max_tokens].decode("utf-8", "ignore")
    n_prompt = sum(4 + math.ceil(len(text.encode("utf-8", "replace")) / 4) for text in texts)
    n_completion = min(math.ceil(len(data) / 4), max_tokens)
    choice = {"index": 0, "message": {"role": "assistant", "content": shown, "refusal": None},
              "logprobs": None, "finish_reason": "stop" if len(data) <= 4 * max_tokens else "length"}
    return {"id": "chatcmpl-offline", "object": "chat.completion", "created": 0, "model": model,
            "system_fingerprint": FINGERPRINT, "choices": [choice],
            "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_completion,
                      "total_tokens": n_prompt + n_completion}}


# --------------------------------------------------------------------------- the server

async def chat(request):
    return web.json_response(complete(await request.read()))


async def models(_):
    model = {"id": "offline-stand-in", "object": "model", "created": 0, "owned_by": FINGERPRINT}
    return web.json_response({"object": "list", "data": [model]})


async def run_command(command, url):
    """The exit status of a command that finds the server in its environment."""
    outside = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    no_proxy = f"127.0.0.1,{outside}"  # a proxy cannot reach this machine
    env = {"OPENAI_API_KEY": "offline", **os.environ, "OPENAI_BASE_URL": url,
           "NO_PROXY": no_proxy, "no_proxy": no_proxy}
    child = await asyncio.create_subprocess_exec(*command, env=env)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, child.terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the command by itself
    status = await child.wait()
    return status if status >= 0 else 128 - status


async def serve(port, command):
    """Serves until SIGTERM or Ctrl-C, or as long as the command runs; returns the exit status."""
    app = web.Application(client_max_size=MAX_BODY)
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/v1/models", models)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    print(f"offline_llm.py: {FINGERPRINT}; serving {url}", file=sys.stderr, flush=True)
    if command:
        return await run_command(command, url)
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    print(url, flush=True)
    await stopped.wait()
    return 0


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == []:
        parser.error("--exec needs a command")
    try:
        return asyncio.run(serve(args.port, args.command))
    except (OSError, OverflowError) as error:  # the port is taken or none, or there is no such command
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
