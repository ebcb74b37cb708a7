"""When rows of a slab are multiplied at once, and when what is left of them is folded in later.

What comes out is the same either way, but for what would overflow: so the choice is asked by itself.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.strategies import normal
from wmtp import slab_softmax
from wmtp.problem import Rows
from wmtp.slab_softmax import applied_if_large, row_scale_over_columns


ROWS = 4
# What may be left, times what a row counts and one more than the largest of the hidden states.
MOST = 2.0**100


def of(value: float) -> Tensor:
    return torch.full((ROWS,), value)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("count", "fits"), [(1.0, True), (1.5, False)])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_left_waits_unless_something_could_overflow(
    sign: int, count: float, fits: bool, which: int
) -> None:
    """The largest of the hidden states, of either sign, is 3; two factors are to be multiplied with."""
    x, slab, left = torch.zeros(ROWS, 2), torch.ones(ROWS, 5), of(2.0)
    x[1, 1] = 3 * sign
    factors = [of(0.0), of(0.0)]
    factors[which][2] = count * MOST / 4 / 2
    found = applied_if_large(left, slab, x, *factors)
    assert (found is left) == fits
    assert bool((slab == (1 if fits else 2)).all())


def test_where_nothing_is_left_nothing_waits() -> None:
    slab = torch.ones(ROWS, 5)
    assert applied_if_large(None, slab, torch.ones(ROWS, 2), of(math.inf)) is None
    assert bool((slab == 1).all())
    # No hidden states are none that could overflow.
    left = of(1.0)
    assert applied_if_large(left, slab, torch.ones(0, 2), of(1.0)) is left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_columns_the_factor_waits_where_it_can(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slab_softmax, "_rounds_once", lambda _: True)
    x, base, log_sum = normal(0, ROWS, 2).to(dtype), of(1.0), of(2.0)
    found = row_scale_over_columns(x, base, log_sum, of(0.5), 0.0, 0.0)
    assert found is not None
    torch.testing.assert_close(found, of(0.5), rtol=1e-5, atol=0.0)
    grown = row_scale_over_columns(x, base, log_sum, of(0.5), 0.0, 0.1)
    assert grown is not None
    torch.testing.assert_close(grown, of(0.5 * (1 + 2 * 0.1 * 3)), rtol=1e-5, atol=0.0)
    # Rows that are added to, products that would overflow, exponentials that are not scaled.
    assert row_scale_over_columns(x, base, log_sum, of(0.5), 0.1, 0.0) is None
    assert row_scale_over_columns(x, base, log_sum, of(MOST), 0.0, 0.0) is None
    assert row_scale_over_columns(x, of(5000.0), log_sum, of(0.5), 0.0, 0.0) is None
    assert row_scale_over_columns(x.half(), base, log_sum, of(0.5), 0.0, 0.0) is None
    assert row_scale_over_columns(x.double(), base.double(), log_sum, of(0.5), 0.0, 0.0) is None


@pytest.mark.parametrize("once", [True, False])
def test_exponentials_are_scaled_where_that_rounds_once(
    once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slab_softmax, "_rounds_once", lambda _: once)
    assert slab_softmax._scales(of(4096.0)) == once
    assert slab_softmax._scales(of(-4096.0)) == once
    assert slab_softmax._scales(of(0.0)[:0]) == once
    assert not slab_softmax._scales(of(1.0).double())
    for far in (4097.0, -4097.0, math.inf, -math.inf, math.nan):
        base = of(1.0)
        base[2] = far
        assert not slab_softmax._scales(base)


def test_only_float16_rows_that_z_loss_has_made_large_are_divided() -> None:
    """By a power of two that leaves them no larger than they were."""

    def shrunk(dtype: torch.dtype, z_loss: float, base: float, log_sum: float) -> Tensor | None:
        slab.copy_(torch.ones(ROWS, 5)).to(dtype)
        rows = Rows(*(of(x) for x in (0.0, 0.0, base, log_sum, 0.0, 1.0)))
        return slab_softmax._shrunk(slab if dtype == torch.float16 else slab.float(), z_loss, rows)

    slab = torch.ones(ROWS, 5).half()
    assert shrunk(torch.float32, 1.0, 5.0, 5.0) is None
    assert shrunk(torch.float16, 0.0, 5.0, 5.0) is None
    # 1 + 2 · 0.5 · (base + log_sum): 2 is let through, 2.5 and 11 are not.
    assert shrunk(torch.float16, 0.5, 0.5, 0.5) is None
    assert bool((slab == 1).all())
    for base, log_sum, power in ((1.0, 0.5, 4.0), (5.0, 5.0, 16.0), (-6.0, -6.0, 16.0)):
        found = shrunk(torch.float16, 0.5, base, log_sum)
        assert found is not None
        assert bool((found == power).all())
        assert bool((slab == 1 / power).all())


def test_whether_a_scaled_sum_rounds_once_does_not_depend_on_defaults() -> None:
    ask = slab_softmax._rounds_once.__wrapped__
    known, before = ask(torch.device("cpu")), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert ask(torch.device("cpu")) == known
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        assert ask(torch.device("cpu")) == known
