"""Measure the averages and rates that bench/plan.py multiplies its counts by, on this machine.

How     tokens and bytes of DATA, with a tokenizer trained on it; the speed of an XLM-R large with random weights, of exact search and of
        BM25, by the stages' own code, in processor seconds over cores; what other scripts measured is read from their docstrings
Reads   DATA, a folder made by 00_prepare_data.py (mini-MIRACL)
Writes  results/rates.json   averages and rates, each with how it was measured
Usage   make data DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl && python bench/measure_rates.py --data data/minimiracl
        python bench/plan.py --markdown     afterwards: SCALING.md
Cost    Linux: three minutes of CPU, 7 GB of memory, 3 GB of temporary disk
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from argparse import SUPPRESS
from pathlib import Path
from time import process_time

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("bench", "sample", "tests"))]
from common import DataError, Parser, run  # noqa: E402
from plan import LAYERS, MIRACL, NEGATIVES, WIDTH  # noqa: E402

QUOTED = {  # what other scripts measured and say in their docstrings
    "prepare_s_per_million": ("00_prepare_data.py", r"a million passages: ([\d,]+) s"),
    "judge_calls_per_s": ("bench/judge_throughput.py", r"stage 02 +([\d,]+),"),
    "judge_mb": ("02_filter_false_negatives.py", r"([\d,]+) MB and [\d,]+ MB more for each million"),
    "judge_mb_per_million": ("02_filter_false_negatives.py", r"([\d,]+) MB more for each million"),
    "mine_mb": ("bench/mine_million.py", r"1,000,000 (?:dense )?[\d,]+ s, (?:peak )?([\d,]+) MB"),
    "train_mb": ("bench/train_memory.py", r"100,000 records \(.*?\):? ([\d,]+) MB"),
}


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a folder made by 00_prepare_data.py")
    parser.add_argument(
        "--bm25", nargs=2, help=SUPPRESS
    )  # FOLDER STRIDE, of the processes that this one starts
    return parser


def quoted():
    """{rate: (value, how)} of QUOTED."""
    rates = {}
    for name, (path, pattern) in QUOTED.items():
        if not (match := re.search(pattern, (ROOT / path).read_text("utf-8"))):
            raise DataError(
                f"{path}: its docstring does not say {name} (wanted {pattern!r}); correct QUOTED in bench/measure_rates.py"
            )
        rates[name] = int(match[1].replace(",", "")), f"docstring of `{path}`"
    return rates


def cpu_seconds(work):
    """Processor seconds of work(), of all its threads: other work on the machine does not count."""
    start = process_time()
    work()
    return process_time() - start


def measure_averages(data, folder):
    """(averages, tokens of some passages, rates); the tokenizer that counts them is left in folder."""
    import zlib

    import make_encoder
    from conftest import load_stage
    from transformers import PreTrainedTokenizerFast

    from common import corpus_languages, dump, passage_text, read_queries
    from llm import judge_messages, labelled

    passages = make_encoder.read_corpus(
        data, [lang for lang in corpus_languages(data) if lang in MIRACL], 1000, 13
    )
    tokeniser, generate = (
        make_encoder.train_tokeniser(passages, 32_000, 13),
        load_stage("03_generate_negatives"),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokeniser, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    n_tokens = lambda *texts: sum(len(tokeniser.encode(text, add_special_tokens=False).ids) for text in texts)  # noqa: E731
    texts, counted, lengths = [dump(p) for of_lang in passages.values() for p in of_lang], {}, []
    for lang, of_lang in passages.items():
        own = {
            "passage": [min(256, n_tokens(passage_text(p)) + 2) for p in of_lang],
            "query": [],
            "judge": [],
            "judge, shared": [],
            "summarise": [],
        }
        for record, candidate in zip(read_queries(f"{data}/train.jsonl", [lang]), of_lang[:200]):
            system, user = (
                m["content"]
                for m in judge_messages(record["query"], lang, [candidate], record["positive_passages"][0])
            )
            asked = labelled(Question=record["query"], Passage=passage_text(record["positive_passages"][0]))
            own["query"].append(min(64, n_tokens(record["query"]) + 2))
            own["judge"].append(10 + n_tokens(system, user))  # 10: the chat template's own
            own["judge, shared"].append(10 + n_tokens(system, user.split("\nCandidate passage:")[0]))
            own["summarise"].append(10 + n_tokens(generate.SUMMARISE, asked))
        lengths += own["passage"][:50]
        for name, values in own.items():
            counted.setdefault(name, {})[lang] = round(sum(values) / len(values), 1)
    size = {
        lang: round(sum(len(dump(p).encode()) for p in of_lang) / len(of_lang), 1)
        for lang, of_lang in passages.items()
    }
    blob, seconds = (
        "".join(texts).encode(),
        cpu_seconds(lambda: tokeniser.encode_batch_fast(texts)) / os.cpu_count(),
    )
    how = (
        f"Up to 1,000 passages and 200 training queries a language of {Path(data).name}, whose passages are cut at about 1,650 characters and stand "
        "near some question; Thai is not among them and counts as the mean of the others. Passages are cut at 256 tokens, queries at 64, as in "
        "Sec. 4.1; judge: instructions, question, reference and candidate. The tokenizer has 32,000 pieces and is trained on these passages by "
        "`sample/make_encoder.py`; XLM-R's and Llama's will count differently, Llama's most where it knows a script badly."
    )
    return (
        {"tokens": counted, "ask": 10 + n_tokens(generate.ASK), "bytes": size, "how": how},
        lengths,
        {
            "gzip_share": (len(zlib.compress(blob)) / len(blob), "size of a packed corpus over the unpacked"),
            "tokenise_tokens_per_s": (n_tokens(*texts) / seconds, "that tokenizer on both cores"),
        },
    )


def measure_speeds(folder, lengths):
    """{rate: (value, how)} of an XLM-R large with random weights and of exact search, by the stages' own code."""
    import numpy as np
    import torch
    from conftest import load_stage
    from train_speed import make_encoder

    from common import SHARD
    from encoder import Encoder
    from search import QUERY_BLOCK, Best, unit

    make_encoder(folder, LAYERS, WIDTH)
    encoder, train, draw, cores = (
        Encoder(str(folder), "cpu"),
        load_stage("05_train"),
        np.random.default_rng(13),
        os.cpu_count(),
    )
    texts = [
        " ".join(["w1"] * (n - 2)) for n in draw.choice(lengths, 24)
    ]  # its tokenizer adds no special tokens
    encoder.encode(texts[:1], "passage")  # loads the model
    step = encoder.tokenize(["w1 " * 16, *texts[: 1 + NEGATIVES]], "passage")  # one query and its passages
    encode_s = cpu_seconds(lambda: encoder.encode(texts, "passage")) / cores
    encoder.model.train()
    train_s = (
        cpu_seconds(
            lambda: train.backward(encoder, step, lambda v: torch.logsumexp(v[:1] @ v[1:].T / 0.02, 1).sum())
        )
        / cores
    )
    rates = {
        "encode_tokens_per_s": (
            sum(map(len, encoder.tokenize(texts, "passage"))) / encode_s,
            f"`Encoder.encode`, {LAYERS} x {WIDTH:,}, random weights, real lengths",
        ),
        "train_tokens_per_s": (
            sum(map(len, step)) / train_s,
            "forward and backward of 05 at that shape, fp32: "
            f"one query, {1 + NEGATIVES} passages; without the optimiser",
        ),
    }
    encoder = train = None
    queries, *shards = (
        unit(draw.standard_normal((n, WIDTH), np.float32)) for n in (QUERY_BLOCK, *[SHARD] * 4)
    )
    best, docids, asked = (
        Best({"m": 1.0}, QUERY_BLOCK, 80),
        np.array([str(i).encode() for i in range(SHARD)]),
        torch.from_numpy(queries).float(),
    )

    def search(shard):
        wide = torch.from_numpy(np.array(shard)).float()
        best.offer(0, {"m": asked @ wide.T}, {"m": 2e-5}, {"m": queries}, {"m": shard}, 0, docids)

    with torch.inference_mode():
        search(shards[0])  # fills the lists; a corpus has hundreds of shards
        seconds = cpu_seconds(lambda: [search(shard) for shard in shards[1:]]) / cores
        rates["search_pairs_per_s"] = (
            3 * QUERY_BLOCK * SHARD / seconds,
            f"`Best` of 01, queries x passages x encoders, {WIDTH:,} dimensions",
        )
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a = torch.ones(1024, 1024, dtype=dtype)
            a @ a
            seconds = cpu_seconds(lambda: [a @ a for _ in range(20)]) / cores
            rates[f"{name}_tflop_per_s"] = (
                20 * 2 * 1024**3 / seconds / 1e12,
                "products of 1,024 x 1,024, for comparison",
            )
    return rates


