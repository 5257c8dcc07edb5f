"""Give each training query a topic: KMeans over the embeddings of its positives (Sec. 3.5).

Source  Sec. 3.5 uses 12 topics. Deviation: the paper maps two English fastText classifiers to 12 labels;
        KMeans with C = 12 over the positives' embeddings needs no labels, in any language.
Reads   augmented.jsonl of stage 03, or any file in Tevatron's layout
Writes  topics.jsonl: + topic (0 to C-1, the largest first; --per-language: the next language's after them)
Usage   python 04_cluster_topics.py --input runs/sample/augmented.jsonl --encoder models/sample \\
            --topics 12 --out runs/sample/topics.jsonl
Cost    one embedding a positive, cached; one vector a query in memory, 160 MB for 40,000 of 1,024 dimensions
"""
from collections import Counter, defaultdict

import numpy as np

from common import Output, Parser, batched, dump, positive_int, read_queries, run, say
from encoder import encoder_flags, from_flags, model_digests

BLOCK = 8_192  # queries embedded and cached at a time; does not change the result
RESTARTS = 10  # KMeans starts so often; the best is kept
SMALL = 0.01   # share of the queries under which a topic is worth a warning


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--input", required=True, metavar="FILE", help="augmented.jsonl, or in its layout")
    parser.add_argument("--encoder", required=True, metavar="MODEL",
                        help="model folder or hub id; the paper trains BAAI/bge-m3")
    parser.add_argument("--topics", type=positive_int, default=12, help="number of clusters, C in Sec. 3.5")
    parser.add_argument("--per-language", action="store_true",
                        help="each language has topics of its own; default: topics span languages")
    parser.add_argument("--remove-language-mean", action="store_true",
                        help="centre each language first, since multilingual vectors may cluster by language")
    parser.add_argument("--cache", default="cache", metavar="FOLDER", help="embeddings are kept here")
    encoder_flags(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="topics.jsonl")
    return parser


def embed(records, encoder, cache):
    """(N,) languages and (N, D) float32 means of each query's positives, brought to unit length."""
    langs, sums = [], []
    queries = ((record["lang"], [encoder.passage_text(p) for p in record["positive_passages"]])
               for record in records)  # without the negatives, which are most of a record
    for block in batched(queries, BLOCK):
        langs += [lang for lang, _ in block]
        texts = [text for _, of_query in block for text in of_query]
        vectors = np.asarray(encoder.encode_cached(texts, "passage", cache), np.float32)
        starts = np.cumsum([0] + [len(of_query) for _, of_query in block[:-1]])
        sums.append(np.add.reduceat(vectors, starts))  # only the direction counts
    vectors = np.concatenate(sums)
    return np.array(langs), vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def cluster(vectors, n_topics, seed):
    """(N,) topics by size, 0 the largest; no more of them than different vectors."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits
    n_topics = min(n_topics, len({row.tobytes() for row in vectors}))
    with threadpool_limits(1):  # with several threads the last bits, and so the topics, may differ
        labels = KMeans(n_topics, random_state=seed, n_init=RESTARTS).fit_predict(vectors)
    order = np.argsort(-np.bincount(labels, minlength=n_topics), kind="stable")
    return np.argsort(order)[labels]


def warn(langs, small, n_topics):
    """Say where batches cannot hold all topics, or not without repeating; small: the sizes of such topics."""
    for lang, n in zip(*np.unique(langs, return_counts=True)):
        if n < n_topics:
            say(f"{lang}: {n} queries are fewer than the {n_topics} topics, so its batches lack some")
    if small:
        say(f"{len(small)} topics hold under {SMALL:.0%} of the queries ({small}): batches "
            "that take topics evenly repeat these; try fewer --topics or another --encoder")


def summarise(langs, topics, titles):
    """Say each topic's queries by language, and the titles most its own: frequent here, rare elsewhere."""
    overall = sum(titles.values(), Counter())
    for topic in sorted(titles):
        telling = sorted(titles[topic], key=lambda t: (-titles[topic][t] ** 2 / overall[t], t))[:6]
        in_topic = Counter(sorted(langs[topics == topic].tolist()))
        by_lang = ", ".join(f"{lang} {n}" for lang, n in in_topic.items())
        say(f"topic {topic}: {in_topic.total()} queries ({by_lang}): {'; '.join(telling)}")


def main(argv=None):
    args = build_parser().parse_args(argv)
    output = Output(args, [args.input], model_digests([args.encoder]))
    if output.is_done():
        return
    encoder = from_flags(args.encoder, args)
    langs, vectors = embed(read_queries(args.input, args.lang, args.limit), encoder, args.cache)
    encoder.report_cut()
    for lang in np.unique(langs) if args.remove_language_mean else []:
        vectors[langs == lang] -= vectors[langs == lang].mean(0)
    topics = np.full(len(langs), -1)
    small = []
    groups = langs if args.per_language else np.full(len(langs), "all")
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        of_group = cluster(vectors[rows], args.topics, args.seed)
        topics[rows] = topics.max() + 1 + of_group  # no topic is of two groups
        sizes = np.bincount(of_group)
        small += sizes[sizes < SMALL * len(rows)].tolist()
        if len(sizes) < args.topics:
            say(f"{group}: {len(rows)} queries give {len(sizes)} of {args.topics} topics")
    warn(langs, small, args.topics)
    titles = defaultdict(Counter)  # topic -> first positive's title -> queries

    def labelled():
        for record, topic in zip(read_queries(args.input, args.lang, args.limit), topics.tolist()):
            titles[topic][record["positive_passages"][0].get("title", "")] += 1
            yield record | {"topic": topic}

    output.write_lines(map(dump, labelled()))
    summarise(langs, topics, titles)
    from sklearn.metrics import normalized_mutual_info_score
    nmi = round(float(normalized_mutual_info_score(langs, topics)), 3)
    say(f"normalised mutual information of topic and language: {nmi} (0 to 1; near 1 the topics are "
        "languages: see --remove-language-mean and --per-language)")
    sizes = {lang: Counter(sorted(topics[langs == lang].tolist())) for lang in np.unique(langs).tolist()}
    output.finish(queries=len(langs), topics=int(topics.max()) + 1, nmi_topic_language=nmi, by_lang=sizes)


if __name__ == "__main__":
    run(main)
