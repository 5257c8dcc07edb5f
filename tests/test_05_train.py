"""05_train.py killed at random steps, in two processes, in chunks: always the same training."""

import functools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_stage
from safetensors.torch import load_file
from tiny_models import sentence_transformers_files

from encoder import Encoder

stage = load_stage("05_train")
TEXTS = {
    "th": "กรุงเทพ เป็น เมืองหลวง ของ ไทย แม่น้ำ เจ้าพระยา วัด ช้าง ข้าว ทะเล",
    "ko": "서울 대한민국 수도 한강 강 산 바다 도시 음식 김치",
    "fa": "تهران پایتخت ایران رود کوه دریا شهر غذا کتاب شعر",
    "sw": "Nairobi mji mkuu Kenya mto mlima bahari chakula kitabu simba",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """topics.jsonl (52 queries, 4 languages, 3 topics), encoder/, a BERT of 2 layers, without dropout."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    top = tmp_path_factory.mktemp("train")
    draw = random.Random(5)
    words = sorted({w for text in TEXTS.values() for w in text.split()})
    records = []

    @functools.cache  # one docid is one text
    def passage(lang, name):
        text = " ".join(draw.choices(TEXTS[lang].split(), k=draw.randint(3, 20)))
        return {"docid": name, "title": draw.choice(TEXTS[lang].split()), "text": text}

    for lang, n in (("th", 17), ("ko", 19), ("fa", 11), ("sw", 5)):
        for q in range(n):
            records.append({"query_id": str(q), "lang": lang, "topic": draw.randrange(3),
                            "query": " ".join(draw.choices(TEXTS[lang].split(), k=4)),
                            "positive_passages": [passage(lang, f"p{q}")],
                            "negative_passages": [passage(lang, f"n{q}-{j}") for j in range(5)],
                            "false_negatives": [passage(lang, f"p{(q + 1) % n}")]})
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
    (top / "topics.jsonl").write_text("".join(lines), "utf-8")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(1)
    for name, dropout in (("encoder", 0.0), ("dropout", 0.1)):
        config = BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2,
                            num_attention_heads=2, intermediate_size=64, hidden_dropout_prob=dropout,
                            attention_probs_dropout_prob=dropout)
        BertModel(config).save_pretrained(top / name)
        fast.save_pretrained(top / name)
    return top


def arguments(made, out, *flags, encoder="encoder"):
    fixed = ["--input", made / "topics.jsonl", "--encoder", made / encoder, "--negatives", 3,
             "--batch-size", 4, "--lr", "3e-4", "--temperature", 0.1, "--epochs", 3, "--device", "cpu",
             "--out", made / out]
    return [str(word) for word in [*fixed, *flags]]


def log_of(made, out):
    """The log without the speed, which is the one thing that a run may not repeat."""
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_s"}
        for line in (made / out / "train_log.jsonl").read_text("utf-8").splitlines()
    ]


def weights_of(made, out):
    return load_file(made / out / "model.safetensors")


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.fixture(scope="module")
def whole(made):
    """An undisturbed run, with dropout."""
    stage.main(arguments(made, "whole", "--log-batches", made / "whole.batches", encoder="dropout"))
    return made


KILLER = """
import os, random, signal, sys
sys.path[:0] = [{tests!r}]
from conftest import load_stage
from transformers import AutoModel, AutoTokenizer, BertModel, PreTrainedTokenizerFast  # once for all
stage, draw, kills = load_stage("05_train"), random.Random(7), 0
while True:  # each child is a process that dies by SIGKILL in the middle of its 3rd, 4th or 5th step
    steps, child = draw.randint(2, 4) if kills < 10 else 10**9, os.fork()
    if child == 0:
        def dying(*args, real=stage.contrastive_loss):
            global steps
            steps -= 1
            if steps < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        stage.contrastive_loss = dying
        stage.main({args!r})
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    kills += 1
print(kills)
"""


def test_killed_at_ten_random_steps_it_ends_in_the_same_weights_and_log(whole):
    made = whole
    args = arguments(
        made, "killed", "--save-every", 2, "--log-batches", made / "killed.batches", encoder="dropout"
    )
    done = subprocess.run(
        [sys.executable, "-c", KILLER.format(tests=str(ROOT / "tests"), args=args)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.split() == ["10"], done.stderr[-2000:]
    assert log_of(made, "killed") == log_of(made, "whole")
    assert (made / "killed.batches").read_bytes() == (made / "whole.batches").read_bytes()
    assert difference(weights_of(made, "killed"), weights_of(made, "whole")) == 0
    assert not (made / "killed.checkpoint").exists()


@pytest.mark.parametrize("place", [(stage.Output, "finish"), (stage.Path, "rename")], ids=["meta", "folder"])
def test_killed_while_the_model_is_put_in_place_it_is_put_there_again(made, monkeypatch, place):
    out = f"placed.{place[1]}"
    first, second = (arguments(made, out, "--max-steps", 2, "--lr", lr) for lr in ("3e-4", "3e-3"))
    stage.main(first)
    before = weights_of(made, out)

    def killed(this, *to, **_):
        if isinstance(this, stage.Path) and this.is_file():
            return os.replace(this, *to)
        raise KeyboardInterrupt  # nothing after it is done, as with SIGKILL

    with monkeypatch.context() as patch:
        patch.setattr(*place, killed)
        with pytest.raises(KeyboardInterrupt):
            stage.main(second)
    if place[1] == "finish":
        stage.main(first)  # the old model still has its meta
        assert difference(weights_of(made, out), before) == 0
    else:
        with pytest.raises(stage.DataError, match="of another run"):  # and not "is up to date"
            stage.main(first)
    stage.main(second)
    assert difference(weights_of(made, out), before) > 0
    assert json.loads((made / f"{out}.meta.json").read_text("utf-8"))["arguments"]["lr"] == 3e-3


def test_the_checkpoint_does_not_grow(made, monkeypatch):
    sizes = []
    real = torch.save

    def measured(content, file):
        real(content, file)
        if "state" in content:
            sizes.append(file.tell())

    monkeypatch.setattr(torch, "save", measured)
    stage.main(arguments(made, "growing", "--save-every", 3))
    assert len(sizes) > 9 and max(sizes) - sizes[4] < 512  # the optimiser's moments come with the first step


def weights_by_formula(made, records, weighting):
    """{(lang, query_id): w} from the files alone; what is drawn is what --log-batches says."""
    if weighting == "none":
        return {(r["lang"], r["query_id"]): 1.0 for r in records}
    flags = ["--batch-size", 24, "--dev-share", 0, "--epochs", 334, "--max-steps", 0]
    stage.main(arguments(made, "drawn", *flags, "--log-batches", made / "drawn.batches"))
    lines = [json.loads(line) for line in (made / "drawn.batches").read_text("utf-8").splitlines()][:1000]
    total = dict.fromkeys([(r["lang"], r["query_id"]) for r in records], 0.0)
    for mean, key, drawn in ((0.45, "lang", "langs"), (0.40, "topic", "topics")):
        raw = {r[key]: (sum(o[key] == r[key] for o in records) / len(records)) ** -0.5 for r in records}
        labels = [label for line in lines for label in line[drawn]]
        middle = statistics.median(raw[label] for label in labels)
        bounded = {label: min(max(value, middle / 2), 2 * middle) for label, value in raw.items()}
        average = sum(bounded[label] for label in labels) / len(labels)
        for r in records:
            total[r["lang"], r["query_id"]] += mean * bounded[r[key]] / average
    return total


def by_formula(made, batch, weighting, weight_on, size=None):
    """(loss, gradient norm) of a line of --log-batches, from the files alone and in float64.

    The model of transformers, one text at a time. size: queries to divide by, where not those of the batch.
    """
    from transformers import AutoModel, AutoTokenizer
    records = [json.loads(line) for line in (made / "topics.jsonl").read_text("utf-8").splitlines()]
    weight_of = weights_by_formula(made, records, weighting)
    model = AutoModel.from_pretrained(made / "encoder", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(made / "encoder")

    def vector(text):
        hidden = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)
        return hidden / hidden.norm()

    total = 0
    chosen = [r for r in records if r["lang"] == batch["lang"] and r["query_id"] in batch["query_ids"]]
    brought = [(r["query_id"], p["docid"], vector(p["title"] + "\n" + p["text"]))
               for r in chosen for p in r["positive_passages"] + r["negative_passages"]]
    for record in chosen:
        weight, query = weight_of[record["lang"], record["query_id"]], vector(record["query"])
        positive = record["positive_passages"][0]["docid"]
        relevant = {p["docid"] for p in record["positive_passages"] + record["false_negatives"]}
        e = {(whose, docid): (query @ v / 0.1).exp() for whose, docid, v in brought}
        above = e[record["query_id"], positive]
        below = sum(value for (_, docid), value in e.items() if docid not in relevant)
        if weight_on == "negatives":
            loss = -(above / (above + weight * below)).log()
        else:
            loss = -weight * (above / (above + below)).log()
        total = total + loss / (size or len(chosen))
    total.backward()
    squares = sum((p.grad ** 2).sum() for p in model.parameters() if p.grad is not None)
    return total.item(), squares.item() ** 0.5


@pytest.mark.parametrize("weighting, weight_on, flags", [
    *((weighting, on, ["--short-batch", "shrink"])
      for weighting in ("inverse", "none") for on in ("loss", "negatives")),
    ("inverse", "loss", ["--short-batch", "reuse"]),
    ("inverse", "negatives", ["--short-batch", "shrink", "--chunk-tokens", 60])], ids=str)
def test_the_loop_s_loss_and_gradient_are_those_of_the_formula(made, weighting, weight_on, flags):
    out = "formula" + weighting + weight_on + "".join(map(str, flags))
    stage.main(arguments(made, out, "--max-steps", 1, "--batch-size", 24, "--negatives", 5, "--dev-share", 0,
                         "--weighting", weighting, "--weight-on", weight_on,
                         "--log-batches", made / f"{out}.batches", *flags))
    batch = json.loads((made / f"{out}.batches").read_text("utf-8").splitlines()[0])
    assert len(batch["query_ids"]) == {"th": 17, "ko": 19, "fa": 11, "sw": 5}[batch["lang"]]
    loss, norm = by_formula(made, batch, weighting, weight_on, 24 if "shrink" in flags else None)
    line = log_of(made, out)[0]
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    plain, _ = by_formula(made, batch, "none", "loss", 24 if "shrink" in flags else None)
    assert line["plain_loss"] == pytest.approx(plain, rel=1e-5) and 0 <= line["accuracy"] <= 1


TOGETHER = """
import sys
sys.path[:0] = [{tests!r}]
from test_05_train import stage
import torch.distributed as dist
dist.init_process_group("gloo")
dist.init_process_group = lambda *_: None  # one group for all, for it cannot be made twice
for args in {runs!r}:
    stage.main(args)
dist.destroy_process_group()
"""
SINGLE = [
    "--epochs",
    1,
    "--dev-share",
    0,
    "--weight-on",
    "negatives",
    "--batch-size",
    1,
]  # a query: one process has none


@pytest.fixture(scope="module")
def one_process(made):
    """One process with the whole batch: of eight queries, or of one."""
    stage.main(arguments(made, "one", "--batch-size", 8))
    stage.main(arguments(made, "one single", *SINGLE))
    return made


@pytest.fixture(scope="module")
def two_processes(made):
    """The same batches, shared by two processes under one torchrun."""
    runs = [
        arguments(made, "shared", "--batch-size", 8),
        arguments(made, "cached2", "--batch-size", 8, "--chunk-tokens", 60),
        arguments(made, "single", *SINGLE),
    ]
    (made / "two.py").write_text(TOGETHER.format(tests=str(ROOT / "tests"), runs=runs), "utf-8")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(made / "two.py"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize(("out", "one"), [("shared", "one"), ("cached2", "one"), ("single", "one single")])
def test_two_processes_that_share_each_batch_train_as_one(one_process, two_processes, out, one):
    """Also with gradients cached in chunks, and where a process has no query of the batch."""
    made = one_process
    # Adam enlarges the rounding of gradients near zero
    assert difference(weights_of(made, out), weights_of(made, one)) < 5e-5
    assert difference(weights_of(made, one), load_file(made / "encoder/model.safetensors")) > 1e-3
    assert len(log_of(made, out)) == len(log_of(made, one))
    for ours, theirs in zip(log_of(made, out), log_of(made, one), strict=True):
        assert ours.get("lang") == theirs.get("lang") and ours.get("loss") == pytest.approx(
            theirs.get("loss"), abs=1e-5
        )
        assert ours.get("grad_norm", 0) == pytest.approx(theirs.get("grad_norm", 0), rel=1e-3)


def test_a_cpu_trains_with_the_faster_products_and_dropout(made, on_amd):
    with torch.profiler.profile() as profile:
        stage.main(arguments(made, "profiled", "--max-steps", 1, "--dev-share", 0, encoder="dropout"))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] > 20
    assert calls["aten::randint"] > 0 and "aten::bernoulli_" not in calls
    assert calls["aten::embedding_sparse_backward"] > 0


def test_gradient_checkpointing_gives_the_same_weights_and_computes_twice(made, on_amd):
    """With dropout, whose draws must come again, and with the CPU's own layers, which must come again too."""
    n_products = {}
    for out, *flags in (["kept"], ["recomputed", "--gradient-checkpointing"]):
        with torch.profiler.profile() as profile:
            flags += ["--max-steps", 2, "--dev-share", 0]
            stage.main(arguments(made, out, *flags, encoder="dropout"))
        calls = {event.key: event.count for event in profile.key_averages()}
        n_products[out] = calls["mkldnn::_linear_pointwise"]
    assert difference(weights_of(made, "kept"), weights_of(made, "recomputed")) < 1e-6
    assert n_products["recomputed"] > 1.2 * n_products["kept"]


def test_cached_gradients_give_the_same_weights(one_process):
    stage.main(arguments(one_process, "cached", "--batch-size", 8, "--chunk-tokens", 60))
    assert difference(weights_of(one_process, "cached"), weights_of(one_process, "one")) < 5e-5


def test_cached_gradients_repeat_the_dropout_of_each_chunk(made):
    encoder = Encoder(str(made / "dropout"), "cpu")
    encoder.model.train()
    texts = [" ".join(text.split()[:n]) for text in TEXTS.values() for n in (2, 5, 9)]
    gradients = []
    for chunk_tokens, seed in (
        (None, 5),
        (len(texts) * 9 // 4, 5),
        (None, 6),
    ):  # the same chunks, which None makes too
        encoder.model.zero_grad()
        args = Namespace(seed=seed, chunk_tokens=chunk_tokens)
        embedding = stage.Embedding(encoder, texts, "passage", 1, args)
        (embedding.vectors[:4] @ embedding.vectors[4:].T).square().sum().backward()
        embedding.backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in encoder.model.parameters() if p.grad is not None])
        )
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 < 1e-2 < (gradients[0] - gradients[2]).abs().max()


