"""What the linear losses are asked, and what they give back, row by row.

A row is one prediction: one position of one head. Everything here is a plain container.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp import _checks
from wmtp._dtypes import wide_dtype


DEFAULT_SLAB_BYTES = 64 * 2**20
# What a label below 0 is moved up by, beyond any vocabulary.
_BELOW_ZERO = 2**62


class Rows(NamedTuple):
    """What is known of each row, 0 (or false) where nothing was computed; all ``[rows]``.

    Attributes:
        loss: the objective.
        ce: the plain cross entropy.
        base: near to the log-sum-exp, or one of the row's logits; see ``log_sum``.
        log_sum: the log-sum-exp of the logits less their base. The two are kept apart because their sum
            would be rounded as the logits are, however small their differences.
        correct: whether the target is the first most probable token.
        weight: what a row-local weighting gave it, or 1.
    """

    loss: Tensor
    ce: Tensor
    base: Tensor
    log_sum: Tensor
    correct: Tensor
    weight: Tensor


class RowLocal(NamedTuple):
    """A weight that a prediction's own logits determine, as the operators take it.

    Attributes:
        kind: ``"none"``, ``"dft"``, ``"focal"``, ``"entropy"`` or ``"el2n"``.
        power: exponent.
    """

    kind: str
    power: float


NOT_LOCAL = RowLocal("none", 1.0)


class Problem(NamedTuple):
    """Hidden states and unembedding, whose logits are never whole but by choice, and what is asked of them.

    Attributes:
        hidden: ``[rows dim]``.
        unembedding: ``[vocab dim]``, same dtype.
        bias: ``[vocab]``, same dtype, or ``None``.
        target: ``[rows]`` int64, negative where there is none. See ``targets_of``.
        label_smoothing: see ``cross_entropy.Objective``.
        z_loss: see there.
        softcap: see there; 0 means none.
        slab_bytes: budget for what is held beside inputs and gradients.
    """

    hidden: Tensor
    unembedding: Tensor
    bias: Tensor | None
    target: Tensor
    label_smoothing: float
    z_loss: float
    softcap: float
    slab_bytes: int

    @property
    def vocab(self) -> int:
        """How many columns the logits have."""
        return self.unembedding.shape[0]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of everything that is summed."""
        return wide_dtype(self.hidden.dtype)

    @property
    def row_bytes(self) -> int:
        """Size of one row of logits."""
        return self.vocab * self.hidden.dtype.itemsize

    @property
    def scratch_bytes(self) -> int:
        """What of the budget is for scratch, a sixteenth; slabs of rows have the other fifteen."""
        return self.slab_bytes // 16

    def wide_excess(self, needs: Sequence[bool]) -> int:
        """By how many bytes wide gradients for hidden states and unembedding exceed narrow ones."""
        # Not a product with the bool: torch 2.11 cannot multiply one with a symbolic size.
        size = self.hidden.numel() if needs[0] else 0
        size += self.unembedding.numel() if needs[1] else 0
        return size * (self.wide.itemsize - self.hidden.dtype.itemsize)

    def holds_wide(self, needs: Sequence[bool]) -> bool:
        """Whether the budget holds wide gradients until the upstream gradient is known.

        While they are summed there are the wide sums and a slab; when they are narrowed, both forms,
        of which the wide one is twice its excess.
        """
        excess = self.wide_excess(needs)
        return self.slab_bytes >= excess + max(excess, self.row_bytes)

    def only(self, counted: Tensor) -> "Problem":
        """The same with −1 as the target where not counted.

        Targets outside the vocabulary stay, so that they are still refused.
        """
        stays = counted | (self.target >= self.vocab)
        return self._replace(target=torch.where(stays, self.target, -1))

    def label_outside(self) -> _checks.LabelRangeError:
        """What is to be raised for the first label that does not exist."""
        row = int((self.target >= self.vocab).nonzero()[0])
        label = int(self.target[row])
        if _BELOW_ZERO // 2 <= label < _BELOW_ZERO:
            label -= _BELOW_ZERO
        # What is far below 0 has lost how far.
        said = f"{label} or less" if label == -_BELOW_ZERO // 2 else label
        where = f"of prediction {row}, counted in the order of [batch seq heads]"
        return _checks.label_outside(self.vocab, said, where)

    def empty_rows(self) -> Rows:
        """Zeros to be filled in."""
        size = self.target.shape[0]  # `len` would fix a size that a compiler has left open
        # One tensor each: what an operator gives back may not share memory.
        loss, ce, base, log_sum, weight = (
            self.hidden.new_zeros(size, dtype=self.wide) for _ in range(5)
        )
        correct = self.hidden.new_zeros(size, dtype=torch.bool)
        return Rows(loss, ce, base, log_sum, correct, weight)


class Gradients(NamedTuple):
    """For ``hidden``, ``unembedding`` and ``bias``; empty where not needed.

    They are still to be multiplied with ``unit``, and rounded to the dtype of the inputs if they are
    wider: once, together with the upstream gradient.
    """

    hidden: Tensor
    unembedding: Tensor
    bias: Tensor
    unit: Tensor


def targets_of(targets: Tensor, valid: Tensor) -> Tensor:
    """Targets as a problem takes them: −1 where not valid.

    A label that does not exist is beyond the vocabulary, for whoever looks at the numbers to refuse. So is
    one below 0, which would say that there is none.
    """
    moved = targets.clamp(min=-_BELOW_ZERO // 2) + _BELOW_ZERO
    return torch.where(valid, torch.where(targets < 0, moved, targets), -1)


def beside_bytes(hidden: Tensor, rows: int, *, copied: bool = True) -> int:
    """What a walk over the vocabulary has beside a slab of rows: their hidden states, and a wide sum."""
    size, wide = hidden.dtype.itemsize, wide_dtype(hidden.dtype).itemsize
    return rows * hidden.shape[1] * ((size if copied else 0) + wide)


def slab_budget(slab_bytes: int | None, hidden: Tensor, unembedding: Tensor) -> int:
    """Bytes that may be held beside inputs and gradients, refused if not one row of logits fits.

    By default 64 MiB of logits, or as many bytes as the unembedding has, a sixteenth for scratch, and
    what float32 sums of narrower gradients take; on a GPU also what ``beside_bytes`` says.
    """
    # Not with `len`, which fixes a size that a compiler has left open.
    vocab, size = unembedding.shape[0], unembedding.dtype.itemsize
    row = vocab * size
    if slab_bytes is None:
        whole = unembedding.numel() * size
        excess = (hidden.numel() + unembedding.numel()) * (wide_dtype(hidden.dtype).itemsize - size)
        slab = max(DEFAULT_SLAB_BYTES, row, whole)
        beside = beside_bytes(hidden, hidden.shape[0]) if hidden.is_cuda else 0
        # Rounded up: of what is left beside the scratch not a byte may be missing, or a row is. And room
        # for narrow gradients beside wide ones, however many hidden states there are: see `holds_wide`.
        return excess + max(slab + -(-slab // 15), excess) + beside
    if slab_bytes < row:
        raise ValueError(
            f"slab_bytes must hold at least one row of logits, {row} bytes for a vocabulary of "
            f"{vocab}, got {slab_bytes}"
        )
    return slab_bytes
