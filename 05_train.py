"""Train the bi-encoder on monolingual multi-topic batches with a weighted contrastive loss (Sec. 3.5).

Source  Sec. 3.5. A batch holds one language and as many topics as that has, both drawn uniformly. Its loss is
        the mean of w(q) L(q), L(q) = -log( exp(s(q,d+)/t) / sum_d exp(s(q,d)/t) ): s cosine, t temperature,
        d+ a positive of query q, d also its hard negatives and the other passages of the batch.
        w(q) = alpha g(language) + beta g(topic); the paper has no formula ("based on the portion of each
        category"). Here g = p^-1/2, p the share of the training queries, at 1/2 to 2 times its median over
        the queries drawn, scaled to mean 1 over them: w averages alpha + beta = 0.85, as in the best row of
        Table 9, and is at most 4 times its median. A topic is its number, whatever the language.
Reads   topics.jsonl of stage 04, or Tevatron's layout with lang and topic (without topic: --topic-power 1)
Writes  OUT/ a sentence-transformers folder with card and train_log.jsonl; OUT.checkpoint/ until it is done
Usage   python 05_train.py --input runs/sample/topics.jsonl --encoder models/sample --out runs/sample/model
        torchrun --nproc-per-node 8 05_train.py ...    the processes share each batch and all its passages
Cost    sample, two cores: under a minute. A killed run goes on where it stopped, to the same weights
"""
import ctypes
import json
import math
import os
import random
import shutil
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from common import (DataError, Output, Parser, atomic, atomic_folder, dump, normalise, parse_query,
                    positive_float, positive_int, progress, read_lines, run, say, share)
from encoder import encoder_flags, from_flags

DEV_QUERIES = 100  # held-out queries a language that validation reads, whose passages they search
FALL = 0.05        # MRR@10 below a language's best epoch that is worth a warning
TIE = 1e-6         # scores this close are equal
DRAWS = 1000       # batches, or an epoch if that is more, over which the weights average
RANK = int(os.environ.get("RANK", "0"))         # torchrun's: this process ...
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # ... of so many


def build_parser():
    parser = Parser(__doc__).common_flags()
    flag = parser.add_argument
    flag("--input", required=True, metavar="FILE", help="topics.jsonl, or training data in Tevatron's layout")
    flag("--encoder", required=True, metavar="MODEL", help="where to start; the paper: BAAI/bge-m3 ...")
    flag("--epochs", type=positive_int, default=20, help="of as many queries as there are (Sec. 4.1)")
    flag("--max-steps", type=whole, metavar="S", help="stop after S steps; 0: only write --log-batches")
    flag("--batch-size", type=positive_int, default=24, help="queries a step, of all processes (Sec. 4.1)")
    flag("--negatives", type=whole, default=7, help="hard negatives a query, others each time (Sec. 4.1)")
    flag("--no-in-batch", action="store_true", help="own negatives only, not the batch's other passages")
    flag("--lr", type=positive_float, default=2e-6, help="highest learning rate (Sec. 4.1: mBERT, mDPR 3e-6)")
    flag("--warmup", type=share, default=0.1, help="share of the steps in which it rises; then it falls to 0")
    flag("--clip", type=positive_float, metavar="NORM",
         help="clip gradients; undoes a language's weight, since a batch holds one language; default: off")
    flag("--temperature", type=positive_float, help="t; default: 0.01 for E5, else 0.02, as their makers")
    flag("--alpha", type=positive_float, default=0.45, help="mean weight of the language (Table 9)")
    flag("--beta", type=positive_float, default=0.40, help="mean weight of the topic (Table 9)")
    flag("--weighting", choices=["inverse", "proportional", "uniform", "none"], default="inverse",
         help="g: p^-1/2, bounded as said above; p^1/2, bounded; 1; none: w(q) = 1")
    flag("--weight-on", choices=["loss", "negatives"], default="loss",
         help="multiply the query's loss by w(q), or its negatives' terms in the sum (Sec. 3.5 says both)")
    flag("--language-power", type=share, default=0.0, metavar="P",
         help="a language is drawn by its share to the power P: 0 uniform (Sec. 3.5), 1 as the data is")
    flag("--topic-power", type=share, default=0.0, metavar="P", help="the same for the topics in a batch")
    flag("--mixed", action="store_true", help="batches of all languages, as they come (Table 7)")
    flag("--short-batch", choices=["reuse", "shrink"], default="reuse",
         help="a topic that runs out in mid-batch gives used queries, but none twice a batch; or none, and "
              "the loss of a batch that stays short is scaled by its size")
    flag("--chunk-tokens", type=positive_int, metavar="T",
         help="cache gradients: T tokens in memory at a time; the same gradients, a third more time")
    flag("--gradient-checkpointing", action="store_true", help="keep fewer activations; a third more time")
    flag("--dev-share", type=share, default=0.1, help="share of each language held out (Sec. 4.1)")
    flag("--patience", type=positive_int, metavar="E", help="stop when E epochs brought no better dev score")
    flag("--log-batches", metavar="FILE", help="write batches: step, lang, query_ids, topics, langs")
    flag("--save-every", type=positive_int, default=200, metavar="S", help="steps between checkpoints")
    flag("--out", required=True, metavar="FOLDER", help="the trained model")
    encoder_flags(parser)
    return parser


