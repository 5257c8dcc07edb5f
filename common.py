"""The interface of the stages: command line, errors, checked records, outputs finished or not there."""
import argparse
import contextlib
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sqlite3
import sys
import time
import traceback
import unicodedata
import weakref
import zlib
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads are 10-100x slower on a busy machine
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# torch keeps code and buffers of 1,024 shapes: 0.6 GB that texts of every length fill, seldom used twice
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
os.environ.setdefault("LRU_CACHE_CAPACITY", "8")
# large blocks in huge pages: a training step takes 7 to 13% less time and 10% less memory
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
gc.set_threshold(50_000)  # records are trees: every 700 objects a search for cycles took a tenth of mining

LANGUAGES = {"ar": "Arabic", "bn": "Bengali", "de": "German", "en": "English", "es": "Spanish",
             "fa": "Persian", "fi": "Finnish", "fr": "French", "hi": "Hindi", "id": "Indonesian",
             "ja": "Japanese", "ko": "Korean", "ru": "Russian", "sw": "Swahili", "te": "Telugu",
             "th": "Thai", "yo": "Yoruba", "zh": "Chinese"}
LANG = re.compile("[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8}){,3}")  # it names files and stands in prompts
# what a terminal obeys or shows in another order, but for line ends
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LISTS = ("positive_passages", "negative_passages", "candidate_passages", "false_negatives")  # of passages
SHARD = 16_384  # passages encoded, cached and searched at a time; bounds memory, does not change results
MADE_BY = {"train": "00_prepare_data.py", "dev": "00_prepare_data.py", "candidates": "01_mine_candidates.py",
           "filtered": "02_filter_false_negatives.py", "augmented": "03_generate_negatives.py",
           "topics": "04_cluster_topics.py"}
NOT_OURS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EPIPE}


# --------------------------------------------------------------------------- errors, command line, progress

class DataError(Exception):
    """Bad input or usage, told to the user in one line: `file:line: what is wrong; remedy`."""


def run(main):
    """Run a stage and exit: 0 done; 1 a bug, with its traceback; 2 bad input; 130 Ctrl-C; 143 SIGTERM."""
    status = 130

    def terminate(*_):
        nonlocal status
        status = 143
        signal.raise_signal(signal.SIGINT)  # for which asyncio, too, ends in good order

    def last_words(text):
        with contextlib.suppress(OSError):  # stderr may be what is full
            say(" ".join(text.split()))

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's `&` and nohup turn off
    signal.signal(signal.SIGTERM, terminate)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # a shell's `2>&-`
    try:
        sys.exit(main())
    except DataError as error:
        last_words(str(error))
        sys.exit(2)
    except Exception as error:
        if not of_disk_or_reader(error):
            traceback.clear_frames(error.__traceback__)  # a generator they hold would wait for its event loop
            raise
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        last_words(f"{error}; mend that (a full disk?): the same command goes on with what there is")
        sys.exit(2)
    except KeyboardInterrupt:
        again = "the same command" + " without --overwrite" * ("--overwrite" in sys.argv)
        last_words(f"stopped; {again} goes on with what there is")
        sys.exit(status)
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # its threads may abort a process that just ends


def of_disk_or_reader(error):
    """Whether an error, or what is behind it, is a full disk, a path that cannot be, a closed pipe."""
    if isinstance(error, OSError) and (error.filename or not error.errno):  # without errno: NumPy's
        return True
    while error:
        told = re.search(r"os error (\d+)", str(error))  # as safetensors tells it
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number in NOT_OURS:
            return True
        error = error.__context__
    return False


