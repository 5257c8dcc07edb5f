"""Peak memory of stage 05 over a training file of N records: it must not grow with the texts.

python bench/train_memory.py --records 1000000 --encoder models/sample
Writes a file of stand-in records (16 languages, 12 topics, eight negatives), trains 20 steps on it, prints
the stage's own figures, and does the same with a tenth of the records for comparison.
Figures (two cores, encoder of 16M parameters): 100,000 records (0.27 GB) 988 MB; 1,000,000 records
(2.73 GB) 1,364 MB, 100 s.
"""
import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LANGS = "ar bn en es fa fi fr hi id ja ko ru sw te th zh".split()


def write(path, n_records):
    draw = random.Random(13)
    words = "bahari mlima mto kitabu samaki jiji ndege jua mwezi nyota barabara daraja shule mti ua".split()
    texts = [" ".join(draw.choices(words, k=40)) for _ in range(1000)]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n_records):
            passages = [{"docid": f"{i}-{j}", "title": words[j], "text": texts[(i * 7 + j) % 1000]}
                        for j in range(9)]
            file.write(json.dumps({"query_id": str(i), "lang": LANGS[i % 16],
                                   "query": f"{texts[i % 1000][:60]} {i}", "positive_passages": passages[:1],
                                   "negative_passages": passages[1:], "topic": i % 12}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/memory"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for n in (args.records // 10, args.records):
        path = args.work / "topics.jsonl"
        write(path, n)
        started = time.time()
        subprocess.run([sys.executable, ROOT / "05_train.py", "--input", path, "--encoder", args.encoder,
                        "--max-steps", "20", "--dev-share", "0.01", "--overwrite",
                        "--out", args.work / "model"],
                       check=True, capture_output=True)
        meta = json.loads((args.work / "model.meta.json").read_text("utf-8"))
        print(f"{n} records, {path.stat().st_size / 1e9:.2f} GB: peak {meta['peak_memory_mb']} MB, "
              f"{time.time() - started:.0f} s", flush=True)
        path.unlink()


if __name__ == "__main__":
    main()