def whole(text):
    return 0 if text == "0" else positive_int(text)


@dataclass(slots=True, eq=False)
class Query:
    """What batches are made from, some 300 bytes; its texts are read when a batch holds it."""
    lang: str
    query_id: str
    topic: int
    offset: int   # of its line in the file
    marks: tuple  # hashes of its question and its positives, which no other query of a batch may share


def read_index(args):
    """The Query of each record of the input."""
    if args.input.endswith(".gz"):
        raise DataError(f"{args.input}: records are read by offset, which gzip does not allow; gunzip it")
    queries, seen, end = [], set(), 0
    for number, line in read_lines(args.input, blank=True):
        end += len(line)
        record = parse_query(args.input, number, line, args.lang) if line.strip() else None
        if record is None or args.lang and record["lang"] not in args.lang:
            continue
        key = record["lang"], record["query_id"]
        topic = record.get("topic", 0 if args.topic_power == 1 else None)
        n_negatives = len(record.get("negative_passages", []))
        where = f"{args.input}:{number}: query {key[1]!r} ({key[0]})"
        if key in seen:
            raise DataError(f"{where} is there twice; drop one")
        if n_negatives < args.negatives:
            raise DataError(f"{where} has {n_negatives} negatives, --negatives wants {args.negatives}; bring "
                            "all to N with 03_generate_negatives.py, or lower --negatives")
        if type(topic) is not int:
            raise DataError(f"{where}: 'topic' is {json.dumps(topic)[:40]}, want a whole number; make it "
                            "with 04_cluster_topics.py, or drop it and pass --topic-power 1")
        seen.add(key)
        marks = [normalise(record["query"]), *((key[0], p["docid"]) for p in record["positive_passages"])]
        queries.append(Query(*key, topic, end - len(line), tuple(map(hash, marks))))
        if len(queries) == args.limit:
            break
    return queries


def read_records(file, queries):
    """Yield the record of each query, from the open input."""
    for query in queries:
        file.seek(query.offset)
        yield parse_query(file.name, f"byte {query.offset}", file.readline(), [query.lang])


def by_language(queries):
    """{lang: its queries}, sorted by lang."""
    langs = sorted({query.lang for query in queries})
    return {lang: [query for query in queries if query.lang == lang] for lang in langs}


def hold_out(queries, dev_share, seed):
    """(train, dev): dev is a random share of each language, none of a language with under 5 queries."""
    dev = set()
    for lang, members in by_language(queries).items():
        members.sort(key=lambda query: random.Random(f"{seed}:{lang}:{query.query_id}").random())
        n_dev = max(1, round(dev_share * len(members))) if dev_share and len(members) >= 5 else 0
        dev.update(members[:n_dev])
    return [query for query in queries if query not in dev], [query for query in queries if query in dev]


# --------------------------------------------------------------------------- batches (Sec. 3.5)

