"""Let an LLM find the candidates that answer the query: they are false negatives, and are removed (Sec. 3.3).

Source  Sec. 3.3: NC_q = {d : LLM(q, d+, d) = 0}. The judge sees the query and a known positive as reference
        and scores accuracy and completeness, 0 to 2 each; the grade is the lower one. The main text keeps
        grade 0 only (--drop-at 1, default); in the appendix only 2 is a false negative (--drop-at 2).
        --relabel-at 2 does not throw grade 2 away but trains on it as positive (RLHN, arXiv 2505.16967)
Reads   candidates.jsonl of stage 01, or any file in Tevatron's layout (its negatives without `source: human`)
Writes  filtered.jsonl: the records; negative_passages = kept [+ source, grade], false_negatives = removed
        [+ accuracy, completeness, grade]; no candidate_passages; with --relabel-at: further
        positive_passages of source `relabelled`; unjudged: [{docid, reason}] where no answer
        was usable: it may be a false negative, so it is left out; the next run asks for it again
Usage   python 02_filter_false_negatives.py --input candidates.jsonl --llm NAME --out filtered.jsonl
        In batches, for half the price: --batch-export F.jsonl, have F*.jsonl answered by the host or by
        `vllm run-batch -i F.jsonl -o A.jsonl --model NAME`, then --batch-import A.jsonl (cascade: twice)
Cost    a call a candidate (MIRACL: 1.6 million; --dry-run tells), 1 ms of a core each, 80 MB (bench/judge_*)
"""
import asyncio
import contextlib
import functools
import re
from collections import Counter, defaultdict
from pathlib import Path

import common
from common import DataError, Output, Parser, parse_line, progress, read_lines, read_queries, run, say
from llm import LLM, Answers, from_flags, in_order, judge_candidates, judge_flags, parse_judgment, read_answer

BATCH_REQUESTS = 50_000  # OpenAI's limits of one batch file
BATCH_BYTES = 200_000_000
FORECAST_AT = 50  # answers
ALIKE = 200  # verdicts


def build_parser():
    parser = Parser(__doc__).common_flags()
    flag = parser.add_argument
    flag("--input", required=True, metavar="FILE", help="candidates.jsonl, or Tevatron's layout")
    flag("--out", required=True, metavar="FILE", help="filtered.jsonl")
    judge_flags(parser)
    flag("--relabel-at", type=int, choices=[2], metavar="2", help="make candidates of this grade positives")
    flag("--cascade-llm", metavar="NAME",
         help="judges first, without --llm-settings; --llm is asked where it scores above 0 and 0")
    flag("--cascade-base-url", metavar="URL", help="its server; default: as for --llm")
    flag("--rejudge-human", action="store_true", help="judge also what people judged non-relevant")
    flag("--max-unjudged", type=common.share, default=0.01, metavar="SHARE",
         help="highest share of candidates without a usable answer; above it the exit status is 2")
    flag("--dry-run", action="store_true", help="print what it would cost and stop")
    flag("--answer-tokens", type=common.positive_int, default=16, metavar="N",
         help="of one answer, for --dry-run; one that thinks takes hundreds")
    flag("--tokenizer", metavar="MODEL", help="counts --dry-run's tokens: folder or hub name; default: --llm")
    flag("--price-in", type=common.finite, nargs="+", default=[0], metavar="P",
         help="price of a million prompt tokens; a second one for --cascade-llm")
    flag("--price-out", type=common.finite, nargs="+", default=[0], metavar="P",
         help="likewise of completion tokens")
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument("--batch-export", metavar="FILE", help="write the calls as batch files and stop")
    batch.add_argument("--batch-import", nargs="+", metavar="FILE", help="read their results, ask no server")
    return parser


# ---- the method