class Parser(argparse.ArgumentParser):
    """argparse with one-line usage errors, no abbreviations, and the script's docstring in --help."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    def __init__(self, doc, **more):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=self.Help, **more)

    def parse_args(self, args=None, namespace=None):
        try:
            "".join(sys.argv if args is None else args).encode()
        except UnicodeError as error:  # what could be written into no file
            self.error(f"an argument is not UTF-8 ({error}); rename what it names")
        found = super().parse_args(args, namespace)
        if getattr(found, "lang", None):
            found.lang = sorted(set(found.lang))
        return found

    def error(self, message):
        say(f"{self.prog}: {' '.join(message.split())}; {self.prog} --help explains every flag")
        sys.exit(2)

    def common_flags(self):
        self.add_argument("--seed", type=seed, default=13, help="seed of every random draw")
        self.add_argument("--limit", type=positive_int, metavar="N",
                          help="use only the first N queries of each language")
        self.add_argument("--lang", type=check_lang, nargs="+", metavar="CODE",
                          help="use only these languages (ISO 639-1 codes); default: all there are")
        self.add_argument("--overwrite", action="store_true",
                          help="redo a finished output, or replace a file that this script did not make")
        return self


def positive_int(text, least=1, most=10**9):
    if not text.isdecimal() or len(text) > 10 or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"got {text[:20]!r}, want a whole number from {least} to {most}")
    return int(text)


whole = functools.partial(positive_int, least=0)
seed = functools.partial(positive_int, least=0, most=2**32 - 1)  # what every library takes


def finite(text):
    """A number, of the command line or of JSON."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no number")
    return number


def positive_float(text):
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a number above 0")
    return float(text)


def share(text):
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a number from 0 to 1")
    return float(text)


def say(text):
    """A text on stderr, where none of a file or server steers the terminal."""
    print(CONTROL.sub(lambda found: ascii(found[0])[1:-1], text), file=sys.stderr, flush=True)


say_once = functools.cache(say)


def progress(iterable=None, **kwargs):
    """A tqdm bar on a terminal, a line every thirty seconds elsewhere, always on stderr."""
    from tqdm import tqdm
    if not sys.stderr.isatty():
        line = "{l_bar}{n_fmt}/{total_fmt} {rate_fmt} {elapsed}<{remaining}{postfix}\n"
        kwargs |= {"mininterval": 30, "delay": 30, "bar_format": line}
    return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, **kwargs)


def peak_mb():
    """The most memory this process has held; ru_maxrss alone may be that of the process that started it."""
    status = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if own:
        return int(own[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


# --------------------------------------------------------------------------- lines, records, corpus

def open_bytes(path):
    """Open a plain or gzipped file, to be read in bytes; DataError where it is missing."""
    path = Path(path)
    if not path.is_file():
        stage = MADE_BY.get(path.name.split(".")[0])
        raise DataError(f"{path} not found; " + (f"make it with {stage}" if stage else "check the path"))
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def read_lines(path):
    """Yield (line number from 1, bytes) of lines that are not blank."""
    with open_bytes(path) as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}:{number + 1}: cannot be read ({error}); fetch it again") from None


DECODER = json.JSONDecoder(parse_float=finite, parse_constant=finite)  # NaN is no JSON, and 1e999 no number


def decode(line, where):
    """The text of a line of bytes, without a byte-order mark and its line end."""
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeError as error:
        raise DataError(f"{where}: not valid UTF-8 ({error}); convert the file, or unpack it") from None


def parse_line(path, number, line):
    """One JSON object from one line; DataError with file and line otherwise."""
    where = f"{path}:{number}"
    try:
        record = DECODER.decode(decode(line, where))
        if b"\\u" in line:  # a lone surrogate could never be written again
            decode(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass"), where)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object ({error}); is the file half-written?") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}; want an object a line")
    return record


def read_qrels(path, queries=None):
    """{query_id: {docid: relevance}} of TREC's four columns or BEIR's three; queries: all that there are."""
    qrels = defaultdict(dict)
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        text = decode(line, where).strip()
        cells = [cell.strip() for cell in text.split("\t" if "\t" in text else None)]
        if len(cells) not in (3, 4):
            raise DataError(f"{where}: got {len(cells)} columns, want query_id (0) docid relevance; mend it")
        query_id, docid, relevance = cells[0], cells[-2], cells[-1]
        if not qrels and not re.search("[0-9]", relevance):
            continue  # a header
        if not re.fullmatch(r"-?[0-9]{1,9}(\.0*)?", relevance):
            raise DataError(f"{where}: relevance is {relevance[:20]!r}, want a whole number; mend the line")
        if queries is not None and query_id not in queries:
            raise DataError(f"{where}: query {query_id!r} is not among the queries; take files that belong")
        grade = int(relevance.partition(".")[0])
        if qrels[query_id].setdefault(docid, grade) != grade:
            raise DataError(f"{where}: query {query_id!r} judges docid {docid!r} twice; drop one")
    return qrels


