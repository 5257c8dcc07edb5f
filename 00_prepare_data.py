"""Bring any collection into the layout that the stages read: corpora, training and dev queries, judgments.

Source  the data of Sec. 4.1 (MIRACL), or a collection of your own in one of four known layouts
        deviates from the house rule "NFC once, in stage 00": texts and ids stay byte for byte as they are
Reads   sample    sample/data beside this script, which is laid out like OUT
        miracl    the hub's miracl/miracl and miracl/miracl-corpus (gated: accept the terms, set HF_TOKEN), or a copy:
                  ROOT/miracl-corpus/miracl-corpus-v1.0-LANG/docs-*.jsonl.gz, ROOT/miracl/miracl-v1.0-LANG/{topics,qrels}/
        beir      ROOT/corpus.jsonl, queries.jsonl, qrels/train.tsv, qrels/dev.tsv (else test.tsv); needs --lang CODE
        squad     ROOT/*.LANG.json: its paragraphs are the corpus, a tenth of its articles is dev
        tevatron  ROOT/train.jsonl, dev.jsonl (else a tenth of the queries), corpus.jsonl (else all passages in the
                  records), or ROOT itself a JSONL file; needs --lang CODE where the records have no `lang`
        Any of these files may be gzipped (.gz).
Writes  OUT/corpus/LANG.jsonl        {docid, title, text}
        OUT/train.jsonl, dev.jsonl   {query_id, lang, query, positive_passages, negative_passages}, in source order
        OUT/qrels/SPLIT/LANG.tsv     query_id 0 docid relevance: all judgments of the queries in that split
        OUT.meta.json                arguments, input digests, counts
        Left out, counted and shown: empty passages, judgments of passages that are not in the corpus, queries without
        a positive in it, unanswerable questions. Anything else that is wrong stops the stage and leaves OUT as it was.
Usage   python 00_prepare_data.py --source miracl --root ../shared/data/minimiracl --lang sw te --out data/minimiracl
Cost    mini-MIRACL (62,608 passages, 2,796 queries, 17 languages): 2 s, 43 MB; a million passages: 40 s, 55 MB; one core
"""
import json
import os
import random
import re
import shutil
from array import array
from collections import Counter, defaultdict
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from common import (DataError, Output, Parser, check_passage, check_text, corpus_files, corpus_languages,
                    digest_file, dump, parse_line, progress, read_lines, read_queries, run, say)

SAMPLE = Path(__file__).resolve().parent / "sample" / "data"
SPLITS = ("train", "dev")
PARTS = ("corpus", "qrels", "train.jsonl", "dev.jsonl")  # what OUT consists of; other files in it are left alone
DEV_SHARE = 10  # of ten articles (squad) or queries (tevatron) one is held out, where a source has no dev split


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--source", required=True, choices=list(SOURCES), help="layout of the data, see above")
    parser.add_argument("--root", metavar="FOLDER", help="where the data is; default: sample/data beside this script "
                        "for sample, hub (downloads) for miracl, none for the others")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the collection, such as data/NAME")
    next(a for a in parser._actions if a.dest == "limit").help = (
        "keep only the first N training queries of each language; corpora and dev stay whole")
    return parser


# --------------------------------------------------------------------------- writing

