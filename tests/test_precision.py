"""Our error is at most that of plain PyTorch in the same dtype, plus two units in the last place.

The truth is computed in 64 bits or more (`np.longdouble`, by formula, without autograd) from the same
rounded inputs. Two other ways to compute the same loss are measured against it too:

* *naive*: `F.linear` and `F.cross_entropy` in the given dtype, weights and their mean in that dtype.
* *careful*: the same with the logits (and weights) widened to float32 after `F.linear`.

The careful way is mostly the better one, and what people write who know of rounding; the bound holds
for the better of the two in every single case. What one of them cannot represent (a sum that overflows
float16, 0/0 where every probability underflowed) counts as infinitely wrong.

Errors are relative: of a loss to `max(1, |loss|)`, of a gradient in Frobenius norm. Where the terms of
a gradient cancel, so that its size says nothing of its rounding, the terms are the measure.

`python -m tests.test_precision` counts the cases and prints the worst error and ratio of every cell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tests.helpers import leaf
from tests.strategies import IGNORE, integers, mask, normal, uniform
from wmtp import (
    RowLocalWeights,
    linear_mtp_ce_loss,
    linear_weighted_mtp_loss,
    mtp_ce_loss,
    mtp_targets,
    weighted_mtp_loss,
)


Array = NDArray[Any]
Wide = np.longdouble

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REGIMES = ("ordinary", "wide", "gaps of 1e4", "masked vocabulary", "all equal")
WEIGHTINGS = ("none", "token", "prediction", "function", "dft", "focal", "entropy", "el2n")
NORMALIZERS = ("weights", "tokens", 9.0)
# Of rows in a slab: everything, one, and a number that leaves a remainder.
SLABS = (None, 1, 3)
# Powers of two scale a gradient without rounding it; others round it once more if it is rounded.
UPSTREAMS = (0.37, 1.0, -2.7, 0.25, 1.3e-3)
SIZES = ((24, 8), (7, 16), (70, 5), (12, 3), (130, 33))
BATCH, SEQ, HEADS = 2, 7, 2
SHAPE = (BATCH, SEQ, HEADS)
SHARES = (None, (1.0, 0.3))
# A gradient is measured by its own size, or by its terms' where it is smaller by more than this.
CANCELLED = 2


class Case(NamedTuple):
    """One call of one loss; everything else follows from the seed."""

    dtype: torch.dtype
    regime: str
    form: str
    weighting: str
    normalizer: str | float
    slab_rows: int | None
    seed: int

    @property
    def sizes(self) -> tuple[int, int]:
        return SIZES[self.seed % len(SIZES)]

    @property
    def shares(self) -> tuple[float, ...] | None:
        return SHARES[self.seed // 2 % 2]

    @property
    def linear(self) -> bool:
        return self.form.startswith("linear")

    @property
    def reduced(self) -> bool:
        return self.form.endswith("weighted_mtp_loss")

    @property
    def upstream(self) -> Tensor:
        scale = UPSTREAMS[self.seed % 7 % len(UPSTREAMS)]
        # The naive loss has the dtype of its inputs, and so has what it is differentiated with.
        wide = torch.tensor(scale) if self.reduced else scale * normal(self.seed + 5, *SHAPE)
        return wide.to(self.dtype).double()


def cases(dtype: torch.dtype, regime: str) -> Iterator[Case]:
    """Every form with every weighting, normaliser and slab."""
    seeds = itertools.count()
    for _ in range(5):
        yield Case(dtype, regime, "mtp_ce_loss", "none", 1.0, None, next(seeds))
        for rows in SLABS:
            yield Case(dtype, regime, "linear_mtp_ce_loss", "none", 1.0, rows, next(seeds))
    for weighting, normalizer in itertools.product(WEIGHTINGS, NORMALIZERS):
        for _ in range(2):
            yield Case(dtype, regime, "weighted_mtp_loss", weighting, normalizer, None, next(seeds))
        for rows in SLABS:
            yield Case(
                dtype, regime, "linear_weighted_mtp_loss", weighting, normalizer, rows, next(seeds)
            )


# ------------------------------------------------------------------------------------------- inputs


def inputs(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """What the loss is differentiated by, rounded to the dtype, and `[batch seq]` labels."""
    (vocab, dim), seed = case.sizes, case.seed
    masked = max(1, vocab // 3) if case.regime == "masked vocabulary" else 0
    labels = integers(seed, vocab - masked, BATCH, SEQ)
    labels = labels.masked_fill(mask(seed + 9, 0.2, BATCH, SEQ), IGNORE)
    labels[0, 1:3] = 0  # something is predicted, whatever was drawn
    found: dict[str, Tensor]
    if case.linear:
        hidden = normal(seed, *SHAPE, dim)
        unembedding, bias = normal(seed + 1, vocab, dim), normal(seed + 2, vocab)
        unembedding = unembedding / math.sqrt(dim)
        if case.regime in ("wide", "gaps of 1e4"):
            # Products that are exact in any dtype, so that only what follows them is compared: the
            # rounding of large logits would hide it behind the luck of an order of summation.
            hidden = integers(seed, 5, *SHAPE, dim).double() - 2
            hidden[..., 8:] = 0  # float16 ends at 65504
            steps, size = (8, 1) if case.regime == "wide" else (2, 1250)
            unembedding = size * (integers(seed + 1, 2 * steps + 1, vocab, dim).double() - steps)
            bias = integers(seed + 2, 17, vocab).double() / 8
            bias = bias.round() if case.regime == "wide" else bias
        elif case.regime == "all equal":
            hidden, bias = torch.zeros_like(hidden), bias[:1].repeat(vocab)
        bias[vocab - masked :] = -math.inf
        found = {"hidden": hidden, "unembedding": unembedding, "bias": bias}
    else:
        logits = normal(seed, *SHAPE, vocab) * (20 if case.regime == "wide" else 2)
        if case.regime == "gaps of 1e4":
            logits = logits + 1e4 * (integers(seed + 1, 3, *SHAPE, vocab).double() - 1)
        elif case.regime == "all equal":
            logits = logits[..., :1].expand(*SHAPE, vocab)
        logits = logits.clone()
        logits[..., vocab - masked :] = -math.inf
        found = {"logits": logits}
    if case.weighting in ("token", "prediction"):
        shape = SHAPE if case.weighting == "prediction" else SHAPE[:2]
        found["weights"] = (0.1 + uniform(seed + 4, *shape)) * ~mask(seed + 6, 0.2, *shape)
        found["weights"][0, 1:3] = 0.75
    return {name: x.to(case.dtype) for name, x in found.items()}, labels


# ------------------------------------------------------------------------------------------- truths


class Result(NamedTuple):
    """A loss and its gradients by name, as float64 or wider."""

    loss: Array
    gradients: dict[str, Array]
    scales: dict[str, float]


def wide(x: Tensor) -> Array:
    return x.detach().double().numpy().astype(Wide)


def norm(x: Array) -> float:
    return float(np.sqrt((x.astype(Wide) ** 2).sum()))


def truth(case: Case, tensors: dict[str, Tensor], targets: Tensor) -> Result:
    """By formula: `∂ℓ/∂z = p − e_y`, `∂L/∂ℓ = λ w / Z`, `∂L/∂w = λ ℓ / Z − N / (Z² H)`."""
    known = {name: wide(x) for name, x in tensors.items()}
    upstream = wide(case.upstream)
    valid, target = (targets != IGNORE).numpy(), targets.clamp(min=0).numpy()
    if case.linear:
        logits = known["hidden"] @ known["unembedding"].T + known["bias"]
    else:
        logits = known["logits"]
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True)
    log_p, p = shifted - np.log(total), np.exp(shifted) / total
    chosen = np.eye(logits.shape[-1], dtype=Wide)[target]
    ce = np.where(valid, -np.take_along_axis(log_p, target[..., None], -1)[..., 0], 0)
    gradients: dict[str, Array] = {}
    scales: dict[str, float] = {}
    if case.reduced:
        loss, factor = weigh(case, ce, p, log_p, chosen, valid, known, gradients, scales)
    else:
        loss, factor = ce, valid * upstream
    of_logits = (factor * valid)[..., None] * (p - chosen)
    if case.linear:
        flat = of_logits.reshape(-1, of_logits.shape[-1])
        rows = known["hidden"].reshape(len(flat), -1)
        gradients["hidden"] = of_logits @ known["unembedding"]
        gradients["unembedding"] = flat.T @ rows
        gradients["bias"] = flat.sum(0)
        scales["hidden"] = norm(abs(of_logits) @ abs(known["unembedding"]))
        scales["unembedding"] = norm(abs(flat.T) @ abs(rows))
        # A plain sum over rows, in any order: its terms are what its rounding is measured by.
        scales["bias"] = CANCELLED * norm(abs(flat).sum(0))
    else:
        gradients["logits"] = of_logits
    sizes = {
        name: max(norm(gradient), scales.get(name, 0.0) / CANCELLED)
        for name, gradient in gradients.items()
    }
    return Result(loss, gradients, sizes)


def weigh(
    case: Case,
    ce: Array,
    p: Array,
    log_p: Array,
    chosen: Array,
    valid: Array,
    known: dict[str, Array],
    gradients: dict[str, Array],
    scales: dict[str, float],
) -> tuple[Array, Array]:
    """The weighted loss and what each prediction's cross entropy counts in it."""
    steps = [(h, BATCH, SEQ - h - 1) for h in range(HEADS)]
    weights = np.zeros(SHAPE, Wide)
    if case.weighting == "token":
        for h, _, left in steps:
            weights[:, :left, h] = known["weights"][:, h + 1 :]
    else:
        weights = {
            "none": np.ones(SHAPE, Wide),
            "prediction": known.get("weights"),
            "function": 1 / (1 + ce),
            "dft": np.exp(-ce),
            "focal": -np.expm1(-ce),
            "entropy": -(p * np.where(p > 0, log_p, 0)).sum(-1),
            "el2n": np.sqrt(((p - chosen) ** 2).sum(-1)),
        }[case.weighting]
    weights = np.where(valid, weights, 0)
    by_weights = case.normalizer == "weights"
    denominator = {"weights": weights.sum() / HEADS, "tokens": valid.sum(dtype=Wide) / HEADS}
    z = denominator.get(str(case.normalizer), Wide(9.0))
    share = np.array(case.shares or (1 / Wide(HEADS),) * HEADS, Wide)
    factor = share * weights / z
    loss = (factor * ce).sum()
    upstream = wide(case.upstream)
    if "weights" in known:
        minus = loss / (z * HEADS) if by_weights else Wide(0)
        slope = np.where(valid, upstream * (share * ce / z - minus), 0)
        # The two terms cancel altogether where all losses are equal.
        size = np.where(valid, abs(upstream) * (share * ce / z + minus), 0)
        if case.weighting == "token":
            back, of = np.zeros(SHAPE[:2], Wide), np.zeros(SHAPE[:2], Wide)
            for h, _, left in steps:
                back[:, h + 1 :] += slope[:, :left, h]
                of[:, h + 1 :] += size[:, :left, h]
            slope, size = back, of
        gradients["weights"], scales["weights"] = slope, CANCELLED * norm(size)
    return loss, upstream * factor


