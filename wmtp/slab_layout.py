"""Where slabs of logits lie in memory: how large they are within the budget, and which of them are kept.

The budget (``slab_bytes``) covers one slab, its scratch, wide sums of gradients, and on a GPU a copy of the
hidden states and a wide sum of their gradient. Where the logits are recomputed in the backward pass, copies
of the hidden states that count (on a CPU a scaled one too) and their wide gradient come on top of it; on a
GPU only what these take beyond three quarters of the budget.

On a GPU, in eager mode, logits are kept from the forward pass to the backward pass. If the budget holds
all of them, they are one slab. Otherwise, where keeping a part is faster than making gradients in the
forward pass, they are slabs of columns in two kinds of memory:

* ``own``: what the budget has room for.
* ``lent``: the memory of the unembedding's gradient. It must be allocated anyway, and is empty until the
  backward pass writes the gradient into it, so it stores logits until then. It holds those of ``dim``
  rows.

        slab          0    1    2    3    4    5    6
        memory        own  own  lent lent lent none none

        gradient      [ slice 0 | slice 1 | …  →            ]    written from the start
        lent slabs    [               | slab 2 | slab 3 | 4 ]    stored at the end

The backward pass goes from slab 0 on and writes one slice of the gradient per slab; ``most_lent`` is how
many slabs fit at the end without being overwritten before they are used. Slabs with no memory are
recomputed. If the graph is kept for another backward pass, all logits are recomputed, into memory of their
own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.problem import Problem, beside_bytes
from wmtp.products import evenly, filled_up, scratch_cells
from wmtp.slab_softmax import scratch_for


# Walks over the vocabulary gain nothing from a larger slab: it leaves a CPU's cache, and makes products
# that are large enough for a GPU.
_COLUMN_SLAB_BYTES = 2**25
_COLUMN_SLAB_BYTES_GPU = 2**29
# Before slabs of vocabulary get narrower than this rows are blocked: each slab adds to a sum as large as
# the hidden states, which takes as long as to make some columns of it. Small slabs are square instead.
_LEAST_COLUMNS, _LEAST_COLUMNS_GPU = 1024, 4096
# To add up the hidden states' gradient takes a GPU about as long as to make the logits of so many columns.
_SUM_COLUMNS = 1000
# Into how many pieces a slab of vocabulary is cut at most, so that more of them are kept.
_MOST_PIECES = 8
# A slab of vocabulary starts at a multiple of so many columns, for vector loads; and on a GPU, whose
# products want it aligned, every row of a slab.
_ALIGNED_COLUMNS, _ALIGNED_COLUMNS_GPU = 16, 64


def row_stride(problem: Problem, columns: int) -> int:
    """How many cells from one row of a slab to the next."""
    # A GPU's product adds a bias before it rounds only where nothing lies between the rows.
    aligned = problem.hidden.is_cuda and problem.bias is None
    return columns + (-columns % _ALIGNED_COLUMNS_GPU if aligned else 0)


def laid_out(problem: Problem, cells: Tensor, rows: int, columns: int) -> Tensor:
    """The first of some cells as a slab of so many rows and columns."""
    stride = row_stride(problem, columns)
    return cells[: rows * stride].view(rows, stride)[:, :columns]


def sum_cells(problem: Problem) -> int:
    """Scratch for sums that are wider than the products."""
    return scratch_cells(problem.hidden, problem.wide)


def most_rows(problem: Problem, needs: Sequence[bool], dtype: torch.dtype) -> int:
    """Rows of logits in what gradients of a dtype leave of the budget, beside a scratch of a sixteenth."""
    wide = dtype == problem.wide and problem.holds_wide(needs)
    excess = problem.wide_excess(needs) if wide else 0
    row = row_stride(problem, problem.vocab) * problem.hidden.itemsize
    return (problem.slab_bytes - excess) * 15 // 16 // row


def row_slab(
    problem: Problem, rows: int, needs: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A slab for as many rows as fit in the budget beside gradients of a dtype, and its scratch."""
    most = most_rows(problem, needs, dtype)
    size = filled_up(evenly(rows, most), most)
    flat = problem.hidden.new_empty(size * row_stride(problem, problem.vocab))
    slab = laid_out(problem, flat, size, problem.vocab)
    return slab, scratch_for(slab, problem.scratch_bytes, sum_cells(problem))


def copied_bytes(problem: Problem, active: Tensor) -> int:
    """What hidden states take that ``gathered`` has copied: none if there is a target for each."""
    whole = len(active) == len(problem.hidden)
    return 0 if whole else len(active) * problem.hidden.shape[1] * problem.hidden.itemsize