class Sampler:
    """Queries of a language (or all): a shuffled queue a topic, refilled on its own, least used first."""

    def __init__(self, members, args, draw):
        self.args, self.draw, self.uses = args, draw, Counter()
        self.members = defaultdict(list)
        for query in members:
            self.members[query.topic].append(query)
        self.queue = {topic: [] for topic in sorted(self.members)}

    def take(self, size):
        """Up to size queries, no two with a common mark; at --topic-power 0 topics differ by at most one."""
        batch, taken, n_of, topics = [], set(), Counter(), list(self.queue)
        while topics and len(batch) < size:
            if self.args.topic_power:
                portion = [len(self.members[topic]) ** self.args.topic_power for topic in topics]
                topic = self.draw.choices(topics, portion)[0]
            else:
                topic = min(topics, key=lambda topic: (n_of[topic], self.draw.random()))
            query = self.fitting(topic, taken, refill=self.args.short_batch == "reuse" or not n_of[topic])
            if query is None:
                topics.remove(topic)
                continue
            self.queue[topic].remove(query)
            self.uses[query] += 1
            n_of[topic] += 1
            taken.update(query.marks)
            batch.append(query)
        return batch

    def fitting(self, topic, taken, refill):
        """The first query of the topic's queue that has no mark in taken; None where a refill gives none."""
        fits = (query for query in self.queue[topic] if taken.isdisjoint(query.marks))
        query = next(fits, None)
        if query is None and refill:
            self.draw.shuffle(self.members[topic])
            self.queue[topic] = sorted(self.members[topic], key=lambda query: self.uses[query])
            return self.fitting(topic, taken, refill=False)
        return query


def batches(queries, args):
    """Yield for ever (language or "mixed", queries, how often each was used before), by the seed alone.

    The language that is owed most is next, by chance among equals: each has its portion to within one batch.
    """
    draw = random.Random(f"{args.seed}:batches")
    groups = {"mixed": queries} if args.mixed else by_language(queries)
    samplers = {lang: Sampler(members, args, draw) for lang, members in groups.items()}
    portion = {lang: len(members) ** args.language_power for lang, members in groups.items()}
    owed = dict.fromkeys(groups, 0.0)
    while True:
        for lang in groups:
            owed[lang] += portion[lang] / sum(portion.values())
        lang = max(groups, key=lambda lang: (round(owed[lang], 6), draw.random()))
        owed[lang] -= 1
        batch = samplers[lang].take(args.batch_size)
        yield lang, batch, [samplers[lang].uses[query] - 1 for query in batch]


def write_batches(path, plan):
    """--log-batches: a line a step."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for step, (lang, batch, _) in enumerate(plan, 1):
            file.write(dump({"step": step, "lang": lang, "query_ids": [query.query_id for query in batch],
                             "topics": [query.topic for query in batch],
                             "langs": [query.lang for query in batch]}))


def choose(record, visit, args):
    """[positive, negatives ...] for a query's visit-th use: each is used once before one repeats."""
    draw = random.Random(f"{args.seed}:{record['lang']}:{record['query_id']}")
    negatives, positives = record.get("negative_passages", []), record["positive_passages"]
    order = draw.sample(range(len(negatives)), len(negatives))
    chosen = [negatives[order[(visit * args.negatives + n) % len(order)]] for n in range(args.negatives)]
    return [positives[(draw.randrange(len(positives)) + visit) % len(positives)], *chosen]


def names(lang, passages):
    """By what passages are known again: docid or text, since a corpus may hold one text under two docids."""
    return {name for p in passages for name in ((lang, p["docid"]), normalise(p["text"]))}


def collate(records, uses, args):
    """(passages, target, masked) of N records; M = N (1 + negatives): a query's positive, then its negatives.

    target (N,) is the row of each query's positive; masked (N, M) is True where a passage must not count as
    its negative: it is relevant, whoever brought it, or, with --no-in-batch, another query's.
    """
    passages = [passage for record, visit in zip(records, uses) for passage in choose(record, visit, args)]
    owner = np.arange(len(passages)) // (1 + args.negatives)                    # (M,)
    known = [names(records[of]["lang"], [passage]) for of, passage in zip(owner, passages)]
    target = np.arange(len(records)) * (1 + args.negatives)
    masked = np.zeros((len(records), len(passages)), bool)
    for n, record in enumerate(records):
        relevant = names(record["lang"], record["positive_passages"] + record.get("false_negatives", []))
        masked[n] = [not relevant.isdisjoint(of) for of in known]
        masked[n] |= args.no_in_batch & (owner != n)
        masked[n, target[n]] = False
    return passages, target, masked


