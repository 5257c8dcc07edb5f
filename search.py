"""Exact search with an ensemble of retrievers over one language's corpus: vectors on disk, BM25, fusion (01, 03, 06).

Letters used for shapes: N queries, M passages, D width of an embedding, K results a query.
"""
import contextlib
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import common
from common import (DataError, atomic, atomic_folder, batched, corpus_files, digest_file, open_text, parse_line,
                    passage_text, progress, read_lines, read_passages)
from encoder import Encoder, Stored, load_tokenizer, model_folder, pick_device


def scan_corpus(path, cache):
    """The shards of a corpus file: [{key, line, offset, size, passages}]; every line is checked, docids go to the cache.

    key is the digest of the shard's lines; line (from 1), offset and size (bytes, of the unpacked file) say where it is. A
    file that was scanned before, by its digest, is not read again.
    """
    import numpy as np
    known = Path(cache) / "corpus" / f"{digest_file(path)}-{common.SHARD}.json"
    if known.is_file():
        shards = json.loads(known.read_text("utf-8"))
        if all((known.parent / f"{shard['key']}.npy").is_file() for shard in shards):
            return shards
    shards, lines, start, end, first = [], [], 0, 0, 1

    def close():
        key = hashlib.blake2b(b"".join(line for _, line in lines)).hexdigest()[:32]
        docids = np.array([passage["docid"].encode() for passage in read_passages(path, lines)])
        Stored(known.parent / f"{key}.npy", len(lines)).save(docids)
        shards.append({"key": key, "line": first, "offset": start, "size": end - start, "passages": len(lines)})
        lines.clear()

    for number, line in read_lines(path, blank=True):
        end += len(line)
        if line.strip():
            lines.append((number, line))
        if len(lines) == common.SHARD:
            close()
            start, first = end, number + 1
    if lines:
        close()
    with atomic(known) as temporary:
        temporary.write_text(json.dumps(shards), "utf-8")
    return shards


def read_shard(path, shard, file):
    """The checked passages of one shard; file is path opened by open_text, which seeks forward even in a gzip."""
    file.seek(shard["offset"])
    lines = enumerate(file.read(shard["size"]).split(b"\n"), shard["line"])
    return read_passages(path, ((number, line) for number, line in lines if line.strip()))


