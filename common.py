"""The interface of the stages: records and their files, arguments, errors, progress, outputs that are finished or not there."""
import argparse
import contextlib
import gzip
import hashlib
import json
import os
import re
import resource
import sys
import time
import unicodedata
import zlib
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads are 10-100x slower on a busy machine
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # torch keeps code and buffers of 1024 shapes: 0.6 GB that
    os.environ.setdefault(cache, "64")                                   # texts of every length fill, little of it used twice

LANGUAGES = {"ar": "Arabic", "bn": "Bengali", "de": "German", "en": "English", "es": "Spanish", "fa": "Persian",
             "fi": "Finnish", "fr": "French", "hi": "Hindi", "id": "Indonesian", "ja": "Japanese", "ko": "Korean",
             "ru": "Russian", "sw": "Swahili", "te": "Telugu", "th": "Thai", "yo": "Yoruba", "zh": "Chinese"}


# --------------------------------------------------------------------------- command line, errors, progress

class DataError(Exception):
    """Bad input or usage, told to the user in one line: `file:line: what is wrong; remedy`."""


def run(main):
    """Run a stage: a DataError or a forbidden file becomes one line on stderr and exit status 2, a bug keeps its traceback (1)."""
    try:
        sys.exit(main())
    except (DataError, PermissionError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        leave()


class Parser(argparse.ArgumentParser):
    """argparse with one-line usage errors, no abbreviations, and the script's docstring in --help."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=self.Help)

    def error(self, message):
        print(f"{self.prog}: {message}; {self.prog} --help explains every flag", file=sys.stderr)
        sys.exit(2)

    def common_flags(self):
        """The flags that mean the same in every stage."""
        self.add_argument("--seed", type=int, default=13, help="seed of every random draw")
        self.add_argument("--limit", type=positive_int, metavar="N", help="use only the first N queries, for a trial")
        self.add_argument("--lang", nargs="+", metavar="CODE",
                          help="use only these languages (ISO 639-1 codes); default: all there are")
        self.add_argument("--overwrite", action="store_true",
                          help="redo a finished output, or replace a file that this script did not make")
        return self


def positive_int(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a whole number of at least 1")
    return int(text)


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def progress(iterable=None, **kwargs):
    """A tqdm bar on a terminal, a line every thirty seconds elsewhere, always on stderr."""
    from tqdm import tqdm
    if not sys.stderr.isatty():
        kwargs |= {"mininterval": 30, "delay": 30, "bar_format": "{l_bar}{n_fmt}/{total_fmt} {rate_fmt} {elapsed}<{remaining}{postfix}\n"}
    return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, **kwargs)


# --------------------------------------------------------------------------- JSONL records (the interface)

def open_text(path):
    """Open a plain or gzipped file for reading lines of bytes; DataError where it is missing."""
    path = Path(path)
    if not path.is_file():
        made_by = {"candidates": "01_mine_candidates.py", "filtered": "02_filter_false_negatives.py",
                   "augmented": "03_generate_negatives.py", "topics": "04_cluster_topics.py",
                   "train": "00_prepare_data.py", "dev": "00_prepare_data.py"}.get(path.name.split(".")[0])
        raise DataError(f"{path} not found; " + (f"make it with {made_by}" if made_by else "check the path"))
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def read_lines(path, blank=False):
    """Yield (line number from 1, bytes) of the lines that are not blank (or of all); DataError for a damaged gzip file."""
    with open_text(path) as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if blank or line.strip():
                    yield number, line
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}:{number + 1}: cannot be read ({error}); fetch or make the file again") from None


def parse_line(path, number, line):
    """One JSON object from one line; DataError with file and line otherwise."""
    try:
        record = json.loads(line)
        if b"\\u" in line:
            json.dumps(record, ensure_ascii=False).encode()  # a lone surrogate could never be written again
    except UnicodeError as error:
        raise DataError(f"{path}:{number}: not valid UTF-8 ({error}); convert the file to UTF-8") from None
    except ValueError as error:
        raise DataError(f"{path}:{number}: not a JSON object ({error}); is the file half-written?") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}:{number}: got a JSON {type(record).__name__}, want an object a line")
    return record


def check_text(record, key, where, empty=False):
    value = record.get(key)
    if not isinstance(value, str) or (not empty and not value.strip()):
        got = f"{key!r} is missing" if key not in record else f"{key!r} is {json.dumps(value, ensure_ascii=False)[:40]}"
        raise DataError(f"{where}: {got}; want a {'string' if empty else 'string that is not empty'}")


def check_passage(passage, where):
    """A passage is {docid, text} and mostly a title."""
    if not isinstance(passage, dict):
        raise DataError(f"{where}: a passage is {json.dumps(passage)[:40]}; want an object with docid, title, text")
    check_text(passage, "docid", where)
    check_text(passage, "text", f"{where}: passage {passage['docid']!r}")
    if "title" in passage:
        check_text(passage, "title", f"{where}: passage {passage['docid']!r}", empty=True)


def check_query(record, where):
    """A training query in Tevatron's layout, whatever stages it has been through."""
    for key in ("query_id", "lang", "query"):
        check_text(record, key, where)
    for key in ("positive_passages", "negative_passages", "candidate_passages", "false_negatives"):
        passages = record.get(key, [])
        if not isinstance(passages, list):
            raise DataError(f"{where}: {key!r} is no list; want a list of passages")
        for passage in passages:
            check_passage(passage, f"{where}: {key}")
    if not record.get("positive_passages"):
        raise DataError(f"{where}: query {record['query_id']!r} has no positive_passages; drop it or label one")


def parse_query(path, number, line, lang=None):
    """The checked record of one line; lang gives plain Tevatron records, which have none, the one language it names."""
    record = parse_line(path, number, line)
    if "lang" not in record:
        if not lang or len(lang) != 1:
            raise DataError(f"{path}:{number}: no 'lang'; name the file's language with --lang CODE, "
                            "or add it with 00_prepare_data.py --source tevatron")
        record = {"query_id": record.get("query_id"), "lang": lang[0], **record}
    check_query(record, f"{path}:{number}")
    return record


def read_queries(path, lang=None, limit=None, need=()):
    """Yield the checked records of a JSONL file of training queries, in order.

    lang keeps these languages, limit the first so many records; need lists further fields that must be there. DataError
    with file and line on the first bad record.
    """
    seen, n_read = set(), 0
    for number, line in read_lines(path):
        record = parse_query(path, number, line, lang)
        if lang and record["lang"] not in lang:
            continue
        for key in need:
            if key not in record:
                raise DataError(f"{path}:{number}: no {key!r}; run the stages before this one, see README")
        key = hash((record["lang"], record["query_id"]))
        if key in seen:
            raise DataError(f"{path}:{number}: query {record['query_id']!r} ({record['lang']}) is there twice; drop one")
        seen.add(key)
        yield record
        n_read += 1
        if n_read == limit:
            return
    if not n_read:
        raise DataError(f"{path}: no queries" + (f" in {' '.join(lang)}" if lang else "") + "; check the file and --lang")


def dump(record):
    """The one way a record becomes a line."""
    return json.dumps(record, ensure_ascii=False, separators=(", ", ": ")) + "\n"


@contextlib.contextmanager
def atomic(path):
    """A temporary path in the same folder, renamed to path when the block ends well, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


class Output:
    """One output file of a stage: written whole or not at all, with `<out>.meta.json` beside it.

    A finished output is recognised by that file: the same arguments, the same inputs (by digest), and its own digest.
    """
    # where things lie and how fast they are made does not change what is made
    NEUTRAL = {"out", "overwrite", "cache", "device", "concurrency", "base_url", "save_every", "input", "data", "root",
               "queries", "timeout", "max_unjudged", "price_in", "price_out", "dry_run", "tokenizer", "batch_export", "batch_import",
               "cascade_base_url"}

    def __init__(self, args, inputs, models=(), out=None):
        self.path, self.started, self.overwrite = Path(out or args.out), time.time(), args.overwrite
        self.meta_path = self.path.with_name(self.path.name + ".meta.json")
        self.inputs = [Path(p) for p in inputs]
        self.meta = {"script": Path(sys.argv[0]).name,
                     "arguments": {k: v for k, v in vars(args).items() if k not in self.NEUTRAL},
                     "inputs": [{"path": str(p), "digest": digest_file(p)} for p in inputs],
                     "models": {short_name(m): digest_folder(m) for m in models if Path(m).is_dir()}}

    def key(self, meta):
        """What must be equal for a finished output to be this one."""
        return json.dumps([meta.get("arguments"), [i["digest"] for i in meta.get("inputs", [])], meta.get("models")],
                          default=str, sort_keys=True)

    def is_done(self):
        """Whether the file is already there; DataError where it is somebody else's."""
        if not self.path.exists() or self.overwrite:
            return False
        if not self.meta_path.exists():
            raise DataError(f"{self.path} exists and was not made by this script; pass --overwrite or another --out")
        meta = json.loads(self.meta_path.read_text("utf-8"))
        same = self.key(meta) == self.key(self.meta) and (self.path.is_dir() or meta.get("digest") == digest_file(self.path))
        if same:
            os.utime(self.path)  # newer than its inputs, for make
        say(f"{self.path} is up to date" if same else f"{self.path}: arguments, inputs or models changed, making it again")
        return same

    def write(self, records):
        """Write records, an iterable that is consumed as it comes, as JSONL."""
        self.write_lines(dump(record) for record in records)

    def write_lines(self, lines):
        """Write the file, then its meta, then rename: a kill in between leaves the old file, which is then made again."""
        with atomic(self.path) as temporary:
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
            self.meta["digest"] = digest_file(temporary)
            self._write_meta({})

    def finish(self, **counts):
        """Complete the meta file and print the closing line."""
        self._write_meta(counts)
        say(f"{self.path}: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items()
                                         if not isinstance(v, (dict, list)))
            + f" - {self.meta['seconds']} s, peak {self.meta['peak_memory_mb']} MB")

    def _write_meta(self, counts):
        versions = {p: version(p) for p in ("torch", "transformers", "openai", "numpy")} | {"python": sys.version.split()[0]}
        self.meta |= {"counts": counts, "versions": versions, "seconds": round(time.time() - self.started, 1),
                      "peak_memory_mb": peak_mb()}
        with atomic(self.meta_path) as temporary:
            temporary.write_text(json.dumps(self.meta, ensure_ascii=False, indent=1, default=str) + "\n", "utf-8")