# --------------------------------------------------------------------------- loss (Sec. 3.5)

def weights(queries, args):
    """The function w(q), as said at the top; its range in each language is printed."""
    if args.weighting == "none":
        return lambda query: 1.0
    n_batches = max(DRAWS, math.ceil(len(queries) / args.batch_size))
    drawn = [query for _, batch, _ in islice(batches(queries, args), n_batches) for query in batch]

    def g(label):
        """{language or topic: its g}; label gives that of a query."""
        power = {"inverse": -0.5, "proportional": 0.5, "uniform": 0}[args.weighting]
        raw = {of: n ** power for of, n in Counter(map(label, queries)).items()}
        middle = np.median([raw[label(query)] for query in drawn])
        bounded = {of: np.clip(value, middle / 2, middle * 2) for of, value in raw.items()}
        mean = np.mean([bounded[label(query)] for query in drawn])
        return {of: value / mean for of, value in bounded.items()}

    of_lang, of_topic = g(lambda query: query.lang), g(lambda query: query.topic)

    def w(query):
        return args.alpha * of_lang[query.lang] + args.beta * of_topic[query.topic]

    for lang, members in by_language(queries).items() if RANK == 0 else ():
        low, middle, high = np.quantile([w(query) for query in members], (0, 0.5, 1))
        short = f", fewer than a batch of {args.batch_size}" if len(members) < args.batch_size else ""
        say(f"{lang}: {len(members)} queries{short}; weight {low:.2f} to {high:.2f}, median {middle:.2f}")
    return w


def contrastive_loss(query, passages, target, masked, weight, args):
    """(weighted InfoNCE of a batch, its mean without weights, share of queries whose positive is first).

    query (N, D), passages (M, D) of unit vectors; target (N,) the row of each query's positive; masked (N, M)
    True where a passage must not count as a negative; weight (N,).
    """
    logits = query @ passages.T / args.temperature                             # (N, M) = (N, D) @ (D, M)
    logits = logits.masked_fill(masked, -math.inf)
    positive = logits.gather(1, target[:, None])                               # (N, 1)
    plain = logits.logsumexp(1) - positive[:, 0]                               # (N,)
    loss = weight * plain
    if args.weight_on == "negatives":  # exp(s + log w) = w exp(s)
        shift = weight.log()[:, None].expand_as(logits)                        # (N, M)
        loss = (logits + shift.scatter(1, target[:, None], 0.0)).logsumexp(1) - positive[:, 0]
    n_queries = args.batch_size if args.short_batch == "shrink" else len(query)
    return loss.sum() / n_queries, plain.mean(), (logits.argmax(1) == target).float().mean()


class Embedding:
    """The unit vectors of texts, which the loss is taken of, and the way of its gradient back to the weights.

    Texts go through the model in chunks of like length, since one wide batch would be a third padding; each
    process takes its share. With --chunk-tokens a chunk goes twice, without its activations and with them, so
    that memory holds those of one chunk (gradient cache, Gao et al. 2021).
    """

    def __init__(self, encoder, texts, kind, step, args):
        import torch
        self.encoder, self.kind, self.step, self.args = encoder, kind, step, args
        self.token_ids = encoder.tokenize(texts, kind)
        length = [len(ids) for ids in self.token_ids]
        self.n_tokens = sum(length)
        budget = args.chunk_tokens or len(texts) * max(length) // 4
        self.chunks = []  # of row numbers
        for row in sorted(range(len(texts)), key=lambda row: length[row])[RANK::WORLD]:
            if not self.chunks or (len(self.chunks[-1]) + 1) * length[row] > budget:
                self.chunks.append([])
            self.chunks[-1].append(row)
        with torch.set_grad_enabled(args.chunk_tokens is None):
            self.parts = list(self.forward())
        width = encoder.model.get_embedding_dimension()
        self.vectors = torch.zeros(len(texts), width, device=encoder.device)  # a leaf of the graph
        for rows, part in zip(self.chunks, self.parts):
            self.vectors[rows] = part.detach()
        if WORLD > 1:
            torch.distributed.all_reduce(self.vectors)  # each row has one owner, the others add zeros
        self.vectors.requires_grad_()

    def forward(self):
        """Yield the vectors of each chunk. Dropout is seeded by chunk: a second time gives the same."""
        import torch
        for number, rows in enumerate(self.chunks):
            torch.manual_seed(hash((self.args.seed, self.step, self.kind == "query", RANK, number)))
            yield self.encoder.forward([self.token_ids[row] for row in rows], self.kind)

    def backward(self):
        """From the gradient of the vectors to that of the weights."""
        parts = self.forward() if self.args.chunk_tokens else self.parts
        for rows, part in zip(self.chunks, parts):
            part.backward(self.vectors.grad[rows])


