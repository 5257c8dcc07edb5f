"""Build the bundled sample: true facts told in 16 languages, with planted false negatives and the truth.

Source  facts.json (entities, their facts, topics), languages/<lang>.json (names, sentence patterns): our own
Writes  OUT/data/   corpus/<lang>.jsonl, train.jsonl, dev.jsonl, qrels/<split>/<lang>.tsv, as 00 gives them
        OUT/truth/  <split>/<lang>.tsv: every relevant passage of every query, for measuring only
Usage   python sample/make_sample.py       (writes sample/data and sample/truth again, to the same bytes)
        python sample/make_sample.py --scale 1000000 --lang sw --out data/big
                                           (invented entities, for measuring memory and speed)

Each entity has four passages on its four facts. The questions of a language ask for two of the facts of each
topic. Of half of the entities these are told twice, the second time in other words, but for most training
queries only one of the two passages is labelled: the other is a planted false negative. Of the other half
they are told once, in other words, so that there is something to learn. An entity's other passages, and the
same fact of its neighbours, are the hard negatives.
"""
import argparse
import json
import random
import re
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent

# entities, training and dev queries by language: uneven on purpose, as MIRACL is; sw cannot fill a batch
SIZES = {"en": (64, 60, 24), "es": (56, 48, 22), "ru": (52, 44, 22), "zh": (52, 44, 20), "fr": (50, 40, 20),
         "ja": (46, 36, 20), "ar": (46, 36, 20), "id": (44, 30, 20), "fa": (42, 28, 20), "ko": (42, 26, 20),
         "fi": (40, 24, 18), "hi": (40, 24, 18), "bn": (36, 16, 16), "te": (32, 12, 16), "th": (30, 10, 16),
         "sw": (24, 8, 16)}
TOLD_TWICE = 0.5   # share of entities whose facts are told twice
ONE_LABEL = 0.8    # share of the training queries about them with only one of the two passages labelled
HUMAN_JUDGED = 0.3  # share of training queries with a passage that people judged non-relevant


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(HERE), metavar="FOLDER", help="default: this script's folder")
    parser.add_argument("--seed", type=int, default=13, help="seed of every random draw (default: 13)")
    parser.add_argument("--scale", type=int, metavar="N",
                        help="instead: N passages about invented entities, in one language")
    parser.add_argument("--queries", type=int, default=1000, metavar="N",
                        help="training queries under --scale (default: 1000)")
    parser.add_argument("--lang", default="en", choices=sorted(SIZES),
                        help="language under --scale (default: en)")
    return parser


class Language:
    """Names and sentence patterns of one language; `{e:gen}` in a pattern asks for a form of a name."""

    def __init__(self, lang):
        spec = json.loads((HERE / "languages" / f"{lang}.json").read_text("utf-8"))
        self.names, self.patterns = spec["names"], spec["topics"]
        self.digits, self.space = spec.get("digits"), " " if spec.get("space", True) else ""

    def form(self, name, form=""):
        forms = self.names.get(name, name)  # symbols and invented names are no keys: they stay as they are
        if isinstance(forms, str):
            return forms
        return forms.get(form, forms[""])

    def number(self, value):
        text = f"−{-value}" if value < 0 else str(value)
        return text.translate(str.maketrans("0123456789", self.digits)) if self.digits else text

    def title(self, entity):
        title = self.form(entity, "title")
        return title[0].upper() + title[1:]

    def sentence(self, pattern, entity, value=None):
        def fill(slot):
            if slot[1] == "v" and isinstance(value, int):
                return self.number(value)
            return self.form(entity if slot[1] == "e" else value, slot[2] or "")
        text = re.sub(r"\{([ev])(?::(\w+))?\}", fill, pattern)
        return text[0].upper() + text[1:]


def tell(language, topic, entity, facts, article, asked, twice):
    """The four passages of an entity, [({docid, title, text}, {attributes})]; asked: the two to ask for."""
    a, c = asked
    b, d = sorted(set(facts) - set(asked))
    # a sentence is (attribute, wording): wording 0 is near the question's, wording 1 says it in other words
    plan = [[(b, 0), (d, 0)], [(a, 1)], [(c, 1)]]
    if twice:
        plan = [[(a, 0), (b, 0)], [(c, 0), (d, 0)], [(a, 1), (c, 1)]]
    patterns, passages = language.patterns[topic], []
    for n, sentences in enumerate([*plan, [(b, 1), (d, 1)]]):
        told = [language.sentence(patterns["about"][n], entity)] if n < 3 else []
        told += [language.sentence(patterns[x]["say"][wording], entity, facts[x]) for x, wording in sentences]
        text = language.space.join(told)
        passage = {"docid": f"{article}#{n}", "title": language.title(entity), "text": text}
        passages.append((passage, {x for x, _ in sentences}))
    return passages


