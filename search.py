"""Exact search with an ensemble of retrievers over a language's corpus: vectors, faiss, BM25, fusion.

Letters used for shapes: N queries, M passages of a shard, D width of a vector, K results a query.
"""
import functools
import hashlib
import json
import os
import unicodedata
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np

import encoder
from common import (DataError, atomic_folder, batched, corpus_files, finite, lock, passage_text, progress,
                    read_lines, read_passages, read_shards, short_name)

CPU = Path("/proc/cpuinfo")
if CPU.exists() and {"AuthenticAMD", "avx2"} <= set(CPU.read_text().split()):
    # before faiss is loaded: its OpenBLAS takes new ones for a processor of 2007, at a quarter of the speed
    os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")

RRF_K = 60         # Cormack et al. 2009
TIE = 2e-6         # of the largest score: of two products this close, faiss may rank the lower first
CONCAT = "concat"  # stands for the concatenation among the retrievers' names


def ensemble_flags(parser):
    """The flags that say what is searched and how: the same in 01 and 03."""
    parser.add_argument("--data", required=True, metavar="FOLDER", help="made by 00_prepare_data.py")
    parser.add_argument("--retrievers", nargs="+", required=True, metavar="MODEL_OR_bm25",
                        help="folders, hub ids, bm25; the paper: intfloat/multilingual-e5-large BAAI/bge-m3")
    parser.add_argument("--weights", nargs="+", type=finite, help="of each retriever in the fusion, else 1")
    parser.add_argument("--fusion", choices=["concat", "rrf"], default="concat",
                        help="concat: sum of cosines (Sec. 3.3); rrf: reciprocal ranks, needed with bm25")
    parser.add_argument("--bm25-tokenizer", metavar="MODEL",
                        help="its sub-words are BM25's terms; default: the first dense retriever's")
    parser.add_argument("--cache", default="cache", metavar="FOLDER", help="embeddings are kept here")
    encoder.encoder_flags(parser)


def from_flags(args):
    return Ensemble(args.retrievers, args.data, args.cache, args.fusion, args.weights, args.bm25_tokenizer,
                    **encoder.flags_given(args, args.retrievers))


# --------------------------------------------------------------------------- processes (torchrun)