def read_json(path, kind=dict):
    """The object (or list) that a JSON file holds, an empty one where there is no such file."""
    try:
        content = DECODER.decode(path.read_text("utf-8-sig")) if path.is_file() else kind()
        if not isinstance(content, kind):
            raise ValueError(f"a {type(content).__name__}, want a {kind.__name__}")
        return content
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON as wanted ({error}); fetch it again, or delete it and make it "
                        "with --overwrite") from None


def check_text(record, key, where, empty=False):
    """DataError unless record[key] is a string, which must not be blank unless `empty` allows it."""
    value = record.get(key)
    if not isinstance(value, str) or not (empty or value.strip()):
        got = f"is {json.dumps(value, ensure_ascii=False)[:40]}" if key in record else "is missing"
        raise DataError(f"{where}: {key!r} {got}; want a {'string' if empty else 'string that is not empty'}")


def check_passage(passage, where):
    """A passage is {docid, text} and mostly a title."""
    if not isinstance(passage, dict):
        raise DataError(f"{where}: a passage is {json.dumps(passage)[:40]}; want {{docid, title, text}}")
    check_text(passage, "docid", where)
    if passage["docid"].endswith("\0"):  # which arrays of docids would lose
        raise DataError(f"{where}: docid {passage['docid']!r} ends in NUL; rename it")
    where = f"{where}: passage {passage['docid']!r}"
    check_text(passage, "text", where, empty=bool(passage.get("title")))
    for key in ("title", "source"):
        check_text({key: ""} | passage, key, where, empty=True)


def check_lang(lang, where="--lang or --translate"):
    if not isinstance(lang, str) or not LANG.fullmatch(lang):
        raise DataError(f"{where}: 'lang' {str(lang)[:20]!r} cannot name a file; want a code such as sw")
    return lang


def check_query(record, where):
    """A training query in Tevatron's layout, whatever stages it has been through."""
    if "lang" not in record:
        raise DataError(f"{where}: no 'lang'; name the file's language with --lang CODE")
    for key in ("query_id", "lang", "query"):
        check_text(record, key, where)
    check_lang(record["lang"], where)
    for key in LISTS:
        passages = record.get(key, [])
        if not isinstance(passages, list):
            raise DataError(f"{where}: {key!r} is no list; want a list of passages")
        for passage in passages:
            check_passage(passage, f"{where}: {key}")
    if not record.get("positive_passages"):
        raise DataError(f"{where}: query {record['query_id']!r} has no positive_passages; drop it")


def parse_query(path, number, line, lang=None):
    """The checked record of one line; a single lang is that of plain Tevatron records, which say none."""
    record = parse_line(path, number, line)
    if len(lang or ()) == 1:
        record.setdefault("lang", lang[0])
    check_query(record, f"{path}:{number}")
    return record


def read_queries(path, lang=None, limit=None, need=(), judged=False):
    """Yield the records of a file of training queries.

    need lists further fields that must be there; judged: no candidates may be there that nobody has judged.
    """
    return (record for _, record in numbered_queries(path, lang, limit, need, judged))


def numbered_queries(path, lang=None, limit=None, need=(), judged=False):
    """Yield (line number, record) of these languages, `limit` of each; DataError at the first bad record."""
    texts = sqlite3.connect(":memory:", isolation_level=None)  # 40 bytes a docid, where a dict takes 150
    texts.execute("CREATE TABLE texts (docid INTEGER PRIMARY KEY, text INTEGER, number INTEGER)")
    seen = defaultdict(set)
    for number, line in read_lines(path):
        record = parse_query(path, number, line, lang)
        where = f"{path}:{number}"
        of_lang = record["lang"]
        if lang and of_lang not in lang or len(seen[of_lang]) == limit:
            continue
        if hash(record["query_id"]) in seen[of_lang]:
            raise DataError(f"{where}: query {record['query_id']!r} ({of_lang}) is there twice; drop one")
        seen[of_lang].add(hash(record["query_id"]))
        for key in sorted(set(need) - record.keys()):
            raise DataError(f"{where}: no {key!r}; run the stages before this one, see README")
        if judged and record.get("candidate_passages"):
            raise DataError(f"{where}: candidates that nobody has judged; run 02_filter_false_negatives.py")
        for passage in [passage for key in LISTS for passage in record.get(key, ())]:
            row = hash((of_lang, passage["docid"])), hash(text_key(passage)), number
            texts.execute("INSERT OR IGNORE INTO texts VALUES (?, ?, ?)", row)
            _, text, first = texts.execute("SELECT * FROM texts WHERE docid = ?", row[:1]).fetchone()
            if text != row[1]:
                raise DataError(f"{where}: docid {passage['docid']!r} has another text at {path}:{first}; "
                                "make new docids: 00_prepare_data.py --source tevatron --docids-from-texts")
        yield number, record
    if not seen:
        raise DataError(f"{path}: no queries in {' '.join(lang or ['it'])}; check the file and --lang")
    missing = set(lang or ()) - seen.keys()
    if missing:
        say_once(f"{path}: no queries in {' '.join(sorted(missing))}")


