"""One number: the weighted loss, dense and linear."""

from __future__ import annotations

import functools
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
    grads,
    leaf,
    operations,
)
from tests.loss_forms import (
    FORMS,
    HEAD_WEIGHTS,
    KEPT_FORMS,
    NORMALIZERS,
    WEIGHTS,
    apply,
    head_weights_of,
    known,
    leaves_of,
    used_tokens,
    valid_of,
)
from tests.strategies import (
    IGNORE,
    JUNK,
    SEEDS,
    WIDE_DTYPES,
    Batch,
    Documents,
    batches,
    integers,
    mask,
    normal,
    packings,
    sizes,
    spoiled,
    uniform,
)
from wmtp import (
    MTPLossStats,
    RowLocalWeights,
    align_to_heads,
    linear_weighted_mtp_loss,
    linear_weighted_mtp_loss_and_stats,
    mtp_ce_loss,
    mtp_targets,
    rho1_weights,
    weighted_mtp_loss,
)


# -------------------------------------------------------------------------------- against the oracle


@FORMS
@given(
    case=batches(label_dims=(2,)),
    dtype=WIDE_DTYPES,
    kind=WEIGHTS,
    normalizer=NORMALIZERS,
    heads=HEAD_WEIGHTS,
    scale=st.sampled_from([1.0, -2.5]),
)
def test_loss_and_every_gradient_follow_the_oracle(
    form: str,
    case: Batch,
    dtype: torch.dtype,
    kind: str,
    normalizer: str | float,
    heads: str | None,
    scale: float,
) -> None:
    tensors, weights = leaves_of(case, form, dtype), case.weights(kind, dtype)
    leaves = tensors if weights is None else [*tensors, weights.requires_grad_()]
    options: dict[str, Any] = {
        "offsets": case.offsets,
        "head_weights": head_weights_of(case, heads),
        "normalizer": normalizer,
        **case.options,
    }
    loss = apply(form, tensors, case.labels, weights, **options)
    expected, gradients = known(form, tensors, case.labels, weights, upstream=scale, **options)
    assert loss.dtype == dtype
    assert loss.shape == ()
    close(loss, expected, dtype)
    for found, gradient in zip(grads(scale * loss, leaves), gradients, strict=True):
        assert found.dtype == dtype
        close(found, gradient, dtype)


@FORMS
@given(case=batches(label_dims=(3,)), kind=WEIGHTS, normalizer=NORMALIZERS)
def test_aligned_labels_follow_the_oracle(
    form: str, case: Batch, kind: str, normalizer: str | float
) -> None:
    # A target that lies past the end of the row has no token whose weight could be looked up.
    steps = oracle.offset_list(case.offsets, case.heads)
    there = oracle.align_to_heads(torch.ones(case.batch, case.seq), steps) > 0
    labels = torch.where(there, case.labels, IGNORE)
    tensors, weights = leaves_of(case, form), case.weights(kind)
    options: dict[str, Any] = {"offsets": case.offsets, "normalizer": normalizer, **case.options}
    loss = apply(form, tensors, labels, weights, **options)
    close(loss, known(form, tensors, labels, weights, **options)[0])


@FORMS
@given(case=batches(), kind=WEIGHTS)
def test_statistics_follow_the_oracle(form: str, case: Batch, kind: str) -> None:
    tensors = leaves_of(case, form)
    weights = case.weights("none" if case.labels.dim() == 3 and kind == "token" else kind)
    options: dict[str, Any] = {"offsets": case.offsets, **case.options}
    loss, stats = apply(form, tensors, case.labels, weights, stats=True, **options)
    assert isinstance(stats, MTPLossStats)
    close(loss, apply(form, tensors, case.labels, weights, **options))
    logits = tensors[0] if form == "dense" else oracle.linear_logits(*tensors)
    expected = oracle.loss_stats(logits, case.labels, weights, **options)
    assert set(stats._fields) == set(expected)
    for name, value in expected.items():
        found = getattr(stats, name)
        assert not found.requires_grad
        close(found.double(), value)


@KEPT_FORMS
@given(case=batches(min_batch=1), kind=WEIGHTS)
def test_statistics_do_not_change_the_gradient(form: str, case: Batch, kind: str) -> None:
    tensors = leaves_of(case, form)
    weights = case.weights("none" if case.labels.dim() == 3 and kind == "token" else kind)
    options: dict[str, Any] = {"offsets": case.offsets, **case.options}
    with_stats, _ = apply(form, tensors, case.labels, weights, stats=True, **options)
    without = apply(form, tensors, case.labels, weights, **options)
    for a, b in zip(grads(with_stats, tensors), grads(without, tensors), strict=True):
        close(a, b)