def share_gradients(parameters):
    """Add up the gradients of the processes, each of which has those of its texts."""
    import torch
    for parameter in parameters if WORLD > 1 else ():
        if parameter.grad is None:  # nothing reads it, or this process had no text
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)


def validate(encoder, dev_queries, file, args):
    """{lang: {queries, loss, mrr@10}}; a held-out query searches its language's held-out passages.

    A passage that scores like the best positive ranks above it. Processes share the languages.
    """
    found = {}
    for lang, members in list(by_language(dev_queries).items())[RANK::WORLD]:
        records = list(read_records(file, members[:DEV_QUERIES]))
        pool = {p["docid"]: p for record in records
                for p in record["positive_passages"] + record.get("negative_passages", [])}
        passages = encoder.encode([encoder.passage_text(passage) for passage in pool.values()], "passage")
        queries = encoder.encode([record["query"] for record in records], "query")
        losses, reciprocal_ranks = [], []
        for record, scores in zip(records, queries @ passages.T):               # of (N, M) = (N, D) @ (D, M)
            score = dict(zip(pool, scores))
            positives = [score[p["docid"]] for p in record["positive_passages"]]
            negatives = [score[p["docid"]] for p in record.get("negative_passages", [])]
            logits = np.array([positives[0], *negatives]) / args.temperature
            losses.append(np.logaddexp.reduce(logits) - logits[0])
            for passage in record["positive_passages"] + record.get("false_negatives", []):
                score.pop(passage["docid"], None)
            rank = 1 + sum(value >= max(positives) - TIE for value in score.values())
            reciprocal_ranks.append(1 / rank if rank <= 10 else 0.0)
        found[lang] = {"queries": len(records), "loss": round(float(np.mean(losses)), 4),
                       "mrr@10": round(float(np.mean(reciprocal_ranks)), 4)}
    if WORLD > 1:
        from torch.distributed import all_gather_object
        parts = [None] * WORLD
        all_gather_object(parts, found)
        found = {lang: values for part in parts for lang, values in part.items()}
    return dict(sorted(found.items()))


# --------------------------------------------------------------------------- the loop