def world():
    """(rank, number of processes) under torchrun, else (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(value):
    """[value of each process] in rank order, once all have come here; [value] without torchrun."""
    if world()[1] == 1:
        return [value]
    import torch.distributed as dist
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # one may encode long after another
    values = [None] * world()[1]
    dist.all_gather_object(values, value)
    return values


# --------------------------------------------------------------------------- exact search in one shard

def best(parts, k):
    """The k best of parts (scores, docids, rows), (N, m) each: by score, then by docid."""
    scores, docids, rows = (np.concatenate(arrays, axis=1) for arrays in zip(*parts))
    order = np.lexsort((docids, -scores))[:, :k]
    return [np.take_along_axis(array, order, axis=1) for array in (scores, docids, rows)]


def nearest(queries, block, docids, k, n_found=None):
    """(scores, docids, rows), (N, k) each: the best of a block for each query, by score, then by docid.

    faiss.knn breaks ties as it likes: where what it found ends in a tie with the k-th, more is looked for.
    Its scores change in their last bits with block and threads (1 in 100 at six decimals), those of single
    pairs do not.
    """
    import faiss
    k = min(k, len(block))
    n_found = min(n_found or k + 8, len(block))
    found, rows = faiss.knn(queries, block, n_found, metric=faiss.METRIC_INNER_PRODUCT)
    scores = np.empty_like(found)
    pointers = [faiss.swig_ptr(array) for array in (scores, queries, block, rows)]
    faiss.fvec_inner_products_by_idx(*pointers, queries.shape[1], *rows.shape)
    result = best([(scores.astype(np.float64).round(6), docids[rows], rows)], k)
    tied = np.flatnonzero(found[:, -1] > found[:, k - 1] - TIE * max(1, np.abs(found).max()))
    if len(tied) and n_found < len(block):
        for array, more in zip(result, nearest(queries[tied], block, docids, k, 4 * n_found)):
            array[tied] = more
    return result


# --------------------------------------------------------------------------- the ensemble

class Ensemble:
    """One or more retrievers over one language's corpus at a time (Sec. 3.3, V = E(f_1) o ... o E(f_z)).

    fusion concat: E is the L2-normalised embedding, so the score of the concatenation is the (weighted) sum
    of cosines. fusion rrf: reciprocal ranks, for BM25, whose scores have another scale. A single retriever
    scores as its maker does. Under torchrun every process makes the same calls and gets the whole result;
    they share the shards through the cache folder. No result depends on the number of processes.
    """

    def __init__(self, names, data, cache, fusion="concat", weights=None, bm25_tokenizer=None, **reading):
        self.names = [short_name(name) for name in names]
        self.concat = fusion == "concat" and len(names) > 1
        if "bm25" in names and self.concat:
            raise DataError("--retrievers: bm25 cannot be concatenated with embeddings; pass --fusion rrf")
        if weights and len(weights) != len(names):
            raise DataError(f"--weights: got {len(weights)} for {len(names)} retrievers; give one each")
        if len(set(self.names)) < len(names):
            raise DataError(f"--retrievers: two of {' '.join(names)} have the same name; rename a folder")
        self.data = data
        self.asked = []  # queries
        self.cache = Path(cache)
        self.weights = dict(zip(self.names, weights or [1.0] * len(names)))
        dense = [name for name in names if name != "bm25"]
        self.encoders = {short_name(name): encoder.Encoder(name, **reading) for name in dense}
        self.device = next((e.device for e in self.encoders.values()), "cpu")
        self.bm25 = BM25(self, bm25_tokenizer or next(iter(dense), None)) if "bm25" in names else None

    @functools.cache
    def shards(self, lang):
        """[(key, number of passages)] of a language; docids and vectors are in the cache when it returns.

        Each process makes what the cache has not of those whose turn it is.
        """
        rank, size = world()
        shards = []
        corpus = corpus_files(self.data, lang)
        total = len(self.encoders) * sum(1 for path in corpus for _ in read_lines(path))
        bar = progress(total=total, desc=f"encode {lang}", unit="passage", disable=rank > 0 or not total)
        for number, (path, lines) in enumerate(read_shards(self.data, lang)):
            key = hashlib.blake2b(b"".join(line for _, line in lines)).hexdigest()[:32]
            shards.append((key, len(lines)))
            if number % size == rank:
                self.make_shard(key, path, lines, bar)
            bar.update(len(self.encoders) * sum(n for _, n in shards) - bar.n)  # also what was there
        bar.close()
        if not shards:
            raise DataError(f"{corpus[0]}: no passages; make it again, or leave {lang} out with --lang")
        gather(None)  # until all are made
        self.check_docids(corpus, shards)
        return shards

    def docids(self, key, n):
        """(n,) docids of a shard, in bytes."""
        return np.array(encoder.load_rows(self.docids_file(key), n))

    def check_docids(self, corpus, shards):
        """DataError where two passages of a corpus have one docid."""
        hashes = [np.array([hash(docid) for docid in self.docids(*shard).tolist()]) for shard in shards]
        hashes = np.sort(np.concatenate(hashes))  # 8 bytes a passage
        twice = hashes[1:][hashes[1:] == hashes[:-1]]
        if len(twice):
            docid = next(docid for shard in shards for docid in self.docids(*shard).tolist()
                         if hash(docid) == twice[0])
            raise DataError(f"{' '.join(map(str, corpus))}: docid {docid.decode()!r} is there twice; drop or "
                            "rename one")

    def not_in_corpus(self, lang, docids):
        """Those of the docids that no passage of a language has."""
        found = (docid.decode() for shard in self.shards(lang) for docid in self.docids(*shard).tolist())
        return set(docids).difference(found)

    def n_passages(self, lang):
        return sum(n for _, n in self.shards(lang))

    def docids_file(self, key):
        return self.cache / "corpus" / f"{key}.npy"

    def vectors_file(self, name, key):
        return self.encoders[name].vectors_folder("passage", self.cache) / f"passage-{key}.npy"

    def make_shard(self, key, path, lines, bar):
        """Check a shard's passages; write docids and vectors where they are missing."""
        missing = [name for name in self.encoders if not self.vectors_file(name, key).is_file()]
        if not missing and self.docids_file(key).is_file():
            return
        passages = list(read_passages(path, lines))
        if not self.docids_file(key).is_file():
            docids = np.array([passage["docid"].encode() for passage in passages])
            encoder.save_rows(self.docids_file(key), docids)
        for name in missing:
            texts = [self.encoders[name].passage_text(passage) for passage in passages]
            self.encoders[name].encode_file(self.vectors_file(name, key), texts, "passage", bar)

    def encodings(self, queries):
        """{retriever: (settings, {kind: number of texts cut})} of {lang: queries} that have been searched."""
        keys = [key for lang in queries for key, _ in self.shards(lang)]
        asked = [list(dict.fromkeys(of_lang)) for of_lang in queries.values()]
        found = {}
        for name, e in self.encoders.items():
            files = {"query": [e.vectors_file(texts, "query", self.cache) for texts in asked],
                     "passage": [self.vectors_file(name, key) for key in keys]}
            e.n_read = {"query": sum(map(len, asked)), "passage": sum(map(self.n_passages, queries))}
            e.n_cut = {kind: sum(map(encoder.read_cut, paths)) for kind, paths in files.items()}
            found[name] = e.cached_settings(self.cache), e.n_cut
        return found

    def compared(self, vectors, kind):
        """float32 of {retriever: (N, D)}; with fusion concat as unit vectors, and under CONCAT joined."""
        vectors = {name: v.astype(np.float32) for name, v in vectors.items()}
        if self.concat:
            for name, v in vectors.items():
                vectors[name] = v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12)
            weights = self.weights if kind == "query" else dict.fromkeys(self.names, 1.0)
            weighted = [np.float32(weights[name]) * v for name, v in vectors.items()]
            vectors[CONCAT] = np.concatenate(weighted, axis=1)
        return vectors

    def ask(self, queries):
        """All queries of a language, encoded in one file: searches that follow may take some at a time."""
        self.asked = list(dict.fromkeys(queries))

    def encode(self, items, kind):
        """{retriever: (N, D)} of queries or passages as they are compared."""
        if kind == "query" and not set(items) <= set(self.asked):
            self.ask(items)
        vectors = {}
        for name, e in self.encoders.items():
            texts = items if kind == "query" else [e.passage_text(passage) for passage in items]
            different = self.asked if kind == "query" else list(dict.fromkeys(texts))
            if world()[0] == 0:
                e.encode_cached(different, kind, self.cache)
            gather(None)  # the others wait for it
            place = {text: row for row, text in enumerate(different)}
            vectors[name] = e.encode_cached(different, kind, self.cache)[[place[text] for text in texts]]
        return self.compared(vectors, kind)

    def similarity(self, queries, passages):
        """(N,) scores of queries[i] with passages[i], {title, text} of any origin, on the scale of search."""
        name = CONCAT if self.concat else self.names[0]
        scores = (self.encode(queries, "query")[name] * self.encode(passages, "passage")[name]).sum(1)
        return scores.astype(np.float64).round(6)

    def search(self, lang, queries, depth):
        """(hits, ranks) by query: [(docid, row, score)], best first, and {retriever: {docid: rank}}."""
        lists = self.rank(lang, queries, 2 * depth if len(self.names) > 1 else depth)
        hits = [self.fuse(dict(zip(lists, found)))[:depth] for found in zip(*lists.values())]
        ranks = [{name: {docid: rank for rank, (docid, _, _) in enumerate(lists[name][q], 1)}
                  for name in self.names} for q in range(len(queries))]
        return hits, ranks

    def rank(self, lang, queries, k):
        """{retriever: [(docid, row, score)] of a query}, the top k; under CONCAT the concatenation's."""
        lists = self.dense(lang, queries, k)
        if self.bm25:
            lists["bm25"] = self.bm25.search(lang, queries, k)
        return lists

    def dense(self, lang, queries, k):
        """The same of the encoders, in one pass over the shards: memory holds one, whatever their number."""
        rank, size = world()
        queries = self.encode(queries, "query")
        first_row = np.cumsum([0] + [n for _, n in self.shards(lang)])
        found = {name: [] for name in queries}
        for number, (key, n) in list(enumerate(self.shards(lang)))[rank::size]:
            block = {name: encoder.load_rows(self.vectors_file(name, key), n) for name in self.encoders}
            docids = self.docids(key, n)
            for name, passages in self.compared(block, "passage").items():
                scores, near, rows = nearest(queries[name], passages, docids, k)
                found[name] = [best([*found[name], (scores, near, rows + first_row[number])], k)]
        for name in found:
            parts = [part for of_process in gather(found[name]) for part in of_process]
            columns = zip(*(array.tolist() for array in best(parts, k)))
            found[name] = [[(docid.decode(), row, score) for score, docid, row in zip(*of)] for of in columns]
        return found

    def fuse(self, lists):
        """The hits of one query, best first, of {retriever: [(docid, row, score)]}."""
        if self.concat or len(self.names) == 1:
            return lists[CONCAT if self.concat else self.names[0]]
        scores = Counter()  # reciprocal rank fusion
        for name, found in lists.items():
            for rank, (docid, row, _) in enumerate(found, 1):
                scores[docid, row] += self.weights[name] / (RRF_K + rank)
        fused = [(docid, row, round(score, 6)) for (docid, row), score in scores.items()]
        return sorted(fused, key=lambda hit: (-hit[2], hit[0].encode()))


