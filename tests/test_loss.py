"""One number: the weighted loss, dense and linear."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
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
    peak_bytes,
    subsets,
    untouched,
)
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
    sizes,
    spoiled,
    uniform,
)
from wmtp import (
    MTPLossStats,
    linear_weighted_mtp_loss,
    linear_weighted_mtp_loss_and_stats,
    mtp_ce_loss,
    mtp_targets,
    rho1_weights,
    weighted_mean,
    weighted_mtp_loss,
    weighted_mtp_loss_and_stats,
)


WEIGHTS = st.sampled_from(["prediction", "token", "none"])
NORMALIZERS = st.sampled_from(["weights", "tokens", 7.5, 3])
HEAD_WEIGHTS = st.sampled_from(["given", None])
FORMS = pytest.mark.parametrize("form", ["dense", "linear"])


def head_weights_of(case: Batch, kind: str | None) -> list[float] | None:
    return None if kind is None else [1.0 / (h + 1) for h in range(case.heads)]


def leaves_of(case: Batch, form: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What the loss is differentiated by: logits, or hidden states, unembedding and bias."""
    if form == "dense":
        return [leaf(case.logits(dtype))]
    return [leaf(x) for x in (case.hidden(dtype), case.unembedding(dtype), case.bias(dtype))]


def apply(
    form: str,
    tensors: Sequence[Tensor],
    labels: Tensor,
    weights: Tensor | Callable[..., Tensor] | None = None,
    *,
    stats: bool = False,
    **options: Any,
) -> Any:
    if form == "dense":
        function = weighted_mtp_loss_and_stats if stats else weighted_mtp_loss
        return function(tensors[0], labels, weights, **options)
    linear = linear_weighted_mtp_loss_and_stats if stats else linear_weighted_mtp_loss
    return linear(tensors[0], tensors[1], labels, weights, bias=tensors[2], **options)


def known(
    form: str, tensors: Sequence[Tensor], labels: Tensor, weights: Tensor | None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The oracle's loss and gradients, in the order of the leaves and then the weights."""
    if form == "dense":
        loss, found = oracle.weighted_mtp_loss(tensors[0], labels, weights, **options)
    else:
        loss, found = oracle.linear_weighted_mtp_loss(
            tensors[0], tensors[1], labels, weights, bias=tensors[2], **options
        )
    return loss, list(found.values())


def valid_of(case: Batch) -> Tensor:
    return oracle.valid_of(case.labels, case.heads, offsets=case.offsets)


def used_tokens(case: Batch) -> Tensor:
    """Which entries of a `[batch seq]` weight any prediction looks at."""
    valid, used = valid_of(case), torch.zeros(case.batch, case.seq).bool()
    steps = oracle.offset_list(case.offsets, case.heads)
    for b, t, h in oracle.places(case.shape):
        if valid[b, t, h]:
            used[b, t + steps[h]] = True
    return used


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


@FORMS
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


# ------------------------------------------------------------------------------------------ autograd


@pytest.mark.parametrize("wanted", subsets(4)[1:])
@given(
    case=batches(min_batch=1, min_seq=1, label_dims=(2,)),
    kind=st.sampled_from(["token", "prediction"]),
)
def test_every_subset_of_linear_inputs_that_require_grad(
    wanted: tuple[bool, ...], case: Batch, kind: str
) -> None:
    weights = case.weights(kind)
    assert weights is not None
    leaves = [*leaves_of(case, "linear"), leaf(weights)]
    options: dict[str, Any] = {"offsets": case.offsets, **case.options}
    everything = grads(apply("linear", leaves, case.labels, leaves[3], **options), leaves)
    some = [leaf(x, needs) for x, needs in zip(leaves, wanted, strict=True)]
    apply("linear", some, case.labels, some[3], **options).backward()
    for x, needs, expected in zip(some, wanted, everything, strict=True):
        assert (x.grad is not None) == needs
        if x.grad is not None:
            close(x.grad, expected)


@pytest.mark.parametrize("wanted", subsets(2)[1:])
@given(case=batches(min_batch=1, min_seq=1, label_dims=(2,)))
def test_every_subset_of_dense_inputs_that_require_grad(
    wanted: tuple[bool, ...], case: Batch
) -> None:
    weights = case.weights("token")
    assert weights is not None
    leaves = [*leaves_of(case, "dense"), leaf(weights)]
    options: dict[str, Any] = {"offsets": case.offsets, **case.options}
    everything = grads(apply("dense", leaves, case.labels, leaves[1], **options), leaves)
    some = [leaf(x, needs) for x, needs in zip(leaves, wanted, strict=True)]
    apply("dense", some, case.labels, some[1], **options).backward()
    for x, needs, expected in zip(some, wanted, everything, strict=True):
        assert (x.grad is not None) == needs
        if x.grad is not None:
            close(x.grad, expected)


@FORMS
@pytest.mark.parametrize("normalizer", ["weights", "tokens", 6.0])
@pytest.mark.parametrize("shape", ["token", "prediction"])
def test_gradcheck(form: str, normalizer: str | float, shape: str) -> None:
    labels = integers(3, 4, 2, 4)
    labels[0, 2] = IGNORE
    case = Batch(2, 4, 2, 4, 3, None, labels, 5)
    weights = case.weights(shape)
    assert weights is not None

    def loss(*tensors: Tensor) -> Tensor:
        return apply(
            form,
            tensors[:-1],
            labels,
            tensors[-1],
            normalizer=normalizer,
            head_weights=[1.0, 0.3],
            label_smoothing=0.1,
            z_loss=0.1,
            softcap=3.0,
        )

    assert torch.autograd.gradcheck(loss, [*leaves_of(case, form), leaf(weights)])


@FORMS
@given(case=batches(min_batch=1, label_dims=(2,)), kind=WEIGHTS)
def test_backward_twice_gives_the_same(form: str, case: Batch, kind: str) -> None:
    tensors, weights = leaves_of(case, form), case.weights(kind)
    leaves = tensors if weights is None else [*tensors, weights.requires_grad_()]
    loss = apply(form, tensors, case.labels, weights, offsets=case.offsets, **case.options)
    first, second, doubled = (grads(c * loss, leaves) for c in (1.0, 1.0, 2.0))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, doubled, strict=True))