def one_line(capsys, args):
    """What a user sees of a DataError: one line on stderr, exit status 2."""
    from common import run

    with pytest.raises(SystemExit) as end:
        run(lambda: stage.main(args))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    return lines[-1]


def test_a_non_finite_loss_names_the_queries_and_keeps_the_last_good_checkpoint(made, capsys, monkeypatch):
    real, left = stage.contrastive_loss, [8]

    def failing(*args):
        left[0] -= 1
        loss, seen = real(*args)
        return loss * (float("nan") if left[0] < 0 else 1), seen

    with monkeypatch.context() as patch:
        patch.setattr(stage, "contrastive_loss", failing)
        line = one_line(capsys, arguments(made, "nan", "--save-every", 5))
    stage.main(arguments(made, "planned", "--max-steps", 0, "--log-batches", made / "nan.batches"))
    batch = [json.loads(batch) for batch in (made / "nan.batches").read_text("utf-8").splitlines()][8]
    assert "step 9: loss nan" in line and f"{batch['lang']} queries {' '.join(batch['query_ids'])};" in line
    assert "last good state" in line and "lower --lr" in line
    saved = torch.load(made / "nan.checkpoint/last.pt", weights_only=True)
    assert saved["state"]["step"] == 5 and all(torch.isfinite(v).all() for v in saved["model"].values())
    assert not (made / "nan").exists()
    # a checkpoint of another run is not gone on with
    line = one_line(capsys, arguments(made, "nan", "--temperature", 0.2))
    assert "of another run (flags, input or encoder differ)" in line and "--overwrite" in line
    stage.main(arguments(made, "nan", "--temperature", 0.2, "--overwrite"))
    assert (made / "nan/model.safetensors").exists()
    # nor is a model that lost its weights up to date
    weights = (made / "nan/model.safetensors").read_bytes()
    (made / "nan/model.safetensors").unlink()
    stage.main(arguments(made, "nan", "--temperature", 0.2))
    assert (made / "nan/model.safetensors").read_bytes() == weights


