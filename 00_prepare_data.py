"""Bring any collection into the layout that the stages read: corpora, training and dev queries, judgments.

Source  the data of Sec. 4.1 (MIRACL), or a collection of your own; deviates from the house rule "NFC once, in
        stage 00": texts stay byte for byte as they are (what is the same text, common.normalise decides)
Reads   sample    sample/data beside this script
        miracl    the hub's miracl/miracl and miracl/miracl-corpus (gated: accept the terms, set HF_TOKEN), or
                  copies: ROOT/miracl-corpus/miracl-corpus-v1.0-LANG/, ROOT/miracl/miracl-v1.0-LANG/
        beir      ROOT/corpus.jsonl, queries.jsonl, qrels/train.tsv, dev.tsv (else test.tsv); --lang CODE
        squad     ROOT/*.LANG.json: its paragraphs are the corpus, a tenth of its articles is dev
        tevatron  ROOT/train.jsonl, dev.jsonl (else a tenth of the queries), corpus.jsonl or corpus/LANG.jsonl
                  (else the records' passages), or ROOT a JSONL file; also FlagEmbedding's (query, pos, neg)
        Any may be gzipped. Where neither file nor record names the language, --lang CODE does.
Writes  OUT/corpus/LANG.jsonl        {docid, title, text}
        OUT/train.jsonl, dev.jsonl   {query_id, lang, query, positive_passages, negative_passages}
        OUT/qrels/SPLIT/LANG.tsv     query_id 0 docid relevance: all judgments of the queries in that split
        OUT.meta.json                arguments, input digests, counts, also of what is left out
        --limit N: the first N training queries of a language. Any fault leaves OUT as it was.
Usage   python 00_prepare_data.py --source miracl --root ../shared/data/minimiracl --lang sw --out data/mini
Cost    mini-MIRACL (62,608 passages, 2,796 queries): 3 s, 30 MB; a million passages: 40 s, 150 MB
"""
import random
import re
import shutil
from collections import Counter, defaultdict
from contextlib import ExitStack
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path

from common import (LISTS, DataError, Output, Parser, atomic_folder, check_passage, check_query, check_text,
                    corpus_files, decode, dump, normalise, parse_line, positive_int, progress, read_lines,
                    read_json, read_qrels, run, say, text_key)

SAMPLE = Path(__file__).resolve().parent / "sample" / "data"
PARTS = ("corpus", "qrels", "train.jsonl", "dev.jsonl")  # of OUT; other files in it are left alone


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--source", required=True, choices=list(SOURCES), help="layout of the data")
    parser.add_argument("--root", metavar="FOLDER", help="where it is; miracl: hub (default) downloads it")
    parser.add_argument("--min-relevance", type=positive_int, default=1, metavar="GRADE",
                        help="what is judged so or higher is a positive, others negatives; qrels keep all")
    parser.add_argument("--docids-from-texts", action="store_true",
                        help="tevatron: new docids, where those of the file just number a record's passages")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the collection, such as data/NAME")
    return parser


# --------------------------------------------------------------------------- reading

def find(path, need=True):
    """The file, plain or packed (read refuses what is not gzip); error or None where there is none."""
    packed = [path.with_name(path.name + ending) for ending in ("", ".gz", ".zst", ".xz", ".bz2", ".zip")]
    found = next(filter(Path.is_file, packed), None)
    if need and not found:
        raise DataError(f"{path} not found; fetch it, --help tells the layout of every source")
    return found


def read(path):
    """Yield (where, content) of every line: the cells of a .tsv, else the JSON object, tidied."""
    is_table = ".tsv" in path.suffixes
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        yield where, decode(line, where) if is_table else tidy(parse_line(path, number, line), where)


def tidy(record, where):
    """The record: ids that are numbers become strings, a title or text that is null becomes empty."""
    for key in {"_id", "id", "docid", "query_id"} & record.keys():
        if type(record[key]) in (int, float) and record[key] % 1 == 0:
            record[key] = str(int(record[key]))
        if isinstance(record[key], str) and len(record[key].split()) != 1:
            raise DataError(f"{where}: id {record[key]!r} has white space, TREC files cannot have it; rename")
    for key in {"title", "text"} & record.keys():
        record[key] = "" if record[key] is None else record[key]
    return record


