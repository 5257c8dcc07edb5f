"""Faults over the whole pipeline on a cut of the sample: whatever happens to a stage, the same command then
ends with the files of an undisturbed run. A short part runs here; `make soak SECONDS=3600` draws at random.
"""

import argparse
import errno
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LANGS = ["sw", "th"]
JUMPING_CLOCK = """
import random, time
now = time.time
time.time = lambda: now() + random.choice([-1e7, 0, 1e7])
"""

# --------------------------------------------------------------------------- the pipeline


def commands(top):
    """{stage: (its arguments, what it writes in top)}, in order."""
    data, model, cache, run = top / "data", top / "encoder", top / "cache", top / "run"
    ensemble = ["--data", data, "--retrievers", "bm25", model, "--fusion", "rrf", "--cache", cache]
    judge = ["--llm", "offline-stand-in", "--cache", cache]
    rows = {
        "00_prepare_data": (["--source", "sample", "--lang", *LANGS, "--limit", 6, "--out", data], "data"),
        "sample/make_encoder": (["--data", data, "--steps", 20, "--out", model], "encoder"),
        "01_mine_candidates": ([*ensemble, "--depth", 8], "run/candidates.jsonl"),
        "02_filter_false_negatives": (["--input", run / "candidates.jsonl", *judge], "run/filtered.jsonl"),
        "03_generate_negatives": (
            ["--input", run / "filtered.jsonl", *ensemble, *judge[:2], "--target", 9],
            "run/augmented.jsonl",
        ),
        "04_cluster_topics": (
            ["--input", run / "augmented.jsonl", "--encoder", model, "--topics", 3, "--cache", cache],
            "run/topics.jsonl",
        ),
        "05_train": (
            ["--input", run / "topics.jsonl", "--encoder", model, "--epochs", 3, "--batch-size", 4]
            + ["--dev-share", 0.2, "--passage-max-len", 64],
            "run/model",
        ),
        "05a_export": (["--input", run / "topics.jsonl", "--layout", "tevatron"], "run/export"),
        "06_eval": (["--data", data, "--models", "bm25", run / "model", "--cache", cache], "run/eval"),
        "06a_report": (["--run", run], "run/eval"),
    }
    for arguments, out in rows.values():
        if "--out" not in arguments:
            arguments += ["--out", top / out]
    return rows


def start(stage, top, url, **options):
    arguments, _ = commands(top)[stage]
    env = os.environ | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "", "OMP_NUM_THREADS": "1"}
    env |= options.pop("env", {})
    argv = [*options.pop("prefix", []), sys.executable, ROOT / f"{stage}.py", *arguments]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, argv)), env=env, start_new_session=True, **pipes, **options)


def end(process, status, words=""):
    """Its stderr, once it has ended with one of these statuses, these words, and no traceback."""
    told = process.communicate(timeout=300)[1]
    assert process.returncode in status, f"{process.returncode}: {told[-1500:]}"
    if process.returncode >= 0:  # else a signal ended it before any of our code ran
        assert "Traceback" not in told and (words in told or process.returncode == 0), told[-1500:]
    return told


def content(path):
    """{name: bytes} of a file, or of a folder without what tells times."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    timed = (".meta.json", ".png", ".md", "build.json", "train_log.jsonl")
    files = [p for p in files if not p.name.endswith(timed)]
    return {p.relative_to(path.parent).as_posix(): p.read_bytes() for p in files}


class Server:
    """offline_llm.py on a port that stays its own when it dies and comes back."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self):
        argv = [sys.executable, str(ROOT / "offline_llm.py"), "--port", str(self.port)]
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while self.process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError("offline_llm.py did not start")

    def stop(self):
        self.process.kill()
        self.process.wait()


