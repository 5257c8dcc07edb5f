"""Train the bi-encoder on monolingual multi-topic batches with a weighted contrastive loss (Sec. 3.5).

Source  Sec. 3.5. A batch holds one language and as many topics as that has, both drawn uniformly. Its loss is
        the mean of w(q) L(q), L(q) = -log( exp(s(q,d+)/t) / sum_d exp(s(q,d)/t) ): s cosine, t temperature,
        d+ a positive of query q, d also its hard negatives and the other passages of the batch.
        w(q) = alpha g(language) + beta g(topic); the paper has no formula for g. Here g = p^-1/2, p the share
        of the training queries, at 1/2 to 2 times its median over the queries drawn, with mean 1 over them:
        w averages alpha + beta = 0.85, the best row of Table 9, and is at most 4 times its median.
Reads   topics.jsonl of stage 04, or Tevatron's layout with lang and topic (without topic: --topic-power 1)
Writes  OUT/ a sentence-transformers folder with card and train_log.jsonl; OUT.checkpoint/ until it is done
Usage   [torchrun --nproc-per-node 8] 05_train.py --input topics.jsonl --encoder BAAI/bge-m3 --out model
Cost    sample, two cores: under a minute. A killed run goes on where it stopped, to the same weights
"""
import json
import math
import random
import shutil
import time
from collections import Counter, defaultdict
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import (DataError, Output, Parser, atomic, atomic_folder, dump, normalise, numbered_queries,
                    open_bytes, parse_query, positive_float, positive_int, progress, run, say, share,
                    text_key, whole)
from encoder import CPU_TOKENS, encoder_flags, faster, from_flags, keep_blocks, model_digests, usable
from search import gather, world

DEV_QUERIES = 100  # held-out queries a language that validation reads, whose passages they search
TIE = 1e-6         # scores this close are equal
DRAWS = 1000       # batches, or an epoch if that is more, over which the weights average
RANK, WORLD = world()  # this process, of so many, under torchrun


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
    flag("--clip", type=positive_float, metavar="NORM", help="clip gradients; undoes a language's weight")
    flag("--temperature", type=positive_float, help="t; default: 0.01 for E5, else 0.02, as their makers")
    flag("--alpha", type=positive_float, default=0.45, help="mean weight of the language (Table 9)")
    flag("--beta", type=positive_float, default=0.40, help="mean weight of the topic (Table 9)")
    flag("--weighting", choices=["inverse", "none"], default="inverse", help="w(q) as said above, or 1")
    flag("--weight-on", choices=["loss", "negatives"], default="loss", help="what w(q) multiplies (Sec. 3.5)")
    flag("--language-power", type=share, default=0.0, metavar="P", help="draw by share^P (Sec. 3.5: 0)")
    flag("--topic-power", type=share, default=0.0, metavar="P", help="the same for the topics in a batch")
    flag("--mixed", action="store_true", help="batches of all languages, as they come (Table 7)")
    flag("--short-batch", choices=["reuse", "shrink"], default="reuse",
         help="a topic that runs out gives used queries, none twice a batch; or a smaller batch and loss")
    flag("--chunk-tokens", type=positive_int, metavar="T", help="cache gradients: T tokens in memory at once")
    flag("--gradient-checkpointing", action="store_true", help="keep fewer activations; a third more time")
    flag("--dev-share", type=share, default=0.1, help="share of each language held out (Sec. 4.1)")
    flag("--patience", type=positive_int, metavar="E", help="stop when E epochs brought no better dev score")
    flag("--log-batches", metavar="FILE", help="write batches: step, lang, query_ids, topics, langs")
    flag("--save-every", type=positive_int, default=200, metavar="S", help="steps between checkpoints")
    flag("--out", required=True, metavar="FOLDER", help="the trained model")
    encoder_flags(parser)
    return parser


class Query(NamedTuple):
    """What batches are made from, some 300 bytes; its texts are read when a batch holds it."""
    lang: str
    query_id: str
    topic: int
    offset: int   # of its line in the file
    marks: tuple  # hashes of its question and what answers it, which no other query of a batch may share