# ------------------------------------------------------------------------------------- the contenders


def ours(case: Case, tensors: dict[str, Tensor], labels: Tensor) -> Tensor:
    options: dict[str, Any] = {}
    first = [tensors["hidden"], tensors["unembedding"]] if case.linear else [tensors["logits"]]
    if case.linear:
        row = case.sizes[0] * case.dtype.itemsize
        rows = case.slab_rows
        # A sixteenth of a slab is scratch.
        options["slab_bytes"] = None if rows is None else max(row, -(-rows * row * 16 // 15))
        options["bias"] = tensors["bias"]
    if not case.reduced:
        function: Any = linear_mtp_ce_loss if case.linear else mtp_ce_loss
        return function(*first, labels, reduction="none", **options)
    weights: Any = tensors.get("weights")
    if case.weighting == "function":
        weights = lambda ce, valid: 1 / (1 + ce)
    elif case.weighting in ("dft", "focal", "entropy", "el2n"):
        weights = RowLocalWeights(case.weighting)  # type: ignore[arg-type]
    function = linear_weighted_mtp_loss if case.linear else weighted_mtp_loss
    return function(
        *first,
        labels,
        weights,
        head_weights=case.shares,
        normalizer=case.normalizer,
        **options,
    )


def plain(case: Case, tensors: dict[str, Tensor], targets: Tensor, careful: bool) -> Tensor:
    """What a user of PyTorch would write."""
    logits = tensors.get("logits")
    if logits is None:
        logits = F.linear(tensors["hidden"], tensors["unembedding"], tensors["bias"])
    weights = tensors.get("weights")
    if careful and case.dtype != torch.float64:
        logits, weights = logits.float(), None if weights is None else weights.float()
    valid, target = targets != IGNORE, targets.clamp(min=0)
    ce = F.cross_entropy(
        logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORE, reduction="none"
    ).view(SHAPE)
    if not case.reduced:
        return ce
    if weights is None:
        p = logits.detach().softmax(-1)
        score = {
            "none": lambda: torch.ones_like(ce),
            "function": lambda: 1 / (1 + ce),
            "dft": lambda: torch.exp(-ce),
            "focal": lambda: 1 - torch.exp(-ce),
            "entropy": lambda: torch.special.entr(p).sum(-1),
            "el2n": lambda: (p - F.one_hot(target, p.shape[-1])).norm(dim=-1),
        }[case.weighting]
        weights = score().detach()
    elif weights.dim() == 2:
        weights = torch.stack([F.pad(weights[:, h + 1 :], (0, h + 1)) for h in range(HEADS)], 2)
    weights = weights * valid
    z = {"weights": weights.sum() / HEADS, "tokens": valid.sum() / HEADS}.get(
        str(case.normalizer), 9.0
    )
    share = weights.new_tensor(case.shares or [1 / HEADS] * HEADS)
    return (share * weights * ce).sum() / z


# ---------------------------------------------------------------------------------------- the measure


def errors(case: Case, loss: Tensor, leaves: dict[str, Tensor], right: Result) -> dict[str, float]:
    """Of the loss relative to `max(1, |loss|)`, of gradients in relative Frobenius norm."""
    found = torch.autograd.grad(loss, list(leaves.values()), case.upstream.to(loss.dtype))
    out = {"loss": norm(wide(loss) - right.loss) / norm(np.maximum(1, np.abs(right.loss)))}
    for (name, x), gradient in zip(leaves.items(), found, strict=True):
        assert gradient.dtype == x.dtype
        smallest = torch.finfo(case.dtype).tiny
        size = max(right.scales[name], smallest)
        out[name] = norm(wide(gradient) - right.gradients[name]) / size
    return {name: error if math.isfinite(error) else math.inf for name, error in out.items()}


class Measured(NamedTuple):
    case: Case
    quantity: str
    ours: float
    naive: float
    careful: float

    @property
    def slack(self) -> float:
        return 2 * torch.finfo(self.case.dtype).eps


def measure(case: Case) -> list[Measured]:
    tensors, labels = inputs(case)
    targets = mtp_targets(labels, HEADS)
    right = truth(case, tensors, targets)
    columns = []
    for which in ("ours", "naive", "careful"):
        leaves = {name: leaf(x) for name, x in tensors.items()}
        if which == "ours":
            loss = ours(case, leaves, labels)
        else:
            loss = plain(case, leaves, targets, which == "careful")
        columns.append(errors(case, loss, leaves, right))
    return [Measured(case, name, *(found[name] for found in columns)) for name in columns[0]]


PATHS = {
    "dense": lambda case: not case.linear,
    "linear, known weights": lambda case: (
        case.weighting in ("none", "token", "prediction", "focal", "el2n")
    ),
    "linear, dft weights": lambda case: case.weighting == "dft",
    "linear, entropy weights": lambda case: case.weighting == "entropy",
    "linear, losses first": lambda case: True,
}


def path_of(case: Case) -> str:
    """How the loss is computed; without a sum, or with a function, losses come before gradients."""
    if case.linear and not case.reduced:
        return "linear, losses first"
    return next(name for name, holds in PATHS.items() if holds(case))


def cells() -> Iterator[Any]:
    for cell in itertools.product(DTYPES, REGIMES, PATHS):
        yield pytest.param(*cell, id=f"{str(cell[0])[6:]}, {cell[1]}, {cell[2]}")


@pytest.mark.parametrize(("dtype", "regime", "path"), list(cells()))
def test_the_error_is_at_most_that_of_plain_pytorch(
    dtype: torch.dtype, regime: str, path: str
) -> None:
    if dtype == torch.float64 and np.finfo(Wide).eps >= np.finfo(np.float64).eps:
        pytest.skip("this platform has nothing wider than float64 to compare it with")
    found = [x for case in cases(dtype, regime) if path_of(case) == path for x in measure(case)]
    worse = [x for x in found if not x.ours <= min(x.naive, x.careful) + x.slack]
    assert found
    assert not worse, "\n".join(map(str, worse[:20]))


def main() -> None:
    """The worst of every cell, in units of `eps`, and the worst share of what is allowed."""
    total = 0
    head = ("dtype", "logits", "quantity", "cases", "ours", "naive", "careful", "of allowed")
    print("| " + " | ".join((*head, "of allowed (careful)", "worst case")) + " |")
    for dtype, regime in itertools.product(DTYPES, REGIMES):
        known = list(cases(dtype, regime))
        total += len(known)
        table: dict[str, list[Measured]] = {}
        for case in known:
            for found in measure(case):
                table.setdefault(found.quantity, []).append(found)
        eps = torch.finfo(dtype).eps
        for quantity, rows in table.items():
            worst = [max(getattr(x, name) for x in rows) / eps for name in Measured._fields[2:]]
            naive, careful = (
                max(x.ours / (getattr(x, name) + x.slack) for x in rows)
                for name in ("naive", "careful")
            )
            last = max(rows, key=lambda x: x.ours / (x.careful + x.slack)).case
            cells = [str(dtype)[6:], regime, quantity, str(len(rows))]
            cells += [f"{x:.2f}" for x in worst] + [f"{naive:.2f}", f"{careful:.2f}"]
            print("| " + " | ".join([*cells, str(tuple(last[2:]))]) + " |")
    print(f"{total} cases, every gradient of each")


if __name__ == "__main__":
    main()