@given(case=batches(label_dims=(2,)), kind=WEIGHTS, normalizer=NORMALIZERS)
def test_dense_equals_linear(case: Batch, kind: str, normalizer: str | float) -> None:
    here, there = leaves_of(case, "linear"), leaves_of(case, "linear")
    weights = [case.weights(kind), case.weights(kind)]
    options: dict[str, Any] = {"offsets": case.offsets, "normalizer": normalizer, **case.options}
    losses = (
        apply("linear", here, case.labels, weights[0], **options),
        apply("dense", [there[0] @ there[1].T + there[2]], case.labels, weights[1], **options),
    )
    close(*losses)
    for a, b in zip(grads(losses[0], here), grads(losses[1], there), strict=True):
        close(a, b)


# ------------------------------------------------------------------------------------ normalisation


@FORMS
@given(case=batches(max_heads=1, min_batch=1, min_seq=2, label_dims=(2,), default_offsets=True))
def test_one_head_with_unit_weights_equals_torchs_cross_entropy(form: str, case: Batch) -> None:
    labels = case.labels.clone()
    labels[0, 1] = 0  # torch's mean over nothing is NaN
    tensors = leaves_of(case, form)
    smoothing = case.options.get("label_smoothing", 0.0)
    logits = tensors[0] if form == "dense" else tensors[0] @ tensors[1].T + tensors[2]
    theirs = F.cross_entropy(
        logits[:, :-1, 0].reshape(-1, case.vocab),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORE,
        label_smoothing=smoothing,
    )
    for weights in (None, torch.ones(case.batch, case.seq), torch.ones(case.shape)):
        ours = apply(form, tensors, labels, weights, label_smoothing=smoothing)
        close(ours, theirs)
        for a, b in zip(grads(ours, tensors), grads(theirs, tensors), strict=True):
            close(a, b)


@FORMS
@given(case=batches(options=None))
def test_unit_weights_give_the_mean_over_all_valid_predictions(form: str, case: Batch) -> None:
    tensors = leaves_of(case, form)
    logits = tensors[0] if form == "dense" else tensors[0] @ tensors[1].T + tensors[2]
    expected = mtp_ce_loss(logits, case.labels, offsets=case.offsets)
    for normalizer in ("weights", "tokens"):
        loss = apply(form, tensors, case.labels, offsets=case.offsets, normalizer=normalizer)
        close(loss, expected)


@FORMS
@given(
    case=batches(label_dims=(2,)),
    kind=st.sampled_from(["token", "prediction"]),
    scale=st.sampled_from([1e-6, 0.5, 300.0]),
)
def test_scaling_the_weights_changes_nothing(
    form: str, case: Batch, kind: str, scale: float
) -> None:
    tensors, weights = leaves_of(case, form), case.weights(kind)
    assert weights is not None
    options: dict[str, Any] = {"offsets": case.offsets, **case.options}
    one = apply(form, tensors, case.labels, weights, **options)
    other = apply(form, tensors, case.labels, scale * weights, **options)
    close(other, one)
    for a, b in zip(grads(other, tensors), grads(one, tensors), strict=True):
        close(a, b)


@FORMS
def test_other_normalizers_scale_with_the_weights(form: str) -> None:
    case = Batch(2, 5, 2, 6, 3, None, integers(0, 6, 2, 5), 1)
    tensors, weights = leaves_of(case, form), case.weights("token")
    assert weights is not None
    for normalizer in ("tokens", 4.0):
        one = apply(form, tensors, case.labels, weights, normalizer=normalizer)
        close(apply(form, tensors, case.labels, 3 * weights, normalizer=normalizer), 3 * one)


@FORMS
def test_the_normalizer_may_be_a_tensor(form: str) -> None:
    case = Batch(2, 5, 2, 6, 3, None, integers(0, 6, 2, 5), 1)
    tensors = leaves_of(case, form)
    expected = apply(form, tensors, case.labels, normalizer=8)
    for normalizer in (8.0, torch.tensor(8), torch.tensor(8.0)):
        assert torch.equal(apply(form, tensors, case.labels, normalizer=normalizer), expected)


@FORMS
@given(seed=SEEDS, cut=st.integers(0, 9))
def test_shards_of_a_sequence_add_to_the_whole(form: str, seed: int, cut: int) -> None:
    """If targets and weights were aligned before it was cut."""
    case = Batch(2, 9, 3, 6, 3, None, integers(seed, 6, 2, 9), seed)
    tensors, weights = leaves_of(case, form), uniform(seed + 5, 2, 9)
    targets, aligned = mtp_targets(case.labels, 3), align_to_heads(weights, 3)
    whole = apply(form, tensors, case.labels, weights, normalizer=7)
    total = torch.zeros_like(whole)
    for part in (slice(0, cut), slice(cut, 9)):
        shard = [tensors[0][:, part], *tensors[1:]]
        total = total + apply(form, shard, targets[:, part], aligned[:, part], normalizer=7)
    close(total, whole)
    for one, other in zip(grads(total, tensors), grads(whole, tensors), strict=True):
        close(one, other)


