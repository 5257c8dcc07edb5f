"""02 against `transformers serve` with a small model of random weights: a real server, the same code."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import load_stage


def make_model(folder):
    """A two-layer Llama with a byte-level tokenizer and a chat template; its answers are noise."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1} | {
        c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_model(folder / "model")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (folder / "hub").mkdir()
    log = open(folder / "log", "w")
    server = subprocess.Popen(
        [
            Path(sys.executable).with_name("transformers"),
            "serve",
            folder / "model",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--port",
            str(port),
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "OMP_NUM_THREADS": "1"},
    )
    try:
        for _ in range(240):
            if server.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.skip("transformers serve was not ready within a minute")
        if server.poll() is not None:
            pytest.skip(f"transformers serve does not start here: {(folder / 'log').read_text()[-300:]}")
        yield folder / "model", f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def test_transformers_serve_answers_a_real_run(served, tmp_path, monkeypatch):
    """Noise is no judgment: each candidate ends as unjudged, with the reason, and the run goes through."""
    import llm

    model, url = served
    monkeypatch.setattr(llm.LLM, "ATTEMPTS", 2)
    record = {
        "query_id": "q",
        "lang": "th",
        "query": "เมืองหลวง?",
        "positive_passages": [{"docid": "p", "title": "", "text": "กรุงเทพ"}],
        "negative_passages": [{"docid": "h", "title": "", "text": "no", "source": "human"}],
        "candidate_passages": [{"docid": str(i), "title": "t", "text": f"text {i}"} for i in range(3)],
    }
    (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
    load_stage("02_filter_false_negatives").main(
        list(
            map(
                str,
                [
                    "--input",
                    tmp_path / "in.jsonl",
                    "--llm",
                    model,
                    "--base-url",
                    url,
                    "--cache",
                    tmp_path / "cache",
                    "--concurrency",
                    2,
                    "--max-unjudged",
                    1,
                    "--out",
                    tmp_path / "out.jsonl",
                ],
            )
        )
    )
    counts = json.loads((tmp_path / "out.jsonl.meta.json").read_text())["counts"]
    stats = counts["calls"][str(model)]
    assert 6 <= stats["asked"] <= 7 and stats["prompt_tokens"] > 6 * 1000 and stats["completion_tokens"] > 0
    assert counts["unjudged"] == 3 and set(counts["reasons"]) <= {"unparsable", "cut off", "empty"}
    out = json.loads((tmp_path / "out.jsonl").read_text())
    assert [p["docid"] for p in out["negative_passages"]] == ["h"] and [
        u["docid"] for u in out["unjudged"]
    ] == ["0", "1", "2"]
