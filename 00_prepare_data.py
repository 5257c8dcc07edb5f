"""Bring any collection into the layout that the stages read: corpora, training and dev queries, judgments.

Source  the data of Sec. 4.1 (MIRACL), or a collection of your own in one of four known layouts
        deviates from the house rule "NFC once, in stage 00": texts and ids stay byte for byte as they are
Reads   sample    sample/data beside this script, which is laid out like OUT
        miracl    the hub's miracl/miracl and miracl/miracl-corpus (gated: accept the terms, set HF_TOKEN), or
                  copies: ROOT/miracl-corpus/miracl-corpus-v1.0-LANG/, ROOT/miracl/miracl-v1.0-LANG/
        beir      ROOT/corpus.jsonl, queries.jsonl, qrels/train.tsv, dev.tsv (else test.tsv); --lang CODE
        squad     ROOT/*.LANG.json: its paragraphs are the corpus, a tenth of its articles is dev
        tevatron  ROOT/train.jsonl, dev.jsonl (else a tenth of the queries), corpus.jsonl (else the passages
                  of the records), or ROOT itself a JSONL file; --lang CODE where the records have no `lang`.
                  FlagEmbedding's records (query, pos, neg) as well: a docid is then a digest of the text
        Any of these files may be gzipped (.gz).
Writes  OUT/corpus/LANG.jsonl        {docid, title, text}
        OUT/train.jsonl, dev.jsonl   {query_id, lang, query, positive_passages, negative_passages}
        OUT/qrels/SPLIT/LANG.tsv     query_id 0 docid relevance: all judgments of the queries in that split
        OUT.meta.json                arguments, input digests, counts
        All in source order. Left out, counted and shown: empty passages, judgments of passages not in the
        corpus, queries without a positive in it, unanswerable questions. --limit N keeps the first N training
        queries of a language, and all else. Any other fault stops the stage and leaves OUT as it was.
Usage   python 00_prepare_data.py --source miracl --root ../shared/data/minimiracl --lang sw --out data/mini
Cost    mini-MIRACL (62,608 passages, 2,796 queries): 2 s, 43 MB; a million passages: 40 s, 55 MB
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
from hashlib import blake2b
from pathlib import Path

import numpy as np

from common import (DataError, Output, Parser, atomic_folder, check_passage, check_text, corpus_files,
                    corpus_languages, digest_file, dump, parse_line, parse_query, positive_int, progress,
                    read_lines, run, say)

SAMPLE = Path(__file__).resolve().parent / "sample" / "data"
SPLITS = ("train", "dev")
PARTS = ("corpus", "qrels", "train.jsonl", "dev.jsonl")  # of OUT; other files in it are left alone


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--source", required=True, choices=list(SOURCES), help="layout of the data")
    parser.add_argument("--root", metavar="FOLDER", help="where it is; default: sample/data beside this "
                        "script for sample, hub (downloads) for miracl, none for the others")
    parser.add_argument("--min-relevance", type=positive_int, default=1, metavar="GRADE",
                        help="what is judged so or higher is a positive, others negatives; qrels keep all")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the collection, such as data/NAME")
    return parser


# --------------------------------------------------------------------------- reading

def check_id(value, where):
    if len(value.split()) != 1:
        raise DataError(f"{where}: id {value!r} has white space in it, TREC files cannot have it; rename it")
    return value


def add_once(queries, query_id, query, where):
    if check_id(query_id, where) in queries:
        raise DataError(f"{where}: query {query_id!r} is there twice; drop one")
    queries[query_id] = query


def is_new(texts, lang, passage, where):
    """Whether the docid is not in texts, {(lang, docid): (text, where)}; DataError if it had another text."""
    key = hash((lang, check_id(passage["docid"], where)))
    text = hash((passage.get("title", ""), passage["text"]))
    first_text, first = texts.setdefault(key, (text, where))
    if first_text != text:
        raise DataError(f"{where}: docid {passage['docid']!r} has had another text, at {first}; rename one")
    return first == where


def read_corpora(corpora):
    """Yield (where, lang, passage) of {lang: [JSONL files]}."""
    for lang, paths in corpora.items():
        for path in paths:
            for number, line in read_lines(path):
                yield f"{path}:{number}", lang, parse_line(path, number, line)


def read_cells(path, n_cells):
    """Yield (where, cells) of tab-separated lines, checked to have n_cells; the last may have tabs in it."""
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        try:
            cells = line.decode().rstrip("\r\n").split("\t", n_cells - 1)
        except UnicodeError as error:
            raise DataError(f"{where}: not valid UTF-8 ({error}); convert the file to UTF-8") from None
        n_filled = sum(bool(cell.strip()) for cell in cells)
        if n_filled != n_cells:
            raise DataError(f"{where}: got {n_filled} columns, want {n_cells}, between tabs; mend the line")
        yield where, cells


def read_qrels(path, n_columns, queries=None):
    """{query_id: {docid: relevance}} of TREC's four columns or BEIR's three, on none but these queries."""
    qrels = defaultdict(dict)
    for where, (query_id, *_, docid, relevance) in read_cells(path, n_columns):
        if query_id == "query-id":  # BEIR's header
            continue
        if not re.fullmatch("-?[0-9]+", relevance):
            raise DataError(f"{where}: relevance is {relevance!r}, want a whole number; mend the line")
        if queries is not None and query_id not in queries:
            raise DataError(f"{where}: query {query_id!r} is not among the queries; take files that belong")
        if docid in qrels[query_id]:
            raise DataError(f"{where}: query {query_id!r} judges docid {docid!r} twice; drop one")
        qrels[query_id][docid] = int(relevance)
    return qrels


def find(path, need=True):
    """The file, plain or gzipped; where there is none an error, or None if there need not be."""
    for found in (path, path.with_name(path.name + ".gz")):
        if found.is_file():
            return found
    if need:
        raise DataError(f"{path} not found; fetch it, --help tells the layout of every source")


def choose_languages(args, available):
    missing = " ".join(sorted(set(args.lang or []) - set(available)))
    if missing or not available:
        raise DataError(f"{args.root}: no {missing or 'files laid out as --help tells'} there, "
                        f"but {' '.join(sorted(available)) or 'nothing'}; check --root and --lang")
    return sorted(set(args.lang or available))


def held_out(keys, seed, lang):
    """A tenth of the keys, at least one of two; file order does not matter."""
    keys = sorted(set(keys), key=lambda key: (random.Random(f"{seed}:{lang}:{key}").random(), key))
    return set(keys[:max(1, round(len(keys) / 10))]) if len(keys) > 1 else set()


# --------------------------------------------------------------------------- sources
# Each returns (files it reads, parts); memory holds the judged passages of one part. A part is two functions:
#   passages()  yields (where, lang, {docid, title, text})
#   queries()   yields (where, split, {query_id, lang, query}, {docid: relevance}); more fields are kept

def sample(args, root, counts):
    corpora = {lang: corpus_files(root, lang) for lang in choose_languages(args, corpus_languages(root))}
    splits = {split: root / f"{split}.jsonl" for split in SPLITS if (root / f"{split}.jsonl").is_file()}
    qrels = {(split, lang): root / f"qrels/{split}/{lang}.tsv" for split in splits for lang in corpora}
    qrels = {key: path for key, path in qrels.items() if path.is_file()}

    def queries():
        judged = {key: read_qrels(path, 4) for key, path in qrels.items()}
        for split, path in splits.items():
            for where, record in read_records(path, list(corpora)):
                judgments = judged.get((split, record["lang"]), {}).get(record["query_id"])
                if not judgments:
                    raise DataError(f"{where}: qrels/{split} has nothing on query {record['query_id']!r}")
                yield where, split, record, judgments

    files = sum(corpora.values(), []) + list(splits.values()) + list(qrels.values())
    return files, [(partial(read_corpora, corpora), queries)]


def miracl(args, root, counts):
    topics_root, corpus_root = (root / "miracl", root / "miracl-corpus") if root else download(args.lang)
    prefix = "miracl-corpus-v1.0-"
    corpora = {path.name.removeprefix(prefix): path for path in corpus_root.glob(f"{prefix}*")}
    files, parts = [], []
    for lang in choose_languages(args, corpora):
        numbers = [int(re.search(r"docs-(\d+)", path.name)[1]) for path in corpora[lang].glob("docs-*")]
        corpus = [find(corpora[lang] / f"docs-{n}.jsonl") for n in range(max(numbers, default=0) + 1)]
        judged = {}
        for split in SPLITS:
            pair = [topics_root / f"miracl-v1.0-{lang}/{kind}/{kind}.miracl-v1.0-{lang}-{split}.tsv"
                    for kind in ("topics", "qrels")]
            if split == "dev" or any(find(path, need=False) for path in pair):  # de and yo have no train
                judged[split] = [find(path) for path in pair]
        files += corpus + sum(judged.values(), [])
        parts.append((partial(read_corpora, {lang: corpus}), partial(read_topics, lang, judged)))
    return files, parts


def download(langs):
    """[folder of miracl/miracl, folder of miracl/miracl-corpus] from the hub, with these languages."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError
    folders = []
    for name in ("miracl", "miracl-corpus"):
        files = [f"{name}-v1.0-{lang}/*" for lang in langs or ["*"]]
        try:
            folder = snapshot_download(f"miracl/{name}", repo_type="dataset", allow_patterns=files)
            folders.append(Path(folder))
        except (HTTPError, OSError) as error:
            raise DataError(f"miracl/{name}: the hub does not give it ({error!r}); accept the terms at "
                            f"https://huggingface.co/datasets/miracl/{name} and set HF_TOKEN to its "
                            "token, or check the network and HF_HUB_OFFLINE, or point --root at a copy") from None
    return folders