def measure_bm25(data, folder, stride):
    """In a process of its own: prints passages, seconds, peak memory, index bytes, seconds a query of BM25 over all languages as one."""
    from common import corpus_languages, read_queries, read_shards
    from search import Ensemble

    one, n = Path(folder) / stride, 0
    (one / "corpus").mkdir(parents=True)
    with open(one / "corpus/en.jsonl", "wb") as file:
        for lang, lines in (
            (lang, shard[:: int(stride)])
            for lang in corpus_languages(data)
            for _, shard in read_shards(data, lang)
        ):
            n += sum(
                file.write(line.replace(b'"docid": "', f'"docid": "{lang}'.encode(), 1)) > 0
                for _, line in lines
            )
    bm25 = Ensemble(["bm25"], one, one / "cache", bm25_tokenizer=f"{folder}/bpe").bm25
    queries = [q["query"] for q in read_queries(f"{data}/dev.jsonl")][:100]
    made = cpu_seconds(lambda: bm25.index("en"))
    peak = 1024 * int(
        re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    )  # ru_maxrss starts at the parent's
    searched = cpu_seconds(lambda: bm25.search("en", queries, 100)) / len(queries)
    print(
        json.dumps(
            [n, made, peak, sum(f.stat().st_size for f in (one / "cache/bm25").rglob("*.npy")), searched]
        )
    )


