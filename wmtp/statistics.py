"""Watching weights: what to log at every step, and the gate that stops a run that went wrong."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wmtp import _checks
from wmtp._dtypes import wide
from wmtp._typing import typed
from wmtp.normalize import check_weight_shapes


class WeightStatistics(NamedTuple):
    """Statistics of weights over their valid entries, 0-d tensors; ``_asdict()`` goes to a logger.

    Attributes:
        weight_mean: mean; 1 for the builders of this package.
        weight_std: population standard deviation.
        weight_min: smallest.
        weight_max: largest.
        weight_p25: quantile, linearly interpolated, as are the next three.
        weight_p50: median.
        weight_p75: quantile.
        weight_p95: quantile.
        weight_entropy: ``−Σ p log p / log n`` with ``p = w / Σw``; 1 is uniform, 0 all on one entry.
        effective_sample_ratio: ``(Σw)² / (n Σw²)``; 1 is uniform, ``1/n`` all on one entry.
        zero_fraction: share of entries that are 0.
        nan_weights: number of entries that are NaN or infinite; the statistics above leave them out.
        extreme_weights: number of entries above ``extreme``.
    """

    weight_mean: Float[Tensor, ""]
    weight_std: Float[Tensor, ""]
    weight_min: Float[Tensor, ""]
    weight_max: Float[Tensor, ""]
    weight_p25: Float[Tensor, ""]
    weight_p50: Float[Tensor, ""]
    weight_p75: Float[Tensor, ""]
    weight_p95: Float[Tensor, ""]
    weight_entropy: Float[Tensor, ""]
    effective_sample_ratio: Float[Tensor, ""]
    zero_fraction: Float[Tensor, ""]
    nan_weights: Float[Tensor, ""]
    extreme_weights: Float[Tensor, ""]


@typed
def weight_statistics(
    weights: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    extreme: float = 5.0,
) -> WeightStatistics:
    """Describe weights over their valid entries, without a host synchronisation.

    Args:
        weights: ``[batch seq]`` or ``[batch seq heads]``, of any size (``torch.quantile`` stops at
            2²⁴ entries, this does not).
        valid: same shape.
        extreme: above which a weight counts as extreme, at least 0.

    Returns:
        ``WeightStatistics``, detached; all 0 if nothing is valid.

    Raises:
        ValueError: shapes that do not fit, ``extreme`` negative.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> valid = torch.tensor([[True, True, True, False]])
        >>> statistics = weight_statistics(torch.tensor([[0.0, 1.0, 2.0, 99.0]]), valid)
        >>> statistics.weight_mean, statistics.effective_sample_ratio
        (tensor(1.), tensor(0.6000))

    Source: effective sample size: Kish, "Survey Sampling", 1965; quantiles: Hyndman and Fan, 1996,
    definition 7.
    """
    check_weight_shapes("weights", weights, valid)
    _checks.in_range("extreme", extreme, 0.0)
    entries = wide(weights.detach()).reshape(-1)
    inside = valid.reshape(-1)
    used = inside & entries.isfinite()
    count = used.sum()
    divisor = count.clamp(min=1).to(entries.dtype)
    values = torch.where(used, entries, 0)
    # Divided by the largest: squares and sums of huge weights would overflow.
    peak = torch.cat([values.abs(), values.new_zeros(1)]).amax()
    scaled = values / torch.where(peak > 0, peak, 1)
    mean = scaled.sum() / divisor
    variance = torch.where(used, scaled - mean, 0).square().sum() / divisor
    quantiles = _quantiles(entries, used, count, (0.0, 0.25, 0.5, 0.75, 0.95, 1.0))
    smallest, p25, p50, p75, p95, largest = quantiles.unbind()
    return WeightStatistics(
        weight_mean=peak * mean,
        weight_std=peak * variance.sqrt(),
        weight_min=smallest,
        weight_max=largest,
        weight_p25=p25,
        weight_p50=p50,
        weight_p75=p75,
        weight_p95=p95,
        weight_entropy=_entropy(scaled, count),
        effective_sample_ratio=_effective_sample_ratio(scaled, divisor),
        zero_fraction=(used & (entries == 0)).sum() / divisor,
        nan_weights=(inside & ~entries.isfinite()).sum().to(entries.dtype),
        extreme_weights=(inside & (entries > extreme)).sum().to(entries.dtype),
    )


@typed
def check_weights(
    weights: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    extreme: float = 5.0,
) -> None:
    """Raise if weights would do harm: the failure gate of a training loop.

    Refuses NaN, infinite, negative and extreme weights at valid entries, and weights that are all 0
    where something is valid. It reads the data, which synchronises: call it when you want that.

    Args:
        weights: ``[batch seq]`` or ``[batch seq heads]``.
        valid: same shape.
        extreme: above which a weight is refused, at least 0; ``math.inf`` allows any.

    Returns:
        Nothing.

    Raises:
        ValueError: shapes that do not fit, ``extreme`` negative, no values (meta tensors), or bad
            weights; the message names what is wrong, how often, and where first.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> check_weights(torch.tensor([[1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool))
        Traceback (most recent call last):
            ...
        ValueError: weights must not be negative, got 1 of 2 valid entries, the first -2.0 at [0, 1]

    Source: none; it guards the preconditions of the loss.
    """
    check_weight_shapes("weights", weights, valid)
    _checks.in_range("extreme", extreme, 0.0)
    if weights.is_meta:
        raise ValueError("weights must have values to look at, got a tensor on the meta device")
    entries = wide(weights.detach())
    total = int(valid.sum())
    for rule, wrong in (
        ("NaN", entries.isnan()),
        ("infinite", entries.isinf()),
        ("negative", entries < 0),
        (f"above {extreme}", entries > extreme),
    ):
        places = (valid & wrong).nonzero()
        if len(places):
            first = [int(i) for i in places[0]]
            raise ValueError(
                f"weights must not be {rule}, got {len(places)} of {total} valid entries, "
                f"the first {float(entries[tuple(first)])} at {first}"
            )
    if total and not bool((valid & (entries > 0)).any()):
        raise ValueError(f"weights must not be all 0, got 0 at each of {total} valid entries")


def _quantiles(
    entries: Tensor, used: Tensor, count: Tensor, levels: tuple[float, ...]
) -> Float[Tensor, " levels"]:
    if len(entries) == 0:
        return entries.new_zeros(len(levels))
    ordered = torch.where(used, entries, torch.inf).sort().values
    last = (count - 1).clamp(min=0)
    place = torch.stack([last.double() * level for level in levels])
    below = place.floor().long()
    above = torch.minimum(below + 1, last)
    found = torch.lerp(ordered[below], ordered[above], (place - below).to(entries.dtype))
    return torch.where(count > 0, found, 0)


def _entropy(scaled: Tensor, count: Tensor) -> Tensor:
    """Entropy of the weights as a distribution, relative to that of the uniform one."""
    positive = scaled.clamp(min=0)
    total = positive.sum()
    p = positive / torch.where(total > 0, total, 1)
    entropy = -torch.xlogy(p, p).sum() / torch.where(count > 1, count, 2).to(p.dtype).log()
    # A single entry is as uniform as can be.
    return torch.where(count == 1, (total > 0).to(p.dtype), entropy)


def _effective_sample_ratio(scaled: Tensor, divisor: Tensor) -> Tensor:
    squares = scaled.square().sum()
    return scaled.sum().square() / torch.where(squares > 0, squares * divisor, 1)
