"""Stage 01 on 250,000 and on 1,000,000 passages of one language: seconds and peak memory.

How     invented passages (sample/make_sample.py --scale), 1,000 queries, depth 40, a BERT without layers
        (384 wide) made on the spot; each run is a process of its own, its peak resident memory (of the whole
        process, libraries and mapped pages included) from its .meta.json. "again" is a second run with
        another depth and strategy.
Usage   python bench/mine_million.py --work runs/million [--sizes 250000 1000000] [--retrievers KIND]
Disk    about 1.2 GB under --work; remove it afterwards
Measured  2 cores (AMD EPYC): 250,000 dense 47 s, peak 766 MB, again 14 s, 584 MB;
        1,000,000 dense 149 s, 753 MB, again 61 s, 585 MB. The peak does not grow from one to the other
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def call(*command):
    subprocess.run([sys.executable, *map(str, command)], check=True, stderr=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[250_000, 1_000_000])
    parser.add_argument("--retrievers", choices=["dense", "bm25", "both"], default="dense")
    args = parser.parse_args()
    encoder, rows = args.work / "encoder", []
    for size in args.sizes:
        data = args.work / str(size)
        if not (data / "train.jsonl").is_file():
            call(ROOT / "sample/make_sample.py", "--scale", size, "--lang", "en", "--out", data)
        if not encoder.is_dir():
            call(
                ROOT / "sample/make_encoder.py",
                "--data",
                data,
                "--out",
                encoder,
                "--steps",
                0,
                "--width",
                384,
                "--vocab",
                8000,
            )
        retrievers = {"dense": [encoder], "bm25": ["bm25"], "both": ["bm25", encoder]}[args.retrievers]
        common = [
            "--data",
            data,
            "--retrievers",
            *retrievers,
            "--fusion",
            "rrf" if args.retrievers == "both" else "concat",
            "--bm25-tokenizer",
            encoder,
            "--cache",
            data / "cache",
        ]
        strategy = "margin" if args.retrievers == "dense" else "shifted"
        for run, flags in (("first", ["--depth", 40]), ("again", ["--depth", 30, "--strategy", strategy])):
            out = data / f"{args.retrievers}.{run}.jsonl"
            call(ROOT / "01_mine_candidates.py", *common, *flags, "--out", out, "--overwrite")
            meta = json.loads(Path(f"{out}.meta.json").read_text("utf-8"))
            rows.append((size, run, meta["seconds"], meta["peak_memory_mb"]))
            print(
                f"{size:>9} passages, {args.retrievers}, {run}: {meta['seconds']:7.1f} s, "
                f"peak {meta['peak_memory_mb']} MB",
                flush=True,
            )
    peaks = {size: max(mb for s, _, _, mb in rows if s == size) for size in args.sizes}
    print(
        f"peak memory, {args.sizes[-1]} over {args.sizes[0]} passages: "
        f"{peaks[args.sizes[-1]] / peaks[args.sizes[0]]:.3f}"
    )


if __name__ == "__main__":
    main()