def test_bad_encoders_and_flags_are_one_line(made, capsys):
    (made / "no encoder").mkdir()
    assert str(made / "no encoder") in one_line(capsys, arguments(made, "bad", encoder="no encoder"))
    for flags in (
        ["--temperature", 0],
        ["--lr", "nan"],
        ["--alpha", -1],
        ["--max-steps", -1],
        ["--warmup", 1.5],
        ["--dev-share", -0.1],
    ):
        with pytest.raises(SystemExit) as end:
            stage.main(arguments(made, "bad", *flags))
        assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not list(made.glob("bad*"))


def test_a_model_that_cannot_be_checkpointed_says_so(made, capsys):
    from transformers import MPNetConfig, MPNetModel
    folder = shutil.copytree(made / "encoder", made / "mpnet")
    size = len(json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"])
    MPNetModel(MPNetConfig(vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=64)).save_pretrained(folder)
    stage.main(arguments(made, "mpnet-out", "--max-steps", 1, encoder="mpnet"))
    line = one_line(capsys, arguments(made, "mpnet-no", "--gradient-checkpointing", encoder="mpnet"))
    assert "does not support" in line and "leave --gradient-checkpointing out" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_device_that_is_not_there_is_told_as_such(made, capsys):
    line = one_line(capsys, [*arguments(made, "no device"), "--device", "cuda"])
    assert "--device cuda:0: no device to be used" in line and line.strip().endswith("take auto or cpu")


def test_an_adapter_is_read_as_its_base_with_it_and_not_trained(made, capsys):
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense

    model = SentenceTransformer(str(made / "encoder"), device="cpu")
    before = model.encode(["ไทย วัด"])
    model.add_adapter(LoraConfig("FEATURE_EXTRACTION", target_modules="all-linear", init_lora_weights=False))
    model.save(str(made / "adapter"))
    vectors = Encoder(str(made / "adapter"), "cpu").encode(["ไทย วัด"], "passage")
    assert np.allclose(vectors, model.encode(["ไทย วัด"], normalize_embeddings=True), atol=1e-5)
    assert not np.allclose(vectors, before, atol=1e-2)
    model.append(Dense(model.get_embedding_dimension(), 8))  # which alone would be trained
    model.save(str(made / "adapter and dense"))
    for name in ("adapter", "adapter and dense"):
        line = one_line(capsys, arguments(made, "of adapter", encoder=name))
        assert f"{name}: an adapter, whose weights are frozen; merge" in line
    assert not (made / "of adapter").exists()


def test_of_epochs_with_equal_scores_the_last_is_kept_and_told(made, monkeypatch):
    scores, kept = iter([0.2, 0.6, 0.6, 0.4]), {}

    def validate(encoder, *_):
        score = next(scores)
        if score == 0.6:
            kept.update({k: v.clone() for k, v in encoder.model.state_dict().items()})
        return score, {"sw": {}}

    monkeypatch.setattr(stage, "validate", validate)
    stage.main(arguments(made, "equals", "--epochs", 4, "--patience", 2))
    assert difference({k.removeprefix("0.model."): v for k, v in kept.items()}, weights_of(made, "equals")) == 0
    counts = json.loads((made / "equals.meta.json").read_text("utf-8"))["counts"]
    assert counts["best_step"] == 3 * counts["steps"] // 4 and next(scores, None) is None


def test_other_peoples_files_are_neither_replaced_nor_deleted(made, tmp_path):
    few = "--max-steps", 1, "--dev-share", 0
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "log").touch()  # as mktemp makes it
    for path in (made / "topics.jsonl", tmp_path / "notes.txt"):
        before = path.read_bytes()
        with pytest.raises(stage.DataError, match="the file is there, and no log of batches"):
            stage.main(arguments(made, "logged", *few, "--log-batches", path))
        assert path.read_bytes() == before
    for _ in range(2):  # a log is written again, also where the model is there
        stage.main(arguments(made, "logged", *few, "--log-batches", tmp_path / "log"))
        assert (tmp_path / "log").read_text().startswith('{"step": 1, ')
        (tmp_path / "log").unlink()
    notes = made / "kept.checkpoint/notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    (notes.parent / ".last.pt.4242.tmp").write_text("of a kill")
    stage.main(arguments(made, "kept", *few, "--overwrite"))
    assert notes.read_text() == "mine" and [path.name for path in notes.parent.iterdir()] == ["notes.txt"]
    (made / "a-file").write_text("mine")
    stage.main(arguments(made, "a-file", *few, "--overwrite"))
    assert (made / "a-file/model.safetensors").is_file()


