"""Measure the averages and rates that bench/plan.py multiplies its counts by, on this machine.

How     tokens and bytes of DATA, with a tokenizer trained on it; the speed of an XLM-R large with random
        weights, of exact search (faiss.knn, as in search.py) and of BM25, in processor seconds over cores;
        what other scripts measured is read from their docstrings
Reads   DATA, a folder made by 00_prepare_data.py (mini-MIRACL)
Writes  results/rates.json   averages and rates, each with how it was measured
Usage   make data DATA_SOURCE=miracl DATA_ROOT=../shared/data/minimiracl
        python bench/measure_rates.py --data data/minimiracl
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
from common import SHARD, DataError, Parser, run  # noqa: E402
from plan import LAYERS, MIRACL, NEGATIVES, WIDTH  # noqa: E402

N_QUERIES = 2048  # searched at once; a language has 868 to 4,683
QUOTED = {  # what other scripts measured and say in their docstrings
    "prepare_s_per_million": ("00_prepare_data.py", r"a million passages: ([\d,]+) s"),
    "judge_calls_per_s": ("bench/judge_throughput.py", r"stage 02 +([\d,]+),"),
    "judge_mb": ("bench/judge_memory.py", r"asked +10000 .*?peak ([\d,]+) MB"),
    "judge_mb_at_a_million": ("bench/judge_memory.py", r"hits +1000000 .*?peak ([\d,]+) MB"),
    "mine_mb": ("bench/mine_million.py", r"1,000,000 (?:dense )?[\d,]+ s, (?:peak )?([\d,]+) MB"),
    "train_mb": ("bench/train_memory.py", r"100,000 records \(.*?\):? ([\d,]+) MB"),
}
HOW = (
    "Up to 1,000 passages and 200 training queries a language of {data}, whose passages are cut at about "
    "1,650 characters and stand near some question; Thai is not among them and counts as the mean of the "
    "others. Passages are cut at 256 tokens, queries at 64, as in Sec. 4.1; judge: instructions, "
    "question, reference and candidate. The tokenizer has 32,000 pieces and is trained on these passages "
    "by `sample/make_encoder.py`; XLM-R's and Llama's will count differently, Llama's most where it knows "
    "a script badly."
)


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
        match = re.search(pattern, (ROOT / path).read_text("utf-8"))
        if not match:
            raise DataError(
                f"{path}: its docstring does not say {name} (wanted {pattern!r}); correct QUOTED in "
                "bench/measure_rates.py"
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

    from common import corpus_languages, dump

    langs = [lang for lang in corpus_languages(data) if lang in MIRACL]
    passages = make_encoder.read_corpus(data, langs, 1000, 13)
    tokeniser = make_encoder.train_tokeniser(passages, 32_000, 13)
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokeniser, **special).save_pretrained(folder)

    def n_tokens(*texts):
        return sum(len(tokeniser.encode(text, add_special_tokens=False).ids) for text in texts)

    generate = load_stage("03_generate_negatives")
    counted, sizes, lengths = {}, {}, []
    for lang, of_lang in passages.items():
        counts = count_tokens(data, lang, of_lang, n_tokens, generate.SUMMARISE)
        for name, values in counts.items():
            counted.setdefault(name, {})[lang] = round(sum(values) / len(values), 1)
        lengths += counts["passage"][:50]
        sizes[lang] = round(sum(len(dump(p).encode()) for p in of_lang) / len(of_lang), 1)
    texts = [dump(p) for of_lang in passages.values() for p in of_lang]
    blob = "".join(texts).encode()
    seconds = cpu_seconds(lambda: tokeniser.encode_batch_fast(texts)) / os.cpu_count()
    averages = {
        "tokens": counted,
        "ask": 10 + n_tokens(generate.ASK),
        "bytes": sizes,
        "how": HOW.format(data=Path(data).name),
    }
    return (
        averages,
        lengths,
        {
            "gzip_share": (len(zlib.compress(blob)) / len(blob), "size of a packed corpus over the unpacked"),
            "tokenise_tokens_per_s": (n_tokens(*texts) / seconds, "that tokenizer on both cores"),
        },
    )


def count_tokens(data, lang, passages, n_tokens, summarise):
    """{what: [tokens]} of a language's passages, queries and prompts; 10 are the chat template's own."""
    from common import passage_text, read_queries
    from llm import judge_messages, labelled

    counts = {
        "passage": [min(256, n_tokens(passage_text(p)) + 2) for p in passages],
        "query": [],
        "judge": [],
        "judge, shared": [],
        "summarise": [],
    }
    for record, candidate in zip(read_queries(f"{data}/train.jsonl", [lang]), passages[:200]):
        reference = record["positive_passages"][0]
        system, user = (m["content"] for m in judge_messages(record["query"], lang, candidate, reference))
        asked = labelled(Question=record["query"], Passage=passage_text(reference))
        counts["query"].append(min(64, n_tokens(record["query"]) + 2))
        counts["judge"].append(10 + n_tokens(system, user))
        counts["judge, shared"].append(10 + n_tokens(system, user.split("\nCandidate passage:")[0]))
        counts["summarise"].append(10 + n_tokens(summarise, asked))
    return counts


def make_xlmr(folder, layers, width):
    """An XLM-R of this shape with random weights and a word-level tokenizer of 2,000 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel
    words = {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *(f"w{n}" for n in range(2000))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)
    config = XLMRobertaConfig(vocab_size=250_002, hidden_size=width, num_hidden_layers=layers,
                              num_attention_heads=max(1, width // 64), intermediate_size=4 * width,
                              max_position_embeddings=514, type_vocab_size=1, pad_token_id=1)
    XLMRobertaModel(config).save_pretrained(folder)


def measure_encoder(folder, lengths):
    """{rate: (value, how)} of an XLM-R large with random weights; the step is plain torch, as 05's is."""
    import numpy as np
    import torch

    from encoder import Encoder

    make_xlmr(folder, LAYERS, WIDTH)
    encoder = Encoder(str(folder), "cpu")
    texts = [" ".join(["w1"] * (n - 2)) for n in np.random.default_rng(13).choice(lengths, 24)]
    encoder.encode(texts[:1], "passage")  # loads the model
    n_encoded = sum(map(len, encoder.tokenize(texts, "passage")))
    encode_s = cpu_seconds(lambda: encoder.encode(texts, "passage")) / os.cpu_count()
    query = encoder.tokenize(["w1 " * 16], "query")
    passages = encoder.tokenize(texts[: 1 + NEGATIVES], "passage")
    encoder.model.train()

    def step():
        scores = encoder.forward(query, "query") @ encoder.forward(passages, "passage").T / 0.02  # (1, 8)
        torch.nn.functional.cross_entropy(scores, torch.zeros(1, dtype=torch.long)).backward()

    train_s = cpu_seconds(step) / os.cpu_count()
    return {
        "encode_tokens_per_s": (
            n_encoded / encode_s,
            f"`Encoder.encode`, {LAYERS} x {WIDTH:,}, random weights, real lengths",
        ),
        "train_tokens_per_s": (
            sum(map(len, query + passages)) / train_s,
            "`Encoder.forward` and backward at that shape, fp32: one query, "
            f"{1 + NEGATIVES} passages; without the optimiser",
        ),
    }


def measure_search():
    """{rate: (value, how)} of exact search and, for comparison, of matrix products."""
    import faiss
    import numpy as np
    import torch

    draw = np.random.default_rng(13)
    queries = draw.standard_normal((N_QUERIES, WIDTH), np.float32)
    blocks = [draw.standard_normal((SHARD, WIDTH), np.float32) for _ in range(4)]

    def search(block):
        faiss.knn(queries, block, 80, metric=faiss.METRIC_INNER_PRODUCT)

    search(blocks[0])
    seconds = cpu_seconds(lambda: [search(block) for block in blocks[1:]]) / os.cpu_count()
    rates = {
        "search_pairs_per_s": (
            3 * N_QUERIES * SHARD / seconds,
            f"`faiss.knn`, top 80 of {N_QUERIES:,} queries over blocks of {SHARD:,} x "
            f"{WIDTH:,} float32; queries x passages x encoders",
        )
    }
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.ones(1024, 1024, dtype=dtype)
        a @ a
        seconds = cpu_seconds(lambda: [a @ a for _ in range(20)]) / os.cpu_count()
        flop = 20 * 2 * 1024**3
        rates[f"{name}_tflop_per_s"] = flop / seconds / 1e12, "products of 1,024 x 1,024, for comparison"
    return rates


def measure_bm25(data, folder, stride):
    """In a process of its own: prints passages, seconds, peak bytes, index bytes, seconds a query of BM25."""
    from common import corpus_languages, read_queries, read_shards
    from search import Ensemble

    one, n = Path(folder) / stride, 0
    (one / "corpus").mkdir(parents=True)
    with open(one / "corpus/en.jsonl", "wb") as file:  # all languages as one
        for lang in corpus_languages(data):
            for _, shard in read_shards(data, lang):
                for _, line in shard[:: int(stride)]:
                    file.write(line.replace(b'"docid": "', f'"docid": "{lang}'.encode(), 1))
                    n += 1
    ensemble = Ensemble(["bm25"], one, one / "cache", bm25_tokenizer=f"{folder}/bpe")
    queries = [q["query"] for q in read_queries(f"{data}/dev.jsonl")][:100]
    made = cpu_seconds(lambda: ensemble.search("en", queries[:1], 100))
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # ru_maxrss starts at the parent's
    searched = cpu_seconds(lambda: ensemble.search("en", queries, 100)) / len(queries)
    stored = sum(f.stat().st_size for f in (one / "cache/bm25").rglob("*.npy"))
    print(json.dumps([n, made, peak, stored, searched]))


def measure(data):
    """The content of results/rates.json."""
    import torch

    rates = quoted()
    with tempfile.TemporaryDirectory() as folder:
        averages, lengths, counted = measure_averages(data, f"{folder}/bpe")
        found = []
        for stride in ("4", "1"):
            command = [sys.executable, __file__, "--data", data, "--bm25", folder, stride]
            found.append(
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            )
        rates |= counted | measure_encoder(Path(folder) / "xlmr", lengths) | measure_search()
    small, large = found
    n = large[0] - small[0]
    how = (
        f"reading, checking and indexing {large[0]:,} passages of all languages as one corpus, less a "
        "quarter of it"
    )
    names = ("bm25_s_per_passage", "bm25_memory_bytes_per_passage", "bm25_disk_bytes_per_passage")
    for i, name in enumerate(names, 1):
        rates[name] = (large[i] - small[i]) / n, how
    rates["bm25_s_per_pair"] = large[4] / large[0], "100 queries there, queries x passages"
    cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    name = (re.findall(r"model name\s*: (.*)", cpuinfo) or ["an unknown processor"])[0]
    bf16 = " with avx512_bf16" if "avx512_bf16" in cpuinfo else ""
    return {
        "machine": f"{os.cpu_count()} cores of {name}{bf16}, torch {torch.__version__}",
        "averages": averages,
        "rates": {key: [float(f"{value:.4g}"), how] for key, (value, how) in rates.items()},
    }


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.bm25:
        measure_bm25(args.data, *args.bm25)
        return
    text = json.dumps(measure(args.data), indent=1)
    (ROOT / "results/rates.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    run(main)
