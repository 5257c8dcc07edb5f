"""Peak memory of stage 02 over 1,000,000 candidates: streamed, answered, and streamed again from the cache.

    python bench/judge_memory.py [--candidates 1000000] [--asked 20000 60000]

First runs of --asked candidates over a real server (offline_llm.py), to see that asking does not grow with their number; then
--candidates whose answers are stored in the cache as they are asked for (no server: at 1,000 calls/s it would take 17 minutes),
and the whole stage over them with every answer cached. Each run is a process of its own.

Measured on two cores (AMD EPYC) shared with other work, load 8: the times are upper bounds, the peaks are not affected.
  asked       10000 candidates:    55.8 s, peak 70 MB
  asked       30000 candidates:   115.9 s, peak 73 MB
  stored    1000000 candidates:   122.2 s, peak 164 MB
  hits      1000000 candidates:   305.3 s, peak 198 MB
"""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
N_CANDIDATES = 40


def write_input(path, n):
    text = "The city lies on the river and has been the seat of the government since nineteen hundred and five. " * 4
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n // N_CANDIDATES):
            file.write(json.dumps({"query_id": f"q{i}", "lang": "en", "query": f"Which city is the capital number {i}?",
                                   "positive_passages": [{"docid": f"p{i}", "title": "", "text": f"It is Dodoma {i}."}], "negative_passages": [],
                                   "candidate_passages": [{"docid": f"{i}#{j}", "title": "T", "text": f"{i} {j} {text}"}
                                                          for j in range(N_CANDIDATES)]}) + "\n")


def child(kind, folder):
    from conftest import load_stage
    stage = load_stage("02_filter_false_negatives")
    argv = ["--input", f"{folder}/in.jsonl", "--llm", "m", "--cache", f"{folder}/cache-{kind}", "--out", f"{folder}/out.jsonl", "--overwrite"]
    start = time.time()
    if kind == "stored":
        args = stage.build_parser().parse_args([*argv[:5], f"{folder}/cache-hits", *argv[6:]])

        def instead(llm, key, body):
            llm.store(key, '{"accuracy": 0, "completeness": 1}')
            return "stored"
        for _ in stage.filtered(stage.clients(args, instead), args, {}):
            pass
    else:
        stage.main(argv)
    print(json.dumps([time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--asked", type=int, nargs="*", default=[20_000, 60_000])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    for kind, n in [("asked", n) for n in args.asked] + [("stored", args.candidates), ("hits", args.candidates)]:
        if kind != "hits":
            folder = tempfile.TemporaryDirectory()
            write_input(f"{folder.name}/in.jsonl", n)
        command = [sys.executable, __file__, "--child", kind, folder.name]
        server = [sys.executable, str(ROOT / "offline_llm.py"), "--exec"] if kind == "asked" else ["env", "OPENAI_BASE_URL=http://127.0.0.1:9/v1"]
        done = subprocess.run([*server, *command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        seconds, mb = json.loads(done.stdout.splitlines()[-1])
        print(f"{kind:<7} {n:>9} candidates: {seconds:7.1f} s, peak {mb} MB", flush=True)


if __name__ == "__main__":
    main()
