"""Selections that are guessed while they are awaited: the same numbers, whatever the guess, for less.

`rho1_weights` as the weights of a linear loss; `forward_guessing_rows` and `corrected_rows` under it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests import oracle
from tests.helpers import all_zero, close, grads, leaf, operations, peak_bytes, subsets, untouched
from tests.loss_forms import apply, known, leaves_of
from tests.strategies import IGNORE, Batch, batches, integers, mask, normal, uniform
from tests.test_slabs import problem
from wmtp import (
    dft_weights,
    linear_weighted_mtp_loss,
    linear_weighted_mtp_loss_and_stats,
    operators,
    rho1_weights,
    top_k_weights,
    weighted_mtp_loss,
)
from wmtp.guesses import early_rho1
from wmtp.problem import NOT_LOCAL, Gradients
from wmtp.schedule import can_guess
from wmtp.slab_columns import forward_columns
from wmtp.slab_rows import corrected_rows, forward_backward_rows, forward_guessing_rows


ALL = [True, True, True]


def rho1(reference: Tensor, **options: Any) -> functools.partial[Tensor]:
    return functools.partial(rho1_weights, reference_nll=reference, **options)


def late(weights: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, so that nobody can tell what it will give."""
    return lambda token_ce, valid: weights(token_ce, valid)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each backward pass had to correct."""
    counts: list[int] = []

    def watched(asked: Any, guessed: Tensor, factor: Tensor, *rest: Any) -> Gradients:
        # One row too many counts as wrong what differs by more than rounding.
        counts.append(int((~torch.isclose(guessed, factor, rtol=1e-5, atol=0)).sum()))
        return corrected_rows(asked, guessed, factor, *rest)

    monkeypatch.setattr("wmtp.operators.corrected_rows", watched)
    return counts


# --------------------------------------------------------------------------------------- the numbers


@given(
    case=batches(min_batch=1, min_seq=1, max_seq=12),
    keep=st.sampled_from([0.05, 0.3, 0.6, 1.0]),
    scope=st.sampled_from(["sequence", "batch", "all"]),
    slab_rows=st.sampled_from([1, 2, 5, 1000]),
    normalizer=st.sampled_from(["weights", "tokens", 7.5]),
    by_head=st.booleans(),
    upstream=st.sampled_from([1.0, -0.37]),
)
def test_loss_statistics_and_gradients_follow_the_oracle(
    case: Batch,
    keep: float,
    scope: str,
    slab_rows: int,
    normalizer: Any,
    by_head: bool,
    upstream: float,
) -> None:
    tensors = leaves_of(case, "linear")
    # Scores apart from one another: rounding must not decide what is kept.
    reference = normal(case.seed + 7, *case.shape)
    options: dict[str, Any] = {
        "offsets": case.offsets, "normalizer": normalizer, **case.options,
        "head_weights": [1 / (2 + h) for h in range(case.heads)] if by_head else None,
    }  # fmt: skip
    logits = oracle.linear_logits(*(x.detach() for x in tensors))
    softcap = case.options.get("softcap")
    ce, _ = oracle.mtp_ce_loss(
        logits, case.labels, offsets=case.offsets, softcap=softcap, reduction="none"
    )
    valid = oracle.valid_of(case.labels, case.heads, offsets=case.offsets)
    weights = oracle.rho1_weights(ce, valid, reference, keep=keep, scope=scope)
    expected, gradients = known("linear", tensors, case.labels, weights, **options)

    asked = rho1(reference, keep=keep, scope=scope, offsets=case.offsets)
    slab_bytes = slab_rows * case.vocab * 8
    loss, stats = apply(
        "linear", tensors, case.labels, asked, stats=True, slab_bytes=slab_bytes, **options
    )
    close(loss, expected)
    close(stats.token_ce, ce)
    for found, gradient in zip(grads(upstream * loss, tensors), gradients, strict=False):
        close(found, upstream * gradient)


@pytest.mark.parametrize("wanted", subsets(3)[1:])
@pytest.mark.parametrize("slab_rows", [3, 1000])
def test_every_subset_of_inputs_that_require_grad(wanted: tuple[bool, ...], slab_rows: int) -> None:
    case = Batch(2, 9, 3, 6, 3, None, integers(0, 6, 2, 9), 4)
    whole, weights = leaves_of(case, "linear"), rho1(uniform(5, 2, 9))
    options = {"slab_bytes": slab_rows * 6 * 8}
    everything = grads(apply("linear", whole, case.labels, late(weights), **options), whole)
    some = [leaf(x, needs) for x, needs in zip(whole, wanted, strict=True)]
    apply("linear", some, case.labels, weights, **options).backward()
    for x, needs, expected in zip(some, wanted, everything, strict=True):
        assert (x.grad is not None) == needs
        if x.grad is not None:
            close(x.grad, expected)


GUESSES = st.sampled_from(["right", "scaled", "nothing", "random", "everything", "opposite"])


@given(
    case=batches(min_batch=1, min_seq=1, label_dims=(3,)),
    kind=GUESSES,
    share=st.sampled_from([0.0, 0.4, 1.0]),
    slab_rows=st.sampled_from([1, 4, 1000]),
)
def test_whatever_is_guessed_the_gradients_are_those_of_the_factors(
    case: Batch, kind: str, share: float, slab_rows: int
) -> None:
    target = case.labels.flatten()
    rows = len(target)
    factor = normal(case.seed + 5, rows).masked_fill(mask(case.seed + 6, 1 - share, rows), 0.0)
    other = normal(case.seed + 7, rows).masked_fill(mask(case.seed + 8, 0.5, rows), 0.0)
    told = {
        "right": factor, "scaled": 3 * factor, "nothing": 0 * factor, "random": other,
        "everything": torch.ones_like(factor), "opposite": torch.where(factor == 0, 1.0, 0.0),
    }[kind].double()  # fmt: skip
    asked = problem(
        case.hidden().flatten(0, 2),
        case.unembedding(),
        target,
        slab_bytes=slab_rows * case.vocab * 8,
    )._replace(bias=case.bias(), **{k: v or 0.0 for k, v in case.options.items()})
    seen_before = torch.zeros(rows, dtype=torch.bool)

    def guess(ce: Tensor, seen: Tensor) -> Tensor:
        nonlocal seen_before
        assert bool((seen | ~seen_before).all()), "what has been seen stays seen"
        assert int(seen.sum()) > int(seen_before.sum())
        close(ce[seen], losses.ce[seen])
        assert all_zero(ce[~seen])
        seen_before = seen.clone()
        return told

    losses = forward_columns(asked, True)
    # Fewer guesses are allowed than there may be rows here; the schedule does not care.
    found, made, guessed = forward_guessing_rows(asked, guess, True, ALL)
    assert torch.equal(guessed, torch.where(target >= 0, told, 0))
    assert torch.equal(seen_before, target >= 0) or not (target >= 0).any()
    for mine, theirs in zip(found, losses, strict=True):
        # Where a row's log-sum-exp is split is its own affair.
        if mine is not found.base and mine is not found.log_sum:
            close(mine.double(), theirs.double())
    close(found.base + found.log_sum, losses.base + losses.log_sum)

    rest = torch.where(target >= 0, factor, 0)
    corrected = corrected_rows(asked, guessed, rest, made, ALL)
    right = forward_backward_rows(asked, rest, NOT_LOCAL, False, False, ALL)[1]
    for mine, theirs in zip(corrected[:3], right[:3], strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("upstream", [1.0, 0.37])
@pytest.mark.parametrize("slab_bytes", [250_000, 400_000, None])
def test_rounding_is_that_of_known_weights(
    dtype: torch.dtype, upstream: float, slab_bytes: int | None, counted: list[int]
) -> None:
    hidden, unembedding = normal(0, 2, 60, 2, 48), normal(1, 500, 48, scale=48**-0.5)
    labels, reference = integers(2, 500, 2, 60), 5 + 2 * uniform(3, 2, 60)
    ours = [leaf(x.to(dtype)) for x in (hidden, unembedding)]
    truth = [leaf(x.detach().double()) for x in ours]
    options = {"head_weights": [1.0, 0.3]}
    loss, stats = linear_weighted_mtp_loss_and_stats(
        *ours, labels, rho1(reference), slab_bytes=slab_bytes, **options
    )
    # The selection of the very cross entropy that was found.
    chosen = rho1(reference)(stats.token_ce, oracle.valid_of(labels, 2))
    right = grads(upstream * linear_weighted_mtp_loss(*truth, labels, chosen, **options), truth)
    logits = F.linear(*ours).float()
    dense = grads(upstream * weighted_mtp_loss(logits, labels, chosen, **options), ours)
    found = grads(upstream * loss, ours)
    assert counted
    assert counted[0] < 30
    for mine, theirs, exact in zip(found, dense, right, strict=True):
        assert mine.dtype == dtype
        error, naive = (float((x.double() - exact).norm() / exact.norm()) for x in (mine, theirs))
        assert error <= max(1.1 * naive, 4 * torch.finfo(torch.float32).eps)


def test_a_nan_at_a_valid_place_is_not_hidden() -> None:
    case = Batch(1, 8, 2, 5, 3, None, integers(0, 5, 1, 8), 4)
    tensors = leaves_of(case, "linear")
    with torch.no_grad():
        tensors[0][0, 2, 0] = torch.nan
    loss = apply("linear", tensors, case.labels, rho1(uniform(5, 1, 8), keep=1.0), slab_bytes=160)
    assert bool(loss.isnan())
    assert bool(grads(loss, tensors)[1].isnan().any())


@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize("upstream", [torch.inf, 1e30])
def test_what_overflows_is_not_finite(keep: float, upstream: float) -> None:
    case = Batch(1, 9, 1, 11, 4, None, integers(0, 11, 1, 9), 4)
    tensors = leaves_of(case, "linear", torch.float32)
    loss = apply("linear", tensors, case.labels, rho1(uniform(5, 1, 9), keep=keep))
    for found in grads(loss * upstream * upstream, tensors):
        assert not bool(found.isfinite().all())


def test_a_nan_that_is_not_kept_does_no_harm(counted: list[int]) -> None:
    case = Batch(1, 9, 1, 11, 4, None, integers(0, 11, 1, 9), 4)
    tensors = leaves_of(case, "linear")
    with torch.no_grad():
        tensors[0][0, 0] = torch.nan
    weights, options = rho1(uniform(5, 1, 9), keep=0.5), {"slab_bytes": 11 * 8 * 2}
    loss = apply("linear", tensors, case.labels, weights, **options)
    right = grads(apply("linear", tensors, case.labels, late(weights), **options), tensors)
    for found, expected in zip(grads(loss, tensors), right, strict=True):
        assert bool(expected.isfinite().all())
        close(found, expected)
    assert counted


def test_logits_that_overflow_are_not_guessed() -> None:
    hidden, unembedding = normal(0, 1, 30, 1, 8), 2000 + 1000 * uniform(1, 20, 8)
    hidden[0, 0] = 6.0  # an ordinary hidden state, logits beyond float16, a loss of NaN
    labels, weights = integers(2, 20, 1, 30, 1), rho1(torch.zeros(1, 30, 1), keep=0.95)
    for asked in (late(weights), weights):
        tensors = [leaf(x.half()) for x in (hidden, unembedding)]
        loss, stats = linear_weighted_mtp_loss_and_stats(
            *tensors, labels, asked, slab_bytes=2 * 2 * (30 + 20) * 8 + 2 * 20 * 2
        )
        assert bool(stats.token_ce[0, 0].isnan())
        assert bool(loss.isfinite())
        for gradient in grads(loss, tensors):
            assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("big", [1.0, 20.0, 1e3, 1e6])
def test_a_large_row_that_is_not_kept_costs_no_precision(big: float) -> None:
    # Orthogonal to the unembedding: its logits are ordinary, what it adds to a gradient is not.
    rows, vocab, dim = 64, 50, 8
    hidden, unembedding = normal(0, 1, rows, 1, dim), normal(1, vocab, dim)
    hidden[..., -1], unembedding[:, -1] = 0.1 * hidden[..., -1], 0.0
    labels, reference = integers(2, vocab, 1, rows, 1), torch.zeros(1, rows, 1)
    for first in range(8):
        x = hidden.clone()
        x[0, first, 0, -1] = big
        ours = [leaf(t.float()) for t in (x, unembedding)]
        exact = [leaf(t.detach().double()) for t in ours]
        shifted = reference.clone()
        shifted[0, first] = 1e-3  # not kept by a whisker, if at all
        options = {"slab_bytes": 8 * vocab * 4}
        loss, stats = linear_weighted_mtp_loss_and_stats(*ours, labels, rho1(shifted), **options)
        chosen = rho1(shifted)(stats.token_ce, torch.ones(1, rows, 1, dtype=torch.bool))
        right = grads(linear_weighted_mtp_loss(*exact, labels, chosen.double()), exact)
        for found, expected in zip(grads(loss, ours), right, strict=True):
            error = float((found.double() - expected).norm() / expected.norm())
            assert error < 1e-6


@pytest.mark.parametrize("shape", [(0, 4, 2, 3), (2, 0, 2, 3), (2, 1, 3, 3)])
def test_nothing_to_select_from(shape: tuple[int, ...]) -> None:
    hidden, unembedding = leaf(normal(0, *shape)), leaf(normal(1, 6, 3))
    labels = torch.full(shape[:2], IGNORE)
    loss = linear_weighted_mtp_loss(hidden, unembedding, labels, rho1(torch.zeros(shape[:2])))
    assert float(loss.detach()) == 0
    assert all(map(all_zero, grads(loss, [hidden, unembedding])))


# ---------------------------------------------------------------------------------------- the price


def priced(slab_rows: int, keep: float) -> tuple[int, int, list[int]]:
    """Operations of a step, those of one product over all rows, and how many rows there are."""
    vocab, dim, seq, heads = 400, 16, 512, 2
    hidden = leaf(normal(0, 1, seq, heads, dim).float())
    unembedding = leaf(normal(1, vocab, dim).float())
    targets, reference = integers(2, vocab, 1, seq, heads), normal(3, 1, seq, heads).float()
    weights = rho1(reference, keep=keep)
    cost = operations(
        lambda: linear_weighted_mtp_loss(
            hidden, unembedding, targets, weights, slab_bytes=slab_rows * vocab * 4
        ).backward()
    )
    return cost, 2 * vocab * dim, [seq * heads]


@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_one_slab_takes_one_product_for_all_and_two_for_what_is_kept(
    keep: float, counted: list[int]
) -> None:
    cost, unit, (rows,) = priced(5000, keep)
    assert counted == [0]
    assert cost == unit * rows * (1 + 2 * keep)


def test_several_slabs_take_little_more(counted: list[int]) -> None:
    cost, unit, (rows,) = priced(160, 0.5)
    assert 0 < counted[0] < rows / 25
    # Three products for each, and one of kept rows is filled up to a multiple of 16.
    assert cost <= unit * (rows * 2 + 3 * counted[0] + 8 * 15)


def test_a_slab_is_a_fair_sample_of_the_batch(counted: list[int]) -> None:
    # The further on, the less is kept: of rows in their order every guess would be of the wrong sort.
    hidden, unembedding = leaf(normal(0, 1, 400, 1, 4)), leaf(normal(1, 30, 4))
    reference = torch.linspace(0, 50, 400).double()[None, :, None]
    linear_weighted_mtp_loss(
        hidden, unembedding, integers(2, 30, 1, 400, 1), rho1(reference), slab_bytes=45 * 30 * 8
    ).backward()
    assert counted[0] <= 8


def test_a_factor_common_to_all_is_no_wrong_guess(counted: list[int]) -> None:
    case = Batch(2, 40, 3, 6, 3, None, integers(0, 6, 2, 40), 4)
    tensors, weights = leaves_of(case, "linear"), rho1(uniform(5, 2, 40))
    for options in ({}, {"head_weights": [1, 0.1, 0.1]}, {"normalizer": 7}):
        loss = apply("linear", tensors, case.labels, weights, **options)
        grads(0.37 * loss, tensors)
        # What nobody told it: that the caller's weights are those of Rho-1 times a number.
    assert counted == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slab_bytes", [300_000, 800_000, 2_000_000])
def test_gradients_and_the_slab_are_all_that_is_held(dtype: torch.dtype, slab_bytes: int) -> None:
    hidden = leaf(normal(0, 2, 200, 2, 32).to(dtype))
    unembedding = leaf(normal(1, 3000, 32).to(dtype))
    labels, weights = integers(2, 3000, 2, 200), rho1(8 + uniform(3, 2, 200))

    def step() -> None:
        loss = linear_weighted_mtp_loss(hidden, unembedding, labels, weights, slab_bytes=slab_bytes)
        loss.backward()

    gradients = (hidden.numel() + unembedding.numel()) * dtype.itemsize
    beside = 2 * 200 * 2 * 400
    if dtype == torch.bfloat16 and slab_bytes < 2 * gradients:
        beside += hidden.numel() * (2 + 2 + 4 + 2 + 4 + 4)
    assert peak_bytes(step) <= 1.1 * (gradients + slab_bytes) + beside


# --------------------------------------------------------------------------- who is asked beforehand


def calls_of(weights: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many predictions were valid at each call of `rho1_weights` or of what is given."""
    case = Batch(1, 40, 2, 5, 3, None, integers(0, 5, 1, 40), 4)
    seen: list[int] = []

    def watched(token_ce: Tensor, valid: Tensor, **options: Any) -> Tensor:
        seen.append(int(valid.sum()))
        return weights(token_ce, valid)

    def early(_: Any, *rest: Any) -> Any:
        found = early_rho1(weights, *rest)
        return found and (watched, found[1])

    monkeypatch.setattr("wmtp.loss.early_rho1", early)
    loss = apply("linear", leaves_of(case, "linear"), case.labels, watched, slab_bytes=20 * 5 * 8)
    loss.backward()
    return seen


