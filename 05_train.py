"""Train the bi-encoder on monolingual multi-topic batches with a weighted contrastive loss (Sec. 3.5).

Source  Sec. 3.5. Every batch holds one language and as many topics as that language allows; languages are drawn uniformly.
        Loss of query q over its positive, its hard negatives and the other passages of the batch, cosine / temperature:
            L(q) = -log( exp(s(q,d+)/t) / sum_d exp(s(q,d)/t) ),   batch loss = mean of w(q) L(q),   w(q) = alpha_l + beta_c
        The paper gives no formula for alpha_l and beta_c ("based on the portion of each category") and no temperature:
        alpha_l = alpha g(p_l), beta_c = beta g(p_c), p the share of the language or topic among the training queries and
        g its inverse (--weighting), scaled so that g averages 1 and w averages alpha + beta = 0.85, as in the best row of Table 9.
Reads   topics.jsonl of stage 04, or Tevatron's layout with lang and topic (without topic: --no-topic-balance)
Writes  OUT/ a Hugging Face folder that SentenceTransformer(OUT) loads too, with loss.png; OUT.log.jsonl; OUT.checkpoint/
Usage   python 05_train.py --input runs/sample/topics.jsonl --encoder models/sample --out runs/sample/model
        torchrun --nproc-per-node 8 05_train.py ...          one node; more: --nnodes and --rdzv-endpoint, see torchrun --help
Cost    sample, two cores: under a minute. A killed run goes on where it stopped, to the same weights
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import time
from array import array
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

# before torch: it sets OMP_WAIT_POLICY, which torch reads when it loads
from common import (DataError, Output, Parser, atomic, dump, normalise, open_text, parse_query, passage_text,
                    positive_int, progress, run, say)
from encoder import Encoder, keep_blocks

import numpy as np  # isort: skip
import torch  # isort: skip
import torch.distributed as dist  # isort: skip

DEV_QUERIES = 100  # held-out queries a language that validation reads; their passages are the pool that they search
FALL = 0.05        # MRR@10 below a language's best that is worth a warning


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--input", required=True, metavar="FILE", help="topics.jsonl, or training data in Tevatron's layout")
    parser.add_argument("--encoder", required=True, metavar="MODEL", help="start from this folder or hub id; the paper: BAAI/bge-m3")
    parser.add_argument("--epochs", type=positive_int, default=20, help="an epoch is as many queries as the file has (Sec. 4.1: 20 for BGE-M3)")
    parser.add_argument("--max-steps", type=lambda text: 0 if text == "0" else positive_int(text), metavar="S", help="stop after S optimiser steps; 0: only write --log-batches for all epochs")
    parser.add_argument("--batch-size", type=positive_int, default=24, help="queries a step and process (Sec. 4.1)")
    parser.add_argument("--negatives", type=positive_int, default=7, help="hard negatives a query and step, a different choice each time (Sec. 4.1)")
    parser.add_argument("--lr", type=positive_float, default=2e-6, help="highest learning rate (Sec. 4.1: 2e-6 for BGE-M3 and mE5, 3e-6 for mBERT and mDPR)")
    parser.add_argument("--weight-decay", type=zero_to_one, default=0.0, help="above 0 makes AdamW of Adam (Sec. 4.1: Adam)")
    parser.add_argument("--warmup", type=zero_to_one, default=0.1, help="share of the steps with rising learning rate, 0 to 1; then it falls linearly to 0")
    parser.add_argument("--temperature", type=positive_float, help="tau; default: 0.01 for E5 models, else 0.02, their makers' values (the paper gives none)")
    parser.add_argument("--query-max-len", type=positive_int, default=64, help="tokens of a query that are read (Sec. 4.1)")
    parser.add_argument("--passage-max-len", type=positive_int, default=256, help="tokens of a passage that are read (Sec. 4.1)")
    parser.add_argument("--alpha", type=positive_float, default=0.45, help="mean weight of the language, alpha_l (Table 9)")
    parser.add_argument("--beta", type=positive_float, default=0.40, help="mean weight of the topic, beta_c (Table 9)")
    parser.add_argument("--weighting", choices=["inverse", "proportional", "uniform", "none"], default="inverse",
                        help="g(p): 1/p favours rare languages and topics; p; 1; none: w(q) = 1 (Sec. 3.5)")
    parser.add_argument("--weight-on", choices=["loss", "negatives"], default="loss",
                        help="multiply the query's loss by w(q), or its negatives' terms in the sum (Sec. 3.5 says both)")
    parser.add_argument("--language-sampling", choices=["uniform", "proportional", "temperature"], default="uniform",
                        help="steps of a language: equal, like its share, or like the square root of its share (Sec. 3.5: uniform)")
    parser.add_argument("--short-batch", choices=["reuse", "shrink", "merge"], default="reuse",
                        help="when a language's queries are used up in mid-batch: go on with used ones; leave the batch short, its loss "
                             "scaled by its size; or join a language that is smaller than a batch with those whose writing is "
                             "closest. No batch holds a query twice")
    parser.add_argument("--no-same-language", action="store_true", help="batches of mixed languages (ablation of Table 7)")
    parser.add_argument("--no-topic-balance", action="store_true", help="ignore topics when making batches (ablation of Table 7)")
    parser.add_argument("--gather", action="store_true", help="processes split one batch, --batch-size queries each, and share its passages, "
                                                              "with gradients; default: a batch each")
    parser.add_argument("--chunk-tokens", type=positive_int, metavar="T",
                        help="cache gradients: T tokens, padding included, in memory at a time; the same gradients, a third more time")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast on a CPU too: 2-3 times as fast where it knows bf16; CUDA always has it")
    parser.add_argument("--dev-share", type=zero_to_one, default=0.1, help="share of each language's queries held out for validation (Sec. 4.1)")
    parser.add_argument("--patience", type=positive_int, metavar="E", help="stop when E epochs in a row brought no better dev score")
    parser.add_argument("--log-batches", metavar="FILE", help="write each batch as a line: step, lang, query_ids, topics (and langs, where it mixes some)")
    parser.add_argument("--export", choices=["flagembedding", "sentence-transformers"],
                        help="also write the training queries in that trainer's layout, to OUT.<layout>/<lang>.jsonl")
    parser.add_argument("--save-every", type=positive_int, default=200, metavar="S", help="steps between checkpoints")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the trained model")
    return parser


def positive_float(text):
    try:
        if 0 < float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"got {text!r}, want a number above 0")


def zero_to_one(text):
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"got {text!r}, want a number from 0 to 1")


# --------------------------------------------------------------------------- data: compact arrays and offsets, never the texts

class Queries:
    """The training file, checked once and then read by offset: about 100 bytes of memory a query, however long its texts.

    lang and topic are (N,) integer arrays, langs names the languages; positives(i) are hashes of (lang, docid).
    """

    def __init__(self, args):
        if args.input.endswith(".gz"):
            raise DataError(f"{args.input}: training reads records by offset, which gzip does not allow; gunzip it first")
        self.path, self.only, self.langs = args.input, args.lang, []
        self.offset, self.lang, self.topic = array("q"), array("H"), array("q")
        self.ids, self.id_end, self.hashes, self.hash_end = bytearray(), array("q", [0]), array("Q"), array("q", [0])
        codes, seen, offset = {}, set(), 0
        self.file = open_text(args.input)
        for number, line in enumerate(self.file, 1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            record = parse_query(args.input, number, line, args.lang)
            lang, query_id, where = record["lang"], record["query_id"], f"{args.input}:{number}"
            if args.lang and lang not in args.lang:
                continue
            key = hash64(lang, query_id)
            if key in seen:
                raise DataError(f"{where}: query {query_id!r} ({lang}) is there twice; drop one")
            seen.add(key)
            n_negatives = len(record.get("negative_passages", []))
            if n_negatives < args.negatives:
                raise DataError(f"{where}: query {query_id!r} has {n_negatives} negatives, --negatives wants {args.negatives}; "
                                "bring all to N with 03_generate_negatives.py, or lower --negatives")
            topic = record.get("topic", 0 if args.no_topic_balance else None)
            if topic is None:
                raise DataError(f"{where}: no 'topic'; make it with 04_cluster_topics.py, or pass --no-topic-balance")
            if type(topic) is not int or abs(topic) >= 2**63:
                raise DataError(f"{where}: 'topic' is {json.dumps(topic)[:40]}; want a whole number, as 04_cluster_topics.py gives")
            self.offset.append(start), self.lang.append(codes.setdefault(lang, len(codes))), self.topic.append(topic)
            self.ids += query_id.encode()
            self.id_end.append(len(self.ids))
            self.hashes.extend(hash64(lang, p["docid"]) for p in record["positive_passages"])
            self.hash_end.append(len(self.hashes))
            if len(self.offset) == args.limit:
                break
        if not self.offset:
            raise DataError(f"{args.input}: no queries; check the file and --lang")
        self.langs = list(codes)
        self.lang, self.topic = np.frombuffer(self.lang, np.uint16), np.frombuffer(self.topic, np.int64)

    def __len__(self):
        return len(self.offset)

    def __getitem__(self, i):
        self.file.seek(self.offset[i])
        return parse_query(self.path, f"byte {self.offset[i]}", self.file.readline(), self.only)

    def lang_of(self, i):
        return self.langs[self.lang[i]]

    def query_id(self, i):
        return self.ids[self.id_end[i]:self.id_end[i + 1]].decode()

    def positives(self, i):
        return self.hashes[self.hash_end[i]:self.hash_end[i + 1]]


def hash64(*words):
    return int.from_bytes(hashlib.blake2b("\0".join(words).encode(), digest_size=8).digest(), "little")


def hold_out(queries, share, seed):
    """(train, dev) query numbers; dev is a random share of each language, none of a language with under 5."""
    lots = np.array([random.Random(f"{seed}:{queries.lang_of(i)}:{queries.query_id(i)}").random() for i in range(len(queries))])
    dev = np.zeros(len(queries), bool)
    for code in range(len(queries.langs)):
        here = np.flatnonzero(queries.lang == code)
        if len(here) >= 5 and share:
            dev[here[np.argsort(lots[here], kind="stable")][:max(1, round(share * len(here)))]] = True
    return np.flatnonzero(~dev), np.flatnonzero(dev)


def export(queries, train_ids, layout, out):
    """Write OUT.<layout>/<lang>.jsonl, a file a language, since both trainers can keep a file's queries together in a batch."""
    for code, lang in enumerate(queries.langs):
        if not lang.isalnum():
            raise DataError(f"{queries.path}: language {lang!r} cannot name a file; use its ISO 639-1 code")
        path = Path(f"{out}.{layout}") / f"{lang}.jsonl"
        with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for i in train_ids[queries.lang[train_ids] == code]:
                record = queries[i]
                positives, negatives = ([passage_text(p) for p in record[f"{k}_passages"]] for k in ("positive", "negative"))
                file.write(dump({"query": record["query"], "pos": positives, "neg": negatives} if layout == "flagembedding" else
                                {"anchor": record["query"], "positive": positives[0]}
                                | {f"negative_{n}": text for n, text in enumerate(negatives, 1)}))


