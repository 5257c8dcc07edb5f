"""Train the bi-encoder on monolingual multi-topic batches with a weighted contrastive loss (Sec. 3.5).

Source  Sec. 3.5. Every batch holds one language and as many topics as that language allows; languages are drawn uniformly.
        Loss of query q over its positive, its hard negatives and the other passages of the batch, cosine / temperature:
            L(q) = -log( exp(s(q,d+)/t) / sum_d exp(s(q,d)/t) ),   batch loss = mean of w(q) L(q),   w(q) = alpha_l + beta_c
        The paper gives no formula for alpha_l and beta_c ("based on the portion of each category") and no temperature:
        alpha_l = alpha g(p_l), beta_c = beta g(p_c), p the share of the language or topic among the training queries and
        g its inverse (--weighting), scaled so that g averages 1 and w averages alpha + beta = 0.85, as in the best row of Table 9.
Reads   topics.jsonl of stage 04, or Tevatron's layout with lang and topic (without topic: --no-topic-balance)
Writes  OUT/ a Hugging Face folder that SentenceTransformer(OUT) loads too; OUT.log.jsonl step, loss, lr, ...; OUT.checkpoint/
Usage   python 05_train.py --input runs/sample/topics.jsonl --encoder models/sample --out runs/sample/model
Cost    sample, two cores: under a minute. A killed run goes on where it stopped, to the same weights
"""
import json
import math
import random
import shutil
import time
from collections import Counter, defaultdict
from pathlib import Path

from common import (DataError, Encoder, Output, Parser, atomic, dump, open_text, parse_query, passage_text,
                    positive_int, progress, run, say)


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--input", required=True, metavar="FILE", help="topics.jsonl, or training data in Tevatron's layout")
    parser.add_argument("--encoder", required=True, metavar="MODEL", help="start from this folder or hub id; the paper: BAAI/bge-m3")
    parser.add_argument("--epochs", type=positive_int, default=20, help="an epoch is as many queries as the file has (Sec. 4.1: 20 for BGE-M3)")
    parser.add_argument("--max-steps", type=positive_int, help="stop after this many optimiser steps")
    parser.add_argument("--batch-size", type=positive_int, default=24, help="queries a step (Sec. 4.1)")
    parser.add_argument("--negatives", type=positive_int, default=7, help="hard negatives a query and step, a different choice each time (Sec. 4.1)")
    parser.add_argument("--lr", type=float, default=2e-6, help="highest learning rate (Sec. 4.1: 2e-6 for BGE-M3 and mE5, 3e-6 for mBERT and mDPR)")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps with rising learning rate, 0 to 1; then it falls linearly to 0")
    parser.add_argument("--temperature", type=float, help="tau; default: 0.01 for E5 models, else 0.02, their makers' values (the paper gives none)")
    parser.add_argument("--query-max-len", type=positive_int, default=64, help="tokens of a query that are read (Sec. 4.1)")
    parser.add_argument("--passage-max-len", type=positive_int, default=256, help="tokens of a passage that are read (Sec. 4.1)")
    parser.add_argument("--alpha", type=float, default=0.45, help="mean weight of the language, alpha_l (Table 9)")
    parser.add_argument("--beta", type=float, default=0.40, help="mean weight of the topic, beta_c (Table 9)")
    parser.add_argument("--weighting", choices=["inverse", "proportional", "uniform", "none"], default="inverse",
                        help="g(p): 1/p favours rare languages and topics; p; 1; none: w(q) = 1 (Sec. 3.5)")
    parser.add_argument("--weight-on", choices=["loss", "negatives"], default="loss",
                        help="multiply the query's loss by w(q), or its negatives' terms in the sum (Sec. 3.5 says both)")
    parser.add_argument("--language-sampling", choices=["uniform", "proportional", "temperature"], default="uniform",
                        help="steps of a language: equal, like its share, or like the square root of its share (Sec. 3.5: uniform)")
    parser.add_argument("--short-batch", choices=["reuse", "shrink"], default="reuse",
                        help="when a language's queries are used up in mid-batch: go on with used ones, or leave the batch "
                             "short, its loss scaled by its size; no batch holds a query twice")
    parser.add_argument("--no-same-language", action="store_true", help="batches of mixed languages (ablation of Table 7)")
    parser.add_argument("--no-topic-balance", action="store_true", help="ignore topics when making batches (ablation of Table 7)")
    parser.add_argument("--dev-share", type=float, default=0.1, help="share of each language's queries held out for validation (Sec. 4.1)")
    parser.add_argument("--log-batches", metavar="FILE", help="write each batch as a line: step, lang, query_ids, topics")
    parser.add_argument("--save-every", type=positive_int, default=200, metavar="S", help="steps between checkpoints")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the trained model")
    return parser


