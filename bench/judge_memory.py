"""Peak memory of stage 02 over 1,000,000 candidates: streamed, answered, and streamed again from the cache.

    python bench/judge_memory.py [--candidates 1000000] [--asked 20000 60000]

First runs of --asked candidates over a real server (offline_llm.py), to see that asking does not grow with
their number; then --candidates whose answers are stored as they are asked for (no server: at 1,000 calls/s it
would take 17 minutes), and the whole stage over them with every answer stored. Each run is its own process.

Measured with --asked 10000 on two cores (AMD EPYC) shared with other work:
  asked       10000 candidates:     7.6 s, peak 71 MB
  stored    1000000 candidates:    80.9 s, peak 33 MB
  hits      1000000 candidates:    70.7 s, peak 70 MB
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
N_CANDIDATES = 40
TEXT = "The city lies on the river and has been the seat of the government since nineteen hundred and five. "


def write_input(path, n):
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n // N_CANDIDATES):
            candidates = [{"docid": f"{i}#{j}", "title": "T", "text": f"{i} {j} {TEXT * 4}"}
                          for j in range(N_CANDIDATES)]
            record = {"query_id": f"q{i}", "lang": "en", "query": f"Which city is the capital number {i}?",
                      "positive_passages": [{"docid": f"p{i}", "title": "", "text": f"It is Dodoma {i}."}],
                      "negative_passages": [], "candidate_passages": candidates}
            file.write(json.dumps(record) + "\n")


def store(llm, key, body):
    llm.answers.store(key, '{"accuracy": 0, "completeness": 1}')
    return "stored"


def child(kind, folder):
    """One run, in a process of its own: prints its seconds and peak."""
    from conftest import load_stage

    from common import peak_mb
    stage = load_stage("02_filter_false_negatives")
    argv = ["--input", f"{folder}/in.jsonl", "--llm", "m", "--cache", f"{folder}/cache",
            "--out", f"{folder}/out.jsonl", "--overwrite"]
    start = time.time()
    if kind == "stored":
        args = stage.build_parser().parse_args(argv)
        for _ in stage.filtered(stage.clients(args, store), args):
            pass
    else:
        stage.main(argv)
    print(json.dumps([time.time() - start, peak_mb()]))


def measure(kind, n, folder):
    command = [sys.executable, __file__, "--child", kind, folder]
    server = ["env", "OPENAI_BASE_URL=http://127.0.0.1:9/v1"]
    if kind == "asked":
        server = [sys.executable, str(ROOT / "offline_llm.py"), "--exec"]
    done = subprocess.run([*server, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    seconds, mb = json.loads(done.stdout.splitlines()[-1])
    print(f"{kind:<7} {n:>9} candidates: {seconds:7.1f} s, peak {mb} MB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--asked", type=int, nargs="*", default=[20_000, 60_000])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    for n in args.asked:
        with tempfile.TemporaryDirectory() as folder:
            write_input(f"{folder}/in.jsonl", n)
            measure("asked", n, folder)
    with tempfile.TemporaryDirectory() as folder:
        write_input(f"{folder}/in.jsonl", args.candidates)
        measure("stored", args.candidates, folder)
        measure("hits", args.candidates, folder)


if __name__ == "__main__":
    main()
