"""The README shows what is: numbers of results/*.json, commands, records and names of the scripts."""

import ast
import json
import re
import shlex
import sys

import pytest
from conftest import ROOT, load_stage

sys.path.insert(0, str(ROOT / "bench"))
from results import fill, short  # noqa: E402

README = (ROOT / "README.md").read_text("utf-8")
BLOCK = re.compile(r"(?:<!-- (needs|run by): (.+?) -->\n)?^```bash\n(.*?)^```$", re.M | re.S)
NEEDS = {
    "hub": "hub",
    "server": "server",
    "GPU": "GPU",
    "hours": "hour",
}  # a mark, and the word that the text must say

# What may have a digit and is not generated: names, flags with values, places in the paper; no result.
CODE = r"""--[a-z].* | .*\ --[a-z].* | make\ .* | [\w/.-]*\.(py|jsonl?|png)(\ [a-z]+)? | bm25 |
           OMP_NUM_THREADS=1 | OPENAI_\w+"""
ALLOWED = [
    r"\]\([^)\n]*\)",
    r"<https?://\S+>",  # where a link goes
    r"\bSec\. \d(\.\d)?( to \d\.\d)?",
    r"\bTables? \d+((, \d+)* and \d+|(, \d+)*)",
    r"\bFigure \d+",
    r"\bApp\. [A-Z]",
    r"\barXiv \d{4}\.\d{5}",
    r"\b(EMNLP|TACL) 20\d\d",
    r"\bPython 3\.11\b",
    r"\bApache 2\.0",
    r"\(401 or 403\)",
    r"\bexit status 2\b",
    r"\b[Ss]tages? 0\d( (and|to) 0\d)?\b",
    r"\bafter 0\d\b",
    r"^ *(corpus, queries ─ )?0\d (mine|filter|generate|cluster|train|evaluate)\b",
    r"\bnDCG@10\b",
    r"\bR@100\b",
    r"\bE5\b",
    r"\bBM25\b",
    r"\bL2-normalised",
    r"\bf_1\b",
    r"tokens are bytes / 4\b",
    r"\bLLM\(q, d\+, d\) = 0",
    r"Covering 18 Diverse Languages",
]


def typed_by_hand(text):
    """What has a digit and is neither generated, nor marked as a constant of the paper, nor on the list."""
    text = re.sub(r"<!-- table .+? -->\n.*?<!-- end -->", "", text, flags=re.S)
    text = re.sub(r"<!-- paper: .+? -->\n.*?<!-- end -->", "", text, flags=re.S)
    text = re.sub(r"<!-- = .+? -->.*?<!-- / -->", "", text)
    text = re.sub(
        r"^```(bash|python|json|bibtex)\n(.*?)^```$",
        lambda m: "\n".join(re.findall(r"#.*", m[2])) if m[1] in ("bash", "python") else "",
        text,
        flags=re.M | re.S,
    )  # of code only the comments can claim something
    text = re.sub(r"<!-- .*? -->", "", text)
    text = re.sub(r"`([^`\n]+)`", lambda m: "" if re.fullmatch(CODE, m[1], re.X) else m[1], text)
    for pattern in ALLOWED:
        text = re.sub(pattern, " ", text, flags=re.M)
    return [line.strip() for line in text.splitlines() if re.search(r"\d", line)]


def test_numbers_are_those_of_the_result_files():
    assert fill(README) == README


def test_no_number_is_typed_by_hand():
    assert typed_by_hand(README) == []


@pytest.mark.parametrize(
    "line",
    [
        "It reaches 76.5 nDCG@10.",
        "Done in 2 minutes.",
        "| model | 76.5 |",
        "`76.5`",
        "`a` 76.5 `--drop-at 1`",
        "`a` 76.5 --drop-at `b`",
        "**70.0** on average",
        "see Table 76.5",
        "Sec. 3.3 gains 2.4",
        "```bash\nmake all  # 2 minutes on two cores\n```",
        "```text\n01 mine: 40 s\n```",
        "<!-- = sample total/seconds -->7<!-- / --> and 8 more",
    ],
)
def test_a_number_typed_by_hand_is_found(line):
    assert typed_by_hand(line)


def test_marks_are_closed_and_do_not_begin_a_line():
    """A comment that begins a line would make the whole line HTML, in which Markdown means nothing."""
    generated = re.findall(r"<!-- (?:table|paper:) (?:(?!<!--).)*?<!-- end -->", README, re.S)
    assert (
        len(generated) == len(re.findall(r"<!-- (?:table|paper:) ", README)) == README.count("<!-- end -->")
    )
    assert (
        len(re.findall(r"\S ?<!-- = \S+ \S+(?: \S+)? -->[^<\n]+<!-- / -->", README))
        == README.count("<!-- = ")
        == README.count("<!-- / -->")
        > 0
    )
    assert not re.search(r"^<!-- [=/]", README, re.M)


# ------------------------------------------------------- commands; test_readme_commands.py runs the others


def commands(block):
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_every_command_is_run_or_needs_what_the_text_says():
    assert len(BLOCK.findall(README)) == len(re.findall(r"^```(?:bash|sh|console|shell)", README, re.M)) > 10
    for found in BLOCK.finditer(README):
        kind, marks, block = found.groups()
        if kind == "run by":
            assert all(line in (ROOT / marks).read_text("utf-8") for line in commands(block))
        elif kind == "needs":
            before = README[: found.start()].rstrip().split("\n\n")[-1]
            for mark in marks.split(", "):
                assert re.search(rf"\b{NEEDS[mark]}", before), (
                    f"the text before {block!r} does not say that it needs: {mark}"
                )


