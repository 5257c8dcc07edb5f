"""A classical stand-in for a language model: an OpenAI-compatible chat server that needs no model.

It lets the pipeline (judge, summarise, write queries and negatives) run end to end on a fresh
machine, over a real socket with the real client. IT IS NOT A LANGUAGE MODEL: it compares words and
numbers, and picks and cuts sentences. Its output shows that the plumbing works, not what the method
is worth; every answer says so in `system_fingerprint`.

Reads   POST /v1/chat/completions; the last user message has lines `Label: "JSON string"`:
          Question, [Reference passage (...),] Candidate passage       (judge, Sec. 3.3)
            -> {"accuracy": 0|1|2, "completeness": 0|1|2}
          Question, [Reference passage (...),] Candidate passage 1, Candidate passage 2, ...
            -> {"judgments": [{"id": 1, "accuracy": 0|1|2, "completeness": 0|1|2}, ...]}
          Question, Passage  -> the sentences that cover the question best  (summary, Sec. 3.4)
          Summary            -> its telling words and numbers, in order     (query, Sec. 3.4)
          Question, Passage that answers it  -> the sentences that cover the question least
        A passage is title, newline, text (or only text). Other lines are ignored, other tasks
        refused with 400. Also GET /v1/models and GET /health.
Usage   python offline_llm.py --port 0            prints its base URL, serves until SIGTERM
        python offline_llm.py --exec make all     serves while the command runs
Cost    one core, 47 MB, 0.3 ms a judge call with its HTTP: 2,700 to 3,100 calls/s (2 cores, AMD Zen 5)

Answers depend on the request alone: no memory, no chance, no clock (`created` is 0; temperature and
seed change nothing). Token counts are an estimate: UTF-8 bytes / 4 rounded up, plus 4 a message.
"""
import argparse
import asyncio
import functools
import json
import math
import os
import re
import signal
import sys
import traceback
import zlib
from collections import Counter
from http import HTTPStatus

FINGERPRINT = "offline-stand-in: classical methods, no language model"
MAX_HEAD, MAX_BODY = 64 * 1024, 4 * 1024 * 1024  # bytes; more is answered 431 or 413
ROUTES = {"/v1/chat/completions": "POST", "/v1/models": "GET", "/health": "GET"}

# Tuned once for all languages: human judgments in 15 (mini-MIRACL, train), the sample in 5.
PREFIX = 5  # a word counts as its first letters: a crude stemmer, for Finnish or Telugu as for English
ACCURACY_AT = (0.56, 0.72)  # evidence in [0, 1] that earns accuracy 1 and 2
COVERAGE_ONLY_AT = (0.62, 0.80)  # the same without a reference, where coverage is all the evidence
COMPLETENESS_AT = (0.25, 0.60)  # coverage of the question in [0, 1] for completeness 1 and 2

FUNCTION_WORDS = frozenset("""
the of in and a to was as is by for on with that it from at an which this were be are also his he has
what when who where how did does do many much whose why de la en y el que los se del un por con una las
es como su para al fue no lo qué cuál quién cuándo dónde cuántos más le et les des est du une dans qui
il sont sur par pour quel quelle quels quelles quand où comment combien ja oli myös joka ovat tai sekä
ei että hän milloin kuka mikä mitä missä minkä kuinka dan yang di dari dengan pada adalah ini dalam
untuk sebagai oleh juga apakah apa siapa siapakah kapan berapa mana ya na wa kwa katika ni za kama cha
kuwa je gani nani upi ipi lini wapi ngapi der die das und ist von dem den ein eine zu im wer wann wo wie
ní ti tí àti kí jẹ́ wọ́n l d s в и на с по из не к для как от что за его был это были или до кто какой
какая каком когда где сколько является في من على إلى أن التي عن أو مع هو الذي ما هي هذه هذا كان كانت متى
أين هل أي كم ماهو ماهي در به از که می است این را های با آن شد شده یک ها برای بود چه چند چیست کدام کی کجا
चे के में की है और का से को एक हैं पर किया यह ने था थी क्या कौन किस कब कहाँ कितने कितनी कितना এবং ও হয়
করে একটি এই থেকে এর কোন কত কী কে কবে কোথায় ছিল ఈ ఉంది మరియు ఒక ఏది ఏ ఎవరు ఎంత ఎన్ని ఎప్పుడు ఎక్కడ యొక్క
ఏమిటి 은 는 이 가 을 를 의 에 언제 누구 무엇 어디 몇""".split())

