"""5,000 judgments against a server with 30% bad replies, then with ten kills: nothing lost or changed.

    python bench/judge_faults.py [--judgments 5000] [--kills 10] [--stall 30] [--timeout 10]

The server (tests/faulty_server.py, its own process) mixes 429 with and without Retry-After, 500, 503, dropped
connections, 30-second stalls, truncated JSON, prose, wrong types, out-of-range grades, empty and refused
answers, broken bodies. Prints seconds, what came back, and whether the output is that of a clean server, byte
for byte. Kills are SIGKILL at random moments, while a second copy works on the same cache.

Measured with --judgments 2000 --kills 4 --stall 8 --timeout 4 on two cores shared with other work, load 9:
  clean:   3.7 s; 2000 judgments stored
  faulty: 26.9 s; 2000 judgments stored; same output as clean
  killed: 43.0 s, 4 kills (so at most 256 repeats); 2000 stored; 61 answers repeated; same output as clean
"""
import argparse
import contextlib
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
N_CANDIDATES = 40
TEXT = "ข้อความ text 텍스트 "


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judgments", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--stall", type=float, default=30, help="seconds of a stall")
    parser.add_argument("--timeout", type=float, default=10, help="stage 02's --timeout")
    parser.add_argument("--concurrency", type=int, default=64)
    return parser


def write_input(path, n_judgments):
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n_judgments // N_CANDIDATES):
            candidates = [{"docid": f"{i}#{j}", "title": "หัวเรื่อง", "text": f"{i} {j} {TEXT * 10}"}
                          for j in range(N_CANDIDATES)]
            record = {"query_id": f"q{i}", "lang": "th", "query": f"อะไร {i}?", "negative_passages": [],
                      "positive_passages": [{"docid": f"p{i}", "text": f"yes {i}"}],
                      "candidate_passages": candidates}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def serve(top, name, flags):
    """(the server's process, its base URL)."""
    process = subprocess.Popen([sys.executable, ROOT / "tests/faulty_server.py", "--port-file", top / name,
                                "--log", top / f"{name}.log", *flags])
    while not (top / name).exists():
        time.sleep(0.05)
    return process, (top / name).read_text()


def filter_and_kill(args, top, name, url, moments):
    """Run stage 02 to its end, killed each time that so many answers were sent; the number of kills."""
    command = [sys.executable, ROOT / "02_filter_false_negatives.py", "--input", top / "in.jsonl",
               "--llm", "judge", "--base-url", url, "--cache", top / f"{name}.cache",
               "--out", top / f"{name}.jsonl",
               "--concurrency", str(args.concurrency), "--timeout", str(args.timeout)]
    n_kills = 0
    if moments:  # a second copy on the same cache, never killed
        beside = subprocess.Popen([*command, "--out", top / "beside.jsonl"], stderr=subprocess.DEVNULL)
    for moment in moments:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and len((top / f"{name}.log").read_text().split()) < moment:
            time.sleep(0.002)
        n_kills += process.poll() is None
        process.kill()
        process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    if moments:
        assert beside.wait() == 0
        assert (top / "beside.jsonl").read_bytes() == (top / f"{name}.jsonl").read_bytes()
    return n_kills


def main():
    args = build_parser().parse_args()
    faults = ["--faults", "0.3", "--stall", str(args.stall)]
    draw = random.Random(13)
    moments = sorted(draw.sample(range(1, int(0.9 * args.judgments)), args.kills))
    runs = (("clean", ["--faults", "0"], []), ("faulty", faults, []),
            ("killed", [*faults, "--delay", "0.05"], moments))
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        write_input(top / "in.jsonl", args.judgments)
        for name, flags, moments in runs:
            server, url = serve(top, name, flags)
            start = time.time()
            try:
                n_kills = filter_and_kill(args, top, name, url, moments)
            finally:
                server.terminate()
            seconds = time.time() - start
            sent = Counter((top / f"{name}.log").read_text().split())
            with contextlib.closing(sqlite3.connect(top / f"{name}.cache/llm/judge.sqlite")) as db:
                (n_stored,) = db.execute("SELECT count(*) FROM answers").fetchone()
            same = (top / f"{name}.jsonl").read_bytes() == (top / "clean.jsonl").read_bytes()
            print(f"{name}: {seconds:.1f} s, {n_kills} kills (at most {n_kills * args.concurrency} repeats); "
                  f"{n_stored} judgments stored; good answers sent {sent.total()}, repeated "
                  f"{sent.total() - len(sent)}; same output as clean: {same}", flush=True)


if __name__ == "__main__":
    main()
