"""Walks over the predictions: slabs of whole rows of the logits, gradients made in the same pass.

A slab is made by one product, finished by ``slab_softmax.py``, and used by up to two more
(``products.py``), whose sums wait for the upstream gradient.

* ``forward_backward_rows``: for a factor per row that is known beforehand or that the row itself
  determines. Three products in all, for the rows whose factor is not zero.
* ``forward_guessing_rows``, then ``corrected_rows``: for factors that are known only when all losses are,
  but can be guessed from the losses so far. One product for all rows, two for those with a guess, three
  for those whose guess was wrong.

Rows without a target (``target < 0``) enter no product. Plain functions of tensors: gradients and
``torch.compile`` are the business of ``operators.py``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.problem import NOT_LOCAL, Gradients, Problem, RowLocal, Rows
from wmtp.products import add_product, filled_up, gathered, move_up, parts
from wmtp.schedule import can_hold, gradient_dtype, sums_by_rows
from wmtp.slab_columns import (
    add_to_bias,
    backward_columns,
    backward_held,
    forward_columns,
    forward_held,
    product_of,
    put,
    rows_of,
    unfilled,
    unit_of,
)
from wmtp.slab_layout import row_slab
from wmtp.slab_softmax import applied_if_large, gradient_over_rows
from wmtp.target_rows import add_targets, scaled, write_hidden


# Rows whose largest hidden number is more than so many times the median of all are not guessed.
_MOST_SIZE = 8
# A guess that is wrong by so many roundings is right.
_NEAR = 8


# From the cross entropy of the rows that have been seen, and which these are, what they will count.
Guess = Callable[[Tensor, Tensor], Tensor]


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
    see ``unit_of``.
    """
    found = problem.empty_rows()
    has_target = problem.target >= 0
    weighted = has_target if weighting != NOT_LOCAL else has_target & (factor != 0)
    active = rows_of(problem, weighted)
    dtype = gradient_dtype(problem, needs, weighting)
    if not sums_by_rows(problem, needs, dtype, len(active)):
        return _forward_then_backward(problem, factor, with_correct, every_row, needs)
    hidden, weight = problem.hidden, problem.unembedding
    factor, unit = factor.to(problem.wide), factor.new_ones((), dtype=problem.wide)
    if dtype == torch.float16:
        unit = unit_of(factor[active], hidden[active], weight)
        factor = factor / unit
    of_hidden = hidden.new_zeros(hidden.shape if needs[0] else 0, dtype=dtype)
    of_weight = unfilled(weight, weight.shape if needs[1] else (0,), dtype, active)
    of_bias = weight.new_zeros(problem.vocab if needs[2] else 0, dtype=problem.wide)
    into = Gradients(of_hidden, of_weight, of_bias, unit)
    _sum_blocks(problem, active, needs, factor, weighting, with_correct, found, into)
    if every_row:
        # In what the sums leave of the budget.
        excess = problem.wide_excess(needs) if dtype == problem.wide else 0
        budget = max(problem.slab_bytes - excess, problem.row_bytes)
        others = problem.only(~weighted)._replace(slab_bytes=budget)
        _fill_in(found, forward_columns(others, with_correct), ~weighted)
    return found, Gradients(of_hidden, of_weight, of_bias.to(dtype), unit)


