"""The encoder: sentence-transformers' vectors, settings, what is refused, what is kept on disk."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny_models import (
    LIMIT,
    random_bert,
    random_llama,
    save_tokenizer,
    sentence_transformer,
    sentence_transformers_files,
)

import encoder
from common import DataError
from encoder import Encoder

WORDS = [f"w{i}" for i in range(200)] + ["query:", "passage:"]
PROMPTS = {"query": "query: ", "document": "passage: "}


def texts(n, seed=0, longest=160):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS[:200], draw.integers(1, longest))) for _ in range(n)]


def smallest_cosine(a, b):
    return ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()


def same_as_theirs(ours, folder, those=None, least=0.99999):
    """Both kinds of vectors are those of SentenceTransformer(folder), for long texts too."""
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    those = those or texts(40)
    for kind, encode in (("query", theirs.encode_query), ("passage", theirs.encode_document)):
        a, b = ours.encode(those, kind), encode(those)
        assert smallest_cosine(a, b) > least
    return theirs


# --------------------------------------------------------------------------- sentence-transformers' vectors


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"normalise": False},
        {"pooling": "cls"},
        {"pooling": "lasttoken"},
        {"pooling": "max", "normalise": False},
        {"prompts": PROMPTS},
        {"prompts": PROMPTS, "pooling": "cls"},
        {"prompts": PROMPTS, "pooling": "lasttoken"},
        {"dense": 16},
        {"dense": 16, "normalise": False},
        {"dense": 48, "pooling": "lasttoken", "prompts": PROMPTS},
    ],
    ids=str,
)
def test_vectors_are_those_of_sentence_transformers(tmp_path, kind):
    folder = sentence_transformer(tmp_path / "model", WORDS, **kind)
    ours = Encoder(folder, "cpu", 512, 512)
    same_as_theirs(ours, folder)
    assert ours.max_len == {"query": LIMIT, "passage": LIMIT} and 0 < ours.n_cut["passage"] < 40


@pytest.mark.parametrize(
    ("pooling", "normalise", "legacy"),
    [("mean", True, True), ("mean", False, False), ("cls", True, False), ("cls", False, True)],
)
def test_folders_of_older_versions_are_read_as_theirs(tmp_path, pooling, normalise, legacy):
    folder = random_bert(tmp_path / "model", WORDS)
    sentence_transformers_files(folder, pooling, normalise, PROMPTS, legacy)
    same_as_theirs(Encoder(folder, "cpu", 512, 512), folder)


def test_pooling_that_leaves_the_prompt_out(tmp_path):
    folder = sentence_transformer(tmp_path / "model", WORDS, prompts=PROMPTS, include_prompt=False)
    same_as_theirs(Encoder(folder, "cpu", 512, 512), folder)
    whole = sentence_transformer(tmp_path / "whole", WORDS, prompts=PROMPTS)
    assert smallest_cosine(*(Encoder(of, "cpu").encode(texts(9), "query") for of in (folder, whole))) < 0.999


def as_chat(folder):
    """The model reads its text as a user's message, in the words of a chat template."""
    template = "{% for message in messages %}w3 {{ message['role'] }} {{ message['content'] }} w4{% endfor %}"
    change_json(folder / "tokenizer_config.json", chat_template=template)
    entry = {"method": "forward", "method_output_name": "last_hidden_state"}
    change_json(
        folder / "sentence_bert_config.json",
        modality_config={"text": entry, "message": entry | {"format": "flat"}},
    )


@pytest.mark.parametrize(
    "file, values",
    [
        ("config_sentence_transformers.json", {"truncate_dim": 8}),
        ("config_sentence_transformers.json", {"truncate_dim": 8, "similarity_fn_name": "dot"}),
        ("sentence_bert_config.json", {"query_length": 4, "document_length": 6}),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"add_special_tokens": False}}}),
        ("sentence_bert_config.json", {"do_lower_case": True}),
        ("tokenizer_config.json", {"truncation_side": "left"}),
        (None, None),
    ],
)
def test_whatever_a_folder_sets_is_done_as_sentence_transformers_does_it(tmp_path, file, values):
    folder = Path(sentence_transformer(tmp_path / "model", WORDS, prompts=PROMPTS))
    if file:
        change_json(folder / file, **values)
    else:
        as_chat(folder)
    ours = Encoder(str(folder), "cpu", 512, 512)
    same_as_theirs(ours, folder)
    assert ours.n_cut["passage"] > 0  # of texts that are longer than any limit


def test_prompts_that_nothing_uses_are_named(tmp_path, capsys):
    prompts = {"retrieval.query": "query: ", "retrieval.passage": "passage: "}
    folder = sentence_transformer(tmp_path / "model", WORDS, prompts=prompts)
    Encoder(folder, "cpu")
    assert "none of its prompts (retrieval.passage, retrieval.query) is named" in capsys.readouterr().err
    Encoder(folder, "cpu", settings=["query_prefix=query: "])
    sentence_transformer(tmp_path / "other", WORDS, prompts=PROMPTS | {"clustering": "w1 "})
    Encoder(str(tmp_path / "other"), "cpu")
    assert "prompts" not in capsys.readouterr().err