def dump(record):
    """The one way a record becomes a line."""
    return json.dumps(record, ensure_ascii=False, separators=(", ", ": ")) + "\n"


def passage_text(passage, join="\n"):
    """Title, line break, text (as MIRACL's baselines; leaving the title out costs points)."""
    return f"{passage['title']}{join}{passage['text']}" if passage.get("title") else passage["text"]


def normalise(text):
    """For comparing texts: NFKC, case-folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_key(passage):
    """What is equal for passages with one text; a document may be a title alone."""
    return normalise(passage["text"].strip() or passage["title"])


def batched(items, n):
    """Lists of n items (the last may be shorter)."""
    items = iter(items)
    while batch := list(itertools.islice(items, n)):
        yield batch


def corpus_files(data, lang):
    """A language's corpus files: corpus/<lang>.jsonl[.gz] or corpus/<lang>/*.jsonl[.gz], in name order."""
    root = Path(data) / "corpus"
    single = [path for path in (root / f"{lang}.jsonl", root / f"{lang}.jsonl.gz") if path.is_file()]
    parts = sorted(p for p in (root / lang).glob("*") if p.name.endswith((".jsonl", ".jsonl.gz")))
    if not single + parts:
        raise DataError(f"{root}/{lang}.jsonl not found; make it with 00_prepare_data.py, or change --lang")
    others = [path for path in (root / lang).glob("*.json*") if path not in parts]
    if len(single) + bool(parts) > 1 or others:
        names = " ".join(path.name for path in single + parts[:1] + others[:1])
        raise DataError(f"{root}: {names} for {lang}; want one CODE.jsonl[.gz], or one folder of such files")
    return single or parts


def corpus_languages(data):
    root = Path(data) / "corpus"
    if not root.is_dir():
        raise DataError(f"{root} not found; make it with 00_prepare_data.py")
    names = {p.name.split(".")[0] for p in root.iterdir() if p.is_dir() or ".jsonl" in p.suffixes}
    return sorted(filter(LANG.fullmatch, names))


def read_shards(data, lang):
    """Yield (path, [(line number, bytes)]) of at most SHARD passages each; a shard never spans two files."""
    for path in corpus_files(data, lang):
        for numbered_lines in batched(read_lines(path), SHARD):
            yield path, numbered_lines


def read_passages(path, numbered_lines):
    """Yield the checked passages of [(line number, bytes)]."""
    for number, line in numbered_lines:
        passage = parse_line(path, number, line)
        check_passage(passage, f"{path}:{number}")
        yield passage


def fetch_passages(data, lang, rows):
    """{row: passage} of these rows (from 0, over the language's files), in one pass that parses only them."""
    wanted = set(rows)
    found = {}
    lines = ((path, line) for path in corpus_files(data, lang) for line in read_lines(path))
    for row, (path, numbered_line) in enumerate(lines):
        if row in wanted:
            passage, = read_passages(path, [numbered_line])
            found[row] = {key: passage.get(key, "") for key in ("docid", "title", "text")}
    return found


# --------------------------------------------------------------------------- outputs

