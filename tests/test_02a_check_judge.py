"""02a: figures that a reader can check by hand, from hand-made records, sheets and labels."""

import csv
import json
import re

import pytest
from conftest import load_stage
from faulty_server import Running, scores

import common
from common import DataError


def passage(docid, text="x"):
    return {"docid": docid, "title": "", "text": text}


def run(*args):
    load_stage("02a_check_judge").main(list(map(str, args)))


def text_with(grade, n):
    """The n-th text that the test server's judge gives this grade."""
    texts = (f"สวัสดี {i}" for i in range(10_000))
    return [t for t, _ in zip((t for t in texts if min(scores(t).values()) == grade), range(n + 1))][n]


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


@pytest.fixture
def judged(tmp_path):
    """th: 2 of 3 further positives found, 1 of 4 negatives thrown away. sw: 1 of 1 and 0 of 1."""

    def record(query_id, lang, positives, negatives):
        return {
            "query_id": query_id,
            "lang": lang,
            "query": "?",
            "positive_passages": [
                passage(f"{query_id}p{i}", text_with(g, i)) for i, g in enumerate(positives)
            ],
            "negative_passages": [
                passage(f"{query_id}n{i}", text_with(g, 10 + i)) | {"source": "human"}
                for i, g in enumerate(negatives)
            ],
        }

    rows = [
        record("a", "th", [0, 1, 0], [0, 0]),
        record("b", "th", [0, 2], [0, 1]),
        record("c", "sw", [2, 2], [0]),
        record("d", "sw", [0], []),
    ]
    rows[2]["negative_passages"].append(passage("cx", text_with(2, 30)))  # nobody judged it: no truth
    return write(tmp_path / "train.jsonl", rows)


def test_calibrate_counts_by_hand(judged, tmp_path, capsys):
    with Running() as server:
        run(
            "calibrate",
            "--input",
            judged,
            "--llm",
            "judge",
            "--base-url",
            server.url,
            "--cache",
            tmp_path / "cache",
            "--out",
            tmp_path / "o",
        )
        assert len(server.bodies) == 8  # two pairs of one wording
        printed = capsys.readouterr().out
        for _ in range(2):  # cached for the next time and for stage 02
            run(
                "calibrate",
                "--input",
                judged,
                "--llm",
                "judge",
                "--base-url",
                server.url,
                "--cache",
                tmp_path / "cache",
            )
            assert len(server.bodies) == 8  # two pairs of one wording
    rows = {line.split()[0]: line for line in printed.splitlines()}
    assert list(rows) == ["lang", "sw", "th", "all"]
    assert (
        "71.4 [35.9, 91.8] of 7" in rows["th"]
    )  # 5 of 7 right; Wilson by hand: centre 0.6384, half-width 0.2794
    assert "25.0 [4.6, 69.9] of 4" in rows["th"] and "33.3 [6.1, 79.2] of 3" in rows["th"]
    # people call 3 of 7 relevant; balanced: the mean of 2 of 3 found and 3 of 4 spared
    assert rows["th"].split()[1:3] == ["42.9", "70.8"] and rows["sw"].split()[1:3] == ["50.0", "100.0"]
    assert "100.0 [34.2, 100.0] of 2" in rows["sw"] and "0.0 [0.0, 79.3] of 1" in rows["sw"]
    assert len((tmp_path / "o").read_text("utf-8").splitlines()) == 9


def test_calibrate_never_shows_a_passage_its_own_text_as_reference(judged, tmp_path):
    with Running() as server:
        for flags in ([], ["--reference", "best"], ["--no-reference"]):
            run(
                "calibrate",
                "--input",
                judged,
                "--llm",
                "judge",
                "--base-url",
                server.url,
                "--cache",
                tmp_path / "c",
                *flags,
            )
    for body in server.bodies:
        lines = dict(line.split(": ", 1) for line in body["messages"][1]["content"].splitlines())
        assert lines["Candidate passage"] != lines.get("Reference passage (known to answer the question)")


def test_calibrate_has_something_to_calibrate_on(tmp_path):
    rows = [
        {
            "query_id": "q",
            "lang": "th",
            "query": "?",
            "positive_passages": [passage("p")],
            "negative_passages": [passage("n")],
        }
    ]
    with pytest.raises(common.DataError, match="take a file with judgments"):
        run(
            "calibrate",
            "--input",
            write(tmp_path / "in.jsonl", rows),
            "--llm",
            "x",
            "--base-url",
            "http://127.0.0.1:9/v1",
        )


