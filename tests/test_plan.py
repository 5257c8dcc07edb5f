"""bench/plan.py and `make miracl`: the count is right, the page is the script's, nothing starts unasked."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import measure_rates  # noqa: E402
import plan  # noqa: E402

FULL = ROOT.parent / "shared/data/miracl-full-topics-qrels/miracl"
RATES = json.loads((ROOT / "results/rates.json").read_text("utf-8"))
# averages that can be multiplied in the head
ROUND = {
    "tokens": {
        "passage": {"sw": 100, "te": 200},
        "query": {"sw": 10, "te": 20},
        "judge": {"sw": 500, "te": 500},
        "judge, shared": {"sw": 400, "te": 400},
        "summarise": {"sw": 300, "te": 300},
    },
    "ask": 44,
    "bytes": {"sw": 1000, "te": 1000},
}


def args(*flags):
    return plan.build_parser().parse_args(list(flags))


def test_scaling_page_is_what_the_script_writes():
    assert (ROOT / "SCALING.md").read_text("utf-8") == plan.markdown(args(), RATES)


def test_full_miracl_has_the_published_sizes():
    work = plan.count(args(), RATES["averages"])
    assert (work["passages"], work["training queries"], work["judged passages"], work["dev queries"]) == (
        90_416_887,
        40_203,
        343_177,
        13_071,
    )
    assert work["judge calls in 02"] == 40_203 * 40 == 1_608_120
    assert work["vector bytes of an encoder, fp16"] == 90_416_887 * 1024 * 2
    assert work["negatives from 03"] == round(0.091 * 30 * 40_203) and work["judge calls in 03"] == round(
        109_754 / 0.805
    )
    assert work["training steps"] == 20 * 1508  # 36,183 of the 40,203 queries are trained on, 24 a step
    assert plan.BODY == 302_309_376 and round(plan.WEIGHTS / 1e6) == 559
    millions = dict(
        en=32.9,
        fr=14.6,
        es=10.4,
        ru=9.5,
        ja=7.0,
        zh=4.9,
        fa=2.2,
        ar=2.1,
        fi=1.9,
        ko=1.5,
        id=1.4,
        th=0.54,
        te=0.52,
        hi=0.51,
        bn=0.30,
        sw=0.13,
    )
    passages = {lang: sizes["passages"] for lang, sizes in plan.MIRACL.items()}
    assert {lang: round(n / 1e6, 1 if n > 1e6 else 2) for lang, n in passages.items()} == millions  # Sec. 4.1


@pytest.mark.skipif(not FULL.is_dir(), reason=f"{FULL} is not there")
@pytest.mark.parametrize("lang", plan.MIRACL)
def test_sizes_are_those_of_the_topics_and_judgments(lang):
    def lines(kind, split):
        return (
            gzip.decompress(
                (FULL / f"miracl-v1.0-{lang}/{kind}/{kind}.miracl-v1.0-{lang}-{split}.tsv.gz").read_bytes()
            )
            .decode()
            .splitlines()
        )

    judgments = lines("qrels", "train")
    assert plan.MIRACL[lang] == {
        "passages": plan.MIRACL[lang]["passages"],
        "train_queries": len(lines("topics", "train")),
        "relevant": sum(line.split("\t")[3] != "0" for line in judgments),
        "judged": len(judgments),
        "dev_queries": len(lines("topics", "dev")),
    }


def test_work_of_two_languages_by_hand():
    work = plan.count(
        args("--lang", "sw", "te", "--depth", "10"), ROUND
    )  # sw: 131,924 passages, 1,901 queries; te: 518,079 and 3,452
    assert work["passage tokens"] == 131_924 * 100 + 518_079 * 200
    assert (
        work["pairs in 01"] == 1_901 * 131_924 + 3_452 * 518_079
        and work["pairs in 06"] == 482 * 131_924 + 828 * 518_079
    )
    assert (
        work["prompt tokens in 02"] == 5_353 * 10 * 500
        and work["of them spared by a prefix cache"] == 5_353 * 9 * 400
    )
    assert work["completion tokens in 02"] == 5_353 * 10 * 16
    assert work["prompt tokens in 03"] == pytest.approx(
        5_353 * 300 + 5_353 * (44 + 256) + work["judge calls in 03"] * 500
    )
    assert work["completion tokens in 03"] == 5_353 * (256 + 128) + work["judge calls in 03"] * 16
    steps = 20 * -(-(5_353 - 190 - 345) // 24)
    assert (
        work["training steps"] == steps
    )  # both languages are drawn as often: 15 tokens a query, 150 a passage
    assert work["training tokens"] == pytest.approx(steps * 24 * (15 + 8 * 150))
    assert work["validation tokens"] == pytest.approx(
        20 * (30 + (2_687 + 4_119) / 5_353) * (100 * 100 + 100 * 200)
    )


def test_a_language_that_was_not_measured_counts_as_the_mean():
    assert plan.total({"sw": 100, "te": 200}, {"th": 10}) == 1500


def test_times_are_work_over_rates():
    rows = {
        row.stage[:2]: row
        for row in plan.stages(args("--peak-tflops", "100", "--utilisation", "0.5"), RATES)[1]
    }
    work, rate = (
        plan.count(args(), RATES["averages"]),
        {name: value for name, (value, _) in RATES["rates"].items()},
    )
    flops = 5e13  # a second
    assert rows["01"].gpu_s == pytest.approx(2 * 302_309_376 * 2 * work["passage tokens"] / flops)
    assert rows["06"].gpu_s == pytest.approx(
        rows["01"].gpu_s / 2
    )  # BGE-M3's vectors are there from 01, the trained model's are not
    assert rows["02"].gpu_s == pytest.approx(
        2 * 70e9 * (work["prompt tokens in 02"] + 16 * 1_608_120) / flops
    )
    assert rows["05"].gpu_s == pytest.approx(
        302_309_376 * (6 * work["training tokens"] + 2 * work["validation tokens"]) / flops
    )
    assert rows["02"].cpu_s == rows["02"].floor_s == pytest.approx(1_608_120 / rate["judge_calls_per_s"])
    assert rows["01"].cpu_s == pytest.approx(
        2
        * (
            work["passage tokens"] / rate["encode_tokens_per_s"]
            + work["pairs in 01"] / rate["search_pairs_per_s"]
        )
    )
    assert rows["05"].floor_s == pytest.approx(rows["05"].gpu_s / 24)  # a query each is the least
    lists = 40 * work["bytes of a passage for each query"] + work["bytes of judged passages"]
    assert rows["01"].disk == pytest.approx(2 * (90_416_887 * 2048 + 4 * plan.WEIGHTS) + lists)


def test_what_bm25_takes_of_stage_06():
    with_bm25, without = (
        plan.stages(args(*flags), RATES)[1][-1] for flags in ([], ["--eval-models", "BAAI/bge-m3", "m"])
    )
    rate = {name: value for name, (value, _) in RATES["rates"].items()}
    told = f"{rate['bm25_memory_bytes_per_passage'] * 32_893_221 / 1e9:.0f} GB"
    assert (
        with_bm25.memory.startswith(f"{told}:")
        and without.memory == f"as 01, without BM25, whose index would need {told}"
    )
    assert f"about {told} of memory" in (ROOT / "Makefile").read_text("utf-8")
    assert f"to {told}," in " ".join((ROOT / "SCALING.md").read_text("utf-8").split())
    assert with_bm25.disk - without.disk == pytest.approx(rate["bm25_disk_bytes_per_passage"] * 90_416_887)
    assert with_bm25.cpu_s - without.cpu_s == pytest.approx(with_bm25.fixed_s)


def test_gpus_share_what_splits_down_to_the_floor():
    row = plan.Row("", "", "", "", 0, "", gpu_s=800, side_s=80, floor_s=50, fixed_s=7)
    assert [plan.wall(row, n) for n in (1, 8, 64)] == [887, 117, 57]


def values(*flags):
    """What the plan says, number by number."""
    lines = dict(line.split(None, 1) for line in plan.show(args(*flags), RATES) if line[:1].islower())
    work, rows = plan.stages(args(*flags), RATES)
    return work | {row.stage[:2]: row for row in rows} | lines


BEFORE = values()


@pytest.mark.parametrize(
    "flags, change",
    [
        (["--lang", "sw"], lambda now: now["passages"] == 131_924),
        (["--depth", "20"], lambda now: 2 * now["judge calls in 02"] == 1_608_120),
        (["--target", "15"], lambda now: 2 * now["negatives from 03"] == 109_754),
        (["--epochs", "10"], lambda now: 2 * now["training steps"] == 30_160),
        (["--retrievers", "BAAI/bge-m3", "bm25"], lambda now: 2 * now["01"].gpu_s == BEFORE["01"].gpu_s),
        (["--encoder", "other"], lambda now: now["06"].gpu_s == 2 * BEFORE["06"].gpu_s),
        (
            ["--llm", "Llama-3.1-7B"],
            lambda now: (
                10 * now["02"].gpu_s == pytest.approx(BEFORE["02"].gpu_s) and now["01"] == BEFORE["01"]
            ),
        ),
        (
            ["--eval-models", "BAAI/bge-m3", "m"],
            lambda now: now["06"].fixed_s == 0 and now["06"].gpu_s == BEFORE["06"].gpu_s,
        ),
        (
            ["--eval-models", "bm25"],
            lambda now: (
                now["06"].gpu_s == 0 and now["06"].cpu_s == now["06"].fixed_s == BEFORE["06"].fixed_s > 0
            ),
        ),
        (["--peak-tflops", "1978"], lambda now: 2 * now["05"].gpu_s == pytest.approx(BEFORE["05"].gpu_s)),
        (["--utilisation", "0.6"], lambda now: 2 * now["05"].gpu_s == pytest.approx(BEFORE["05"].gpu_s)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_flag_changes_what_it_says(flags, change):
    assert change(values(*flags))


@pytest.mark.parametrize("flags", [["--utilisation", "0"], ["--utilisation", "1.1"], ["--peak-tflops", "0"]])
def test_impossible_assumptions_are_an_error(flags):
    with pytest.raises(plan.DataError, match="want more than 0"):
        plan.main(flags)


def test_money_only_at_the_prices_given():
    assert BEFORE["money"].startswith("not computed")
    tokens = {
        kind: sum(BEFORE[f"{kind} tokens in {stage}"] for stage in ("02", "03")) / 1e6
        for kind in ("prompt", "completion")
    }
    assert values("--price-in", "3")["money"] == f"{3 * tokens['prompt']:,.0f} for tokens"
    assert values("--price-out", "5")["money"] == f"{5 * tokens['completion']:,.0f} for tokens"
    hours = {stage: BEFORE[stage].gpu_s / 3600 for stage in ("01", "02", "03", "04", "05", "06")}
    llm, encoders = hours.pop("02") + hours.pop("03"), sum(hours.values())
    assert (
        values("--gpu-price", "2")["money"]
        == f"{2 * encoders:,.0f} for the encoders' GPUs, {2 * llm:,.0f} for the LLM's GPUs"
    )
    # tokens that are paid for need no GPUs of one's own
    assert (
        values("--gpu-price", "2", "--price-in", "0")["money"]
        == f"0 for tokens, {2 * encoders:,.0f} for the encoders' GPUs"
    )


@pytest.mark.parametrize(
    "name, size",
    [
        ("meta-llama/Llama-3.1-70B-Instruct", 70),
        ("Qwen/Qwen2.5-7B", 7),
        ("llama-0.5b-x", 0.5),
        ("gpt-4o", 0),
        ("offline-stand-in", 0),
        ("gemma-27bit", 0),
        ("Mixtral-8x7B", 0),
    ],
)  # a product is no size of its own
def test_size_of_an_llm_from_its_name(name, size):
    assert plan.billions(name) == size


@pytest.mark.parametrize(
    "seconds, told",
    [
        (30, "30 s"),
        (119, "119 s"),
        (120, "2.0 min"),
        (7200, "2.0 h"),
        (36_000, "10 h"),
        (172_800, "2.0 days"),
        (63_072_000, "2.0 years"),
    ],
)
def test_spans(seconds, told):
    assert plan.span(seconds) == told


def test_averages_of_the_sample(tmp_path):
    averages, lengths, rates = measure_rates.measure_averages(str(ROOT / "sample/data"), tmp_path / "bpe")
    tokens = averages["tokens"]
    assert all(set(of_lang) == set(plan.MIRACL) for of_lang in (*tokens.values(), averages["bytes"]))
    assert all(
        tokens["query"][lang]
        < tokens["passage"][lang]
        < tokens["judge, shared"][lang]
        < tokens["judge"][lang]
        for lang in plan.MIRACL
    )
    assert max(lengths) <= 256 and 0 < rates["gzip_share"][0] < 1
    lines = [
        (line, json.loads(line))
        for line in (ROOT / "sample/data/corpus/sw.jsonl").read_text("utf-8").splitlines()
    ]
    assert averages["bytes"]["sw"] == pytest.approx(
        sum(len(line.encode()) + 1 for line, _ in lines) / len(lines), abs=0.1
    )


@pytest.mark.parametrize("name", measure_rates.QUOTED)
def test_quoted_rates_stand_in_the_docstrings(name):
    assert measure_rates.quoted()[name][0] > 0 and measure_rates.quoted()[name][1] == RATES["rates"][name][1]


# --------------------------------------------------------------------------- make miracl


@pytest.fixture
def copy(tmp_path):
    """What the plan needs of the project and no more; .venv looks installed, so nothing is installed."""
    (tmp_path / ".venv").mkdir()
    for name in ("bench", "results"):
        (tmp_path / name).mkdir()
    for name in (
        "Makefile",
        "common.py",
        "paper.json",
        "requirements.txt",
        "bench/plan.py",
        "results/rates.json",
    ):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/installed").touch()
    return tmp_path


OUTSIDE = {
    k: v
    for k, v in os.environ.items()
    if k
    not in (
        "OPENAI_BASE_URL",
        "HF_TOKEN",
        "MAKEFLAGS",
        "MAKELEVEL",
        "LLM",
        "LANGS",
        "RUN",
        "GPUS",
        "BATCH",
        "EVAL_MODELS",
    )
}


def make(folder, *words, **env):
    """`make miracl` with a Python without packages; that of the stages is echo: it prints what would run."""
    return subprocess.run(
        ["make", "--no-print-directory", "miracl", f"PYTHON={sys.executable} -S -B", "PY=echo", *words],
        cwd=folder,
        env=OUTSIDE | env,
        capture_output=True,
        text=True,
    )


def test_make_miracl_prints_the_plan_and_starts_nothing(copy):
    before = sorted(copy.rglob("*"))
    done = make(copy)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.splitlines()[:-1] == plan.show(
        args("--eval-models", "BAAI/bge-m3", "runs/miracl/model"), RATES
    )
    assert "06 as 01, without BM25" in done.stdout
    for word in (
        "disk",
        "GPU hours",
        "LLM calls",
        "tokens",
        "money",
        "Nothing was started: make miracl CONFIRM=1 starts it.",
    ):
        assert f"\n{word}" in done.stdout
    assert "00_prepare_data.py" not in done.stdout and sorted(copy.rglob("*")) == before


def test_make_miracl_passes_its_variables(copy):
    done = make(
        copy,
        "LANGS=sw te",
        "LLM=gpt-4o",
        "RETRIEVERS=a",
        "ENCODER=b",
        "DEPTH=7",
        "N=5",
        "EPOCHS=3",
        "PRICE_IN=1",
        "PRICE_OUT=2",
        "GPU_PRICE=3",
        "PLAN=--utilisation 0.5",
    )
    flags = (
        "--lang sw te --llm gpt-4o --retrievers a --encoder b --depth 7 --target 5 --epochs 3 --price-in 1 "
        "--price-out 2 --gpu-price 3 --utilisation 0.5 --eval-models b runs/miracl/model"
    )
    assert done.stdout.splitlines()[:-1] == plan.show(args(*flags.split()), RATES)


@pytest.mark.parametrize(
    "words, env, missing",
    [
        ([], {"HF_TOKEN": "x"}, "OPENAI_BASE_URL"),
        ([], {"OPENAI_BASE_URL": "http://x/v1"}, "HF_TOKEN"),
        (["LLM=offline-stand-in"], {}, "HF_TOKEN"),
        (["DATA_ROOT=copy"], {}, "OPENAI_BASE_URL"),
    ],
)
def test_confirmed_without_server_or_token_stops_in_one_line(copy, words, env, missing):
    done = make(copy, "CONFIRM=1", *words, **env)
    told = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert (
        done.returncode == 2
        and len(told) == 1
        and told[0].startswith(f"{missing} is not set")
        and "00_prepare_data.py" not in done.stdout
    )


def test_confirmed_runs_the_papers_setting(copy):
    done = make(copy, "CONFIRM=1", OPENAI_BASE_URL="http://x/v1", HF_TOKEN="x")
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "Nothing was started" not in told
    models, langs = "intfloat/multilingual-e5-large BAAI/bge-m3", " ".join(plan.MIRACL)
    for command in (
        f"00_prepare_data.py --source miracl --out data/miracl --seed 13 --lang {langs}",
        f"01_mine_candidates.py --data data/miracl --retrievers {models} --fusion concat --depth 40 ",
        "02_filter_false_negatives.py --input runs/miracl/candidates.jsonl --llm meta-llama/Llama-3.1-70B-",
        f"--retrievers {models} --fusion concat --llm meta-llama/Llama-3.1-70B-Instruct --target 30 ",
        "--encoder BAAI/bge-m3 --topics 12 ",
        "05_train.py --input runs/miracl/topics.jsonl --encoder BAAI/bge-m3 --epochs 20 --batch-size 24 "
        "--language-power 0 --topic-power 0 --out runs/miracl/model ",
        "06_eval.py --data data/miracl --models BAAI/bge-m3 runs/miracl/model --baseline BAAI/bge-m3 ",
    ):
        assert command in told, command
    assert "offline_llm.py" not in told and "make_encoder.py" not in told


def test_what_the_user_sets_wins(copy):
    done = make(
        copy,
        "CONFIRM=1",
        "LLM=gpt-4o",
        "RUN=runs/mine",
        "EVAL_MODELS=bm25 BAAI/bge-m3",
        OPENAI_BASE_URL="http://x/v1",
        HF_TOKEN="x",
        LANGS="sw te",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "--llm gpt-4o" in done.stdout
        and "meta-llama" not in done.stdout
        and "--out runs/mine/model --seed 13 --lang sw te\n" in done.stdout
    )
    assert " --models bm25 BAAI/bge-m3 --baseline " in done.stdout and "pairs, BM25 " in done.stdout


def dry(folder, *words):
    """The commands of `make all`, {script: (what starts it, its arguments)}; nothing runs."""
    done = subprocess.run(
        ["make", "-n", "all", *words], cwd=folder, env=OUTSIDE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    commands = (
        line.partition(next(word for word in line.split() if word.startswith("0")))
        for line in done.stdout.splitlines()
        if " 0" in line
    )
    return {script: (start.strip(), arguments) for start, script, arguments in commands}


@pytest.mark.parametrize(
    "words, wanted",
    [
        ([], "--epochs 8 | --lr 1e-3 --temperature 0.05"),
        (
            ["ENCODER=intfloat/multilingual-e5-small"],
            "--epochs 1 | --lr 2e-5 --negatives 3 --passage-max-len 128",
        ),
        (
            ["ENCODER=models/multilingual-e5-small"],
            "--epochs 1 | --lr 2e-5 --negatives 3 --passage-max-len 128",
        ),
        (["ENCODER=BAAI/bge-m3"], "--epochs 20 | --topic-power 0.5 --out"),
        (["ENCODER=intfloat/multilingual-e5-small", "KIND=paper"], "--epochs 20 | --topic-power 0.5 --out"),
        (["ENCODER=BAAI/bge-m3", "EPOCHS=2", "TRAIN=--lr 1e-5"], "--epochs 2 | --lr 1e-5 --out"),
    ],
)
def test_settings_of_the_training_go_by_the_kind_of_encoder(copy, words, wanted):
    command = " ".join(dry(copy, *words)["05_train.py"][1].split())
    assert all(flags in command for flags in wanted.split(" | ")), command


def test_a_path_may_end_in_a_slash_and_n_bounds_the_negatives_that_train_does_not(copy):
    small = dry(copy)["05_train.py"][1]
    for encoder in ("models/sample/", "./models/sample", str(copy / "models/sample")):
        assert dry(copy, f"ENCODER={encoder}")["05_train.py"][1].replace(encoder, "models/sample") == small
    assert " --epochs 20 " in dry(copy, "ENCODER=/m/bge-m3/")["05_train.py"][1]
    for words, flag in ((["N=5"], "--negatives 5"), (["N=5", "TRAIN=--negatives 2"], "--negatives 2"),
                        (["N=2", "ENCODER=/m/other"], "--negatives 2"),
                        (["N=6", "ENCODER=/m/other"], "--negatives 3")):
        assert re.findall("--negatives [0-9]", dry(copy, *words)["05_train.py"][1]) == [flag]


def told(copy, *words):
    """The commands that make would run."""
    command = ["make", "-n", *words]
    return subprocess.run(command, cwd=copy, env=OUTSIDE, capture_output=True, text=True).stdout


def test_a_collection_that_is_there_is_used_as_it_is(copy):
    """Unless its source is named, or is the sample; and `make clean` leaves it."""
    (copy / "data/mine").mkdir(parents=True)
    (copy / "data/mine/train.jsonl").touch()
    kept = "DATA=data/mine/", "LANGS=sw"
    commands = dry(copy, *kept)
    assert "00_prepare_data.py" not in commands and " --out runs/mine/model " in commands["05_train.py"][1]
    assert "00_prepare_data.py" in dry(copy, *kept, "DATA_SOURCE=beir")
    clean = told(copy, "clean", *kept)
    assert "runs/mine" in clean and "data/mine" not in clean
    named = told(copy, "clean", *kept, "DATA_SOURCE=beir")
    assert "runs/mine" in named and "data/mine" not in named  # 00 did not make it
    (copy / "models/mine").mkdir(parents=True)  # somebody's: no build.json
    clean = told(copy, "clean", *kept)
    assert "models" not in clean
    quality = told(copy, "judge-quality", *kept)
    assert "--truth" not in quality and "--out results/judge-quality-mine" in quality
    (copy / "data/mine.meta.json").write_text('{"arguments": {\n "source": "sample"}}')
    assert "00_prepare_data.py" in dry(copy, *kept)
    made = told(copy, "encoder", *kept, "SEED=14")
    assert " --out models/mine" in made.replace(" --seed 14", " seed")


@pytest.mark.parametrize("words, told", [
    (["RUN="], "RUN is empty"), (["EVAL_MODELS=bm25 runs/sample/model"], "has not ENCODER=BAAI/bge-m3")])
def test_what_would_fail_at_the_end_fails_at_once(copy, words, told):
    done = make(copy, *words)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1


def test_judge_quality_trains_with_the_same_settings():
    words = ["ENCODER=intfloat/multilingual-e5-small", "TRAIN=--lr 1e-5 --clip 2"]
    words = ["make", "-n", "judge-quality", *words]
    done = subprocess.run(words, cwd=ROOT, env=OUTSIDE, capture_output=True, text=True)
    assert " --train-flags lr=1e-5 clip=2 batch-size=24 " in done.stdout and "--epochs 1 " in done.stdout


def test_gpus_start_mining_and_training_under_torchrun(copy):
    one, eight = dry(copy), dry(copy, "GPUS=8")
    assert (
        one == dry(copy, "GPUS=1")
        and " --batch-size 24 --language-power 0.5 --topic-power 0.5 --lr 1e-3 " in one["05_train.py"][1]
        and "torchrun" not in str(one)
    )
    spread = ".venv/bin/torchrun --nproc-per-node 8 --standalone"
    assert eight == one | {
        script: (spread, one[script][1]) for script in ("01_mine_candidates.py", "05_train.py")
    }


@pytest.mark.parametrize("gpus", ["0", "-8", "", "all"])
def test_gpus_that_are_no_number_are_an_error_in_one_line(copy, gpus):
    done = make(copy, f"GPUS={gpus}")
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert f"GPUS={gpus}: want a whole number" in done.stderr


@pytest.mark.parametrize("variable", ["DATA", "RUN", "CACHE"])
def test_a_target_with_a_blank_is_an_error_in_one_line_and_a_root_with_one_is_fine(copy, variable):
    done = make(copy, f"{variable}=my folder")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "has a blank" in done.stderr
    words = ["make", "-n", "data", "DATA_SOURCE=beir", "DATA_ROOT=my folder/in it"]
    done = subprocess.run(words, cwd=copy, env=OUTSIDE, capture_output=True, text=True)
    assert '--root "my folder/in it" --out data/in_it ' in done.stdout


def test_confirmed_with_gpus_uses_them(copy):
    torchrun = copy / ".venv/bin/torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text("#!/bin/sh\necho torchrun $*\n")
    torchrun.chmod(0o755)
    done = make(copy, "CONFIRM=1", "GPUS=8", OPENAI_BASE_URL="http://x/v1", HF_TOKEN="x")
    assert done.returncode == 0, done.stderr
    spread = [line.split()[:5] for line in done.stdout.splitlines() if line.startswith("torchrun ")]
    assert spread == [
        ["torchrun", "--nproc-per-node", "8", "--standalone", script]
        for script in ("01_mine_candidates.py", "05_train.py")
    ]


def test_other_targets_keep_their_small_defaults(copy):
    done = subprocess.run(["make", "-n", "all"], cwd=copy, capture_output=True, text=True)
    assert (
        "--source sample" in done.stdout
        and " --models bm25 models/sample runs/sample/model --baseline " in done.stdout
        and "bge-m3" not in done.stdout
    )


def test_variables_reach_what_trains():
    for words, wanted in (
        (["EPOCHS=3", "BATCH=8", "SEED=5"], ["--epochs 3", "--batch-size 8", "--seeds 5 6 7"]),
        ([], ["--batch-size 24", "--seeds 13 14 15"]),
    ):
        done = subprocess.run(
            ["make", "-n", "ablations", *words], cwd=ROOT, env=OUTSIDE, capture_output=True, text=True
        )
        command = done.stdout.split("bench/ablations.py")[-1]
        assert all(flag in command for flag in wanted) and ("--epochs" in command) == bool(words)
    done = subprocess.run(
        ["make", "-n", "judge-quality", "EPOCHS=3", "BATCH=8", "SEED=5"],
        cwd=ROOT,
        env=OUTSIDE,
        capture_output=True,
        text=True,
    )
    command = done.stdout.split("bench/judge_quality.py")[-1]
    assert "batch-size=8" in command and "--epochs 3" in command and "--seeds 5 6 7" in command