# --------------------------------------------------------------------------- batches (Sec. 3.5)

class Pool:
    """The queries of one language (or of several joined): each is used once before one is used again."""

    def __init__(self, members, queries, draw, args):
        self.members, self.queries, self.draw, self.by_topic = members.tolist(), queries, draw, not args.no_topic_balance
        self.reuse = args.short_batch != "shrink"
        self.uses, self.left = Counter(), {}

    def refill(self):
        """left: {topic: queries}, shuffled, the least used last, where they are popped."""
        self.left = defaultdict(list)
        self.draw.shuffle(self.members)
        for i in sorted(self.members, key=lambda i: -self.uses[i]):
            self.left[int(self.queries.topic[i]) if self.by_topic else 0].append(i)

    def take(self, size):
        """Up to size query numbers: no query twice, no positive in common, topics as even as what is left allows."""
        batch, owner, n_of = [], {}, Counter()  # owner: positive -> the query of the batch that has it; n_of: queries a topic
        topic_of = lambda i: int(self.queries.topic[i]) if self.by_topic else 0  # noqa: E731

        def clash(i):
            return {owner[p] for p in self.queries.positives(i) if p in owner}

        def fill():
            """Add one by one to the topic that has fewest in the batch and still has a query that fits."""
            topics = {t for t in self.left if self.left[t]}
            while len(batch) < size and topics:
                topic = min(sorted(topics), key=lambda t: (n_of[t], self.draw.random()))
                of_topic = self.left[topic]
                at = next((at for at in range(len(of_topic) - 1, -1, -1) if of_topic[at] not in batch and not clash(of_topic[at])), None)
                if at is None:
                    topics.remove(topic)
                else:
                    put(topic, at)

        def put(topic, at):
            batch.append(self.left[topic].pop(at))
            owner.update(dict.fromkeys(self.queries.positives(batch[-1]), batch[-1]))
            n_of[topic] += 1

        def exchange():
            """Where a common positive keeps a topic behind, swap that one query; False when no swap makes it more even."""
            for topic in sorted(t for t in self.left if n_of[t] + 1 < max(n_of.values())):
                for at, i in enumerate(self.left[topic]):
                    rivals = clash(i) or {max(batch, key=lambda j: n_of[topic_of(j)])}
                    rival = rivals.pop()
                    if not rivals and n_of[topic_of(rival)] > n_of[topic] + 1:
                        put(topic, at)
                        batch.remove(rival)
                        self.left[topic_of(rival)].append(rival)
                        n_of[topic_of(rival)] -= 1
                        owner.clear()
                        owner.update({p: j for j in batch for p in self.queries.positives(j)})
                        return True

        if not any(self.left.values()):
            self.refill()
        fill()
        while exchange():
            fill()
        if len(batch) < size and self.reuse and len(batch) < len(self.members):
            self.refill()
            fill()
        self.uses.update(batch)
        return batch