def read_corpora(corpora, id_key="docid"):
    """Yield (where, lang, passage) of {lang: [files]}; id_key is the id that judgments name."""
    for lang, paths in corpora.items():
        for path in paths:
            for where, passage in read(path):
                check_text(passage, id_key, where)
                yield where, lang, passage | {"docid": passage[id_key]}


def read_judged(lang, files):
    """Yield (where, split, query, judgments) that {split: (topics, qrels)} of MIRACL or BEIR have."""
    for split, (topics_path, qrels_path) in files.items():
        topics = []
        for where, topic in read(topics_path):
            if isinstance(topic, str):
                topic = tidy(dict(zip(("_id", "text"), topic.split("\t", 1))), where)
            for key in ("_id", "text"):
                check_text(topic, key, where)
            topics.append((where, topic["_id"], topic["text"]))
        qrels = read_qrels(qrels_path, {query_id for _, query_id, _ in topics})
        for where, query_id, text in topics:
            if query_id in qrels:
                yield where, split, {"query_id": query_id, "lang": lang, "query": text}, qrels[query_id]


def choose_languages(args, available):
    if len({lang.lower() for lang in available}) < len(available):
        raise DataError(f"{args.root}: two of {' '.join(sorted(available))} differ in case alone; rename one")
    missing = set(args.lang or available) - set(available)
    if missing or not available:
        raise DataError(f"{args.root}: no {' '.join(sorted(missing)) or 'files laid out as --help tells'} "
                        f"there, but {' '.join(sorted(available)) or 'nothing'}; check --root and --lang")
    return sorted(set(args.lang or available))


def held_out(keys, seed, what):
    """A tenth of {lang: keys}, at least one of two; the draw of a key is that of its translations."""
    held = set()
    for of_lang in keys.values():
        drawn = sorted(set(of_lang), key=lambda key: (random.Random(f"{seed}:{key}").random(), key))
        held.update(drawn[:max(1, round(len(drawn) / 10))] if len(drawn) > 1 else [])
    say(f"{len(held)} of {len(set().union(*keys.values()))} {what} held out as dev")
    return held


# --------------------------------------------------------------------------- sources
# Each returns (files it reads, parts); memory holds the judged passages of one part. A part is two functions:
#   passages()  yields (where, lang, {docid, title, text})
#   queries()   yields (where, split, {query_id, lang, query}, {docid: relevance}); more fields are kept

def miracl(args, root, counts):
    topics_root = root / "miracl" if root else download("miracl", args.lang)
    corpus_root = root / "miracl-corpus" if root else download("miracl-corpus", args.lang)
    corpora = {path.name.rpartition("v1.0-")[2]: path for path in corpus_root.glob("miracl-corpus-v1.0-*")}
    files, parts = [], []
    for lang in choose_languages(args, corpora):
        numbers = [int(re.search(r"docs-(\d+)", path.name)[1]) for path in corpora[lang].glob("docs-[0-9]*")]
        corpus = [find(corpora[lang] / f"docs-{n}.jsonl") for n in range(max(numbers, default=0) + 1)]
        judged = {}
        for split in ("train", "dev"):
            pair = [topics_root / f"miracl-v1.0-{lang}/{kind}/{kind}.miracl-v1.0-{lang}-{split}.tsv"
                    for kind in ("topics", "qrels")]
            if split == "dev" or any(find(path, need=False) for path in pair):  # de and yo have no train
                judged[split] = [find(path) for path in pair]
        files += corpus + sum(judged.values(), [])
        parts.append((partial(read_corpora, {lang: corpus}), partial(read_judged, lang, judged)))
    return files, parts


