"""What is done to a slab of logits between two matrix products: softmax, loss, gradient.

Three functions over a slab ``[rows columns]``, in torch operations. They walk over tiles of rows that
stay in the cache, in a scratch of the wide dtype that the caller holds, and leave the slab as it is
until the gradient is written over it. ``triton_softmax.py`` has the same three as GPU kernels.

The gradient's entry at the target is written as 0 and given back by itself, ``at_target``. It is a
row's largest entry and the only one that a rank-one update, rows × dim, can add to both products in
the wide dtype: so the target's part of a gradient is rounded once, at the end.

Logits of an ordinary size are neither shifted by their largest nor divided by their sum: a slab of
``exp(z)`` takes two passes where a softmax takes four, and what is left to multiply its rows with, the
reciprocal of the sum, is for the caller to fold into a factor of rows × dim.
"""

import functools
import importlib.util
import math
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.problem import RowLocal, Rows, wide_dtype


# Tiles of this size are still in the cache when the next operation comes to them.
_TILE_BYTES = 4 * 2**20
# The log-sum-exp of some columns is told by the most probable of the first so many, or if that is less
# probable than this, by the most probable of all: the rounding of its log-probability is the error.
_SAMPLE = 64
_COARSE = math.exp(-8.0)
# A target tells its own row's unless its probability is near to underflow.
_TINY = math.exp(-30.0)
# Exponentials of logits are summed as they are if the log of the sum is no further from 0: no term that
# counts overflows or underflows then, in products with other operands neither.
_MOST_LOG_SUM = 32.0
# What rows are still to be multiplied with is divided out of the slab if it would be less than this.
_LEAST_LEFT = 2.0**-100
# Row-local weights that look at every probability of a row.
_WHOLE_ROW = ("entropy", "el2n")


class ColumnSums(NamedTuple):
    """What a slab of some columns tells of its rows, ``[rows]``; ``best`` and ``total`` on demand.

    Attributes:
        base: a logit, or near to it.
        log_sum: the log-sum-exp of the logits less their base, −inf if all logits are.
        chosen: the target's logit, 0 where the target is not among the columns.
        best: the largest logit.
        best_at: the first column that has it.
        total: the sum of the logits.
    """

    base: Tensor
    log_sum: Tensor
    chosen: Tensor
    best: Tensor
    best_at: Tensor
    total: Tensor