def beside(path, ending):
    return path.with_name(f".{path.name}.{ending}")


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path, wait=True):
    """Only one process at a time makes path: others wait here, or stop with one line.

    The kernel frees the lock of a process that died, and what it left of path is put right here.
    """
    name = beside(path, "lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(name, "a")  # it may be a link: nothing is emptied
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if not wait:
                raise DataError(f"{path}: another process makes it; start again when it has ended") from None
            say(f"{path}: another process makes it; waiting for its end")
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            say(f"{path}: it cannot be locked ({error}); start no second run on it")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(name.stat(), os.fstat(file.fileno())):
                break
        file.close()  # of one that has ended, and took its name away
    if beside(path, "old").exists() and not path.exists():  # killed between two renames
        beside(path, "old").rename(path)
    ours = re.compile(rf"\.{re.escape(path.name)}(\.meta\.json|\.partial)?\.(\d+\.tmp|old)")
    for left in path.parent.iterdir():
        if ours.fullmatch(left.name):  # not those of one that is called NAME.more
            remove(left)
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        file.close()


def to_disk(path):
    """Flush a file, or all of a folder: a power cut could leave the name without the content."""
    for part in [path, *(part for part in path.rglob("*") if not part.is_symlink())]:
        descriptor = os.open(part, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def atomic(path):
    """A temporary path, for a file or a folder, that replaces path when the block ends well, else goes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path, f"{os.getpid()}.tmp")
    try:
        yield temporary
        to_disk(temporary)
        if path.exists() and temporary.is_dir():
            path.rename(beside(path, "old"))
        temporary.rename(path)
    finally:
        remove(temporary)
    remove(beside(path, "old"))


@contextlib.contextmanager
def atomic_folder(path):
    with atomic(path) as temporary:
        temporary.mkdir()
        yield temporary


def digest_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def digest_folder(folder):
    """Digest of all files of a model folder that decide what it computes, whatever the folder is called."""
    kinds = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
    paths = [Path(top, name) for top, _, names in os.walk(folder, followlinks=True) for name in names]
    files = sorted(path for path in paths if path.suffix in kinds and path.name != "build.json")
    lines = [f"{p.relative_to(folder).as_posix()} {digest_file(p)}\n" for p in files]
    base = read_json(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    if base and Path(base).is_dir() and not Path(base).samefile(folder):
        lines.append(digest_folder(base))
    return hashlib.blake2b("".join(lines).encode()).hexdigest()[:32]


def short_name(model):
    """How a model is called in records and tables: the folder's name, or the hub id."""
    path = Path(os.path.abspath(model))  # a link is called as its user calls it
    if path.parent.name == "snapshots":  # of the hub's cache: models--ORG--NAME/snapshots/COMMIT
        return path.parents[1].name.rpartition("--")[2]
    return path.name if path.is_dir() else model


class Output:
    """A file or folder that a stage makes: written whole or not at all, with `<out>.meta.json` beside it.

    A finished output is recognised by that file: same arguments, same inputs and models ({name: digest}), its
    own digests. `parts` are patterns of a folder's files that are the stage's; without them all are.
    """
    # where things lie and how fast they are made does not change what is made
    NEUTRAL = {"out", "overwrite", "cache", "device", "concurrency", "base_url", "save_every", "input",
               "data", "root", "queries", "timeout", "max_unjudged", "price_in", "price_out", "dry_run",
               "tokenizer", "answer_tokens", "log_batches", "batch_export", "batch_import",
               "cascade_base_url", "judge_base_url"}

    def __init__(self, args, inputs, models=(), out=None, parts=()):
        path = Path(out or args.out)
        path = path.resolve() if path.name in ("", "..") else path
        self.meta_path = path.with_name(path.name + ".meta.json")
        self.path = path.resolve() if path.is_symlink() else path  # the link stays
        self.parts = parts
        self.overwrite = args.overwrite
        self.started = time.time()
        rank = os.environ.get("RANK")  # torchrun's other processes would wait for the first
        if rank in (None, "0"):
            held = contextlib.ExitStack()
            held.enter_context(lock(self.path, wait=rank is None))
            weakref.finalize(self, held.close)  # once the stage has ended, however
        place = self.path.resolve()
        for path in inputs:
            open_bytes(path).close()  # DataError where it is missing, with the stage that makes it
            if place in (Path(path).resolve(), *Path(path).resolve().parents):
                raise DataError(f"{self.path} is where the input lies ({path}); choose another --out")
        given = vars(args)
        models_named = {given.get("encoder"), *given.get("retrievers", ()), *given.get("models", ())}
        for model in models_named - {None, "", "bm25"}:
            if Path(model).is_dir() and Path(model).resolve() in (place, *place.parents):
                raise DataError(f"{self.path} lies in the model {model}, which would be another one then; "
                                "choose another --out")
        self.meta = {"script": Path(sys.argv[0]).name,
                     "arguments": {k: v for k, v in vars(args).items() if k not in self.NEUTRAL},
                     "inputs": [{"path": str(p), "digest": digest_file(p)} for p in inputs],
                     "models": dict(models)}

    def key(self, meta):
        """What must be equal for a finished output to be this one."""
        digests = re.findall('"digest": "([^"]*)"', json.dumps(meta.get("inputs")))
        given = {k: v for k, v in meta.get("arguments", {}).items() if k not in self.NEUTRAL}
        given.pop("encoder", None)  # its digest tells
        given["lang"] = sorted(set(given.get("lang") or ()))  # earlier versions wrote it as it came
        return json.dumps([given, digests, meta.get("models")], default=str, sort_keys=True)

    def digests(self, folder):
        """{name: digest} of the stage's files in a folder; a model's card may be edited."""
        paths = {path for part in self.parts or ["**/*"] for path in folder.glob(part) if path.is_file()}
        return {path.relative_to(folder).as_posix(): digest_file(path)
                for path in sorted(paths) if path.name != "README.md"}

    def is_done(self):
        """Whether the output is already there; DataError where it, or something in it, is somebody else's."""
        if not self.path.exists() or self.overwrite and self.path.is_file():
            return False
        is_folder = self.path.is_dir()
        if not (self.path.is_file() or is_folder):
            raise DataError(f"{self.path} is neither a file nor a folder; choose another --out")
        meta = read_json(self.meta_path)
        found = self.digests(self.path) if is_folder else {"": digest_file(self.path)}
        made = meta.get("files", {}) if is_folder else {"": meta.get("digest")}
        told_below = is_folder and not self.parts and not meta  # file by file
        if found and meta.get("script") != self.meta["script"] and not (self.overwrite or told_below):
            raise DataError(f"{self.path} exists and was not made by this script; pass --overwrite, "
                            "or another --out")
        untouched = made.items() <= found.items()
        if untouched and self.key(meta) == self.key(self.meta) and not self.overwrite:
            os.utime(self.path)  # newer than its inputs, for make
            say(f"{self.path} is up to date")
            return True
        others = min(found.keys() - made.keys(), default=None)
        if others and (made or not self.parts):  # an adapter of earlier versions has no list of its files
            raise DataError(f"{self.path} holds {others}, which this script did not make; move it away, or "
                            "take another --out")
        if not self.overwrite:
            why = "arguments, inputs or models changed" if untouched else "a file is missing or was changed"
            say(f"{self.path}: {why}, making it again")
        return False

    def write_lines(self, lines):
        """Write file and meta, then rename: a kill in between leaves the old file, which is made again."""
        if self.path.is_dir():
            raise DataError(f"{self.path} is a folder; name a file with --out")
        with atomic(self.path) as temporary:
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
            self.meta["digest"] = digest_file(temporary)
            self._write_meta({})

    def finish(self, folder=None, /, **counts):
        """Complete the meta file, for a folder before it gets its name, and print the closing line."""
        if folder:
            self.meta["files"] = self.digests(Path(folder))
            to_disk(Path(folder))  # takes long; a kill between meta file and rename has the folder refused
        self._write_meta(counts)
        told = [f"{k.replace('_', ' ')} {v}" for k, v in counts.items() if not isinstance(v, (dict, list))]
        told += [f"{self.meta['seconds']} s", f"peak {self.meta['peak_memory_mb']} MB"]
        say(f"{self.path}: {', '.join(told)}")

    def _write_meta(self, counts):
        packages = ("torch", "transformers", "sentence-transformers", "faiss-cpu", "openai", "numpy")
        versions = {package: version(package) for package in packages} | {"python": sys.version.split()[0]}
        self.meta |= {"counts": counts, "versions": versions, "seconds": round(time.time() - self.started, 1),
                      "peak_memory_mb": peak_mb()}
        with atomic(self.meta_path) as temporary:
            text = json.dumps(self.meta, ensure_ascii=False, indent=1, default=str)
            temporary.write_text(text + "\n", "utf-8")
