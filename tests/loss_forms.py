"""Every form of the weighted loss, and of the oracle's, behind one call.

"held" is the linear form where the logits are kept for the backward pass, as on a GPU. Where tests keep
the graph, to ask again, these are left alone and made anew; "used up" is the same as if the graph was not
kept, so that the gradient is written over them; and "lent" the same with a budget for an eighth of them, so
that others lie in the memory of the unembedding's gradient. A test that asks twice takes ``KEPT_FORMS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.helpers import (
    leaf,
)
from tests.strategies import (
    Batch,
)
from wmtp import (
    linear_weighted_mtp_loss,
    linear_weighted_mtp_loss_and_stats,
    schedule,
    slab_columns,
    slab_layout,
    weighted_mtp_loss,
    weighted_mtp_loss_and_stats,
)
from wmtp.problem import Problem
from wmtp.slab_layout import HeldLayout


WEIGHTS = st.sampled_from(["prediction", "token", "none"])
NORMALIZERS = st.sampled_from(["weights", "tokens", 7.5, 3])
HEAD_WEIGHTS = st.sampled_from(["given", None])
KEPT_FORMS = pytest.mark.parametrize("form", ["dense", "linear", "held"])
FORMS = pytest.mark.parametrize("form", ["dense", "linear", "held", "used up", "lent"])


def head_weights_of(case: Batch, kind: str | None) -> list[float] | None:
    return None if kind is None else [1.0 / (h + 1) for h in range(case.heads)]


def leaves_of(case: Batch, form: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What the loss is differentiated by: logits, or hidden states, unembedding and bias."""
    if form == "dense":
        return [leaf(case.logits(dtype))]
    return [leaf(x) for x in (case.hidden(dtype), case.unembedding(dtype), case.bias(dtype))]


def apply(
    form: str,
    tensors: Sequence[Tensor],
    labels: Tensor,
    weights: Tensor | Callable[..., Tensor] | None = None,
    *,
    stats: bool = False,
    **options: Any,
) -> Any:
    if form == "dense":
        function = weighted_mtp_loss_and_stats if stats else weighted_mtp_loss
        return function(tensors[0], labels, weights, **options)
    linear = linear_weighted_mtp_loss_and_stats if stats else linear_weighted_mtp_loss
    with held_logits(form):
        return linear(tensors[0], tensors[1], labels, weights, bias=tensors[2], **options)


@contextmanager
def held_logits(form: str = "held") -> Iterator[None]:
    """Where logits of a linear loss are kept if a gradient is wanted: all, or what a small budget holds."""
    with ExitStack() as stack:
        if form != "linear":
            layout = layout_within_little if form == "lent" else layout_of_all
            stack.enter_context(mock.patch.object(slab_columns, "held_layout", layout))
            stack.enter_context(
                mock.patch.multiple(
                    schedule,
                    can_hold=lambda _, needs: any(needs),
                    holds_better=lambda *_: True,
                )
            )
        yield


def layout_of_all(asked: Problem, rows: int, needs: Sequence[bool], all_count: bool) -> HeldLayout:
    return HeldLayout(asked.vocab, own=1, lent=0, slabs=1)


def layout_within_little(
    asked: Problem, rows: int, needs: Sequence[bool], all_count: bool
) -> HeldLayout:
    """Memory for an eighth, and whatever the unembedding's gradient lends."""
    columns = max(1, asked.vocab // 8)
    slabs = -(-asked.vocab // columns)
    lent = slab_layout.most_lent(asked, rows, columns, own=1) if needs[1] and rows else 0
    return HeldLayout(columns, own=1, lent=lent, slabs=slabs)


def known(
    form: str, tensors: Sequence[Tensor], labels: Tensor, weights: Tensor | None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The oracle's loss and gradients, in the order of the leaves and then the weights."""
    if form == "dense":
        loss, found = oracle.weighted_mtp_loss(tensors[0], labels, weights, **options)
    else:
        loss, found = oracle.linear_weighted_mtp_loss(
            tensors[0], tensors[1], labels, weights, bias=tensors[2], **options
        )
    return loss, list(found.values())


def valid_of(case: Batch) -> Tensor:
    return oracle.valid_of(case.labels, case.heads, offsets=case.offsets)


def used_tokens(case: Batch) -> Tensor:
    """Which entries of a `[batch seq]` weight any prediction looks at."""
    valid, used = valid_of(case), torch.zeros(case.batch, case.seq).bool()
    steps = oracle.offset_list(case.offsets, case.heads)
    for b, t, h in oracle.places(case.shape):
        if valid[b, t, h]:
            used[b, t + steps[h]] = True
    return used