def test_a_model_that_pads_on_the_left_reads_its_last_token(tmp_path):
    folder = random_llama(tmp_path / "model", WORDS)
    same_as_theirs(Encoder(folder, "cpu", 512, 512), folder)


def test_real_e5_gives_the_vectors_of_sentence_transformers(tmp_path):
    folder = Path(os.environ.get("E5_SMALL") or ROOT / "models" / "multilingual-e5-small")
    tool = ROOT.parent / "shared" / "tools" / "real_models.py"
    if not folder.is_dir():
        if not tool.is_file():
            pytest.skip(f"no multilingual-e5-small: neither {folder}, nor E5_SMALL, nor {tool}")
        folder = tmp_path / "multilingual-e5-small"
        made = subprocess.run(
            [sys.executable, tool, "e5", "--out", folder], cwd=tmp_path, capture_output=True
        )
        if made.returncode:
            pytest.skip("multilingual-e5-small cannot be downloaded")
    those = [
        "Mji mkuu wa Kenya ni upi?",
        "เมืองหลวงของประเทศไทย",
        "日本で最も高い山は?",
        "w 🙂",
        "Nairobi " * 600,
    ]
    ours = Encoder(str(folder), "cpu", 512, 512)
    same_as_theirs(ours, folder, those)
    assert ours.n_cut == {"query": 1, "passage": 1}
    short = Encoder(str(folder), "cpu", 64, 256, dtype="bf16")
    assert smallest_cosine(short.encode(those[:4], "query"), ours.encode(those[:4], "query")) > 0.999
    assert short.max_len == {"query": 64, "passage": 256}


def test_a_prompt_named_passage_is_used_where_there_is_none_for_documents(tmp_path):
    folder = sentence_transformer(
        tmp_path / "model", WORDS, prompts={"query": "query: ", "passage": "passage: "}
    )
    assert Encoder(folder, "cpu").prefix == {"query": "query: ", "passage": "passage: "}


def test_bf16_is_close_and_keeps_fp32_weights_for_training(tmp_path):
    folder = sentence_transformer(tmp_path / "model", WORDS, prompts=PROMPTS)
    exact, fast = Encoder(folder, "cpu"), Encoder(folder, "cpu", dtype="bf16")
    assert (
        0.999 < smallest_cosine(exact.encode(texts(40), "query"), fast.encode(texts(40), "query")) < 1 - 1e-7
    )
    assert exact.fingerprint("query") != fast.fingerprint("query")
    vectors = fast.forward(fast.tokenize(texts(3), "query"), "query")
    vectors.sum().backward()
    weight = fast.model[0].model.embeddings.word_embeddings.weight
    assert vectors.dtype == weight.dtype == weight.grad.dtype == torch.float32 and weight.grad.abs().sum() > 0


def test_fp32_products_are_fp32_whatever_was_set_before(tmp_path):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        Encoder(random_bert(tmp_path / "model", WORDS), "cpu").encode(texts(2), "query")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_vector_hardly_depends_on_what_is_encoded_with_it(tmp_path):
    ours, batch = Encoder(random_bert(tmp_path / "model", WORDS), "cpu"), texts(100)
    together = ours.encode(batch, "passage")
    apart = np.concatenate([ours.encode(batch[i : i + 7], "passage") for i in range(0, len(batch), 7)])
    assert np.allclose(apart, together, atol=1e-5) and np.array_equal(ours.encode(batch, "passage"), together)


def test_a_batch_holds_texts_of_like_length_and_no_more_tokens_than_the_budget(tmp_path, monkeypatch):
    ours, widths = Encoder(random_bert(tmp_path / "model", WORDS), "cpu"), []
    forward = ours.forward
    monkeypatch.setattr(encoder, "CPU_TOKENS", 500)
    monkeypatch.setattr(
        ours, "forward", lambda ids, kind: widths.append([len(i) for i in ids]) or forward(ids, kind)
    )
    ours.encode(texts(100), "passage")
    assert all(max(lengths) * len(lengths) <= 500 for lengths in widths)
    assert sum(widths, []) == sorted(sum(widths, []), reverse=True) and len(sum(widths, [])) == 100


