"""What stays the same, or moves along, when the question is asked in another way.

No oracle here: every test compares the package with itself. Losses are differentiated with a random
upstream gradient, because a backward pass that ignores it passes every test that uses ones.
`python -m tests.properties` lists these properties and those that other files hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import wmtp
from tests.helpers import all_zero, close, grads, leaf, of_predictions
from tests.loss_forms import head_weights_of, valid_of
from tests.properties import PROPERTIES, searched_tests
from tests.strategies import (
    IGNORE,
    LAYOUTS,
    SEEDS,
    WIDE_DTYPES,
    Batch,
    Scored,
    Trajectories,
    batches,
    generator,
    integers,
    mask,
    normal,
    offset_sets,
    relayout,
    scored,
    sizes,
    trajectories,
    uniform,
)


# A property of the four losses is searched for four times.
HALF = settings(max_examples=settings.default.max_examples // 2)  # pyright: ignore
LOSSES = pytest.mark.parametrize(
    "loss", ["mtp_ce_loss", "linear_mtp_ce_loss", "weighted_mtp_loss", "linear_weighted_mtp_loss"]
)
FORMS = pytest.mark.parametrize("form", ["", "linear_"], ids=["dense", "linear"])


def score_of_ce(token_ce: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, 1 / (1 + token_ce), 0)


# How a weighted loss may be weighted by predictions. Row-local weights are near 0 together where
# nothing is uncertain, and a mean weighted by rounding errors has no properties.
OF_PREDICTIONS: dict[str, Any] = {
    "none": None,
    "prediction": None,
    "function": score_of_ce,
    "dft": wmtp.RowLocalWeights("dft"),
    "focal": wmtp.RowLocalWeights("focal", 2.0),
    "entropy": wmtp.RowLocalWeights("entropy"),
    "el2n": wmtp.RowLocalWeights("el2n", 0.5),
}
KINDS = st.sampled_from(list(OF_PREDICTIONS))
DENOMINATORS = st.sampled_from(["weights", "tokens", 7.5])
REDUCTIONS = st.sampled_from(["none", "sum", "mean"])
# What has an entry, or a row, for every prediction.
PREDICTED = ("hidden", "logits", "weights")


@dataclass(frozen=True)
class Call:
    """One call of one loss, so that a property can change a part of it and ask again."""

    loss: str
    tensors: dict[str, Tensor]
    labels: Tensor
    upstream: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    weigh: Any = None

    @property
    def reduced(self) -> bool:
        return self.loss.endswith("weighted_mtp_loss")

    @property
    def linear(self) -> bool:
        return self.loss.startswith("linear")

    def but(self, **changes: Any) -> Call:
        return replace(self, **changes)

    def told(self, **options: Any) -> Call:
        return replace(self, options={**self.options, **options})

    def of(self, **tensors: Tensor) -> Call:
        return replace(self, tensors={**self.tensors, **tensors})

    def apply(self, leaves: dict[str, Tensor], suffix: str = "") -> Any:
        options = dict(self.options)
        names = ("hidden", "unembedding") if self.linear else ("logits",)
        if self.linear:
            options["bias"] = leaves["bias"]
        arguments: list[Any] = [*(leaves[name] for name in names), self.labels]
        if self.reduced:
            arguments.append(leaves.get("weights", self.weigh))
        return getattr(wmtp, self.loss + suffix)(*arguments, **options)

    def run(self, upstream: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the gradient of everything that has one."""
        leaves = {name: leaf(x) for name, x in self.tensors.items()}
        loss = self.apply(leaves)
        found = grads(loss, list(leaves.values()), self.upstream if upstream is None else upstream)
        return loss, dict(zip(leaves, found, strict=True))

    def rearranged(self, change: Callable[[Tensor], Tensor], **options: Any) -> Call:
        """Everything that belongs to predictions changed alike."""
        per_prediction = {name: change(x) for name, x in self.tensors.items() if name in PREDICTED}
        unreduced = self.upstream.dim() == 3
        return replace(
            self.of(**per_prediction),
            labels=change(self.labels),
            upstream=change(self.upstream) if unreduced else self.upstream,
        ).told(**options)


def call_of(
    loss: str,
    case: Batch,
    kind: str = "none",
    *,
    normalizer: Any = "weights",
    reduction: str = "none",
    dtype: torch.dtype = torch.float64,
    shares: bool = True,
) -> Call:
    """The loss of a drawn problem, with upstream gradients that nothing rounds to by accident."""
    linear, reduced = loss.startswith("linear"), loss.endswith("weighted_mtp_loss")
    tensors = {"logits": case.logits(dtype)}
    if linear:
        tensors = {
            "hidden": case.hidden(dtype),
            "unembedding": case.unembedding(dtype),
            "bias": case.bias(dtype),
        }
    options = dict(case.options)
    if case.labels.dim() == 2:
        options["offsets"] = case.offsets
    weigh: Any = None
    if reduced:
        options["normalizer"] = normalizer
        options["head_weights"] = head_weights_of(case, "given" if shares else None)
        weigh = OF_PREDICTIONS.get(kind)
        weights = None if kind in OF_PREDICTIONS and kind != "prediction" else case.weights(kind)
        if weights is not None:
            tensors["weights"] = weights.to(dtype)
    else:
        options["reduction"] = reduction
    scalar = reduced or reduction != "none"
    upstream = normal(case.seed + 5) if scalar else case.upstream()
    return Call(loss, tensors, case.labels, upstream.to(dtype), options, weigh)


def same(
    found: tuple[Tensor, dict[str, Tensor]],
    loss: Tensor,
    gradients: dict[str, Tensor],
    dtype: torch.dtype = torch.float64,
) -> None:
    close(found[0], loss, dtype)
    for name, gradient in gradients.items():
        close(found[1][name], gradient, dtype)


def targets_of(case: Batch) -> Tensor:
    """`[batch seq heads]`, whatever the labels are."""
    if case.labels.dim() == 3:
        return case.labels
    return wmtp.mtp_targets(case.labels, case.heads if case.offsets is None else case.offsets)


def order_of(seed: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed + 7))


ALIGNED = batches(label_dims=(3,))
PLAIN = batches(label_dims=(3,), options=None)


# ------------------------------------------------------------------------------ order and symmetry


