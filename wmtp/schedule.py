"""Which walk a call takes: everything that sizes, device and who is asking decide, in one place.

    products     walk                                         taken
    1            forward_columns                              if no gradient is asked for
    3ρ           forward_backward_rows                        if what a row counts is known, or its own
                                                              logits tell, but not if ``losses_first``
    1 + 2ρ       forward_held, backward_held                  by everything else where ``keeps_logits``
    1 + 2ρ + 3ε  forward_guessing_rows, corrected_rows        by a selection that ``can_guess``, elsewhere
    1 + 3ρ       forward_columns, backward_columns            by whatever is left

A product is one over all rows, ρ the share of rows that count, ε that of wrong guesses; 1 is ρ where it is
known beforehand what counts. Weights that a row gives itself take ``forward_backward_rows`` in evaluation
too, for one product, but not on a GPU if their cross entropy tells them.

Nothing here reads a number in a tensor. The walks are in ``slab_columns.py`` and ``slab_rows.py``; one that
has waited for the number of rows to do asks ``sums_by_rows``.
"""

from collections.abc import Sequence

import torch

from wmtp import _checks
from wmtp.problem import NOT_LOCAL, Problem, RowLocal
from wmtp.slab_layout import held_layout, most_rows


# So much of the logits must be kept where gradients can be summed in the forward pass.
_SHARE_WORTHWHILE = 0.75
# More slabs than this and guessing their factors takes a time of its own.
_MOST_GUESSES = 256


def needs_of(problem: Problem) -> list[bool]:
    """Which gradients are asked for: of hidden states, unembedding, bias."""
    grad = torch.is_grad_enabled()
    return [grad and tensor is not None and tensor.requires_grad for tensor in problem[:3]]


def is_eager(problem: Problem) -> bool:
    """Whether the numbers of a problem are there: no compiler, no transform."""
    tensors = [tensor for tensor in problem[:4] if tensor is not None]
    return not torch.compiler.is_compiling() and all(map(_checks.is_plain, tensors))


def losses_first(problem: Problem) -> bool:
    """Whether to ask for losses before what they count, even where that is known.

    Where enough logits are kept; and on a GPU where no gradient is wanted, so that the one product that
    there is begins sooner.
    """
    needs = needs_of(problem)
    if not is_eager(problem):
        return False
    if can_hold(problem, needs):
        return holds_better(problem, needs)
    return problem.hidden.is_cuda and not any(needs)


def keeps_logits(problem: Problem) -> bool:
    """Whether logits are kept for the backward pass: in eager mode, where ``can_hold``."""
    return is_eager(problem) and can_hold(problem, needs_of(problem))


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


def can_guess(problem: Problem, needs: Sequence[bool]) -> bool:
    """Whether ``forward_guessing_rows`` has the memory it wants, and few enough guesses to make."""
    if not any(needs) or not problem.holds_wide(needs):
        return False
    return len(problem.target) <= _MOST_GUESSES * most_rows(problem, needs, problem.wide)


def gradient_dtype(problem: Problem, needs: Sequence[bool], weighting: RowLocal) -> torch.dtype:
    """In which dtype gradients made in the forward pass wait for the upstream gradient.

    Wide, if the budget holds that. But not on a GPU whose budget holds the logits of all rows instead, so
    that nothing is summed: one product writes the unembedding's gradient, and wide sums take as long as a
    part of one. Weights that a row gives itself may all be tiny, and only their sum, the denominator, says
    so: their gradients are never narrowed before.
    """
    narrow = problem.hidden.dtype
    if weighting != NOT_LOCAL:
        return problem.wide
    gpu, rows = problem.hidden.is_cuda, problem.hidden.shape[0]
    if gpu and needs[1] and rows <= most_rows(problem, needs, narrow):
        return narrow
    return problem.wide if problem.holds_wide(needs) else narrow


def sums_by_rows(problem: Problem, needs: Sequence[bool], dtype: torch.dtype, rows: int) -> bool:
    """Whether gradients of so many rows, in ``gradient_dtype``, can be summed in the forward pass.

    Narrow ones cannot where one slab is not all, or it is not known yet how large z-loss makes them.
    """
    if dtype == problem.wide:
        return True
    parted = needs[1] and rows > most_rows(problem, needs, dtype)
    return not (parted or (dtype == torch.float16 and problem.z_loss))
