"""Let an LLM find the candidates that answer the query: they are false negatives, and are removed (Sec. 3.3).

Source  Sec. 3.3: NC_q = {d : LLM(q, d+, d) = 0}. The judge sees the query and a known positive as reference and scores
        information accuracy and completeness, 0 to 2 each; the grade is the lower one. The main text keeps grade 0 only
        (--drop-at 1, default); the appendix calls only 2 a false negative (--drop-at 2).
Reads   candidates.jsonl of stage 01, or any file in Tevatron's layout: then its negatives without `source: human` are judged
Writes  filtered.jsonl: the records; negative_passages = kept [+ source, grade], false_negatives = removed [+ accuracy,
        completeness, grade]; no candidate_passages; where the judge gave no usable answer, unjudged: [{docid, reason}]: such a
        candidate may be a false negative and is left out; the next run asks for it again
Usage   python 02_filter_false_negatives.py --input runs/sample/candidates.jsonl --llm Llama-3.1-70B-Instruct --out runs/sample/filtered.jsonl
        (OPENAI_BASE_URL and OPENAI_API_KEY name the server, as for every OpenAI client)
        In batches, for half the price at many hosts: --batch-export F.jsonl, have F*.jsonl answered by the host or by
        `vllm run-batch -i F.jsonl -o A.jsonl --model NAME`, then --batch-import A.jsonl
        With --cascade-llm the small model's answers come first: export, import, and export again for the large one.
Cost    one call a candidate (MIRACL: 40,203 x 40 = 1.6 million); --dry-run tells before anything is spent. Our side: about
        1 ms of one core a call, 70 MB and 130 MB more for each million answers (bench/judge_*.py)
"""
import asyncio
import contextlib
import json
from collections import Counter, defaultdict
from pathlib import Path

from common import DataError, Output, Parser, dump, parse_line, progress, read_lines, read_queries, run, say
from llm import LLM, in_order, judge_candidates, judge_flags

BATCH_REQUESTS, BATCH_BYTES = 50_000, 200_000_000  # OpenAI's limits of one batch file
ANSWER_TOKENS = 16  # of one judgment


def build_parser():
    parser = Parser(__doc__).common_flags()
    parser.add_argument("--input", required=True, metavar="FILE", help="candidates.jsonl, or training data in Tevatron's layout")
    judge_flags(parser)
    parser.add_argument("--cascade-llm", metavar="NAME",
                        help="a small model that judges first; --llm is asked only where it does not score 0 and 0")
    parser.add_argument("--cascade-base-url", metavar="URL", help="its server; default: as for --llm")
    parser.add_argument("--rejudge-human", action="store_true",
                        help="judge also the passages that people judged non-relevant; they are kept without a call otherwise")
    parser.add_argument("--max-unjudged", type=float, default=0.01, metavar="SHARE",
                        help="highest share, 0 to 1, of candidates without a usable answer; above it the exit status is 2")
    parser.add_argument("--dry-run", action="store_true", help="print what it would cost and stop")
    parser.add_argument("--tokenizer", metavar="MODEL", help="counts tokens for --dry-run: a folder or hub name; default: --llm")
    parser.add_argument("--price-in", type=float, nargs="+", default=[0], metavar="P",
                        help="price of a million prompt tokens; a second one for --cascade-llm")
    parser.add_argument("--price-out", type=float, nargs="+", default=[0], metavar="P", help="likewise of completion tokens")
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument("--batch-export", metavar="FILE", help="write the calls as OpenAI batch files (FILE, FILE-2, ...) and stop")
    batch.add_argument("--batch-import", nargs="+", metavar="FILE", help="read their results, in any order, and ask no server")
    parser.add_argument("--out", required=True, metavar="FILE", help="filtered.jsonl")
    return parser


# ---- the method

def split(record, rejudge_human=False):
    """(candidates, docids people judged non-relevant, passages to judge); a file without candidates: its negatives."""
    negatives = record.get("negative_passages", [])
    positives = {p["docid"] for p in record["positive_passages"]}
    human = {p["docid"]: p for p in negatives if p.get("source") == "human" and p["docid"] not in positives}
    candidates = record.get("candidate_passages", [p for p in negatives if p["docid"] not in human])
    candidates = [c for c in candidates if c["docid"] not in positives]
    # judged negatives that no retriever found follow the mined ones: they are sure, but easier
    mined = {c["docid"] for c in candidates}
    candidates += [p for docid, p in human.items() if docid not in mined]
    return candidates, set(human), [c for c in candidates if rejudge_human or c["docid"] not in human]


