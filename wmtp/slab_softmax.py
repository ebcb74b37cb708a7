"""What is done to a slab of logits between two matrix products: softmax, loss, gradient.

Three functions over a slab ``[rows columns]``, in torch operations. They walk over tiles of rows that
stay in the cache, in a scratch of the wide dtype that the caller holds, and leave the slab as it is
until the gradient is written over it. ``triton_softmax.py`` has the same three as GPU kernels.

Three things differ from a textbook softmax:

* The target is kept apart. The gradient ``p − e_y`` is largest at the target, where a narrow slab would
  round it most. The slab gets 0 there, and the entry is returned by itself, ``at_target``, in the wide
  dtype; ``target_rows.py`` adds its contribution to both gradients, one row of ``dim`` numbers each.
* The division is deferred. The slab holds ``exp(z − base)``, not ``p``: dividing by the row's sum would
  take another pass over ``rows × vocab`` numbers. The quotient is returned as ``row_scale``, and the
  caller multiplies ``rows × dim`` numbers by it instead. Label smoothing, weights that look at whole
  rows, and float16 need ``p`` itself: there the slab is divided after all.
* ``exp(z − base)`` is ``2 ** (z · log₂e − bits)``, one fused multiply-add and one ``exp2``: on an AMD CPU
  (Zen 4) ``torch.exp`` took three times as long. ``bits`` is ``base · log₂e``, rounded. The rounding is the
  same for a whole row; ``_rounding`` gives it, and the log-sum-exp is corrected by it.
"""

import functools
import math
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp._dtypes import wide_dtype
from wmtp._kernels import kernels_for
from wmtp.problem import RowLocal, Rows
from wmtp.products import parts


_LOG2_E = math.log2(math.e)
# Tiles of this size are still in the cache when the next operation comes to them.
_TILE_BYTES = 4 * 2**20
# Logits up to this size are shifted and scaled in one operation.
_LARGE = 4096.0
# A row scale is deferred only if it, times the row's factor and the largest hidden number, is at most this.
_MOST_LEFT = 2.0**100
# A target as probable as this tells the log-sum-exp of a slab of vocabulary.
_PROBABLE = math.exp(-8.0)
# A target tells its own row's log-sum-exp unless its probability is near to underflow.
_TINY = math.exp(-30.0)
# Float16 rows that z-loss multiplies with more than this are divided again: products could overflow.
_MOST_GROWTH = 2.0
# Row-local weights that look at every probability of a row.
_WHOLE_ROW = ("entropy", "el2n")


