"""The coefficient of each prediction in the loss: head weight, token weight and denominator in one.

In ``loss = Σ_h λ_h Σ_{b,t} w[b,t,h] · ℓ[b,t,h] / Z`` that is ``λ_h · w / Z``, where ``λ_h`` is ``1/H``, or
``head_weights`` as given, and the normalizer says what ``Z`` is:

    "weights"    (1/H) Σ w        a weighted mean
    "tokens"     (1/H) Σ valid    the number of valid predictions per head
    <number>     the number       one count for a whole accumulation window
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wmtp import _checks
from wmtp._dtypes import wide
from wmtp._typing import typed


Normalizer = Literal["weights", "tokens"] | float | Float[Tensor, ""] | Int[Tensor, ""]
HeadWeights = Sequence[float] | Float[Tensor, " heads"] | None


@typed
def weighted_mean(
    token_ce: Float[Tensor, "batch seq heads"],
    weights: Float[Tensor, "batch seq heads"] | None,
    valid: Bool[Tensor, "batch seq heads"],
    *,
    head_weights: HeadWeights = None,
    normalizer: Normalizer = "weights",
) -> Float[Tensor, ""]:
    """Reduce per-prediction values to the loss: the only place where a denominator is chosen.

    ``Σ_h λ_h Σ_{b,t} w · ℓ / Z``, with ``Z`` and ``λ`` as in ``weighted_mtp_loss``.

    Args:
        token_ce: ``[batch seq heads]`` values, such as ``mtp_ce_loss(..., reduction="none")``.
        weights: ``[batch seq heads]``, or ``None`` for ones.
        valid: ``[batch seq heads]``; elsewhere values and weights may be anything, NaN included.
        head_weights: ``λ``, one per head.
        normalizer: ``"weights"``, ``"tokens"`` or a count.

    Returns:
        A scalar, float32 or wider, differentiable in values and weights; 0 if ``Z`` is 0.

    Raises:
        ValueError: shapes that do not fit, a negative count.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> ce, valid = torch.tensor([[[1.0], [3.0]]]), torch.ones(1, 2, 1, dtype=torch.bool)
        >>> weighted_mean(ce, torch.tensor([[[3.0], [1.0]]]), valid)
        tensor(1.5000)

    Source: arXiv:2404.07965, equation 4, for ``normalizer="tokens"`` and weights of mean one.
    """
    _checks.rank_in("token_ce", token_ce, (3,), "[batch seq heads]")
    _checks.masks("valid", valid, "token_ce", token_ce)
    _checks.same_device(token_ce=token_ce, weights=weights, valid=valid)
    values = torch.where(valid, wide(token_ce), 0)
    factors = factors_of(weights, valid, head_weights, normalizer, values.dtype)
    # What counts nothing may be infinite; where it is finite, the weight still has a gradient.
    values = torch.where((factors == 0) & ~values.isfinite(), 0, values)
    return (factors * values).sum()


def factors_of(
    weights: Tensor | None,
    valid: Tensor,
    head_weights: HeadWeights,
    normalizer: Normalizer,
    dtype: torch.dtype,
) -> Float[Tensor, "batch seq heads"]:
    """What each prediction's value counts in the loss: ``λ_h · w / Z``, 0 where not valid."""
    heads = valid.shape[2]
    used = valid.to(dtype)
    if weights is not None:
        _checks.same_shape("weights", weights, "the predictions", valid)
        used = torch.where(valid, weights.to(dtype), 0)
    if normalizer == "weights":
        # Relative to the largest, which cancels: a sum of huge weights would overflow.
        peak = torch.cat([used.detach().abs().flatten(), used.new_zeros(1)]).amax()
        used = used / torch.where(peak > 0, peak, 1)
        whole = used.sum() / heads
    elif normalizer == "tokens":
        whole = valid.sum().to(dtype) / heads
    else:
        whole = count_of(normalizer, used)
    return used * (head_weights_of(head_weights, used) * reciprocal(whole))


def reciprocal(count: Tensor) -> Tensor:
    """``1 / count``, and 0 where there was nothing to count."""
    empty = count == 0
    return torch.where(empty, 0, 1 / torch.where(empty, 1, count))


def count_of(normalizer: float | Tensor, like: Tensor) -> Tensor:
    """A caller's denominator as a 0-d tensor."""
    if isinstance(normalizer, Tensor):
        _checks.shape_is("normalizer", normalizer, (), "")
        if normalizer.device.type != "cpu":  # from there a number goes anywhere, as in torch
            _checks.same_device(normalizer=normalizer, predictions=like)
        number = normalizer.detach().to(like.dtype)
        # A number of the host goes along with an operation on the device; a copy would be waited for.
        return number if number.device == like.device else like.new_ones(()) * number
    if isinstance(normalizer, str):
        raise ValueError(f"normalizer must be 'weights', 'tokens' or a number, got {normalizer!r}")
    limits = torch.finfo(like.dtype)
    _checks.in_range("normalizer", normalizer, 0.0, limits.max)
    if 0 < normalizer < limits.tiny:
        raise ValueError(f"normalizer must be 0 or at least {limits.tiny}, got {normalizer}")
    return _filled(like, normalizer)


def head_weights_of(head_weights: HeadWeights, like: Tensor) -> Tensor:
    """``λ``, one for each of the last axis of ``like``, in its dtype."""
    heads = like.shape[2]
    if head_weights is None:
        return like.new_full((heads,), 1 / heads)
    if isinstance(head_weights, Tensor):
        _checks.shape_is("head_weights", head_weights, (heads,), "heads")
        _checks.same_device(head_weights=head_weights, predictions=like)
        return head_weights.to(like)
    _checks.not_bytes("head_weights", head_weights)
    if len(head_weights) != heads:
        raise ValueError(
            f"head_weights must be one for each of the {heads} heads, got {len(head_weights)}"
        )
    for weight in head_weights:
        _checks.in_range("head_weights", weight, 0.0, torch.finfo(like.dtype).max)
    # Filled on the device: a tensor made from a list would be copied there, and waited for.
    return torch.stack([_filled(like, weight) for weight in head_weights])


def _filled(like: Tensor, number: float) -> Tensor:
    """A caller's number as a 0-d tensor: a product, for which a compiler does not fix the number."""
    return like.new_ones(()) * number
