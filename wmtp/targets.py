"""Where each head looks: labels become per-head targets.

The index law of the whole package: head ``h`` at position ``t`` scores token ``t + offsets[h]``. What
belongs to a token is ``[batch seq]`` and indexed by that token; what belongs to a prediction is
``[batch seq heads]`` and aligned with the logits; ``align_to_heads`` is the only bridge.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Bool, Int, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

from wmtp import _checks
from wmtp._typing import typed
from wmtp.documents import find_documents


IGNORE_INDEX = -100
Offsets = int | Sequence[int]
# No head looks further: what is larger is a mistake, and takes memory of its size.
MOST_HEADS = 2**16


@typed
def align_to_heads(
    per_token: Shaped[Tensor, "batch seq"], offsets: Offsets, *, fill: float = 0
) -> Shaped[Tensor, "batch seq heads"]:
    """Give every prediction the value of the token it predicts.

    ``out[b, t, h] = per_token[b, t + offsets[h]]``, and ``fill`` past the end of the row.

    Args:
        per_token: ``[batch seq]``, any dtype but float8, indexed by token.
        offsets: an int ``H``, meaning ``1, …, H``, or strictly increasing non-negative ints. For 5
            tokens ``a b c d e`` and ``H = 3``, position 0 gets ``b c d``, position 3 gets ``e`` and
            two fills, position 4 only fills.
        fill: the value past the end.

    Returns:
        ``[batch seq heads]`` in the dtype of ``per_token``; differentiable.

    Raises:
        ValueError: offsets that are empty, negative or not strictly increasing; a ``fill`` that the
            dtype does not hold.
        TypeError: arguments of another type or number of axes.

    Example:
        >>> import torch
        >>> align_to_heads(torch.tensor([[10, 11, 12]]), 2).tolist()
        [[[11, 12], [12, 0], [0, 0]]]

    Source: Gloeckle et al., "Better & Faster Large Language Models via Multi-token Prediction",
    arXiv:2404.19737, equation 2.
    """
    _checks.rank_in("per_token", per_token, (2,), "[batch seq]")
    steps = resolve_offsets(offsets)
    if fill != 0:
        _checks.fits("fill", fill, per_token.dtype)
    seq = per_token.shape[1]
    padded = F.pad(per_token, (0, steps[-1]), value=fill)
    return torch.stack([padded[:, step : step + seq] for step in steps], dim=-1)


@typed
def mtp_targets(
    labels: Int64[Tensor, "batch seq"],
    offsets: Offsets,
    *,
    ignore_index: int = IGNORE_INDEX,
    attention_mask: Shaped[Tensor, "batch seq"] | None = None,
    position_ids: Int[Tensor, "batch seq"] | None = None,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
) -> Int64[Tensor, "batch seq heads"]:
    """Shift unshifted labels into one target per position and head, inside documents only.

    ``target[b, t, h] = labels[b, t + offsets[h]]``, or ``ignore_index`` where that lies past the end,
    where the label there is ``ignore_index``, where either end of the prediction is padding, or where
    the two ends lie in different documents. Masking only the first label of each packed document, as
    collators do for next-token prediction, would let head ``h`` see ``offsets[h] - 1`` tokens of the
    next document. Make the targets before sharding a sequence (context parallelism), and so that every
    shard has what it needs, align with ``align_to_heads`` whatever else goes by token: weights, reference
    NLL.

    Args:
        labels: ``[batch seq]`` int64, *not* shifted: entry ``j`` is token ``x_j`` or ``ignore_index``.
        offsets: an int ``H``, meaning ``1, …, H``, or strictly increasing non-negative ints:
            ``range(H)`` for labels that are already shifted by one (inside each document: where the
            next token is another document's, the label is ``ignore_index``; the descriptions below stay
            as they are), ``range(2, H + 2)`` for extra heads only. Tokens ``a b c d e``, ``H = 3``:
            position 0 targets ``b c d``, position 3 targets ``e`` and nothing else, position 4 nothing.
        ignore_index: the label that means "no target".
        attention_mask: ``[batch seq]``, 0 at padding. Other integers than 1, as some packing collators
            give them, are equal within a document.
        position_ids: ``[batch seq]`` that restart with every document; any step other than +1 is a
            boundary.
        segment_ids: ``[batch seq]``, equal within a document.
        cu_seqlens: ``[documents + 1]`` boundaries of a batch flattened to one row; tokens behind the
            last one belong to no document.

    Returns:
        ``[batch seq heads]`` int64, a new tensor; the inputs are never written to.

    Raises:
        ValueError: illegal offsets, a document description of another shape, or bad ``cu_seqlens``.
        RuntimeError: bad ``cu_seqlens`` under ``torch.compile``, and on a GPU from the device, whose
            process must start anew then.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> mtp_targets(torch.tensor([[5, 6, 7, 8]]), 2, segment_ids=torch.tensor([[0, 0, 0, 1]]))[0]
        tensor([[   6,    7],
                [   7, -100],
                [-100, -100],
                [-100, -100]])

    Source: arXiv:2404.19737, equation 2; packing as in "padding-free" collators.
    """
    _checks.dtype_is("labels", labels, torch.int64)
    _checks.rank_in("labels", labels, (2,), "[batch seq]")
    _checks.whole("ignore_index", ignore_index)
    targets = align_to_heads(labels, offsets)
    documents = find_documents(
        labels,
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_ids=segment_ids,
        cu_seqlens=cu_seqlens,
    )
    together = rearrange(documents.real, "batch seq -> batch seq 1") & align_to_heads(
        documents.real, offsets
    )
    for ids in documents.ids:
        together = together & (
            rearrange(ids, "batch seq -> batch seq 1") == align_to_heads(ids, offsets)
        )
    return torch.where(together, targets, ignore_index)


def resolve_offsets(offsets: Offsets) -> tuple[int, ...]:
    """Expand ``H`` to ``1, …, H`` and check a sequence."""
    if isinstance(offsets, bool):
        raise TypeError("offsets must be an int or a sequence of ints, got a bool")
    if isinstance(offsets, torch.SymInt):  # a number of heads that an export would leave open
        offsets = int(offsets)
    if isinstance(offsets, int):
        _checks.in_range("offsets given as a number of heads", offsets, 1, MOST_HEADS)
        return tuple(range(1, offsets + 1))
    sequence = isinstance(offsets, Sequence)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not sequence or isinstance(offsets, str | bytes):
        raise TypeError(
            f"offsets must be an int or a sequence of ints, got {type(offsets).__name__}"
        )
    steps = tuple(offsets[: MOST_HEADS + 1])  # `len` fails for a wild range
    _checks.in_range("the number of offsets", len(steps), 0, MOST_HEADS)
    if any(type(step) is not int for step in steps):
        raise TypeError(f"offsets must be ints, got {list(steps)}")
    if not steps or steps[0] < 0 or any(b <= a for a, b in pairwise(steps)):
        raise ValueError(
            "offsets must be non-empty, non-negative and strictly increasing, such as (1, 2, 3), "
            f"got {list(steps)}"
        )
    _checks.in_range("offsets", steps[-1], 0, MOST_HEADS)
    return steps


def offsets_for(offsets: Offsets | None, heads: int, source: str) -> tuple[int, ...]:
    """Offsets of a tensor that has ``heads`` heads; ``1, …, heads`` by default."""
    if heads == 0:
        raise ValueError(f"{source} must have at least one head, got 0")
    steps = resolve_offsets(heads if offsets is None else offsets)
    if len(steps) != heads:
        raise ValueError(
            f"offsets must give one step for each of the {heads} heads of {source}, got {len(steps)}"
        )
    return steps


def known_offsets(offsets: Offsets | None, labels: Tensor, heads: int) -> Offsets | None:
    """The offsets of the labels; ``None`` if the labels have targets already and nobody said which."""
    return heads if offsets is None and labels.dim() == 2 else offsets


def resolve_targets(
    labels: Tensor, offsets: Offsets | None, batch: int, seq: int, heads: int, ignore_index: int
) -> tuple[Int64[Tensor, "batch seq heads"], Bool[Tensor, "batch seq heads"]]:
    """Targets, and whether each is one, from labels in either of the two accepted shapes."""
    steps = offsets_for(offsets, heads, "the predictions")
    _checks.whole("ignore_index", ignore_index)
    _checks.dtype_is("labels", labels, torch.int64)
    _checks.rank_in("labels", labels, (2, 3), "[batch seq] or [batch seq heads]")
    if labels.dim() == 2:
        _checks.shape_is("labels", labels, (batch, seq), "batch seq")
        targets = mtp_targets(labels, steps, ignore_index=ignore_index)
    else:
        _checks.shape_is("labels", labels, (batch, seq, heads), "batch seq heads")
        targets = labels
    return targets, targets != ignore_index
