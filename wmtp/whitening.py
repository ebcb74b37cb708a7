"""Running statistics of scores, as values that are passed in and out."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wmtp import _checks
from wmtp._dtypes import wide
from wmtp._typing import typed
from wmtp.normalize import check_weight_shapes
from wmtp.scopes import ProcessGroup, Scoped


class WhiteningStatistics(NamedTuple):
    """Count, mean and summed squared deviation of the scores seen so far.

    Shapes are ``[]`` for ``[batch seq]`` scores and ``[heads]`` for ``[batch seq heads]`` ones.
    """

    count: Float[Tensor, "*heads"]  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Float[Tensor, "*heads"]
    m2: Float[Tensor, "*heads"]

    @property
    def std(self) -> Float[Tensor, "*heads"]:
        """Population standard deviation, 0 before the first score."""
        return (self.m2 / torch.where(self.count > 0, self.count, 1)).sqrt()

    @property
    def flat(self) -> Bool[Tensor, "*heads"]:
        """Whether there is no deviation but what rounding makes of the mean."""
        spread = self.std
        return spread <= torch.finfo(spread.dtype).eps * self.mean.abs()


@typed
def update_statistics(
    statistics: WhiteningStatistics | None,
    scores: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    decay: float = 1.0,
    group: ProcessGroup | None = None,
) -> WhiteningStatistics:
    """Add a batch of scores to running statistics; nothing is changed in place.

    With ``decay = 1`` the result is that of all batches at once, but for rounding, however they were
    split.
    A smaller ``decay`` forgets: the old count and deviation are multiplied by it first.

    Args:
        statistics: what came before, or ``None`` for a first batch.
        scores: ``[batch seq]`` or ``[batch seq heads]`` (statistics for each head by itself).
        valid: same shape. Entries that are not valid, or not finite, are left out.
        decay: in [0, 1].
        group: process group whose ranks each bring a part of the batch.

    Returns:
        The new statistics, float32 or wider, detached.

    Raises:
        ValueError: shapes that do not fit, ``decay`` outside [0, 1].
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> valid = torch.ones(1, 2, dtype=torch.bool)
        >>> first = update_statistics(None, torch.tensor([[0.0, 2.0]]), valid)
        >>> second = update_statistics(first, torch.tensor([[4.0, 6.0]]), valid)
        >>> second.count, second.mean
        (tensor(4.), tensor(3.))

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979, equations 2.1.
    """
    check_weight_shapes("scores", scores, valid)
    _checks.in_range("decay", decay, 0.0, 1.0)
    check_statistics(statistics, scores)
    new = batch_statistics(scores, valid, group)
    if statistics is None:
        return new
    old_count = decay * statistics.count
    count = old_count + new.count
    share = torch.where(count > 0, new.count / torch.where(count > 0, count, 1), 0)
    step = new.mean - statistics.mean
    return WhiteningStatistics(
        count=count,
        mean=statistics.mean + share * step,
        m2=decay * statistics.m2 + new.m2 + step.square() * old_count * share,
    )


def check_statistics(statistics: WhiteningStatistics | None, scores: Tensor) -> None:
    """Require statistics of as many heads as the scores have."""
    if statistics is None:
        return
    for field, value in statistics._asdict().items():
        name = f"statistics.{field}"
        _checks.float_tensor(name, value)
        heads = scores.shape[2:]
        _checks.shape_is(name, value, heads, "heads" if heads else "")
        _checks.same_device(**{name: value, "scores": scores})


def batch_statistics(
    scores: Tensor, valid: Tensor, group: ProcessGroup | None
) -> WhiteningStatistics:
    """Statistics of one batch, of each head by itself; two passes, so that nothing cancels."""
    scoped = Scoped(scores, "batch", group)
    values = wide(scoped.split(scores.detach()))
    use = scoped.split(valid) & values.isfinite()
    count = scoped.total(use.to(values.dtype))
    mean = scoped.total(torch.where(use, values, 0)) / count.clamp(min=1)
    m2 = scoped.total(torch.where(use, values - mean, 0).square())
    # Equal scores have no deviation, also when their mean rounds.
    limit = torch.finfo(values.dtype).max
    ends = torch.cat([torch.where(use, values, -limit), torch.where(use, -values, -limit)])
    largest, negated = scoped.largest(ends, -limit).chunk(2)
    equal = largest == -negated
    mean, m2 = torch.where(equal, largest, mean), torch.where(equal, 0, m2)
    shape = scores.shape[2:]
    return WhiteningStatistics(*(part.reshape(shape) for part in (count, mean, m2)))