def check_docids(data, lang, docids, cache):
    """DataError where a docid is twice in a language's corpus; 8 bytes a passage, once for each state of the corpus."""
    import numpy as np
    if not docids:
        raise DataError(f"{corpus_files(data, lang)[0]}: no passages; make it again, or leave {lang} out with --lang")
    checked = Path(cache) / "corpus" / (hashlib.blake2b("".join(d.path.name for d in docids).encode()).hexdigest()[:32] + ".unique")
    if checked.is_file():
        return
    factors = np.random.default_rng(0).integers(1 << 63, size=4096, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def hashes(shard):  # (m,) a sum of byte x random factor: independent of the width a shard pads its docids to
        ids = np.ascontiguousarray(shard.load())
        return (ids.view(np.uint8).reshape(len(ids), -1) * factors[:ids.itemsize]).sum(1, dtype=np.uint64)

    every = np.empty(sum(map(len, docids)), np.uint64)
    at = 0
    for shard in docids:
        every[at:at + len(shard)] = hashes(shard)
        at += len(shard)
    every.sort()
    twice = np.unique(every[1:][every[1:] == every[:-1]])
    if len(twice):
        seen = Counter(d for shard in docids for d in shard.load()[np.isin(hashes(shard), twice)])
        twice = {d.decode() for d, n in seen.items() if n > 1}
    if len(twice):  # not just a collision of hashes
        first = {}
        for path in corpus_files(data, lang):
            for number, line in read_lines(path):
                docid = parse_line(path, number, line)["docid"]
                if docid in first:
                    raise DataError(f"{path}:{number}: docid {docid!r} is there twice, first in {first[docid]}; "
                                    f"docids must be unique in a language: drop or rename one")
                if docid in twice:
                    first[docid] = f"{path}:{number}"
    checked.touch()


# --------------------------------------------------------------------------- search

EPSILON = 2e-5        # above any rounding error of a float32 product of unit vectors
RRF_K = 60            # Cormack et al. 2009
QUERY_BLOCK = 256     # queries compared with a shard at a time; bounds memory, does not change results
PAIR_BLOCK = 4096     # pairs rescored at a time, likewise


def world():
    """(rank, number of processes) under torchrun, else (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(value):
    """[value of each process] in rank order, once all have come here; [value] without torchrun."""
    if world()[1] == 1:
        return [value]
    from datetime import timedelta

    import torch.distributed as dist
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # one process may encode long after another
    values = [None] * world()[1]
    dist.all_gather_object(values, value)
    return values


def together(work):
    """work() in every process; a DataError of one ends all of them, told once."""
    message = None
    try:
        result = work()
    except DataError as error:
        message = str(error)
    if failed := [m for m in gather(message) if m]:
        if world()[0] == 0:
            raise DataError(failed[0])
        sys.exit(2)
    return result


def subwords(text):
    """Terms for BM25 where no tokenizer is at hand: words cut to 5 letters, and bigrams of scripts without spaces."""
    terms = []
    for word in re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()):
        if re.search("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]", word):
            terms += [word[i:i + 2] for i in range(max(1, len(word) - 1))]
        else:
            terms.append(word[:5])
    return terms


class Best:
    """The best `depth` passages of each of N queries, by score at six decimals (as it is written), ties by docid.

    offer() takes float32 scores of a block, rescores in float64 from the stored fp16 vectors what could be among the best,
    and keeps that. A product of two fp16 numbers is a multiple of 2^-48, so for unit vectors these sums are exact: neither
    the order of adding nor the block can change a bit of them.
    """

    def __init__(self, weights, n_queries, depth, below=None):
        import numpy as np
        self.weights, self.depth = weights, depth
        self.floor = np.full(n_queries, -np.inf)  # what a passage must reach to be among the best so far
        self.ceiling = np.full(n_queries, np.inf) if below is None else np.asarray(below, np.float64)
        self.parts = [[np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, "S1"), np.empty((0, len(weights)))]]
        self.n_pending = 0

    def offer(self, at, cosines, slack, vectors, block, first_row, docids):
        """Look at one block: cosines {retriever: (n, m) tensor} of queries at.. with the passages first_row.. of a shard."""
        import numpy as np
        import torch
        scores = sum(w * cosines[n] for n, w in self.weights.items())                          # (n, m)
        slack = sum(abs(w) * slack[n] for n, w in self.weights.items()) + 1e-6
        there = slice(at, at + len(scores))
        floor = torch.from_numpy(self.floor[there]).to(scores)[:, None]
        ceiling = torch.from_numpy(self.ceiling[there]).to(scores)[:, None]
        if scores.shape[1] >= self.depth and torch.isinf(floor).any():
            sure = scores.masked_fill(scores >= ceiling - slack, -torch.inf)
            floor = torch.maximum(floor, sure.topk(self.depth).values[:, -1:])
        query, passage = torch.nonzero((scores >= floor - slack) & (scores < ceiling + slack), as_tuple=True)
        query, passage = query.cpu().numpy() + at, passage.cpu().numpy()
        parts = np.stack([dot(vectors[n], query, block[n], passage) for n in self.weights], axis=1)  # (pairs, retrievers)
        score = np.round(sum(w * parts[:, i] for i, w in enumerate(self.weights.values())), 6)
        good = score < self.ceiling[query]
        self.parts.append([query[good], passage[good] + first_row, score[good], docids[passage[good]], parts[good]])
        self.n_pending += int(good.sum())
        if self.n_pending > len(self.floor) * self.depth:
            self.cut()

    def cut(self):
        """Keep the best of what was offered; returns (query, row, score, docid, parts), arrays by query, best first."""
        import numpy as np
        query, row, score, docid, parts = (np.concatenate(column) for column in zip(*self.parts))
        order = np.lexsort((docid, -score, query))
        query, row, score, docid, parts = (column[order] for column in (query, row, score, docid, parts))
        place = np.arange(len(query)) - np.searchsorted(query, np.arange(len(self.floor)))[query]
        last, kept = place == self.depth - 1, place < self.depth
        self.floor[query[last]] = score[last]
        self.parts, self.n_pending = [[column[kept] for column in (query, row, score, docid, parts)]], 0
        return self.parts[0]


def dot(vectors, rows, block, passages):
    """(pairs,) float64 inner products of vectors[rows[i]] and block[passages[i]], both fp16."""
    import numpy as np
    out = np.empty(len(rows))
    for at in range(0, len(rows), PAIR_BLOCK):
        here = slice(at, at + PAIR_BLOCK)
        out[here] = np.einsum("cd,cd->c", vectors[rows[here]].astype(np.float64), block[passages[here]].astype(np.float64))
    return out


def unit(vectors):
    """fp16 vectors brought to length 1."""
    import numpy as np
    wide = np.asarray(vectors, np.float32)
    return (wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)).astype(np.float16)


class Ensemble:
    """One or more retrievers over one language's corpus at a time (Sec. 3.3, V = E(f_1) o ... o E(f_z)).

    fusion concat: E is the L2-normalised embedding, optionally weighted, so the score of the concatenation is the weighted
    sum of the cosines. fusion rrf: reciprocal rank fusion, which BM25 needs since its scores have another scale.
    A single retriever scores as its maker's settings say: the inner product, of unit vectors or not.
    Under torchrun every process makes the same calls; they share the shards through the cache folder (one file system for
    all nodes) and each gets the whole result. Results do not depend on shards, blocks or processes.
    """

    def __init__(self, names, data, cache, fusion="concat", weights=None, device="auto", bm25_tokenizer=None,
                 query_max_len=64, passage_max_len=256, settings=()):
        if "bm25" in names and fusion == "concat" and len(names) > 1:
            raise DataError("--retrievers: bm25 cannot be concatenated with embeddings; pass --fusion rrf")
        if weights and len(weights) != len(names):
            raise DataError(f"--weights: got {len(weights)} for {len(names)} retrievers; give one each")
        self.data, self.cache, self.fusion = data, Path(cache), fusion
        self.weights = list(weights or [1.0] * len(names))
        self.device = pick_device(device)
        if self.device == "cuda":
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        encoders = {n: Encoder(n, self.device, query_max_len, passage_max_len, settings) for n in names if n != "bm25"}
        self.names = [n if n == "bm25" else encoders[n].name for n in names]
        if len(set(self.names)) < len(names):
            raise DataError(f"--retrievers: two of {' '.join(names)} have the same name; rename a folder")
        self.encoders = {e.name: e for e in encoders.values()}
        for of in {text.partition("=")[0].rpartition(":")[0] for text in settings or ()} - {"", *self.encoders}:
            raise DataError(f"--settings: {of!r} is not a dense retriever here; want one of {', '.join(self.encoders) or 'none'}")
        # the concatenation is of unit vectors; a retriever on its own, or beside others in rrf, scores as its maker does
        self.to_unit = {n: fusion == "concat" and len(names) > 1 and not e.normalise for n, e in self.encoders.items()}
        self.bm25 = BM25(self, bm25_tokenizer) if "bm25" in names else None
        self._index, self._vectors = (None, None), ([], {})

    def index(self, lang):
        """({retriever: [Stored (m, D) of each shard]}, [Stored (m,) docids of each shard]); encodes what is not cached."""
        if self._index[0] != lang:
            rank, size = world()
            paths = corpus_files(self.data, lang)
            together(lambda: [scan_corpus(path, self.cache) for path in paths[rank::size]])
            self._index = (lang, together(lambda: self._make_index(lang, paths)))
        return self._index[1]

    def _make_index(self, lang, paths):
        rank, size = world()
        shards = [(path, shard) for path in paths for shard in scan_corpus(path, self.cache)]
        docids = [Stored(self.cache / "corpus" / f"{shard['key']}.npy", shard["passages"]) for _, shard in shards]
        if rank == 0:
            check_docids(self.data, lang, docids, self.cache)
        vectors = {n: [e.stored("passage", shard["key"], shard["passages"], self.cache) for _, shard in shards]
                   for n, e in self.encoders.items()}
        todo = [s for s in range(rank, len(shards), size) if any(not vectors[n][s].path.is_file() for n in vectors)]
        self._encode([(*shards[s], {n: vectors[n][s] for n in vectors}) for s in todo], lang)
        return vectors, docids

    def _encode(self, todo, lang):
        """Encode the shards todo, [(path, shard, {retriever: Stored})] in corpus order, reading each file once."""
        import numpy as np
        with contextlib.ExitStack() as stack:
            opened, file = None, None
            for path, shard, stored in progress(todo, desc=f"encode {lang}", unit="shard", disable=world()[0] > 0):
                if path != opened:
                    stack.close()
                    opened, file = path, stack.enter_context(open_text(path))
                passages = list(read_shard(path, shard, file))
                for name, target in stored.items():
                    if not target.path.is_file():
                        encoder = self.encoders[name]
                        target.save(encoder.encode([encoder.passage_text(p) for p in passages], "passage").astype(np.float16))

    def _queries(self, queries):
        """{retriever: (N, D) fp16 vectors}; those of the last call with all these queries are still at hand."""
        import numpy as np
        known, vectors = self._vectors
        places = {query: i for i, query in enumerate(known)}
        if not all(q in places for q in queries):
            known = list(dict.fromkeys(queries))  # each once, so that the key in the cache is that of any call with these queries
            together(lambda: [e.encode_cached(known, "query", self.cache) for e in self.encoders.values()
                              if world()[0] == 0])  # the others find them in the cache
            vectors = {n: np.array(e.encode_cached(known, "query", self.cache)) for n, e in self.encoders.items()}
            vectors = {n: unit(v) if self.to_unit[n] else v for n, v in vectors.items()}
            self._vectors, places = (known, vectors), {query: i for i, query in enumerate(known)}
        return {n: v[[places[q] for q in queries]] for n, v in vectors.items()}

    def _block(self, name, stored):
        """(m, D) fp16 vectors of a shard, as this fusion compares them."""
        return unit(stored.load()) if self.to_unit[name] else stored.load()

    def search(self, lang, queries, depth, below=None):
        """(hits, rankings): for each query its best passages, and {retriever: [docid] of its own top 2 x depth} of each.

        hits are lists of at most depth {docid, row, score, scores, ranks}, best first, with scores and ranks by retriever; a
        rank is there where the retriever has the passage in its own top 2 x depth. below: (N,) only passages scoring less.
        """
        pool, alone, everything = 2 * depth, len(self.names) == 1, {}
        for name in self.encoders:
            everything[name] = ({name: 1.0}, pool, None)
        if self.encoders and (below is not None or (not alone and self.fusion == "concat")):
            everything[None] = (dict(zip(self.names, self.weights)) if not alone else {self.names[0]: 1.0}, depth, below)
        lists = self._dense(lang, queries, everything)
        if self.bm25:
            lists["bm25"] = self.bm25.search(lang, queries, pool)
        own = {n: lists[n] for n in self.names}
        fused = lists.get(None) or ([of_query[:depth] for of_query in own[self.names[0]]] if alone else
                                    [self._rrf([own[n][q] for n in self.names], depth) for q in range(len(queries))])
        hits = []
        for q, of_query in enumerate(fused):
            places = {n: {row: (rank, score) for rank, (row, _, score, _) in enumerate(own[n][q], 1)} for n in self.names}
            hits.append([{"docid": docid, "row": row, "score": score,
                          "scores": parts or {n: places[n][row][1] for n in self.names if row in places[n]},
                          "ranks": {n: places[n][row][0] for n in self.names if row in places[n]}}
                         for row, docid, score, parts in of_query])
        return hits, {n: [[docid for _, docid, _, _ in of_query] for of_query in own[n]] for n in self.names}

    def _dense(self, lang, queries, lists):
        """{key: for each query [(row, docid, score, {retriever: score})]} of lists {key: (weights, depth, below)}.

        Exact, in one pass over this process's shards: the products of a block serve every list. Memory: one block of
        (QUERY_BLOCK, common.SHARD) a retriever and depth passages a query, whatever the corpus.
        """
        import numpy as np
        import torch
        if not lists:
            return {}
        (shards, docids), (rank, size) = self.index(lang), world()
        vectors = self._queries(queries)
        best = {key: Best(weights, len(queries), depth, below) for key, (weights, depth, below) in lists.items()}
        longest = {n: float(np.linalg.norm(v.astype(np.float32), axis=1).max()) for n, v in vectors.items()}
        first_row = np.cumsum([0, *map(len, docids)])
        with torch.inference_mode():
            asked = {n: torch.from_numpy(v).to(self.device).float() for n, v in vectors.items()}   # (N, D)
            for s in range(rank, len(docids), size):
                block, ids = {n: self._block(n, shards[n][s]) for n in shards}, docids[s].load()   # (m, D), (m,)
                wide = {n: torch.from_numpy(np.array(b)).to(self.device).float() for n, b in block.items()}
                slack = {n: EPSILON * max(1, longest[n] * float(w.norm(dim=1).max())) for n, w in wide.items()}
                for at in range(0, len(queries), QUERY_BLOCK):
                    cosines = {n: q[at:at + QUERY_BLOCK] @ wide[n].T for n, q in asked.items()}     # (n, m)
                    for of_key in best.values():
                        of_key.offer(at, cosines, slack, vectors, block, first_row[s], ids)
        results = {}
        for key, of_key in best.items():
            of_key.parts = gather(of_key.cut())
            query, row, score, docid, parts = of_key.cut()
            names = list(of_key.weights)
            results[key] = [[] for _ in queries]
            for q, r, s, d, p in zip(query.tolist(), row.tolist(), score.tolist(), docid.tolist(), np.round(parts, 6).tolist()):
                results[key][q].append((r, d.decode(), s, dict(zip(names, p)) if key is None else None))
        return results

    def _rrf(self, rankings, depth):
        """Reciprocal rank fusion: sum of weight / (RRF_K + rank); ties by docid."""
        fused, names = Counter(), {}
        for weight, ranking in zip(self.weights, rankings):
            for rank, (row, docid, _, _) in enumerate(ranking, 1):
                fused[row] += weight / (RRF_K + rank)
                names[row] = docid
        best = sorted(((row, names[row], round(score, 6)) for row, score in fused.items()), key=lambda h: (-h[2], h[1].encode()))
        return [(*hit, None) for hit in best[:depth]]

    def scores_of(self, lang, queries, docids):
        """(N,) score of queries[i] with the passage docids[i], on the scale of `search`; NaN where the corpus has it not."""
        import numpy as np
        (shards, stored), (rank, size) = self.index(lang), world()
        vectors = self._queries(queries)
        wanted = np.array([d.encode() for d in docids])
        names, group = np.unique(wanted, return_inverse=True)
        scores = np.full(len(queries), np.nan)
        for s in range(rank, len(stored), size):
            ids = stored[s].load()
            place = np.minimum(np.searchsorted(names, ids), len(names) - 1)
            where = np.full(len(names), -1)
            where[place[names[place] == ids]] = np.flatnonzero(names[place] == ids)
            here = np.flatnonzero(where[group] >= 0)
            if len(here):
                scores[here] = self._weighted({n: dot(vectors[n], here, self._block(n, shards[n][s]), where[group][here])
                                               for n in shards})
        return np.fmax.reduce(gather(scores))

    def similarity(self, queries, passages):
        """(N,) score of queries[i] with passages[i], {title, text} of any origin, on the scale of `search`."""
        import numpy as np
        vectors, every = self._queries(queries), np.arange(len(queries))
        together(lambda: [e.encode_cached([e.passage_text(p) for p in passages], "passage", self.cache)
                          for e in self.encoders.values() if world()[0] == 0])
        passages = {n: e.encode_cached([e.passage_text(p) for p in passages], "passage", self.cache)
                    for n, e in self.encoders.items()}
        return self._weighted({n: dot(vectors[n], every, unit(p) if self.to_unit[n] else p, every) for n, p in passages.items()})

    def _weighted(self, parts):
        import numpy as np
        weights = self.weights if len(self.names) > 1 else [1.0]
        return np.round(sum(w * parts[n] for w, n in zip(weights, self.names)), 6)


class BM25:
    """BM25 (bm25s, Lucene's formula) over sub-word terms of an ensemble's corpus; passages without a term are left out.

    The index of a language is kept in the cache, memory-mapped, under a digest of tokenizer and corpus.
    """

    def __init__(self, ensemble, tokenizer=None):
        self.ensemble, self.tokenizer, self._index = ensemble, None, (None, None)
        if tokenizer:
            self.tokenizer = load_tokenizer(model_folder(tokenizer))
        elif ensemble.encoders:
            self.tokenizer = next(iter(ensemble.encoders.values())).tokenizer
        self.kept, self.name = None, "subwords"
        if self.tokenizer is not None:
            import numpy as np
            words = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
            special = set(self.tokenizer.all_special_ids)
            self.kept = np.array([i not in special and any(c.isalnum() for c in w or "") for i, w in enumerate(words)])
            state = self.tokenizer.backend_tokenizer.to_str() if hasattr(self.tokenizer, "backend_tokenizer") else repr(words)
            self.name = hashlib.blake2b(state.encode()).hexdigest()[:24]

    def terms(self, texts, vocabulary):
        """The term numbers of each text, an int32 array each; vocabulary {term: number} grows where there is no tokenizer."""
        import numpy as np
        if self.tokenizer is None:
            return [np.array([vocabulary.setdefault(t, len(vocabulary)) for t in subwords(text)], np.int32) for text in texts]
        texts = [unicodedata.normalize("NFKC", text).casefold() for text in texts]
        ids = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        return [row[self.kept[row]] for row in (np.array(i, np.int32) for i in ids)]

    def index(self, lang):
        """(bm25s index, vocabulary) of a language, made by the first process where the cache has none."""
        if self._index[0] == lang:
            return self._index[1]
        import bm25s
        docids = self.ensemble.index(lang)[1]
        key = hashlib.blake2b(json.dumps([self.name, [d.path.name for d in docids]]).encode()).hexdigest()[:32]
        folder = self.ensemble.cache / "bm25" / key
        together(lambda: None if world()[0] or folder.is_dir() else self._make(lang, folder))
        vocabulary = json.loads((folder / "terms.json").read_text("utf-8"))
        self._index = (lang, (bm25s.BM25.load(folder, mmap=True, load_vocab=False), vocabulary))
        return self._index[1]

    def _make(self, lang, folder):
        """Number the terms of the corpus into a file, 4 bytes a term, and let bm25s read that."""
        import bm25s
        import numpy as np
        vocabulary, lengths = {}, []
        with atomic_folder(folder) as temporary:
            with open(temporary / "terms", "wb") as file:
                for path in corpus_files(self.ensemble.data, lang):
                    for batch in batched(read_passages(path, read_lines(path)), 1024):
                        for ids in self.terms([passage_text(p) for p in batch], vocabulary):
                            lengths.append(len(ids))
                            file.write(ids.tobytes())
            n_terms = len(vocabulary) if self.tokenizer is None else len(self.tokenizer)
            index = bm25s.BM25(method="lucene")
            rows = TermRows(temporary / "terms", np.array(lengths, np.int32))
            index.scores, index.vocab_dict = index.build_index_from_ids(range(n_terms), rows, show_progress=False), {}
            index.save(temporary, show_progress=False)
            (temporary / "terms.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
            (temporary / "terms").unlink()

    def search(self, lang, queries, depth):
        """For each query [(row, docid, score, None)], best first; each process takes its share of the queries."""
        import numpy as np
        (index, vocabulary), (rank, size) = self.index(lang), world()
        stored = self.ensemble.index(lang)[1]
        first_row = np.cumsum([0, *map(len, stored)])
        known, found = len(vocabulary) if self.tokenizer is None else len(self.tokenizer), []
        for ids in self.terms(queries[rank::size], dict(vocabulary)):
            ids = ids[ids < known]
            scores = np.round(index.get_scores_from_ids(ids) if len(ids) else np.zeros(first_row[-1], np.float32), 6)
            cut = np.partition(scores, -depth)[-depth] if depth < len(scores) else 0
            rows = np.flatnonzero((scores >= cut) & (scores > 0))
            names = np.empty(len(rows), object)
            shard = np.searchsorted(first_row, rows, "right") - 1
            for s in np.unique(shard):
                names[shard == s] = stored[s].load()[rows[shard == s] - first_row[s]]
            best = sorted(zip((-np.round(scores[rows].astype(np.float64), 6)).tolist(), names.tolist(), rows.tolist()))[:depth]
            found.append([(row, docid.decode(), -score, None) for score, docid, row in best])
        shares = gather(found)
        return [shares[q % size][q // size] for q in range(len(queries))]


class TermRows:
    """Term numbers of each passage from a file, one at a time: what bm25s reads instead of a list of lists."""

    def __init__(self, path, lengths):
        self.path, self.lengths = path, lengths

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        import numpy as np
        with open(self.path, "rb") as file:
            for length in self.lengths:
                yield np.frombuffer(file.read(4 * int(length)), np.int32)