MARKS = "\u0300-\u036f\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0970-\u09e3\u09f0-\u0dff"  # not in \w
THAI, HANGUL, KATAKANA = "\u0e01-\u0e4e", "\uac00-\ud7af", "\u30a1-\u30fa\u30fc-\u30ff"
HAN = "\u3400-\u9fff\u3005"
# No spaces between words: runs end at common function words; hiragana, mostly grammar, is skipped.
THAI_GLUE = "ของ|คือ|เป็น|และ|ที่|ใน|จาก|โดย|ด้วย|ว่า|มี|ได้|หรือ|อะไร|ใคร|ใด|เท่าไร"
HAN_GLUE = "的是了在有和為为這这與与於于之其以而及等也被什么麼谁誰哪个個几幾多少吗嗎"
THAI_RUN, HAN_RUN = f"(?:{THAI_GLUE})|(?:(?!{THAI_GLUE})[{THAI}])+", f"(?:(?![{HAN_GLUE}])[{HAN}])+"
UNSPACED = f"{THAI}\u3041-\u30ff{HAN}"
NUMBER = r"\d(?:[\d.,٫٬]*\d)?"
LETTERS = rf"(?:[^\W\d_{UNSPACED}%s]+[{MARKS}]*)+"
TOKEN = re.compile(rf"{LETTERS % HANGUL}|{NUMBER}|{THAI_RUN}|[{KATAKANA}]+|{HAN_RUN}|[{HANGUL}]+")
PHRASE = re.compile(rf"{LETTERS % ''}|{NUMBER}|{THAI_RUN}|[{KATAKANA}]+|{HAN_RUN}")  # as shown
KOREAN_ENDING = re.compile("(?<=.)(?:에서|에는|으로|이다|입니다|습니다|하는|[은는이가을를의에와과로다])$")
ARABIC_ARTICLE = re.compile("^(?:[وفبكل]?ال|لل)(?=..)")
CAPITALISED = re.compile(r"(?<=[\w,;:(\"] )\(?[A-ZÀ-ÞА-Я]\w+")  # a name, most likely
SENTENCE_END = re.compile(r"(?<=[。！？।॥۔؟])\s*(?=\S)"
                          rf"|(?<=[^\W\d_][^\W\d_{MARKS}][.!?])\s+(?=\S)"
                          rf"|(?<=[\d{MARKS})\]\"»”%°][.!?])\s+(?=\S)|(?<=[{UNSPACED}][!?])(?=\S)")
CLAUSE_END = re.compile(r"[,;،؛、，；:：—–]")
LABEL = re.compile(r"^(Question|Reference passage|Candidate passage|Passage that answers it|Passage"
                   r"|Summary)(?: (\d{1,6}))?(?: \([^)\n]*\))?:[ \t]*(.*)$", re.MULTILINE)


class RequestError(Exception):
    """An HTTP status and OpenAI's error body; param names the field to mend."""

    def __init__(self, message, param=None, status=400, code=None, headers=""):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers


# ---- text ----------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=32768)  # words recur; this changes speed only
def token_terms(token):
    """Terms of a token: a number, a word's prefix, or character pairs (Thai: triples) of a run."""
    first = token[0]
    if token in FUNCTION_WORDS or token in THAI_GLUE.split("|"):
        return []
    if first.isdecimal():  # 139,820 and ১৩৯৮২০ are one number
        digits = re.sub(r"\D", "", token)
        return [str(int(digits)) if len(digits) < 20 else digits]
    if "\u0e01" <= first <= "\u0e4e" or "\u30a1" <= first <= "\ud7af":
        n = 3 if first <= "\u0e4e" else 2
        if first >= "\uac00":
            token = KOREAN_ENDING.sub("", token)
        return [token[i:i + n] for i in range(max(1, len(token) - n + 1))]
    return [(ARABIC_ARTICLE.sub("", token) if "\u0620" <= first <= "\u06ff" else token)[:PREFIX]]


