"""The batches of 05_train.py, checked from --log-batches alone: nothing of the sampler checks itself."""

import gzip
import json
import random
import subprocess
import sys
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


def check(lines, records, batch_size=24, topic_power=0):
    """What holds for every batch, from log and records alone; returns how many each language had."""
    of = {(r["lang"], r["query_id"]): r for r in records}
    marks = {}
    for key, r in of.items():
        marks[key] = {" ".join(r["query"].casefold().split())} | {
            (r["lang"], p["docid"]) for p in r["positive_passages"]
        }
    of_lang, topics, steps = defaultdict(set), defaultdict(set), Counter()
    for key in of:
        of_lang[key[0]].add(key)
        topics[key[0]].add(of[key]["topic"])
        topics["mixed"].add(of[key]["topic"])
    for line in lines:
        keys = list(zip(line["langs"], line["query_ids"], strict=True))
        lang = line["lang"]
        steps[lang] += 1
        assert lang == "mixed" or set(line["langs"]) == {lang}, "monolingual"
        assert len(set(keys)) == len(keys), "no query twice"
        assert line["topics"] == [of[key]["topic"] for key in keys]
        taken = set()
        for key in keys:
            assert not taken & marks[key], "no positive and no question in common"
            taken |= marks[key]
        counts = Counter(line["topics"])
        least = min(counts[topic] for topic in topics[lang])
        if len(keys) == batch_size and (topic_power or least + 1 >= max(counts.values())):
            continue  # full and even: whatever else would have fitted
        for key in (set(of) if lang == "mixed" else of_lang[lang]) - set(keys):
            if taken & marks[key]:
                continue  # it would not have fitted
            assert len(keys) == batch_size, (line["step"], key, "short, although it would have fitted")
            if topic_power == 0:
                assert counts[of[key]["topic"]] + 1 >= max(counts.values()), (
                    line["step"],
                    key,
                    "topics uneven",
                )
    return steps


def shares(lines, records):
    """{lang: {topic: its share of the draws}} and the same of the records."""
    found = []
    for pairs in (
        ((x["lang"], t) for x in lines for t in x["topics"]),
        ((r["lang"], r["topic"]) for r in records),
    ):
        counts = defaultdict(Counter)
        for lang, topic in pairs:
            counts[lang][topic] += 1
        found.append({lang: {t: n / sum(of.values()) for t, n in of.items()} for lang, of in counts.items()})
    return found