@FORMS
def test_a_loss_that_meets_another_keeps_its_share_of_the_gradient(form: str) -> None:
    case = Batch(2, 5, 2, 6, 3, None, integers(0, 6, 2, 5), 4)
    tensors = leaves_of(case, form)
    alone = grads(apply(form, tensors, case.labels), tensors)
    total = apply(form, tensors, case.labels) * 0.25 + sum(x.square().sum() for x in tensors)
    for found, part, x in zip(grads(total, tensors), alone, tensors, strict=True):
        close(found, 0.25 * part + 2 * x)


@FORMS
def test_a_tied_unembedding_gets_both_gradients(form: str) -> None:
    labels, table = integers(0, 6, 2, 5), normal(1, 6, 3)
    tied = leaf(table)
    hidden = tied[labels][:, :, None].tanh()
    if form == "dense":
        weighted_mtp_loss(hidden @ tied.T, labels).backward()
    else:
        linear_weighted_mtp_loss(hidden, tied, labels).backward()
    apart = [leaf(table), leaf(table)]
    there = apart[0][labels][:, :, None].tanh() @ apart[1].T
    expected = sum(grads(weighted_mtp_loss(there, labels), apart))
    assert isinstance(expected, Tensor)
    assert tied.grad is not None
    close(tied.grad, expected)


@FORMS
def test_gradients_accumulate_over_micro_batches(form: str) -> None:
    case = Batch(2, 5, 2, 6, 3, None, integers(0, 6, 2, 5), 4)
    tensors, once = leaves_of(case, form), leaves_of(case, form)
    expected = grads(apply(form, once, case.labels), once)
    for _ in range(3):
        apply(form, tensors, case.labels).backward()
    for x, gradient in zip(tensors, expected, strict=True):
        assert x.grad is not None
        close(x.grad, 3 * gradient)


