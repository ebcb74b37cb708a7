"""How surprised every head was, from logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests import oracle
from tests.helpers import all_zero, close, error_against, grads, leaf, untouched
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
)
from wmtp import mtp_ce_loss, mtp_targets, token_nll


INF = math.inf


def per_prediction(case: Batch, logits: Tensor, labels: Tensor | None = None) -> Tensor:
    labels = case.labels if labels is None else labels
    return mtp_ce_loss(logits, labels, offsets=case.offsets, reduction="none", **case.options)


@given(batches(), WIDE_DTYPES)
def test_values_follow_the_oracle(case: Batch, dtype: torch.dtype) -> None:
    logits = case.logits(dtype)
    expected, _ = oracle.mtp_ce_loss(
        logits, case.labels, offsets=case.offsets, reduction="none", **case.options
    )
    actual = per_prediction(case, logits)
    assert actual.dtype == dtype
    close(actual, expected, dtype)
    assert all_zero(actual[~valid_of(case)])


@given(batches(), WIDE_DTYPES)
def test_a_non_uniform_upstream_gradient_is_honoured(case: Batch, dtype: torch.dtype) -> None:
    logits, upstream = leaf(case.logits(dtype)), case.upstream().to(dtype)
    (actual,) = grads(per_prediction(case, logits), [logits], upstream)
    _, expected = oracle.mtp_ce_loss(
        logits,
        case.labels,
        offsets=case.offsets,
        reduction="none",
        upstream=upstream.double(),
        **case.options,
    )
    assert actual.dtype == dtype
    close(actual, expected, dtype)


@given(batches(), st.sampled_from(["mean", "sum"]), st.sampled_from([1.0, -2.5, 1e-3]))
def test_reductions_and_scaled_gradients_follow_the_oracle(
    case: Batch, reduction: str, scale: float
) -> None:
    logits = leaf(case.logits())
    options: dict[str, Any] = {"offsets": case.offsets, "reduction": reduction, **case.options}
    loss = mtp_ce_loss(logits, case.labels, **options)
    expected, gradient = oracle.mtp_ce_loss(logits, case.labels, upstream=scale, **options)
    assert loss.shape == ()
    close(loss, expected)
    close(grads(scale * loss, [logits])[0], gradient)


def test_the_default_reduction_is_the_mean_over_all_valid_predictions() -> None:
    logits, labels = normal(0, 2, 5, 3, 7), integers(1, 7, 2, 5)
    values = mtp_ce_loss(logits, labels, reduction="none")
    valid = oracle.valid_of(labels, 3)
    close(mtp_ce_loss(logits, labels), values.sum() / valid.sum())


@given(batches(min_heads=1, max_heads=1, min_batch=1, min_seq=2, label_dims=(2,), options=None))
def test_one_head_equals_torchs_cross_entropy(case: Batch) -> None:
    logits = leaf(case.logits())
    labels = case.labels.clone()
    labels[0, 1] = 0  # torch's mean over nothing is NaN
    theirs = F.cross_entropy(
        logits[:, :-1, 0].reshape(-1, case.vocab), labels[:, 1:].reshape(-1), ignore_index=IGNORE
    )
    ours = mtp_ce_loss(logits, labels)
    close(ours, theirs)
    close(grads(ours, [logits])[0], grads(theirs, [logits])[0])


@given(batches(max_heads=1, default_offsets=True), st.sampled_from(["none", "mean", "sum"]))
def test_three_axes_of_logits_mean_one_head(case: Batch, reduction: str) -> None:
    logits = case.logits()
    flat = mtp_ce_loss(logits[:, :, 0], case.labels, reduction=reduction, **case.options)
    assert torch.equal(flat, mtp_ce_loss(logits, case.labels, reduction=reduction, **case.options))
    assert flat.dim() == (3 if reduction == "none" else 0)


@given(batches(label_dims=(2,)))
def test_unshifted_labels_equal_the_targets_made_from_them(case: Batch) -> None:
    logits = case.logits()
    targets = mtp_targets(case.labels, case.heads if case.offsets is None else case.offsets)
    close(
        per_prediction(case, logits), mtp_ce_loss(logits, targets, reduction="none", **case.options)
    )


@given(batches(label_dims=(2,), min_seq=1, default_offsets=True))
def test_pre_shifted_labels_take_offsets_from_zero(case: Batch) -> None:
    logits = case.logits()
    shifted = F.pad(case.labels[:, 1:], (0, 1), value=IGNORE)
    expected = per_prediction(case, logits)
    actual = mtp_ce_loss(
        logits, shifted, offsets=range(case.heads), reduction="none", **case.options
    )
    assert torch.equal(actual, expected)


@given(batches(min_batch=1, min_seq=1))
def test_mask_equals_removal(case: Batch) -> None:
    logits, valid = case.logits(), valid_of(case)
    targets = case.labels
    if targets.dim() == 2:
        targets = oracle.mtp_targets(targets, oracle.offset_list(case.offsets, case.heads))
    kept = mtp_ce_loss(
        logits[valid][None, :, None], targets[valid][None, :, None], reduction="sum", **case.options
    )
    close(mtp_ce_loss(logits, targets, reduction="sum", **case.options), kept)


@given(batches(min_batch=1, min_seq=1), JUNK)
def test_junk_at_ignored_places_changes_neither_loss_nor_gradient(case: Batch, junk: float) -> None:
    ignored = ~valid_of(case)
    clean, dirty = leaf(case.logits()), leaf(spoiled(case.logits(), ignored, junk))
    options: dict[str, Any] = {"offsets": case.offsets, **case.options}
    for reduction in ("none", "sum", "mean"):
        here = mtp_ce_loss(clean, case.labels, reduction=reduction, **options)
        there = mtp_ce_loss(dirty, case.labels, reduction=reduction, **options)
        assert torch.equal(here, there)
        upstream = case.upstream() if reduction == "none" else None
        (expected,), (actual,) = grads(here, [clean], upstream), grads(there, [dirty], upstream)
        assert torch.equal(actual, expected)
        assert all_zero(actual[ignored])


@given(batches(min_batch=1, min_seq=1), JUNK)
def test_a_junk_upstream_gradient_at_ignored_places_goes_nowhere(case: Batch, junk: float) -> None:
    ignored, logits = ~valid_of(case), leaf(case.logits())
    upstream = spoiled(case.upstream(), ignored, junk)
    (actual,) = grads(per_prediction(case, logits), [logits], upstream)
    (expected,) = grads(per_prediction(case, logits), [logits], case.upstream())
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("stray", [999, -7, 2**40])
def test_a_label_that_no_head_looks_at_may_be_anything(stray: int) -> None:
    logits, labels = normal(0, 2, 5, 2, 4), integers(1, 4, 2, 5)
    odd = labels.clone()
    odd[:, 0] = stray
    assert torch.equal(mtp_ce_loss(logits, odd), mtp_ce_loss(logits, labels))
    odd[:, 1] = stray
    skipping = mtp_ce_loss(logits, odd, offsets=[2, 3])
    assert torch.equal(skipping, mtp_ce_loss(logits, labels, offsets=[2, 3]))


@pytest.mark.parametrize("stray", [4, -1, -99, 2**40])
@pytest.mark.parametrize("error", [ValueError, IndexError])
def test_an_out_of_range_label_at_a_valid_place_is_an_error(
    stray: int, error: type[Exception]
) -> None:
    labels = integers(1, 4, 2, 5)
    labels[1, 3] = stray
    with pytest.raises(error, match="label"):
        mtp_ce_loss(normal(0, 2, 5, 2, 4), labels)


def test_a_nan_at_a_valid_place_is_not_hidden() -> None:
    logits = normal(0, 1, 3, 1, 4)
    logits[0, 0, 0, 2] = math.nan
    assert mtp_ce_loss(logits, integers(1, 4, 1, 3)).isnan()


@given(batches(min_batch=1))
def test_nothing_valid_gives_zero_and_zero_gradients(case: Batch) -> None:
    labels = torch.full_like(case.labels, IGNORE)
    for reduction in ("mean", "sum", "none"):
        logits = leaf(spoiled(case.logits(), torch.ones(case.shape).bool(), math.nan))
        loss = mtp_ce_loss(
            logits, labels, offsets=case.offsets, reduction=reduction, **case.options
        )
        assert all_zero(loss)
        assert loss.requires_grad
        assert all_zero(grads(loss.sum(), [logits])[0])


@pytest.mark.parametrize("shape", [(0, 4, 2, 3), (2, 0, 2, 3), (2, 1, 3, 3), (1, 2, 4, 1)])
def test_empty_and_short_batches(shape: tuple[int, ...]) -> None:
    logits, labels = leaf(normal(0, *shape)), torch.zeros(shape[:2]).long()
    loss = mtp_ce_loss(logits, labels)
    assert all_zero(loss)
    assert all_zero(grads(loss, [logits])[0])


@given(SEEDS, st.sampled_from([1e4, -1e4, 6e4, 1e30]))
def test_extreme_gaps_stay_exact(seed: int, gap: float) -> None:
    logits, labels = normal(seed, 1, 4, 2, 5).float(), integers(seed, 5, 1, 4)
    logits[..., 2] += gap
    x = leaf(logits)
    loss = mtp_ce_loss(x, labels, reduction="none")
    expected, gradient = oracle.mtp_ce_loss(logits, labels, reduction="none")
    close(loss, expected, torch.float32)
    close(grads(loss.sum(), [x])[0], gradient, torch.float32)


@given(SEEDS, st.integers(1, 4))
def test_a_masked_vocabulary_is_a_smaller_one(seed: int, masked: int) -> None:
    logits, labels = normal(seed, 2, 4, 2, 5 + masked), integers(seed, 5, 2, 4)
    logits[..., 5:] = -INF
    x, y = leaf(logits), leaf(logits[..., :5])
    whole, small = mtp_ce_loss(x, labels), mtp_ce_loss(y, labels)
    close(whole, small)
    (gradient,) = grads(whole, [x])
    close(gradient[..., :5], grads(small, [y])[0])
    assert all_zero(gradient[..., 5:])


@pytest.mark.parametrize("level", [0.0, 1e4, -1e30])
def test_equal_logits_cost_the_log_of_the_vocabulary(level: float) -> None:
    x = leaf(torch.full((1, 3, 2, 8), level))
    loss = mtp_ce_loss(x, torch.tensor([[1, 2, 3]]))
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)
    assert grads(loss, [x])[0].isfinite().all()


@given(batches(min_batch=1, min_seq=1, options=None), st.sampled_from([-50.0, 3.0, 1000.0]))
def test_a_constant_added_to_a_row_changes_nothing(case: Batch, shift: float) -> None:
    per_row = shift * (1 + mask(case.seed, 0.5, *case.shape).double())[..., None]
    torch.testing.assert_close(
        per_prediction(case, case.logits() + per_row),
        per_prediction(case, case.logits()),
        rtol=1e-9,
        atol=1e-10,
    )


@given(batches(min_batch=1, min_seq=1))
def test_renaming_the_vocabulary_changes_nothing(case: Batch) -> None:
    order = torch.randperm(case.vocab, generator=torch.Generator().manual_seed(case.seed))
    renamed = torch.where(case.labels == IGNORE, IGNORE, order.argsort()[case.labels.clamp(min=0)])
    logits = case.logits()
    close(per_prediction(case, logits[..., order], renamed), per_prediction(case, logits))


@given(batches(min_batch=1, min_seq=1))
def test_the_order_of_the_batch_does_not_matter(case: Batch) -> None:
    logits, values = case.logits(), per_prediction(case, case.logits())
    assert torch.equal(per_prediction(case, logits.flip(0), case.labels.flip(0)), values.flip(0))


@given(batches(min_batch=1, min_seq=1, options=None), st.sampled_from([0.0, 0.3]))
def test_rows_of_the_softmax_gradient_sum_to_zero(case: Batch, smoothing: float) -> None:
    logits = leaf(case.logits())
    loss = mtp_ce_loss(
        logits,
        case.labels,
        offsets=case.offsets,
        label_smoothing=smoothing,
        reduction="none",
    )
    sums = grads(loss, [logits], case.upstream())[0].sum(-1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-12)


@given(packings(), st.integers(1, 3), SEEDS)
def test_packed_equals_separate_documents(packing: Documents, heads: int, seed: int) -> None:
    labels = integers(seed, 5, packing.batch, packing.seq)
    logits = normal(seed, packing.batch, packing.seq, heads, 5)
    targets = mtp_targets(labels, heads, segment_ids=packing.segment_ids)
    packed = mtp_ce_loss(logits, targets, reduction="none")
    for b, piece in packing.pieces():
        alone = mtp_ce_loss(logits[b : b + 1, piece], labels[b : b + 1, piece], reduction="none")
        close(packed[b : b + 1, piece], alone)


@given(SEEDS, st.integers(1, 4), st.integers(1, 3), st.sampled_from(["left", "right"]), JUNK)
def test_padding_equals_no_padding(
    seed: int, seq: int, padding: int, side: str, junk: float
) -> None:
    labels, logits = integers(seed, 5, 2, seq), normal(seed, 2, seq, 2, 5)
    pads = (padding, 0) if side == "left" else (0, padding)
    there = F.pad(torch.ones(2, seq).long(), pads)
    targets = mtp_targets(F.pad(labels, pads, value=3), 2, attention_mask=there)
    padded = leaf(F.pad(logits, (0, 0, 0, 0, *pads), value=junk))
    alone = leaf(logits)
    here, expected = mtp_ce_loss(padded, targets), mtp_ce_loss(alone, labels)
    close(here, expected)
    inner = slice(pads[0], pads[0] + seq)
    gradient = grads(here, [padded])[0]
    close(gradient[:, inner], grads(expected, [alone])[0])
    assert all_zero(gradient[~there.bool()])


@given(batches(min_batch=1, min_seq=1), LAYOUTS)
def test_the_layout_does_not_matter(case: Batch, layout: str) -> None:
    inner = leaf(case.logits())
    view = relayout(inner, layout)
    copy = leaf(view)
    labels = relayout(case.labels, layout)
    here = per_prediction(case, view, labels)
    there = per_prediction(case, copy, labels.clone())
    close(here, there)
    (upstream,) = grads(there, [copy], case.upstream())
    (actual,), (expected,) = grads(here, [inner], case.upstream()), grads(view, [inner], upstream)
    close(actual, expected)


@given(batches())
def test_inputs_are_never_written_to(case: Batch) -> None:
    logits, upstream = leaf(case.logits()), case.upstream()
    with untouched(logits, case.labels, upstream):
        loss = per_prediction(case, logits)
        torch.autograd.grad(loss, logits, upstream)


@given(batches(min_batch=1))
def test_backward_twice_gives_the_same(case: Batch) -> None:
    logits = leaf(case.logits())
    loss = per_prediction(case, logits)
    first, second = (grads(loss, [logits], case.upstream())[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(grads(per_prediction(case, logits), [logits], case.upstream())[0], first)


def test_gradcheck() -> None:
    labels = integers(3, 4, 2, 4)
    labels[0, 2] = IGNORE
    assert torch.autograd.gradcheck(
        lambda z: mtp_ce_loss(
            z, labels, label_smoothing=0.1, z_loss=0.1, softcap=3.0, reduction="none"
        ),
        [leaf(normal(0, 2, 4, 2, 4))],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_low_precision_is_as_good_as_the_naive_path(dtype: torch.dtype, seed: int) -> None:
    logits, labels = normal(seed, 3, 12, 4, 40, scale=4.0).to(dtype), integers(seed, 40, 3, 12)
    targets = mtp_targets(labels, 4)

    def naive(x: Tensor) -> Tensor:
        return F.cross_entropy(x.flatten(0, 2), targets.flatten(), ignore_index=IGNORE)

    ours, theirs, truth = leaf(logits), leaf(logits), leaf(logits.double())
    losses = mtp_ce_loss(ours, labels), naive(theirs.float()), naive(truth)
    assert losses[0].dtype == torch.float32
    close(losses[0], losses[2], torch.float32)
    known = grads(losses[2], [truth])[0]
    (gradient,), (theirs_gradient,) = grads(losses[0], [ours]), grads(losses[1], [theirs])
    assert gradient.dtype == dtype
    slack = 2 * torch.finfo(dtype).eps * float(known.abs().max())
    assert error_against(known, gradient) <= error_against(known, theirs_gradient) + slack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    logits, labels = normal(0, 2, 5, 2, 6).to(dtype), integers(0, 6, 2, 5)
    expected = mtp_ce_loss(logits, labels, z_loss=0.1, softcap=5.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = mtp_ce_loss(logits, labels, z_loss=0.1, softcap=5.0)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["label_smoothing", "softcap", "z_loss"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_impossible_options_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        mtp_ce_loss(normal(0, 1, 3, 1, 4), integers(0, 4, 1, 3), **{name: value})


def test_more_impossible_options_are_refused() -> None:
    logits, labels = normal(0, 1, 3, 2, 4), integers(0, 4, 1, 3)
    with pytest.raises(ValueError, match="label_smoothing"):
        mtp_ce_loss(logits, labels, label_smoothing=1.5)
    with pytest.raises(ValueError, match="softcap"):
        mtp_ce_loss(logits, labels, softcap=0.0)
    with pytest.raises((TypeError, ValueError), match="reduction"):
        mtp_ce_loss(logits, labels, reduction="average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="offsets"):
        mtp_ce_loss(logits, labels, offsets=3)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1, 3, 3), (1, 4, 2), (1, 3, 2, 1)])
def test_labels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises((TypeError, ValueError), match="labels"):
        mtp_ce_loss(normal(0, 1, 3, 2, 4), torch.zeros(shape).long())


def test_logits_of_another_rank_or_type_are_refused() -> None:
    labels = integers(0, 4, 1, 3)
    with pytest.raises((TypeError, ValueError), match="logits"):
        mtp_ce_loss(normal(0, 3, 4), labels)
    with pytest.raises(TypeError, match="logits"):
        mtp_ce_loss(torch.zeros(1, 3, 2, 4).long(), labels)
    with pytest.raises(TypeError, match="labels"):
        mtp_ce_loss(normal(0, 1, 3, 2, 4), labels.double())  # type: ignore[arg-type]


# ------------------------------------------------------------------------- token-indexed likelihood


def told_documents(packing: Documents, seed: int) -> dict[str, Tensor]:
    there = mask(seed, 0.8, packing.batch, packing.seq).long()
    return {"segment_ids": packing.segment_ids, "attention_mask": there}


@given(packings(), SEEDS, WIDE_DTYPES, st.sampled_from([None, 2.0]))
def test_token_nll_follows_the_oracle(
    packing: Documents, seed: int, dtype: torch.dtype, softcap: float | None
) -> None:
    logits = normal(seed, packing.batch, packing.seq, 5, scale=3.0).to(dtype)
    labels = integers(seed, 5, packing.batch, packing.seq)
    labels = labels.masked_fill(mask(seed + 1, 0.2, *labels.shape), IGNORE)
    told = told_documents(packing, seed + 2)
    for documents in ({}, told, {"position_ids": packing.position_ids}):
        actual = token_nll(logits, labels, softcap=softcap, **documents)
        expected = oracle.token_nll(logits, labels, softcap=softcap, **documents)
        assert actual.dtype == dtype
        close(actual, expected, dtype)


def test_token_nll_is_indexed_by_the_token_it_scores() -> None:
    logits, labels = normal(0, 1, 4, 6), torch.tensor([[5, 2, 0, 3]])
    nll = token_nll(logits, labels)
    assert float(nll[0, 0]) == 0.0
    for j in range(1, 4):
        expected = -torch.log_softmax(logits[0, j - 1], -1)[labels[0, j]]
        close(nll[0, j], expected)


@given(batches(max_heads=1, label_dims=(2,), min_seq=1, default_offsets=True, options=None))
def test_token_nll_is_the_shifted_cross_entropy(case: Batch) -> None:
    logits = case.logits()
    nll, ce = token_nll(logits[:, :, 0], case.labels), per_prediction(case, logits)
    assert torch.equal(nll[:, 1:], ce[:, :-1, 0])
    assert all_zero(nll[:, 0])


def test_token_nll_restarts_with_every_document() -> None:
    logits, labels = normal(0, 1, 6, 5), integers(0, 5, 1, 6)
    packed = token_nll(logits, labels, cu_seqlens=torch.tensor([0, 2, 6]))
    apart = [token_nll(logits[:, s], labels[:, s]) for s in (slice(0, 2), slice(2, 6))]
    assert torch.equal(packed, torch.cat(apart, 1))


@given(JUNK)
def test_token_nll_never_reads_padding(junk: float) -> None:
    logits, labels = normal(0, 1, 6, 5), integers(0, 5, 1, 6)
    there = torch.tensor([[0, 0, 1, 1, 1, 0]])
    expected = token_nll(logits, labels, attention_mask=there)
    stray = labels.masked_fill(there == 0, 77)
    actual = token_nll(spoiled(logits, there == 0, junk), stray, attention_mask=there)
    assert torch.equal(actual, expected)
    assert int((expected != 0).sum()) == 2


def test_token_nll_in_low_precision_is_float32() -> None:
    logits, labels = normal(0, 2, 5, 6).bfloat16(), integers(0, 6, 2, 5)
    close(token_nll(logits, labels), oracle.token_nll(logits, labels), torch.float32)
    assert token_nll(logits, labels).dtype == torch.float32


def test_token_nll_refuses_several_heads() -> None:
    with pytest.raises((TypeError, ValueError), match="logits"):
        token_nll(normal(0, 1, 3, 2, 4), integers(0, 4, 1, 3))
    with pytest.raises((TypeError, ValueError), match="labels"):
        token_nll(normal(0, 1, 3, 4), integers(0, 4, 1, 2))


@pytest.mark.parametrize("ignore_index", [2, -1])
def test_token_nll_ignores_what_the_caller_says(ignore_index: int) -> None:
    logits, labels = normal(0, 1, 4, 5), torch.tensor([[0, 1, ignore_index, 3]])
    found = token_nll(logits, labels, ignore_index=ignore_index)
    assert found[0, 2] == 0
    assert bool((found[0, [1, 3]] > 0).all())


def test_no_heads_are_refused_and_a_sequence_of_none_is_not() -> None:
    with pytest.raises(ValueError, match=r"logits must have at least one head, got \[1, 3, 0, 5\]"):
        mtp_ce_loss(normal(0, 1, 3, 0, 5), torch.zeros(1, 3).long())
    empty = mtp_ce_loss(torch.zeros(1, 0, 5), torch.zeros(1, 0).long(), reduction="none")
    assert empty.shape == (1, 0, 1)