async def judge_all(llms, record, to_judge, args, counts):
    """[(verdict, reason)] for the candidates; in a cascade a small model spares the large one the clearly irrelevant."""
    large, small = llms
    if small is None:
        return await judge_candidates(large, record, to_judge, args)
    answers = await judge_candidates(small, record, to_judge, args)
    for verdict, _ in answers:
        counts["small: asked"] += 1
        counts["small: settled"] += bool(verdict) and verdict["accuracy"] == verdict["completeness"] == 0
    # what is left of an unanswered batch waits for the small model; online its failures go to the large one
    waits = bool(args.batch_export or args.batch_import)
    rest = [i for i, (verdict, _) in enumerate(answers) if (verdict and any(verdict.values())) or not (verdict or waits)]
    for i, answer in zip(rest, await judge_candidates(large, record, [to_judge[i] for i in rest], args)):
        answers[i] = answer
    return answers


async def filter_record(llms, record, args):
    """(the record with its candidates judged, Counter of what became of them, Counter of reasons)."""
    counts, reasons = Counter(), Counter()
    candidates, human, to_judge = split(record, args.rejudge_human)
    verdicts = dict(zip((c["docid"] for c in to_judge), await judge_all(llms, record, to_judge, args, counts)))
    kept, removed, unjudged = [], [], []
    for passage in candidates:
        docid = passage["docid"]
        source = "human" if docid in human else passage.get("source", "mined")
        verdict, reason = verdicts.get(docid, ({"grade": 0}, None))
        counts["human" if docid not in verdicts else f"grade {verdict['grade']}" if verdict else "unjudged"] += 1
        if verdict is None:
            unjudged.append({"docid": docid, "reason": reason})
            reasons[reason] += 1
        elif verdict["grade"] < args.drop_at:
            kept.append(passage | {"source": source, "grade": verdict["grade"]})
        else:
            removed.append(passage | verdict)
    counts |= {"candidates": len(candidates), "judged": len(to_judge), "removed": len(removed), "kept": len(kept)}
    record = {k: v for k, v in record.items() if k not in ("candidate_passages", "negative_passages", "false_negatives", "unjudged")}
    record |= {"negative_passages": kept, "false_negatives": removed} | ({"unjudged": unjudged} if unjudged else {})
    return record, counts, reasons


# ---- money

def money(llms, args):
    """What the calls cost so far."""
    return sum(prices[min(i, len(prices) - 1)] * llm.stats[kind] / 1e6 for i, llm in enumerate(llms) if llm
               for kind, prices in (("prompt_tokens", args.price_in), ("completion_tokens", args.price_out)))


def token_counter(name):
    """(function from text to tokens, how it counts): the model's tokenizer, or an estimate where there is none."""
    import tokenizers
    try:
        path = Path(name) / "tokenizer.json"
        if not path.is_file():
            if name.count("/") != 1 or name.startswith((".", "/")):
                raise OSError("neither a model folder nor a hub name")
            from huggingface_hub import hf_hub_download
            path = hf_hub_download(name, "tokenizer.json", etag_timeout=10)
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # offline, gated, absent, damaged: tokenizers raises bare Exceptions
        return lambda text: len(text.encode("utf-8", "replace")) / 4, f"estimated as bytes / 4; no tokenizer of {name}: {str(error)[:80]}"
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False)), f"counted with the tokenizer of {name}"


def dry_run(args):
    """Print calls, tokens and money of a run, without what the cache holds."""
    count, how = {}, {}

    def instead(llm, key, body):
        if llm.model not in count:
            count[llm.model], how[llm.model] = token_counter(args.tokenizer or llm.model)
        system, user = (m["content"] for m in body["messages"])
        if llm.stats[system] == 0:  # the instructions are the same in every call
            llm.stats[system] = count[llm.model](system) + 10  # + the chat template's own
        n = max(1, user.count("\nCandidate passage "))
        llm.stats += Counter({"asked": 1, "prompt_tokens": llm.stats[system] + count[llm.model](user),
                              "completion_tokens": ANSWER_TOKENS * n + (8 if n > 1 else 0)})
        return "counted"
    total = Counter()
    llms = clients(args, instead)
    for _, counts, _ in filtered(llms, args, Counter()):
        total += counts
    for llm in filter(None, llms):
        most = "at most " if args.cascade_llm and llm is llms[0] else ""
        print(f"{llm.model}: {most}{llm.stats['asked']} calls, {round(llm.stats['prompt_tokens'])} prompt tokens "
                f"({how.get(llm.model, 'nothing to count')}), {llm.stats['completion_tokens']} completion tokens (estimated), "
                f"{llm.stats['cached']} answers cached")
    print(f"{total['candidates']} candidates, {total['human']} of them judged by people; money: {money(llms, args):.2f}"
            + ("" if any(args.price_in + args.price_out) else " (give --price-in and --price-out)"))


