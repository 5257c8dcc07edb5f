"""What the stand-in of offline_llm.py can do: judge, summarise, write queries and negatives.

No language model: it compares words and numbers, and picks and cuts sentences, in any language. A passage is
title, newline, text (or only text). Answers depend on the arguments alone. answer_task reads a message.
"""
import functools
import json
import re
from collections import Counter

# Tuned once for all languages: human judgments in 15 (mini-MIRACL, train), the sample in 5.
PREFIX = 5  # a word counts as its first letters: a crude stemmer, for Finnish or Telugu as for English
ACCURACY_AT = (0.56, 0.72)  # evidence in [0, 1] that earns accuracy 1 and 2
COVERAGE_ONLY_AT = (0.62, 0.80)  # the same without a reference, where coverage is all the evidence
COMPLETENESS_AT = (0.25, 0.60)  # coverage of the question in [0, 1] for completeness 1 and 2

FUNCTION_WORDS = frozenset("""
the of in and a to was as is by for on with that it from at an which this were be are also his he has what
when who where how did does do many much whose why de la en y el que los se del un por con una las es como
su para al fue no lo qué cuál quién cuándo dónde cuántos más le et les des est du une dans qui il sont sur
par pour quel quelle quels quelles quand où comment combien ja oli myös joka ovat tai sekä ei että hän
milloin kuka mikä mitä missä minkä kuinka dan yang di dari dengan pada adalah ini dalam untuk sebagai oleh
juga apakah apa siapa siapakah kapan berapa mana ya na wa kwa katika ni za kama cha kuwa je gani nani upi
ipi lini wapi ngapi der die das und ist von dem den ein eine zu im wer wann wo wie ní ti tí àti kí jẹ́ wọ́n
l d s в и на с по из не к для как от что за его был это были или до кто какой какая каком когда где сколько
является في من على إلى أن التي عن أو مع هو الذي ما هي هذه هذا كان كانت متى أين هل أي كم ماهو ماهي در به از
که می است این را های با آن شد شده یک ها برای بود چه چند چیست کدام کی کجا चे के में की है और का से को एक हैं
पर किया यह ने था थी क्या कौन किस कब कहाँ कितने कितनी कितना এবং ও হয় করে একটি এই থেকে এর কোন কত কী কে কবে
কোথায় ছিল ఈ ఉంది మరియు ఒక ఏది ఏ ఎవరు ఎంత ఎన్ని ఎప్పుడు ఎక్కడ యొక్క ఏమిటి 은 는 이 가 을 를 의 에 언제 누구 무엇 어디 몇
""".split())

MARKS = "\u0300-\u036f\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0970-\u09e3\u09f0-\u0dff"  # not in \w
THAI = "\u0e01-\u0e4e"
HANGUL = "\uac00-\ud7af"
KATAKANA = "\u30a1-\u30fa\u30fc-\u30ff"
HAN = "\u3400-\u9fff\u3005"
UNSPACED = f"{THAI}\u3041-\u30ff{HAN}"
# No spaces between words: runs end at common function words; hiragana, mostly grammar, is skipped.
THAI_GLUE = "ของ|คือ|เป็น|และ|ที่|ใน|จาก|โดย|ด้วย|ว่า|มี|ได้|หรือ|อะไร|ใคร|ใด|เท่าไร"
HAN_GLUE = "的是了在有和為为這这與与於于之其以而及等也被什么麼谁誰哪個个几幾多少吗嗎"
RUNS = (rf"\d(?:[\d.,٫٬]*\d)?|(?:{THAI_GLUE})|(?:(?!{THAI_GLUE})[{THAI}])+"
        rf"|[{KATAKANA}]+|(?:(?![{HAN_GLUE}])[{HAN}])+")
LETTERS = rf"(?:[^\W\d_{UNSPACED}%s]+[{MARKS}]*)+"
TOKEN = re.compile(rf"{LETTERS % HANGUL}|{RUNS}|[{HANGUL}]+")
PHRASE = re.compile(rf"{LETTERS % ''}|{RUNS}")  # as shown
KOREAN_ENDING = re.compile("(?<=.)(?:에서|에는|으로|이다|입니다|습니다|하는|[은는이가을를의에와과로다])$")
ARABIC_ARTICLE = re.compile("^(?:[وفبكل]?ال|لل)(?=..)")
CAPITALISED = re.compile(r"(?<=[\w,;:(\"] )\(?[A-ZÀ-ÞА-Я]\w+")  # a name, most likely
SENTENCE_END = re.compile(r"(?<=[。！？।॥۔؟])\s*(?=\S)"
                          rf"|(?<=[^\W\d_][^\W\d_{MARKS}][.!?])\s+(?=\S)"
                          rf"|(?<=[\d{MARKS})\]\"»”%°][.!?])\s+(?=\S)|(?<=[{UNSPACED}][!?])(?=\S)")