def test_commands_use_flags_that_exist():
    found = re.findall(
        r"^(?:torchrun .*?|(?:python offline_llm.py --exec )?python )(0\d\w+\.py) (.*)$", README, re.M
    )
    assert len(found) > 10
    for script, arguments in found:
        load_stage(script.removesuffix(".py")).build_parser().parse_args(shlex.split(arguments))


def test_flags_in_the_text_exist():
    flags = set(re.findall(r"`(--[a-z][a-z-]+)", README))
    sources = '"--help"' + "".join(
        p.read_text("utf-8") for p in [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py")]
    )
    assert len(flags) > 20 and [flag for flag in flags if f'"{flag}"' not in sources] == []


def test_make_variables_and_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    lines = re.findall(r"^make (.*)$", README, re.M) + re.findall(r"`make ([^`]*)`", README)
    for line in lines:
        for word in shlex.split(line.split("#")[0]):
            name, _, value = word.partition("=")
            assert re.search(rf"^{name} \?=" if value else rf"(^|\s){name}(\s|:)", makefile, re.M), word


# --------------------------------------------------------------------------- records


def shown_record():
    """The line of topics.jsonl that the README shows."""
    return re.search(r"```json\n(.*)\n```", (ROOT / "RESULTS.md").read_text("utf-8"))[1]


def test_records_are_valid():
    from common import parse_query

    own = re.findall(r"this much is needed:\n\n```json\n(.*)\n```", README)
    assert len(own) == 1 and len(re.findall(r"^```json", README, re.M)) == 1
    for line in (shown_record(), *own):
        record = parse_query("README.md", 1, line.encode(), ["sw"])
        assert record["lang"] and record["positive_passages"]


def test_the_record_has_texts_of_the_sample_and_what_every_stage_adds():
    record = json.loads(shown_record())
    lang, query_id = record["lang"], record["query_id"]
    train = map(json.loads, open(ROOT / "sample/data/train.jsonl", encoding="utf-8"))
    given = next(r for r in train if (r["lang"], r["query_id"]) == (lang, query_id))
    passages = map(json.loads, open(ROOT / f"sample/data/corpus/{lang}.jsonl", encoding="utf-8"))
    corpus = {p["docid"]: p["text"] for p in passages}
    assert record["query"] == given["query"] and short(record) == record
    for key in ("positive_passages", "negative_passages", "false_negatives"):
        assert all(p["text"] == corpus[p["docid"]] for p in record[key])
    (removed,) = record["false_negatives"]
    (negative,) = record["negative_passages"]
    assert removed["grade"] == min(removed["accuracy"], removed["completeness"]) > 0 == negative["grade"]
    assert record["summary"] and record["generated_query"] and negative["source"] == "generated-query"
    assert negative["ranks"] and type(record["topic"]) is int and "candidate_passages" not in record


def test_the_table_of_records_names_every_field_of_the_record():
    table = " ".join(" ".join(row) for row in rows_of("The stages", "### The records"))
    for field in json.loads(shown_record()):
        assert field in table, field


# --------------------------------------------------------------------------- names


def functions(path):
    return {
        node.name
        for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }


def rows_of(heading, below=""):
    section = re.search(rf"^## {heading}\n(.*?)^## ", README, re.M | re.S)[1].partition(below or "\0")
    section = section[2] if below else section[0].partition("\n### ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section.splitlines()
        if line.startswith("| ")
    ][1:]


def test_the_map_names_files_and_functions_that_exist():
    rows = rows_of("The paper and the code")
    for place, _, path, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert name in functions(path.strip("`")), f"{place}: {path} has no {name}"
    said = " ".join(place for place, *_ in rows)
    assert [
        part
        for part in (
            "Sec. 3.3",
            "Sec. 3.4",
            "Sec. 3.5",
            "Sec. 4.1",
            "Table 1",
            "Table 2",
            "Tables 3",
            "Table 8",
            "Table 9",
            "Table 13",
            "Figure 3",
            "App. C",
        )
        if part not in said
    ] == []
    assert {p.name for p in ROOT.glob("0*.py")} <= {path.strip("`") for _, _, path, _ in rows}
    assert {p.name for p in ROOT.glob("0*.py")} == {script.strip("`") for script, *_ in rows_of("The stages")}


def test_troubleshooting_quotes_messages_that_exist():
    sources = re.sub(
        r'"\s*\n\s*f?"', "", "".join(p.read_text("utf-8") for p in ROOT.glob("*.py"))
    )  # strings over two lines
    messages = [
        message
        for symptom, *_ in rows_of("Troubleshooting")
        for message in re.findall(r"`([^`]+ [^`]+)`", symptom)
    ]
    assert len(messages) > 8 and [message for message in messages if message not in sources] == []


def anchors(text):
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert len(links) > 8
    for link in links:
        path, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            assert not path or (ROOT / path).is_file(), link
            if anchor:
                text = (ROOT / path).read_text("utf-8") if path else README
                assert anchor in anchors(text), link