def candidate(passage, score, ranks):
    """The passage with its score, and its rank by each retriever that found it."""
    docid = passage["docid"]
    return passage | {"score": score, "ranks": {name: of[docid] for name, of in ranks.items() if docid in of}}


# --------------------------------------------------------------------------- BM25

UNSPACED = r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\u30fc]"
RUN = rf"(?:{UNSPACED}\p{{M}}*)+|(?:(?!{UNSPACED}).\p{{M}}*)+"  # of letters written with spaces, or without


def words_of(text):
    """Terms where no tokenizer is at hand: words cut to 5 letters, letter bigrams of scripts without spaces.

    A letter keeps its marks: vowel signs and tones tell words apart. Joiners after a mark (a virama) and the
    dot that small Turkish i is left with are not seen; other non-joiners end a word, as in Persian.
    """
    import regex
    text = regex.sub("\u200d|(?<=\\p{M})\u200c", "", text).replace("i\u0307", "i")
    terms = []
    words = regex.findall(r"[\p{L}\p{M}\p{N}]+", text)
    for run in [run for word in words for run in regex.findall(RUN, word)]:
        letters = regex.findall(r".\p{M}*", run)
        if regex.match(UNSPACED, run):
            terms += ["".join(letters[i:i + 2]) for i in range(max(1, len(letters) - 1))]
        else:
            terms.append("".join(letters[:5]))
    return terms