# --------------------------------------------------------------------------- data: an index of offsets, never the texts

def read_index(args):
    """One small tuple a record (offset, lang, query_id, topic, positive docids), after checking the whole file."""
    if args.input.endswith(".gz"):
        raise DataError(f"{args.input}: training reads records by offset, which gzip does not allow; gunzip it first")
    index, seen, offset = [], set(), 0
    with open_text(args.input) as lines:
        for number, line in enumerate(lines, 1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            record = parse_query(args.input, number, line, args.lang)
            key = record["lang"], record["query_id"]
            if args.lang and record["lang"] not in args.lang:
                continue
            if key in seen:
                raise DataError(f"{args.input}:{number}: query {key[1]!r} ({key[0]}) is there twice; drop one")
            seen.add(key)
            n_negatives = len(record.get("negative_passages", []))
            if n_negatives < args.negatives:
                raise DataError(f"{args.input}:{number}: query {key[1]!r} has {n_negatives} negatives, --negatives wants "
                                f"{args.negatives}; bring all to N with 03_generate_negatives.py, or lower --negatives")
            if "topic" not in record and not args.no_topic_balance:
                raise DataError(f"{args.input}:{number}: no 'topic'; make it with 04_cluster_topics.py, or pass --no-topic-balance")
            index.append((start, *key, record.get("topic", 0), frozenset(p["docid"] for p in record["positive_passages"])))
            if len(index) == args.limit:
                break
    if not index:
        raise DataError(f"{args.input}: no queries; check the file and --lang")
    return index


def hold_out(index, share, seed):
    """(train, dev) positions in the index; dev is a random share of each language, none of a language with under 5."""
    by_lang = defaultdict(list)
    for i, (_, lang, query_id, _, _) in enumerate(index):
        by_lang[lang].append((random.Random(f"{seed}:{lang}:{query_id}").random(), i))
    dev = {i for group in by_lang.values() if len(group) >= 5
           for _, i in sorted(group)[:max(1, round(share * len(group))) if share else 0]}
    return [i for i in range(len(index)) if i not in dev], sorted(dev)


class Records:
    """Reads records from the file by offset, so that memory does not grow with the file."""

    def __init__(self, args):
        self.path, self.lang, self.file = args.input, args.lang, open_text(args.input)

    def __getitem__(self, offset):
        self.file.seek(offset)
        return parse_query(self.path, f"byte {offset}", self.file.readline(), self.lang)


# --------------------------------------------------------------------------- batches (Sec. 3.5)

def spread(counts, size):
    """How many of each topic to take: as equal as the counts allow, `size` in all. counts: {topic: available}."""
    taken = dict.fromkeys(counts, 0)
    while size and any(taken[t] < counts[t] for t in counts):
        open_topics = [t for t in counts if taken[t] < counts[t]]
        level = min(taken[t] for t in open_topics)
        for topic in [t for t in open_topics if taken[t] == level][:size]:
            taken[topic] += 1
            size -= 1
    return taken


class Pool:
    """The queries of one language (or of all): drawn without repeats until used up, then shuffled anew."""

    def __init__(self, members, index, draw, by_topic):
        self.members, self.index, self.draw, self.by_topic = members, index, draw, by_topic
        self.left = []

    def refill(self):
        self.left = list(self.members)
        self.draw.shuffle(self.left)

    def take(self, size, short_batch):
        """Up to size positions, no two the same query or with a positive in common, topics spread evenly."""
        batch, positives = [], set()
        if not self.left:
            self.refill()
        self._take_into(batch, positives, size)
        if len(batch) < size and short_batch == "reuse" and len(batch) < len(self.members):
            if not self.left:
                self.refill()
                self._take_into(batch, positives, size)
        return batch

    def _take_into(self, batch, positives, size):
        available = defaultdict(list)
        for i in self.left:
            if i not in batch:
                available[self.index[i][3] if self.by_topic else 0].append(i)
        order = sorted(available)
        self.draw.shuffle(order)
        chosen = set()
        while len(batch) < size and any(available.values()):
            # the topic least present in the batch so far gives the next query
            present = Counter(self.index[i][3] if self.by_topic else 0 for i in batch)
            topic = min((t for t in order if available[t]), key=lambda t: (present[t], order.index(t)))
            i = available[topic].pop(0)
            key = {(self.index[i][1], d) for d in self.index[i][4]}
            if not key & positives:
                batch.append(i)
                chosen.add(i)
                positives |= key
        self.left = [i for i in self.left if i not in chosen]


def batches(train, index, args):
    """Yield for ever (language or "mixed", positions): the same for the same seed, so a resumed run replays it."""
    draw = random.Random(f"{args.seed}:batches")
    by_lang = defaultdict(list)
    for i in train:
        by_lang["mixed" if args.no_same_language else index[i][1]].append(i)
    pools = {lang: Pool(members, index, draw, not args.no_topic_balance) for lang, members in sorted(by_lang.items())}
    power = {"uniform": 0, "proportional": 1, "temperature": 0.5}[args.language_sampling]
    share = {lang: len(pool.members) ** power for lang, pool in pools.items()}
    steps_per_epoch = steps_in_epoch(len(train), args)
    owed = dict.fromkeys(pools, 0.0)  # steps a language has coming; whole ones are spent, the rest carries over
    while True:
        plan = []
        for lang in pools:
            owed[lang] += steps_per_epoch * share[lang] / sum(share.values())
        for lang in sorted(pools, key=lambda l: (-(owed[l] % 1), l)):
            plan += [lang] * int(owed[lang])
        for lang in sorted(pools, key=lambda l: (-(owed[l] % 1), l))[:max(0, steps_per_epoch - len(plan))]:
            plan.append(lang)
        for lang in pools:
            owed[lang] -= plan.count(lang)
        draw.shuffle(plan)
        for lang in plan:
            yield lang, pools[lang].take(args.batch_size, args.short_batch)


def steps_in_epoch(n_queries, args):
    return max(1, math.ceil(n_queries / args.batch_size))


def choose(record, visit, args):
    """(positive, negatives) of a query's visit-th use: each negative is used once before one repeats."""
    draw = random.Random(f"{args.seed}:{record['lang']}:{record['query_id']}")
    order = draw.sample(range(len(record["negative_passages"])), len(record["negative_passages"]))
    first = visit * args.negatives
    negatives = [record["negative_passages"][order[(first + j) % len(order)]] for j in range(args.negatives)]
    positives = record["positive_passages"]
    return positives[(draw.randrange(len(positives)) + visit) % len(positives)], negatives


# --------------------------------------------------------------------------- loss (Sec. 3.5)

def weights(train, index, args):
    """{(lang, topic): w(q)} with w(q) = alpha g(p_lang) + beta g(p_topic), where g averages 1 over the training queries."""
    if args.weighting == "none":
        return defaultdict(lambda: 1.0)

    def g(values):
        counts = Counter(values)
        raw = {v: {"inverse": 1 / n, "proportional": n, "uniform": 1}[args.weighting] for v, n in counts.items()}
        mean = sum(raw[v] * n for v, n in counts.items()) / len(values)
        return {v: r / mean for v, r in raw.items()}

    g_lang, g_topic = g([index[i][1] for i in train]), g([index[i][3] for i in train])
    return {(lang, topic): args.alpha * g_lang[lang] + args.beta * g_topic[topic] for lang in g_lang for topic in g_topic}


def contrastive_loss(query, passages, target, masked, weight, temperature, weight_on="loss", size=None):
    """Weighted InfoNCE of a batch, a scalar.

    query (N, D) and passages (M, D) unit vectors, target (N,) the row of each query's positive, masked (N, M) True where a
    passage must not count as a negative, weight (N,). size: divide by this many queries (default N).
    """
    import torch
    logits = query @ passages.T / temperature                       # (N, M)
    logits = logits.masked_fill(masked, -torch.inf)
    if weight_on == "negatives":  # exp(s + log w) = w exp(s)
        shift = weight.log()[:, None].expand_as(logits).clone()     # (N, M)
        shift.scatter_(1, target[:, None], 0.0)
        return torch.nn.functional.cross_entropy(logits + shift, target, reduction="sum") / (size or len(query))
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")  # (N,)
    return (weight * loss).sum() / (size or len(query))


def collate(records, visits, args):
    """The texts of a step and who is whose: (queries, passages, target, masked) for a list of records."""
    import torch
    queries, texts, keys, target = [], [], [], []
    for record, visit in zip(records, visits):
        positive, negatives = choose(record, visit, args)
        target.append(len(texts))
        queries.append(record["query"])
        texts += [passage_text(p) for p in (positive, *negatives)]
        keys += [(record["lang"], p["docid"]) for p in (positive, *negatives)]
    masked = torch.zeros(len(records), len(texts), dtype=torch.bool)
    for q, record in enumerate(records):  # what is relevant to q is no negative of q, whoever brought it
        relevant = {(record["lang"], p["docid"]) for key in ("positive_passages", "false_negatives") for p in record.get(key, [])}
        masked[q] = torch.tensor([key in relevant for key in keys])
        masked[q, target[q]] = False
    return queries, texts, torch.tensor(target), masked


def embed(encoder, texts, kind):
    """(N, D) with gradients, in chunks of like length: the same vectors as one wide batch, with less padding."""
    import torch
    token_ids = encoder.tokenize(texts, kind)
    order = sorted(range(len(texts)), key=lambda i: len(token_ids[i]))
    chunk = max(16, math.ceil(len(texts) / 4))
    vectors = torch.cat([encoder.forward([token_ids[i] for i in order[at:at + chunk]]) for at in range(0, len(order), chunk)])
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return vectors[back.to(vectors.device)]


# --------------------------------------------------------------------------- validation

def validate(encoder, records, index, dev, args):
    """{lang: {"loss", "mrr@10"}} on the held-out queries; each searches its language's held-out passages."""
    import torch
    by_lang, report = defaultdict(list), {}
    for i in dev:
        by_lang[index[i][1]].append(records[index[i][0]])
    encoder.model.eval()
    for lang, group in sorted(by_lang.items()):
        pool = {p["docid"]: p for r in group for p in r["positive_passages"] + r["negative_passages"]}
        docids = {d: row for row, d in enumerate(pool)}
        passages = torch.from_numpy(encoder.encode([passage_text(p) for p in pool.values()], "passage"))
        scores = torch.from_numpy(encoder.encode([r["query"] for r in group], "query")) @ passages.T  # (N, M)
        loss = mrr = 0.0
        for row, record in zip(scores, group):
            positives = [docids[p["docid"]] for p in record["positive_passages"]]
            others = [docids[p["docid"]] for p in record["negative_passages"]]
            loss -= torch.log_softmax(row[[positives[0], *others]] / args.temperature, 0)[0].item()
            best = row[positives].max()
            rank = 1 + int((row > best).sum())
            mrr += 1 / rank if rank <= 10 else 0
        report[lang] = {"loss": round(loss / len(group), 4), "mrr@10": round(mrr / len(group), 4)}
    encoder.model.train()
    return report


# --------------------------------------------------------------------------- the loop

def train(args, encoder, index, log_path, checkpoint):
    """Train in place; the best epoch by mean MRR@10 over the languages ends up in the encoder. Returns counts."""
    import torch
    torch.manual_seed(args.seed)
    train_ids, dev_ids = hold_out(index, args.dev_share, args.seed)
    records, weight_of = Records(args), weights(train_ids, index, args)
    per_epoch = steps_in_epoch(len(train_ids), args)
    n_steps = min(args.max_steps or math.inf, args.epochs * per_epoch)
    model = encoder.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)  # the paper: Adam
    warmup = max(1, round(args.warmup * n_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, max(0.0, (n_steps - s) / max(1, n_steps - warmup))))
    step, best, best_state, log = 0, -1.0, None, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=encoder.device)
        model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"]), torch.set_rng_state(state["random"].cpu())
        step, best, best_state, log = state["step"], state["best"], state["best_state"], json.loads(state["log"])
        say(f"going on from step {step} of {n_steps}")
    plan, visits, seen = batches(train_ids, index, args), Counter(), Counter()
    batch_lines = []
    bar = progress(total=n_steps, initial=step, desc="train", unit="step")
    for at in range(n_steps):
        lang, members = next(plan)
        visit = [visits[i] for i in members]
        visits.update(members)
        seen[lang] += 1
        batch_lines.append({"step": at + 1, "lang": lang, "query_ids": [index[i][2] for i in members],
                            "topics": [index[i][3] for i in members]})
        if at < step:
            continue  # a resumed run replays the plan
        started = time.time()
        queries, texts, target, masked = collate([records[index[i][0]] for i in members], visit, args)
        weight = torch.tensor([weight_of[index[i][1], index[i][3]] for i in members])
        loss = contrastive_loss(embed(encoder, queries, "query"), embed(encoder, texts, "passage"), target.to(encoder.device),
                                masked.to(encoder.device), weight.to(encoder.device), args.temperature, args.weight_on,
                                size=args.batch_size if args.short_batch == "shrink" else None)
        if not torch.isfinite(loss):
            raise DataError(f"step {at + 1}: the loss is {loss.item()} on the {lang} queries "
                            f"{' '.join(index[i][2] for i in members)}; lower --lr or raise --temperature. "
                            f"The last good state is {checkpoint}")
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = schedule.get_last_lr()[0]
        optimizer.step(), schedule.step()
        log.append({"step": at + 1, "epoch": round((at + 1) / per_epoch, 3), "lang": lang, "loss": round(loss.item(), 6), "lr": lr,
                    "grad_norm": round(norm.item(), 4), "queries_per_s": round(len(members) / (time.time() - started), 1)})
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", lang=lang, refresh=False)
        if (at + 1) % per_epoch == 0 or at + 1 == n_steps:
            dev = validate(encoder, records, index, dev_ids, args) if dev_ids else {}
            score = sum(v["mrr@10"] for v in dev.values()) / len(dev) if dev else at
            log.append({"step": at + 1, "epoch": round((at + 1) / per_epoch, 3), "dev": dev, "dev_mrr@10": round(score, 4)})
            if score > best:
                best, best_state = score, {k: v.detach().clone() for k, v in model.state_dict().items()}
        if (at + 1) % args.save_every == 0 or at + 1 == n_steps:
            with atomic(checkpoint) as temporary:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                            "random": torch.get_rng_state(), "step": at + 1, "best": best, "best_state": best_state,
                            "log": json.dumps(log)}, temporary)
    bar.close()
    model.load_state_dict(best_state)
    model.eval()
    for path, lines in ((log_path, log), (args.log_batches, batch_lines)):
        if path:
            with atomic(path) as temporary:
                temporary.write_text("".join(map(dump, lines)), "utf-8")
    used = Counter(index[i][1] for i in visits.elements())
    unique = Counter(index[i][1] for i in visits)
    return {"steps": n_steps, "train_queries": len(train_ids), "dev_queries": len(dev_ids), "best_dev_mrr@10": round(best, 4),
            "by_lang": {lang: {"steps": seen[lang], "queries": used[lang], "unique": unique[lang]} for lang in sorted(used)}}


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.temperature is None:
        args.temperature = 0.01 if "e5" in args.encoder.lower() else 0.02
    output = Output(args, [args.input], [args.encoder])
    if output.is_done():
        return
    index = read_index(args)
    encoder = Encoder(args.encoder, args.device, args.query_max_len, args.passage_max_len)
    run_key = output.key(output.meta)  # a checkpoint belongs to one run: the same input, encoder and arguments
    checkpoint = Path(f"{args.out}.checkpoint") / "last.pt"
    owner = checkpoint.with_name("run.json")
    if owner.exists() and owner.read_text("utf-8") != run_key:
        say(f"{checkpoint.parent}: from another run (arguments, input or encoder differ); starting anew")
        shutil.rmtree(checkpoint.parent)
    owner.parent.mkdir(parents=True, exist_ok=True)
    owner.write_text(run_key, "utf-8")
    counts = train(args, encoder, index, f"{args.out}.log.jsonl", checkpoint)
    with atomic_folder(args.out) as folder:
        encoder.save(folder)
        (folder / "README.md").write_text(model_card(args, encoder, counts), "utf-8")
    output.finish(**counts)
    shutil.rmtree(checkpoint.parent)


def atomic_folder(path):
    """Like `atomic`, for a folder."""
    import contextlib

    @contextlib.contextmanager
    def swap():
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    return swap()


def model_card(args, encoder, counts):
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
language: {json.dumps(sorted(counts["by_lang"]))}
---
# {Path(args.out).name}

A bi-encoder for monolingual retrieval in {len(counts["by_lang"])} languages, fine-tuned from `{encoder.name}` with LLM-filtered hard negatives,
monolingual multi-topic batches and a weighted contrastive loss.

- training queries: {counts["train_queries"]}, held out: {counts["dev_queries"]}, steps: {counts["steps"]}, MRR@10 on held-out queries: {counts["best_dev_mrr@10"]}
- settings: {", ".join(f"{k} {v}" for k, v in sorted(vars(args).items()) if k in ("batch_size", "epochs", "lr", "negatives", "seed", "temperature", "weighting"))}
- {encoder.pooling} pooling, cosine similarity, prefixes {encoder.prefix["query"]!r} (query) and {encoder.prefix["passage"]!r} (passage, which is title, line break, text)

Method: Huang et al., Boosting Data Utilization for Multilingual Dense Retrieval, EMNLP 2025, arXiv 2509.09459.
"""


if __name__ == "__main__":
    run(main)
