"""The target's part of both gradients as Triton kernels: one launch each, and no sum is atomic.

Drop-ins for the functions of the same names in ``target_rows.py``, for float32, bfloat16 and float16 on
CUDA. In torch operations each would be a few dozen launches, between which a GPU idles, or, all rows
at once, as many copies of the hidden states; and sums whose order changes from run to run.

Importing this file imports Triton, as ``triton_softmax.py`` does, and what is said there of
``TRITON_INTERPRET`` holds here.
"""

# Triton describes neither what its decorator leaves of a function nor what its operations return.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
import triton.language as tl  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
from torch import Tensor


# How many numbers of a row a program takes: eight per thread, a vector load of a narrow dtype.
_LARGEST_BLOCK = 1024
_SMALLEST_BLOCK = 64
# How many rows are read before the first of them is added.
_TOGETHER = 4


def write_hidden(
    out: Tensor,
    rows: Tensor,
    of_x: Tensor,
    scale: Tensor,
    weight: Tensor,
    wanted: Tensor,
    at_target: Tensor,
) -> None:
    """``out[rows] = scale · of_x + at_target · weight[wanted]``, in float32, rounded once.

    Args:
        out: ``[any dim]``, contiguous.
        rows: ``[rows]`` int64, all different.
        of_x: ``[at least rows, dim]``, contiguous.
        scale: ``[rows]`` float32.
        weight: ``[vocab dim]``, however it lies.
        wanted: ``[rows]`` int64. Where it is outside ``[0, vocab)`` NaN is written, and nothing read.
        at_target: ``[rows]`` float32.
    """
    size, dim = len(rows), out.shape[1]
    if not size or not dim:
        return
    block, warps = _block(dim)
    with torch.cuda.device_of(out):
        _write_hidden[(size, triton.cdiv(dim, block))](
            out,
            rows.contiguous(),
            of_x,
            scale.contiguous(),
            weight,
            weight.stride(0),
            weight.stride(1),
            len(weight),
            wanted.contiguous(),
            at_target.contiguous(),
            dim,
            block=block,
            num_warps=warps,  # pyright: ignore[reportCallIssue]
        )


def add_targets(of_weight: Tensor, wanted: Tensor, x: Tensor, at_target: Tensor) -> None:
    """``of_weight[wanted] += at_target · x``, what one row gets summed in float32 and rounded once.

    Args:
        of_weight: ``[vocab dim]``, contiguous.
        wanted: ``[rows]`` int64; what repeats is added up, in the order of the rows, and what is outside
            ``[0, vocab)`` nowhere.
        x: ``[rows dim]``; rows may lie apart.
        at_target: ``[rows]`` float32.
    """
    size, dim = len(wanted), of_weight.shape[1]
    if not size or not dim:
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    target, order = torch.sort(wanted, stable=True)
    block, warps = _block(dim)
    with torch.cuda.device_of(of_weight):
        _add_targets[(size, triton.cdiv(dim, block))](
            of_weight,
            target,
            order,
            x,
            x.stride(0),
            at_target.contiguous(),
            len(of_weight),
            size,
            dim,
            together=_TOGETHER,
            block=block,
            num_warps=warps,  # pyright: ignore[reportCallIssue]
        )


def _block(dim: int) -> tuple[int, int]:
    """How many numbers a program takes, and with how many warps."""
    block = min(max(int(triton.next_power_of_2(dim)), _SMALLEST_BLOCK), _LARGEST_BLOCK)
    return block, max(1, block // 256)


@triton.jit
def _write_hidden(
    out,
    rows,
    of_x,
    scale,
    weight,
    stride,
    step,
    vocab,
    wanted,
    at_target,
    dim,
    block: tl.constexpr,
):
    """One program per row and block of its numbers."""
    row = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < dim
    to = tl.load(rows + row) * dim
    target = tl.load(wanted + row)
    # A width of nothing where there is no such row.
    width = tl.where((target >= 0) & (target < vocab), dim, 0)
    cells = weight + target * stride + column.to(tl.int64) * step
    product = tl.load(of_x + row.to(tl.int64) * dim + column, mask=inside, other=0.0).to(tl.float32)
    own = tl.load(cells, mask=column < width, other=float("nan")).to(tl.float32)
    whole = own * tl.load(at_target + row) + product * tl.load(scale + row)
    tl.store(out + to + column, whole, mask=inside)


@triton.jit
def _add_targets(
    of_weight,
    target,
    order,
    x,
    stride,
    at_target,
    vocab,
    size,
    dim,
    together: tl.constexpr,
    block: tl.constexpr,
):
    """One program per row, of those that are sorted by their targets, and block of its numbers.

    The first row of a target adds up all of them; the programs of the others have nothing to do.
    """
    first = tl.program_id(0)
    own = tl.load(target + first)
    before = tl.load(target + first - 1, mask=first > 0, other=-1)
    is_first = (own != before) & (own >= 0) & (own < vocab)
    if is_first:  # pragma: no branch (the interpreter's copy ends elsewhere)
        column = tl.program_id(1) * block + tl.arange(0, block)
        inside = column < dim
        place = of_weight + own * dim + column
        total = tl.zeros([block], tl.float32)
        done = 0
        more = 1
        while more > 0:
            for ahead in tl.static_range(together):  # pyright: ignore[reportGeneralTypeIssues]
                # Of what is behind the last of them nothing is read.
                at = first + done + ahead
                same = (at < size) & (tl.load(target + at, mask=at < size, other=-1) == own)
                row = tl.load(order + at, mask=same, other=0)
                count = tl.load(at_target + row, mask=same, other=0.0)
                width = tl.where(same, dim, 0)
                some = tl.load(x + row * stride + column, mask=column < width, other=0.0)
                total += count * some.to(tl.float32)
                more = same.to(tl.int32)
            done += together
        old = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, old + total, mask=inside)
