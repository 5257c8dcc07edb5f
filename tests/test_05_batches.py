"""The batches of 05_train.py, checked from --log-batches alone; nothing of the sampler is used to check it."""

import gzip
import json
import random
from argparse import Namespace
from collections import Counter, defaultdict

import pytest
from conftest import ROOT, load_stage

stage = load_stage("05_train")
FULL, MINI = (
    ROOT.parent / "shared/data" / name / "miracl" for name in ("miracl-full-topics-qrels", "minimiracl")
)


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def record(lang, query_id, topic, positives, query="질문 ๆ 🙂", false_negatives=(), hard=()):
    positives, negatives, false = (
        [{"docid": d, "title": "", "text": f"ข้อความ {d}"} for d in docids]
        for docids in (positives, [*hard, *(f"n{n}" for n in range(7 - len(hard)))], false_negatives)
    )
    return {
        "query_id": query_id,
        "lang": lang,
        "query": query,
        "positive_passages": positives,
        "negative_passages": negatives,
        "false_negatives": false,
        "topic": topic,
    }


def plan(tmp_path, records, *flags):
    """The lines of --log-batches without training, and the records that were not held out."""
    write(tmp_path / "topics.jsonl", records)
    stage.main(
        [
            "--input",
            str(tmp_path / "topics.jsonl"),
            "--encoder",
            "none",
            "--max-steps",
            "0",
            "--dev-share",
            "0",
            "--log-batches",
            str(tmp_path / "b.jsonl"),
            "--out",
            str(tmp_path / "m"),
            *map(str, flags),
        ]
    )
    return [json.loads(line) for line in (tmp_path / "b.jsonl").read_text("utf-8").splitlines()]


def even(available, size):
    """The most even counts, by trial: one at a time to the topic that has fewest and still has a query."""
    counts = dict.fromkeys(available, 0)
    for _ in range(size):
        able = [t for t in sorted(available) if counts[t] < available[t]]
        if able:
            counts[min(able, key=lambda t: counts[t])] += 1
    return sorted(counts.values())


def compatible(query, others, positives):
    return all(not positives[query] & positives[o] for o in others)


def check(lines, records, batch_size, reuse=True):
    """Every property of the batches; returns how many there were of each language, and how many were split by common positives."""
    topic = {(r["lang"], r["query_id"]): r["topic"] for r in records}
    positives = {
        (r["lang"], r["query_id"]): {(r["lang"], p["docid"]) for p in r["positive_passages"]} for r in records
    }
    of_lang, unused, steps, uneven = defaultdict(set), {}, Counter(), 0
    for key in topic:
        of_lang[key[0]].add(key)
    for line in lines:
        lang, keys = line["lang"], [(line["lang"], q) for q in line["query_ids"]]
        steps[lang] += 1
        assert len(set(keys)) == len(keys) and all(key in topic for key in keys), (
            "monolingual, no query twice"
        )
        assert line["topics"] == [topic[key] for key in keys]
        seen = set()
        for key in keys:
            assert not positives[key] & seen, "no two queries share a positive"
            seen |= positives[key]
        left = unused.setdefault(lang, set()) or set(
            of_lang[lang]
        )  # a pass begins when the last query is used
        first = [key for key in keys if key in left]
        counts, available = Counter(topic[k] for k in first), Counter(topic[k] for k in left)
        if sorted(counts[t] for t in available) != even(available, batch_size):
            uneven += 1  # only where common positives leave no better choice: no addition makes it more even
            rest = left - set(first)
            for key in rest:
                if compatible(key, first, positives):
                    assert len(first) == batch_size and counts[topic[key]] + 1 >= max(counts.values()), (
                        line["step"],
                        key,
                    )
        left -= set(first)
        if len(keys) < min(batch_size, len(of_lang[lang])):  # short although the language is large enough
            assert not reuse or not [k for k in of_lang[lang] - set(keys) if compatible(k, keys, positives)]
        if len(first) < len(keys):  # went on into the next pass; what clashed is not carried over
            left = set(of_lang[lang]) - (set(keys) - set(first))
        unused[lang] = left
    return steps, uneven