def merge_small(by_lang, queries, size):
    """Join the language with the fewest queries to the one whose writing is closest until none is smaller than a batch.

    Closest is the cosine of the counts of letter trigrams in up to 200 queries: the script counts first, then the language.
    """
    def profile(members):
        texts = (f" {queries[int(i)]['query'].lower()} " for i in members[:200])
        return Counter(text[at:at + 3] for text in texts for at in range(len(text) - 2))

    def cosine(a, b):
        return sum(n * b[t] for t, n in a.items()) / math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()) or 1)

    profiles = {lang: profile(members) for lang, members in by_lang.items()}
    while len(by_lang) > 1 and min(map(len, by_lang.values())) < size:
        small = min(by_lang, key=lambda lang: (len(by_lang[lang]), lang))
        closest = max((lang for lang in by_lang if lang != small), key=lambda lang: (cosine(profiles[small], profiles[lang]), lang))
        joined = "+".join(sorted(f"{small}+{closest}".split("+")))
        by_lang[joined] = np.concatenate([by_lang.pop(small), by_lang.pop(closest)])
        profiles[joined] = profiles[small] + profiles[closest]
    return by_lang


def batches(train_ids, queries, args, size):
    """Yield for ever (language or "mixed", query numbers): the same for the same seed, so that a resumed run replays it.

    An epoch holds the languages' shares of its batches to within one, in random order.
    """
    draw = random.Random(f"{args.seed}:batches")
    by_lang = {lang: train_ids[queries.lang[train_ids] == code] for code, lang in sorted(enumerate(queries.langs), key=lambda x: x[1])}
    by_lang = {lang: members for lang, members in by_lang.items() if len(members)}
    if args.no_same_language:
        by_lang = {"mixed": train_ids}
    elif args.short_batch == "merge":
        by_lang = merge_small(by_lang, queries, size)
    pools = {lang: Pool(members, queries, draw, args) for lang, members in by_lang.items()}
    power = {"uniform": 0, "proportional": 1, "temperature": 0.5}[args.language_sampling]
    share = {lang: len(pool.members) ** power for lang, pool in pools.items()}
    owed = dict.fromkeys(pools, 0.0)  # batches that a language has coming
    while True:
        plan = []
        for _ in range(math.ceil(len(train_ids) / size)):
            for lang in pools:
                owed[lang] += share[lang] / sum(share.values())
            plan.append(max(pools, key=lambda lang: round(owed[lang], 6)))
            owed[plan[-1]] -= 1
        draw.shuffle(plan)
        for lang in plan:
            yield lang, pools[lang].take(size)


