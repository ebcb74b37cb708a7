"""The products of the linear losses, however they are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import OnGpu, addmm_of_a_gpu
from tests.strategies import SEEDS, normal
from wmtp import products


NARROW = [torch.bfloat16, torch.float16]


def of_integers(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers: their products and sums are exact in every dtype here."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


@given(
    rows=st.integers(1, 40), vocab=st.integers(1, 700), biased=st.booleans(), seed=SEEDS,
    few=st.sampled_from((0, 20, 40)),
)  # fmt: skip
def test_logits_do_not_depend_on_the_slices(
    rows: int, vocab: int, biased: bool, seed: int, few: int
) -> None:
    x, unembedding = of_integers((rows, 3), seed, torch.float64), normal(seed + 1, vocab, 3)
    bias = normal(seed + 2, vocab) if biased else None
    # A slab is wider than the part that is asked for.
    slab = torch.full((rows, vocab + 2), 7.0, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_SLICE_BYTES", 1)
        patch.setattr(products, "_FEW_ROWS", few)
        products.logits_of(x, unembedding, bias, slab[:, 1:-1])
    wanted = x @ unembedding.T + (0 if bias is None else bias)
    torch.testing.assert_close(slab[:, 1:-1], wanted)
    assert bool((slab[:, [0, -1]] == 7).all())


def test_few_rows_are_multiplied_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    mm = torch.mm

    def noted(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        widths.append(b.shape[1])
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", noted)
    unembedding = torch.ones(1000, 2048)
    for rows in (products._FEW_ROWS, products._FEW_ROWS + 1):
        products.logits_of(torch.ones(rows, 2048), unembedding, None, torch.empty(rows, 1000))
    assert widths == [256, 256, 256, 232, 1000]


@pytest.mark.parametrize("dtype", NARROW)
@given(
    rows=st.integers(1, 600), inner=st.integers(1, 5), columns=st.integers(0, 4), seed=SEEDS,
    fresh=st.booleans(), scaled=st.booleans(), spare=st.integers(0, 3000),
)  # fmt: skip
def test_narrow_products_are_summed_wide(
    dtype: torch.dtype, rows: int, inner: int, columns: int, seed: int, fresh: bool, scaled: bool,
    spare: int,
) -> None:  # fmt: skip
    a, b = of_integers((rows, inner), seed, dtype), of_integers((inner, columns), seed + 1, dtype)
    total = normal(seed + 2, rows, columns).float()
    unit = torch.tensor(0.25) if scaled else None
    scratch = torch.empty(products.scratch_cells(b, torch.float32) + spare)
    product = a.float() @ b.float() * (0.25 if scaled else 1)
    wanted = product if fresh else total + product
    products.add_product(total, a, b, scratch, unit, fresh=fresh)
    assert torch.equal(total, wanted)


@pytest.mark.parametrize("fresh", [True, False])
def test_sums_in_the_dtype_of_the_products_need_no_scratch(fresh: bool) -> None:
    a, b = normal(0, 4, 3), normal(1, 3, 2)
    total = normal(2, 4, 2)
    wanted = a @ b + (0 if fresh else total)
    assert products.scratch_cells(b, torch.float64) == 0
    products.add_product(total, a, b, total.new_empty(0), fresh=fresh)
    torch.testing.assert_close(total, wanted)


def drawn_on_a_gpu(
    dtype: torch.dtype, fresh: bool, scaled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Two matrices, a total, a unit if there is one, and what is to become of the total."""
    a, b = of_integers((5, 3), 0, dtype), of_integers((3, 4), 1, dtype)
    total = torch.full((5, 4), torch.nan) if fresh else normal(2, 5, 4).float()
    unit = torch.tensor(0.25) if scaled else None
    wanted = a.float() @ b.float() * (0.25 if scaled else 1) + (0 if fresh else total)
    return a.as_subclass(OnGpu), b, total, unit, wanted


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_gpu_sums_narrow_products_wide_in_one_operation(
    dtype: torch.dtype, fresh: bool, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, total, unit, wanted = drawn_on_a_gpu(dtype, fresh, scaled)
    assert products.scratch_cells(a, torch.float32) == 0
    monkeypatch.setattr(torch, "addmm", addmm_of_a_gpu)
    monkeypatch.setattr(torch, "mm", None)
    products.add_product(total, a, b, total.new_empty(0), unit, fresh=fresh)
    assert torch.equal(total, wanted)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_gpu_without_wide_sums_widens_products_by_parts(
    dtype: torch.dtype, fresh: bool, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 where cuBLAS may add up in it, bfloat16 before Ampere."""
    a, b, total, unit, wanted = drawn_on_a_gpu(dtype, fresh, scaled)
    monkeypatch.setattr(products, "_PART_ROWS", 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    if dtype == torch.bfloat16:
        a = a.as_subclass(OnACard)
    try:
        torch.backends.cuda.matmul.allow_fp16_accumulation = dtype == torch.float16
        products.add_product(total, a, b, total.new_empty(0), unit, fresh=fresh)
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert torch.equal(total, wanted)


@pytest.mark.parametrize(("capability", "wide"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_is_summed_wide_from_ampere_on(
    capability: tuple[int, int], wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert products._gpu_sums_wide(torch.zeros(2).bfloat16().as_subclass(OnACard)) is wide
    assert products._gpu_sums_wide(torch.zeros(2).half().as_subclass(OnACard))


class OnACard(OnGpu):
    device = torch.device("cuda")  # pyright: ignore[reportAssignmentType]


@given(rows=st.integers(0, 100), room=st.integers(0, 100))
def test_blocks_are_filled_up_as_far_as_there_is_room(rows: int, room: int) -> None:
    filled = products.filled_up(rows, room)
    assert rows <= filled <= max(rows, room)
    if room >= rows + 15:
        assert filled % 16 == 0
    assert filled < rows + 16


@given(size=st.integers(0, 100), most=st.integers(0, 30))
def test_parts_are_even_and_cover_everything(size: int, most: int) -> None:
    step = products.evenly(size, most)
    found = list(products.parts(size, step))
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(size))
    assert step <= max(1, most)
    assert len(found) == -(-size // max(1, most))


def test_gathered_rows_have_zeros_behind_them() -> None:
    hidden = normal(0, 5, 2)
    found = products.gathered(hidden, torch.tensor([3, 0]), 4)
    assert torch.equal(found, torch.stack((hidden[3], hidden[0], hidden[0] * 0, hidden[0] * 0)))