def check_masks(lines, records, every=10):
    """In every tenth batch a passage is masked for just those queries that it is relevant to."""
    of, uses, n_masked = {(r["lang"], r["query_id"]): r for r in records}, Counter(), 0
    for number, line in enumerate(lines):
        keys = [(line["lang"], q) for q in line["query_ids"]]
        if number % every == 0:
            args = Namespace(seed=13, negatives=7, no_in_batch=False)
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
    """The training queries of a MIRACL folder with their positives; stand-in texts, topics of skewed size.

    Twenty positives of each language are popular: three are hard negatives, three known false ones.
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
            # queries about one article have one topic, as clusters have it; sizes fall like 1/rank
            draw = random.Random(f"{lang}:{qrels[query_id][0].split('#')[0]}")
            topic = draw.choices(range(12), [1 / (t + 1) for t in range(12)])[0]
            found = draw.sample([d for d in popular if d not in qrels[query_id]], 6)
            records.append(record(lang, query_id, topic, qrels[query_id], query, found[:3], found[3:]))
    return records


@pytest.fixture(scope="module")
def full():
    if not FULL.is_dir():
        pytest.skip(f"needs {FULL}")
    return miracl(FULL)


def test_batches_over_all_training_queries_of_miracl(tmp_path, full):
    assert len(full) == 40_203 and len({r["lang"] for r in full}) == 16
    lines = plan(tmp_path, full, "--epochs", 2)
    assert len(lines) == 2 * -(-len(full) // 24)
    steps = check(lines, full)
    assert len(steps) == 16 and max(steps.values()) - min(steps.values()) <= 1
    drawn, given = shares(lines, full)
    for lang, of in given.items():
        assert len(of) == 12  # so every batch holds all twelve, and each gets a twelfth
        assert all(len(set(x["topics"])) == 12 and len(x["topics"]) == 24 for x in lines if x["lang"] == lang)
        assert all(abs(drawn[lang][topic] - 1 / 12) < 0.01 for topic in of), (lang, drawn[lang])
    n_masked = check_masks(lines, full)
    assert n_masked > len(lines)


def test_at_power_one_miracl_s_languages_and_topics_are_drawn_as_the_data_is(tmp_path, full):
    n = Counter(r["lang"] for r in full)
    lines = plan(tmp_path, full, "--epochs", 1, "--language-power", 1)
    for lang, steps in check(lines, full).items():
        assert abs(steps - n[lang] / len(full) * len(lines)) <= 1
    lines = plan(tmp_path, full, "--epochs", 2, "--topic-power", 1)
    check(lines, full, topic_power=1)
    drawn, given = shares(lines, full)
    for lang, of in given.items():
        assert all(abs(drawn[lang][topic] - share) < 0.02 for topic, share in of.items()), (
            lang,
            drawn[lang],
            of,
        )
    for topic in range(12):
        assert abs(sum(drawn[lang][topic] - given[lang][topic] for lang in n)) / 16 < 0.004


def test_batches_over_minimiracl(tmp_path):
    if not MINI.is_dir():
        pytest.skip(f"needs {MINI}")
    records = miracl(MINI)
    lines = plan(tmp_path, records, "--epochs", 10)
    steps = check(lines, records)
    assert len(steps) == 15 and max(steps.values()) - min(steps.values()) <= 1
    assert check_masks(lines, records) > len(lines)


def small(sizes, n_topics=3, shared=()):
    """sizes: {lang: queries}; shared: pairs of (lang, i, j) whose queries have a positive in common."""
    records = [
        record(lang, str(i), i % n_topics, [f"p{i}"], f"질문 ๆ 🙂 {lang} {i}")
        for lang, n in sizes.items()
        for i in range(n)
    ]
    index = {(r["lang"], r["query_id"]): r for r in records}
    for lang, i, j in shared:
        index[lang, str(i)]["positive_passages"] += index[lang, str(j)]["positive_passages"]
    return records


def test_batches_of_uneven_languages_with_common_positives(tmp_path):
    records = small(
        {"sw": 317, "te": 321, "zh": 145, "yo": 5}, shared=[("sw", i, i + 3) for i in range(0, 300, 6)]
    )
    steps = check(plan(tmp_path, records, "--epochs", 6), records)
    assert max(steps.values()) - min(steps.values()) <= 1


def test_no_two_queries_of_a_batch_ask_the_same(tmp_path):
    records = small({"sw": 30})
    for r, twin in zip(records[:10], records[10:20]):
        twin["query"] = f" {r['query'].upper()}  "  # but for case and white space
    lines = plan(tmp_path, records, "--epochs", 20, "--batch-size", 20)
    check(lines, records, 20)
    assert {len(x["query_ids"]) for x in lines} == {20}


def test_queries_of_a_topic_are_used_equally_often(tmp_path):
    """What did not fit, since its positive was in the batch already, comes first in the next."""
    records = small({"sw": 49, "te": 31}, shared=[("sw", i, i + 3) for i in range(0, 18, 6)])
    uses = Counter((x["lang"], q) for x in plan(tmp_path, records, "--epochs", 60) for q in x["query_ids"])
    for lang in ("sw", "te"):
        for topic in range(3):
            used = [uses[lang, r["query_id"]] for r in records if (r["lang"], r["topic"]) == (lang, topic)]
            assert max(used) - min(used) <= 2


def test_a_rare_topic_is_in_every_batch_and_no_batch_ends_in_one_topic(tmp_path):
    records = small({"sw": 200}, n_topics=1) + [r | {"topic": 1} for r in small({"sw": 3})]
    records = [r | {"query_id": str(i), "query": f"{r['query']} {i}"} for i, r in enumerate(records)]
    for r in records[200:]:
        r["positive_passages"][0]["docid"] += "rare"
    lines = plan(tmp_path, records, "--epochs", 5)
    check(lines, records)
    assert {Counter(x["topics"])[1] for x in lines} == {3}


def test_reuse_and_shrink(tmp_path):
    records = small({"ko": 30, "ja": 40, "th": 7})
    lines = plan(tmp_path, records, "--epochs", 4, "--batch-size", 16)
    assert {len(x["query_ids"]) for x in lines if x["lang"] != "th"} == {16}
    assert {len(x["query_ids"]) for x in lines if x["lang"] == "th"} == {7}
    lines = plan(tmp_path, records, "--epochs", 4, "--batch-size", 16, "--short-batch", "shrink")
    assert [len(x["query_ids"]) for x in lines if x["lang"] == "ko"][:4] == [16, 14, 16, 14]
    for start in range(0, 4, 2):  # none is used again before all are used
        two = [x["query_ids"] for x in lines if x["lang"] == "ko"][start : start + 2]
        assert len({q for batch in two for q in batch}) == 30


def test_language_power(tmp_path):
    records = small({"sw": 400, "te": 100})
    for power, share in ((0, 1 / 2), (1, 4 / 5), (0.5, 2 / 3)):
        lines = plan(tmp_path, records, "--epochs", 6, "--batch-size", 10, "--language-power", power)
        assert abs(sum(x["lang"] == "sw" for x in lines) - share * len(lines)) <= 1


def test_topic_power(tmp_path):
    records = small({"sw": 900}, n_topics=1) + [
        r | {"topic": 1} for r in small({"sw": 1000}, n_topics=1)[900:]
    ]
    for power, share in ((0, 1 / 2), (1, 9 / 10), (0.5, 3 / 4)):
        lines = plan(tmp_path, records, "--epochs", 10, "--batch-size", 10, "--topic-power", power)
        drawn = shares(check_and(lines, records, power), records)[0]
        assert abs(drawn["sw"][0] - share) < 0.02


def check_and(lines, records, power):
    check(lines, records, 10, power)
    return lines


def test_mixed_batches_balance_topics_or_not(tmp_path):
    records = small({"sw": 90, "te": 60}) + small({"ko": 60}, n_topics=1)
    lines = plan(tmp_path, records, "--epochs", 20, "--batch-size", 12, "--mixed")
    assert check(lines, records, 12) == {"mixed": len(lines)}
    assert all(sorted(Counter(x["topics"]).values()) == [4, 4, 4] for x in lines)
    assert any(len(set(x["langs"])) == 3 for x in lines)
    lines = plan(tmp_path, records, "--epochs", 20, "--batch-size", 12, "--mixed", "--topic-power", 1)
    check(lines, records, 12, topic_power=1)
    drawn = Counter(lang for x in lines for lang in x["langs"])
    assert abs(drawn["ko"] / sum(drawn.values()) - 60 / 210) < 0.04  # the languages as the data is


def test_records_without_topics_need_topic_power_one(tmp_path):
    records = small({"sw": 60})
    for r in records:
        del r["topic"]
    lines = plan(tmp_path, records, "--topic-power", 1, "--negatives", 0)
    assert {t for x in lines for t in x["topics"]} == {0}


def test_batches_are_written_without_torch(tmp_path):
    write(tmp_path / "topics.jsonl", small({"ko": 30}))
    code = (
        "import sys; from conftest import load_stage; load_stage('05_train').main(sys.argv[1:]); "
        "print('torch' in sys.modules)"
    )
    flags = [
        "--input",
        tmp_path / "topics.jsonl",
        "--encoder",
        "none",
        "--max-steps",
        0,
        "--log-batches",
        tmp_path / "b",
        "--out",
        tmp_path / "m",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, flags)], cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
    assert (tmp_path / "b").exists() and not (tmp_path / "m").exists()


def test_a_share_of_every_language_is_held_out_at_random():
    """Neither the first queries nor one a language, and others with another seed."""
    queries = [
        stage.Query(lang, str(i), 0, 0, (f"{lang} {i}?",))
        for lang, n in (("sw", 200), ("te", 31), ("yo", 4))
        for i in range(n)
    ]
    train, dev = stage.hold_out(queries, 0.1, 13)
    assert len(train) + len(dev) == len(queries) and not set(train) & set(dev)
    assert Counter(q.lang for q in dev) == {"sw": 20, "te": 3}
    numbers = sorted(int(q.query_id) for q in dev if q.lang == "sw")
    assert max(numbers) > 150 and min(numbers) < 50 and len(set(numbers) & set(range(20))) < 10
    assert {q.query_id for q in stage.hold_out(queries, 0.1, 14)[1]} != {q.query_id for q in dev}
    assert stage.hold_out(queries, 0, 13)[1] == []
    again = stage.Query("sw", "again", 0, 0, dev[0].marks)  # a held-out question under another id
    assert set(stage.hold_out([*queries, again], 0.1, 13)[1]) >= {again, dev[0]}


def test_of_parallel_languages_the_same_queries_are_held_out():
    """Translations share their id: none is trained on while another one chooses the best epoch."""
    queries = [stage.Query(lang, f"q{i}", 0, 0, (f"{lang} {i}",)) for i in range(40) for lang in ("de", "sw")]
    dev = stage.hold_out(queries, 0.1, 13)[1]
    of_lang = {lang: {query.query_id for query in dev if query.lang == lang} for lang in ("de", "sw")}
    assert of_lang["de"] == of_lang["sw"] and len(of_lang["de"]) == 4


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
