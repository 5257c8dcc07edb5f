"""Stage 03a: instructions, translation over a real socket, LoRA on a small causal LM, and serving it."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import tiny_lm
from conftest import ROOT, load_stage, run_stage

ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PLACES = [
    ("Accra", "Ghana"),
    ("Lagos", "Nigeria"),
    ("Kigali", "Rwanda"),
    ("Lusaka", "Zambia"),
    ("Harare", "Zimbabwe"),
    ("Maputo", "Angola"),
    ("Tunis", "Tunisia"),
    ("Dakar", "Senegal"),
]
MOSTLY = PLACES + 24 * PLACES[:1]  # what so small a model speaks of: it cannot copy from a passage


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def town(name, country, number):
    return f"{name} lies in {country}. It has {number} houses. People come to {name} to trade."


def generator_chats(n=48):
    """Chats as stage 03 asks them: summaries of town passages, and questions from such summaries."""
    stage, draw, chats = load_stage("03_generate_negatives"), random.Random(2), []
    for _ in range(n):
        name, country = draw.choice(MOSTLY)[0], draw.choice(MOSTLY)[1]
        summary, question = f"{name} is a town in {country}.", f"Where is the town of {name}?"
        data = stage.labelled(
            Question=f"Where does {name} lie?",
            Passage=f"{name}\n{town(name, country, draw.randrange(100, 1000))}",
        )
        for system, user, answer in (
            (stage.SUMMARISE, data, summary),
            (stage.ASK, stage.labelled(Summary=summary), question),
        ):
            chats.append(
                {
                    "lang": "en",
                    "messages": [
                        {"role": "system", "content": system.format(language="English")},
                        {"role": "user", "content": f"Language: English\n{user}"},
                        {"role": "assistant", "content": answer},
                    ],
                }
            )
    return chats


def tune(top, out, *args, **env):
    return run_stage(
        "03a_tune_generator.py",
        "--base",
        top / "base",
        "--instructions",
        top / "chats.jsonl",
        "--device",
        "cpu",
        "--lr",
        1e-2,
        "--epochs",
        6,
        "--out",
        top / out,
        *args,
        env=ONE_THREAD | env,
    )


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """Folder with base/ (no chat template), chats.jsonl, and adapter/ with merged/ in it."""
    top, chats = tmp_path_factory.mktemp("tune"), generator_chats()
    tiny_lm.make(top / "base", [m["content"] for c in chats for m in c["messages"]])
    (top / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats), "utf-8")
    done = tune(top, "adapter", "--merge")
    assert done.returncode == 0, done.stderr[-2000:]
    return top


def test_the_loss_on_held_out_instructions_falls(top):
    log = json.loads((top / "adapter/trainer_state.json").read_text("utf-8"))["log_history"]
    losses = [row["eval_loss"] for row in log if "eval_loss" in row]
    print("held-out loss:", losses)
    assert len(losses) == 7 and losses[-1] < 0.4 * losses[0]


def test_the_merged_folder_answers_like_the_adapter(top):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(top / "adapter/merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(top / "base").eval()
    plain = base(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(top / "adapter/merged").eval()(ids).logits
    tuned = PeftModel.from_pretrained(base, top / "adapter").eval()(ids).logits
    assert torch.allclose(merged, tuned, atol=1e-3) and not torch.allclose(merged, plain, atol=0.1)


def test_a_killed_run_goes_on_to_the_same_weights(top):
    command = [
        sys.executable,
        ROOT / "03a_tune_generator.py",
        "--base",
        top / "base",
        "--instructions",
        top / "chats.jsonl",
        "--device",
        "cpu",
        "--lr",
        "0.01",
        "--epochs",
        "6",
        "--out",
        top / "again",
    ]
    process = subprocess.Popen(
        list(map(str, command)), env=os.environ | ONE_THREAD, stderr=subprocess.DEVNULL
    )
    checkpoints = top / "again.checkpoint"
    while not list(checkpoints.glob("*/checkpoint-6/trainer_state.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoints.exists() and not (top / "again").exists()
    newest = max(checkpoints.glob("*/checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    unfinished = newest.with_name("checkpoint-99")  # as a kill leaves one that was being written
    unfinished.mkdir()
    done = tune(top, "again")
    assert done.returncode == 0 and "going on from" in done.stderr and "checkpoint-99" not in done.stderr
    assert not checkpoints.exists() and not (top / "again/merged").exists()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (top / "again" / name).read_bytes() == (top / "adapter" / name).read_bytes()


def test_flags_change_the_weights(top, capsys):
    stage = load_stage("03a_tune_generator")

    def weights(*flags):
        out = top / ("flags" + "".join(flags))
        stage.main(
            [
                "--base",
                str(top / "base"),
                "--instructions",
                str(top / "chats.jsonl"),
                "--device",
                "cpu",
                "--limit",
                "20",
                "--epochs",
                "2",
                "--out",
                str(out),
                *flags,
            ]
        )
        return (out / "adapter_model.safetensors").read_bytes()

    # a checkpoint of other settings, which no run may take
    (top / "flags.checkpoint/0123/checkpoint-9").mkdir(parents=True)
    (top / "flags.checkpoint/0123/checkpoint-9/trainer_state.json").write_text("{}")
    usual = weights()
    for flags in (
        ["--lr", "1e-2"],
        ["--seed", "5"],
        ["--rank", "4"],
        ["--epochs", "1"],
        ["--batch-size", "2"],
        ["--accumulation", "2"],
        ["--max-len", "109"],
    ):
        assert weights(*flags) != usual, flags
    assert capsys.readouterr().out == ""  # Trainer's log goes to stderr


def test_two_processes_make_the_steps_of_one(top):
    from safetensors.numpy import load_file

    args = [
        "--base",
        top / "base",
        "--instructions",
        top / "chats.jsonl",
        "--device",
        "cpu",
        "--epochs",
        1,
        "--lr",
        1e-3,
        "--limit",
        34,  # 2 are held out
    ]
    load_stage("03a_tune_generator").main([*map(str, args), "--out", str(top / "one")])
    two = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            *map(str, [ROOT / "03a_tune_generator.py", *args, "--out", top / "two"]),
        ],
        env=os.environ | ONE_THREAD,
        capture_output=True,
        text=True,
    )
    assert two.returncode == 0, two.stderr[-2000:]
    first, second = (load_file(top / out / "adapter_model.safetensors") for out in ("one", "two"))
    assert set(first) == set(second)
    for name, weights in first.items():
        assert abs(weights - second[name]).max() < 1e-4, name


def test_stage_03_runs_against_the_merged_model_in_transformers_serve(top, tmp_path):
    """Summaries and questions in the file come from the tuned model, over HTTP."""
    (tmp_path / "data/corpus").mkdir(parents=True)
    draw, passages = random.Random(3), []
    for i, (name, country) in enumerate([(n, c) for n, _ in PLACES for _, c in PLACES]):
        passages.append(
            {"docid": f"{i}#0", "title": name, "text": town(name, country, draw.randrange(100, 1000))}
        )
    (tmp_path / "data/corpus/en.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages), "utf-8")
    records = [
        {
            "query_id": str(i),
            "lang": "en",
            "query": f"Where does {passages[0]['title']} lie?",
            "positive_passages": [passages[0]],
            "negative_passages": [],
        }
        for i in range(4)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model, log = top / "adapter/merged", open(tmp_path / "serve.log", "w")
    home = tmp_path / "hub"
    (home / "hub").mkdir(parents=True)  # /v1/models fails where the hub cache is missing
    server = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from transformers.cli.transformers import main; main()",
            "serve",
            str(model),
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--port",
            str(port),
        ],
        env=os.environ | ONE_THREAD | {"HF_HOME": str(home)},
        stdout=log,
        stderr=log,
    )
    try:
        if not wait_for(f"http://127.0.0.1:{port}/health", server):
            pytest.skip(
                "`transformers serve` does not start here: " + (tmp_path / "serve.log").read_text()[-300:]
            )
        done = run_stage(
            "03_generate_negatives.py",
            "--input",
            tmp_path / "in.jsonl",
            "--data",
            tmp_path / "data",
            "--retrievers",
            "bm25",
            "--llm",
            model,
            "--base-url",
            f"http://127.0.0.1:{port}/v1",
            "--no-judge-new",
            "--target",
            7,
            "--cache",
            tmp_path / "cache",
            "--concurrency",
            2,
            "--out",
            tmp_path / "out.jsonl",
            env={"NO_PROXY": "127.0.0.1"},
        )
    finally:
        server.terminate()
        server.wait(30)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stderr)
    for record in read(tmp_path / "out.jsonl"):
        assert len(record["negative_passages"]) == 7
        assert " is a town in" in record["summary"] and record["generated_query"].startswith(
            "Where is the town"
        )
        assert {p["source"] for p in record["negative_passages"]} == {"generated-query"}


def wait_for(url, server, seconds=60):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(seconds * 4):
        if server.poll() is not None:
            return False
        try:
            return opener.open(url, timeout=5).status == 200
        except OSError:
            time.sleep(0.25)
    return False


# --------------------------------------------------------------------------- instructions


def parse(*args):
    stage = load_stage("03a_tune_generator")
    return stage, stage.build_parser().parse_args([*map(str, args), "--out", "x"])


def test_of_alpaca_only_summarisation_instructions_with_an_input_are_taken(tmp_path):
    records = [
        {"instruction": "Summarize this.", "input": "一二三", "output": "一"},
        {"instruction": "Summarize War and Peace.", "input": "", "output": "x"},
        {"instruction": "Summarize the Iliad.", "input": None, "output": "x"},
        {"instruction": "Summarize the Odyssey.", "output": "x"},
        {"instruction": "Name a colour.", "input": "red", "output": "red"},
        {"instruction": "Give the main idea.", "input": "a", "output": "b"},
    ]
    for path, text in (
        (tmp_path / "a.json", json.dumps(records)),
        (tmp_path / "a.jsonl", "\n".join(map(json.dumps, records))),
    ):
        path.write_text(text, "utf-8")
        stage, args = parse("--instructions", path)
        assert stage.read_instructions(args) == [
            ("en", ("Summarize this.", "一二三", "一"), None),
            ("en", ("Give the main idea.", "a", "b"), None),
        ]
        stage, args = parse("--instructions", path, "--samples", 1)
        assert len(stage.read_instructions(args)) == 1


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"messages": [{"role": "user", "content": "x"}]}', "end with an answer"),
        ('{"messages": "x"}', "end with an answer"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}', "end with an answer"),
        ('{"text": "x"}', "neither chat"),
        ('{"instruction": "Sum up", "input": 3, "output": "x"}', "neither chat"),
        ("[]", "want an object"),
        ('{"instruction": "Say", "input": "x", "output": "x"}', "no summarisation"),
    ],
)
def test_bad_instructions_are_one_line_and_exit_2(tmp_path, capsys, line, said):
    (tmp_path / "bad.jsonl").write_text(line + "\n", "utf-8")
    stage, args = parse("--instructions", tmp_path / "bad.jsonl")
    with pytest.raises(stage.DataError, match=said):
        stage.read_instructions(args)


def test_instructions_that_are_missing_are_one_line_and_exit_2(tmp_path):
    done = run_stage(
        "03a_tune_generator.py", "--base", "x", "--instructions", tmp_path / "no.json", "--out", tmp_path
    )
    assert done.returncode == 2 and "no.json not found; check the path" in done.stderr


def test_the_loss_is_on_the_answer_only(tmp_path):
    """The labels are the answer and its end, with the model's own chat template and without one."""
    import torch
    from transformers import AutoTokenizer

    stage = load_stage("03a_tune_generator")
    messages = [
        {"role": "user", "content": "Summarize.\n\nAccra is big."},
        {"role": "assistant", "content": "Big."},
    ]
    chat = {"lang": "en", "messages": messages}
    tokenizer = AutoTokenizer.from_pretrained(
        tiny_lm.make(tmp_path / "lm", ["Accra is big. Summarize."], steps=0)
    )
    for template in (stage.CHAT_TEMPLATE, tiny_lm.CHAT_TEMPLATE):
        tokenizer.chat_template = template
        examples = stage.tokenize([chat, chat], tokenizer, 2048)
        ids, labels = (torch.tensor(examples[0][key]) for key in ("input_ids", "labels"))
        assert tokenizer.decode(labels[labels != -100]).strip() == "Big.<end>"
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        short = stage.tokenize([chat], tokenizer, len(ids) - 1)
        assert len(short[0]["labels"]) == len(short[0]["input_ids"]) == len(ids) - 1
        assert stage.tokenize([chat], tokenizer, examples[0]["labels"].count(-100)) == []