class ColumnSums(NamedTuple):
    """What a slab of some columns tells of its rows, ``[rows]``; ``best`` and ``total`` on demand.

    Attributes:
        base: the largest logit, or the target's where that is probable.
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
    inside, column = _within(wanted, columns)
    chosen = _capped(_at(logits, column).to(scratch.dtype), softcap)
    whole, own, base, excess = (torch.empty_like(chosen) for _ in range(4))
    best = chosen.new_empty(rows if with_best else 0)
    best_at = wanted.new_empty(rows if with_best else 0)
    total = chosen.new_empty(rows if with_sum else 0)
    for tile in _tiles(logits, scratch):
        z, out = _widened(logits[tile], softcap, scratch)
        if with_best:
            best_at[tile] = z.argmax(1)
            best[tile] = _at(z, best_at[tile])
        if with_sum:
            torch.sum(z, 1, out=total[tile])
        _exponentials(z, base[tile], excess[tile], out)
        torch.sum(out, 1, out=whole[tile])
        own[tile] = _at(out, column[tile])
    # A probable target tells the sum without a rounding of its own: a sure one has a loss of exactly 0.
    probable = inside & (own >= _PROBABLE * whole) & (own > 0)
    log_sum = whole.log() - excess
    log_sum = torch.where(probable, torch.log(whole / own), log_sum)
    base = torch.where(probable, chosen, base)
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
    """For rows of the whole vocabulary: all ``Rows``, ``dℓ/dz`` at each row's target, and the row scale.

    The slab is overwritten with ``dℓ/dz / row_scale``, 0 at the target. ``row_scale`` is ``[rows]``, or
    ``None`` for 1. The caller multiplies by it and by each row's factor, in ``rows × dim``.
    """
    kernels = _kernels(logits)
    if kernels is not None:
        *seen, at_target = kernels.gradient_over_rows(
            logits, wanted, label_smoothing, z_loss, softcap, *weighting, with_correct
        )
        rows = Rows(*seen)
        return rows, at_target, _shrunk(logits, z_loss, rows)
    vocab, kind = logits.shape[1], weighting.kind
    # Only where a probability must not be left undivided; float16 products would overflow.
    divided = label_smoothing > 0 or kind in _WHOLE_ROW or logits.dtype == torch.float16
    chosen = _capped(_at(logits, wanted).to(scratch.dtype), softcap)
    own, others, shift, excess, mean, score = (torch.empty_like(chosen) for _ in range(6))
    correct = torch.zeros_like(wanted, dtype=torch.bool)
    for tile in _tiles(logits, scratch):
        index, slab = wanted[tile].unsqueeze(1), logits[tile]
        z, out = _widened(slab, softcap, scratch)
        if with_correct:
            correct[tile] = z.argmax(1) == wanted[tile]
        if label_smoothing:
            torch.mean(z, 1, out=mean[tile])
        _exponentials(z, shift[tile], excess[tile], out)
        own[tile] = _at(out, wanted[tile])
        # The others are summed by themselves: what a probable target leaves of 1 would be its rounding.
        torch.sum(out.scatter_(1, index, 0.0), 1, out=others[tile])
        if divided:
            whole = own[tile] + others[tile]
            out.mul_((1 / whole).unsqueeze(1))
            if kind in _WHOLE_ROW:
                score[tile] = _score(kind, out, own[tile] / whole, others[tile] / whole)
            if z_loss:
                lse = shift[tile] + whole.log()
                out.mul_(growth(z_loss, lse).unsqueeze(1))
            if label_smoothing:
                out.sub_(label_smoothing / vocab).scatter_(1, index, 0.0)
        _write_gradient(slab, out, softcap)
    whole = own + others
    p_target, p_others = own / whole, others / whole
    # The target is a logit of its row that tells the sum, −log p less, unless it is near to nothing.
    tiny = p_target < _TINY
    base = torch.where(tiny, shift, chosen)
    log_sum = whole.log() - excess
    log_sum = torch.where(tiny, log_sum, torch.log1p(others / own))
    lse = base + log_sum
    loss = ce = (base - chosen) + log_sum
    if label_smoothing:
        loss = torch.lerp(ce, (base - mean) + log_sum, label_smoothing)
    if z_loss:
        loss = loss + z_loss * lse.square()
    weight = torch.ones_like(chosen)
    if kind != "none":
        if kind not in _WHOLE_ROW:
            score = p_target if kind == "dft" else p_others
        weight = score.clamp(min=0).pow(weighting.power)
    at_target = _gradient_at_target(
        p_target, p_others, chosen, lse, label_smoothing, z_loss, softcap, vocab
    )
    rows = Rows(loss, ce, base, log_sum, correct, weight)
    if divided:
        row_scale = _shrunk(logits, z_loss, rows)
    else:
        row_scale = growth(z_loss, lse) / whole if z_loss else 1 / whole
    return rows, at_target, row_scale


def applied_if_large(
    row_scale: Tensor | None, slab: Tensor, x: Tensor, *factors: Tensor
) -> Tensor | None:
    """The row scale if it can stay deferred; otherwise the slab is multiplied by it, and it is ``None``.

    ``x`` and ``factors`` are what the caller will multiply it with: products that could overflow.
    """
    if row_scale is None or _fits(x, *(factor * row_scale for factor in factors)):
        return row_scale
    slab.mul_(row_scale.unsqueeze(1))
    return None


def _fits(x: Tensor, *factors: Tensor) -> bool:
    """Whether rows that are multiplied with these factors stay in range."""
    least, most = x.aminmax() if x.numel() else (x.new_zeros(()),) * 2
    largest = max(-float(least), float(most))
    return all(bool((factor.abs() * (1 + largest) <= _MOST_LEFT).all()) for factor in factors)


def row_scale_over_columns(
    x: Tensor,
    base: Tensor,
    log_sum: Tensor,
    factor: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor | None:
    """The row scale that ``gradient_over_columns`` defers, the same for every slab of the vocabulary.

    ``None`` if nothing is deferred, and the slabs hold ``factor · dℓ/dz`` themselves: with the GPU kernels,
    under label smoothing (which is subtracted from ``p`` itself), in float16 or where a product could
    overflow, and where exponentials are not made as powers of two.
    """
    if _kernels(x) is not None or x.dtype == torch.float16 or label_smoothing or not _scales(base):
        return None
    row_scale = factor * torch.exp(-_rounding(base, log_sum))
    if z_loss:
        row_scale = row_scale * growth(z_loss, base + log_sum)
    return row_scale if _fits(x, row_scale) else None


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
    deferred: bool,
    source: Tensor | None = None,
) -> Tensor:
    """The slab of some columns becomes ``factor · dℓ/dz``, 0 at the target, whose gradient is given.

    ``base`` and ``log_sum`` are the whole rows'. ``wanted`` counts from the slab's first column; 0 is
    given where it is not in the slab. With ``deferred`` the slab is still to be multiplied by the row
    scale of ``row_scale_over_columns``.

    ``source``: at which row of the slab each row's logits are, if not at its own; then behind all rows that
    are written, so that nothing is overwritten before it is read.
    """
    kernels = _kernels(logits)
    if kernels is not None:
        return kernels.gradient_over_columns(
            logits, wanted, base, log_sum, factor, label_smoothing, z_loss, softcap, vocab, source
        )
    if source is not None:
        moved = (source >= len(wanted)).nonzero().squeeze(1)
        for part in parts(len(moved), len(scratch) // logits.shape[1]):
            logits[moved[part]] = logits[source[moved[part]]]
        logits = logits[: len(wanted)]
    lse, bits = base + log_sum, _bits(base, log_sum)
    inside, column = _within(wanted, logits.shape[1])
    chosen = _capped(_at(logits, column).to(scratch.dtype), softcap)
    for tile in _tiles(logits, scratch):
        slab = logits[tile]
        z, out = _widened(slab, softcap, scratch)
        if deferred:
            p = _exp2_less(z, bits[tile], slab if z is slab else out)
        else:
            p = torch.sub(z, base[tile].unsqueeze(1), out=out)
            p.sub_(log_sum[tile].unsqueeze(1)).exp_()
            if z_loss:
                p.mul_(growth(z_loss, lse[tile]).unsqueeze(1))
            if label_smoothing:
                p.sub_(label_smoothing / vocab)
            p.mul_(factor[tile].unsqueeze(1))
        _write_gradient(slab, p, softcap)
    # Not `scatter_`, which widens a copy of a narrow slab.
    row = torch.arange(len(column), device=column.device)
    logits[row, column] = logits[row, column].masked_fill_(inside, 0.0)
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


def growth(z_loss: float, lse: Tensor) -> Tensor:
    """What z-loss multiplies the gradient of the log-sum-exp with."""
    return 1 + 2 * z_loss * lse


def _shrunk(slab: Tensor, z_loss: float, rows: Rows) -> Tensor | None:
    """Powers of two that float16 rows are divided by where z-loss has made them large, if it has."""
    if slab.dtype != torch.float16 or not z_loss:
        return None
    grown = growth(z_loss, rows.base + rows.log_sum).abs()
    if not bool((grown > _MOST_GROWTH).any()):
        return None
    row_scale = torch.exp2(torch.ceil(torch.log2(grown.clamp(min=1))))
    slab.mul_(row_scale.reciprocal().unsqueeze(1))
    return row_scale


def _write_gradient(slab: Tensor, p: Tensor, softcap: float) -> None:
    """The gradient for logits from that for capped ones."""
    if softcap:
        # Where the dtypes agree the slab itself is used up: it is written over below.
        p.mul_(1 - slab.to(p.dtype).div_(softcap).tanh_().square_())
    if p is not slab:
        slab.copy_(p)


def _score(kind: str, p: Tensor, p_target: Tensor, p_others: Tensor) -> Tensor:
    """Of row-local weights that look at whole rows, ``p`` with the target left out."""
    if kind == "entropy":
        # Not as lse − Σ p z, whose terms are as large as the logits.
        return -(torch.xlogy(p, p).sum(1) + torch.xlogy(p_target, p_target))
    return torch.hypot(torch.linalg.vector_norm(p, dim=1), p_others)  # pyright: ignore


def _scales(base: Tensor) -> bool:
    """Whether exponentials are made as scaled powers of two. Of float64 the last bit is wanted."""
    if base.dtype == torch.float64 or not _rounds_once(base.device):
        return False
    least, most = base.aminmax() if base.numel() else (0.0, 0.0)
    return float(least) >= -_LARGE and float(most) <= _LARGE


@functools.cache
def _rounds_once(device: torch.device) -> bool:
    """Whether a scaled sum is one fused operation there, for vectors and for what is left of a row."""
    z = torch.arange(-38, 39, dtype=torch.float32, device="cpu") / 3
    scale = torch.tensor(_LOG2_E, dtype=torch.float32, device="cpu").double()
    exact = (scale * z.double() + z[:1].double()).float()
    return torch.equal(torch.add(z[:1].to(device), z.to(device), alpha=_LOG2_E).cpu(), exact)


def _bits(base: Tensor, log_sum: Tensor | None = None) -> Tensor:
    """``(base + log_sum) · log2 e``, rounded."""
    bits = base * _LOG2_E
    return bits if log_sum is None else torch.add(bits, log_sum, alpha=_LOG2_E)


def _rounding(base: Tensor, log_sum: Tensor | None = None) -> Tensor:
    """What ``_bits`` has rounded away, in nats."""
    rest = torch.add(-_bits(base, log_sum), base, alpha=_LOG2_E)
    return (rest if log_sum is None else torch.add(rest, log_sum, alpha=_LOG2_E)) / _LOG2_E


def _exp2_less(z: Tensor, bits: Tensor, out: Tensor) -> Tensor:
    """``out = 2 ** (z · log2 e − bits)``."""
    return torch.add(-bits.unsqueeze(1), z, alpha=_LOG2_E, out=out).exp2_()


def _exponentials(z: Tensor, base: Tensor, excess: Tensor, out: Tensor) -> None:
    """``out = exp(z − base + excess)``.

    ``base`` is set to each row's largest logit, 0 if that is −inf, and ``excess`` to what the rounding
    of ``_bits(base)`` adds to every exponent of the row: 0 where exponentials are not scaled.
    """
    torch.amax(z, 1, out=base)
    if _scales(base):
        _exp2_less(z, _bits(base), out)
        excess.copy_(_rounding(base))
    else:
        base.masked_fill_(base == -torch.inf, 0)
        torch.sub(z, base.unsqueeze(1), out=out).exp_()
        excess.zero_()


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _widened(slab: Tensor, softcap: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Capped logits in the wide dtype, and where the next result goes: the scratch, either way."""
    out = scratch[: slab.numel()].view(slab.shape)
    if softcap or slab.dtype != out.dtype:
        return _capped(out.copy_(slab), softcap), out
    return slab, out


def _within(wanted: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    inside = (wanted >= 0) & (wanted < columns)
    return inside, torch.where(inside, wanted, 0)


def _at(rows: Tensor, column: Tensor) -> Tensor:
    return rows.gather(1, column.unsqueeze(1)).squeeze(1)


def _tiles(logits: Tensor, scratch: Tensor) -> Iterator[slice]:
    """Slices of as many rows as the scratch holds."""
    rows, columns = logits.shape
    return parts(rows, len(scratch) // max(1, columns))


def _kernels(logits: Tensor) -> ModuleType | None:
    return kernels_for(logits, "triton_softmax")