# --------------------------------------------------------------------------- corpus

SHARD = 16_384  # passages encoded, cached and searched at a time; bounds memory, does not change results


def corpus_files(data, lang):
    """The files of one language's corpus: corpus/<lang>.jsonl[.gz] or corpus/<lang>/*.jsonl[.gz], in name order."""
    root = Path(data) / "corpus"
    found = [p for p in (root / f"{lang}.jsonl", root / f"{lang}.jsonl.gz") if p.is_file()]
    found = found[:1] or sorted(p for p in (root / lang).glob("*") if p.name.endswith((".jsonl", ".jsonl.gz")))
    if not found:
        raise DataError(f"{root}/{lang}.jsonl not found; make it with 00_prepare_data.py, or leave {lang} out with --lang")
    return found


def corpus_languages(data):
    root = Path(data) / "corpus"
    if not root.is_dir():
        raise DataError(f"{root} not found; make it with 00_prepare_data.py")
    return sorted({p.name.split(".")[0] for p in root.iterdir() if p.is_dir() or ".jsonl" in p.suffixes})


def read_passages(path, numbered_lines):
    for number, line in numbered_lines:
        passage = parse_line(path, number, line)
        check_passage(passage, f"{path}:{number}")
        yield passage


def read_shards(data, lang):
    """Yield (path, [(line number, bytes)]) of at most SHARD passages each; a shard never spans two files."""
    for path in corpus_files(data, lang):
        shard = []
        for numbered_line in read_lines(path):
            shard.append(numbered_line)
            if len(shard) == SHARD:
                yield path, shard
                shard = []
        if shard:
            yield path, shard