def test_a_selection_is_asked_as_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls_of(rho1(uniform(5, 1, 40)), monkeypatch)
    assert len(seen) > 3
    assert seen[:-1] == sorted(set(seen[:-1]))
    assert seen[-2:] == [77, 77]


@pytest.mark.parametrize(
    "weights",
    [
        late(rho1(uniform(5, 1, 40))),
        rho1(uniform(5, 1, 40), mode="softmax"),
        dft_weights,
        functools.partial(dft_weights, mode="none"),
    ],
)
def test_other_functions_are_called_once_with_everything(
    weights: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calls_of(weights, monkeypatch) == [77]


def test_what_cannot_be_told_beforehand_is_not() -> None:
    valid, reference = torch.ones(1, 4, 2, dtype=torch.bool), torch.zeros(1, 4)
    asked = functools.partial(early_rho1, valid=valid, dtype=torch.float64)
    assert asked(rho1(reference)) is not None
    for weights in (
        rho1_weights,
        late(rho1(reference)),
        functools.partial(dft_weights),
        functools.partial(rho1_weights, torch.zeros(1, 4, 2)),
        rho1(reference, mode="softmax"),
        rho1(reference, mode="top"),
        rho1(reference, scope="none"),
        rho1(reference, keep=0.0),
        rho1(reference, keep=1.5),
        rho1(reference, keep="all"),
    ):
        assert asked(weights) is None


@given(
    case=batches(min_batch=1, min_seq=1),
    keep=st.floats(0.01, 1.0),
    scope=st.sampled_from(["sequence", "batch", "all"]),
)
def test_what_is_kept_weighs_what_was_said(case: Batch, keep: float, scope: Any) -> None:
    valid = oracle.valid_of(case.labels, case.heads, offsets=case.offsets)
    early = early_rho1(rho1(torch.zeros(case.shape), keep=keep, scope=scope), valid, torch.float64)
    scores = normal(case.seed, *case.shape)
    weights = top_k_weights(scores, valid, keep=keep, scope=scope)
    assert early is not None
    close(early[0](scores, valid), weights)
    told = early[1]
    close(torch.where(weights > 0, told, 0), weights)
    assert all_zero(told[~valid])


@pytest.mark.parametrize(
    "options", [{"keep": 2.0}, {"scope": "none"}, {"mode": "top"}, {"keeps": 1}]
)
def test_what_the_function_refuses_is_refused_as_by_the_dense_loss(options: dict[str, Any]) -> None:
    case = Batch(1, 6, 2, 5, 3, None, integers(0, 5, 1, 6), 4)
    weights = rho1(torch.zeros(1, 6), **options)
    errors = []
    for form in ("dense", "linear"):
        with pytest.raises((ValueError, TypeError)) as caught:
            apply(form, leaves_of(case, form), case.labels, weights)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_without_memory_or_gradients_nothing_is_guessed() -> None:
    narrow = problem(
        torch.zeros(64, 8).bfloat16(), torch.zeros(100, 8).bfloat16(), torch.zeros(64).long()
    )
    wide = narrow._replace(hidden=torch.zeros(64, 8), unembedding=torch.zeros(100, 8))
    assert can_guess(narrow, ALL)
    assert not can_guess(narrow, [False] * 3)
    # Sums in float32, and as much again while they are narrowed.
    assert not can_guess(narrow._replace(slab_bytes=2 * 2 * (64 + 100) * 8 - 1), ALL)
    assert can_guess(wide._replace(slab_bytes=400 * 3), ALL)
    many = wide._replace(target=torch.zeros(769).long(), slab_bytes=400 * 3)
    assert not can_guess(many, ALL)


# ------------------------------------------------------------------------------------------ autograd


def step(form: str = "linear") -> tuple[list[Tensor], Tensor]:
    case = Batch(2, 30, 2, 6, 3, None, integers(0, 6, 2, 30), 4)
    tensors = leaves_of(case, form)
    with untouched(*tensors, case.labels):
        options = {"slab_bytes": 20 * 6 * 8} if form == "linear" else {}
        loss = apply(form, tensors, case.labels, rho1(uniform(5, 2, 30)), **options)
    return tensors, loss


def test_backward_twice_gives_the_same() -> None:
    leaves, loss = step()
    first, second, doubled = (grads(c * loss, leaves) for c in (1.0, 1.0, 2.0))
    last = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, doubled, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))