def download(name, langs):
    """The folder of miracl/miracl or miracl/miracl-corpus from the hub, with these languages."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError
    files = [f"{name}-v1.0-{lang}/*" for lang in langs or ["*"]]
    try:
        return Path(snapshot_download(f"miracl/{name}", repo_type="dataset", allow_patterns=files))
    except (HTTPError, OSError) as error:
        raise DataError(f"miracl/{name}: the hub does not give it ({error!r}); accept the terms at "
                        f"https://huggingface.co/datasets/miracl/{name} and set HF_TOKEN to its token, "
                        "or check the network and HF_HUB_OFFLINE, or point --root at a copy") from None


def beir(args, root, counts):
    if len(args.lang or ()) != 1:
        raise DataError("--source beir needs --lang CODE; it names the one language there (ISO 639-1)")
    corpus, topics = find(root / "corpus.jsonl"), find(root / "queries.jsonl")
    qrels = {split: find(root / f"qrels/{split}.tsv", need=False) for split in ("train", "dev")}
    if not qrels["dev"]:
        qrels["dev"] = find(root / "qrels/test.tsv", need=not qrels["train"])
        say(f"{root}: no qrels/dev.tsv, so dev is {'qrels/test.tsv' if qrels['dev'] else 'empty'}")
    judged = {split: (topics, path) for split, path in qrels.items() if path}
    part = partial(read_corpora, {args.lang[0]: [corpus]}, "_id"), partial(read_judged, args.lang[0], judged)
    return [corpus, topics, *filter(None, qrels.values())], [part]


def squad(args, root, counts):
    files = defaultdict(list)
    for path in sorted(root.glob("*.json*")) if root.is_dir() else [root]:
        named = re.fullmatch(r".+\.(?!dev|val)([A-Za-z]{2,3}(-\w+)?)\.jsonl?(\.gz)?", path.name)
        if not named and len(args.lang or ()) != 1:
            raise DataError(f"{path}: want NAME.CODE.json[.gz]; rename or unpack it, or pass --lang CODE")
        files[named[1] if named else args.lang[0]].append(path)
    langs = choose_languages(args, files)
    corpus, asked, article_of = {}, [], {}
    for lang in langs:
        for where, article, passage, questions in read_squad(files[lang]):
            # of articles that share a paragraph or, as translations do, a question's id, the first counts for
            # both: nothing is in train and in dev (ids that are numbers may be of any question)
            names = [question["id"] for question in questions if not question["id"].isdecimal()]
            names.append((lang, normalise(passage["text"])))
            article = next((article_of[name] for name in names if name in article_of), article)
            article_of |= dict.fromkeys(names, article)
            _, _, passage = corpus.setdefault(names[-1], (where, lang, passage))
            for question in questions:
                if question["has_answer"]:
                    query = {"query_id": question["id"], "lang": lang, "query": question["question"]}
                    asked.append((article, where, query, {passage["docid"]: 1}))
                else:
                    counts[lang]["unanswerable questions"] += 1
    paths = [path for lang in langs for path in files[lang]]
    for path in paths:
        if len(paths) > 1 and re.search(r"(?<![a-z])(dev|test|val|valid)(?![a-z])", path.name.lower()):
            say(f"{path}: its articles, too, are divided into train and dev; prepare it alone if need be")
    articles = {lang: [article for article, _, query, _ in asked if query["lang"] == lang] for lang in langs}
    held = held_out(articles, args.seed, "articles")
    queries = [(where, "dev" if article in held else "train", *query) for article, where, *query in asked]
    return paths, [(corpus.values, queries.copy)]


def read_squad(paths):
    """Yield (where, article, passage, questions) of every paragraph; articles with one title have one number.

    A file is {"data": [...]}, that list or its lines, of articles or of questions with their contexts.
    """
    number_of, n_articles = {}, 0
    for path in paths:
        lines = list(read_lines(path))
        whole = b"".join(line for _, line in lines).removeprefix(b"\xef\xbb\xbf")
        if len(lines) > 1 and lines[0][1].rstrip().endswith(b"}"):
            data = [parse_line(path, *line) for line in lines]
        else:
            data = parse_line(path, 1, b'{"data": %b}' % whole)["data"]
        try:
            for entry in data["data"] if isinstance(data, dict) else data:
                where, title = f"{path}: data[{n_articles}]", entry.get("title") or ""
                article = number_of.setdefault(title or n_articles, n_articles)
                for number, paragraph in enumerate(entry.get("paragraphs", [entry])):
                    questions = [tidy(question, where) for question in paragraph.get("qas", [entry])]
                    for question in questions:
                        check_text(question, "id", where)
                        check_text(question, "question", where)
                        question["has_answer"] = has_answer(question)
                    check_text(paragraph, "context", where, empty=True)
                    docid = f"{n_articles}#{number}"
                    passage = {"docid": docid, "title": title, "text": paragraph["context"]}
                    yield where, article, passage, questions
                n_articles += 1
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: data[{n_articles}]: {error!r}; want SQuAD's data[].paragraphs[] with "
                            "context and qas[]") from None


def has_answer(question):
    """Files say no by is_impossible, by no or empty answers, by plausible ones alone."""
    answers = question.get("answers", [] if "plausible_answers" in question else ["not told"])
    if isinstance(answers, dict):
        answers = answers.get("text")  # a column of the hub's tables
    texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers or ()]
    impossible = str(question.get("is_impossible")).lower() in ("true", "1")
    return not impossible and any(text and text.strip() for text in texts)


def tevatron(args, root, counts):
    """Records with corpus.jsonl, with a corpus/ for each language, or with neither."""
    train = root if root.is_file() else find(root / "train.jsonl")
    dev, corpus = (find(root / f"{name}.jsonl", need=False) for name in ("dev", "corpus"))
    splits = [("train", train)] + [("dev", dev)] * bool(dev)
    records = partial(read_records, splits, args)
    first_id = defaultdict(dict)  # {lang: {question: query_id}}: under several ids it is held out by one
    for _, _, record in records():
        first_id[record["lang"]].setdefault(normalise(record["query"]), record["query_id"])
    langs = choose_languages(args, first_id)
    if corpus and len(langs) > 1:
        raise DataError(f"{corpus}: one corpus has one language, not {' '.join(langs)}; choose with --lang")
    if corpus and args.docids_from_texts:
        raise DataError(f"--docids-from-texts: docids are those of {corpus}; leave one of them out")
    held = {} if dev else held_out({lang: first_id[lang].values() for lang in langs}, args.seed, "queries")
    corpora = {lang: [corpus] for lang in langs if corpus}
    if (root / "corpus").is_dir():  # of the sample, or what this script wrote
        corpora = {lang: corpus_files(root, lang) for lang in langs}

    qrels = {(split, lang): find(root / f"qrels/{split}/{lang}.tsv", need=False)
             for split, _ in splits for lang in first_id}  # of the sample, or what this script wrote
    graded = {key: read_qrels(path) if path else {} for key, path in qrels.items()}

    def passages():
        for where, _, record in records():
            for passage in record["positive_passages"] + record["negative_passages"]:
                if record["lang"] in langs:
                    yield where, record["lang"], passage

    def queries():
        for where, split, record in records():
            judgments = {passage["docid"]: 1 for passage in record["positive_passages"]}
            for passage in record["negative_passages"]:
                if passage.get("source") == "human":
                    judgments.setdefault(passage["docid"], 0)
            judgments |= graded[split, record["lang"]].get(record["query_id"], {})
            in_dev = first_id[record["lang"]][normalise(record["query"])] in held
            if record["lang"] in langs:
                yield where, "dev" if in_dev else split, record, judgments

    files = [path for _, path in splits] + sum(corpora.values(), []) + list(filter(None, qrels.values()))
    return files, [(partial(read_corpora, corpora) if corpora else passages, queries)]


def read_records(splits, args):
    """Yield (where, split, record) of Tevatron's records, or FlagEmbedding's, whose passages are texts."""
    for split, path in splits:
        for where, record in read(path):
            if isinstance(record, str):
                raise DataError(f"{where}: a table, want JSON lines; --help tells the layouts")
            if not {"positive_passages", "pos"} & record.keys():
                raise DataError(f"{where}: {' '.join(record)}: neither positive_passages (Tevatron) nor pos "
                                "(FlagEmbedding); positive_document_ids have no texts")
            if "pos" in record:
                record.setdefault("query_id", where.rpartition(":")[2])
            if len(args.lang or ()) == 1:
                record.setdefault("lang", args.lang[0])
            for name, of_flagembedding in (("positive_passages", "pos"), ("negative_passages", "neg")):
                record[name] = record.pop(of_flagembedding, record.get(name, []))
            for name in [name for name in LISTS if isinstance(record.get(name), list)]:
                record[name] = [with_docid(p, where, args.docids_from_texts) for p in record[name]]
            check_query(record, where)
            yield where, split, record


def with_docid(passage, where, from_text):
    passage = {"text": passage} if isinstance(passage, str) else passage
    if isinstance(passage, dict) and ("docid" not in tidy(passage, where) or from_text):
        text = normalise(f"{passage.get('title', '')}\n{passage.get('text')}")
        passage["docid"] = blake2b(text.encode(), digest_size=8).hexdigest()
    return passage


SOURCES = {"sample": tevatron, "miracl": miracl, "beir": beir, "squad": squad, "tevatron": tevatron}


# --------------------------------------------------------------------------- writing

class Collection:
    """The folder that is being written; counts: {lang: Counter} of what is in it and of what was left out."""

    def __init__(self, folder, args, counts, files):
        self.folder = folder
        self.args = args
        self.counts = counts
        self.files = files  # an ExitStack, which closes what is opened

    @cache
    def file(self, name):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return self.files.enter_context(open(path, "w", encoding="utf-8", newline="\n"))

    def add_part(self, passages, queries):
        asked, in_dev, judged, answers = set(), set(), set(), set()
        for where, split, record, judgments in queries():
            lang, question = record["lang"], normalise(record["query"])
            if (split, lang, record["query_id"]) in asked:
                raise DataError(f"{where}: query {record['query_id']!r} is there twice; drop one")
            asked.add((split, lang, record["query_id"]))
            in_dev.update([(lang, question)] * (split == "dev"))
            own = record.get("positive_passages", []) + record.get("negative_passages", [])
            judged.update((lang, docid) for docid in judgments.keys() - {p["docid"] for p in own})
            answers.update(hash((lang, question, docid)) for docid in self.positives(judgments))
        texts, kept = self.add_passages(passages, judged)
        for where, split, record, judgments in queries():
            lang, question = record["lang"], normalise(record["query"])
            if split == "dev" or self.counts[lang]["train"] != self.args.limit:
                self.add_query(where, split, record, judgments, texts, kept, answers)
                if split == "train" and (lang, question) in in_dev:
                    self.counts[lang]["train queries with the same text as a dev query"] += 1

    def positives(self, judgments):
        return [docid for docid, grade in judgments.items() if grade >= self.args.min_relevance]

    def add_passages(self, passages, judged):
        """Write the corpora; give back {hash of (lang, docid): that of the text} and the judged passages."""
        texts, kept = {}, {}
        for where, lang, passage in progress(passages(), desc="passages", unit=""):
            if not f"{passage.get('title', '')}{passage.get('text', 'missing')}".strip():
                self.counts[lang]["empty passages"] += 1
                continue
            check_passage(passage, where)
            key = lang, passage["docid"]
            text = hash(text_key(passage))
            if hash(key) not in texts:
                texts[hash(key)] = text
                self.counts[lang]["passages"] += 1
                passage = {"docid": key[1], "title": passage.get("title", ""), "text": passage["text"]}
                self.file(f"corpus/{lang}.jsonl").write(dump(passage))
                if key in judged:
                    kept[key] = passage
            elif texts[hash(key)] != text:
                first = next(at for at, other, p in passages() if (other, p["docid"]) == key)
                remedy = ", or take --docids-from-texts" if self.args.source == "tevatron" else ""
                raise DataError(f"{where}: docid {key[1]!r} has another text at {first}; rename one{remedy}")
        return texts, kept

    def add_query(self, where, split, record, judgments, texts, kept, answers):
        lang = record["lang"]
        count = self.counts[lang]
        found = {docid: grade for docid, grade in judgments.items() if hash((lang, docid)) in texts}
        lost = "judgments of passages not in the corpus (left out of the metrics)"
        count[lost] += len(judgments) - len(found)
        passages = {docid: kept[lang, docid] for docid in found if (lang, docid) in kept}
        own = record.get("negative_passages", []) + record.get("positive_passages", [])  # a positive wins
        for passage in own:
            docid, text = passage["docid"], hash(text_key(passage))
            if texts.get(hash((lang, docid)), text) != text:
                raise DataError(f"{where}: docid {docid!r} has another text in the corpus; rename one")
            if docid in found or docid not in judgments:  # with its own fields; unjudged ones too
                passages[docid] = {"docid": docid, "title": "", **passage}
        count["negatives that their query has already"] += len(own) - len({p["docid"] for p in own})
        positives = [passages.pop(docid) for docid in self.positives(found)]
        own_texts = {text_key(passage) for passage in positives}
        twins = [docid for docid, passage in passages.items() if text_key(passage) in own_texts
                 or hash((lang, normalise(record["query"]), docid)) in answers]
        count["negatives with a positive's text, or that answer the question under another id"] += len(twins)
        negatives = [passage | ({"source": "human"} if docid in found else {})
                     for docid, passage in passages.items() if docid not in twins]
        if not positives:
            count["queries without a positive"] += 1
            return
        count[split] += 1
        count["positives"] += len(positives)
        record = dict.fromkeys(("query_id", "lang", "query")) | record  # those come first
        record |= {"positive_passages": positives, "negative_passages": negatives}
        self.file(f"{split}.jsonl").write(dump(record))
        for docid, grade in found.items():
            self.file(f"qrels/{split}/{lang}.tsv").write(f"{record['query_id']}\t0\t{docid}\t{grade}\n")


def main(argv=None):
    args = build_parser().parse_args(argv)
    root = SAMPLE if args.source == "sample" else Path(args.root or "")
    if args.source == "miracl" and args.root in (None, "hub"):
        root = None
    elif not root.exists() or bool(args.root) == (args.source == "sample"):
        raise DataError(f"--root {args.root}: no {args.source} there; --help tells the layouts")
    if args.docids_from_texts and args.source != "tevatron":
        raise DataError("--docids-from-texts is for --source tevatron; leave it out")
    counts = defaultdict(Counter)
    inputs, parts = SOURCES[args.source](args, root, counts)
    output = Output(args, inputs, parts=[*PARTS, *(f"{part}/**/*" for part in PARTS)])
    output.meta["arguments"]["files"] = [path.name for path in inputs]  # their names tell the language
    out = output.path
    earlier = read_json(output.meta_path).get("arguments", {}).get("source", args.source)
    if out.is_dir() and earlier != args.source and not args.overwrite:
        raise DataError(f"{out} was made from --source {earlier}; pass --overwrite, or another --out")
    if output.is_done():
        return
    with atomic_folder(out) as folder:
        with ExitStack() as files:
            collection = Collection(folder, args, counts, files)
            for passages, queries in parts:
                collection.add_part(passages, queries)
        for lang, of_lang in counts.items():
            say(f"{lang}: " + ", ".join(f"{n:,} {what}" for what, n in of_lang.items() if n))
        total = sum(counts.values(), Counter())
        if not total["train"] + total["dev"]:
            raise DataError(f"{root}: no query has a positive (relevance {args.min_relevance}) there; "
                            "take files that belong together, or another --min-relevance")
        if out.is_dir():  # what others put there stays
            shutil.copytree(out, folder, symlinks=True, dirs_exist_ok=True,
                            ignore=lambda top, _: PARTS if Path(top) == out else ())
        output.finish(folder, passages=total["passages"], train_queries=total["train"],
                      dev_queries=total["dev"], languages=counts)


if __name__ == "__main__":
    run(main)
