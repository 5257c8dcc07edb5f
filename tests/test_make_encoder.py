"""sample/make_encoder.py: what it reads, what it writes, and that it writes the same again."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "sample" / "make_encoder.py"
SMALL = ["--vocab", "600", "--width", "32", "--steps", "20", "--batch-size", "8"]
SUBJECTS = {
    "sw": [
        ("Simba", "Simba ni mnyama mkubwa wa familia ya paka anayeishi Afrika."),
        ("Nairobi", "Nairobi ni mji mkuu wa Kenya na mji mkubwa zaidi nchini humo."),
        ("Kahawa", "Kahawa ni kinywaji kinachotengenezwa kwa mbegu za mkahawa."),
        ("Mlima Kenya", "Mlima Kenya ni mlima mrefu kuliko yote nchini Kenya."),
        ("Ziwa Viktoria", "Ziwa Viktoria ni ziwa kubwa la Afrika; maji yake hutoka katika mto Kagera."),
        ("", "Pwani ya Bahari Hindi ina miji ya kale kama Lamu na Mombasa."),
    ],
    "th": [
        ("สิงโต", "สิงโตเป็นสัตว์กินเนื้อขนาดใหญ่ในวงศ์แมว อาศัยอยู่ในแอฟริกา"),
        ("กรุงเทพมหานคร", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย"),
        ("กาแฟ", "กาแฟเป็นเครื่องดื่มที่ทำจากเมล็ดกาแฟคั่ว"),
        ("ดอยอินทนนท์", "ดอยอินทนนท์เป็นภูเขาที่สูงที่สุดในประเทศไทย"),
        ("ทะเลสาบสงขลา", "ทะเลสาบสงขลาเป็นทะเลสาบที่ใหญ่ที่สุดในภาคใต้ 🌊"),
        ("ช้าง", "ช้างเป็นสัตว์เลี้ยงลูกด้วยนมที่มีงวงยาว"),
    ],
    "ja": [
        ("ライオン", "ライオンはアフリカに生息するネコ科の大型動物である。"),
        ("東京", "東京は日本の首都であり、人口が最も多い都市である。"),
        ("コーヒー", "コーヒーは焙煎したコーヒー豆から作る飲み物である。"),
        ("富士山", "富士山は日本で最も高い山で、静岡県と山梨県にまたがる。"),
        ("琵琶湖", "琵琶湖は滋賀県にある日本最大の湖である。"),
        ("", "象は長い鼻を持つ哺乳類である。"),
    ],
}


def load_script():
    spec = importlib.util.spec_from_file_location("make_encoder", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_encoder = load_script()


def write_collection(data):
    """Each of the three forms a language's corpus may have: plain, gzipped, a folder of shards."""
    lines = {
        lang: [
            json.dumps({"docid": f"{n}#0", "title": title, "text": text}, ensure_ascii=False) + "\n"
            for n, (title, text) in enumerate(those)
        ]
        for lang, those in SUBJECTS.items()
    }
    (data / "corpus" / "ja").mkdir(parents=True)
    (data / "corpus" / "sw.jsonl").write_text("".join(lines["sw"]), "utf-8")
    (data / "corpus" / "th.jsonl.gz").write_bytes(gzip.compress("".join(lines["th"]).encode()))
    (data / "corpus" / "ja" / "0.jsonl").write_text("".join(lines["ja"][:3]), "utf-8")
    (data / "corpus" / "ja" / "1.jsonl.gz").write_bytes(gzip.compress("".join(lines["ja"][3:]).encode()))
    return data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("collection"))


@pytest.fixture(scope="module")
def encoder(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "small"
    make_encoder.main(["--data", str(data), "--out", str(out), *SMALL])
    return out


def build(data, out, *more):
    make_encoder.main(["--data", str(data), "--out", str(out), *SMALL, *more])
    return out


def mean_pooled(folder, texts):
    from transformers import AutoModel, AutoTokenizer

    tokeniser, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokeniser(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


TEXTS = ["Mji mkuu wa Kenya ni upi?", "เมืองหลวงของประเทศไทย", "日本で最も高い山は?", "simba 🌊"]


def test_same_arguments_give_identical_bytes_in_another_process(data, encoder, tmp_path):
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "2"}
    subprocess.run(
        [sys.executable, SCRIPT, "--data", data, "--out", tmp_path / "again", *SMALL],
        check=True,
        env=environment,
        capture_output=True,
    )
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (encoder / name).read_bytes(), name


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "14"],
        ["--lang", "sw", "ja"],
        ["--max-passages", "3"],
        ["--vocab", "300"],
        ["--width", "16"],
        ["--steps", "5"],
        ["--batch-size", "4"],
        ["--lr", "0.001"],
    ],
)
def test_each_flag_changes_the_weights(data, encoder, tmp_path, flags):
    other = build(data, tmp_path / "other", *flags)
    assert (other / "model.safetensors").read_bytes() != (encoder / "model.safetensors").read_bytes()


