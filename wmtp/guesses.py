"""What a ``partial`` of ``rho1_weights`` says before it is called: what it looks at, and what it will keep.

The linear losses ask it early, as the cross entropy comes in, which predictions it would keep, and make
gradients for these in the same pass: see ``slab_rows.py``.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from wmtp.methods import rho1_weights
from wmtp.scopes import ProcessGroup, Scope, Scoped
from wmtp.targets import Offsets, resolve_offsets


def check_rho1_offsets(weights: object, offsets: Offsets | None, heads: int) -> None:
    """Refuse a ``partial`` of ``rho1_weights`` that looks elsewhere than the loss it is given to."""
    if offsets is None or not isinstance(weights, partial) or weights.func is not rho1_weights:
        return
    reference, given = weights.keywords.get("reference_nll"), weights.keywords.get("offsets")
    aligned = isinstance(reference, Tensor) and reference.dim() == 3
    steps = resolve_offsets(offsets)
    if not aligned and resolve_offsets(heads if given is None else given) != steps:
        raise ValueError(
            f"offsets of rho1_weights must be those of the loss, {steps}, got {given}; "
            "give them to the partial too"
        )


def asks_ranks(weights: object) -> bool:
    """Whether these may be a selection over ranks, whose ``early_rho1`` asks the others."""
    return isinstance(weights, partial) and weights.keywords.get("group") is not None


def early_rho1(
    weights: object, valid: Tensor, dtype: torch.dtype
) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor] | None:
    """What a guess needs of a ``partial`` of ``rho1_weights``: its selection, and what a kept entry weighs.

    The selection is the ``partial`` itself without ``group``: ranks guess at different times, so a guess
    must not wait for a collective. Joins one collective here, if there is a group.

    ``None`` where nothing can be guessed: for any other function, which may be called only once, with the
    complete cross entropy; for ``mode="softmax"``, whose weights depend on all scores; and for arguments
    that the call itself will refuse.
    """
    if not isinstance(weights, partial) or weights.func is not rho1_weights or weights.args:
        return None
    asked = inspect.unwrap(rho1_weights).__kwdefaults__ | weights.keywords
    keep, scope = asked["keep"], asked["scope"]
    if asked["mode"] != "top_k" or scope not in get_args(Scope):
        return None
    if not isinstance(keep, int | float) or not 0 < keep <= 1:
        return None
    kept = _weight_if_kept(valid, keep, scope, asked["group"], dtype)
    return partial(rho1_weights, **(weights.keywords | {"group": None})), kept


def _weight_if_kept(
    valid: Tensor, keep: float, scope: Scope, group: ProcessGroup | None, dtype: torch.dtype
) -> Tensor:
    """What ``top_k_weights`` gives each entry that it keeps, which the scores do not change."""
    scoped = Scoped(valid, scope, group)
    count = scoped.total(scoped.split(valid).long()).double()
    # 0/0 where nothing is valid, which nobody sees.
    weight = (count / (count * keep).ceil()).to(dtype)
    return scoped.join(torch.where(scoped.split(valid), weight, 0))