def test_a_correction_under_autocast_is_not_narrowed() -> None:
    """A backward pass in an autocast block, of a selection that was guessed wrong."""
    leaves, found = [leaf(normal(n, *s).float()) for n, s in enumerate([(12, 4), (7, 4)])], []
    for enabled in (False, True):
        asked = problem(*leaves, integers(2, 7, 12))
        wrong = operators.guessed_row_losses(
            asked, lambda ce, seen: (ce > ce.median()) * 1.0, False
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(grads(wrong.loss, leaves, uniform(3, 12).float()))
    for here, there in zip(*found, strict=True):
        assert torch.equal(here, there)


def test_several_upstream_gradients_at_once() -> None:
    leaves, loss = step()
    once = grads(loss, leaves)
    many = torch.autograd.grad(
        loss, leaves, torch.tensor([1.0, -2.0, 0.0]).double(), is_grads_batched=True
    )
    for found, expected in zip(many, once, strict=True):
        close(found, torch.stack([expected, -2 * expected, 0 * expected]))


@pytest.mark.parametrize("upstream", [0.0, torch.inf, torch.nan])
def test_upstream_gradients_that_are_no_number(upstream: float) -> None:
    (leaves, loss), (others, right) = step(), step("dense")
    found = grads(loss, leaves, torch.tensor(upstream).double())[1]
    if upstream == 0:
        assert all_zero(found)
    else:
        of_logits = grads(right, others, torch.tensor(upstream).double())[0]
        assert not bool(of_logits.isfinite().all())
        assert not bool(found.isfinite().any())


def test_a_second_derivative_is_refused() -> None:
    leaves, loss = step()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


def test_only_the_losses_reach_the_graph() -> None:
    case = Batch(2, 30, 2, 6, 3, None, integers(0, 6, 2, 30), 4)
    loss, stats = apply(
        "linear", leaves_of(case, "linear"), case.labels, rho1(uniform(5, 2, 30)), stats=True
    )
    assert loss.requires_grad
    assert not any(x.requires_grad for x in stats)
