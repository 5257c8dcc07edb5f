"""The encoder: a model's own settings, what overrides them, and vectors that depend on nothing else."""
import json

import numpy as np
import pytest
import torch
from conftest import load_stage  # noqa: F401  (puts the project on the path)
from tiny_models import random_bert, sentence_transformers_files

import encoder
from common import DataError
from encoder import Encoder, maker_settings

WORDS = [f"w{i}" for i in range(200)] + ["query:", "passage:"]


def texts(n, seed=0, longest=40):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS[:200], draw.integers(1, longest))) for _ in range(n)]


PROMPTS = {"query": "query: ", "document": "passage: "}


@pytest.mark.parametrize(("pooling", "normalise", "prompts", "legacy"), [
    ("mean", True, None, True), ("mean", True, PROMPTS, False), ("mean", False, PROMPTS, True),
    ("cls", True, None, True), ("cls", True, PROMPTS, False), ("cls", False, None, False)])
def test_vectors_equal_those_of_sentence_transformers(tmp_path, pooling, normalise, prompts, legacy):
    from sentence_transformers import SentenceTransformer
    folder = tmp_path / "model"
    random_bert(folder, WORDS)
    sentence_transformers_files(folder, pooling, normalise, prompts, legacy)
    ours, theirs = Encoder(str(folder), "cpu", 100, 100), SentenceTransformer(str(folder), device="cpu")
    for kind, encode in (("query", theirs.encode_query), ("passage", theirs.encode_document)):
        a, b = ours.encode(texts(50), kind), encode(texts(50))
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() > 0.9999
        assert np.allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1), rtol=1e-4)
        assert np.allclose(np.linalg.norm(a, axis=1), 1, atol=1e-4) == normalise


@pytest.mark.parametrize(("name", "pooling", "normalise", "prompts"), [
    ("multilingual-e5-large", "mean", True, PROMPTS), ("bge-m3", "cls", True, None), ("bert-base-multilingual-cased", "cls", True, None),
    ("mdpr-tied-pft-msmarco", "cls", False, None), ("mcontriever-msmarco", "mean", False, None), ("gte-multilingual-base", "cls", True, None)])
def test_a_folder_known_by_its_name_alone_gives_the_vectors_of_sentence_transformers(tmp_path, name, pooling, normalise, prompts):
    from sentence_transformers import SentenceTransformer
    ours = Encoder(random_bert(tmp_path / name, WORDS), "cpu")
    random_bert(tmp_path / "theirs", WORDS)
    theirs = SentenceTransformer(sentence_transformers_files(tmp_path / "theirs", pooling, normalise, prompts), device="cpu")
    for kind, encode in (("query", theirs.encode_query), ("passage", theirs.encode_document)):
        assert np.allclose(ours.encode(texts(20), kind), encode(texts(20)), atol=1e-4)


def test_known_models_without_files_of_their_own_are_used_as_their_makers_do(tmp_path):
    for name, expected in {
            "intfloat/multilingual-e5-large": ("mean", "query: ", "passage: ", True, " "),
            "BAAI/bge-m3": ("cls", "", "", True, "\n"),
            "google-bert/bert-base-multilingual-cased": ("cls", "", "", True, "\n"),
            "castorini/mdpr-tied-pft-msmarco": ("cls", "", "", False, " "),
            "facebook/mcontriever-msmarco": ("mean", "", "", False, " "),
            "Alibaba-NLP/gte-multilingual-base": ("cls", "", "", True, "\n"),
            "somebody/other": ("mean", "", "", True, "\n"),
            "intfloat/multilingual-e5-large-instruct": ("mean", "", "", True, "\n")}.items():
        settings, limit = maker_settings(tmp_path, name)
        assert tuple(settings.values()) == expected and limit is None
    prompts = {"query": "frage: ", "document": ""}
    sentence_transformers_files(tmp_path, "cls", False, prompts)
    settings, limit = maker_settings(tmp_path, "multilingual-e5-small")
    assert settings == {"pooling": "cls", "query_prefix": "frage: ", "passage_prefix": "passage: ", "normalise": False, "title_join": " "}
    assert limit == 100


def test_settings_override_the_maker_and_each_changes_the_vectors(tmp_path):
    folder = random_bert(tmp_path / "model", WORDS)
    passage = {"title": "w1 w2", "text": " ".join(texts(1)[0].split() * 3)}
    plain = Encoder(folder, "cpu")

    def vectors(encoder):
        return np.concatenate([encoder.encode([encoder.passage_text(passage)], "passage"), encoder.encode(["w3 w4 w5 w6"], "query")])

    def fingerprints(encoder):
        return encoder.fingerprint("query"), encoder.fingerprint("passage")

    seen = {fingerprints(plain)}
    for setting in ("pooling=cls", "query_prefix=query: ", "passage_prefix=passage: ", "normalise=no", r"title_join= w9\n", "query_max_len=3",
                    "passage_max_len=5", "model:pooling=cls"):
        changed = Encoder(folder, "cpu", settings=[setting])
        assert not np.allclose(vectors(changed), vectors(plain), atol=1e-4), setting
        seen.add(fingerprints(changed))
        assert (changed.fingerprint("passage") == plain.fingerprint("passage")) == setting.startswith("query_"), setting
    assert len(seen) == 8  # the last is the first again
    assert np.array_equal(vectors(Encoder(folder, "cpu", settings=["other:pooling=cls"])), vectors(plain))
    for wrong in ("pooling=max", "poling=cls", "pooling", "normalise=1", "query_max_len=0"):
        with pytest.raises(DataError, match="--settings"):
            Encoder(folder, "cpu", settings=[wrong])


def test_a_vector_does_not_depend_on_what_is_encoded_with_it(tmp_path):
    encoder, batch = Encoder(random_bert(tmp_path / "model", WORDS), "cpu"), texts(100)
    together = encoder.encode(batch, "passage")
    for n in (1, 7):
        apart = np.concatenate([encoder.encode(batch[i:i + n], "passage") for i in range(0, len(batch), n)])
        assert np.array_equal(apart, together)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert np.array_equal(encoder.encode(batch, "passage"), together)
    finally:
        torch.set_num_threads(threads)


def test_inputs_are_cut_at_the_shortest_limit(tmp_path):
    folder = tmp_path / "model"
    random_bert(folder, WORDS)
    assert Encoder(str(folder), "cpu", 64, 256).max_len == {"query": 64, "passage": 128}  # tokenizer and positions
    sentence_transformers_files(folder, "mean", True)
    assert Encoder(str(folder), "cpu", 64, 256).max_len == {"query": 64, "passage": 100}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "xlm-roberta", "max_position_embeddings": 66, "pad_token_id": 1}))
    assert encoder.max_positions(folder) == 64


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer cannot be loaded"),
    (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "no encoder"),
    (lambda f: (f / "config.json").unlink(), "no encoder"),
    (lambda f: sentence_transformers_files(f, "max", True), "pooling 'max' is not supported"),
    (lambda f: (f / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]'), "Dense is not supported"),
    (lambda f: (f / "modules.json").write_text("["), "not JSON")])
def test_a_model_folder_that_cannot_be_used_is_told_in_one_line(tmp_path, damage, message):
    folder = tmp_path / "model"
    random_bert(folder, WORDS)
    damage(folder)
    with pytest.raises(DataError, match=message):
        Encoder(str(folder), "cpu").encode(["w1"], "query")
