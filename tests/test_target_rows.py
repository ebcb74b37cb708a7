"""The target's part of both gradients: the kernels and the torch operations against plain loops."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.strategies import integers, normal, uniform
from wmtp import target_rows


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Narrower than a tile, as wide, wider, odd.
DIMS = [1, 64, 100, 300]
ROWS, VOCAB = 29, 11

on_linux = sys.platform.startswith("linux")
kernels = importlib.import_module("wmtp.triton_target_rows") if on_linux else target_rows
MODULES = pytest.mark.parametrize("module", [target_rows, kernels] if on_linux else [target_rows])


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_rows, "_PART_ROWS", 8)
    monkeypatch.setattr(target_rows, "_NARROW_PART_ROWS", 8)
    # What is asked for here is what is called.
    monkeypatch.setattr(target_rows, "_kernels", lambda _: None)
    if on_linux:
        monkeypatch.setattr(kernels, "_LARGEST_BLOCK", 64)


def drawn(dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    given = {
        "x": normal(0, ROWS, dim).to(dtype),
        "weight": normal(1, VOCAB, dim).to(dtype),
        "wanted": integers(2, VOCAB - 2, ROWS),  # two that nobody wants
        "scale": uniform(3, ROWS).float(),
        "at_target": -uniform(4, ROWS).float(),
        "rows": torch.randperm(2 * ROWS, generator=torch.Generator().manual_seed(5))[:ROWS],
    }
    given["wanted"][:9] = 3  # more than are added together
    return {name: tensor.to(DEVICE) for name, tensor in given.items()}


@MODULES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_targets_are_added_where_they_belong(
    module: Any, dtype: torch.dtype, wide: bool, dim: int
) -> None:
    given = drawn(dim, dtype)
    out = given["weight"].float() if wide else given["weight"].clone()
    right = out.double()
    for row, target in enumerate(given["wanted"].tolist()):
        right[target] += given["at_target"][row].double() * given["x"][row].double()
    module.add_targets(out, given["wanted"], given["x"], given["at_target"])
    # By parts a narrow row is rounded more than once; and there are sums of a dozen in float32.
    rounding = (4 if module is target_rows or out.dtype == torch.float32 else 1) * ROUNDING[
        out.dtype
    ]
    torch.testing.assert_close(out.double(), right, rtol=rounding, atol=rounding * 0.5)
    assert torch.equal(out[VOCAB - 2 :], given["weight"][VOCAB - 2 :].to(out.dtype))


@MODULES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_hidden_rows_are_written_where_they_belong(
    module: Any, dtype: torch.dtype, wide: bool, dim: int
) -> None:
    given = drawn(dim, dtype)
    product = normal(6, ROWS + 3, dim).to(torch.float32 if wide else dtype).to(DEVICE)
    out = torch.full((2 * ROWS, dim), torch.nan, dtype=dtype, device=DEVICE)
    module.write_hidden(
        out, given["rows"], product, given["scale"], given["weight"], given["wanted"], given["at_target"]
    )  # fmt: skip
    right = torch.full_like(out, torch.nan, dtype=torch.float64)
    for row, place in enumerate(given["rows"].tolist()):
        own = given["weight"][given["wanted"][row]].double() * given["at_target"][row].double()
        right[place] = given["scale"][row].double() * product[row].double() + own
    torch.testing.assert_close(
        out.double(), right, rtol=ROUNDING[dtype], atol=ROUNDING[dtype], equal_nan=True
    )


@MODULES
def test_rows_may_lie_apart(module: Any) -> None:
    given = drawn(100, torch.float32)
    apart = {name: torch.stack([given[name]] * 2, 1)[:, 0] for name in ("x", "weight")}
    turned = {name: given[name].T.contiguous().T for name in ("x", "weight")}
    found = []
    for strided in ({}, apart, turned):
        asked = given | strided
        of_hidden, of_weight = torch.zeros_like(given["x"]), torch.zeros_like(given["weight"])
        module.write_hidden(
            of_hidden, torch.arange(ROWS, device=DEVICE), given["x"], asked["scale"], asked["weight"],
            asked["wanted"], asked["at_target"],
        )  # fmt: skip
        module.add_targets(of_weight, asked["wanted"], asked["x"], asked["at_target"])
        found.append((of_hidden, of_weight))
    for one in found[1:]:
        # On a GPU the operations of torch add up what repeats in any order.
        for a, b in zip(one, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=2**-20, atol=2**-20)


@MODULES
def test_places_may_lie_apart(module: Any) -> None:
    given = drawn(100, torch.float32)
    every = torch.arange(4 * ROWS, device=DEVICE)
    found = []
    for rows in (every[1::4], every[1::4].contiguous()):
        out = torch.zeros(4 * ROWS, 100, device=DEVICE)
        module.write_hidden(
            out, rows, given["x"], given["scale"], given["weight"], given["wanted"], given["at_target"]
        )  # fmt: skip
        found.append(out)
    assert torch.equal(*found)


@pytest.mark.skipif(not on_linux, reason="Triton is published for Linux only")
@pytest.mark.parametrize("stray", [5, 7, -1, -3, 2**33])
def test_a_target_that_does_not_exist_is_nobodys_row(stray: int) -> None:
    """Neither is another's memory read, nor written."""
    x, numbers = torch.ones(2, 4, device=DEVICE), torch.ones(2, device=DEVICE)
    wanted = torch.tensor([stray, 2], device=DEVICE)
    whole = torch.zeros(12, 4, device=DEVICE)
    kernels.add_targets(whole[3:8], wanted, x, numbers)
    expected = torch.zeros_like(whole)
    expected[5] = 1
    assert torch.equal(whole, expected)
    out = torch.zeros(2, 4, device=DEVICE)
    rows = torch.arange(2, device=DEVICE)
    kernels.write_hidden(out, rows, x, numbers, whole[3:8], wanted, numbers)
    assert bool(out[0].isnan().all())
    assert torch.equal(out[1], torch.full_like(out[1], 2.0))


@MODULES
@pytest.mark.parametrize(("rows", "dim"), [(0, 4), (3, 0)])
def test_nothing_is_nothing(module: Any, rows: int, dim: int) -> None:
    x, numbers = torch.ones(rows, dim, device=DEVICE), torch.ones(rows, device=DEVICE)
    wanted, out = (
        torch.zeros(rows, dtype=torch.int64, device=DEVICE),
        torch.ones(3, dim, device=DEVICE),
    )
    module.add_targets(out, wanted, x, numbers)
    module.write_hidden(out, wanted.cumsum(0), x, numbers, out.clone(), wanted, numbers)
    assert torch.equal(out, torch.ones_like(out))


def test_what_a_target_gets_is_summed_in_order() -> None:
    """To the last bit what a loop over the rows adds up in float32."""
    given = drawn(300, torch.float32)
    right = torch.zeros(VOCAB, 300, device=DEVICE)
    for row, target in enumerate(given["wanted"].tolist()):
        # As a float32 multiplication and addition, or both in one; which it is, the compiler decides.
        right[target] += given["at_target"][row] * given["x"][row]
    out = torch.zeros_like(right)
    kernels.add_targets(out, given["wanted"], given["x"], given["at_target"])
    again = torch.zeros_like(right)
    kernels.add_targets(again, given["wanted"], given["x"], given["at_target"])
    assert torch.equal(out, again)
    torch.testing.assert_close(out, right, rtol=0, atol=0 if DEVICE == "cpu" else 2**-21)