def column_slab(problem: Problem, rows: int, beside: int) -> tuple[int, int]:
    """Rows and columns of a slab of vocabulary: all rows, if enough columns are left for them.

    On a GPU, whose slabs are large, ``beside`` bytes of the budget are left for others, but no more than
    three quarters of it.
    """
    size = problem.hidden.dtype.itemsize
    budget, large, least = problem.slab_bytes, _COLUMN_SLAB_BYTES, _LEAST_COLUMNS
    if problem.hidden.is_cuda:
        budget, large = max(budget - beside, budget // 4), _COLUMN_SLAB_BYTES_GPU
        least = _LEAST_COLUMNS_GPU
    cells = max(1, min(budget, large) // size)
    most = max(cells // max(filled_up(rows, cells), 1), min(least, math.isqrt(cells)))
    # Rows that lie a power of two apart meet in the same lines of a CPU's cache: a product that writes
    # them takes 7 % longer. At an odd multiple of 16 columns they do not.
    on_gpu = problem.hidden.is_cuda
    aligned = _ALIGNED_COLUMNS_GPU if on_gpu else _ALIGNED_COLUMNS
    if most >= aligned:
        most -= most % aligned
        if not on_gpu and most // aligned % 2 == 0:
            most -= aligned
        columns = evenly(problem.vocab, most)
        columns += -columns % aligned
        if not on_gpu and columns // aligned % 2 == 0:
            columns += aligned
        columns = min(problem.vocab, columns)
    else:
        columns = evenly(problem.vocab, most)
    most = max(cells, columns) // row_stride(problem, columns)
    return filled_up(evenly(rows, most), most), columns


class HeldLayout(NamedTuple):
    """Slabs of vocabulary, of all rows, that are kept from the forward pass to the backward pass.

    Attributes:
        columns: of each slab, but the last of the vocabulary may have fewer.
        own: how many of them, from the first, have memory of their own; 0 if nothing is kept.
        lent: how many after those lie in the memory of the unembedding's gradient.
        slabs: how many there are in all; the rest are recomputed.
    """

    columns: int
    own: int
    lent: int
    slabs: int

    @property
    def share(self) -> float:
        """How much is kept, of 1."""
        return (self.own + self.lent) / self.slabs


def held_layout(
    problem: Problem, rows: int, needs: Sequence[bool], all_count: bool = False
) -> HeldLayout:
    """What is kept of the logits of so many rows; as one slab if the budget holds all of them.

    ``all_count``: none of the rows is left out in the backward pass.
    """
    hidden, vocab = problem.hidden, problem.vocab
    beside = beside_bytes(hidden, rows, copied=not all_count or rows < len(hidden))
    cells = max(0, problem.slab_bytes - beside) // hidden.itemsize
    if rows * row_stride(problem, vocab) <= cells:
        return HeldLayout(vocab, own=1, lent=0, slabs=1)
    at_once, widest = column_slab(problem, rows, beside)
    if at_once < rows:
        return HeldLayout(widest, own=0, lent=0, slabs=1)

    def cut(columns: int) -> HeldLayout:
        own = max(1, cells // (rows * row_stride(problem, columns)))
        slabs = -(-vocab // columns)
        lent = most_lent(problem, rows, columns, own) if needs[1] else 0
        return HeldLayout(columns, min(own, slabs), lent, slabs)

    def cost(layout: HeldLayout) -> int:
        kept = min(vocab, (layout.own + layout.lent) * layout.columns)
        return vocab - kept + layout.slabs * _SUM_COLUMNS

    # Narrower slabs fill the memory better, but there are more of them to be summed.
    widths = (evenly(vocab, -(-widest // pieces)) for pieces in range(1, _MOST_PIECES + 1))
    aligned = (min(vocab, width + -width % _ALIGNED_COLUMNS_GPU) for width in widths)
    return min(map(cut, aligned), key=cost)


def most_lent(problem: Problem, rows: int, columns: int, own: int) -> int:
    """How many slabs, after the first ``own``, can lie at the end of the unembedding's gradient.

    Slice ``i`` of the gradient is written after slab ``i`` has been read, so slices ``0 … i − 1`` must end
    before slab ``i`` begins. Of ``n`` lent slabs the one numbered ``own + j`` begins at
    ``vocab · dim − (n − j) · slab``.
    Both sides are linear in ``j``, so it is enough that it holds at both ends: ``j = 0`` bounds ``n`` by
    ``first``, ``j = n − 1`` by ``last``.
    """
    vocab, dim = problem.unembedding.shape
    slab, slice_ = rows * row_stride(problem, columns), columns * dim
    first = (vocab * dim - own * slice_) // slab
    last = (vocab * dim - slab) // slice_ + 1 - own
    return max(0, min(first, last))


class Held(NamedTuple):
    """Logits of some rows, kept from the forward pass to the backward pass.

    Attributes:
        rows: ``[held]``, which rows of the problem.
        own: cells of the slabs that have their own memory, flat, the first of which others may use later.
        lent: memory of the unembedding's gradient, ``[vocab · dim]``, or empty if no slab is in it.
        layout: which slab is where.
    """

    rows: Tensor
    own: Tensor
    lent: Tensor
    layout: HeldLayout


def held_for(problem: Problem, rows: Tensor, room: int, layout: HeldLayout) -> Held:
    """Memory for the logits of some rows, by the layout for as many or more, ``room``."""
    x = problem.hidden
    own = x.new_empty(layout.own * room * row_stride(problem, layout.columns))
    return Held(rows, own, x.new_empty(problem.unembedding.numel() if layout.lent else 0), layout)


def held_slab(problem: Problem, held: Held, number: int, columns: int) -> Tensor | None:
    """Where a slab of vocabulary with so many columns is kept, if it is."""
    columns_before, own, lent, _ = held.layout
    size = len(held.rows) * row_stride(problem, columns_before)
    if number >= own + lent:
        return None
    if number < own:
        cells = held.own[number * size :]
    else:
        cells = held.lent[len(held.lent) - (own + lent - number) * size :]
    return laid_out(problem, cells, len(held.rows), columns)


def used_slab(problem: Problem, held: Held, number: int, part: slice) -> Tensor | None:
    """``held_slab`` in the backward pass, before slice ``part`` of the gradient is written.

    If that slice would overwrite the slab itself, the slab is first copied to the start of ``own``, whose
    logits have all been used by then.
    """
    slab = held_slab(problem, held, number, part.stop - part.start)
    if slab is None or number < held.layout.own:
        return slab
    start = slab.storage_offset() - held.lent.storage_offset()
    if start >= part.stop * problem.unembedding.shape[1]:
        return slab
    free = laid_out(problem, held.own, len(held.rows), part.stop - part.start)
    return free.copy_(slab)
