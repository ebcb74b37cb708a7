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
        lse: the log-sum-exp.
        chosen: the target's logit, 0 where the target is not among the columns.
        best: the largest logit.
        best_at: the first column that has it.
        total: the sum of the logits.
    """

    lse: Tensor
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
    lse, chosen = (logits.new_empty(rows, dtype=scratch.dtype) for _ in range(2))
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
        lse[tile] = _exact_where_coarse(first - log_p, log_p, logits[tile], softcap)
    return ColumnSums(lse, chosen, best, best_at, total)


def gradient_over_rows(
    logits: Tensor,
    wanted: Tensor,
    factor: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    weighting: RowLocal,
    with_correct: bool,
    scratch: Tensor,
) -> tuple[Rows, Tensor]:
    """Everything about rows of the whole vocabulary, and the gradient at each row's target.

    The slab becomes ``factor · weight · dℓ/dz``.
    """
    kernels = _kernels(logits)
    if kernels is not None:
        *seen, at_target = kernels.gradient_over_rows(
            logits, wanted, factor, label_smoothing, z_loss, softcap, *weighting, with_correct
        )
        return Rows(*seen), at_target
    loss, ce, lse, at_target = (torch.empty_like(factor) for _ in range(4))
    correct, weight = torch.zeros_like(wanted, dtype=torch.bool), torch.ones_like(factor)
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
        row_lse = _exact_where_coarse(chosen - log_p, log_p, slab, softcap)
        row_ce = torch.where(log_p < -_COARSE, row_lse - chosen, 0 - log_p)
        total = row_ce if mean is None else torch.lerp(row_ce, row_lse - mean, label_smoothing)
        if z_loss:
            total = total + z_loss * row_lse.square()
        scale = factor[tile]
        if weighting.kind != "none":
            weight[tile] = _local_weight(weighting, p, column, p_target)
            scale = scale * weight[tile]
        loss[tile], ce[tile], lse[tile] = total, row_ce, row_lse
        at_target[tile] = _write_gradient(
            slab, p, None, column, None, p_target, chosen, row_lse, scale,
            label_smoothing, z_loss, softcap, logits.shape[1],
        )  # fmt: skip
    return Rows(loss, ce, lse, correct, weight), at_target


def gradient_over_columns(
    logits: Tensor,
    wanted: Tensor,
    lse: Tensor,
    factor: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    vocab: int,
    scratch: Tensor,
) -> Tensor:
    """The slab of some columns becomes ``factor · dℓ/dz``; gives the gradient at the target.

    ``wanted`` counts from the slab's first column; 0 is given where it is not in the slab.
    """
    kernels = _kernels(logits)
    if kernels is not None:
        return kernels.gradient_over_columns(
            logits, wanted, lse, factor, label_smoothing, z_loss, softcap, vocab
        )
    at_target = torch.empty_like(factor)
    inside, column = _within(wanted, logits.shape[1])
    for tile in _tiles(logits, scratch):
        slab, row_lse = logits[tile], lse[tile]
        z, out = _widened(slab, softcap, scratch)
        chosen, first = _at(z, column[tile]), z[:, 0].clone()
        # Softmax over these columns, times their share of the whole: torch's exp takes longer.
        p = torch.softmax(z, 1, out=out)
        log_p = p[:, 0].log()
        of_slab = _exact_where_coarse(first - log_p, log_p, slab, softcap)
        masked = of_slab == -torch.inf
        if bool(masked.any()):
            p[masked] = 0
        at_target[tile] = _write_gradient(
            slab, p, (of_slab - row_lse).exp(), column[tile], inside[tile],
            (chosen - row_lse).exp(), chosen, row_lse, factor[tile],
            label_smoothing, z_loss, softcap, vocab,
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
    scale: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    vocab: int,
) -> Tensor:
    """Turn probabilities, ``share · p``, into the gradient over the slab; gives the target's entry.

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
    over_row = (scale if over_row is None else scale * over_row).unsqueeze(1)
    if p.dtype == slab.dtype:
        torch.mul(p, over_row, out=slab)
    else:
        slab.copy_(p.mul_(over_row))
    return scale * at_target


def _local_weight(weighting: RowLocal, p: Tensor, column: Tensor, p_target: Tensor) -> Tensor:
    """A row's weight by its own probabilities: see ``row_local.RowLocalWeights``."""
    kind, power = weighting
    if kind == "dft":
        score = p_target
    elif kind == "focal":
        score = 1 - p_target
    elif kind == "entropy":
        # Not as lse − Σ p z, whose terms are as large as the logits.
        score = torch.special.entr(p).sum(1)
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


def _exact_where_coarse(lse: Tensor, log_p: Tensor, slab: Tensor, softcap: float) -> Tensor:
    """Log-sum-exps again, with care, of rows where it was told by an improbable column."""
    coarse = ~(log_p >= -_COARSE)
    if not bool(coarse.any()):
        return lse
    again = slab[coarse]
    wide = again.new_empty(again.numel(), dtype=lse.dtype)
    return lse.masked_scatter(coarse, _widened(again, softcap, wide)[0].logsumexp(1))


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
