"""How a score becomes a weight: softmax, the top k, exponentials, or as it is.

Every function returns float32 (or float64) weights that are detached, exactly 0 where not valid,
finite whatever came in, without a host synchronisation, and by default of mean one over the valid
entries of their scope, so that the loss keeps the scale of the unweighted one. Weights of
``[batch seq]`` belong to tokens and are aligned by the loss; ``[batch seq heads]`` to predictions.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wmtp import _checks
from wmtp._dtypes import wide
from wmtp._typing import typed
from wmtp.normalize import Clip, check_bounds, check_weight_shapes, normalize_weights
from wmtp.scopes import ProcessGroup, Scope, Scoped
from wmtp.selection import select_top
from wmtp.whitening import WhiteningStatistics, batch_statistics, check_statistics


# Below this a temperature is 0 in float32.
_COLDEST = 1e-30


@typed
def softmax_weights(
    scores: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    temperature: float = 1.0,
    scope: Scope = "batch",
    group: ProcessGroup | None = None,
) -> Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"]:
    """Weights proportional to ``exp(score / T)``: ``w = n · softmax(scores / T)`` over the valid entries.

    Args:
        scores: ``[batch seq]`` or ``[batch seq heads]``; NaN counts as −inf.
        valid: same shape, marks the entries that count.
        temperature: ``T ≥ 1e-30``; large is uniform, small is the maximum alone.
        scope: ``"sequence"``, ``"batch"`` (both within each head), or ``"all"`` heads together.
        group: process group whose ranks share the scope.

    Returns:
        The shape of ``scores``, mean one; uniform if every score is −inf.

    Raises:
        ValueError: shapes that do not fit, ``temperature`` not positive.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> valid = torch.ones(1, 2, dtype=torch.bool)
        >>> softmax_weights(torch.tensor([[0.0, 1.0]]), valid)
        tensor([[0.5379, 1.4621]])

    Source: V-MPO, arXiv:1909.12238, equation 4.
    """
    check_weight_shapes("scores", scores, valid)
    check_temperature("temperature", temperature)
    raw = _exponential(scores, valid, temperature, Scoped(scores, scope, group))
    return normalize_weights(raw, valid, scope=scope, group=group)


@typed
def top_k_weights(
    scores: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    keep: float = 0.6,
    scope: Scope = "batch",
    group: ProcessGroup | None = None,
) -> Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"]:
    """Equal weights for the highest scores, 0 for the rest.

    Keeps exactly ``k = ceil(keep · n)`` of the ``n`` valid entries of each scope, each with weight
    ``n / k``. Ties are broken by position, invalid entries take no place, NaN ranks last.

    Args:
        scores: ``[batch seq]`` or ``[batch seq heads]``.
        valid: same shape, marks the entries that count. ``weight_statistics(scores, valid)`` counts the
            NaN scores among them.
        keep: share in (0, 1].
        scope: ``"sequence"``, ``"batch"`` (both within each head, because far heads have structurally
            larger cross entropy), or ``"all"`` heads together.
        group: process group whose ranks share the scope.

    Returns:
        The shape of ``scores``, mean one.

    Raises:
        ValueError: shapes that do not fit, ``keep`` outside (0, 1].
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> valid = torch.ones(1, 4, dtype=torch.bool)
        >>> top_k_weights(torch.tensor([[3.0, 1.0, 3.0, 2.0]]), valid, keep=0.5)
        tensor([[2., 0., 2., 0.]])

    Source: Rho-1, arXiv:2404.07965, equation 5.
    """
    check_weight_shapes("scores", scores, valid)
    check_share("keep", keep)
    scoped = Scoped(scores, scope, group)
    ranked = wide(scoped.split(scores.detach()))
    chosen = scoped.join(select_top(ranked, scoped.split(valid), keep, scoped))
    return normalize_weights(chosen.to(ranked.dtype), valid, scope=scope, group=group)


@typed
def exp_weights(
    scores: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    beta: float = 1.0,
    clip: Clip = (0.1, 3.0),
    whiten: bool = True,
    statistics: WhiteningStatistics | None = None,
    scope: Scope = "batch",
    group: ProcessGroup | None = None,
) -> Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"]:
    """Advantage-weighted regression: ``w ∝ exp((A − μ) / (σ β))``, bounded, with mean one.

    Bounds and mean one hold together, see ``normalize_weights``; so ``μ`` and any common factor drop
    out, and ``σ`` and ``β`` say how sharp the weights are.

    Args:
        scores: ``[batch seq]`` or ``[batch seq heads]``, such as ``gae``; NaN counts as −inf.
        valid: same shape, marks the entries that count.
        beta: temperature, above 0; in standard deviations if ``whiten``.
        clip: ``(lo, hi)`` with ``0 ≤ lo ≤ 1 ≤ hi``, or ``None``.
        whiten: whether to divide by the standard deviation, of each head by itself; without it the
            scores are used as they are.
        statistics: running statistics to whiten with, from ``update_statistics``; ``None``, or
            statistics without any spread yet, mean those of this batch. They are sums of squares in
            float32: magnitudes between 1e-18 and 1e18, say.
        scope: where the mean is one; whitening is always over the batch.
        group: process group whose ranks share batch and scope.

    Returns:
        The shape of ``scores``, mean one; uniform if all scores are equal.

    Raises:
        ValueError: shapes that do not fit, ``beta`` not positive, bounds out of range, statistics for
            another number of heads or without ``whiten``.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> valid = torch.ones(1, 3, dtype=torch.bool)
        >>> exp_weights(torch.tensor([[-1.0, 0.0, 1.0]]), valid, clip=None)
        tensor([[0.1877, 0.6387, 2.1736]])

    Source: AWR, arXiv:1910.00177, equation 7.
    """
    check_weight_shapes("scores", scores, valid)
    check_temperature("beta", beta)
    check_bounds(clip)
    check_whitening(whiten, statistics, scores)
    scaled = wide(scores.detach())
    if whiten:
        found = batch_statistics(scores, valid, group)
        if statistics is not None:
            # Nothing seen yet, or nothing that differs: no scale to whiten with.
            fresh = statistics.flat
            found = WhiteningStatistics(
                *(torch.where(fresh, b, s) for b, s in zip(found, statistics, strict=True))
            )
        # Scores without any spread say nothing: their differences are rounding.
        whitened = (scaled - found.mean) / torch.where(found.flat, 1, found.std)
        scaled = torch.where(found.flat & whitened.isfinite(), 0, whitened)
    raw = _exponential(scaled, valid, beta, Scoped(scores, scope, group))
    return normalize_weights(raw, valid, clip=clip, scope=scope, group=group)


@typed
def score_weights(
    scores: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    clip: Clip = None,
    min_ess: float | None = None,
    scope: Scope = "batch",
    group: ProcessGroup | None = None,
) -> Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"]:
    """Use scores that are at least 0 as weights, ``w ∝ score``: a self-critic's marks, say.

    Signed scores go through ``exp_weights`` or ``softmax_weights`` instead; here a negative one
    counts as 0.

    Args:
        scores: ``[batch seq]`` or ``[batch seq heads]``, at least 0.
        valid: same shape, marks the entries that count.
        clip: as in ``normalize_weights``.
        min_ess: as in ``normalize_weights``.
        scope: as in ``normalize_weights``.
        group: as in ``normalize_weights``.

    Returns:
        The shape of ``scores``, mean one.

    Raises:
        ValueError: as ``normalize_weights``.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> score_weights(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool))
        tensor([[0.5000, 1.5000]])

    Source: self-normalised importance weights, as in V-MPO, arXiv:1909.12238, equation 4.
    """
    return normalize_weights(scores, valid, clip=clip, min_ess=min_ess, scope=scope, group=group)


@typed
def span_weights(
    span_ids: Int[Tensor, "batch seq"],
    span_values: Float[Tensor, " spans"],
    valid: Bool[Tensor, "batch seq"],
    *,
    outside: float = 1.0,
    clip: Clip = None,
    scope: Scope = "batch",
    group: ProcessGroup | None = None,
) -> Float[Tensor, "batch seq"]:
    """Give every token the weight of its span: a role, a reasoning step, a tool call.

    ``w_j ∝ span_values[span_ids_j]``, and ``outside`` for tokens with span id −1.

    Args:
        span_ids: ``[batch seq]`` in [−1, spans).
        span_values: ``[spans]``, at least 0.
        valid: ``[batch seq]``, marks the tokens that count.
        outside: raw weight of tokens in no span, at least 0.
        clip: as in ``normalize_weights``.
        scope: as in ``normalize_weights``.
        group: as in ``normalize_weights``.

    Returns:
        ``[batch seq]``, indexed by token, mean one.

    Raises:
        ValueError: shapes that do not fit, ``outside`` negative, and on the CPU a span id out of range
            at a valid token.
        RuntimeError: the last under ``torch.compile``, and on a GPU from the device, whose process must
            start anew then.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> spans = torch.tensor([[-1, 0, 1, 1]])
        >>> span_weights(spans, torch.tensor([0.0, 1.0]), torch.ones(1, 4, dtype=torch.bool))
        tensor([[1.3333, 0.0000, 1.3333, 1.3333]])

    Source: the per-role loss scales of supervised fine-tuning; no single paper.
    """
    check_weight_shapes("span_ids", span_ids, valid)
    _checks.rank_in("span_values", span_values, (1,), "[spans]")
    _checks.in_range("outside", outside, 0.0, open_high=True)
    count = len(span_values)
    wrong = valid & ((span_ids < -1) | (span_ids >= count))
    if _checks.may_look(span_ids):
        if wrong.any():
            raise ValueError(
                f"span_ids must lie in [-1, {count}), got {int(span_ids[wrong][0])} at a valid token"
            )
    else:
        _checks.holds(~wrong.any(), "span_ids must lie in [-1, spans) at valid tokens")
    _checks.same_device(span_ids=span_ids, span_values=span_values)
    inside = wide(span_values).detach()
    _checks.fits("outside", outside, inside.dtype)
    table = torch.cat([inside, inside.new_full((1,), outside)])
    index = torch.where(valid & ~wrong & (span_ids >= 0), span_ids.long(), count)
    return normalize_weights(table[index], valid, clip=clip, scope=scope, group=group)


def check_temperature(name: str, value: float) -> None:
    """Require a temperature that float32 can divide by."""
    _checks.in_range(name, value, _COLDEST, open_high=True)


def check_share(name: str, value: float) -> None:
    """Require a share of which something is left."""
    _checks.in_range(name, value, 0.0, 1.0, open_low=True)


def check_whitening(whiten: bool, statistics: WhiteningStatistics | None, scores: Tensor) -> None:
    """Require statistics only where something is whitened, and such as fit the scores."""
    if statistics is not None and not whiten:
        raise ValueError("statistics are for whitening, got statistics with whiten=False")
    check_statistics(statistics, scores)


def _exponential(scores: Tensor, valid: Tensor, temperature: float, scoped: Scoped) -> Tensor:
    """``exp(score / T)`` up to a factor that makes the largest of each scope 1."""
    ranked = wide(scoped.split(scores.detach()))
    limit = torch.finfo(ranked.dtype).max
    ranked = torch.where(scoped.split(valid), ranked, -math.inf)
    ranked = ranked.nan_to_num(-math.inf, limit, -math.inf)
    peak = scoped.largest(ranked, -limit)
    return scoped.join(torch.exp((ranked - peak) / temperature))