class Collection:
    """The folder that is being written, and the counts for the closing table."""

    def __init__(self, folder, limit, files):
        self.folder, self.limit, self.files = folder, limit, files  # files: ExitStack that closes what is opened
        self.counts, self.dropped, self.open = defaultdict(Counter), defaultdict(Counter), {}

    def write(self, name, line):
        if name not in self.open:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.open[name] = self.files.enter_context(open(self.folder / name, "w", encoding="utf-8", newline="\n"))
        self.open[name].write(line)

    def add_passage(self, lang, passage):
        self.counts[lang]["passages"] += 1
        self.write(f"corpus/{lang}.jsonl", dump(plain(passage)))

    def add_corpus(self, lang, read, wanted=()):
        """Write the corpus that read() yields as (where, passage); returns {docid: passage} of the wanted docids.

        Memory holds the wanted passages and 8 bytes for each other one (English MIRACL has 33M).
        """
        kept, hashes = {}, array("q")
        for where, passage in progress(read(), desc=f"{lang}: passages", unit=""):
            if isinstance(passage.get("text"), str) and not passage["text"].strip():
                self.dropped[lang]["empty passages"] += 1
                continue
            check_passage(passage, where)
            docid = check_id(passage["docid"], where)
            self.add_passage(lang, passage)
            hashes.append(hash(docid))
            if docid in wanted:
                kept[docid] = plain(passage)
        if not hashes:
            raise DataError(f"the corpus of {lang} has no passage with text; check --root and --lang")
        hashes = np.sort(np.frombuffer(hashes, np.int64))
        repeated, first = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist()), {}
        for where, passage in read() if repeated else ():  # again, only to name the lines
            docid = passage.get("docid")
            if hash(docid) in repeated and passage["text"].strip() and first.setdefault(docid, where) != where:
                raise DataError(f"{where}: docid {docid!r} is there twice, first at {first[docid]}; drop one")
        return kept

    def is_full(self, split, lang):
        return split == "train" and self.counts[lang]["train"] == self.limit

    def add_query(self, split, record, judgments):
        """Write a record and, to the qrels, its judgments {docid: relevance}; count it where it has no positive."""
        lang, query_id = record["lang"], record["query_id"]
        if not record["positive_passages"]:
            self.dropped[lang]["queries without a positive"] += 1
            return
        self.counts[lang][split] += 1
        self.counts[lang]["positives"] += len(record["positive_passages"])
        self.write(f"{split}.jsonl", dump(record))
        for docid, relevance in judgments.items():
            self.write(f"qrels/{split}/{lang}.tsv", f"{query_id}\t0\t{docid}\t{relevance}\n")

    def add_judged(self, lang, read, splits):
        """Write a language's corpus and {split: ({query_id: query}, {query_id: {docid: relevance}})}."""
        wanted = {docid for _, qrels in splits.values() for judgments in qrels.values() for docid in judgments}
        kept = self.add_corpus(lang, read, wanted)
        for split, (queries, qrels) in splits.items():
            for query_id, query in queries.items():
                if self.is_full(split, lang):
                    break
                judged = qrels.get(query_id, {})
                judgments = {docid: relevance for docid, relevance in judged.items() if docid in kept}
                self.dropped[lang]["judgments of passages not in the corpus"] += len(judged) - len(judgments)
                self.add_query(split, {
                    "query_id": query_id, "lang": lang, "query": query,
                    "positive_passages": [kept[d] for d, relevance in judgments.items() if relevance > 0],
                    "negative_passages": [kept[d] | {"source": "human"} for d, relevance in judgments.items()
                                          if relevance <= 0]}, judgments)

    def table(self):
        self.counts["all"], self.dropped["all"] = (sum(c.values(), Counter()) for c in (self.counts, self.dropped))
        rows = [("language", "passages", "train", "dev", "positives/query", "dropped")]
        for lang, n in self.counts.items():
            n_queries = n["train"] + n["dev"]
            rows.append((lang, n["passages"], n["train"], n["dev"], f"{n['positives'] / max(1, n_queries):.2f}",
                         ", ".join(f"{count} {reason}" for reason, count in self.dropped[lang].items() if count) or "-"))
        return "\n".join("{:9}{:>10}{:>8}{:>7}{:>17}  {}".format(*row) for row in rows)


def plain(passage):
    return {"docid": passage["docid"], "title": passage.get("title", ""), "text": passage["text"]}


# --------------------------------------------------------------------------- reading

def check_id(value, where):
    if len(value.split()) != 1:
        raise DataError(f"{where}: id {value!r} has white space in it, which TREC files cannot hold; rename it")
    return value


def add_once(queries, query_id, query, where):
    if check_id(query_id, where) in queries:
        raise DataError(f"{where}: query {query_id!r} is there twice; drop one")
    queries[query_id] = query


def read_objects(*paths):
    """Yield (where, object) of the lines of JSONL files."""
    for path in paths:
        for number, line in read_lines(path):
            yield f"{path}:{number}", parse_line(path, number, line)


