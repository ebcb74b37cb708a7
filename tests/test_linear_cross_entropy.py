"""How surprised every head was, from hidden states: the same numbers without the logits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests import oracle
from tests.helpers import (
    all_zero,
    close,
    error_against,
    grads,
    leaf,
    operations,
    peak_bytes,
    subsets,
    untouched,
)
from tests.loss_forms import valid_of
from tests.strategies import (
    IGNORE,
    JUNK,
    LAYOUTS,
    SEEDS,
    WIDE_DTYPES,
    Batch,
    Documents,
    batches,
    integers,
    mask,
    normal,
    packings,
    relayout,
    spoiled,
    uniform,
)
from wmtp import (
    linear_mtp_ce_loss,
    linear_token_nll,
    linear_weighted_mtp_loss,
    mtp_ce_loss,
    mtp_targets,
    token_nll,
    weighted_mtp_loss,
)
from wmtp.cross_entropy import Objective, predict
from wmtp.linear_cross_entropy import linear_predict, linear_problem


# Hidden states, unembedding and bias of a small problem, with a seed each.
SHAPES = [(0, (2, 6, 2, 3)), (1, (5, 3)), (2, (5,))]


def inputs(case: Batch, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [leaf(x) for x in (case.hidden(dtype), case.unembedding(dtype), case.bias(dtype))]


def run(case: Batch, tensors: list[Tensor], **options: Any) -> Tensor:
    hidden, unembedding, bias = tensors
    options = {"reduction": "none", "offsets": case.offsets, **case.options, **options}
    return linear_mtp_ce_loss(hidden, unembedding, case.labels, bias=bias, **options)


@given(batches(), WIDE_DTYPES, st.booleans())
def test_values_and_every_gradient_follow_the_oracle(
    case: Batch, dtype: torch.dtype, with_bias: bool
) -> None:
    hidden, unembedding, bias = inputs(case, dtype)
    upstream = case.upstream().to(dtype)
    leaves = [hidden, unembedding, bias] if with_bias else [hidden, unembedding]
    options: dict[str, Any] = {
        "bias": bias if with_bias else None,
        "offsets": case.offsets,
        "reduction": "none",
        **case.options,
    }
    actual = linear_mtp_ce_loss(hidden, unembedding, case.labels, **options)
    expected, gradients = oracle.linear_mtp_ce_loss(
        hidden, unembedding, case.labels, upstream=upstream.double(), **options
    )
    assert actual.dtype == dtype
    close(actual, expected, dtype)
    assert all_zero(actual[~valid_of(case)])
    for found, name in zip(grads(actual, leaves, upstream), gradients, strict=True):
        assert found.dtype == dtype
        close(found, gradients[name], dtype)


@given(batches(), st.sampled_from(["mean", "sum"]), st.sampled_from([1.0, -2.5, 1e-3]))
def test_reductions_and_scaled_gradients_follow_the_oracle(
    case: Batch, reduction: str, scale: float
) -> None:
    leaves = inputs(case)
    loss = run(case, leaves, reduction=reduction)
    expected, gradients = oracle.linear_mtp_ce_loss(
        *leaves[:2],
        case.labels,
        bias=leaves[2],
        offsets=case.offsets,
        reduction=reduction,
        upstream=scale,
        **case.options,
    )
    assert loss.shape == ()
    close(loss, expected)
    for found, name in zip(grads(scale * loss, leaves), gradients, strict=True):
        close(found, gradients[name])


@given(batches())
def test_linear_equals_dense(case: Batch) -> None:
    here, there = inputs(case), inputs(case)
    logits = there[0] @ there[1].T + there[2]
    dense = mtp_ce_loss(logits, case.labels, offsets=case.offsets, reduction="none", **case.options)
    linear = run(case, here)
    close(linear, dense)
    upstream = case.upstream()
    for a, b in zip(grads(linear, here, upstream), grads(dense, there, upstream), strict=True):
        close(a, b)


@pytest.mark.parametrize("wanted", subsets(3)[1:])
@given(case=batches(min_batch=1, min_seq=1))
def test_every_subset_of_inputs_that_require_grad(case: Batch, wanted: tuple[bool, ...]) -> None:
    leaves = inputs(case)
    everything = grads(run(case, leaves), leaves, case.upstream())
    some = [leaf(x, needs) for x, needs in zip(leaves, wanted, strict=True)]
    loss = run(case, some)
    torch.autograd.backward(loss, case.upstream())
    for x, needs, expected in zip(some, wanted, everything, strict=True):
        assert (x.grad is not None) == needs
        if x.grad is not None:
            assert torch.equal(x.grad, expected)


def test_no_gradient_wanted_means_no_graph() -> None:
    loss = linear_mtp_ce_loss(normal(0, 1, 3, 2, 4), normal(1, 5, 4), integers(2, 5, 1, 3))
    assert not loss.requires_grad


@given(batches(max_heads=1, default_offsets=True), st.sampled_from(["none", "mean", "sum"]))
def test_three_axes_of_hidden_states_mean_one_head(case: Batch, reduction: str) -> None:
    hidden, unembedding, bias = inputs(case)
    flat = run(case, [hidden[:, :, 0], unembedding, bias], reduction=reduction)
    assert torch.equal(flat, run(case, [hidden, unembedding, bias], reduction=reduction))
    assert flat.dim() == (3 if reduction == "none" else 0)


@given(batches(label_dims=(2,)))
def test_unshifted_labels_equal_the_targets_made_from_them(case: Batch) -> None:
    hidden, unembedding, bias = inputs(case)
    targets = mtp_targets(case.labels, case.heads if case.offsets is None else case.offsets)
    aligned = linear_mtp_ce_loss(
        hidden, unembedding, targets, bias=bias, reduction="none", **case.options
    )
    assert torch.equal(aligned, run(case, [hidden, unembedding, bias]))


@given(batches(label_dims=(2,), min_seq=1, default_offsets=True))
def test_pre_shifted_labels_take_offsets_from_zero(case: Batch) -> None:
    hidden, unembedding, bias = inputs(case)
    shifted = F.pad(case.labels[:, 1:], (0, 1), value=IGNORE)
    actual = linear_mtp_ce_loss(
        hidden,
        unembedding,
        shifted,
        bias=bias,
        offsets=range(case.heads),
        reduction="none",
        **case.options,
    )
    assert torch.equal(actual, run(case, [hidden, unembedding, bias]))


@given(batches(min_batch=1, min_seq=1), WIDE_DTYPES)
def test_the_size_of_the_slab_does_not_matter(case: Batch, dtype: torch.dtype) -> None:
    upstream = case.upstream().to(dtype)
    one_row = case.vocab * torch.finfo(dtype).bits // 8
    results = []
    for slab_bytes in (None, one_row, 2 * one_row + 1, 7 * one_row, 2**40):
        leaves = inputs(case, dtype)
        loss = run(case, leaves, slab_bytes=slab_bytes)
        results.append([loss, *grads(loss, leaves, upstream)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            close(b, a.double(), dtype)


@pytest.mark.parametrize("vocab", [1, 257, 700])
@pytest.mark.parametrize("rows_in_slab", [1, 3, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wide_vocabulary_may_be_cut_into_slabs(
    vocab: int, rows_in_slab: int, dtype: torch.dtype
) -> None:
    labels = integers(0, vocab, 2, 5).masked_fill(mask(1, 0.2, 2, 5), IGNORE)
    case = Batch(2, 5, 2, vocab, 3, None, labels, 3)
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0}
    leaves, upstream = inputs(case, dtype), case.upstream().to(dtype)
    slab_bytes = rows_in_slab * vocab * torch.finfo(dtype).bits // 8
    loss = run(case, leaves, slab_bytes=slab_bytes, **options)
    expected, gradients = oracle.linear_mtp_ce_loss(
        *leaves[:2],
        labels,
        bias=leaves[2],
        reduction="none",
        upstream=upstream.double(),
        **options,
    )
    close(loss, expected, dtype)
    for found, name in zip(grads(loss, leaves, upstream), gradients, strict=True):
        close(found, gradients[name], dtype)


@pytest.mark.parametrize("slab_bytes", [0, -1])
def test_a_slab_needs_room(slab_bytes: int) -> None:
    with pytest.raises(ValueError, match="slab_bytes"):
        linear_mtp_ce_loss(
            normal(0, 1, 3, 2, 4), normal(1, 5, 4), integers(2, 5, 1, 3), slab_bytes=slab_bytes
        )


def peak_of_slab(slab_bytes: int) -> int:
    """The most memory that was live at once in a forward and backward pass, by the profiler."""
    hidden, unembedding = normal(0, 2, 512, 2, 8).float(), normal(1, 1024, 8).float()
    hidden.requires_grad_()
    unembedding.requires_grad_()
    labels = integers(2, 1024, 2, 512)
    return peak_bytes(
        lambda: linear_mtp_ce_loss(hidden, unembedding, labels, slab_bytes=slab_bytes).backward()
    )


def test_the_logits_are_never_held_beyond_the_slab() -> None:
    all_logits = 2 * 512 * 2 * 1024 * 4
    slab = 256 * 1024
    assert peak_of_slab(slab) < all_logits // 4
    assert peak_of_slab(2 * all_logits) >= all_logits


@given(batches(min_batch=1, min_seq=1), JUNK)
def test_junk_in_ignored_hidden_rows_changes_neither_loss_nor_gradient(
    case: Batch, junk: float
) -> None:
    ignored = ~valid_of(case)
    clean = inputs(case)
    dirty = [leaf(spoiled(case.hidden(), ignored, junk)), *inputs(case)[1:]]
    for reduction in ("none", "mean", "sum"):
        upstream = case.upstream() if reduction == "none" else None
        here = run(case, clean, reduction=reduction)
        there = run(case, dirty, reduction=reduction)
        assert torch.equal(here, there)
        found = grads(there, dirty, upstream)
        for a, b in zip(found, grads(here, clean, upstream), strict=True):
            assert torch.equal(a, b)
        assert all_zero(found[0][ignored])


@given(batches(min_batch=1, min_seq=1), JUNK)
def test_a_junk_upstream_gradient_at_ignored_places_goes_nowhere(case: Batch, junk: float) -> None:
    leaves = inputs(case)
    loss = run(case, leaves)
    upstream = spoiled(case.upstream(), ~valid_of(case), junk)
    pairs = zip(grads(loss, leaves, upstream), grads(loss, leaves, case.upstream()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("stray", [999, -7, 2**40])
def test_a_label_that_no_head_looks_at_may_be_anything(stray: int) -> None:
    hidden, unembedding, labels = normal(0, 2, 5, 2, 3), normal(1, 4, 3), integers(1, 4, 2, 5)
    odd = labels.clone()
    odd[:, 0] = stray
    expected = linear_mtp_ce_loss(hidden, unembedding, labels)
    assert torch.equal(linear_mtp_ce_loss(hidden, unembedding, odd), expected)


@pytest.mark.parametrize("stray", [4, -1, 2**40])
@pytest.mark.parametrize("error", [ValueError, IndexError])
def test_an_out_of_range_label_at_a_valid_place_is_an_error(
    stray: int, error: type[Exception]
) -> None:
    labels = integers(1, 4, 2, 5)
    labels[1, 3] = stray
    with pytest.raises(error, match="label"):
        linear_mtp_ce_loss(normal(0, 2, 5, 2, 3), normal(1, 4, 3), labels)


def test_a_nan_at_a_valid_place_is_not_hidden() -> None:
    hidden = normal(0, 1, 3, 1, 4)
    hidden[0, 0, 0, 2] = math.nan
    assert linear_mtp_ce_loss(hidden, normal(1, 5, 4), integers(1, 5, 1, 3)).isnan()


@given(batches(min_batch=1))
def test_nothing_valid_gives_zero_and_zero_gradients(case: Batch) -> None:
    labels = torch.full_like(case.labels, IGNORE)
    everywhere = torch.ones(case.shape).bool()
    for reduction in ("mean", "sum", "none"):
        leaves = [leaf(spoiled(case.hidden(), everywhere, math.nan)), *inputs(case)[1:]]
        loss = linear_mtp_ce_loss(
            leaves[0],
            leaves[1],
            labels,
            bias=leaves[2],
            offsets=case.offsets,
            reduction=reduction,
            **case.options,
        )
        assert all_zero(loss)
        assert loss.requires_grad
        assert all(all_zero(g) for g in grads(loss.sum(), leaves))


@pytest.mark.parametrize("shape", [(0, 4, 2, 3), (2, 0, 2, 3), (2, 1, 3, 3), (1, 1, 4, 1)])
def test_empty_and_short_batches(shape: tuple[int, ...]) -> None:
    leaves = [leaf(normal(0, *shape)), leaf(normal(1, 5, shape[-1]))]
    loss = linear_mtp_ce_loss(leaves[0], leaves[1], torch.zeros(shape[:2]).long())
    assert all_zero(loss)
    assert all(all_zero(g) for g in grads(loss, leaves))


@given(SEEDS, st.sampled_from([1e4, -1e4, 1e30]))
def test_extreme_logits_stay_exact(seed: int, gap: float) -> None:
    hidden, unembedding = normal(seed, 1, 4, 2, 3).float(), normal(seed + 1, 5, 3).float()
    bias, labels = torch.tensor([0.0, 0.0, gap, 0.0, 0.0]), integers(seed, 5, 1, 4)
    leaves = [leaf(hidden), leaf(unembedding), leaf(bias)]
    loss = linear_mtp_ce_loss(leaves[0], leaves[1], labels, bias=leaves[2], reduction="none")
    expected, gradients = oracle.linear_mtp_ce_loss(
        hidden, unembedding, labels, bias=bias, reduction="none"
    )
    close(loss, expected, torch.float32)
    for found, name in zip(grads(loss.sum(), leaves), gradients, strict=True):
        close(found, gradients[name], torch.float32)


def test_a_vocabulary_masked_by_the_bias_is_a_smaller_one() -> None:
    hidden, unembedding, labels = normal(0, 2, 5, 2, 3), normal(1, 7, 3), integers(2, 5, 2, 5)
    bias = torch.zeros(7, dtype=torch.float64)
    bias[5:] = -math.inf
    whole, small = leaf(hidden), leaf(hidden)
    here = linear_mtp_ce_loss(whole, unembedding, labels, bias=bias)
    there = linear_mtp_ce_loss(small, unembedding[:5], labels)
    close(here, there)
    close(grads(here, [whole])[0], grads(there, [small])[0])


@given(batches(min_batch=1, min_seq=1, options=None), st.sampled_from([-50.0, 1000.0]))
def test_a_constant_added_to_the_logits_changes_nothing(case: Batch, shift: float) -> None:
    hidden, unembedding, bias = inputs(case)
    moved = run(case, [hidden, unembedding, bias + shift])
    torch.testing.assert_close(moved, run(case, [hidden, unembedding, bias]), rtol=1e-9, atol=1e-10)


@given(batches(min_batch=1, min_seq=1))
def test_renaming_the_vocabulary_changes_nothing(case: Batch) -> None:
    order = torch.randperm(case.vocab, generator=torch.Generator().manual_seed(case.seed))
    renamed = torch.where(case.labels == IGNORE, IGNORE, order.argsort()[case.labels.clamp(min=0)])
    hidden, unembedding, bias = inputs(case)
    actual = linear_mtp_ce_loss(
        hidden,
        unembedding[order],
        renamed,
        bias=bias[order],
        offsets=case.offsets,
        reduction="none",
        **case.options,
    )
    close(actual, run(case, [hidden, unembedding, bias]))


@given(batches(min_batch=1, min_seq=1, options=None))
def test_the_bias_gradient_sums_to_zero(case: Batch) -> None:
    leaves = inputs(case)
    total = grads(run(case, leaves), leaves, case.upstream())[2].sum()
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-11)


@given(packings(), st.integers(1, 3), SEEDS)
def test_packed_equals_separate_documents(packing: Documents, heads: int, seed: int) -> None:
    labels = integers(seed, 5, packing.batch, packing.seq)
    hidden, unembedding = normal(seed, packing.batch, packing.seq, heads, 3), normal(seed, 5, 3)
    targets = mtp_targets(labels, heads, segment_ids=packing.segment_ids)
    packed = linear_mtp_ce_loss(hidden, unembedding, targets, reduction="none")
    for b, piece in packing.pieces():
        alone = linear_mtp_ce_loss(
            hidden[b : b + 1, piece], unembedding, labels[b : b + 1, piece], reduction="none"
        )
        close(packed[b : b + 1, piece], alone)


@given(SEEDS, st.integers(1, 4), st.integers(1, 3), st.sampled_from(["left", "right"]), JUNK)
def test_padding_equals_no_padding(
    seed: int, seq: int, padding: int, side: str, junk: float
) -> None:
    labels, hidden = integers(seed, 5, 2, seq), normal(seed, 2, seq, 2, 3)
    pads = (padding, 0) if side == "left" else (0, padding)
    there = F.pad(torch.ones(2, seq).long(), pads)
    targets = mtp_targets(F.pad(labels, pads, value=3), 2, attention_mask=there)
    padded = [leaf(F.pad(hidden, (0, 0, 0, 0, *pads), value=junk)), leaf(normal(seed, 5, 3))]
    alone = [leaf(hidden), leaf(normal(seed, 5, 3))]
    here = linear_mtp_ce_loss(padded[0], padded[1], targets)
    expected = linear_mtp_ce_loss(alone[0], alone[1], labels)
    close(here, expected)
    found, known = grads(here, padded), grads(expected, alone)
    close(found[0][:, pads[0] : pads[0] + seq], known[0])
    close(found[1], known[1])
    assert all_zero(found[0][~there.bool()])


@given(batches(min_batch=1, min_seq=1), LAYOUTS, LAYOUTS)
def test_the_layout_does_not_matter(case: Batch, layout: str, other: str) -> None:
    leaves = inputs(case)
    views = [relayout(x, how) for x, how in zip(leaves, (layout, other, other), strict=True)]
    copies = [leaf(x) for x in views]
    here, there = run(case, views), run(case, copies)
    close(here, there)
    backs = grads(there, copies, case.upstream())
    for inner, view, back, found in zip(
        leaves, views, backs, grads(here, leaves, case.upstream()), strict=True
    ):
        close(found, grads(view, [inner], back)[0])


@given(batches())
def test_inputs_are_never_written_to(case: Batch) -> None:
    leaves, upstream = inputs(case), case.upstream()
    with untouched(*leaves, case.labels, upstream):
        torch.autograd.grad(run(case, leaves), leaves, upstream)


@given(batches(min_batch=1))
def test_backward_twice_gives_the_same(case: Batch) -> None:
    leaves = inputs(case)
    loss = run(case, leaves)
    first, second = (grads(loss, leaves, case.upstream()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    doubled = grads(loss, leaves, 2 * case.upstream())
    assert all(torch.equal(2 * a, b) for a, b in zip(first, doubled, strict=True))


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(with_bias: bool) -> None:
    labels = integers(3, 4, 2, 4)
    labels[0, 2] = IGNORE

    def loss(hidden: Tensor, unembedding: Tensor, bias: Tensor) -> Tensor:
        return linear_mtp_ce_loss(
            hidden,
            unembedding,
            labels,
            bias=bias if with_bias else None,
            label_smoothing=0.1,
            z_loss=0.1,
            softcap=3.0,
            reduction="none",
        )

    leaves = [leaf(x) for x in (normal(0, 2, 4, 2, 3), normal(1, 4, 3), normal(2, 4))]
    leaves[2].requires_grad_(with_bias)
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slab_bytes", [None, 40 * 4 * 5])
def test_low_precision_is_as_good_as_the_naive_path(
    dtype: torch.dtype, seed: int, slab_bytes: int | None
) -> None:
    hidden, unembedding = normal(seed, 3, 12, 4, 16).to(dtype), normal(seed + 1, 40, 16).to(dtype)
    bias, labels = normal(seed + 2, 40).to(dtype), integers(seed, 40, 3, 12)
    targets = mtp_targets(labels, 4).flatten()

    def naive(h: Tensor, u: Tensor, b: Tensor) -> Tensor:
        logits = F.linear(h, u, b)
        logits = logits.double() if h.dtype == torch.float64 else logits.float()
        flat = F.cross_entropy(logits.flatten(0, 2), targets, ignore_index=IGNORE, reduction="none")
        return flat.view(3, 12, 4)

    ours, theirs = ([leaf(x) for x in (hidden, unembedding, bias)] for _ in range(2))
    truth = [leaf(x.double()) for x in (hidden, unembedding, bias)]
    loss = linear_mtp_ce_loss(
        ours[0], ours[1], labels, bias=ours[2], reduction="none", slab_bytes=slab_bytes
    )
    there, known = naive(*theirs), naive(*truth)
    assert loss.dtype == torch.float32
    slack = 2 * torch.finfo(dtype).eps
    assert error_against(known, loss) <= error_against(known, there) + slack
    up = normal(seed + 3, 3, 12, 4).float()
    for mine, other, right in zip(
        grads(loss, ours, up),
        grads(there, theirs, up),
        grads(known, truth, up.double()),
        strict=True,
    ):
        assert mine.dtype == dtype
        slack = 2 * torch.finfo(dtype).eps * float(right.abs().max())
        assert error_against(right, mine) <= error_against(right, other) + slack


def relative(found: Tensor, right: Tensor) -> float:
    """Frobenius error."""
    return float((found.double() - right).norm() / right.norm())


def test_the_mean_of_one_prediction_is_its_loss() -> None:
    hidden, unembedding, labels = (
        normal(0, 1, 3, 4),
        normal(1, 5, 4),
        torch.tensor([[0, 2, IGNORE]]),
    )
    mean, whole = (
        linear_mtp_ce_loss(hidden, unembedding, labels, reduction=reduction)
        for reduction in ("mean", "sum")
    )
    assert mean == whole > 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_mean_and_a_sum_cost_three_products_of_what_has_a_target(reduction: str) -> None:
    hidden, unembedding = leaf(normal(0, 2, 32, 1, 8)), leaf(normal(1, 600, 8))
    labels = integers(2, 600, 2, 32).masked_fill(torch.arange(32) >= 16, IGNORE)

    def step() -> None:
        loss = linear_mtp_ce_loss(hidden, unembedding, labels, offsets=[0], reduction=reduction)
        loss.sum().backward()

    # What each counts in a sum over all is known in the forward pass; of single ones it is not.
    products = 4 if reduction == "none" else 3
    assert operations(step) == products * 2 * (2 * 16) * 600 * 8


# One row, several rows, room for wide sums (142,080 bytes) and several rows, everything at once.
@pytest.mark.parametrize("slab_bytes", [1000, 12_000, 150_000, None])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_bfloat16_gradients_are_rounded_once_whatever_the_slab(
    slab_bytes: int | None, known: bool, upstream: float
) -> None:
    hidden, unembedding = normal(0, 2, 60, 2, 48), normal(1, 500, 48, scale=48**-0.5)
    labels, up = integers(2, 500, 2, 60), 0.1 + uniform(3, 2, 60, 2)
    ours = [leaf(x.bfloat16()) for x in (hidden, unembedding)]
    truth = [leaf(x.detach().double()) for x in ours]
    weights = up if known else (lambda _, valid: torch.where(valid, up.float(), 0))
    loss = upstream * linear_weighted_mtp_loss(*ours, labels, weights, slab_bytes=slab_bytes)
    right = grads(upstream * linear_weighted_mtp_loss(*truth, labels, up), truth)
    logits = F.linear(*ours).float()
    dense = grads(upstream * weighted_mtp_loss(logits, labels, up), ours)
    # Known weights: made before the upstream gradient is known, and kept wide until then if the
    # budget allows.
    twice = known and upstream != 1 and slab_bytes is not None and slab_bytes < 142_080
    for mine, theirs, exact in zip(grads(loss, ours), dense, right, strict=True):
        assert relative(mine, exact) <= min(
            2.5e-3 if twice else 1.9e-3, 1.1 * relative(theirs, exact)
        )


# Below 486,400 bytes there is no room for wide sums of bfloat16 gradients.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slab_bytes", [80_000, 300_000, 800_000])
@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_gradients_and_the_slab_are_all_that_is_held(
    dtype: torch.dtype, slab_bytes: int, masked: float
) -> None:
    hidden = leaf(normal(0, 2, 200, 2, 32).to(dtype))
    unembedding = leaf(normal(1, 3000, 32).to(dtype))
    labels = integers(2, 3000, 2, 200).masked_fill(mask(3, masked, 2, 200), IGNORE)

    def step() -> None:
        loss = linear_weighted_mtp_loss(hidden, unembedding, labels, slab_bytes=slab_bytes)
        loss.backward()

    gradients = (hidden.numel() + unembedding.numel()) * dtype.itemsize
    # Labels, targets, factors and what is known of each row, beside a hidden state of 32 numbers.
    beside = 2 * 200 * 2 * 160
    if dtype == torch.bfloat16 and slab_bytes < 2 * gradients:
        # Recomputing takes the hidden states that count, as they are and scaled, their gradient in
        # float32, and a product as it comes and widened.
        beside += hidden.numel() * (2 + 2 + 4 + 2 + 4 + 4)
    assert peak_bytes(step) <= 1.1 * (gradients + slab_bytes) + beside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slab_bytes", [2**20, 2**22])
def test_recomputing_holds_the_slab_and_a_few_copies_of_hidden_states(
    dtype: torch.dtype, slab_bytes: int
) -> None:
    """What counts is known in the backward pass only."""
    hidden = leaf(normal(0, 2, 500, 1, 16).to(dtype))
    unembedding = leaf(normal(1, 4000, 16).to(dtype))
    labels = integers(2, 4000, 2, 500)

    def step() -> None:
        loss = linear_mtp_ce_loss(
            hidden, unembedding, labels, reduction="none", slab_bytes=slab_bytes
        )
        loss.sum().backward()

    gradients = (hidden.numel() + unembedding.numel()) * dtype.itemsize
    # As they are and scaled, and their gradient in float32, as it comes and widened; what is known of rows.
    beside = hidden.numel() * (2 * dtype.itemsize + 3 * 4) + 2 * 500 * 240
    assert peak_bytes(step) <= 1.1 * (gradients + slab_bytes) + beside


def test_a_tiny_upstream_gradient_survives_float16() -> None:
    labels, leaves = integers(0, 5, 2, 6), [leaf(normal(n, *s).half()) for n, s in SHAPES]
    loss = linear_mtp_ce_loss(leaves[0], leaves[1], labels, bias=leaves[2], reduction="sum") * 1e-7
    scale = 2.0**20  # what a gradient scaler does
    _, expected = oracle.linear_mtp_ce_loss(
        leaves[0], leaves[1], labels, bias=leaves[2], reduction="sum", upstream=scale * 1e-7
    )
    for found, right in zip(grads(scale * loss, leaves), expected.values(), strict=True):
        torch.testing.assert_close(
            found.double(), right, rtol=4e-3, atol=4e-3 * float(right.abs().max())
        )


@pytest.mark.parametrize("upstream", [1e-7, 1e-3, 1.0, 1e3])
def test_float16_rows_keep_their_own_upstream_gradient(upstream: float) -> None:
    labels, leaves = integers(0, 5, 2, 6), [leaf(normal(n, *s).half()) for n, s in SHAPES]
    loss = linear_mtp_ce_loss(leaves[0], leaves[1], labels, bias=leaves[2], reduction="none")
    up = upstream * normal(9, 2, 6, 2).float()
    _, expected = oracle.linear_mtp_ce_loss(
        leaves[0], leaves[1], labels, bias=leaves[2], reduction="none", upstream=up.double()
    )
    # The gradients leave as float16, which cannot say less than 6e-8.
    for found, right in zip(grads(loss, leaves, up), expected.values(), strict=True):
        torch.testing.assert_close(
            found.double(), right, rtol=4e-3, atol=4e-3 * float(right.abs().max()) + 6e-8
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_casts_the_operands_of_the_product_and_nothing_else(dtype: torch.dtype) -> None:
    tensors = [x.to(dtype) for x in (normal(0, 2, 5, 2, 4), normal(1, 6, 4), normal(2, 6))]
    labels, results = integers(0, 6, 2, 5), []
    for enabled in (False, True):
        leaves = [leaf(x) for x in tensors]
        cast = leaves if enabled else [x.to(torch.bfloat16) for x in leaves]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = linear_mtp_ce_loss(cast[0], cast[1], labels, bias=cast[2], z_loss=0.1)
        results.append([loss, *grads(loss, leaves)])
    assert results[1][0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_leaves_float64_alone() -> None:
    hidden, unembedding, labels = normal(0, 2, 5, 2, 4), normal(1, 6, 4), integers(2, 6, 2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_mtp_ce_loss(hidden, unembedding, labels)
    close(loss, oracle.linear_mtp_ce_loss(hidden, unembedding, labels)[0])


@pytest.mark.parametrize("name", ["label_smoothing", "softcap", "z_loss"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_impossible_options_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        linear_mtp_ce_loss(
            normal(0, 1, 3, 1, 4), normal(1, 5, 4), integers(0, 4, 1, 3), **{name: value}
        )


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, unembedding, labels = normal(0, 1, 3, 2, 4), normal(1, 5, 4), integers(0, 5, 1, 3)
    with pytest.raises((TypeError, ValueError), match="unembedding"):
        linear_mtp_ce_loss(hidden, normal(1, 5, 3), labels)
    with pytest.raises((TypeError, ValueError), match="unembedding"):
        linear_mtp_ce_loss(hidden, normal(1, 5), labels)
    with pytest.raises((TypeError, ValueError), match="bias"):
        linear_mtp_ce_loss(hidden, unembedding, labels, bias=normal(2, 4))
    with pytest.raises((TypeError, ValueError), match="hidden"):
        linear_mtp_ce_loss(hidden[0, 0], unembedding, labels)
    with pytest.raises((TypeError, ValueError), match="labels"):
        linear_mtp_ce_loss(hidden, unembedding, labels[:, :2])
    with pytest.raises((TypeError, ValueError), match="reduction"):
        linear_mtp_ce_loss(hidden, unembedding, labels, reduction="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("other", ["hidden", "unembedding", "bias"])
def test_inputs_of_several_dtypes_are_refused(other: str) -> None:
    given = {"hidden": normal(0, 1, 3, 2), "unembedding": normal(1, 5, 2), "bias": normal(2, 5)}
    given[other] = given[other].float()
    said = ", ".join(f"{name} {x.dtype}" for name, x in given.items())
    with pytest.raises(ValueError, match=rf"{said}; cast them to one dtype"):
        linear_mtp_ce_loss(labels=torch.tensor([[0, 1, 2]]), **given)


def test_hidden_states_without_a_dim_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^hidden must .* its last axis \(dim\), got \[1, 3, 0\]"):
        linear_mtp_ce_loss(torch.zeros(1, 3, 0), torch.zeros(5, 0), torch.tensor([[0, 1, 2]]))


@pytest.mark.parametrize("biased", [True, False])
def test_autocast_casts_whatever_there_is(biased: bool) -> None:
    hidden, unembedding, labels = normal(0, 1, 6, 3), normal(1, 5, 3), integers(2, 5, 1, 6)
    held = {"hidden": hidden, "unembedding": unembedding} | (
        {"bias": normal(3, 5)} if biased else {}
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear_mtp_ce_loss(labels=labels, **{k: x.float() for k, x in held.items()})
    expected = linear_mtp_ce_loss(labels=labels, **{k: x.bfloat16() for k, x in held.items()})
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("with_correct", [True, False])
def test_predictions_are_those_of_the_dense_path(with_correct: bool) -> None:
    hidden, unembedding, labels = normal(0, 2, 6, 2, 3), normal(1, 5, 3), integers(2, 5, 2, 6)
    objective = Objective().checked()
    problem, valid = linear_problem(
        hidden, unembedding, labels, None, None, IGNORE, objective, None
    )
    found = linear_predict(problem, valid, with_correct=with_correct)
    logits = hidden @ unembedding.T
    dense = predict(logits, labels, None, IGNORE, objective, with_correct=with_correct)
    assert (found.correct is None) == (dense.correct is None) == (not with_correct)
    for one, other in zip(found, dense, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------- token-indexed likelihood


@given(packings(), SEEDS, WIDE_DTYPES, st.booleans())
def test_token_nll_follows_the_oracle(
    packing: Documents, seed: int, dtype: torch.dtype, with_bias: bool
) -> None:
    hidden = normal(seed, packing.batch, packing.seq, 3).to(dtype)
    unembedding, bias = normal(seed + 1, 5, 3).to(dtype), normal(seed + 2, 5).to(dtype)
    labels = integers(seed, 5, packing.batch, packing.seq)
    labels = labels.masked_fill(mask(seed + 1, 0.2, *labels.shape), IGNORE)
    there = mask(seed + 2, 0.8, packing.batch, packing.seq).long()
    told = {"segment_ids": packing.segment_ids, "attention_mask": there}
    options: dict[str, Any] = {"bias": bias if with_bias else None}
    logits = oracle.linear_logits(hidden, unembedding, **options)[:, :, 0]
    actual = linear_token_nll(hidden, unembedding, labels, softcap=2.0, **options, **told)
    assert actual.dtype == dtype
    close(actual, oracle.token_nll(logits, labels, softcap=2.0, **told), dtype)


def test_token_nll_equals_the_dense_one_for_any_slab() -> None:
    hidden, unembedding, labels = normal(0, 2, 6, 3), normal(1, 5, 3), integers(2, 5, 2, 6)
    dense = token_nll(hidden @ unembedding.T, labels)
    for slab_bytes in (None, 40, 2**30):
        close(linear_token_nll(hidden, unembedding, labels, slab_bytes=slab_bytes), dense)


@pytest.mark.parametrize(
    "told",
    [
        {"ignore_index": 3},
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])},
        {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]])},
        {"segment_ids": torch.tensor([[0, 0, 1, 1, 1, 1]])},
        {"cu_seqlens": torch.tensor([0, 2, 6])},
    ],
)
def test_token_nll_is_told_of_documents_as_the_dense_one_is(told: dict[str, Any]) -> None:
    hidden, unembedding = normal(0, 1, 6, 3), normal(1, 5, 3)
    labels, logits = torch.tensor([[1, 0, 4, 3, 2, 3]]), hidden @ unembedding.T
    actual = linear_token_nll(hidden, unembedding, labels, **told)
    close(actual, token_nll(logits, labels, **told))
    assert not torch.equal(actual, linear_token_nll(hidden, unembedding, labels))


@given(JUNK)
def test_token_nll_never_reads_padding(junk: float) -> None:
    hidden, unembedding, labels = normal(0, 1, 6, 3), normal(1, 5, 3), integers(0, 5, 1, 6)
    there = torch.tensor([[1, 1, 1, 0, 0, 0]])
    expected = linear_token_nll(hidden, unembedding, labels, attention_mask=there)
    actual = linear_token_nll(
        spoiled(hidden, there == 0, junk),
        unembedding,
        labels.masked_fill(there == 0, 77),
        attention_mask=there,
    )
    assert torch.equal(actual, expected)
    assert (expected != 0).tolist() == [[False, True, True, False, False, False]]


def test_many_options_at_once_agree_with_the_oracle() -> None:
    hidden, unembedding, labels = normal(0, 2, 5, 3, 4), normal(1, 6, 4), integers(2, 6, 2, 5)
    for smoothing, z_loss, softcap in itertools.product((0.0, 0.2), (0.0, 0.1), (None, 1.5)):
        options: dict[str, Any] = {
            "label_smoothing": smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
        }
        expected, _ = oracle.linear_mtp_ce_loss(hidden, unembedding, labels, **options)
        close(linear_mtp_ce_loss(hidden, unembedding, labels, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_to_predict_gives_gradients_of_zero(dtype: torch.dtype, reduction: Any) -> None:
    hidden, unembedding = (
        leaf(normal(i, *size).to(dtype)) for i, size in enumerate(((1, 3, 2), (5, 2)))
    )
    labels = torch.full((1, 3), IGNORE)
    loss = linear_mtp_ce_loss(hidden, unembedding, labels, reduction=reduction).sum()
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (hidden, unembedding)):
        assert all_zero(gradient)
