"""The row work of the linear losses as Triton kernels: softmax, loss and gradient over a slab of logits.

Counterparts of the functions of the same names in torch operations, for float32, bfloat16 and float16
slabs on CUDA. There the operations would each read and write the slab once more; here a slab is read
once for what is known of its rows, and once more and written for its gradient.

What all kernels share:

* The slab is ``[rows cols]`` with columns side by side; rows may lie further apart than ``cols``. If they
  start at multiples of 16 columns, what lies between ``cols`` and the next such multiple may be written
  over: loads and stores are of vectors then, whatever ``cols`` is.
  Offsets of rows are 64-bit, because a slab may hold more than 2³¹ logits.
* All arithmetic is in float32. Sums are kept per lane of a block and added up at the end of a row, so
  that a block costs one reduction, that of its maximum. Nothing is atomic: results are reproducible.
* What is not asked for is compiled out. Numbers such as the label smoothing are ordinary arguments,
  so that another value does not compile another kernel.

Importing this file imports Triton. With ``TRITON_INTERPRET=1`` in the environment before Triton is
first imported, the kernels run on the CPU, which is how they are tested where there is no GPU.
"""

# Triton describes neither what its decorator leaves of a function nor what its operations return.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# What a kernel is not asked for it neither defines nor uses.
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
import triton.language as tl  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
from torch import Tensor


# Sixteen logits per thread: two vector loads of a narrow dtype, and no accumulator leaves the registers.
_LARGEST_BLOCK = 4096
_SMALLEST_BLOCK = 128
_LANES_PER_WARP = 512
# Rows that start at multiples of so many columns own what is between them up to the next.
_VECTOR = 16
_WEIGHTINGS = ("none", "dft", "focal", "entropy", "el2n")