def read_topics(lang, judged):
    for split, (topics_path, qrels_path) in judged.items():
        topics = {}
        for where, (query_id, text) in read_cells(topics_path, 2):
            add_once(topics, query_id, text, where)
        qrels = read_qrels(qrels_path, 4, topics)
        for query_id, text in topics.items():
            yield topics_path, split, {"query_id": query_id, "lang": lang, "query": text}, qrels[query_id]


def beir(args, root, counts):
    if len(args.lang or ()) != 1:
        raise DataError("--source beir needs --lang CODE, the one language of the collection (ISO 639-1)")
    lang, = args.lang
    corpus, topics = find(root / "corpus.jsonl"), find(root / "queries.jsonl")
    qrels = {split: find(root / f"qrels/{split}.tsv", need=False) for split in (*SPLITS, "test")}
    if not qrels["dev"]:
        qrels["dev"] = qrels["test"]
        say(f"{root}: no qrels/dev.tsv, so dev is qrels/test.tsv")
    qrels = {split: qrels[split] for split in SPLITS if qrels[split]}

    def passages():
        for where, _, record in read_corpora({lang: [corpus]}):
            check_text(record, "_id", where)
            yield where, lang, record | {"docid": record["_id"]}  # judgments name _id, whatever else is there

    def queries():
        texts = {}
        for where, _, record in read_corpora({lang: [topics]}):
            check_text(record, "_id", where)
            check_text(record, "text", where)
            add_once(texts, record["_id"], record["text"], where)
        for split, path in qrels.items():
            judged = read_qrels(path, 3, texts)
            for query_id, text in texts.items():
                if query_id in judged:
                    yield topics, split, {"query_id": query_id, "lang": lang, "query": text}, judged[query_id]

    return [corpus, topics, *qrels.values()], [(passages, queries)]