def make_language(lang, facts, seed):
    """(corpus, {split: [(record, {docid: relevance} labelled, [docids relevant])]}) of one language."""
    n_entities, n_train, n_dev = SIZES[lang]
    draw, language = random.Random(f"{seed}:{lang}"), Language(lang)
    queues = {topic: draw.sample(sorted(entities), len(entities)) for topic, entities in facts.items()}
    chosen = []
    while len(chosen) < n_entities:  # one of each topic in turn
        chosen += [(topic, queue.pop()) for topic, queue in queues.items() if queue]
    to_ask = {}
    for topic, entities in facts.items():
        attributes = next(iter(entities.values()))
        to_ask[topic] = draw.sample(sorted(attributes), 2)
    corpus, questions = [], []
    for article, (topic, entity) in enumerate(chosen[:n_entities], 1):
        twice = draw.random() < TOLD_TWICE
        passages = tell(language, topic, entity, facts[topic][entity], article, to_ask[topic], twice)
        corpus += [p for p, _ in passages]
        for attribute in to_ask[topic]:
            ask = draw.choice(language.patterns[topic][attribute]["ask"])
            relevant = [p for p, told in passages if attribute in told]
            others = [p for p, told in passages if attribute not in told]
            questions.append((language.sentence(ask, entity), relevant, others))
    draw.shuffle(questions)
    splits = {"train": questions[:n_train], "dev": questions[n_train:n_train + n_dev]}
    made = {}
    for split, asked in splits.items():
        made[split] = []
        for number, (query, relevant, others) in enumerate(asked, 1 if split == "train" else 1001):
            labelled, judged = relevant, []
            if split == "train" and len(relevant) > 1 and draw.random() < ONE_LABEL:
                labelled = [draw.choice(relevant)]
            if split == "dev" or draw.random() < HUMAN_JUDGED:
                judged = [draw.choice(others)]
            record = {"query_id": str(number), "lang": lang, "query": query, "positive_passages": labelled,
                      "negative_passages": [p | {"source": "human"} for p in judged]}
            qrels = {p["docid"]: 1 for p in labelled} | {p["docid"]: 0 for p in judged}
            made[split].append((record, qrels, [p["docid"] for p in relevant]))
    return corpus, made


def dump(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


def to_json(record):
    return json.dumps(record, ensure_ascii=False)


def make_sample(out, seed):
    facts = json.loads((HERE / "facts.json").read_text("utf-8"))
    for folder in ("data", "truth"):
        shutil.rmtree(out / folder, ignore_errors=True)
    records = {"train": [], "dev": []}
    for lang in sorted(SIZES):
        corpus, made = make_language(lang, facts, seed)
        dump(out / "data" / "corpus" / f"{lang}.jsonl", map(to_json, corpus))
        for split, rows in made.items():
            records[split] += [to_json(record) for record, _, _ in rows]
            dump(out / "data" / "qrels" / split / f"{lang}.tsv",
                 (f"{r['query_id']}\t0\t{d}\t{v}" for r, qrels, _ in rows for d, v in qrels.items()))
            dump(out / "truth" / split / f"{lang}.tsv",
                 (f"{r['query_id']}\t0\t{d}\t1" for r, _, relevant in rows for d in relevant))
    for split, lines in records.items():
        dump(out / "data" / f"{split}.jsonl", lines)


def invent(draw):
    syllables = ["ba", "do", "ka", "li", "mo", "na", "pe", "ri", "su", "ta", "ve", "zu"]
    return "".join(draw.choices(syllables, k=4)).capitalize()


def make_scaled(out, seed, n_passages, n_queries, lang):
    """n_passages about invented entities, written as they are made, with n_queries about them."""
    facts, language = json.loads((HERE / "facts.json").read_text("utf-8")), Language(lang)
    topics = sorted(facts)
    kinds = {t: {a: [f[a] for f in facts[t].values()] for a in next(iter(facts[t].values()))} for t in topics}
    every = max(1, n_passages // 4 // max(1, n_queries))  # an entity with a query each so many
    queries, written = [], 0

    def passages():
        nonlocal written
        article = 0
        while written < n_passages:
            article += 1
            draw = random.Random(f"{seed}:{lang}:{article}")
            topic = draw.choice(topics)
            entity = f"{invent(draw)} {article}"
            values = {a: draw.randrange(1, 5000) if isinstance(known[0], int) else draw.choice(known)
                      for a, known in kinds[topic].items()}
            asked = draw.sample(sorted(values), 2)
            told = tell(language, topic, entity, values, article, asked, twice=True)
            if article % every == 0 and len(queries) < n_queries:
                attribute = asked[0]
                ask = language.sentence(draw.choice(language.patterns[topic][attribute]["ask"]), entity)
                queries.append(to_json({"query_id": str(article), "lang": lang, "query": ask,
                                        "positive_passages": [told[0][0]], "negative_passages": []}))
            for passage, _ in told[:n_passages - written]:
                written += 1
                yield to_json(passage)

    dump(out / "corpus" / f"{lang}.jsonl", passages())
    dump(out / "train.jsonl", queries)


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.scale:
        make_scaled(Path(args.out), args.seed, args.scale, args.queries, args.lang)
    else:
        make_sample(Path(args.out), args.seed)


if __name__ == "__main__":
    main()