def test_a_run_is_the_same_however_its_encoder_is_written(made, capsys):
    few = "--max-steps", 1, "--dev-share", 0
    stage.main(arguments(made, "slash", *few))
    stage.main(arguments(made, "slash", *few, "--encoder", f"{made}/../{made.name}/encoder/"))
    assert "slash is up to date" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--negatives", 0, "--batch-size", 1], "nothing to train on"),
    (["--settings", "normalise=no"], "the loss is of cosines"),
])
def test_what_cannot_train_is_refused(made, flags, words):
    with pytest.raises(stage.DataError, match=words):
        stage.main(arguments(made, "refused", *flags))


def test_patience_stops_early_and_keeps_the_best_epoch(made, monkeypatch):
    scores, best = iter([0.2, 0.6, 0.5, 0.4, 0.9]), {}

    def scored(encoder, *_):
        score = next(scores)
        if score == 0.6:
            best.update(
                {
                    k.split("auto_model.")[-1].split("model.", 1)[-1]: v.clone()
                    for k, v in encoder.model.state_dict().items()
                }
            )
        return score, {"th": {"queries": 2, "mrr@10": score}}

    monkeypatch.setattr(stage, "validate", scored)
    stage.main(arguments(made, "early", "--epochs", 9, "--patience", 2))
    epochs = [line for line in log_of(made, "early") if "dev" in line]
    assert [line["dev_mrr@10"] for line in epochs] == [0.2, 0.6, 0.5, 0.4]
    assert difference(best, weights_of(made, "early")) == 0
    assert '"th": 15' in (made / "early/README.md").read_text("utf-8")