def squad(args, root, counts):
    files = defaultdict(list)
    for path in sorted(root.glob("*.json*")):
        found = re.fullmatch(r".+\.([a-z]{2,3}(-\w+)?)\.json(\.gz)?", path.name)
        if found:
            files[found[1]].append(path)
    langs = choose_languages(args, files)

    def read(lang):
        passages, article_of, questions = {}, {}, {}  # by text; {docid: title}; {query_id: (query, docid)}
        for where, article, passage, qas in read_squad(files[lang]):
            # a paragraph that two articles share belongs to the first: no passage is in both train and dev
            docid = passages.setdefault(passage["text"], (where, lang, passage))[2]["docid"]
            article_of.setdefault(docid, article)
            for qa in qas:
                if qa.get("is_impossible"):
                    counts[lang]["unanswerable questions"] += 1
                else:
                    add_once(questions, qa["id"], (qa["question"], docid), where)
        articles = {article_of[docid] for _, docid in questions.values()}
        dev = held_out(articles, args.seed, lang)
        say(f"{lang}: {len(dev)} of {len(articles)} articles held out as dev")
        queries = []
        for query_id, (query, docid) in questions.items():
            split = "dev" if article_of[docid] in dev else "train"
            queries.append((root, split, {"query_id": query_id, "lang": lang, "query": query}, {docid: 1}))
        return partial(iter, passages.values()), partial(iter, queries)

    return [path for lang in langs for path in files[lang]], (read(lang) for lang in langs)