def passage_text(passage):
    """What an encoder reads: title, line break, text (as MIRACL's baselines; leaving the title out costs points)."""
    return f"{passage['title']}\n{passage['text']}" if passage.get("title") else passage["text"]


def normalise(text):
    """For comparing texts: NFKC, case-folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def fetch_passages(data, lang, rows):
    """{row: passage} for the given rows (0-based over the language's files), in one pass that parses only those."""
    wanted, found, row = set(rows), {}, -1
    for path in corpus_files(data, lang):
        for number, line in read_lines(path):
            row += 1
            if row in wanted:
                passage, = read_passages(path, [(number, line)])
                found[row] = {"docid": passage["docid"], "title": passage.get("title", ""), "text": passage["text"]}
    return found


def short_name(model):
    """How a model is called in records and tables: the folder's name, or the hub id."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def digest_folder(folder):
    """Digest of a model folder's weights, configuration and tokenizer, whatever the folder is called."""
    files = sorted(p for kind in ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "1_Pooling/*.json")
                   for p in Path(folder).glob(kind) if p.name not in ("build.json",))
    return hashlib.blake2b("".join(f"{p.name} {digest_file(p)}\n" for p in files).encode()).hexdigest()[:32]


def peak_mb():
    """The most memory that this process has held; ru_maxrss alone may be that of the process that started it."""
    status = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return (int(own[1]) if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) >> 10


def read_json(path):
    """The object of a model folder's JSON file, {} where there is no such file."""
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); fetch the model again") from None


def leave():
    """Take leave of the other processes: one that ends without may be aborted by threads of the group that still run."""
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def batched(items, n):
    """Lists of n items (the last may be shorter)."""
    from itertools import islice
    items = iter(items)
    while batch := list(islice(items, n)):
        yield batch


@contextlib.contextmanager
def atomic_folder(folder):
    """A temporary folder beside it, renamed to folder when the block ends well, else removed."""
    import shutil
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