def scratch_for(logits: Tensor, most_bytes: int, least: int = 0) -> Tensor:
    """Memory for the tiles of a slab, at least a row; and at least so many cells for other uses."""
    rows, columns = logits.shape
    wide = wide_dtype(logits.dtype)
    if _kernels(logits) is not None:
        return logits.new_empty(least, dtype=wide)
    step = max(1, min(rows, min(most_bytes, _TILE_BYTES) // max(1, columns * wide.itemsize)))
    return logits.new_empty(max(step * columns, least), dtype=wide)


def reduce_columns(
    logits: Tensor,
    wanted: Tensor,
    softcap: float,
    with_best: bool,
    with_sum: bool,
    scratch: Tensor,
) -> ColumnSums:
    """Log-sum-exp and the target's logit; ``wanted`` counts from the slab's first column."""
    kernels = _kernels(logits)
    if kernels is not None:
        return ColumnSums(*kernels.reduce_columns(logits, wanted, softcap, with_best, with_sum))
    rows, columns = logits.shape
    base, log_sum, chosen = (logits.new_empty(rows, dtype=scratch.dtype) for _ in range(3))
    best = logits.new_empty(rows if with_best else 0, dtype=scratch.dtype)
    best_at = wanted.new_empty(rows if with_best else 0)
    total = logits.new_empty(rows if with_sum else 0, dtype=scratch.dtype)
    inside, column = _within(wanted, columns)
    for tile in _tiles(logits, scratch):
        slab = logits[tile]
        z, out = _widened(slab, softcap, scratch)
        chosen[tile] = _at(z, column[tile])
        if with_best:
            best[tile], best_at[tile] = _first_max(z)
        if with_sum:
            total[tile] = z.sum(1)
        sample = z[:, :_SAMPLE].clone()
        p, whole = _exponentials(z, out, slab, softcap)
        base[tile], log_sum[tile] = _anchored(sample, p, whole, slab, softcap)
    return ColumnSums(base, log_sum, torch.where(inside, chosen, 0), best, best_at, total)


def gradient_over_rows(
    logits: Tensor,
    wanted: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    weighting: RowLocal,
    with_correct: bool,
    scratch: Tensor,
) -> tuple[Rows, Tensor, Tensor | None]:
    """Everything about rows of the whole vocabulary, ``dℓ/dz`` at each row's target, and what is left.

    The slab's rows, multiplied with what is left (1 if ``None``), are ``dℓ/dz``. That, and what a row
    counts, is for the caller to multiply with, in rows × dim.
    """
    kernels = _kernels(logits)
    if kernels is not None:
        *seen, at_target = kernels.gradient_over_rows(
            logits, wanted, label_smoothing, z_loss, softcap, *weighting, with_correct
        )
        return Rows(*seen), at_target, None
    rows, vocab = logits.shape
    divided = label_smoothing > 0 or weighting.kind in _WHOLE_ROW
    chosen, p_target, p_others, base, log_sum, mean = (
        logits.new_empty(rows, dtype=scratch.dtype) for _ in range(6)
    )
    correct, weight = torch.zeros_like(wanted, dtype=torch.bool), torch.ones_like(chosen)
    left = torch.ones_like(chosen)
    for tile in _tiles(logits, scratch):
        column, slab = wanted[tile], logits[tile]
        z, out = _widened(slab, softcap, scratch)
        chosen[tile] = own = _at(z, column)
        if with_correct:
            correct[tile] = _first_max(z)[1] == column
        if label_smoothing:
            mean[tile] = z.mean(1)
        told = _by_target_and_others(z, out, column, slab, softcap, divided)
        p, of_own, of_others, whole = told
        p_target[tile], p_others[tile] = of_own, of_others
        row_base, row_sum = _by_target(own, *told, slab, softcap)
        base[tile], log_sum[tile] = row_base, row_sum
        if weighting.kind != "none":
            weight[tile] = _local_weight(weighting, p, column, of_own, of_others)
        over_row = 1 / whole
        if z_loss:
            over_row *= 1 + 2 * z_loss * (row_base + row_sum)
        if label_smoothing:
            p.mul_(over_row.unsqueeze(1)).sub_(label_smoothing / vocab)
        else:
            left[tile] = over_row
        _write_gradient(slab, p, column, None, None, softcap)
    loss = ce = (base - chosen) + log_sum
    if label_smoothing:
        loss = torch.lerp(ce, (base - mean) + log_sum, label_smoothing)
    lse = base + log_sum
    if z_loss:
        loss = loss + z_loss * lse.square()
    at_target = _gradient_at_target(
        p_target, p_others, chosen, lse, label_smoothing, z_loss, softcap, vocab
    )
    return Rows(loss, ce, base, log_sum, correct, weight), at_target, left


def settled(left: Tensor | None, slab: Tensor, *factors: Tensor) -> Tensor | None:
    """What is left, or ``None`` if a factor is so small that the slab's rows had better be multiplied."""
    if left is None:
        return None
    fits = [((factor * left).abs() >= _LEAST_LEFT) | (factor == 0) for factor in factors]
    if bool(torch.stack(fits).all()):
        return left
    slab.mul_(left.unsqueeze(1))
    return None


def left_over_columns(
    logits: Tensor,
    base: Tensor,
    log_sum: Tensor,
    factor: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor | None:
    """What the rows that ``gradient_over_columns`` makes are to be multiplied with, whatever the columns.

    ``None``, if that is 1, because the slab's rows are multiplied with it already: by a kernel, or
    where exponentials of logits as they are would not do.
    """
    if _kernels(logits) is not None or logits.dtype == torch.float16 or label_smoothing:
        return None
    lse = base + log_sum
    left = factor * torch.exp(-base) * torch.exp(-log_sum)
    if z_loss:
        left = left * (1 + 2 * z_loss * lse)
    # Nothing is left of rows whose factor is 0.
    fits = (lse.abs() <= _MOST_LOG_SUM) & ((left.abs() >= _LEAST_LEFT) | (factor == 0))
    return left if bool(fits.all()) else None


def gradient_over_columns(
    logits: Tensor,
    wanted: Tensor,
    base: Tensor,
    log_sum: Tensor,
    factor: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    vocab: int,
    scratch: Tensor,
    is_left: bool,
) -> Tensor:
    """The slab of some columns becomes ``factor · dℓ/dz``; gives the gradient at the target.

    ``base`` and ``log_sum`` are the whole rows'. ``wanted`` counts from the slab's first column; 0 is
    given where it is not in the slab. With ``is_left`` the slab's rows are still to be multiplied with what
    ``left_over_columns`` has given for them.
    """
    kernels = _kernels(logits)
    if kernels is not None:
        return kernels.gradient_over_columns(
            logits, wanted, base, log_sum, factor, label_smoothing, z_loss, softcap, vocab
        )
    chosen, lse = torch.empty_like(factor), base + log_sum
    inside, column = _within(wanted, logits.shape[1])
    growth = 1 + 2 * z_loss * lse if z_loss else None
    for tile in _tiles(logits, scratch):
        slab = logits[tile]
        z, out = _widened(slab, softcap, scratch)
        chosen[tile] = _at(z, column[tile])
        over_row = None
        if is_left:
            p = torch.exp(z, out=slab if z is slab else out)
        else:
            # A softmax over these columns, times their share of the whole.
            sample = z[:, :_SAMPLE].clone()
            p = torch.softmax(z, 1, out=out)
            own_base, own_sum = _anchored(sample, p, torch.ones_like(base[tile]), slab, softcap)
            over_row = ((own_base - base[tile]) + (own_sum - log_sum[tile])).exp_()
            if growth is not None:
                over_row *= growth[tile]
            if label_smoothing:
                p.mul_(over_row.unsqueeze(1)).sub_(label_smoothing / vocab)
                over_row = 1
            over_row = over_row * factor[tile]
        _write_gradient(slab, p, column[tile], inside[tile], over_row, softcap)
    log_p = (chosen - base) - log_sum
    at_target = factor * _gradient_at_target(
        log_p.exp(), -log_p.expm1(), chosen, lse, label_smoothing, z_loss, softcap, vocab
    )
    return torch.where(inside, at_target, 0)


def _gradient_at_target(
    p: Tensor,
    p_others: Tensor,
    chosen: Tensor,
    lse: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    vocab: int,
) -> Tensor:
    """``dℓ/dz`` at each row's target, whose probability is ``p``, and ``1 − p`` that of the others.

    ``dℓ/dz_v = (1 + 2 · z_loss · lse) p_v − (1 − ε) [v = y] − ε / V``, times the softcap's slope
    ``1 − tanh²``.
    """
    out = -p_others
    if z_loss:
        out = out + p * (2 * z_loss * lse)
    if label_smoothing:
        out = out + label_smoothing * (1 - 1 / vocab)
    return out * (1 - (chosen / softcap).square()) if softcap else out


def _write_gradient(
    slab: Tensor,
    p: Tensor,
    column: Tensor,
    inside: Tensor | None,
    over_row: Tensor | None,
    softcap: float,
) -> None:
    """``dℓ/dz`` from that of the capped logits, ``p``, times ``over_row``, with 0 at the target."""
    if softcap:
        # Where the dtypes agree the slab itself is used up: it is written over below.
        p.mul_(1 - slab.to(p.dtype).div_(softcap).tanh_().square_())
    index = column.unsqueeze(1)
    if inside is None:
        p.scatter_(1, index, 0.0)
    else:
        p.scatter_(1, index, p.gather(1, index).masked_fill_(inside.unsqueeze(1), 0.0))
    if over_row is None:
        if p is not slab:
            slab.copy_(p)
    elif p.dtype == slab.dtype:
        torch.mul(p, over_row.unsqueeze(1), out=slab)
    else:
        slab.copy_(p.mul_(over_row.unsqueeze(1)))


def _local_weight(
    weighting: RowLocal, p: Tensor, column: Tensor, p_target: Tensor, p_others: Tensor
) -> Tensor:
    """A row's weight by its own probabilities: see ``row_local.RowLocalWeights``."""
    kind, power = weighting
    if kind == "dft":
        score = p_target
    elif kind == "focal":
        score = p_others
    elif kind == "entropy":
        # Not as lse − Σ p z, whose terms are as large as the logits.
        score = -torch.xlogy(p, p).sum(1)
    else:
        # Without the target, whose square would swallow the others'; it is written apart anyway.
        p.scatter_(1, column.unsqueeze(1), 0.0)
        score = (_dot(p, p) + p_others.square()).sqrt()
    return score.clamp(min=0).pow(power)


def _widened(slab: Tensor, softcap: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Capped logits in the wide dtype, and where the next result goes: the scratch, either way."""
    out = scratch[: slab.numel()].view(slab.shape)
    if softcap:
        return out.copy_(slab).div_(softcap).tanh_().mul_(softcap), out
    return (slab if slab.dtype == out.dtype else out.copy_(slab)), out


def _exponentials(z: Tensor, out: Tensor, slab: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Each row's probabilities times the second result: exponentials and their sum, or a softmax and 1.

    ``z`` are the slab's logits as ``_widened`` gives them.
    """
    if slab.dtype != torch.float16:
        whole = torch.exp(z, out=out).sum(1)
        if _ordinary(whole):
            return out, whole
        z, out = _widened(slab, softcap, out.flatten())
    return torch.softmax(z, 1, out=out), out.new_ones(len(out))


def _by_target_and_others(
    z: Tensor, out: Tensor, column: Tensor, slab: Tensor, softcap: float, divided: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities of the target and of all others, between those that ``_exponentials`` gives.

    The others are summed by themselves, for what is left of 1 by a probable target would be its rounding;
    the target's entry becomes 0. Not with ``divided``, which asks for the softmax of whole rows.
    """
    if not divided and slab.dtype != torch.float16:
        index = column.unsqueeze(1)
        own = _at(torch.exp(z, out=out), column)
        others = out.scatter_(1, index, 0.0).sum(1)
        whole = own + others
        if _ordinary(whole):
            return out, own / whole, others / whole, whole
        z, out = _widened(slab, softcap, out.flatten())
    own = _at(torch.softmax(z, 1, out=out), column)
    return out, own, 1 - own, torch.ones_like(own)


def _ordinary(whole: Tensor) -> bool:
    """Whether the sums of exponentials are such as ``_MOST_LOG_SUM`` says; not if one is NaN."""
    low, high = torch.aminmax(whole)
    return math.exp(-_MOST_LOG_SUM) <= float(low) and float(high) <= math.exp(_MOST_LOG_SUM)


def _anchored(
    sample: Tensor, p: Tensor, whole: Tensor, slab: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """A probable logit of each row, and the log-sum-exp less that: ``−log p`` of that logit.

    ``p / whole`` are probabilities over the slab's columns, ``sample`` the logits of the first ones.
    Rows of −inf have base 0 and log-sum −inf, and their probabilities become 0.
    """
    best, at = p[:, : sample.shape[1]].max(1)
    base, told = _at(sample, at), best / whole
    if bool(told.amin() >= _COARSE):
        return base, 0 - told.log()
    where = (~(told >= _COARSE)).nonzero().squeeze(1)
    base[where], told[where] = _most_probable(where, p, whole, slab, softcap)
    log_sum = 0 - told.log()
    masked = base == -torch.inf
    base[masked], log_sum[masked], p[masked] = 0, -torch.inf, 0
    return base, log_sum


def _by_target(
    chosen: Tensor,
    p: Tensor,
    p_target: Tensor,
    p_others: Tensor,
    whole: Tensor,
    slab: Tensor,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The same as the target tells it, which has logit ``chosen``: ``log(1 + others / target)``."""
    log_sum = torch.log1p(p_others / p_target)
    if bool(p_target.amin() >= _TINY):
        return chosen, log_sum
    where = (~(p_target >= _TINY)).nonzero().squeeze(1)
    base = chosen.clone()
    base[where], told = _most_probable(where, p, whole, slab, softcap)
    log_sum[where] = 0 - told.log()
    return base, log_sum


def _most_probable(
    where: Tensor, p: Tensor, whole: Tensor, slab: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """The largest logit of some rows and its probability."""
    best, at = p[where].max(1)
    logit = slab[where, at].to(p.dtype)
    return (torch.tanh(logit / softcap) * softcap if softcap else logit), best / whole[where]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("rv, rv -> r", a, b)


def _within(wanted: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    inside = (wanted >= 0) & (wanted < columns)
    return inside, torch.where(inside, wanted, 0)


def _at(rows: Tensor, column: Tensor) -> Tensor:
    return rows.gather(1, column.unsqueeze(1)).squeeze(1)


def _first_max(z: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry and the first column that has it."""
    at = z.argmax(1)
    return _at(z, at), at


def _tiles(logits: Tensor, scratch: Tensor) -> Iterator[slice]:
    """Slices of as many rows as the scratch holds."""
    rows, columns = logits.shape
    step = max(1, len(scratch) // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _kernels(logits: Tensor) -> ModuleType | None:
    """The Triton kernels, for a slab that they can take."""
    if logits.is_cuda and logits.dtype != torch.float64:
        return _triton_softmax()
    return None


@functools.cache
def _triton_softmax() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from wmtp import triton_softmax

    return triton_softmax
