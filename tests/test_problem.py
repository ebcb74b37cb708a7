"""The budget of the linear losses: what fits into it, and what it is by default."""

from __future__ import annotations

import importlib
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import OnGpu
from wmtp.cross_entropy import Objective
from wmtp.linear_cross_entropy import linear_problem
from wmtp.problem import NOT_LOCAL, Problem, RowLocal, slab_budget, targets_of
from wmtp.schedule import can_guess, can_hold, gradient_dtype, holds_better
from wmtp.slab_layout import column_slab, held_layout, most_lent, most_rows


MIB = 2**20
ROWS, VOCAB, DIM = 6, 11, 5
NEEDS = [list(needs) for needs in product((False, True), repeat=3)]


def problem(dtype: torch.dtype, slab_bytes: int) -> Problem:
    return Problem(
        torch.zeros(ROWS, DIM, dtype=dtype), torch.zeros(VOCAB, DIM, dtype=dtype), None,
        torch.zeros(ROWS, dtype=torch.long), 0.0, 0.0, 0.0, slab_bytes,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "more"), [(torch.bfloat16, 2), (torch.float32, 0)])
@pytest.mark.parametrize("needs", NEEDS)
def test_wide_gradients_are_asked_for_where_gradients_are(
    dtype: torch.dtype, more: int, needs: list[bool]
) -> None:
    size = (ROWS * DIM if needs[0] else 0) + (VOCAB * DIM if needs[1] else 0)
    assert problem(dtype, 1000).wide_excess(needs) == more * size


@pytest.mark.parametrize("needs", NEEDS)
def test_wide_gradients_are_held_where_they_and_a_row_fit(needs: list[bool]) -> None:
    excess = problem(torch.bfloat16, 1000).wide_excess(needs)
    least = excess + max(excess, 2 * VOCAB)
    dft = RowLocal("dft", 1.0)
    for budget, held in ((least, True), (least - 1, False)):
        asked = problem(torch.bfloat16, budget)
        assert asked.holds_wide(needs) is held
        narrow = torch.float32 if held else torch.bfloat16
        assert gradient_dtype(asked, needs, NOT_LOCAL) == narrow
        assert gradient_dtype(asked, needs, dft) == torch.float32


