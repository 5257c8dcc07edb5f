"""The loss of 05_train.py, its gradients and weights, against the formula written out in float64."""
import itertools
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import load_stage

stage = load_stage("05_train")
SMALL = {("sw", 0): 2, ("sw", 1): 1, ("th", 2): 1}
UNEVEN = {("sw", 0): 300, ("sw", 1): 30, ("sw", 2): 3, ("te", 0): 20, ("te", 2): 60,
          ("th", 1): 5, ("yo", 0): 1}
WEIGHTINGS = ["inverse", "none"]


def queries(sizes):
    """{(lang, topic): n}: so many queries, no two with a mark in common."""
    pairs = [pair for pair, n in sizes.items() for _ in range(n)]
    return [stage.Query(lang, str(i), topic, 0, (i,)) for i, (lang, topic) in enumerate(pairs)]


def sampling(weighting, **changed):
    flags = {"weighting": weighting, "alpha": 0.45, "beta": 0.40, "seed": 13, "batch_size": 24,
             "mixed": False, "language_power": 0.0, "topic_power": 0.0, "short_batch": "reuse"}
    return Namespace(**flags | changed)


def settings(weight_on="loss", short_batch="reuse", batch_size=4):
    return Namespace(temperature=0.05, weight_on=weight_on, short_batch=short_batch, batch_size=batch_size)


def collated(records, alone=False, negatives=3):
    """(docids of the passages, target, masked) of the first use of each."""
    args = Namespace(seed=13, negatives=negatives, no_in_batch=alone)
    passages, target, masked = stage.collate(records, [0] * len(records), args)
    return [p["docid"] for p in passages], torch.from_numpy(target), torch.from_numpy(masked)


def passage(docid):
    return {"docid": docid, "title": "", "text": f"maandishi {docid} 🙂"}


def batch():
    """Four queries: p1's false negative is q0's positive, q2's negative is one of q3's positives."""
    records = [{"query_id": f"q{q}", "lang": "ko", "query": f"질문 {q}", "false_negatives": [],
                "positive_passages": [passage(f"p{q}")],
                "negative_passages": [passage(f"n{q}{j}") for j in range(3)]}
               for q in range(4)]
    records[1]["false_negatives"] = [passage("p0")]
    records[2]["negative_passages"][1] = passage("x")
    records[3]["positive_passages"].append(passage("x"))
    return records


