"""Walks over the vocabulary: slabs of columns of the logits, for many rows at once.

A slab is made by one product, finished by ``slab_softmax.py``, and used by up to two more
(``products.py``).

* ``forward_columns``: loss and log-sum-exp of each row. One product.
* ``backward_columns``: the gradient for any upstream gradient, given the log-sum-exp. Each slice of the
  unembedding gradient is written once. Three products.
* ``forward_held``, then ``backward_held``: the same, but slabs are kept in between, all of them or as many
  as there is memory for. One product for all rows, two for those that count, and what is not kept is made
  anew for these.

Rows without a target (``target < 0``) enter no product. Plain functions of tensors: gradients and
``torch.compile`` are the business of ``operators.py``.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.problem import Gradients, Problem, Rows
from wmtp.products import add_product, filled_up, gathered, logits_of, parts
from wmtp.slab_layout import (
    Held,
    column_slab,
    copied_bytes,
    held_for,
    held_layout,
    held_slab,
    laid_out,
    row_stride,
    sum_cells,
    used_slab,
)
from wmtp.slab_softmax import (
    ColumnSums,
    gradient_over_columns,
    growth,
    reduce_columns,
    row_scale_over_columns,
    scratch_for,
)
from wmtp.target_rows import add_targets, scaled, write_hidden


# Rows whose logits are walked over together where only their losses are wanted.
_BLOCK_ROWS, _BLOCK_ROWS_GPU = 4096, 8192
# The number of rows that are kept is rounded up to one of so many, so that an allocator can reuse memory.
_SIZES = 8


def forward_columns(problem: Problem, with_correct: bool) -> Rows:
    """Loss, cross entropy and log-sum-exp of every row that has a target."""
    active = rows_of(problem, problem.target >= 0)
    block = _BLOCK_ROWS_GPU if problem.hidden.is_cuda else _BLOCK_ROWS
    rows, columns = column_slab(problem, min(len(active), block), copied_bytes(problem, active))
    return _found_in_columns(problem, with_correct, active, rows, columns)


def backward_columns(
    problem: Problem, upstream: Tensor, base: Tensor, log_sum: Tensor, needs: list[bool]
) -> Gradients:
    """The gradients of ``Σ upstream · loss``, recomputing the logits slab by slab of vocabulary.

    Beside slab and gradients it holds the hidden states that count, as they are and scaled, and their
    gradient in the wide dtype.
    """
    active = ((problem.target >= 0) & (upstream != 0)).nonzero().squeeze(1)
    summed = len(active) * problem.hidden.shape[1] * problem.wide.itemsize
    rows, columns = column_slab(problem, len(active), copied_bytes(problem, active) + summed)
    filled = gathered(problem.hidden, active, filled_up(len(active), 2 * len(active)))
    known = _known_of(problem, upstream, base, log_sum, active)
    return _summed_over_columns(problem, needs, known, filled, rows, columns)


def forward_held(
    problem: Problem, needs: Sequence[bool], with_correct: bool, all_count: bool
) -> tuple[Rows, Held]:
    """``forward_columns``, and what it keeps of the logits.

    ``all_count``: no row with a target will have an upstream gradient of 0, unless all have.
    """
    active = rows_of(problem, problem.target >= 0)
    every = len(problem.hidden)
    # With room for a few rows more, so that most batches ask for memory of a size that there is already.
    room = min(every, len(active) + -len(active) % max(1, -(-every // _SIZES)))
    layout = held_layout(problem, room, needs, all_count and len(active) == every)
    held = held_for(problem, active, room, layout)
    size = len(active), held.layout.columns
    return _found_in_columns(problem, with_correct, active, *size, held), held


def backward_held(
    problem: Problem,
    upstream: Tensor,
    base: Tensor,
    log_sum: Tensor,
    needs: list[bool],
    held: Held,
    all_count: bool,
) -> Gradients:
    """The same from logits that were held, which are used up; ``all_count``: see ``row_losses``."""
    rows, source = held.rows, None
    if all_count:
        known = _known_of(problem, upstream, base, log_sum, rows)
        x = gathered(problem.hidden, rows, len(rows))
    else:
        count = upstream[rows] != 0
        size = count.sum()
        source = _moved_together(count, size)
        known = _known_of(problem, upstream, base, log_sum, rows[source])
        x = problem.hidden[known.rows]
        # Waited for when everything else is on its way: a GPU has nothing to do until then.
        kept = int(size)
        known, x, source = _Known(*(column[:kept] for column in known)), x[:kept], source[:kept]
    size = len(known.rows), held.layout.columns
    return _summed_over_columns(problem, needs, known, x, *size, held, source)


def rows_of(problem: Problem, counted: Tensor) -> Tensor:
    """The rows that are counted, in ascending order. The others enter no product.

    The one deliberate synchronisation before it; so here labels that do not exist are refused: whether
    there are any is known by the time the rows are.
    """
    # Sent before `nonzero` waits, so that one wait is for both. Of no rows nothing waited: it is not read.
    wrong = (problem.target >= problem.vocab).any().to("cpu", non_blocking=True)
    rows = counted.nonzero().squeeze(1)
    if len(counted) and wrong:
        raise problem.label_outside()
    return rows


def _found_in_columns(
    problem: Problem,
    with_correct: bool,
    active: Tensor,
    rows: int,
    columns: int,
    held: Held | None = None,
) -> Rows:
    """Everything about the active rows but weights, by slabs of so many rows and columns.

    The last columns come first: if some are held, the first are left in the cells when all are done.
    """
    found: Rows | None = None
    cells = _cells_of(problem, rows, columns, held)
    scratch = scratch_for(laid_out(problem, cells, rows, columns), problem.scratch_bytes)
    for some in parts(len(active), rows):
        block = active[some]
        size = filled_up(len(block), rows)
        x = gathered(problem.hidden, block, size)
        seen: list[ColumnSums] = []
        for number, part in reversed([*enumerate(parts(problem.vocab, columns))]):
            width = part.stop - part.start
            whole = None if held is None else held_slab(problem, held, number, width)
            if whole is None:
                whole = laid_out(problem, cells, size, width)
            # The first product before anything else that can wait: a GPU has nothing to do until then.
            product_of(problem, x, part, whole)
            wanted = problem.target[block] - part.start
            seen.append(
                reduce_columns(
                    whole[: len(block)], wanted, problem.softcap, with_correct,
                    problem.label_smoothing > 0, scratch,
                )
            )  # fmt: skip
        done = _whole_rows(problem, problem.target[block], seen[::-1], columns)
        if len(block) == len(problem.target):
            return done
        if found is None:
            found = problem.empty_rows()
        put(found, block, done)
    return problem.empty_rows() if found is None else found


def _whole_rows(problem: Problem, wanted: Tensor, seen: list[ColumnSums], columns: int) -> Rows:
    """Everything about rows, from what each so many columns tell of them."""
    base, log_sum = _merged(seen)
    chosen = sum((some.chosen for some in seen[1:]), seen[0].chosen)
    ce = (base - chosen) + log_sum
    loss = ce.clone()
    if problem.label_smoothing:
        total = sum((some.total for some in seen[1:]), seen[0].total)
        uniform = (base - total / problem.vocab) + log_sum
        loss = torch.lerp(ce, uniform, problem.label_smoothing)
    if problem.z_loss:
        loss = loss + problem.z_loss * (base + log_sum).square()
    correct = torch.zeros_like(wanted, dtype=torch.bool)
    if len(seen[0].best):
        best, best_at = torch.full_like(ce, -math.inf), torch.zeros_like(wanted)
        for index, some in enumerate(seen):
            better = some.best > best
            best = torch.where(better, some.best, best)
            best_at = torch.where(better, some.best_at + index * columns, best_at)
        correct = best_at == wanted
    return Rows(loss, ce, base, log_sum, correct, torch.ones_like(ce))


def _merged(seen: list[ColumnSums]) -> tuple[Tensor, Tensor]:
    """Base and log-sum of whole rows from those of their parts."""
    if len(seen) == 1:
        return seen[0].base, seen[0].log_sum
    bases, sums = (torch.stack([some[i] for some in seen], 1) for i in range(2))
    largest = (bases + sums).argmax(1, keepdim=True)
    base = bases.gather(1, largest)
    return base.squeeze(1), ((bases - base) + sums).logsumexp(1)


def _moved_together(count: Tensor, size: Tensor) -> Tensor:
    """Where the logits of rows come from so that those that count, ``size`` of them, come first.

    These stay where they are, but the last of them take the places of rows that do not count: nothing is
    read where something is written, in whatever order.
    """
    place = torch.arange(len(count), device=count.device)
    inside = place < size
    hole, late = ~count & inside, count & ~inside
    # There are as many of the one as of the other.
    filling = torch.empty_like(place)
    filling[torch.where(late, late.cumsum(0) - 1, -1)] = place
    return torch.where(hole, filling[(hole.cumsum(0) - 1).clamp(min=0)], place)


class _Known(NamedTuple):
    """What is known of the rows of a backward pass; all ``[rows]``.

    Attributes:
        rows: where they are in the problem.
        factor: upstream gradient, in the wide dtype.
        wanted: target.
        base: see ``Rows``.
        log_sum: see ``Rows``.
    """

    rows: Tensor
    factor: Tensor
    wanted: Tensor
    base: Tensor
    log_sum: Tensor


def _known_of(
    problem: Problem, upstream: Tensor, base: Tensor, log_sum: Tensor, active: Tensor
) -> _Known:
    upstream = upstream.to(problem.wide)
    some = (column[active] for column in (upstream, problem.target, base, log_sum))
    return _Known(active, *some)


def _summed_over_columns(
    problem: Problem,
    needs: list[bool],
    known: _Known,
    filled: Tensor,
    rows: int,
    columns: int,
    held: Held | None = None,
    source: Tensor | None = None,
) -> Gradients:
    """Gradients from some rows and their hidden states, by slabs of so many rows and columns.

    Logits that are held are in the order of the rows, or where ``source`` says.
    """
    active, factor, wanted, base, log_sum = known
    x, weight = filled[: len(active)], problem.unembedding
    grown = factor * growth(problem.z_loss, base + log_sum) if problem.z_loss else factor
    unit = unit_of(grown, x, weight)
    factor = factor / unit
    row_scale = row_scale_over_columns(
        x, base, log_sum, factor, problem.label_smoothing, problem.z_loss
    )
    of_x = unfilled(x, filled.shape if needs[0] else (0,), problem.wide, active)
    if needs[1] and held is not None and len(held.lent):
        # Slice by slice, when the logits that lie there have been used up. A view that was made without
        # gradients could not be changed in place, and whoever gets this may want to.
        of_weight = held.lent.view(weight.shape).detach()
        if not len(active):
            of_weight.zero_()
    else:
        of_weight = unfilled(weight, weight.shape if needs[1] else (0,), weight.dtype, active)
    of_bias = weight.new_zeros(problem.vocab if needs[2] else 0, dtype=problem.wide)
    sums = Gradients(of_x, of_weight, of_bias, unit)
    known = known._replace(factor=factor)
    at_target = _sum_slabs(
        problem, needs, known, filled, row_scale, sums, rows, columns, held, source
    )  # fmt: skip
    of_hidden = x.new_zeros(problem.hidden.shape if needs[0] else 0)
    if needs[0]:
        scale = torch.ones_like(factor) if row_scale is None else row_scale
        write_hidden(of_hidden, active, of_x, scale, weight, wanted, at_target)
    del sums, of_x
    if needs[1]:
        add_targets(of_weight, wanted, x, at_target)
    if needs[2]:
        of_bias.index_add_(0, wanted, at_target)
    return Gradients(of_hidden, of_weight, of_bias.to(weight.dtype), unit)


def _sum_slabs(
    problem: Problem,
    needs: list[bool],
    known: _Known,
    filled: Tensor,
    row_scale: Tensor | None,
    sums: Gradients,
    rows: int,
    columns: int,
    held: Held | None,
    source: Tensor | None,
) -> Tensor:
    """Add up all products, of hidden states by their place among the rows; what is at the targets.

    A function of its own, so that slab and scratch are gone before anything else is asked for.
    """
    active, factor, wanted, base, log_sum = known
    x, weight = filled[: len(active)], problem.unembedding
    rescaled = x if row_scale is None or not needs[1] else scaled(x, row_scale).to(x.dtype)
    at_target = torch.zeros_like(factor)
    # A slice that one product writes needs no wider sum.
    sum_dtype = weight.dtype if rows >= len(active) else problem.wide
    cells = _cells_of(problem, rows, columns, held)
    scratch = scratch_for(
        laid_out(problem, cells, rows, columns), problem.scratch_bytes, sum_cells(problem)
    )
    for number, part in enumerate(parts(problem.vocab if len(active) else 0, columns)):
        total = sums.unembedding[part]
        if needs[1] and sum_dtype != total.dtype:
            total = torch.empty_like(total, dtype=sum_dtype)
        kept = None if held is None else used_slab(problem, held, number, part)
        for block in parts(len(active), rows):
            # With rows of zeros behind the last block, whose logits nobody looks at.
            whole = slice(block.start, min(block.start + rows, len(filled)))
            if kept is None:
                made = laid_out(problem, cells, whole.stop - whole.start, part.stop - part.start)
                product_of(problem, filled[whole], part, made)
            else:
                made = kept[: len(active)]
            logits = made[: block.stop - block.start]
            at_target[block] += gradient_over_columns(
                logits if kept is None else kept, wanted[block] - part.start, base[block],
                log_sum[block], factor[block], problem.label_smoothing, problem.z_loss,
                problem.softcap, problem.vocab, scratch, row_scale is not None,
                None if kept is None else source,
            )  # fmt: skip
            if needs[0]:
                into = sums.hidden[whole]
                add_product(into, made, weight[part], scratch, fresh=part.start == 0)
            if needs[1]:
                add_product(total, logits.T, rescaled[block], scratch, fresh=block.start == 0)
            if needs[2]:
                scale = None if row_scale is None else row_scale[block]
                add_to_bias(problem, sums.bias[part], logits, scale)
        if needs[1] and sum_dtype != weight.dtype:
            sums.unembedding[part] = total
    return at_target


def _cells_of(problem: Problem, rows: int, columns: int, held: Held | None) -> Tensor:
    """Memory for a slab: that of the first which is held, when that has been used, or new."""
    if held is not None:
        return held.own
    return problem.hidden.new_empty(rows * row_stride(problem, columns))


def product_of(problem: Problem, x: Tensor, part: slice, out: Tensor) -> None:
    """Logits of some hidden states, for some columns of the vocabulary."""
    bias = None if problem.bias is None else problem.bias[part]
    logits_of(x, problem.unembedding[part], bias, out)


def put(found: Rows, rows: Tensor, done: Rows) -> None:
    """Fill in what is known of some rows."""
    for column, values in zip(found, done, strict=True):
        column[rows] = values


def unfilled(like: Tensor, shape: Sequence[int], dtype: torch.dtype, active: Tensor) -> Tensor:
    """Memory that the first product over the active rows will fill; zeros if there is no row."""
    fill = like.new_empty if len(active) else like.new_zeros
    return fill(shape, dtype=dtype)


def unit_of(factor: Tensor, *operands: Tensor) -> Tensor:
    """1, or for float16 operands a power of two to divide the factors by.

    A factor of ``1/N`` would push a product into float16's subnormals. Divided by the unit the factors
    sum to at most 256, or to less where an operand is so large that its products would overflow. The
    unit goes back in after the products, in float32.
    """
    unit = factor.new_ones(())
    if operands[0].dtype != torch.float16:
        return unit
    largest = unit
    for operand in operands:
        if operand.numel():
            # Not `abs().amax()`, which holds another operand.
            least, most = operand.aminmax()
            operand_size = torch.maximum(-least, most).to(unit.dtype)
            largest = torch.maximum(largest, operand_size.nan_to_num(1.0))
    total = factor.abs().sum() / (2.0**14 / largest).clamp(max=128)
    return torch.where(total > 0, torch.exp2(torch.floor(torch.log2(total))), unit)


def add_to_bias(problem: Problem, total: Tensor, logits: Tensor, scale: Tensor | None) -> None:
    """``total += scale @ logits``, by parts that are widened first; a GPU widens what it sums itself."""
    if scale is None and logits.is_cuda:
        total += logits.sum(0, dtype=total.dtype)
        return
    scale = total.new_ones(len(logits)) if scale is None else scale
    size = logits.shape[1] * total.dtype.itemsize
    for part in parts(len(logits), problem.scratch_bytes // 2 // size):
        total.addmv_(logits[part].to(total.dtype).T, scale[part])