class Pipeline:
    """An undisturbed run, with a copy of the folder from before each stage."""

    def __init__(self, top, url):
        self.top = top / "work"  # always here: paths stand in no output, but are arguments
        self.before = top / "before"
        self.url = url
        self.seconds = {}
        self.results = {}
        self.top.mkdir()
        for stage, (_, out) in commands(self.top).items():
            shutil.copytree(self.top, self.before / stage)
            started = time.monotonic()
            end(start(stage, self.top, url), [0])
            self.seconds[stage] = time.monotonic() - started
            self.results[stage] = content(self.top / out)
            assert self.results[stage], stage

    def restore(self, stage):
        shutil.rmtree(self.top)
        shutil.copytree(self.before / stage, self.top)

    def check(self, stage):
        """The same command ends well, with the same bytes, and nothing temporary is left."""
        end(start(stage, self.top, self.url), [0])
        assert content(self.top / commands(self.top)[stage][1]) == self.results[stage]
        left = [p for p in self.top.rglob(".*") if p.suffix in (".tmp", ".old", ".lock")]
        assert not left, left


# --------------------------------------------------------------------------- faults


def killed(pipeline, stage, rng, server, how=signal.SIGKILL):
    process = start(stage, pipeline.top, pipeline.url)
    time.sleep(rng.uniform(0, pipeline.seconds[stage]))
    process.send_signal(how)
    sent = time.monotonic()
    expected = {signal.SIGKILL: [-9, 0], signal.SIGTERM: [143, -15, 0], signal.SIGINT: [130, -2, 0]}[how]
    end(process, expected, "the same command goes on")
    seconds = time.monotonic() - sent
    assert seconds < 5 + pipeline.seconds[stage] / 2, f"ended after {seconds:.1f} s"


def terminated(pipeline, stage, rng, server):
    killed(pipeline, stage, rng, server, signal.SIGTERM)


def interrupted(pipeline, stage, rng, server):
    killed(pipeline, stage, rng, server, signal.SIGINT)


def full_disk(pipeline, stage, rng, server):
    size = int(10 ** rng.uniform(2, 6))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    told = end(start(stage, pipeline.top, pipeline.url, preexec_fn=limit), [0, 2])
    assert "\n" not in told.strip().splitlines()[-1]


def two_copies(pipeline, stage, rng, server):
    processes = []
    for _ in range(2):
        processes.append(start(stage, pipeline.top, pipeline.url))
        time.sleep(rng.uniform(0, 1))
    for process in processes:
        end(process, [0])


def jumping_clock(pipeline, stage, rng, server):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(JUMPING_CLOCK)
        end(start(stage, pipeline.top, pipeline.url, env={"PYTHONPATH": folder}), [0])
    out = pipeline.top / commands(pipeline.top)[stage][1]
    os.utime(out, (4e9, 4e9))


def damaged_cache(pipeline, stage, rng, server):
    """A stage that was killed half-way, and then one of the files it keeps is cut or deleted."""
    killed(pipeline, stage, rng, server)
    files = [p for p in (pipeline.top / "cache").rglob("*") if p.is_file()]
    if not files:
        return
    path = rng.choice(sorted(files))
    if rng.random() < 0.5:
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    told = end(start(stage, pipeline.top, pipeline.url), [0, 2])
    for part in told.split():  # the remedy: delete, or move away, the file that is named
        if part.endswith(":") and (pipeline.top / "cache") in Path(part[:-1]).parents:
            shutil.rmtree(part[:-1]) if Path(part[:-1]).is_dir() else Path(part[:-1]).unlink(missing_ok=True)


def torn_input(pipeline, stage, rng, server):
    """The last line of what the stage reads is cut: it says so; then the file is made again."""
    arguments = list(map(str, commands(pipeline.top)[stage][0]))
    if "--input" not in arguments:
        return
    path = Path(arguments[arguments.index("--input") + 1])
    whole = path.read_bytes()
    path.write_bytes(whole[: -rng.randrange(3, 200)])
    n_lines = whole.count(b"\n")
    end(start(stage, pipeline.top, pipeline.url), [2], f"{path}:{n_lines}: ")
    path.write_bytes(whole)