def read_cells(path, n_cells):
    """Yield (where, cells) of tab-separated lines, checked to have n_cells; the last may have tabs in it."""
    for number, line in read_lines(path):
        try:
            cells = line.decode().removesuffix("\n").removesuffix("\r").split("\t", n_cells - 1)
        except UnicodeError as error:
            raise DataError(f"{path}:{number}: not valid UTF-8 ({error}); convert the file to UTF-8") from None
        if len(cells) != n_cells or not all(cell.strip() for cell in cells):
            raise DataError(f"{path}:{number}: got {sum(bool(c.strip()) for c in cells)} columns, want {n_cells} separated "
                            "by tabs; mend the line")
        yield f"{path}:{number}", cells


def read_topics(path):
    queries = {}
    for where, (query_id, query) in read_cells(path, 2):
        add_once(queries, query_id, query, where)
    return queries


def read_qrels(path, n_columns, queries=None):
    """{query_id: {docid: relevance}} of TREC's four columns or BEIR's three; queries: those that may be judged."""
    qrels = {}
    for where, (query_id, *_, docid, relevance) in read_cells(path, n_columns):
        if query_id == "query-id":  # BEIR's header
            continue
        if not re.fullmatch("-?[0-9]+", relevance):
            raise DataError(f"{where}: relevance is {relevance!r}, want {n_columns} columns with a whole number in the last; "
                            "mend the line")
        if queries is not None and query_id not in queries:
            raise DataError(f"{where}: query {query_id!r} is not among the queries; take files that belong together")
        if docid in qrels.setdefault(query_id, {}):
            raise DataError(f"{where}: query {query_id!r} judges docid {docid!r} twice; drop one")
        qrels[query_id][docid] = int(relevance)
    return qrels


def root_folder(args):
    if not args.root or not Path(args.root).exists():
        raise DataError(f"--root {args.root or 'FOLDER'}: not found; --source {args.source} --help tells its layout")
    return Path(args.root)