@pytest.mark.parametrize("form", ["linear", "held"])
def test_what_counts_nothing_enters_no_product_whatever_the_normalizer(form: str) -> None:
    case = Batch(2, 16, 2, 60, 3, None, integers(0, 60, 2, 16), 1)
    tensors, weights = leaves_of(case, form), uniform(2, 2, 16).round()
    targets = mtp_targets(case.labels, 2)

    def cost(normalizer: Any) -> int:
        return operations(
            lambda: apply(form, tensors, targets, weights, normalizer=normalizer).backward()
        )

    rows = int(((align_to_heads(weights, 2) > 0) & (targets >= 0)).sum())
    for normalizer in ("weights", 8.0, torch.tensor(8), torch.tensor(8.0)):
        # Blocks may be filled up to a multiple of 16 rows.
        assert rows <= cost(normalizer) / (3 * 2 * 60 * 3) <= rows + -rows % 16


@FORMS
@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    seq=sizes(5, 2),
    factor=st.integers(0, 3),
    heads=st.integers(1, 2),
)
def test_an_integer_weight_equals_repeating_the_token(
    form: str, seed: int, batch: int, seq: int, factor: int, heads: int
) -> None:
    # Predictions with weight k, and the same predictions standing k times in a longer row.
    case = Batch(batch, seq, heads, 5, 3, None, integers(seed, 5, batch, seq), seed)
    targets, tensors = mtp_targets(case.labels, heads), leaves_of(case, form)
    counts = integers(seed + 6, factor + 1, batch, seq)
    counts[0, 0] = 1
    weights = counts.double()[..., None].expand(case.shape)
    loss = apply(form, tensors, targets, weights)
    where = counts.flatten()
    wide = tensors[0].flatten(0, 1).repeat_interleave(where, 0)[None]
    repeated = targets.flatten(0, 1).repeat_interleave(where, 0)[None]
    close(loss, apply(form, [wide, *tensors[1:]], repeated))


@FORMS
@given(case=batches(label_dims=(2,), min_seq=1), share=st.sampled_from([0.0, 0.4, 0.8]))
def test_weight_zero_equals_an_ignored_label(form: str, case: Batch, share: float) -> None:
    out = mask(case.seed + 7, share, case.batch, case.seq)
    weights = case.weights("token")
    assert weights is not None
    tensors = leaves_of(case, form)
    options: dict[str, Any] = {"offsets": case.offsets, **case.options}
    zeroed = apply(form, tensors, case.labels, weights.masked_fill(out, 0.0), **options)
    ignored = apply(form, tensors, case.labels.masked_fill(out, IGNORE), weights, **options)
    close(zeroed, ignored)
    for a, b in zip(grads(zeroed, tensors), grads(ignored, tensors), strict=True):
        close(a, b)


@FORMS
@given(case=batches(label_dims=(2,), min_batch=2), kind=WEIGHTS, pieces=st.sampled_from([1, 2]))
def test_a_split_batch_with_an_external_normalizer_equals_the_whole(
    form: str, case: Batch, kind: str, pieces: int
) -> None:
    tensors, weights = leaves_of(case, form), case.weights(kind)
    options: dict[str, Any] = {"offsets": case.offsets, "normalizer": 11, **case.options}
    whole = apply(form, tensors, case.labels, weights, **options)
    parts = []
    for part in (slice(0, pieces), slice(pieces, None)):
        cut = None if weights is None else weights[part]
        split = [tensors[0][part], *tensors[1:]]
        parts.append(apply(form, split, case.labels[part], cut, **options))
    total = parts[0] + parts[1]
    close(total, whole)
    for a, b in zip(grads(total, tensors), grads(whole, tensors), strict=True):
        close(a, b)


@FORMS
@given(case=batches(min_heads=2, min_batch=1, min_seq=2), normalizer=st.sampled_from([5.0, 3]))
def test_a_duplicated_head_equals_its_doubled_head_weight(
    form: str, case: Batch, normalizer: float
) -> None:
    targets = case.labels
    if targets.dim() == 2:
        targets = oracle.mtp_targets(targets, oracle.offset_list(case.offsets, case.heads))
    tensors, share = leaves_of(case, form), head_weights_of(case, "given")
    assert share is not None
    doubled = [2 * share[0], *share[1:]]
    weights = case.weights("prediction")
    assert weights is not None
    twice = [torch.cat([tensors[0][:, :, :1], tensors[0]], 2), *tensors[1:]]
    options: dict[str, Any] = {"normalizer": normalizer, **case.options}
    one = apply(form, tensors, targets, weights, head_weights=doubled, **options)
    other = apply(
        form,
        twice,
        torch.cat([targets[:, :, :1], targets], 2),
        torch.cat([weights[:, :, :1], weights], 2),
        head_weights=[share[0], *share],
        **options,
    )
    close(one, other)
    for a, b in zip(grads(one, tensors), grads(other, tensors), strict=True):
        close(a, b)


