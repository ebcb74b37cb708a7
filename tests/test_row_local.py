"""Weights that a prediction's own distribution determines, made inside the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.helpers import close, grads, leaf, peak_bytes
from tests.loss_forms import apply
from tests.strategies import Batch, batches, integers, mask, normal
from wmtp import (
    RowLocalWeights,
    dft_weights,
    linear_weighted_mtp_loss,
    linear_weighted_mtp_loss_and_stats,
    weighted_mtp_loss,
    weighted_mtp_loss_and_stats,
)


KINDS = ("dft", "focal", "entropy", "el2n")
POWERS = st.sampled_from([0.0, 0.5, 1.0, 2.0])
NORMALIZERS = st.sampled_from(["weights", "tokens", 3.5])


def plain_weights(kind: str, power: float, logits: Tensor, targets: Tensor, cap: Any) -> Tensor:
    """`[batch seq heads]`, one row after the other in plain Python."""
    out = torch.zeros(targets.shape, dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in targets.shape)).tolist():
        at = tuple(place)
        if targets[at] < 0:
            continue
        row = [float(z) if cap is None else cap * math.tanh(float(z) / cap) for z in logits[at]]
        top = max(row)
        total = sum(math.exp(z - top) for z in row)
        p = [math.exp(z - top) / total for z in row]
        y = int(targets[at])
        off = sum(p[v] for v in range(len(p)) if v != y)
        score = {
            "dft": p[y],
            "focal": off,
            "entropy": -sum(q * math.log(q) for q in p if q > 0),
            "el2n": math.sqrt(sum(p[v] ** 2 for v in range(len(p)) if v != y) + off**2),
        }[kind]
        out[at] = max(score, 0.0) ** power
    return out


@pytest.mark.parametrize("kind", KINDS)
@given(
    case=batches(min_batch=1, min_seq=2),
    power=POWERS,
    normalizer=NORMALIZERS,
    last_head=st.sampled_from([0.0, 0.3]),
)
def test_dense_and_linear_follow_plain_loops(
    kind: Any, case: Batch, power: float, normalizer: str | float, last_head: float
) -> None:
    leaves = [leaf(case.hidden()), leaf(case.unembedding()), leaf(case.bias())]
    logits = oracle.linear_logits(*leaves).view(*case.shape, case.vocab)
    targets = case.labels
    if targets.dim() == 2:
        targets = oracle.mtp_targets(case.labels, case.offsets or case.heads)
    cap = case.options.get("softcap")
    weights = plain_weights(kind, power, logits.detach(), targets, cap)
    # A weight that rounds to 0 or not decides whether anything is counted at all.
    weights = torch.where(weights > 1e-12, weights, 0)
    # A head that counts nothing still has weights in the denominator.
    head_weights = [1.0 / (h + 1) for h in range(case.heads - 1)] + [last_head]
    options: dict[str, Any] = {
        "offsets": case.offsets,
        "normalizer": normalizer,
        "head_weights": head_weights,
        **case.options,
    }
    if weights.sum() == 0 and normalizer == "weights":
        return
    loss, expected = oracle.linear_weighted_mtp_loss(
        leaves[0], leaves[1], case.labels, weights, bias=leaves[2], **options
    )
    row_local = RowLocalWeights(kind, power)
    for form in ("linear", "held"):
        linear = apply(form, leaves, case.labels, row_local, **options)
        close(linear, loss)
        for got, name in zip(grads(linear, leaves), ("hidden", "unembedding", "bias"), strict=True):
            close(got, expected[name])
    wide = leaf(logits)
    dense = weighted_mtp_loss(wide, case.labels, row_local, **options)
    close(dense, loss)
    of_logits = oracle.weighted_mtp_loss(wide, case.labels, weights, **options)[1]["logits"]
    close(grads(dense, [wide])[0], of_logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slab_rows", [1, 3, 1000])
def test_narrow_dtypes_and_small_slabs(kind: Any, dtype: torch.dtype, slab_rows: int) -> None:
    hidden, unembedding = normal(0, 2, 9, 2, 16).to(dtype), normal(1, 40, 16, scale=0.3).to(dtype)
    labels = integers(2, 40, 2, 9)
    row_local = RowLocalWeights(kind)
    leaves, wide = ([leaf(x) for x in xs] for xs in ((hidden, unembedding),) * 2)
    wide = [leaf(x.double()) for x in (hidden, unembedding)]
    got = linear_weighted_mtp_loss(
        *leaves, labels, row_local, slab_bytes=slab_rows * 40 * dtype.itemsize
    )
    truth = linear_weighted_mtp_loss(*wide, labels, row_local)
    bound = 3e-6 if dtype == torch.float32 else 6e-3
    torch.testing.assert_close(got.double(), truth, rtol=bound, atol=0)
    upstream = torch.tensor(0.37)
    for x, y in zip(
        grads(got, leaves, upstream), grads(truth, wide, upstream.double()), strict=True
    ):
        assert x.dtype == dtype
        assert float((x.double() - y).norm() / y.norm()) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_say_which_weights_were_used(kind: Any) -> None:
    hidden, unembedding = normal(0, 2, 5, 2, 4), normal(1, 7, 4)
    logits, row_local = oracle.linear_logits(hidden, unembedding), RowLocalWeights(kind)
    labels = torch.where(mask(3, 0.5, 2, 5, 2), logits.argmax(-1), integers(2, 7, 2, 5, 2))
    options: Any = {"head_weights": (1.0, 0.0)}
    loss, stats = linear_weighted_mtp_loss_and_stats(
        hidden, unembedding, labels, row_local, **options
    )
    dense, known = weighted_mtp_loss_and_stats(logits, labels, row_local, **options)
    close(loss, dense)
    for one, other in zip(stats, known, strict=True):
        close(one, other)
    assert (stats.weight_sum != stats.token_count).all()
    assert (stats.head_accuracy > 0).all()


def test_dft_is_the_function_of_that_name_where_one_head_is_normalised() -> None:
    hidden, unembedding = normal(0, 2, 5, 1, 4), normal(1, 7, 4)
    labels = integers(2, 7, 2, 5)
    by_function = linear_weighted_mtp_loss(hidden, unembedding, labels, dft_weights)
    by_row = linear_weighted_mtp_loss(hidden, unembedding, labels, RowLocalWeights("dft"))
    close(by_row, by_function)


def test_the_weight_of_low_precision_logits_is_float32() -> None:
    logits, labels = normal(0, 2, 9, 2, 11).bfloat16(), integers(1, 11, 2, 9)
    _, stats = weighted_mtp_loss_and_stats(
        logits, labels, RowLocalWeights("dft"), normalizer="tokens"
    )
    weights = torch.where(stats.token_ce > 0, torch.exp(-stats.token_ce), 0)
    close(stats.weight_sum, weights.sum((0, 1)), torch.float32)


def test_the_weight_carries_no_gradient() -> None:
    logits = leaf(normal(0, 1, 3, 1, 5))
    labels = torch.tensor([[0, 1, 2]])
    loss = weighted_mtp_loss(logits, labels, RowLocalWeights("dft"), normalizer="tokens")
    (got,) = grads(loss, [logits])
    p = logits.detach().softmax(-1)[0, :2, 0]
    onehot = torch.eye(5, dtype=torch.float64)[labels[0, 1:]]
    chosen = (p * onehot).sum(-1, keepdim=True)
    close(got[0, :2, 0], chosen * (p - onehot) / 2)


def test_nothing_valid_and_weights_that_underflow_give_zero() -> None:
    hidden, unembedding = leaf(normal(0, 1, 3, 2, 4).float()), leaf(normal(1, 7, 4).float())
    for labels, x in (
        (torch.full((1, 3), -100), hidden),
        (torch.zeros(1, 3, dtype=torch.long), leaf(hidden * 1e4)),
    ):
        bias = torch.tensor([-1e6] + [0.0] * 6)
        loss = linear_weighted_mtp_loss(x, unembedding, labels, RowLocalWeights("dft"), bias=bias)
        assert loss == 0
        assert all((g == 0).all() for g in grads(loss, [x, unembedding]))


def test_the_slab_is_all_that_is_held() -> None:
    hidden, unembedding = leaf(normal(0, 1, 400, 1, 8).float()), leaf(normal(1, 3000, 8).float())
    labels = integers(2, 3000, 1, 400)

    def work() -> None:
        linear_weighted_mtp_loss(
            hidden, unembedding, labels, RowLocalWeights("entropy"), slab_bytes=20 * 3000 * 4
        ).backward()

    whole = 400 * 3000 * 4
    assert peak_bytes(work) < whole / 4


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (RowLocalWeights("perplexity"), "weights.kind"),  # pyright: ignore
        (RowLocalWeights("dft", -1.0), "weights.power"),
        (RowLocalWeights("dft", math.inf), "weights.power"),
    ],
)
@pytest.mark.parametrize("form", ["dense", "linear"])
def test_unknown_kinds_and_powers_are_refused(
    wrong: RowLocalWeights, named: str, form: str
) -> None:
    labels = torch.tensor([[0, 1, 2]])
    dense, linear = (torch.zeros(1, 3, 4),), (torch.zeros(1, 3, 2), torch.zeros(4, 2))
    loss: Any = weighted_mtp_loss if form == "dense" else linear_weighted_mtp_loss
    with pytest.raises(ValueError, match=named):
        loss(*(dense if form == "dense" else linear), labels, wrong)


# Dynamo makes an instance of an autograd.Function while it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_whole(kind: Any) -> None:
    hidden, unembedding = leaf(normal(0, 2, 5, 2, 4)), leaf(normal(1, 7, 4))
    labels = integers(2, 7, 2, 5)

    def step(x: Tensor, w: Tensor) -> Tensor:
        return linear_weighted_mtp_loss(x, w, labels, RowLocalWeights(kind))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, unembedding)
    eager = step(hidden, unembedding)
    close(compiled, eager)
    for got, known in zip(
        grads(compiled, [hidden, unembedding]), grads(eager, [hidden, unembedding]), strict=True
    ):
        close(got, known)