def choose(record, visit, args):
    """(positive, negatives) of a query's visit-th use: each negative is used once before one repeats."""
    draw = random.Random(f"{args.seed}:{record['lang']}:{record['query_id']}")
    order = draw.sample(range(len(record["negative_passages"])), len(record["negative_passages"]))
    first = visit * args.negatives
    negatives = [record["negative_passages"][order[(first + j) % len(order)]] for j in range(args.negatives)]
    positives = record["positive_passages"]
    return positives[(draw.randrange(len(positives)) + visit) % len(positives)], negatives


def collate(records, visits, args):
    """The texts of a batch and who is whose: (queries, passages, target, masked) for N records, M = N (1 + negatives).

    target (N,) is the row of each query's positive, its negatives follow it; masked (N, M) is True where a passage is
    relevant to the query, be it another of its positives or a known false negative, whoever brought it: by docid, or by
    text, since a corpus may hold one text under two docids.
    """
    def names(record, passages):
        """By what passages are known again: [(language and docid, text)]."""
        return [((record["lang"], p["docid"]), normalise(p["text"])) for p in passages]

    queries, texts, known, target = [], [], [], []
    for record, visit in zip(records, visits):
        positive, negatives = choose(record, visit, args)
        target.append(len(texts))
        queries.append(record["query"])
        texts += [passage_text(p) for p in (positive, *negatives)]
        known += names(record, (positive, *negatives))
    masked = torch.zeros(len(records), len(texts), dtype=torch.bool)
    for q, record in enumerate(records):
        relevant = {name for key in ("positive_passages", "false_negatives") for both in names(record, record.get(key, [])) for name in both}
        masked[q] = torch.tensor([docid in relevant or text in relevant for docid, text in known])
        masked[q, target[q]] = False
    return queries, texts, torch.tensor(target), masked


# --------------------------------------------------------------------------- loss (Sec. 3.5)

def weights(train_ids, queries, args):
    """w(q), (N,) float32 for all queries, with w(q) = alpha g(p_lang) + beta g(p_topic), where g averages 1 over train_ids."""
    if args.weighting == "none":
        return np.ones(len(queries), np.float32)

    def g(labels):
        values, inverse = np.unique(labels, return_inverse=True)
        n = np.bincount(inverse[train_ids], minlength=len(values)).clip(1)[inverse]  # (N,) training queries with the same label
        raw = {"inverse": 1 / n, "proportional": n, "uniform": n / n}[args.weighting]
        return raw / raw[train_ids].mean()

    return (args.alpha * g(queries.lang) + args.beta * g(queries.topic)).astype(np.float32)