def test_a_model_of_inner_products_is_trained_and_validated_by_cosines(made):
    """As mDPR and mContriever are, whose vectors are not of unit length: the trained model's are."""
    shutil.copytree(made / "encoder", made / "inner")
    sentence_transformers_files(made / "inner", "mean", normalise=False)
    config = made / "inner/config_sentence_transformers.json"
    settings = json.loads(config.read_text("utf-8")) if config.exists() else {}
    config.write_text(json.dumps(settings | {"similarity_fn_name": "dot"}), "utf-8")
    for out, encoder in (("cosines", "encoder"), ("products", "inner")):
        stage.main(arguments(made, out, "--max-steps", 3, encoder=encoder))
    assert log_of(made, "products") == log_of(made, "cosines")
    assert log_of(made, "cosines")[-1]["loss"] < 4


def test_the_log_has_every_step_and_epoch(whole):
    log = log_of(whole, "whole")
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 37))
    assert all({"step", "lang", "loss", "lr", "grad_norm", "epoch"} <= set(line) for line in steps)
    first = json.loads((whole / "whole/train_log.jsonl").read_text("utf-8").splitlines()[0])
    assert first["tokens_per_s"] > 0
    batches = [json.loads(line) for line in (whole / "whole.batches").read_text("utf-8").splitlines()]
    assert [line["lang"] for line in steps] == [batch["lang"] for batch in batches]
    epochs = [line for line in log if "dev" in line]
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert all(set(line["dev"]) == {"fa", "ko", "sw", "th"} for line in epochs)