# --------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "pooling", "similarity", "prompts", "join", "temperature"),
    [
        ("multilingual-e5-large", "mean", "cosine", PROMPTS, " ", 0.01),
        ("bge-m3", "cls", "cosine", None, "\n", 0.02),
        ("bert-base-multilingual-cased", "cls", "cosine", None, "\n", 0.02),
        ("mdpr-tied-pft-msmarco", "cls", "dot", None, " ", 0.02),
        ("mcontriever-msmarco", "mean", "dot", None, " ", 0.02),
        ("multilingual-e5-large-instruct", "mean", "cosine", None, "\n", 0.02),
        ("other", "mean", "cosine", None, "\n", 0.02),
    ],
)
def test_a_folder_known_by_its_name_alone_is_used_as_its_makers_do(
    tmp_path, capsys, name, pooling, similarity, prompts, join, temperature
):
    ours = Encoder(random_bert(tmp_path / name, WORDS), "cpu", 512, 512)
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and f"{name}: " in said
        and f'"pooling": "{pooling}"' in said
        and similarity in said
    )
    theirs = sentence_transformer(
        tmp_path / "theirs", WORDS, pooling, similarity == "cosine", prompts=prompts
    )
    same_as_theirs(ours, theirs, texts(20, longest=80))
    lengths = np.linalg.norm(ours.encode(texts(20), "query"), axis=1)
    assert np.allclose(lengths, 1, atol=1e-5) == (similarity == "cosine")
    assert (
        ours.passage_text({"title": "a", "text": "b"}) == f"a{join}b"
        and ours.passage_text({"text": "b"}) == "b"
    )
    assert ours.default_temperature == temperature
    settings = json.loads(json.dumps(ours.settings()))
    assert settings["similarity"] == similarity and settings["assumed"]["pooling"] == pooling
    assert pooling in str(settings["modules"]) and settings["max_len"] == {"query": 128, "passage": 128}


def test_prompts_that_an_e5_folder_lacks_are_its_makers_and_that_is_said(tmp_path, capsys):
    folder = sentence_transformer(
        tmp_path / "multilingual-e5-small", WORDS, pooling="cls", prompts={"query": "w1 "}
    )
    ours = Encoder(folder, "cpu")
    assert ours.prefix == {"query": "w1 ", "passage": "passage: "} and "passage: " in capsys.readouterr().err
    assert ours.model[1].pooling_mode == "cls"
    whole = sentence_transformer(tmp_path / "whole", WORDS, prompts={"query": "w1 "})
    assert Encoder(whole, "cpu").prefix == {"query": "w1 ", "passage": ""} and capsys.readouterr().err == ""


def test_the_folders_similarity_decides_the_length_of_vectors(tmp_path):
    for similarity, unit in (("dot", False), ("cosine", True), (None, True)):
        folder = sentence_transformer(
            tmp_path / str(similarity), WORDS, normalise=False, similarity=similarity
        )
        lengths = np.linalg.norm(Encoder(folder, "cpu").encode(texts(5), "query"), axis=1)
        assert np.allclose(lengths, 1, atol=1e-5) == unit
    folder = sentence_transformer(tmp_path / "unit", WORDS, similarity="dot")  # with a Normalize module
    plain, longer = Encoder(folder, "cpu"), Encoder(folder, "cpu", settings=["normalise=no"])
    longest, unit = (np.linalg.norm(ours.encode(["w1"], "query")) for ours in (longer, plain))
    assert longest > 1.1 > unit
    assert longer.fingerprint("query") != plain.fingerprint("query")
    folder = sentence_transformer(tmp_path / "far", WORDS, similarity="euclidean")
    with pytest.raises(DataError, match="similarity 'euclidean', want cosine or dot"):
        Encoder(folder, "cpu")
    assert Encoder(folder, "cpu", settings=["normalise=yes"]).similarity == "cosine"


def test_settings_override_the_maker_and_each_changes_the_vectors(tmp_path):
    folder = sentence_transformer(tmp_path / "model", WORDS)
    passage = {"title": "w1 w2", "text": " ".join(texts(1)[0].split()[:20])}

    def encode(ours):
        return np.concatenate(
            [ours.encode([ours.passage_text(passage)], "passage"), ours.encode(["w3 w4 w5"], "query")]
        )

    plain = Encoder(folder, "cpu")
    vectors, seen = encode(plain), {(plain.fingerprint("query"), plain.fingerprint("passage"))}
    for setting in (
        "pooling=cls",
        "pooling=lasttoken",
        "query_prefix=query: ",
        "passage_prefix=passage: ",
        "normalise=no",
        r"title_join= w9\n",
        "query_max_len=3",
        "passage_max_len=5",
        "model:pooling=cls",
    ):
        changed = Encoder(folder, "cpu", settings=[setting])
        assert not np.allclose(encode(changed), vectors, atol=1e-4), setting
        seen.add((changed.fingerprint("query"), changed.fingerprint("passage")))
        kept = changed.fingerprint("passage") == plain.fingerprint("passage")
        assert kept == setting.startswith("query_"), setting
    assert len(seen) == 9  # the last is the first again
    assert np.array_equal(encode(Encoder(folder, "cpu", settings=["other:pooling=cls"])), vectors)
    for wrong in (
        "pooling=max",
        "poling=cls",
        "pooling",
        "normalise=1",
        "query_max_len=0",
        "query_max_len=x",
    ):
        with pytest.raises(DataError, match="--settings"):
            Encoder(folder, "cpu", settings=[wrong])
    with pytest.raises(DataError, match="129 tokens asked for, the model has 128 positions"):
        Encoder(folder, "cpu", settings=["passage_max_len=129"]).encode(["w1 " * 200], "passage")


