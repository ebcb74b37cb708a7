"""The matrix products over a slab of logits, in the shapes that are fast.

What is computed is in ``slab_columns.py`` and ``slab_rows.py``; here is only how. Measured on a CPU:

* Few rows against a whole vocabulary pay for reading all of the unembedding before they begin: by
  slices of it that stay in the cache, 512 rows in float32 take a tenth less.
* A number of rows that is no multiple of 4 makes bfloat16 products up to a quarter slower.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


# A product over so few rows is cut by slices of the unembedding of this size.
_FEW_ROWS = 1024
_SLICE_BYTES = 2 * 2**20
# Where a product is cut for memory: the most rows, and the fewest that make it worthwhile.
_PART_ROWS, _MIN_PART_ROWS = 1024, 64
# How many rows of a narrow product are widened at a time: they are still in the cache when added.
_WIDENED_ROWS = 512
# Blocks of rows are filled up to a multiple of this.
_ROW_MULTIPLE = 16


def parts(size: int, step: int) -> Iterator[slice]:
    """Slices of ``step``, the last of what is left."""
    step = max(1, step)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def evenly(size: int, most: int) -> int:
    """The part of a size cut into as few as ``most`` allows, none much smaller than the others."""
    pieces = max(1, -(-size // max(1, most)))
    return -(-size // pieces)


def filled_up(rows: int, most: int) -> int:
    """How many rows a product over ``rows`` has, if there is room for ``most``."""
    return max(rows, min(most, rows + -rows % _ROW_MULTIPLE))


def gathered(hidden: Tensor, rows: Tensor, size: int) -> Tensor:
    """Some rows, in ascending order, and as many rows of zeros behind them as ``size`` asks for.

    No copy if all rows are asked for.
    """
    if len(rows) == len(hidden) == size and hidden.is_contiguous():
        return hidden
    out = hidden.new_empty(size, hidden.shape[1])
    torch.index_select(hidden, 0, rows, out=out[: len(rows)])
    out[len(rows) :] = 0
    return out


def move_up(slab: Tensor, rows: Tensor, most_bytes: int, scratch: Tensor) -> None:
    """The slab's first rows become those at ``rows``, which ascend, without a second slab."""
    columns = slab.shape[1]
    narrow = scratch.view(slab.dtype)
    if len(narrow) < columns:  # a GPU's kernels want no scratch
        narrow = slab.new_empty(max(columns, most_bytes // slab.itemsize))
    # A row is read before anything is written there: it moves up or stays.
    for part in parts(len(rows), len(narrow) // max(1, columns)):
        some = rows[part]
        moved = narrow[: len(some) * columns].view(len(some), columns)
        slab[part] = torch.index_select(slab, 0, some, out=moved)


def logits_of(x: Tensor, unembedding: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out = x @ unembedding.T + bias``."""
    step = len(unembedding)
    if len(x) <= _FEW_ROWS and not x.is_cuda:
        step = max(256, _SLICE_BYTES // max(1, unembedding.shape[1] * unembedding.itemsize))
    for part in parts(len(unembedding), step):
        weight = unembedding[part].T
        if bias is None:
            torch.mm(x, weight, out=out[:, part])
        else:
            torch.addmm(bias[part], x, weight, out=out[:, part])


def scratch_cells(a: Tensor, total: torch.dtype) -> int:
    """How much scratch, of the dtype of the total, ``add_product`` wants for products as wide as ``a``.

    It has the tiles of a slab to share, so little is asked for.
    """
    return 0 if total == a.dtype or a.is_cuda else 2 * _MIN_PART_ROWS * a.shape[1]


def add_product(
    total: Tensor, a: Tensor, b: Tensor, scratch: Tensor, unit: Tensor | None = None, *, fresh: bool
) -> None:
    """``total += unit · a @ b``, or ``total = …`` if it is fresh, summed in the dtype of ``total``.

    The unit is for float16 and a wide total. ``scratch`` is of the dtype of ``total``.
    """
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if fresh else total.addmm_(a, b)
        return
    if a.is_cuda:
        if _gpu_sums_wide(a):
            scale = 1.0 if unit is None else float(unit)
            old = 0 if fresh else 1
            torch.addmm(total, a, b, out_dtype=total.dtype, beta=old, alpha=scale, out=total)
            return
        for part in parts(len(a), _PART_ROWS):
            product = torch.mm(a[part], b).to(total.dtype)
            if unit is not None:
                product *= unit
            total[part].copy_(product) if fresh else total[part].add_(product)
        return
    # A CPU has no product of narrow matrices with a wide result; by parts it needs no second copy.
    columns = b.shape[1]
    rows = max(1, min(_WIDENED_ROWS, len(scratch) // max(1, columns * 2)))
    wide, rest = scratch[: rows * columns].view(rows, columns), scratch[rows * columns :]
    narrow = rest.view(a.dtype)
    # oneDNN copies what is transposed, and a cache is small.
    step = max(1, min(_PART_ROWS, len(narrow) // max(1, columns)))
    for part in parts(len(a), step):
        size = part.stop - part.start
        product = narrow[: size * columns].view(size, columns)
        torch.mm(a[part], b, out=product)
        for some in parts(len(product), rows):
            into = total[part][some]
            if fresh and unit is None:
                into.copy_(product[some])
                continue
            widened = wide[: len(into)].copy_(product[some])
            if unit is not None:
                widened.mul_(unit)
            into.copy_(widened) if fresh else into.add_(widened)


def _gpu_sums_wide(a: Tensor) -> bool:
    """Whether cuBLAS has a product of such matrices with a float32 result."""
    if a.dtype == torch.float16:
        return not torch.backends.cuda.matmul.allow_fp16_accumulation
    # Of bfloat16 not before Ampere, where torch emulates it.
    return a.device.type != "cuda" or torch.cuda.get_device_capability(a.device) >= (8, 0)
