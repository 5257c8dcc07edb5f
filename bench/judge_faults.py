"""5,000 judgments against a server with 30% bad replies, then the same with ten kills: nothing lost, doubled or changed.

    python bench/judge_faults.py [--judgments 5000] [--kills 10] [--stall 30] [--timeout 10]

The server (tests/faulty_server.py, a process of its own) mixes 429 with and without Retry-After, 500, 503, dropped connections,
30-second stalls, truncated JSON, prose, wrong types, out-of-range grades, empty and refused answers, broken bodies. Prints seconds,
what came back, and whether the output is that of a clean server, byte for byte. Kills are SIGKILL at random moments.

Measured on two cores shared with other work, load 8:
  clean:  71.5 s; 5000 judgments cached, 0 doubled
  faulty: 140.2 s; 5000 judgments cached, 0 doubled; same output as clean
  killed: 172.0 s, 10 kills (so at most 640 repeats); 5000 judgments cached, 0 doubled; 214 answers repeated; same output as clean
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
N_CANDIDATES = 40


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--judgments", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--stall", type=float, default=30, help="seconds of a stall")
    parser.add_argument("--timeout", type=float, default=10, help="stage 02's --timeout")
    parser.add_argument("--concurrency", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        with open(top / "in.jsonl", "w", encoding="utf-8") as file:
            for i in range(args.judgments // N_CANDIDATES):
                candidates = [{"docid": f"{i}#{j}", "title": "หัวเรื่อง", "text": f"{i} {j} " + "ข้อความ text 텍스트 " * 10} for j in range(N_CANDIDATES)]
                file.write(json.dumps({"query_id": f"q{i}", "lang": "th", "query": f"อะไร {i}?", "positive_passages": [{"docid": "p", "text": f"yes {i}"}],
                                       "negative_passages": [], "candidate_passages": candidates}, ensure_ascii=False) + "\n")

        def serve(name, *flags):
            process = subprocess.Popen([sys.executable, ROOT / "tests/faulty_server.py", "--port-file", top / name, "--log", top / f"{name}.log", *flags])
            while not (top / name).exists():
                time.sleep(0.05)
            return process, (top / name).read_text()

        def command(url, name):
            return list(map(str, [sys.executable, ROOT / "02_filter_false_negatives.py", "--input", top / "in.jsonl", "--llm", "judge", "--base-url", url,
                                  "--cache", top / f"{name}.cache", "--out", top / f"{name}.jsonl", "--concurrency", args.concurrency,
                                  "--timeout", args.timeout]))

        def told(name):
            answers = Counter((top / f"{name}.log").read_text().split())
            keys = [json.loads(line)["key"] for line in open(top / f"{name}.cache/llm/judge.jsonl", encoding="utf-8")]
            same = (top / f"{name}.jsonl").read_bytes() == (top / "clean.jsonl").read_bytes()
            print(f"{name}: {len(set(keys))} judgments cached, {len(keys) - len(set(keys))} doubled; good answers sent {answers.total()}, "
                  f"repeated {answers.total() - len(answers)}; same output as clean: {same}", flush=True)
        faults = ["--faults", "0.3", "--stall", str(args.stall)]
        for name, flags in (("clean", ["--faults", "0"]), ("faulty", faults), ("killed", [*faults, "--delay", "0.05"])):
            server, url = serve(name, *flags)
            start, kills = time.time(), 0
            try:
                draw = random.Random(13)
                moments = sorted(draw.sample(range(1, int(0.9 * args.judgments)), args.kills)) if name == "killed" else []
                for moment in moments:
                    process = subprocess.Popen(command(url, name), stderr=subprocess.DEVNULL)
                    while process.poll() is None and len((top / f"{name}.log").read_bytes()) < 17 * moment:
                        time.sleep(0.002)
                    kills += process.poll() is None
                    process.kill()
                    process.wait()
                subprocess.run(command(url, name), check=True, stderr=subprocess.DEVNULL)
            finally:
                server.terminate()
            print(f"{name}: {time.time() - start:.1f} s, {kills} kills (so at most {kills * args.concurrency} repeats)")
            told(name)


if __name__ == "__main__":
    main()