def read_index(args):
    """The Query of each record of the input."""
    if args.input.endswith(".gz"):
        raise DataError(f"{args.input}: records are read by offset, which gzip does not allow; gunzip it")
    queries = []
    with open_bytes(args.input) as lines:
        starts = [0, *accumulate(map(len, lines))]
    for number, record in numbered_queries(args.input, args.lang, args.limit, judged=True):
        key = record["lang"], record["query_id"]
        where = f"{args.input}:{number}: query {key[1]!r} ({key[0]})"
        topic = record.get("topic", 0 if args.topic_power == 1 else None)
        n_negatives = len(record.get("negative_passages", []))
        if n_negatives < args.negatives:
            raise DataError(f"{where} has {n_negatives} negatives, --negatives wants {args.negatives}; lower "
                            "it, or bring all to N with 03_generate_negatives.py")
        if type(topic) is not int:
            raise DataError(f"{where}: 'topic' is {json.dumps(topic)[:40]}, want a whole number; make it "
                            "with 04_cluster_topics.py, or drop it and pass --topic-power 1")
        marks = [normalise(record["query"]), *((key[0], p["docid"]) for p in record["positive_passages"])]
        queries.append(Query(*key, topic, starts[number - 1], tuple(map(hash, marks))))
    answers = defaultdict(set)  # {question: marks of all that ask it}: it may stand under several ids
    for query in queries:
        answers[query.lang, query.marks[0]].update(query.marks)
    return [query._replace(marks=tuple(answers[query.lang, query.marks[0]])) for query in queries]


def read_records(file, queries):
    """Yield the record of each query, from the open input."""
    for query in queries:
        file.seek(query.offset)
        record = parse_query(file.name, f"byte {query.offset}", file.readline(), [query.lang])
        yield record | {"marks": query.marks}


def by_language(queries):
    """{lang: its queries}, sorted by lang."""
    langs = sorted({query.lang for query in queries})
    return {lang: [query for query in queries if query.lang == lang] for lang in langs}


def hold_out(queries, dev_share, seed):
    """(train, dev): dev is a drawn share of each language with 5 queries; a question under all its ids."""
    dev = set()
    for members in by_language(queries).values():  # of translations, which share ids, the same ones
        members.sort(key=lambda query: random.Random(f"{seed}:{query.query_id}").random())
        n_dev = max(1, round(dev_share * len(members))) if dev_share and len(members) >= 5 else 0
        asked = {query.marks for query in members[:n_dev]}
        dev.update(query for query in members if query.marks in asked)
    return [query for query in queries if query not in dev], [query for query in queries if query in dev]


# --------------------------------------------------------------------------- batches and loss (Sec. 3.5)

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
        query = next((query for query in self.queue[topic] if taken.isdisjoint(query.marks)), None)
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
    first = open(path, "rb").readline() if Path(path).exists() else b""
    if first and not first.startswith(b'{"step": '):
        raise DataError(f"--log-batches {path}: the file is there, and no log of batches; take another")
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for step, (lang, batch, _) in enumerate(plan, 1):
            file.write(dump({"step": step, "lang": lang, "query_ids": [query.query_id for query in batch],
                             "topics": [q.topic for q in batch], "langs": [q.lang for q in batch]}))


def choose(record, visit, args):
    """[positive, negatives ...] for a query's visit-th use: each is used once before one repeats."""
    draw = random.Random(f"{args.seed}:{record['lang']}:{record['query_id']}")
    negatives, positives = record.get("negative_passages", []), record["positive_passages"]
    order = draw.sample(range(len(negatives)), len(negatives))
    chosen = [negatives[order[(visit * args.negatives + n) % len(order)]] for n in range(args.negatives)]
    return [positives[(draw.randrange(len(positives)) + visit) % len(positives)], *chosen]


def names(lang, passages):
    """Hashes of what passages are known by: docid or text, which a corpus may hold under two docids."""
    return {hash(name) for p in passages for name in ((lang, p["docid"]), text_key(p))}


def relevant_to(record):
    """names of what is no negative of a record: its positives and false negatives, its question's answers."""
    own = names(record["lang"], record["positive_passages"] + record.get("false_negatives", []))
    return own.union(record.get("marks", ()))  # those are of all that ask the same


def collate(records, uses, args):
    """(passages, target, masked) of N records; M = N (1 + negatives): a query's positive, then its negatives.

    target (N,): the positive's row; masked (N, M): relevant ones, and with --no-in-batch those of others.
    """
    passages = [passage for record, visit in zip(records, uses) for passage in choose(record, visit, args)]
    owner = np.arange(len(passages)) // (1 + args.negatives)                    # (M,)
    known = [names(records[of]["lang"], [passage]) for of, passage in zip(owner, passages)]
    target = np.arange(len(records)) * (1 + args.negatives)
    masked = np.zeros((len(records), len(passages)), bool)
    for n, record in enumerate(records):
        relevant = relevant_to(record)
        masked[n] = [not relevant.isdisjoint(of) for of in known]
        masked[n] |= args.no_in_batch & (owner != n)
        masked[n, target[n]] = False
    return passages, target, masked