def reference(vectors, keys, n, weight, temperature, weight_on, divisor):
    """(loss, gradient) in float64, one query at a time.

    -log(e+ / (e+ + sum of e-)); a relevant passage leaves the sum.
    """
    v = torch.tensor(vectors, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for q in range(n):
        relevant = {0: {"p0"}, 1: {"p1", "p0"}, 2: {"p2"}, 3: {"p3", "x"}}[q]
        row_of_positive = 4 * q  # each query brings its positive and three negatives
        e = [torch.exp((v[q] * v[n + row]).sum() / temperature) for row in range(len(keys))]
        negatives = sum(e[row] for row in range(len(keys)) if keys[row] not in relevant)
        if weight_on == "negatives":
            total = total - torch.log(e[row_of_positive] / (e[row_of_positive] + weight[q] * negatives))
        else:
            total = total - weight[q] * torch.log(e[row_of_positive] / (e[row_of_positive] + negatives))
    total = total / divisor
    total.backward()
    return total.item(), v.grad.numpy()


def drawn_queries(members, args, skip=0):
    plan = itertools.islice(stage.batches(members, args), skip, skip + 1000)
    return [query for _, members, _ in plan for query in members]


def weights_by_hand(members, args):
    """The docstring's formula, label by label."""
    if args.weighting == "none":
        return np.ones(len(members))
    drawn, total = drawn_queries(members, args), np.zeros(len(members))
    for mean, label in ((args.alpha, lambda q: q.lang), (args.beta, lambda q: q.topic)):
        share = {label(q): sum(label(o) == label(q) for o in members) / len(members) for q in members}
        raw = sorted(share[label(q)] ** -0.5 for q in drawn)
        median = (raw[(len(raw) - 1) // 2] + raw[len(raw) // 2]) / 2
        g = {of: min(max(p ** -0.5, median / 2), 2 * median) for of, p in share.items()}
        average = sum(g[label(q)] for q in drawn) / len(drawn)
        total += [mean * g[label(q)] / average for q in members]
    return total


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("changed", [{}, {"mixed": True}, {"language_power": 1.0, "topic_power": 0.5}],
                         ids=str)
def test_weights_follow_the_formula_and_average_alpha_plus_beta_over_the_draws(weighting, changed, capsys):
    members, args = queries(UNEVEN), sampling(weighting, **changed)
    w = stage.weights(members, args)
    found = np.array([w(q) for q in members])
    assert np.allclose(found, weights_by_hand(members, args), rtol=1e-6)
    if weighting == "none":
        return
    later = np.mean([w(q) for q in drawn_queries(members, args, skip=1000)])
    assert math.isclose(later, 0.85, rel_tol=0.01)
    assert found.max() <= 4 * np.median(found)
    if weighting == "inverse" and not changed:
        of = dict(zip([(q.lang, q.topic) for q in members], found))
        assert of["yo", 0] > of["te", 0] > of["sw", 0] and of["sw", 1] > of["sw", 2] > of["sw", 0]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["sw", "te", "th", "yo"]  # one a language
    assert "5 queries, fewer than a batch of 24" in lines[2] and "fewer" not in lines[0]


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("weight_on", ["loss", "negatives"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_and_gradients_equal_the_formula(weighting, weight_on, short):
    keys, target, masked = collated(batch())
    assert target.tolist() == [0, 4, 8, 12] and len(keys) == 16
    vectors = torch.randn(20, 8, dtype=torch.float64, generator=torch.manual_seed(1))
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    weight = weights_by_hand(queries(SMALL), sampling(weighting))
    args = settings(weight_on, "shrink" if short else "reuse", batch_size=6)  # 4 where 6 were asked
    divisor = 6 if short else 4
    expected, gradient = reference(vectors.numpy(), keys, 4, weight, 0.05, weight_on, divisor)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        ours = vectors.detach().clone().to(dtype).requires_grad_()
        w = torch.tensor(weight, dtype=dtype)
        loss, seen = stage.contrastive_loss(ours[:4], ours[4:], target, masked, w, args)
        loss.backward()
        plain, _ = reference(vectors.numpy(), keys, 4, np.ones(4), 0.05, weight_on, divisor)
        assert abs(seen["plain_loss"] - plain) < tolerance * max(1, plain)
        assert abs(loss.item() - expected) < tolerance * max(1, expected)
        assert np.abs(ours.grad.numpy() - gradient).max() < tolerance * np.abs(gradient).max()


def test_accuracy_is_the_share_of_queries_whose_positive_is_first_of_what_is_not_masked():
    keys, target, masked = collated(batch())
    passages = torch.eye(16)
    query = passages[[0, keys.index("p0"), 9, 12]]  # q1 scores best with its masked p0, q2 with its negative
    for second, accuracy in ((0.5, 0.75), (0.0, 0.5)):
        query[1, target[1]] = second
        query[1, 5] = 0.1
        _, seen = stage.contrastive_loss(query, passages, target, masked, torch.ones(4), settings())
        assert seen["accuracy"] == accuracy


def test_a_masked_pair_has_no_gradient():
    keys, target, masked = collated(batch())
    assert masked[1, keys.index("p0")] and masked[3, keys.index("x")]
    assert masked.sum() == 2 + (keys.count("x") - 1) and not masked[torch.arange(4), target].any()
    passages = torch.randn(16, 8, generator=torch.manual_seed(2), requires_grad=True)
    query = torch.randn(4, 8, generator=torch.manual_seed(3))
    one = query[1:2], passages, target[1:2], masked[1:2], torch.ones(1), settings()
    stage.contrastive_loss(*one)[0].backward()
    assert passages.grad[keys.index("p0")].abs().max() == 0 < passages.grad[target[1]].abs().max()


def test_without_in_batch_negatives_a_query_has_its_own_and_without_negatives_the_others_positives():
    _, target, masked = collated(batch(), alone=True)
    for q, row in enumerate(masked):
        assert torch.nonzero(~row).flatten().tolist() == [4 * q + j for j in range(4)]
    records = batch()
    for record in records:
        del record["negative_passages"]
    keys, target, masked = collated(records, negatives=0)
    assert target.tolist() == [0, 1, 2, 3] and keys[:3] == ["p0", "p1", "p2"]
    assert torch.nonzero(masked).tolist() == [[1, 0]]


def test_a_passage_with_the_text_of_a_relevant_one_is_masked_whatever_its_docid_and_title():
    records = batch()
    q1_s = {"docid": "other", "title": "another title", "text": "MAANDISHI  p1 🙂"}
    records[0]["negative_passages"][0] = q1_s
    records[2]["negative_passages"][0] = passage("p2") | {"docid": "again"}  # its own positive
    records[3]["lang"] = "th"
    records[3]["positive_passages"][0]["text"] = records[1]["positive_passages"][0]["text"]
    keys, _, masked = collated(records)
    other, again = keys.index("other"), keys.index("again")
    before = collated(batch())[2]
    new = [[1, other], [1, 12], [2, again], [3, 4], [3, other]]
    assert torch.nonzero(masked & ~before).tolist() == sorted(new)


def test_negatives_rotate_and_all_are_used_before_one_repeats():
    record = {"query_id": "7", "lang": "th", "positive_passages": [passage("p0"), passage("p1")],
              "negative_passages": [passage(f"n{j}") for j in range(30)]}
    chosen = [stage.choose(record, visit, Namespace(seed=13, negatives=7)) for visit in range(30)]
    docids = [n["docid"] for _, *negatives in chosen for n in negatives]
    for start in range(0, 210, 30):
        assert len(set(docids[start:start + 30])) == 30
    assert all(len({n["docid"] for n in negatives}) == 7 for _, *negatives in chosen)
    assert [p["docid"] for p, *_ in chosen[:4]] in (["p0", "p1", "p0", "p1"], ["p1", "p0", "p1", "p0"])