def train(args, encoder, queries, dev_queries, folder, run_key):
    """Train in place; the weights of the epoch with the best dev score are in best.pt. Returns the state.

    Every draw depends on the seed and the step alone, so going on from a checkpoint needs no random state:
    the batches are drawn again, and each step seeds its own dropout.
    """
    import torch
    model, parameters = encoder.model, list(encoder.model.parameters())
    optimizer = torch.optim.Adam(parameters, fused=True)
    state, log = resume(folder, model, optimizer, run_key)
    file, weight_of = open(args.input, "rb"), weights(queries, args)
    warmup = max(1, round(args.warmup * args.max_steps))
    plan = islice(batches(queries, args), state["step"], args.max_steps)
    bar = progress(plan, total=args.max_steps, initial=state["step"], desc="train", disable=RANK > 0)
    for step, (lang, batch, uses) in enumerate(bar, state["step"] + 1):
        if args.patience and state["without_gain"] >= args.patience:
            break
        started = time.perf_counter()
        records = list(read_records(file, batch))
        passages, target, masked = collate(records, uses, args)
        weight = np.array([weight_of(query) for query in batch], np.float32)
        target, masked, weight = (torch.from_numpy(a).to(encoder.device) for a in (target, masked, weight))
        model.train()
        texts = [encoder.passage_text(passage) for passage in passages]
        query = Embedding(encoder, [record["query"] for record in records], "query", step, args)
        passage = Embedding(encoder, texts, "passage", step, args)
        loss, plain, accuracy = contrastive_loss(query.vectors, passage.vectors, target, masked, weight, args)
        loss.backward()
        query.backward()
        passage.backward()
        share_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)
        check_finite(step, loss.item(), norm.item(), lang, batch, folder)
        lr = args.lr * min(step / warmup, (args.max_steps + 1 - step) / (args.max_steps + 1 - warmup))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        state["step"] = step
        state["clipped"] += bool(args.clip and norm > args.clip)
        n_tokens, seconds = query.n_tokens + passage.n_tokens, time.perf_counter() - started
        line = {"step": step, "epoch": round(step / args.epoch_steps, 3), "lang": lang, "loss": loss.item(),
                "plain_loss": plain.item(), "accuracy": accuracy.item(), "lr": lr,
                "grad_norm": norm.item(), "tokens_per_s": round(n_tokens / seconds)}
        log.write(dump(line).encode())
        epoch_ends = step % args.epoch_steps == 0 or step == args.max_steps
        if epoch_ends:
            model.eval()
            dev = validate(encoder, dev_queries, file, args)
            line = {"step": step, "epoch": line["epoch"], "dev_mrr@10": end_epoch(state, dev), "dev": dev}
            log.write(dump(line).encode())
            if state["without_gain"] == 0:
                save(folder / "best.pt", model.state_dict())
        if epoch_ends or step % args.save_every == 0:
            state["log_bytes"] = log.tell()
            save(folder / "last.pt", {"run": run_key, "state": state, "model": model.state_dict(),
                                      "optimizer": optimizer.state_dict()})
    return state


def check_finite(step, loss, norm, lang, batch, folder):
    """DataError before a step that would ruin the weights."""
    if not math.isfinite(loss + norm):
        ids = " ".join(query.query_id for query in batch)
        raise DataError(f"step {step}: loss {loss}, gradient norm {norm}, {lang} queries {ids}; "
                        f"lower --lr or raise --temperature; the last good state, if any: {folder}/last.pt")


def end_epoch(state, dev):
    """The dev score, noted in the state: mean MRR@10 over queries; without any the last epoch is best."""
    score = state["step"]
    if dev:
        n_queries = [values["queries"] for values in dev.values()]
        score = float(np.average([values["mrr@10"] for values in dev.values()], weights=n_queries))
    state["without_gain"] += 1
    if score > state["best"]:
        state |= {"best": score, "dev": dev, "without_gain": 0}
    return round(score, 4) if dev else None


def resume(folder, model, optimizer, run_key):
    """(state, log file) of a start, or as last.pt left them: what the log has from later comes again."""
    import torch
    state = {"step": 0, "log_bytes": 0, "clipped": 0, "best": -1, "dev": {}, "without_gain": 0}
    if (folder / "last.pt").exists():
        saved = torch.load(folder / "last.pt", weights_only=True, map_location="cpu")
        if saved["run"] != run_key:
            before, now = json.loads(saved["run"])[0], json.loads(run_key)[0]
            differ = [f"--{key.replace('_', '-')}" for key in now if now[key] != before.get(key)]
            raise DataError(f"{folder} is of another run ({' '.join(differ) or 'input or encoder'} differ); "
                            "go on with its arguments, pass --overwrite to start anew, or take another --out")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        say(f"going on from step {state['step']}")
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / "train_log.jsonl" if RANK == 0 else os.devnull, "ab", buffering=0)
    if RANK == 0:
        log.truncate(state["log_bytes"])
    return state, log


def save(path, content):
    """Of the first process; the others hold the same."""
    import torch
    if RANK == 0:
        with atomic(path) as temporary:
            torch.save(content, temporary)