@LOSSES
@HALF
@given(case=ALIGNED, kind=KINDS)
def test_renaming_the_vocabulary_renames_the_gradient(loss: str, case: Batch, kind: str) -> None:
    call = call_of(loss, case, kind, normalizer="tokens")
    order = order_of(case.seed, case.vocab)
    labels = torch.where(case.labels == IGNORE, IGNORE, order.argsort()[case.labels.clamp(min=0)])
    names = {"logits": -1, "unembedding": 0, "bias": 0}
    renamed = {name: x.index_select(names[name], order) for name, x in call.tensors.items()
               if name in names}  # fmt: skip
    value, gradients = call.run()
    expected = {name: g.index_select(names[name], order) if name in names else g
                for name, g in gradients.items()}  # fmt: skip
    same(call.of(**renamed).but(labels=labels).run(), value, expected)


def permuted(call: Call, axis: int, seed: int) -> None:
    order = order_of(seed, call.labels.shape[axis])
    options: dict[str, Any] = {}
    if axis == 2 and call.reduced:
        options["head_weights"] = [call.options["head_weights"][i] for i in order.tolist()]
    change = functools.partial(torch.index_select, dim=axis, index=order)
    value, gradients = call.run()
    moved = {name: change(g) if name in PREDICTED else g for name, g in gradients.items()}
    unreduced = call.upstream.dim() == 3
    same(call.rearranged(change, **options).run(), change(value) if unreduced else value, moved)


@LOSSES
@HALF
@given(case=ALIGNED, kind=KINDS)
def test_permuting_the_batch_permutes_the_gradient(loss: str, case: Batch, kind: str) -> None:
    permuted(call_of(loss, case, kind, normalizer="tokens"), 0, case.seed)


@LOSSES
@HALF
@given(case=ALIGNED, kind=KINDS)
def test_permuting_the_positions_permutes_the_gradient(loss: str, case: Batch, kind: str) -> None:
    permuted(call_of(loss, case, kind, normalizer="tokens"), 1, case.seed)


@LOSSES
@HALF
@given(case=ALIGNED, kind=KINDS)
def test_permuting_the_heads_permutes_the_gradient(loss: str, case: Batch, kind: str) -> None:
    permuted(call_of(loss, case, kind, normalizer="tokens"), 2, case.seed)


@LOSSES
@HALF
@given(case=ALIGNED, kind=KINDS, normalizer=DENOMINATORS, reduction=REDUCTIONS)
def test_only_the_set_of_predictions_matters(
    loss: str, case: Batch, kind: str, normalizer: Any, reduction: str
) -> None:
    # Heads and positions of a batch as one long row of one head.
    if normalizer == "weights" and kind not in ("none", "prediction", "function"):
        normalizer = "tokens"
    call = call_of(loss, case, kind, normalizer=normalizer, reduction=reduction, shares=False)
    count = {"normalizer": case.heads * normalizer} if normalizer == 7.5 and call.reduced else {}
    row = call.rearranged(lambda x: x.reshape(1, -1, 1, *x.shape[3:]), **count)
    value, gradients = row.run()
    back = {name: g.reshape(call.tensors[name].shape) for name, g in gradients.items()}
    same(call.run(), value if value.dim() == 0 else value.reshape(case.shape), back)