def contrastive_loss(query, passages, target, masked, weight, temperature, weight_on="loss", size=None):
    """Weighted InfoNCE of a batch, a scalar.

    query (N, D) and passages (M, D) unit vectors, target (N,) the row of each query's positive, masked (N, M) True where a
    passage must not count as a negative, weight (N,). size: divide by this many queries (default N).
    """
    logits = query @ passages.T / temperature                       # (N, M) = (N, D) @ (D, M)
    logits = logits.masked_fill(masked, -torch.inf)
    if weight_on == "negatives":  # exp(s + log w) = w exp(s)
        shift = weight.log()[:, None].expand_as(logits).clone()     # (N, M)
        logits = logits + shift.scatter_(1, target[:, None], 0.0)
        weight = torch.ones_like(weight)
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")  # (N,)
    return (weight * loss).sum() / (size or len(query))


class Gather(torch.autograd.Function):
    """(M, D): the passages of all processes, from the rows that each has embedded; a gradient goes back to its owner."""

    @staticmethod
    def forward(ctx, own, rows, n_rows):
        ctx.rows = rows
        whole = own.new_zeros(n_rows, own.shape[1])
        whole[rows] = own
        dist.all_reduce(whole)  # every row has one owner, the others add zeros: uneven shares need no padding
        return whole

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.rows], None, None


def backward(encoder, token_ids, loss_of, chunk_tokens=None, seed=0, bf16=False):
    """Add the gradients of loss_of(vectors) to the model's parameters; returns the loss. vectors is (T, D) for T texts.

    Texts go through the model in chunks of like length, since a third of one wide batch would be padding. With chunk_tokens
    only one chunk's activations are kept at a time (Gao et al. 2021, gradient cache): embed all without gradients, take
    the loss's gradient by the embeddings, embed each chunk again and go on from there. Dropout is seeded by chunk.
    """
    order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
    budget = chunk_tokens or len(order) * len(token_ids[order[-1]]) // 4
    chunks = [[]]
    for i in order:
        if chunks[-1] and (len(chunks[-1]) + 1) * len(token_ids[i]) > budget:
            chunks.append([])
        chunks[-1].append(i)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))

    def embed(n):
        torch.manual_seed(seed + n)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # on CUDA the encoder does so itself
            return encoder.forward([token_ids[i] for i in chunks[n]])

    with torch.set_grad_enabled(not chunk_tokens):
        vectors = torch.cat([embed(n) for n in range(len(chunks))])[back.to(encoder.device)]
    if not chunk_tokens:
        loss = loss_of(vectors)
        loss.backward()
        return loss.detach()
    loss = loss_of(vectors.requires_grad_())
    loss.backward()
    for n, chunk in enumerate(chunks):
        last = n + 1 == len(chunks)  # processes add up their gradients once, not for every chunk
        with contextlib.nullcontext() if last or not dist.is_initialized() else encoder.model.no_sync():
            embed(n).backward(vectors.grad[torch.tensor(chunk, device=encoder.device)])
    return loss.detach()


# --------------------------------------------------------------------------- validation

def validate(encoder, queries, dev_ids, args, rank, world):
    """{lang: {"loss", "mrr@10"}} on held-out queries; each searches its language's held-out passages. Processes share the languages."""
    report = {}
    for code, lang in list(enumerate(queries.langs))[rank::world]:
        group = [queries[int(i)] for i in dev_ids[queries.lang[dev_ids] == code][:DEV_QUERIES]]
        if not group:
            continue
        pool = {p["docid"]: p for r in group for p in r["positive_passages"] + r["negative_passages"]}
        rows = {docid: row for row, docid in enumerate(pool)}
        passages = torch.from_numpy(encoder.encode([passage_text(p) for p in pool.values()], "passage"))
        scores = torch.from_numpy(encoder.encode([r["query"] for r in group], "query")) @ passages.T  # (N, M) = (N, D) @ (D, M)
        loss = mrr = 0.0
        for score, record in zip(scores, group):
            positives, negatives = ([rows[p["docid"]] for p in record[f"{kind}_passages"]] for kind in ("positive", "negative"))
            loss -= torch.log_softmax(score[[positives[0], *negatives]] / args.temperature, 0)[0].item()
            score[[rows[p["docid"]] for p in record.get("false_negatives", []) if p["docid"] in rows]] = -1
            rank_of_best = 1 + int((score > score[positives].max()).sum())
            mrr += 1 / rank_of_best if rank_of_best <= 10 else 0
        report[lang] = {"loss": round(loss / len(group), 4), "mrr@10": round(mrr / len(group), 4)}
    if world > 1:
        reports = [None] * world
        dist.all_gather_object(reports, report)
        report = {lang: values for part in reports for lang, values in part.items()}
    return dict(sorted(report.items()))