@FORMS
def test_head_weights_are_used_as_given(form: str) -> None:
    case = Batch(2, 6, 4, 5, 3, None, integers(0, 5, 2, 6), 2)
    tensors = leaves_of(case, form)
    share = (1.0, 0.1, 0.1, 0.1)
    logits = tensors[0] if form == "dense" else tensors[0] @ tensors[1].T + tensors[2]
    ce = mtp_ce_loss(logits, case.labels, reduction="none")
    tokens = oracle.valid_of(case.labels, 4).sum() / 4
    expected = sum(s * ce[:, :, h].sum() for h, s in enumerate(share)) / tokens
    assert isinstance(expected, Tensor)
    for given_as in (share, list(share), torch.tensor(share, dtype=torch.float64)):
        close(apply(form, tensors, case.labels, head_weights=given_as), expected)


@FORMS
def test_head_weights_of_one_over_heads_are_the_default(form: str) -> None:
    case = Batch(2, 6, 3, 5, 3, None, integers(0, 5, 2, 6), 2)
    tensors, weights = leaves_of(case, form), case.weights("prediction")
    third = [1 / 3] * 3
    close(
        apply(form, tensors, case.labels, weights, head_weights=third),
        apply(form, tensors, case.labels, weights),
    )


# ------------------------------------------------------------------------------- the ways to say it


@FORMS
@given(case=batches(label_dims=(2,)), kind=WEIGHTS)
def test_unshifted_labels_equal_the_targets_made_from_them(
    form: str, case: Batch, kind: str
) -> None:
    tensors, weights = leaves_of(case, form), case.weights(kind)
    targets = mtp_targets(case.labels, case.heads if case.offsets is None else case.offsets)
    options: dict[str, Any] = {"offsets": case.offsets, **case.options}
    assert torch.equal(
        apply(form, tensors, case.labels, weights, **options),
        apply(form, tensors, targets, weights, **options),
    )


@FORMS
@given(case=batches(label_dims=(2,), min_seq=1, default_offsets=True))
def test_pre_shifted_labels_and_weights_take_offsets_from_zero(form: str, case: Batch) -> None:
    tensors, weights = leaves_of(case, form), case.weights("token")
    assert weights is not None
    expected = apply(form, tensors, case.labels, weights, **case.options)
    actual = apply(
        form,
        tensors,
        F.pad(case.labels[:, 1:], (0, 1), value=IGNORE),
        F.pad(weights[:, 1:], (0, 1), value=math.nan),
        offsets=range(case.heads),
        **case.options,
    )
    close(actual, expected)


@FORMS
@given(case=batches(label_dims=(2,)))
def test_token_weights_equal_the_aligned_ones(form: str, case: Batch) -> None:
    tensors, weights = leaves_of(case, form), case.weights("token")
    assert weights is not None
    steps = oracle.offset_list(case.offsets, case.heads)
    options: dict[str, Any] = {"offsets": case.offsets, **case.options}
    close(
        apply(form, tensors, case.labels, weights, **options),
        apply(form, tensors, case.labels, oracle.align_to_heads(weights, steps), **options),
    )


@FORMS
def test_a_weight_belongs_to_the_token_it_is_indexed_by(form: str) -> None:
    case = Batch(1, 5, 3, 6, 3, None, integers(0, 6, 1, 5), 4)
    tensors, weights = leaves_of(case, form), torch.zeros(1, 5).double()
    weights[0, 3] = 1.0
    logits = tensors[0] if form == "dense" else tensors[0] @ tensors[1].T + tensors[2]
    ce = mtp_ce_loss(logits, case.labels, reduction="none")
    expected = (ce[0, 2, 0] + ce[0, 1, 1] + ce[0, 0, 2]) / 3
    close(apply(form, tensors, case.labels, weights), expected)


@pytest.mark.parametrize("stats", [False, True])
@FORMS
def test_three_axes_mean_one_head(form: str, stats: bool) -> None:
    case = Batch(2, 5, 1, 6, 3, None, integers(0, 6, 2, 5), 4)
    tensors, weights = leaves_of(case, form), case.weights("token")
    flat = [tensors[0][:, :, 0], *tensors[1:]]
    here = apply(form, flat, case.labels, weights, stats=stats)
    there = apply(form, tensors, case.labels, weights, stats=stats)
    if stats:
        assert here[1].token_ce.shape == (2, 5, 1)
        here, there = here[0], there[0]
    assert torch.equal(here, there)