def read_squad(paths):
    """Yield (where, article, passage, questions) of every paragraph; a split never cuts an article."""
    n_articles = 0
    for where in paths:
        try:
            for article in parse_line(where, 1, b"".join(line for _, line in read_lines(where)))["data"]:
                title = article.get("title") or ""
                for number, paragraph in enumerate(article["paragraphs"]):
                    docid = f"{n_articles}#{number}"
                    for qa in paragraph["qas"]:
                        check_text(qa, "id", f"{where}: paragraph {docid}")
                        check_text(qa, "question", f"{where}: paragraph {docid}")
                    passage = {"docid": docid, "title": title, "text": paragraph["context"]}
                    yield f"{where}: paragraph {docid}", title or f"#{n_articles}", passage, paragraph["qas"]
                n_articles += 1
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: data[{n_articles}]: {error!r}; want SQuAD's data[].paragraphs[] with "
                            "context and qas[]") from None


def tevatron(args, root, counts):
    splits = {"train": root if root.is_file() else find(root / "train.jsonl")}
    dev, corpus = (find(root / f"{name}.jsonl", need=False) for name in ("dev", "corpus"))
    if dev:
        splits["dev"] = dev
    ids = defaultdict(list)  # {lang: [query_id]}
    for _, record in read_records(splits["train"], args.lang):
        ids[record["lang"]].append(record["query_id"])
    if corpus and len(ids) > 1:
        raise DataError(f"{corpus}: one corpus has one language, not {' '.join(ids)}; choose with --lang")
    held = {lang: set() if dev else held_out(of_lang, args.seed, lang) for lang, of_lang in ids.items()}
    if not dev:
        for lang, of_lang in ids.items():
            say(f"{lang}: no dev.jsonl, so {len(held[lang])} of {len(of_lang)} queries are held out as dev")

    def passages():
        texts = {}
        for path in splits.values():
            for where, record in read_records(path, args.lang):
                for passage in record["positive_passages"] + record["negative_passages"]:
                    if is_new(texts, record["lang"], passage, where):
                        yield where, record["lang"], passage

    def queries():
        for split, path in splits.items():
            for where, record in read_records(path, args.lang):
                judgments = {p["docid"]: 1 for p in record["positive_passages"]}
                human = [p for p in record["negative_passages"] if p.get("source") == "human"]
                judgments |= {p["docid"]: 0 for p in human}
                yield where, "dev" if record["query_id"] in held[record["lang"]] else split, record, judgments

    if corpus:
        return [*splits.values(), corpus], [(partial(read_corpora, dict.fromkeys(ids, [corpus])), queries)]
    return [*splits.values()], [(passages, queries)]


