"""Which walk a call takes. Every choice made from sizes, the device or the kind of call is made here.

The cost of a walk is counted in matrix products over all rows. ρ is the share of rows whose loss has a
non-zero upstream gradient, ε the share of rows whose guess was wrong.

    cost         walk                                     taken when
    1            forward_columns                          no gradient is wanted
    3ρ           forward_backward_rows                    each row's factor is known beforehand, or follows
                                                          from its own logits; but not ``losses_first``
    1 + 2ρ       forward_held, then backward_held         ``keeps_logits``: a GPU with room for the logits
    1 + 2ρ + 3ε  forward_guessing_rows, corrected_rows    a selection that ``can_guess``, logits not kept
    1 + 3ρ       forward_columns, then backward_columns   none of the above

Where the rows that matter are known before the first product, its 1 becomes ρ too. Row-local weights take
``forward_backward_rows`` even when no gradient is wanted (one product), except on a GPU when the cross
entropy alone determines them.

Nothing here reads the values of a tensor. The walks themselves are in ``slab_columns.py`` and
``slab_rows.py``. ``forward_backward_rows`` asks once more, in ``sums_by_rows``, when it knows how many rows
there are.
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
    return not torch.compiler.is_compiling() and all(map(_checks.has_values, tensors))


def losses_first(problem: Problem) -> bool:
    """Whether to compute the losses before their factors, even if the factors are already known.

    That is so where enough logits are kept for the backward pass; and on a GPU where no gradient is
    wanted, because the only product can then start before the factors are computed.
    """
    if not is_eager(problem):
        return False
    needs = needs_of(problem)
    if any(needs):
        return can_hold(problem, needs) and holds_better(problem, needs)
    return problem.hidden.is_cuda


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
    """Whether kept logits are faster than gradients made in the forward pass, where both are possible.

    Gradients in the forward pass take three products if the budget holds their wide sums (or the
    unembedding's is not wanted), and then win unless most logits are kept. Otherwise they take four, and
    every slab that is kept saves part of the fourth.
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