def first_file(*paths, need=True):
    """The first of these files that is there, plain or gzipped."""
    found = next((p for path in paths for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)
    if need and not found:
        raise DataError(f"{paths[0]} not found; --help tells the layout of every source")
    return found


def choose_languages(args, available):
    missing = [lang for lang in args.lang or ["files laid out as --help tells"] if lang not in available]
    if missing and (args.lang or not available):
        raise DataError(f"{args.root}: no {' '.join(missing)} there, but {' '.join(sorted(available)) or 'nothing'}; "
                        "check --root and --lang")
    return sorted(set(args.lang or available))


def held_out(keys, seed, lang):
    """A tenth of the keys, at least one of two; file order does not matter."""
    keys = sorted(set(keys), key=lambda key: (random.Random(f"{seed}:{lang}:{key}").random(), key))
    return set(keys[:max(1, round(len(keys) / DEV_SHARE))]) if len(keys) > 1 else set()


# --------------------------------------------------------------------------- sources: (input files, what converts them)

def sample(args):
    args.root = args.root or str(SAMPLE)
    root = root_folder(args)
    langs = choose_languages(args, corpus_languages(root))
    files = {split: path for split in SPLITS if (path := root / f"{split}.jsonl").is_file()}
    qrels = {(split, lang): path for split in files for lang in langs
             if (path := root / "qrels" / split / f"{lang}.tsv").is_file()}

    def convert(collection):
        for lang in langs:
            collection.add_corpus(lang, partial(read_objects, *corpus_files(root, lang)))
        for split, path in files.items():
            judged = {lang: read_qrels(qrels[split, lang], 4) for lang in langs if (split, lang) in qrels}
            for record in read_queries(path):
                lang, query_id = record["lang"], record["query_id"]
                if lang not in langs or collection.is_full(split, lang):
                    continue
                if query_id not in judged.get(lang, {}):
                    raise DataError(f"{root}/qrels/{split}/{lang}.tsv: nothing on query {query_id!r}; make the sample again")
                collection.add_query(split, record, judged[lang][query_id])
    return [p for lang in langs for p in corpus_files(root, lang)] + [*files.values(), *qrels.values()], convert


def hub_files():
    """(names of the files in the two hub repositories, as in a local copy; what downloads one and returns its path)."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # else a line for every retry

    def ask(call, repo, *rest):
        try:
            return call(f"miracl/{repo}", *rest, repo_type="dataset")
        except (HTTPError, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", "no answer")
            remedy = (f"accept the terms at https://huggingface.co/datasets/miracl/{repo} and set HF_TOKEN to a token of that "
                      "account" if status in (401, 403) else "check the network and HF_HUB_OFFLINE, or point --root at a "
                      "folder laid out like the two repositories")
            raise DataError(f"miracl/{repo}: the hub does not give it ({type(error).__name__}, {status}); {remedy}") from None

    names = {f"{repo}/{name}" for repo in ("miracl", "miracl-corpus") for name in ask(HfApi().list_repo_files, repo)}
    return names, lambda name: Path(ask(hf_hub_download, *name.split("/", 1)))


def local_files(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}, root.joinpath


def miracl(args):
    args.root = args.root or "hub"
    names, fetch = hub_files() if args.root == "hub" else local_files(root_folder(args))
    corpora = defaultdict(dict)  # {lang: {shard number: name}}
    for name in names:
        if found := re.fullmatch(r"miracl-corpus/miracl-corpus-v1\.0-([\w-]+)/docs-(\d+)\.jsonl(\.gz)?", name):
            corpora[found[1]][int(found[2])] = name
    plan = []  # (lang, corpus files, {split: [topics file, qrels file]})
    for lang in choose_languages(args, corpora):
        shards, pairs = corpora[lang], {}
        missing = [f"docs-{number} of {lang}" for number in range(max(shards)) if number not in shards]
        for split in SPLITS:  # German and Yoruba have no train
            pair = [f"miracl/miracl-v1.0-{lang}/{kind}/{kind}.miracl-v1.0-{lang}-{split}.tsv" for kind in ("topics", "qrels")]
            found = [next((n for n in (name, name + ".gz") if n in names), None) for name in pair]
            if any(found):
                pairs[split] = found
                missing += [name for name, there in zip(pair, found) if not there]
        if missing or not pairs:
            raise DataError(f"{args.root}: {missing[0] if missing else f'miracl/miracl-v1.0-{lang}/topics'} is missing; "
                            f"fetch it, or leave {lang} out with --lang")
        pairs = {split: [fetch(name) for name in pair] for split, pair in pairs.items()}  # gated, so before the big ones
        plan.append((lang, [fetch(name) for _, name in sorted(shards.items())], pairs))

    def convert(collection):
        for lang, shards, pairs in plan:
            splits = {}
            for split, (topics, qrels) in pairs.items():
                queries = read_topics(topics)
                splits[split] = queries, read_qrels(qrels, 4, queries)
            collection.add_judged(lang, partial(read_objects, *shards), splits)
    return [path for _, shards, pairs in plan for path in [*shards, *sum(pairs.values(), [])]], convert


def beir(args):
    root = root_folder(args)
    if len(args.lang or ()) != 1:
        raise DataError("--source beir needs --lang CODE, the one language of the collection (ISO 639-1)")
    corpus, queries = first_file(root / "corpus.jsonl"), first_file(root / "queries.jsonl")
    train, dev, test = (first_file(root / "qrels" / f"{name}.tsv", need=False) for name in ("train", "dev", "test"))
    qrels = {split: path for split, path in (("train", train), ("dev", dev or test)) if path}
    if not qrels:
        raise DataError(f"{root}/qrels: no train.tsv, dev.tsv or test.tsv; --help tells the layout of every source")
    if not train:
        say(f"{root}: no qrels/train.tsv, so no training queries")
    if not dev:
        say(f"{root}: no qrels/dev.tsv, so " + ("dev is qrels/test.tsv" if test else "no dev queries"))

    def read():
        for where, record in read_objects(corpus):
            check_text(record, "_id", where)
            yield where, {"docid": record.pop("_id"), **record}

    def convert(collection):
        texts, splits = {}, {}
        for where, record in read_objects(queries):
            check_text(record, "_id", where)
            check_text(record, "text", where)
            add_once(texts, record["_id"], record["text"], where)
        for split, path in qrels.items():
            judged = read_qrels(path, 3, texts)
            splits[split] = {query_id: text for query_id, text in texts.items() if query_id in judged}, judged
        collection.add_judged(args.lang[0], read, splits)
    return [corpus, queries, *qrels.values()], convert


def read_squad(paths):
    """Yield (where, article, docid, title, context, qas) of every paragraph; article is what a split never cuts."""
    def field(record, key, kind, default=None):
        value = record.get(key, default) if isinstance(record, dict) else None
        if not isinstance(value, kind):
            raise DataError(f"{where}: {key!r} is missing or no {kind.__name__}; want SQuAD's data[].paragraphs[].qas[]")
        return value

    n_articles = 0
    for path in paths:
        where = path
        whole = parse_line(path, 1, b"".join(line for _, line in read_lines(path)))
        for article in field(whole, "data", list):
            where = f"{path}: data[{n_articles}]"
            title = field(article, "title", str, "")
            for number, paragraph in enumerate(field(article, "paragraphs", list)):
                docid = f"{n_articles}#{number}"
                where = f"{path}: paragraph {docid}"
                qas = field(paragraph, "qas", list)
                for qa in qas:
                    field(qa, "is_impossible", bool, False)
                    check_text(qa, "id", where)
                    check_text(qa, "question", where)
                yield where, title or f"#{n_articles}", docid, title, field(paragraph, "context", str), qas
            n_articles += 1


def squad(args):
    root, files = root_folder(args), defaultdict(list)
    for path in sorted(root.glob("*.json*")):
        if found := re.fullmatch(r".+\.([a-z]{2,3}(-\w+)?)\.json(\.gz)?", path.name):
            files[found[1]].append(path)
    langs = choose_languages(args, files)

    def convert(collection):
        for lang in langs:
            passages, questions, article_of = {}, {}, {}  # by context; by query_id: (question, docid); by docid
            for where, article, docid, title, context, qas in read_squad(files[lang]):
                # a paragraph that two articles share belongs to the first: no passage is in both train and dev
                docid = passages.setdefault(context, {"docid": docid, "title": title, "text": context})["docid"]
                article_of.setdefault(docid, article)
                for qa in qas:
                    if qa.get("is_impossible"):
                        collection.dropped[lang]["unanswerable questions"] += 1
                    else:
                        add_once(questions, qa["id"], (qa["question"], docid), where)
            articles = {article_of[docid] for _, docid in questions.values()}
            dev = held_out(articles, args.seed, lang)
            say(f"{lang}: {len(dev)} of {len(articles)} articles held out as dev")
            splits = {split: ({}, {}) for split in SPLITS}
            for query_id, (question, docid) in questions.items():
                queries, qrels = splits["dev" if article_of[docid] in dev else "train"]
                queries[query_id], qrels[query_id] = question, {docid: 1}
            collection.add_judged(lang, partial(zip, article_of, list(passages.values())), splits)
    return [path for lang in langs for path in files[lang]], convert


def tevatron(args):
    root = root_folder(args)
    train = root if root.is_file() else first_file(root / "train.jsonl")
    dev, corpus = (None if root.is_file() else first_file(root / f"{name}.jsonl", need=False) for name in ("dev", "corpus"))
    files = [path for path in (train, dev, corpus) if path]

    def records():  # read twice: they may be larger than memory
        for path in filter(None, (train, dev)):
            for record in read_queries(path, args.lang):
                yield path, record, record["lang"], record["positive_passages"], record.get("negative_passages", [])

    def convert(collection):
        train_ids, known, texts = defaultdict(list), defaultdict(set), {}
        for path, record, lang, positives, negatives in records():
            query_id = check_id(record["query_id"], path)
            if not re.fullmatch(r"[\w-]+", lang):
                raise DataError(f"{path}: query {query_id!r}: lang {lang!r} cannot name a file; use an ISO 639-1 code")
            if both := {p["docid"] for p in positives} & {p["docid"] for p in negatives}:
                raise DataError(f"{path}: query {query_id!r}: docid {min(both)!r} is both positive and negative; drop one")
            if path == train:
                train_ids[lang].append(query_id)
            known[lang].update(p["docid"] for p in positives)
            for passage in [] if corpus else positives + negatives:
                key, text = (lang, check_id(passage["docid"], path)), hash((passage.get("title", ""), passage["text"]))
                if key not in texts:
                    collection.add_passage(lang, passage)
                if texts.setdefault(key, text) != text:
                    raise DataError(f"{path}: query {query_id!r}: docid {key[1]!r} has had another text; rename one")
        if corpus and len(known) > 1:
            raise DataError(f"{corpus}: the queries are in {' '.join(known)}, one corpus has one language; choose with --lang")
        if corpus:
            known = {lang: collection.add_corpus(lang, partial(read_objects, corpus), docids) for lang, docids in known.items()}
        held = {} if dev else {lang: held_out(ids, args.seed, lang) for lang, ids in train_ids.items()}
        for lang, ids in held.items():
            say(f"{lang}: no dev.jsonl, so {len(ids)} of {len(train_ids[lang])} queries are held out as dev")
        for path, record, lang, positives, negatives in records():
            split = "dev" if path == dev or record["query_id"] in held.get(lang, ()) else "train"
            if collection.is_full(split, lang):
                continue
            found = [plain(p) | p for p in positives if p["docid"] in known[lang]]
            collection.dropped[lang]["positives not in the corpus"] += len(positives) - len(found)
            first = {"query_id": record["query_id"], "lang": lang, "query": record["query"], "positive_passages": found,
                     "negative_passages": [plain(p) | p for p in negatives]}
            collection.add_query(split, first | {key: value for key, value in record.items() if key not in first}, {
                **{p["docid"]: 1 for p in found}, **{p["docid"]: 0 for p in negatives if p.get("source") == "human"}})
    return files, convert


SOURCES = {"sample": sample, "miracl": miracl, "beir": beir, "squad": squad, "tevatron": tevatron}


# --------------------------------------------------------------------------- the folder as a whole

def damaged(output):
    """A file of a finished collection that is not as it was written (or was not moved in before a kill), or None."""
    files = json.loads(output.meta_path.read_text("utf-8"))["files"] if output.meta_path.exists() else {}
    return next((path for name, digest in files.items()
                 if not (path := output.path / name).is_file() or digest_file(path) != digest), None)


def publish(folder, out):
    out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if (out / part).is_dir():
            shutil.rmtree(out / part)
        (out / part).unlink(missing_ok=True)
        if (folder / part).exists():
            shutil.move(folder / part, out / part)


def main(argv=None):
    args = build_parser().parse_args(argv)
    out = Path(args.out)
    out = out.resolve() if out.is_symlink() or out.name in ("", "..") else out
    inputs, convert = SOURCES[args.source](args)
    if out.is_file() or any(out.resolve() in path.resolve().parents for path in map(Path, inputs)):
        raise DataError(f"{out} is {'a file' if out.is_file() else 'where the input lies'}; choose another --out")
    output = Output(args, inputs, out=out)
    output.meta["arguments"]["files"] = [Path(path).name for path in inputs]  # their names tell the language
    if path := not args.overwrite and damaged(output):
        say(f"{path} is missing or was changed: making {out} again")
    elif output.is_done():
        for part in PARTS[2:]:
            if (out / part).exists():
                os.utime(out / part)  # newer than its inputs, for make
        return
    folder = out.with_name(f".{out.name}.tmp")  # always the same: what a killed run left is cleared away
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with ExitStack() as files:
            collection = Collection(folder, args.limit, files)
            convert(collection)
        total = sum(collection.counts.values(), Counter())
        if not total["train"] + total["dev"]:
            raise DataError(f"{args.root}: no query has a positive in the corpus; take files that belong together")
        output.meta["files"] = {path.relative_to(folder).as_posix(): digest_file(path)
                                for path in sorted(folder.rglob("*")) if path.is_file()}
        output.finish(passages=total["passages"], train_queries=total["train"], dev_queries=total["dev"], languages={
            lang: {**n, "dropped": +collection.dropped[lang]} for lang, n in collection.counts.items()})
        publish(folder, out)  # after the meta file, whose digests tell if a kill came in between
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not total["train"]:
        say(f"{out}: no training queries, so no train.jsonl")
    say(collection.table())


if __name__ == "__main__":
    run(main)
