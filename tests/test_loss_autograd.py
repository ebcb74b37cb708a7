"""The weighted loss, dense and linear: what autograd makes of it, and what rounding does to it."""

from __future__ import annotations

import math
import weakref
from functools import partial
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

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
from tests.loss_forms import (
    FORMS,
    KEPT_FORMS,
    WEIGHTS,
    apply,
    known,
    leaves_of,
)
from tests.strategies import (
    IGNORE,
    LAYOUTS,
    WIDE_DTYPES,
    Batch,
    batches,
    integers,
    mask,
    normal,
    relayout,
    uniform,
)
from wmtp import (
    RowLocalWeights,
    dft_weights,
    linear_weighted_mtp_loss,
    mtp_targets,
    rho1_weights,
    slab_columns,
    top_k_weights,
    weighted_mtp_loss,
)
from wmtp.row_local import Kind


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


ROUTES: dict[str, Any] = {
    "none": None,
    "known": uniform(5, 2, 9, 2).float(),
    "rho1": partial(rho1_weights, reference_nll=uniform(6, 2, 9).float(), keep=0.5),
    "function": dft_weights,
    **{kind: RowLocalWeights(kind) for kind in get_args(Kind)},
}


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("rows_in_slab", [3, 1000])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_reaches_nothing_but_the_operands(
    name: str, rows_in_slab: int, narrow: torch.dtype
) -> None:
    """Neither the forward pass over operands that are cast already, nor the backward pass of wide ones."""
    labels = integers(3, 7, 2, 9)
    tensors = [normal(n, *shape).float() for n, shape in enumerate([(2, 9, 2, 4), (7, 4), (7,)])]

    def found(dtype: torch.dtype, forward: bool, backward: bool) -> list[Tensor]:
        leaves = [leaf(x.to(dtype)) for x in tensors]
        with torch.autocast("cpu", dtype=narrow, enabled=forward):
            loss = linear_weighted_mtp_loss(
                leaves[0],
                leaves[1],
                labels,
                ROUTES[name],
                bias=leaves[2],
                slab_bytes=rows_in_slab * 7 * dtype.itemsize,
            )
        with torch.autocast("cpu", dtype=narrow, enabled=backward):
            return [loss.detach(), *grads(loss, leaves)]

    for dtype, forward, backward in ((narrow, True, False), (torch.float32, False, True)):
        for here, there in zip(
            found(dtype, forward, backward), found(dtype, False, False), strict=True
        ):
            assert torch.equal(here, there)


@pytest.mark.parametrize("name", ["none", "known", "dft"])
def test_operands_of_gradients_that_are_made_do_not_wait_for_the_backward_pass(name: str) -> None:
    """They are freed, may change in place, and may come from inference mode."""
    tensors = [leaf(normal(n, *shape)) for n, shape in enumerate([(2, 9, 2, 4), (7, 4)])]
    labels = integers(3, 7, 2, 9)
    expected = grads(linear_weighted_mtp_loss(*tensors, labels, ROUTES[name]), tensors)  # type: ignore[misc]
    casts = [x * 1 for x in tensors]
    loss = linear_weighted_mtp_loss(*casts, labels, ROUTES[name])  # type: ignore[misc]
    waiting = [weakref.ref(x) for x in casts]
    casts[1].add_(1)
    del casts
    assert [ref() for ref in waiting] == [None, None]
    for here, there in zip(grads(loss, tensors), expected, strict=True):
        close(here, there)
    with torch.inference_mode():
        trunk = tensors[0] * 1
    loss = linear_weighted_mtp_loss(trunk, tensors[1], labels, ROUTES[name])
    close(grads(loss, tensors[1:])[0], expected[1])


@KEPT_FORMS
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


@KEPT_FORMS
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


@pytest.mark.parametrize("keep", [0.2, 0.6, 1.0])
@FORMS
def test_a_selection_of_predictions_that_all_have_targets(form: str, keep: float) -> None:
    """Where every prediction counts before the losses are known, and only some of them after."""
    labels = integers(1, 9, 2, 7, 2)
    case = Batch(batch=2, seq=7, heads=2, vocab=9, dim=4, offsets=None, labels=labels, seed=3)
    leaves = leaves_of(case, form)
    seen: list[Tensor] = []

    def weights(ce: Tensor, valid: Tensor) -> Tensor:
        assert bool(valid.all())
        seen.append(top_k_weights(ce, valid, keep=keep))
        return seen[0]

    loss = apply(form, leaves, labels, weights)
    found = torch.autograd.grad(loss, leaves)
    expected, gradients = known(form, leaves, labels, seen[0])
    close(loss, expected)
    for got, right in zip(found, gradients[:-1], strict=True):
        close(got, right)


def test_what_known_weights_count_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their backward pass on a GPU waits for nothing."""
    labels, weights = integers(1, 9, 2, 7, 2), uniform(2, 2, 7, 2) * mask(3, 0.5, 2, 7, 2)
    leaves = [leaf(normal(n, *shape)) for n, shape in ((4, (2, 7, 2, 4)), (5, (9, 4)), (6, (9,)))]
    looked: list[int] = []
    move = slab_columns._moved_together

    def moved(count: Tensor, size: Tensor) -> Tensor:
        looked.append(len(count))
        return move(count, size)

    monkeypatch.setattr(slab_columns, "_moved_together", moved)
    apply("held", leaves, labels, weights).backward()
    assert looked == []
    apply("held", leaves, labels, weights, stats=True)[0].backward()
    apply("held", leaves, labels, leaf(weights)).backward()
    apply("held", leaves, labels, lambda ce, valid: weights).backward()
    assert looked == [28, 28, 28]


@pytest.mark.parametrize("junk", [math.nan, math.inf])
@pytest.mark.parametrize("form", ["linear", "held", "used up"])
def test_what_counts_nothing_is_not_looked_at(form: str, junk: float) -> None:
    """A prediction of weight 0 and all of a head of weight 0 may hold anything."""
    labels, weights = integers(1, 9, 2, 7, 3), uniform(2, 2, 7, 3) * mask(3, 0.5, 2, 7, 3)
    head_weights = [1.0, 0.0, 0.5]
    counts = (weights != 0) & (torch.tensor(head_weights) != 0)
    clean = [leaf(normal(n, *shape)) for n, shape in ((4, (2, 7, 3, 4)), (5, (9, 4)), (6, (9,)))]
    dirty = [leaf(torch.where(counts[..., None], clean[0].detach(), junk)), *clean[1:]]
    found: list[list[Tensor]] = []
    for leaves in (clean, dirty):
        loss = apply(form, leaves, labels, weights, head_weights=head_weights)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*found, strict=True):
        close(one, other)
    assert all_zero(found[1][1][~counts])


@pytest.mark.parametrize("normalizer", [0.0, 0, torch.tensor(0.0)])
@pytest.mark.parametrize("form", ["linear", "held", "used up"])
def test_divided_by_0_nothing_counts_whatever_it_is(form: str, normalizer: Any) -> None:
    leaves = [leaf(normal(n, *shape)) for n, shape in ((4, (2, 7, 3, 4)), (5, (9, 4)), (6, (9,)))]
    with torch.no_grad():
        leaves[0][0, 0] = math.inf
    loss = apply(form, leaves, integers(1, 9, 2, 7, 3), normalizer=normalizer)
    assert loss.item() == 0
    assert all(map(all_zero, torch.autograd.grad(loss, leaves)))
