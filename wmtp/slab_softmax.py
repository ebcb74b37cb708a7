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
        # The fastest pass that torch has; any column tells the sum, z − log p.
        torch.log_softmax(z, 1, out=out)
        base[tile], log_sum[tile] = _anchored(sample, out, slab, softcap, are_logs=True)
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
    rows, vocab = logits.shape
    chosen, p_target, base, log_sum, mean = (
        logits.new_empty(rows, dtype=scratch.dtype) for _ in range(5)
    )
    correct, weight = torch.zeros_like(wanted, dtype=torch.bool), torch.ones_like(chosen)
    for tile in _tiles(logits, scratch):
        column, slab = wanted[tile], logits[tile]
        z, out = _widened(slab, softcap, scratch)
        chosen[tile] = own = _at(z, column)
        if with_correct:
            correct[tile] = _first_max(z)[1] == column
        if label_smoothing:
            mean[tile] = z.mean(1)
        p = torch.softmax(z, 1, out=out)
        p_target[tile] = of_own = _at(p, column)
        base[tile], log_sum[tile] = row_base, row_sum = _by_target(own, of_own, p, slab, softcap)
        if weighting.kind != "none":
            weight[tile] = _local_weight(weighting, p, column, of_own)
        over_row = None
        if z_loss:
            over_row = 1 + 2 * z_loss * (row_base + row_sum)
        _write_gradient(slab, p, column, None, over_row, None, label_smoothing, softcap, vocab)
    loss = ce = (base - chosen) + log_sum
    if label_smoothing:
        loss = torch.lerp(ce, (base - mean) + log_sum, label_smoothing)
    lse = base + log_sum
    if z_loss:
        loss = loss + z_loss * lse.square()
    at_target = _gradient_at_target(p_target, chosen, lse, label_smoothing, z_loss, softcap, vocab)
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
    chosen, lse = torch.empty_like(factor), base + log_sum
    inside, column = _within(wanted, logits.shape[1])
    growth = 1 + 2 * z_loss * lse if z_loss else None
    for tile in _tiles(logits, scratch):
        slab = logits[tile]
        z, out = _widened(slab, softcap, scratch)
        chosen[tile] = _at(z, column[tile])
        sample = z[:, :_SAMPLE].clone()
        # Softmax over these columns, times their share of the whole: torch's exp takes longer.
        p = torch.softmax(z, 1, out=out)
        own_base, own_sum = _anchored(sample, p, slab, softcap, are_logs=False)
        over_row = ((own_base - base[tile]) + (own_sum - log_sum[tile])).exp_()
        if growth is not None:
            over_row *= growth[tile]
        _write_gradient(
            slab, p, column[tile], inside[tile], over_row, factor[tile],
            label_smoothing, softcap, vocab,
        )  # fmt: skip
    p_target = ((chosen - base) - log_sum).exp()
    at_target = factor * _gradient_at_target(
        p_target, chosen, lse, label_smoothing, z_loss, softcap, vocab
    )
    return torch.where(inside, at_target, 0)


def _gradient_at_target(
    p: Tensor,
    chosen: Tensor,
    lse: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    vocab: int,
) -> Tensor:
    """``dℓ/dz`` at each row's target, whose probability is ``p``.

    ``dℓ/dz_v = (1 + 2 · z_loss · lse) p_v − (1 − ε) [v = y] − ε / V``, times the softcap's slope
    ``1 − tanh²``.
    """
    out = p * (1 + 2 * z_loss * lse) if z_loss else p
    out = out - (1 - label_smoothing)
    if label_smoothing:
        out = out - label_smoothing / vocab
    return out * (1 - (chosen / softcap).square()) if softcap else out


def _write_gradient(
    slab: Tensor,
    p: Tensor,
    column: Tensor,
    inside: Tensor | None,
    over_row: Tensor | None,
    scale: Tensor | None,
    label_smoothing: float,
    softcap: float,
    vocab: int,
) -> None:
    """Turn probabilities, ``p`` times what their row counts, into ``scale · dℓ/dz``, 0 at the target."""
    if label_smoothing:
        if over_row is not None:
            p.mul_(over_row.unsqueeze(1))
        p.sub_(label_smoothing / vocab)
        over_row = None
    if softcap:
        # Where the dtypes agree the slab itself is used up: it is written over below.
        p.mul_(1 - slab.to(p.dtype).div_(softcap).tanh_().square_())
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


def _anchored(
    sample: Tensor, out: Tensor, slab: Tensor, softcap: float, *, are_logs: bool
) -> tuple[Tensor, Tensor]:
    """A probable logit of each row, and the log-sum-exp less that: ``−log p`` of that logit.

    ``out`` are (log-)probabilities over the slab's columns, ``sample`` the logits of the first ones.
    Rows of −inf have base 0 and log-sum −inf, and their probabilities become 0.
    """
    p, at = out[:, : sample.shape[1]].max(1)
    base = _at(sample, at)
    limit = math.log(_COARSE) if are_logs else _COARSE
    if bool(p.amin() >= limit):
        return base, 0 - (p if are_logs else p.log())
    where = (~(p >= limit)).nonzero().squeeze(1)
    base[where], p[where] = _most_probable(where, out, slab, softcap)
    log_sum = 0 - (p if are_logs else p.log())
    masked = base == -torch.inf
    base[masked], log_sum[masked], out[masked] = 0, -torch.inf, 0
    return base, log_sum


def _by_target(
    chosen: Tensor, p_target: Tensor, p: Tensor, slab: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """The same as the target tells it, which has logit ``chosen``."""
    if bool(p_target.amin() >= _TINY):
        return chosen, 0 - p_target.log()
    where = (~(p_target >= _TINY)).nonzero().squeeze(1)
    base, told = chosen.clone(), p_target.clone()
    base[where], told[where] = _most_probable(where, p, slab, softcap)
    return base, 0 - told.log()


def _most_probable(
    where: Tensor, out: Tensor, slab: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """The largest logit of some rows and its (log-)probability."""
    best, at = out[where].max(1)
    logit = slab[where, at].to(out.dtype)
    return (torch.tanh(logit / softcap) * softcap if softcap else logit), best


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