CLAUSE_END = re.compile(r"[,;،؛、，；:：—–]")


# ---- text

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
    if "\u0620" <= first <= "\u06ff":
        token = ARABIC_ARTICLE.sub("", token)
    return [token[:PREFIX]]


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
    if newline and len(title) <= 200:
        return title.strip(), text.strip()
    return "", passage.strip()


def share(weights, present):
    """Weighted share of the terms in `weights` that are in `present`, in [0, 1]; 0 for no terms."""
    return sum(w for t, w in weights.items() if t in present) / (sum(weights.values()) or 1.0)


def telling(question, title):
    """{term: weight} of a question, to compare sentences: the title's words may stand in any."""
    in_title = set(terms(title))
    return {t: weight(t) * (0.2 if t in in_title else 1.0) for t in terms(question)}


# ---- the four tasks

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
    title_terms = set(terms(title))
    in_reference = set(terms(reference))
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
    completeness = sum(coverage >= x for x in COMPLETENESS_AT)
    if agreement is None:
        return {"accuracy": sum(coverage >= x for x in COVERAGE_ONLY_AT), "completeness": completeness}
    evidence = 0.45 * coverage + 0.55 * agreement
    return {"accuracy": sum(evidence >= x for x in ACCURACY_AT), "completeness": completeness}


def shorten(sentence):
    """One sentence up to its last clause mark past 40% of it, else its first two thirds."""
    n = len(sentence)
    cuts = [m.start() for m in CLAUSE_END.finditer(sentence) if 0.4 * n <= m.start() < n - 2]
    if cuts:
        return sentence[:cuts[-1]]
    words = sentence.split(" ")
    return " ".join(words[:-(len(words) // 3)]) if len(words) > 2 else sentence[:max(1, n * 2 // 3)]


def with_topic(title, text):
    """Cut out of its passage, "It lies in ..." lacks its subject: put the title before it."""
    return text if not title or set(terms(title)) & set(terms(text)) else f"{title}: {text}"


def ranked_sentences(question, passage):
    """(title, sentences, their positions: those that cover the question best first)."""
    title, text = split_passage(passage)
    parts = sentences(text)
    asked = telling(question, title)
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
    keep = sorted(words, key=value.get, reverse=True)[:7]  # of equals the first
    query = " ".join(w for w in words if w in keep) or shorten(summary)
    mark = "?"
    if re.search("[\u0600-\u06ff]", query):
        mark = "؟"
    elif re.search("[\u3041-\u9fff]", query):
        mark = "？"
    return query if query + mark == summary.strip() else query + mark


def write_negative(question, passage):
    """The two sentences that cover the question least; of a single one, no more than was known."""
    title, parts, order = ranked_sentences(question, passage)
    if len(parts) > 1:
        return with_topic(title, " ".join(parts[i] for i in sorted(order[max(1, len(order) - 2):])))
    known = set(terms(question + "\n" + title))
    words = [w for part in parts for w in PHRASE.findall(part) if set(terms(w)) <= known]
    return " ".join(words) or title or question


# ---- which of them a message asks for

REFERENCE = "Reference passage"
LABEL = re.compile(r"^(Question|Reference passage|Candidate passage|Passage that answers it|Passage|Summary)"
                   r"(?: \([^)\n]*\))?:[ \t]*(.*)$", re.MULTILINE)


class Unanswerable(ValueError):
    """Why a message has no answer, and a code for programs or None."""


def read_labels(message):
    """{label: value} of the lines `Label: "JSON string"`; a passage cannot leave its JSON string."""
    values = {}
    for label, raw in LABEL.findall(message):
        try:
            values[label] = json.loads(raw)
        except (ValueError, RecursionError):
            values[label] = None
        if not isinstance(values[label], str):
            raise Unanswerable(f'line "{label}:" needs a JSON string, got {raw[:60]!r}', None)
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
            raise Unanswerable("this stand-in is no language model and does not know this task (labels: "
                               f"{', '.join(given) or 'none'}); see offline_llm.py --help, or use a real "
                               "server", "unknown_task")