def terms(text):
    """Content terms in order, with repeats."""
    out = []
    for token in TOKEN.findall(text.lower()):
        out += token_terms(token) if len(token) < 64 else token_terms.__wrapped__(token)
    return out


def weight(term):
    """How much a term tells: numbers most, long words more than short."""
    if term.isdigit():
        return 3.0 if len(term) > 1 else 1.5
    if "\u0e01" <= term[0] <= "\u0e4e":
        return 0.7
    if "\u3041" <= term[0] <= "\ud7af":
        return 1.0 if len(term) > 1 else 0.7
    return min(len(term), PREFIX) / 4


def sentences(text):
    out = []
    for line in text.split("\n"):
        for part in SENTENCE_END.split(line.strip()):
            if len(re.findall(rf"[{THAI}]", part)) > len(part) / 2:  # Thai: a space may end a sentence
                pieces = part.split(" ")
                part = pieces[0]
                for piece in pieces[1:]:
                    if len(part) < 24 or len(piece) < 12:
                        part += " " + piece
                    else:
                        out.append(part)
                        part = piece
            if part.strip():
                out.append(part.strip())
    return out


def split_passage(passage):
    """(title, text); the title is a first line of up to 200 characters with text after it."""
    title, newline, text = passage.strip().partition("\n")
    return (title.strip(), text.strip()) if newline and len(title) <= 200 else ("", passage.strip())


def share(weights, present):
    """Weighted share of the terms in `weights` that are in `present`, in [0, 1]; 0 for no terms."""
    return sum(w for t, w in weights.items() if t in present) / (sum(weights.values()) or 1.0)


def telling(question, title):
    """{term: weight} of a question, to compare sentences: the title's words may stand in any."""
    in_title = set(terms(title))
    return {t: weight(t) * (0.2 if t in in_title else 1.0) for t in terms(question)}


# ---- the four tasks ------------------------------------------------------------------------------

@functools.lru_cache(maxsize=256)  # a query's candidates come together
def read_question(question, reference):
    """What a question and its reference ask of a candidate: key, topic, answer, each {term: weight}.

    key: the question's terms that the reference uses too (the rest is the question's own wording);
    topic: those in the reference's title; answer: the reference's other terms, by how well their
    sentence covers the question (to the third power: the best counts), names half as much again.
    """
    asked = {t: weight(t) for t in terms(question)}
    if reference is None:
        return asked, asked, {}
    title, text = split_passage(reference)
    title_terms, in_reference = set(terms(title)), set(terms(reference))
    key = {t: w for t, w in asked.items() if t in in_reference} or asked
    topic = {t: w for t, w in asked.items() if t in title_terms} or key
    # An unspaced title is cut out, or the character pairs at its edges would pose as answers.
    known = title.lower() if re.search(f"[{UNSPACED}{HANGUL}]", title) else "\n"
    parts = sentences(text)
    rows = [list(dict.fromkeys(terms(s.lower().replace(known, " ")))) for s in parts]  # in order
    seen_in = Counter(t for row in rows for t in row)
    tell = telling(question, title)
    covered = [sum(tell[t] / (0.7 + 0.3 * seen_in[t]) for t in row if t in tell) for row in rows]
    if not max(covered, default=1.0):  # none covers the question: each may hold the answer
        covered = [1.0] * len(rows)
    answer = {}
    for row, sentence, cover in zip(rows, parts, covered, strict=True):
        names = set(terms(" ".join(CAPITALISED.findall(sentence))))
        for t in row:
            if t not in asked and t not in title_terms:
                w = weight(t) * (1.5 if t in names else 1.0) * (cover / max(covered)) ** 3
                answer[t] = max(w, answer.get(t, 0.0))
    return key, topic, {t: w for t, w in answer.items() if w > 0}


def measure(question, reference, candidate):
    """(coverage, agreement) of a candidate, in [0, 1]; agreement is None without a reference."""
    key, topic, answer = read_question(question, reference)
    count = Counter(terms(candidate))
    frequent = sum(w * count[t] / (count[t] + 1.2) for t, w in key.items()) / (sum(key.values()) or 1.0)
    coverage = 0.4 * frequent + 0.6 * share(topic, count)
    if not answer:
        return coverage, None
    strongest = max((w for t, w in answer.items() if t in count), default=0.0) / max(answer.values())
    return coverage, 0.7 * share(answer, count) + 0.3 * strongest


