"""How fast the encoder is, beside sentence-transformers' own encode and another checkout of this project.

What    passages of all languages in mixed order, in fp32 on the CPU; each side in a process of its own,
        in turn, timed once the model is loaded and warm. The smallest cosine shows that all do the same work.
Usage   python bench/encode_speed.py --data data/sample [--encoder FOLDER] [--other CHECKOUT] [--rounds 3]
"""
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def make_encoder(folder, texts):
    """6 layers x 384 with random weights, and a BPE vocabulary of these texts."""
    from tokenizers import SentencePieceBPETokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    tokenizer = SentencePieceBPETokenizer()
    tokenizer.train_from_iterator(texts, 30_000, show_progress=False, special_tokens=["<pad>", "<unk>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token="<pad>", unk_token="<unk>",
                            model_max_length=512).save_pretrained(folder)
    BertModel(BertConfig(vocab_size=30_000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                         intermediate_size=1536)).save_pretrained(folder)


def time_one(checkout, folder, work):
    """Encode in this process, without a checkout by sentence-transformers; prints seconds and peak MB."""
    texts = json.loads(Path(work, "texts.json").read_text("utf-8"))
    if checkout:
        sys.path.insert(0, checkout)
        from encoder import Encoder
        encoder = Encoder(folder, "cpu")
    else:
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": "float32"})
        model.max_seq_length = 256

    def encode(some):
        return encoder.encode(some, "passage") if checkout else model.encode_document(some)

    encode(texts[:50])
    cpu, wall = time.process_time(), time.perf_counter()
    vectors = encode(texts)
    seconds = [time.process_time() - cpu, time.perf_counter() - wall]
    np.save(Path(work, "vectors.npy"), vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    print(json.dumps([*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def main(argv=None):
    sys.path.insert(0, str(ROOT))
    from common import Parser, corpus_languages, passage_text, positive_int, read_passages, read_shards
    parser = Parser(__doc__)
    parser.add_argument("--data", default="data/sample", metavar="FOLDER", help="from 00_prepare_data.py")
    parser.add_argument("--encoder", metavar="FOLDER", help="default: random weights, made on the spot")
    parser.add_argument("--other", metavar="FOLDER", help="another checkout of this project")
    parser.add_argument("--passages", type=positive_int, default=600, help="drawn from all languages")
    parser.add_argument("--rounds", type=positive_int, default=3, help="of each side; the median is shown")
    args = parser.parse_args(argv)
    shards = [shard for lang in corpus_languages(args.data) for shard in read_shards(args.data, lang)]
    texts = [passage_text(passage) for path, lines in shards for passage in read_passages(path, lines)]
    texts = random.Random(13).sample(texts, min(args.passages, len(texts)))
    sides = {"this checkout": ROOT, "sentence-transformers": "", "other checkout": args.other}
    rounds, vectors = {name: [] for name, checkout in sides.items() if checkout is not None}, {}
    with tempfile.TemporaryDirectory() as work:
        Path(work, "texts.json").write_text(json.dumps(texts), "utf-8")
        if not args.encoder:
            make_encoder(work, texts)
        for _ in range(args.rounds):
            for name in rounds:
                command = [sys.executable, __file__, "--one", sides[name], args.encoder or work, work]
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                rounds[name].append(json.loads(run.stdout))
                vectors[name] = np.load(f"{work}/vectors.npy")
    for name, found in rounds.items():
        cpu, wall, peak = np.median(found, axis=0)
        cosine = (vectors[name] * vectors["sentence-transformers"]).sum(1).min()
        print(f"{name:<22} {len(texts)} passages: CPU {cpu:.1f} s, wall {wall:.1f} s, peak {peak:.0f} MB, "
              f"smallest cosine to sentence-transformers {cosine:.6f}")


if __name__ == "__main__":
    time_one(*sys.argv[2:]) if sys.argv[1:2] == ["--one"] else main()