def weights(queries, args):
    """The function w(q), as said at the top; its range in each language is printed."""
    if args.weighting == "none":
        return lambda query: 1.0
    n_batches = max(DRAWS, math.ceil(len(queries) / args.batch_size))
    drawn = [query for _, batch, _ in islice(batches(queries, args), n_batches) for query in batch]

    def g(label):
        """{language or topic: its g}; label gives that of a query."""
        raw = {of: n ** -0.5 for of, n in Counter(map(label, queries)).items()}
        middle = np.median([raw[label(query)] for query in drawn])
        bounded = {of: np.clip(value, middle / 2, middle * 2) for of, value in raw.items()}
        mean = np.mean([bounded[label(query)] for query in drawn])
        return {of: value / mean for of, value in bounded.items()}

    of_lang, of_topic = g(lambda query: query.lang), g(lambda query: query.topic)

    def w(query):
        return args.alpha * of_lang[query.lang] + args.beta * of_topic[query.topic]

    for lang, members in by_language(queries).items() if RANK == 0 else ():
        short = f", fewer than a batch of {args.batch_size}" if len(members) < args.batch_size else ""
        low, middle, high = np.quantile([w(query) for query in members], (0, 0.5, 1))
        say(f"{lang}: {len(members)} queries{short}; weight {low:.2f} to {high:.2f}, median {middle:.2f}")
    return w


def contrastive_loss(query, passages, target, masked, weight, args):
    """Weighted InfoNCE of a batch: query (N, D) and passages (M, D) of unit vectors, weight (N,).

    target (N,) is the row of each query's positive; masked (N, M) is True where a passage is no negative.
    Returns the loss and, so that runs compare, {plain_loss: without weights, accuracy: positives first}.
    """
    from torch.nn.functional import cross_entropy
    logits = query @ passages.T / args.temperature                             # (N, M) = (N, D) @ (D, M)
    logits = logits.masked_fill(masked, -math.inf)
    plain = cross_entropy(logits, target, reduction="none")                    # (N,)
    losses = weight * plain
    if args.weight_on == "negatives":  # exp(s + log w) = w exp(s)
        shift = weight.log()[:, None].expand_as(logits)                        # (N, M)
        losses = cross_entropy(logits + shift.scatter(1, target[:, None], 0.0), target, reduction="none")
    n = args.batch_size if args.short_batch == "shrink" else len(query)
    first = logits.argmax(1) == target                                         # (N,)
    return losses.sum() / n, {"plain_loss": plain.sum().item() / n, "accuracy": first.float().mean().item()}