def test_a_shortage_is_said_once(made, capsys):
    stage.main(arguments(made, "told", "--batch-size", 8, "--max-steps", 1))
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "sw" in line and "fewer" in line]) == 1


def test_the_temperature_is_that_of_the_makers_by_the_model_s_own_name(made):
    for name, temperature in (("e5 and others/tiny", 0.02), ("multilingual-e5-small", 0.01)):
        shutil.copytree(made / "encoder", made / name)
        args = arguments(made, f"{name} trained", "--max-steps", 1, encoder=name)
        at = args.index("--temperature")
        stage.main(args[:at] + args[at + 2 :])
        card = (made / f"{name} trained/README.md").read_text("utf-8")
        assert f'"temperature": {temperature},' in card


def test_model_folder_has_a_card(whole):
    card = (whole / "whole/README.md").read_text("utf-8")
    for words in (
        '"train_queries": 46',
        '"dev_queries": 6',
        "2509.09459",
        '"temperature": 0.1',
        '"sw": 4',
        '"steps": 36',
    ):
        assert words in card


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_zero(whole):
    rates = [line["lr"] for line in log_of(whole, "whole") if "loss" in line]
    assert rates[:4] == pytest.approx([3e-4 * n / 4 for n in (1, 2, 3, 4)])  # a tenth of 36 steps
    assert rates[4:] == pytest.approx([3e-4 * (37 - n) / 33 for n in range(5, 37)])
    assert rates[-1] == pytest.approx(3e-4 / 33)