@pytest.mark.parametrize("stats", [False, True])
@FORMS
@given(case=batches(label_dims=(2,)), normalizer=NORMALIZERS)
def test_a_weight_function_sees_the_plain_detached_cross_entropy(
    form: str, stats: bool, case: Batch, normalizer: str | float
) -> None:
    tensors, seen = leaves_of(case, form), []
    options: dict[str, Any] = {
        "offsets": case.offsets,
        "normalizer": normalizer,
        **case.options,
    }

    def weigh(token_ce: Tensor, valid: Tensor) -> Tensor:
        seen.append((token_ce, valid))
        return torch.where(valid, 1.0 + token_ce.square(), math.nan)

    result = apply(form, tensors, case.labels, weigh, stats=stats, **options)
    loss = result[0] if stats else result
    ((ce, valid),) = seen
    assert not ce.requires_grad
    assert torch.equal(valid, valid_of(case))
    logits = tensors[0] if form == "dense" else oracle.linear_logits(*tensors)
    softcap = case.options.get("softcap")
    plain, _ = oracle.mtp_ce_loss(
        logits, case.labels, offsets=case.offsets, softcap=softcap, reduction="none"
    )
    close(ce, plain)
    assert all_zero(ce[~valid])
    expected, gradients = known(form, tensors, case.labels, 1.0 + plain.square(), **options)
    close(loss, expected)
    for found, gradient in zip(grads(loss, tensors), gradients, strict=False):
        close(found, gradient)


@FORMS
def test_rho1_in_one_call_equals_rho1_by_hand(form: str) -> None:
    case = Batch(2, 7, 3, 6, 3, None, integers(0, 6, 2, 7), 4)
    tensors, reference = leaves_of(case, form), uniform(5, 2, 7)
    logits = tensors[0] if form == "dense" else tensors[0] @ tensors[1].T + tensors[2]
    ce = mtp_ce_loss(logits.detach(), case.labels, reduction="none")
    by_hand = rho1_weights(ce, oracle.valid_of(case.labels, 3), reference, keep=0.5)
    one_call = functools.partial(rho1_weights, reference_nll=reference, keep=0.5)
    here = apply(form, tensors, case.labels, one_call)
    there = apply(form, tensors, case.labels, by_hand)
    close(here, there)
    for a, b in zip(grads(here, tensors), grads(there, tensors), strict=True):
        close(a, b)


@FORMS
def test_a_function_cannot_change_what_the_loss_uses(form: str) -> None:
    case = Batch(2, 7, 3, 6, 3, None, integers(0, 6, 2, 7), 4)
    tensors, weights = leaves_of(case, form), uniform(5, 2, 7, 3)

    def careless(token_ce: Tensor, valid: Tensor) -> Tensor:
        token_ce.zero_()
        valid.fill_(False)
        return weights

    here, stats = apply(form, tensors, case.labels, careless, stats=True)
    there, known_stats = apply(form, tensors, case.labels, weights, stats=True)
    for a, b in zip((here, *stats), (there, *known_stats), strict=True):
        close(a, b)


@KEPT_FORMS
def test_a_selection_that_looks_elsewhere_than_its_loss_is_refused(form: str) -> None:
    case = Batch(2, 7, 2, 6, 3, None, integers(0, 6, 2, 7), 4)
    tensors, reference = leaves_of(case, form), uniform(5, 2, 7)

    def loss(own: Any, **given: Any) -> Tensor:
        weights = functools.partial(rho1_weights, keep=0.5, **given)
        return apply(form, tensors, case.labels, weights, offsets=own)

    with pytest.raises(ValueError, match=r"offsets of rho1_weights must be .* \(2, 3\), got None"):
        loss((2, 3), reference_nll=reference)
    with pytest.raises(
        ValueError, match=r"offsets of rho1_weights must be .* \(2, 3\), got \(1, 3\)"
    ):
        loss((2, 3), reference_nll=reference, offsets=(1, 3))
    with pytest.raises(
        ValueError, match=r"offsets of rho1_weights must be .* \(1, 2\), got \(2, 3\)"
    ):
        loss(None, reference_nll=reference, offsets=(2, 3))
    given = loss((2, 3), reference_nll=reference, offsets=range(2, 4))
    # Labels that have targets already do not say which.
    made = mtp_targets(case.labels, (2, 3))
    weights = functools.partial(rho1_weights, reference_nll=reference, keep=0.5, offsets=(2, 3))
    close(apply(form, tensors, made, weights), given)
    # What is aligned already needs no offsets, and 1 … H need not be said.
    aligned = align_to_heads(reference, (2, 3))
    close(loss((2, 3), reference_nll=aligned), given)
    close(loss(2, reference_nll=reference), loss(None, reference_nll=reference))
    close(loss(None, reference_nll=reference, offsets=2), loss((1, 2), reference_nll=reference))