def read_records(path, langs):
    """Yield (where, record) of Tevatron's records, or FlagEmbedding's; one docid is one text in the file."""
    queries, texts = defaultdict(dict), {}
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if b'"positive_document_ids"' in line:
            raise DataError(f"{where}: positive_document_ids have no texts; want positive_passages")
        if b'"pos"' in line:
            line = dump(from_flagembedding(parse_line(path, number, line), where, number)).encode()
        record = {"negative_passages": []} | parse_query(path, number, line, langs)
        if not langs or record["lang"] in langs:
            add_once(queries[record["lang"]], record["query_id"], None, where)
            for passage in record["positive_passages"] + record["negative_passages"]:
                is_new(texts, record["lang"], passage, where)
            positives = {p["docid"] for p in record["positive_passages"]}
            for docid in (p["docid"] for p in record["negative_passages"]):
                if docid in positives:
                    raise DataError(f"{where}: docid {docid!r} is both positive and negative; drop one")
            yield where, record


def from_flagembedding(record, where, number):
    """A record of {query, pos, neg}, whose passages are texts, in Tevatron's layout."""
    made = {"query_id": str(number), "query": record.get("query")}
    for key, name in (("pos", "positive_passages"), ("neg", "negative_passages")):
        texts = record.get(key, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: {key!r} is no list of texts; want FlagEmbedding's query, pos, neg")
        docids = [blake2b(text.encode(), digest_size=8).hexdigest() for text in texts]
        made[name] = [{"docid": docid, "title": "", "text": text} for docid, text in zip(docids, texts)]
    return made


SOURCES = {"sample": sample, "miracl": miracl, "beir": beir, "squad": squad, "tevatron": tevatron}


# --------------------------------------------------------------------------- writing

class Collection:
    """The folder that is being written; counts: {lang: Counter} of what is in it and of what was left out."""

    def __init__(self, folder, args, counts, files):
        self.folder, self.args, self.counts = folder, args, counts
        self.files = files  # ExitStack that closes what is opened
        self.open = {}

    def write(self, name, line):
        if name not in self.open:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / name, "w", encoding="utf-8", newline="\n")
            self.open[name] = self.files.enter_context(file)
        self.open[name].write(line)

    def add_part(self, passages, queries):
        judged = {}  # {(lang, docid): whether the passage is needed, because the record does not have it}
        for _, _, record, judgments in queries():
            for docid in judgments:
                judged[record["lang"], docid] = "positive_passages" not in record
        kept = self.add_passages(passages, judged)
        for _, split, record, judgments in queries():
            if split == "dev" or self.counts[record["lang"]]["train"] != self.args.limit:
                self.add_query(split, record, judgments, kept)

    def add_passages(self, passages, judged):
        """Write the corpora, {(lang, docid): passage} of the judged; of others memory holds 8 bytes each."""
        kept, hashes = {}, array("q")
        for where, lang, passage in progress(passages(), desc="passages", unit=""):
            if isinstance(passage.get("text"), str) and not passage["text"].strip():
                self.counts[lang]["empty passages"] += 1
                continue
            check_passage(passage, where)
            key = lang, check_id(passage["docid"], where)
            hashes.append(hash(key))
            if key in judged:
                kept[key] = plain(passage) if judged[key] else None
            self.counts[lang]["passages"] += 1
            self.write(f"corpus/{lang}.jsonl", dump(plain(passage)))
        check_unique(passages, np.sort(hashes))
        return kept

    def add_query(self, split, record, judgments, kept):
        lang, query_id = record["lang"], record["query_id"]
        found = {docid: relevance for docid, relevance in judgments.items() if (lang, docid) in kept}
        lost = judgments.keys() - found.keys()
        self.counts[lang]["judgments of passages not in the corpus"] += len(lost)
        if "positive_passages" in record:
            passages = record["positive_passages"] + record["negative_passages"]
            passages = [plain(p) | p for p in passages if p["docid"] not in lost]
        else:
            passages = [kept[lang, docid] for docid in found]
        positives, negatives = [], []
        for passage in passages:
            if passage["docid"] not in found:
                negatives.append(passage)
            elif found[passage["docid"]] >= self.args.min_relevance:
                positives.append(passage)
            else:
                negatives.append(passage | {"source": "human"})
        if not positives:
            self.counts[lang]["queries without a positive"] += 1
            return
        self.counts[lang][split] += 1
        self.counts[lang]["positives"] += len(positives)
        line = {"query_id": query_id, "lang": lang, "query": record["query"], "positive_passages": positives,
                "negative_passages": negatives}
        self.write(f"{split}.jsonl", dump(line | {key: record[key] for key in record if key not in line}))
        for docid, relevance in found.items():
            self.write(f"qrels/{split}/{lang}.tsv", f"{query_id}\t0\t{docid}\t{relevance}\n")