def measure(data):
    """The content of results/rates.json."""
    import torch

    rates = quoted()
    with tempfile.TemporaryDirectory() as folder:
        averages, lengths, more = measure_averages(data, f"{folder}/bpe")
        small, large = (
            json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--data", data, "--bm25", folder, stride],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for stride in ("4", "1")
        )
        rates |= more | measure_speeds(Path(folder) / "xlmr", lengths)
    n, *more = (b - a for a, b in zip(small, large))
    how = f"reading, checking and indexing {large[0]:,} passages of all languages as one corpus, less a quarter of it"
    for name, value in zip(
        ("bm25_s_per_passage", "bm25_memory_bytes_per_passage", "bm25_disk_bytes_per_passage"), more
    ):
        rates[name] = value / n, how
    rates["bm25_s_per_pair"] = large[4] / large[0], "100 queries there, queries x passages"
    cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    name = (re.findall(r"model name\s*: (.*)", cpuinfo) or ["an unknown processor"])[0]
    return {
        "machine": f"{os.cpu_count()} cores of {name}{' with avx512_bf16' * ('avx512_bf16' in cpuinfo)}, torch {torch.__version__}",
        "averages": averages,
        "rates": {key: [float(f"{value:.4g}"), how] for key, (value, how) in rates.items()},
    }


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.bm25:
        return measure_bm25(args.data, *args.bm25)
    (ROOT / "results/rates.json").write_text(json.dumps(measure(args.data), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    run(main)