def collapse_warnings(by_lang, dev, best_dev):
    """Sentences on languages that lose: under half of the fair share of an epoch's queries, or a dev score that fell."""
    fair = sum(v["queries"] for v in by_lang.values()) / max(1, len(by_lang))
    return [f"{lang}: {v['queries']} queries in this epoch are under half of its fair share of {fair:.0f}; see --language-sampling, --short-batch"
            for lang, v in by_lang.items() if v["queries"] < fair / 2] + \
           [f"{lang}: dev MRR@10 fell from {best_dev[lang]:.3f} to {v['mrr@10']:.3f}"
            for lang, v in dev.items() if v["mrr@10"] < best_dev.get(lang, 0) - FALL]


# --------------------------------------------------------------------------- the loop

def steps(plan, queries, per_step, per_epoch, batch_log):
    """Yield (step, [(lang, query numbers, their earlier uses)], by_lang) for ever, a batch a process, and log the batches.

    by_lang is {} but at an epoch's end: {lang: {"steps", "queries", "unique"}} of the epoch.
    """
    uses = np.zeros(len(queries), np.int32)
    before, n_batches, step = uses.copy(), Counter(), 0
    while True:
        step, drawn, by_lang = step + 1, [], {}
        for lang, members in (next(plan) for _ in range(per_step)):
            drawn.append((lang, members, uses[members].tolist()))
            uses[members] += 1
            n_batches.update({queries.lang_of(i) for i in members})
            batch_log.write(dump({"step": step, "lang": lang, "query_ids": [queries.query_id(i) for i in members],
                                  "topics": queries.topic[members].tolist()}
                                 | ({} if lang in queries.langs else {"langs": [queries.lang_of(i) for i in members]})))
        if step % per_epoch == 0:
            now = uses - before
            here = {lang: now[queries.lang == code] for code, lang in enumerate(queries.langs)}
            by_lang = {lang: {"steps": n_batches[lang], "queries": int(n.sum()), "unique": int((n > 0).sum())} for lang, n in sorted(here.items())}
            before, n_batches = uses.copy(), Counter()
        yield step, drawn, by_lang


