"""Training speed of stage 05 at a model's full shape with random weights.

Prints queries/s, peak memory and the share of the bf16 product rate.
python bench/train_speed.py --device cuda      XLM-R large: 24 layers x 1,024; 64/256 tokens, batch 24, 1 + 7
python bench/train_speed.py --device cuda --chunk-tokens 16384 --batch-size 192
python bench/train_speed.py --device cpu --layers 2 --width 128 --steps 4      where there is no GPU
Figures: not run on a GPU yet (none was at hand).
"""
import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent


def make_encoder(folder, layers, width):
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
    model = XLMRobertaModel(config)
    model.save_pretrained(folder)
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith("encoder."))


def make_queries(path, n=960):
    draw = random.Random(13)

    def text(length):
        return " ".join(f"w{draw.randrange(2000)}" for _ in range(length))

    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            passages = [{"docid": f"{i}-{j}", "title": "", "text": text(256)} for j in range(8)]
            file.write(json.dumps({"query_id": str(i), "lang": "sw", "topic": i % 12, "query": text(64),
                                   "positive_passages": passages[:1],
                                   "negative_passages": passages[1:]}) + "\n")


def product_rate(device):
    """Measured bf16 matrix products, in operations a second."""
    import torch
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for repeat in range(30):
        if repeat == 10:
            wait()
            started = time.perf_counter()
        a @ b
    wait()
    return 20 * 2 * n ** 3 / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--chunk-tokens")
    parser.add_argument("--work", type=Path, default=Path("runs/speed"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    n_parameters = make_encoder(args.work / "encoder", args.layers, args.width)
    make_queries(args.work / "topics.jsonl")
    chunks = ["--chunk-tokens", args.chunk_tokens] if args.chunk_tokens else []
    subprocess.run([sys.executable, ROOT / "05_train.py", "--input", args.work / "topics.jsonl",
                    "--encoder", args.work / "encoder", "--device", args.device,
                    "--batch-size", str(args.batch_size), "--max-steps", str(args.steps), "--dev-share", "0",
                    "--overwrite", *chunks, "--out", args.work / "model"], check=True)
    log = (args.work / "model/train_log.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in log.splitlines()]
    tokens_per_s = median(line["tokens_per_s"] for line in lines[args.steps // 3:] if "loss" in line)
    meta = json.loads((args.work / "model.meta.json").read_text("utf-8"))
    rate = product_rate(args.device)
    # forward and backward take six operations a weight and token; attention's own products are left out
    share = 6 * n_parameters * tokens_per_s / rate
    queries_per_s = tokens_per_s / (64 + 8 * 256)
    print(f"{args.layers} x {args.width}, batch {args.batch_size}: {queries_per_s:.1f} queries/s, "
          f"{tokens_per_s:.0f} tokens/s, peak {meta['counts']['peak_gpu_mb'] or meta['peak_memory_mb']} MB, "
          f"{share:.0%} of {rate / 1e12:.3g} bf16 TFLOP/s")


if __name__ == "__main__":
    main()