def chat(lang, n, system=()):
    messages = [{"role": role, "content": f"{lang} {role} {n}"} for role in ("user", "assistant")]
    return {"lang": lang, "messages": [*system, *messages]}


def test_the_limit_is_of_each_language(tmp_path):
    chats = [chat(lang, n) for lang in ("sw", "te", "fr") for n in range(4)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, chats)), "utf-8")
    for flags, langs in (([], ["sw", "te", "fr"]), (["--lang", "te", "fr"], ["te", "fr"])):
        stage, args = parse("--instructions", tmp_path / "c.jsonl", "--limit", 3, *flags)
        assert [record[0] for record in stage.read_instructions(args)] == [c for c in langs for _ in range(3)]


def test_to_translate_and_to_tune_are_two_runs(tmp_path):
    for flags in (["--base", "m"], ["--merge"]):
        stage = load_stage("03a_tune_generator")
        with pytest.raises(stage.DataError, match="want --base MODEL"):
            stage.main(["--instructions", "x", "--translate", "sw", "--llm", "m", "--out", str(tmp_path / "x"),
                        *flags])


# --------------------------------------------------------------------------- translation


def test_what_is_in_the_language_is_copied_and_the_blank_stays_blank(tmp_path, httpserver):
    """From Swahili and French into both: each text is translated once, into the other."""
    from werkzeug import Response

    sw, fr = "Mji huu una watu wengi sana na soko kubwa", "Cette ville est grande et son marché est connu"
    asked = []

    def answer(request):
        asked.append(request.get_json()["messages"][1]["content"])
        reply = sw if asked[-1].startswith("Language: Swahili") else fr
        choice = {"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
        return Response(json.dumps({"choices": [choice]}), content_type="application/json")

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    blank = {"role": "system", "content": ""}
    chats = [{"lang": lang, "messages": [blank, {"role": "user", "content": text},
                                         {"role": "assistant", "content": text}]}
             for lang, text in (("sw", sw), ("fr", fr))]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, chats)), "utf-8")
    load_stage("03a_tune_generator").main(
        ["--instructions", str(tmp_path / "c.jsonl"), "--translate", "sw", "fr", "sw", "--llm", "m",
         "--base-url", httpserver.url_for("/v1"), "--cache", str(tmp_path / "cache"),
         "--out", str(tmp_path / "out.jsonl")])
    made = read(tmp_path / "out.jsonl")
    assert [record["lang"] for record in made] == ["sw", "sw", "fr", "fr"]
    for record in made:
        texts = [message["content"] for message in record["messages"]]
        assert texts == ["", *[{"sw": sw, "fr": fr}[record["lang"]]] * 2]
    assert len(asked) == 2  # a text that stands twice is asked once