def dying_server(pipeline, stage, rng, server):
    process = start(stage, pipeline.top, pipeline.url)
    time.sleep(rng.uniform(0, pipeline.seconds[stage]))
    server.stop()
    time.sleep(rng.uniform(0, 2))
    server.start()
    end(process, [0])


def read_only(pipeline, stage, rng, server):
    out = pipeline.top / commands(pipeline.top)[stage][1]
    out.parent.mkdir(exist_ok=True)
    folders = [folder for folder in (out, out.parent) if folder.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    may_not = [] if os.getuid() else ["setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-all"]
    try:
        end(start(stage, pipeline.top, pipeline.url, prefix=may_not), [2], "Permission denied")
    finally:
        for folder in folders:
            folder.chmod(0o755)


FAULTS = [killed, terminated, interrupted, full_disk, two_copies, jumping_clock, damaged_cache, torn_input,
          dying_server, read_only]  # fmt: skip


@pytest.fixture(scope="module")
def server():
    running = Server()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, server):
    return Pipeline(tmp_path_factory.mktemp("faults"), server.url)


@pytest.mark.parametrize(
    "stage, fault",
    [
        ("00_prepare_data", killed),
        ("00_prepare_data", two_copies),
        ("00_prepare_data", read_only),
        ("01_mine_candidates", two_copies),
        ("02_filter_false_negatives", terminated),
        ("02_filter_false_negatives", dying_server),
        ("02_filter_false_negatives", torn_input),
        ("02_filter_false_negatives", jumping_clock),
        ("03_generate_negatives", killed),
        ("05_train", full_disk),
        ("06_eval", interrupted),
        ("05a_export", full_disk),
    ],
)
def test_the_same_command_then_ends_with_the_same_files(pipeline, server, stage, fault):
    pipeline.restore(stage)
    fault(pipeline, stage, random.Random(13), server)
    pipeline.check(stage)


def test_a_link_that_is_called_like_a_lock_is_not_emptied(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "precious")
    from common import lock

    with lock(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_text() == "x"


def test_where_files_cannot_be_locked_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    import common

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(common.fcntl, "lockf", no_locks)
    with common.lock(tmp_path / "out"):
        assert (tmp_path / ".out.lock").exists()
    assert "cannot be locked" in capsys.readouterr().err and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- the long run


def soak():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--faults", type=int, default=10_000, help="end after so many")
    parser.add_argument("--each", type=int, help="of every stage and fault so many, in place of random ones")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", nargs="+", metavar="FAULT", help="names, such as two_copies")
    args = parser.parse_args()
    print(f"seed {args.seed}")
    rng = random.Random(args.seed)
    faults = [fault for fault in FAULTS if fault.__name__ in (args.only or fault.__name__)]
    done = Counter()
    failed = []
    with tempfile.TemporaryDirectory() as top:
        server = Server()
        pipeline = Pipeline(Path(top), server.url)
        until = time.monotonic() + args.seconds
        stages = list(pipeline.seconds)
        if args.each:
            cases = [(stage, fault) for stage in stages for fault in faults] * args.each
        else:
            cases = [(rng.choice(stages), rng.choice(faults)) for _ in range(args.faults)]
        for stage, fault in cases:
            if time.monotonic() > until:
                break
            pipeline.restore(stage)
            done[stage, fault.__name__] += 1
            try:
                fault(pipeline, stage, rng, server)
                pipeline.check(stage)
            except Exception as error:
                failed.append(f"{stage}, {fault.__name__}: {error!r}")
                print(failed[-1], flush=True)
        server.stop()
    for (stage, fault), times in sorted(done.items()):
        print(f"{stage:28} {fault:16} {times}")
    print(f"{done.total()} faults, {len(failed)} failures")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(soak())