class Embedding:
    """The unit vectors of texts, in chunks of like length (less padding); each process takes its share.

    With --chunk-tokens a chunk goes through the model twice, without its activations and with them, so that
    memory holds those of one chunk (gradient cache, Gao et al. 2021).
    """

    def __init__(self, encoder, texts, kind, step, args):
        import torch
        self.encoder, self.kind = encoder, kind
        self.seed = args.seed, step, kind == "query", RANK
        self.token_ids = encoder.tokenize(texts, kind)
        length = [len(ids) for ids in self.token_ids]
        self.n_tokens = sum(length)
        most = 2 * CPU_TOKENS if encoder.device == "cpu" else math.inf  # fits its caches: 10% less time
        budget = args.chunk_tokens or min(len(texts) * max(length) // 4, most)
        self.chunks = []  # of row numbers
        for row in sorted(range(len(texts)), key=lambda row: length[row])[RANK::WORLD]:
            if not self.chunks or (len(self.chunks[-1]) + 1) * length[row] > budget:
                self.chunks.append([])
            self.chunks[-1].append(row)
        with torch.set_grad_enabled(args.chunk_tokens is None):
            parts = list(self.forward())
        self.parts = self.forward() if args.chunk_tokens else parts  # runs again in backward(), or is there
        self.vectors = torch.zeros(len(texts), encoder.model.get_embedding_dimension(), device=encoder.device)
        for rows, part in zip(self.chunks, parts):
            self.vectors[rows] = part.detach()
        if WORLD > 1:
            torch.distributed.all_reduce(self.vectors)  # each row has one owner, the others add zeros
        self.vectors.requires_grad_()  # a leaf of the graph

    def forward(self):
        """Yield the vectors of each chunk. Dropout is seeded by chunk: a second time gives the same."""
        import torch
        for number, rows in enumerate(self.chunks):
            torch.manual_seed(hash((*self.seed, number)))
            yield self.encoder.forward([self.token_ids[row] for row in rows], self.kind)

    def backward(self):
        """From the gradient of the vectors to that of the weights."""
        for rows, part in zip(self.chunks, self.parts):
            part.backward(self.vectors.grad[rows])


def share_gradients(parameters):
    """Add up the gradients of the processes, each of which has those of its texts, if any; all dense."""
    import torch
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
        if WORLD > 1:
            torch.distributed.all_reduce(parameter.grad)


def validate(encoder, dev_queries, file):
    """(MRR@10, {lang: {queries, mrr@10}}); a held-out query searches its language's held-out passages.

    A passage that scores like the best positive ranks above it. Processes share the languages.
    """
    found = {}
    for lang, members in list(by_language(dev_queries).items())[RANK::WORLD]:
        records = list(read_records(file, members[:DEV_QUERIES]))
        pool = {p["docid"]: p for record in records
                for p in record["positive_passages"] + record.get("negative_passages", [])}
        known = {docid: names(lang, [passage]) for docid, passage in pool.items()}
        passages = encoder.encode([encoder.passage_text(passage) for passage in pool.values()], "passage")
        queries = encoder.encode([record["query"] for record in records], "query")
        ranks = []
        for record, scores in zip(records, queries @ passages.T):               # of (N, M) = (N, D) @ (D, M)
            score = dict(zip(pool, scores))
            best = max(score[passage["docid"]] for passage in record["positive_passages"])
            relevant = relevant_to(record)
            others = [score[docid] for docid in pool if relevant.isdisjoint(known[docid])]
            ranks.append(1 + sum(value >= best - TIE for value in others))
        mrr = np.mean([1 / rank if rank <= 10 else 0 for rank in ranks])
        found[lang] = {"queries": len(records), "mrr@10": round(float(mrr), 4)}
    dev = dict(sorted(pair for part in gather(found) for pair in part.items()))
    of_queries = [of["mrr@10"] for of in dev.values() for _ in range(of["queries"])]
    return round(float(np.mean(of_queries)), 4) if dev else None, dev


def train(args, encoder, queries, dev_queries, folder, run_key):
    """Train in place, best epoch in best.pt; returns the state. Draws depend on seed and step alone."""
    import torch
    model, parameters = encoder.model, encoder.trainable(args.gradient_checkpointing)
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
        query = Embedding(encoder, [record["query"] for record in records], "query", step, args)
        passage = Embedding(encoder, list(map(encoder.passage_text, passages)), "passage", step, args)
        loss, seen = contrastive_loss(query.vectors, passage.vectors, target, masked, weight, args)
        loss.backward()
        query.backward()
        passage.backward()
        share_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)
        if not math.isfinite(loss.item() + norm.item()):  # a step would ruin the weights
            ids = " ".join(query.query_id for query in batch)
            raise DataError(f"step {step}: loss {loss.item()}, gradient {norm.item()}, {lang} queries {ids}; "
                            f"lower --lr or raise --temperature; {folder} has the last good state, if any")
        lr = args.lr * min(step / warmup, (args.max_steps + 1 - step) / (args.max_steps + 1 - warmup))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        state["step"] = step
        state["queries"] += len(batch)
        state["clipped"] += bool(args.clip and norm > args.clip)
        n_tokens, seconds = query.n_tokens + passage.n_tokens, time.perf_counter() - started
        line = {"step": step, "epoch": round(step / args.epoch_steps, 3), "lang": lang, "loss": loss.item(),
                **seen, "lr": lr, "grad_norm": norm.item(), "tokens_per_s": round(n_tokens / seconds)}
        epoch_ends = step % args.epoch_steps == 0 or step == args.max_steps
        if epoch_ends:
            model.eval()
            score, dev = validate(encoder, dev_queries, file)
            line |= {"dev_mrr@10": score, "dev": dev}
            better = not dev or score > state["best"]  # without held-out queries the last is best
            state["without_gain"] = 0 if better else state["without_gain"] + 1
            if better or score == state["best"]:
                state |= {"best": score, "best_step": step}
                save(folder / "best.pt", model.state_dict())
        log.write(dump(line).encode())
        if epoch_ends or step % args.save_every == 0:
            state["log_bytes"] = log.tell()
            save(folder / "last.pt", {"run": run_key, "state": state, "model": model.state_dict(),
                                      "optimizer": optimizer.state_dict()})
    return state