@pytest.mark.parametrize(("model_class", "n_reserved"), [("Bert", 0), ("XLMRoberta", 1), ("MPNet", 2)])
def test_positions_that_a_model_reserves_are_not_read(tmp_path, model_class, n_reserved):
    """XLM-R counts positions from the number of the padding token + 1, here 0 + 1; MPNet always from 2."""
    folder = tmp_path / "model"
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    words = {"vocab_size": save_tokenizer(folder, WORDS), "max_position_embeddings": 128, "pad_token_id": 0}
    config = getattr(transformers, f"{model_class}Config")(**size, **words)
    getattr(transformers, f"{model_class}Model")(config).save_pretrained(folder)
    least = Encoder(folder, "cpu", settings=[f"passage_max_len={128 - n_reserved}"])
    assert np.isfinite(least.encode(["w1 " * 200], "passage")).all()
    match = f"{129 - n_reserved} tokens asked for, the model has {128 - n_reserved} positions"
    with pytest.raises(DataError, match=match):
        Encoder(folder, "cpu", settings=[f"passage_max_len={129 - n_reserved}"]).encode(["w1"], "passage")


def test_flags_reach_the_encoder(tmp_path):
    parser = ArgumentParser()
    encoder.encoder_flags(parser)
    folder = random_bert(tmp_path / "model", WORDS)
    args = parser.parse_args(
        [
            "--query-max-len",
            "5",
            "--passage-max-len",
            "7",
            "--dtype",
            "bf16",
            "--device",
            "cpu",
            "--settings",
            "pooling=cls",
            "model:query_prefix=w1 ",
        ]
    )
    ours = encoder.from_flags(folder, args)
    assert (
        ours.max_len == {"query": 5, "passage": 7} and ours.dtype == "bf16" and ours.prefix["query"] == "w1 "
    )
    assert ours.model[1].pooling_mode == "cls"
    plain = encoder.from_flags(folder, parser.parse_args([]))
    assert plain.asked == {"query": 64, "passage": 256} and plain.dtype == (
        "bf16" if torch.cuda.is_available() else "fp32"
    )


def test_inputs_are_cut_at_the_shortest_limit_and_counted(tmp_path, capsys):
    folder = random_bert(tmp_path / "model", WORDS)
    assert Encoder(folder, "cpu", 64, 256).max_len == {"query": 64, "passage": 128}  # tokenizer and positions
    sentence_transformers_files(folder, "mean", True)
    ours = Encoder(folder, "cpu", 64, 256)
    assert ours.max_len == {"query": 64, "passage": LIMIT}
    exact, long = (
        " ".join(["w1"] * (LIMIT - 2)),
        " ".join(["w1"] * (LIMIT - 1)),
    )  # [CLS] and [SEP] make two more
    assert [len(ids) for ids in ours.tokenize([exact, long, "w1"], "passage")] == [LIMIT, LIMIT, 3]
    assert ours.n_cut == {"query": 0, "passage": 1}
    capsys.readouterr()
    ours.report_cut()
    assert capsys.readouterr().err == (
        "model: 1 of 3 texts (passage) were cut at 100 tokens, by --passage-max-len or the "
        "model's own limit\n"
    )