def forward_guessing_rows(
    problem: Problem, guess: Guess, with_correct: bool, needs: list[bool]
) -> tuple[Rows, Gradients, Tensor]:
    """Rows, the gradients of ``Σ guessed · loss``, and ``guessed``, the factor guessed for each row.

    For a selection such as "the 60 % with the highest excess loss", which is known only when all losses
    are. Slab by slab, the losses so far stand for the whole batch: the selection is applied to them, and
    the slab's rows that it keeps get their gradient at once. Each slab takes every n-th row, so that its
    rows are a fair sample. ``corrected_rows`` repairs wrong guesses in the backward pass.

    The factor is guessed 0, which never has to be taken back, for rows whose loss is not finite or whose
    hidden state is far larger than the others'.
    """
    found = problem.empty_rows()
    active = rows_of(problem, problem.target >= 0)
    hidden, weight, dtype = problem.hidden, problem.unembedding, problem.wide
    into = Gradients(
        hidden.new_zeros(hidden.shape if needs[0] else 0, dtype=dtype),
        unfilled(weight, weight.shape if needs[1] else (0,), dtype, active),
        weight.new_zeros(problem.vocab if needs[2] else 0, dtype=dtype),
        hidden.new_ones((), dtype=dtype),
    )
    guessed, seen = torch.zeros_like(found.loss), torch.zeros_like(found.correct)
    size = hidden.abs().amax(1)
    # What a row of these adds could not be taken back without rounding what others have added.
    sure = size <= _MOST_SIZE * size[active].nanmedian() if len(active) else seen
    slab, scratch = row_slab(problem, len(active), needs, dtype)
    slabs = -(-len(active) // max(1, len(slab)))
    for first in range(slabs):
        block, done = _block(problem, active[first::slabs], slab, NOT_LOCAL, with_correct, scratch)
        put(found, block.rows, done)
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
    """Turn the gradients of ``Σ guessed · loss``, in place, into those of ``Σ factor · loss``.

    Adds ``(factor − guessed) · ∂loss`` for the rows where the two differ by more than rounding. If there
    are more of these than rows with a non-zero factor, or a sum is not finite, all gradients are made anew.
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
    slab, scratch = row_slab(problem, len(active), needs, problem.wide)
    for some in parts(len(active), len(slab)):
        block, _ = _block(problem, active[some], slab, NOT_LOCAL, False, scratch)
        of_hidden, of_others = factor[block.rows], (factor - guessed)[block.rows]
        # What was written for hidden states is written anew, what was added for others is added to.
        _add_gradients(problem, made, block, of_hidden, of_others, scratch, fresh=False)
    return made


def _sum_blocks(
    problem: Problem,
    active: Tensor,
    needs: list[bool],
    factor: Tensor,
    weighting: RowLocal,
    with_correct: bool,
    found: Rows,
    into: Gradients,
) -> None:
    """Fill in what is found of the active rows, slab by slab, and add up their gradients.

    A function of its own, so that slab and scratch are gone before anything else is asked for.
    """
    slab, scratch = row_slab(problem, len(active), needs, into.hidden.dtype)
    for some in parts(len(active), len(slab)):
        block, done = _block(problem, active[some], slab, weighting, with_correct, scratch)
        put(found, block.rows, done)
        scale = factor[block.rows] * done.weight
        _add_gradients(problem, into, block, scale, scale, scratch, fresh=some.start == 0)


class _Block(NamedTuple):
    """Some rows between two products: which they are, and what ``gradient_over_rows`` made of them.

    Attributes:
        rows: ``[block]``, where they are in the problem.
        x: their hidden states, and rows of zeros to fill a product up.
        slab: the gradient for their logits first; the rows behind are of earlier blocks.
        at_target: ``[block]``, the gradient at the target, which is 0 in the slab.
        row_scale: ``[block]``, what the slab's rows are still to be multiplied by; ``None`` means 1.
    """

    rows: Tensor
    x: Tensor
    slab: Tensor
    at_target: Tensor
    row_scale: Tensor | None


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
    product_of(problem, x, slice(0, problem.vocab), slab[: len(x)])
    done, at_target, row_scale = gradient_over_rows(
        slab[: len(rows)], problem.target[rows], problem.label_smoothing, problem.z_loss,
        problem.softcap, weighting, with_correct, scratch,
    )  # fmt: skip
    return _Block(rows, x, slab, at_target, row_scale), done


def _some_of(problem: Problem, block: _Block, kept: Tensor, scratch: Tensor) -> _Block:
    """Only those rows of a block that are kept, in its slab, whose others are gone."""
    rows, x, slab, at_target, row_scale = block
    if len(kept) == len(rows):
        return block
    move_up(slab, kept, problem.scratch_bytes, scratch)
    x = gathered(x, kept, filled_up(len(kept), len(slab)))
    return _Block(
        rows[kept], x, slab, at_target[kept], None if row_scale is None else row_scale[kept]
    )


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
    rows, filled, slab, at_target, row_scale = block
    weight, wanted = problem.unembedding, problem.target[rows]
    x, logits = filled[: len(rows)], slab[: len(rows)]
    row_scale = applied_if_large(row_scale, logits, x, of_hidden, of_others)
    if into.hidden.numel():
        of_x = weight.new_empty(len(filled), weight.shape[1])
        torch.mm(slab[: len(filled)], weight, out=of_x)  # `@` would follow autocast
        scale = of_hidden if row_scale is None else of_hidden * row_scale
        write_hidden(into.hidden, rows, of_x, scale, weight, wanted, of_hidden * at_target)
    scale, at_target = (
        of_others if row_scale is None else of_others * row_scale,
        of_others * at_target,
    )
    if into.unembedding.numel():
        one = torch.ones_like(into.unit)
        own = unit_of(scale, x) if into.unembedding.dtype == problem.wide else one
        rescaled = scaled(x, scale / own).to(x.dtype)
        own = own if x.dtype == torch.float16 else None
        add_product(into.unembedding, logits.T, rescaled, scratch, own, fresh=fresh)
        add_targets(into.unembedding, wanted, x, at_target)
    if into.bias.numel():
        add_to_bias(problem, into.bias, logits, scale)
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