def test_gradients_are_clipped_only_where_asked_for_and_the_share_is_told(made):
    stage.main(arguments(made, "free"))
    stage.main(arguments(made, "clipped", "--clip", 0.05))
    free, clipped = ([line for line in log_of(made, out) if "loss" in line] for out in ("free", "clipped"))
    assert max(line["grad_norm"] for line in free) > 1
    norms = [line["grad_norm"] for line in clipped]
    metas = [made / "free.meta.json", made / "clipped.meta.json"]
    counts = [json.loads(path.read_text("utf-8"))["counts"] for path in metas]
    assert counts[0]["clipped"] == 0
    assert counts[1]["clipped"] == pytest.approx(sum(norm > 0.05 for norm in norms) / len(norms), abs=1e-4)
    assert f'"clipped": {counts[1]["clipped"]}' in (made / "clipped/README.md").read_text("utf-8")
    assert difference(weights_of(made, "free"), weights_of(made, "clipped")) > 1e-6


class Fixed:
    """An encoder whose vectors are given; a passage's text is its name."""

    def __init__(self, vectors):
        self.vectors = vectors

    def passage_text(self, passage):
        return passage["text"]

    def encode(self, texts, kind):
        return np.array([self.vectors[text] for text in texts], np.float32)


def validated(tmp_path, scores, records):
    """validate() of queries "q", where a passage's score is given by its docid."""
    lines = [json.dumps(r) + "\n" for r in records]
    (tmp_path / "dev.jsonl").write_text("".join(lines), "utf-8")
    starts = [sum(map(len, lines[:n])) for n in range(len(lines))]
    queries = [stage.Query(r["lang"], r["query_id"], 0, start, ()) for r, start in zip(records, starts)]
    vectors = {docid: [score, 1.0] for docid, score in scores.items()} | {"q": [1.0, 0.0]}
    with open(tmp_path / "dev.jsonl", "rb") as file:
        return stage.validate(Fixed(vectors), queries, file)


def dev_record(query_id, positives, negatives, false=()):
    def passages(docids):
        return [{"docid": docid, "text": docid} for docid in docids]

    return {"query_id": query_id, "lang": "th", "query": "q", "positive_passages": passages(positives),
            "negative_passages": passages(negatives), "false_negatives": passages(false)}


def test_validation_ranks_the_best_positive_and_is_cut_at_ten(tmp_path):
    others = {f"n{n}": 0.5 + n / 100 for n in range(30)}
    for place, expected in ((1, 1.0), (2, 0.5), (10, 0.1), (11, 0.0), (20, 0.0)):
        scores = others | {"p": 0.8 - place / 100 + 0.005, "worse": 0.0}
        found = validated(tmp_path, scores, [dev_record("0", ["worse", "p"], list(others))])
        assert found == (expected, {"th": {"queries": 1, "mrr@10": expected}})