def judge(question, reference, candidate):
    """Accuracy wants the reference's answer beside the question's terms, completeness the latter."""
    coverage, agreement = measure(question, reference, candidate)
    if agreement is None:
        evidence, limits = coverage, COVERAGE_ONLY_AT
    else:
        evidence, limits = 0.45 * coverage + 0.55 * agreement, ACCURACY_AT
    return {"accuracy": sum(evidence >= x for x in limits),
            "completeness": sum(coverage >= x for x in COMPLETENESS_AT)}


def shorten(sentence):
    """One sentence up to its last clause mark past 40% of it, else its first two thirds."""
    n, words = len(sentence), sentence.split(" ")
    cuts = [m.start() for m in CLAUSE_END.finditer(sentence) if 0.4 * n <= m.start() < n - 2]
    if cuts:
        return sentence[:cuts[-1]]
    return " ".join(words[:-(len(words) // 3)]) if len(words) > 2 else sentence[:max(1, n * 2 // 3)]


def with_topic(title, text):
    """Cut out of its passage, "It lies in ..." lacks its subject: put the title before it."""
    return text if not title or set(terms(title)) & set(terms(text)) else f"{title}: {text}"


def ranked_sentences(question, passage):
    """(title, sentences, their positions: those that cover the question best first)."""
    title, text = split_passage(passage)
    parts, asked = sentences(text), telling(question, title)
    cover = [share(asked, set(terms(part))) for part in parts]
    return title, parts, sorted(range(len(parts)), key=lambda i: (-cover[i], i))


def summarise(question, passage):
    title, parts, order = ranked_sentences(question, passage)
    if len(parts) < 2:
        return with_topic(title, shorten(parts[0])) if parts else title
    chosen = sorted(order[:2] if len(parts) > 4 else order[:1])
    return with_topic(title, " ".join(parts[i] for i in chosen))


def write_query(summary):
    """The most telling words, at most 7, in the summary's order, with a question mark."""
    words = PHRASE.findall(summary)
    words = [w for w in dict.fromkeys(words) if terms(w)]
    value = {w: sum(map(weight, terms(w))) * (1.5 if w[0].isupper() else 1.0) for w in words}
    keep = set(sorted(words, key=lambda w: (-value[w], words.index(w)))[:7])
    query = " ".join(w for w in words if w in keep) or shorten(summary)
    arabic, east_asian = re.search("[\u0600-\u06ff]", query), re.search("[\u3041-\u9fff]", query)
    mark = "؟" if arabic else "？" if east_asian else "?"
    return query if query + mark == summary.strip() else query + mark


def write_negative(question, passage):
    """The two sentences that cover the question least; of a single one, no more than was known."""
    title, parts, order = ranked_sentences(question, passage)
    if len(parts) > 1:
        return with_topic(title, " ".join(parts[i] for i in sorted(order[max(1, len(order) - 2):])))
    known = set(terms(question + "\n" + title))
    words = [w for part in parts for w in PHRASE.findall(part) if set(terms(w)) <= known]
    return " ".join(words) or title or question


def read_labels(message):
    """{label: value} of the lines `Label: "JSON string"`; a passage cannot leave its JSON string."""
    values = {}
    for label, number, raw in LABEL.findall(message):
        name = f"{label} {number}".strip()
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, str):
            raise RequestError(f'line "{name}:" needs a JSON string, got {raw[:60]!r}', "messages")
        if name in values:
            raise RequestError(f'line "{name}:" is there twice; give each value once', "messages")
        values[name] = value
    return values


def answer_task(message):
    """The answer to a user message: a dict (to be sent as JSON) for a judge's task, else plain text."""
    values = read_labels(message)
    question, reference = values.get("Question"), values.get("Reference passage")
    labels = set(values) - {"Reference passage"}
    listed = [name for name in values if re.fullmatch(r"Candidate passage \d+", name)]
    if labels == {"Question", "Candidate passage"}:
        return judge(question, reference, values["Candidate passage"])
    if listed and labels == {"Question", *listed}:
        return {"judgments": [{"id": int(name.split()[-1]), **judge(question, reference, values[name])}
                              for name in listed]}
    if set(values) == {"Question", "Passage"}:
        return summarise(question, values["Passage"])
    if set(values) == {"Question", "Passage that answers it"}:
        return write_negative(question, values["Passage that answers it"])
    if set(values) == {"Summary"}:
        return write_query(values["Summary"])
    raise RequestError("this stand-in is no language model and does not know this task (labels found: "
                       f"{', '.join(values) or 'none'}); see offline_llm.py --help, or use a real "
                       "server", "messages", code="unknown_task")


# ---- the protocol --------------------------------------------------------------------------------

def whole_number(body, name, default):
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not 1 <= value <= 1 << 30:
        raise RequestError(f"{name} is {value!r}; it must be a whole number from 1", name)
    return value


def message_text(message):
    """The text of one chat message, whose content is a string or a list of text parts."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str):
        raise RequestError("each message needs content: a string or a list of text parts", "messages")
    return content


def check_format(response_format, answer):
    """Refuses a response_format that the answer would break, rather than answer in another shape."""
    if response_format is None or response_format == {"type": "text"}:
        return
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    problem = None
    if kind not in ("json_schema", "json_object"):
        problem = f"type is {kind!r}, not text, json_object or json_schema"
    elif not isinstance(answer, dict):
        problem = f"this task is answered in plain text, not as {kind}; leave response_format out"
    elif kind == "json_schema":
        try:
            if not set(response_format["json_schema"]["schema"].get("required", ())) <= set(answer):
                problem = f"the schema requires more than this task's answer has: {', '.join(answer)}"
        except (KeyError, TypeError, AttributeError):
            problem = "json_schema.schema must be an object, its required a list of names"
    if problem:
        raise RequestError(problem, "response_format")


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
    texts = [message_text(m) for m in body["messages"]]
    asked = [text for text, m in zip(texts, body["messages"]) if m.get("role") == "user"]
    if not asked:
        raise RequestError("no message has the role user", "messages")
    answer = answer_task(asked[-1])
    check_format(body.get("response_format"), answer)
    data = (json.dumps(answer) if isinstance(answer, dict) else answer).encode("utf-8", "replace")
    content = data[:limit].decode("utf-8", "ignore")
    n_prompt = sum(4 + math.ceil(len(text.encode("utf-8", "replace")) / 4) for text in texts)
    n_completion = n_choices * math.ceil(min(len(data), limit) / 4)
    choice = {"message": {"role": "assistant", "content": content, "refusal": None}, "logprobs": None,
              "finish_reason": "stop" if len(data) <= limit else "length"}
    return {"id": f"chatcmpl-offline-{zlib.crc32(data):08x}", "object": "chat.completion", "created": 0,
            "model": body["model"], "system_fingerprint": FINGERPRINT,
            "choices": [{"index": i, **choice} for i in range(n_choices)],
            "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_completion,
                      "total_tokens": n_prompt + n_completion}}


def error_body(message, param=None, code=None, kind="invalid_request_error"):
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def respond(method, target, payload):
    """(status, JSON-ready answer, further header lines) to one whole request."""
    try:
        path = target.partition("?")[0]
        if path not in ROUTES:
            raise RequestError(f"no route {path}; there are {', '.join(ROUTES)}", status=404)
        if method != ROUTES[path]:
            raise RequestError(f"{path} wants {ROUTES[path]}, got {method}", status=405,
                               headers=f"Allow: {ROUTES[path]}\r\n")
        if path == "/health":
            return 200, {"status": "ok", "system_fingerprint": FINGERPRINT}, ""
        if path == "/v1/models":
            model = {"id": "offline-stand-in", "object": "model", "created": 0, "owned_by": FINGERPRINT}
            return 200, {"object": "list", "data": [model]}, ""
        try:
            body = json.loads(payload)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {error}") from None
        return 200, complete(body), ""
    except RequestError as error:
        return error.status, error_body(str(error), error.param, error.code), error.headers
    except Exception:  # a bug of ours: its traceback goes to stderr, and the client is told
        traceback.print_exc()
        return 500, error_body("a bug in offline_llm.py; see its stderr", kind="server_error"), ""


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive over one socket; needs Content-Length, as the openai client sends it."""

    def __init__(self):
        self.buffer, self.request = bytearray(), None
        self.close = self.close_after = False  # closed already; to be closed once this answer is out

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.buffer += data
        while not self.close and (self.request or self.read_head()):
            method, target, n_body = self.request
            if len(self.buffer) < n_body:
                return
            payload, self.request = bytes(self.buffer[:n_body]), None
            del self.buffer[:n_body]
            self.send(*respond(method, target, payload))

    def read_head(self):
        """Sets self.request = (method, target, bytes of body) once the head is whole."""
        end = self.buffer.find(b"\r\n\r\n")
        if max(end, 0) > MAX_HEAD or (end < 0 and len(self.buffer) > MAX_HEAD):
            return self.refuse(431, f"the request's head is over {MAX_HEAD} bytes")
        if end < 0:
            return False
        first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
        del self.buffer[:end + 4]
        pairs = [line.partition(":") for line in lines]
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        parts, length = first.split(" "), headers.get("content-length", "0")
        if len(parts) != 3 or parts[2][:7] != "HTTP/1." or not re.fullmatch("[0-9]{1,18}", length):
            return self.refuse(400, "not a readable HTTP/1.1 request")
        if "transfer-encoding" in headers:
            return self.refuse(411, "send Content-Length, not Transfer-Encoding")
        if int(length) > MAX_BODY:
            return self.refuse(413, f"the body has {length} bytes; at most {MAX_BODY} are read")
        connection = headers.get("connection", "").lower()
        old = parts[2] == "HTTP/1.0" and "keep-alive" not in connection
        self.close_after = old or "close" in connection or parts[0] == "HEAD"
        if headers.get("expect", "").lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.request = (parts[0], parts[1], int(length))
        return True

    def refuse(self, status, message):
        self.close_after = True
        self.send(status, error_body(message))
        return False

    def send(self, status, answer, headers=""):
        data = json.dumps(answer).encode()  # ASCII: a lone surrogate in a request does no harm
        head = (f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(data)}\r\n{headers}"
                f"Connection: {'close' if self.close_after else 'keep-alive'}\r\n\r\n").encode()
        self.transport.write(head + data)
        if self.close_after:
            self.close = True
            self.transport.close()


# ---- the command ---------------------------------------------------------------------------------

async def serve(port, command):
    """Serves until a signal comes, or as long as the command runs; returns the exit status."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    server = await loop.create_server(Connection, "127.0.0.1", port, backlog=1024)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    print(f"offline_llm.py: {FINGERPRINT}; serving {url}", file=sys.stderr, flush=True)
    if command is None:
        for number in signals:
            loop.add_signal_handler(number, stopped.set)
        print(url, flush=True)
        await stopped.wait()
        return 0
    no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    no_proxy = f"{no_proxy},127.0.0.1" if no_proxy else "127.0.0.1"  # a proxy cannot reach this machine
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

    for number in signals:
        loop.add_signal_handler(number, pass_on, number)
    status = await child.wait()
    return status if status >= 0 else 128 - status


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0,
                        help="port of 127.0.0.1, 0 to 65535; 0 (default) takes a free one")
    parser.add_argument("--exec", nargs=argparse.REMAINDER, metavar="COMMAND", dest="command",
                        help="run this command (all that follows is its own) with OPENAI_BASE_URL "
                             "pointing here, and OPENAI_API_KEY if it is unset; pass signals on; exit "
                             "with its status, 128 + the signal that ended it, 126 or 127 if it cannot "
                             "be run. Without --exec: serve until SIGTERM or SIGINT")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is not None and not args.command:
        parser.error("--exec needs a command")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port is {args.port}, must be 0 to 65535")
    try:
        return asyncio.run(serve(args.port, args.command))
    except OSError as error:
        parser.error(f"cannot serve on port {args.port}: {error.strerror}; try --port 0")


if __name__ == "__main__":
    sys.exit(main())