# -------------------------------------------------------------------------------- leaks and emptiness


@FORMS
@given(
    case=batches(min_batch=1, min_seq=1, label_dims=(2,)),
    kind=WEIGHTS,
    junk=JUNK,
    normalizer=NORMALIZERS,
)
def test_junk_at_ignored_places_changes_neither_loss_nor_gradient(
    form: str, case: Batch, kind: str, junk: float, normalizer: str | float
) -> None:
    ignored = ~valid_of(case)
    clean, dirty = leaves_of(case, form), leaves_of(case, form)
    dirty[0] = leaf(spoiled(clean[0], ignored, junk))
    weights = [case.weights(kind), case.weights(kind)]
    if weights[1] is not None:
        nowhere = ignored if kind == "prediction" else ~used_tokens(case)
        weights[1] = spoiled(weights[1], nowhere, junk)
        clean.append(weights[0].requires_grad_())  # type: ignore[union-attr]
        dirty.append(weights[1].requires_grad_())
    options: dict[str, Any] = {"offsets": case.offsets, "normalizer": normalizer, **case.options}
    here = apply(form, clean, case.labels, weights[0], **options)
    there = apply(form, dirty, case.labels, weights[1], **options)
    assert torch.equal(here, there)
    found = grads(there, dirty)
    for a, b in zip(found, grads(here, clean), strict=True):
        assert torch.equal(a, b)
    assert all_zero(found[0][ignored])
    if weights[1] is not None:
        assert all_zero(found[-1][nowhere])


@FORMS
@pytest.mark.parametrize("stray", [999, -7, 2**40])
def test_a_label_that_no_head_looks_at_may_be_anything(form: str, stray: int) -> None:
    case = Batch(2, 5, 2, 6, 3, None, integers(0, 6, 2, 5), 4)
    tensors, odd = leaves_of(case, form), case.labels.clone()
    odd[:, 0] = stray
    assert torch.equal(apply(form, tensors, odd), apply(form, tensors, case.labels))


@FORMS
@pytest.mark.parametrize("error", [ValueError, IndexError])
def test_an_out_of_range_label_at_a_valid_place_is_an_error(
    form: str, error: type[Exception]
) -> None:
    case = Batch(2, 5, 2, 6, 3, None, integers(0, 6, 2, 5), 4)
    case.labels[1, 2] = 6
    with pytest.raises(error, match="label"):
        apply(form, leaves_of(case, form), case.labels)


@FORMS
@pytest.mark.parametrize("stats", [False, True])
@given(case=batches(min_batch=1, label_dims=(2,)), kind=WEIGHTS, normalizer=NORMALIZERS)
def test_nothing_valid_gives_zero_and_zero_gradients(
    form: str, stats: bool, case: Batch, kind: str, normalizer: str | float
) -> None:
    labels, tensors = torch.full_like(case.labels, IGNORE), leaves_of(case, form)
    tensors[0] = leaf(torch.full_like(tensors[0], math.nan))
    weights = case.weights(kind)
    leaves = tensors if weights is None else [*tensors, weights.requires_grad_()]
    loss = apply(
        form,
        tensors,
        labels,
        weights,
        stats=stats,
        offsets=case.offsets,
        normalizer=normalizer,
        **case.options,
    )
    if stats:
        assert all(all_zero(part) for part in loss[1])
        loss = loss[0]
    assert all_zero(loss)
    assert loss.requires_grad
    assert all(all_zero(g) for g in grads(loss, leaves))


@FORMS
@given(case=batches(min_batch=1, label_dims=(2,)), normalizer=NORMALIZERS)
def test_all_weights_zero_give_zero_and_finite_gradients(
    form: str, case: Batch, normalizer: str | float
) -> None:
    for shape in (case.shape, case.shape[:2]):
        tensors, weights = leaves_of(case, form), leaf(torch.zeros(shape).double())
        loss = apply(
            form,
            tensors,
            case.labels,
            weights,
            offsets=case.offsets,
            normalizer=normalizer,
            **case.options,
        )
        assert all_zero(loss)
        assert loss.requires_grad
        found = grads(loss, [*tensors, weights])
        assert all(all_zero(g) for g in found[:-1])
        assert found[-1].isfinite().all()


