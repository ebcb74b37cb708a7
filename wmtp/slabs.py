"""The schedules of the linear losses: which slab of logits is computed when, and kept how long.

Three walks over the same matrix of logits, none of which holds more of it than a slab:

* ``forward_rows``: slabs of rows, loss and log-sum-exp of each. One product.
* ``backward_columns``: the gradient for any upstream gradient, given the log-sum-exp. Slabs of
  vocabulary, so that each slice of the unembedding gradient is written once. Three products.
* ``forward_backward_rows``: both at once, for a factor per row that is known beforehand. Slabs of
  rows. Three products in all, for the rows whose factor is not zero.

Rows without a target (``target < 0``) enter no product. Plain functions of tensors: gradients and
``torch.compile`` are the business of ``operators.py``.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


DEFAULT_SLAB_BYTES = 64 * 2**20
# Rows are finished in tiles that stay in the cache between the passes of a softmax.
_TILE_BYTES = 2**20
# How many rows of a product are made at a time where they must be widened.
_PART_ROWS = 4096
# Slabs of vocabulary narrower than this waste the matrix units; rows are blocked instead.
_MIN_COLUMNS = 256


class Rows(NamedTuple):
    """What is known of each row, 0 (or false) where nothing was computed; all ``[rows]``.

    Attributes:
        loss: the objective.
        ce: the plain cross entropy.
        lse: the log-sum-exp of the logits.
        correct: whether the target is the first most probable token.
    """

    loss: Tensor
    ce: Tensor
    lse: Tensor
    correct: Tensor


class Problem(NamedTuple):
    """The logits that nobody holds, ``hidden @ unembedding.T + bias``, and what is asked of them.

    Attributes:
        hidden: ``[rows dim]``.
        unembedding: ``[vocab dim]``, same dtype.
        bias: ``[vocab]``, same dtype, or ``None``.
        target: ``[rows]`` int64, negative where there is none.
        label_smoothing: see ``cross_entropy.Objective``.
        z_loss: see there.
        softcap: see there; 0 means none.
        slab_bytes: budget for the logits held at once.
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
        return self.unembedding.shape[0]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of everything that is summed."""
        return wide_dtype(self.hidden.dtype)

    @property
    def cells(self) -> int:
        """How many logits fit into the budget."""
        return max(1, self.slab_bytes // _bytes_per_logit(self.hidden.dtype))

    def empty_rows(self) -> Rows:
        """Zeros to be filled in."""
        size = len(self.target)
        loss, ce, lse = (self.hidden.new_zeros(size, dtype=self.wide) for _ in range(3))
        return Rows(loss, ce, lse, self.hidden.new_zeros(size, dtype=torch.bool))


class Gradients(NamedTuple):
    """For ``hidden``, ``unembedding`` and ``bias``, in their dtype; empty where not needed.

    They are still to be multiplied with ``unit``, see ``_split_unit``.
    """

    hidden: Tensor
    unembedding: Tensor
    bias: Tensor
    unit: Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slab_budget(slab_bytes: int | None, vocab: int, dtype: torch.dtype) -> int:
    """Bytes of logits that may be held at once, refused if not even one row fits."""
    row = vocab * _bytes_per_logit(dtype)
    if slab_bytes is None:
        return max(DEFAULT_SLAB_BYTES, row)
    if slab_bytes < row:
        raise ValueError(
            f"slab_bytes must hold at least one row of logits, {row} bytes for a vocabulary of "
            f"{vocab}, got {slab_bytes}"
        )
    return slab_bytes


def forward_rows(problem: Problem, with_correct: bool) -> Rows:
    """Loss, cross entropy and log-sum-exp of every row that has a target."""
    found = problem.empty_rows()
    # One deliberate synchronisation: rows without a target are left out of the product.
    active = (problem.target >= 0).nonzero().squeeze(1)
    for block, logits in _row_slabs(problem, active):
        _finish_rows(problem, block, logits, found, with_correct, None)
    return found


def forward_backward_rows(
    problem: Problem, factor: Tensor, with_correct: bool, every_row: bool, needs: list[bool]
) -> tuple[Rows, Gradients]:
    """Rows, and the gradients of ``Σ factor · loss`` for hidden states, unembedding and bias.

    Rows of factor 0 are left out of everything, or with ``every_row`` only of the gradients.
    """
    found = problem.empty_rows()
    has_target = problem.target >= 0
    weighted = has_target & (factor != 0)
    active = weighted.nonzero().squeeze(1)
    factor, unit = _split_unit(problem, factor, active)
    hidden, weight = problem.hidden, problem.unembedding
    of_hidden = hidden.new_zeros(hidden.shape if needs[0] else 0)
    of_weight = _unfilled(weight, weight.shape if needs[1] else (0,), problem.wide, active)
    of_bias = weight.new_zeros(problem.vocab if needs[2] else 0, dtype=problem.wide)
    first = True
    for block, logits in _row_slabs(problem, active):
        _finish_rows(problem, block, logits, found, with_correct, factor)
        x, row = hidden[block], _row_scale(problem, factor[block])
        if needs[0]:
            of_hidden[block] = _scaled(logits @ weight, row)
        if needs[1]:
            _add_product(of_weight, logits.T, _scaled(x, row), fresh=first)
        if needs[2]:
            of_bias += _column_sums(logits, row)
        first = False
    if every_row:
        for block, logits in _row_slabs(problem, (has_target & ~weighted).nonzero().squeeze(1)):
            _finish_rows(problem, block, logits, found, with_correct, None)
    return found, Gradients(of_hidden, of_weight.to(weight.dtype), of_bias.to(weight.dtype), unit)


def backward_columns(
    problem: Problem, upstream: Tensor, lse: Tensor, needs: list[bool]
) -> Gradients:
    """The gradients of ``Σ upstream · loss``, recomputing the logits slab by slab of vocabulary."""
    active = ((problem.target >= 0) & (upstream != 0)).nonzero().squeeze(1)
    factor, unit = _split_unit(problem, upstream, active)
    factor, wanted, lse = factor[active], problem.target[active], lse[active]
    x, weight, row = problem.hidden[active], problem.unembedding, _row_scale(problem, factor)
    x_scaled = _scaled(x, row)
    of_x = _unfilled(x, x.shape if needs[0] else (0,), problem.wide, active)
    of_weight = _unfilled(weight, weight.shape if needs[1] else (0,), weight.dtype, active)
    of_bias = weight.new_zeros(problem.vocab if needs[2] else 0, dtype=problem.wide)
    rows, columns = _tile_shape(len(active), problem)
    # A slice that one product writes needs no wider sum.
    sum_dtype = weight.dtype if rows >= len(active) else problem.wide
    slab = x.new_empty(rows * columns)
    for first in range(0, problem.vocab if len(active) else 0, columns):
        part = slice(first, min(first + columns, problem.vocab))
        total = of_weight[part]
        if needs[1] and sum_dtype != total.dtype:
            total = torch.empty_like(total, dtype=sum_dtype)
        for start in range(0, len(active), rows):
            block = slice(start, min(start + rows, len(active)))
            logits = slab[: (block.stop - start) * (part.stop - first)].view(block.stop - start, -1)
            _product(problem, x[block], part, logits)
            _finish_columns(problem, logits, wanted[block] - first, lse[block], factor[block])
            if needs[0]:
                _add_product(of_x[block], logits, weight[part], fresh=first == 0)
            if needs[1]:
                _add_product(total, logits.T, x_scaled[block], fresh=start == 0)
            if needs[2]:
                of_bias[part] += _column_sums(logits, None if row is None else row[block])
        if needs[1] and sum_dtype != of_weight.dtype:
            of_weight[part] = total
    of_hidden = x.new_zeros(problem.hidden.shape if needs[0] else 0)
    if needs[0]:
        of_hidden[active] = _scaled(of_x, row).to(x.dtype)
    return Gradients(of_hidden, of_weight, of_bias.to(weight.dtype), unit)


def _row_slabs(problem: Problem, active: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices of a block of the active rows and its logits, in one buffer used again and again."""
    step = max(1, problem.cells // problem.vocab)
    slab = problem.hidden.new_empty(min(step, len(active)), problem.vocab)
    for start in range(0, len(active), step):
        block = active[start : start + step]
        logits = slab[: len(block)]
        _product(problem, problem.hidden[block], slice(0, problem.vocab), logits)
        yield block, logits


def _product(problem: Problem, x: Tensor, part: slice, out: Tensor) -> None:
    weight = problem.unembedding[part].T
    if problem.bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(problem.bias[part], x, weight, out=out)


def _finish_rows(
    problem: Problem,
    block: Tensor,
    logits: Tensor,
    found: Rows,
    with_correct: bool,
    factor: Tensor | None,
) -> None:
    """Softmax of whole rows: write what is found, and with a factor the gradient over the logits."""
    for tile in _row_tiles(logits):
        rows = block[tile]
        wanted = problem.target[rows].unsqueeze(1)
        z, slope = _capped(problem, logits[tile].to(problem.wide), factor is not None)
        peak = z.amax(1, keepdim=True)
        chosen = z.gather(1, wanted)
        if with_correct:
            found.correct[rows] = (z.argmax(1, keepdim=True) == wanted).squeeze(1)
        mean = z.mean(1, keepdim=True) if problem.label_smoothing else None
        p = z.sub_(peak).exp_()
        total = p.sum(1, keepdim=True)
        lse = peak + total.log()
        ce = lse - chosen
        loss = ce if mean is None else torch.lerp(ce, lse - mean, problem.label_smoothing)
        if problem.z_loss:
            loss = loss + problem.z_loss * lse.square()
        found.loss[rows], found.ce[rows], found.lse[rows] = (
            column.squeeze(1) for column in (loss, ce, lse)
        )
        if factor is not None:
            p.mul_(total.reciprocal_())
            _write_gradient(problem, p, wanted, lse, slope, factor[rows], logits[tile])


def _finish_columns(
    problem: Problem, logits: Tensor, wanted: Tensor, lse: Tensor, factor: Tensor
) -> None:
    """Write the gradient over a slab of vocabulary; ``wanted`` counts from its first column."""
    for tile in _row_tiles(logits):
        z, slope = _capped(problem, logits[tile].to(problem.wide), True)
        row_lse = lse[tile].unsqueeze(1)
        p = z.sub_(row_lse).exp_()
        _write_gradient(
            problem, p, wanted[tile].unsqueeze(1), row_lse, slope, factor[tile], logits[tile]
        )


def _write_gradient(
    problem: Problem,
    p: Tensor,
    wanted: Tensor,
    lse: Tensor,
    slope: Tensor | None,
    factor: Tensor,
    out: Tensor,
) -> None:
    """Turn probabilities into ``dℓ/dz`` and write them to the slab.

    ``dℓ/dz_v = (1 + 2 · z_loss · lse) p_v − (1 − ε) [v = y] − ε / V``, times the softcap's slope. In a
    narrow dtype the row's factor goes in before the one rounding; otherwise it scales rows × dim of
    the products instead, which is less work.
    """
    smoothing = problem.label_smoothing
    if problem.z_loss:
        p.mul_(1 + 2 * problem.z_loss * lse)
    inside = (wanted >= 0) & (wanted < p.shape[1])
    p.scatter_add_(1, torch.where(inside, wanted, 0), inside.to(p.dtype) * (smoothing - 1))
    if smoothing:
        p.sub_(smoothing / problem.vocab)
    if slope is not None:
        p.mul_(slope)
    if p.dtype != out.dtype:
        torch.mul(p, factor.unsqueeze(1), out=p)
    if p.data_ptr() != out.data_ptr():
        out.copy_(p)


def _capped(problem: Problem, z: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Apply the softcap in place; with its derivative ``1 − tanh²`` if asked for."""
    if not problem.softcap:
        return z, None
    z.div_(problem.softcap).tanh_()
    slope = 1 - z.square() if with_slope else None
    return z.mul_(problem.softcap), slope


def _split_unit(problem: Problem, factor: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in the wide dtype; for float16 divided by a power of two, which is given too.

    A factor of ``1/N`` would push ``p · factor`` into float16's subnormals. Divided by the unit the
    active factors sum to at most 256, or to less where hidden states or unembedding are so large
    that the products would overflow. The unit goes back in after the products, in float32, together
    with the upstream gradient, which for float16 is usually a large loss scale.
    """
    factor = factor.to(problem.wide)
    unit = factor.new_ones(())
    if problem.hidden.dtype != torch.float16:
        return factor, unit
    largest = unit
    for operand in (problem.hidden[active], problem.unembedding):
        if operand.numel():
            largest = torch.maximum(largest, operand.abs().amax().to(unit.dtype).nan_to_num(1.0))
    total = factor[active].abs().sum() / (2.0**14 / largest).clamp(max=128)
    unit = torch.where(total > 0, torch.exp2(torch.floor(torch.log2(total))), unit)
    return factor / unit, unit


def _row_scale(problem: Problem, factor: Tensor) -> Tensor | None:
    """What rows × dim are still to be multiplied with: see ``_write_gradient``."""
    return factor.unsqueeze(1) if problem.hidden.dtype == problem.wide else None


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def _unfilled(like: Tensor, shape: Sequence[int], dtype: torch.dtype, active: Tensor) -> Tensor:
    """Memory that the first product over the active rows will fill; zeros if there is no row."""
    fill = torch.empty if len(active) else torch.zeros
    return fill(shape, dtype=dtype, device=like.device)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """``total += a @ b``, or ``total = a @ b`` if it is fresh, summed in the dtype of ``total``."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if fresh else total.addmm_(a, b)
        return
    # A CPU has no product of narrow matrices with a wide result; by parts it needs no second copy.
    for start in range(0, len(a), _PART_ROWS):
        part = slice(start, start + _PART_ROWS)
        product = a[part] @ b
        total[part].copy_(product) if fresh else total[part].add_(product)


def _column_sums(logits: Tensor, row: Tensor | None) -> Tensor:
    if row is None:
        return logits.sum(0, dtype=wide_dtype(logits.dtype))
    return torch.mv(logits.T, row.squeeze(1))


def _row_tiles(logits: Tensor) -> Iterator[slice]:
    """Slices of a few rows each, small enough for the cache."""
    rows, columns = logits.shape
    step = max(1, _TILE_BYTES // (columns * 4))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _tile_shape(rows: int, problem: Problem) -> tuple[int, int]:
    """Rows and columns of a slab of vocabulary: all rows, if enough columns are left for them."""
    cells = problem.cells
    columns = min(problem.vocab, max(cells // max(rows, 1), min(_MIN_COLUMNS, cells)))
    return max(1, min(rows, cells // columns)), columns


def _bytes_per_logit(dtype: torch.dtype) -> int:
    return dtype.itemsize
