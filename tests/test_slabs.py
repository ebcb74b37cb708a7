"""The schedules over slabs: what they cost, and what they find where one slab is not all."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.strategies import integers, mask, normal, uniform
from wmtp.problem import NOT_LOCAL, Problem, RowLocal
from wmtp.slabs import backward_columns, forward_backward_rows, forward_columns


ROWS, DIM = 64, 8
NEEDS = [list(needs) for needs in product((False, True), repeat=2) if any(needs)]


def problem(
    x: Tensor, unembedding: Tensor, target: Tensor, *, slab_bytes: int = 2**20, softcap: float = 0.0
) -> Problem:
    return Problem(x, unembedding, None, target, 0.0, 0.0, softcap, slab_bytes)


def operations(work: Callable[[], Any]) -> int:
    """How many multiplications and additions the matrix products take."""

    def in_place(total: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    with counter:
        work()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("active", [0, 16, 48, 64])
@pytest.mark.parametrize("needs", NEEDS)
def test_rows_that_do_not_count_enter_no_product(
    dtype: torch.dtype, active: int, needs: list[bool]
) -> None:
    vocab = 600
    x, unembedding = normal(0, ROWS, DIM).to(dtype), normal(1, vocab, DIM).to(dtype)
    target, counts = integers(2, vocab, ROWS), torch.arange(ROWS) % ROWS < active
    unit = 2 * active * vocab * DIM
    masked = problem(x, unembedding, torch.where(counts, target, -1))
    weighted, factor = problem(x, unembedding, target), uniform(3, ROWS).float() * counts
    wanted, dft = [*needs, False], RowLocal("dft", 1.0)

    def forward_backward(asked: Problem, weighting: RowLocal) -> int:
        return operations(
            lambda: forward_backward_rows(asked, factor, weighting, False, False, wanted)
        )

    assert operations(lambda: forward_columns(masked, True)) == unit
    assert forward_backward(weighted, NOT_LOCAL) == unit * (1 + sum(needs))
    assert forward_backward(masked, dft) == unit * (1 + sum(needs))
    sums = torch.zeros(ROWS), torch.zeros(ROWS)
    backward = operations(lambda: backward_columns(weighted, factor, *sums, wanted))
    assert backward == unit * (1 + sum(needs))


def test_rows_of_factor_zero_cost_one_product_where_statistics_want_them() -> None:
    vocab = 600
    asked = problem(normal(0, ROWS, DIM), normal(1, vocab, DIM), integers(2, vocab, ROWS))
    factor = (torch.arange(ROWS) < 16).double()
    needs = [True, True, False]
    cost = operations(lambda: forward_backward_rows(asked, factor, NOT_LOCAL, True, True, needs))
    assert cost == 2 * vocab * DIM * (3 * 16 + 48)


# ------------------------------------------------------------------------- the most probable token


def first_of_the_best(logits: Tensor) -> Tensor:
    return (logits == logits.amax(1, keepdim=True)).long().argmax(1)


def correct(asked: Problem, *, columns: bool) -> Tensor:
    if columns:
        return forward_columns(asked, True).correct
    factor = torch.ones(len(asked.hidden), dtype=asked.wide)
    return forward_backward_rows(asked, factor, NOT_LOCAL, True, True, [True, False, False])[
        0
    ].correct


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("slab_rows", [1, 7, 1000])
def test_of_tied_tokens_the_first_is_the_prediction(slab_rows: int, columns: bool) -> None:
    vocab = 600
    # Small whole numbers: products are exact, and ties are everywhere.
    x, unembedding = integers(0, 5, ROWS, 3) - 2.0, integers(1, 5, vocab, 3) - 2.0
    best = first_of_the_best(x @ unembedding.T)
    last = (vocab - 1) - first_of_the_best((x @ unembedding.T).flip(1))
    target = torch.where(mask(2, 0.5, ROWS), best, last)
    asked = problem(x, unembedding, target, slab_bytes=slab_rows * vocab * 4)
    expected = target == best
    assert 0 < expected.sum() < ROWS
    assert torch.equal(correct(asked, columns=columns), expected)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_the_best_of_two_slabs_is_told_in_float32(first: bool, columns: bool) -> None:
    vocab, low, high = 600, 2.0, 2.015625
    # The cap brings the two nearer to each other than bfloat16 can say.
    assert torch.tensor([low, high]).tanh().bfloat16().unique().numel() == 1
    unembedding = torch.zeros(vocab, 1).bfloat16()
    unembedding[3], unembedding[590] = (high, low) if first else (low, high)
    asked = problem(
        torch.ones(1, 1).bfloat16(), unembedding, torch.tensor([3 if first else 590]),
        softcap=1.0, slab_bytes=vocab * 2,
    )  # fmt: skip
    assert bool(correct(asked, columns=columns).all())