def main(argv=None):
    args = build_parser().parse_args(argv)
    output = Output(args, [args.input], [args.encoder])
    if args.max_steps != 0 and output.is_done():
        return
    queries, dev_queries = hold_out(read_index(args), args.dev_share, args.seed)
    if not queries or args.no_in_batch and not args.negatives:
        raise DataError(f"{args.input}: nothing to train on; check --lang, --dev-share and --negatives")
    args.epoch_steps = math.ceil(len(queries) / args.batch_size)
    n_steps = min(args.epochs * args.epoch_steps, args.max_steps or math.inf)
    if args.log_batches and RANK == 0:
        write_batches(args.log_batches, islice(batches(queries, args), n_steps))
    if args.max_steps == 0:
        return
    args.max_steps = n_steps
    folder = Path(f"{args.out}.checkpoint")
    if RANK == 0 and args.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    if WORLD > 1:
        import torch.distributed
        torch.distributed.init_process_group()  # gloo for CPUs, nccl for GPUs; waits for all
    encoder = from_flags(args.encoder, args)
    encoder.similarity = "cosine"  # as the loss wants it, whatever the maker used
    args.temperature = args.temperature or encoder.default_temperature
    if sys.platform == "linux":
        for option in (-3, -1):  # glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: keep freed blocks up to 1 GB,
            ctypes.CDLL(None).mallopt(option, 1 << 30)  # else half of a step's CPU time goes to page faults
    if args.gradient_checkpointing:
        encoder.model.gradient_checkpointing_enable()
    state = train(args, encoder, queries, dev_queries, folder, output.key(output.meta))
    if RANK == 0:
        finish(args, encoder, queries, dev_queries, folder, state, output)


def finish(args, encoder, queries, dev_queries, folder, state, output):
    """Put the model in place, with card and log."""
    import torch
    lines = (folder / "train_log.jsonl").read_text("utf-8").splitlines()
    epochs = [line["dev"] for line in map(json.loads, lines) if "dev" in line]
    for lang, values in state["dev"].items():
        highest = max(dev[lang]["mrr@10"] for dev in epochs)
        if values["mrr@10"] < highest - FALL:
            say(f"warning: {lang}: dev MRR@10 is {values['mrr@10']:.2f} in the epoch kept, was {highest:.2f}")
    encoder.report_cut()
    encoder.model.load_state_dict(torch.load(folder / "best.pt", weights_only=True, map_location="cpu"))
    counts = {"steps": state["step"], "clipped": round(state["clipped"] / state["step"], 4),
              "train_queries": len(queries), "dev_queries": len(dev_queries), "processes": WORLD,
              "temperature": args.temperature, "dev": state["dev"],
              "best_dev_mrr@10": round(state["best"], 4) if dev_queries else None,
              "peak_gpu_mb": torch.cuda.max_memory_allocated() >> 20,
              "by_lang": {lang: len(members) for lang, members in by_language(queries).items()}}
    with atomic_folder(args.out) as model:
        encoder.save(model)
        shutil.copy(folder / "train_log.jsonl", model)
        (model / "README.md").write_text(card(args, encoder, counts), "utf-8")
        shutil.rmtree(args.out, ignore_errors=True)  # never beside the meta of another
        output.finish(**counts)
    shutil.rmtree(folder)


def card(args, encoder, counts):
    """README.md of the model."""
    facts = {"input": args.input, "started from": encoder.name, "arguments": vars(args), "counts": counts,
             "vectors": encoder.settings()}
    return "\n".join([
        "---", "library_name: sentence-transformers", "pipeline_tag: sentence-similarity",
        f"language: {json.dumps(list(counts['by_lang']))}", "---", f"# {Path(args.out).name}", "",
        "A bi-encoder for monolingual retrieval, trained on hard negatives in monolingual multi-topic",
        "batches with a weighted contrastive loss (Huang et al., EMNLP 2025, arXiv 2509.09459).", "",
        "```json", json.dumps(facts, ensure_ascii=False, indent=1, default=str), "```", ""])


if __name__ == "__main__":
    run(main)