# --------------------------------------------------------------------------- what is refused


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def rename_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {f"wrapper.{key}": w for key, w in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def drop_weights(folder, word):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {key: w for key, w in weights.items() if word not in key},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "no encoder to be used .*[Tt]okenizer"),
        (without_tokenizer, "no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "no encoder to be used"),
        (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "no encoder to be used"),
        (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "no encoder to be used"),
        (lambda f: (f / "modules.json").write_text("["), "no encoder to be used"),
        (lambda f: (f / "config_sentence_transformers.json").write_text("["), "not JSON"),
        (lambda f: (f / "2_Dense" / "model.safetensors").unlink(), "no encoder to be used"),
        (rename_weights, r"\d+ weights are missing, embeddings.LayerNorm.bias first"),
        (
            lambda f: drop_weights(f, "layer.1.output.dense.bias"),
            "1 weights are missing, encoder.layer.1.output.dense.bias first",
        ),
        (lambda f: change_json(f / "config.json", hidden_size=64), "no encoder to be used"),
        (
            lambda f: change_json(f / "config.json", auto_map={"AutoModel": "code.Model"}),
            r"custom class \(auto_map\)",
        ),
        (
            lambda f: change_json(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T"]}),
            r"custom class \(auto_map",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_told_in_one_line(tmp_path, damage, message):
    folder = Path(sentence_transformer(tmp_path / "model", WORDS, dense=8))
    damage(folder)
    with pytest.raises(DataError, match=message) as told:
        Encoder(str(folder), "cpu").encode(["w1"], "query")
    assert str(tmp_path) in str(told.value)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("reranker", "a reranker gives no vector a text"),
        ("SparseEncoder", "a SparseEncoder gives no vector a text"),
        ("late interaction", "no transformer with a pooling"),
    ],
)
def test_models_of_another_kind_are_refused(tmp_path, kind, message):
    folder = tmp_path / "model"
    if kind == "reranker":
        random_bert(folder, WORDS)
        change_json(folder / "config.json", architectures=["BertForSequenceClassification"])
    if kind == "SparseEncoder":
        sentence_transformer(folder, WORDS)
        change_json(folder / "config_sentence_transformers.json", model_type=kind)
    if kind == "late interaction":
        sentence_transformer(folder, WORDS)
        modules = json.loads((folder / "modules.json").read_text("utf-8"))
        (folder / "modules.json").write_text(json.dumps(modules[:1]), "utf-8")
    with pytest.raises(DataError, match=message):
        Encoder(str(folder), "cpu").encode(["w1"], "query")


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(tmp_path):
    folder = Path(random_llama(tmp_path / "model", WORDS))
    before = Encoder(str(folder), "cpu").encode(texts(9), "query")
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(DataError, match="neither a padding nor an end token"):
        Encoder(str(folder), "cpu").encode(texts(9), "query")
    change_json(folder / "tokenizer_config.json", eos_token="[SEP]")
    assert np.allclose(Encoder(str(folder), "cpu").encode(texts(9), "query"), before, atol=1e-5)


def test_missing_weights_are_told_however_quiet_transformers_is(tmp_path):
    folder = Path(sentence_transformer(tmp_path / "model", WORDS, dense=8))
    rename_weights(folder)
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    with pytest.raises(DataError, match="weights are missing"):
        Encoder(str(folder), "cpu").encode(["w1"], "query")


def test_loading_prints_nothing_of_the_libraries(tmp_path):
    folder = sentence_transformer(tmp_path / "model", WORDS)
    code = f"from encoder import Encoder; Encoder({folder!r}, 'cpu').encode(['w1'], 'query')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_class_of_the_folders_own_is_not_run(tmp_path):
    folder = Path(sentence_transformer(tmp_path / "model", WORDS))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Module: pass\n")
    (folder / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "", "type": "code.Module"}])
    )
    with pytest.raises(DataError, match="code.Module"):
        Encoder(str(folder), "cpu").encode(["w1"], "query")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = random_bert(tmp_path / "model", WORDS)
    random_bert(tmp_path / "other", WORDS + [f"more{i}" for i in range(50)])
    (tmp_path / "other" / "tokenizer.json").replace(tmp_path / "model" / "tokenizer.json")
    with pytest.raises(DataError, match="tokenizer has 256 tokens, its model 206"):
        Encoder(folder, "cpu").encode(["w1"], "query")


def test_a_special_token_without_a_row_harms_nobody_who_does_not_write_it(tmp_path):
    """EmbeddingGemma's tokenizer has one for images, its model none."""
    folder = Path(random_bert(tmp_path / "model", WORDS))
    before = Encoder(str(folder), "cpu").encode(["w1 w2"], "query")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    ours = Encoder(str(folder), "cpu")
    assert np.array_equal(ours.encode(["w1 w2"], "query"), before)
    with pytest.raises(DataError, match="model: a token of 'w2 <image>' has no vector in the model"):
        ours.encode(["w1", "w2 <image>"], "query")


def test_a_prompt_that_leaves_no_room_for_the_text_is_refused(tmp_path):
    folder = random_bert(tmp_path / "model", WORDS)
    prompt = "query_prefix=" + " ".join(WORDS[:8]) + " "
    assert len(Encoder(folder, "cpu", 11, settings=[prompt]).encode(["w1"], "query")) == 1
    with pytest.raises(DataError, match=r"alone has 10 of 10 tokens \(query\); raise --query-max-len"):
        Encoder(folder, "cpu", 10, settings=[prompt]).encode(["w1"], "query")


def test_a_padding_token_without_a_row_is_of_another_model(tmp_path):
    folder = random_bert(tmp_path / "model", WORDS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(DataError, match="files of two models"):
        Encoder(folder, "cpu").encode(["w1"], "query")


def test_an_adapter_is_another_one_where_its_base_is(tmp_path):
    folder = Path(random_bert(tmp_path / "adapter", WORDS))
    base = Path(random_bert(tmp_path / "base", WORDS))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = encoder.digest_folder(folder)
    random_bert(base, WORDS, seed=1)
    assert encoder.digest_folder(folder) != before
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    assert encoder.digest_folder(folder)  # an adapter may lie in its base's folder


def test_only_a_pooler_that_nothing_reads_may_be_missing(tmp_path):
    folder = Path(random_bert(tmp_path / "model", WORDS))
    vectors = Encoder(str(folder), "cpu").encode(texts(3), "query")
    drop_weights(folder, "pooler")
    assert np.array_equal(Encoder(str(folder), "cpu").encode(texts(3), "query"), vectors)


def test_vectors_that_are_not_finite_name_model_and_text(tmp_path):
    folder = Path(sentence_transformer(tmp_path / "model", WORDS))
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][4 + 7] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    ours = Encoder(str(folder), "cpu")
    assert np.isfinite(ours.encode(["w1", "w2 w3"], "query")).all()
    with pytest.raises(DataError, match="model: the vector of 'w1 w7 w3' is not finite"):
        ours.encode(["w1", "w2 w3", "w1 w7 w3"], "query")


