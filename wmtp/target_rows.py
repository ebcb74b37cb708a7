"""The target's part of both gradients: one row each, added to what the products have made.

A row of logits counts its target apart from the others (``slab_softmax.py``), in the wide dtype. For the
hidden state that is a row of the unembedding, for the unembedding the hidden state, each times the
gradient at the target. ``triton_target_rows.py`` has the same two as GPU kernels.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wmtp._kernels import kernels_for
from wmtp.products import parts


# How many rows are widened at a time: they stay in the cache, and take little beside a slab.
_PART_ROWS = 256
# And where sums are narrow, so that each is rounded as seldom as that.
_NARROW_PART_ROWS = 1024


def write_hidden(
    out: Tensor,
    rows: Tensor,
    of_x: Tensor,
    scale: Tensor,
    weight: Tensor,
    wanted: Tensor,
    at_target: Tensor,
) -> None:
    """``out[rows] = scale · of_x + at_target · weight[wanted]``, rounded once."""
    kernels = _kernels(out)
    if kernels is not None:
        kernels.write_hidden(out, rows, of_x, scale, weight, wanted, at_target)
        return
    for part in parts(len(rows), _PART_ROWS):
        whole = scaled(weight.index_select(0, wanted[part]), at_target[part])
        whole += scaled(of_x[part], scale[part])
        out[rows[part]] = whole.to(out.dtype)


def add_targets(of_weight: Tensor, wanted: Tensor, x: Tensor, at_target: Tensor) -> None:
    """Add ``at_target · x`` to the targets' rows, each rounded once, or narrow ones once for each part."""
    kernels = _kernels(of_weight)
    if kernels is not None:
        kernels.add_targets(of_weight, wanted, x, at_target)
        return
    wide = at_target.dtype
    if of_weight.dtype == wide:
        for part in parts(len(wanted), _PART_ROWS):
            of_weight.index_add_(0, wanted[part], scaled(x[part], at_target[part]))
        return
    order = wanted.argsort()
    unique: Any = torch.unique  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    for some in parts(len(order), _NARROW_PART_ROWS):
        part = order[some]
        rows, place = unique(wanted[part], return_inverse=True)
        total = of_weight[rows].to(wide)
        total.index_add_(0, place, scaled(x[part], at_target[part]))
        of_weight[rows] = total.to(of_weight.dtype)


def scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """``rows · factor`` in the dtype of the factor. A product of two dtypes takes twice as long."""
    column = factor.unsqueeze(1)
    return rows * column if rows.dtype == factor.dtype else rows.to(factor.dtype).mul_(column)


def _kernels(tensor: Tensor) -> ModuleType | None:
    return kernels_for(tensor, "triton_target_rows")