def test_auto_model_and_sentence_transformers_give_the_vectors_it_was_trained_with(encoder):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    rows = load_file(encoder / "model.safetensors")["embeddings.word_embeddings.weight"]
    tokeniser = AutoTokenizer.from_pretrained(encoder)
    ids = [tokeniser(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    trained = make_encoder.embed(rows, ids)
    assert (trained * mean_pooled(encoder, TEXTS)).sum(1).min() > 0.9999

    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(encoder), device="cpu")
    vectors = model.encode(TEXTS, convert_to_tensor=True)
    assert (trained * vectors).sum(1).min() > 0.9999  # fails too where the vectors are not of length 1
    assert model.get_max_seq_length() == 512


def test_text_from_every_script_has_known_tokens(encoder):
    from transformers import AutoTokenizer

    tokeniser = AutoTokenizer.from_pretrained(encoder)
    for those in SUBJECTS.values():
        for title, text in those:
            assert tokeniser.unk_token_id not in tokeniser(f"{title}\n{text}")["input_ids"]


def test_case_and_width_of_characters_make_no_difference(encoder):
    from transformers import AutoTokenizer

    tokeniser = AutoTokenizer.from_pretrained(encoder)
    assert tokeniser("ＮＡＩＲＯＢＩ")["input_ids"] == tokeniser("nairobi")["input_ids"]


def test_warm_up_brings_a_title_nearer_to_its_passage(data, tmp_path):
    def mean_rank(folder):
        titles = [t for those in SUBJECTS.values() for t, _ in those if t]
        texts = [text for those in SUBJECTS.values() for t, text in those if t]
        scores = mean_pooled(folder, titles) @ mean_pooled(folder, texts).T
        return (scores >= scores.diag()[:, None]).sum(1).float().mean()

    cold = build(data, tmp_path / "cold", "--steps", "0")
    warm = build(data, tmp_path / "warm", "--steps", "60")
    assert mean_rank(warm) < mean_rank(cold)


def test_only_the_corpus_is_read(tmp_path):
    data = write_collection(tmp_path / "data")
    for name in ("train.jsonl", "dev.jsonl"):
        (data / name).write_text("not even JSON\n")
    (data / "qrels" / "dev").mkdir(parents=True)
    (data / "qrels" / "dev" / "sw.tsv").write_text("1\t0\t0#0\t1\n")
    opened, listening = [], [True]
    sys.addaudithook(lambda event, details: listening and event == "open" and opened.append(str(details[0])))
    build(data, tmp_path / "out")
    listening.clear()
    read = {Path(name).relative_to(data).as_posix() for name in opened if name.startswith(str(data))}
    assert read == {"corpus/sw.jsonl", "corpus/th.jsonl.gz", "corpus/ja/0.jsonl", "corpus/ja/1.jsonl.gz"}


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"docid": "9#0", "title": "x", "te', "not a JSON object"),
        ('{"docid": "9#0", "title": "x"}', "'text' is missing"),
    ],
)
def test_a_bad_line_ends_with_status_2_and_one_line_that_names_it(tmp_path, capsys, line, complaint):
    data = write_collection(tmp_path / "data")
    with open(data / "corpus" / "sw.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit) as ended:
        make_encoder.run(lambda: build(data, tmp_path / "out"))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert f"{data}/corpus/sw.jsonl:7: " in message and complaint in message
    assert message.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--lang", "ko"], ["--steps", "-1"], ["--lr", "0"]])
def test_what_cannot_be_done_is_said(data, tmp_path, flags):
    with pytest.raises((make_encoder.DataError, SystemExit)):
        build(data, tmp_path / "out", *flags)
    with pytest.raises(make_encoder.DataError, match="corpus not found"):
        build(tmp_path, tmp_path / "out")


def test_a_second_run_does_nothing_until_something_changes(tmp_path, capsys):
    data, out = write_collection(tmp_path / "data"), tmp_path / "models" / "out"
    build(data, out)
    first = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    build(data, out)
    assert "up to date" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == first

    with open(data / "corpus" / "sw.jsonl", "a", encoding="utf-8") as file:
        file.write('{"docid": "9#0", "title": "Twiga", "text": "Twiga ni mnyama mrefu."}\n')
    build(data, out)
    assert json.loads((out / "build.json").read_text())["counts"]["passages"]["sw"] == 7
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing temporary is left


def test_a_folder_of_someone_else_is_never_replaced(data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(make_encoder.DataError, match="was not made by"):
        build(data, tmp_path, "--overwrite")
    assert (tmp_path / "notes.txt").read_text() == "mine"