# --------------------------------------------------------------------------- on disk


def test_cached_vectors_are_found_again_without_the_model(tmp_path, monkeypatch):
    folder, those = sentence_transformer(tmp_path / "model", WORDS), texts(20)
    first = Encoder(folder, "cpu").encode_cached(those, "passage", tmp_path / "cache")
    assert first.dtype == np.float16 and isinstance(first, np.memmap)
    assert np.allclose(first, Encoder(folder, "cpu").encode(those, "passage"), atol=1e-3)
    monkeypatch.setattr(encoder, "load_model", None)
    (tmp_path / "model").rename(tmp_path / "renamed")
    again = Encoder(str(tmp_path / "renamed"), "cpu").encode_cached(those, "passage", tmp_path / "cache")
    assert np.array_equal(first, again)
    (path,) = (tmp_path / "cache").rglob("*.npy")
    with pytest.raises(DataError, match="20 rows, want 21"):
        encoder.load_rows(path, 21)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be read .*delete it"):
        Encoder(str(tmp_path / "renamed"), "cpu").encode_cached(those, "passage", tmp_path / "cache")


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "2_Dense/model.safetensors",
        "1_Pooling/config.json",
        "tokenizer.json",
        "chat_template.jinja",
    ],
)
def test_any_file_that_decides_vectors_changes_the_fingerprint(tmp_path, name):
    folder = Path(sentence_transformer(tmp_path / "model", WORDS, dense=8))
    before = Encoder(str(folder), "cpu").fingerprint("passage")
    (folder / "README.md").write_text("other words")
    (folder / "build.json").write_text("{}")
    assert Encoder(str(folder), "cpu").fingerprint("passage") == before
    with open(folder / name, "ab") as file:
        file.write(b" ")
    assert Encoder(str(folder), "cpu").fingerprint("passage") != before