@pytest.fixture
def sheet(tmp_path):
    rows = [
        {
            "query_id": f"q{i}",
            "lang": ["ko", "te"][i % 2],
            "query": "=1+1?",
            "positive_passages": [passage("p", "the answer")],
            "negative_passages": [
                passage(f"k{i}.{j}", f'-kept {i} {j}, "quoted"\nline') | {"source": "mined", "grade": 0}
                for j in range(6)
            ]
            + [passage("h", "human") | {"source": "human", "grade": 0}],
            "false_negatives": [
                passage(f"r{i}.{j}", f"removed {i} {j}") | {"accuracy": 1, "completeness": 1, "grade": 1}
                for j in range(3)
            ],
        }
        for i in range(4)
    ]
    run(
        "sample",
        "--input",
        write(tmp_path / "filtered.jsonl", rows),
        "--per-language",
        8,
        "--out",
        tmp_path / "sheet.csv",
    )
    return tmp_path / "sheet.csv"


def read(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_a_sheet_is_blind_shuffled_and_half_removed(sheet, tmp_path):
    rows, key = read(sheet), read(f"{sheet}.key.csv")
    assert set(rows[0]) == {"item", "lang", "question", "known answer", "title", "passage", "relevant"}
    assert [r["item"] for r in rows] == [k["item"] for k in key] and len(rows) == 16
    removed = [k["removed"] for k in key if k["lang"] == "ko"]
    assert sorted(removed) == ["0"] * 4 + ["1"] * 4 and removed != sorted(removed, reverse=True)
    assert all(
        r["relevant"] == "" and not r["passage"].startswith("-") and r["question"] == "'=1+1?" for r in rows
    )
    run(
        "sample", "--input", tmp_path / "filtered.jsonl", "--per-language", 100, "--out", tmp_path / "all.csv"
    )
    assert len(read(tmp_path / "all.csv")) == 4 * 9 and "human" not in {
        r["passage"] for r in read(tmp_path / "all.csv")
    }
    before = sheet.read_bytes()
    run("sample", "--input", tmp_path / "filtered.jsonl", "--per-language", 8, "--out", sheet, "--overwrite")
    assert sheet.read_bytes() == before
    run(
        "sample",
        "--input",
        tmp_path / "filtered.jsonl",
        "--per-language",
        8,
        "--out",
        sheet,
        "--overwrite",
        "--seed",
        5,
    )
    assert sheet.read_bytes() != before


def test_what_was_relabelled_is_sampled_among_the_removed(sheet, tmp_path):
    rows = common.read_queries(tmp_path / "filtered.jsonl")
    rows = [row | {"positive_passages": row["positive_passages"] + [
        passage(f"new{n}", f"relabelled {n}") | {"source": "relabelled", "grade": 2}]}
        for n, row in enumerate(rows)]
    path = write(tmp_path / "relabelled.jsonl", rows)
    run("sample", "--input", path, "--out", tmp_path / "r.csv")
    key = read(tmp_path / "r.csv.key.csv")
    removed = {row["docid"]: row["grade"] for row in key if row["removed"] == "1"}
    assert len(removed) == 4 * 4 and all(removed[f"new{n}"] == "2" for n in range(4))


def test_a_sheet_does_not_replace_its_input_and_a_key_steers_no_terminal(sheet, tmp_path):
    flags = ["--input", tmp_path / "filtered.jsonl", "--out", tmp_path / "filtered.jsonl", "--overwrite"]
    with pytest.raises(DataError, match="is the input"):
        run("sample", *flags)
    key = tmp_path / "sheet.csv.key.csv"
    key.write_text(key.read_text("utf-8-sig").replace("te,", "te\x1b]0;x\x07,"), "utf-8")
    with pytest.raises(DataError, match="cannot name a file"):
        run("score", sheet, "--key", key)


def test_a_sheet_is_not_written_beside_the_key_of_another(sheet, tmp_path):
    sheet.unlink()
    with pytest.raises(DataError, match="sheet.csv.key.csv exists"):
        run("sample", "--input", tmp_path / "filtered.jsonl", "--out", sheet)
    assert not sheet.exists()


def test_a_sheet_as_excel_leaves_it_is_read(tmp_path):
    """Without the commas of last, empty cells, and with rows of nothing but commas."""
    (tmp_path / "sheet.csv").write_text("item,passage,relevant\nsw-1,x\nsw-2,y,1\n,,\n\n", "utf-8")
    rows = load_stage("02a_check_judge").read_csv(tmp_path / "sheet.csv", ["item", "relevant"])
    assert [(line, row["item"], row["relevant"]) for line, row in rows] == [(2, "sw-1", ""), (3, "sw-2", "1")]


def test_only_of_both_kinds_can_a_judge_that_says_one_thing_be_told(judged, tmp_path, capsys):
    rows = [row for row in common.read_queries(judged) if row["query_id"] in "cd"]
    for row in rows:
        row["positive_passages"] = row["positive_passages"][:1]
        row["negative_passages"] = [passage(f"n{n}", text_with(0, n)) | {"source": "human"} for n in range(3)]
    with Running() as server:
        flags = ["--llm", "judge", "--base-url", server.url, "--cache", tmp_path / "cache"]
        run("calibrate", "--input", write(tmp_path / "negatives.jsonl", rows), *flags)
        assert "it does not judge" not in capsys.readouterr().err
        rows[0]["positive_passages"].append(passage("p", text_with(0, 7)))
        run("calibrate", "--input", write(tmp_path / "both.jsonl", rows), *flags)
        assert "all 7 verdicts are alike (grade 0): it does not judge" in capsys.readouterr().err


def test_a_long_passage_is_read_back(tmp_path):
    (tmp_path / "sheet.csv").write_text(f'item,passage,relevant\nsw-1,"{"x" * 200_000}",1\n', "utf-8")
    ((_, row),) = load_stage("02a_check_judge").read_csv(tmp_path / "sheet.csv", ["item", "relevant"])
    assert row["relevant"] == "1" and len(row["passage"]) == 200_000


def test_a_sheet_fits_its_own_key_alone(sheet, tmp_path, capsys):
    flags = ["--input", tmp_path / "filtered.jsonl", "--per-language", 8, "--seed", 5]
    run("sample", *flags, "--out", tmp_path / "other.csv")
    with pytest.raises(DataError, match="is not in .*other.csv.key.csv; give its key"):
        run("score", sheet, "--key", tmp_path / "other.csv.key.csv")


def fill(sheet, path, label):
    rows = read(sheet)
    with open(path, "w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(row | {"relevant": label(row["item"])} for row in rows)
    return path


def scored(capsys, sheet, *sheets):
    """{lang: cells} of the table that score prints."""
    run("score", *sheets, "--key", f"{sheet}.key.csv")
    rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    return {lang: cells for lang, *cells in rows}


def test_score_gives_agreement_and_kappa(sheet, tmp_path, capsys):
    key = {k["item"]: k["removed"] for k in read(f"{sheet}.key.csv")}
    ann = fill(sheet, tmp_path / "ann.csv", key.get)  # agrees with the judge everywhere
    bob = fill(sheet, tmp_path / "bob.csv", lambda item: key[item])
    eve = fill(
        sheet, tmp_path / "eve.csv", lambda item: "1" if item.startswith("te") else key[item]
    )  # in te: all relevant
    rows = scored(capsys, sheet, ann, bob)
    assert " ".join(rows["all"]).count("100.0 [") == 3
    assert rows["all"][-2:] == ["1.000 of 16", "-"]  # what was removed all call relevant: so would chance
    rows = scored(capsys, sheet, ann, eve)
    # te: 4 items (1, 1), 4 items (0, 1): observed 0.5, chance 0.75^2 + 0.25^2 = 0.625, kappa = -0.125 / 0.375
    assert rows["te"][-2:] == ["-0.333 of 8", "-"] and rows["ko"][-2:] == ["1.000 of 8", "-"]
    agreed = "100.0 [51.0, 100.0] of 4"
    assert rows["te"][1:4] == [agreed, agreed, "-"]  # a tie decides nothing
    rows = scored(capsys, sheet, eve)
    assert rows["te"][1] == "50.0 [21.5, 78.5] of 8" and rows["te"][-1] == "-"


def test_kappa_of_what_was_removed_is_given_on_its_own(sheet, tmp_path, capsys):
    """As in App. C; all eight, half of them kept, would give a half."""
    key = {k["item"]: k["removed"] for k in read(f"{sheet}.key.csv")}
    removed = sorted(item for item, is_removed in key.items() if is_removed == "1" and item.startswith("te"))
    dan = fill(sheet, tmp_path / "dan.csv", lambda item: "1" if item in removed[:2] else "0")
    gus = fill(sheet, tmp_path / "gus.csv", lambda item: "1" if item in removed[::2] else "0")
    # (1, 1), (1, 0), (0, 1), (0, 0): observed and by chance a half; of all: 0.75, 0.75^2 + 0.25^2
    assert scored(capsys, sheet, dan, gus)["te"][-2:] == ["0.333 of 8", "0.000 of 4"]


@pytest.mark.parametrize(
    "label, complaint", [(lambda item: "maybe", r"ann.csv:\d+: relevant is 'maybe'; want 1")]
)
def test_a_bad_cell_is_told_with_its_line(sheet, tmp_path, label, complaint):
    with pytest.raises(common.DataError, match=complaint):
        run("score", fill(sheet, tmp_path / "ann.csv", label), "--key", f"{sheet}.key.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(common.DataError, match="other.csv:1: column 'item' is missing"):
        run("score", tmp_path / "other.csv", "--key", f"{sheet}.key.csv")