@FORMS
def test_a_normalizer_of_zero_gives_zero_and_zero_gradients(form: str) -> None:
    case = Batch(1, 3, 1, 4, 2, None, integers(0, 4, 1, 3), 4)
    for normalizer in (0, 0.0, torch.tensor(0.0)):
        tensors = leaves_of(case, form)
        loss = apply(form, tensors, case.labels, normalizer=normalizer)
        assert all_zero(loss)
        assert all(all_zero(g) for g in grads(loss, tensors))


@FORMS
@pytest.mark.parametrize("sizes", [(0, 4, 2), (2, 0, 2), (2, 1, 3), (1, 1, 4)])
def test_empty_and_short_batches(form: str, sizes: tuple[int, int, int]) -> None:
    case = Batch(*sizes, 5, 3, None, torch.zeros(sizes[:2]).long(), 1)
    tensors = leaves_of(case, form)
    loss, stats = apply(form, tensors, case.labels, case.weights("token"), stats=True)
    assert all_zero(loss)
    assert stats.token_ce.shape == sizes
    assert all(all_zero(g) for g in grads(loss, tensors))


# ------------------------------------------------------------------------------ packing and padding


@FORMS
@given(packing=packings(), heads=st.integers(1, 3), seed=SEEDS, kind=WEIGHTS)
def test_packed_equals_separate_documents(
    form: str, packing: Documents, heads: int, seed: int, kind: str
) -> None:
    labels = integers(seed, 5, packing.batch, packing.seq)
    case = Batch(packing.batch, packing.seq, heads, 5, 3, None, labels, seed)
    tensors, weights = leaves_of(case, form), case.weights(kind)
    targets = mtp_targets(labels, heads, segment_ids=packing.segment_ids)
    packed = apply(form, tensors, targets, weights, normalizer=9)
    total = torch.zeros((), dtype=torch.float64)
    for b, piece in packing.pieces():
        inner = (slice(b, b + 1), piece)
        cut = None if weights is None else weights[inner]
        part = [tensors[0][inner], *tensors[1:]]
        total = total + apply(form, part, labels[inner], cut, normalizer=9)
    close(packed, total)
    for a, b in zip(grads(packed, tensors), grads(total, tensors), strict=True):
        close(a, b)


@FORMS
@given(
    seed=SEEDS,
    seq=sizes(5, 1),
    padding=st.integers(1, 3),
    side=st.sampled_from(["left", "right"]),
    junk=JUNK,
)
def test_left_and_right_padding_equal_no_padding(
    form: str, seed: int, seq: int, padding: int, side: str, junk: float
) -> None:
    case = Batch(2, seq, 2, 5, 3, None, integers(seed, 5, 2, seq), seed)
    pads = (padding, 0) if side == "left" else (0, padding)
    there = F.pad(torch.ones(2, seq).long(), pads)
    targets = mtp_targets(F.pad(case.labels, pads, value=3), 2, attention_mask=there)
    alone, padded = leaves_of(case, form), leaves_of(case, form)
    padded[0] = leaf(F.pad(alone[0], (0, 0, 0, 0, *pads), value=junk))
    weights = case.weights("token")
    assert weights is not None
    here = apply(form, padded, targets, F.pad(weights, pads, value=junk))
    expected = apply(form, alone, case.labels, weights)
    close(here, expected)
    found, right = grads(here, padded), grads(expected, alone)
    close(found[0][:, pads[0] : pads[0] + seq], right[0])
    assert all_zero(found[0][~there.bool()])
    for a, b in zip(found[1:], right[1:], strict=True):
        close(a, b)


# -------------------------------------------------------------------------------------------- errors


@FORMS
def test_the_loss_refuses_what_does_not_fit(form: str) -> None:
    case = Batch(2, 5, 2, 6, 3, None, integers(0, 6, 2, 5), 4)
    call = functools.partial(apply, form, leaves_of(case, form))
    labels = case.labels
    with pytest.raises((TypeError, ValueError), match="labels"):
        call(labels[:, :4])
    with pytest.raises((TypeError, ValueError), match="labels"):
        call(labels[..., None].expand(2, 5, 3))
    for shape in ((2, 4), (2, 5, 3), (2, 5, 1), (5,), (2, 5, 2, 1)):
        with pytest.raises((TypeError, ValueError), match="weights"):
            call(labels, torch.ones(shape))
    with pytest.raises(TypeError, match="weights"):
        call(labels, torch.ones(2, 5).long())
    with pytest.raises((TypeError, ValueError), match="head_weights"):
        call(labels, head_weights=[1.0, 0.3, 0.3])
    with pytest.raises((TypeError, ValueError), match="normalizer"):
        call(labels, normalizer="mean")
    with pytest.raises((TypeError, ValueError), match="normalizer"):
        call(labels, normalizer=torch.ones(2))
    with pytest.raises(ValueError, match="normalizer"):
        call(labels, normalizer=-1.0)
    with pytest.raises(ValueError, match="offsets"):
        call(labels, offsets=[1, 2, 3])
    with pytest.raises(ValueError, match="label_smoothing"):
        call(labels, label_smoothing=2.0)
    with pytest.raises(ValueError, match="softcap"):
        call(labels, softcap=0.0)
    with pytest.raises(ValueError, match="z_loss"):
        call(labels, z_loss=-1.0)


