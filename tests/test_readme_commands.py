"""The README's commands and Python run as they stand, in order, in a copy with a cut of the sample.

Those that need a hub, a GPU, a server or hours are marked there; test_readme.py checks what it can of them.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_readme import BLOCK, README, shown_record

LANGS = "sw te id ar zh".split()  # those of the README's command on mini-MIRACL


def lines(path):
    return path.read_text("utf-8").splitlines()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def cut_sample(data, langs=LANGS):
    """sample/data in a few languages, with six training and four dev queries each; whole corpora."""
    for split, n in (("train", 6), ("dev", 4)):
        records = [json.loads(line) for line in lines(ROOT / f"sample/data/{split}.jsonl")]
        records = [r for lang in langs for r in [r for r in records if r["lang"] == lang][:n]]
        write(data / f"{split}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        for lang in langs:
            ids = {r["query_id"] for r in records if r["lang"] == lang}
            qrels = lines(ROOT / f"sample/data/qrels/{split}/{lang}.tsv")
            write(
                data / f"qrels/{split}/{lang}.tsv",
                "".join(line + "\n" for line in qrels if line.split("\t")[0] in ids),
            )
    for lang in langs:
        write(data / f"corpus/{lang}.jsonl", (ROOT / f"sample/data/corpus/{lang}.jsonl").read_text("utf-8"))


def like_miracl(data, root):
    """The cut once more, laid out like the hub's two repositories."""
    for lang in LANGS:
        docs = root / f"miracl-corpus/miracl-corpus-v1.0-{lang}/docs-0.jsonl.gz"
        docs.parent.mkdir(parents=True)
        docs.write_bytes(gzip.compress((data / f"corpus/{lang}.jsonl").read_bytes()))
        for split in ("train", "dev"):
            records = [json.loads(line) for line in lines(data / f"{split}.jsonl")]
            base = root / f"miracl/miracl-v1.0-{lang}"
            write(
                base / f"topics/topics.miracl-v1.0-{lang}-{split}.tsv",
                "".join(f"{r['query_id']}\t{r['query']}\n" for r in records if r["lang"] == lang),
            )
            write(
                base / f"qrels/qrels.miracl-v1.0-{lang}-{split}.tsv",
                (data / f"qrels/{split}/{lang}.tsv").read_text("utf-8"),
            )


def own_file(data, path):
    """Records as people have them: Tevatron's layout, no lang, negatives that nobody judged."""
    corpus = [json.loads(line) for line in lines(data / "corpus/sw.jsonl")]
    with open(path, "w", encoding="utf-8") as file:
        for record in (r for r in map(json.loads, lines(data / "train.jsonl")) if r.pop("lang") == "sw"):
            positives = {p["docid"] for p in record["positive_passages"]}
            file.write(
                json.dumps(
                    record
                    | {"negative_passages": [p for p in corpus if p["docid"] not in positives][::7][:20]},
                    ensure_ascii=False,
                )
                + "\n"
            )


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    top = tmp_path_factory.mktemp("readme") / "project"
    for path in (
        "Makefile",
        "requirements.txt",
        "README.md",
        "RESULTS.md",
        "paper.json",
        *(p.name for p in ROOT.glob("*.py")),
        "sample/make_encoder.py",
        "sample/stand_in.py",
        "sample/make_sample.py",
    ):
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, top / path)
    for folder in ("bench", "results"):
        shutil.copytree(ROOT / folder, top / folder)
    cut_sample(top / "sample/data")
    like_miracl(top / "sample/data", top.parent / "shared/data/minimiracl")
    own_file(top / "sample/data", top / "mine.jsonl")
    (top / ".venv").mkdir()  # this environment, as one that make has installed
    for name in ("bin", "lib", "lib64", "include", "pyvenv.cfg"):
        if Path(sys.prefix, name).exists():
            (top / ".venv" / name).symlink_to(Path(sys.prefix, name))
    (top / ".venv/installed").touch()
    return top


@pytest.fixture(scope="module")
def shell(project):
    def run(*command):
        env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(project / "hub")}
        env["PYTHONFAULTHANDLER"] = "1"  # an aborted process tells where
        env = {
            k: v
            for k, v in env.items()
            if k not in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        }
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-1000:]}\n{done.stderr[-20_000:]}"
        return done.stdout

    return run


@pytest.fixture(scope="module")
def ran(project, shell):
    """All blocks without a mark, in one shell, in the README's order; what it prints."""
    blocks = [block for kind, _, block in BLOCK.findall(README) if not kind]
    assert len(blocks) > 5
    return shell("bash", "-euc", "\n".join(blocks))


def test_all_commands_without_a_mark_run(ran, project):
    for made in (
        "runs/sample/eval/report.md",
        "runs/minimiracl/eval/metrics.json",
        "model/model.safetensors",
        "exported/sw.jsonl",
        "runs/hosted/batch.jsonl",
        "runs/two/candidates.jsonl",
        "runs/two/model/model.safetensors",
    ):
        assert (project / made).exists(), made
    assert "make all" in ran and "model - sample:" in ran  # of make help, and of the evaluation


def test_the_shown_record_has_the_fields_that_the_stages_write(ran, project):
    shown = json.loads(shown_record())
    made = json.loads(lines(project / "runs/sample/topics.jsonl")[0])
    assert list(shown) == list(made)
    assert [list(p) for p in shown["positive_passages"]] == [list(p) for p in made["positive_passages"][:1]]


def test_a_collected_run_is_shown_in_the_readme_and_in_the_results(ran, project, shell):
    shell(".venv/bin/python", "bench/results.py", "--collect", "runs/sample", "sample")
    metrics = json.loads((project / "runs/sample/eval/metrics.json").read_text("utf-8"))
    result = json.loads((project / "results/sample.json").read_text("utf-8"))
    assert {key: result[key] for key in metrics} == metrics
    optional = {"02a_check_judge.py", "03a_tune_generator.py", "05a_export.py"}
    assert set(result["stages"]) == {p.name for p in ROOT.glob("0*.py")} - optional
    assert result["sizes"]["train_queries"] == 30 and result["sizes"]["llm_calls"] > 0
    assert result["made"]["date"].startswith("20")
    score = f"| model | **{100 * metrics['models']['model']['avg']['ndcg@10']:.1f}** |"
    readme = (project / "README.md").read_text("utf-8")
    assert score in re.search(r"<!-- table scores sample -->\n.*?<!-- end -->", readme, re.S)[0]
    assert score in (project / "RESULTS.md").read_text("utf-8")
    assert "scores" in result["figures"]
    for name in result["figures"]:
        drawn = (project / f"runs/sample/eval/figures/{name}.png").read_bytes()
        assert (project / f"results/figures/sample-{name}.png").read_bytes() == drawn


def test_the_python_of_the_readme_runs(ran, shell):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert shell(sys.executable, "-c", code).startswith("30 (")