class BM25:
    """BM25 (bm25s, Lucene's formula) over sub-words; passages without a term of the query are left out.

    The index of a language is kept in the cache, memory-mapped, under a digest of tokenizer and shards.
    """

    def __init__(self, ensemble, tokenizer=None):
        self.ensemble = ensemble
        self.tokenizer = tokenizer and encoder.load_tokenizer(tokenizer)
        # as of GPT-2, Qwen, ModernBERT
        self.of_bytes = tokenizer and "ByteLevel" in repr(self.tokenizer.backend_tokenizer.pre_tokenizer)
        self.words = {}  # {number: sub-word} of those with a letter, mark or digit, or a byte of one
        special = self.tokenizer.all_special_ids if tokenizer else ()
        for i in range(len(self.tokenizer or ())):
            word = self.tokenizer.convert_ids_to_tokens(i) or ""
            shown = self.tokenizer.decode([i]) if self.of_bytes else word
            letter = "\ufffd" in shown or any(unicodedata.category(c)[0] in "LMN" for c in shown)
            if i not in special and letter:
                self.words[i] = word

    def terms(self, texts):
        """The terms of each text: its sub-words without punctuation, and what the tokenizer does not know."""
        texts = [unicodedata.normalize("NFKC", text).casefold() for text in texts]
        if self.tokenizer is None:
            return [words_of(text) for text in texts]
        if self.of_bytes:  # which have a word twice: behind a blank, and at the beginning of a line
            texts = [" " + " ".join(text.split()) for text in texts]
        rows = []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text, ids, spans in zip(texts, encoded["input_ids"], encoded["offset_mapping"]):
            rows.append([])
            for i, (start, end) in zip(ids, spans):
                unknown = words_of(text[start:end]) if i == self.tokenizer.unk_token_id else []
                rows[-1] += [self.words[i]] if i in self.words else unknown
        return rows

    @functools.lru_cache(maxsize=1)
    def index(self, lang):
        """(bm25s index, (M,) docids) of a language, made by the first process where the cache has none."""
        import bm25s
        shards = self.ensemble.shards(lang)
        rule = self.tokenizer.backend_tokenizer.to_str() if self.tokenizer else UNSPACED
        state = json.dumps([rule, list(self.words), shards])
        folder = self.ensemble.cache / "bm25" / hashlib.blake2b(state.encode()).hexdigest()[:32]
        if world()[0] == 0:
            with lock(folder):
                if not folder.is_dir():
                    self.make_index(lang, folder)
        gather(None)  # the others wait for it
        docids = np.concatenate([self.ensemble.docids(*shard) for shard in shards])
        with encoder.usable(folder, "no BM25 index to be used", "delete it to have it made again"):
            return bm25s.BM25.load(folder, mmap=True), docids

    def make_index(self, lang, folder):
        import bm25s
        ids = []
        vocabulary = {}
        for path, lines in read_shards(self.ensemble.data, lang):
            for passages in batched(read_passages(path, lines), 1024):
                for terms in self.terms([passage_text(passage) for passage in passages]):
                    numbers = [vocabulary.setdefault(term, len(vocabulary)) for term in terms]
                    ids.append(np.array(numbers, np.int32))  # not terms: a third of the memory
        if not vocabulary:
            raise DataError(f"{self.ensemble.data}/corpus/{lang}: no passage has a word; leave bm25 out")
        index = bm25s.BM25(method="lucene")
        index.index((ids, vocabulary), show_progress=False)
        with atomic_folder(folder) as temporary:
            index.save(temporary, show_progress=False)

    def search(self, lang, queries, depth):
        """For each query [(docid, row, score)], best first; each process takes its share of the queries."""
        rank, size = world()
        index, docids = self.index(lang)
        found = []
        for terms in self.terms(queries[rank::size]):
            scores = index.get_scores_from_ids(index.get_tokens_ids(terms)).astype(np.float64).round(6)
            cut = np.partition(scores, -depth)[-depth] if depth < len(scores) else 0
            rows = np.flatnonzero((scores >= cut) & (scores > 0))
            rows = rows[np.lexsort((docids[rows], -scores[rows]))[:depth]]
            found.append([(docids[row].decode(), int(row), float(scores[row])) for row in rows])
        shares = gather(found)
        return [shares[q % size][q // size] for q in range(len(queries))]