@pytest.mark.parametrize("weights", [None, lambda ce, valid: 1.0 + ce])
def test_a_second_derivative_is_right_or_refused(weights: Any) -> None:
    case = Batch(2, 4, 2, 4, 3, None, integers(0, 4, 2, 4), 4)
    if weights is None:
        assert torch.autograd.gradgradcheck(
            lambda x: weighted_mtp_loss(x, case.labels, z_loss=0.1), leaves_of(case, "dense")
        )
    leaves = leaves_of(case, "linear")
    loss = apply("linear", leaves, case.labels, weights)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="dense"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@FORMS
def test_no_gradient_wanted_means_no_graph(form: str) -> None:
    case = Batch(1, 3, 1, 4, 2, None, integers(0, 4, 1, 3), 4)
    tensors = [x.detach() for x in leaves_of(case, form)]
    assert not apply(form, tensors, case.labels).requires_grad
    with torch.no_grad():
        loss = apply(form, leaves_of(case, form), case.labels)
    assert not loss.requires_grad
    close(loss, apply(form, tensors, case.labels))


@FORMS
@given(case=batches(label_dims=(2,)), kind=WEIGHTS)
def test_inputs_are_never_written_to(form: str, case: Batch, kind: str) -> None:
    tensors, weights = leaves_of(case, form), case.weights(kind)
    leaves = tensors if weights is None else [*tensors, weights.requires_grad_()]
    with untouched(*leaves, case.labels):
        loss, _ = apply(form, tensors, case.labels, weights, stats=True, offsets=case.offsets)
        torch.autograd.grad(loss, leaves, allow_unused=True)


@FORMS
@given(case=batches(min_batch=1, min_seq=1, label_dims=(2,)), layout=LAYOUTS, other=LAYOUTS)
def test_the_layout_does_not_matter(form: str, case: Batch, layout: str, other: str) -> None:
    leaves, weights = leaves_of(case, form), case.weights("prediction")
    assert weights is not None
    views = [relayout(x, how) for x, how in zip(leaves, (layout, other, other), strict=False)]
    copies, weights = [leaf(x) for x in views], relayout(weights, layout)
    options: dict[str, Any] = {"offsets": case.offsets, **case.options}
    here = apply(form, views, relayout(case.labels, layout), weights, **options)
    labels = relayout(case.labels, layout).clone()
    there = apply(form, copies, labels, weights.clone(), **options)
    close(here, there)
    for inner, view, back, found in zip(
        leaves, views, grads(there, copies), grads(here, leaves), strict=True
    ):
        close(found, grads(view, [inner], back)[0])


# ------------------------------------------------------------------------------------------ numerics