def resume(folder, model, optimizer, run_key):
    """(state, log file) of a start, or as last.pt left them: what the log has from later comes again."""
    import torch
    state = dict.fromkeys(("step", "best_step", "queries", "clipped", "without_gain", "log_bytes"), 0)
    state["best"] = -1.0
    if (folder / "last.pt").exists():
        with usable(folder / "last.pt", "no checkpoint to be used", "pass --overwrite to start anew"):
            saved = torch.load(folder / "last.pt", weights_only=True, map_location="cpu")
        if saved["run"] != run_key:
            raise DataError(f"{folder} is of another run (flags, input or encoder differ); go on with those, "
                            "pass --overwrite to start anew, or take another --out")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        say(f"going on from step {state['step']}")
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / f"train_log{RANK or ''}.jsonl", "ab", buffering=0)  # the first process's is kept
    log.truncate(state["log_bytes"])
    return state, log


def forget(folder):
    """Delete the checkpoint; what others put there stays."""
    for name in ("last.pt", "best.pt", ".*.pt.*.tmp", "train_log*.jsonl"):
        for path in folder.glob(name):
            path.unlink()
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def save(path, content):
    """Of the first process; the others hold the same."""
    import torch
    if RANK == 0:
        with atomic(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)


def main(argv=None):
    args = build_parser().parse_args(argv)
    output = Output(args, [args.input], model_digests([args.encoder] if args.max_steps != 0 else []))
    done = args.max_steps != 0 and output.is_done()
    if done and not args.log_batches:
        return
    queries, dev_queries = hold_out(read_index(args), args.dev_share, args.seed)
    if not queries or not args.negatives and (args.no_in_batch or args.batch_size == 1):
        raise DataError(f"{args.input}: nothing to train on; check --lang, --dev-share, --negatives, "
                        "--batch-size")
    if args.patience and not dev_queries:
        raise DataError("--patience needs held-out queries; raise --dev-share, or leave it out")
    args.epoch_steps = math.ceil(len(queries) / args.batch_size)
    n_steps = min(args.epochs * args.epoch_steps, args.max_steps or math.inf)
    if args.log_batches and RANK == 0:
        write_batches(args.log_batches, islice(batches(queries, args), n_steps))
    if done or args.max_steps == 0:
        return
    args.max_steps = n_steps
    folder = Path(f"{output.path}.checkpoint")
    if RANK == 0 and args.overwrite:
        forget(folder)
    import torch  # not for the batches alone
    if WORLD > 1:
        torch.distributed.init_process_group()  # gloo for CPUs, nccl for GPUs; waits for all
    encoder = from_flags(args.encoder, args)
    if encoder.given.get("normalise") == "no":
        raise DataError("--settings normalise=no: the loss is of cosines (Sec. 3.5); leave it out")
    encoder.similarity = "cosine"  # as the loss wants it, whatever the maker used
    args.temperature = args.temperature or encoder.default_temperature
    keep_blocks(1 << 30)
    with faster(encoder.device == "cpu"):
        state = train(args, encoder, queries, dev_queries, folder, output.key(output.meta))
    if RANK > 0:
        return
    encoder.report_cut()
    encoder.model.load_state_dict(torch.load(folder / "best.pt", weights_only=True, map_location="cpu"))
    with atomic_folder(output.path) as model:
        encoder.save(model)
        shutil.copy(folder / "train_log.jsonl", model)
        output.finish(model, steps=state["step"], queries_a_step=round(state["queries"] / state["step"], 1),
                      clipped=round(state["clipped"] / state["step"], 4),
                      train_queries=len(queries), dev_queries=len(dev_queries),
                      best_dev_mrr=state["best"], best_step=state["best_step"],
                      temperature=args.temperature, peak_gpu_mb=torch.cuda.max_memory_allocated() >> 20,
                      by_lang=Counter(query.lang for query in queries), vectors=encoder.settings())
        facts = json.dumps(output.meta, ensure_ascii=False, indent=1, default=str)
        card = f"# A bi-encoder trained as in arXiv 2509.09459\n\n```json\n{facts}\n```\n"
        (model / "README.md").write_text(card, "utf-8")
    forget(folder)


if __name__ == "__main__":
    run(main)