def candidates_of(record, rejudge_human=False):
    """(candidates and unjudged negatives, docids that people judged non-relevant, those to judge)."""
    negatives = record.get("negative_passages", [])
    positives = {p["docid"] for p in record["positive_passages"]}
    human = {p["docid"]: p for p in negatives if p.get("source") == "human" and p["docid"] not in positives}
    own = [p for p in negatives if p["docid"] not in human]
    candidates = {}  # by docid; what is sure, but easier, comes after the mined
    for passage in [*record.get("candidate_passages", []), *own, *human.values()]:
        if passage["docid"] not in positives:
            candidates.setdefault(passage["docid"], passage)
    candidates = list(candidates.values())
    return candidates, set(human), [c for c in candidates if rejudge_human or c["docid"] not in human]


async def judge_all(llms, record, to_judge, args, counts):
    """[(verdict, reason)]; in a cascade a small model spares the large one the clearly irrelevant."""
    answers = await judge_candidates(llms[-1], record, to_judge, args)
    if len(llms) > 1:
        # in batches the large model waits for the small one's missing answers; online it gets those, too
        online = not (args.batch_export or args.batch_import)
        settled = [verdict is not None and not any(verdict.values()) for verdict, _ in answers]
        rest = [i for i, (verdict, _) in enumerate(answers) if not settled[i] and (verdict or online)]
        counts.update({"small: asked": len(answers), "small: settled": sum(settled)})
        second = await judge_candidates(llms[0], record, [to_judge[i] for i in rest], args)
        for i, answer in zip(rest, second):
            answers[i] = answer
    return answers


async def filter_record(llms, record, args):
    """(the record with its candidates judged, Counter of what became of them)."""
    candidates, human, to_judge = candidates_of(record, args.rejudge_human)
    positives = {p["docid"] for p in record["positive_passages"]}
    listed = record.get("candidate_passages", []) + record.get("negative_passages", [])
    counts = Counter(queries=1, candidates=len(candidates), judged=len(to_judge),
                     human=len(candidates) - len(to_judge))
    counts["positives"] = sum(passage["docid"] in positives for passage in listed)
    answers = await judge_all(llms, record, to_judge, args, counts)
    counts.update(f"grade {verdict['grade']}" for verdict, _ in answers if verdict)
    answer_of = {c["docid"]: answer for c, answer in zip(to_judge, answers)}
    fates = {"kept": [], "removed": [], "relabelled": [], "unjudged": []}
    for passage in candidates:
        docid = passage["docid"]
        verdict, reason = answer_of.get(docid, ({"grade": 0}, None))
        if verdict is None:
            fates["unjudged"].append({"docid": docid, "reason": reason})
        elif verdict["grade"] < args.drop_at:
            source = "human" if docid in human else passage.get("source", "mined")
            fates["kept"].append(passage | {"source": source, "grade": verdict["grade"]})
        elif verdict["grade"] == args.relabel_at and docid not in human:
            fates["relabelled"].append(passage | verdict | {"source": "relabelled"})
        else:
            fates["removed"].append(passage | verdict)
    counts.update({fate: len(passages) for fate, passages in fates.items()})
    again = {candidate["docid"] for candidate in candidates}
    earlier = [p for p in record.get("false_negatives", []) if p["docid"] not in again]
    for key in ("candidate_passages", "negative_passages", "false_negatives", "unjudged"):
        record.pop(key, None)
    record["positive_passages"] = record["positive_passages"] + fates["relabelled"]
    record |= {"negative_passages": fates["kept"], "false_negatives": earlier + fates["removed"]}
    return record | ({"unjudged": fates["unjudged"]} if fates["unjudged"] else {}), counts


# ---- the run

def clients(args, instead=None):
    """[the judge], and behind it the small judge of a cascade."""
    llms = [from_flags(args, instead)]
    if args.cascade_base_url and not args.cascade_llm:
        raise DataError("--cascade-base-url is nobody's without --cascade-llm; give both, or neither")
    if args.cascade_llm:
        if args.cascade_llm == args.llm and not args.llm_settings:
            raise DataError(f"--cascade-llm {args.llm} has the name of --llm, and would answer for it; tell "
                            "them apart with --llm-settings")
        url = args.cascade_base_url or args.base_url
        llms.append(LLM(args.cascade_llm, args.cache, url, args.concurrency, args.timeout, instead))
    return llms