def train(args, encoder, queries, rank, world, log_path, checkpoint):
    """Train in place; the weights of the epoch with the best mean dev MRR@10 end up in the encoder. Returns counts.

    encoder is None for --max-steps 0. Every draw depends on the seed and the step alone, so that going on from a
    checkpoint needs no random state: the plan of batches is replayed, and each step seeds its own dropout.
    """
    train_ids, dev_ids = hold_out(queries, args.dev_share, args.seed)
    if not len(train_ids):
        raise DataError(f"{args.input}: --dev-share {args.dev_share} leaves no query to train on")
    weight_of = torch.from_numpy(weights(train_ids, queries, args))
    shared = world if args.gather else 1  # processes that share a batch
    size = args.batch_size * shared
    per_epoch = math.ceil(len(train_ids) / (args.batch_size * world))
    n_steps = min(args.epochs * per_epoch, args.max_steps or math.inf)
    warmup = max(1, round(args.warmup * n_steps))
    if args.log_batches:
        Path(args.log_batches).parent.mkdir(parents=True, exist_ok=True)
    batch_log = open(args.log_batches if args.log_batches and not rank else os.devnull, "w", encoding="utf-8", newline="\n")
    plan = steps(batches(train_ids, queries, args, size), queries, world // shared, per_epoch, batch_log)
    if not encoder:
        for _ in islice(plan, n_steps):
            pass
        return batch_log.close()

    model, device = encoder.model.train(), encoder.device
    keep_blocks(1024)  # the gradients of every step have the same size
    encoder.forward(encoder.tokenize(["probe"], "query")).sum().backward()
    for parameter in model.parameters():  # such as a pooler that nothing reads: neither trained nor waited for
        parameter.requires_grad_(parameter.grad is not None)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    state = {"step": 0, "log_bytes": 0, "loss": {}, "best": -1.0, "best_dev": {}, "dev": {}, "without_gain": 0}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        say(f"going on from step {state['step']} of {n_steps}")
    distributed = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    log = open(os.devnull if rank else log_path, "ab", buffering=0)
    if not rank:
        log.truncate(state["log_bytes"])  # what came after the checkpoint comes again
    bar = progress(total=n_steps, initial=state["step"], desc="train", unit="step", disable=bool(rank))

    stop = lambda: args.patience and state["without_gain"] >= args.patience  # noqa: E731
    for step, drawn, by_lang in islice(plan, state["step"] if stop() else n_steps):
        if step <= state["step"]:
            continue  # a resumed run replays the plan
        started = time.perf_counter()
        lang, members, visits = drawn[rank % len(drawn)]
        texts, passages, target, masked = collate([queries[i] for i in members], visits, args)
        # a process that shares its batch takes every world-th query; one that is left without takes the first, weight 0
        mine = torch.arange(rank if args.gather else 0, len(members), shared)
        alive, mine = float(len(mine) > 0), mine if len(mine) else torch.tensor([0])
        rows = (target[mine][:, None] + torch.arange(1 + args.negatives)).flatten()  # each positive and its negatives
        token_ids = encoder.tokenize([texts[i] for i in mine], "query") + encoder.tokenize([passages[i] for i in rows], "passage")
        target, masked, rows = target[mine].to(device), masked[mine].to(device), rows.to(device)
        weight = (alive * weight_of[members][mine]).to(device)
        divisor = (size if args.short_batch == "shrink" else len(members)) / shared  # the processes' gradients are averaged

        def loss_of(vectors):
            query, passage = vectors[:len(mine)], vectors[len(mine):]
            if shared > 1:
                passage = Gather.apply(alive * passage, rows, len(passages))
            return contrastive_loss(query, passage, target, masked, weight, args.temperature, args.weight_on, divisor)

        lr = args.lr * min(step / warmup, (n_steps + 1 - step) / max(1, n_steps + 1 - warmup))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        encoder.model = distributed.train()
        loss = backward(encoder, token_ids, loss_of, args.chunk_tokens, (args.seed * 2**40 + step * 2**20 + rank * 2**10) % 2**63, args.bf16)
        encoder.model = model
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        totals = torch.zeros(world + 1, device=device, dtype=torch.float64)  # the losses of all processes, and their tokens
        totals[rank], totals[-1] = loss, sum(map(len, token_ids))
        if world > 1:
            dist.all_reduce(totals)
        *losses, n_tokens = totals.tolist()
        if not math.isfinite(norm.item() + sum(losses)):
            raise DataError(f"step {step}: loss {loss.item()}, gradient norm {norm.item()} on the {lang} queries "
                            f"{' '.join(queries.query_id(i) for i in members)}; lower --lr or raise --temperature; "
                            + (f"the last good state is {checkpoint}" if checkpoint.exists() else "no checkpoint was written yet"))
        optimizer.step()
        state["step"], loss = step, sum(losses) / world
        for name, value in zip([name for name, _, _ in drawn], [loss] if args.gather else losses):
            n, total = state["loss"].get(name, (0, 0.0))
            state["loss"][name] = (n + 1, total + value)
        lines = [{"step": step, "epoch": round(step / per_epoch, 3), "lang": " ".join(name for name, _, _ in drawn), "loss": round(loss, 6),
                  "lr": lr, "grad_norm": round(norm.item(), 6), "tokens_per_s": round(n_tokens / (time.perf_counter() - started))}]
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", lang=lang, refresh=False)
        if by_lang or step == n_steps:
            model.eval()
            dev = validate(encoder, queries, dev_ids, args, rank, world)
            score = sum(v["mrr@10"] for v in dev.values()) / len(dev) if dev else step
            warnings = collapse_warnings(by_lang, dev, state["best_dev"])
            lines.append({"step": step, "epoch": round(step / per_epoch, 3), "dev_mrr@10": round(score, 4) if dev else None, "dev": dev, "by_lang": by_lang,
                          "loss_by_lang": {k: round(total / n, 4) for k, (n, total) in sorted(state["loss"].items())}, "warnings": warnings})
            state |= {"loss": {}, "without_gain": state["without_gain"] + 1,
                      "best_dev": {lang: max(v["mrr@10"], state["best_dev"].get(lang, 0)) for lang, v in dev.items()}}
            if score > state["best"]:
                state |= {"best": score, "without_gain": 0, "dev": dev}
            if not rank:
                for warning in warnings:
                    say(f"warning: epoch {step / per_epoch:g}: {warning}")
                if not state["without_gain"]:
                    with atomic(checkpoint.with_name("best.pt")) as temporary:
                        torch.save(model.state_dict(), temporary)
        log.write("".join(map(dump, lines)).encode())
        if not rank and (by_lang or step == n_steps or step % args.save_every == 0):
            state["log_bytes"] = os.path.getsize(log_path)
            with atomic(checkpoint) as temporary:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}, temporary)
        if stop():
            break
    bar.close(), log.close(), batch_log.close()
    if not rank:
        model.load_state_dict(torch.load(checkpoint.with_name("best.pt"), weights_only=True, map_location=device))
    model.eval()
    return {"steps": state["step"], "train_queries": len(train_ids), "dev_queries": len(dev_ids),
            "best_dev_mrr@10": round(state["best"], 4) if state["dev"] else None,
            "peak_gpu_mb": torch.cuda.max_memory_allocated(device) >> 20 if device.startswith("cuda") else None, "dev": state["dev"],
            "by_lang": dict(sorted(Counter(queries.langs[c] for c in queries.lang[train_ids]).items()))}


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.temperature is None:
        args.temperature = 0.01 if "e5" in Path(args.encoder).name.lower() else 0.02
    rank, args.processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    output = Output(args, [args.input], [args.encoder])
    if args.max_steps == 0:
        if not args.log_batches:
            raise DataError("--max-steps 0 trains nothing; name a file with --log-batches, or take a number above 0")
        return train(args, None, Queries(args), rank, args.processes, None, None)
    if output.is_done():
        return
    checkpoint = Path(f"{args.out}.checkpoint") / "last.pt"
    owner, run_key = checkpoint.with_name("run.json"), json.loads(output.key(output.meta))
    if checkpoint.exists() and json.loads(owner.read_text("utf-8")) != run_key and not args.overwrite:
        before = json.loads(owner.read_text("utf-8"))
        differ = [f"--{k.replace('_', '-')}" for k in run_key[0] if run_key[0][k] != before[0].get(k)] or ["the input or the encoder"]
        raise DataError(f"{checkpoint.parent} is of another run ({', '.join(differ)} differ); go on with that run's arguments, "
                        "pass --overwrite to start anew, or take another --out")
    queries = Queries(args)
    if args.processes > 1:
        if args.device in ("auto", "cuda") and torch.cuda.is_available():
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    encoder = Encoder(args.encoder, args.device, args.query_max_len, args.passage_max_len)
    encoder.normalise = True  # the loss is of cosines whatever the maker used, so validation is, and the saved model too
    if not rank:
        if args.overwrite:
            shutil.rmtree(checkpoint.parent, ignore_errors=True)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        owner.write_text(dump(run_key), "utf-8")
    if args.processes > 1:
        dist.barrier()
    log_path = Path(f"{args.out}.log.jsonl")
    counts = train(args, encoder, queries, rank, args.processes, log_path, checkpoint)
    if not rank:
        if args.export:
            export(queries, hold_out(queries, args.dev_share, args.seed)[0], args.export, args.out)
        with atomic_folder(args.out) as folder:
            encoder.save(folder)
            plot(log_path, folder / "loss.png")
            (folder / "README.md").write_text(model_card(args, encoder, counts, output.meta), "utf-8")
            shutil.rmtree(args.out, ignore_errors=True)  # at no moment does a folder lie beside the meta of another
            output.finish(**counts)
        shutil.rmtree(checkpoint.parent)
    if args.processes > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def atomic_folder(path):
    """Like `atomic`, for a folder that is not there when the block ends."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    temporary.rename(target)


def plot(log_path, path):
    """loss.png: the loss of each step and its mean over fifty, and the dev score of each epoch."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in log_path.read_text("utf-8").splitlines()]
    step, loss = zip(*((line["step"], line["loss"]) for line in lines if "loss" in line))
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(step, loss, color="lightgrey", linewidth=0.8, label="loss")
    width = min(50, len(loss))
    axis.plot(step[width - 1:], np.convolve(loss, np.ones(width) / width, "valid"), label=f"mean of {width} steps")
    axis.set(xlabel="step", ylabel="loss", ylim=(0, None))
    if any(line.get("dev") for line in lines):
        other = axis.twinx()
        other.plot(*zip(*((line["step"], line["dev_mrr@10"]) for line in lines if line.get("dev"))), "o-", color="tab:green", label="dev MRR@10")
        other.set(ylabel="dev MRR@10", ylim=(0, 1))
    figure.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def model_card(args, encoder, counts, meta):
    shown = ("alpha", "batch_size", "beta", "epochs", "language_sampling", "lr", "negatives", "passage_max_len", "processes",
             "query_max_len", "seed", "short_batch", "temperature", "weight_on", "weighting")
    table = "\n".join(f"| {lang} | {n} | {counts['dev'].get(lang, {}).get('mrr@10', '')} |" for lang, n in counts["by_lang"].items())
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, multilingual]
language: {json.dumps(list(counts["by_lang"]))}
---
# {Path(args.out).name}

A bi-encoder for monolingual retrieval in {len(counts["by_lang"])} languages, fine-tuned from `{encoder.name}` with hard negatives,
monolingual multi-topic batches and a weighted contrastive loss.

- data: `{Path(args.input).name}` (digest {meta["inputs"][0]["digest"]}), {counts["train_queries"]} training queries, {counts["dev_queries"]} held out
- settings: {", ".join(f"{k} {vars(args)[k]}" for k in shown)}; {counts["steps"]} steps
- score: mean MRR@10 of the best epoch on held-out queries {counts["best_dev_mrr@10"]} (a small pool; evaluate with 06_eval.py)
- {encoder.pooling} pooling, cosine similarity, prefixes {encoder.prefix["query"]!r} (query) and {encoder.prefix["passage"]!r} (passage, which is title, line break, text)

| language | training queries | MRR@10 on held-out queries |
|---|---|---|
{table}

![loss](loss.png)

```bibtex
@inproceedings{{huang2025boosting,
  title={{Boosting Data Utilization for Multilingual Dense Retrieval}}, author={{Huang and others}},
  booktitle={{EMNLP}}, year={{2025}}, note={{arXiv 2509.09459}}
}}
```
"""


if __name__ == "__main__":
    run(main)
