"""Which document does each token of a packed row belong to?"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from wmtp import _checks


class Documents(NamedTuple):
    """Where documents lie in a batch of rows.

    Attributes:
        real: ``[batch seq]``, false for tokens that belong to no document (padding).
        ids: zero or more numberings ``[batch seq]``; two real tokens share a document exactly if
            every numbering gives them equal ids.
    """

    real: Bool[Tensor, "batch seq"]
    ids: tuple[Int[Tensor, "batch seq"], ...]

    def continues(self) -> Bool[Tensor, "batch seq"]:
        """Whether token ``t - 1`` stands in the same document as token ``t``; false at ``t = 0``."""
        same = self.real & shift_right(self.real)
        for ids in self.ids:
            same = same & (ids == shift_right(ids))
        return same


def shift_right(per_token: Tensor) -> Tensor:
    """Give each token its left neighbour's value, and the first one 0 (or false)."""
    return torch.cat([torch.zeros_like(per_token[:, :1]), per_token[:, :-1]], dim=1)


def find_documents(
    like: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    name: str = "labels",
) -> Documents:
    """Read the documents from whichever descriptions the caller has.

    If several are given, a document ends where any of them ends it.

    Args:
        like: any ``[batch seq]`` tensor, for its shape and device.
        attention_mask: ``[batch seq]``, 0 at padding, which belongs to no document; other integers
            than 1, as packing collators give them, are equal within a document.
        position_ids: ``[batch seq]``; a document starts wherever the position is not its left
            neighbour's plus one, which is how padding-free collators mark it.
        segment_ids: ``[batch seq]``, equal within a document.
        cu_seqlens: ``[documents + 1]`` cumulative lengths over the one row of a flattened batch,
            from 0; tokens behind the last boundary belong to no document.
        name: what the caller calls ``like``.

    Raises:
        ValueError: a description of another shape, ``cu_seqlens`` with a batch of more than one row,
            or (on the CPU) ``cu_seqlens`` that do not rise from 0 to at most ``seq``.
        RuntimeError: the last under ``torch.compile``, and on a GPU from the device, whose process must
            start anew then.
    """
    batch, seq = like.shape
    _checks.same_device(
        **{name: like},
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_ids=segment_ids,
        cu_seqlens=cu_seqlens,
    )
    for description, tensor in (
        ("attention_mask", attention_mask),
        ("position_ids", position_ids),
        ("segment_ids", segment_ids),
    ):
        if tensor is not None:
            _checks.shape_is(description, tensor, (batch, seq), "batch seq")
    real = torch.ones(batch, seq, dtype=torch.bool, device=like.device)
    ids: list[Tensor] = []
    if attention_mask is not None:
        real = attention_mask != 0
        if not attention_mask.is_floating_point():
            ids.append(attention_mask)
    if position_ids is not None:
        ids.append((position_ids != shift_right(position_ids) + 1).cumsum(1))
    if segment_ids is not None:
        ids.append(segment_ids)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, batch, seq)
        place = torch.arange(seq, device=like.device)[None]
        real = real & (place < cu_seqlens[-1])
        # Counting the boundaries at or before a token numbers the documents, empty ones included.
        ids.append(torch.searchsorted(cu_seqlens.long(), place, right=True))
    return Documents(real, tuple(ids))


def _check_cu_seqlens(cu_seqlens: Tensor, batch: int, seq: int) -> None:
    _checks.rank_in("cu_seqlens", cu_seqlens, (1,), "[documents+1]")
    if batch != 1:
        raise ValueError(
            f"cu_seqlens describes one flattened row, got a batch of {batch} rows; "
            "flatten the batch to [1, batch * seq] or give segment_ids"
        )
    if len(cu_seqlens) < 1:
        raise ValueError("cu_seqlens must hold at least the boundary 0, got an empty tensor")
    rising = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
    right = rising & (cu_seqlens[0] == 0) & (cu_seqlens[-1] <= seq)
    if not _checks.may_look(cu_seqlens):
        _checks.holds(right, "cu_seqlens must rise from 0 to at most seq")
    elif not right:
        raise ValueError(
            f"cu_seqlens must rise from 0 to at most seq = {seq}, got {[int(b) for b in cu_seqlens]}"
        )
