"""From raw weights to weights of mean one: the last step of every builder."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wmtp import _checks
from wmtp._dtypes import wide
from wmtp._typing import typed
from wmtp.scopes import ProcessGroup, Scope, Scoped


Clip = tuple[float, float] | None
# So many scales are tried at once, and so often that the bracket is down to the dtype's own spacing (and
# equal weights stay 1 in float32): on a GPU, and over ranks, a round takes as long as one scale would.
_SCALES = 7
_ROUNDS = {torch.float32: 11, torch.float64: 18}


@typed
def normalize_weights(
    weights: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    mode: Literal["mean_one", "none"] = "mean_one",
    clip: Clip = None,
    min_ess: float | None = None,
    scope: Scope = "batch",
    group: ProcessGroup | None = None,
    on_zero: Literal["uniform", "zero"] = "uniform",
) -> Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"]:
    """Scale weights to mean one over the valid entries, so that the loss keeps its scale.

    ``w ← w · n / Σw`` within each scope. With ``clip=(lo, hi)`` both hold: ``w ← clip(s · w, lo, hi)``
    with the ``s`` that gives mean one. With ``min_ess=ρ`` the result is mixed with uniform weights,
    ``(1 − ε) w + ε``, by the smallest ``ε`` that gives an effective sample ratio
    ``(Σw)² / (n Σw²) ≥ ρ``; that keeps the mean and the bounds.

    Args:
        weights: ``[batch seq]`` or ``[batch seq heads]``, raw, at least 0. Whatever comes in, the
            result is finite: NaN and negative entries count as 0, ``inf`` as the largest float.
            ``check_weights`` is the gate that raises.
        valid: same shape, marks the entries that count.
        mode: ``"mean_one"``, or ``"none"`` to only mask and clamp.
        clip: ``(lo, hi)`` with ``0 ≤ lo ≤ 1 ≤ hi``, or ``None``. If the positive entries cannot reach
            mean one under ``hi``, they sit at ``hi`` and the zeros share what is missing.
        min_ess: ``ρ`` in (0, 1], or ``None``.
        scope: ``"sequence"``, ``"batch"`` (both within each head), or ``"all"`` heads together.
        group: process group whose ranks share the scopes ``"batch"`` and ``"all"``.
        on_zero: what all-zero weights over a non-empty scope become.

    Returns:
        The shape of ``weights``, float32 (float64 if they are), detached, 0 where not valid.

    Raises:
        ValueError: shapes that do not fit; bounds or ``min_ess`` out of range, or with
            ``mode="none"`` a ``min_ess``.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> valid = torch.tensor([[True, True, True, False]])
        >>> normalize_weights(torch.tensor([[1.0, 2.0, 3.0, 9.0]]), valid)
        tensor([[0.5000, 1.0000, 1.5000, 0.0000]])

    Source: effective sample size: Kish, "Survey Sampling", 1965; mean-one weights: V-MPO,
    arXiv:1909.12238, equation 4.
    """
    check_weight_shapes("weights", weights, valid)
    _checks.one_of("mode", mode, ("mean_one", "none"))
    _checks.one_of("on_zero", on_zero, ("uniform", "zero"))
    check_bounds(clip)
    if min_ess is not None:
        _checks.in_range("min_ess", min_ess, 0.0, 1.0, open_low=True)
        if mode == "none":
            raise ValueError("min_ess needs mode='mean_one', got mode='none'")
    scoped = Scoped(weights, scope, group)
    inside = scoped.split(valid)
    raw = wide(scoped.split(weights.detach()))
    if clip is not None and clip[1] > torch.finfo(raw.dtype).max:
        clip = clip[0], math.inf  # torch refuses a bound that the dtype cannot hold
    raw = torch.where(inside, raw.nan_to_num(nan=0.0), 0).clamp(min=0)
    if mode == "none":
        bounded = raw if clip is None else raw.clamp(*clip)
        return scoped.join(torch.where(inside, bounded, 0))

    count = scoped.total(inside.to(raw.dtype))
    peak = scoped.largest(raw, 0.0)
    uniform = inside.to(raw.dtype)
    # Divided by the largest first: sums of huge weights would overflow, of tiny ones vanish.
    raw = torch.where(peak > 0, raw / torch.where(peak > 0, peak, 1), uniform)
    if clip is None:
        out = raw * (count / scoped.total(raw).clamp(min=1))
    else:
        out = _project(raw, inside, count, clip, scoped)
    if min_ess is not None:
        out = _mix_to_ess(out, inside, count, min_ess, scoped)
    if on_zero == "zero":
        out = torch.where(peak > 0, out, 0)
    return scoped.join(torch.where(inside, out, 0))


def check_weight_shapes(name: str, tensor: Tensor, valid: Tensor) -> None:
    """Require ``[batch seq]`` or ``[batch seq heads]`` and a mask of the same shape."""
    _checks.rank_in(name, tensor, (2, 3), "[batch seq] or [batch seq heads]")
    _checks.masks("valid", valid, name, tensor)
    _checks.same_device(**{name: tensor, "valid": valid})


def check_bounds(clip: Clip) -> None:
    """Require bounds that a mean of one can keep."""
    if clip is None:
        return
    low, high = clip
    _checks.is_number("clip", low)
    _checks.is_number("clip", high)
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"clip must be (lo, hi) with 0 <= lo <= 1 <= hi, got {clip}")


def _project(
    raw: Tensor, inside: Tensor, count: Tensor, clip: tuple[float, float], scoped: Scoped
) -> Tensor:
    """``clip(s · raw, lo, hi)`` with mean one; raw is at most 1 and reaches it.

    The mean is continuous and rises with ``s``, so a search on ``log₂ s`` brackets the root, and one
    step on the entries between the bounds, where the mean is linear, makes it exact.
    """
    low, high = clip
    positive = inside & (raw > 0)
    reach = scoped.total(positive.to(raw.dtype))
    zeros = count - reach
    # Too few positive entries for a mean of one under hi: the rest is shared among the zeros.
    missing = count - high * reach
    floor = (missing / zeros.clamp(min=1)).clamp(min=low)
    short = missing > low * zeros

    span = -math.log2(torch.finfo(raw.dtype).tiny * torch.finfo(raw.dtype).eps)
    left = torch.zeros_like(count)
    right = torch.full_like(count, span + math.log2(high) if high < math.inf else span)
    between = torch.arange(1, _SCALES + 1, dtype=raw.dtype, device=raw.device) / (_SCALES + 1)
    for _ in range(_ROUNDS[raw.dtype]):
        middle = torch.lerp(left, right, between)
        below = _clipped_totals(raw, inside, middle, clip, scoped) < count
        grid, last = torch.cat([left, middle, right], 1), below.sum(1, keepdim=True)
        left, right = grid.gather(1, last), grid.gather(1, last + 1)
    scaled = _scaled(raw, right)
    free = positive & (scaled > low) & (scaled < high)
    at_high = scoped.total((inside & (scaled >= high)).to(raw.dtype))
    at_low = scoped.total((inside & (scaled <= low)).to(raw.dtype))
    rest = count - low * at_low - (high * at_high if high < math.inf else 0.0)
    share = scoped.total(torch.where(free, scaled, 0))
    exact = torch.where(share > 0, rest / torch.where(share > 0, share, 1), 1)
    out = torch.where(free, scaled * exact, scaled).clamp(low, high)
    return torch.where(short, torch.where(positive, high, floor), out)


def _clipped_totals(
    raw: Tensor, inside: Tensor, log_scales: Tensor, clip: tuple[float, float], scoped: Scoped
) -> Tensor:
    """``Σ clip(2^s · raw, lo, hi)`` over each group, for several ``s`` at once: ``[groups scales]``."""
    clipped = _scaled(raw.unsqueeze(1), log_scales.unsqueeze(2)).clamp(*clip)
    return scoped.over_ranks(clipped.mul_(inside.unsqueeze(1)).sum(2))


def _scaled(raw: Tensor, log_scale: Tensor) -> Tensor:
    """``raw · 2^log_scale``; two factors, because the power alone may overflow; 0 stays 0."""
    half = torch.exp2(log_scale / 2)
    return raw * half * half


def _mix_to_ess(
    weights: Tensor, inside: Tensor, count: Tensor, min_ess: float, scoped: Scoped
) -> Tensor:
    """``(1 − ε) w + ε`` with ``ε = 1 − √(1/ρ − 1) / CV``, where that is positive."""
    centred = torch.where(inside, weights - 1, 0)
    variance = scoped.total(centred.square()) / count.clamp(min=1)
    cv = variance.sqrt()
    allowed = math.sqrt(1 / min_ess - 1)
    share = torch.where(cv > allowed, allowed / torch.where(cv > allowed, cv, 1), 1)
    return share * weights + (1 - share)