def test_translation_is_checked_cached_and_resumed(tmp_path, httpserver):
    """A server that first answers Swahili requests in English: asked again; a second run asks nothing."""
    from werkzeug import Response

    asked = []

    def answer(request):
        body = request.get_json()
        asked.append(body)
        text = json.loads(body["messages"][1]["content"].split("Text: ", 1)[1])
        if (
            "swahili" in body["messages"][0]["content"].lower()
            and body["temperature"] == 0
            and "lies in" in text
        ):
            reply = "This is not a translation, it is still in the English language."
        else:
            reply = {"Telugu": "ఈ వచనం యొక్క సారాంశం రాయండి"}.get(
                body["messages"][1]["content"].split("\n")[0][10:],
                "Fupisha maandishi haya kwa sentensi moja tafadhali",
            )
        return Response(
            json.dumps(
                {
                    "choices": [
                        {"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
                    ],
                    "usage": {"prompt_tokens": 1, "completion_tokens": 1},
                }
            ),
            content_type="application/json",
        )

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    tiny_lm.write_instructions(tmp_path / "alpaca.jsonl", 3)
    args = [
        "--instructions",
        str(tmp_path / "alpaca.jsonl"),
        "--translate",
        "sw",
        "te",
        "en",
        "--llm",
        "m",
        "--base-url",
        httpserver.url_for("/v1"),
        "--cache",
        str(tmp_path / "cache"),
        "--concurrency",
        "1",
    ]
    stage = load_stage("03a_tune_generator")
    stage.main([*args, "--out", str(tmp_path / "mift.jsonl")])
    out = read(tmp_path / "mift.jsonl")
    assert [r["lang"] for r in out] == ["sw"] * 3 + ["te"] * 3 + ["en"] * 3
    assert not any("still in the English" in m["content"] for r in out for m in r["messages"])
    counts = json.loads((tmp_path / "mift.jsonl.meta.json").read_text())["counts"]["by_lang"]
    assert counts["sw"] == {"another language": 3, "translated": 3, "lost": 0}
    n_asked = len(asked)
    stage.main([*args, "--out", str(tmp_path / "again.jsonl")])
    assert (
        len(asked) == n_asked
        and (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "mift.jsonl").read_bytes()
    )


def test_a_translator_that_answers_in_english_is_an_error(tmp_path, httpserver):
    httpserver.expect_request("/v1/chat/completions").respond_with_json(
        {
            "choices": [
                {"message": {"content": "I am afraid that this stays in English."}, "finish_reason": "stop"}
            ]
        }
    )
    tiny_lm.write_instructions(tmp_path / "alpaca.jsonl", 2)
    stage = load_stage("03a_tune_generator")
    with pytest.raises(stage.DataError, match="sw: 2 of 2 samples"):
        stage.main(
            [
                "--instructions",
                str(tmp_path / "alpaca.jsonl"),
                "--translate",
                "sw",
                "--llm",
                "m",
                "--base-url",
                httpserver.url_for("/v1"),
                "--cache",
                str(tmp_path / "cache"),
                "--out",
                str(tmp_path / "mift.jsonl"),
            ]
        )
    assert not (tmp_path / "mift.jsonl").exists()


# --------------------------------------------------------------------------- the form of stage 03, merging


def test_what_is_trained_on_is_what_stage_03_asks(tmp_path):
    """Alpaca's and translated instructions become the request that stage 03 sends, and its answer."""
    ask = load_stage("03_generate_negatives")
    stage = load_stage("03a_tune_generator")
    chat = stage.as_chat("sw", ("Fupisha.", "Mji wa <Nairobi>.", "Mji."))
    system, user, answer = chat["messages"]
    data = ask.labelled(Question="Fupisha.", Passage="Mji wa <Nairobi>.")
    assert system == {"role": "system", "content": ask.SUMMARISE.format(language="Swahili")}
    assert user == {"role": "user", "content": f"Language: Swahili\n{data}"}
    assert answer == {"role": "assistant", "content": "Mji."} and chat["lang"] == "sw"
    given = stage.as_chat("sw", ("a", "b"), ("user", "assistant"))
    assert [m["content"] for m in given["messages"]] == ["a", "b"]


def test_a_chat_template_without_system_messages_is_one_line(tmp_path):
    from transformers import AutoTokenizer

    stage = load_stage("03a_tune_generator")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm.make(tmp_path / "lm", ["Accra is big."], steps=0))
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(stage.DataError, match="System role not supported.*take another --base"):
        stage.tokenize([stage.as_chat("en", ("Sum up.", "Accra is big.", "Big."))], tokenizer, 100)