def test_validation_leaves_out_known_false_negatives_and_other_positives(tmp_path):
    scores = {"p": 0.5, "p2": 0.4, "false": 0.9, "n": 0.7}
    records = [dev_record("0", ["p", "p2"], ["false", "n"], ["false"])]
    assert validated(tmp_path, scores, records)[0] == 0.5


def test_validation_and_training_leave_out_the_same(tmp_path):
    """A positive's text under another docid, and what answers the same question under another id."""
    records = [dev_record("0", ["p"], ["n", "other"]), dev_record("1", ["other"], ["n"])]
    records[0]["negative_passages"].append({"docid": "copy", "text": " P "})
    records[1]["negative_passages"].append({"docid": "p", "text": "p"})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    args = Namespace(input=str(tmp_path / "in.jsonl"), lang=None, limit=None, topic_power=1, negatives=2)
    args.seed, args.no_in_batch = 13, False
    queries = stage.read_index(args)
    vectors = {"p": [0.5, 1], " P ": [0.55, 1], "other": [0.6, 1], "n": [0.1, 1], "q": [1, 0]}
    with open(args.input, "rb") as file:
        assert stage.validate(Fixed(vectors), queries, file)[0] == 1
        first, second = stage.read_records(file, queries)
    for record in (first, second):
        passages, target, masked = stage.collate([record], [0], args)
        kept = {p["docid"] for p, left_out in zip(passages, masked[0]) if not left_out}
        assert kept <= {"n", passages[target[0]]["docid"]}


def test_an_encoder_that_has_collapsed_gets_no_credit(tmp_path):
    docids = [f"n{n}" for n in range(12)]
    scores = dict.fromkeys(["p", *docids], 0.7)
    assert validated(tmp_path, scores, [dev_record("0", ["p"], docids)])[0] == 0
    assert validated(tmp_path, scores, [dev_record("0", ["p"], docids[:3])])[0] == 0.25


def test_a_query_searches_the_passages_of_all_held_out_queries(tmp_path):
    scores = {"p": 0.5, "n": 0.1, "other": 0.6, "m": 0.2}
    found = validated(tmp_path, scores, [dev_record("0", ["p"], ["n"]), dev_record("1", ["other"], ["m"])])
    assert found[0] == 0.75


def test_the_score_of_an_epoch_is_the_mean_over_queries_not_languages(tmp_path):
    records = [dev_record(str(n), ["p"], ["n"]) for n in range(3)]
    records.append(dev_record("3", ["worse"], ["n"]) | {"lang": "sw"})
    score, dev = validated(tmp_path, {"p": 0.5, "n": 0.1, "worse": 0.0}, records)
    assert score == 0.875 and [of["mrr@10"] for of in dev.values()] == [0.5, 1.0]
    assert list(dev) == ["sw", "th"] and dev["th"]["queries"] == 3


def test_patience_without_held_out_queries_is_refused(made, capsys):
    line = one_line(capsys, arguments(made, "patient", "--patience", 1, "--dev-share", 0))
    assert "--patience needs held-out queries" in line


FLAGS = ["--weighting none", "--weight-on negatives", "--alpha 2", "--beta 2",
         "--short-batch shrink", "--warmup 0.9", "--negatives 2", "--negatives 0", "--no-in-batch",
         "--topic-power 1", "--language-power 1", "--mixed", "--clip 0.05", "--dtype bf16",
         "--query-max-len 2", "--passage-max-len 3"]


@pytest.mark.parametrize("flags", FLAGS)
def test_each_flag_changes_the_training(made, flags):
    if not (made / "default").exists():
        stage.main(arguments(made, "default", "--epochs", 1))
    stage.main(arguments(made, flags, "--epochs", 1, *flags.split()))
    assert difference(weights_of(made, flags), weights_of(made, "default")) > 0


def test_negatives_are_not_both_none_and_own_only(made, capsys):
    line = one_line(capsys, arguments(made, "nothing", "--negatives", 0, "--no-in-batch"))
    assert "nothing to train on" in line