def check_masks(lines, records, every=10):
    """In every tenth batch a passage is masked for just those of its queries that it is relevant to, whoever brought it."""
    of, uses, n_masked = {(r["lang"], r["query_id"]): r for r in records}, Counter(), 0
    for number, line in enumerate(lines):
        keys = [(line["lang"], q) for q in line["query_ids"]]
        if number % every == 0:
            args = Namespace(seed=13, negatives=7)
            passages, target, masked = stage.collate([of[k] for k in keys], [uses[k] for k in keys], args)
            docids = [passage["docid"] for passage in passages]
            for key, own, row in zip(keys, target.tolist(), masked.tolist(), strict=True):
                positives, false = (
                    {p["docid"] for p in of[key][name]} for name in ("positive_passages", "false_negatives")
                )
                assert docids[own] in positives
                assert row == [at != own and docid in positives | false for at, docid in enumerate(docids)]
                n_masked += sum(row)
        uses.update(keys)
    return n_masked


def miracl(root):
    """The training queries of a MIRACL folder with their real positives; stand-in texts, and topics of skewed size.

    Twenty positives of each language are popular: three of them are hard negatives and three known false negatives of any query.
    """
    records = []
    for folder in sorted(root.glob("miracl-v1.0-*")):
        lang, qrels, lines = folder.name[-2:], defaultdict(list), {}
        for kind in ("qrels", "topics"):
            for path in folder.glob(f"{kind}/*-train.tsv*"):
                with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                    lines[kind] = file.read().splitlines()
        for query_id, _, docid, relevance in map(str.split, lines.get("qrels", [])):
            if relevance == "1":
                qrels[query_id].append(docid)
        popular = sorted({docids[0] for docids in qrels.values()})[:20]
        for query_id, query in (line.split("\t") for line in lines.get("topics", [])):
            # queries about one article have one topic, as clusters of positives would have it; sizes fall like 1/rank
            draw = random.Random(f"{lang}:{qrels[query_id][0].split('#')[0]}")
            topic = draw.choices(range(12), [1 / (t + 1) for t in range(12)])[0]
            found = draw.sample([d for d in popular if d not in qrels[query_id]], 6)
            records.append(record(lang, query_id, topic, qrels[query_id], query, found[:3], found[3:]))
    return records