@LOSSES
@HALF
@given(case=PLAIN, kind=KINDS, shift=st.sampled_from([-3.25, 40.0]))
def test_a_constant_added_to_a_row_of_logits_changes_no_gradient(
    loss: str, case: Batch, kind: str, shift: float
) -> None:
    call = call_of(loss, case, kind, normalizer="tokens")
    if call.linear:
        # `v` added to every row of the unembedding adds `hidden · v` to a whole row of logits.
        common = normal(case.seed + 8, case.dim)
        moved = call.of(
            bias=call.tensors["bias"] + shift, unembedding=call.tensors["unembedding"] + common
        )
    else:
        moved = call.of(logits=call.tensors["logits"] + shift * uniform(case.seed, *case.shape, 1))
    value, gradients = moved.run()
    here = call.run()
    torch.testing.assert_close(here[0], value, rtol=1e-9, atol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(here[1][name], gradient, rtol=1e-8, atol=1e-9)


@LOSSES
@HALF
@given(case=ALIGNED, kind=KINDS, padding=st.integers(1, 4))
def test_impossible_words_change_nothing(loss: str, case: Batch, kind: str, padding: int) -> None:
    # A vocabulary padded to a round size, its logits masked by −inf.
    smooth = {name: x for name, x in case.options.items() if name == "z_loss"}
    call = call_of(loss, replace(case, options=smooth), kind, normalizer="tokens")
    if call.linear:
        more = call.of(
            unembedding=F.pad(call.tensors["unembedding"], (0, 0, 0, padding), value=2.0),
            bias=F.pad(call.tensors["bias"], (0, padding), value=-torch.inf),
        )
    else:
        more = call.of(logits=F.pad(call.tensors["logits"], (0, padding), value=-torch.inf))
    value, found = more.run()
    cut = {"logits": -1, "unembedding": 0, "bias": 0}
    real = {name: g.narrow(cut[name], 0, case.vocab) if name in cut else g
            for name, g in found.items()}  # fmt: skip
    same(call.run(), value, real)
    padded = [g.narrow(cut[name], case.vocab, padding) for name, g in found.items() if name in cut]
    assert all(all_zero(g) for g in padded)


@pytest.mark.parametrize("loss", ["linear_mtp_ce_loss", "linear_weighted_mtp_loss"])
@given(case=ALIGNED, kind=KINDS, scale=st.sampled_from([0.3, 5.0]))
def test_a_change_of_basis_of_the_hidden_space_turns_the_gradient(
    loss: str, case: Batch, kind: str, scale: float
) -> None:
    call = call_of(loss, case, kind, normalizer="tokens")
    turn = torch.linalg.qr(normal(case.seed + 8, case.dim, case.dim))[0]
    hidden, unembedding = call.tensors["hidden"], call.tensors["unembedding"]
    turned = call.of(hidden=scale * hidden @ turn, unembedding=unembedding @ turn / scale)
    value, gradients = call.run()
    gradients["hidden"] = gradients["hidden"] @ turn / scale
    gradients["unembedding"] = gradients["unembedding"] @ turn * scale
    same(turned.run(), value, gradients)


# ---------------------------------------------------------------------------------------- additivity


@LOSSES
@HALF
@given(case=ALIGNED, kind=KINDS, share=st.sampled_from([0.2, 0.5]))
def test_any_partition_of_the_predictions_adds_up(
    loss: str, case: Batch, kind: str, share: float
) -> None:
    # Micro-batches, shards of the sequence, heads: with an external normaliser, anything adds.
    call = call_of(loss, case, kind, normalizer=11.3)
    here = mask(case.seed + 8, share, *case.shape)
    parts = [call.but(labels=case.labels.masked_fill(hidden, IGNORE)) for hidden in (here, ~here)]
    (first, of_first), (second, of_second) = (part.run() for part in parts)
    same(call.run(), first + second, {name: g + of_second[name] for name, g in of_first.items()})
    if call.reduced:
        whole, *split = (x.apply(x.tensors, "_and_stats")[1] for x in (call, *parts))
        for total, one, other in zip(whole, *split, strict=True):
            close(total, one + other)


@LOSSES
@HALF
@given(case=ALIGNED, kind=KINDS)
def test_heads_add_up(loss: str, case: Batch, kind: str) -> None:
    call = call_of(loss, case, kind, normalizer=11.3, reduction="sum")
    value, gradients = call.run()
    alone = []
    for h in range(case.heads):
        options = {"head_weights": [call.options["head_weights"][h]]} if call.reduced else {}
        alone.append(call.rearranged(lambda x, h=h: x[:, :, h : h + 1], **options).run())
    close(value, sum(one for one, _ in alone))  # type: ignore[arg-type]
    for name, gradient in gradients.items():
        found = [of[name] for _, of in alone]
        close(gradient, torch.cat(found, 2) if name in PREDICTED else sum(found))  # type: ignore[arg-type]


@LOSSES
@HALF
@given(case=batches(label_dims=(3,), min_batch=1), kind=KINDS, normalizer=DENOMINATORS)
def test_a_batch_seen_twice_has_the_same_mean(
    loss: str, case: Batch, kind: str, normalizer: Any
) -> None:
    if kind not in ("none", "prediction", "function") or normalizer == 7.5:
        normalizer = "tokens"
    call = call_of(loss, case, kind, normalizer=normalizer, reduction="mean")
    twice = call.rearranged(lambda x: torch.cat([x, x]))
    value, gradients = call.run()
    halves = {name: torch.cat([g, g]) / 2 if name in PREDICTED else g
              for name, g in gradients.items()}  # fmt: skip
    same(twice.run(), value, halves)


@LOSSES
@HALF
@given(case=ALIGNED, kind=KINDS, normalizer=DENOMINATORS)
def test_gradients_are_linear_in_the_upstream_gradient(
    loss: str, case: Batch, kind: str, normalizer: Any
) -> None:
    call = call_of(loss, case, kind, normalizer=normalizer)
    other = normal(case.seed + 8, *call.upstream.shape)
    _, one = call.run(call.upstream)
    _, two = call.run(other)
    _, both = call.run(0.7 * call.upstream - 1.9 * other)
    for name, gradient in both.items():
        close(gradient, 0.7 * one[name] - 1.9 * two[name])


@FORMS
@given(case=ALIGNED, normalizer=st.sampled_from(["tokens", 7.5]))
def test_the_loss_is_linear_in_the_weights(form: str, case: Batch, normalizer: Any) -> None:
    call = call_of(f"{form}weighted_mtp_loss", case, "prediction", normalizer=normalizer)
    first, second = call.tensors["weights"], uniform(case.seed + 8, *case.shape)
    (one, of_one), (two, of_two) = (call.of(weights=w).run() for w in (first, second))
    value, gradients = call.of(weights=0.6 * first + 1.7 * second).run()
    close(value, 0.6 * one + 1.7 * two)
    for name in gradients.keys() - {"weights"}:
        close(gradients[name], 0.6 * of_one[name] + 1.7 * of_two[name])
    close(gradients["weights"], of_one["weights"])


@FORMS
@given(case=ALIGNED, kind=KINDS, normalizer=DENOMINATORS)
def test_the_loss_is_linear_in_the_head_weights(
    form: str, case: Batch, kind: str, normalizer: Any
) -> None:
    call = call_of(f"{form}weighted_mtp_loss", case, kind, normalizer=normalizer)
    first, second = uniform(case.seed + 8, case.heads), uniform(case.seed + 9, case.heads)
    (one, of_one), (two, of_two) = (call.told(head_weights=x).run() for x in (first, second))
    both = call.told(head_weights=0.6 * first + 1.7 * second).run()
    expected = {name: 0.6 * g + 1.7 * of_two[name] for name, g in of_one.items()}
    same(both, 0.6 * one + 1.7 * two, expected)


@LOSSES
@HALF
@given(case=PLAIN, kind=KINDS, smoothing=st.sampled_from([0.1, 0.7]))
def test_smoothing_and_z_loss_are_terms_of_a_sum(
    loss: str, case: Batch, kind: str, smoothing: float
) -> None:
    call = call_of(loss, case, kind, normalizer="tokens")
    base, of_base = call.run()
    smooth, of_smooth = call.told(label_smoothing=1.0).run()
    wide, of_wide = call.told(z_loss=1.0).run()
    both = call.told(label_smoothing=smoothing, z_loss=0.3).run()
    value = base + smoothing * (smooth - base) + 0.3 * (wide - base)
    same(both, value, {
        name: g + smoothing * (of_smooth[name] - g) + 0.3 * (of_wide[name] - g)
        for name, g in of_base.items()
    })  # fmt: skip


# -------------------------------------------------------------------------------------- denominators


@FORMS
@given(case=ALIGNED, kind=KINDS)
def test_a_normalizer_is_only_its_number(form: str, case: Batch, kind: str) -> None:
    call = call_of(f"{form}weighted_mtp_loss", case, kind, normalizer=1.0)
    value, gradients = call.run()
    stats = call.apply(call.tensors, "_and_stats")[1]
    names = (
        ["tokens"]
        if "weights" in gradients or kind in ("focal", "entropy")
        else ["tokens", "weights"]
    )
    numbers = {"tokens": stats.token_count, "weights": stats.weight_sum}
    for name in names:
        z = numbers[name].sum() / case.heads
        over = torch.where(z == 0, 0, 1 / z)
        same(call.told(normalizer=name).run(), value * over,
             {key: g * over for key, g in gradients.items()})  # fmt: skip


@FORMS
@given(case=ALIGNED, kind=KINDS, normalizer=DENOMINATORS)
def test_the_loss_is_made_of_its_statistics(
    form: str, case: Batch, kind: str, normalizer: Any
) -> None:
    call = call_of(f"{form}weighted_mtp_loss", case, kind, normalizer=normalizer)
    loss, stats = call.apply(call.tensors, "_and_stats")
    numbers = {"tokens": stats.token_count.sum(), "weights": stats.weight_sum.sum()}
    z = (
        numbers[normalizer] / case.heads
        if isinstance(normalizer, str)
        else torch.tensor(normalizer)
    )
    share = torch.tensor(call.options["head_weights"], dtype=torch.float64)
    total = (share * stats.head_loss).sum()
    close(loss, torch.where(z == 0, 0, total / z.clamp(min=1e-300)))


@FORMS
@given(case=batches(label_dims=(2,)), kind=st.sampled_from(["token", "prediction"]),
       normalizer=DENOMINATORS)  # fmt: skip
def test_weights_and_their_gradient_are_orthogonal_or_make_the_loss(
    form: str, case: Batch, kind: str, normalizer: Any
) -> None:
    # Euler: of degree 0 with `normalizer="weights"`, of degree 1 with the others.
    call = call_of(f"{form}weighted_mtp_loss", case, kind, normalizer=normalizer)
    value, gradients = call.run()
    product = (call.tensors["weights"] * gradients["weights"]).sum()
    close(product, torch.zeros_like(value) if normalizer == "weights" else call.upstream * value)


@pytest.mark.parametrize("loss", ["mtp_ce_loss", "linear_mtp_ce_loss"])
@given(case=batches())
def test_the_three_reductions_are_of_the_same_values(loss: str, case: Batch) -> None:
    call = call_of(loss, case)
    up = normal(case.seed + 8)
    count = (targets_of(case) != IGNORE).sum()
    values, gradients = call.run(up.expand(case.shape))
    same(call.told(reduction="sum").run(up), values.sum(), gradients)
    part = 1 / count.clamp(min=1).double()
    mean = {name: g * part for name, g in gradients.items()}
    same(call.told(reduction="mean").run(up), values.sum() * part, mean)


@FORMS
@given(case=batches(label_dims=(2,)), kind=st.sampled_from(["none", "prediction"]),
       normalizer=DENOMINATORS)  # fmt: skip
def test_the_loss_is_the_weighted_mean_of_the_cross_entropy(
    form: str, case: Batch, kind: str, normalizer: Any
) -> None:
    call = call_of(f"{form}weighted_mtp_loss", case, kind, normalizer=normalizer)
    leaves = {name: leaf(x) for name, x in call.tensors.items()}
    values = call_of(f"{form}mtp_ce_loss", case).apply(leaves)
    share = call.options["head_weights"]
    mean = wmtp.weighted_mean(
        values, leaves.get("weights"), valid_of(case), head_weights=share, normalizer=normalizer
    )
    gradients = grads(mean, list(leaves.values()), call.upstream)
    same(call.run(), mean, dict(zip(leaves, gradients, strict=True)))


# ------------------------------------------------------------------------------------ two ways to say


@FORMS
@given(case=batches(label_dims=(2,)), data=st.data())
def test_a_head_does_not_know_the_others(form: str, case: Batch, data: st.DataObject) -> None:
    call = call_of(f"{form}mtp_ce_loss", case)
    kept = sorted(data.draw(st.sets(st.integers(0, case.heads - 1), min_size=1)))
    steps = wmtp.mtp_targets(torch.arange(99)[None], case.offsets or case.heads)[0, 0].tolist()
    names = "hidden" if call.linear else "logits"
    fewer = call.of(**{names: call.tensors[names][:, :, kept]})
    fewer = fewer.told(offsets=[steps[h] for h in kept])
    part = torch.zeros_like(call.upstream)
    part[:, :, kept] = call.upstream[:, :, kept]
    value, gradients = call.run(part)
    gradients[names] = gradients[names][:, :, kept]
    same(fewer.but(upstream=call.upstream[:, :, kept]).run(), value[:, :, kept], gradients)


@FORMS
@given(case=batches(label_dims=(2,)), kind=st.sampled_from(["none", "token"]),
       step=st.integers(1, 3))  # fmt: skip
def test_offsets_further_on_are_labels_moved_here(
    form: str, case: Batch, kind: str, step: int
) -> None:
    call = call_of(f"{form}weighted_mtp_loss", case, kind)
    offsets = [h + 2 * h * h for h in range(case.heads)]
    further = call.told(offsets=[o + step for o in offsets])
    step = min(step, case.seq)
    moved = call.told(offsets=offsets).but(
        labels=F.pad(case.labels[:, step:], (0, step), value=IGNORE)
    )
    value, gradients = further.run()
    if kind == "token":
        there = F.pad(call.tensors["weights"][:, step:], (0, step))
        gradients["weights"] = F.pad(gradients["weights"][:, step:], (0, step))
        moved = moved.of(weights=there)
    same(moved.run(), value, gradients)


@LOSSES
@HALF
@given(case=batches(), kind=KINDS, index=st.sampled_from([-1, 10**6, 0]))
def test_the_ignore_index_may_be_any_number(loss: str, case: Batch, kind: str, index: int) -> None:
    # 0 is a word as well: it is then one that nobody has to predict.
    labels = case.labels.masked_fill(case.labels == 0, IGNORE) if index == 0 else case.labels
    call = call_of(loss, case, kind, normalizer="tokens").but(labels=labels)
    other = call.but(labels=labels.masked_fill(labels == IGNORE, index)).told(ignore_index=index)
    here, there = call.run(), other.run()
    assert torch.equal(here[0], there[0])
    assert all(torch.equal(g, there[1][name]) for name, g in here[1].items())


@LOSSES
@HALF
@given(case=PLAIN, kind=KINDS, cap=st.sampled_from([0.7, 5.0]))
def test_a_softcap_is_a_bound_put_on_the_logits(
    loss: str, case: Batch, kind: str, cap: float
) -> None:
    call = call_of(loss, case, kind, normalizer="tokens")
    leaves = {name: leaf(x) for name, x in call.tensors.items()}
    logits = leaves.get("logits")
    if logits is None:
        logits = leaves["hidden"] @ leaves["unembedding"].T + leaves["bias"]
    dense = call.but(loss=loss.removeprefix("linear_"))
    by_hand = dense.apply({**leaves, "logits": cap * torch.tanh(logits / cap)})
    gradients = grads(by_hand, list(leaves.values()), call.upstream)
    same(call.told(softcap=cap).run(), by_hand, dict(zip(leaves, gradients, strict=True)))


@pytest.mark.parametrize("loss", ["linear_mtp_ce_loss", "linear_weighted_mtp_loss"])
@given(case=batches(label_dims=(2,)), kind=st.sampled_from([*OF_PREDICTIONS, "token"]),
       normalizer=DENOMINATORS)  # fmt: skip
def test_dense_and_linear_agree_in_loss_statistics_and_every_gradient(
    loss: str, case: Batch, kind: str, normalizer: Any
) -> None:
    if kind in ("focal", "entropy") and normalizer == "weights":
        normalizer = "tokens"
    call = call_of(loss, case, kind, normalizer=normalizer)
    leaves = {name: leaf(x) for name, x in call.tensors.items()}
    logits = leaves["hidden"] @ leaves["unembedding"].T + leaves["bias"]
    dense = call.but(loss=loss.removeprefix("linear_"))
    value = dense.apply({**leaves, "logits": logits})
    gradients = grads(value, list(leaves.values()), call.upstream)
    same(call.run(), value, dict(zip(leaves, gradients, strict=True)))
    if call.reduced:
        here = call.apply(call.tensors, "_and_stats")
        there = dense.apply({**call.tensors, "logits": logits.detach()}, "_and_stats")
        close(here[0], there[0])
        for one, other in zip(here[1], there[1], strict=True):
            close(one, other)


@pytest.mark.parametrize("loss", ["linear_mtp_ce_loss", "linear_weighted_mtp_loss"])
@given(
    case=batches(label_dims=(2,)),
    kind=st.sampled_from([*OF_PREDICTIONS, "token"]),
    rows=st.sampled_from([1, 2, 3, 7]),
    dtype=WIDE_DTYPES,
    vocab=st.sampled_from([None, 600]),
)
def test_no_slab_changes_loss_statistics_or_gradient_of_any_weighting(
    loss: str, case: Batch, kind: str, rows: int, dtype: torch.dtype, vocab: int | None
) -> None:
    # Only a wide vocabulary is cut into slabs of columns.
    case = replace(case, vocab=vocab or case.vocab)
    call = call_of(loss, case, kind, normalizer="tokens", dtype=dtype)
    row = case.vocab * dtype.itemsize
    small = call.told(slab_bytes=max(row, rows * row * 16 // 15 + 1))
    same(small.run(), *call.run(), dtype)
    if call.reduced:
        (value, whole), (again, parts) = (x.apply(x.tensors, "_and_stats") for x in (call, small))
        close(again, value, dtype)
        for one, other in zip(parts, whole, strict=True):
            close(one, other, dtype)


# ----------------------------------------------------------------------------------------- gradients


@LOSSES
@HALF
@given(case=PLAIN, kind=KINDS, smoothing=st.sampled_from([0.0, 0.3]))
def test_gradients_sum_to_zero_over_the_vocabulary(
    loss: str, case: Batch, kind: str, smoothing: float
) -> None:
    call = call_of(loss, case, kind, normalizer="tokens").told(label_smoothing=smoothing)
    _, gradients = call.run()
    if call.linear:
        sums = [gradients["unembedding"].sum(0), gradients["bias"].sum(0)]
    else:
        sums = [gradients["logits"].sum(-1)]
    for total in sums:
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-11)


@pytest.mark.parametrize("loss", ["linear_mtp_ce_loss", "linear_weighted_mtp_loss"])
@given(case=ALIGNED, kind=KINDS)
def test_hidden_states_and_unembedding_have_the_same_share_in_the_logits(
    loss: str, case: Batch, kind: str
) -> None:
    call = call_of(loss, case, kind, normalizer="tokens")
    _, gradients = call.run()
    of_hidden, of_unembedding = (
        (call.tensors[name] * gradients[name]).sum() for name in ("hidden", "unembedding")
    )
    close(of_hidden, of_unembedding)


@FORMS
@given(case=batches(label_dims=(3,), min_batch=1, min_seq=1), data=st.data())
def test_a_prediction_depends_on_its_own_logits_only(
    form: str, case: Batch, data: st.DataObject
) -> None:
    call = call_of(f"{form}mtp_ce_loss", case)
    name = "hidden" if call.linear else "logits"
    place = tuple(data.draw(st.integers(0, size - 1)) for size in case.shape)
    own = torch.zeros(case.shape, dtype=torch.bool)
    own[place] = True
    values, gradients = call.run(call.upstream * own)
    assert all_zero(gradients[name][~own])
    others = 3 * normal(case.seed + 8, *call.tensors[name].shape)
    changed = torch.where(own[..., None], call.tensors[name], others)
    labels = torch.where(own, case.labels, IGNORE)
    there, found = call.of(**{name: changed}).but(labels=labels, upstream=call.upstream * own).run()
    close(there[place], values[place])
    close(found[name][place], gradients[name][place])


@FORMS
@given(case=batches(min_batch=1, min_seq=1), layout=LAYOUTS)
def test_the_layout_of_the_upstream_gradient_does_not_matter(
    form: str, case: Batch, layout: str
) -> None:
    call = call_of(f"{form}mtp_ce_loss", case)
    view = relayout(call.upstream, layout)
    here, there = call.run(view), call.run(view.clone(memory_format=torch.contiguous_format))
    same(here, *there)


# ---------------------------------------------------------------------------- targets and likelihoods


@given(seed=SEEDS, batch=sizes(3), seq=sizes(8), heads=st.integers(1, 4), data=st.data())
def test_targets_are_the_aligned_labels(
    seed: int, batch: int, seq: int, heads: int, data: st.DataObject
) -> None:
    labels = integers(seed, 9, batch, seq).masked_fill(mask(seed, 0.2, batch, seq), IGNORE)
    offsets = data.draw(offset_sets(heads)) or heads
    aligned = wmtp.align_to_heads(labels, offsets, fill=IGNORE)
    assert torch.equal(wmtp.mtp_targets(labels, offsets), aligned)


@FORMS
@given(seed=SEEDS, seq=sizes(7, 1), data=st.data())
def test_the_likelihood_of_a_prefix_does_not_know_what_follows(
    form: str, seed: int, seq: int, data: st.DataObject
) -> None:
    end = data.draw(st.integers(0, seq))
    labels = integers(seed, 5, 2, seq)
    shared = [normal(seed + 1, 5, 3)] if form else []
    inputs = normal(seed, 2, seq, 3 if form else 5)
    nll: Any = getattr(wmtp, f"{form}token_nll")
    whole = nll(inputs, *shared, labels)
    close(nll(inputs[:, :end], *shared, labels[:, :end]), whole[:, :end])
    values = getattr(wmtp, f"{form}mtp_ce_loss")(inputs, *shared, labels, reduction="none")
    close(whole, F.pad(values[:, :-1, 0], (1, 0)))


@given(case=batches(label_dims=(3,), options=None), cap=st.sampled_from([None, 2.0]))
def test_scores_of_the_logits_are_told_by_the_cross_entropy_of_every_word(
    case: Batch, cap: float | None
) -> None:
    logits = case.logits()
    words = [torch.full(case.shape, v) for v in range(case.vocab)]
    p = torch.stack([wmtp.target_probability(logits, w, softcap=cap) for w in words])
    ce = torch.stack([wmtp.mtp_ce_loss(logits, w, softcap=cap, reduction="none") for w in words])
    close(p, torch.exp(-ce))
    close(p.sum(0), torch.ones(case.shape).double())
    close(wmtp.predictive_entropy(logits, softcap=cap), (p * ce).sum(0))
    bounded = leaf(logits if cap is None else cap * torch.tanh(logits / cap))
    loss = wmtp.mtp_ce_loss(bounded, case.labels, reduction="none")
    (slope,) = grads(loss, [bounded], torch.ones(case.shape).double())
    close(wmtp.el2n(logits, case.labels, softcap=cap), slope.norm(dim=-1))


@given(case=PLAIN)
def test_weights_of_a_probability_are_weights_of_its_cross_entropy(case: Batch) -> None:
    logits, valid = case.logits(), case.labels != IGNORE
    ce = wmtp.mtp_ce_loss(logits, case.labels, reduction="none")
    p = wmtp.target_probability(logits, case.labels)
    close(wmtp.dft_weights(ce, valid), wmtp.normalize_weights(p, valid))
    # What rounding leaves of 1 − p is not a weight.
    sure = p > 1 - 1e-3
    far = torch.where(sure, 0, (1 - p).square())
    focal = wmtp.focal_weights(ce, valid & ~sure, gamma=2.0)
    close(focal, wmtp.normalize_weights(far, valid & ~sure))


# ---------------------------------------------------------------------------------- scores of critics


@given(case=trajectories(dtype=torch.float64), level=st.sampled_from([-2.0, 7.5]))
def test_the_level_of_a_critic_has_no_deltas(case: Trajectories, level: float) -> None:
    options: dict[str, Any] = dict(case.documents)
    raised = case.values + level
    close(wmtp.td_deltas(raised, case.valid, **options),
          wmtp.td_deltas(case.values, case.valid, **options))  # fmt: skip
    close(wmtp.gae(raised, case.valid, lam=case.lam, **options),
          wmtp.gae(case.values, case.valid, lam=case.lam, **options))  # fmt: skip


@given(case=trajectories(dtype=torch.float64), seed=SEEDS)
def test_deltas_advantages_and_returns_are_linear(case: Trajectories, seed: int) -> None:
    values, rewards = normal(seed, *case.values.shape), normal(seed + 1, *case.values.shape)
    own = torch.zeros_like(values) if case.rewards is None else case.rewards
    discount = {"gamma": case.gamma, **case.documents}

    def deltas(v: Tensor, r: Tensor) -> Tensor:
        return wmtp.td_deltas(v, case.valid, rewards=r, initial_value=0.0, **discount)  # type: ignore[arg-type]

    def advantages(v: Tensor, r: Tensor) -> Tensor:
        return wmtp.gae(v, case.valid, rewards=r, lam=case.lam, initial_value=0.0, **discount)  # type: ignore[arg-type]

    def returns(v: Tensor, r: Tensor) -> Tensor:
        return wmtp.lambda_returns(v, r, case.valid, lam=case.lam, **discount)  # type: ignore[arg-type]

    for of in (deltas, advantages, returns):
        both = of(0.6 * case.values - 1.7 * values, 0.6 * own - 1.7 * rewards)
        close(both, 0.6 * of(case.values, own) - 1.7 * of(values, rewards))


@given(case=trajectories(dtype=torch.float64), mode=st.sampled_from(["exp", "softmax"]),
       scale=st.sampled_from([0.25, 3.0]))  # fmt: skip
def test_the_level_of_a_critic_has_no_weight_and_its_unit_none_when_whitened(
    case: Trajectories, mode: Any, scale: float
) -> None:
    options: dict[str, Any] = {"lam": case.lam, **case.documents}
    scale = scale if mode == "exp" else 1.0
    here = wmtp.critic_delta_weights(case.values, case.valid, mode=mode, **options)
    there = wmtp.critic_delta_weights(scale * case.values + 2.5, case.valid, mode=mode, **options)
    # Deltas that are all 0 have no unit.
    deltas = wmtp.gae(case.values, case.valid, **options)[case.valid]
    if deltas.numel() and float(deltas.std(correction=0)) > 1e-3:
        torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-9)


@given(seed=SEEDS, n=st.integers(1, 8), scale=st.sampled_from([0.2, -3.0]))
def test_advantages_know_neither_level_nor_unit_of_a_reward(
    seed: int, n: int, scale: float
) -> None:
    rewards, groups = integers(seed, 4, n).double() / 4, integers(seed + 1, 3, n)
    here = wmtp.group_advantages(rewards, groups, eps=0.0)
    there = wmtp.group_advantages(scale * rewards + 5.0, groups, eps=0.0)
    close(there, here if scale > 0 else -here)


@given(seed=SEEDS, seq=sizes(5, 1), pool=st.sampled_from(["last", "mean"]),
       level=st.sampled_from([-1.5, 20.0]))  # fmt: skip
def test_a_ranking_knows_differences_only(seed: int, seq: int, pool: Any, level: float) -> None:
    chosen, rejected = leaf(normal(seed, 3, seq)), leaf(normal(seed + 1, 3, seq + 1))
    valid = [torch.ones(3, size).bool() for size in (seq, seq + 1)]
    here = wmtp.pairwise_ranking_loss(chosen, rejected, *valid, pool=pool)
    there = wmtp.pairwise_ranking_loss(chosen + level, rejected + level, *valid, pool=pool)
    close(there, here)
    # −log σ(d) + log σ(−d) = −d
    swapped = wmtp.pairwise_ranking_loss(rejected, chosen, *valid[::-1], pool=pool)
    ends = [x[:, -1] if pool == "last" else x.mean(1) for x in (chosen, rejected)]
    close(here - swapped, (ends[1] - ends[0]).mean())
    up = normal(seed + 2)
    for a, b in zip(grads(here, [chosen, rejected], up), grads(there, [chosen, rejected], up),
                    strict=True):  # fmt: skip
        close(a, b)
    # A level has no gradient.
    total = sum(g.sum() for g in grads(here, [chosen, rejected], up))
    close(total, torch.zeros(()).double())  # type: ignore[arg-type]


@given(seed=SEEDS, batch=sizes(3), seq=sizes(5), kind=st.sampled_from(["mse", "huber", "bce"]))
def test_a_value_loss_mirrors(seed: int, batch: int, seq: int, kind: Any) -> None:
    values, targets = normal(seed, batch, seq), uniform(seed + 1, batch, seq)
    valid, up = mask(seed + 2, 0.7, batch, seq), normal(seed + 3)
    order = order_of(seed, batch)
    flipped = 1 - targets if kind == "bce" else -targets
    here, there, mixed = leaf(values), leaf(-values), leaf(values[order])
    one = wmtp.value_loss(here, targets, valid, kind=kind)
    other = wmtp.value_loss(there, flipped, valid, kind=kind)
    third = wmtp.value_loss(mixed, targets[order], valid[order], kind=kind)
    close(other, one)
    close(third, one)
    (gradient,) = grads(one, [here], up)
    close(grads(other, [there], up)[0], -gradient)
    close(grads(third, [mixed], up)[0], gradient[order])


# -------------------------------------------------------------------------------------------- weights


# Builders of one score; those that fall as it rises are told of its negative.
RISING: dict[str, Callable[..., Tensor]] = {
    "softmax_weights": wmtp.softmax_weights,
    "top_k_weights": wmtp.top_k_weights,
    "exp_weights": wmtp.exp_weights,
    "score_weights": wmtp.score_weights,
    "normalize_weights": wmtp.normalize_weights,
    "entropy_weights": wmtp.entropy_weights,
    "el2n_weights": wmtp.el2n_weights,
    "focal_weights": of_predictions(wmtp.focal_weights),
    "dft_weights": lambda s, valid, **k: of_predictions(wmtp.dft_weights)(3 - s, valid, **k),
    "rho1_weights": lambda s, valid, **k: of_predictions(
        lambda ce, ok, **o: wmtp.rho1_weights(ce, ok, torch.zeros_like(ce), **o)
    )(s, valid, **k),
}
BUILDERS = pytest.mark.parametrize("build", RISING.values(), ids=RISING.keys())


@BUILDERS
@HALF
@given(case=scored())
def test_weights_follow_their_tokens(build: Callable[..., Tensor], case: Scored) -> None:
    scores, valid = case.cross_entropies(), case.valid
    weights = build(scores, valid, scope=case.scope)
    for axis in range(2):
        order = order_of(case.seed, case.shape[axis])
        moved = build(
            scores.index_select(axis, order), valid.index_select(axis, order), scope=case.scope
        )
        torch.testing.assert_close(moved, weights.index_select(axis, order), rtol=2e-5, atol=2e-6)


@BUILDERS
@HALF
@given(case=scored())
def test_weights_rise_with_their_scores(build: Callable[..., Tensor], case: Scored) -> None:
    scores, valid = case.cross_entropies(), case.valid
    weights = build(scores, valid, scope="sequence")
    heads = (1,) if scores.dim() == 2 else (1, case.shape[2])
    score, weight, ok = (x.reshape(*case.shape[:2], heads[-1]) for x in (scores, weights, valid))
    for b in range(case.shape[0]):
        for h in range(heads[-1]):
            used = ok[b, :, h]
            order = score[b, used, h].argsort()
            rising = weight[b, used, h][order].diff()
            assert (rising >= -1e-6).all()


@given(case=scored(dims=(3,)), scope=st.sampled_from(["sequence", "batch", "all"]))
def test_rho1_knows_the_excess_only(case: Scored, scope: Any) -> None:
    # Eighths, so that sums are exact and the order of the scores is the same.
    ce = integers(case.seed, 40, *case.shape).double() / 8
    reference = integers(case.seed + 1, 40, *case.shape).double() / 8
    common = integers(case.seed + 2, 40, *case.shape).double() / 8
    here = wmtp.rho1_weights(ce, case.valid, reference, scope=scope)
    there = wmtp.rho1_weights(ce + common, case.valid, reference + common, scope=scope)
    assert torch.equal(here, there)
    excess = wmtp.excess_loss(ce, reference)
    assert torch.equal(here, wmtp.top_k_weights(excess, case.valid, scope=scope))
    assert torch.equal(excess, -wmtp.excess_loss(reference, ce))


@given(case=scored(), mode=st.sampled_from(["mixture", "product", "intersection"]))
def test_the_order_of_combined_weights_does_not_matter(case: Scored, mode: Any) -> None:
    members = [case.weights(), case.cross_entropies(), torch.ones(case.shape).to(case.dtype)]
    shares = None if mode == "intersection" else [0.5, 1.5, 1.0]
    options: dict[str, Any] = {"mode": mode, "scope": case.scope}
    here = wmtp.combine_weights(members, case.valid, coefficients=shares, **options)
    for order in ([1, 2, 0], [2, 1, 0]):
        there = wmtp.combine_weights(
            [members[i] for i in order],
            case.valid,
            coefficients=None if shares is None else [shares[i] for i in order],
            **options,
        )
        torch.testing.assert_close(there, here, rtol=5e-5, atol=1e-6)


@given(case=scored(dims=(2,)), spans=st.integers(1, 4))
def test_the_names_of_spans_do_not_matter(case: Scored, spans: int) -> None:
    ids = integers(case.seed + 4, spans + 1, *case.shape) - 1
    values = (0.1 + uniform(case.seed + 5, spans)).to(case.dtype)
    order = order_of(case.seed, spans)
    renamed = torch.where(ids < 0, ids, order.argsort()[ids.clamp(min=0)])
    here = wmtp.span_weights(ids, values, case.valid)
    assert torch.equal(wmtp.span_weights(renamed, values[order], case.valid), here)


@given(case=scored(), groups=st.integers(1, 3))
def test_sequences_keep_their_weight_in_any_order_and_group_name(case: Scored, groups: int) -> None:
    rewards = uniform(case.seed + 4, case.shape[0]).to(case.dtype)
    ids = integers(case.seed + 5, groups, case.shape[0])
    order = order_of(case.seed, case.shape[0])
    here = wmtp.group_relative_weights(rewards, ids, case.valid)
    there = wmtp.group_relative_weights(rewards[order], 7 - 3 * ids[order], case.valid[order])
    torch.testing.assert_close(there, here[order], rtol=5e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- watching


@given(case=scored(), scale=st.sampled_from([0.25, 8.0]))
def test_the_scale_of_the_weights_shows_in_levels_and_not_in_shares(
    case: Scored, scale: float
) -> None:
    here = wmtp.weight_statistics(case.weights(), case.valid, extreme=2.0)._asdict()
    there = wmtp.weight_statistics(
        scale * case.weights(), case.valid, extreme=2.0 * scale
    )._asdict()
    shares = ("weight_entropy", "effective_sample_ratio", "zero_fraction", "nan_weights",
              "extreme_weights")  # fmt: skip
    for name, value in here.items():
        wanted = value if name in shares else scale * value
        torch.testing.assert_close(there[name], wanted, rtol=1e-5, atol=1e-6)


@given(case=scored())
def test_weights_seen_twice_have_the_same_levels(case: Scored) -> None:
    twice = wmtp.weight_statistics(torch.cat([case.weights()] * 2), torch.cat([case.valid] * 2))
    once = wmtp.weight_statistics(case.weights(), case.valid)
    same_of_both = ("weight_mean", "weight_std", "weight_min", "weight_max", "zero_fraction",
                    "effective_sample_ratio")  # fmt: skip
    for name in same_of_both:
        torch.testing.assert_close(getattr(twice, name), getattr(once, name), rtol=1e-5, atol=1e-6)
    assert twice.extreme_weights == 2 * once.extreme_weights


@given(case=scored())
def test_shuffling_changes_no_statistic(case: Scored) -> None:
    weights = case.weights()
    mixed = wmtp.shuffled_weights(weights, case.valid, generator=generator(case.seed))
    for a, b in zip(wmtp.weight_statistics(mixed, case.valid),
                    wmtp.weight_statistics(weights, case.valid), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@given(case=scored(), bad=st.sampled_from([None, float("nan"), float("inf"), -0.5, 9.0, 0.0]))
def test_the_gate_refuses_what_the_statistics_show(case: Scored, bad: float | None) -> None:
    weights = case.weights()
    if bad is not None:
        weights = weights.masked_fill(mask(case.seed + 5, 0.3 if bad else 1.0, *case.shape), bad)
    seen = wmtp.weight_statistics(weights, case.valid, extreme=5.0)
    harm = (
        seen.nan_weights > 0
        or seen.extreme_weights > 0
        or seen.weight_min < 0
        or (case.valid.any() and seen.zero_fraction == 1)
    )
    try:
        wmtp.check_weights(weights, case.valid, extreme=5.0)
    except ValueError:
        assert harm
    else:
        assert not harm


@given(case=scored(), scale=st.sampled_from([-2.0, 0.5]), level=st.sampled_from([0.0, 3.0]))
def test_running_statistics_know_no_order_and_follow_unit_and_level(
    case: Scored, scale: float, level: float
) -> None:
    first, second = case.scores().double(), normal(case.seed + 7, *case.shape)
    valid = {True: case.valid, False: mask(case.seed + 8, 0.3, *case.shape)}

    def seen(*parts: tuple[Tensor, bool]) -> wmtp.WhiteningStatistics:
        statistics: Any = None
        for part, is_first in parts:
            statistics = wmtp.update_statistics(statistics, part, valid[is_first])
        return statistics

    one, other = (first, True), (second, False)
    here, swapped = seen(one, other), seen(other, one)
    for a, b in zip(here, swapped, strict=True):
        close(a, b)
    moved = seen((scale * first + level, True), (scale * second + level, False))
    close(moved.mean, torch.where(here.count > 0, scale * here.mean + level, 0))
    close(moved.std, abs(scale) * here.std)


# -------------------------------------------------------------------------------------------- modules


def trained(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    with torch.no_grad():
        for n, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(seed + n, *parameter.shape))
    return module.double()


@given(seed=SEEDS, batch=sizes(3), seq=sizes(5), heads=st.integers(1, 3))
def test_modules_treat_every_position_alike(seed: int, batch: int, seq: int, heads: int) -> None:
    hidden, order = normal(seed, batch, seq, 6), order_of(seed, batch * seq)
    for module in (wmtp.MTPHeads(6, heads, hidden_dim=4), wmtp.ValueHead(6)):
        module = trained(module, seed)
        row = module(hidden.reshape(1, batch * seq, 6)[:, order])
        together = module(hidden).reshape(1, batch * seq, *row.shape[2:])
        close(row, together[:, order])


@pytest.mark.parametrize("name", ["WeightedMTPLoss", "LinearWeightedMTPLoss"])
@given(case=batches(label_dims=(2,)), kind=st.sampled_from([*OF_PREDICTIONS, "token"]),
       normalizer=DENOMINATORS)  # fmt: skip
def test_a_loss_module_has_the_gradients_of_its_function(
    name: str, case: Batch, kind: str, normalizer: Any
) -> None:
    loss = "linear_weighted_mtp_loss" if name.startswith("Linear") else "weighted_mtp_loss"
    call = call_of(loss, case, kind, normalizer=normalizer)
    leaves = {key: leaf(x) for key, x in call.tensors.items()}
    weights = leaves.get("weights", call.weigh)
    module = getattr(wmtp, name)(**call.options)
    if call.linear:
        found = module(leaves["hidden"], leaves["unembedding"], call.labels, weights,
                       bias=leaves["bias"])  # fmt: skip
    else:
        found = module(leaves["logits"], call.labels, weights)
    value, gradients = call.run()
    assert torch.equal(found, value)
    for key, gradient in zip(leaves, grads(found, list(leaves.values()), call.upstream),
                             strict=True):  # fmt: skip
        assert torch.equal(gradient, gradients[key])


# ----------------------------------------------------------------------------------------- the register


def test_every_public_name_has_a_property_that_hypothesis_searches() -> None:
    found = searched_tests()
    for entry in PROPERTIES:
        assert entry.test in found, f"{entry.test} is no Hypothesis test"
        unknown = set(entry.functions) - set(wmtp.__all__)
        assert not unknown, f"{entry.name}: {unknown} is not public"
    covered = {function for entry in PROPERTIES for function in entry.functions}
    assert set(wmtp.__all__) == covered
    own = {test for test in found if test.startswith("test_properties::")}
    assert own <= {entry.test for entry in PROPERTIES}, "a property that nobody listed"
    assert len({entry.name for entry in PROPERTIES}) == len(PROPERTIES) >= 40
