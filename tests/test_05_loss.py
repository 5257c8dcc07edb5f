"""The loss of 05_train.py, its gradients and weights against a reference written out by the formula in float64."""

import itertools
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import load_stage

stage = load_stage("05_train")
RECORDS = [  # (lang, topic): 3 of sw, 1 of th; topics 0 0 1 2
    ("sw", 0),
    ("sw", 0),
    ("sw", 1),
    ("th", 2),
]


def query(lang, topic):
    return stage.Query(lang, "1", topic, 0, ())


def settings(weight_on="loss", short_batch="reuse", batch_size=4):
    return Namespace(temperature=0.05, weight_on=weight_on, short_batch=short_batch, batch_size=batch_size)


def collated(records):
    """(texts, target, masked) of the first use of each."""
    passages, target, masked = stage.collate(records, [0] * len(records), Namespace(seed=13, negatives=3))
    return [p["docid"] for p in passages], torch.from_numpy(target), torch.from_numpy(masked)


def passage(docid):
    return {"docid": docid, "title": "", "text": f"maandishi {docid} 🙂"}


def batch():
    """Four queries with shared passages: p1's false negative is q0's positive, q2's negative is one of q3's positives."""
    records = [
        {
            "query_id": f"q{q}",
            "lang": "ko",
            "query": f"질문 {q}",
            "positive_passages": [passage(f"p{q}")],
            "negative_passages": [passage(f"n{q}{j}") for j in range(3)],
            "false_negatives": [],
        }
        for q in range(4)
    ]
    records[1]["false_negatives"] = [passage("p0")]
    records[2]["negative_passages"][1] = passage("x")
    records[3]["positive_passages"].append(passage("x"))
    return records


def reference(vectors, keys, n, weight, temperature, weight_on, divisor):
    """(loss, gradient) in float64, one query at a time: -log(e+ / (e+ + sum of e-)), a relevant passage leaves the sum."""
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


def weight_by_hand(weighting, alpha=0.45, beta=0.40):
    langs, topics = zip(*RECORDS)
    if weighting == "none":
        return [1.0] * 4
    g = {"inverse": lambda n: 1 / (n / 4), "proportional": lambda n: n / 4, "uniform": lambda n: 1.0}[
        weighting
    ]
    raw = [[g(labels.count(x)) for x in labels] for labels in (langs, topics)]
    mean = [sum(r) / 4 for r in raw]
    return [alpha * a / mean[0] + beta * b / mean[1] for a, b in zip(*raw)]


@pytest.mark.parametrize("weighting", ["inverse", "proportional", "uniform", "none"])
def test_weights_follow_the_shares_and_average_alpha_plus_beta(weighting):
    queries = [query(*record) for record in RECORDS]
    w = stage.weights(queries, Namespace(weighting=weighting, alpha=0.45, beta=0.40))
    found = np.array([w(q) for q in queries])
    assert np.allclose(found, weight_by_hand(weighting), rtol=1e-6)
    if weighting != "none":
        assert math.isclose(found.mean(), 0.85, rel_tol=1e-6)
    if weighting == "inverse":
        assert found[3] > found[2] > found[0]


@pytest.mark.parametrize(
    "weighting, weight_on, short",
    list(
        itertools.product(
            ["inverse", "proportional", "uniform", "none"], ["loss", "negatives"], [False, True]
        )
    ),
)
def test_loss_and_gradients_equal_the_formula(weighting, weight_on, short):
    keys, target, masked = collated(batch())
    assert target.tolist() == [0, 4, 8, 12] and len(keys) == 16
    vectors = torch.nn.functional.normalize(
        torch.randn(20, 8, dtype=torch.float64, generator=torch.manual_seed(1)), dim=1
    )
    weight = weight_by_hand(weighting)
    args = settings(
        weight_on, "shrink" if short else "reuse", batch_size=6
    )  # a batch of 4 where 6 were asked
    expected, gradient = reference(vectors.numpy(), keys, 4, weight, 0.05, weight_on, 6 if short else 4)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        ours = vectors.detach().clone().to(dtype).requires_grad_()
        loss = stage.contrastive_loss(
            ours[:4], ours[4:], target, masked, torch.tensor(weight, dtype=dtype), args
        )
        loss.backward()
        assert abs(loss.item() - expected) < tolerance * max(1, expected)
        assert np.abs(ours.grad.numpy() - gradient).max() < tolerance * np.abs(gradient).max()


def test_a_masked_pair_has_no_gradient():
    keys, target, masked = collated(batch())
    assert masked[1, keys.index("p0")] and masked[3, keys.index("x")]
    assert masked.sum() == 2 + (keys.count("x") - 1) and not masked[torch.arange(4), target].any()
    passages = torch.randn(16, 8, generator=torch.manual_seed(2), requires_grad=True)
    query = torch.randn(4, 8, generator=torch.manual_seed(3))
    stage.contrastive_loss(
        query[1:2], passages, target[1:2], masked[1:2], torch.ones(1), settings()
    ).backward()
    assert passages.grad[keys.index("p0")].abs().max() == 0 < passages.grad[target[1]].abs().max()


def test_a_passage_with_the_text_of_a_relevant_one_is_masked_whatever_its_docid_and_title():
    records = batch()
    records[0]["negative_passages"][0] = {
        "docid": "other",
        "title": "another title",
        "text": "MAANDISHI  p1 🙂",
    }  # q1's positive
    records[2]["negative_passages"][0] = passage("p2") | {"docid": "again"}  # its own positive
    records[3]["lang"], records[3]["positive_passages"][0]["text"] = (
        "th",
        records[1]["positive_passages"][0]["text"],
    )
    keys, _, masked = collated(records)
    other, again = keys.index("other"), keys.index("again")
    before = collated(batch())[2]
    new = [[1, other], [1, 12], [2, again], [3, 4], [3, other]]
    assert torch.nonzero(masked & ~before).tolist() == sorted(new)


def test_negatives_rotate_and_all_are_used_before_one_repeats():
    record = {
        "query_id": "7",
        "lang": "th",
        "positive_passages": [passage("p0"), passage("p1")],
        "negative_passages": [passage(f"n{j}") for j in range(30)],
    }
    chosen = [stage.choose(record, visit, Namespace(seed=13, negatives=7)) for visit in range(30)]
    docids = [n["docid"] for _, *negatives in chosen for n in negatives]
    for start in range(0, 210, 30):
        assert len(set(docids[start : start + 30])) == 30
    assert all(len({n["docid"] for n in negatives}) == 7 for _, *negatives in chosen)
    assert [p["docid"] for p, *_ in chosen[:4]] in (["p0", "p1", "p0", "p1"], ["p1", "p0", "p1", "p0"])