@pytest.mark.parametrize(
    ("dtype", "rows", "vocab", "dim", "expected"),
    [
        (torch.float32, 10, 1000, 8, 64 * MIB),
        (torch.float64, 10, 1000, 8, 64 * MIB),
        (torch.float32, 10, 2**25, 0, 128 * MIB),  # a row
        (torch.float32, 10, 2**15, 2**10, 128 * MIB),  # the unembedding
        (torch.bfloat16, 10, 1000, 8, 64 * MIB),
        (torch.float16, 2**10, 2**16, 2**10, 128 * MIB),
    ],
)
def test_the_default_is_a_slab_scratch_and_wide_sums(
    dtype: torch.dtype, rows: int, vocab: int, dim: int, expected: int
) -> None:
    hidden = torch.empty(rows, dim, dtype=dtype, device="meta")
    unembedding = torch.empty(vocab, dim, dtype=dtype, device="meta")
    wide_sums = 2 * (rows + vocab) * dim if dtype in (torch.bfloat16, torch.float16) else 0
    assert slab_budget(None, hidden, unembedding) == expected + -(-expected // 15) + wide_sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [32000, 50257, 128256])
@pytest.mark.parametrize("rows", [2048, 4096, 2**17])
def test_the_default_has_room_for_as_many_rows_of_logits_as_the_hidden_size(
    dtype: torch.dtype, vocab: int, rows: int
) -> None:
    """Batches are often multiples of it: one row less, and there is a slab more.

    However many rows there are, wide gradients fit too; a fourth product would be needed without.
    """
    dim, needs = 2048, [True, True, False]
    hidden = torch.empty(rows, dim, dtype=dtype, device="meta")
    unembedding = torch.empty(vocab, dim, dtype=dtype, device="meta")
    budget = slab_budget(None, hidden, unembedding)
    asked = Problem(hidden, unembedding, None, hidden[:, 0], 0.0, 0.0, 0.0, budget)
    assert asked.holds_wide(needs)
    assert most_rows(asked, needs, torch.float32) >= dim
    assert budget <= (unembedding.numel() + 2 * hidden.numel()) * 4.3
    if dtype == torch.float32:
        assert most_rows(asked, needs, torch.float32) == dim


def on_gpu(rows: int, slab_bytes: int | None) -> Problem:
    """A large problem there; the tensors have one number each."""
    one = torch.zeros((), dtype=torch.bfloat16)
    hidden, unembedding = one.expand(rows, 4096).as_subclass(OnGpu), one.expand(128256, 4096)
    budget = slab_budget(slab_bytes, hidden, unembedding)
    target = torch.zeros(rows, dtype=torch.long)
    return Problem(hidden, unembedding, None, target, 0.0, 0.0, 0.0, budget)


@pytest.mark.parametrize(
    ("rows", "least", "most"), [(8192, 1.0, 1.0), (12288, 0.75, 0.9), (16384, 0.5, 0.7)]
)
def test_the_default_of_a_gpu_holds_twice_as_many_rows_as_the_hidden_size(
    rows: int, least: float, most: float
) -> None:
    """With a copy of the hidden states and a float32 sum of them; of more rows a part."""
    asked, needs = on_gpu(rows, None), [True, True, False]
    on_cpu = slab_budget(None, asked.hidden.as_subclass(torch.Tensor), asked.unembedding)
    assert asked.slab_bytes - on_cpu == rows * 4096 * (2 + 4)
    # Of all heads, and as the losses ask for it.
    labels = torch.zeros(2, rows // 8, dtype=torch.long)
    whole = linear_problem(
        asked.hidden.view(2, rows // 8, 4, 4096), asked.unembedding, labels, None, None, -100,
        Objective(), None,
    )  # fmt: skip
    assert whole[0].slab_bytes == asked.slab_bytes
    assert least <= held_layout(asked, rows, needs).share <= most
    assert can_hold(asked, needs)
    # Sums in the forward pass are faster than to make more than a quarter anew.
    assert holds_better(asked, needs) is (least >= 0.75)


def test_on_a_gpu_no_sum_is_wide_where_none_is_needed() -> None:
    """A frozen unembedding has none, and of row-local weights the denominator is not known yet."""
    narrow, wide, both = torch.bfloat16, torch.float32, [True, True, False]
    usual, slab_bytes = on_gpu(8192, None), 2**33
    most = slab_bytes * 15 // 16 // (2 * 128256)
    assert gradient_dtype(usual, both, NOT_LOCAL) == narrow
    assert gradient_dtype(on_gpu(16384, None), both, NOT_LOCAL) == wide
    assert gradient_dtype(on_gpu(most, slab_bytes), both, NOT_LOCAL) == narrow
    assert gradient_dtype(on_gpu(most + 1, slab_bytes), both, NOT_LOCAL) == wide
    assert gradient_dtype(usual, [True, False, False], NOT_LOCAL) == wide
    assert gradient_dtype(usual, both, RowLocal("dft", 1.0)) == wide
    here = usual._replace(hidden=usual.hidden.as_subclass(torch.Tensor))
    assert gradient_dtype(here, both, NOT_LOCAL) == wide
    assert most_rows(usual, both, wide) < 8192 <= most_rows(usual, both, narrow)


@pytest.mark.parametrize("all_count", [True, False])
@pytest.mark.parametrize("rows", [4096, 6000, 8192])
@pytest.mark.parametrize("slab_bytes", [3 * 2**30 // 10, 2**30])
@pytest.mark.parametrize("needs", [[True, True, False], [True, False, False]])
def test_a_small_budget_is_kept_and_half_of_the_logits_too(
    slab_bytes: int, rows: int, all_count: bool, needs: list[bool]
) -> None:
    asked = on_gpu(rows, slab_bytes)
    layout = held_layout(asked, rows, needs, all_count)
    own = 2 * layout.own * rows * layout.columns
    beside = rows * 4096 * (4 if all_count else 4 + 2)
    assert own + beside <= slab_bytes
    # Of what the budget and the lent memory hold little is wasted.
    lent = 2 * 128256 * 4096 * (1 - min(1, layout.own * layout.columns / 128256)) if needs[1] else 0
    room = (slab_bytes - beside + lent) / (2 * rows * 128256)
    assert min(1, room) - 0.15 <= layout.share <= min(1, room) + 0.02
    assert layout.columns >= 4096
    assert layout.columns % 64 == 0
    assert all(isinstance(number, int) for number in layout)
    assert can_hold(asked, needs)
    # The gradient of hidden states alone takes two products in the forward pass, and no sums.
    share = held_layout(asked, rows, needs).share
    assert holds_better(asked, needs) is (needs[1] or share >= 0.75)


@pytest.mark.parametrize(("all_count", "missing"), [(True, 0), (True, 9), (False, 0), (False, 9)])
def test_all_logits_are_one_slab_where_they_fit_to_the_byte(all_count: bool, missing: int) -> None:
    """With a float32 sum of the hidden states, and a copy of them if some may be left out."""
    asked, needs, rows = on_gpu(100, None), [True, True, False], 100 - missing
    copied = not all_count or missing > 0
    whole = rows * 128256 * 2 + rows * 4096 * (4 + 2 * copied)
    for size, slabs in ((whole, 1), (whole - 1, 2)):
        layout = held_layout(asked._replace(slab_bytes=size), rows, needs, all_count)
        assert layout.slabs == slabs
        assert layout.share == 1.0
        assert all(isinstance(number, int) for number in layout)
    assert layout == (64128, 1, 1, 2)


@pytest.mark.parametrize("needs", [[True, True, False], [True, False, False]])
def test_slabs_are_cut_so_that_what_is_kept_is_worth_their_number(needs: list[bool]) -> None:
    """Beside a slab kept anew costs its columns, one more slab a thousand."""
    rows = 8192
    for slab_bytes in (3 * 2**28, 2**30, 3 * 2**29):
        asked = on_gpu(rows, slab_bytes)
        found = held_layout(asked, rows, needs)
        cells = (slab_bytes - rows * 4096 * 6) // 2

        def cost(columns: int, cells: int = cells, asked: Problem = asked) -> int:
            slabs = -(-128256 // columns)
            own = min(slabs, max(1, cells // (rows * columns)))
            lent = most_lent(asked, rows, columns, own) if needs[1] else 0
            return max(0, 128256 - (own + lent) * columns) + 1000 * slabs

        widest = min(2**29, slab_bytes - rows * 4096 * 6) // (2 * rows)
        assert found.columns <= widest
        for pieces in range(1, 9):
            columns = 64 * -(-widest // (64 * pieces))
            assert cost(found.columns) <= cost(columns) + 3000


@pytest.mark.parametrize("needs", [[True, True, False], [False, True, False], [True, False, False]])
def test_without_room_for_wide_sums_only_a_frozen_unembedding_needs_no_fourth_product(
    needs: list[bool],
) -> None:
    asked = on_gpu(16384, 3 * 2**25)
    assert not asked.holds_wide(needs)
    assert held_layout(asked, 16384, needs).share < 0.75
    assert holds_better(asked, needs) is needs[1]


def test_the_benchmarks_check_takes_every_route_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is compared with float64 first, at a smaller size: so that size needs all of them."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    peers: Any = importlib.import_module("peers")
    x = peers.make_inputs(peers.CHECKED_SIZES, torch.bfloat16)
    hidden, needs = x.hidden.detach().flatten(0, 2).as_subclass(OnGpu), [True, True, False]
    target = torch.zeros(len(hidden), dtype=torch.int64)
    taken: list[tuple[bool, ...]] = []
    for size in (None, *peers.CHECKED_BYTES):
        size = slab_budget(size, hidden, x.unembedding)
        asked = Problem(hidden, x.unembedding.detach(), None, target, 0.0, 0.0, 0.0, size)
        layout = held_layout(asked, len(hidden), needs)
        anew = layout.own + layout.lent < layout.slabs
        taken.append((holds_better(asked, needs), layout.lent > 0, anew, can_guess(asked, needs)))
    # All are kept; a part, in the gradient too; sums and guesses in the forward pass.
    assert taken[0][:3] == (True, False, False)
    assert taken[1][:3] == (True, True, True)
    assert taken[2] == (False, False, True, True)


def test_a_budget_for_no_slab_of_all_rows_holds_nothing() -> None:
    asked, needs = on_gpu(2**16, 2**18), [True, True, False]
    assert held_layout(asked, 2**16, needs).share == 0
    assert not can_hold(asked, needs)


@pytest.mark.parametrize("rows", [2**14, 2**16, 2**17, 2**18])
@pytest.mark.parametrize("gpu", [True, False])
def test_slabs_of_many_rows_stay_wide_enough_to_be_summed(rows: int, gpu: bool) -> None:
    """Each adds to a sum of the hidden states' size: of narrow ones that took as long as a product."""
    asked = on_gpu(rows, None)
    if not gpu:
        asked = asked._replace(hidden=asked.hidden.as_subclass(torch.Tensor))
    at_once, columns = column_slab(asked, rows, rows * 4096 * 6)
    assert columns >= (3900 if gpu else 900)
    assert 2 * at_once * columns <= (2**29 if gpu else 2**25) * 1.01
    assert at_once == rows or at_once >= (2**15 if gpu else 2**13)


def test_small_slabs_of_vocabulary_are_square() -> None:
    for cells in (50, 5000, 128256):
        asked = on_gpu(3000, None)
        asked = asked._replace(hidden=asked.hidden.as_subclass(torch.Tensor), slab_bytes=2 * cells)
        rows, columns = column_slab(asked, 3000, 0)
        assert cells * 0.6 < rows * columns <= cells
        assert 1 / 3 < rows / columns < 3


def test_a_budget_of_a_row_is_the_least() -> None:
    hidden, unembedding = torch.zeros(ROWS, DIM), torch.zeros(VOCAB, DIM)
    assert slab_budget(4 * VOCAB, hidden, unembedding) == 4 * VOCAB
    with pytest.raises(ValueError, match=f"one row of logits, {4 * VOCAB} bytes for a vocabulary"):
        slab_budget(4 * VOCAB - 1, hidden, unembedding)


def test_a_label_that_does_not_exist_is_never_no_target() -> None:
    labels = torch.tensor([0, VOCAB - 1, VOCAB, -1, -(2**63), 2**63 - 1, -100])
    target = targets_of(labels, labels != -100)
    assert target[:3].tolist() == [0, VOCAB - 1, VOCAB]
    assert bool((target[3:6] > 2**60).all())
    assert target[6] < 0
    asked = problem(torch.float32, 1000)._replace(target=target)
    counted = torch.tensor([True, False, False, False, False, False, True])
    left = asked.only(counted).target
    assert left[0] == 0
    assert left[1] < 0
    assert torch.equal(left[2:], target[2:])


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (VOCAB, f"{VOCAB}"),
        (2**61 - 1, f"{2**61 - 1}"),
        (2**62, f"{2**62}"),
        (2**63 - 1, f"{2**63 - 1}"),
        (-1, "-1"),
        (-(2**61) + 1, f"{-(2**61) + 1}"),
        (-(2**61), f"{-(2**61)} or less"),
        (-(2**63), f"{-(2**61)} or less"),
    ],
)
def test_the_first_label_that_does_not_exist_is_told(label: int, said: str) -> None:
    labels = torch.tensor([0, VOCAB - 1, -100, label, 1, VOCAB])
    asked = problem(torch.float32, 1000)._replace(target=targets_of(labels, labels != -100))
    assert f"got {said} as the target of prediction 3," in str(asked.label_outside())


def test_what_is_known_of_rows_starts_as_nothing() -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        found = problem(dtype, 1000).empty_rows()
        assert [column.dtype for column in found] == [wide] * 4 + [torch.bool, wide]
        for column in found:
            assert column.shape == (ROWS,)
            assert not column.any()
        assert len({column.data_ptr() for column in found}) == 6