async def filter_all(llms, args):
    """Yield filter_record's results in input order, with a window of queries under way."""
    window = max(8, args.concurrency // 4)  # the candidates of one are asked together (prefix caching)
    records = read_queries(args.input, args.lang, args.limit)
    async with contextlib.AsyncExitStack() as stack:
        for llm in llms:
            await stack.enter_async_context(llm)
        results = in_order(records, lambda record: filter_record(llms, record, args), window)
        async for result in await stack.enter_async_context(contextlib.aclosing(results)):
            yield result


def filtered(llms, args):
    """The same for plain code. The whole input is read before money is spent: a bad record stops the run."""
    records = read_queries(args.input, args.lang, args.limit)
    n_to_judge = sum(len(candidates_of(record, args.rejudge_human)[2]) for record in records)
    seen = Counter()
    bar = progress(desc="judge", unit=" candidates", total=n_to_judge, disable=args.dry_run)
    results = filter_all(llms, args)
    with asyncio.Runner() as runner, bar:
        try:
            while result := runner.run(anext(results, None)):
                bar.set_postfix_str(spent(llms, args), refresh=False)
                bar.update(result[1]["judged"])
                watch(llms, args, seen, n_to_judge, result[1])
                yield result
        finally:
            with contextlib.suppress(RuntimeError):  # of a loop that Ctrl-C has stopped; runner closes it
                runner.run(results.aclose())


def watch(llms, args, seen, n_to_judge, counts):
    """Tell, once each, what the whole run will take, and that a judge does not judge."""
    first = llms[-1]  # it is asked about every candidate
    if first.client and first.stats["asked"] >= FORECAST_AT and not seen["forecast"]:
        seen["forecast"] = 1
        say(f"forecast of the whole run: {spent(llms, args, n_to_judge * args.votes / first.n_done)}")
    seen.update(counts)
    grades = {grade: seen[f"grade {grade}"] for grade in range(3)}
    n = sum(grades.values())
    if n >= ALIKE and not seen["told"]:
        seen["told"] = 1
        if n in grades.values():
            say(f"{args.llm}: the first {n} verdicts are all alike ({grades}); does it judge at all? "
                "02a_check_judge.py calibrate tells")


def report(args, table, reasons, llms):
    """Say what became of the candidates; DataError where too few were judged or none is left."""
    total = sum(table.values(), Counter())
    for lang, n in sorted(table.items()):
        n_judged = n["judged"] - n["unjudged"]
        rate = (n["removed"] + n["relabelled"]) / max(1, n_judged)
        say(f"{lang}: {n['candidates']} candidates, human {n['human']}; of {n_judged} judged {rate:.1%} "
            f"false negatives; removed {n['removed']}, kept {n['kept']}, unjudged {n['unjudged']}"
            + (f"; {n['positives']} more are positives, left out" if n["positives"] else "")
            + (f", relabelled as positives {n['relabelled']}" if args.relabel_at else ""))
    for reason, n in reasons.most_common(10):
        say(f"unjudged: {n} x {reason}")
    for llm in llms:
        say(llm.summary())
    if args.cascade_llm:
        say(f"cascade: {args.cascade_llm} settled {total['small: settled']} of {total['small: asked']}")
    if total["unjudged"] > args.max_unjudged * total["judged"]:
        again = "export the rest with --batch-export" if args.batch_import else "run again"
        raise DataError(f"{args.input}: {total['unjudged']} of {total['judged']} candidates got no usable "
                        f"answer (most: {reasons.most_common(1)[0][0]}); {again}, or raise --max-unjudged")
    if not total["kept"]:
        milder = "try --drop-at 2, or " if total["grade 1"] else ""  # which keeps these
        raise DataError(f"{args.input}: 0 of {total['candidates']} candidates kept at --drop-at "
                        f"{args.drop_at}; {milder}look at the judge's answers")


# ---- what it would cost

def spent(llms, args, times=1):
    """Calls, tokens and money so far, or so many times as much; a single price is that of both models."""
    n = sum((llm.stats for llm in llms), Counter())
    n_calls, n_prompt, n_completion = (times * n[k] for k in ("asked", "prompt_tokens", "completion_tokens"))
    prices = zip(llms, args.price_in * 2, args.price_out * 2)
    money = times * sum(llm.stats["prompt_tokens"] * price_in + llm.stats["completion_tokens"] * price_out
                        for llm, price_in, price_out in prices) / 1e6
    return (f"{n_calls:,.0f} calls, {n_prompt:,.0f} prompt and {n_completion:,.0f} completion tokens, "
            f"{money:,.2f} money")


def token_counter(name):
    """(function from text to tokens, how it counts): the model's tokenizer, or an estimate without one."""
    from tokenizers import Tokenizer
    path = Path(name) / "tokenizer.json"
    on_hub = name.count("/") == 1 and not name.startswith((".", "/")) and not path.is_file()
    try:
        tokenizer = Tokenizer.from_pretrained(name) if on_hub else Tokenizer.from_file(str(path))
    except Exception as error:  # offline, gated, absent, damaged: tokenizers raises bare Exceptions
        return (lambda text: len(text.encode("utf-8", "replace")) / 4,
                f"estimated as bytes / 4; no tokenizer of {name}: {str(error)[:80]}")
    count = functools.lru_cache(lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
    return count, f"counted with the tokenizer of {name}"


def dry_run(args):
    """Print calls, tokens and money of a run, without what the cache holds."""
    counters = {name: token_counter(args.tokenizer or name) for name in (args.llm, args.cascade_llm) if name}

    def instead(llm, key, body):
        count = counters[llm.model][0]
        n_tokens = 10 + sum(count(message["content"]) for message in body["messages"])  # 10: the template's
        llm.stats.update(asked=1, prompt_tokens=n_tokens, completion_tokens=args.answer_tokens)
        return "counted"
    llms = clients(args, instead)
    total = sum((counts for _, counts in filtered(llms, args)), Counter())
    for llm, most in zip(reversed(llms), ("", "at most ")):  # the large model of a cascade is asked at most
        n = llm.stats
        print(f"{llm.model}: {most}{n['asked']} calls, {n['prompt_tokens']:.0f} prompt tokens "
              f"({counters[llm.model][1]}), {n['completion_tokens']} completion tokens (estimated), "
              f"{n['cached']} answers cached")
    print(f"{total['candidates']} candidates, {total['human']} of them judged by people; in all "
          f"{spent(llms, args)} (at --price-in {args.price_in} --price-out {args.price_out})")


# ---- batch files

def export(args):
    """Write what is still to be asked as OpenAI batch files, one model a file: FILE, FILE-2, ..."""
    path = Path(args.batch_export)
    old = [p for p in (path, *path.parent.glob(f"{path.stem}-*{path.suffix}"))
           if p.is_file() and re.fullmatch(r"|-\d+", p.stem.removeprefix(path.stem))
           and b'"method": "POST"' in open(p, "rb").readline()]
    if old and not args.overwrite:
        raise DataError(f"{old[0]} exists; pass --overwrite or another --batch-export")
    paths = []
    files = {}  # model -> the file that is being filled
    n_lines = Counter()  # of a file
    seen = set()  # a custom_id stands for one request

    def add(llm, key, body):
        request = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        line = common.dump(request).encode()
        digest = bytes.fromhex(key)
        if digest not in seen:
            seen.add(digest)
            file = files.get(llm.model)
            if file is None or n_lines[file] == BATCH_REQUESTS or file.tell() + len(line) > BATCH_BYTES:
                number = f"-{len(paths) + 1}" if paths else ""
                paths.append(path.with_stem(path.stem + number))
                if paths[-1].exists() and paths[-1] not in old:
                    raise DataError(f"{paths[-1]} exists and is no export; choose another --batch-export")
                temporary = finished.enter_context(common.atomic(paths[-1]))
                file = files[llm.model] = finished.enter_context(open(temporary, "wb"))
            file.write(line)
            n_lines[file] += 1
        return "exported"

    with contextlib.ExitStack() as finished:  # the files get their names when all ends well
        for _ in filtered(clients(args, add), args):
            pass
    for stale in set(old) - set(paths):
        stale.unlink()
    say(f"{len(seen)} calls to ask, in {len(paths)} files: {' '.join(map(str, paths))}")


def read_result(path, number, line):
    """(custom_id, text, None) of a line of batch results, or (custom_id, None, what went wrong)."""
    result = parse_line(path, number, line)
    key = result.get("custom_id")
    response = result.get("response") or {}
    if not (isinstance(key, str) and isinstance(response, dict) and {"response", "error"} & result.keys()):
        raise DataError(f"{path}:{number}: no batch result (custom_id, response, error); "
                        "give the host's output or error file")
    body = response.get("body") or {}
    text, reason = read_answer(body)
    if reason == "broken":
        error = result.get("error") or (body.get("error") if isinstance(body, dict) else body) or "no answer"
        reason = str(error.get("message") if isinstance(error, dict) else error)[:200]
    return key, text, reason or (None if text.strip() else "empty")


def import_results(args, llms):
    """Store the answers of batch results; {key: what went wrong} of the others."""
    errors = {}
    n = Counter()
    stores = [Answers(llm.path) for llm in llms]
    for path in args.batch_import:
        for number, line in read_lines(path):
            key, text, reason = read_result(path, number, line)
            if not re.fullmatch("[0-9a-f]{32}", key):
                n["not ours"] += 1
            elif reason:
                errors[key] = f"batch: {reason}"
            else:
                n["answers"] += 1
                for store, version in zip(stores, (args.llm_version, None)):
                    kept = store.get(key)
                    if parse_judgment(text) or not (kept and parse_judgment(kept[0])):
                        store.store(key, text, version)  # in place of a usable one only a usable one
    for store in stores:
        store.close()
    say(f"imported {n['answers']} answers; {len(errors)} failed, {n['not ours']} not ours")
    return errors


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.dry_run:
        return dry_run(args)
    if args.batch_export:
        return export(args)
    output = Output(args, [args.input])
    if output.is_done():
        if not common.read_json(output.meta_path)["counts"].get("unjudged", 1):
            return
        say(f"{output.path}: some candidates were left unjudged, asking for them again")
    llms = clients(args)
    if args.batch_import:
        errors = import_results(args, llms)

        def missing(llm, key, body):
            unusable = "batch: unparsable" if llm.answers.get(key) else "not in the batch results"
            return errors.get(key, unusable)
        llms = clients(args, missing)
    table = defaultdict(Counter)
    reasons = Counter()

    def records():
        for record, counts in filtered(llms, args):
            table[record["lang"]].update(counts)
            reasons.update(passage["reason"] for passage in record.get("unjudged", []))
            yield record
        report(args, table, reasons, llms)  # before the file gets its name
    output.write_lines(map(common.dump, records()))
    total = sum(table.values(), Counter())
    kinds = ("queries", "candidates", "removed", "relabelled", "kept", "unjudged")
    output.finish(**{kind: total[kind] for kind in kinds}, calls={llm.model: +llm.stats for llm in llms},
                  reasons=reasons, by_lang=dict(sorted(table.items())))  # +: without what is 0


if __name__ == "__main__":
    run(main)
