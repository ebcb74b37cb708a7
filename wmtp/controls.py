"""Controls: the same weights with their meaning taken away.

A weighting has shown something only if it beats these two as well as no weighting.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wmtp._dtypes import wide
from wmtp._typing import typed
from wmtp.normalize import check_weight_shapes


@typed
def shuffled_weights(
    weights: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    generator: torch.Generator,
) -> Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"]:
    """Permute the weights among the valid positions of each sequence and head.

    The multiset of every row stays, so mean, bounds and effective sample size do too; which token
    has which weight becomes random. Positions that are not valid take no part: a prompt's zeros do
    not wander into the answer.

    Args:
        weights: ``[batch seq]`` or ``[batch seq heads]``.
        valid: same shape.
        generator: source of randomness, on the device of ``weights``. Draw outside what is checkpointed:
            ``torch.utils.checkpoint`` does not restore a generator of yours, and would draw anew.

    Returns:
        The shape of ``weights``, float32 or wider, detached, 0 where not valid.

    Raises:
        ValueError: shapes that do not fit, a generator on another device.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> valid = torch.tensor([[False, True, True, True]])
        >>> out = shuffled_weights(torch.tensor([[9.0, 1.0, 2.0, 3.0]]), valid, generator=generator)
        >>> sorted(out[0].tolist())
        [0.0, 1.0, 2.0, 3.0]

    Source: permutation control; Edgington and Onghena, "Randomization Tests", 2007.
    """
    check_weight_shapes("weights", weights, valid)
    places = _valid_first(valid)
    keys = _uniform(valid, generator)
    # The valid entries come first in both orders, as many as there are: a permutation of them.
    mixed = torch.where(valid, keys, 2.0).argsort(dim=1)
    return _deal(weights, valid, places, mixed)


@typed
def random_matched_weights(
    weights: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    generator: torch.Generator,
) -> Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"]:
    """Draw each weight afresh from those of its own sequence and head.

    With replacement, so the distribution is kept where the multiset is not; not normalised again,
    which would change the distribution.

    Args:
        weights: ``[batch seq]`` or ``[batch seq heads]``.
        valid: same shape.
        generator: source of randomness, on the device of ``weights``. Draw outside what is checkpointed:
            ``torch.utils.checkpoint`` does not restore a generator of yours, and would draw anew.

    Returns:
        The shape of ``weights``, float32 or wider, detached, 0 where not valid.

    Raises:
        ValueError: shapes that do not fit, a generator on another device.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> weights, valid = torch.tensor([[0.0, 2.0]]), torch.tensor([[False, True]])
        >>> random_matched_weights(weights, valid, generator=generator)
        tensor([[0., 2.]])

    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.
    """
    check_weight_shapes("weights", weights, valid)
    places = _valid_first(valid)
    count = valid.sum(1, keepdim=True)
    draw = (_uniform(valid, generator) * count).long()
    draw = torch.minimum(draw, (count - 1).clamp(min=0))
    return _deal(weights, valid, places, places.gather(1, draw))


def _valid_first(valid: Tensor) -> Tensor:
    """Positions of each row and head, the valid ones first, in order."""
    return (~valid).long().argsort(dim=1, stable=True)


def _deal(weights: Tensor, valid: Tensor, places: Tensor, sources: Tensor) -> Tensor:
    """Put the weight at the i-th source into the i-th place."""
    dealt = wide(weights.detach()).gather(1, sources)
    return torch.where(valid, torch.zeros_like(dealt).scatter(1, places, dealt), 0)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1); float64, so that ties and rounding up to the end do not happen."""
    if generator.device.type != like.device.type:
        raise ValueError(
            f"generator must be on the weights' device {like.device}, got {generator.device}; "
            f"make it with torch.Generator({like.device.type!r})"
        )
    return torch.rand(like.shape, generator=generator, dtype=torch.float64, device=like.device)
