"""What is done to a slab of logits between two matrix products: softmax, loss, gradient.

Three functions over a slab ``[rows columns]``, in torch operations. They walk over tiles of rows that
stay in the cache, in a scratch of the wide dtype that the caller holds, and leave the slab as it is
until the gradient is written over it. ``triton_softmax.py`` has the same three as GPU kernels.

The gradient's entry at the target is written as 0 and given back by itself, ``at_target``. It is a
row's largest entry and the only one that a rank-one update, rows × dim, can add to both products in
the wide dtype: so the target's part of a gradient is rounded once, at the end.
"""

import functools
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.problem import RowLocal, Rows, wide_dtype


# Tiles of this size are still in the cache when the next operation comes to them.
_TILE_BYTES = 8 * 2**20
# A log-probability below this is too coarse to tell the log-sum-exp by.
_COARSE = 30.0


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


def scratch_for(logits: Tensor, most_bytes: int) -> Tensor:
    """Memory for the tiles of a slab: at least a row."""
    rows, columns = logits.shape
    wide = wide_dtype(logits.dtype)
    if _kernels(logits) is not None:
        return logits.new_empty(0, dtype=wide)
    step = max(1, min(rows, min(most_bytes, _TILE_BYTES) // max(1, columns * wide.itemsize)))
    return logits.new_empty(step * columns, dtype=wide)


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
        z, out = _widened(logits[tile], softcap, scratch)
        chosen[tile] = torch.where(inside[tile], _at(z, column[tile]), 0)
        if with_best:
            best[tile], best_at[tile] = _first_max(z)
        if with_sum:
            total[tile] = z.sum(1)
        # The fastest pass that torch has; any column tells the sum, z − log p.
        first = z[:, 0].clone()
        log_p = torch.log_softmax(z, 1, out=out)[:, 0]
        base[tile], log_sum[tile] = _normaliser(first, log_p, logits[tile], softcap)
    return ColumnSums(base, log_sum, chosen, best, best_at, total)


def gradient_over_rows(
    logits: Tensor,
    wanted: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    weighting: RowLocal,
    with_correct: bool,
    scratch: Tensor,
) -> tuple[Rows, Tensor]:
    """Everything about rows of the whole vocabulary, and ``dℓ/dz`` at each row's target.

    The slab becomes ``dℓ/dz``: what a row counts is for the caller to multiply with, in rows × dim.
    """
    kernels = _kernels(logits)
    if kernels is not None:
        *seen, at_target = kernels.gradient_over_rows(
            logits, wanted, label_smoothing, z_loss, softcap, *weighting, with_correct
        )
        return Rows(*seen), at_target
    loss, ce, base, log_sum, at_target = (
        logits.new_empty(len(logits), dtype=scratch.dtype) for _ in range(5)
    )
    correct, weight = torch.zeros_like(wanted, dtype=torch.bool), torch.ones_like(loss)
    for tile in _tiles(logits, scratch):
        column, slab = wanted[tile], logits[tile]
        z, out = _widened(slab, softcap, scratch)
        chosen = _at(z, column)
        if with_correct:
            correct[tile] = _first_max(z)[1] == column
        mean = z.mean(1) if label_smoothing else None
        p = torch.softmax(z, 1, out=out)
        p_target = _at(p, column)
        log_p = p_target.log()
        base[tile], log_sum[tile] = _normaliser(chosen, log_p, slab, softcap)
        row_base, row_sum = base[tile], log_sum[tile]
        row_ce = (row_base - chosen) + row_sum
        total = row_ce
        if mean is not None:
            total = torch.lerp(row_ce, (row_base - mean) + row_sum, label_smoothing)
        lse = row_base + row_sum
        if z_loss:
            total = total + z_loss * lse.square()
        if weighting.kind != "none":
            weight[tile] = _local_weight(weighting, p, column, p_target)
        loss[tile], ce[tile] = total, row_ce
        at_target[tile] = _write_gradient(
            slab, p, None, column, None, p_target, chosen, lse, None,
            label_smoothing, z_loss, softcap, logits.shape[1],
        )  # fmt: skip
    return Rows(loss, ce, base, log_sum, correct, weight), at_target


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
) -> Tensor:
    """The slab of some columns becomes ``factor · dℓ/dz``; gives the gradient at the target.

    ``base`` and ``log_sum`` are the whole rows'. ``wanted`` counts from the slab's first column; 0 is
    given where it is not in the slab.
    """
    kernels = _kernels(logits)
    if kernels is not None:
        return kernels.gradient_over_columns(
            logits, wanted, base, log_sum, factor, label_smoothing, z_loss, softcap, vocab
        )
    at_target = torch.empty_like(factor)
    inside, column = _within(wanted, logits.shape[1])
    for tile in _tiles(logits, scratch):
        slab, row_base, row_sum = logits[tile], base[tile], log_sum[tile]
        z, out = _widened(slab, softcap, scratch)
        chosen, first = _at(z, column[tile]), z[:, 0].clone()
        # Softmax over these columns, times their share of the whole: torch's exp takes longer.
        p = torch.softmax(z, 1, out=out)
        log_p = p[:, 0].log()
        own_base, own_sum = _normaliser(first, log_p, slab, softcap)
        masked = own_sum == -torch.inf
        if bool(masked.any()):
            p[masked] = 0
        share = ((own_base - row_base) + (own_sum - row_sum)).exp()
        p_target = ((chosen - row_base) - row_sum).exp()
        at_target[tile] = factor[tile] * _write_gradient(
            slab, p, share, column[tile], inside[tile], p_target, chosen, row_base + row_sum,
            factor[tile], label_smoothing, z_loss, softcap, vocab,
        )  # fmt: skip
    return torch.where(inside, at_target, 0)


def _write_gradient(
    slab: Tensor,
    p: Tensor,
    share: Tensor | None,
    column: Tensor,
    inside: Tensor | None,
    p_target: Tensor,
    chosen: Tensor,
    lse: Tensor,
    scale: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    vocab: int,
) -> Tensor:
    """Turn probabilities, ``share · p``, into ``scale · dℓ/dz``; gives ``dℓ/dz`` at the target.

    ``dℓ/dz_v = (1 + 2 · z_loss · lse) p_v − (1 − ε) [v = y] − ε / V``, times the softcap's slope
    ``1 − tanh²``.
    """
    at_target, over_row = p_target, share
    if z_loss:
        growth = 1 + 2 * z_loss * lse
        at_target = at_target * growth
        over_row = growth if share is None else growth * share
    at_target = at_target - (1 - label_smoothing)
    if label_smoothing:
        at_target = at_target - label_smoothing / vocab
        if over_row is not None:
            p.mul_(over_row.unsqueeze(1))
        p.sub_(label_smoothing / vocab)
        over_row = None
    if softcap:
        at_target = at_target * (1 - (chosen / softcap).square())
        p.mul_(1 - slab.to(p.dtype, copy=True).div_(softcap).tanh_().square_())
    index = column.unsqueeze(1)
    if inside is None:
        p.scatter_(1, index, 0.0)
    else:
        p.scatter_(1, index, p.gather(1, index).masked_fill_(inside.unsqueeze(1), 0.0))
    if scale is not None:
        over_row = scale if over_row is None else scale * over_row
    if over_row is None:
        slab.copy_(p)
    elif p.dtype == slab.dtype:
        torch.mul(p, over_row.unsqueeze(1), out=slab)
    else:
        slab.copy_(p.mul_(over_row.unsqueeze(1)))
    return at_target


def _local_weight(weighting: RowLocal, p: Tensor, column: Tensor, p_target: Tensor) -> Tensor:
    """A row's weight by its own probabilities: see ``row_local.RowLocalWeights``."""
    kind, power = weighting
    if kind == "dft":
        score = p_target
    elif kind == "focal":
        score = 1 - p_target
    elif kind == "entropy":
        # Not as lse − Σ p z, whose terms are as large as the logits.
        score = -torch.xlogy(p, p).sum(1)
    else:
        # Without the target, whose square would swallow the others'; it is written apart anyway.
        p.scatter_(1, column.unsqueeze(1), 0.0)
        score = (_dot(p, p) + (1 - p_target).square()).sqrt()
    return score.clamp(min=0).pow(power)


def _widened(slab: Tensor, softcap: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Capped logits in the wide dtype, and where the next result goes: the scratch, either way."""
    out = scratch[: slab.numel()].view(slab.shape)
    if softcap:
        return out.copy_(slab).div_(softcap).tanh_().mul_(softcap), out
    return (slab if slab.dtype == out.dtype else out.copy_(slab)), out


def _normaliser(z: Tensor, log_p: Tensor, slab: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """``base`` and ``log_sum`` as one column tells them, which has logit ``z`` and ``log_p``.

    Again, with care, for rows where that column is improbable.
    """
    base, log_sum = z, 0 - log_p
    coarse = ~(log_p >= -_COARSE)
    if bool(coarse.any()):
        again = slab[coarse]
        wide = again.new_empty(again.numel(), dtype=z.dtype)
        logits = _widened(again, softcap, wide)[0]
        peak = logits.amax(1)
        peak = torch.where(peak == -torch.inf, 0, peak)
        base = base.masked_scatter(coarse, peak)
        log_sum = log_sum.masked_scatter(coarse, logits.sub_(peak.unsqueeze(1)).exp_().sum(1).log())
    return base, log_sum


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