def reduce_columns(
    logits: Tensor, wanted: Tensor, softcap: float, with_best: bool, with_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a slab of some columns contributes to its rows, to be merged with the other slabs.

    Args:
        logits: ``[rows cols]``, left as it is.
        wanted: ``[rows]`` int64, the target counted from the slab's first column; anything outside
            ``[0, cols)`` means that it stands elsewhere.
        softcap: positive bound of the logits, or 0 for none.
        with_best: whether the largest logit is wanted.
        with_sum: whether the sum of the logits is wanted.

    Returns:
        Six tensors ``[rows]``, the last three empty unless asked for: the largest logit (0 if all are
        −inf), the log-sum-exp of the logits less that (−inf if all are), the target's logit (0 if it
        stands elsewhere), the largest logit and the first column it stands in (both leave NaN out), the
        sum. All are of the soft-capped logits.
    """
    rows, cols, width = _checked(logits)
    base, log_sum, chosen = (_numbers(logits, rows) for _ in range(3))
    best = _numbers(logits, rows if with_best else 0)
    best_at = torch.empty_like(best, dtype=torch.int64)
    total = _numbers(logits, rows if with_sum else 0)
    if rows:
        block, warps = _block(cols)
        with torch.cuda.device_of(logits):
            _reduce_columns[(rows,)](
                logits,
                logits.stride(0),
                cols,
                width,
                wanted.contiguous(),
                base,
                log_sum,
                chosen,
                best,
                best_at,
                total,
                softcap,
                has_softcap=softcap > 0,
                with_best=with_best,
                with_sum=with_sum,
                has_gap=width > cols,
                block=block,
                num_warps=warps,  # pyright: ignore[reportCallIssue]
            )
    return base, log_sum, chosen, best, best_at, total


def gradient_over_rows(
    logits: Tensor,
    wanted: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    weighting: str,
    power: float,
    with_correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss of whole rows, and in place of their logits the gradient, the target's column left out.

    The gradient is ``dℓ/dlogit``, not yet multiplied with the weight. The target's entry is by far the
    largest of a row, so it is set to 0 in the slab, where a narrow dtype would round it, and returned
    in float32.

    Args:
        logits: ``[rows vocab]``, overwritten.
        wanted: ``[rows]`` int64 in ``[0, vocab)``.
        label_smoothing: see ``cross_entropy.Objective``.
        z_loss: see there.
        softcap: see there; 0 means none.
        weighting: which weight a row gives itself: ``"none"`` 1, ``"dft"`` ``p_y``, ``"focal"``
            ``1 − p_y``, ``"entropy"`` ``H(p)``, ``"el2n"`` ``‖p − e_y‖₂``.
        power: at least 0, what the weight is raised to.
        with_correct: whether ``correct`` is wanted.

    Returns:
        Seven tensors ``[rows]``: loss, cross entropy, the largest logit and the log-sum-exp of the
        logits less that, whether the target is the first most probable token (false if not asked for;
        false where a logit is NaN), weight, and the target's entry of the gradient.
    """
    rows, cols, width = _checked(logits)
    if weighting not in _WEIGHTINGS:
        raise ValueError(f"weighting must be one of {_WEIGHTINGS}, got {weighting!r}")
    if power == 0:  # also where the base is 0
        weighting = "none"
    loss, ce, base, log_sum, weight, at_target = (_numbers(logits, rows) for _ in range(6))
    correct = torch.zeros(rows, dtype=torch.bool, device=logits.device)
    if rows:
        block, warps = _block(cols)
        with torch.cuda.device_of(logits):
            _gradient_over_rows[(rows,)](
                logits,
                logits.stride(0),
                cols,
                width,
                wanted.contiguous(),
                loss,
                ce,
                base,
                log_sum,
                correct.view(torch.uint8),
                weight,
                at_target,
                label_smoothing,
                1 - label_smoothing,
                label_smoothing / cols,
                label_smoothing * (1 - 1 / cols),
                1 / cols,
                z_loss,
                softcap,
                power,
                has_smoothing=label_smoothing != 0,
                has_z_loss=z_loss != 0,
                has_softcap=softcap > 0,
                weighting=weighting,
                has_power=power != 1,
                with_correct=with_correct,
                has_gap=width > cols,
                block=block,
                num_warps=warps,  # pyright: ignore[reportCallIssue]
            )
    return loss, ce, base, log_sum, correct, weight, at_target


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
    source: Tensor | None = None,
) -> Tensor:
    """Write the gradient in place of a slab of some columns, for rows whose log-sum-exp is known.

    As in ``gradient_over_rows``, but multiplied with a factor: ``factor · dℓ/dlogit``.

    Args:
        logits: ``[rows cols]``, overwritten; with ``source`` there may be more rows.
        wanted: ``[rows]`` int64, the target counted from the slab's first column; anything outside
            ``[0, cols)`` means that it stands elsewhere.
        base: ``[rows]`` float32.
        log_sum: ``[rows]`` float32, over the whole vocabulary, of the logits less the base.
        factor: ``[rows]`` float32.
        label_smoothing: see ``cross_entropy.Objective``.
        z_loss: see there.
        softcap: see there; 0 means none.
        vocab: the size of the whole vocabulary.
        source: ``[rows]`` int64, where the logits of each row are: in its own place, or behind all rows
            that are written, each in another.

    Returns:
        ``[rows]`` float32, the target's entry of the gradient, 0 where the target stands elsewhere.
    """
    _, cols, width = _checked(logits)
    rows = len(wanted)
    at_target = torch.zeros(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block, warps = _block(cols)
        with torch.cuda.device_of(logits):
            _gradient_over_columns[(rows, triton.cdiv(cols, block))](
                logits,
                logits.stride(0),
                cols,
                width,
                None if source is None else source.contiguous(),
                wanted.contiguous(),
                base.contiguous(),
                log_sum.contiguous(),
                factor.contiguous(),
                at_target,
                label_smoothing / vocab,
                label_smoothing * (1 - 1 / vocab),
                z_loss,
                softcap,
                has_smoothing=label_smoothing != 0,
                has_z_loss=z_loss != 0,
                has_softcap=softcap > 0,
                has_source=source is not None,
                has_gap=width > cols,
                block=block,
                num_warps=warps,  # pyright: ignore[reportCallIssue]
            )
    return at_target


def _checked(logits: Tensor) -> tuple[int, int, int]:
    """Rows, columns and width of a slab, refused if the kernels would misread it.

    The width is how many columns are read and written, where rows own more than they have: as a multiple
    of 16, for else every access would be of a single logit, in the last block and in all others.
    """
    rows, cols = logits.shape
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits must be float32, bfloat16 or float16, got {logits.dtype}")
    if cols > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits must have its columns side by side, got {logits.stride()}")
    apart, width = logits.stride(0), cols + -cols % _VECTOR
    return rows, cols, width if apart >= width and apart % _VECTOR == 0 else cols


def _numbers(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def _block(cols: int) -> tuple[int, int]:
    """How many columns a program takes at a time, and with how many warps."""
    block = min(max(int(triton.next_power_of_2(cols)), _SMALLEST_BLOCK), _LARGEST_BLOCK)
    return block, max(1, block // _LANES_PER_WARP)


# ------------------------------------------------------------------------------- the three kernels


@triton.jit
def _reduce_columns(
    logits,
    stride,
    cols,
    width,
    wanted,
    base_out,
    log_sum,
    chosen,
    best,
    best_at,
    total,
    softcap,
    has_softcap: tl.constexpr,
    with_best: tl.constexpr,
    with_sum: tl.constexpr,
    has_gap: tl.constexpr,
    block: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0)
    line = logits + _offset(row, stride)
    lanes = tl.arange(0, block)
    peak = tl.full([], -float("inf"), tl.float32)
    mass = tl.full([block], 0.0, tl.float32)
    if with_best:
        # The best of every lane; an earlier column gives way only to a larger logit.
        top = tl.full([block], -float("inf"), tl.float32)
        top_at = lanes
    if with_sum:
        sums = tl.full([block], 0.0, tl.float32)
    done = 0
    while done * block < cols:
        column = done * block + lanes
        z, _ = _scores(line, column, cols, width, softcap, has_softcap, has_gap)
        higher = tl.maximum(peak, tl.max(z, 0))
        base = _finite(higher)
        mass = mass * tl.exp(peak - base) + tl.exp(z - base)
        peak = higher
        if with_best:
            better = z > top
            top = tl.where(better, z, top)
            top_at = tl.where(better, column, top_at)
        if with_sum:
            sums += tl.where(column < cols, z, 0.0)
        done += 1
    sum_of_mass = tl.sum(mass, 0)
    logarithm = tl.log(tl.where(sum_of_mass == 0, 1.0, sum_of_mass))
    tl.store(base_out + row, _finite(peak))
    tl.store(log_sum + row, tl.where(sum_of_mass == 0, -float("inf"), logarithm))
    if with_best:
        tl.store(best + row, peak)
        tl.store(best_at + row, tl.min(tl.where(top == peak, top_at, cols), 0).to(tl.int64))
    if with_sum:
        tl.store(total + row, tl.sum(sums, 0))
    target = tl.load(wanted + row)
    inside = (target >= 0) & (target < cols)
    raw = tl.load(line + target, mask=inside, other=0.0).to(tl.float32)
    z_target, _ = _capped(raw, softcap, has_softcap)
    tl.store(chosen + row, z_target)


@triton.jit
def _gradient_over_rows(
    logits,
    stride,
    cols,
    width,
    wanted,
    loss,
    ce,
    base_out,
    log_sum,
    correct,
    weight,
    at_target,
    smoothing,
    rest,
    smoothing_per_column,
    smoothing_at_target,
    per_column,
    z_loss,
    softcap,
    power,
    has_smoothing: tl.constexpr,
    has_z_loss: tl.constexpr,
    has_softcap: tl.constexpr,
    weighting: tl.constexpr,
    has_power: tl.constexpr,
    with_correct: tl.constexpr,
    has_gap: tl.constexpr,
    block: tl.constexpr,
):
    """One program per row, two walks over it.

    The target is kept out of the sums of the first walk: ``1 − p_y`` is then the share of all the
    others, exact also where ``p_y`` rounds to 1.
    """
    row = tl.program_id(0)
    line = logits + _offset(row, stride)
    lanes = tl.arange(0, block)
    target = tl.load(wanted + row)
    # Of a target that does not exist nothing is read: its loss is NaN.
    target = tl.where((target >= 0) & (target < cols), target, -1).to(tl.int32)
    raw = tl.load(line + target, mask=target >= 0, other=float("nan")).to(tl.float32)
    z_target, slope_target = _capped(raw, softcap, has_softcap)
    # Logits are averaged as differences to the target's, which are as small as the loss itself.
    anchor = _finite(z_target)
    peak = z_target
    others = tl.full([block], 0.0, tl.float32)  # Σ exp(z − peak)
    if weighting == "entropy":
        depth = tl.full([block], 0.0, tl.float32)  # Σ exp(z − peak) (z − peak)
    if weighting == "el2n":
        squares = tl.full([block], 0.0, tl.float32)  # Σ exp(z − peak)²
    if has_smoothing:
        drift = tl.full([block], 0.0, tl.float32)  # Σ (z − anchor)
    done = 0
    while done * block < cols:
        column = done * block + lanes
        z, _ = _scores(line, column, cols, width, softcap, has_softcap, has_gap)
        higher = tl.maximum(peak, tl.max(z, 0))
        base = _finite(higher)
        kept = tl.exp(peak - base)
        e = tl.where(column == target, 0.0, tl.exp(z - base))
        if weighting == "entropy":
            drop = tl.where(kept > 0, peak - base, 0.0)
            depth = (depth + others * drop) * kept + e * tl.where(e > 0, z - base, 0.0)
        if weighting == "el2n":
            squares = squares * (kept * kept) + e * e
        others = others * kept + e
        peak = higher
        if has_smoothing:
            drift += tl.where(column < cols, z - anchor, 0.0)
        done += 1

    base = _finite(peak)
    e_target = tl.exp(z_target - base)
    off = tl.sum(others, 0)
    total = off + e_target
    log_total = tl.log(total)
    row_lse = peak + log_total
    row_ce = (peak - z_target) + log_total
    row_loss = row_ce
    if has_smoothing:
        uniform = (peak - anchor) + log_total - tl.sum(drift, 0) * per_column
        row_loss = rest * row_ce + smoothing * uniform
    if has_z_loss:
        row_loss += z_loss * row_lse * row_lse
    if weighting == "dft":
        own = e_target / total
    elif weighting == "focal":
        own = off / total
    elif weighting == "entropy":
        deep = tl.sum(depth, 0) + e_target * tl.where(e_target > 0, z_target - base, 0.0)
        own = log_total - deep / total
        own = tl.where(own < 0, 0.0, own)
    elif weighting == "el2n":
        own = tl.sqrt(tl.sum(squares, 0) + off * off) / total
    else:
        own = tl.full([], 1.0, tl.float32)
    if weighting != "none" and has_power:
        # NaN stays NaN: only an exact 0 is 0, and its logarithm is not taken.
        own = tl.where(own == 0, 0.0, tl.exp(power * tl.log(tl.where(own == 0, 1.0, own))))
    # p_y − 1 is −off / total; the other terms of the target's entry are added to that.
    entry = -off / total
    pull = 1 / total
    if has_smoothing:
        entry += smoothing_at_target
    if has_z_loss:
        entry += 2 * z_loss * row_lse * (e_target / total)
        pull *= 1 + 2 * z_loss * row_lse
    if has_softcap:
        entry *= slope_target
    tl.store(loss + row, row_loss)
    tl.store(ce + row, row_ce)
    tl.store(base_out + row, peak)
    tl.store(log_sum + row, log_total)
    tl.store(weight + row, own)
    tl.store(at_target + row, entry)

    # No warp may overwrite the target's logit before all have read it.
    tl.debug_barrier()
    if with_correct:
        # Asked in this walk, where the registers are free.
        first = tl.full([block], 1, tl.int32)
    while done > 0:
        # From the end, which was read last and is the most likely to be still in a cache.
        done -= 1
        column = done * block + lanes
        z, slope = _scores(line, column, cols, width, softcap, has_softcap, has_gap)
        if with_correct:
            below = tl.where(column < target, z < z_target, z <= z_target)
            first = tl.where(below, first, 0)
        g = tl.exp(z - base) * pull
        if has_smoothing:
            g -= smoothing_per_column
        if has_softcap:
            g *= slope
        tl.store(line + column, tl.where(column == target, 0.0, g), mask=column < width)
    if with_correct:  # pragma: no branch (the interpreter's copy ends elsewhere)
        tl.store(correct + row, tl.min(first, 0).to(tl.uint8))


@triton.jit
def _gradient_over_columns(
    logits,
    stride,
    cols,
    width,
    source,
    wanted,
    base,
    log_sum,
    factor,
    at_target,
    smoothing_per_column,
    smoothing_at_target,
    z_loss,
    softcap,
    has_smoothing: tl.constexpr,
    has_z_loss: tl.constexpr,
    has_softcap: tl.constexpr,
    has_source: tl.constexpr,
    has_gap: tl.constexpr,
    block: tl.constexpr,
):
    """One program per row and block of columns; whichever holds the target writes its entry."""
    row = tl.program_id(0)
    line = logits + _offset(row, stride)
    read = line
    if has_source:
        read = logits + tl.load(source + row) * stride
    start = tl.program_id(1) * block
    column = start + tl.arange(0, block)
    target = tl.load(wanted + row)
    inside = (target >= start) & (target < start + block) & (target < cols)
    target = tl.where(inside, target, -1).to(tl.int32)
    row_base = tl.load(base + row)
    row_sum = tl.load(log_sum + row)
    row_lse = row_base + row_sum
    scale = tl.load(factor + row)
    pull = scale
    if has_z_loss:
        pull *= 1 + 2 * z_loss * row_lse
    z, slope = _scores(read, column, cols, width, softcap, has_softcap, has_gap)
    g = tl.exp((z - row_base) - row_sum) * pull
    if has_smoothing:
        g -= scale * smoothing_per_column
    if has_softcap:
        g *= slope
    tl.store(line + column, tl.where(column == target, 0.0, g), mask=column < width)
    if inside:  # pragma: no branch (as above)
        # Taken from the block, not loaded again: another warp may have written there already.
        z_target = tl.sum(tl.where(column == target, z, 0.0), 0)
        short = _expm1((z_target - row_base) - row_sum)  # p_y − 1
        entry = short
        if has_smoothing:
            entry += smoothing_at_target
        if has_z_loss:
            entry += 2 * z_loss * row_lse * (1 + short)
        if has_softcap:
            entry *= tl.sum(tl.where(column == target, slope, 0.0), 0)
        tl.store(at_target + row, scale * entry)


# ------------------------------------------------------------------------------- what they share


@triton.jit
def _offset(row, stride):
    """Where a row starts, in 64 bits."""
    return row.to(tl.int64) * stride


@triton.jit
def _scores(line, column, cols, width, softcap, has_softcap: tl.constexpr, has_gap: tl.constexpr):
    """A block of the soft-capped logits, −inf behind the last column, and the softcap's slope."""
    raw = tl.load(line + column, mask=column < width, other=-float("inf")).to(tl.float32)
    z, slope = _capped(raw, softcap, has_softcap)  # pyright: ignore[reportGeneralTypeIssues]
    if has_softcap or has_gap:  # a softcap would make something finite of the −inf
        z = tl.where(column < cols, z, -float("inf"))
    return z, slope


@triton.jit
def _capped(raw, softcap, has_softcap: tl.constexpr):
    """The soft-capped logits and the derivative of the softcap, the logits and anything without."""
    z = raw
    slope = raw
    if has_softcap:
        bounded, slope = _tanh(raw * (1 / softcap))  # pyright: ignore[reportGeneralTypeIssues]
        z = softcap * bounded
    return z, slope


@triton.jit
def _tanh(x):
    """The hyperbolic tangent and its derivative, to a few units in the last place everywhere.

    The quotient of exponentials loses what is small: near 0 the polynomial of Cephes' ``tanhf``
    stands in. The derivative is ``4e / (1 + e)²``, not ``1 − tanh²``, which is 0 too early.
    """
    size = tl.abs(x)
    e = tl.exp(-2 * size)
    inverse = 1 / (1 + e)
    far = (1 - e) * inverse
    slope = 4 * e * inverse * inverse
    small = tl.where(size < 0.625, x, 0.0)
    square = small * small
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * small + small
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far)), slope


@triton.jit
def _expm1(x):
    """``exp(x) − 1`` without cancellation, for ``x`` that is at most a little above 0."""
    half, _ = _tanh(x * 0.5)  # pyright: ignore[reportGeneralTypeIssues]
    return 2 * half / (1 - half)


@triton.jit
def _finite(peak):
    """What is subtracted before the exponential: 0 where there is nothing but −inf so far."""
    return tl.where(peak == -float("inf"), 0.0, peak)