@FORMS
def test_numbers_beyond_the_dtype_are_refused(form: str) -> None:
    case = Batch(2, 5, 2, 6, 3, None, integers(0, 6, 2, 5), 4)
    tensors = [leaf(x.detach().float()) for x in leaves_of(case, form)]
    most = torch.finfo(torch.float32).max
    apply(form, tensors, case.labels, normalizer=most, head_weights=[1.0, most])
    for options in ({"normalizer": 1e39}, {"head_weights": [1.0, 1e39]}):
        (name,) = options
        with pytest.raises(ValueError, match=rf"^{name} must .*got 1e\+39"):
            apply(form, tensors, case.labels, **options)


@FORMS
@pytest.mark.parametrize("stats", [False, True])
def test_a_weight_function_must_return_what_fits(form: str, stats: bool) -> None:
    case = Batch(2, 5, 2, 6, 3, None, integers(0, 6, 2, 5), 4)
    tensors = leaves_of(case, form)
    with pytest.raises((TypeError, ValueError), match="weights"):
        apply(form, tensors, case.labels, lambda ce, valid: ce[:, :, 0], stats=stats)
    with pytest.raises((TypeError, ValueError), match="weights"):
        apply(form, tensors, case.labels, lambda ce, valid: 1.0, stats=stats)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("count", [1e-39, 1e-46])
def test_a_normalizer_without_a_reciprocal_is_refused(count: float) -> None:
    logits, labels = torch.zeros(1, 3, 2, 4), torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"normalizer must be 0 or at least 1\.17"):
        weighted_mtp_loss(logits, labels, normalizer=count)


def test_the_smallest_normalizer_has_a_reciprocal() -> None:
    logits, labels = torch.zeros(1, 3, 2, 4), torch.ones(1, 3, dtype=torch.int64)
    logits[..., 1] = 1e3
    assert weighted_mtp_loss(logits, labels, normalizer=torch.finfo(torch.float32).tiny) == 0


@pytest.mark.parametrize("form", ["linear", "held", "used up", "lent"])
@pytest.mark.parametrize("weights", ["none", "known", "all zero", "selected", "row-local"])
@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("label", [6, -1, 2**40])
def test_a_label_that_does_not_exist_is_refused_where_looking_is_not_free(
    form: str, weights: str, needs: bool, label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, when the rows that count have been waited for."""
    monkeypatch.setattr("wmtp._checks.labels_in_range", lambda *_: None)
    case = Batch(2, 5, 2, 6, 3, None, integers(0, 6, 2, 5), 4)
    case.labels[0, 4] = label
    tensors = [x.detach().requires_grad_(needs) for x in leaves_of(case, form)]
    given: Any = {
        "none": None,
        "known": uniform(3, 2, 5),
        "all zero": torch.zeros(2, 5),
        "selected": functools.partial(rho1_weights, reference_nll=uniform(3, 2, 5)),
        "row-local": RowLocalWeights("focal"),
    }[weights]
    # Head 1 at position 2 comes first.
    message = rf"^labels must lie in \[0, 6\) .* got {label} as the target of prediction 5, "
    with pytest.raises(ValueError, match=message):
        apply(form, tensors, case.labels, given)


@pytest.mark.parametrize("weights", ["none", "known", "from the losses", "row-local"])
@pytest.mark.parametrize("stats", [False, True])
def test_on_a_gpu_evaluation_asks_what_counts_when_the_losses_are_known(
    weights: str, stats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, unembedding, labels = normal(0, 2, 5, 3, 4), normal(1, 7, 4), integers(2, 7, 2, 5)
    given: Any = {
        "none": None,
        "known": uniform(3, 2, 5, 3) * mask(4, 2, 5, 3),
        "from the losses": lambda ce, valid: ce * valid,
        "row-local": RowLocalWeights("focal"),
    }[weights]
    loss: Any = linear_weighted_mtp_loss_and_stats if stats else linear_weighted_mtp_loss

    def found() -> Any:
        return loss(hidden, unembedding, labels, given, head_weights=[1.0, 0.0, 0.5])

    expected = found()
    monkeypatch.setattr("wmtp.loss.losses_first", lambda _: True)
    monkeypatch.setattr("wmtp.loss.linear_weighted_sum", None)
    torch.testing.assert_close(found(), expected)
