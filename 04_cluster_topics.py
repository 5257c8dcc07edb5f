"""Give each training query a topic: KMeans over the embeddings of its positives (Sec. 3.5).

Source  Sec. 3.5 uses 12 topics. Deviation: the paper maps two English fastText classifiers to 12 labels; KMeans with
        C = 12 over the positives' embeddings needs no labels and works in any language.
Reads   augmented.jsonl of stage 03, or any file in Tevatron's layout
Writes  topics.jsonl: + topic (0 to C-1)
Usage   python 04_cluster_topics.py --input runs/sample/augmented.jsonl --encoder models/sample --topics 12 --out runs/sample/topics.jsonl
Cost    one embedding a positive, cached; the file is read twice and never held in memory
"""
from collections import Counter, defaultdict
from itertools import islice

import numpy as np

from common import Output, Parser, passage_text, positive_int, progress, read_queries, run, say
from encoder import Encoder

BLOCK = 8_192       # queries embedded and cached at a time; bounds memory, does not change the result
FIT = 65_536        # clusters are fitted to at most so many queries, drawn by the seed; all queries are then assigned


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--input", required=True, metavar="FILE", help="augmented.jsonl, or training data in Tevatron's layout")
    parser.add_argument("--encoder", required=True, metavar="MODEL", help="model folder or hub id; the paper trains BAAI/bge-m3")
    parser.add_argument("--topics", type=positive_int, default=12, help="number of clusters, C in Sec. 3.5")
    parser.add_argument("--per-language", action="store_true",
                        help="cluster each language alone; default: all together, so that a topic spans languages")
    parser.add_argument("--remove-language-mean", action="store_true",
                        help="centre each language first, since multilingual vectors may cluster by language")
    parser.add_argument("--passage-max-len", type=positive_int, default=256, help="tokens of a passage that are read (Sec. 4.1)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--cache", default="cache", metavar="FOLDER", help="embeddings are kept here")
    parser.add_argument("--out", required=True, metavar="FILE", help="topics.jsonl")
    return parser


def embed(records, encoder, cache):
    """Yield (langs, (n, D) float32 means of the positives' vectors) for each BLOCK of records."""
    records = iter(records)
    while block := list(islice(records, BLOCK)):
        texts = [[passage_text(p) for p in record["positive_passages"]] for record in block]
        langs = [record["lang"] for record in block]
        del block  # a record holds some forty texts; the positives are all that is needed
        flat = np.asarray(encoder.encode_cached([t for ts in texts for t in ts], "passage", cache), np.float32)
        starts = np.cumsum([0] + [len(ts) for ts in texts[:-1]])
        yield langs, np.add.reduceat(flat, starts) / np.array([[len(ts)] for ts in texts], np.float32)


def fit(sample, n_topics, seed):
    """KMeans on (n, D) vectors; no more clusters than different vectors."""
    from sklearn.cluster import MiniBatchKMeans
    n_topics = min(n_topics, len({row.tobytes() for row in sample}))
    return MiniBatchKMeans(n_topics, random_state=seed, n_init=10, batch_size=4096).fit(sample)


def main(argv=None):
    args = build_parser().parse_args(argv)
    output = Output(args, [args.input], [args.encoder])
    if output.is_done():
        return
    encoder = Encoder(args.encoder, args.device, passage_max_len=args.passage_max_len)

    def blocks():
        return embed(read_queries(args.input, args.lang, args.limit), encoder, args.cache)

    langs, sums = [], defaultdict(float)
    for block_langs, block in progress(blocks(), desc="embed", unit="block"):
        langs += block_langs
        for lang in set(block_langs):
            sums[lang] += block[np.array(block_langs) == lang].sum(0, dtype=np.float64)
    langs = np.array(langs)  # (N,)
    codes = {lang: np.flatnonzero(langs == lang) for lang in np.unique(langs).tolist()}
    means = {lang: (sums[lang] / len(rows)).astype(np.float32) for lang, rows in codes.items()}
    groups = codes if args.per_language else {"all": np.arange(len(langs))}

    def centred():
        """Yield (row numbers, their vectors) by block, from the cache."""
        at = 0
        for block_langs, block in blocks():
            if args.remove_language_mean:
                block -= np.stack([means[lang] for lang in block_langs])
            yield np.arange(at, at + len(block)), block
            at += len(block)

    draw, chosen = np.random.default_rng(args.seed), np.zeros(len(langs), bool)
    for rows in groups.values():
        chosen[draw.permutation(rows)[:FIT // len(groups)]] = True
    sample, sampled = np.concatenate([block[chosen[rows]] for rows, block in centred()]), np.flatnonzero(chosen)
    models = {name: fit(sample[np.isin(sampled, rows)], args.topics, args.seed) for name, rows in groups.items()}
    del sample
    topics = np.zeros(len(langs), int)
    for rows, block in centred():
        for name in sorted(set(langs[rows].tolist())) if args.per_language else ["all"]:
            here = langs[rows] == name if args.per_language else np.ones(len(rows), bool)
            topics[rows[here]] = models[name].predict(block[here])
    for name, rows in groups.items():  # number them by size, 0 the largest
        topics[rows] = np.argsort(np.argsort(-np.bincount(topics[rows]), kind="stable"))[topics[rows]]
        if len(set(topics[rows].tolist())) < args.topics:
            say(f"{name}: {len(rows)} queries give {len(set(topics[rows].tolist()))} of {args.topics} topics")
    for lang, n in zip(*np.unique(langs, return_counts=True)):
        if n < args.topics:
            say(f"{lang}: {n} queries are fewer than the {args.topics} topics, so its batches cannot hold them all")
    titles = defaultdict(Counter)  # topic -> first positive's title -> queries

    def labelled():
        for record, topic in zip(read_queries(args.input, args.lang, args.limit), topics.tolist()):
            titles[topic][record["positive_passages"][0].get("title", "")] += 1
            yield record | {"topic": topic}

    output.write(labelled())
    summarise(langs, topics, titles)
    output.finish(queries=len(langs), topics=int(topics.max()) + 1, nmi_topic_language=nmi(langs, topics),
                  by_lang={lang: dict(sorted(Counter(topics[langs == lang].tolist()).items())) for lang in np.unique(langs).tolist()})


def nmi(langs, topics):
    """Normalised mutual information: 0 where topics tell nothing of the language, 1 where they are the languages."""
    from sklearn.metrics import normalized_mutual_info_score
    return round(float(normalized_mutual_info_score(langs, topics)), 3)


def summarise(langs, topics, titles):
    """Say for each topic its queries by language, and the titles that are most its own: frequent here, rare elsewhere."""
    overall = sum(titles.values(), Counter())
    for topic in sorted(titles):
        telling = sorted(titles[topic], key=lambda t: (-titles[topic][t] ** 2 / overall[t], t))[:6]
        by_lang = ", ".join(f"{lang} {n}" for lang, n in sorted(Counter(langs[topics == topic].tolist()).items()))
        say(f"topic {topic}: {(topics == topic).sum()} queries ({by_lang}): {'; '.join(telling)}")
    say(f"normalised mutual information of topic and language: {nmi(langs, topics)} (0 to 1; near 1 the topics are languages: "
        "see --remove-language-mean and --per-language)")


if __name__ == "__main__":
    run(main)
