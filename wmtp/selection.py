"""The largest share of each scope, exactly, also across ranks."""

import torch
from torch import Tensor

from wmtp.scopes import Scoped


def select_top(scores: Tensor, valid: Tensor, keep: float, scoped: Scoped) -> Tensor:
    """Mark the ``ceil(keep · n)`` highest of the ``n`` valid scores of each group.

    A radix selection: the threshold is found one byte at a time from a histogram of 256 counts, which
    ranks can add up, where a sort would have to gather everybody's scores. Ties are broken by
    position, and by rank before that; NaN ranks below −inf; entries that are not valid take no place.

    Args:
        scores: ``[groups entries]`` float32 or float64.
        valid: ``[groups entries]``.
        keep: share in (0, 1].
        scoped: adds over ranks.

    Returns:
        ``[groups entries]`` bool.

    Source: Alabi et al., "Fast k-selection algorithms for graphics processing units", JEA 17, 2012.
    """
    # The product in float64, as a caller who computes math.ceil(keep * n) has it.
    wanted = (scoped.total(valid.long()).double() * keep).ceil().long()
    bits = scores.element_size() * 8
    key = _ordered_bits(scores)
    tied, selected = valid, torch.zeros_like(valid)
    above = torch.zeros_like(wanted)
    for shift in range(bits - 8, -1, -8):
        digit = (key >> shift) & 255
        counts = digit.new_zeros(digit.shape[0], 256).scatter_add(1, digit, tied.long())
        at_least = scoped.over_ranks(counts).flip(1).cumsum(1).flip(1)
        # The threshold's digit is the largest one that still leaves enough entries at or above it.
        threshold = ((above + at_least >= wanted).sum(1, keepdim=True) - 1).clamp(min=0)
        higher = torch.nn.functional.pad(at_least, (0, 1)).gather(1, threshold + 1)
        selected = selected | (tied & (digit > threshold))
        tied = tied & (digit == threshold)
        above = above + higher
    earlier = scoped.before_this_rank(tied.long().sum(1, keepdim=True))
    place = earlier + tied.long().cumsum(1)
    return selected | (tied & (above + place <= wanted))


def _ordered_bits(scores: Tensor) -> Tensor:
    """Int64 whose unsigned bits sort as the scores do, with NaN lowest and both zeros equal."""
    wide = scores.dtype == torch.float64
    bits = (scores + 0.0).view(torch.int64 if wide else torch.int32).long()
    sign = torch.iinfo(torch.int64).min if wide else 1 << 31
    ordered = torch.where(bits < 0, ~bits, bits ^ sign)
    return torch.where(scores.isnan(), 0, ordered if wide else ordered & 0xFFFFFFFF)
