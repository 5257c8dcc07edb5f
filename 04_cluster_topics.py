"""Give each training query a topic: KMeans over the embeddings of its positives (Sec. 3.5).

Source  Sec. 3.5 uses 12 topics. Deviation: the paper maps two English fastText classifiers to 12 labels; KMeans with
        C = 12 over the positives' embeddings needs no labels and works in any language.
Reads   augmented.jsonl of stage 03, or any file in Tevatron's layout
Writes  topics.jsonl: + topic (0 to C-1)
Usage   python 04_cluster_topics.py --input runs/sample/augmented.jsonl --encoder models/sample --topics 12 --out runs/sample/topics.jsonl
Cost    one embedding a query
"""
from collections import Counter, defaultdict

import numpy as np

from common import Encoder, Output, Parser, passage_text, positive_int, read_queries, run, say


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


def cluster(vectors, n_topics, seed):
    """(N,) cluster numbers by size, 0 the largest, for (N, D) vectors; no more clusters than different vectors."""
    from sklearn.cluster import MiniBatchKMeans
    n_topics = min(n_topics, len(np.unique(vectors, axis=0)))
    labels = MiniBatchKMeans(n_topics, random_state=seed, n_init=10, batch_size=4096).fit_predict(vectors)
    by_size = {label: topic for topic, (label, _) in enumerate(sorted(Counter(labels.tolist()).items(), key=lambda x: (-x[1], x[0])))}
    return np.array([by_size[label] for label in labels.tolist()])


def main(argv=None):
    args = build_parser().parse_args(argv)
    output = Output(args, [args.input], [args.encoder])
    if output.is_done():
        return
    keys, texts, titles = [], [], []
    for record in read_queries(args.input, args.lang, args.limit):
        keys.append(record["lang"])
        texts.append([passage_text(p) for p in record["positive_passages"]])
        titles.append(record["positive_passages"][0].get("title", ""))
    encoder = Encoder(args.encoder, args.device, passage_max_len=args.passage_max_len)
    flat = np.asarray(encoder.encode_cached([t for ts in texts for t in ts], "passage", args.cache), np.float32)
    ends = np.cumsum([len(ts) for ts in texts])
    vectors = np.stack([flat[end - len(ts):end].mean(0) for ts, end in zip(texts, ends)])  # (N, D), mean of the positives
    langs = np.array(keys)
    topics = np.zeros(len(keys), int)
    if args.remove_language_mean:
        for lang in np.unique(langs):
            vectors[langs == lang] -= vectors[langs == lang].mean(0)
    for lang in np.unique(langs) if args.per_language else [None]:
        here = langs == lang if lang else np.ones(len(keys), bool)
        topics[here] = cluster(vectors[here], args.topics, args.seed)
        if len(set(topics[here].tolist())) < args.topics:
            say(f"{lang or 'all'}: {here.sum()} queries give {len(set(topics[here].tolist()))} of {args.topics} topics")
    output.write(record | {"topic": int(topic)} for record, topic in zip(read_queries(args.input, args.lang, args.limit), topics))
    summarise(langs, topics, titles)
    output.finish(queries=len(keys), topics=int(topics.max()) + 1, nmi_topic_language=nmi(langs, topics),
                  by_lang={lang: dict(sorted(Counter(topics[langs == lang].tolist()).items())) for lang in np.unique(langs).tolist()})


def nmi(langs, topics):
    """Normalised mutual information: 0 where topics tell nothing of the language, 1 where they are the languages."""
    from sklearn.metrics import normalized_mutual_info_score
    return round(float(normalized_mutual_info_score(langs, topics)), 3)


def summarise(langs, topics, titles):
    """Per topic its size, languages, and the titles that are most its own."""
    overall = Counter(titles)
    by_topic = defaultdict(Counter)
    for topic, title in zip(topics.tolist(), titles):
        by_topic[topic][title] += 1
    for topic in sorted(by_topic):
        telling = sorted(by_topic[topic], key=lambda t: (-by_topic[topic][t] ** 2 / overall[t], t))[:6]
        n_langs = len(set(langs[topics == topic].tolist()))
        say(f"topic {topic}: {(topics == topic).sum()} queries, {n_langs} languages: {', '.join(telling)}")


if __name__ == "__main__":
    run(main)