KILLED = """
import sys
sys.path[:0] = [{root!r}]
import encoder
encoder.CPU_TOKENS = 500
forward, n = encoder.Encoder.forward, [0]
def slow(self, token_ids, kind):
    n[0] += 1
    if n[0] == 6:
        print("five batches", flush=True)
        import time
        time.sleep(60)
    return forward(self, token_ids, kind)
encoder.Encoder.forward = slow
encoder.Encoder({folder!r}, "cpu").encode_file({path!r}, open({texts!r}).read().split("\\n"), "passage")
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    folder, those, path = sentence_transformer(tmp_path / "model", WORDS), texts(60), tmp_path / "killed.npy"
    (tmp_path / "texts").write_text("\n".join(those))
    code = KILLED.format(root=str(ROOT), folder=folder, path=str(path), texts=str(tmp_path / "texts"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"five batches\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (
        not path.exists() and len(list(tmp_path.glob("killed.npy*"))) == 1
    )  # what was saved, nothing temporary
    monkeypatch.setattr(encoder, "CPU_TOKENS", 500)
    ours, encoded = Encoder(folder, "cpu"), []
    forward = ours.forward
    monkeypatch.setattr(ours, "forward", lambda ids, kind: encoded.append(len(ids)) or forward(ids, kind))
    ours.encode_file(tmp_path / "whole.npy", those, "passage")
    n_batches = len(encoded)
    ours.encode_file(path, those, "passage")
    assert (
        len(encoded) - n_batches == n_batches - 5
        and path.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    )
    assert not list(tmp_path.glob("*.partial"))


class Bar:
    n = 0

    def update(self, n):
        self.n += n


def test_encoding_counts_on_the_bar_it_is_given_and_does_nothing_twice(tmp_path):
    ours, bar = Encoder(random_bert(tmp_path / "model", WORDS), "cpu"), Bar()
    for _ in range(2):
        ours.encode_file(tmp_path / "a.npy", texts(30), "query", bar)
    assert bar.n == 30
    assert ours.encode([], "query").shape == (0, 32)


@pytest.mark.parametrize("name", ["multilingual-e5-small", "mdpr", "other"])
def test_a_saved_model_gives_everybody_the_same_vectors(tmp_path, name):
    ours = Encoder(random_bert(tmp_path / name, WORDS), "cpu", 10, 20)
    ours.similarity = "cosine"
    vectors = ours.encode(texts(10), "passage")
    ours.save(tmp_path / "saved")
    saved = Encoder(str(tmp_path / "saved"), "cpu", 10, 20)
    assert np.allclose(saved.encode(texts(10), "passage"), vectors, atol=1e-6)
    assert (saved.prefix, saved.title_join, saved.similarity) == (ours.prefix, ours.title_join, "cosine")
    wide = Encoder(str(tmp_path / "saved"), "cpu", 512, 512)
    theirs = same_as_theirs(wide, tmp_path / "saved")
    assert (
        theirs.max_seq_length == 128 and theirs.similarity_fn_name == "cosine"
    )  # not the 10 and 20 of training
    assert np.allclose(np.linalg.norm(theirs.encode(texts(3)), axis=1), 1, atol=1e-5)
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text("utf-8"))["truncation"] is None


def test_nothing_is_assumed_of_a_folder_that_we_saved(tmp_path, capsys):
    folder = random_bert(tmp_path / "other", WORDS)
    Encoder(folder, "cpu", settings=["query_prefix=", "title_join= "]).save(
        tmp_path / "my-multilingual-e5-small"
    )
    capsys.readouterr()
    saved = Encoder(str(tmp_path / "my-multilingual-e5-small"), "cpu")
    assert (
        saved.prefix == {"query": "", "passage": ""}
        and saved.title_join == " "
        and not capsys.readouterr().err
    )


def test_a_dense_layer_and_its_prompts_survive_saving(tmp_path):
    folder = sentence_transformer(tmp_path / "model", WORDS, dense=16, normalise=False, prompts=PROMPTS)
    ours = Encoder(folder, "cpu", 512, 512)
    ours.save(tmp_path / "saved")
    assert [type(module).__name__ for module in ours.model] == [
        "Transformer",
        "Pooling",
        "Dense",
        "Normalize",
    ]
    same_as_theirs(ours, tmp_path / "saved")


def test_importing_the_encoder_loads_no_library():
    code = "import sys, encoder; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    started = time.time()
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0 and time.time() - started < 5
    )


@pytest.mark.parametrize("change", ["tokenizer.json", "config.json"])
def test_a_model_changed_in_place_is_another_one(tmp_path, change):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_text("{}")
    before = encoder.model_digests([str(folder), "bm25", None])
    (folder / change).write_text('{"a": 1}')
    assert before.keys() == {"0 model"} and encoder.model_digests([str(folder)]) != before


def test_weights_are_cast_to_bf16_once_not_at_every_batch(tmp_path, monkeypatch):
    def casts_of_weights(tokens):
        monkeypatch.setattr(encoder, "CPU_TOKENS", tokens)
        with torch.profiler.profile(record_shapes=True) as profile:
            ours.encode(texts(12), "passage")
        events = profile.key_averages(group_by_input_shape=True)
        sizes = [(event.input_shapes[0], event.count) for event in events if event.key == "aten::_to_copy"]
        return sum(count for shape, count in sizes if shape in weights)

    ours = Encoder(random_bert(tmp_path / "bert", WORDS), dtype="bf16")
    layers = [module for module in ours.model.modules() if isinstance(module, torch.nn.Linear)]
    weights = [list(layer.weight.shape) for layer in layers]
    assert casts_of_weights(10**6) == casts_of_weights(100) > 0


def test_products_and_dropout_of_a_cpu_are_the_faster_ones_with_the_same_values(on_amd):
    """Forward and backward through two layers, one without a bias; and dropout, of any strides."""
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.GELU(), torch.nn.Linear(48, 8, bias=False))
    x = torch.randn(3, 5, 24)

    def gradients():
        layers.zero_grad()
        layers(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in layers.parameters()]

    wanted = gradients()
    with torch.profiler.profile() as profile, encoder.faster(True):
        found = gradients()
        torch.nn.functional.dropout(x.transpose(0, 2), 0.1, training=True)
    for a, b in zip(wanted, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == 6  # two forward, four backward
    assert "aten::bernoulli_" not in calls
    with torch.profiler.profile() as profile, encoder.faster(True), torch.autocast("cpu", torch.bfloat16):
        layers(x).sum().backward()
    assert "mkldnn::_linear_pointwise" not in {event.key for event in profile.key_averages()}
    theirs = torch.nn.functional.linear
    with encoder.faster(False):
        assert torch.nn.functional.linear is theirs
    with encoder.faster(True):
        assert torch.nn.functional.linear is not theirs
    assert torch.nn.functional.linear is theirs


def test_an_intel_keeps_the_products_of_torch_which_are_its_faster_ones(monkeypatch):
    theirs = torch.nn.functional.linear, torch.nn.functional.dropout
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Intel Xeon"})
    with encoder.faster(True):
        assert torch.nn.functional.linear is theirs[0] and torch.nn.functional.dropout is not theirs[1]


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16"])
def test_bf16_on_a_processor_that_has_none_is_told(flag, monkeypatch, tmp_path, capsys):
    folder = random_bert(tmp_path / "bert", WORDS)
    for has in (False, True):
        found = {"avx512_f": True, flag: has}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        for dtype in ("fp32", "bf16"):
            Encoder(folder, "cpu", dtype=dtype).model  # noqa: B018
            said = "cpu has no bf16 of its own; --dtype fp32 is several times faster"
            assert (said in capsys.readouterr().err) == (dtype == "bf16" and not has)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_repeats_with_its_seed(p):
    x = torch.ones(7, 999, 143)

    def draw(seed):
        torch.manual_seed(seed)
        with encoder.faster(True):
            return torch.nn.functional.dropout(x, p, training=True)

    first = draw(1)
    assert abs((first == 0).float().mean() - p) < 3e-3
    assert torch.allclose(first[first != 0], torch.tensor(1 / (1 - p)))
    assert torch.equal(first, draw(1)) and (p == 0 or not torch.equal(first, draw(2)))
    assert (first.mean((0, 1)) - 1).abs().max() < 6 * (p / (1 - p) / 6993) ** 0.5 + 1e-6  # in each column


# --------------------------------------------------------------------------- folders as others keep them


def test_a_link_and_the_hubs_cache_are_called_as_their_users_call_them(tmp_path, capsys):
    kept = tmp_path / "models--intfloat--multilingual-e5-large/snapshots/0dc5580a"
    random_bert(kept, WORDS)
    link = tmp_path / "multilingual-e5-large"
    link.symlink_to(kept)
    for folder in (link, kept, f"{link}/"):
        ours = Encoder(str(folder), "cpu")
        assert (ours.name, ours.prefix["query"]) == ("multilingual-e5-large", "query: ")
        assert ours.default_temperature == 0.01


def test_a_linked_module_is_in_the_digest(tmp_path):
    folder = Path(sentence_transformer(tmp_path / "model", WORDS, dense=16))
    shared = tmp_path / "shared"
    (folder / "2_Dense").rename(shared)
    (folder / "2_Dense").symlink_to(shared)
    before = Encoder(folder, "cpu").digest
    (shared / "config.json").write_text((shared / "config.json").read_text() + " ")
    assert Encoder(folder, "cpu").digest != before


def test_settings_name_a_model_that_is_there_by_name_or_path(tmp_path):
    parser = ArgumentParser()
    encoder.encoder_flags(parser)
    folder = random_bert(tmp_path / "one", WORDS)
    for name in ("one", folder):
        args = parser.parse_args(["--settings", f"{name}:pooling=cls", "--settings", "query_prefix=w1 "])
        ours = encoder.from_flags(folder, args)
        assert ours.pooling == "cls" and ours.prefix["query"] == "w1 "  # both flags count
    args = parser.parse_args(["--settings", "typo:pooling=cls"])
    with pytest.raises(DataError, match="'typo' is not a model here; want one of one"):
        encoder.from_flags(folder, args)


def test_empty_prompts_that_were_trained_with_are_read_back(tmp_path):
    folder = sentence_transformer(tmp_path / "start", WORDS, prompts={"query": "w1 ", "passage": "w2 "})
    assert Encoder(folder, "cpu").prefix["passage"] == "w2 "
    ours = Encoder(folder, "cpu", settings=["passage_prefix=", "query_prefix="])
    ours.save(tmp_path / "trained")
    read = Encoder(str(tmp_path / "trained"), "cpu")
    assert read.prefix == {"query": "", "passage": ""}
    assert smallest_cosine(read.encode(texts(8), "passage"), ours.encode(texts(8), "passage")) > 0.99999


def test_a_tokenizer_that_pads_on_the_left_makes_no_vector_hang_on_its_batch(tmp_path):
    ours = Encoder(sentence_transformer(tmp_path / "left", WORDS, side="left"), "cpu")
    together = ours.encode(texts(8), "passage")
    alone = np.concatenate([ours.encode([text], "passage") for text in texts(8)])
    assert smallest_cosine(together, alone) > 0.99999


def test_a_causal_model_without_pooling_takes_its_last_token(tmp_path):
    config = {"vocab_size": save_tokenizer(tmp_path, WORDS), "hidden_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(tmp_path)
    same_as_theirs(Encoder(str(tmp_path), "cpu", query_max_len=256), tmp_path)


def test_poolings_that_are_joined_are_not_changed(tmp_path):
    folder = sentence_transformer(tmp_path / "joined", WORDS, pooling=("cls", "mean"))
    same_as_theirs(Encoder(folder, "cpu", 256), folder)
    with pytest.raises(DataError, match="--settings pooling=... is of one kind"):
        Encoder(folder, "cpu", settings=["pooling=cls"]).encode(["w1"], "passage")


def test_token_types_are_not_dropped_in_silence(tmp_path):
    folder = Path(random_bert(tmp_path / "model", WORDS))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for piece in tokenizer["post_processor"]["single"]:
        next(iter(piece.values()))["type_id"] = 1
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="its tokenizer gives token types"):
        Encoder(str(folder), "cpu").encode(["w1"], "passage")


def test_no_more_is_read_than_there_are_positions(tmp_path):
    folder = Path(random_bert(tmp_path / "model", WORDS))
    sentence_transformers_files(folder, "mean", True)
    limits = folder / "sentence_bert_config.json"
    limits.write_text(limits.read_text().replace(str(LIMIT), "512"))
    ours = Encoder(str(folder), "cpu")
    assert ours.max_len == {"query": 64, "passage": 128}
    assert np.isfinite(ours.encode(["w1 " * 300], "passage")).all()


def test_the_faster_layers_output_may_be_changed_in_place(on_amd):
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 3, 4)
    wanted = torch.autograd.grad((layer(x) + 1).square().sum(), layer.weight)
    with encoder.faster(True):
        found = torch.autograd.grad(layer(x).add_(1).square().sum(), layer.weight)
    assert torch.allclose(wanted[0], found[0], atol=1e-5)