@given(case=batches(min_batch=1, min_seq=1, label_dims=(2,)), kind=WEIGHTS, dtype=WIDE_DTYPES)
def test_the_size_of_the_slab_does_not_matter(case: Batch, kind: str, dtype: torch.dtype) -> None:
    weights, results = case.weights(kind, dtype), []
    one_row = case.vocab * torch.finfo(dtype).bits // 8
    for slab_bytes in (None, one_row, 3 * one_row + 1, 2**40):
        leaves = leaves_of(case, "linear", dtype)
        loss = apply(
            "linear",
            leaves,
            case.labels,
            weights,
            slab_bytes=slab_bytes,
            offsets=case.offsets,
            **case.options,
        )
        results.append([loss, *grads(loss, leaves)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            close(b, a.double(), dtype)


@pytest.mark.parametrize("rows_in_slab", [1, 3, 10**6])
@pytest.mark.parametrize("callable_weights", [False, True])
def test_a_wide_vocabulary_may_be_cut_into_slabs(rows_in_slab: int, callable_weights: bool) -> None:
    labels = integers(0, 700, 2, 5).masked_fill(mask(1, 0.2, 2, 5), IGNORE)
    case = Batch(2, 5, 2, 700, 3, None, labels, 3)
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0}
    leaves, weights = leaves_of(case, "linear"), case.weights("prediction")
    used: Any = (lambda ce, valid: weights) if callable_weights else weights
    loss = apply("linear", leaves, labels, used, slab_bytes=rows_in_slab * 5600, **options)
    expected, gradients = known("linear", leaves, labels, weights, **options)
    close(loss, expected)
    for found, gradient in zip(grads(loss, leaves), gradients, strict=False):
        close(found, gradient)


def peak_of_slab(slab_bytes: int) -> int:
    """The most memory that was live at once in a forward and backward pass, by the profiler."""
    leaves = [
        leaf(normal(n, *shape).float()) for n, shape in enumerate([(2, 512, 2, 8), (1024, 8)])
    ]
    labels, weights = integers(2, 1024, 2, 512), uniform(3, 2, 512).float()
    return peak_bytes(
        lambda: linear_weighted_mtp_loss(
            leaves[0], leaves[1], labels, weights, slab_bytes=slab_bytes
        ).backward()
    )


def test_the_logits_are_never_held_beyond_the_slab() -> None:
    all_logits = 2 * 512 * 2 * 1024 * 4
    assert peak_of_slab(256 * 1024) < all_logits // 4
    assert peak_of_slab(2 * all_logits) >= all_logits


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_low_precision_is_as_good_as_the_naive_path(
    form: str, dtype: torch.dtype, seed: int
) -> None:
    case = Batch(3, 12, 4, 40, 16, None, integers(seed, 40, 3, 12), seed)
    targets, weights = mtp_targets(case.labels, 4), case.weights("prediction", torch.float32)
    assert weights is not None
    start = [x.detach().to(dtype) for x in leaves_of(case, form)]

    def naive(tensors: list[Tensor]) -> Tensor:
        logits = tensors[0] if form == "dense" else F.linear(*tensors)
        logits = logits.double() if logits.dtype == torch.float64 else logits.float()
        ce = F.cross_entropy(
            logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORE, reduction="none"
        )
        used = torch.where(targets == IGNORE, 0, weights).flatten()
        return (used * ce).sum() / used.sum()

    ours, theirs = ([leaf(x) for x in start] for _ in range(2))
    truth = [leaf(x.double()) for x in start]
    losses = apply(form, ours, case.labels, weights), naive(theirs), naive(truth)
    assert losses[0].dtype == torch.float32
    slack = 2 * torch.finfo(dtype).eps
    right = losses[2]
    assert error_against(right, losses[0]) <= error_against(right, losses[1]) + slack
    for mine, other, exact in zip(
        grads(losses[0], ours), grads(losses[1], theirs), grads(right, truth), strict=True
    ):
        assert mine.dtype == dtype
        slack = 2 * torch.finfo(dtype).eps * float(exact.abs().max())
        assert error_against(exact, mine) <= error_against(exact, other) + slack


@FORMS
def test_a_tiny_upstream_gradient_survives_float16(form: str) -> None:
    # A loss divided by a window's token count is the rule; 1e-7 times a probability is 0 in float16.
    case = Batch(2, 6, 2, 5, 3, None, integers(0, 5, 2, 6), 4)
    tensors = leaves_of(case, form, torch.float16)
    loss = apply(form, tensors, case.labels, normalizer=1e7)
    scale = 2.0**20  # what a gradient scaler does
    _, expected = known(form, tensors, case.labels, None, normalizer=1e7, upstream=scale)
    for found, right in zip(grads(scale * loss, tensors), expected, strict=True):
        torch.testing.assert_close(
            found.double(), right, rtol=4e-3, atol=4e-3 * float(right.abs().max())
        )


@FORMS
def test_sums_are_not_kept_in_low_precision(form: str) -> None:
    # 4096 equal terms: added up in bfloat16 they would stop growing at 256.
    case = Batch(4, 1025, 1, 2, 2, None, integers(0, 2, 4, 1025), 4)
    tensors = [torch.zeros_like(x).bfloat16() for x in leaves_of(case, form)]
    loss, stats = apply(form, tensors, case.labels, torch.ones(4, 1025).bfloat16(), stats=True)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert stats.weight_sum.tolist() == [4096.0]
    assert stats.token_count.tolist() == [4096.0]


@FORMS
def test_ties_count_as_some_top_one(form: str) -> None:
    case = Batch(1, 4, 1, 3, 2, None, torch.tensor([[0, 1, 2, 0]]), 4)
    tensors = [torch.zeros_like(x) for x in leaves_of(case, form)]
    _, stats = apply(form, tensors, case.labels, stats=True)
    assert 0.0 <= stats.head_accuracy.item() <= 3.0


def test_statistics_of_micro_batches_add() -> None:
    case = Batch(3, 6, 2, 5, 3, None, integers(0, 5, 3, 6), 4)
    tensors, weights = leaves_of(case, "dense"), case.weights("token")
    assert weights is not None
    _, whole = apply("dense", tensors, case.labels, weights, stats=True)
    parts = [
        apply("dense", [tensors[0][s]], case.labels[s], weights[s], stats=True)[1]
        for s in (slice(0, 1), slice(1, 3))
    ]
    for name in ("head_loss", "head_accuracy", "weight_sum", "token_count"):
        close(getattr(parts[0], name) + getattr(parts[1], name), getattr(whole, name))


# --------------------------------------------------------------------------------- the weighted mean


@given(
    seed=SEEDS,
    batch=sizes(3),
    seq=sizes(5),
    heads=st.integers(1, 3),
    dtype=WIDE_DTYPES,
    weighted=st.booleans(),
    shared=st.booleans(),
    normalizer=NORMALIZERS,
)
def test_the_weighted_mean_follows_the_oracle(
    seed: int,
    batch: int,
    seq: int,
    heads: int,
    dtype: torch.dtype,
    weighted: bool,
    shared: bool,
    normalizer: str | float,
) -> None:
    shape = (batch, seq, heads)
    ce, valid = leaf(normal(seed, *shape).to(dtype)), mask(seed + 1, 0.7, *shape)
    weights = leaf((0.1 + uniform(seed + 2, *shape)).to(dtype)) if weighted else None
    share = [1.0 / (h + 1) for h in range(heads)] if shared else None
    options: dict[str, Any] = {"head_weights": share, "normalizer": normalizer}
    mean = weighted_mean(ce, weights, valid, **options)
    expected, to_ce, to_weights = oracle.weighted_mean(ce, weights, valid, **options)
    assert mean.dtype == dtype
    close(mean, expected, dtype)
    close(grads(mean, [ce])[0], to_ce, dtype)
    if weights is not None:
        close(grads(mean, [weights])[0], to_weights, dtype)


@given(seed=SEEDS, junk=JUNK, normalizer=NORMALIZERS)
def test_the_weighted_mean_never_reads_invalid_places(
    seed: int, junk: float, normalizer: str | float
) -> None:
    valid = mask(seed + 1, 0.6, 2, 4, 2)
    clean = [leaf(x) for x in (normal(seed, 2, 4, 2), 0.1 + uniform(seed + 2, 2, 4, 2))]
    dirty = [leaf(spoiled(x, ~valid, junk)) for x in clean]
    here, there = (weighted_mean(*x, valid, normalizer=normalizer) for x in (clean, dirty))
    assert torch.equal(here, there)
    for a, b in zip(grads(there, dirty), grads(here, clean), strict=True):
        assert torch.equal(a, b)
        assert all_zero(a[~valid])


def test_the_weighted_mean_refuses_what_does_not_fit() -> None:
    ce, valid = normal(0, 1, 3, 2), torch.ones(1, 3, 2).bool()
    with pytest.raises((TypeError, ValueError), match="weights"):
        weighted_mean(ce, normal(1, 1, 3, 1), valid)
    with pytest.raises((TypeError, ValueError), match="valid"):
        weighted_mean(ce, None, valid[:, :2])
    with pytest.raises((TypeError, ValueError), match="head_weights"):
        weighted_mean(ce, None, valid, head_weights=[1.0])
    with pytest.raises((TypeError, ValueError), match="normalizer"):
        weighted_mean(ce, None, valid, normalizer="mean")  # type: ignore[arg-type]


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
@pytest.mark.parametrize("stats", [False, True])
def test_a_weight_function_must_return_what_fits(form: str, stats: bool) -> None:
    case = Batch(2, 5, 2, 6, 3, None, integers(0, 6, 2, 5), 4)
    tensors = leaves_of(case, form)
    with pytest.raises((TypeError, ValueError), match="weights"):
        apply(form, tensors, case.labels, lambda ce, valid: ce[:, :, 0], stats=stats)
    with pytest.raises((TypeError, ValueError), match="weights"):
        apply(form, tensors, case.labels, lambda ce, valid: 1.0, stats=stats)  # type: ignore[arg-type,return-value]