def plain(passage):
    return {"docid": passage["docid"], "title": passage.get("title", ""), "text": passage["text"]}


def check_unique(passages, hashes):
    """DataError that names both lines where two of the hashes are equal, sorted as they are."""
    repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    first = {}
    for where, lang, passage in passages() if repeated else ():  # again, only to name the lines
        key = lang, passage["docid"]
        if hash(key) in repeated and passage["text"].strip():
            if key in first:
                raise DataError(f"{where}: docid {key[1]!r} is there twice, first at {first[key]}; drop one")
            first[key] = where


def damaged(output):
    """A file of a finished collection that is not as it was written, or None."""
    files = json.loads(output.meta_path.read_text("utf-8"))["files"] if output.meta_path.exists() else {}
    for name, digest in files.items():
        if not (output.path / name).is_file() or digest_file(output.path / name) != digest:
            return output.path / name
    return None


def convert(args, parts, counts, output):
    with atomic_folder(output.path) as folder:
        with ExitStack() as files:
            collection = Collection(folder, args, counts, files)
            for passages, queries in parts:
                collection.add_part(passages, queries)
        total = sum(counts.values(), Counter())
        if not total["train"] + total["dev"]:
            raise DataError(f"{args.root}: no query has a positive in the corpus; take files that belong")
        written = sorted(path for path in folder.rglob("*") if path.is_file())
        output.meta["files"] = {path.relative_to(folder).as_posix(): digest_file(path) for path in written}
        for path in output.path.glob("*"):
            if path.name not in PARTS:  # what others put there stays
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, folder / path.name)
        output.finish(passages=total["passages"], train_queries=total["train"], dev_queries=total["dev"],
                      languages=counts)  # its digests tell if a kill comes before the folder is in place


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.source == "sample":
        args.root = args.root or str(SAMPLE)
    root = None if args.source == "miracl" and args.root in (None, "hub") else Path(args.root or "")
    if root and not (args.root and root.exists()):
        raise DataError(f"--root {args.root or 'FOLDER'}: not found; --help tells the layouts")
    out = Path(args.out)
    out = out.resolve() if out.is_symlink() or out.name in ("", "..") else out
    counts = defaultdict(Counter)
    inputs, parts = SOURCES[args.source](args, root, counts)
    if out.is_file() or any(out.resolve() in Path(path).resolve().parents for path in inputs):
        fault = "a file" if out.is_file() else "where the input lies"
        raise DataError(f"{out} is {fault}; choose another --out")
    output = Output(args, inputs, out=out)
    output.meta["arguments"]["files"] = [Path(path).name for path in inputs]  # their names tell the language
    changed = None if args.overwrite else damaged(output)
    if changed:
        say(f"{changed} is missing or was changed: making {out} again")
    elif output.is_done():
        for part in PARTS[2:]:
            if (out / part).exists():
                os.utime(out / part)  # newer than its inputs, for make
        return
    convert(args, parts, counts, output)
    if not (out / "train.jsonl").exists():
        say(f"{out}: no training queries, so no train.jsonl")
    for lang, of_lang in counts.items():
        say(f"{lang}: " + ", ".join(f"{n:,} {what}" for what, n in of_lang.items() if n))


if __name__ == "__main__":
    run(main)
