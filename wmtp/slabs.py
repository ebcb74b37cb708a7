"""The schedules of the linear losses: which slab of logits is computed when, and kept how long.

Five walks over the same matrix of logits, all but one of which hold no more of it than a slab. A slab is
made by one product, finished by ``slab_softmax.py``, and used by up to two more (``products.py``).

* ``forward_columns``: loss and log-sum-exp of each row. Slabs of vocabulary. One product.
* ``backward_columns``: the gradient for any upstream gradient, given the log-sum-exp. Slabs of
  vocabulary, so that each slice of the unembedding gradient is written once. Three products.
* ``forward_backward_rows``: both at once, for a factor per row that is known beforehand or that the
  row itself determines. Slabs of rows. Three products in all, for the rows whose factor is not zero.
* ``forward_guessing_rows``, then ``corrected_rows``: both at once, for factors that are known only when
  all losses are, but can be guessed from the losses so far. Slabs of rows. One product for all rows,
  two for those with a guess, three for those whose guess was wrong.
* ``forward_held``, then ``backward_held``: as the first two, but slabs are kept in between, all of them or
  as many as there is memory for. One product for all rows, two for those that count, and what is not kept
  is made anew for these.

Rows without a target (``target < 0``) enter no product. Plain functions of tensors: gradients and
``torch.compile`` are the business of ``operators.py``.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.problem import NOT_LOCAL, Gradients, Problem, RowLocal, Rows
from wmtp.products import add_product, filled_up, gathered, logits_of, move_up, parts
from wmtp.slab_layout import (
    Held,
    column_slab,
    copied_bytes,
    gradient_dtype,
    held_for,
    held_layout,
    held_slab,
    laid_out,
    most_rows,
    row_slab,
    row_stride,
    sum_cells,
    used_slab,
)
from wmtp.slab_softmax import (
    ColumnSums,
    gradient_over_columns,
    gradient_over_rows,
    growth,
    left_over_columns,
    reduce_columns,
    scratch_for,
    settled,
)
from wmtp.target_rows import add_targets, scaled, write_hidden


# Rows whose logits are walked over together where only their losses are wanted.
_BLOCK_ROWS, _BLOCK_ROWS_GPU = 4096, 8192
# More slabs than this and guessing their factors takes a time of its own.
_MOST_GUESSES = 256
# So much of the logits must be kept where gradients can be summed in the forward pass.
_SHARE_WORTHWHILE = 0.75
# Rows whose largest hidden number is more than so many times the median of all are not guessed.
_MOST_SIZE = 8
# A guess that is wrong by so many roundings is right.
_NEAR = 8
# The number of rows that are kept is rounded up to one of so many, so that an allocator can reuse memory.
_SIZES = 8


# From the cross entropy of the rows that have been seen, and which these are, what they will count.
Guess = Callable[[Tensor, Tensor], Tensor]


def forward_columns(problem: Problem, with_correct: bool) -> Rows:
    """Loss, cross entropy and log-sum-exp of every row that has a target."""
    active = _rows_of(problem, problem.target >= 0)
    block = _BLOCK_ROWS_GPU if problem.hidden.is_cuda else _BLOCK_ROWS
    rows, columns = column_slab(problem, min(len(active), block), copied_bytes(problem, active))
    cells = problem.hidden.new_empty(rows * row_stride(problem, columns))
    return _found_in_columns(problem, with_correct, active, cells, rows, columns)


def can_hold(problem: Problem, needs: Sequence[bool]) -> bool:
    """Whether ``forward_held`` has the memory that it wants, and anything for the backward pass to use.

    Not on a CPU: there a slab that is not used at once has left the cache when it is.
    """
    if not (any(needs) and problem.hidden.is_cuda):
        return False
    return held_layout(problem, len(problem.hidden), needs).own > 0


def holds_better(problem: Problem, needs: Sequence[bool]) -> bool:
    """Whether that is faster than gradients made in the forward pass, where one could do either.

    These take three products, where the budget has room for wide sums or the unembedding's is not wanted,
    and a GPU adds up wide sums in a part of the time of one. Else they take four, of which every kept slab
    saves a part.
    """
    if needs[1] and not problem.holds_wide(needs):
        return True
    return held_layout(problem, len(problem.hidden), needs).share >= _SHARE_WORTHWHILE


def forward_held(
    problem: Problem, needs: Sequence[bool], with_correct: bool, all_count: bool
) -> tuple[Rows, Held]:
    """``forward_columns``, and what it keeps of the logits. ``can_hold`` says whether to call this.

    ``all_count``: no row with a target will have an upstream gradient of 0, unless all have.
    """
    active = _rows_of(problem, problem.target >= 0)
    every = len(problem.hidden)
    # With room for a few rows more, so that most batches ask for memory of a size that there is already.
    room = min(every, len(active) + -len(active) % max(1, -(-every // _SIZES)))
    layout = held_layout(problem, room, needs, all_count and len(active) == every)
    held = held_for(problem, active, room, layout)
    size = len(active), held.layout.columns
    return _found_in_columns(problem, with_correct, active, held.own, *size, held), held


def _rows_of(problem: Problem, counted: Tensor) -> Tensor:
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
    cells: Tensor,
    rows: int,
    columns: int,
    held: Held | None = None,
) -> Rows:
    """Everything about the active rows but weights, by slabs of so many rows and columns.

    The last columns come first: if some are held, the first are left in the cells when all are done.
    """
    found: Rows | None = None
    scratch = scratch_for(laid_out(problem, cells, rows, columns), problem.slab_bytes // 16)
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
            _product(problem, x, part, whole)
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
        _put(found, block, done)
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


def forward_backward_rows(
    problem: Problem,
    factor: Tensor,
    weighting: RowLocal,
    with_correct: bool,
    every_row: bool,
    needs: list[bool],
) -> tuple[Rows, Gradients]:
    """Rows, and the gradients of ``Σ factor · weight · loss`` for hidden, unembedding and bias.

    The weight is what ``weighting`` gives each row, a constant to the gradient. Rows of factor 0 are
    left out of everything, or with ``every_row`` only of the gradients; under a weighting none is,
    for the weights of all make the denominator. Gradients are still to be multiplied with ``unit``:
    see ``_unit``.
    """
    found = problem.empty_rows()
    has_target = problem.target >= 0
    weighted = has_target if weighting != NOT_LOCAL else has_target & (factor != 0)
    active = _rows_of(problem, weighted)
    dtype = gradient_dtype(problem, needs, weighting)
    most = most_rows(problem, needs, dtype)
    # Where one slab is not all, or it is not known yet how large z-loss makes the gradients.
    parted = needs[1] and len(active) > most
    if dtype != problem.wide and (parted or (dtype == torch.float16 and problem.z_loss)):
        return _forward_then_backward(problem, factor, with_correct, every_row, needs)
    hidden, weight = problem.hidden, problem.unembedding
    factor, unit = factor.to(problem.wide), factor.new_ones((), dtype=problem.wide)
    if dtype == torch.float16:
        unit = _unit(factor[active], hidden[active], weight)
        factor = factor / unit
    of_hidden = hidden.new_zeros(hidden.shape if needs[0] else 0, dtype=dtype)
    of_weight = _unfilled(weight, weight.shape if needs[1] else (0,), dtype, active)
    of_bias = weight.new_zeros(problem.vocab if needs[2] else 0, dtype=problem.wide)
    slab, scratch = row_slab(problem, len(active), most)
    into = Gradients(of_hidden, of_weight, of_bias, unit)
    for some in parts(len(active), len(slab)):
        block, done = _block(problem, active[some], slab, weighting, with_correct, scratch)
        _put(found, block.rows, done)
        scale = factor[block.rows] * done.weight
        _add_gradients(problem, into, block, scale, scale, scratch, fresh=some.start == 0)
    # Freed before anything else is asked for: what comes takes its place.
    del slab, scratch
    if every_row:
        left = torch.where(weighted, -1, problem.target)
        _fill_in(found, forward_columns(problem._replace(target=left), with_correct), ~weighted)
    return found, Gradients(of_hidden, of_weight, of_bias.to(dtype), unit)


def can_guess(problem: Problem, needs: Sequence[bool]) -> bool:
    """Whether ``forward_guessing_rows`` has the memory it wants, and few enough guesses to make."""
    if not any(needs) or not problem.holds_wide(needs):
        return False
    return len(problem.target) <= _MOST_GUESSES * most_rows(problem, needs, problem.wide)


def forward_guessing_rows(
    problem: Problem, guess: Guess, with_correct: bool, needs: list[bool]
) -> tuple[Rows, Gradients, Tensor]:
    """Rows, and the gradients of ``Σ guessed · loss`` for what was guessed of each row, given last.

    A slab's rows are taken from all over the batch, so that what is known when they are guessed is a
    fair sample of it. Rows whose loss is not finite, or whose hidden state is far larger than others,
    are guessed to count nothing. ``can_guess`` says whether to call this.
    """
    found = problem.empty_rows()
    active = _rows_of(problem, problem.target >= 0)
    hidden, weight, dtype = problem.hidden, problem.unembedding, problem.wide
    into = Gradients(
        hidden.new_zeros(hidden.shape if needs[0] else 0, dtype=dtype),
        _unfilled(weight, weight.shape if needs[1] else (0,), dtype, active),
        weight.new_zeros(problem.vocab if needs[2] else 0, dtype=dtype),
        hidden.new_ones((), dtype=dtype),
    )
    guessed, seen = torch.zeros_like(found.loss), torch.zeros_like(found.correct)
    size = hidden.abs().amax(1)
    # What a row of these adds could not be taken back without rounding what others have added.
    sure = size <= _MOST_SIZE * size[active].nanmedian() if len(active) else seen
    most = most_rows(problem, needs, problem.wide)
    slab, scratch = row_slab(problem, len(active), most)
    slabs = -(-len(active) // max(1, len(slab)))
    for first in range(slabs):
        block, done = _block(problem, active[first::slabs], slab, NOT_LOCAL, with_correct, scratch)
        _put(found, block.rows, done)
        seen[block.rows] = True
        fair = sure[block.rows] & done.loss.isfinite()
        guessed[block.rows] = factor = torch.where(fair, guess(found.ce, seen)[block.rows], 0)
        kept = (factor != 0).nonzero().squeeze(1)
        some, scale = _some_of(problem, block, kept, scratch), factor[kept]
        _add_gradients(problem, into, some, scale, scale, scratch, fresh=first == 0)
    return found, into, guessed


def corrected_rows(
    problem: Problem, guessed: Tensor, factor: Tensor, made: Gradients, needs: list[bool]
) -> Gradients:
    """From the gradients of ``Σ guessed · loss``, changed in place, those of ``Σ factor · loss``.

    Rows whose guess was right, but for the rounding of factors, are left as they are. Where more were
    wrong than count, or something overflowed on the way, they are all made anew.
    """
    near = (factor - guessed).abs() <= _NEAR * torch.finfo(factor.dtype).eps * factor.abs()
    near &= factor.isfinite()
    active = ((problem.target >= 0) & ~near).nonzero().squeeze(1)
    count = ((problem.target >= 0) & (factor != 0)).nonzero().squeeze(1)
    finite = bool(torch.stack([gradient.sum() for gradient in made[:3]]).isfinite().all())
    if len(active) > len(count) or not finite:
        active, guessed = count, torch.zeros_like(guessed)
        for gradient in made[:3]:
            gradient.zero_()
    most = most_rows(problem, needs, problem.wide)
    slab, scratch = row_slab(problem, len(active), most)
    for some in parts(len(active), len(slab)):
        block, _ = _block(problem, active[some], slab, NOT_LOCAL, False, scratch)
        of_hidden, of_others = factor[block.rows], (factor - guessed)[block.rows]
        # What was written for hidden states is written anew, what was added for others is added to.
        _add_gradients(problem, made, block, of_hidden, of_others, scratch, fresh=False)
    return made


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
    cells = problem.hidden.new_empty(rows * row_stride(problem, columns))
    filled = gathered(problem.hidden, active, filled_up(len(active), 2 * len(active)))
    known = _known_of(problem, upstream, base, log_sum, active)
    return _summed_over_columns(problem, needs, known, filled, cells, rows, columns)


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
        left = int(size)
        known, x, source = _Known(*(column[:left] for column in known)), x[:left], source[:left]
    size = len(known.rows), held.layout.columns
    return _summed_over_columns(problem, needs, known, x, held.own, *size, held, source)


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
    cells: Tensor,
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
    unit = _unit(grown, x, weight)
    factor = factor / unit
    left = left_over_columns(x, base, log_sum, factor, problem.label_smoothing, problem.z_loss)
    scale = torch.ones_like(factor) if left is None else left
    rescaled = x if left is None else scaled(x, left).to(x.dtype)
    of_x = _unfilled(x, filled.shape if needs[0] else (0,), problem.wide, active)
    if needs[1] and held is not None and len(held.lent):
        # Slice by slice, when the logits that lie there have been used up. A view that was made without
        # gradients could not be changed in place, and whoever gets this may want to.
        of_weight = held.lent.view(weight.shape).detach()
        if not len(active):
            of_weight.zero_()
    else:
        of_weight = _unfilled(weight, weight.shape if needs[1] else (0,), weight.dtype, active)
    of_bias = weight.new_zeros(problem.vocab if needs[2] else 0, dtype=problem.wide)
    at_target = torch.zeros_like(factor)
    # A slice that one product writes needs no wider sum.
    sum_dtype = weight.dtype if rows >= len(active) else problem.wide
    scratch = scratch_for(
        laid_out(problem, cells, rows, columns), problem.slab_bytes // 16, sum_cells(problem)
    )
    for number, part in enumerate(parts(problem.vocab if len(active) else 0, columns)):
        total = of_weight[part]
        if needs[1] and sum_dtype != total.dtype:
            total = torch.empty_like(total, dtype=sum_dtype)
        kept = None if held is None else used_slab(problem, held, number, part)
        for block in parts(len(active), rows):
            # With rows of zeros behind the last block, whose logits nobody looks at.
            whole = slice(block.start, min(block.start + rows, len(filled)))
            if kept is None:
                made = laid_out(problem, cells, whole.stop - whole.start, part.stop - part.start)
                _product(problem, filled[whole], part, made)
            else:
                made = kept[: len(active)]
            logits = made[: block.stop - block.start]
            at_target[block] += gradient_over_columns(
                logits if kept is None else kept, wanted[block] - part.start, base[block],
                log_sum[block], factor[block], problem.label_smoothing, problem.z_loss,
                problem.softcap, problem.vocab, scratch, left is not None,
                None if kept is None else source,
            )  # fmt: skip
            if needs[0]:
                add_product(of_x[whole], made, weight[part], scratch, fresh=part.start == 0)
            if needs[1]:
                add_product(total, logits.T, rescaled[block], scratch, fresh=block.start == 0)
            if needs[2]:
                _add_to_bias(problem, of_bias[part], logits, None if left is None else left[block])
        if needs[1] and sum_dtype != of_weight.dtype:
            of_weight[part] = total
    del cells, scratch, rescaled
    of_hidden = x.new_zeros(problem.hidden.shape if needs[0] else 0)
    if needs[0]:
        write_hidden(of_hidden, active, of_x, scale, weight, wanted, at_target)
    del of_x
    if needs[1]:
        add_targets(of_weight, wanted, x, at_target)
    if needs[2]:
        of_bias.index_add_(0, wanted, at_target)
    return Gradients(of_hidden, of_weight, of_bias.to(weight.dtype), unit)


class _Block(NamedTuple):
    """Some rows between two products: which they are, and what ``gradient_over_rows`` made of them.

    Attributes:
        rows: ``[block]``, where they are in the problem.
        x: their hidden states, and rows of zeros to fill a product up.
        slab: the gradient for their logits first, whatever is left of others behind.
        at_target: ``[block]``.
        left: ``[block]`` or ``None``.
    """

    rows: Tensor
    x: Tensor
    slab: Tensor
    at_target: Tensor
    left: Tensor | None


def _block(
    problem: Problem,
    rows: Tensor,
    slab: Tensor,
    weighting: RowLocal,
    with_correct: bool,
    scratch: Tensor,
) -> tuple[_Block, Rows]:
    """The first product over some rows, in the slab, and everything about them."""
    x = gathered(problem.hidden, rows, filled_up(len(rows), len(slab)))
    _product(problem, x, slice(0, problem.vocab), slab[: len(x)])
    done, at_target, left = gradient_over_rows(
        slab[: len(rows)], problem.target[rows], problem.label_smoothing, problem.z_loss,
        problem.softcap, weighting, with_correct, scratch,
    )  # fmt: skip
    return _Block(rows, x, slab, at_target, left), done


def _some_of(problem: Problem, block: _Block, kept: Tensor, scratch: Tensor) -> _Block:
    """Only those rows of a block that are kept, in its slab, whose others are gone."""
    rows, x, slab, at_target, left = block
    if len(kept) == len(rows):
        return block
    move_up(slab, kept, problem.slab_bytes // 16, scratch)
    x = gathered(x, kept, filled_up(len(kept), len(slab)))
    return _Block(rows[kept], x, slab, at_target[kept], None if left is None else left[kept])


def _put(found: Rows, rows: Tensor, done: Rows) -> None:
    for column, values in zip(found, done, strict=True):
        column[rows] = values


def _add_gradients(
    problem: Problem,
    into: Gradients,
    block: _Block,
    of_hidden: Tensor,
    of_others: Tensor,
    scratch: Tensor,
    *,
    fresh: bool,
) -> None:
    """Write the gradient of a block's hidden states, and add to the other two, or set them if fresh.

    Its rows count ``of_hidden`` in the one and ``of_others`` in the other gradients.
    """
    rows, filled, slab, at_target, left = block
    weight, wanted = problem.unembedding, problem.target[rows]
    x, logits = filled[: len(rows)], slab[: len(rows)]
    left = settled(left, logits, x, of_hidden, of_others)
    if into.hidden.numel():
        of_x = weight.new_empty(len(filled), weight.shape[1])
        torch.mm(slab[: len(filled)], weight, out=of_x)  # `@` would follow autocast
        scale = of_hidden if left is None else of_hidden * left
        write_hidden(into.hidden, rows, of_x, scale, weight, wanted, of_hidden * at_target)
    scale, at_target = of_others if left is None else of_others * left, of_others * at_target
    if into.unembedding.numel():
        one = torch.ones_like(into.unit)
        own = _unit(scale, x) if into.unembedding.dtype == problem.wide else one
        rescaled = scaled(x, scale / own).to(x.dtype)
        own = own if x.dtype == torch.float16 else None
        add_product(into.unembedding, logits.T, rescaled, scratch, own, fresh=fresh)
        add_targets(into.unembedding, wanted, x, at_target)
    if into.bias.numel():
        _add_to_bias(problem, into.bias, logits, scale)
        into.bias.index_add_(0, wanted, at_target)


def _forward_then_backward(
    problem: Problem, factor: Tensor, with_correct: bool, every_row: bool, needs: list[bool]
) -> tuple[Rows, Gradients]:
    """Instead of wide sums that the budget does not hold: a fourth product, or logits that are kept."""
    asked = problem if every_row else problem.only(factor != 0)
    if can_hold(asked, needs):
        found, held = forward_held(asked, needs, with_correct, not every_row)
        known = found.base, found.log_sum
        return found, backward_held(asked, factor, *known, needs, held, not every_row)
    found = forward_columns(asked, with_correct)
    return found, backward_columns(asked, factor, found.base, found.log_sum, needs)


def _fill_in(found: Rows, more: Rows, where: Tensor) -> None:
    for column, values in zip(found, more, strict=True):
        torch.where(where, values, column, out=column)


def _product(problem: Problem, x: Tensor, part: slice, out: Tensor) -> None:
    bias = None if problem.bias is None else problem.bias[part]
    logits_of(x, problem.unembedding[part], bias, out)


def _merged(seen: list[ColumnSums]) -> tuple[Tensor, Tensor]:
    """Base and log-sum of whole rows from those of their parts."""
    if len(seen) == 1:
        return seen[0].base, seen[0].log_sum
    bases, sums = (torch.stack([some[i] for some in seen], 1) for i in range(2))
    largest = (bases + sums).argmax(1, keepdim=True)
    base = bases.gather(1, largest)
    return base.squeeze(1), ((bases - base) + sums).logsumexp(1)


def _unit(factor: Tensor, *operands: Tensor) -> Tensor:
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


def _unfilled(like: Tensor, shape: Sequence[int], dtype: torch.dtype, active: Tensor) -> Tensor:
    """Memory that the first product over the active rows will fill; zeros if there is no row."""
    fill = like.new_empty if len(active) else like.new_zeros
    return fill(shape, dtype=dtype)


def _add_to_bias(problem: Problem, total: Tensor, logits: Tensor, scale: Tensor | None) -> None:
    """``total += scale @ logits``, by parts that are widened first; a GPU widens what it sums itself."""
    if scale is None and logits.is_cuda:
        total += logits.sum(0, dtype=total.dtype)
        return
    scale = total.new_ones(len(logits)) if scale is None else scale
    size = logits.shape[1] * total.dtype.itemsize
    for part in parts(len(logits), problem.slab_bytes // 32 // size):
        total.addmv_(logits[part].to(total.dtype).T, scale[part])