# ---- batch files

class BatchFiles:
    """Calls as OpenAI batch files, split at the host's limits, one model a file; they appear when all are written."""

    def __init__(self, path):
        self.path, self.open, self.parts, self.n, self.seen = Path(path), {}, [], 0, set()

    def add(self, llm, key, body):
        if (digest := bytes.fromhex(key)) in self.seen:  # a custom_id stands for one request
            return "exported"
        self.seen.add(digest)
        line = dump({"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()
        file, n, size = self.open.get(llm.model, (None, 0, 0))
        if file is None or n == BATCH_REQUESTS or size + len(line) > BATCH_BYTES:
            file and file.close()
            part = self.path.with_stem(self.path.stem + (f"-{len(self.parts) + 1}" if self.parts else ""))
            self.parts.append(part)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file, n, size = open(temporary_name(part), "wb"), 0, 0
        file.write(line)
        self.open[llm.model] = file, n + 1, size + len(line)
        self.n += 1
        return "exported"

    def close(self, keep):
        for file, _, _ in self.open.values():
            file.close()
        for part in self.parts:
            temporary_name(part).replace(part) if keep else temporary_name(part).unlink(missing_ok=True)


def temporary_name(path):
    return path.with_name(f".{path.name}.tmp")


def export(args):
    path = Path(args.batch_export)
    old = [p for p in (path, *path.parent.glob(f"{path.stem}-*{path.suffix}")) if p.exists()]
    if old and not args.overwrite:
        raise DataError(f"{old[0]} exists; pass --overwrite or another --batch-export")
    files, done = BatchFiles(path), False
    try:
        for _ in filtered(clients(args, files.add), args, Counter()):
            pass
        done = True
    finally:
        files.close(keep=done)
    for stale in set(old) - set(files.parts):
        stale.unlink()
    say(f"{files.n} calls in {len(files.parts)} files: {' '.join(map(str, files.parts))}" if files.n else
        "nothing is left to ask: run again without --batch-export")


def import_results(llms, paths):
    """Put the answers of batch results into the cache; {key: what went wrong} of the others."""
    errors, n = {}, Counter()
    for path in paths:
        for number, line in read_lines(path):
            result = parse_line(path, number, line)
            key, body, error = result.get("custom_id"), (result.get("response") or {}).get("body"), result.get("error")
            if not isinstance(key, str) or "response" not in result and "error" not in result:
                raise DataError(f"{path}:{number}: no batch result (custom_id, response, error); give the host's output or error file")
            if len(key) != 32 or set(key) - set("0123456789abcdef"):
                n["not ours"] += 1
                continue
            try:
                choice = body["choices"][0]
                text, finish = choice["message"]["content"], choice.get("finish_reason")
            except (TypeError, LookupError, AttributeError):
                failed = error or (body.get("error") if isinstance(body, dict) else body) or "no answer"
                errors[key] = "batch: " + str(failed.get("message") if isinstance(failed, dict) else failed)[:200]
                n["failed"] += 1
                continue
            if isinstance(text, str) and text.strip() and finish not in ("length", "content_filter"):
                for llm in filter(None, llms):
                    if llm.cached(key) != text:
                        llm.store(key, text)
                n["answers"] += 1
            else:
                errors[key] = f"batch: {'empty' if finish == 'stop' else finish}"
                n["failed"] += 1
    say(f"imported {n['answers']} answers; {n['failed']} failed, {n['not ours']} not ours")
    return errors


# ---- the run

def clients(args, instead=None):
    """(the judge, the small judge of a cascade or None)."""
    def client(name, url):
        return LLM(name, args.cache, url, args.concurrency, args.timeout, instead)
    return client(args.llm, args.base_url), args.cascade_llm and client(args.cascade_llm, args.cascade_base_url or args.base_url)


def plan(args):
    """Candidates to judge, by reading the whole input: a bad record stops the run before money is spent."""
    return sum(len(split(r, args.rejudge_human)[2]) for r in read_queries(args.input, args.lang, args.limit))


def filtered(llms, args, calls):
    """Yield filter_record's results in input order, holding a window of them; calls gets the clients' statistics."""
    async def step(results):
        return await anext(results, None)

    async def results():
        window = max(8, args.concurrency // 4)  # queries: the candidates of one are asked together (prefix caching)
        async with llms[0], llms[1] or contextlib.nullcontext():
            if args.batch_import:
                errors = import_results(llms, args.batch_import)
                for llm in filter(None, llms):
                    llm.instead = lambda llm, key, body: errors.get(key, "not in the batch results")
            records = read_queries(args.input, args.lang, args.limit)
            async with contextlib.aclosing(in_order(records, lambda r: filter_record(llms, r, args), window)) as found:
                async for result in found:
                    yield result
    bar = progress(desc="judge", unit=" candidates", total=plan(args), disable=bool(args.dry_run))
    with asyncio.Runner() as runner:  # an async generator, driven from plain code
        generator = results()
        try:
            while (result := runner.run(step(generator))) is not None:
                asked = sum((Counter({k: round(llm.stats[k]) for k in ("prompt_tokens", "completion_tokens")}) for llm in llms if llm),
                            Counter())
                bar.set_postfix_str(f"{asked.total():,} tokens" + (f", {money(llms, args):.2f} money" if any(args.price_in) else ""),
                                    refresh=False)
                bar.update(result[1]["judged"])
                yield result
        finally:
            runner.run(generator.aclose())
            bar.close()
    for llm in filter(None, llms):
        calls[llm.model] = {k: v for k, v in llm.stats.items() if v}


def report(args, table, reasons, calls):
    """Say what became of the candidates, by language; DataError where too few were judged or none is left."""
    total = sum(table.values(), Counter())
    for lang, counts in sorted(table.items()):
        say(f"{lang}: {counts['candidates']} candidates, removed {counts['removed']} "
            f"({100 * counts['removed'] / max(1, counts['candidates']):.1f}%), kept {counts['kept']}, human {counts['human']}, "
            f"unjudged {counts['unjudged']}")
    for reason, n in reasons.most_common(10):
        say(f"unjudged: {n} x {reason}")
    if args.cascade_llm:
        n = max(1, total["small: asked"])
        say(f"cascade: {args.cascade_llm} settled {total['small: settled']} of {n} candidates, which saved {args.llm} "
            f"{100 * total['small: settled'] / n:.1f}% of its judgments")
    if total["unjudged"] > args.max_unjudged * total["judged"]:
        raise DataError(f"{args.input}: {total['unjudged']} of {total['judged']} candidates got no usable answer from "
                        f"{args.llm} (most: {reasons.most_common(1)[0][0]}); run again to ask for them again, or raise --max-unjudged")
    if not total["kept"]:
        raise DataError(f"{args.input}: 0 of {total['candidates']} candidates kept at --drop-at {args.drop_at}; "
                        "try --drop-at 2, or look at the judge's answers")
    return total


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not 0 <= args.max_unjudged <= 1:
        parser.error(f"--max-unjudged {args.max_unjudged}: want a share, 0 to 1")
    if args.dry_run:
        return dry_run(args)
    if args.batch_export:
        return export(args)
    output = Output(args, [args.input])
    if output.is_done():
        if not json.loads(output.meta_path.read_text("utf-8"))["counts"].get("unjudged", 1):
            return
        say(f"{output.path}: some candidates were left unjudged, asking for them again")
    table, reasons, calls, totals = defaultdict(Counter), Counter(), {}, Counter()

    def records():
        llms = clients(args, instead=(lambda *_: "not in the batch results") if args.batch_import else None)
        for record, counts, why in filtered(llms, args, calls):
            table[record["lang"]].update(counts)
            reasons.update(why)
            totals["queries"] += 1
            yield record
        totals.update(report(args, table, reasons, calls))  # before the file gets its name
    output.write(records())
    output.finish(queries=totals["queries"], candidates=totals["candidates"], removed=totals["removed"], kept=totals["kept"],
                  unjudged=totals["unjudged"], calls=calls, reasons=dict(reasons), by_lang={k: dict(v) for k, v in sorted(table.items())})


if __name__ == "__main__":
    run(main)