@pytest.mark.parametrize(
    "root, n_queries, n_langs, epochs",
    [(FULL, 40_203, 16, 2), (MINI, None, 15, 10)],
    ids=["all of MIRACL", "mini-MIRACL"],
)
def test_batches_over_the_real_training_queries(tmp_path, root, n_queries, n_langs, epochs):
    if not root.is_dir():
        pytest.skip(f"needs {root}")
    records = miracl(root)
    assert len(records) == (n_queries or len(records)) and len({r["lang"] for r in records}) == n_langs
    lines = plan(tmp_path, records, "--epochs", epochs)
    per_epoch = -(-len(records) // 24)
    assert len(lines) == epochs * per_epoch
    steps, uneven = check(lines, records, 24)
    for start in range(0, len(lines), per_epoch):
        in_epoch = Counter(line["lang"] for line in lines[start : start + per_epoch])
        assert len(in_epoch) == n_langs and max(in_epoch.values()) - min(in_epoch.values()) <= 1
    n_masked = check_masks(lines, records)
    assert n_masked > len(lines)
    print(
        f"{len(records)} queries, {len(lines)} batches, {uneven} less even because of common positives, {n_masked} masked pairs in a tenth"
    )


def small(sizes, n_topics=3, shared=()):
    """sizes: {lang: queries}; shared: pairs of (lang, i, j) whose queries have a positive in common."""
    records = [record(lang, str(i), i % n_topics, [f"p{i}"]) for lang, n in sizes.items() for i in range(n)]
    index = {(r["lang"], r["query_id"]): r for r in records}
    for lang, i, j in shared:
        index[lang, str(i)]["positive_passages"] += index[lang, str(j)]["positive_passages"]
    return records


def test_batches_of_minimiracl_proportions_and_a_tiny_language(tmp_path):
    records = small(
        {"sw": 317, "te": 321, "zh": 145, "yo": 5}, shared=[("sw", i, i + 3) for i in range(0, 300, 6)]
    )
    steps, _ = check(plan(tmp_path, records, "--epochs", 6), records, 24)
    assert max(steps.values()) - min(steps.values()) <= 1


def test_queries_of_a_language_are_used_equally_often(tmp_path):
    """What could not be used in a pass, since its positive was in the batch already, comes first in the next."""
    records = small({"sw": 49, "te": 31}, shared=[("sw", i, i + 1) for i in range(0, 18, 3)])
    uses = Counter((x["lang"], q) for x in plan(tmp_path, records, "--epochs", 60) for q in x["query_ids"])
    for lang in ("sw", "te"):
        of_lang = [uses[r["lang"], r["query_id"]] for r in records if r["lang"] == lang]
        assert max(of_lang) - min(of_lang) <= 2


def test_reuse_and_shrink(tmp_path):
    records = small({"ko": 30, "ja": 40, "th": 7})
    lines = plan(tmp_path, records, "--epochs", 4, "--batch-size", 16)
    assert {len(x["query_ids"]) for x in lines if x["lang"] != "th"} == {16}
    assert {len(x["query_ids"]) for x in lines if x["lang"] == "th"} == {7}
    lines = plan(tmp_path, records, "--epochs", 4, "--batch-size", 16, "--short-batch", "shrink")
    check(lines, records, 16, reuse=False)
    assert [len(x["query_ids"]) for x in lines if x["lang"] == "ko"][:4] == [16, 14, 16, 14]


def test_language_sampling_shares(tmp_path):
    records = small({"sw": 400, "te": 100})
    for flag, share in (("uniform", 1 / 2), ("proportional", 4 / 5), ("temperature", 2 / 3)):
        lines = plan(tmp_path, records, "--epochs", 6, "--batch-size", 10, "--language-sampling", flag)
        assert abs(sum(x["lang"] == "sw" for x in lines) - share * len(lines)) <= 1


def test_ablation_flags_mix_languages_and_ignore_topics(tmp_path):
    records = small({"sw": 60, "te": 60}) + small({"ko": 60}, n_topics=1)
    lines = plan(tmp_path, records, "--epochs", 4, "--batch-size", 12, "--no-same-language")
    assert {x["lang"] for x in lines} == {"mixed"} and max(
        max(Counter(x["topics"]).values()) - min(Counter(x["topics"]).values()) for x in lines[:3]
    ) <= 1
    lines = plan(tmp_path, records, "--epochs", 4, "--batch-size", 12, "--no-topic-balance")
    assert {x["lang"] for x in lines} == {"sw", "te", "ko"}
    assert any(
        max(Counter(x["topics"]).values()) - min(Counter(x["topics"]).values()) > 1
        for x in lines
        if x["lang"] == "sw"
    )


def test_same_seed_same_batches_another_seed_others(tmp_path):
    records = small({"sw": 60, "te": 30})
    assert plan(tmp_path, records) == plan(tmp_path, records) != plan(tmp_path, records, "--seed", 14)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: r["negative_passages"].pop(), "6 negatives, --negatives wants 7"),
        (lambda r: r.pop("topic"), "'topic' is null, want a whole number; make it with 04_cluster_topics.py"),
        (lambda r: r.update(topic="3"), "'topic' is \"3\""),
        (lambda r: r.pop("lang"), "no 'lang'"),
        (lambda r: r["positive_passages"][0].update(text=" "), "want a string that is not empty"),
        (lambda r: r.update(query_id="0"), "is there twice"),
    ],
)
def test_a_bad_record_is_named_with_file_and_line(tmp_path, change, words):
    records = small({"ko": 5})
    change(records[2])
    with pytest.raises(stage.DataError, match=words) as error:
        plan(tmp_path, records)
    assert "topics.jsonl:3: " in str(error.value)