def test_merging_a_finished_adapter_does_not_tune_it_again(top):
    shutil.copytree(top / "adapter", top / "later", ignore=shutil.ignore_patterns("merged"))
    shutil.copy(top / "adapter.meta.json", top / "later.meta.json")
    adapter = top / "later/adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    done = tune(top, "later", "--merge")
    assert done.returncode == 0 and "is up to date" in done.stderr, done.stderr[-2000:]
    assert "held out" not in done.stderr and adapter.stat().st_mtime_ns == before
    name = "model.safetensors"
    merged = top / "later/merged" / name
    assert merged.read_bytes() == (top / "adapter/merged" / name).read_bytes()
    written = merged.stat().st_mtime_ns
    assert tune(top, "later", "--merge").returncode == 0 and merged.stat().st_mtime_ns == written


def test_a_folder_in_the_adapters_is_not_replaced(top, capsys):
    """Unless it is the stage's own, which goes with it."""
    stage = load_stage("03a_tune_generator")
    flags = ["--base", top / "base", "--instructions", top / "chats.jsonl", "--device", "cpu", "--limit", 12]
    flags = [*map(str, flags), "--epochs", "1", "--out", str(top / "small")]
    checkpoint = top / "small.checkpoint/mine"
    checkpoint.mkdir(parents=True)
    stage.main(flags)
    assert checkpoint.is_dir()
    (top / "small/notes").mkdir()
    with pytest.raises(stage.DataError, match="small/notes was not made by this script; move it away"):
        stage.main([*flags, "--seed", "2"])
    (top / "small/notes").rmdir()
    for name in ("merged", "additional_chat_templates", ".merged.1.tmp"):
        (top / "small" / name).mkdir()
    meta = json.loads((top / "small.meta.json").read_text("utf-8"))
    meta.pop("files")  # as earlier versions
    (top / "small.meta.json").write_text(json.dumps(meta), "utf-8")
    stage.main([*flags, "--seed", "2"])
    assert not (top / "small/merged").exists()


def test_help_says_what_fits_on_one_gpu():
    assert "of one GPU" in run_stage("03a_tune_generator.py", "--help").stdout
